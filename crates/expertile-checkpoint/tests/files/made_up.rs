//! Small checkpoints, made up: every family, both weight formats, one file or several.

use expertile::E4m3;
use expertile_testkit::{Random, block_scaled_weights, unit_weights};
use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::Path;

/// One tensor on its way into a file.
#[derive(Debug, Clone)]
pub(crate) struct NewTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// A model of one family with one MoE layer, number 1.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) config: Value,
    pub(crate) tensors: Vec<NewTensor>,
}

/// The number of the layer that [`Model`] has.
pub(crate) const LAYER: usize = 1;

/// The namings.
pub(crate) const FAMILIES: [&str; 3] = ["qwen3_moe", "deepseek_v3", "mixtral"];

/// The sizes of a made-up layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) experts: usize,
    pub(crate) topk: usize,
}

impl Model {
    pub(crate) fn new(family: &str, sizes: Sizes, e4m3: bool) -> Self {
        let mut random = Random::new(17);
        let mut model = Self { config: config(family, sizes, e4m3), tensors: Vec::new() };
        let (block, parts) = match family {
            "mixtral" => ("block_sparse_moe", ["w1", "w3", "w2"]),
            _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        let prefix = format!("model.layers.{LAYER}.{block}");
        let Sizes { hidden, intermediate, experts, .. } = sizes;
        model.add_bf16(format!("{prefix}.gate.weight"), [experts, hidden], &mut random);
        if family == "deepseek_v3" {
            let bias: Vec<u8> = (0..experts).flat_map(|_| (0.1 * random.uniform()).to_le_bytes()).collect();
            let name = format!("{prefix}.gate.e_score_correction_bias");
            model.tensors.push(NewTensor { name, dtype: Dtype::F32, shape: vec![experts], bytes: bias });
        }
        let mut names: Vec<String> = (0..experts).map(|expert| format!("experts.{expert}")).collect();
        if family == "deepseek_v3" {
            names.push("shared_experts".into());
        }
        for name in names {
            for (part, shape) in
                parts.iter().zip([[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]])
            {
                let name = format!("{prefix}.{name}.{part}.weight");
                if e4m3 {
                    model.add_e4m3(name, shape, &mut random);
                } else {
                    model.add_bf16(name, shape, &mut random);
                }
            }
        }
        model
    }

    fn add_bf16(&mut self, name: String, [rows, cols]: [usize; 2], random: &mut Random) {
        let weights = unit_weights(random, [1, rows, cols], bf16::from_f32);
        let bytes = weights.into_iter().flat_map(bf16::to_le_bytes).collect();
        self.tensors.push(NewTensor { name, dtype: Dtype::BF16, shape: vec![rows, cols], bytes });
    }

    fn add_e4m3(&mut self, name: String, [rows, cols]: [usize; 2], random: &mut Random) {
        let byte = |x| E4m3::from_f32(x).0;
        let (bytes, scales) = block_scaled_weights(random, [1, rows, cols], E4m3::MAX, byte);
        self.tensors.push(NewTensor { name: name.clone(), dtype: Dtype::F8_E4M3, shape: vec![rows, cols], bytes });
        let (name, shape) = (format!("{name}_scale_inv"), vec![rows.div_ceil(128), cols.div_ceil(128)]);
        let bytes = scales.into_iter().flat_map(f32::to_le_bytes).collect();
        self.tensors.push(NewTensor { name, dtype: Dtype::F32, shape, bytes });
    }

    /// The tensor whose name ends so.
    pub(crate) fn tensor_mut(&mut self, ending: &str) -> &mut NewTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name.ends_with(ending)).expect(ending)
    }

    /// Writes `config.json` and one `model.safetensors`, or an index with several shards.
    pub(crate) fn write(&self, folder: &Path, shards: usize) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        if shards == 1 {
            std::fs::write(folder.join("model.safetensors"), serialize(&self.tensors)).unwrap();
            return;
        }
        let mut weight_map = serde_json::Map::new();
        for shard in 0..shards {
            let own: Vec<NewTensor> = self.tensors.iter().skip(shard).step_by(shards).cloned().collect();
            let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
            std::fs::write(folder.join(&name), serialize(&own)).unwrap();
            weight_map.extend(own.into_iter().map(|tensor| (tensor.name, Value::String(name.clone()))));
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// A safetensors file of these tensors.
pub(crate) fn serialize(tensors: &[NewTensor]) -> Vec<u8> {
    let view = |tensor: &NewTensor| {
        let bytes: &'static [u8] = tensor.bytes.clone().leak();
        (tensor.name.clone(), TensorView::new(tensor.dtype, tensor.shape.clone(), bytes).unwrap())
    };
    safetensors::serialize(tensors.iter().map(view), None).unwrap()
}

fn config(family: &str, sizes: Sizes, e4m3: bool) -> Value {
    let Sizes { hidden, intermediate, experts, topk } = sizes;
    let mut config = json!({
        "model_type": family, "hidden_size": hidden, "hidden_act": "silu", "num_hidden_layers": 2,
        "num_experts_per_tok": topk, "norm_topk_prob": true
    });
    let (experts_key, intermediate_key) = match family {
        "qwen3_moe" => ("num_experts", "moe_intermediate_size"),
        "deepseek_v3" => ("n_routed_experts", "moe_intermediate_size"),
        _ => ("num_local_experts", "intermediate_size"),
    };
    config[experts_key] = json!(experts);
    config[intermediate_key] = json!(intermediate);
    if family == "deepseek_v3" {
        config["first_k_dense_replace"] = json!(1);
        config["n_group"] = json!(2);
        config["topk_group"] = json!(2);
        config["routed_scaling_factor"] = json!(2.5);
        config["scoring_func"] = json!("sigmoid");
        config["n_shared_experts"] = json!(1);
    }
    if e4m3 {
        config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    }
    config
}
