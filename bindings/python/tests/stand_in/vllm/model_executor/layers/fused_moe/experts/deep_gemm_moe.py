"""Stands in for the experts, which import the functions by name."""

from vllm.model_executor.layers.fused_moe.deep_gemm_utils import (
    compute_aligned_M,
    compute_aligned_M_and_alignment,
    deepgemm_moe_permute,
    deepgemm_unpermute_and_reduce,
)
from vllm.utils.deep_gemm import get_mk_alignment_for_contiguous_layout


def workspace_rows(tokens, topk, experts):
    return compute_aligned_M(tokens, topk, experts, get_mk_alignment_for_contiguous_layout()[0], None)


def apply(aq, aq_scale, topk_ids, topk_weights, experts, gemm):
    rows, scales, layout, inv_perm, alignment = deepgemm_moe_permute(
        aq=aq,
        aq_scale=aq_scale,
        topk_ids=topk_ids,
        local_num_experts=experts,
        expert_map=None,
        expert_tokens_meta=None,
    )
    result = gemm(rows, scales, layout)
    output = result.new_empty(aq.shape)
    deepgemm_unpermute_and_reduce(
        a=result, topk_ids=topk_ids, topk_weights=topk_weights, inv_perm=inv_perm, expert_map=None, output=output
    )
    return output


__all__ = ["apply", "compute_aligned_M_and_alignment", "workspace_rows"]
