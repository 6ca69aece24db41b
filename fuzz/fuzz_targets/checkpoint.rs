//! The checkpoint reader over any bytes, and over whole checkpoints of the three families with damage done to them.
//!
//! Whatever the bytes are, opening and reading a layer end in a value or an error; a value can be read throughout.
#![no_main]

mod edits;

use arbitrary::Arbitrary;
use edits::Edit;
use expertile_checkpoint::{Checkpoint, LayerInput, MoeLayer};
use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::Path;

const HIDDEN: usize = 4;
const INTERMEDIATE: usize = 3;
const EXPERTS: usize = 2;

#[derive(Arbitrary, Debug)]
enum Input {
    Noise { config: Vec<u8>, file: Vec<u8>, layer: usize },
    Damaged { family: Family, e4m3: bool, layer: u8, config: Vec<Edit>, file: Vec<Edit> },
}

#[derive(Arbitrary, Debug, Clone, Copy, PartialEq)]
enum Family {
    Qwen3Moe,
    DeepSeekV3,
    Mixtral,
}

fuzz_target!(|input: Input| {
    let (config, file, layer) = match input {
        Input::Noise { config, file, layer } => (config, file, layer),
        Input::Damaged { family, e4m3, layer, config: config_edits, file: file_edits } => {
            let (mut config, mut file) = (whole_config(family), whole_file(family, e4m3));
            edits::apply(&config_edits, &mut config);
            edits::apply(&file_edits, &mut file);
            if config_edits.is_empty() && file_edits.is_empty() {
                let checkpoint = Checkpoint::from_bytes(&config, &file).expect("nothing was damaged");
                read(&checkpoint.layer(1).expect("nothing was damaged"));
            }
            (config, file, usize::from(layer))
        }
    };
    let _ = LayerInput::from_bytes(Path::new("input"), &file);
    let Ok(checkpoint) = Checkpoint::from_bytes(&config, &file) else { return };
    for layer in [layer, 1] {
        match checkpoint.layer(layer) {
            Ok(layer) => read(&layer),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
});

/// Touches everything that a layer holds.
fn read(layer: &MoeLayer<'_>) {
    let shape = layer.shape();
    assert_eq!(layer.experts().len(), shape.local_experts());
    assert_eq!(layer.router_weight().len(), shape.local_experts() * shape.hidden());
    let topk = layer.router().topk();
    let logits = vec![0.0; shape.local_experts()];
    let logits = expertile::MatrixRef::new(&logits, 1, shape.local_experts()).expect("one row");
    layer.router().route(logits, &mut vec![0; topk], &mut vec![0.0; topk]).expect("a router that was checked");
    for expert in layer.experts() {
        for matrix in [&expert.gate, &expert.up, &expert.down] {
            let mut row = vec![0.0; matrix.cols()];
            for j in 0..matrix.rows() {
                matrix.write_row(j, &mut row);
            }
        }
    }
}

fn whole_config(family: Family) -> Vec<u8> {
    let own = match family {
        Family::Qwen3Moe => {
            r#""model_type":"qwen3_moe","num_experts":2,"moe_intermediate_size":3,"norm_topk_prob":true,
            "mlp_only_layers":[0],"decoder_sparse_step":1"#
        }
        Family::DeepSeekV3 => {
            r#""model_type":"deepseek_v3","n_routed_experts":2,"moe_intermediate_size":3,"n_group":1,"topk_group":1,
            "norm_topk_prob":true,"routed_scaling_factor":2.5,"first_k_dense_replace":1,"scoring_func":"sigmoid",
            "topk_method":"noaux_tc""#
        }
        Family::Mixtral => r#""architectures":["MixtralForCausalLM"],"num_local_experts":2,"intermediate_size":3"#,
    };
    format!(
        r#"{{{own},"hidden_size":4,"num_experts_per_tok":1,"hidden_act":"silu","num_hidden_layers":2,
        "quantization_config":{{"weight_block_size":[128,128]}}}}"#
    )
    .into_bytes()
}

fn whole_file(family: Family, e4m3: bool) -> Vec<u8> {
    let prefix = if family == Family::Mixtral { "model.layers.1.block_sparse_moe" } else { "model.layers.1.mlp" };
    let parts = if family == Family::Mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
    let weight = if e4m3 { Dtype::F8_E4M3 } else { Dtype::BF16 };
    let mut tensors = vec![(format!("{prefix}.gate.weight"), Dtype::F32, vec![EXPERTS, HIDDEN])];
    if family == Family::DeepSeekV3 {
        tensors.push((format!("{prefix}.gate.e_score_correction_bias"), Dtype::F32, vec![EXPERTS]));
    }
    for expert in 0..EXPERTS {
        let shapes = [[INTERMEDIATE, HIDDEN], [INTERMEDIATE, HIDDEN], [HIDDEN, INTERMEDIATE]];
        for (part, shape) in parts.into_iter().zip(shapes) {
            let name = format!("{prefix}.experts.{expert}.{part}.weight");
            if e4m3 {
                tensors.push((format!("{name}_scale_inv"), Dtype::F32, vec![1, 1]));
            }
            tensors.push((name, weight, shape.to_vec()));
        }
    }
    let data = [0x3c; 4 * EXPERTS * HIDDEN];
    let views = tensors.into_iter().map(|(name, dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (name, TensorView::new(dtype, shape, &data[..bytes]).expect("as many bytes as the shape asks for"))
    });
    safetensors::serialize(views, None).expect("a header of a few tensors")
}
