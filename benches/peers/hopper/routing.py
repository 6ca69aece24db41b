"""Which experts the tokens of a call choose."""

import torch

from device import DEVICE

KINDS = ("uniform", "zipf")


def routing(tokens, topk, experts, global_experts, seed, kind="uniform"):
    """Distinct experts per token: ids i32, map, weights. Under `zipf` the r-th favourite expert is chosen in proportion
    to 1 / r; which one that is comes from the seed."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    scores = torch.rand((tokens, global_experts), device=DEVICE, generator=generator)
    if kind == "zipf":
        rank = torch.randperm(global_experts, device=DEVICE, generator=generator) + 1
        # The largest of log p + Gumbel noise are draws in proportion to p, without replacement.
        scores = -torch.log(-torch.log(scores.clamp(min=1e-30))) - torch.log(rank.float())
    elif kind != "uniform":
        raise ValueError(f"routing {kind!r}, expected one of {', '.join(KINDS)}")
    ids = scores.topk(topk, dim=1).indices.to(torch.int32)
    weights = torch.rand((tokens, topk), device=DEVICE, generator=generator)
    expert_map = None
    if experts != global_experts:
        expert_map = torch.full((global_experts,), -1, device=DEVICE, dtype=torch.int32)
        expert_map[:experts] = torch.arange(experts, device=DEVICE, dtype=torch.int32)
    return ids, expert_map, weights


def local_ids(ids, expert_map):
    return ids if expert_map is None else expert_map[ids.long()]
