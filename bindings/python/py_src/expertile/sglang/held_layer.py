"""The layer of a runner's weights: made from them in place, and prepared for calls before they come."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .._errors import ArgumentTypeError
from ..torch import Layer
from . import serving
from .refusal import layer_options, of_config, of_weights

Place = tuple[tuple[int, int], ...]
_Kind = tuple[int, torch.dtype, torch.dtype]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHTS = ("w13_weight", "w2_weight", "w13_scale", "w2_scale")


def place_of(weights: Any) -> Place:
    """Where weights and scales are, and on the CPU, where they are copied, how often they have been written."""
    place = []
    for name in _WEIGHTS:
        tensor = getattr(weights, name, None)
        if tensor is not None:
            copied = not (tensor.is_cuda or tensor.is_inference())
            place.append((tensor.data_ptr(), tensor._version if copied else 0))
    return tuple(place)


class HeldLayer:
    """What is known of weights at a place: their layer, or why there is none."""

    def __init__(self, place: Place, refused: str | None) -> None:
        self.place = place
        self.refused = refused
        self.layer: Layer | None = None
        # Of an expert parallel rank: the length says how many experts share a token's slots, which the tiles depend on.
        self.expert_map: Tensor | None = None
        self.calls = 0
        self.captured = False
        self._prepared: dict[_Kind, int] = {}
        self._not_prepared: dict[_Kind, str] = {}
        # While they are alive no other weights are at their place.
        self._weights: list[Tensor] = []

    @classmethod
    def of(cls, place: Place, config: Any, weights: Any) -> HeldLayer:
        """Makes the layer, if it takes the weights."""
        held = cls(place, of_config(config) or of_weights(weights))
        if held.refused is None:
            try:
                held.layer = _layer(config, weights)
                held.expert_map = _local_ids(config.num_experts, held.layer)
            except (ValueError, TypeError, RuntimeError, MemoryError) as reason:
                held.refused = f"{type(reason).__name__}: {reason}"
            found = (getattr(weights, name) for name in _WEIGHTS)
            held._weights = [tensor.detach() for tensor in found if tensor is not None]
        return held

    def prepare(self, hidden_states: Tensor, topk_ids: Tensor) -> str | None:
        """Compiles what such calls need, up to the most tokens of this server; the reason if it cannot be done.

        Raises TypeError for dtypes of which there are no calls.
        """
        layer = self.layer
        if layer is None or layer.device.type != "cuda" or topk_ids.dim() != 2:
            return None  # On the CPU there is nothing to compile; what does not fit, the call says.
        if hidden_states.dtype not in _FLOATS:
            found = f" has dtype {hidden_states.dtype}"
            raise ArgumentTypeError("hidden_states", found, hidden_states.dtype, "bfloat16, float16 or float32")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError("topk_ids", f" has dtype {topk_ids.dtype}", topk_ids.dtype, "int32 or int64")
        tokens, topk = topk_ids.shape
        kind = (topk, topk_ids.dtype, hidden_states.dtype)
        if self._prepared.get(kind, -1) >= tokens:
            return None
        if kind in self._not_prepared:
            return self._not_prepared[kind]
        if torch.cuda.is_current_stream_capturing():
            return f"a CUDA graph captures the first call of {tokens} tokens, topk {topk}, expected a warm-up before it"
        most = serving.max_tokens(tokens)
        serving.say(logging.INFO, f"expertile compiles for calls of up to {most} tokens, topk {topk}")
        experts = None if self.expert_map is None else len(self.expert_map)
        try:
            layer.prepare(most, topk, global_experts=experts, ids_dtype=topk_ids.dtype, dtype=hidden_states.dtype)
        except (ValueError, RuntimeError, MemoryError) as reason:
            self._not_prepared[kind] = f"{type(reason).__name__}: {reason}"
            return self._not_prepared[kind]
        self._prepared[kind] = most
        return None


def _layer(config: Any, weights: Any) -> Layer:
    options = layer_options(config)
    if weights.use_fp8_w8a8:
        options |= {"w13_scale": weights.w13_scale.detach(), "w2_scale": weights.w2_scale.detach()}
        options["activations"] = "e4m3"
    return Layer(weights.w13_weight.detach(), weights.w2_weight.detach(), **options)


def _local_ids(global_experts: int | None, layer: Layer) -> Tensor | None:
    """A map of ids that are local already to themselves, as long as there are experts on all ranks."""
    local = layer.local_experts
    if global_experts is None or global_experts <= local:
        return None
    ids = torch.arange(global_experts, dtype=torch.int32, device=layer.device)
    return torch.where(ids < local, ids, -1).to(torch.int32)
