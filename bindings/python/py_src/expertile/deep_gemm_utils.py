"""vLLM 0.33.0's ``vllm.model_executor.layers.fused_moe.deep_gemm_utils``, function for function.

Same names, parameters (positional and by keyword) and returns, on torch tensors and NumPy arrays; arrays that a function
creates are of the kind of its first argument. What differs is what the original leaves open or gets wrong:

- rows within an expert stand in slot order, so the same input gives the same bytes;
- ``inv_perm`` of an empty or non-local slot is -1 (the original leaves it unwritten);
- scale padding is always zero, packed scales included;
- ids are checked against the map's length, and strides of every input are honoured;
- counts that are handed over must agree with the ids (checked where both are on the CPU).

Functions that look at tensors cannot be part of a trace (``torch.jit.trace``, ``make_fx``), which would keep one call's
numbers: they raise RuntimeError. The operators of :mod:`expertile.torch` can.

On a GPU an id past the experts (or the map) is treated as an empty slot, and :func:`check` raises for it.

Shapes: ``M`` tokens, ``H`` values each, ``topk`` slots, ``E`` local experts, ``M_sum`` rows after alignment.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from . import _arrays, _native
from ._arrays import Array

__all__ = [
    "ExpertTokensMetadata",
    "check",
    "compute_aligned_M",
    "compute_aligned_M_and_alignment",
    "count_expert_num_tokens",
    "deepgemm_moe_permute",
    "deepgemm_unpermute_and_reduce",
    "ep_gather",
    "ep_scatter",
    "expert_num_tokens_round_up_and_sum",
    "get_mk_alignment_for_contiguous_layout",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "mk_alignment_scope",
    "set_alignment_rule",
    "set_mk_alignment_for_contiguous_layout",
]


# -- the GEMM's alignment -----------------------------------------------------------------------------------------------


class AlignmentSource(Protocol):
    """Who knows the row tile of the GEMM that will read the layout."""

    def get(self) -> int:
        """The row tile in force."""

    def set(self, value: int) -> None:
        """Caps the row tile from now on."""

    def theoretical(self, expected_m: int | None, num_groups: int | None) -> int | None:
        """The row tile the GEMM would pick for a call; None if it never shrinks."""


class _OwnAlignment:
    """The source while no DeepGEMM is loaded: a value per context, and a rule chosen by name."""

    __slots__ = ("_value", "rule")

    def __init__(self) -> None:
        self._value: contextvars.ContextVar[int] = contextvars.ContextVar("mk_alignment", default=128)
        self.rule: tuple[str, str] | None = None

    def get(self) -> int:
        deep_gemm = _loaded_deep_gemm()
        return deep_gemm.get_mk_alignment_for_contiguous_layout() if deep_gemm else self._value.get()

    def set(self, value: int) -> None:
        deep_gemm = _loaded_deep_gemm()
        if deep_gemm:
            deep_gemm.set_mk_alignment_for_contiguous_layout(value)
        else:
            self._value.set(value)

    def theoretical(self, expected_m: int | None, num_groups: int | None) -> int | None:
        return _native.theoretical_alignment(*self.rule, expected_m, num_groups) if self.rule else None


def _loaded_deep_gemm() -> Any:
    """A DeepGEMM that this process has imported: the value must be its, or it reads the wrong expert's weights."""
    loaded = sys.modules
    return loaded.get("deep_gemm") or loaded.get("vllm.third_party.deep_gemm")


_own_alignment = _OwnAlignment()
_alignment: AlignmentSource = _own_alignment


def set_alignment_rule(rule: str | None, arch: str | None = None) -> None:
    """Chooses the rule by which the alignment may shrink for a call.

    rule: ``"deepgemm-2026-06"``, ``"vllm-fork"`` or ``"deepgemm-2.8"``; None (the default) never shrinks it, as vLLM
        0.33.0 with its own DeepGEMM.
    arch: ``"sm90"``, ``"sm100"`` or ``"sm120"``; None asks the current CUDA device, and means ``"sm90"`` without one.

    Raises ValueError for an unknown name.
    """
    if rule is None:
        _own_alignment.rule = None
        return
    arch = _current_arch() if arch is None else arch
    _native.theoretical_alignment(rule, arch)
    _own_alignment.rule = (rule, arch)


def _current_arch() -> str:
    return _arch_of_device() if "torch" in sys.modules else "sm90"


@functools.cache
def _arch_of_device() -> str:
    torch = sys.modules["torch"]
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
    return {10: "sm100", 12: "sm120"}.get(major, "sm90")


def get_mk_alignment_for_contiguous_layout() -> list[int]:
    """The row tile in force and the scale block, ``[alignment, alignment]``: 128 unless set otherwise."""
    alignment = _alignment.get()
    return [alignment, alignment]


def set_mk_alignment_for_contiguous_layout(value: int) -> None:
    """Sets the row tile, DeepGEMM's too if it is loaded. Raises ValueError unless `value` is at least 1."""
    _native.round_up(0, value)
    _alignment.set(value)


@contextlib.contextmanager
def mk_alignment_scope(value: int) -> Iterator[None]:
    """Sets the row tile to `value` inside a ``with`` block, and back when it is left."""
    previous = _alignment.get()
    set_mk_alignment_for_contiguous_layout(value)
    try:
        yield
    finally:
        _alignment.set(previous)


def get_theoretical_mk_alignment_for_contiguous_layout(
    expected_m: int | None = None, num_groups: int | None = None
) -> int:
    """The row tile that the rule in force picks for a call.

    expected_m: rows over all groups (``M * topk``). num_groups: experts on this rank.

    Without a rule (see :func:`set_alignment_rule`): what DeepGEMM 2.8, vendored in vLLM 0.33.0, answers.
    Raises ValueError for a number below 0, or no groups.
    """
    chosen = _alignment.theoretical(expected_m, num_groups)
    if chosen is not None:
        return chosen
    return _native.theoretical_alignment("deepgemm-2.8", _current_arch(), expected_m, num_groups)


# -- sizing -------------------------------------------------------------------------------------------------------------


@dataclass
class ExpertTokensMetadata:
    """Live rows per local expert, where a dispatcher knows them. vLLM's own object does as well."""

    expert_num_tokens: Array | None
    """int32 ``[E]``, on the tokens' device."""
    expert_num_tokens_cpu: Array | None
    """int32 ``[E]``, on the host."""
    psum_recv_per_rank: Array | None = None
    """Carried along, not used here."""
    rank_expert_offset: int | None = None
    """Carried along, not used here."""

    @staticmethod
    def make_from_list(expert_num_tokens_list: list[int], device: str) -> ExpertTokensMetadata:
        """Counts on the host and, copied without waiting, on `device`. Without torch: NumPy, and only ``"cpu"``."""
        try:
            import torch
        except ImportError:
            if str(device) != "cpu":
                raise ImportError(f'device is "{device}", expected "cpu" where torch is not installed') from None
            import numpy

            counts = numpy.array(expert_num_tokens_list, dtype=numpy.int32)
            return ExpertTokensMetadata(expert_num_tokens=counts, expert_num_tokens_cpu=counts)
        pinned = torch.tensor(
            expert_num_tokens_list, device="cpu", dtype=torch.int32, pin_memory=torch.cuda.is_available()
        )
        return ExpertTokensMetadata(
            expert_num_tokens=pinned.to(device, non_blocking=True), expert_num_tokens_cpu=pinned
        )


def expert_num_tokens_round_up_and_sum(expert_num_tokens: Array, alignment: int) -> int:
    """``sum_e round_up(expert_num_tokens[e], alignment)``.

    expert_num_tokens: int32 or int64 ``[E]`` on the host, or a list of integers.

    Raises ValueError for a negative count or an alignment of 0, TypeError for another dtype.
    """
    return _native.expert_num_tokens_round_up_and_sum(expert_num_tokens, alignment)


def compute_aligned_M_and_alignment(
    M: int,
    num_topk: int,
    local_num_experts: int,
    alignment: int,
    expert_tokens_meta: ExpertTokensMetadata | None,
) -> tuple[int, int]:
    """``(M_sum, alignment_used)``: rows of the permuted buffer, and what each expert's rows are padded to.

    With counts on the host (``expert_tokens_meta.expert_num_tokens_cpu``) their exact sum and `alignment` itself;
    otherwise a bound, after the rule in force may have shrunk the alignment.

    Raises ValueError for a zero, a negative count or an overflow.
    """
    counts = None if expert_tokens_meta is None else expert_tokens_meta.expert_num_tokens_cpu
    rule, arch = _own_alignment.rule or (None, None)
    if _alignment is not _own_alignment and counts is None:
        per_call = _alignment.theoretical(M * num_topk, local_num_experts)
        alignment = per_call if per_call and per_call <= alignment else alignment
        rule = arch = None
    try:
        return _native.compute_aligned_m_and_alignment(M, num_topk, local_num_experts, alignment, rule, arch, counts)
    except (TypeError, ValueError) as error:
        raise _renamed(error, _SIZE_NAMES) from None


def compute_aligned_M(
    M: int,
    num_topk: int,
    local_num_experts: int,
    alignment: int,
    expert_tokens_meta: ExpertTokensMetadata | None,
) -> int:
    """The first value of :func:`compute_aligned_M_and_alignment`."""
    return compute_aligned_M_and_alignment(M, num_topk, local_num_experts, alignment, expert_tokens_meta)[0]


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
            # A layout without padding has the counts in front.
            where = (num_local_experts, 1, tokens * topk)
            lists = _arrays.empty((_native.layout_len(tokens, topk, *where),), "int32", topk_ids)
            _native.build_layout(topk_ids, expert_map, *where, lists)
            return lists[:num_local_experts]
        _native.layout_len(0, 1, num_local_experts, 1, 0)  # Before an array is sized by it.
        counts = _arrays.empty((num_local_experts,), "int32", topk_ids)
        _native.count_expert_num_tokens(topk_ids, expert_map, num_local_experts, counts)
    except (TypeError, ValueError) as error:
        raise _renamed(error, {"local_experts": "num_local_experts"}) from None
    return counts


# -- permute ------------------------------------------------------------------------------------------------------------


def deepgemm_moe_permute(
    aq: Array,
    aq_scale: Array,
    topk_ids: Array,
    local_num_experts: int,
    expert_map: Array | None,
    expert_tokens_meta: ExpertTokensMetadata | None,
    aq_out: Array | None = None,
    block_size: int | None = None,
    use_psum_layout: bool = False,
) -> tuple[Array, Array, Array, Array, int]:
    """Lays quantized rows out for DeepGEMM's contiguous grouped GEMM.

    aq: ``[M, H]``, e4m3 (or bytes). aq_scale: float32 ``[M, H / block_size]``, or uint8 (UE8M0), which is packed.
    topk_ids: int32 or int64 ``[M, topk]``. expert_map: int32 ``[G]``. aq_out: ``[M_sum, H]``, written in place; rows of
    padding are left as they are. block_size: values per scale, by default the block in force (128).

    Returns ``(aq_out, scales, grouped_layout, inv_perm, alignment_used)``: scales float32 ``[M_sum, H / block_size]``, or
    int32 ``[M_sum, ceil(H / block_size / 4)]`` with strides ``(1, round_up(M_sum, 4))``; grouped_layout int32 ``[M_sum]``
    (the expert of each row, -1 on padding), or with `use_psum_layout` int32 ``[E]`` (the end of each expert's rows);
    inv_perm int32 ``[M, topk]``, -1 for an empty slot.

    Raises ValueError or TypeError for what does not fit.
    """
    block = _alignment.get()
    group = block if block_size is None else block_size
    if getattr(aq, "is_cuda", False):
        # One call, planning included where that is ours; what it does not take goes step by step.
        alignment, m_sum = block, None
        if expert_tokens_meta is not None or _alignment is not _own_alignment:
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
                _own_alignment.rule,
            )
        except (TypeError, ValueError) as error:
            raise _renamed(error, _PERMUTE_NAMES) from None
        if made is not None:
            return made
    tokens, topk = _arrays.require_array("topk_ids", topk_ids, 2)
    m_sum, alignment = compute_aligned_M_and_alignment(tokens, topk, local_num_experts, block, expert_tokens_meta)
    _, hidden = _arrays.require_array("aq", aq, 2)
    _arrays.require_array("aq_scale", aq_scale, 2)
    if aq_out is None:
        aq_out = _arrays.empty((m_sum, hidden), aq.dtype, aq)
    elif _arrays.require_array("aq_out", aq_out, 2) != (m_sum, hidden):
        raise ValueError(f"aq_out has shape {list(aq_out.shape)}, expected {[m_sum, hidden]}")
    scale_layout = "packed_ue8m0" if _arrays.dtype_name(aq_scale) == "uint8" else "row_major"
    flat, scales = _empty_scales(aq, m_sum, hidden, group, scale_layout)
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
        flat,
        _PERMUTE_NAMES,
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
    m_indices int32 ``[M_sum]`` (live rows) or ``[E]`` with `use_psum_layout`, output_index int32 ``[M, topk]`` (-1 for an
    empty slot), and expert_start_loc int32 ``[E]``, which ends, as the original's, as the end of each expert's rows.

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
        if _arrays.require_array(argument, array, len(shape)) != shape:
            raise ValueError(f"{argument} has shape {list(array.shape)}, expected {list(shape)}")
        if _arrays.dtype_name(array) != "int32":
            raise TypeError(f"{argument} has dtype {array.dtype}, expected int32")
    scale_layout = "packed_ue8m0" if pack_ue8m0 else "row_major"
    flat, scales = _scale_target(output_tensor_scale, rows, hidden, scale_layout, block_size)
    outputs = [
        ("out", output_tensor),
        ("scales", output_tensor_scale),
        ("expert_start_loc", expert_start_loc),
        ("m_indices", m_indices),
        ("output_index", output_index),
    ]
    _require_targets(outputs, recv_x, recv_x_scale, recv_topk, expert_map, _SCATTER_NAMES)
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
        flat,
        _SCATTER_NAMES,
    )
    if scales is not output_tensor_scale:
        _arrays.assign(output_tensor_scale, scales)
    _arrays.assign(expert_start_loc, lists.psum)
    _arrays.assign(output_index, lists.inv_perm)
    _arrays.assign(m_indices, lists.psum if use_psum_layout else _where_live(lists.m_indices, m_indices))


def _where_live(new: Array, old: Array) -> Array:
    if not _arrays.is_tensor(new):
        import numpy

        return numpy.where(new >= 0, new, old.numpy() if _arrays.is_tensor(old) else old)
    torch = sys.modules["torch"]
    return torch.where(new >= 0, new, old if _arrays.is_tensor(old) else torch.from_numpy(old))


def _require_targets(
    outputs: list[tuple[str, Array]],
    x: Array,
    x_scale: Array,
    topk_ids: Array,
    expert_map: Array | None,
    names: dict[str, str],
) -> None:
    """Checks what is written by assignment, at the end, before anything is written at all."""
    inputs = [("x", x), ("x_scales", x_scale), ("topk_ids", topk_ids), ("expert_map", expert_map)]
    try:
        _native.require_targets(outputs, inputs)
    except (TypeError, ValueError) as error:
        raise _renamed(error, names) from None


def _empty_scales(like: Array, rows: int, hidden: int, group: int, scale_layout: str) -> tuple[Array, Array]:
    """Memory for the scales of ``[rows, hidden]``, and the matrix that it is read as."""
    try:
        words = _native.scale_words(rows, hidden, scale_layout, group)
    except (TypeError, ValueError) as error:
        raise _renamed(error, _PERMUTE_NAMES) from None
    groups = hidden // group
    if scale_layout == "row_major":
        flat = _arrays.empty((words,), "float32", like)
        return flat, flat.reshape(rows, groups)
    flat = _arrays.empty((words,), "int32", like)
    return flat, _arrays.column_major(flat, rows, -(-groups // 4))


def _scale_target(scales: Array, rows: int, hidden: int, scale_layout: str, group: int) -> tuple[Array, Array]:
    """Memory for the scales and the matrix it is read as: the caller's own, if it has the strides of its layout."""
    _arrays.require_array("output_tensor_scale", scales, 2)
    flat, matrix = _empty_scales(scales, rows, hidden, group, scale_layout)
    if scales.shape != matrix.shape:
        raise ValueError(f"output_tensor_scale has shape {list(scales.shape)}, expected {list(matrix.shape)}")
    if scales.dtype != matrix.dtype:
        raise TypeError(f"output_tensor_scale has dtype {scales.dtype}, expected {matrix.dtype}")
    # A view of fewer rows than its columns' stride does not own the words between them.
    whole = scale_layout == "row_major" or rows % 4 == 0
    if whole and _arrays.strides(scales) == _arrays.strides(matrix):
        return scales, scales
    return flat, matrix


_SIZE_NAMES = {"topk": "num_topk", "local_experts": "local_num_experts"}
_PERMUTE_NAMES = {
    **_SIZE_NAMES,
    "x": "aq",
    "x_scales": "aq_scale",
    "out": "aq_out",
    "group": "block_size",
    "hidden": "H",
}
_SCATTER_NAMES = {
    "x": "recv_x",
    "x_scales": "recv_x_scale",
    "topk_ids": "recv_topk",
    "expert_num_tokens": "num_recv_tokens_per_expert",
    "out": "output_tensor",
    "scales": "output_tensor_scale",
    "group": "block_size",
    "alignment": "align_m",
    "hidden": "H",
}
_GATHER_NAMES = {
    "rows": "input_tensor",
    "topk_ids": "recv_topk_ids",
    "topk_weights": "recv_topk_weight",
    "inv_perm": "input_index",
    "out": "output_tensor",
}
_UNPERMUTE_NAMES = {"rows": "a", "out": "output"}


def _renamed(error: Exception, names: dict[str, str]) -> Exception:
    """The same error, where it speaks of an argument that has another name here."""
    if _arrays.is_traced():
        return RuntimeError(
            "a trace is being recorded, which would keep the numbers of this call: expected a call outside of "
            "torch.jit.trace and make_fx, or the operators of expertile.torch in them"
        )

    def rename(match: re.Match[str]) -> str:
        return names.get(match[0], match[0])

    return type(error)(re.sub(r"^\w+|(?<=memory with )\w+|(?<=, as )\w+", rename, str(error)))


@dataclass
class _Lists:
    """The lists of a layout, as views of one array."""

    memory: Array
    tokens: int
    topk: int
    experts: int
    m_sum: int

    @property
    def psum(self) -> Array:
        return self.memory[2 * self.experts : 3 * self.experts]

    @property
    def m_indices(self) -> Array:
        return self.memory[3 * self.experts : 3 * self.experts + self.m_sum]

    @property
    def inv_perm(self) -> Array:
        start = 3 * self.experts + self.m_sum
        inv_perm = self.memory[start : start + self.tokens * self.topk].reshape(self.tokens, self.topk)
        if _arrays.on_gpu(inv_perm):
            inv_perm._expertile_complete = True
        return inv_perm


def _permute(
    x: Array,
    x_scale: Array,
    topk_ids: Array,
    experts: int,
    expert_map: Array | None,
    expert_num_tokens: Array | None,
    alignment: int,
    group: int,
    scale_layout: str,
    out: Array,
    scales: Array,
    names: dict[str, str],
) -> _Lists:
    tokens, topk = topk_ids.shape
    m_sum = out.shape[0]
    if out.dtype != x.dtype:
        raise TypeError(f"{names['out']} has dtype {out.dtype}, expected {x.dtype}, as {names['x']}")
    where = (topk_ids, expert_map, experts, alignment, m_sum, expert_num_tokens)
    if not _arrays.is_contiguous(out) or x.itemsize != 1:
        _require_targets([("out", out)], x, x_scale, topk_ids, expert_map, names)
    target = _arrays.contiguous(out)
    try:
        lists = _arrays.empty((_native.layout_len(tokens, topk, experts, alignment, m_sum),), "int32", x)
        if x.itemsize == 1:
            _native.permute_quantized(x, x_scale, *where, group, scale_layout, False, target, scales, lists)
        else:
            # Wider rows cannot be e4m3; they are moved as they are, and so are their scales.
            if scale_layout != "row_major":
                raise TypeError(f"x has dtype {x.dtype}, expected float8_e4m3fn with uint8 scales")
            # The scales first, and not yet to their place: the rows, written last, may still be refused.
            groups = out.shape[1] // group
            if _arrays.require_array("x_scales", x_scale, 2) != (tokens, groups):
                raise ValueError(f"x_scales has shape {list(x_scale.shape)}, expected {[tokens, groups]}")
            if _arrays.dtype_name(x_scale) != _arrays.dtype_name(scales):
                raise TypeError(f"x_scales has dtype {x_scale.dtype}, expected float32")
            moved = _arrays.empty((m_sum, groups), scales.dtype, scales)
            _native.permute_rows(x_scale, *where, True, moved, lists)
            _native.permute_rows(x, *where, False, target, lists)
            _arrays.assign(scales, moved.reshape(scales.shape))
    except (TypeError, ValueError) as error:
        raise _renamed(error, names) from None
    if target is not out:
        _arrays.assign(out, target)
    return _Lists(lists, tokens, topk, experts, m_sum)


def check(device: Any = None) -> None:
    """Waits for the current stream of a CUDA device, and raises ValueError for ids that its kernels had to refuse.

    Only for calls that were not captured into a graph. On the CPU every call raises by itself.
    """
    torch = sys.modules["torch"]
    # "cuda" without a number is the current device, as everywhere in torch.
    index = None if device is None else torch.device(device).index
    _native.cuda_check(torch.cuda.current_device() if index is None else index)


# -- unpermute ----------------------------------------------------------------------------------------------------------


def ep_gather(
    input_tensor: Array,
    recv_topk_ids: Array,
    recv_topk_weight: Array,
    input_index: Array,
    expert_map: Array | None,
    output_tensor: Array,
) -> None:
    """``output_tensor[m] = sum over slots k of recv_topk_weight[m, k] * input_tensor[input_index[m, k]]``.

    input_tensor ``[M_sum, H]`` and output_tensor ``[M, H]``: bfloat16, float16 or float32. The sum is float32, in slot
    order, cast once. Slots whose id is negative, or of an expert that is not local, are skipped; a token without any
    gives zeros.

    Raises ValueError or TypeError for what does not fit.
    """
    _gather(input_tensor, recv_topk_ids, recv_topk_weight, input_index, expert_map, output_tensor, _GATHER_NAMES)


def _gather(
    rows: Array,
    topk_ids: Array,
    topk_weights: Array,
    inv_perm: Array,
    expert_map: Array | None,
    output: Array,
    names: dict[str, str],
) -> None:
    try:
        if getattr(inv_perm, "_expertile_complete", False) and _native.deep_gemm_unpermute(
            rows, inv_perm, topk_weights, output
        ):
            return
        _arrays.require_array("topk_weights", topk_weights, 2)
        slots = _arrays.require_array("inv_perm", inv_perm, 2)
        if _arrays.require_array("out", output, 2)[0] != slots[0]:
            raise ValueError(f"out has shape {list(output.shape)}, expected {[slots[0], output.shape[1]]}")
        if topk_weights.shape != inv_perm.shape:
            raise ValueError(f"topk_weights has shape {list(topk_weights.shape)}, expected {list(slots)}")
        _native.require_slots(*slots)
        if not _arrays.is_contiguous(output):
            inputs = [("rows", rows), ("inv_perm", inv_perm), ("topk_weights", topk_weights), ("topk_ids", topk_ids)]
            _native.require_targets([("out", output)], [*inputs, ("expert_map", expert_map)])
        out = _arrays.contiguous(output)
        weights = _arrays.as_float32(topk_weights)
        if _arrays.on_gpu(rows):
            # Ours says -1 for an empty slot; others leave such slots unwritten, and the kernel does not look at ids.
            if not getattr(inv_perm, "_expertile_complete", False):
                inv_perm = _arrays.without_empty_slots(inv_perm, topk_ids, expert_map)
            rows, inv_perm = _arrays.contiguous(rows), _arrays.contiguous(inv_perm)
            topk_ids = expert_map = None
        _native.unpermute(rows, inv_perm, topk_ids, expert_map, weights, out)
    except (TypeError, ValueError) as error:
        raise _renamed(error, names) from None
    if out is not output:
        _arrays.assign(output, out)


def deepgemm_unpermute_and_reduce(
    a: Array,
    topk_ids: Array,
    topk_weights: Array,
    inv_perm: Array,
    expert_map: Array | None,
    output: Array,
) -> None:
    """:func:`ep_gather` under the name the layer calls: `a` ``[M_sum, H]`` to `output` ``[M, H]``, written in place."""
    _gather(a, topk_ids, topk_weights, inv_perm, expert_map, output, _UNPERMUTE_NAMES)
