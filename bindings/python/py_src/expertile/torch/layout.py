"""What a call writes: a layout and its lists, rows, scales, and how large each of them is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _arrays, _layout, _native
from .._errors import ArgumentValueError


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

    def _list(self, name: str) -> Tensor:
        return _layout.list_of(self.space, name, self.local_experts, self.m_sum, self.tokens * self.topk)

    @property
    def expert_num_tokens(self) -> Tensor:
        """``[E]``: live rows per local expert."""
        return self._list("expert_num_tokens")

    @property
    def expert_start(self) -> Tensor:
        """``[E]``: first row of each expert, a multiple of the alignment."""
        return self._list("expert_start")

    @property
    def psum(self) -> Tensor:
        """``[E]``: ``expert_start + expert_num_tokens``; an empty expert stores its start."""
        return self._list("psum")

    @property
    def m_indices(self) -> Tensor:
        """``[M_sum]``: local expert of each row, -1 on padding."""
        return self._list("m_indices")

    @property
    def inv_perm(self) -> Tensor:
        """``[M, topk]``: row of each slot, -1 for an empty or non-local one."""
        return self._list("inv_perm").view(self.tokens, self.topk)

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
    m_sum = m_sum_of(tokens, topk, local_experts, alignment, m_sum, distinct)
    return Sizes(
        m_sum,
        _native.layout_len(tokens, topk, local_experts, alignment, m_sum),
        _native.scale_matrix(m_sum, hidden, scale_layout, group)[0],
    )


def targets_of(
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
    tokens, topk = matrix("topk_ids", topk_ids)
    _, hidden = matrix("x", x)
    m_sum = m_sum_of(tokens, topk, local_experts, alignment, m_sum, distinct)
    space = space_of(topk_ids, tokens, topk, local_experts, alignment, m_sum, layout)
    out = empty("out", (m_sum, hidden), x.dtype if dtype is None else dtype, x) if out is None else out
    return out, Layout(space, tokens, topk, local_experts, alignment, m_sum)


def scales_of(
    x: Tensor, m_sum: int, hidden: int, group: int, scale_layout: str, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The memory of the scales, and the matrix it is read as."""
    if group not in _native.SCALE_GROUPS:
        expected = " or ".join(map(str, _native.SCALE_GROUPS))
        raise ArgumentValueError("group", f" is {group}", group, expected)
    if scale_layout not in _native.SCALE_LAYOUTS:
        expected = f"one of {', '.join(_native.SCALE_LAYOUTS)}"
        raise ArgumentValueError("scale_layout", f' is "{scale_layout}"', scale_layout, expected)
    words, dtype, shape, strides = _layout.scale_shape(m_sum, hidden, scale_layout, group)
    if scales is None:
        scales = empty("scales", (words,), getattr(torch, dtype), x)
    require_tensor("scales", scales)
    if scales.dim() != 1:
        return scales, scales
    require_len("scales", scales, words)
    return scales, scales.as_strided(shape, strides)


def m_sum_of(tokens: int, topk: int, local_experts: int, alignment: int, m_sum: int | None, distinct: bool) -> int:
    if m_sum is not None:
        return m_sum
    if torch.compiler.is_compiling() or isinstance(tokens, torch.SymInt):
        return symbolic_tight_m_sum(tokens, topk, local_experts, alignment, distinct)
    return _native.tight_m_sum(tokens, topk, local_experts, alignment, distinct)


def symbolic_tight_m_sum(tokens: int, topk: int, local_experts: int, alignment: int, distinct: bool) -> int:
    """`expertile.tight_m_sum` for a number of tokens that is only known when the compiled code runs.

    The one formula that this package repeats: no function of the library takes such a number. A test compares the two.
    """
    slots = tokens * (min(topk, local_experts) if distinct else topk)
    active = min(slots, local_experts)
    more = (slots - active) // alignment
    if distinct:
        more = min(more, active * ((tokens + alignment - 1) // alignment - 1))
    return alignment * (active + more)


def space_of(
    like: Tensor, tokens: int, topk: int, local_experts: int, alignment: int, m_sum: int, space: Tensor | None
) -> Tensor:
    if is_dynamo_compiling() or isinstance(tokens, torch.SymInt):
        words = _layout.total_len(local_experts, m_sum, tokens * topk, max(alignment, 1))
    else:
        words = _native.layout_len(tokens, topk, local_experts, alignment, m_sum)
    if space is None:
        return empty("layout", (words,), torch.int32, like)
    require_len("layout", space, words)
    return space


def empty(argument: str, shape: Any, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A new tensor on the device of `like`."""
    if is_dynamo_compiling() or type(like) is not Tensor:
        return like.new_empty(shape, dtype=dtype)
    return _arrays.empty_tensor(argument, shape, dtype, like.device)


def matrix(argument: str, x: Tensor) -> torch.Size:
    require_tensor(argument, x)
    if x.dim() != 2:
        raise _arrays.wrong_shape(argument, x.shape, "two dimensions")
    return x.shape


def require_tensor(argument: str, x: Any) -> None:
    """Fails for anything but a tensor."""
    if not isinstance(x, Tensor):
        raise _arrays.not_a(argument, x, "a torch tensor")


def require_len(argument: str, x: Tensor, words: int) -> None:
    """Fails for a tensor of fewer elements."""
    require_tensor(argument, x)
    if x.numel() < words:
        raise ArgumentValueError(argument, f" holds {x.numel()} elements", x.numel(), f"at least {words}")
