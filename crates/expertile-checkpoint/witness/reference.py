"""What Transformers' own block makes of the tokens: the experts chosen, their weights, and each part of the output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from families import VOCABULARY, Family
from models import decoder_layer

# A logit in bf16 may come out one unit in the last place apart where sums are added up in another order.
BF16_ULP = 2.0**-8
NOISY_RUNS = 16


@dataclass(frozen=True)
class Result:
    """The routing and the output of a block: `routed` and `shared` add up to `whole`."""

    ids: torch.Tensor
    weights: torch.Tensor
    whole: torch.Tensor
    routed: torch.Tensor
    shared: torch.Tensor | None


@dataclass(frozen=True)
class Leeway:
    """What a bf16 router may choose: tokens whose choice the last place of a logit decides, and each weight's range."""

    decided: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor


def _tensor(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _routing(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's choice. Most give (logits, weights, ids); Llama 4's gives every expert's score, zero if not chosen."""
    if len(output) == 3:
        _, weights, ids = output
        return ids, weights
    scores, _ = output
    chosen = int((scores[0] > 0).sum())
    weights, ids = scores.topk(chosen, dim=-1)
    return ids, weights


def token_ids(tokens: int) -> torch.Tensor:
    """The tokens' numbers in the vocabulary, which choose experts in some layers."""
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(2))


def run(model: Any, family: Family, hidden: torch.Tensor) -> Result:
    """Runs the row's block on `hidden` [M, H] in the model's own format."""
    layer = decoder_layer(model, family)
    block = getattr(layer, family.block)
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            # A copy: Llama 4's block adds the routed experts into the shared one's output.
            seen[name] = copy.deepcopy(output)

        return hook

    def keep_input(_module: Any, inputs: Any) -> None:
        seen["normed"] = inputs[0].clone()

    hooks = [getattr(block, family.router).register_forward_hook(keep("router"))]
    if family.norm is not None:
        hooks.append(getattr(block, family.norm).register_forward_pre_hook(keep_input))
    if family.transposed and family.shared is not None:
        hooks.append(getattr(block, family.shared).register_forward_hook(keep("shared")))
    else:
        hooks.append(block.experts.register_forward_hook(keep("experts")))
    try:
        with torch.no_grad():
            by_token = {"input_ids": token_ids(len(hidden)).unsqueeze(0)} if family.by_token else {}
            whole = _tensor(block(hidden.unsqueeze(0), **by_token)).reshape(hidden.shape)
            beside = None
            if family.shared_beside is not None:
                beside = getattr(layer, family.shared_beside)(hidden.unsqueeze(0)).reshape(hidden.shape)
    finally:
        for hook in hooks:
            hook.remove()
    if family.norm is not None:
        whole = seen["normed"].reshape(hidden.shape)
    whole = whole.double()
    shared: torch.Tensor | None = None
    if beside is not None:
        routed, shared = whole, beside.double()
        whole = routed + shared
    elif "shared" in seen:
        shared = seen["shared"].reshape(hidden.shape).double()
        routed = whole - shared
    else:
        routed = seen["experts"].reshape(hidden.shape).double()
        if family.shared is not None:
            shared = whole - routed
    ids, weights = _routing(seen["router"])
    return Result(ids, weights.double(), whole, routed, shared)


def leeway(model: Any, family: Family, hidden: torch.Tensor, experts: int) -> Leeway:
    """Runs the block with logits one bf16 step off in either direction, over and over."""
    block = getattr(decoder_layer(model, family), family.block)
    router = getattr(block, family.router)
    generator = torch.Generator().manual_seed(1)
    exact = F.linear

    def noisy(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = exact(*args, **kwargs)
        steps = torch.randint(-1, 2, logits.shape, generator=generator)
        return (logits.double() * (1 + steps * BF16_ULP)).to(logits.dtype)

    def start(*_: Any) -> None:
        F.linear = noisy

    def stop(*_: Any) -> None:
        F.linear = exact

    hooks = [router.register_forward_pre_hook(start), router.register_forward_hook(stop)]
    dense: list[torch.Tensor] = []
    try:
        for _ in range(NOISY_RUNS):
            result = run(model, family, hidden)
            dense.append(by_expert(result.ids, result.weights, experts))
    finally:
        F.linear = exact
        for hook in hooks:
            hook.remove()
    weights = torch.stack(dense)
    chosen = weights > 0
    decided = (chosen == chosen[0]).all(dim=0).all(dim=-1)
    return Leeway(decided, weights.amin(dim=0), weights.amax(dim=0))


def by_expert(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """The weights as [M, E], zero where an expert is not chosen: the order of the chosen does not matter."""
    # A column more, for ids that choose no expert.
    dense = torch.zeros(ids.shape[0], experts + 1, dtype=torch.float64)
    chosen = torch.where(ids < 0, experts, ids.long())
    return dense.scatter_(1, chosen, weights.double())[:, :experts]
