//! `config.json`: the family of a checkpoint, and what it says about one layer's block of experts.
//!
//! A key is *understood* (the family's row reads it, or fixes its value), *harmless* (known to leave the block as it
//! is), or neither. One that is neither and whose name speaks of experts, routers, activations and the like is an
//! error: it could change the numbers, and nothing is guessed. An entry that is `null` counts as absent. A key that
//! changes the numbers and is missing is an error too.

mod known_keys;

use crate::error::{Error, Result};
use crate::family::{ActivationRow, CorrectionBias, Family, GroupsRow, Layers, Normalize, Scores, Width};
use crate::json;
use crate::keys::Keys;
use crate::quantization::Quantization;
use expertile::layer::LayerShape;
use expertile::{Activation, Groups, Normalization, Router, Scoring};
use known_keys::{speaks_of_the_block, understood_keys};
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

#[cfg(test)]
mod tests;
