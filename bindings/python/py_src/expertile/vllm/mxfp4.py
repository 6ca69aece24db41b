"""``ExpertileMxfp4Experts``: gpt-oss's experts in vLLM, MXFP4 as published. Imports vLLM.

vLLM is told the backend that leaves weights as the checkpoint has them (``EMULATION``). When they are loaded, the layer
takes a copy in the order that its kernels read, in 4.25 bits a weight, and vLLM's own memory for them is freed: layer
by layer, so that the peak is one layer more.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static

from .._errors import ArgumentError, ArgumentValueError
from ..torch import Layer
from .experts import (
    _VLLM_NAMES,
    ExpertileExperts,
    _Held,
    detached,
    require_not_capturing,
    sizes_refusal,
    source_of,
)

__all__ = ["ExpertileMxfp4Experts"]

ACTIVATIONS = "EXPERTILE_VLLM_ACTIVATIONS"
"""The variable that says what hidden states are multiplied as: ``bf16``, unless it is ``e4m3``."""

_GROUP = 32
_HALF_BLOCK = 64
_FREED = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")


class ExpertileMxfp4Experts(ExpertileExperts):
    """gpt-oss's experts: MXFP4 weights with biases, gate and up interleaved, the clamped SwiGLU."""

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key == kMxfp4Static and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value == "swigluoai"

    @staticmethod
    def _config_refusal(moe_config: Any, weight_key: Any) -> str | None:
        asked = os.environ.get(ACTIVATIONS, "bf16")
        if asked not in ("bf16", "e4m3"):
            return f'{ACTIVATIONS} is "{asked}", expected "bf16" or "e4m3"'
        if getattr(moe_config.moe_parallel_config, "enable_eplb", False):
            return "experts move between ranks, expected MXFP4 experts that stay"
        return sizes_refusal(moe_config, _HALF_BLOCK if asked == "e4m3" else _GROUP, f"MXFP4 x {asked}")

    @staticmethod
    def _require_scheme(quant_config: Any) -> None:
        if quant_config.weight_quant_dtype != "mxfp4":
            found = f" has weights {quant_config.weight_quant_dtype}"
            raise ArgumentValueError("quant_config", found, quant_config.weight_quant_dtype, "mxfp4")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Makes the layer, and frees what vLLM has loaded: parameters keep their shapes, and one value each."""
        w13, w2 = layer.w13_weight, layer.w2_weight
        held = self._make(w13, w2, ())
        for name in _FREED:
            parameter = getattr(layer, name)
            parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)
        held.source = self._source(w13, w2)
        self._held = held

    def _source(self, w1: Tensor, w2: Tensor) -> tuple[Any, ...]:
        return source_of(w1, w2, self.w1_scale, self.w2_scale)

    def _layer_of(self, w1: Tensor, w2: Tensor) -> _Held:
        """The layer; anew where weights have been bound to other memory."""
        source = self._source(w1, w2)
        if self._held is None or self._held.source != source:
            self._held = self._make(w1, w2, source)
        return self._held

    def _make(self, w1: Tensor, w2: Tensor, source: tuple[Any, ...]) -> _Held:
        require_not_capturing()
        options = {**self._options, "activations": os.environ.get(ACTIVATIONS, "bf16")}
        try:
            layer = Layer(
                w1.detach(),
                w2.detach(),
                w13_scale=detached(self.w1_scale),
                w2_scale=detached(self.w2_scale),
                w13_bias=detached(self.quant_config.w1_bias),
                w2_bias=detached(self.quant_config.w2_bias),
                **options,
            )
        except ArgumentError as error:
            error.rename({**_VLLM_NAMES, "w13_bias": "w1_bias"})
            raise
        return _Held(layer, source, options)
