"""Two of DeepGEMM's functions, argument for argument, on CUDA tensors of a Hopper and on CPU tensors.

>>> from expertile import deep_gemm
>>> deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), d, m_indices)  # doctest: +SKIP

Arguments are those of DeepGEMM 2.8 as vLLM 0.33 has it. What cannot be honoured, and would change the numbers, raises
ValueError or TypeError; what chooses among DeepGEMM's kernels is taken, and changes nothing: `compiled_dims`,
`disable_ue8m0_cast` (float32 scales are never rounded here), `ensure_zero_padding` (which DeepGEMM does not look at on
a Hopper either: rows of padding are not written).

``m_indices`` may name experts in any order, in segments of any length. With ``use_psum_layout=True``, segments start on
multiples of :func:`get_mk_alignment_for_contiguous_layout`, 128 unless set otherwise.

On a GPU a call compiles what its shape needs the first time (:func:`prepare` does it before), and holds no tensor. On
the CPU, weights are packed by the first call that has them. The packed copy goes with the next call after they are
gone, and weights that have been written since are packed anew. Writes that torch does not count (through ``.data``, or
from NumPy) need a :func:`forget`. Weights made under ``torch.inference_mode``, of which torch counts no writes, are
packed by each call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import _native
from ._arrays import not_a
from ._errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from .deep_gemm_utils import _alignment
from .torch.layout import matrix, require_tensor

__all__ = [
    "check",
    "forget",
    "get_mk_alignment_for_contiguous_layout",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "prepare",
    "set_mk_alignment_for_contiguous_layout",
]

_PREPARED_ROWS = 8192
"""What a first call compiles for, if it has no more rows itself."""


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    grouped_layout: Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    epilogue: Any = None,
) -> None:
    """``d[r] = b[expert of r] @ a[r]`` of float8_e4m3fn values and their float32 scales.

    a: ``[M, K]`` and scales ``[M, ceil(K / 128)]``, of any strides. b: ``[E, N, K]`` and scales ``[E, ceil(N / 128),
    ceil(K / 128)]``. d: bfloat16 ``[M, N]``. grouped_layout: int32, the expert of each of the M rows, -1 on padding;
    with `use_psum_layout` the end of each of the E experts' rows.
    """
    del compiled_dims, disable_ue8m0_cast, ensure_zero_padding
    _require_recipe(recipe, recipe_a, recipe_b)
    rows, scale = _pair("a", a)
    weights, weight_scale = _pair("b", b)
    for name, x in (("a[0]", rows), ("b[0]", weights)):
        if x.dtype != torch.float8_e4m3fn:
            raise ArgumentTypeError(name, f" has dtype {x.dtype}", x.dtype, "float8_e4m3fn")
    _multiply(
        (rows, scale),
        (weights, weight_scale),
        d,
        grouped_layout,
        use_psum_layout,
        expected_m_for_psum_layout,
        epilogue,
        {"rows": "a[0]", "scale": "a[1]", "weights": "b[0]", "weight_scale": "b[1]"},
    )


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    epilogue: Any = None,
) -> None:
    """The same of bfloat16 values: a ``[M, K]``, b ``[E, N, K]``."""
    del compiled_dims, ensure_zero_padding
    for name, x in (("a", a), ("b", b)):
        require_tensor(name, x)
        if x.dtype != torch.bfloat16:
            raise ArgumentTypeError(name, f" has dtype {x.dtype}", x.dtype, "bfloat16")
    _multiply(
        (a, None),
        (b, None),
        d,
        grouped_layout,
        use_psum_layout,
        expected_m_for_psum_layout,
        epilogue,
        {"rows": "a", "weights": "b"},
    )


def get_mk_alignment_for_contiguous_layout() -> int:
    """What the segments of a psum are aligned to: DeepGEMM's own, if it is loaded, or vLLM's while it is patched."""
    return _alignment.source.get()


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Sets it. Raises ValueError unless it is at least 1."""
    _alignment.set_mk_alignment_for_contiguous_layout(new_value)


def prepare(b: Tensor | tuple[Tensor, Tensor], max_rows: int) -> None:
    """Compiles whatever calls with such weights of up to `max_rows` rows can launch; on the CPU, packs the weights."""
    weights, weight_scale = b if isinstance(b, tuple) else (b, None)
    require_tensor("b", weights)
    with _named({"weights": "b", "weight_scale": "b[1]"}):
        if weights.is_cuda:
            _on_gpu(weights).prepare(max_rows)
        else:
            _packed.of(weights, weight_scale)


def check() -> None:
    """Waits for the current stream of each device, and raises ValueError for what layouts said wrong since the last
    time: ids that are no expert's, ends out of order or past the last row. On the CPU a call says so itself."""
    with _named({"psum": "grouped_layout", "m_indices": "grouped_layout"}):
        for gemm in list(_gpu_gemms.values()):
            gemm.check()


def forget() -> None:
    """Gives packed copies of weights on the CPU back; a call that needs one packs anew."""
    _packed.clear()


def _pair(name: str, pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise not_a(name, pair, "a pair of values and scales")
    for index, x in enumerate(pair):
        require_tensor(f"{name}[{index}]", x)
    return pair[0], pair[1]


def _require_recipe(recipe: Any, recipe_a: Any, recipe_b: Any) -> None:
    """Fails for scales of other blocks than 1 x 128 and 128 x 128."""
    if (recipe_a is None) != (recipe_b is None):
        name, other = ("recipe_a", "recipe_b") if recipe_a is None else ("recipe_b", "recipe_a")
        raise ArgumentValueError(name, " is None beside", None, "both or neither", other)
    if recipe is not None and recipe_a is not None:
        raise ArgumentValueError("recipe", f" is {recipe} beside", recipe, "None", "recipe_a")
    for name, value, expected in (
        ("recipe", recipe, (1, 128, 128)),
        ("recipe_a", recipe_a, (1, 128)),
        ("recipe_b", recipe_b, (128, 128)),
    ):
        if value is not None and (not isinstance(value, (tuple, list)) or tuple(value) != expected):
            raise ArgumentValueError(name, f" is {value}", value, f"{expected}")


def _multiply(
    a: tuple[Tensor, Tensor | None],
    b: tuple[Tensor, Tensor | None],
    d: Tensor,
    grouped_layout: Tensor,
    use_psum_layout: bool,
    expected_m: int | None,
    epilogue: Any,
    names: dict[str, str],
) -> None:
    if epilogue is not None:
        raise ArgumentValueError("epilogue", f" is {epilogue}", epilogue, "None")
    if expected_m is not None and not use_psum_layout:
        expected = "None without use_psum_layout"
        raise ArgumentValueError("expected_m_for_psum_layout", f" is {expected_m}", expected_m, expected)
    require_tensor("d", d)
    require_tensor("grouped_layout", grouped_layout)
    psum, m_indices = (grouped_layout, None) if use_psum_layout else (None, grouped_layout)
    alignment = get_mk_alignment_for_contiguous_layout()
    names = names | {"out": "d", "psum": "grouped_layout", "m_indices": "grouped_layout"}
    with _named(names):
        # Rows of a wider matrix: read and written through a copy.
        rows = a[0].contiguous() if _is_wide(a[0]) else a[0]
        out = torch.empty(d.shape, dtype=d.dtype, device=d.device).copy_(d) if _is_wide(d) else d
        m_sum, _ = matrix("rows", rows)
        if rows.is_cuda:
            gemm = _on_gpu(b[0], m_sum)
            experts = gemm.shape[0]
            if expected_m is None:
                expected_rows = gemm.expected_rows(m_sum, experts, alignment)
            else:
                expected_rows = min(max(expected_m * experts, 1), m_sum)
            gemm.run(rows, a[1], b[0].detach(), _as_rows(b[1]), psum, m_indices, alignment, expected_rows, out)
        else:
            _packed.of(b[0], b[1]).run(rows, a[1], psum, m_indices, alignment, out)
        if out is not d:
            d.copy_(out)


def _is_wide(x: Tensor) -> bool:
    """Whether a matrix has its rows further apart than they are long."""
    return x.dim() == 2 and not x.is_contiguous() and x.stride(1) == 1


def _as_rows(scale: Tensor | None) -> Tensor | None:
    """Block scales row by row; DeepGEMM also takes them column by column."""
    if scale is None or scale.dim() != 3 or scale.is_contiguous():
        return scale
    return scale.detach().contiguous()


@contextlib.contextmanager
def _named(names: dict[str, str]) -> Iterator[None]:
    """Arguments in errors by the names that callers know them by."""
    try:
        yield
    except ArgumentError as error:
        error.rename(names)
        raise


_gpu_gemms: dict[tuple[Any, ...], _native.CudaGemm] = {}
"""What has been prepared, by device, type and shape of the weights; never dropped, since graphs launch its kernels."""


def _on_gpu(weights: Tensor, rows: int = 0) -> _native.CudaGemm:
    """What calls with such weights take, prepared for at least so many rows."""
    key = (weights.device, weights.dtype, tuple(weights.shape))
    gemm = _gpu_gemms.get(key)
    if gemm is None:
        gemm = _gpu_gemms.setdefault(key, _native.CudaGemm(weights))
    if rows > gemm.max_rows:
        gemm.prepare(max(_PREPARED_ROWS, 1 << (rows - 1).bit_length()))
    return gemm


class _Packed:
    """Packed copies of weights that are alive.

    A tensor is known by its storage, where in it it stands, and how often it has been written. A weak reference keeps
    the storage's own address from being given to another storage, so that an entry is never taken for other weights,
    and says when the weights are gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[tuple[Any, ...], tuple[list[StorageWeakRef], _native.Gemm]] = {}

    def of(self, weights: Tensor, scale: Tensor | None) -> _native.Gemm:
        require_tensor("weights", weights)
        tensors = [weights] if scale is None else [weights, scale]
        if any(x.is_inference() or type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
            return _pack(weights, scale)
        with self._lock:
            self._drop_dead()
            # Counted before the weights are read: a write meanwhile makes the entry one of the past.
            key = tuple(_identity(x) for x in tensors)
            known = self._entries.get(key)
        if known is not None:
            return known[1]
        gemm = _pack(weights, scale)
        with self._lock:
            self._drop_others(key)
            self._entries[key] = ([StorageWeakRef(x.untyped_storage()) for x in tensors], gemm)
        return gemm

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        with self._lock:
            self._drop_dead()
            return len(self._entries)

    def _drop_dead(self) -> None:
        dead = [key for key, (storages, _) in self._entries.items() if any(x.expired() for x in storages)]
        for key in dead:
            del self._entries[key]

    def _drop_others(self, key: tuple[Any, ...]) -> None:
        """Drops what the same weights were before they were written."""
        place = [identity[:-1] for identity in key]
        for known in [known for known in self._entries if [identity[:-1] for identity in known] == place]:
            del self._entries[known]


def _pack(weights: Tensor, scale: Tensor | None) -> _native.Gemm:
    return _native.Gemm(weights.detach(), _as_rows(scale))


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), x._version


_packed = _Packed()
