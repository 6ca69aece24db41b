"""The steps of a token's path."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ._dispatch import call, reinterpret_tensor, unwatched
from .layout import Layout, Permuted, empty, m_sum_of, matrix, scales_of, space_of, targets_of


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
    if unwatched(topk_ids):
        return Layout(
            *_native.build_layout(topk_ids, expert_map, local_experts, alignment, m_sum, layout, distinct=distinct)
        )
    tokens, topk = matrix("topk_ids", topk_ids)
    m_sum = m_sum_of(tokens, topk, local_experts, alignment, m_sum, distinct)
    space = space_of(topk_ids, tokens, topk, local_experts, alignment, m_sum, layout)
    call("build_layout", topk_ids, expert_map, local_experts, alignment, m_sum, space)
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
    if unwatched(x):
        where = (topk_ids, expert_map, local_experts, alignment, m_sum)
        rows, made = _native.permute_rows(x, *where, None, zero_padding, out, layout, distinct=distinct)
        return Permuted(rows, None, Layout(*made))
    out, lists = targets_of(x, topk_ids, local_experts, alignment, m_sum, distinct, None, out, layout)
    where = (topk_ids, expert_map, local_experts, alignment, lists.m_sum)
    call("permute_rows", x, *where, zero_padding, out, lists.space)
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

    x: float8_e4m3fn ``[M, H]``. x_scales: float32 ``[M, ceil(H / group)]``, or uint8 (UE8M0) for ``"packed_ue8m0"``.

    Raises ValueError or TypeError for what does not fit.
    """
    if unwatched(x, x_scales):
        where = (topk_ids, expert_map, local_experts, alignment, m_sum)
        rows, words, matrix, made = _native.permute_quantized(
            x, x_scales, *where, None, group, scale_layout, zero_padding, out, scales, layout, distinct=distinct
        )
        return Permuted(rows, words if matrix is None else reinterpret_tensor(words, *matrix, 0), Layout(*made))
    out, lists = targets_of(x, topk_ids, local_experts, alignment, m_sum, distinct, None, out, layout)
    words, shaped = scales_of(x, lists.m_sum, x.shape[1], group, scale_layout, scales)
    where = (topk_ids, expert_map, local_experts, alignment, lists.m_sum)
    call("permute_quantized", x, x_scales, *where, group, scale_layout, zero_padding, out, words, lists.space)
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
    if unwatched(x, topk_weights):
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
        return Permuted(rows, words if matrix is None else reinterpret_tensor(words, *matrix, 0), Layout(*made))
    out, lists = targets_of(x, topk_ids, local_experts, alignment, m_sum, distinct, torch.float8_e4m3fn, out, layout)
    words, shaped = scales_of(x, lists.m_sum, x.shape[1], group, scale_layout, scales)
    where = (topk_ids, expert_map, local_experts, alignment, lists.m_sum)
    power_of_two = scale_layout == "packed_ue8m0" if power_of_two is None else power_of_two
    call(
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

    rows: bfloat16, float16 or float32 ``[M_sum, H]``. topk_weights: float32 ``[M, topk]``, ones if absent. Slots whose
    row is negative are skipped; with `topk_ids` (and `expert_map`) also those of no local expert. `dtype` of the result
    is that of `rows` unless given.

    Raises ValueError or TypeError for what does not fit.
    """
    direct = topk_ids is None and unwatched(rows, topk_weights)
    if out is None or not direct:
        tokens, _ = matrix("inv_perm", inv_perm)
        _, hidden = matrix("rows", rows)
        out = empty("out", (tokens, hidden), rows.dtype if dtype is None else dtype, rows) if out is None else out
    if direct:
        _native.unpermute(rows, inv_perm, None, expert_map, topk_weights, out)
    else:
        call("unpermute", rows, inv_perm, topk_ids, expert_map, topk_weights, out)
    return out
