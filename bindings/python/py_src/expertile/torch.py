"""What vLLM's ``deep_gemm_utils`` lacks, as torch operators.

Every function here allocates what is not handed to it and calls one operator of ``torch.ops.expertile``, which writes the
caller's memory: operators can be compiled (``torch.compile(fullgraph=True)``) and, with buffers handed in, called without
making a tensor. On CUDA tensors the call goes past torch's dispatcher, unless a compiler, a mode, a transform, a profiler
or autograd is there to see it. Nothing here is differentiable.

Shapes: ``M`` tokens, ``H`` values each, ``topk`` slots, ``E`` local experts, ``A`` alignment, ``M_sum`` rows.

- ``topk_ids``: int32 or int64 ``[M, topk]``, any strides; a negative id is an empty slot.
- ``expert_map``: int32 ``[G]``, global id to local, negative for an expert of another rank. Without it ids are local.
- ``m_sum``: rows of the permuted buffer, a multiple of the alignment; by default the tight bound, the most that any
  routing can need (with ``distinct=False``: even if a token names an expert twice).
- ``scale_layout``: ``"row_major"`` (float32 ``[M_sum, H / group]``), ``"mn_major"`` (the same with strides
  ``(1, round_up(M_sum, 4))``, as TMA loads want it) or ``"packed_ue8m0"`` (int32 ``[M_sum, ceil(H / group / 4)]``, strides
  as before, byte ``j`` of word ``p`` the exponent of group ``4 p + j``).
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

try:
    import torch
except ImportError as error:
    raise ImportError(
        "expertile.torch needs torch, which is not installed (pip install torch); "
        "planning and expertile.deep_gemm_utils work without it"
    ) from error

from torch import Tensor
from torch import is_grad_enabled as _is_grad_enabled
from torch.autograd import profiler as _profiler
from torch.compiler import is_dynamo_compiling as _is_dynamo_compiling

from . import _arrays, _native
from .deep_gemm_utils import check

__all__ = [
    "Layer",
    "Layout",
    "Permuted",
    "Sizes",
    "build_layout",
    "check",
    "permute_quantized",
    "permute_rows",
    "quantize_permute",
    "sizes",
    "unpermute",
]


class Layout:
    """Where each row goes: int32 lists, each a view of `space` that is made when it is asked for."""

    __slots__ = ("__weakref__", "alignment", "local_experts", "m_sum", "space", "tokens", "topk")

    def __init__(self, space: Tensor, tokens: int, topk: int, local_experts: int, alignment: int, m_sum: int) -> None:
        self.space = space
        """`Sizes.layout_len` elements: all of the lists, then what a GPU's GEMM walks."""
        self.tokens = tokens
        """``M``."""
        self.topk = topk
        """Slots per token."""
        self.local_experts = local_experts
        """``E``."""
        self.alignment = alignment
        """What each expert's rows are padded to."""
        self.m_sum = m_sum
        """Rows of the permuted buffer."""

    @property
    def expert_num_tokens(self) -> Tensor:
        """``[E]``: live rows per local expert."""
        return self.space[: self.local_experts]

    @property
    def expert_start(self) -> Tensor:
        """``[E]``: first row of each expert, a multiple of the alignment."""
        return self.space[self.local_experts : 2 * self.local_experts]

    @property
    def psum(self) -> Tensor:
        """``[E]``: ``expert_start + expert_num_tokens``; an empty expert stores its start."""
        return self.space[2 * self.local_experts : 3 * self.local_experts]

    @property
    def m_indices(self) -> Tensor:
        """``[M_sum]``: local expert of each row, -1 on padding."""
        return self.space[3 * self.local_experts : 3 * self.local_experts + self.m_sum]

    @property
    def inv_perm(self) -> Tensor:
        """``[M, topk]``: row of each slot, -1 for an empty or non-local one."""
        start = 3 * self.local_experts + self.m_sum
        return self.space[start : start + self.tokens * self.topk].view(self.tokens, self.topk)

    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five lists, in the order above."""
        return self.expert_num_tokens, self.expert_start, self.psum, self.m_indices, self.inv_perm


class Permuted(NamedTuple):
    """Rows in their place."""

    rows: Tensor
    """``[M_sum, H]``."""
    scales: Tensor | None
    """In the layout asked for; None for rows that have none."""
    layout: Layout


class Sizes(NamedTuple):
    """What a call with these numbers writes."""

    m_sum: int
    """Rows of ``out``."""
    layout_len: int
    """int32 elements of ``layout``."""
    scale_words: int
    """4-byte elements of ``scales``."""


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
        f"(Tensor x, Tensor? topk_weights, {_WHERE}, int group, str scale_layout, bool power_of_two, bool zero_padding, "
        "Tensor(a!) out, Tensor(b!) scales, Tensor(c!) layout) -> ()"
    ),
    "layer": (
        "(int layer, Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor? expert_map, "
        "Tensor(a!)? workspace, Tensor(b!) out) -> ()"
    ),
    "unpermute": (
        "(Tensor rows, Tensor inv_perm, Tensor? topk_ids, Tensor? expert_map, Tensor? topk_weights, Tensor(a!) out) -> ()"
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


def _layer(
    layer: int,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_map: Tensor | None,
    workspace: Tensor | None,
    out: Tensor,
) -> None:
    alive = Layer._alive.get(layer)
    if alive is None:
        raise ValueError(f"layer is {layer}, expected the number of a Layer that is alive")
    native = alive._native
    if workspace is None:
        tokens, topk = topk_ids.shape
        size = (native.workspace_bytes(tokens, topk),)
        workspace = _arrays.empty_tensor("workspace", size, torch.uint8, hidden_states.device)
    native.run(hidden_states, topk_ids, topk_weights, expert_map, workspace, out)


_KERNELS: dict[str, tuple[Any, ...]] = {
    "build_layout": (_build_layout, "CPU", "CUDA"),
    "layer": (_layer, "CPU"),
    "permute_quantized": (_permute_quantized, "CPU", "CUDA"),
    "permute_rows": (_permute_rows, "CPU", "CUDA"),
    "quantize_permute": (_quantize_permute, "CPU", "CUDA"),
    "unpermute": (_unpermute, "CPU", "CUDA"),
}


def _register(name: str) -> None:
    kernel, *keys = _KERNELS[name]
    _library.define(name + _SCHEMAS[name])
    for key in keys:
        _library.impl(name, kernel, key)
    # Operators only write their arguments: without values there is nothing to do.
    torch.library.register_fake(f"expertile::{name}", lambda *_: None, lib=_library)


for _name in _SCHEMAS:
    _register(_name)

# Looked up once: a call by attribute finds its overload anew each time.
_ops = {name: getattr(torch.ops.expertile, name).default for name in _SCHEMAS}


def _call(name: str, *arguments: Any) -> None:
    """Calls an operator; what torch's dispatcher refuses is an error of this package's kind."""
    if _is_dynamo_compiling():
        _ops[name](*arguments)
        return
    try:
        _ops[name](*arguments)
    except RuntimeError as error:
        raise _refusal(name, arguments, error) from None


def _refusal(name: str, arguments: tuple[Any, ...], error: RuntimeError) -> Exception:
    wrong = re.search(
        r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'", str(error)
    )
    if wrong:
        return TypeError(f"{wrong[2]} is a {wrong[3]}, expected {wrong[1]}")
    if isinstance(error, NotImplementedError):
        for argument, x in zip(_ops[name]._schema.arguments, arguments, strict=False):
            if not isinstance(x, Tensor):
                continue
            if x.layout is not torch.strided:
                return TypeError(f"{argument.name} is a tensor of layout {x.layout}, expected a dense one")
            if x.device.type not in [key.lower() for key in _KERNELS[name][1:]]:
                return ValueError(f"{argument.name} is on {x.device}, expected {' or '.join(_KERNELS[name][1:])}")
    return error


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
    from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]
except ImportError:

    def _reinterpret_tensor(x: Tensor, shape: Any, strides: Any, offset: int) -> Tensor:
        return x.as_strided(shape, strides, x.storage_offset() + offset)


def _unwatched(x: Any, weights: Any = None) -> bool:
    """Whether a call may go past the dispatcher: on a CUDA tensor that is what it seems, while nobody watches."""
    if _is_dynamo_compiling() or _ALWAYS_DISPATCH or type(x) is not Tensor or not x.is_cuda:
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


def sizes(
    tokens: int,
    topk: int,
    local_experts: int,
    hidden: int,
    *,
    alignment: int = 128,
    m_sum: int | None = None,
    distinct: bool = True,
    group: int = 128,
    scale_layout: str = "mn_major",
) -> Sizes:
    """Sizes of the buffers that `quantize_permute` and its siblings write, for callers who own them.

    Raises ValueError for numbers that do not go together.
    """
    m_sum = _m_sum(tokens, topk, local_experts, alignment, m_sum, distinct)
    return Sizes(
        m_sum,
        _native.layout_len(tokens, topk, local_experts, alignment, m_sum),
        _native.scale_words(m_sum, hidden, scale_layout, group),
    )


def build_layout(
    topk_ids: Tensor,
    local_experts: int,
    *,
    expert_map: Tensor | None = None,
    alignment: int = 128,
    m_sum: int | None = None,
    distinct: bool = True,
    layout: Tensor | None = None,
) -> Layout:
    """The layout alone. `layout`: int32 of `Sizes.layout_len` elements, written in place.

    Raises ValueError or TypeError for what does not fit.
    """
    if _unwatched(topk_ids):
        return Layout(
            *_native.build_layout(topk_ids, expert_map, local_experts, alignment, m_sum, layout, distinct=distinct)
        )
    tokens, topk = _matrix("topk_ids", topk_ids)
    m_sum = _m_sum(tokens, topk, local_experts, alignment, m_sum, distinct)
    space = _space(topk_ids, tokens, topk, local_experts, alignment, m_sum, layout)
    _call("build_layout", topk_ids, expert_map, local_experts, alignment, m_sum, space)
    return Layout(space, tokens, topk, local_experts, alignment, m_sum)


def permute_rows(
    x: Tensor,
    topk_ids: Tensor,
    local_experts: int,
    *,
    expert_map: Tensor | None = None,
    alignment: int = 128,
    m_sum: int | None = None,
    distinct: bool = True,
    zero_padding: bool = False,
    out: Tensor | None = None,
    layout: Tensor | None = None,
) -> Permuted:
    """Moves rows as they are: x ``[M, H]`` of any dtype of 1, 2 or 4 bytes, no scales.

    Rows of padding are zero with `zero_padding`, else untouched.

    Raises ValueError or TypeError for what does not fit.
    """
    if _unwatched(x):
        where = (topk_ids, expert_map, local_experts, alignment, m_sum)
        rows, made = _native.permute_rows(x, *where, None, zero_padding, out, layout, distinct=distinct)
        return Permuted(rows, None, Layout(*made))
    out, lists = _targets(x, topk_ids, local_experts, alignment, m_sum, distinct, None, out, layout)
    where = (topk_ids, expert_map, local_experts, alignment, lists.m_sum)
    _call("permute_rows", x, *where, zero_padding, out, lists.space)
    return Permuted(out, None, lists)


def permute_quantized(
    x: Tensor,
    x_scales: Tensor,
    topk_ids: Tensor,
    local_experts: int,
    *,
    expert_map: Tensor | None = None,
    alignment: int = 128,
    m_sum: int | None = None,
    distinct: bool = True,
    group: int = 128,
    scale_layout: str = "mn_major",
    zero_padding: bool = False,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    layout: Tensor | None = None,
) -> Permuted:
    """Moves rows that are already quantized, and their scales.

    x: float8_e4m3fn ``[M, H]``. x_scales: float32 ``[M, H / group]``, or uint8 (UE8M0) for ``"packed_ue8m0"``.

    Raises ValueError or TypeError for what does not fit.
    """
    if _unwatched(x, x_scales):
        where = (topk_ids, expert_map, local_experts, alignment, m_sum)
        rows, words, matrix, made = _native.permute_quantized(
            x, x_scales, *where, None, group, scale_layout, zero_padding, out, scales, layout, distinct=distinct
        )
        return Permuted(rows, words if matrix is None else _reinterpret_tensor(words, *matrix, 0), Layout(*made))
    out, lists = _targets(x, topk_ids, local_experts, alignment, m_sum, distinct, None, out, layout)
    words, shaped = _scales(x, lists.m_sum, x.shape[1], group, scale_layout, scales)
    where = (topk_ids, expert_map, local_experts, alignment, lists.m_sum)
    _call("permute_quantized", x, x_scales, *where, group, scale_layout, zero_padding, out, words, lists.space)
    return Permuted(out, shaped, lists)


def quantize_permute(
    x: Tensor,
    topk_ids: Tensor,
    local_experts: int,
    *,
    expert_map: Tensor | None = None,
    topk_weights: Tensor | None = None,
    alignment: int = 128,
    m_sum: int | None = None,
    distinct: bool = True,
    group: int = 128,
    scale_layout: str = "mn_major",
    power_of_two: bool | None = None,
    zero_padding: bool = False,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    layout: Tensor | None = None,
) -> Permuted:
    """Quantizes rows to e4m3 on their way: one pass, each token read and quantized once.

    x: bfloat16, float16 or float32 ``[M, H]``, any strides. topk_weights: float32 ``[M, 1]``, multiplied into the input
    first (``apply_router_weight_on_input``; only ``topk = 1``). group: 128 or 32 values per scale. power_of_two: scales
    rounded up to a power of two; the default is whether `scale_layout` can hold nothing else.

    out: float8_e4m3fn ``[M_sum, H]``; scales: flat, of `Sizes.scale_words` elements, or with the strides of its layout;
    layout: int32 of `Sizes.layout_len` elements: written in place if handed in.

    Raises ValueError or TypeError for what does not fit.
    """
    if _unwatched(x, topk_weights):
        rows, words, matrix, made = _native.quantize_permute(
            x,
            topk_weights,
            topk_ids,
            expert_map,
            local_experts,
            alignment,
            m_sum,
            group,
            scale_layout,
            power_of_two,
            zero_padding,
            out,
            scales,
            layout,
            distinct=distinct,
        )
        return Permuted(rows, words if matrix is None else _reinterpret_tensor(words, *matrix, 0), Layout(*made))
    out, lists = _targets(x, topk_ids, local_experts, alignment, m_sum, distinct, torch.float8_e4m3fn, out, layout)
    words, shaped = _scales(x, lists.m_sum, x.shape[1], group, scale_layout, scales)
    where = (topk_ids, expert_map, local_experts, alignment, lists.m_sum)
    power_of_two = scale_layout == "packed_ue8m0" if power_of_two is None else power_of_two
    _call(
        "quantize_permute",
        x,
        topk_weights,
        *where,
        group,
        scale_layout,
        power_of_two,
        zero_padding,
        out,
        words,
        lists.space,
    )
    return Permuted(out, shaped, lists)


def unpermute(
    rows: Tensor,
    inv_perm: Tensor,
    topk_weights: Tensor | None = None,
    *,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[m] = sum over slots k of topk_weights[m, k] * rows[inv_perm[m, k]]``, in float32, in slot order, cast once.

    rows: bfloat16, float16 or float32 ``[M_sum, H]``. topk_weights: float32 ``[M, topk]``, ones if absent. Slots whose row
    is negative are skipped; with `topk_ids` (and `expert_map`) also those of no local expert. `dtype` of the result is
    that of `rows` unless given.

    Raises ValueError or TypeError for what does not fit.
    """
    direct = topk_ids is None and _unwatched(rows, topk_weights)
    if out is None or not direct:
        tokens, _ = _matrix("inv_perm", inv_perm)
        _, hidden = _matrix("rows", rows)
        out = _empty("out", (tokens, hidden), rows.dtype if dtype is None else dtype, rows) if out is None else out
    if direct:
        _native.unpermute(rows, inv_perm, None, expert_map, topk_weights, out)
    else:
        _call("unpermute", rows, inv_perm, topk_ids, expert_map, topk_weights, out)
    return out


class Layer:
    """The expert half of a layer on the CPU: permute, GEMM 1, activation, GEMM 2, unpermute.

    w13: ``[E, 2 I, H]``, gate rows first; w2: ``[E, H, I]``. Both bfloat16, or both float8_e4m3fn with block scales:
    w13_scale ``[E, 2 ceil(I / 128), ceil(H / 128)]``, gate's row blocks, then up's; w2_scale ``[E, ceil(H / 128),
    ceil(I / 128)]``. Scales are float32, or bfloat16, float16 or float8_e8m0fnu, which are widened exactly. Weights are
    packed, once, into memory of the layer's own.

    activations: ``"bf16"``, or ``"e4m3"`` to quantize them (needs e4m3 weights, and 128 to divide H and I).
    alpha, beta, limit: ``glu = gate * sigmoid(alpha * gate)``, ``(up + beta) * glu``, gate clamped to at most `limit`, up
    to within it. weight_on_input: router weights multiply the input (``topk = 1`` only).

    Raises ValueError or TypeError for what does not fit.
    """

    _alive: ClassVar[weakref.WeakValueDictionary[int, Layer]] = weakref.WeakValueDictionary()
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        w13: Tensor,
        w2: Tensor,
        *,
        w13_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        activations: str = "bf16",
        alignment: int = 1,
        alpha: float = 1.0,
        beta: float = 0.0,
        limit: float | None = None,
        weight_on_input: bool = False,
    ) -> None:
        self._native = _native.Layer(
            w13, w2, w13_scale, w2_scale, activations, alignment, alpha, beta, limit, weight_on_input
        )
        # Operators take numbers and tensors: a layer is passed to its operator by number.
        self._number = next(Layer._numbers)
        Layer._alive[self._number] = self

    def __copy__(self) -> Layer:
        """Another layer with the same packed weights, which nothing can change."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._number = next(Layer._numbers)
        Layer._alive[other._number] = other
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return self.__copy__()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Layer cannot be pickled: its weights are packed for this machine, expected to be packed anew"
        )

    @property
    def local_experts(self) -> int:
        """``E``."""
        return self._native.local_experts

    @property
    def hidden(self) -> int:
        """``H``."""
        return self._native.hidden

    @property
    def intermediate(self) -> int:
        """``I``."""
        return self._native.intermediate

    def workspace_bytes(self, tokens: int, topk: int) -> int:
        """Bytes of uint8 workspace that a call with ``topk_ids [tokens, topk]`` needs at most."""
        return self._native.workspace_bytes(tokens, topk)

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        expert_map: Tensor | None = None,
        workspace: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """hidden_states ``[M, H]`` (bfloat16, float16 or float32), topk_weights float32 ``[M, topk]`` to ``[M, H]``.

        `dtype` of the result is that of `hidden_states` unless given. workspace: uint8, contiguous.

        Raises ValueError or TypeError for what does not fit.
        """
        shape = _matrix("hidden_states", hidden_states)
        if out is None:
            out = _empty("out", shape, hidden_states.dtype if dtype is None else dtype, hidden_states)
        _call("layer", self._number, hidden_states, topk_ids, topk_weights, expert_map, workspace, out)
        return out


def _matrix(argument: str, x: Tensor) -> torch.Size:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} is a {type(x).__qualname__}, expected a torch tensor")
    if x.dim() != 2:
        raise ValueError(f"{argument} has shape {list(x.shape)}, expected two dimensions")
    return x.shape


def _targets(
    x: Tensor,
    topk_ids: Tensor,
    local_experts: int,
    alignment: int,
    m_sum: int | None,
    distinct: bool,
    dtype: torch.dtype | None,
    out: Tensor | None,
    layout: Tensor | None,
) -> tuple[Tensor, Layout]:
    """Where rows of `x` and their layout go: what was handed in, or something new (of `dtype`, or that of `x`)."""
    tokens, topk = _matrix("topk_ids", topk_ids)
    _, hidden = _matrix("x", x)
    m_sum = _m_sum(tokens, topk, local_experts, alignment, m_sum, distinct)
    space = _space(topk_ids, tokens, topk, local_experts, alignment, m_sum, layout)
    out = _empty("out", (m_sum, hidden), x.dtype if dtype is None else dtype, x) if out is None else out
    return out, Layout(space, tokens, topk, local_experts, alignment, m_sum)


def _m_sum(tokens: int, topk: int, local_experts: int, alignment: int, m_sum: int | None, distinct: bool) -> int:
    if m_sum is not None:
        return m_sum
    if torch.compiler.is_compiling() or isinstance(tokens, torch.SymInt):
        return _symbolic_tight_m_sum(tokens, topk, local_experts, alignment, distinct)
    return _native.tight_m_sum(tokens, topk, local_experts, alignment, distinct)


def _symbolic_tight_m_sum(tokens: int, topk: int, local_experts: int, alignment: int, distinct: bool) -> int:
    """`expertile.tight_m_sum` for a number of tokens that is only known when the compiled code runs."""
    slots = tokens * (min(topk, local_experts) if distinct else topk)
    active = min(slots, local_experts)
    more = (slots - active) // alignment
    if distinct:
        more = min(more, active * ((tokens + alignment - 1) // alignment - 1))
    return alignment * (active + more)


def _space(
    like: Tensor, tokens: int, topk: int, local_experts: int, alignment: int, m_sum: int, space: Tensor | None
) -> Tensor:
    if _is_dynamo_compiling() or isinstance(tokens, torch.SymInt):
        # The lists, then room for a GPU's header, worklist and row numbers.
        words = 3 * local_experts + m_sum + tokens * topk + 5 + 2 * (m_sum // max(alignment, 1)) + m_sum
    else:
        words = _native.layout_len(tokens, topk, local_experts, alignment, m_sum)
    if space is None:
        return _empty("layout", (words,), torch.int32, like)
    _require_len("layout", space, words)
    return space


def _empty(argument: str, shape: Any, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A new tensor on the device of `like`."""
    if _is_dynamo_compiling() or type(like) is not Tensor:
        return like.new_empty(shape, dtype=dtype)
    return _arrays.empty_tensor(argument, shape, dtype, like.device)


def _require_len(argument: str, x: Tensor, words: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument} is a {type(x).__qualname__}, expected a torch tensor")
    if x.numel() < words:
        raise ValueError(f"{argument} holds {x.numel()} elements, expected at least {words}")


def _scales(
    x: Tensor, m_sum: int, hidden: int, group: int, scale_layout: str, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The memory of the scales, and the matrix it is read as."""
    columns, column_major, dtype = _scale_columns(hidden, group, scale_layout)
    rows = (m_sum + 3) // 4 * 4 if column_major else m_sum
    if scales is None:
        scales = _empty("scales", (columns * rows,), dtype, x)
    if not isinstance(scales, Tensor):
        raise TypeError(f"scales is a {type(scales).__qualname__}, expected a torch tensor")
    if scales.dim() != 1:
        return scales, scales
    _require_len("scales", scales, columns * rows)
    return scales, scales.as_strided((m_sum, columns), (1, rows) if column_major else (columns, 1))


def _scale_columns(hidden: int, group: int, scale_layout: str) -> tuple[int, bool, torch.dtype]:
    """How many columns the scales have, whether these are what stands together, and the dtype."""
    if group not in (32, 128):
        raise ValueError(f"group is {group}, expected 32 or 128")
    groups = hidden // group
    if scale_layout == "row_major":
        return groups, False, torch.float32
    if scale_layout == "mn_major":
        return groups, True, torch.float32
    if scale_layout == "packed_ue8m0":
        return (groups + 3) // 4, True, torch.int32
    raise ValueError(f'scale_layout is "{scale_layout}", expected one of row_major, mn_major, packed_ue8m0')
