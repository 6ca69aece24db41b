//! `quantization_config`: how e4m3 weights were scaled, and whether 4-bit ones are MXFP4.
//!
//! | method | scheme | scale tensor |
//! |---|---|---|
//! | `fp8` | `weight_block_size` 128 x 128 | `<weight>_scale_inv`, `[ceil(rows/128), ceil(cols/128)]` |
//! | `fp8` without a block size | one scale per tensor, or per row | `<weight>_scale_inv` or `<weight>_scale` |
//! | `compressed-tensors`, `float-quantized` | strategy `block`, `tensor` or `channel` | `<weight>_scale` |
//! | `mxfp4` | groups of 32 of 4-bit values, `<weight>_blocks` | `<weight>_scales` |
//! | `compressed-tensors`, `mxfp4-pack-quantized` | the same, `<weight>_packed` | `<weight>_scale` |
//! | `compressed-tensors`, `pack-quantized` | int4, symmetric, groups of 32, in I32 `<weight>_packed` | BF16 or F16 `<weight>_scale` |
//! | `fp8` with `expert_dtype` `fp4` (DeepSeek-V4) | experts the same, in I8 under the weight's own name | `<part>.scale`, also of e4m3 weights |
//!
//! Scales may be F32, BF16, F16 or F8_E8M0; all are widened exactly. Static scales of activations are refused: they
//! would change the numbers.

use crate::error::{Error, Result};
use crate::keys::Keys;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::{int4, mxfp4};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The quantization that a config speaks of, as far as it concerns e4m3 weights.
#[derive(Debug, Clone)]
pub(crate) struct Quantization {
    file: PathBuf,
    entries: Option<Map<String, Value>>,
    /// `expert_dtype`, of the config or of the entries.
    expert_dtype: Option<Value>,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// 128 x 128 weights.
    Block,
    /// A tensor, or a row: the scale's shape tells.
    TensorOrRow,
}

const PATH: &str = "quantization_config.";
/// compressed-tensors' names for MXFP4 and for integers.
const MXFP4_PACKED: &str = "mxfp4-pack-quantized";
const INT_PACKED: &str = "pack-quantized";
const COMPRESSED_FORMATS: [&str; 3] = ["float-quantized", MXFP4_PACKED, INT_PACKED];

impl Quantization {
    pub(crate) fn parse(file: &Path, value: Option<Value>, expert_dtype: Option<&Value>) -> Result<Self> {
        let entries = match value {
            None => None,
            Some(Value::Object(entries)) => Some(entries),
            Some(other) => {
                let keys = Keys { file, path: "", entries: &Map::new() };
                return Err(keys.wrong("quantization_config", &other.to_string(), "an object"));
            }
        };
        let own = entries.as_ref().and_then(|entries| entries.get("expert_dtype"));
        let expert_dtype = own.or(expert_dtype).cloned();
        Ok(Self { file: file.to_owned(), entries, expert_dtype })
    }

    /// The method, if the config names one.
    fn method(&self) -> Option<&Value> {
        self.entries.as_ref()?.get("quant_method").filter(|value| !value.is_null())
    }

    /// An error that names the method, if it is one whose weights have other tensors than those that were looked for.
    pub(crate) fn check_method(&self) -> Result<()> {
        const KNOWN: [&str; 3] = ["fp8", "compressed-tensors", "mxfp4"];
        match self.method() {
            Some(method) if !method.as_str().is_some_and(|name| KNOWN.contains(&name)) => {
                let expected = "\"fp8\", \"mxfp4\" or \"compressed-tensors\", or weights in bf16, f16 or f32";
                Err(self.wrong("quant_method", method.to_string(), expected))
            }
            Some(method) if method == "compressed-tensors" => {
                let format = self.entries.as_ref().and_then(|entries| entries.get("format"));
                match format {
                    Some(format) if !format.as_str().is_some_and(|name| COMPRESSED_FORMATS.contains(&name)) => {
                        let expected = "\"float-quantized\", \"mxfp4-pack-quantized\" or \"pack-quantized\"";
                        Err(self.wrong("format", format.to_string(), expected))
                    }
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// How e4m3 weights of this checkpoint are scaled.
    pub(crate) fn scheme(&self) -> Result<Scheme> {
        self.check_method()?;
        let Some(entries) = &self.entries else {
            return Err(self.wrong("weight_block_size", "missing", "[128, 128] (the weights are F8_E4M3)"));
        };
        let keys = Keys { file: &self.file, path: PATH, entries };
        if self.method().is_some_and(|method| method == "compressed-tensors") {
            return self.compressed_scheme(entries);
        }
        keys.one_of("activation_scheme", &["dynamic"])?;
        keys.one_of("fmt", &["e4m3", "float8_e4m3fn"])?;
        match keys.list("weight_block_size")? {
            Some(block) if block == [WEIGHT_BLOCK, WEIGHT_BLOCK] => Ok(Scheme::Block),
            Some(block) => Err(self.wrong("weight_block_size", format!("{block:?}"), "[128, 128]")),
            None if self.method().is_some() => Ok(Scheme::TensorOrRow),
            None => Err(self.wrong("weight_block_size", "missing", "[128, 128] (the weights are F8_E4M3)")),
        }
    }

    /// Whether it says that weights are MXFP4.
    pub(crate) fn speaks_of_mxfp4(&self) -> bool {
        let format = self.entries.as_ref().and_then(|entries| entries.get("format"));
        self.method().is_some_and(|method| method == "mxfp4") || format.is_some_and(|format| format == MXFP4_PACKED)
    }

    /// Fails unless experts in I8 are MXFP4.
    pub(crate) fn require_fp4_experts(&self) -> Result<()> {
        let expected = "(the experts are I8: two 4-bit values to a byte)";
        if self.method().is_none_or(|method| method != "fp8") {
            let actual = self.method().map_or("missing".into(), Value::to_string);
            return Err(self.wrong("quant_method", actual, &format!("\"fp8\" {expected}")));
        }
        match &self.expert_dtype {
            Some(name) if name == "fp4" => Ok(()),
            other => {
                let actual = other.as_ref().map_or("missing".into(), Value::to_string);
                let keys = Keys { file: &self.file, path: "", entries: &Map::new() };
                Err(keys.wrong("expert_dtype", &actual, &format!("\"fp4\" {expected}")))
            }
        }
    }

    /// Fails unless 4-bit weights are MXFP4: in `<weight>_blocks` and `<weight>_scales`.
    pub(crate) fn require_mxfp4(&self) -> Result<()> {
        match self.method() {
            Some(method) if method == "mxfp4" => Ok(()),
            Some(method) => Err(self.wrong("quant_method", method.to_string(), "\"mxfp4\" (the weights are blocks)")),
            None => Err(self.wrong("quant_method", "missing", "\"mxfp4\" (the weights are blocks)")),
        }
    }

    /// Whether it says that packed weights are integers.
    pub(crate) fn speaks_of_int4(&self) -> bool {
        self.entries.as_ref().and_then(|entries| entries.get("format")).is_some_and(|format| format == INT_PACKED)
    }

    /// Fails unless 4-bit weights are MXFP4: in `<weight>_packed` and `<weight>_scale`.
    pub(crate) fn require_packed_mxfp4(&self) -> Result<()> {
        self.require_packed(MXFP4_PACKED, "float", mxfp4::GROUP)
    }

    /// Fails unless they are symmetric int4 with a scale for each 32: in `<weight>_packed` and `<weight>_scale`.
    pub(crate) fn require_packed_int4(&self) -> Result<()> {
        self.require_packed(INT_PACKED, "int", int4::GROUP)
    }

    /// Fails unless all weights that are packed are of that format: of 4 bits, in groups of that size.
    fn require_packed(&self, format: &str, kind: &str, group_size: usize) -> Result<()> {
        let no_entries = Map::new();
        let entries = self.entries.as_ref().unwrap_or(&no_entries);
        let found = |key: &str| entries.get(key).map_or("missing".into(), Value::to_string);
        for (key, expected) in [("quant_method", "compressed-tensors"), ("format", format)] {
            if entries.get(key).is_none_or(|value| value != expected) {
                return Err(self.wrong(key, found(key), &format!("\"{expected}\" (the weights are packed)")));
            }
        }
        let groups = entries.get("config_groups").and_then(Value::as_object);
        for (name, group) in groups.into_iter().flatten() {
            let path = format!("{PATH}config_groups.{name}.");
            if let Some(Value::Object(weights)) = group.get("weights") {
                let keys = Keys { file: &self.file, path: &format!("{path}weights."), entries: weights };
                keys.one_of("type", &[kind])?;
                keys.one_of("strategy", &["group"])?;
                if kind == "int" && weights.get("symmetric").is_some_and(|symmetric| symmetric != true) {
                    return Err(keys.wrong("symmetric", &weights["symmetric"].to_string(), "true"));
                }
                for (key, expected) in [("num_bits", 4), ("group_size", group_size)] {
                    if let Some(other) = keys.count(key)?.filter(|&count| count != expected) {
                        return Err(keys.wrong(key, &other.to_string(), &expected.to_string()));
                    }
                }
            }
            if let Some(Value::Object(inputs)) = group.get("input_activations") {
                let keys = Keys { file: &self.file, path: &format!("{path}input_activations."), entries: inputs };
                if let Some(bits) = keys.count("num_bits")?.filter(|&bits| bits < 8) {
                    let expected = "8 or more: activations of fewer bits are not supported";
                    return Err(keys.wrong("num_bits", &bits.to_string(), expected));
                }
            }
        }
        Ok(())
    }

    /// Fails unless the e4m3 weights called `weight` have block scales.
    pub(crate) fn require_blocks(&self, weight: &str) -> Result<()> {
        match self.scheme()? {
            Scheme::Block => Ok(()),
            Scheme::TensorOrRow => {
                Err(self.wrong("weight_block_size", "missing", &format!("[128, 128] for the fused {weight}")))
            }
        }
    }

    fn compressed_scheme(&self, entries: &Map<String, Value>) -> Result<Scheme> {
        let groups = entries.get("config_groups").and_then(Value::as_object);
        let mut scheme = None;
        for (name, group) in groups.into_iter().flatten() {
            let (weights, inputs) = (group.get("weights"), group.get("input_activations"));
            let Some(Value::Object(weights)) = weights else { continue };
            let path = format!("{PATH}config_groups.{name}.");
            let keys = Keys { file: &self.file, path: &format!("{path}weights."), entries: weights };
            keys.one_of("type", &["float"])?;
            if let Some(bits) = keys.count("num_bits")?.filter(|&bits| bits != 8) {
                return Err(keys.wrong("num_bits", &bits.to_string(), "8"));
            }
            if let Some(Value::Object(inputs)) = inputs {
                let keys = Keys { file: &self.file, path: &format!("{path}input_activations."), entries: inputs };
                if inputs.get("dynamic") == Some(&Value::Bool(false)) {
                    return Err(keys.wrong("dynamic", "false", "true: static scales of activations are not supported"));
                }
            }
            let own = match keys.name("strategy")? {
                Some("block") => match keys.list("block_structure")? {
                    Some(block) if block == [WEIGHT_BLOCK, WEIGHT_BLOCK] => Scheme::Block,
                    Some(block) => return Err(keys.wrong("block_structure", &format!("{block:?}"), "[128, 128]")),
                    None => return Err(keys.wrong("block_structure", "missing", "[128, 128]")),
                },
                Some("tensor" | "channel") => Scheme::TensorOrRow,
                other => {
                    let actual = other.map_or("missing".into(), |name| Value::from(name).to_string());
                    return Err(keys.wrong("strategy", &actual, "\"block\", \"channel\" or \"tensor\""));
                }
            };
            if scheme.is_some_and(|scheme| scheme != own) {
                return Err(keys.wrong("strategy", "another than in an earlier group", "one scheme for all groups"));
            }
            scheme = Some(own);
        }
        scheme.ok_or_else(|| self.wrong("config_groups", "missing or without weights", "a group of float weights"))
    }

    fn wrong(&self, key: &str, actual: impl Into<String>, expected: &str) -> Error {
        let keys = Keys { file: &self.file, path: PATH, entries: &Map::new() };
        keys.wrong(key, &actual.into(), expected)
    }
}

impl Keys<'_> {
    fn one_of(&self, key: &str, names: &[&str]) -> Result<()> {
        match self.get(key) {
            Some(value) if !value.as_str().is_some_and(|name| names.contains(&name)) => {
                Err(self.wrong(key, &value.to_string(), &format!("{names:?}")))
            }
            _ => Ok(()),
        }
    }
}
