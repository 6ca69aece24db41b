//! The checkpoint reader over any bytes, and over whole checkpoints of several kinds with damage done to them: experts in
//! tensors of their own and fused, plain and transposed, in MXFP4, with shared experts, biases and a nested config.
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
/// `H` and `I` of gpt-oss in MXFP4: one group.
const GROUP: usize = 32;

#[derive(Arbitrary, Debug)]
enum Input {
    Noise { config: Vec<u8>, file: Vec<u8>, layer: usize },
    Damaged { family: Family, quantized: bool, layer: u8, config: Vec<Edit>, file: Vec<Edit> },
}

#[derive(Arbitrary, Debug, Clone, Copy, PartialEq)]
enum Family {
    Qwen3Moe,
    DeepSeekV3,
    Mixtral,
    /// Fused and transposed, with biases.
    GptOss,
    /// Fused, in a nested config below another prefix, with a gated shared expert.
    Qwen35Moe,
    /// Without a gate.
    NemotronH,
}

fuzz_target!(|input: Input| {
    let (config, file, layer) = match input {
        Input::Noise { config, file, layer } => (config, file, layer),
        Input::Damaged { family, quantized, layer, config: config_edits, file: file_edits } => {
            let (mut config, mut file) = (whole_config(family, quantized), whole_file(family, quantized));
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
    let topk = layer.router().topk;
    let logits = vec![0.0; shape.local_experts()];
    let logits = expertile::MatrixRef::new(&logits, 1, shape.local_experts()).expect("one row");
    layer.router().route(logits, &mut vec![0; topk], &mut vec![0.0; topk]).expect("a router that was checked");
    if let Some(biases) = layer.biases() {
        assert_eq!(biases.w13.len(), shape.local_experts() * shape.w13_rows());
        assert_eq!(biases.w2.len(), shape.local_experts() * shape.hidden());
    }
    if let Some(shared) = layer.shared() {
        assert!(shared.gate.as_ref().is_none_or(|gate| gate.len() == shape.hidden()));
        shared.expert.down.write_row(0, &mut vec![0.0; shared.shape.intermediate()]);
    }
    for expert in layer.experts() {
        for matrix in expert.gate.iter().chain([&expert.up, &expert.down]) {
            let mut row = vec![0.0; matrix.cols()];
            for j in 0..matrix.rows() {
                matrix.write_row(j, &mut row);
            }
        }
    }
}

fn whole_config(family: Family, quantized: bool) -> Vec<u8> {
    let own = match family {
        Family::GptOss if quantized => {
            r#""model_type":"gpt_oss","num_local_experts":2,"intermediate_size":32,"swiglu_limit":7.0"#
        }
        Family::Qwen3Moe => {
            r#""model_type":"qwen3_moe","num_experts":2,"moe_intermediate_size":3,"norm_topk_prob":true,
            "mlp_only_layers":[0],"decoder_sparse_step":1"#
        }
        Family::DeepSeekV3 => {
            r#""model_type":"deepseek_v3","n_routed_experts":2,"moe_intermediate_size":3,"n_group":1,"topk_group":1,
            "norm_topk_prob":true,"routed_scaling_factor":2.5,"first_k_dense_replace":1,"scoring_func":"sigmoid",
            "topk_method":"noaux_tc","n_shared_experts":2"#
        }
        Family::Mixtral => r#""architectures":["MixtralForCausalLM"],"num_local_experts":2,"intermediate_size":3"#,
        Family::GptOss => r#""model_type":"gpt_oss","num_local_experts":2,"intermediate_size":3,"swiglu_limit":7.0"#,
        Family::Qwen35Moe => {
            r#""model_type":"qwen3_5_moe_text","num_experts":2,"moe_intermediate_size":3,
            "shared_expert_intermediate_size":5"#
        }
        Family::NemotronH => {
            r#""model_type":"nemotron_h","n_routed_experts":2,"moe_intermediate_size":3,"n_group":1,"topk_group":1,
            "norm_topk_prob":true,"routed_scaling_factor":null,"mlp_hidden_act":"relu2",
            "time_step_limit":[0.0,Infinity],"hybrid_override_pattern":"ME","moe_shared_expert_intermediate_size":5"#
        }
    };
    let act = if family == Family::NemotronH { "" } else { r#""hidden_act":"silu","# };
    let (hidden, method) = match family {
        Family::GptOss if quantized => (GROUP, r#""mxfp4""#),
        _ => (HIDDEN, r#""fp8","weight_block_size":[128,128]"#),
    };
    let config = format!(
        r#"{{{own},{act}"hidden_size":{hidden},"num_experts_per_tok":1,"num_hidden_layers":2,
        "quantization_config":{{"quant_method":{method}}}}}"#
    );
    match family {
        Family::Qwen35Moe => format!(r#"{{"model_type":"qwen3_5_moe","text_config":{config}}}"#),
        _ => config,
    }
    .into_bytes()
}

fn whole_file(family: Family, quantized: bool) -> Vec<u8> {
    let mxfp4 = quantized && family == Family::GptOss;
    let prefix = match family {
        Family::Mixtral => "model.layers.1.block_sparse_moe",
        Family::NemotronH => "backbone.layers.1.mixer",
        Family::Qwen35Moe => "model.language_model.layers.1.mlp",
        Family::Qwen3Moe | Family::DeepSeekV3 | Family::GptOss => "model.layers.1.mlp",
    };
    // Fused tensors have no e4m3 form whose blocks are known at this intermediate size.
    let fused = matches!(family, Family::GptOss | Family::Qwen35Moe);
    let weight = if quantized && !fused { Dtype::F8_E4M3 } else { Dtype::BF16 };
    let hidden = if mxfp4 { GROUP } else { HIDDEN };
    let router = if family == Family::GptOss { "router" } else { "gate" };
    let mut tensors = vec![(format!("{router}.weight"), Dtype::F32, vec![EXPERTS, hidden])];
    if matches!(family, Family::DeepSeekV3 | Family::NemotronH) {
        tensors.push(("gate.e_score_correction_bias".into(), Dtype::F32, vec![EXPERTS]));
    }
    type Tensors = Vec<(String, Dtype, Vec<usize>)>;
    let expert = |tensors: &mut Tensors, name: String, parts: &[&str], width: usize| {
        for part in parts {
            let shape = if matches!(*part, "down_proj" | "w2") { vec![HIDDEN, width] } else { vec![width, HIDDEN] };
            let name = format!("{name}.{part}.weight");
            if weight == Dtype::F8_E4M3 {
                tensors.push((format!("{name}_scale_inv"), Dtype::F32, vec![1, 1]));
            }
            tensors.push((name, weight, shape));
        }
    };
    let gated = ["gate_proj", "up_proj", "down_proj"];
    for id in 0..EXPERTS {
        match family {
            Family::Mixtral => expert(&mut tensors, format!("experts.{id}"), &["w1", "w3", "w2"], INTERMEDIATE),
            Family::NemotronH => expert(&mut tensors, format!("experts.{id}"), &gated[1..], INTERMEDIATE),
            Family::Qwen3Moe | Family::DeepSeekV3 => {
                expert(&mut tensors, format!("experts.{id}"), &gated, INTERMEDIATE)
            }
            Family::GptOss | Family::Qwen35Moe => {}
        }
    }
    match family {
        Family::DeepSeekV3 => expert(&mut tensors, "shared_experts".into(), &gated, 2 * INTERMEDIATE),
        Family::NemotronH => expert(&mut tensors, "shared_experts".into(), &gated[1..], 5),
        Family::Qwen35Moe => {
            expert(&mut tensors, "shared_expert".into(), &gated, 5);
            tensors.push(("shared_expert_gate.weight".into(), Dtype::BF16, vec![1, HIDDEN]));
            tensors.push(("experts.gate_up_proj".into(), weight, vec![EXPERTS, 2 * INTERMEDIATE, HIDDEN]));
            tensors.push(("experts.down_proj".into(), weight, vec![EXPERTS, HIDDEN, INTERMEDIATE]));
        }
        Family::GptOss if mxfp4 => {
            tensors.push(("router.bias".into(), Dtype::BF16, vec![EXPERTS]));
            for (part, rows) in [("gate_up_proj", 2 * GROUP), ("down_proj", GROUP)] {
                tensors.push((format!("experts.{part}_blocks"), Dtype::U8, vec![EXPERTS, rows, 1, GROUP / 2]));
                tensors.push((format!("experts.{part}_scales"), Dtype::U8, vec![EXPERTS, rows, 1]));
                tensors.push((format!("experts.{part}_bias"), Dtype::BF16, vec![EXPERTS, rows]));
            }
        }
        Family::GptOss => {
            tensors.push(("router.bias".into(), Dtype::BF16, vec![EXPERTS]));
            tensors.push(("experts.gate_up_proj".into(), weight, vec![EXPERTS, HIDDEN, 2 * INTERMEDIATE]));
            tensors.push(("experts.gate_up_proj_bias".into(), weight, vec![EXPERTS, 2 * INTERMEDIATE]));
            tensors.push(("experts.down_proj".into(), weight, vec![EXPERTS, INTERMEDIATE, HIDDEN]));
            tensors.push(("experts.down_proj_bias".into(), weight, vec![EXPERTS, HIDDEN]));
        }
        Family::Qwen3Moe | Family::Mixtral => {}
    }
    let data = [0x3c; EXPERTS * 2 * GROUP * GROUP];
    let views = tensors.into_iter().map(|(name, dtype, shape)| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let view = TensorView::new(dtype, shape, &data[..bytes]).expect("as many bytes as the shape asks for");
        (format!("{prefix}.{name}"), view)
    });
    safetensors::serialize(views, None).expect("a header of a few tensors")
}
