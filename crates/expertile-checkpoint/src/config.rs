//! `config.json`: which family a checkpoint belongs to, and the sizes of its MoE layers.
//!
//! | | Qwen3-MoE | DeepSeek-V3 | Mixtral |
//! |---|---|---|---|
//! | `model_type` | `qwen3_moe` | `deepseek_v3` | `mixtral` |
//! | experts | `num_experts` | `n_routed_experts` | `num_local_experts` |
//! | intermediate size | `moe_intermediate_size` | `moe_intermediate_size` | `intermediate_size` |
//! | router | softmax, `norm_topk_prob` | sigmoid, `n_group`, `topk_group`, `norm_topk_prob`, `routed_scaling_factor` | softmax, renormalised |
//! | dense layers | `mlp_only_layers`, `decoder_sparse_step` | `first_k_dense_replace`, `moe_layer_freq` | none |
//!
//! All have `hidden_size`, `num_experts_per_tok` and `hidden_act` (which must be `silu`, also if absent). A checkpoint of
//! another `model_type` is taken for one of these if its `architectures` name that family's class. A key that would
//! change the numbers is never guessed: without it there is an error. An entry that is `null` counts as absent.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A model family: how its tensors are named and how its router works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Qwen3-MoE.
    Qwen3Moe,
    /// DeepSeek-V3 (and what shares its class).
    DeepSeekV3,
    /// Mixtral.
    Mixtral,
}

impl Family {
    const ALL: [Self; 3] = [Self::Qwen3Moe, Self::DeepSeekV3, Self::Mixtral];

    /// The family's `model_type`.
    #[must_use]
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Qwen3Moe => "qwen3_moe",
            Self::DeepSeekV3 => "deepseek_v3",
            Self::Mixtral => "mixtral",
        }
    }

    fn architecture(self) -> &'static str {
        match self {
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
            Self::DeepSeekV3 => "DeepseekV3ForCausalLM",
            Self::Mixtral => "MixtralForCausalLM",
        }
    }

    fn experts_key(self) -> &'static str {
        match self {
            Self::Qwen3Moe => "num_experts",
            Self::DeepSeekV3 => "n_routed_experts",
            Self::Mixtral => "num_local_experts",
        }
    }

    fn intermediate_key(self) -> &'static str {
        match self {
            Self::Qwen3Moe | Self::DeepSeekV3 => "moe_intermediate_size",
            Self::Mixtral => "intermediate_size",
        }
    }
}

/// What `config.json` says about the MoE layers.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) file: PathBuf,
    pub(crate) family: Family,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) experts: usize,
    pub(crate) topk: usize,
    pub(crate) scoring: Scoring,
    pub(crate) weight_block: Option<Vec<usize>>,
    layers: Option<usize>,
    dense: DenseLayers,
}

/// The router's settings; the correction bias is a tensor.
#[derive(Debug, Clone)]
pub(crate) enum Scoring {
    Softmax { renormalize: bool },
    Sigmoid { groups: usize, topk_groups: usize, renormalize: bool, scaling_factor: f32 },
}

/// Which layers have no experts.
#[derive(Debug, Clone)]
enum DenseLayers {
    Listed { dense: Vec<usize>, sparse_step: usize },
    First { dense: usize, frequency: usize },
    None,
}

impl Config {
    pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Self> {
        let entries: Map<String, Value> =
            serde_json::from_slice(bytes).map_err(|source| Error::json(file, "config", source))?;
        let keys = Keys { file, path: String::new(), entries: &entries };
        let family = family(&keys)?;
        if let Some(activation) = keys.get("hidden_act").filter(|&activation| activation != "silu") {
            return Err(keys.wrong("hidden_act", &activation.to_string(), "\"silu\""));
        }
        Ok(Self {
            file: file.to_owned(),
            family,
            hidden: keys.size("hidden_size")?,
            intermediate: keys.size(family.intermediate_key())?,
            experts: keys.size(family.experts_key())?,
            topk: keys.size("num_experts_per_tok")?,
            scoring: scoring(&keys, family)?,
            weight_block: weight_block(&keys)?,
            layers: layers(&keys)?,
            dense: dense_layers(&keys, family)?,
        })
    }

    /// Fails unless `layer` exists and, as far as the config tells, has experts.
    pub(crate) fn check_layer(&self, layer: usize) -> Result<()> {
        if let Some(layers) = self.layers.filter(|&layers| layer >= layers) {
            return Err(Error::Layer { file: self.file.clone(), layer, layers });
        }
        let because = match &self.dense {
            DenseLayers::Listed { dense, .. } if dense.contains(&layer) => "it is in mlp_only_layers".into(),
            DenseLayers::Listed { sparse_step, .. } if layer % sparse_step != sparse_step - 1 => {
                format!("decoder_sparse_step is {sparse_step}")
            }
            DenseLayers::First { dense, .. } if layer < *dense => format!("first_k_dense_replace is {dense}"),
            DenseLayers::First { frequency, .. } if !layer.is_multiple_of(*frequency) => {
                format!("moe_layer_freq is {frequency}")
            }
            _ => return Ok(()),
        };
        Err(Error::DenseLayer { file: self.file.clone(), layer, because })
    }
}

fn family(keys: &Keys<'_>) -> Result<Family> {
    let model_type = keys.get("model_type").and_then(Value::as_str);
    if let Some(family) = Family::ALL.into_iter().find(|family| model_type == Some(family.model_type())) {
        return Ok(family);
    }
    let architectures = keys.get("architectures").and_then(Value::as_array);
    let named =
        |family: &Family| architectures.is_some_and(|list| list.iter().any(|name| name == family.architecture()));
    Family::ALL.into_iter().find(named).ok_or_else(|| {
        let actual = model_type.map_or("missing".into(), |name| format!("{name:?}"));
        keys.wrong("model_type", &actual, "qwen3_moe, deepseek_v3 or mixtral (or one of their architectures)")
    })
}

fn scoring(keys: &Keys<'_>, family: Family) -> Result<Scoring> {
    Ok(match family {
        Family::Mixtral => Scoring::Softmax { renormalize: true },
        Family::Qwen3Moe => Scoring::Softmax { renormalize: keys.flag("norm_topk_prob")? },
        Family::DeepSeekV3 => {
            keys.require_if_present("scoring_func", "sigmoid")?;
            keys.require_if_present("topk_method", "noaux_tc")?;
            Scoring::Sigmoid {
                groups: keys.size("n_group")?,
                topk_groups: keys.size("topk_group")?,
                renormalize: keys.flag("norm_topk_prob")?,
                scaling_factor: keys.number("routed_scaling_factor")?,
            }
        }
    })
}

fn dense_layers(keys: &Keys<'_>, family: Family) -> Result<DenseLayers> {
    Ok(match family {
        Family::Mixtral => DenseLayers::None,
        Family::Qwen3Moe => DenseLayers::Listed {
            dense: keys.list("mlp_only_layers")?.unwrap_or_default(),
            sparse_step: keys.size_or("decoder_sparse_step", 1)?,
        },
        Family::DeepSeekV3 => DenseLayers::First {
            dense: keys.count("first_k_dense_replace")?.unwrap_or(0),
            frequency: keys.size_or("moe_layer_freq", 1)?,
        },
    })
}

/// Layers there are, the extra ones that predict tokens further ahead included.
fn layers(keys: &Keys<'_>) -> Result<Option<usize>> {
    let extra = keys.count("num_nextn_predict_layers")?.unwrap_or(0);
    Ok(keys.count("num_hidden_layers")?.map(|layers| layers.saturating_add(extra)))
}

fn weight_block(keys: &Keys<'_>) -> Result<Option<Vec<usize>>> {
    match keys.get("quantization_config") {
        None => Ok(None),
        Some(Value::Object(entries)) => {
            Keys { file: keys.file, path: "quantization_config.".into(), entries }.list("weight_block_size")
        }
        Some(other) => Err(keys.wrong("quantization_config", &other.to_string(), "an object")),
    }
}

/// The entries of a JSON object, with errors that name them.
struct Keys<'a> {
    file: &'a Path,
    path: String,
    entries: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.entries.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, actual: &str, expected: &str) -> Error {
        // A hostile value may be megabytes long.
        let mut actual: String = actual.to_owned();
        if let Some((cut, _)) = actual.char_indices().nth(100) {
            actual.truncate(cut);
            actual.push_str("...");
        }
        let key = format!("{}{key}", self.path);
        Error::Config { file: self.file.to_owned(), key, actual, expected: expected.into() }
    }

    fn required(&self, key: &str, expected: &str) -> Result<&'a Value> {
        self.get(key).ok_or_else(|| self.wrong(key, "missing", expected))
    }

    /// A number that may be zero, if it is there.
    fn count(&self, key: &str) -> Result<Option<usize>> {
        let convert = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
        self.get(key)
            .map(|value| convert(value).ok_or_else(|| self.wrong(key, &value.to_string(), "a whole number")))
            .transpose()
    }

    /// A positive number.
    fn size(&self, key: &str) -> Result<usize> {
        const EXPECTED: &str = "a positive whole number";
        let value = self.required(key, EXPECTED)?;
        self.count(key)?.filter(|&size| size > 0).ok_or_else(|| self.wrong(key, &value.to_string(), EXPECTED))
    }

    fn size_or(&self, key: &str, absent: usize) -> Result<usize> {
        if self.get(key).is_some() { self.size(key) } else { Ok(absent) }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        let value = self.required(key, "true or false")?;
        value.as_bool().ok_or_else(|| self.wrong(key, &value.to_string(), "true or false"))
    }

    fn number(&self, key: &str) -> Result<f32> {
        let value = self.required(key, "a finite number")?;
        let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
        number.ok_or_else(|| self.wrong(key, &value.to_string(), "a finite number"))
    }

    fn list(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.wrong(key, &value.to_string(), "a list of whole numbers");
        let entries = value.as_array().ok_or_else(wrong)?;
        let number = |entry: &Value| entry.as_u64().and_then(|number| usize::try_from(number).ok()).ok_or_else(wrong);
        entries.iter().map(number).collect::<Result<_>>().map(Some)
    }

    fn require_if_present(&self, key: &str, expected: &str) -> Result<()> {
        match self.get(key) {
            Some(value) if value != expected => Err(self.wrong(key, &value.to_string(), &format!("{expected:?}"))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deepseek() -> Value {
        json!({
            "model_type": "deepseek_v3", "hidden_size": 8, "moe_intermediate_size": 4, "intermediate_size": 99,
            "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": true,
            "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "num_hidden_layers": 5,
            "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu",
            "quantization_config": {"weight_block_size": [128, 128]}
        })
    }

    fn qwen3() -> Value {
        json!({
            "model_type": "qwen3_moe", "hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6,
            "num_experts_per_tok": 2, "norm_topk_prob": false
        })
    }

    fn parse(config: &Value) -> Result<Config> {
        Config::parse(Path::new("config.json"), config.to_string().as_bytes())
    }

    fn changed(mut config: Value, key: &str, value: Value) -> Value {
        config[key] = value;
        config
    }

    #[test]
    fn each_family_reads_its_own_keys() {
        let config = parse(&deepseek()).unwrap();
        assert_eq!((config.hidden, config.intermediate, config.experts, config.topk), (8, 4, 6, 2));
        assert_eq!(config.weight_block, Some(vec![128, 128]));
        assert!(matches!(config.scoring, Scoring::Sigmoid { groups: 2, topk_groups: 1, renormalize: true, .. }));
        let config = parse(&qwen3()).unwrap();
        assert!(matches!(config.scoring, Scoring::Softmax { renormalize: false }));
        let mixtral = json!({
            "architectures": ["MixtralForCausalLM"], "hidden_size": 8, "intermediate_size": 4,
            "num_local_experts": 6, "num_experts_per_tok": 2
        });
        let config = parse(&mixtral).unwrap();
        assert_eq!((config.family, config.intermediate), (Family::Mixtral, 4));
    }

    #[test]
    fn a_foreign_type_of_a_known_class_is_taken_for_that_family() {
        let mut config = changed(deepseek(), "model_type", json!("kimi_k2"));
        assert!(parse(&config).unwrap_err().to_string().contains("model_type is \"kimi_k2\""));
        config["architectures"] = json!(["DeepseekV3ForCausalLM"]);
        assert_eq!(parse(&config).unwrap().family, Family::DeepSeekV3);
    }

    #[test]
    fn layers_without_experts_are_known() {
        let says = |config: &Value, layer: usize| match parse(config).unwrap().check_layer(layer) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert!(says(&deepseek(), 2).contains("layer 2 is dense (first_k_dense_replace is 3)"));
        assert_eq!(says(&deepseek(), 3), "");
        assert_eq!(says(&deepseek(), 5), "");
        assert!(says(&deepseek(), 6).contains("layer is 6, expected below 6"));
        let listed = changed(qwen3(), "mlp_only_layers", json!([0, 4]));
        assert!(says(&listed, 4).contains("mlp_only_layers"));
        assert_eq!(says(&listed, 3), "");
        let stepped = changed(qwen3(), "decoder_sparse_step", json!(2));
        assert!(says(&stepped, 2).contains("decoder_sparse_step is 2"));
        assert_eq!(says(&stepped, 1), "");
    }

    #[test]
    fn every_bad_key_is_named() {
        let refuse = |config: Value, part: &str| {
            let error = parse(&config).unwrap_err().to_string();
            assert!(error.starts_with("config.json: ") && error.contains(part), "{error}");
        };
        for key in ["hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"] {
            for value in [json!(0), json!(-1), json!("8"), json!(1.5), json!(1e30)] {
                refuse(changed(qwen3(), key, value), &format!("{key} is "));
            }
            refuse(changed(qwen3(), key, Value::Null), &format!("{key} is missing"));
        }
        refuse(changed(qwen3(), "hidden_act", json!("gelu")), "hidden_act is \"gelu\", expected \"silu\"");
        refuse(changed(qwen3(), "norm_topk_prob", json!(1)), "norm_topk_prob is 1");
        refuse(changed(qwen3(), "norm_topk_prob", Value::Null), "norm_topk_prob is missing");
        refuse(changed(qwen3(), "model_type", json!("llama")), "model_type is \"llama\"");
        refuse(changed(qwen3(), "mlp_only_layers", json!([-1])), "mlp_only_layers");
        refuse(changed(deepseek(), "scoring_func", json!("softmax")), "scoring_func is \"softmax\"");
        refuse(changed(deepseek(), "topk_method", json!("greedy")), "topk_method is \"greedy\"");
        refuse(changed(deepseek(), "n_group", Value::Null), "n_group is missing");
        refuse(changed(deepseek(), "routed_scaling_factor", json!(1e300)), "routed_scaling_factor");
        refuse(changed(deepseek(), "moe_layer_freq", json!(0)), "moe_layer_freq is 0");
        refuse(changed(deepseek(), "quantization_config", json!(7)), "quantization_config is 7");
        let block = json!({"weight_block_size": [128, "x"]});
        refuse(changed(deepseek(), "quantization_config", block), "quantization_config.weight_block_size");
        let long = json!("x".repeat(1 << 20));
        assert!(parse(&changed(qwen3(), "hidden_size", long)).unwrap_err().to_string().len() < 300);
        for text in ["", "{", "[]", "7", "\u{0}"] {
            let error = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap_err();
            assert!(matches!(error, Error::Json { .. }), "{error}");
        }
    }
}
