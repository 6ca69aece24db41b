//! `config.json`: the family of a checkpoint, and what it says about one layer's block of experts.
//!
//! A key is *understood* (the family's row reads it, or fixes its value), *harmless* (known to leave the block as it
//! is), or neither. One that is neither and whose name speaks of experts, routers, activations and the like is an
//! error: it could change the numbers, and nothing is guessed. An entry that is `null` counts as absent. A key that
//! changes the numbers and is missing is an error too.

use crate::error::{Error, Result};
use crate::family::{ActivationRow, CorrectionBias, Family, GroupsRow, Layers, Normalize, Scores, Width};
use crate::json;
use crate::keys::Keys;
use crate::quantization::Quantization;
use expertile::layer::LayerShape;
use expertile::{Activation, Groups, Normalization, Router, Scoring};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A parsed `config.json`.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) file: PathBuf,
    pub(crate) family: &'static Family,
    pub(crate) quantization: Quantization,
    /// The entries that describe the language model: the file's own, or those of its `text_config`.
    entries: Map<String, Value>,
    /// `text_config.` or nothing, for messages.
    path: &'static str,
}

/// What the config says about one layer.
#[derive(Debug, Clone)]
pub(crate) struct BlockConfig {
    pub(crate) shape: LayerShape,
    /// Without its biases, which are tensors.
    pub(crate) router: Router,
    pub(crate) logit_bias: Option<&'static str>,
    pub(crate) correction_bias: Option<&'static str>,
    /// The table that chooses a token's experts, where the router does not.
    pub(crate) token_table: Option<&'static str>,
    pub(crate) activation: Activation,
    /// Width of the shared expert, if there is one.
    pub(crate) shared: Option<usize>,
}

const TEXT_CONFIG: &str = "text_config";

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
const HARMLESS_KEYS: &[&str] = &[
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

impl Config {
    pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Self> {
        let value = json::parse(file, "config", bytes)?;
        let mut outer: Map<String, Value> =
            serde_json::from_value(value).map_err(|source| Error::json(file, "config", source))?;
        let inner = match outer.get(TEXT_CONFIG) {
            Some(Value::Object(inner)) => Some(inner.clone()),
            _ => None,
        };
        let family = family(file, &outer, inner.as_ref())?;
        let quantization = outer.remove("quantization_config").filter(|value| !value.is_null());
        let (mut entries, path) = match inner {
            Some(inner) => (inner, "text_config."),
            None => (outer, ""),
        };
        let own = entries.remove("quantization_config").filter(|value| !value.is_null());
        let quantization = Quantization::parse(file, own.or(quantization), entries.get("expert_dtype"))?;
        let config = Self { file: file.to_owned(), family, quantization, entries, path };
        config.check_keys()?;
        Ok(config)
    }

    fn keys(&self) -> Keys<'_> {
        Keys { file: &self.file, path: self.path, entries: &self.entries }
    }

    /// Fails for a key that could change the block and is not understood, or has a value that the family's row does not
    /// describe.
    fn check_keys(&self) -> Result<()> {
        let keys = self.keys();
        for &(key, allowed) in self.family.fixed {
            if let Some(value) = keys.get(key) {
                let fits = |text: &&str| {
                    let allowed: Value = serde_json::from_str(text).expect("the family's row holds JSON");
                    match value {
                        Value::Array(list) => list.iter().all(|entry| same(entry, &allowed)),
                        value => same(value, &allowed),
                    }
                };
                if !allowed.iter().any(fits) {
                    return Err(keys.wrong(key, &value.to_string(), &allowed.join(" or ")));
                }
            }
        }
        let understood = understood_keys(self.family);
        for (key, value) in &self.entries {
            if !value.is_null() && speaks_of_the_block(key) && !understood.contains(&key.as_str()) {
                let expected =
                    format!("no such key: it could change the block, and {} is not known to have it", self.name());
                return Err(keys.wrong(key, &value.to_string(), &expected));
            }
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        self.family.model_type()
    }

    /// What the config says about layer `layer`.
    ///
    /// Fails unless the layer exists and, as far as the config tells, has experts.
    pub(crate) fn block(&self, layer: usize) -> Result<BlockConfig> {
        self.check_layer(layer)?;
        let (keys, family) = (self.keys(), self.family);
        let hidden = keys.size("hidden_size")?;
        let [experts, topk, intermediate] = [family.experts_keys, family.topk_keys, family.intermediate_keys]
            .map(|names| keys.agreed_size(names, layer));
        let (experts, topk, intermediate) = (experts?, topk?, intermediate?);
        let activation = self.activation()?;
        let shape = self.shape(hidden, intermediate, experts, activation)?;
        let token_table = self.token_table(layer)?;
        let correction_bias = match family.router.correction_bias {
            None => None,
            _ if token_table.is_some() => None,
            Some(CorrectionBias { name, flag: None }) => Some(name),
            Some(CorrectionBias { name, flag: Some(flag) }) => keys.flag(flag)?.then_some(name),
        };
        let router = self.router(topk)?;
        router.check(experts).map_err(|source| Error::Router { file: self.file.clone(), source })?;
        let shared = self.shared(intermediate, layer)?;
        let logit_bias = family.router.logit_bias;
        Ok(BlockConfig { shape, router, logit_bias, correction_bias, token_table, activation, shared })
    }

    /// The table that chooses a token's experts in this layer.
    fn token_table(&self, layer: usize) -> Result<Option<&'static str>> {
        let (keys, Some(row)) = (self.keys(), self.family.router.by_token) else { return Ok(None) };
        let by_token = match keys.get("mlp_layer_types").and_then(Value::as_array) {
            Some(list) => list.get(layer).is_some_and(|kind| kind == "hash_moe"),
            None => match keys.count(row.first)? {
                Some(first) => layer < first,
                None => return Err(keys.wrong(row.first, "missing", "a number of layers, or mlp_layer_types")),
            },
        };
        Ok(by_token.then_some(row.table))
    }

    /// The size of the vocabulary, if the config says it.
    pub(crate) fn vocabulary(&self) -> Result<Option<usize>> {
        self.keys().count("vocab_size")
    }

    /// `H`, `I` and `E` of experts with this activation.
    pub(crate) fn shape(
        &self,
        hidden: usize,
        intermediate: usize,
        experts: usize,
        activation: Activation,
    ) -> Result<LayerShape> {
        let shape = if activation.is_gated() { LayerShape::new } else { LayerShape::ungated };
        shape(hidden, intermediate, experts).map_err(|source| Error::Sizes { file: self.file.clone(), source })
    }

    fn router(&self, topk: usize) -> Result<Router> {
        let (keys, row) = (self.keys(), &self.family.router);
        let scoring = match row.scores {
            Scores::Softmax => Scoring::Softmax,
            Scores::Sigmoid => Scoring::Sigmoid,
            Scores::SqrtSoftplus => Scoring::SqrtSoftplus,
            Scores::SparseMixer(key) => Scoring::SparseMixer { jitter: keys.number(key)? },
        };
        let worth = match row.groups {
            GroupsRow::Never => None,
            GroupsRow::OrOne(_) if keys.get("n_group").is_none() && keys.get("topk_group").is_none() => None,
            GroupsRow::Always(worth) | GroupsRow::OrOne(worth) => Some(worth),
            GroupsRow::IfMethod(method, worth) => {
                let chosen = keys.required("topk_method", "the way groups are chosen")?;
                (chosen == method).then_some(worth)
            }
        };
        let groups = match worth {
            None => None,
            Some(worth) => Some(Groups { count: keys.size("n_group")?, topk: keys.size("topk_group")?, worth }),
        };
        let normalization = match row.normalize {
            Normalize::Never => Normalization::None,
            Normalize::Always(normalization) => normalization,
            Normalize::Flag(key, normalization) => {
                if keys.flag(key)? {
                    normalization
                } else {
                    Normalization::None
                }
            }
            Normalize::AtLeast(key, absent) => Normalization::SumAtLeast(match keys.get(key) {
                Some(_) => keys.number(key)?,
                None => absent,
            }),
        };
        let scaling_factor = match row.factor {
            None => 1.0,
            Some(key) if self.entries.get(key).is_some_and(Value::is_null) => 1.0,
            Some(key) => keys.number(key)?,
        };
        let (logit_bias, correction_bias) = (Vec::new(), Vec::new());
        Ok(Router { topk, scoring, logit_bias, correction_bias, groups, normalization, scaling_factor })
    }

    fn activation(&self) -> Result<Activation> {
        let keys = self.keys();
        Ok(match self.family.activation {
            ActivationRow::Gated(key) => match keys.name(key)? {
                None | Some("silu" | "swish") => Activation::default(),
                Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_tanh") => Activation::GegluTanh,
                Some(other) => {
                    let actual = Value::from(other).to_string();
                    return Err(keys.wrong(key, &actual, "\"silu\" or \"gelu_pytorch_tanh\""));
                }
            },
            ActivationRow::Clamped => Activation::Swiglu {
                // OpenAI's files do not have the key.
                alpha: if keys.get("swiglu_alpha").is_some() { keys.number("swiglu_alpha")? } else { 1.702 },
                beta: 1.0,
                limit: Some(keys.number("swiglu_limit")?),
            },
            ActivationRow::Limited(key) => match keys.name(key)? {
                None | Some("silu" | "swish") => {
                    Activation::Swiglu { alpha: 1.0, beta: 0.0, limit: Some(keys.number("swiglu_limit")?) }
                }
                Some(other) => return Err(keys.wrong(key, &Value::from(other).to_string(), "\"silu\"")),
            },
            ActivationRow::Relu2(key) => match keys.name(key)? {
                Some("relu2") => Activation::Relu2,
                other => {
                    let actual = other.map_or("missing".into(), |name| Value::from(name).to_string());
                    return Err(keys.wrong(key, &actual, "\"relu2\""));
                }
            },
        })
    }

    fn shared(&self, intermediate: usize, layer: usize) -> Result<Option<usize>> {
        let Some(row) = &self.family.shared else { return Ok(None) };
        let keys = self.keys();
        let times = |key: &str, absent: usize| {
            let count = keys.layer_count(key, layer)?.unwrap_or(absent);
            let width = intermediate.checked_mul(count);
            width.ok_or_else(|| keys.wrong(key, &count.to_string(), "a number of experts whose width fits"))
        };
        let width = match row.width {
            Width::Key(key) => keys.layer_count(key, layer)?.unwrap_or(0),
            Width::Times(key) => times(key, 0)?,
            Width::TimesOrOnce(key) => times(key, 1)?,
            Width::Same => intermediate,
        };
        Ok((width > 0).then_some(width))
    }

    /// Fails unless `layer` exists and, as far as the config tells, has experts.
    fn check_layer(&self, layer: usize) -> Result<()> {
        let keys = self.keys();
        let extra = keys.count("num_nextn_predict_layers")?.unwrap_or(0);
        if let Some(own) = keys.count("num_hidden_layers")? {
            // The extra ones predict tokens further ahead.
            let layers = own.saturating_add(extra);
            if layer >= layers {
                return Err(Error::Layer { file: self.file.clone(), layer, layers });
            }
        }
        match self.dense(layer)? {
            None => Ok(()),
            Some(because) => Err(Error::DenseLayer { file: self.file.clone(), layer, because }),
        }
    }

    /// Why a layer has no experts, if the config says so.
    fn dense(&self, layer: usize) -> Result<Option<String>> {
        let keys = self.keys();
        if let Some(value) = keys.get("mlp_layer_types") {
            let by_token = self.family.router.by_token.is_some();
            let expected = if by_token { "\"hash_moe\" and \"moe\"" } else { "\"dense\" and \"sparse\"" };
            let wrong = || keys.wrong("mlp_layer_types", &value.to_string(), &format!("a list of {expected}"));
            let list = value.as_array().ok_or_else(wrong)?;
            return match list.get(layer).map(Value::as_str) {
                None | Some(Some("sparse")) => Ok(None),
                Some(Some("hash_moe" | "moe")) if by_token => Ok(None),
                Some(Some("dense")) => Ok(Some(format!("mlp_layer_types[{layer}] is \"dense\""))),
                Some(_) => Err(wrong()),
            };
        }
        Ok(match self.family.layers {
            Layers::All => None,
            Layers::Stepped => {
                let step = keys.size_or("decoder_sparse_step", 1)?;
                if keys.list("mlp_only_layers")?.unwrap_or_default().contains(&layer) {
                    Some("it is in mlp_only_layers".into())
                } else {
                    (!(layer + 1).is_multiple_of(step)).then(|| format!("decoder_sparse_step is {step}"))
                }
            }
            Layers::AfterFirst => {
                let first = keys.count("first_k_dense_replace")?.unwrap_or(0);
                if layer < first {
                    Some(format!("first_k_dense_replace is {first}"))
                } else if keys.get("moe_layer_freq").is_some_and(Value::is_array) {
                    let flags = keys.list("moe_layer_freq")?.unwrap_or_default();
                    (flags.get(layer) == Some(&0)).then(|| format!("moe_layer_freq[{layer}] is 0"))
                } else {
                    let step = keys.size_or("moe_layer_freq", 1)?;
                    (!layer.is_multiple_of(step)).then(|| format!("moe_layer_freq is {step}"))
                }
            }
            Layers::AfterDense(key) => {
                let first = keys.count(key)?.unwrap_or(0);
                (layer < first).then(|| format!("{key} is {first}"))
            }
            Layers::Periodic => {
                let period = keys.size("expert_layer_period")?;
                let offset = keys.count("expert_layer_offset")?.unwrap_or(0);
                (layer % period != offset)
                    .then(|| format!("expert_layer_period is {period} and expert_layer_offset {offset}"))
            }
            Layers::Interleaved => match keys.list("moe_layers")? {
                Some(layers) => (!layers.contains(&layer)).then(|| "it is not in moe_layers".into()),
                None => {
                    let step = keys.size_or("interleave_moe_layer_step", 1)?;
                    (!(layer + 1).is_multiple_of(step)).then(|| format!("interleave_moe_layer_step is {step}"))
                }
            },
            Layers::Range => {
                let first = keys.count("moe_layer_start_index")?.unwrap_or(0);
                // A negative end, or none, is the last layer.
                let last = keys.get("moe_layer_end_index").and_then(Value::as_u64).map_or(u64::MAX, |last| last);
                let step = keys.size_or("moe_layer_interval", 1)?;
                if layer < first || layer as u64 > last {
                    Some(format!("moe_layer_start_index is {first}, moe_layer_end_index {last}"))
                } else {
                    (!(layer + 1).is_multiple_of(step)).then(|| format!("moe_layer_interval is {step}"))
                }
            }
            Layers::Pattern => {
                let listed = keys.get("layers_block_type").and_then(Value::as_array);
                let drawn = keys.get("hybrid_override_pattern").and_then(Value::as_str);
                let kind = match (listed, drawn) {
                    (Some(list), _) => list.get(layer).and_then(Value::as_str).map(|kind| (kind == "moe", kind.into())),
                    (None, Some(text)) => text.chars().nth(layer).map(|kind| (kind == 'E', kind.to_string())),
                    (None, None) => None,
                };
                kind.and_then(|(has_experts, kind): (bool, String)| {
                    (!has_experts).then(|| format!("its kind is {kind:?} in the pattern of layers"))
                })
            }
        })
    }
}

/// Whether two JSON values are the same, numbers by their value.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// The family that the config names, by `model_type` or by architecture; an error if two of them disagree.
fn family(file: &Path, outer: &Map<String, Value>, inner: Option<&Map<String, Value>>) -> Result<&'static Family> {
    let of_type = |entries: &Map<String, Value>| {
        let name = entries.get("model_type").and_then(Value::as_str);
        Family::all().iter().find(|family| name.is_some_and(|name| family.model_types.contains(&name)))
    };
    let of_class = |entries: &Map<String, Value>| {
        let names = entries.get("architectures").and_then(Value::as_array);
        let named = |family: &&Family| {
            names.is_some_and(|names| {
                names.iter().filter_map(Value::as_str).any(|name| family.architectures.contains(&name))
            })
        };
        Family::all().iter().find(named)
    };
    let by_type = inner.and_then(of_type).or_else(|| of_type(outer));
    let by_class = inner.and_then(of_class).or_else(|| of_class(outer));
    let keys = Keys { file, path: "", entries: outer };
    // Several families may share a class.
    let agree = |by_type: &Family, by_class: &Family| {
        std::ptr::eq(by_type, by_class)
            || by_class.architectures.iter().any(|name| by_type.architectures.contains(name))
    };
    match (by_type, by_class) {
        (Some(by_type), Some(by_class)) if !agree(by_type, by_class) => {
            let actual = outer.get("architectures").map_or(String::new(), ToString::to_string);
            let expected =
                format!("one of {}, as model_type is {}", by_type.architectures.join(", "), by_type.model_type());
            Err(keys.wrong("architectures", &actual, &expected))
        }
        (Some(family), _) | (None, Some(family)) => Ok(family),
        (None, None) => {
            let model_type = inner.and_then(|inner| inner.get("model_type")).or_else(|| outer.get("model_type"));
            let actual = model_type.filter(|value| !value.is_null()).map_or("missing".into(), ToString::to_string);
            let known: Vec<&str> = Family::all().iter().map(Family::model_type).collect();
            Err(keys.wrong("model_type", &actual, &format!("one of {}", known.join(", "))))
        }
    }
}

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
fn speaks_of_the_block(key: &str) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deepseek() -> Value {
        json!({
            "model_type": "deepseek_v3", "hidden_size": 8, "moe_intermediate_size": 4, "intermediate_size": 99,
            "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
            "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "num_hidden_layers": 5, "n_shared_experts": 2,
            "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu",
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
        })
    }

    fn qwen3() -> Value {
        json!({
            "model_type": "qwen3_moe", "hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6,
            "num_experts_per_tok": 2, "norm_topk_prob": false
        })
    }

    fn gpt_oss() -> Value {
        json!({
            "model_type": "gpt_oss", "hidden_size": 8, "intermediate_size": 4, "num_local_experts": 6,
            "num_experts_per_tok": 2, "experts_per_token": 2, "swiglu_limit": 7.0, "hidden_act": "silu"
        })
    }

    fn deepseek_v4() -> Value {
        json!({
            "model_type": "deepseek_v4", "hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 6,
            "num_experts_per_tok": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": true, "n_shared_experts": 1,
            "scoring_func": "sqrtsoftplus", "swiglu_limit": 10.0, "num_hash_layers": 3, "expert_dtype": "fp4"
        })
    }

    fn parse(config: &Value) -> Result<Config> {
        Config::parse(Path::new("config.json"), config.to_string().as_bytes())
    }

    /// Layer 3, which has experts in all of these.
    fn block(config: &Value) -> Result<BlockConfig> {
        parse(config)?.block(3)
    }

    fn changed(mut config: Value, key: &str, value: Value) -> Value {
        config[key] = value;
        config
    }

    fn refused(config: &Value) -> String {
        block(config).unwrap_err().to_string()
    }

    #[test]
    fn each_family_reads_its_own_keys() {
        let config = block(&deepseek()).unwrap();
        let shape = config.shape;
        assert_eq!((shape.hidden(), shape.intermediate(), shape.local_experts()), (8, 4, 6));
        assert_eq!((config.router.topk, config.shared), (2, Some(8)));
        assert_eq!(config.router.groups.unwrap().count, 2);
        assert_eq!(config.router.normalization, Normalization::SumPlus(1e-20));
        assert_eq!(config.correction_bias, Some("gate.e_score_correction_bias"));
        let config = block(&qwen3()).unwrap();
        assert_eq!(config.router, Router::softmax(2, false));
        assert_eq!((config.shared, config.activation), (None, Activation::SWIGLU));
        let mixtral = json!({
            "architectures": ["MixtralForCausalLM"], "hidden_size": 8, "intermediate_size": 4,
            "num_local_experts": 6, "num_experts_per_tok": 2
        });
        assert_eq!(parse(&mixtral).unwrap().family.model_type(), "mixtral");
        assert_eq!(block(&mixtral).unwrap().shape.intermediate(), 4);
        let config = block(&gpt_oss()).unwrap();
        assert_eq!(config.activation, Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) });
        assert_eq!(config.logit_bias, Some("router.bias"));
        let config = block(&deepseek_v4()).unwrap();
        assert_eq!(config.activation, Activation::Swiglu { alpha: 1.0, beta: 0.0, limit: Some(10.0) });
        assert_eq!((config.router.scoring, config.shared), (Scoring::SqrtSoftplus, Some(4)));
        assert_eq!((config.correction_bias, config.token_table), (Some("gate.bias"), None));
        let config = parse(&deepseek_v4()).unwrap().block(2).unwrap();
        assert_eq!((config.correction_bias, config.token_table), (None, Some("gate.tid2eid")));
    }

    #[test]
    fn keys_with_the_same_meaning_have_to_agree() {
        let saved = changed(changed(qwen3(), "num_experts", Value::Null), "num_local_experts", json!(6));
        assert_eq!(block(&saved).unwrap().shape.local_experts(), 6);
        assert!(block(&changed(qwen3(), "num_local_experts", json!(6))).is_ok());
        let message = refused(&changed(qwen3(), "num_local_experts", json!(7)));
        assert!(message.contains("num_local_experts is 7, expected 6, as num_experts"), "{message}");
        let message = refused(&changed(gpt_oss(), "experts_per_token", json!(4)));
        assert!(message.contains("experts_per_token is 4, expected 2, as num_experts_per_tok"), "{message}");
    }

    #[test]
    fn lists_hold_one_number_per_layer() {
        let hunyuan = json!({
            "model_type": "hunyuan_v1_moe", "hidden_size": 8, "intermediate_size": 4, "num_experts": 6,
            "moe_intermediate_size": [4, 4, 4, 4], "moe_topk": [1, 1, 1, 2], "num_shared_expert": [1, 1, 1, 2]
        });
        let config = block(&hunyuan).unwrap();
        assert_eq!((config.router.topk, config.shared), (2, Some(8)));
        let message = refused(&changed(hunyuan.clone(), "moe_topk", json!([1, 1])));
        assert!(message.contains("moe_topk is [1,1], expected a number, or one for each layer up to 3"), "{message}");
        let message = refused(&changed(hunyuan, "moe_intermediate_size", json!([4, 4, 4, 5])));
        assert!(message.contains("moe_intermediate_size is 5, expected 4, as intermediate_size"), "{message}");
    }

    #[test]
    fn nested_configs_are_read_and_null_factors_are_one() {
        let mut inner = deepseek();
        inner["model_type"] = json!("kimi_k2");
        inner["routed_scaling_factor"] = Value::Null;
        let nested =
            json!({"model_type": "a_multimodal_model", "vision_config": {"num_experts": 3}, "text_config": inner});
        let config = parse(&nested).unwrap();
        assert_eq!(config.family.model_type(), "deepseek_v3");
        assert_eq!(config.block(3).unwrap().router.scaling_factor, 1.0);
        let message = refused(&json!({"text_config": changed(qwen3(), "hidden_size", json!(0))}));
        assert!(message.contains("text_config.hidden_size is 0"), "{message}");
    }

    #[test]
    fn a_foreign_type_of_a_known_class_is_taken_for_that_family() {
        let mut config = changed(deepseek(), "model_type", json!("a_new_one"));
        assert!(refused(&config).contains("model_type is \"a_new_one\""));
        config["architectures"] = json!(["DeepseekV3ForCausalLM"]);
        assert_eq!(parse(&config).unwrap().family.model_type(), "deepseek_v3");
        let message = refused(&changed(qwen3(), "architectures", json!(["MiniMaxM2ForCausalLM"])));
        assert!(message.contains("architectures is [\"MiniMaxM2ForCausalLM\"], expected one of Qwen3Moe"), "{message}");
    }

    #[test]
    fn layers_without_experts_are_known() {
        let says = |config: &Value, layer: usize| match parse(config).unwrap().block(layer) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert!(says(&deepseek(), 2).contains("layer 2 is dense (first_k_dense_replace is 3)"));
        assert_eq!(says(&deepseek(), 3), "");
        assert_eq!(says(&deepseek(), 5), "");
        assert!(says(&deepseek(), 6).contains("layer is 6, expected below 6"));
        let listed =
            changed(changed(deepseek(), "first_k_dense_replace", json!(0)), "moe_layer_freq", json!([0, 1, 1, 0]));
        assert!(says(&listed, 3).contains("moe_layer_freq[3] is 0"));
        assert_eq!(says(&listed, 1), "");
        let typed = changed(deepseek(), "mlp_layer_types", json!(["sparse", "dense"]));
        assert_eq!(says(&typed, 0), "");
        assert!(says(&typed, 1).contains("mlp_layer_types[1] is \"dense\""));
        let listed = changed(qwen3(), "mlp_only_layers", json!([0, 4]));
        assert!(says(&listed, 4).contains("mlp_only_layers"));
        assert_eq!(says(&listed, 3), "");
        let stepped = changed(qwen3(), "decoder_sparse_step", json!(2));
        assert!(says(&stepped, 2).contains("decoder_sparse_step is 2"));
        assert_eq!(says(&stepped, 1), "");
        let llama = json!({
            "model_type": "llama4_text", "hidden_size": 8, "intermediate_size": 4, "num_local_experts": 6,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 9
        });
        assert!(says(&llama, 2).contains("interleave_moe_layer_step is 2"));
        assert_eq!(says(&llama, 3), "");
        assert!(says(&changed(llama, "moe_layers", json!([1])), 3).contains("it is not in moe_layers"));
        let jamba = json!({
            "model_type": "jamba", "hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2,
            "expert_layer_period": 2, "expert_layer_offset": 1
        });
        assert!(says(&jamba, 2).contains("expert_layer_period is 2 and expert_layer_offset 1"));
        assert_eq!(says(&jamba, 3), "");
    }

    #[test]
    fn keys_that_could_change_the_block_are_never_ignored() {
        for (key, value) in [
            ("scoring_func", json!("sigmoid")),
            ("routed_scaling_factor", json!(2.5)),
            ("swiglu_limit", json!(7.0)),
            ("n_group", json!(8)),
            ("shared_expert_intermediate_size", json!(512)),
            ("expert_dtype", json!("fp4")),
            ("router_temperature", json!(0.5)),
            ("use_routing_bias", json!(true)),
            ("moe_latent_size", json!(64)),
            ("mlp_bias", json!(true)),
            ("hidden_activation", json!("gelu")),
            ("num_shared_experts", json!(1)),
        ] {
            let message = refused(&changed(qwen3(), key, value.clone()));
            assert!(message.starts_with(&format!("config.json: {key} is {value}, expected ")), "{message}");
            assert!(block(&changed(qwen3(), key, Value::Null)).is_ok(), "{key}");
        }
        for (family, key, value) in [
            (deepseek(), "scoring_func", json!("softmax")),
            (deepseek(), "topk_method", json!("greedy")),
            (deepseek(), "expert_dtype", json!("fp4")),
            (deepseek(), "swiglu_limit", json!(10.0)),
        ] {
            let message = refused(&changed(family, key, value));
            assert!(message.contains(&format!("{key} is ")), "{message}");
        }
    }

    #[test]
    fn keys_of_other_parts_are_harmless() {
        for key in [
            "attention_bias",
            "router_aux_loss_coef",
            "rope_scaling",
            "top_k",
            "temperature",
            "sliding_window",
            "qkv_bias",
            "intermediate_size",
            "num_beam_groups",
            "torch_dtype",
            "head_dim",
            "use_qk_norm",
            "output_router_logits",
            "num_key_value_heads",
            "index_topk",
            "transformers_version",
            "max_window_layers",
            "aux_loss_alpha",
            "logits_scaling",
            "residual_multiplier",
            "output_scores",
            "attn_output_gate",
            "mamba_conv_bias",
        ] {
            assert!(block(&changed(qwen3(), key, json!(1))).is_ok(), "{key}");
        }
        assert!(block(&changed(qwen3(), "shared_expert_intermediate_size", json!(0))).is_ok());
    }

    #[test]
    fn every_bad_key_is_named() {
        let refuse = |config: Value, part: &str| {
            let error = refused(&config);
            assert!(error.starts_with("config.json: ") && error.contains(part), "{error}");
        };
        for key in ["hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"] {
            for value in [json!(0), json!(-1), json!("8"), json!(1.5), json!(1e30)] {
                refuse(changed(qwen3(), key, value), &format!("{key} is "));
            }
        }
        for key in ["hidden_size", "moe_intermediate_size", "num_experts_per_tok"] {
            refuse(changed(qwen3(), key, Value::Null), &format!("{key} is missing"));
        }
        refuse(
            changed(qwen3(), "num_experts", Value::Null),
            "n_routed_experts, num_experts or num_local_experts is missing",
        );
        refuse(changed(qwen3(), "hidden_act", json!("gelu")), "hidden_act is \"gelu\", expected \"silu\"");
        refuse(changed(qwen3(), "norm_topk_prob", json!(1)), "norm_topk_prob is 1");
        refuse(changed(qwen3(), "norm_topk_prob", Value::Null), "norm_topk_prob is missing");
        refuse(changed(qwen3(), "model_type", json!("llama")), "model_type is \"llama\"");
        refuse(changed(qwen3(), "mlp_only_layers", json!([-1])), "mlp_only_layers");
        refuse(changed(deepseek(), "n_group", Value::Null), "n_group is missing");
        refuse(changed(deepseek(), "routed_scaling_factor", json!(1e300)), "routed_scaling_factor");
        refuse(changed(deepseek(), "moe_layer_freq", json!(0)), "moe_layer_freq is 0");
        refuse(changed(deepseek(), "quantization_config", json!(7)), "quantization_config is 7");
        refuse(changed(deepseek(), "n_shared_experts", json!(u64::MAX)), "n_shared_experts");
        refuse(changed(gpt_oss(), "swiglu_limit", Value::Null), "swiglu_limit is missing");
        let long = json!("x".repeat(1 << 20));
        assert!(refused(&changed(qwen3(), "hidden_size", long)).len() < 300);
        let mut config = qwen3();
        config["x".repeat(1 << 20) + "_expert"] = json!(1);
        assert!(refused(&config).len() < 400);
        for text in ["", "{", "[]", "7", "\u{0}"] {
            let error = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap_err();
            assert!(matches!(error, Error::Json { .. }), "{error}");
        }
    }

    #[test]
    fn rows_are_consistent() {
        let mut seen = std::collections::HashSet::new();
        for family in Family::all() {
            for name in family.model_types {
                assert!(seen.insert(*name), "{name} names two families");
            }
            for (key, allowed) in family.fixed {
                assert!(!HARMLESS_KEYS.contains(key), "{key} is fixed and harmless");
                for text in *allowed {
                    assert!(serde_json::from_str::<Value>(text).is_ok(), "{text}");
                }
            }
        }
    }
}
