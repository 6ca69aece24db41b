//! The model families, as data: one row says how a family names its keys and tensors, how its router works, what
//! stands between the GEMMs, which shared expert it has, and which of its layers hold experts.
//!
//! Nothing else in this crate knows a family by name. Keys are those of `config.json` (of its `text_config` where
//! models nest one). Tensor names are relative to the block, or to the layer if they begin with `/`.

use expertile::{GateUpOrder, GroupWorth, Normalization};

/// A model family.
#[derive(Debug)]
pub struct Family {
    /// Values of `model_type` that name it, its own first.
    pub(crate) model_types: &'static [&'static str],
    /// Values in `architectures` that name it where `model_type` is unknown.
    pub(crate) architectures: &'static [&'static str],
    /// Name of the block within its layer.
    pub(crate) block: &'static str,
    /// How experts may be named; the first naming of which there is a tensor is taken.
    pub(crate) experts: &'static [ExpertNames],
    /// Keys of the number of experts; all that are there have to agree.
    pub(crate) experts_keys: &'static [&'static str],
    /// Keys of the number of experts per token.
    pub(crate) topk_keys: &'static [&'static str],
    /// Keys of an expert's width.
    pub(crate) intermediate_keys: &'static [&'static str],
    pub(crate) router: RouterRow,
    pub(crate) activation: ActivationRow,
    /// Whether the router weight multiplies the input of an expert instead of its output.
    pub(crate) weight_on_input: bool,
    pub(crate) shared: Option<SharedRow>,
    pub(crate) layers: Layers,
    /// Keys that may have these values only (as JSON), each value one that leaves the block as this row describes it.
    pub(crate) fixed: &'static [(&'static str, &'static [&'static str])],
    /// Keys of the family that its block does not read, with the values of `fixed`.
    pub(crate) inert: &'static [&'static str],
}

impl Family {
    /// The family's own `model_type`.
    #[must_use]
    pub fn model_type(&self) -> &'static str {
        self.model_types[0]
    }

    /// Every `model_type` that is read as this family, its own first.
    #[must_use]
    pub fn model_types(&self) -> &'static [&'static str] {
        self.model_types
    }

    /// All families.
    #[must_use]
    pub fn all() -> &'static [Self] {
        FAMILIES
    }
}

/// How the tensors of experts are named.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ExpertNames {
    /// `experts.N.<part>.weight`, each `[outputs, inputs]`.
    Each {
        /// Absent where experts have no gate.
        gate: Option<&'static str>,
        up: &'static str,
        down: &'static str,
    },
    /// Two tensors for all experts: `[E, 2 I, H]` with `[E, H, I]`, or both transposed; their shapes tell.
    Fused {
        gate_up: &'static str,
        down: &'static str,
        /// `[E, 2 I]` and `[E, H]`.
        biases: Option<[&'static str; 2]>,
        order: GateUpOrder,
    },
}

/// How logits become a choice.
#[derive(Debug)]
pub(crate) struct RouterRow {
    pub(crate) weight: &'static str,
    /// Added to the logits.
    pub(crate) logit_bias: Option<&'static str>,
    /// Added to the scores for choosing.
    pub(crate) correction_bias: Option<CorrectionBias>,
    pub(crate) scores: Scores,
    pub(crate) groups: GroupsRow,
    pub(crate) normalize: Normalize,
    /// Key of the factor on the weights; `null` stands for 1.
    pub(crate) factor: Option<&'static str>,
    /// Layers in which a token's number in the vocabulary chooses its experts, and the router weighs them.
    pub(crate) by_token: Option<ByToken>,
}

/// Those layers: `hash_moe` in `mlp_layer_types`, or the first ones.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByToken {
    /// The experts of every number, `[vocabulary, topk]`.
    pub(crate) table: &'static str,
    /// Key that counts the layers, where there is no list.
    pub(crate) first: &'static str,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct CorrectionBias {
    pub(crate) name: &'static str,
    /// A flag that says whether there is one.
    pub(crate) flag: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scores {
    Softmax,
    Sigmoid,
    SqrtSoftplus,
    /// With the key of its jitter.
    SparseMixer(&'static str),
}

/// Whether `n_group` and `topk_group` limit the choice.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GroupsRow {
    Never,
    Always(GroupWorth),
    /// One group where the keys are absent.
    OrOne(GroupWorth),
    /// If `topk_method` has this value.
    IfMethod(&'static str, GroupWorth),
}

/// Whether the chosen scores are divided by their sum.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Normalize {
    Never,
    Always(Normalization),
    /// As this flag says.
    Flag(&'static str, Normalization),
    /// By their sum, but at least what this key says, or this number where it is absent.
    AtLeast(&'static str, f32),
}

/// What stands between the GEMMs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ActivationRow {
    /// A gated one, named by this key: `silu` (also if absent) or tanh's approximation of GELU.
    Gated(&'static str),
    /// gpt-oss's: `swiglu_limit`, and `swiglu_alpha` where it is not 1.702.
    Clamped,
    /// A gated one, named by this key: `silu` of a gate that `swiglu_limit` bounds above, times an up within it.
    Limited(&'static str),
    /// The square of the positive part, without a gate; the key has to say `relu2`.
    Relu2(&'static str),
}

/// The shared expert, which every token visits.
#[derive(Debug)]
pub(crate) struct SharedRow {
    pub(crate) names: SharedNames,
    /// `[1, H]`: its sigmoid multiplies the shared expert's output.
    pub(crate) gate: Option<&'static str>,
    pub(crate) width: Width,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum SharedNames {
    /// `<prefix>.<part>.weight` of gate, up and down.
    Separate(&'static str, [&'static str; 3]),
    /// `<prefix>.up_proj.weight`, `down_proj`.
    Ungated(&'static str),
    /// Gate's rows, then up's, in one matrix; and down.
    Fused([&'static str; 2]),
}

/// The shared expert's width.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Width {
    /// This key; 0 or absent: no shared expert.
    Key(&'static str),
    /// The experts' width times this key; 0 or absent: no shared expert.
    Times(&'static str),
    /// The experts' width times this key, 1 if absent.
    TimesOrOnce(&'static str),
    /// The experts' width.
    Same,
}

/// Which layers hold experts. Whatever a row says, a list `mlp_layer_types` decides where there is one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layers {
    All,
    /// `mlp_only_layers` and `decoder_sparse_step`.
    Stepped,
    /// `first_k_dense_replace`, and `moe_layer_freq` as a number or a list.
    AfterFirst,
    /// This key counts the dense layers that come first.
    AfterDense(&'static str),
    /// `expert_layer_period` and `expert_layer_offset`.
    Periodic,
    /// `moe_layers`, else every `interleave_moe_layer_step`th.
    Interleaved,
    /// `moe_layer_start_index`, `moe_layer_end_index`, `moe_layer_interval`.
    Range,
    /// `layers_block_type` (`moe`) or `hybrid_override_pattern` (`E`).
    Pattern,
}

impl Layers {
    /// The keys it reads.
    pub(crate) fn keys(self) -> &'static [&'static str] {
        match self {
            Self::All => &[],
            Self::Stepped => &["mlp_only_layers", "decoder_sparse_step"],
            Self::AfterFirst => &["first_k_dense_replace", "moe_layer_freq"],
            Self::AfterDense("num_dense_layers") => &["num_dense_layers"],
            Self::AfterDense(_) => &[],
            Self::Periodic => &["expert_layer_period", "expert_layer_offset"],
            Self::Interleaved => &["moe_layers", "interleave_moe_layer_step"],
            Self::Range => &["moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"],
            Self::Pattern => &["layers_block_type", "hybrid_override_pattern"],
        }
    }
}

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

const FAMILIES: &[Family] = &[
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/checkpoints.md");
    const BEGIN: &str = "<!-- families: written by a test -->\n";
    const END: &str = "<!-- end of families -->\n";

    fn router(row: &RouterRow) -> String {
        let mut text = match row.scores {
            Scores::Softmax => "softmax".to_owned(),
            Scores::Sigmoid => "sigmoid".to_owned(),
            Scores::SqrtSoftplus => "root of softplus".to_owned(),
            Scores::SparseMixer(key) => format!("sparse mixer, `{key}`"),
        };
        if let Some(name) = row.logit_bias {
            let _ = write!(text, ", logits + `{name}`");
        }
        if let Some(CorrectionBias { name, flag }) = row.correction_bias {
            let _ = write!(text, ", chosen with `{name}`");
            flag.into_iter().for_each(|flag| write!(text, " if `{flag}`").unwrap());
        }
        match row.groups {
            GroupsRow::Never => {}
            GroupsRow::Always(_) | GroupsRow::OrOne(_) => text.push_str(", groups by their two best"),
            GroupsRow::IfMethod(method, _) => write!(text, ", groups by their best if `{method}`").unwrap(),
        }
        match row.normalize {
            Normalize::Never => {}
            Normalize::Always(_) | Normalize::AtLeast(..) => text.push_str(", normalized"),
            Normalize::Flag(key, _) => write!(text, ", normalized if `{key}`").unwrap(),
        }
        row.factor.into_iter().for_each(|key| write!(text, ", times `{key}`").unwrap());
        if let Some(ByToken { table, first }) = row.by_token {
            let _ = write!(text, "; in the first `{first}` layers `{table}` chooses");
        }
        text
    }

    fn shared(row: &SharedRow) -> String {
        let width = match row.width {
            Width::Key(key) => format!("`{key}` wide"),
            Width::Times(key) | Width::TimesOrOnce(key) => format!("`{key}` times an expert's width"),
            Width::Same => "an expert's width".to_owned(),
        };
        if row.gate.is_some() { format!("{width}, gated") } else { width }
    }

    /// The rows as a table.
    fn table() -> String {
        let mut text = String::from(
            "| `model_type` | block | experts on disk | router | activation | shared expert |\n|---|---|---|---|---|---|\n",
        );
        for family in Family::all() {
            let types: Vec<String> = family.model_types.iter().map(|name| format!("`{name}`")).collect();
            let names = |names: &ExpertNames| match *names {
                ExpertNames::Each { gate: Some(gate), up, down } => format!("`experts.N.{{{gate},{up},{down}}}`"),
                ExpertNames::Each { gate: None, up, down } => format!("`experts.N.{{{up},{down}}}`"),
                ExpertNames::Fused { gate_up, biases, order, .. } => {
                    let interleaved = if order == GateUpOrder::Interleaved { ", interleaved" } else { "" };
                    format!("`{gate_up}`{interleaved}{}", if biases.is_some() { ", biases" } else { "" })
                }
            };
            let experts: Vec<String> = family.experts.iter().map(names).collect();
            let activation = match family.activation {
                ActivationRow::Gated(_) => "silu or gelu (tanh), gated",
                ActivationRow::Clamped => "clamped swiglu",
                ActivationRow::Limited(_) => "silu, gated, clamped",
                ActivationRow::Relu2(_) => "relu squared, no gate",
            };
            let on_input = if family.weight_on_input { ", weight on the input" } else { "" };
            let _ = writeln!(
                text,
                "| {} | `{}` | {} | {}{on_input} | {activation} | {} |",
                types.join(", "),
                family.block,
                experts.join(" or "),
                router(&family.router),
                family.shared.as_ref().map_or("none".into(), shared)
            );
        }
        text
    }

    /// `UPDATE_DOCS=1 cargo test -p expertile-checkpoint` writes the table.
    #[test]
    fn the_page_lists_every_family_as_its_row_says() {
        let page = std::fs::read_to_string(PAGE).unwrap();
        let (before, rest) = page.split_once(BEGIN).expect("the page has a place for the table");
        let (old, after) = rest.split_once(END).expect("the page has an end of the table");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(PAGE, format!("{before}{BEGIN}{}{END}{after}", table())).unwrap();
        } else {
            assert!(old == table(), "docs/checkpoints.md differs from the rows; UPDATE_DOCS=1 writes it anew");
        }
    }
}
