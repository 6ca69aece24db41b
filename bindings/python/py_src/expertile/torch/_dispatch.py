"""The operators: their schemas and kernels, and the way to them, through torch's dispatcher or past it."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch import is_grad_enabled as _is_grad_enabled
from torch.autograd import profiler as _profiler
from torch.compiler import is_dynamo_compiling

from .. import _arrays, _native
from .._errors import ArgumentError, ArgumentTypeError, ArgumentValueError

layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Layers that are alive, by number: operators take numbers and tensors."""

gemms: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The same of Gemms."""

_library = torch.library.Library("expertile", "DEF")

_WHERE = "Tensor topk_ids, Tensor? expert_map, int local_experts, int alignment, int m_sum"
_SCHEMAS = {
    "build_layout": f"({_WHERE}, Tensor(a!) layout) -> ()",
    "permute_rows": f"(Tensor x, {_WHERE}, bool zero_padding, Tensor(a!) out, Tensor(b!) layout) -> ()",
    "permute_quantized": (
        f"(Tensor x, Tensor x_scales, {_WHERE}, int group, str scale_layout, bool zero_padding, "
        "Tensor(a!) out, Tensor(b!) scales, Tensor(c!) layout) -> ()"
    ),
    "quantize_permute": (
        f"(Tensor x, Tensor? topk_weights, {_WHERE}, int group, str scale_layout, bool power_of_two, "
        "bool zero_padding, Tensor(a!) out, Tensor(b!) scales, Tensor(c!) layout) -> ()"
    ),
    "layer": (
        "(int layer, Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor? expert_map, "
        "Tensor(a!)? workspace, Tensor(b!) out) -> ()"
    ),
    "layer_expanded": (
        "(int layer, Tensor rows, Tensor? scale, Tensor psum, int alignment, int? expected_rows, Tensor(a!) out) -> ()"
    ),
    "gemm": (
        "(int gemm, Tensor rows, Tensor? scale, Tensor? psum, Tensor? m_indices, int alignment, int? expected_rows, "
        "Tensor(a!) out) -> ()"
    ),
    "unpermute": (
        "(Tensor rows, Tensor inv_perm, Tensor? topk_ids, Tensor? expert_map, Tensor? topk_weights, Tensor(a!) out)"
        " -> ()"
    ),
}


_untyped: Any = _native  # The schemas have said what the arguments are.


def _build_layout(*arguments: Any) -> None:
    _untyped.build_layout(*arguments)


def _permute_rows(x: Tensor, *arguments: Any) -> None:
    *where, zero_padding, out, layout = arguments
    _untyped.permute_rows(x, *where, None, zero_padding, out, layout)


def _permute_quantized(x: Tensor, x_scales: Tensor, *arguments: Any) -> None:
    *where, group, scale_layout, zero_padding, out, scales, layout = arguments
    _untyped.permute_quantized(x, x_scales, *where, None, group, scale_layout, zero_padding, out, scales, layout)


def _quantize_permute(*arguments: Any) -> None:
    _untyped.quantize_permute(*arguments)


def _unpermute(
    rows: Tensor,
    inv_perm: Tensor,
    topk_ids: Tensor | None,
    expert_map: Tensor | None,
    topk_weights: Tensor | None,
    out: Tensor,
) -> None:
    if topk_ids is not None and rows.is_cuda:
        inv_perm = _arrays.without_empty_slots(inv_perm, topk_ids, expert_map)
        topk_ids = expert_map = None
    _untyped.unpermute(rows, inv_perm, topk_ids, expert_map, topk_weights, out)


def _alive_layer(layer: int) -> Any:
    alive = layers.get(layer)
    if alive is None:
        raise ArgumentValueError("layer", f" is {layer}", layer, "the number of a Layer that is alive")
    return alive


def _layer(
    layer: int,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_map: Tensor | None,
    workspace: Tensor | None,
    out: Tensor,
) -> None:
    alive = _alive_layer(layer)
    native = alive._native
    if workspace is None and not alive._on_gpu:
        tokens, topk = topk_ids.shape
        size = (native.workspace_bytes(tokens, topk),)
        workspace = _arrays.empty_tensor("workspace", size, torch.uint8, hidden_states.device)
    native.run(hidden_states, topk_ids, topk_weights, expert_map, workspace, out)


def _layer_expanded(
    layer: int,
    rows: Tensor,
    scale: Tensor | None,
    psum: Tensor,
    alignment: int,
    expected_rows: int | None,
    out: Tensor,
) -> None:
    alive = _alive_layer(layer)
    if alive._on_gpu:
        alive._native.run_expanded(rows, scale, psum, alignment, expected_rows, out)
    else:
        alive._native.run_expanded(rows, scale, psum, alignment, out)


def _gemm(
    gemm: int,
    rows: Tensor,
    scale: Tensor | None,
    psum: Tensor | None,
    m_indices: Tensor | None,
    alignment: int,
    expected_rows: int | None,
    out: Tensor,
) -> None:
    alive = gemms.get(gemm)
    if alive is None:
        raise ArgumentValueError("gemm", f" is {gemm}", gemm, "the number of a Gemm that is alive")
    if alive._on_gpu:
        own = alive._weights, alive._weight_scale
        alive._native.run(rows, scale, *own, psum, m_indices, alignment, expected_rows, out)
    else:
        alive._native.run(rows, scale, psum, m_indices, alignment, out)


_KERNELS: dict[str, tuple[Any, ...]] = {
    "build_layout": (_build_layout, "CPU", "CUDA"),
    "gemm": (_gemm, "CPU", "CUDA"),
    "layer": (_layer, "CPU", "CUDA"),
    "layer_expanded": (_layer_expanded, "CPU", "CUDA"),
    "permute_quantized": (_permute_quantized, "CPU", "CUDA"),
    "permute_rows": (_permute_rows, "CPU", "CUDA"),
    "quantize_permute": (_quantize_permute, "CPU", "CUDA"),
    "unpermute": (_unpermute, "CPU", "CUDA"),
}


def _without_values(name: str, *arguments: Any) -> None:
    """Operators only write their arguments: without values there is nothing to do, unless one has some."""
    tensors = [(index, x) for index, x in enumerate(arguments) if isinstance(x, Tensor)]
    missing = [index for index, x in tensors if x.is_meta]
    if missing and len(missing) < len(tensors):
        argument = _ops[name]._schema.arguments[missing[0]].name
        raise ArgumentValueError(argument, " is on meta", "meta", " or ".join(_KERNELS[name][1:]))


def _register(name: str) -> None:
    kernel, *keys = _KERNELS[name]
    _library.define(name + _SCHEMAS[name])
    for key in keys:
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"expertile::{name}", functools.partial(_without_values, name), lib=_library)


for _name in _SCHEMAS:
    _register(_name)

# Looked up once: a call by attribute finds its overload anew each time.
_ops = {name: getattr(torch.ops.expertile, name).default for name in _SCHEMAS}


def call(name: str, *arguments: Any) -> None:
    """Calls an operator; what torch's dispatcher refuses is an error of this package's kind."""
    if is_dynamo_compiling():
        _ops[name](*arguments)
        return
    try:
        _ops[name](*arguments)
    except ArgumentError:
        raise
    except RuntimeError as error:
        raise _refusal(name, arguments) or error from None


_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "bool": (bool,),
    "int": (int, torch.SymInt),
    "str": (str,),
}
"""Python's types for those of a schema."""


def _refusal(name: str, arguments: tuple[Any, ...]) -> Exception | None:
    """Which argument torch cannot have taken, by the operator's schema."""
    devices = _KERNELS[name][1:]
    for argument, x in zip(_ops[name]._schema.arguments, arguments, strict=False):
        optional = isinstance(argument.type, torch.OptionalType)
        kind = str(argument.type.getElementType() if optional else argument.type)
        if x is None and optional:
            continue
        if not isinstance(x, _TYPES[kind]):
            return _arrays.not_a(argument.name, x, f"{kind} or None" if optional else kind)
        if not isinstance(x, Tensor):
            continue
        if x.layout is not torch.strided:
            found = f" is a tensor of layout {x.layout}"
            return ArgumentTypeError(argument.name, found, x.layout, "a dense one")
        if x.device.type not in [device.lower() for device in devices]:
            return ArgumentValueError(argument.name, f" is on {x.device}", x.device, " or ".join(devices))
    return None


# An operator's way through torch's dispatcher takes longer than the call. It is for those who want to see the call:
# torch's compilers, its modes and transforms, its profiler, and autograd, which warns that nothing is differentiable.

try:
    from torch._C import (
        _are_functorch_transforms_active,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
except ImportError:
    _ALWAYS_DISPATCH = True
else:
    _ALWAYS_DISPATCH = False

try:
    # What torch's compiled code reads memory by: half the time of as_strided, which goes through the dispatcher.
    from torch._C._dynamo.guards import _reinterpret_tensor as reinterpret_tensor  # type: ignore[attr-defined]
except ImportError:

    def reinterpret_tensor(x: Tensor, shape: Any, strides: Any, offset: int) -> Tensor:
        """The memory of `x` with another shape and other strides."""
        return x.as_strided(shape, strides, x.storage_offset() + offset)


def unwatched(x: Any, weights: Any = None) -> bool:
    """Whether a call may go past the dispatcher: on a CUDA tensor that is what it seems, while nobody watches."""
    if is_dynamo_compiling() or _ALWAYS_DISPATCH or type(x) is not Tensor or not x.is_cuda:
        return False
    if (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _is_tracing()
        or _profiler._is_profiler_enabled
    ):
        return False
    if weights is not None and type(weights) is not Tensor:
        return False
    return not (_is_grad_enabled() and (x.requires_grad or (weights is not None and weights.requires_grad)))
