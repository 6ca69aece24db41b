"""The families of models: how Transformers builds a tiny one of each, and what its config.json says on the public hub.

A row is data. `config` goes to Transformers' own configuration class; `hub` rewrites the config.json that Transformers
saved into the form in which the family's own releases publish it: other names of keys, lists, nulls, keys that
Transformers does not write. `layouts.py` saves a row's model, `reference.py` runs its block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIDDEN = 256
INTERMEDIATE = 128
DENSE = 320
SHARED = 192
EXPERTS = 8
TOPK = 3
LAYERS = 2
VOCABULARY = 64

Config = dict[str, Any]

ATTENTION: Config = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LATENT_ATTENTION: Config = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
LINEAR_ATTENTION: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
INDEXER: Config = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
# Four groups of two experts, two of which stay: three experts of four, so that a group's worth decides.
GROUPED: Config = {
    "intermediate_size": DENSE,
    "moe_intermediate_size": INTERMEDIATE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": TOPK,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
SIGMOID_KEYS: Config = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1, "moe_layer_freq": 1}
QWEN: Config = {
    **ATTENTION,
    "intermediate_size": DENSE,
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOPK,
}
# Old releases of Transformers wrote every default of generation into config.json.
GENERATION_DEFAULTS: Config = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "output_scores": False,
    "pruned_heads": {},
    "repetition_penalty": 1.0,
    "chunk_size_feed_forward": 0,
    "bad_words_ids": None,
    "prefix": None,
}
VISION: Config = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": HIDDEN}


@dataclass(frozen=True)
class Hub:
    """What turns the config.json that Transformers saved into the one on the hub: keys of the text model."""

    set: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    model_type: str | None = None


@dataclass(frozen=True)
class Family:
    """A tiny model of Transformers' own classes, and where its MoE block is.

    `block`, `router` and `shared` are names of modules, not of tensors on disk. `shared_beside` is a module of the decoder
    layer, not of the block, whose output the layer adds to the block's.
    """

    name: str
    model_type: str
    config: Config
    hub: Hub = field(default_factory=Hub)
    layer: int = 1
    block: str = "mlp"
    router: str = "gate"
    shared: str | None = None
    shared_beside: str | None = None
    # A norm of the block's class through which its output goes, and which is not the experts': left out here.
    norm: str | None = None
    # There is no module that holds router and experts and nothing else: only a refusal is looked for.
    whole_layer: bool = False
    # The router's logits: "bf16" is a product in the weights' format, "f32" one in f32 whatever the weights are.
    logits: str = "bf16"
    # The hub's format of the router's weight and bias, where it is not that of the experts.
    hub_router: str | None = None
    # Arguments of the vision tower's configuration: the model is then the multimodal one with this text model inside.
    vision: Config | None = None
    # Experts lie as [E, in, out] in memory.
    transposed: bool = False
    # On the hub: "experts" (a tensor of each), "fused" ([E, 2I, H]) or "transposed" ([E, H, 2I]).
    hub_experts: str = "experts"
    # Part of a tensor's name that Transformers saves otherwise than it reads it, and what it reads: only the hub's layout
    # is looked at.
    misnamed: tuple[str, str] | None = None
    # Releases in FP8 exist, with these keys in their quantization_config besides the scheme's own.
    fp8: bool = False
    quantization: Mapping[str, Any] = field(default_factory=dict)
    # Roundings to bf16 between a bf16 router's logits and its weights.
    roundings: int = 1
    # The tokens' numbers in the vocabulary choose the experts.
    by_token: bool = False
    # Width of what a bias for the choice is drawn from, and the scale of gate and up (large where they are clamped).
    bias: float = 0.2
    gain: float = 1.0
    # Not asked for yet: the command may refuse it by name.
    optional: bool = False

    @property
    def family(self) -> str:
        """The name without the variant after the slash."""
        return self.name.split("/")[0]

    @property
    def intermediate(self) -> int:
        """Width of a routed expert."""
        return int(self.config.get("moe_intermediate_size") or self.config["intermediate_size"])

    @property
    def publishes_otherwise(self) -> bool:
        """Whether the hub's layout differs from what Transformers 5 saves."""
        return self.hub != Hub() or self.hub_router is not None or self.hub_experts != "experts"


def _grouped(base: Config, **changes: Any) -> Config:
    return {**base, **GROUPED, **changes}


DEEPSEEK_V4: Config = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "hc_mult": 2,
    "sliding_window": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOPK,
    "num_hash_layers": 1,
    **INDEXER,
}
DEEPSEEK_V4_HUB = Hub(
    set={"num_hash_layers": 1, "topk_method": "noaux_tc", "compress_ratios": [128, 128], "num_nextn_predict_layers": 1},
    drop=("mlp_layer_types", "layer_types", "compress_rates", "mlp_bias"),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen2_moe",
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": SHARED},
        Hub(drop=("layer_types", "mlp_only_layers", "head_dim")),
        shared="shared_expert",
    ),
    Family(
        "qwen2_moe/normalised",
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": SHARED, "norm_topk_prob": True, "mlp_only_layers": [0]},
        shared="shared_expert",
    ),
    Family(
        "qwen3_moe",
        "qwen3_moe",
        {**QWEN, "norm_topk_prob": True, "mlp_only_layers": [0]},
        Hub(
            set={
                "num_experts": EXPERTS,
                "shared_expert_intermediate_size": 0,
                "qkv_bias": False,
                "use_qk_norm": True,
                "max_window_layers": 2,
            },
            drop=("num_local_experts",),
        ),
        fp8=True,
        quantization={
            "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.layers.1.mlp.gate"]
        },
    ),
    # No release has it, but Transformers and the command know the activation for every family.
    Family("qwen3_moe/gelu", "qwen3_moe", {**QWEN, "norm_topk_prob": True, "hidden_act": "gelu_pytorch_tanh"}),
    # Gate and up have 1.5 row blocks of scales each.
    Family(
        "qwen3_moe/192",
        "qwen3_moe",
        {**QWEN, "norm_topk_prob": True, "moe_intermediate_size": 192},
        Hub(set={"num_experts": EXPERTS}, drop=("num_local_experts",)),
        fp8=True,
    ),
    # Gate's one row block holds 96 rows; counted over both projections, up would begin inside it.
    Family(
        "qwen3_moe/96",
        "qwen3_moe",
        {**QWEN, "norm_topk_prob": True, "moe_intermediate_size": 96},
        Hub(set={"num_experts": EXPERTS}, drop=("num_local_experts",)),
        fp8=True,
    ),
    Family(
        "qwen3_moe/unnormalised",
        "qwen3_moe",
        {**QWEN, "norm_topk_prob": False, "decoder_sparse_step": 2},
        Hub(set={"num_experts": EXPERTS}, drop=("num_local_experts",)),
    ),
    Family(
        "qwen3_next",
        "qwen3_next",
        {**QWEN, **LINEAR_ATTENTION, "shared_expert_intermediate_size": INTERMEDIATE},
        Hub(set={"full_attention_interval": 4}, drop=("layer_types",)),
        shared="shared_expert",
        fp8=True,
    ),
    Family(
        "qwen3_next/unnormalised",
        "qwen3_next",
        {**QWEN, **LINEAR_ATTENTION, "shared_expert_intermediate_size": SHARED, "norm_topk_prob": False},
        shared="shared_expert",
    ),
    Family(
        "qwen3_5_moe",
        "qwen3_5_moe",
        {
            **QWEN,
            **LINEAR_ATTENTION,
            "moe_intermediate_size": 160,
            "shared_expert_intermediate_size": SHARED,
        },
        Hub(
            set={
                "attn_output_gate": True,
                "full_attention_interval": 4,
                "mlp_only_layers": [],
                "mtp_num_hidden_layers": 1,
                "mtp_use_dedicated_embeddings": False,
                "mamba_ssm_dtype": "float32",
            },
            drop=("intermediate_size",),
        ),
        shared="shared_expert",
        vision=VISION,
        hub_experts="fused",
        fp8=True,
    ),
    Family(
        "qwen3_vl_moe",
        "qwen3_vl_moe",
        {**QWEN, "moe_intermediate_size": 160},
        Hub(set={"num_experts": EXPERTS, "norm_topk_prob": True}, drop=("num_local_experts",)),
        vision={**VISION, "deepstack_visual_indexes": [0]},
        hub_experts="transposed",
        fp8=True,
    ),
    Family(
        "qwen3_vl_moe/square",
        "qwen3_vl_moe",
        QWEN,
        Hub(set={"num_experts": EXPERTS, "norm_topk_prob": True}, drop=("num_local_experts",)),
        vision={**VISION, "deepstack_visual_indexes": [0]},
        hub_experts="transposed",
    ),
    Family(
        "mixtral",
        "mixtral",
        {**ATTENTION, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        Hub(set={"sliding_window": None}, drop=("head_dim", "router_jitter_noise")),
    ),
    Family(
        "deepseek_v2",
        "deepseek_v2",
        _grouped(
            LATENT_ATTENTION,
            topk_method="greedy",
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            first_k_dense_replace=1,
        ),
        Hub(
            set={
                "scoring_func": "softmax",
                "ep_size": 1,
                "moe_layer_freq": 1,
                "aux_loss_alpha": 0.001,
                "seq_aux": True,
            }
        ),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "deepseek_v2/grouped",
        "deepseek_v2",
        _grouped(LATENT_ATTENTION, topk_method="group_limited_greedy", norm_topk_prob=False, first_k_dense_replace=1),
        Hub(
            set={
                "scoring_func": "softmax",
                "ep_size": 1,
                "moe_layer_freq": 1,
                "aux_loss_alpha": 0.001,
                "seq_aux": True,
            }
        ),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "deepseek_v3",
        "deepseek_v3",
        _grouped(LATENT_ATTENTION, n_shared_experts=1, first_k_dense_replace=1),
        Hub(set={**SIGMOID_KEYS, "num_nextn_predict_layers": 1}),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        fp8=True,
    ),
    Family(
        "deepseek_v3/192",
        "deepseek_v3",
        _grouped(LATENT_ATTENTION, n_shared_experts=1, moe_intermediate_size=192, first_k_dense_replace=1),
        Hub(set={**SIGMOID_KEYS, "num_nextn_predict_layers": 1}),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        fp8=True,
    ),
    Family(
        "deepseek_v3/unnormalised",
        "deepseek_v3",
        _grouped(LATENT_ATTENTION, first_k_dense_replace=0, norm_topk_prob=False),
        shared="shared_experts",
        logits="f32",
    ),
    Family(
        "kimi_k2",
        "deepseek_v3",
        _grouped(LATENT_ATTENTION, n_group=1, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.827),
        Hub(
            set={**SIGMOID_KEYS, **GENERATION_DEFAULTS, "aux_loss_alpha": 0.001, "seq_aux": True},
            model_type="kimi_k2",
        ),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        fp8=True,
    ),
    Family(
        "deepseek_v32",
        "deepseek_v32",
        _grouped(LATENT_ATTENTION, **INDEXER, first_k_dense_replace=1),
        Hub(set={**SIGMOID_KEYS, "num_nextn_predict_layers": 1}, drop=("mlp_layer_types", "layer_types", "mlp_bias")),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        fp8=True,
    ),
    Family(
        "deepseek_v4",
        "deepseek_v4",
        DEEPSEEK_V4,
        DEEPSEEK_V4_HUB,
        shared="shared_experts",
        roundings=3,
        gain=8.0,
    ),
    Family(
        "deepseek_v4/first",
        "deepseek_v4",
        DEEPSEEK_V4,
        DEEPSEEK_V4_HUB,
        layer=0,
        shared="shared_experts",
        roundings=3,
        by_token=True,
        gain=8.0,
    ),
    Family(
        "glm4_moe",
        "glm4_moe",
        _grouped(ATTENTION, first_k_dense_replace=1),
        Hub(set={"num_nextn_predict_layers": 1, "use_qk_norm": False}),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        fp8=True,
    ),
    Family(
        "glm4_moe_lite",
        "glm4_moe_lite",
        _grouped(LATENT_ATTENTION),
        Hub(
            set={"topk_method": "noaux_tc", "first_k_dense_replace": 1, "num_nextn_predict_layers": 1},
            drop=("mlp_layer_types",),
        ),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "glm_moe_dsa",
        "glm_moe_dsa",
        _grouped(LATENT_ATTENTION, **INDEXER, first_k_dense_replace=1),
        Hub(
            set={
                **SIGMOID_KEYS,
                "moe_router_dtype": "float32",
                "num_nextn_predict_layers": 1,
            },
            drop=("layer_types", "mlp_bias"),
        ),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        fp8=True,
    ),
    Family(
        "dots1",
        "dots1",
        _grouped(ATTENTION, first_k_dense_replace=1),
        Hub(set={"scoring_func": "noaux_tc", "moe_layer_freq": 1}, drop=("layer_types",)),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "solar_open",
        "solar_open",
        _grouped(ATTENTION),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "solar_open/ungrouped",
        "solar_open",
        _grouped(ATTENTION, n_group=1, topk_group=1),
        Hub(set={"first_k_dense_replace": 0}, drop=("n_group", "topk_group")),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "mimo_v2_flash",
        "mimo_v2_flash",
        {
            **ATTENTION,
            **{key: value for key, value in GROUPED.items() if key != "n_shared_experts"},
            "routed_scaling_factor": 1.0,
        },
        Hub(
            set={
                **SIGMOID_KEYS,
                "moe_layer_freq": [0, 1],
                "n_shared_experts": None,
                "routed_scaling_factor": None,
                "hybrid_layer_pattern": [0, 1],
                "sliding_window_size": 128,
            },
            drop=("mlp_layer_types", "layer_types", "ep_size"),
        ),
        logits="f32",
        hub_router="bf16",
        fp8=True,
        quantization={"ignored_layers": ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]},
    ),
    Family(
        "minimax",
        "minimax",
        {**ATTENTION, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        Hub(set={"postnorm": True, "rotary_dim": 32, "attn_type_list": [0, 1]}, drop=("layer_types",)),
    ),
    Family(
        "minimax_m2",
        "minimax_m2",
        {**ATTENTION, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": TOPK},
        Hub(
            set={
                "scoring_func": "sigmoid",
                "use_routing_bias": True,
                "shared_intermediate_size": 0,
                "attn_type_list": [1, 1],
                "mtp_transformer_layers": 1,
                "num_mtp_modules": 3,
                "use_mtp": True,
                "qk_norm_type": "per_layer",
                "use_qk_norm": True,
                "rotary_dim": 32,
            }
        ),
        hub_router="f32",
        fp8=True,
        quantization={
            "fmt": "float8_e4m3fn",
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    ),
    Family(
        "phimoe",
        "phimoe",
        {
            **ATTENTION,
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "attention_bias": True,
            "lm_head_bias": True,
        },
        Hub(set={"hidden_dropout": 0.0, "rope_scaling": None}),
        router="router",
    ),
    Family(
        "phimoe/jitter",
        "phimoe",
        {**ATTENTION, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "router_jitter_noise": 0.3},
        router="router",
    ),
    Family(
        "olmoe",
        "olmoe",
        {**ATTENTION, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": TOPK},
        Hub(set={"clip_qkv": None, "rope_scaling": None}, drop=("head_dim",)),
    ),
    Family(
        "flex_olmo",
        "flex_olmo",
        {
            **ATTENTION,
            "intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "norm_topk_prob": True,
        },
    ),
    Family(
        "granitemoe",
        "granitemoe",
        {**ATTENTION, "intermediate_size": 160, "num_local_experts": EXPERTS, "num_experts_per_tok": TOPK},
        Hub(
            set={
                "residual_multiplier": 0.22,
                "logits_scaling": 6.0,
                "embedding_multiplier": 12.0,
                "rope_scaling": None,
            }
        ),
        block="block_sparse_moe",
        router="router",
    ),
    Family(
        "granitemoehybrid",
        "granitemoehybrid",
        {
            **ATTENTION,
            "intermediate_size": INTERMEDIATE,
            "shared_intermediate_size": SHARED,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "layer_types": ["attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 16,
        },
        Hub(set={"layer_types": ["attention", "mamba"], "normalization_function": "rmsnorm"}),
        block="block_sparse_moe",
        router="router",
        shared_beside="shared_mlp",
    ),
    Family(
        "granitemoeshared",
        "granitemoeshared",
        {
            **ATTENTION,
            "intermediate_size": INTERMEDIATE,
            "shared_intermediate_size": SHARED,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
        },
        block="block_sparse_moe",
        router="router",
        shared_beside="shared_mlp",
    ),
    Family(
        "ernie4_5_moe",
        "ernie4_5_moe",
        {
            **ATTENTION,
            "intermediate_size": DENSE,
            "moe_intermediate_size": INTERMEDIATE,
            "moe_num_experts": EXPERTS,
            "moe_k": TOPK,
        },
        Hub(
            set={
                "moe_capacity": [64, 64, 64],
                "moe_gate": "topk",
                "moe_use_aux_free": True,
                "moe_layer_end_index": -1,
            },
            drop=("moe_norm_min",),
        ),
        shared="shared_experts",
        logits="f32",
        bias=0.05,
    ),
    Family(
        "hunyuan_v1_moe",
        "hunyuan_v1_moe",
        {**ATTENTION, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "moe_topk": [2, TOPK]},
        Hub(
            set={
                "moe_intermediate_size": [INTERMEDIATE, INTERMEDIATE],
                "num_shared_expert": [1, 1],
                "use_mixed_mlp_moe": True,
                "moe_layer_num_skipped": 0,
                "moe_drop_tokens": False,
                "moe_random_routing_dropped_token": False,
                "group_limited_greedy": False,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
                "capacity_factor": 1.0,
            }
        ),
        shared="shared_mlp",
        logits="f32",
    ),
    Family(
        "llama4",
        "llama4",
        {
            **ATTENTION,
            "intermediate_size": 160,
            "intermediate_size_mlp": DENSE,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        Hub(drop=("moe_layers", "layer_types", "no_rope_layers")),
        block="feed_forward",
        router="router",
        shared="shared_expert",
        vision={
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        transposed=True,
    ),
    Family(
        "llama4/text",
        "llama4_text",
        {
            **ATTENTION,
            "intermediate_size": INTERMEDIATE,
            "intermediate_size_mlp": DENSE,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
        },
        block="feed_forward",
        router="router",
        shared="shared_expert",
        transposed=True,
    ),
    Family(
        "jamba",
        "jamba",
        {
            **{key: value for key, value in ATTENTION.items() if key != "head_dim"},
            "intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "attn_layer_period": 1,
            "attn_layer_offset": 0,
            "use_mamba_kernels": False,
        },
        Hub(set={"num_logits_to_keep": 1, "calc_logits_for_entire_prompt": False}),
        block="feed_forward",
        router="router",
    ),
    Family(
        "gpt_oss",
        "gpt_oss",
        {**ATTENTION, "intermediate_size": 160, "num_local_experts": EXPERTS, "num_experts_per_tok": TOPK},
        Hub(set={"experts_per_token": TOPK, "initial_context_length": 4096}, drop=("swiglu_alpha",)),
        router="router",
        transposed=True,
        bias=0.5,
        gain=4.0,
    ),
    # Smaller, so that the activation is not flat where most gates are.
    Family(
        "gpt_oss/square",
        "gpt_oss",
        {
            **ATTENTION,
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "swiglu_limit": 2.0,
            "swiglu_alpha": 1.2,
        },
        router="router",
        transposed=True,
        bias=0.5,
        gain=1.5,
    ),
    Family(
        "glm4v_moe",
        "glm4v_moe",
        _grouped(ATTENTION, first_k_dense_replace=1),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        vision=VISION,
    ),
    Family(
        "kimi_k25",
        "kimi_k25",
        _grouped(LATENT_ATTENTION, n_group=1, topk_group=1, first_k_dense_replace=1),
        Hub(set={**SIGMOID_KEYS, **GENERATION_DEFAULTS, "model_type": "kimi_k2"}),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
        vision={"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64},
        misnamed=("language_model.model.blocks.", "language_model.model.layers."),
    ),
    Family(
        "exaone_moe",
        "exaone_moe",
        {
            **ATTENTION,
            "intermediate_size": DENSE,
            "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_shared_experts": 2,
            "num_experts_per_tok": TOPK,
            "n_group": 4,
            "topk_group": 2,
            "layer_types": ["full_attention"] * LAYERS,
        },
        Hub(set={"scoring_func": "sigmoid", "topk_method": "noaux_tc"}, drop=("mlp_layer_types",)),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "afmoe",
        "afmoe",
        {
            **ATTENTION,
            "intermediate_size": DENSE,
            "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "route_scale": 2.5,
        },
        Hub(
            set={
                "route_norm": True,
                "score_func": "sigmoid",
                "n_group": 1,
                "topk_group": 1,
                "num_expert_groups": 1,
                "num_limited_groups": 1,
                "use_grouped_mm": True,
            }
        ),
        router="router",
        shared="shared_experts",
    ),
    Family(
        "lfm2_moe",
        "lfm2_moe",
        {
            **ATTENTION,
            "intermediate_size": DENSE,
            "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.5,
            "layer_types": ["full_attention"] * LAYERS,
        },
        block="feed_forward",
    ),
    Family(
        "hy_v3",
        "hy_v3",
        {
            **ATTENTION,
            "intermediate_size": DENSE,
            "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "num_shared_experts": 2,
        },
        shared="shared_experts",
        logits="f32",
    ),
    Family(
        "nemotron_h",
        "nemotron_h",
        {
            **ATTENTION,
            "layers_block_type": ["full_attention", "moe"],
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": TOPK,
            "moe_intermediate_size": INTERMEDIATE,
            "moe_shared_expert_intermediate_size": SHARED,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
        Hub(set={"hybrid_override_pattern": "*E"}, drop=("layers_block_type", "mtp_layers_block_type")),
        block="mixer",
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    # The norm on the block's output, which its class holds, lies beside the block on disk.
    Family(
        "axk1",
        "axk1",
        _grouped(LATENT_ATTENTION),
        Hub(
            set={**SIGMOID_KEYS, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
            drop=("mlp_layer_types",),
        ),
        shared="shared_experts",
        norm="post_mlp_layernorm",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "sarvam_moe",
        "sarvam_moe",
        _grouped(ATTENTION, first_k_dense_replace=1),
        shared="shared_experts",
        logits="f32",
        hub_router="bf16",
    ),
    Family(
        "cohere2_moe",
        "cohere2_moe",
        {**ATTENTION, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": TOPK},
        optional=True,
    ),
    Family(
        "laguna",
        "laguna",
        {**QWEN, "shared_expert_intermediate_size": SHARED, "moe_routed_scaling_factor": 2.5},
        shared="shared_experts",
        optional=True,
    ),
    Family(
        "longcat_flash",
        "longcat_flash",
        {
            **{key: value for key, value in LATENT_ATTENTION.items() if key != "num_hidden_layers"},
            "num_layers": LAYERS,
            "ffn_hidden_size": DENSE,
            "expert_ffn_hidden_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 2,
            "moe_topk": TOPK,
        },
        router="router",
        logits="f32",
        optional=True,
    ),
    Family(
        "gemma4",
        "gemma4",
        {
            **ATTENTION,
            "intermediate_size": DENSE,
            "moe_intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "top_k_experts": TOPK,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 64,
        },
        router="router",
        vision={
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 64,
        },
        whole_layer=True,
        optional=True,
    ),
    Family(
        "mellum",
        "mellum",
        {**QWEN, "norm_topk_prob": True, "layer_types": ["full_attention"] * LAYERS},
    ),
)


def select(name: str | None) -> list[Family]:
    """The rows of the family `name`, or its one row where a variant follows a slash; all rows without a name."""
    return [row for row in FAMILIES if name is None or name in (row.name, row.family)]
