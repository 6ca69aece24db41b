"""Stands in for the module that is replaced."""

from vllm.model_executor.layers.fused_moe.utils import count_expert_num_tokens


def expert_num_tokens_round_up_and_sum(expert_num_tokens, alignment):
    return "vllm"


def compute_aligned_M_and_alignment(M, num_topk, local_num_experts, alignment, expert_tokens_meta):
    return "vllm", count_expert_num_tokens(None, 1, None)


def compute_aligned_M(M, num_topk, local_num_experts, alignment, expert_tokens_meta):
    return "vllm"


def ep_scatter(*args, **kwargs):
    return "vllm"


def ep_gather(*args, **kwargs):
    return "vllm"


def deepgemm_moe_permute(*args, **kwargs):
    return "vllm"


def deepgemm_unpermute_and_reduce(*args, **kwargs):
    return "vllm"
