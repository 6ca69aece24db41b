//! Configurations as they are published, and as they should never be.

use super::known_keys::HARMLESS_KEYS;
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
    let nested = json!({"model_type": "a_multimodal_model", "vision_config": {"num_experts": 3}, "text_config": inner});
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
    let listed = changed(changed(deepseek(), "first_k_dense_replace", json!(0)), "moe_layer_freq", json!([0, 1, 1, 0]));
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
