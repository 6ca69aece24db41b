//! `expertile layer`, as a user meets it.

mod common;

use common::made_up::{FAMILIES, LAYER, Model, NewTensor, Sizes, serialize};
use common::{fail, json, succeed};
use expertile_oracle::gemm::dot;
use expertile_oracle::routing as oracle;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::path::Path;

const SIZES: Sizes = Sizes { hidden: 256, intermediate: 128, experts: 6, topk: 2 };
const TOKENS: usize = 9;

/// Layer 1 of the checkpoint in the working folder, checked.
const CHECKED: [&str; 10] =
    ["layer", "--model", ".", "--layer", "1", "--input", "in.safetensors", "--output", "out.safetensors", "--check"];

const STAGES: [&str; 6] = ["routing", "permute", "gemm1", "activation", "gemm2", "unpermute"];

fn bytes<const N: usize, T: Copy>(values: &[T], convert: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| convert(value)).collect()
}

fn states(tokens: usize, hidden: usize) -> Vec<f32> {
    let mut random = expertile_testkit::Random::new(5);
    (0..tokens * hidden).map(|_| bf16::from_f32(1.7 * random.uniform()).to_f32()).collect()
}

fn tensor(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> NewTensor {
    NewTensor { name: name.into(), dtype, shape: shape.to_vec(), bytes }
}

fn bf16_states(tokens: usize, hidden: usize) -> NewTensor {
    let values = states(tokens, hidden);
    tensor("hidden_states", Dtype::BF16, &[tokens, hidden], bytes(&values, |x| bf16::from_f32(x).to_le_bytes()))
}

fn write(folder: &Path, file: &str, tensors: &[NewTensor]) {
    std::fs::write(folder.join(file), serialize(tensors)).unwrap();
}

/// The output file's ids, weights and rows.
fn read_output(file: &Path, tokens: usize) -> (Vec<i32>, Vec<f32>, Vec<bf16>) {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let get = |name: &str, dtype| {
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()[0]), (dtype, tokens), "{name}");
        tensor.data().to_vec()
    };
    let ids = get("topk_ids", Dtype::I32).as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b)).collect();
    let weights = get("topk_weights", Dtype::F32).as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let rows = get("output", Dtype::BF16).as_chunks::<2>().0.iter().map(|&b| bf16::from_le_bytes(b)).collect();
    (ids, weights, rows)
}

/// What the oracle's router chooses.
fn oracle_choice(model: &mut Model, family: &str, x: &[f32]) -> (Vec<i32>, Vec<f64>) {
    let Sizes { hidden, experts, topk, .. } = SIZES;
    let weight: Vec<f64> = model
        .tensor_mut(".gate.weight")
        .bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|&b| bf16::from_le_bytes(b).to_f64())
        .collect();
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let logits: Vec<f32> =
        x.chunks(hidden).flat_map(|x| weight.chunks(hidden).map(|w| dot(x, w) as f32).collect::<Vec<_>>()).collect();
    let softmax = oracle::Router {
        topk,
        scoring: oracle::Scoring::Softmax,
        logit_bias: &[],
        correction_bias: &[],
        groups: (1, 1),
        group_best: 2,
        divisor: Some(|sum| sum),
        scaling_factor: 1.0,
    };
    if family != "deepseek_v3" {
        return softmax.route(&logits, experts);
    }
    let bias = &model.tensor_mut("e_score_correction_bias").bytes;
    let bias: Vec<f32> = bias.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let router = oracle::Router {
        scoring: oracle::Scoring::Sigmoid,
        correction_bias: &bias,
        groups: (2, 2),
        divisor: Some(|sum| sum + 1e-20),
        scaling_factor: 2.5,
        ..softmax
    };
    router.route(&logits, experts)
}

#[test]
fn every_naming_and_format_gives_the_oracles_numbers() {
    for family in FAMILIES {
        for e4m3 in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let mut model = Model::new(family, SIZES, e4m3);
            model.write(folder.path(), if e4m3 { 3 } else { 1 });
            write(folder.path(), "in.safetensors", &[bf16_states(TOKENS, SIZES.hidden)]);
            let report = json(folder.path(), &CHECKED);
            assert_eq!(report["check"]["passed"], true, "{report:#}");
            assert_eq!(report["weights"], if e4m3 { "e4m3" } else { "bf16" });
            assert_eq!(report["activations"], report["weights"]);
            let stages: Vec<&Value> =
                report["stages"].as_array().unwrap().iter().map(|stage| &stage["stage"]).collect();
            let shared = family == "deepseek_v3";
            let expected: Vec<&str> =
                ["router", "routing", "shared"].into_iter().chain(STAGES.into_iter().skip(1)).collect();
            assert_eq!(
                json!(stages),
                json!(expected.iter().filter(|stage| shared || **stage != "shared").collect::<Vec<_>>())
            );
            let parts = if shared { json!(["routed", "shared"]) } else { json!(["routed"]) };
            assert_eq!((&report["parts"], &report["left_out"], &report["router"]), (&parts, &json!([]), &json!("f32")));
            for stage in report["stages"].as_array().unwrap() {
                assert!(stage["seconds"].as_f64().unwrap() > 0.0 && stage["bytes"].as_u64().unwrap() > 0, "{stage}");
                let gemm = stage["stage"].as_str().unwrap().starts_with("gemm");
                assert!(stage["share"].as_f64().unwrap() > 0.0 && (!gemm || stage["flops"].as_u64().unwrap() > 0));
            }
            let (ids, weights, rows) = read_output(&folder.path().join("out.safetensors"), TOKENS);
            let (expected_ids, expected_weights) = oracle_choice(&mut model, family, &states(TOKENS, SIZES.hidden));
            assert_eq!(ids, expected_ids, "{family}");
            assert!(weights.iter().zip(expected_weights).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-5));
            assert_eq!(rows.len(), TOKENS * SIZES.hidden);
            assert!(rows.iter().any(|value| value.to_f32().abs() > 0.1));
            if e4m3 {
                let report = json(folder.path(), &[&CHECKED[..], &["--activations", "bf16"]].concat());
                assert_eq!((&report["activations"], &report["check"]["passed"]), (&json!("bf16"), &json!(true)));
            }
        }
    }
}

#[test]
fn ids_in_the_file_are_used_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("qwen3_moe", SIZES, false).write(folder.path(), 1);
    let values = states(3, SIZES.hidden);
    let f32_states = bytes(&values, f32::to_le_bytes);
    let f16_states = bytes(&values, |x| f16::from_f32(x).to_le_bytes());
    let ids = [5i64, -1, 0, 5, -9, -1, 2, 2, 2];
    let weights = [0.5f32, 9.0, 0.25, 1.0, f32::NAN, 0.0, 0.1, 0.2, 0.3];
    for (dtype, states) in [(Dtype::F32, f32_states), (Dtype::F16, f16_states)] {
        let tensors = [
            tensor("hidden_states", dtype, &[3, SIZES.hidden], states),
            tensor("topk_ids", Dtype::I64, &[3, 3], bytes(&ids, i64::to_le_bytes)),
            tensor("topk_weights", Dtype::F32, &[3, 3], bytes(&weights, f32::to_le_bytes)),
        ];
        write(folder.path(), "in.safetensors", &tensors);
        let report = json(folder.path(), &CHECKED);
        assert_eq!((&report["check"]["passed"], &report["active_experts"]), (&json!(true), &json!(3)), "{report:#}");
        let stages: Vec<&Value> = report["stages"].as_array().unwrap().iter().map(|stage| &stage["stage"]).collect();
        assert_eq!(json!(stages), json!(STAGES));
        let (written, _, rows) = read_output(&folder.path().join("out.safetensors"), 3);
        assert_eq!(written, [5, -1, 0, 5, -1, -1, 2, 2, 2]);
        assert!(rows.iter().all(|value| value.is_finite()), "an empty slot's weight reached the output");
    }
}

/// A layer of DeepSeek-V4 in which the tokens' numbers choose the experts.
fn by_token(table: &[[i64; 2]]) -> Model {
    let mut model = Model::new("mixtral", SIZES, false);
    for tensor in &mut model.tensors {
        tensor.name = tensor.name.replace("block_sparse_moe", "ffn");
    }
    for (part, rows, cols) in [("w1", 128, 256), ("w3", 128, 256), ("w2", 256, 128)] {
        let like = model.tensor_mut(&format!("experts.0.{part}.weight")).bytes.clone();
        let name = format!("model.layers.{LAYER}.ffn.shared_experts.{part}.weight");
        model.tensors.push(tensor(&name, Dtype::BF16, &[rows, cols], like));
    }
    let name = format!("model.layers.{LAYER}.ffn.gate.tid2eid");
    let ids: Vec<i64> = table.iter().flatten().copied().collect();
    model.tensors.push(tensor(&name, Dtype::I64, &[table.len(), 2], bytes(&ids, i64::to_le_bytes)));
    model.config = json!({
        "model_type": "deepseek_v4", "hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 6,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
        "num_hash_layers": 3
    });
    model
}

#[test]
fn a_tokens_number_chooses_its_experts_where_the_layer_has_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let table = [[5, 0], [1, 2], [3, 4], [2, 2]];
    by_token(&table).write(folder.path(), 1);
    let numbers = |numbers: &[i64]| tensor("input_ids", Dtype::I64, &[numbers.len()], bytes(numbers, i64::to_le_bytes));
    let own = [2i64, 0, 1, 3, 0];
    write(folder.path(), "in.safetensors", &[bf16_states(5, SIZES.hidden), numbers(&own)]);
    for router in ["f32", "bf16"] {
        let report = json(folder.path(), &[&CHECKED[..], &["--router", router]].concat());
        assert_eq!(report["check"]["passed"], true, "{report:#}");
        let (ids, weights, _) = read_output(&folder.path().join("out.safetensors"), 5);
        assert_eq!(ids, own.map(|number| table[number as usize].map(|id| id as i32)).concat());
        for weights in weights.chunks(2) {
            assert!((weights[0] + weights[1] - 1.5).abs() < 0.02, "{weights:?}");
        }
    }
    // Expert 2 twice: half of the factor each.
    let (_, weights, _) = read_output(&folder.path().join("out.safetensors"), 5);
    assert_eq!(weights[6..8], [0.75, 0.75]);

    let says = |tensors: &[NewTensor], part: &str| {
        write(folder.path(), "in.safetensors", tensors);
        let message = fail(folder.path(), &CHECKED, 2);
        assert!(message.contains(part), "{message}");
    };
    says(&[bf16_states(5, SIZES.hidden)], "input_ids is missing from the input");
    says(&[bf16_states(2, SIZES.hidden), numbers(&[0, 4])], "input_ids[1] is 4, expected a number in the vocabulary");
    says(&[bf16_states(2, SIZES.hidden), numbers(&[-1, 0])], "input_ids[0] is -1");
    says(&[bf16_states(2, SIZES.hidden), numbers(&[0])], "input_ids has shape [1], expected [2]");
    by_token(&[[0, 6]]).write(folder.path(), 1);
    says(&[bf16_states(1, SIZES.hidden), numbers(&[0])], "topk_ids[0, 1] is 6");
}

#[test]
fn no_tokens_and_tokens_without_experts_give_zeros() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("mixtral", SIZES, true).write(folder.path(), 1);
    write(folder.path(), "in.safetensors", &[bf16_states(0, SIZES.hidden)]);
    assert_eq!(json(folder.path(), &CHECKED)["check"]["passed"], true);
    assert_eq!(read_output(&folder.path().join("out.safetensors"), 0).2, []);
    let tensors = [
        bf16_states(1, SIZES.hidden),
        tensor("topk_ids", Dtype::I32, &[1, 2], vec![255; 8]),
        tensor("topk_weights", Dtype::F32, &[1, 2], vec![0; 8]),
    ];
    write(folder.path(), "in.safetensors", &tensors);
    assert_eq!(json(folder.path(), &CHECKED)["check"]["passed"], true);
    assert!(read_output(&folder.path().join("out.safetensors"), 1).2.iter().all(|value| value.to_f32() == 0.0));
}

#[test]
fn threads_do_not_change_a_bit_and_every_instruction_set_passes() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("deepseek_v3", SIZES, true).write(folder.path(), 2);
    write(folder.path(), "in.safetensors", &[bf16_states(TOKENS, SIZES.hidden)]);
    let output = |more: &[&str]| {
        succeed(folder.path(), &[&CHECKED[..], more].concat());
        std::fs::read(folder.path().join("out.safetensors")).unwrap()
    };
    let one = output(&["--threads", "1"]);
    assert_eq!(output(&["--threads", "3"]), one);
    output(&["--isa", "portable"]);
}

#[test]
fn a_result_past_the_tolerance_is_exit_code_1() {
    let folder = tempfile::tempdir().unwrap();
    // One value so large that the rest of its group rounds to nothing, met by weights of zero: all that counts is lost.
    let mut model = Model::new("qwen3_moe", SIZES, true);
    for NewTensor { name, shape, bytes, .. } in &mut model.tensors {
        if name.ends_with("gate_proj.weight") || name.ends_with("up_proj.weight") {
            bytes.chunks_mut(shape[1]).for_each(|row| (row[0], row[128]) = (0, 0));
        }
    }
    model.write(folder.path(), 1);
    let mut values = states(TOKENS, SIZES.hidden);
    values.chunks_mut(128).for_each(|group| group[0] = 1e6);
    let input = bytes(&values, |x| bf16::from_f32(x).to_le_bytes());
    write(folder.path(), "in.safetensors", &[tensor("hidden_states", Dtype::BF16, &[TOKENS, SIZES.hidden], input)]);
    let line = fail(folder.path(), &CHECKED, 1);
    assert!(line.contains("check failed: whole ") && line.contains("(tolerated 2.7e-3)"), "{line}");
    succeed(folder.path(), &[&CHECKED[..], &["--activations", "bf16"]].concat());
}

#[test]
fn right_results_pass_where_rows_are_short_or_one_slot_carries_a_row() {
    let one_slot = Sizes { hidden: 256, intermediate: 128, experts: 4, topk: 1 };
    let short = Sizes { hidden: 32, intermediate: 16, experts: 4, topk: 1 };
    for (sizes, e4m3, tokens) in [(short, false, 4096), (one_slot, true, 1024), (one_slot, true, 1)] {
        let folder = tempfile::tempdir().unwrap();
        Model::new("qwen3_moe", sizes, e4m3).write(folder.path(), 1);
        write(folder.path(), "in.safetensors", &[bf16_states(tokens, sizes.hidden)]);
        let check = &json(folder.path(), &CHECKED)["check"];
        assert_eq!((&check["passed"], &check["values"]), (&json!(true), &check["finite_values"]), "{check:#}");
        assert!(sizes.hidden > 32 || check["worst_row"]["difference"].as_f64().unwrap() > 4e-5, "{check:#}");
    }
}

#[test]
fn an_output_without_a_number_does_not_pass_the_check() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("qwen3_moe", SIZES, false).write(folder.path(), 1);
    let states = |first: f32| {
        let values: Vec<f32> = states(2, SIZES.hidden)
            .into_iter()
            .enumerate()
            .map(|(at, x)| if at < SIZES.hidden { first } else { x })
            .collect();
        tensor("hidden_states", Dtype::F32, &[2, SIZES.hidden], bytes(&values, f32::to_le_bytes))
    };
    let routing = |ids: [i32; 2]| {
        let ids = tensor("topk_ids", Dtype::I32, &[2, 1], bytes(&ids, i32::to_le_bytes));
        [ids, tensor("topk_weights", Dtype::F32, &[2, 1], bytes(&[1.0, 1.0], f32::to_le_bytes))]
    };
    write(folder.path(), "in.safetensors", &[&[states(f32::NAN)][..], &routing([1, 1])].concat());
    let text = succeed(folder.path(), &CHECKED);
    assert!(
        text.contains("check passed") && text.contains("256 of 512 values are not finite and were left out"),
        "{text}"
    );
    let all = tensor("hidden_states", Dtype::F32, &[2, SIZES.hidden], bytes(&[f32::NAN; 512], f32::to_le_bytes));
    write(folder.path(), "in.safetensors", &[&[all][..], &routing([1, 2])].concat());
    let line = fail(folder.path(), &CHECKED, 1);
    assert!(line.contains("check failed: nothing finite was compared, of 512 values"), "{line}");
}

#[test]
fn presets_make_up_what_they_need() {
    let asked = ["layer", "--preset", "qwen3-30b-a3b", "--experts", "8", "--tokens", "3", "--check"];
    let report = json(Path::new("."), &asked);
    assert_eq!(report["check"]["passed"], true, "{report:#}");
    let of = |key: &str| report[key].as_u64().unwrap();
    assert_eq!((of("tokens"), of("hidden"), of("intermediate"), of("experts"), of("topk")), (3, 2048, 768, 8, 8));
    let text = succeed(Path::new("."), &[&asked[..], &["--weights", "e4m3"]].concat());
    for part in
        STAGES.iter().chain(&["router", "layer", "e4m3 weights", "e4m3 activations", "check passed", "of limit"])
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let folder = tempfile::tempdir().unwrap();
    let output = |seed: &str| {
        let asked = ["--seed", seed, "--output", "out.safetensors"];
        succeed(
            folder.path(),
            &[&["layer", "--preset", "deepseek-v3", "--experts", "8", "--tokens", "2"], &asked[..]].concat(),
        );
        std::fs::read(folder.path().join("out.safetensors")).unwrap()
    };
    assert_eq!(output("7"), output("7"));
    assert_ne!(output("7"), output("8"));
}

#[test]
fn the_parts_of_a_block_are_named_and_chosen() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("deepseek_v3", SIZES, false).write(folder.path(), 1);
    write(folder.path(), "in.safetensors", &[bf16_states(TOKENS, SIZES.hidden)]);
    let run = |options: &[&str]| {
        let report = json(folder.path(), &[&CHECKED[..], options].concat());
        assert_eq!(report["check"]["passed"], true, "{report:#}");
        let (ids, _, rows) = read_output(&folder.path().join("out.safetensors"), TOKENS);
        (report, ids, rows.iter().map(|value| value.to_f32()).collect::<Vec<f32>>())
    };
    let (all, ids, whole) = run(&[]);
    let (routed, routed_ids, routed_rows) = run(&["--parts", "routed"]);
    let (shared, shared_ids, shared_rows) = run(&["--parts", "shared"]);
    assert_eq!((&all["parts"], &all["left_out"]), (&json!(["routed", "shared"]), &json!([])));
    assert_eq!((&routed["parts"], &routed["left_out"]), (&json!(["routed"]), &json!(["shared"])));
    assert_eq!((&shared["parts"], &shared["left_out"]), (&json!(["shared"]), &json!(["routed"])));
    assert!(shared["check"]["compared"].as_str().unwrap().starts_with("shared experts, with an f64 oracle"));
    // The choice is the router's, whatever part is computed.
    assert_eq!((&ids, &ids), (&routed_ids, &shared_ids));
    assert!(shared_rows.iter().any(|value| value.abs() > 0.1));
    let sums = routed_rows.iter().zip(&shared_rows).map(|(routed, shared)| routed + shared);
    let close = |(sum, whole): (f32, &f32)| (sum - whole).abs() <= 0.02 * whole.abs().max(0.5);
    assert!(sums.zip(&whole).all(close));
    let text = succeed(folder.path(), &[&CHECKED[..], &["--parts", "routed"]].concat());
    assert!(text.contains("output holds: routed (left out: shared); router in f32; swiglu"), "{text}");
    assert!(text.contains("compared: routed experts, with an f64 oracle on the weights"), "{text}");
}

#[test]
fn a_router_in_bf16_rounds_its_weights() {
    let folder = tempfile::tempdir().unwrap();
    Model::new("mixtral", SIZES, false).write(folder.path(), 1);
    write(folder.path(), "in.safetensors", &[bf16_states(TOKENS, SIZES.hidden)]);
    let report = json(folder.path(), &[&CHECKED[..], &["--router", "bf16"]].concat());
    assert_eq!((&report["router"], &report["check"]["passed"]), (&json!("bf16"), &json!(true)));
    let (_, weights, _) = read_output(&folder.path().join("out.safetensors"), TOKENS);
    assert!(weights.iter().all(|&weight| bf16::from_f32(weight).to_f32() == weight));
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let model = Model::new("deepseek_v3", SIZES, false);
    model.write(folder.path(), 1);
    write(folder.path(), "in.safetensors", &[bf16_states(1, SIZES.hidden)]);
    write(folder.path(), "narrow.safetensors", &[bf16_states(1, 64)]);
    let ids = tensor("topk_ids", Dtype::I32, &[1, 2], bytes(&[1, 6], i32::to_le_bytes));
    let weights = tensor("topk_weights", Dtype::F32, &[1, 2], vec![0; 8]);
    write(folder.path(), "past.safetensors", &[bf16_states(1, SIZES.hidden), ids.clone(), weights]);
    write(folder.path(), "half.safetensors", &[bf16_states(1, SIZES.hidden), ids]);
    let refuse = |arguments: &str, part: &str| {
        let arguments: Vec<&str> = ["layer"].into_iter().chain(arguments.split_whitespace()).collect();
        common::refuse(folder.path(), &arguments, part);
    };
    refuse("", "--model <DIR>|--preset <NAME>");
    refuse("--model .", "--layer <N> --input <FILE.safetensors>");
    refuse("--model . --preset mixtral-8x7b --layer 1 --input in.safetensors", "cannot be used with");
    refuse("--preset gpt-5", "qwen3-30b-a3b, deepseek-v3, qwen3-235b-a22b, mixtral-8x7b, gpt-oss-20b, gpt-oss-120b");
    refuse("--preset qwen3-30b-a3b --experts 4", "--experts is 4, expected at least 8");
    refuse("--preset qwen3-30b-a3b --experts 8 --tokens 99999999999999999", "--tokens is 99999999999999999");
    refuse("--preset qwen3-30b-a3b --weights f32", "weights is \"f32\", expected one of e4m3, bf16");
    refuse("--preset qwen3-30b-a3b --activations e4m3", "--activations is e4m3, expected bf16: the weights are bf16");
    refuse("--preset qwen3-30b-a3b --experts 8 --threads 0", "--threads is 0, expected 1 to ");
    refuse("--preset qwen3-30b-a3b --experts 8 --isa sse9", "isa is \"sse9\", expected one of portable");
    refuse("--preset qwen3-30b-a3b --device gpu", "expected cpu or cuda:N");
    refuse("--preset qwen3-30b-a3b --device cuda:99", "cuda is");
    refuse("--preset qwen3-30b-a3b --device cuda:0 --isa avx2", "--isa goes with --device cpu only");
    refuse("--preset gpt-oss-20b --experts 4 --e4m3-copy", "--device is cpu, expected cuda:N for --e4m3-copy");
    refuse("--model nowhere --layer 1 --input in.safetensors", "nowhere/config.json cannot be read");
    refuse("--model . --layer 0 --input in.safetensors", "layer 0 is dense (first_k_dense_replace is 1)");
    refuse("--model . --layer 7 --input in.safetensors", "layer is 7, expected below 2");
    refuse("--model . --layer 1 --input in.safetensors --parts all", "expected routed, shared or routed,shared");
    refuse("--model . --layer 1 --input in.safetensors --router f16", "expected f32 or bf16");
    for option in ["--experts 8", "--seed 2", "--weights bf16", "--tokens 4"] {
        refuse(&format!("--model . --layer 1 --input in.safetensors {option}"), "cannot be used with");
    }
    refuse("--preset qwen3-30b-a3b --experts 8 --tokens 1 --parts shared", "--parts is shared, expected routed");
    refuse("--model . --layer 1 --input none.safetensors", "none.safetensors cannot be read");
    refuse("--model . --layer 1 --input config.json", "config.json: header length is");
    refuse("--model . --layer 1 --input narrow.safetensors", "hidden_states has 64 columns, expected 256");
    refuse("--model . --layer 1 --input past.safetensors", "topk_ids[0, 1] is 6, expected an id below 6");
    refuse("--model . --layer 1 --input half.safetensors", "half.safetensors: tensor topk_weights is missing");
    refuse(
        "--model . --layer 1 --input in.safetensors --output no/out.safetensors",
        "no/out.safetensors cannot be written",
    );
    let mut gelu = model.clone();
    gelu.config["hidden_act"] = json!("gelu");
    gelu.write(folder.path(), 1);
    refuse("--model . --layer 1 --input in.safetensors", "hidden_act is \"gelu\", expected \"silu\"");
    let odd = Sizes { intermediate: 96, ..SIZES };
    Model::new("deepseek_v3", odd, true).write(folder.path(), 1);
    refuse(
        "--model . --layer 1 --input in.safetensors --activations e4m3",
        "intermediate is 96, expected a multiple of 64 for e4m3 activations: give --activations bf16",
    );
    let report = json(folder.path(), &CHECKED);
    assert_eq!((&report["activations"], &report["check"]["passed"]), (&json!("bf16"), &json!(true)));
    assert_eq!(LAYER, 1);
}
