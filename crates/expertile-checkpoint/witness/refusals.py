"""Checkpoints that must be refused: a key or a tensor changes the numbers and is not the family's, or one is missing.

Each row takes a checkpoint of `families.py` that is read right, and changes one thing. The command must end with exit
code 2 and name what was changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from families import HIDDEN, INTERMEDIATE
from layouts import Config, Tensors, save

BLOCK = "model.layers.1.mlp"
SPARSE_BLOCK = "model.layers.1.block_sparse_moe"


@dataclass(frozen=True)
class Refusal:
    """A change to a row's checkpoint, and what the complaint must name (one of these)."""

    name: str
    row: str
    named: tuple[str, ...]
    keys: Mapping[str, Any] = field(default_factory=dict)
    drop_keys: tuple[str, ...] = ()
    # Tensors to add, by shape.
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # Tensors to leave out: every name that contains one of these.
    drop_tensors: tuple[str, ...] = ()
    # Of the quantized checkpoint of the row, not of the bf16 one.
    fp8: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    layer: int = 1


def _relabelled(row: str, model_type: str, named: tuple[str, ...]) -> list[Refusal]:
    """Another family's `model_type`, as vendors' notes suggest; with and without the class that gives it away."""
    return [
        Refusal(f"{row} as {model_type}", row, (*named, "architectures"), {"model_type": model_type}),
        Refusal(f"{row} as {model_type}, no class", row, named, {"model_type": model_type}, ("architectures",)),
    ]


def _key(row: str, key: str, value: Any) -> Refusal:
    return Refusal(f"{row}: {key} = {json.dumps(value)}", row, (key,), {key: value})


def _tensor(row: str, name: str, *shape: int) -> Refusal:
    return Refusal(f"{row}: tensor {name}", row, (name,), tensors={name: shape})


def _missing(row: str, name: str) -> Refusal:
    return Refusal(f"{row}: without {name}", row, (name,), drop_tensors=(name,))


REFUSALS: tuple[Refusal, ...] = (
    *_relabelled("minimax_m2", "mixtral", ("e_score_correction_bias", "scoring_func", "use_routing_bias")),
    *_relabelled("qwen2_moe", "qwen3_moe", ("shared_expert",)),
    *_relabelled("qwen3_next", "qwen3_moe", ("shared_expert", "linear_", "full_attention_interval")),
    *_relabelled("phimoe", "mixtral", ("input_jitter_noise", "router_jitter_noise")),
    *_relabelled("deepseek_v3", "deepseek_v2", ("e_score_correction_bias", "scoring_func", "topk_method")),
    *_relabelled("ernie4_5_moe", "qwen2_moe", ("moe_statics", "moe_", "num_experts")),
    _key("qwen3_moe", "router_temperature", 0.5),
    _key("qwen3_moe", "swiglu_limit", 7.0),
    _key("qwen3_moe", "scoring_func", "sigmoid"),
    _key("qwen3_moe", "routed_scaling_factor", 2.5),
    _key("qwen3_moe", "n_group", 4),
    _key("qwen3_moe", "shared_expert_intermediate_size", 64),
    _key("qwen3_moe", "expert_dtype", "fp4"),
    _key("qwen3_moe", "hidden_act", "relu"),
    _key("qwen3_moe", "moe_router_logit_softcapping", 30.0),
    _key("qwen3_moe", "moe_apply_router_weight_on_input", True),
    _key("mixtral", "norm_topk_prob", False),
    _key("mixtral", "use_routing_bias", True),
    _key("mixtral", "hidden_act", "gelu"),
    _key("deepseek_v3", "scoring_func", "softmax"),
    _key("deepseek_v3", "scoring_func", "sqrtsoftplus"),
    _key("deepseek_v3", "topk_method", "greedy"),
    _key("deepseek_v3", "expert_dtype", "fp4"),
    _key("deepseek_v3", "swiglu_limit", 10.0),
    _key("deepseek_v3", "moe_layer_freq", 2),
    _key("deepseek_v2", "norm_topk_prob", True),
    _key("deepseek_v2", "mlp_bias", True),
    _key("deepseek_v2", "topk_method", "noaux_tc"),
    _key("ernie4_5_moe", "use_bias", True),
    _key("hunyuan_v1_moe", "group_limited_greedy", True),
    _key("gpt_oss", "swiglu_beta", 2.0),
    _tensor("qwen3_moe", f"{BLOCK}.experts.0.gate_proj.bias", INTERMEDIATE),
    _tensor("qwen3_moe", f"{BLOCK}.experts.3.down_proj.bias", HIDDEN),
    _tensor("qwen3_moe", f"{BLOCK}.gate.bias", 8),
    _tensor("qwen3_moe", f"{BLOCK}.gate.e_score_correction_bias", 8),
    _tensor("qwen3_moe", f"{BLOCK}.shared_expert.gate_proj.weight", 64, HIDDEN),
    _tensor("qwen3_moe", f"{BLOCK}.shared_expert_gate.weight", 1, HIDDEN),
    _tensor("qwen3_moe", f"{BLOCK}.experts.8.gate_proj.weight", INTERMEDIATE, HIDDEN),
    _tensor("mixtral", f"{SPARSE_BLOCK}.e_score_correction_bias", 8),
    _tensor("mixtral", f"{SPARSE_BLOCK}.experts.0.w1.bias", INTERMEDIATE),
    _tensor("deepseek_v2", f"{BLOCK}.gate.e_score_correction_bias", 8),
    _tensor("deepseek_v3", f"{BLOCK}.shared_expert_gate.weight", 1, HIDDEN),
    _missing("deepseek_v3", f"{BLOCK}.gate.e_score_correction_bias"),
    _missing("deepseek_v3", f"{BLOCK}.shared_experts.up_proj.weight"),
    _missing("deepseek_v3", f"{BLOCK}.experts.5.down_proj.weight"),
    _missing("qwen2_moe", f"{BLOCK}.shared_expert_gate.weight"),
    _missing("gpt_oss", f"{BLOCK}.experts.gate_up_proj_bias"),
    _missing("gpt_oss", f"{BLOCK}.router.bias"),
    Refusal("deepseek_v3: a dense layer", "deepseek_v3", ("layer",), layer=0),
    Refusal("jamba: a dense layer", "jamba", ("layer",), layer=0),
    Refusal("qwen3_moe: a layer past the last", "qwen3_moe", ("layer",), layer=2),
    Refusal(
        "qwen3_moe: 64 x 64 blocks",
        "qwen3_moe",
        ("weight_block_size",),
        fp8=True,
        quantization={"weight_block_size": [64, 64]},
    ),
    Refusal("qwen3_moe: e5m2", "qwen3_moe", ("fmt", "e5m2"), fp8=True, quantization={"fmt": "e5m2"}),
    Refusal(
        "qwen3_moe: a method unheard of",
        "qwen3_moe",
        ("quant_method", "awq"),
        fp8=True,
        quantization={"quant_method": "awq"},
    ),
    Refusal(
        "qwen3_moe: scales missing",
        "qwen3_moe",
        ("weight_scale_inv",),
        fp8=True,
        drop_tensors=(f"{BLOCK}.experts.2.up_proj.weight_scale_inv",),
    ),
    Refusal(
        "qwen3_moe: scales for twice the rows",
        "qwen3_moe",
        (f"{BLOCK}.experts.2.up_proj.weight_scale_inv",),
        fp8=True,
        tensors={f"{BLOCK}.experts.2.up_proj.weight_scale_inv": (2, 2)},
    ),
    Refusal(
        "qwen3_moe: a second scale",
        "qwen3_moe",
        ("weight_scale", "input_scale"),
        fp8=True,
        tensors={f"{BLOCK}.experts.2.up_proj.input_scale": (1,)},
    ),
)


def spoil(checkpoint: Path, refusal: Refusal, folder: Path) -> None:
    """Writes the checkpoint with the row's change into `folder`."""
    config: Config = json.loads((checkpoint / "config.json").read_text())
    tensors: Tensors = load_file(checkpoint / "model.safetensors")
    text = config.get("text_config", config)
    text.update(refusal.keys)
    for key in refusal.drop_keys:
        config.pop(key, None)
    if refusal.quantization:
        config["quantization_config"].update(refusal.quantization)
    tensors = {
        name: tensor for name, tensor in tensors.items() if not any(part in name for part in refusal.drop_tensors)
    }
    for name, shape in refusal.tensors.items():
        dtype = torch.float32 if "scale" in name else torch.bfloat16
        tensors[name] = torch.full(shape, 0.5, dtype=dtype)
    save(folder, config, tensors)
