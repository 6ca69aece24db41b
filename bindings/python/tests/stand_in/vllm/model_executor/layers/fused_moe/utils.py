"""Stands in for the module that holds count_expert_num_tokens."""


def count_expert_num_tokens(topk_ids, num_local_experts, expert_map):
    return "vllm"
