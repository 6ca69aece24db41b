//! The rows: each says how a family names its keys and tensors, and what it computes.

use super::{
    ActivationRow, ByToken, CorrectionBias, ExpertNames, Family, GroupsRow, Layers, Normalize, RouterRow, Scores,
    SharedNames, SharedRow, Width,
};
use expertile::{GateUpOrder, GroupWorth, Normalization};

/// Names of gate, up and down.
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
const W_NAMES: [&str; 3] = ["w1", "w3", "w2"];

const EACH: ExpertNames = each(PROJECTIONS);
const EACH_W: ExpertNames = each(W_NAMES);
const fn each([gate, up, down]: [&'static str; 3]) -> ExpertNames {
    ExpertNames::Each { gate: Some(gate), up, down }
}
const FUSED: ExpertNames = ExpertNames::Fused {
    gate_up: "experts.gate_up_proj",
    down: "experts.down_proj",
    biases: None,
    order: GateUpOrder::Halves,
};
const QWEN_NAMES: &[ExpertNames] = &[EACH, FUSED];
const MIXTRAL_NAMES: &[ExpertNames] = &[EACH_W, FUSED];

const EXPERTS: &[&str] = &["n_routed_experts", "num_experts", "num_local_experts"];
const TOPK: &[&str] = &["num_experts_per_tok"];
const MOE_INTERMEDIATE: &[&str] = &["moe_intermediate_size"];
const INTERMEDIATE: &[&str] = &["intermediate_size"];

const SOFTMAX: RouterRow = RouterRow {
    weight: "gate.weight",
    logit_bias: None,
    correction_bias: None,
    scores: Scores::Softmax,
    groups: GroupsRow::Never,
    normalize: Normalize::Always(Normalization::Sum),
    factor: None,
    by_token: None,
};
/// Softmax, divided by its sum if the config says so.
const SOFTMAX_FLAG: RouterRow =
    RouterRow { normalize: Normalize::Flag("norm_topk_prob", Normalization::Sum), ..SOFTMAX };
/// DeepSeek-V3's: sigmoid with a correction bias, groups by their two best, a factor.
const DEEPSEEK: RouterRow = RouterRow {
    correction_bias: Some(CorrectionBias { name: "gate.e_score_correction_bias", flag: None }),
    scores: Scores::Sigmoid,
    groups: GroupsRow::Always(GroupWorth::BestTwo),
    normalize: Normalize::Flag("norm_topk_prob", Normalization::SumPlus(1e-20)),
    factor: Some("routed_scaling_factor"),
    ..SOFTMAX
};

const DEEPSEEK_OR_ONE_GROUP: RouterRow = RouterRow { groups: GroupsRow::OrOne(GroupWorth::BestTwo), ..DEEPSEEK };

/// The shared expert of Qwen2-MoE and its heirs.
const GATED_SHARED: Option<SharedRow> = Some(SharedRow {
    names: SharedNames::Separate("shared_expert", PROJECTIONS),
    gate: Some("shared_expert_gate.weight"),
    width: Width::Key("shared_expert_intermediate_size"),
});
/// DeepSeek's: several experts' widths in one.
const fn shared(count: &'static str) -> Option<SharedRow> {
    Some(SharedRow {
        names: SharedNames::Separate("shared_experts", PROJECTIONS),
        gate: None,
        width: Width::Times(count),
    })
}

const QWEN2_MOE: Family = Family {
    model_types: &["qwen2_moe"],
    architectures: &["Qwen2MoeForCausalLM"],
    block: "mlp",
    experts: QWEN_NAMES,
    experts_keys: EXPERTS,
    topk_keys: TOPK,
    intermediate_keys: MOE_INTERMEDIATE,
    router: SOFTMAX_FLAG,
    activation: ActivationRow::Gated("hidden_act"),
    weight_on_input: false,
    shared: GATED_SHARED,
    layers: Layers::Stepped,
    fixed: &[],
    inert: &[],
};
const QWEN3_MOE: Family = Family {
    model_types: &["qwen3_moe"],
    architectures: &["Qwen3MoeForCausalLM"],
    shared: None,
    fixed: &[("shared_expert_intermediate_size", &["0"])],
    ..QWEN2_MOE
};
const DEEPSEEK_V3: Family = Family {
    model_types: &["deepseek_v3", "kimi_k2"],
    architectures: &["DeepseekV3ForCausalLM"],
    router: DEEPSEEK,
    shared: shared("n_shared_experts"),
    layers: Layers::AfterFirst,
    fixed: &[("scoring_func", &["\"sigmoid\""]), ("topk_method", &["\"noaux_tc\""]), ("mlp_bias", &["false"])],
    ..QWEN2_MOE
};
const MIXTRAL: Family = Family {
    model_types: &["mixtral"],
    architectures: &["MixtralForCausalLM"],
    block: "block_sparse_moe",
    experts: MIXTRAL_NAMES,
    intermediate_keys: INTERMEDIATE,
    router: SOFTMAX,
    shared: None,
    layers: Layers::All,
    fixed: &[("norm_topk_prob", &["true"])],
    ..QWEN2_MOE
};
const OLMOE: Family = Family {
    model_types: &["olmoe"],
    architectures: &["OlmoeForCausalLM"],
    intermediate_keys: INTERMEDIATE,
    shared: None,
    layers: Layers::All,
    ..QWEN2_MOE
};
const GRANITE_NAMES: &[ExpertNames] = &[
    ExpertNames::Fused {
        gate_up: "input_linear.weight",
        down: "output_linear.weight",
        biases: None,
        order: GateUpOrder::Halves,
    },
    FUSED,
];
const GRANITEMOE: Family = Family {
    model_types: &["granitemoe"],
    architectures: &["GraniteMoeForCausalLM"],
    experts: GRANITE_NAMES,
    router: RouterRow { weight: "router.layer.weight", ..SOFTMAX },
    ..MIXTRAL
};
const GRANITE_SHARED: Option<SharedRow> = Some(SharedRow {
    names: SharedNames::Fused(["/shared_mlp.input_linear.weight", "/shared_mlp.output_linear.weight"]),
    gate: None,
    width: Width::Key("shared_intermediate_size"),
});
/// A sigmoid over biased scores, divided by its sum: the router of AFMoE and HunYuan 3.
const fn biased_sigmoid(weight: &'static str, bias: &'static str, factor: &'static str) -> RouterRow {
    RouterRow {
        weight,
        correction_bias: Some(CorrectionBias { name: bias, flag: None }),
        scores: Scores::Sigmoid,
        normalize: Normalize::Always(Normalization::SumPlus(1e-20)),
        factor: Some(factor),
        ..SOFTMAX
    }
}

pub(super) const FAMILIES: &[Family] = &[
    QWEN2_MOE,
    QWEN3_MOE,
    Family { model_types: &["qwen3_next"], architectures: &["Qwen3NextForCausalLM"], ..QWEN2_MOE },
    Family {
        model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
        architectures: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
        router: SOFTMAX,
        fixed: &[("norm_topk_prob", &["true"])],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"],
        architectures: &["Qwen3VLMoeForConditionalGeneration"],
        router: SOFTMAX,
        fixed: &[("norm_topk_prob", &["true"]), ("shared_expert_intermediate_size", &["0"])],
        ..QWEN3_MOE
    },
    Family { model_types: &["mellum"], architectures: &["MellumForCausalLM"], ..QWEN3_MOE },
    MIXTRAL,
    Family { model_types: &["minimax"], architectures: &["MiniMaxForCausalLM"], ..MIXTRAL },
    Family {
        model_types: &["minimax_m2"],
        architectures: &["MiniMaxM2ForCausalLM"],
        router: RouterRow {
            correction_bias: Some(CorrectionBias { name: "e_score_correction_bias", flag: None }),
            scores: Scores::Sigmoid,
            ..SOFTMAX
        },
        fixed: &[
            ("scoring_func", &["\"sigmoid\""]),
            ("use_routing_bias", &["true"]),
            ("shared_intermediate_size", &["0"]),
        ],
        ..MIXTRAL
    },
    Family {
        model_types: &["phimoe"],
        architectures: &["PhimoeForCausalLM", "PhiMoEForCausalLM"],
        router: RouterRow {
            scores: Scores::SparseMixer("router_jitter_noise"),
            normalize: Normalize::Never,
            ..SOFTMAX
        },
        fixed: &[],
        // Noise of training.
        inert: &["input_jitter_noise"],
        ..MIXTRAL
    },
    Family {
        model_types: &["deepseek_v2"],
        architectures: &["DeepseekV2ForCausalLM"],
        router: RouterRow {
            groups: GroupsRow::IfMethod("group_limited_greedy", GroupWorth::Best),
            normalize: Normalize::Never,
            factor: Some("routed_scaling_factor"),
            ..SOFTMAX
        },
        fixed: &[
            ("scoring_func", &["\"softmax\""]),
            ("topk_method", &["\"greedy\"", "\"group_limited_greedy\""]),
            ("norm_topk_prob", &["false"]),
            ("mlp_bias", &["false"]),
        ],
        ..DEEPSEEK_V3
    },
    DEEPSEEK_V3,
    Family {
        model_types: &["deepseek_v4"],
        architectures: &["DeepseekV4ForCausalLM"],
        block: "ffn",
        experts: &[EACH_W],
        router: RouterRow {
            correction_bias: Some(CorrectionBias { name: "gate.bias", flag: None }),
            scores: Scores::SqrtSoftplus,
            normalize: Normalize::Always(Normalization::SumPlus(1e-20)),
            factor: Some("routed_scaling_factor"),
            by_token: Some(ByToken { table: "gate.tid2eid", first: "num_hash_layers" }),
            ..SOFTMAX
        },
        activation: ActivationRow::Limited("hidden_act"),
        shared: Some(SharedRow {
            names: SharedNames::Separate("shared_experts", W_NAMES),
            gate: None,
            width: Width::Same,
        }),
        layers: Layers::All,
        fixed: &[
            ("scoring_func", &["\"sqrtsoftplus\""]),
            ("topk_method", &["\"noaux_tc\""]),
            ("norm_topk_prob", &["true"]),
            ("n_shared_experts", &["1"]),
            ("n_group", &["1"]),
            ("topk_group", &["1"]),
            ("mlp_bias", &["false"]),
            // The tensors tell.
            ("expert_dtype", &["\"fp4\"", "\"fp8\"", "\"bf16\""]),
        ],
        ..QWEN2_MOE
    },
    Family { model_types: &["deepseek_v32"], architectures: &["DeepseekV32ForCausalLM"], ..DEEPSEEK_V3 },
    Family {
        model_types: &["glm4_moe", "glm4v_moe", "glm4v_moe_text"],
        architectures: &["Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration"],
        ..DEEPSEEK_V3
    },
    Family { model_types: &["glm4_moe_lite"], architectures: &["Glm4MoeLiteForCausalLM"], ..DEEPSEEK_V3 },
    Family {
        model_types: &["glm_moe_dsa"],
        architectures: &["GlmMoeDsaForCausalLM"],
        fixed: &[
            ("scoring_func", &["\"sigmoid\""]),
            ("topk_method", &["\"noaux_tc\""]),
            ("mlp_bias", &["false"]),
            // The precision of the logits, which the caller chooses.
            ("moe_router_dtype", &["\"float32\"", "\"bfloat16\""]),
        ],
        ..DEEPSEEK_V3
    },
    Family {
        model_types: &["dots1"],
        architectures: &["Dots1ForCausalLM"],
        router: DEEPSEEK_OR_ONE_GROUP,
        // Its published configs name the method in both keys.
        fixed: &[
            ("scoring_func", &["\"sigmoid\"", "\"noaux_tc\""]),
            ("topk_method", &["\"noaux_tc\""]),
            ("mlp_bias", &["false"]),
        ],
        ..DEEPSEEK_V3
    },
    Family {
        model_types: &["solar_open"],
        architectures: &["SolarOpenForCausalLM"],
        router: DEEPSEEK_OR_ONE_GROUP,
        ..DEEPSEEK_V3
    },
    Family { model_types: &["axk1"], architectures: &["AXK1ForCausalLM"], ..DEEPSEEK_V3 },
    Family {
        model_types: &["exaone_moe"],
        architectures: &["ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"],
        router: RouterRow {
            correction_bias: Some(CorrectionBias { name: "e_score_correction_bias", flag: None }),
            ..DEEPSEEK
        },
        shared: shared("num_shared_experts"),
        ..DEEPSEEK_V3
    },
    Family {
        model_types: &["sarvam_moe"],
        // Transformers saves it under its parent's class.
        architectures: &["SarvamMoEForCausalLM", "SarvamMoeForCausalLM", "Glm4MoeForCausalLM"],
        router: RouterRow {
            correction_bias: Some(CorrectionBias { name: "gate.expert_bias", flag: None }),
            ..DEEPSEEK
        },
        ..DEEPSEEK_V3
    },
    Family {
        model_types: &["mimo_v2_flash"],
        architectures: &["MiMoV2FlashForCausalLM"],
        shared: None,
        // Its own code has no shared expert whatever this key says, and the layer no tensors of one.
        fixed: &[
            ("scoring_func", &["\"sigmoid\""]),
            ("topk_method", &["\"noaux_tc\""]),
            ("n_shared_experts", &["0", "1"]),
        ],
        ..DEEPSEEK_V3
    },
    OLMOE,
    Family { model_types: &["flex_olmo"], architectures: &["FlexOlmoForCausalLM"], ..OLMOE },
    GRANITEMOE,
    Family {
        model_types: &["granitemoeshared", "granitemoehybrid"],
        architectures: &["GraniteMoeSharedForCausalLM", "GraniteMoeHybridForCausalLM"],
        shared: GRANITE_SHARED,
        ..GRANITEMOE
    },
    Family {
        model_types: &["ernie4_5_moe"],
        architectures: &["Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeModel"],
        experts_keys: &["moe_num_experts", "num_experts"],
        topk_keys: &["moe_k", "num_experts_per_tok"],
        router: RouterRow {
            correction_bias: Some(CorrectionBias { name: "moe_statics.e_score_correction_bias", flag: None }),
            normalize: Normalize::AtLeast("moe_norm_min", 1e-12),
            ..SOFTMAX
        },
        shared: shared("moe_num_shared_experts"),
        layers: Layers::Range,
        fixed: &[
            ("use_bias", &["false"]),
            ("moe_gate", &["\"topk\"", "\"topk_fused\""]),
            ("moe_use_aux_free", &["true"]),
        ],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["hunyuan_v1_moe"],
        architectures: &["HunYuanMoEV1ForCausalLM"],
        topk_keys: &["moe_topk", "num_experts_per_tok"],
        intermediate_keys: &["intermediate_size", "moe_intermediate_size"],
        router: RouterRow { weight: "gate.wg.weight", ..SOFTMAX },
        shared: Some(SharedRow {
            names: SharedNames::Separate("shared_mlp", PROJECTIONS),
            gate: None,
            width: Width::TimesOrOnce("num_shared_expert"),
        }),
        layers: Layers::All,
        fixed: &[
            ("use_mixed_mlp_moe", &["true"]),
            ("moe_layer_num_skipped", &["0"]),
            ("group_limited_greedy", &["false"]),
            ("routed_scaling_factor", &["1"]),
            ("norm_topk_prob", &["true"]),
            ("mlp_bias", &["false"]),
        ],
        // Read with group_limited_greedy only.
        inert: &["n_group", "topk_group"],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["llama4", "llama4_text"],
        architectures: &["Llama4ForConditionalGeneration", "Llama4ForCausalLM"],
        block: "feed_forward",
        experts: &[FUSED],
        intermediate_keys: INTERMEDIATE,
        router: RouterRow { weight: "router.weight", scores: Scores::Sigmoid, normalize: Normalize::Never, ..SOFTMAX },
        weight_on_input: true,
        shared: Some(SharedRow {
            names: SharedNames::Separate("shared_expert", PROJECTIONS),
            gate: None,
            width: Width::Same,
        }),
        layers: Layers::Interleaved,
        fixed: &[],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["jamba"],
        architectures: &["JambaForCausalLM"],
        block: "feed_forward",
        intermediate_keys: INTERMEDIATE,
        router: RouterRow { weight: "router.weight", normalize: Normalize::Never, ..SOFTMAX },
        shared: None,
        layers: Layers::Periodic,
        ..QWEN2_MOE
    },
    Family {
        model_types: &["gpt_oss"],
        architectures: &["GptOssForCausalLM"],
        experts: &[ExpertNames::Fused {
            gate_up: "experts.gate_up_proj",
            down: "experts.down_proj",
            biases: Some(["experts.gate_up_proj_bias", "experts.down_proj_bias"]),
            order: GateUpOrder::Interleaved,
        }],
        topk_keys: &["num_experts_per_tok", "experts_per_token"],
        intermediate_keys: INTERMEDIATE,
        router: RouterRow { weight: "router.weight", logit_bias: Some("router.bias"), ..SOFTMAX },
        activation: ActivationRow::Clamped,
        shared: None,
        layers: Layers::All,
        fixed: &[("hidden_act", &["\"silu\""])],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["afmoe"],
        architectures: &["AfmoeForCausalLM"],
        router: biased_sigmoid("router.gate.weight", "expert_bias", "route_scale"),
        shared: shared("num_shared_experts"),
        layers: Layers::AfterDense("num_dense_layers"),
        fixed: &[
            ("score_func", &["\"sigmoid\""]),
            ("route_norm", &["true"]),
            ("n_group", &["1"]),
            ("topk_group", &["1"]),
            ("num_expert_groups", &["1"]),
            ("num_limited_groups", &["1"]),
        ],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["hy_v3"],
        architectures: &["HYV3ForCausalLM"],
        router: biased_sigmoid("router.gate.weight", "expert_bias", "router_scaling_factor"),
        shared: Some(SharedRow {
            names: SharedNames::Separate("shared_mlp", PROJECTIONS),
            gate: None,
            width: Width::Times("num_shared_experts"),
        }),
        layers: Layers::All,
        fixed: &[("mlp_bias", &["false"]), ("enable_moe_fp32_combine", &["true", "false"])],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["lfm2_moe"],
        architectures: &["Lfm2MoeForCausalLM"],
        block: "feed_forward",
        experts: MIXTRAL_NAMES,
        router: RouterRow {
            correction_bias: Some(CorrectionBias { name: "expert_bias", flag: Some("use_expert_bias") }),
            scores: Scores::Sigmoid,
            normalize: Normalize::Flag("norm_topk_prob", Normalization::SumPlus(1e-6)),
            factor: Some("routed_scaling_factor"),
            ..SOFTMAX
        },
        shared: None,
        layers: Layers::AfterDense("num_dense_layers"),
        fixed: &[],
        ..QWEN2_MOE
    },
    Family {
        model_types: &["nemotron_h"],
        architectures: &["NemotronHForCausalLM"],
        block: "mixer",
        experts: &[ExpertNames::Each { gate: None, up: "up_proj", down: "down_proj" }],
        router: DEEPSEEK,
        activation: ActivationRow::Relu2("mlp_hidden_act"),
        shared: Some(SharedRow {
            names: SharedNames::Ungated("shared_experts"),
            gate: None,
            width: Width::Key("moe_shared_expert_intermediate_size"),
        }),
        layers: Layers::Pattern,
        fixed: &[("mlp_bias", &["false"]), ("use_bias", &["false"]), ("n_shared_experts", &["1"])],
        ..QWEN2_MOE
    },
];
