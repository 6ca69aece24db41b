"""FP8 checkpoints on a CPU: what is quantized stays so, the experts (FP4 ones, too) and the linear layers beside them.

Transformers has no FP8 matrix products for a CPU, and widens such a checkpoint to bfloat16 while it reads it. Its
quantizer for FP8 is replaced by one that does the same, but for models that ask for this implementation: their modules
of experts become Transformers' own ``FP8Experts``, and their linear layers ``PackedFP8Linear``, in half of the memory.
Where no layer would compute the experts then (other blocks, other formats, weights in another order) everything is
widened; where the model has linear layers of a kind of its own, those are, and the plain ones with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .._errors import ArgumentError
from .experts import BLOCK, GROUP, NAME, asks_for_expertile, describe, is_experts
from .fp8_linear import pack_later, stored_in_e4m3
from .load import require_computable

logger = logging.get_logger(__name__)

_METHOD = "fp8"
_FORMATS = ("scale_fmt", "expert_dtype")
_KEPT = "expertile: what the checkpoint has quantized stays so on the CPU, and nothing is dequantized"
_EXPERTS_KEPT = "expertile: the experts stay quantized on the CPU; what is dequantized is the other layers"
_WIDENED = (
    "expertile: FP8Experts are not what these experts are, so they are dequantized on the CPU with the other layers"
)


class ExpertileFP8HfQuantizer(FineGrainedFP8HfQuantizer):
    """Transformers' quantizer for FP8; on a CPU it keeps the weights of models that ask for expertile as they are."""

    _on_cpu = False
    _keeps_experts = False
    _keeps_linears = False
    _files: Iterable[str] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Notes whether the model goes to a CPU and its weights are to be widened for no other reason than that."""
        asked = self.quantization_config.dequantize
        super().validate_environment(*args, **kwargs)
        if self.pre_quantized and not asked:
            self._on_cpu = _names_only_the_cpu(kwargs.get("device_map")) or not _has_accelerator()

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that is told the model's configuration: whether it asks for expertile."""
        config = super().update_attn_implementation(config)
        if self._on_cpu and _asks(config) and _is_computable(self.quantization_config):
            self._keeps_experts = True
            self.quantization_config.dequantize = False
        return config

    def get_modules_to_not_convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        """Also the linear layers, if the experts stay as they are and they do not."""
        names = super().get_modules_to_not_convert(model, *args, **kwargs)
        if not self._keeps_experts:
            return names
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        converted = {name: module for name, module in linears.items() if should_convert_module(name, names)}
        # All that are quantized or none: what widens a weight asks for its name's end and no more.
        kept = stored_in_e4m3(converted, self._files) or set()
        self._keeps_linears = bool(kept)
        return list(dict.fromkeys([*names, *(name for name in linears if name not in kept)]))

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        asked, self._files = self._keeps_experts, kwargs.get("checkpoint_files")
        if asked:
            # All of them or none: the conversions of a checkpoint's weights are those of all layers.
            experts = [module for module in model.modules() if is_experts(module)]
            self._keeps_experts = all(_can_stay(module, self.quantization_config) for module in experts)
            self.quantization_config.dequantize = not self._keeps_experts
        super()._process_model_before_weight_loading(model, **kwargs)
        if asked:
            kept = _KEPT if self._keeps_linears else _EXPERTS_KEPT
            logger.warning_once(kept if self._keeps_experts else _WIDENED)
        if self._keeps_linears:
            pack_later(model)
        if self._keeps_experts:
            # What a saved copy of the model is to say, too.
            self.quantization_config.modules_to_not_convert = self.modules_to_not_convert
        require_computable(model)

    def get_weight_conversions(self) -> list[Any]:
        """Widens every weight that has a scale and that no converter of the model's has taken, unless all are kept."""
        if not self._keeps_experts or self._keeps_linears:
            return super().get_weight_conversions()
        from transformers.core_model_loading import WeightConverter

        widen = self.get_load_operations()["dequantize"]
        return [WeightConverter(names, param, [widen(self)]) for param, names in self.serialized_names.items()]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if self._keeps_experts:
            # Saving a model undoes what loading it did: what has been widened stays so.
            widen = self.get_load_operations()["dequantize"]
            model._weight_conversions = list(_without(widen, model._weight_conversions))
        return model


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def _names_only_the_cpu(device_map: Any) -> bool:
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return device_map is not None and all(str(place) == "cpu" for place in places)


def _asks(config: Any) -> bool:
    """Whether a model's configuration, or one of its parts', asks for expertile."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    return any(getattr(part, "_experts_implementation", None) == NAME for part in parts)


def _is_computable(quantization_config: Any) -> bool:
    """Whether a layer computes experts of such weights."""
    block = quantization_config.weight_block_size
    return block is not None and tuple(block) == BLOCK and quantization_config.activation_scheme == "dynamic"


def _can_stay(module: nn.Module, quantization_config: Any) -> bool:
    """Whether ``FP8Experts``, which reads sizes and activation off the configuration, are what a module is."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    if not asks_for_expertile(module):
        return False
    formats = {name: getattr(quantization_config, name) for name in _FORMATS if hasattr(quantization_config, name)}
    try:
        own = describe(module, any_dtype=True)
        with torch.device("meta"):
            theirs = FP8Experts(module.config, block_size=BLOCK, **formats)
        found = describe(theirs)
    except (ArgumentError, AttributeError, KeyError, TypeError):
        return False
    is_fp4 = formats.get("expert_dtype") == "fp4"
    experts, rows, columns = module.gate_up_proj.shape
    shape = (experts, rows, columns // 2) if is_fp4 else (experts, rows, columns)
    usual = own.gated and not own.interleaved and not own.transposed and not own.biases
    same = found.options == own.options and theirs.gate_up_proj.shape == shape
    if is_fp4:
        return usual and same and columns % GROUP == 0 and theirs.intermediate_dim % GROUP == 0
    # A scale belongs to rows of either gate or up.
    return usual and same and theirs.intermediate_dim % BLOCK[0] == 0


def _without(widen: type, conversions: list[Any]) -> Iterator[Any]:
    """The conversions without those operations, and without what only they needed."""
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        rest = [operation for operation in operations if not isinstance(operation, widen)]
        if len(rest) == len(operations):
            yield conversion
        elif rest:
            sources = [name for name in conversion._original_source_patterns if name.endswith("weight")]
            yield conversion.copy(sources, conversion._original_target_patterns, operations=rest)


def register() -> None:
    """Puts the quantizer in the place of Transformers' own, where that has the hooks this one needs."""
    theirs = auto.AUTO_QUANTIZER_MAPPING.get(_METHOD)
    hooks = ("update_attn_implementation", "get_load_operations", "get_weight_conversions", "serialized_names")
    if theirs is FineGrainedFP8HfQuantizer and all(hasattr(HfQuantizer, hook) for hook in hooks):
        auto.AUTO_QUANTIZER_MAPPING[_METHOD] = ExpertileFP8HfQuantizer
