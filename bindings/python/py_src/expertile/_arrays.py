"""The few things that differ between torch tensors and NumPy arrays: allocating, strides, contiguous targets."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

from . import _native
from ._errors import ArgumentMemoryError, ArgumentTypeError, ArgumentValueError

Array = Any
"""A torch tensor or a NumPy array."""


def is_tensor(x: Any) -> bool:
    """Whether `x` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def require_array(argument: str, x: Any, dimensions: int) -> tuple[int, ...]:
    """The shape of `x`, if it is an array of that many dimensions."""
    try:
        shape, _ = x.shape, x.dtype
    except AttributeError:
        raise not_a(argument, x, "a torch tensor or a NumPy array") from None
    if len(shape) != dimensions:
        raise wrong_shape(argument, shape, f"{dimensions} dimensions")
    return tuple(shape)


def not_a(argument: str, x: Any, expected: str) -> ArgumentTypeError:
    """The error of something of another type."""
    return ArgumentTypeError(argument, f" is a {type(x).__qualname__}", x, expected)


def wrong_shape(argument: str, shape: Any, expected: str) -> ArgumentValueError:
    """The error of an array of another shape."""
    return ArgumentValueError(argument, f" has shape {list(shape)}", list(shape), expected)


def wrong_dtype(argument: str, x: Array, expected: str) -> ArgumentTypeError:
    """The error of an array of another dtype."""
    return ArgumentTypeError(argument, f" has dtype {x.dtype}", x.dtype, expected)


def require_shape(argument: str, x: Any, shape: tuple[int, ...]) -> None:
    """Fails unless `x` is an array of that shape."""
    if require_array(argument, x, len(shape)) != shape:
        raise wrong_shape(argument, x.shape, str(list(shape)))


def empty(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
    """An array of `like`'s kind (and device), of a dtype given by name or taken from an array."""
    if is_tensor(like):
        torch = sys.modules["torch"]
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return empty_tensor("a new tensor", shape, dtype, like.device)
    import numpy

    require_memory("a new array", shape, numpy.dtype(dtype).itemsize)
    return numpy.empty(shape, dtype=dtype)


def empty_tensor(argument: str, shape: tuple[int, ...], dtype: Any, device: Any) -> Array:
    """``torch.empty``; on the CPU with Python's own MemoryError for what the machine does not have."""
    torch = sys.modules["torch"]
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    elements = math.prod(shape)
    if min(shape, default=0) < 0 or elements * dtype.itemsize > sys.maxsize:
        raise wrong_shape(argument, shape, "one that memory can be addressed for")
    require_memory(argument, shape, dtype.itemsize)
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        # What else torch would refuse has been checked.
        bytes = elements * dtype.itemsize
        found = f" of shape {list(shape)} needs {bytes} bytes"
        raise ArgumentMemoryError(argument, found, bytes, "less") from error


def require_memory(argument: str, shape: tuple[int, ...], itemsize: int) -> None:
    """Raises MemoryError for an array that the machine has no memory for: some promise it, and kill the process
    later."""
    bytes = math.prod(shape) * itemsize
    if bytes > _ASK_FROM_BYTES:
        _native.require_memory(argument, bytes)


_ASK_FROM_BYTES = 1 << 28


def is_traced() -> bool:
    """Whether torch records a trace, which would keep numbers that are computed here as constants."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    try:
        key = torch._C._TorchDispatchModeKey.PROXY
        return bool(torch._C._is_tracing()) or torch._C._get_dispatch_mode(key) is not None
    except AttributeError:
        return False


def dtype_name(x: Array) -> str:
    """``float32``, ``uint8``, ...: as torch and NumPy both spell it."""
    return str(x.dtype).removeprefix("torch.")


def strides(x: Array) -> tuple[int, ...]:
    """Strides in elements."""
    return x.stride() if is_tensor(x) else tuple(stride // x.itemsize for stride in x.strides)


def is_contiguous(x: Array) -> bool:
    """Whether all elements stand next to each other, row by row."""
    return x.is_contiguous() if is_tensor(x) else x.flags.c_contiguous


def contiguous(x: Array) -> Array:
    """`x` itself if it is contiguous, else a contiguous copy of it."""
    if is_tensor(x):
        return x.contiguous()
    import numpy

    return numpy.ascontiguousarray(x)


def on_gpu(x: Array) -> bool:
    """Whether `x` is a tensor in the memory of a CUDA device."""
    return getattr(x, "is_cuda", False)


def without_empty_slots(inv_perm: Array, topk_ids: Array, expert_map: Array | None) -> Array:
    """`inv_perm` with -1 wherever `topk_ids` names no local expert; tensors only, and nothing waits."""
    torch = sys.modules["torch"]
    live = topk_ids >= 0
    if expert_map is not None:
        known = live & (topk_ids < expert_map.shape[0])
        live = known & (expert_map[torch.where(known, topk_ids, 0).long()] >= 0)
    return torch.where(live, inv_perm, -1)


def matrix_over(flat: Array, shape: tuple[int, int], strides: tuple[int, int]) -> Array:
    """The matrix of this shape and these strides over a flat array that is long enough."""
    if is_tensor(flat):
        return flat.as_strided(shape, strides)
    import numpy

    of_bytes = tuple(stride * flat.itemsize for stride in strides)
    return numpy.lib.stride_tricks.as_strided(flat, shape, of_bytes)


def words_of(values: Array) -> Array:
    """Bytes ``[M, G]`` as int32 ``[M, ceil(G / 4)]``: byte j of word p is that of column ``4 p + j``, zero past G."""
    rows, columns = values.shape
    words = empty((rows, (columns + 3) // 4), "int32", values)
    words[...] = 0
    words.view(values.dtype)[:, :columns] = values
    return words


def as_float32(x: Array) -> Array:
    """`x` as float32: itself, or an exact copy of a narrower float."""
    if dtype_name(x) in ("bfloat16", "float16"):
        require_memory("topk_weights", tuple(x.shape), 4)  # Of an expanded array, the copy is not.
        return x.float() if is_tensor(x) else x.astype("float32")
    return x


def assign(target: Array, values: Array) -> None:
    """``target[...] = values``, also where one is a tensor and the other is not."""
    if not is_tensor(target):
        target[...] = values.numpy() if is_tensor(values) else values
        return
    torch = sys.modules["torch"]
    values = values if is_tensor(values) else torch.from_numpy(values)
    # torch refuses to assign to tensors of inference elsewhere; this package writes them wherever it is called.
    with torch.inference_mode() if target.is_inference() else contextlib.nullcontext():
        target[...] = values
