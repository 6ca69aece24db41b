"""Rows to their place."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from .. import _arrays, _layout, _native
from .._arrays import Array
from .._errors import ArgumentError, ArgumentTypeError
from . import _alignment
from ._alignment import ExpertTokensMetadata, compute_aligned_M_and_alignment
from ._names import PERMUTE, SCATTER, named


def count_expert_num_tokens(topk_ids: Array, num_local_experts: int, expert_map: Array | None) -> Array:
    """Live rows per local expert: int32 ``[E]``.

    topk_ids: int32 or int64 ``[M, topk]``, negative for an empty slot. expert_map: int32 ``[G]``, global id to local.

    Raises ValueError for an id that no expert (or no entry of the map) stands for, TypeError for another dtype.
    """
    if len(getattr(topk_ids, "shape", ())) == 1:
        topk_ids = topk_ids[:, None]
    tokens, topk = _arrays.require_array("topk_ids", topk_ids, 2)
    try:
        if _arrays.on_gpu(topk_ids):
            where = (num_local_experts, 1, tokens * topk)
            lists = _arrays.empty((_native.layout_len(tokens, topk, *where),), "int32", topk_ids)
            _native.build_layout(topk_ids, expert_map, *where, lists)
            return _layout.list_of(lists, "expert_num_tokens", num_local_experts, tokens * topk, tokens * topk)
        _native.layout_len(0, 1, num_local_experts, 1, 0)  # Before an array is sized by it.
        counts = _arrays.empty((num_local_experts,), "int32", topk_ids)
        _native.count_expert_num_tokens(topk_ids, expert_map, num_local_experts, counts)
    except ArgumentError as error:
        raise named(error, {"local_experts": "num_local_experts"}) from None
    return counts


def deepgemm_moe_permute(
    aq: Array,
    aq_scale: Array | None,
    topk_ids: Array,
    local_num_experts: int,
    expert_map: Array | None,
    expert_tokens_meta: ExpertTokensMetadata | None,
    aq_out: Array | None = None,
    block_size: int | None = None,
    use_psum_layout: bool = False,
) -> tuple[Array, Array | None, Array, Array, int]:
    """Lays rows out for DeepGEMM's contiguous grouped GEMM.

    aq: ``[M, H]``, e4m3 (or bytes), bfloat16 or another type of 2 or 4 bytes, which is moved as it is. aq_scale:
    float32 ``[M, H / block_size]``, or uint8 (UE8M0), which is packed; None for rows that have none, if they are not
    e4m3. topk_ids: int32 or int64 ``[M, topk]``. expert_map: int32 ``[G]``. aq_out: ``[M_sum, H]``, written in place;
    rows of padding are left as they are. block_size: values per scale, by default the block in force (128).

    Returns ``(aq_out, scales, grouped_layout, inv_perm, alignment_used)``: scales float32 ``[M_sum, H / block_size]``,
    or int32 ``[M_sum, ceil(H / block_size / 4)]`` with strides ``(1, round_up(M_sum, 4))``, or None without `aq_scale`;
    grouped_layout int32 ``[M_sum]`` (the expert of each row, -1 on padding), or with `use_psum_layout` int32 ``[E]``
    (the end of each expert's rows); inv_perm int32 ``[M, topk]``, -1 for an empty slot.

    Raises ValueError or TypeError for what does not fit.
    """
    block = _alignment.source.get()
    group = block if block_size is None else block_size
    if getattr(aq, "is_cuda", False) and aq_scale is not None:
        # One call, planning included where that is ours; what it does not take goes step by step.
        alignment, m_sum = block, None
        if expert_tokens_meta is not None or _alignment.source is not _alignment.own:
            tokens, topk = _arrays.require_array("topk_ids", topk_ids, 2)
            m_sum, alignment = compute_aligned_M_and_alignment(
                tokens, topk, local_num_experts, block, expert_tokens_meta
            )
        try:
            made = _native.deep_gemm_permute(
                aq,
                aq_scale,
                topk_ids,
                expert_map,
                local_num_experts,
                alignment,
                m_sum,
                group,
                use_psum_layout,
                aq_out,
                _alignment.own.rule,
            )
        except ArgumentError as error:
            raise named(error, PERMUTE) from None
        if made is not None:
            return made
    tokens, topk = _arrays.require_array("topk_ids", topk_ids, 2)
    m_sum, alignment = compute_aligned_M_and_alignment(tokens, topk, local_num_experts, block, expert_tokens_meta)
    _, hidden = _arrays.require_array("aq", aq, 2)
    if aq_scale is not None or aq.itemsize == 1:
        # Rows of one byte are quantized: theirs cannot have been left out on purpose.
        _arrays.require_array("aq_scale", aq_scale, 2)
    if aq_out is None:
        aq_out = _arrays.empty((m_sum, hidden), aq.dtype, aq)
    else:
        _arrays.require_shape("aq_out", aq_out, (m_sum, hidden))
    scale_layout, flat, scales = "row_major", None, None
    if aq_scale is not None:
        scale_layout = "packed_ue8m0" if _arrays.dtype_name(aq_scale) == "uint8" else "row_major"
        flat, scales, _ = _empty_scales(aq, m_sum, hidden, group, scale_layout)
    lists = _permute(
        aq,
        aq_scale,
        topk_ids,
        local_num_experts,
        expert_map,
        None if expert_tokens_meta is None else expert_tokens_meta.expert_num_tokens,
        alignment,
        group,
        scale_layout,
        aq_out,
        (flat, scales),
        PERMUTE,
    )
    layout = lists.psum if use_psum_layout else lists.m_indices
    return aq_out, scales, layout, lists.inv_perm, alignment


def ep_scatter(
    recv_x: Array,
    recv_x_scale: Array,
    recv_topk: Array,
    num_recv_tokens_per_expert: Array,
    expert_map: Array | None,
    expert_start_loc: Array,
    output_tensor: Array,
    output_tensor_scale: Array,
    m_indices: Array,
    output_index: Array,
    align_m: int = 128,
    block_size: int = 128,
    pack_ue8m0: bool = False,
    use_psum_layout: bool = False,
) -> None:
    """What :func:`deepgemm_moe_permute` does, into the caller's buffers.

    recv_x ``[M, H]``, recv_x_scale ``[M, H / block_size]``, recv_topk ``[M, topk]``; num_recv_tokens_per_expert int32
    ``[E]``, unaligned. Written: output_tensor ``[M_sum, H]`` (live rows), output_tensor_scale (zero on padding),
    m_indices int32 ``[M_sum]`` (live rows) or ``[E]`` with `use_psum_layout`, output_index int32 ``[M, topk]`` (-1 for
    an empty slot), and expert_start_loc int32 ``[E]``, which ends, as the original's, as the end of each expert's rows.

    Raises ValueError or TypeError for what does not fit.
    """
    tokens, topk = _arrays.require_array("recv_topk", recv_topk, 2)
    rows, hidden = _arrays.require_array("output_tensor", output_tensor, 2)
    (experts,) = _arrays.require_array("num_recv_tokens_per_expert", num_recv_tokens_per_expert, 1)
    wanted = (
        ("expert_start_loc", expert_start_loc, (experts,)),
        ("output_index", output_index, (tokens, topk)),
        ("m_indices", m_indices, (experts,) if use_psum_layout else (rows,)),
    )
    for argument, array, shape in wanted:
        _arrays.require_shape(argument, array, shape)
        if _arrays.dtype_name(array) != "int32":
            raise _arrays.wrong_dtype(argument, array, "int32")
    scale_layout = "packed_ue8m0" if pack_ue8m0 else "row_major"
    flat, scales = _scale_target(output_tensor_scale, rows, hidden, scale_layout, block_size)
    outputs = [
        ("out", output_tensor),
        ("scales", output_tensor_scale),
        ("expert_start_loc", expert_start_loc),
        ("m_indices", m_indices),
        ("output_index", output_index),
    ]
    _require_targets(outputs, recv_x, recv_x_scale, recv_topk, expert_map, SCATTER)
    lists = _permute(
        recv_x,
        recv_x_scale,
        recv_topk,
        experts,
        expert_map,
        num_recv_tokens_per_expert,
        align_m,
        block_size,
        scale_layout,
        output_tensor,
        (flat, scales),
        SCATTER,
    )
    if scales is not output_tensor_scale:
        _arrays.assign(output_tensor_scale, scales)
    _arrays.assign(expert_start_loc, lists.psum)
    _arrays.assign(output_index, lists.inv_perm)
    _arrays.assign(m_indices, lists.psum if use_psum_layout else _where_live(lists.m_indices, m_indices))


@dataclass
class _Lists:
    """The lists of a layout, as views of one array."""

    memory: Array
    tokens: int
    topk: int
    experts: int
    m_sum: int

    def _list(self, name: str) -> Array:
        return _layout.list_of(self.memory, name, self.experts, self.m_sum, self.tokens * self.topk)

    @property
    def psum(self) -> Array:
        return self._list("psum")

    @property
    def m_indices(self) -> Array:
        return self._list("m_indices")

    @property
    def inv_perm(self) -> Array:
        inv_perm = self._list("inv_perm").reshape(self.tokens, self.topk)
        if _arrays.on_gpu(inv_perm):
            _native.mark_complete(inv_perm)
        return inv_perm


def _permute(
    x: Array,
    x_scale: Array | None,
    topk_ids: Array,
    experts: int,
    expert_map: Array | None,
    expert_num_tokens: Array | None,
    alignment: int,
    group: int,
    scale_layout: str,
    out: Array,
    scales: tuple[Array | None, Array | None],
    names: dict[str, str],
) -> _Lists:
    """Rows to `out` and scales to memory and the matrix it is read as, if there are any."""
    tokens, topk = topk_ids.shape
    m_sum = out.shape[0]
    if out.dtype != x.dtype:
        unlike = f" has dtype {out.dtype}, unlike"
        raise ArgumentTypeError(names["out"], unlike, out.dtype, str(x.dtype), names["x"])
    where = (topk_ids, expert_map, experts, alignment, m_sum, expert_num_tokens)
    if not _arrays.is_contiguous(out) or x.itemsize != 1:
        _require_targets([("out", out)], x, x_scale, topk_ids, expert_map, names)
    target = _arrays.contiguous(out)
    try:
        lists = _arrays.empty((_native.layout_len(tokens, topk, experts, alignment, m_sum),), "int32", x)
        flat, matrix = scales
        if x_scale is None:
            _native.permute_rows(x, *where, False, target, lists)
        elif x.itemsize == 1:
            _native.permute_quantized(x, x_scale, *where, group, scale_layout, False, target, flat, lists)
        else:
            # Wider rows cannot be e4m3; they are moved as they are, and so are their scales. The scales first, and not
            # yet to their place: the rows, written last, may still be refused.
            groups = -(-out.shape[1] // group)
            _arrays.require_shape("x_scales", x_scale, (tokens, groups))
            expected = "uint8" if scale_layout == "packed_ue8m0" else "float32"
            if _arrays.dtype_name(x_scale) != expected:
                raise _arrays.wrong_dtype("x_scales", x_scale, expected)
            moved = _arrays.empty((m_sum, groups), expected, x)
            _native.permute_rows(x_scale, *where, True, moved, lists)
            _native.permute_rows(x, *where, False, target, lists)
            _arrays.assign(matrix, _arrays.words_of(moved) if expected == "uint8" else moved)
    except ArgumentError as error:
        raise named(error, names) from None
    if target is not out:
        _arrays.assign(out, target)
    return _Lists(lists, tokens, topk, experts, m_sum)


def _where_live(new: Array, old: Array) -> Array:
    if not _arrays.is_tensor(new):
        import numpy

        return numpy.where(new >= 0, new, old.numpy() if _arrays.is_tensor(old) else old)
    torch = sys.modules["torch"]
    return torch.where(new >= 0, new, old if _arrays.is_tensor(old) else torch.from_numpy(old))


def _require_targets(
    outputs: list[tuple[str, Array]],
    x: Array,
    x_scale: Array | None,
    topk_ids: Array,
    expert_map: Array | None,
    names: dict[str, str],
) -> None:
    """Checks what is written by assignment, at the end, before anything is written at all."""
    inputs = [("x", x), ("x_scales", x_scale), ("topk_ids", topk_ids), ("expert_map", expert_map)]
    try:
        _native.require_targets(outputs, inputs)
    except ArgumentError as error:
        raise named(error, names) from None


def _empty_scales(like: Array, rows: int, hidden: int, group: int, scale_layout: str) -> tuple[Array, Array, bool]:
    """Memory for the scales of ``[rows, hidden]``, the matrix that it is read as, and whether that has all words."""
    try:
        words, dtype, shape, strides, whole = _native.scale_matrix(rows, hidden, scale_layout, group)
    except ArgumentError as error:
        raise named(error, PERMUTE) from None
    flat = _arrays.empty((words,), dtype, like)
    return flat, _arrays.matrix_over(flat, shape, strides), whole


def _scale_target(scales: Array, rows: int, hidden: int, scale_layout: str, group: int) -> tuple[Array, Array]:
    """Memory for the scales and the matrix it is read as: the caller's own, if it has the strides of its layout."""
    argument = "output_tensor_scale"
    _arrays.require_array(argument, scales, 2)
    flat, matrix, whole = _empty_scales(scales, rows, hidden, group, scale_layout)
    _arrays.require_shape(argument, scales, tuple(matrix.shape))
    if scales.dtype != matrix.dtype:
        raise _arrays.wrong_dtype(argument, scales, str(matrix.dtype))
    # A view of fewer rows than its columns' stride does not own the words between them.
    if whole and _arrays.strides(scales) == _arrays.strides(matrix):
        return scales, scales
    return flat, matrix


def check(device: Any = None) -> None:
    """Waits for the current stream of a CUDA device, and raises ValueError for ids that its kernels had to refuse.

    Only for calls that were not captured into a graph. On the CPU every call raises by itself.
    """
    torch = sys.modules["torch"]
    # "cuda" without a number is the current device, as everywhere in torch.
    index = None if device is None else torch.device(device).index
    _native.cuda_check(torch.cuda.current_device() if index is None else index)
