"""vLLM 0.33.0's ``vllm.model_executor.layers.fused_moe.deep_gemm_utils``, function for function.

Same names, parameters (positional and by keyword) and returns, on torch tensors and NumPy arrays; arrays that a
function creates are of the kind of its first argument. What differs is what the original leaves open or gets wrong:

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

from ._alignment import (
    ExpertTokensMetadata,
    compute_aligned_M,
    compute_aligned_M_and_alignment,
    expert_num_tokens_round_up_and_sum,
    get_mk_alignment_for_contiguous_layout,
    get_theoretical_mk_alignment_for_contiguous_layout,
    mk_alignment_scope,
    set_alignment_rule,
    set_mk_alignment_for_contiguous_layout,
)
from .permute import check, count_expert_num_tokens, deepgemm_moe_permute, ep_scatter
from .unpermute import deepgemm_unpermute_and_reduce, ep_gather

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
