"""Tiny models of Transformers' own classes: built from a row of `families.py` with random weights, or read again."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from families import EXPERTS, Family

# Standard deviation of the router's logits, and of biases inside the experts.
LOGITS = 1.0
EXPERT_BIAS = 0.5


def _auto_class(family: Family) -> Any:
    return transformers.AutoModelForImageTextToText if family.vision else transformers.AutoModelForCausalLM


def configuration(family: Family) -> Any:
    """The row's configuration, of Transformers' own class."""
    config_class = transformers.CONFIG_MAPPING[family.model_type]
    if family.vision is None:
        return config_class(**family.config)
    return config_class(text_config=dict(family.config), vision_config=dict(family.vision))


def build(family: Family) -> Any:
    """The row's model in bf16 (what Transformers keeps in f32 stays so), its MoE block with random weights."""
    torch.manual_seed(zlib.crc32(family.family.encode()))
    model = _auto_class(family).from_config(configuration(family), dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(family.name.encode()))
    for module in block_modules(model, family):
        fill(module, family, generator)
    return model


def load(folder: Path, family: Family, dtype: torch.dtype) -> Any:
    """The model as Transformers reads it from `folder`; a tensor too few, too many or of another shape is an error."""
    config: Any = None
    if family.hub.model_type is not None:
        keys = json.loads((folder / "config.json").read_text())
        keys["model_type"] = family.model_type
        config = transformers.CONFIG_MAPPING[family.model_type].from_dict(keys)
    model, info = _auto_class(family).from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True, experts_implementation="eager"
    )
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise RuntimeError(f"{family.name}: Transformers does not read {folder} whole: {wrong}")
    return model.eval()


def decoder_layer(model: Any, family: Family) -> Any:
    """The decoder layer with the row's block."""
    for path in ("model.language_model.layers", "language_model.model.layers", "model.layers"):
        module: Any = model
        for name in path.split("."):
            module = getattr(module, name, None)
            if module is None:
                break
        else:
            return module[family.layer]
    raise RuntimeError(f"{family.name}: no decoder layers in {type(model).__name__}")


def block_modules(model: Any, family: Family) -> list[Any]:
    """The block, and what lies beside it in the layer but belongs to it."""
    layer = decoder_layer(model, family)
    return [getattr(layer, name) for name in (family.block, family.shared_beside) if name is not None]


def fill(module: nn.Module, family: Family, generator: torch.Generator) -> None:
    """Random values at the scale of trained weights: products keep the size of what goes in, no bias is zero."""
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        last = name.split(".")[-1]
        if not value.is_floating_point():
            # The experts of each number in the vocabulary.
            rows, topk = value.shape
            value.copy_(torch.rand(rows, EXPERTS, generator=generator).topk(topk).indices)
            continue
        if "bias" in last:
            in_experts = "proj" in last
            width = EXPERT_BIAS if in_experts else family.bias
            random = (torch.rand(value.shape, generator=generator) * 2 - 1) * width
        else:
            inputs = value.shape[-2] if family.transposed and value.ndim == 3 else value.shape[-1]
            scale = inputs**-0.5
            if "gate_up" in name:
                scale *= family.gain
            if name.split(".")[0] == family.router:
                scale *= LOGITS
            random = torch.randn(value.shape, generator=generator) * scale
        with torch.no_grad():
            value.copy_(random)
