"""MXFP4 checkpoints of gpt-oss on a CPU or a Hopper GPU: the experts stay as they are.

Transformers computes with them only by kernels of other packages, in an order of their own, and widens them to bfloat16
else: four times the memory. Its quantizer for MXFP4 is replaced by one that does the same, but for models that ask for
this implementation: their modules of experts become ``Mxfp4Experts``, whose parameters are the checkpoint's own blocks
and scales.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils import logging

from .. import _native
from .experts import GROUP, asks_for_expertile, is_experts
from .fp8 import _asks, _has_accelerator, _names_only_the_cpu
from .load import require_computable

logger = logging.get_logger(__name__)

_METHOD = "mxfp4"
_KEPT = "expertile: the experts stay MXFP4"


@functools.cache
def experts_class() -> type[nn.Module]:
    """The module that stands in for ``GptOssExperts``."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    @use_experts_implementation(is_concatenated=False, is_transposed=False, has_bias=True)
    class Mxfp4Experts(nn.Module):
        """gpt-oss's experts as its checkpoints hold them, computed by expertile only."""

        _apply_gate = GptOssExperts._apply_gate

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.intermediate_size = config.intermediate_size
            self.num_experts = config.num_local_experts
            self.hidden_size = config.hidden_size
            self.alpha = config.swiglu_alpha
            self.limit = config.swiglu_limit
            hidden, intermediate = self.hidden_size, self.intermediate_size
            for name, rows, columns in (
                ("gate_up_proj", 2 * intermediate, hidden),
                ("down_proj", hidden, intermediate),
            ):
                groups = (self.num_experts, rows, columns // GROUP)
                self.register_parameter(f"{name}_blocks", _bytes(*groups, GROUP // 2))
                self.register_parameter(f"{name}_scales", _bytes(*groups))
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))

        def forward(self, *_: Any, **__: Any) -> Tensor:
            raise RuntimeError(
                "MXFP4 experts that were loaded for expertile are computed by nothing else: load the model with "
                "another experts_implementation"
            )

    return Mxfp4Experts


def _bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.uint8), requires_grad=False)


class ExpertileMxfp4HfQuantizer(Mxfp4HfQuantizer):
    """Transformers' quantizer for MXFP4; it keeps the experts of models that ask for expertile as they are."""

    _goes_where_layers_are = False
    _keeps_experts = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Notes whether the model goes to a CPU or a Hopper, and whether nobody asked for its weights to be widened."""
        asked = self.quantization_config.dequantize
        super().validate_environment(*args, **kwargs)
        if self.pre_quantized and not asked:
            on_cpu = _names_only_the_cpu(kwargs.get("device_map")) or not _has_accelerator()
            self._goes_where_layers_are = on_cpu or _has_only_hoppers()

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that is told the model's configuration: whether it asks for expertile."""
        config = super().update_attn_implementation(config)
        if self._goes_where_layers_are and _asks(config):
            self._keeps_experts = True
            self.quantization_config.dequantize = False
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if self._keeps_experts:
            # All of them or none: the conversions of a checkpoint's weights are those of all layers.
            self._keeps_experts = all(_can_stay(module) for module in model.modules() if is_experts(module))
        if not self._keeps_experts:
            super()._process_model_before_weight_loading(model, *args, **kwargs)
            return
        logger.warning_once(_KEPT)
        for name, module in list(model.named_modules()):
            if is_experts(module):
                with torch.device("meta"):
                    model.set_submodule(name, experts_class()(module.config).to(dtype=module.down_proj_bias.dtype))
        require_computable(model)

    def param_needs_quantization(self, *args: Any, **kwargs: Any) -> bool:
        """No parameter is made of others if the experts stay as they are."""
        return not self._keeps_experts and super().param_needs_quantization(*args, **kwargs)

    def get_weight_conversions(self) -> list[Any]:
        """None: blocks and scales are parameters by their own names."""
        return [] if self._keeps_experts else super().get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """As they are, for the same reason."""
        return (
            weight_conversions if self._keeps_experts else super().update_weight_conversions(weight_conversions, model)
        )

    def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
        """What the modules say."""
        if self._keeps_experts:
            return HfQuantizer.get_state_dict_and_metadata(self, model)
        return super().get_state_dict_and_metadata(model)


def _has_only_hoppers() -> bool:
    """Whether every accelerator here is a GPU whose kernels a layer can have."""
    if not torch.cuda.is_available() or _native.cuda_unavailable() is not None:
        return False
    return all(torch.cuda.get_device_capability(index)[0] == 9 for index in range(torch.cuda.device_count()))


def _can_stay(module: nn.Module) -> bool:
    """Whether ``Mxfp4Experts`` are what a module is."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return type(module) is GptOssExperts and asks_for_expertile(module)


def register() -> None:
    """Puts the quantizer in the place of Transformers' own, where that has the hooks this one needs."""
    theirs = auto.AUTO_QUANTIZER_MAPPING.get(_METHOD)
    hooks = ("update_attn_implementation", "get_weight_conversions", "update_weight_conversions")
    if theirs is Mxfp4HfQuantizer and all(hasattr(HfQuantizer, hook) for hook in hooks):
        auto.AUTO_QUANTIZER_MAPPING[_METHOD] = ExpertileMxfp4HfQuantizer
