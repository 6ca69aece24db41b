//! Which keys a family's row reads, which are known to leave the block as it is, and which could change it.

use super::TEXT_CONFIG;
use crate::family::{ActivationRow, Family, GroupsRow, Normalize, Scores, Width};

/// Keys that every family has, or that the reader handles for all.
const GENERAL_KEYS: &[&str] = &[
    "model_type",
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "quantization_config",
    "mlp_layer_types",
    TEXT_CONFIG,
];

/// Keys that speak like ones that change the block and do not: other parts of the model, training, generation.
pub(super) const HARMLESS_KEYS: &[&str] = &[
    "activation_dropout",
    "activation_function_dropout",
    "aux_loss_alpha",
    "aux_loss_free_bias_update_speed",
    "attention_bias",
    "attn_output_gate",
    "bias_update_speed",
    "capacity_factor",
    "dense_intermediate_size",
    "diversity_penalty",
    "ep_size",
    "ffn_hidden_size",
    "first_k_dense_replace",
    "global_router_aux_loss_coef",
    "intermediate_size",
    "intermediate_size_mlp",
    "lm_head_bias",
    "logit_scale",
    "mlp_alpha_factor",
    "mlp_beta_factor",
    "mlp_only_layers",
    "moe_all_to_all_dropout",
    "moe_aux_loss_coef",
    "moe_aux_loss_lambda",
    "moe_capacity",
    "moe_drop_tokens",
    "moe_dropout_prob",
    "moe_group",
    "moe_group_experts",
    "moe_layer_feature",
    "moe_multimodal_dispatch_use_allgather",
    "moe_orthogonal_loss_lambda",
    "moe_random_routing_dropped_token",
    "moe_router_aux_loss_coef",
    "moe_router_enable_expert_bias_update",
    "moe_shared_expert_overlap",
    "moe_use_hard_gate",
    "moe_z_loss_lambda",
    "mtp_mlp_layer_types",
    "num_experts_per_tok_mtp",
    "norm_type",
    "output_router_logits",
    "qkv_bias",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
    "routing_bias_update_speed",
    "seq_aux",
    "temperature",
    "top_k",
    "use_gated_attention",
    "z_loss_coef",
];

/// Words that make a key speak of the block.
const BLOCK_WORDS: &[&str] = &[
    "act",
    "activation",
    "alpha",
    "beta",
    "bias",
    "capacity",
    "combine",
    "dense",
    "expert",
    "experts",
    "ffn",
    "gate",
    "gating",
    "glu",
    "group",
    "intermediate",
    "jitter",
    "latent",
    "limit",
    "mlp",
    "moe",
    "norm_topk",
    "reglu",
    "renormalize",
    "route",
    "routed",
    "router",
    "routing",
    "scaling_factor",
    "score",
    "scoring",
    "shared",
    "sparse",
    "sparsity",
    "swiglu",
    "swigluoai",
    "temperature",
    "topk",
    "top_k",
];

/// Words that make a key speak of something else, whatever words of [`BLOCK_WORDS`] it has.
const OTHER_WORDS: &[&str] = &[
    "attention",
    "attn",
    "audio",
    "beam",
    "conv",
    "dropout",
    "embedding",
    "embeddings",
    "head",
    "heads",
    "index",
    "indexer",
    "kv",
    "linear",
    "logits",
    "loss",
    "lora",
    "mamba",
    "mla",
    "mtp",
    "position",
    "qk",
    "rope",
    "rotary",
    "softcapping",
    "ssm",
    "time",
    "swa",
    "token",
    "vision",
    "vocab",
    "window",
];

/// Every key that a family's row reads or fixes.
pub(crate) fn understood_keys(family: &'static Family) -> Vec<&'static str> {
    let mut keys: Vec<&str> = Vec::new();
    for list in [GENERAL_KEYS, family.experts_keys, family.topk_keys, family.intermediate_keys, family.layers.keys()] {
        keys.extend(list);
    }
    let row = &family.router;
    keys.extend(row.correction_bias.and_then(|bias| bias.flag));
    keys.extend(row.factor);
    match row.groups {
        GroupsRow::Never => {}
        GroupsRow::Always(_) | GroupsRow::OrOne(_) => keys.extend(["n_group", "topk_group"]),
        GroupsRow::IfMethod(..) => keys.extend(["n_group", "topk_group", "topk_method"]),
    }
    match row.normalize {
        Normalize::Flag(key, _) | Normalize::AtLeast(key, _) => keys.push(key),
        Normalize::Never | Normalize::Always(_) => {}
    }
    if let Scores::SparseMixer(key) = row.scores {
        keys.push(key);
    }
    keys.extend(row.by_token.map(|row| row.first));
    match family.activation {
        ActivationRow::Gated(key) | ActivationRow::Relu2(key) => keys.push(key),
        ActivationRow::Clamped => keys.extend(["swiglu_alpha", "swiglu_limit"]),
        ActivationRow::Limited(key) => keys.extend([key, "swiglu_limit"]),
    }
    if let Some(shared) = &family.shared {
        match shared.width {
            Width::Key(key) | Width::Times(key) | Width::TimesOrOnce(key) => keys.push(key),
            Width::Same => {}
        }
    }
    keys.extend(family.fixed.iter().map(|(key, _)| key));
    keys.extend(family.inert);
    keys
}

/// Whether a key that no row understands could change the block, by the words in its name.
pub(super) fn speaks_of_the_block(key: &str) -> bool {
    if HARMLESS_KEYS.contains(&key) {
        return false;
    }
    let has = |words: &[&str]| words.iter().any(|word| has_word(key, word));
    // What names experts or routers is about them, whatever else it names.
    has(&["expert", "experts", "moe", "routed", "router", "routing"]) || (has(BLOCK_WORDS) && !has(OTHER_WORDS))
}

/// Whether `key` contains `word` between underscores, dots, hyphens or its ends, in any case.
fn has_word(key: &str, word: &str) -> bool {
    let key = format!("_{}_", key.to_ascii_lowercase().replace(['-', '.'], "_"));
    key.contains(&format!("_{word}_"))
}
