//! The whole layer on a GPU against the f64 oracle and against the CPU backend. Output and workspace are NaN before
//! every call, so whatever was not written, or was read without being written, shows. Skips, and says so, without a
//! Hopper.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]
// Every unsafe block here does one of two things: it hands the layer the addresses of buffers that live until after
// the next wait and are as large as the layer's own functions ask, or it calls the driver with handles made a few
// lines above.
#![allow(clippy::undocumented_unsafe_blocks)]

mod e4m3_copy;
mod expanded;
mod joined;
mod model;
#[path = "../on_device/mod.rs"]
mod on_device;
mod safe;

use cudarc::driver::sys;
use expertile::cuda::{Biases, Device, DeviceMatrix, DevicePtr, Layer, LayerCall, Stream, Weights, WeightsBuilder};
use expertile::{
    Activation, ActivationFormat, Dtype, E4m3, Error, LayerConfig, LayerShape, MatrixRef, WeightFormat,
    WeightsBuilder as WeightsBuilderTrait,
};
use expertile_oracle::compare::{self, Tolerance};
use expertile_testkit::{NAN_POISON, Pattern, assert_untouched};
use half::bf16;
use model::{BASE, Call, Inputs, Matrices, Model, Spec};
use on_device::{hopper, is_emulated};
use std::fmt::{self, Write};

/// Against the CPU backend's GEMM 2 on the very rows and scales that the device's activation left: what differs is the
/// order (and on the device, within 128 of K, the width) of f32 sums, which moves a few results by one unit of bf16.
const SAME_ROWS: Tolerance = Tolerance { whole: 1e-6, row: 1e-5 };
/// Against the CPU backend's layer on the same inputs. Both quantize the same rows, and GEMM 1 differs as above; but
/// where a unit of bf16 moves the largest value of a group of activated values, the group's scale moves too, and some
/// of its 128 values round to the next e4m3. At worst a row is quantized anew in every group, which is what one e4m3
/// GEMM's tolerance is for; over many rows that is rare, and the whole stays within a tenth of it.
const E4M3_TO_CPU: Tolerance = Tolerance { whole: 1e-4, row: compare::E4M3_GEMM.row };
/// Rows from which on rare is rare.
const MANY_ROWS: usize = 64;
/// With bf16 there are no scales, only units of bf16.
const BF16_TO_CPU: Tolerance = Tolerance { whole: 2e-6, row: 2e-5 };

/// Every pair of weights and activations.
const FORMATS: [(WeightFormat, ActivationFormat); 6] = [
    (WeightFormat::E4m3, ActivationFormat::E4m3),
    (WeightFormat::Bf16, ActivationFormat::Bf16),
    (WeightFormat::Mxfp4, ActivationFormat::E4m3),
    (WeightFormat::Mxfp4, ActivationFormat::Bf16),
    (WeightFormat::Int4, ActivationFormat::E4m3),
    (WeightFormat::Int4, ActivationFormat::Bf16),
];

const GPT_OSS: Activation = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };

/// The largest whole and row differences of a comparison.
#[derive(Debug, Clone, Copy, Default)]
struct Differences {
    whole: f64,
    row: f64,
}

impl Differences {
    fn of(found: &[f64], expected: &[f64], hidden: usize) -> Self {
        let row = compare::worst(&compare::by_row(found, expected, hidden)).map_or(0.0, |(_, row)| row);
        Self { whole: compare::difference(found, expected), row }
    }

    fn within(&self, tolerance: Tolerance) -> bool {
        self.whole < tolerance.whole && self.row < tolerance.row
    }

    fn most(self, other: Self) -> Self {
        Self { whole: self.whole.max(other.whole), row: self.row.max(other.row) }
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1e}, row {:.1e}", self.whole, self.row)
    }
}

/// Against the oracle and against the CPU.
fn tolerances(spec: &Spec, tokens: usize) -> (Tolerance, Tolerance) {
    match spec.activations() {
        ActivationFormat::E4m3 if tokens * spec.topk < MANY_ROWS => {
            // The whole is then little more than a row.
            let few = |tolerance: Tolerance| Tolerance { whole: tolerance.row, ..tolerance };
            (few(compare::E4M3_LAYER), few(E4M3_TO_CPU))
        }
        ActivationFormat::E4m3 => (compare::E4M3_LAYER, E4M3_TO_CPU),
        ActivationFormat::Bf16 => (compare::BF16_LAYER, BF16_TO_CPU),
    }
}

/// Runs a call twice on a poisoned workspace and compares all tokens with the CPU's, some with the oracle's.
fn differences(device: &Device, model: &Model, tokens: usize, pattern: Pattern) -> [Differences; 3] {
    let inputs = Inputs::new(model, tokens, pattern, 1);
    let call = Call::new(device, model, &inputs);
    let hidden = model.spec.hidden;
    call.poison(device);
    call.launch(Stream(0));
    call.check(Stream(0)).unwrap();
    call.check_workspace_guard();
    let (bytes, found) = (call.output_bytes(), call.output());
    let choice = model.on_device.choice(tokens).unwrap();
    if choice.one_launch.is_some() || choice.joined {
        call.poison(device);
        call.launch_in_steps(Stream(0));
        assert!(call.output_bytes() == bytes, "one launch differs: {tokens} tokens, {pattern:?}, {:?}", model.spec);
    }
    let half = model.second_half(&inputs, &call);
    assert!(found == half.output, "unpermute differs: {tokens} tokens, {pattern:?}, {:?}", model.spec);
    let same_rows = Differences::of(&half.from_device, &half.from_cpu, hidden);
    // Once more on what the first call left in the workspace.
    call.output.fill(NAN_POISON).unwrap();
    call.launch(Stream(0));
    assert!(call.output_bytes() == bytes, "a second call differs: {tokens} tokens, {pattern:?}, {:?}", model.spec);

    let sample: Vec<usize> = (0..tokens).step_by(tokens.div_ceil(24)).chain([tokens - 1]).collect();
    let rows: Vec<f64> = sample.iter().flat_map(|token| &found[token * hidden..][..hidden]).copied().collect();
    let from_oracle = Differences::of(&rows, &model.oracle(&inputs, &sample), hidden);
    [from_oracle, Differences::of(&found, &model.cpu(&inputs), hidden), same_rows]
}

/// Every size with every pattern; tells all that are off, not the first.
fn check_model(spec: Spec, tokens: &[usize], patterns: &[Pattern]) {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, spec);
    let (mut most, mut off) = ([Differences::default(); 3], String::new());
    for &tokens in tokens {
        for &pattern in patterns {
            let (to_oracle, to_cpu) = tolerances(&spec, tokens);
            let [oracle, cpu, same_rows] = differences(device, &model, tokens, pattern);
            if !oracle.within(to_oracle) || !cpu.within(to_cpu) || !same_rows.within(SAME_ROWS) {
                let choice = model.on_device.choice(tokens).unwrap();
                let _ = writeln!(
                    off,
                    "{tokens} tokens, {pattern:?}, {choice}: oracle {oracle}, CPU {cpu}, gemm2 {same_rows}"
                );
            }
            most = [most[0].most(oracle), most[1].most(cpu), most[2].most(same_rows)];
        }
    }
    println!("from the oracle {}; from the CPU {}; gemm2 on the same rows {}: {spec:?}", most[0], most[1], most[2]);
    assert!(off.is_empty(), "{spec:?}:\n{off}");
}

const ALL: [Pattern; 4] = [Pattern::Even, Pattern::Skewed, Pattern::One, Pattern::Empty];

#[test]
fn a_small_e4m3_layer_is_right_for_every_pattern_and_size() {
    check_model(BASE, &[1, 2, 3, 7, 8, 9, 33, 64, 65, 130, 600], &ALL);
}

#[test]
fn f16_states_i64_ids_and_an_f32_result_are_right_where_h_is_no_power_of_two() {
    let spec = Spec { hidden: 2944, intermediate: 384, experts: 8, topk: 2, ..BASE };
    let spec = Spec { input: Dtype::F16, output: Dtype::F32, ids: Dtype::I64, ..spec };
    check_model(spec, &[1, 2, 17, 300], &[Pattern::Even, Pattern::Skewed]);
}

#[test]
fn an_expert_map_and_a_clamped_activation_are_right_with_routing_in_the_permutes_launch_and_before_it() {
    let spec = Spec { hidden: 1024, intermediate: 640, experts: 32, global: 256, topk: 8, ..BASE };
    // 512 tokens are the last whose routing and rows take one launch.
    check_model(Spec { activation: GPT_OSS, ..spec }, &[1, 2, 5, 64, 512, 513], &[Pattern::Even, Pattern::Skewed]);
}

#[test]
fn one_launch_is_right_where_few_of_the_slots_are_here_and_where_more_are_than_expected() {
    let spec = Spec { hidden: 640, intermediate: 384, experts: 4, global: 64, topk: 4, ..BASE };
    check_model(spec, &[3, 4, 5, 7, 8], &ALL);
    check_model(Spec { format: WeightFormat::Bf16, ..spec }, &[3, 4], &ALL);
    let spec = Spec { hidden: 3072, intermediate: 256, experts: 2, global: 32, topk: 8, ids: Dtype::I64, ..BASE };
    check_model(spec, &[8], &[Pattern::Even, Pattern::One]);
}

#[test]
fn many_experts_are_right() {
    let spec = Spec { hidden: 256, intermediate: 128, experts: 256, topk: 8, ..BASE };
    check_model(spec, &[1, 2, 8, 64, 600], &[Pattern::Even, Pattern::Skewed]);
    check_model(Spec { experts: 1, topk: 1, ..spec }, &[1, 16, 600], &[Pattern::Even]);
    // One tile of outputs, of which no two blocks can share rows.
    check_model(Spec { hidden: 128, experts: 2, topk: 1, ..spec }, &[1, 300], &[Pattern::Skewed]);
}

#[test]
fn a_layer_that_may_split_k_does_for_few_rows_and_is_right() {
    let Some(device) = hopper() else { return };
    for format in [WeightFormat::E4m3, WeightFormat::Bf16] {
        let spec = Spec { hidden: 1024, intermediate: 128, experts: 1, topk: 1, max_tokens: 300, format, ..BASE };
        let choices = |split_k| {
            let model = Model::new(device, Spec { split_k, ..spec });
            [1, 40, 300].map(|tokens| model.on_device.choice(tokens).unwrap().gemm1.splits())
        };
        assert_eq!(choices(false), [1; 3], "never, unless it may");
        let [one, forty, many] = choices(true);
        assert!(one > 1 && forty > 1 && many == 1, "K in {one}, {forty}, {many} parts");
        check_model(Spec { split_k: true, ..spec }, &[1, 16, 40], &[Pattern::Even, Pattern::Skewed]);
    }
}

#[test]
fn gemms_whose_row_tiles_differ_have_a_worklist_each() {
    let Some(device) = hopper() else { return };
    // In one launch both have the same.
    let apart = Spec { one_launch: false, ..BASE };
    let spec = Spec { hidden: 1024, intermediate: 128, experts: 24, topk: 3, max_tokens: 3000, ..apart };
    for format in [WeightFormat::E4m3, WeightFormat::Bf16] {
        let model = Model::new(device, Spec { format, ..spec });
        let differ = |&tokens: &usize| {
            let choice = model.on_device.choice(tokens).unwrap();
            choice.gemm1.row_tile() != choice.gemm2.row_tile()
        };
        // Routing in the permute's launch and before it.
        let few = (1..2730).find(differ);
        let many = (2740..3000).find(differ);
        println!("{format}: {few:?} and {many:?} tokens");
        let tokens: Vec<usize> = few.into_iter().chain(many).collect();
        assert!(!tokens.is_empty(), "{format}: both GEMMs always have the same");
        for tokens in tokens {
            let [oracle, cpu, same_rows] = differences(device, &model, tokens, Pattern::Skewed);
            let (to_oracle, to_cpu) = tolerances(&model.spec, tokens);
            assert!(oracle.within(to_oracle), "{tokens} tokens, {format}: {oracle}");
            assert!(cpu.within(to_cpu) && same_rows.within(SAME_ROWS), "{tokens} tokens, {format}: {cpu}, {same_rows}");
        }
    }
}

#[test]
fn e4m3_rows_with_a_partial_last_group_are_right() {
    let spec = Spec { hidden: 320, intermediate: 128, experts: 6, topk: 2, max_tokens: 40, ..BASE };
    check_model(spec, &[1, 2, 9, 40], &[Pattern::Even, Pattern::Skewed]);
}

#[test]
fn weights_on_the_input_are_right() {
    let spec = Spec { hidden: 384, intermediate: 128, experts: 4, topk: 1, weight_on_input: true, ..BASE };
    check_model(spec, &[1, 2, 9, 200], &[Pattern::Even, Pattern::Skewed]);
}

#[test]
fn bf16_layers_are_right_where_n_and_k_are_partial() {
    let spec = Spec { hidden: 2880, intermediate: 176, experts: 12, format: WeightFormat::Bf16, ..BASE };
    check_model(spec, &[1, 3, 31, 256, 600], &[Pattern::Even, Pattern::Skewed]);
    let spec = Spec { hidden: 528, intermediate: 144, experts: 64, global: 128, topk: 8, ..spec };
    let spec = Spec { ids: Dtype::I64, output: Dtype::F32, activation: GPT_OSS, ..spec };
    check_model(spec, &[1, 2, 4, 8, 64, 513], &ALL);
}

/// A layer as gpt-oss has it: H and I that 128 does not divide, biases, the clamped activation.
fn check_partial_groups_with_biases(format: WeightFormat) {
    let spec = Spec { hidden: 320, intermediate: 192, experts: 6, topk: 2, activation: GPT_OSS, biased: true, ..BASE };
    for activation_format in ActivationFormat::ALL {
        let spec = Spec { format, activation_format, ..spec };
        check_model(spec, &[1, 2, 31, 64, 300], &[Pattern::Even, Pattern::Skewed]);
        check_model(spec, &[1, 2, 3, 40], &[Pattern::One, Pattern::Empty]);
    }
    // Half a unit of K, which e4m3 rows have not.
    let activation_format = ActivationFormat::Bf16;
    let spec = Spec { hidden: 288, intermediate: 160, activation_format, format, ..spec };
    check_model(spec, &[1, 40], &[Pattern::Even]);
}

#[test]
fn mxfp4_layers_with_biases_are_right_where_the_last_groups_are_partial() {
    check_partial_groups_with_biases(WeightFormat::Mxfp4);
}

#[test]
fn int4_layers_with_biases_are_right_where_the_last_groups_are_partial() {
    check_partial_groups_with_biases(WeightFormat::Int4);
}

#[test]
fn layers_of_4_bits_are_right_with_an_expert_map_and_without_biases() {
    let spec = Spec { hidden: 512, intermediate: 128, experts: 16, global: 32, topk: 4, ..BASE };
    for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
        for activation_format in ActivationFormat::ALL {
            let spec = Spec { format, activation_format, ..spec };
            check_model(spec, &[1, 8, 130], &[Pattern::Even, Pattern::Skewed]);
        }
    }
}

#[test]
fn biases_are_added_in_every_format() {
    for format in [WeightFormat::E4m3, WeightFormat::Bf16] {
        let spec = Spec { activation: GPT_OSS, format, biased: true, ..BASE };
        check_model(spec, &[1, 2, 64, 300], &[Pattern::Even, Pattern::Skewed]);
    }
}

#[test]
fn biases_of_other_lengths_are_refused() {
    let Some(device) = hopper() else { return };
    let layer = |biased| Model::new(device, Spec { max_tokens: 8, biased, ..BASE }).on_device;
    let error = layer(false).with_biases(Some(vec![0.0; 16 * 512 - 1]), None).unwrap_err();
    assert!(error.to_string().starts_with("b13 has shape [8191]"), "{error}");
    let error = layer(false).with_biases(None, Some(vec![0.0; 3])).unwrap_err();
    assert!(error.to_string().starts_with("b2 has shape [3]"), "{error}");
    let other = LayerShape::new(BASE.hidden, BASE.intermediate, 4).unwrap();
    let biases = Biases::upload(device, &other, None, Some(&vec![0.0; 4 * BASE.hidden])).unwrap();
    let unbiased = layer(false);
    let [w13, w2] = unbiased.weights().map(Clone::clone);
    let error = Layer::prepare_with_biases(device, (w13, w2), biases, *unbiased.config(), 8).unwrap_err();
    assert!(error.to_string().starts_with("b2 has shape [2048]"), "{error}");
    let choices = [false, true].map(|biased| layer(biased).choice(8).unwrap());
    assert!(!choices[1].activation_inside_gemm1, "{}", choices[1]);
}

#[test]
fn a_workspace_serves_calls_of_different_sizes_in_turn() {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, Spec { max_tokens: 256, ..BASE });
    let large = Call::new(device, &model, &Inputs::new(&model, 256, Pattern::Even, 1));
    large.poison(device);
    for (seed, tokens) in [(2, 64), (3, 256), (4, 1), (5, 65)] {
        let inputs = Inputs::new(&model, tokens, Pattern::Skewed, seed);
        let call = Call::new(device, &model, &inputs);
        let operands = LayerCall { state: large.state.ptr(), workspace: large.workspace.ptr(), ..call.operands() };
        unsafe { model.on_device.launch(Stream(0), &operands).unwrap() };
        let found = Differences::of(&call.output()[..tokens * 512], &model.cpu(&inputs), 512);
        assert!(found.within(tolerances(&BASE, tokens).1), "{tokens} tokens: {found:?}");
    }
}

#[test]
fn fifty_repeats_give_the_same_bits() {
    let Some(device) = hopper() else { return };
    for (format, activation_format) in FORMATS {
        let spec = Spec { hidden: 1024, intermediate: 512, topk: 8, format, activation_format, ..BASE };
        let model = Model::new(device, spec);
        for tokens in [1, 2, 64, 600] {
            let call = Call::new(device, &model, &Inputs::new(&model, tokens, Pattern::Skewed, 9));
            call.poison(device);
            call.launch(Stream(0));
            let first = call.output_bytes();
            for repeat in 1..50 {
                call.output.fill(NAN_POISON).unwrap();
                call.launch(Stream(0));
                assert!(call.output_bytes() == first, "repeat {repeat} of {tokens} tokens, {format}");
            }
        }
    }
}

/// Runs a call on poisoned memory.
fn run(device: &Device, model: &Model, inputs: &Inputs) -> Vec<u8> {
    let call = Call::new(device, model, inputs);
    call.poison(device);
    call.launch(Stream(0));
    call.check(Stream(0)).unwrap();
    call.output_bytes()
}

#[test]
fn a_token_has_the_same_bits_beside_any_others() {
    let Some(device) = hopper() else { return };
    // One expert has few tiles at any size; of several, most have few rows.
    for (experts, topk) in [(1, 1), (12, 2)] {
        for (format, activation_format) in FORMATS {
            let spec = Spec { hidden: 1024, intermediate: 128, experts, topk, format, max_tokens: 320, ..BASE };
            let spec = Spec { activation_format, ..spec };
            let model = Model::new(device, spec);
            let all = Inputs::new(&model, 320, Pattern::Even, 3);
            let expected = run(device, &model, &all);
            let row = 2 * spec.hidden;
            for tokens in [1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 129, 160, 200, 300] {
                // Other neighbours, and another place, each time.
                let first = tokens * 37 % (320 - tokens);
                let found = run(device, &model, &all.some(first..first + tokens));
                let differing = found.iter().zip(&expected[first * row..]).filter(|(a, b)| a != b).count();
                let choice = model.on_device.choice(tokens).unwrap();
                assert_eq!(differing, 0, "bytes differ: {tokens} tokens of {experts} experts, {format}: {choice}");
            }
        }
    }
}

#[test]
fn a_rank_of_some_experts_gives_the_bits_of_the_whole() {
    let Some(device) = hopper() else { return };
    for format in [WeightFormat::E4m3, WeightFormat::Bf16] {
        let model = Model::new(device, Spec { intermediate: 128, experts: 8, topk: 2, format, ..BASE });
        for tokens in [1, 40, if is_emulated(device) { 120 } else { 300 }] {
            // Both experts of a token are on one rank: its output is whole there, and zero elsewhere.
            let ranks = [0..1, 1..4, 4..8];
            let mut inputs = Inputs::new(&model, tokens, Pattern::Even, 5);
            let mut rank_of = Vec::new();
            for ids in inputs.ids.chunks_mut(2) {
                let rank = ranks.iter().position(|rank| rank.contains(&(ids[0] as usize))).unwrap();
                ids[1] = (ranks[rank].start + (ids[1] as usize) % ranks[rank].len()) as i64;
                rank_of.push(rank);
            }
            let whole = run(device, &model, &inputs);
            for (number, experts) in ranks.into_iter().enumerate() {
                let found = run(device, &model.rank(device, experts.clone()), &inputs);
                for (token, (found, whole)) in found.chunks(1024).zip(whole.chunks(1024)).enumerate() {
                    if rank_of[token] == number {
                        assert!(found == whole, "token {token} of {tokens} on rank {experts:?}, {format}");
                    } else {
                        assert!(found.iter().all(|&byte| byte == 0), "token {token} is not of rank {experts:?}");
                    }
                }
            }
        }
    }
}

/// A stream of the test's own.
struct OwnStream(sys::CUstream);

impl OwnStream {
    fn new() -> Self {
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        unsafe { sys::cuStreamCreate(&mut stream, flags).result().unwrap() };
        Self(stream)
    }

    fn stream(&self) -> Stream {
        Stream(self.0 as u64)
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        unsafe { sys::cuStreamDestroy_v2(self.0).result().unwrap() };
    }
}

/// Captures `work` on the stream.
fn capture(stream: &OwnStream, work: impl FnOnce(Stream)) -> sys::CUgraphExec {
    let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
    let thread_local = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    unsafe {
        sys::cuStreamBeginCapture_v2(stream.0, thread_local).result().unwrap();
        work(stream.stream());
        sys::cuStreamEndCapture(stream.0, &mut graph).result().unwrap();
        sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result().unwrap();
        sys::cuGraphDestroy(graph).result().unwrap();
    }
    executable
}

#[test]
fn a_captured_call_replays_on_new_inputs() {
    let Some(device) = hopper() else { return };
    for (spec, tokens) in [
        (BASE, 2),
        (BASE, 5),
        (BASE, 130),
        (Spec { topk: 8, max_tokens: 513, ..BASE }, 513),
        (Spec { format: WeightFormat::Bf16, ..BASE }, 64),
    ] {
        let model = Model::new(device, spec);
        let call = Call::new(device, &model, &Inputs::new(&model, tokens, Pattern::Even, 1));
        call.poison(device);
        let _context = current_context(device);
        let stream = OwnStream::new();
        let executable = capture(&stream, |stream| call.launch(stream));
        assert_untouched("output after capturing, which runs nothing,", &call.output_bytes(), NAN_POISON);
        for (seed, pattern) in [(1, Pattern::Even), (2, Pattern::Skewed), (3, Pattern::One), (4, Pattern::Skewed)] {
            let inputs = Inputs::new(&model, tokens, pattern, seed);
            call.upload(&inputs);
            call.output.fill(NAN_POISON).unwrap();
            unsafe { sys::cuGraphLaunch(executable, stream.0).result().unwrap() };
            call.check(stream.stream()).unwrap();
            let found = Differences::of(&call.output(), &model.cpu(&inputs), spec.hidden);
            assert!(found.within(tolerances(&spec, tokens).1), "{tokens} tokens, {pattern:?}: {found:?}");
        }
        unsafe { sys::cuGraphExecDestroy(executable).result().unwrap() };
    }
}

/// The device's context, current on this thread until the value is dropped.
struct CurrentContext(sys::CUdevice);

fn current_context(device: &Device) -> CurrentContext {
    let (mut handle, mut context) = (0, std::ptr::null_mut());
    unsafe {
        sys::cuDeviceGet(&mut handle, device.info().ordinal as i32).result().unwrap();
        sys::cuDevicePrimaryCtxRetain(&mut context, handle).result().unwrap();
        sys::cuCtxPushCurrent_v2(context).result().unwrap();
    }
    CurrentContext(handle)
}

impl Drop for CurrentContext {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        unsafe {
            sys::cuCtxPopCurrent_v2(&mut context).result().unwrap();
            sys::cuDevicePrimaryCtxRelease_v2(self.0).result().unwrap();
        }
    }
}

#[test]
fn an_id_past_the_limit_counts_as_an_empty_slot_and_is_reported() {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, Spec { max_tokens: 40, ..BASE });
    let mut inputs = Inputs::new(&model, 40, Pattern::Even, 1);
    inputs.ids[4 * 7 + 2] = 16;
    inputs.ids[4 * 30] = 1 << 20;
    let call = Call::new(device, &model, &inputs);
    call.poison(device);
    call.launch(Stream(0));
    let error = call.check(Stream(0)).unwrap_err();
    assert_eq!(error, Error::ExpertId { token: 7, slot: 2, id: 16, limit: 16 });
    call.check(Stream(0)).unwrap();
    call.check_workspace_guard();
    inputs.ids[4 * 7 + 2] = -1;
    inputs.ids[4 * 30] = -1;
    let found = Differences::of(&call.output(), &model.cpu(&inputs), 512);
    assert!(found.within(E4M3_TO_CPU), "{found:?}");
}

#[test]
fn one_launch_reports_bad_ids_and_the_steps_go_on_with_its_state() {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, Spec { global: 32, max_tokens: 40, ..BASE });
    let mut inputs = Inputs::new(&model, 2, Pattern::Even, 1);
    inputs.ids[5] = 32;
    let call = Call::new(device, &model, &inputs);
    call.poison(device);
    call.launch(Stream(0));
    assert_eq!(call.check(Stream(0)).unwrap_err(), Error::ExpertId { token: 1, slot: 1, id: 32, limit: 32 });
    let found = call.output_bytes();
    inputs.ids[5] = -1;
    call.upload(&inputs);
    // In turns, on one state.
    for _ in 0..3 {
        call.output.fill(NAN_POISON).unwrap();
        call.launch_in_steps(Stream(0));
        assert!(call.output_bytes() == found, "in steps");
        call.output.fill(NAN_POISON).unwrap();
        call.launch(Stream(0));
        assert!(call.output_bytes() == found, "in one launch");
    }
    call.check(Stream(0)).unwrap();
}

#[test]
fn bad_calls_are_typed_errors_and_nothing_is_written() {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, Spec { max_tokens: 40, ..BASE });
    let call = Call::new(device, &model, &Inputs::new(&model, 40, Pattern::Even, 1));
    call.poison(device);
    let good = call.operands();
    let refuse = |tokens: usize, operands: LayerCall, start: &str| {
        let error = unsafe { model.on_device.launch(Stream(0), &LayerCall { tokens, ..operands }) }.unwrap_err();
        assert!(error.to_string().starts_with(start), "{error}, expected {start}");
    };
    let states = good.hidden_states;
    let with_states = |hidden_states: DeviceMatrix| LayerCall { hidden_states, ..good };
    let with_weights = |topk_weights: DeviceMatrix<f32>| LayerCall { topk_weights, ..good };
    let mut routing = good.routing;
    refuse(41, good, "tokens is 41, expected at most 40");
    refuse(40, LayerCall { workspace: good.workspace.byte_add(16), ..good }, "workspace is");
    refuse(40, LayerCall { workspace: DevicePtr::default(), ..good }, "workspace is 0");
    refuse(40, LayerCall { state: DevicePtr::default(), ..good }, "state is 0");
    refuse(40, LayerCall { state: good.state.byte_add(8), ..good }, "state is");
    refuse(40, LayerCall { output: good.output.byte_add(8), ..good }, "output is");
    refuse(40, with_states(DeviceMatrix { ptr: states.ptr.byte_add(2), ..states }), "hidden_states is");
    refuse(40, with_states(DeviceMatrix { ptr: DevicePtr::default(), ..states }), "hidden_states is 0");
    refuse(40, with_states(DeviceMatrix { col_stride: 2, ..states }), "hidden_states has strides [512, 2]");
    refuse(40, with_states(DeviceMatrix { row_stride: 513, ..states }), "hidden_states has strides [513, 1]");
    refuse(40, with_weights(DeviceMatrix { col_stride: 2, ..good.topk_weights }), "topk_weights has strides [4, 2]");
    refuse(40, with_weights(DeviceMatrix::default()), "topk_weights is 0");
    routing.ids.ptr = routing.ids.ptr.byte_add(1);
    refuse(40, LayerCall { routing, ..good }, "topk_ids is");
    routing = good.routing;
    routing.global_experts = 17;
    refuse(40, LayerCall { routing, ..good }, "global_experts is 17, expected 16");
    assert_untouched("output", &call.output_bytes(), NAN_POISON);
    let mut workspace = vec![0; call.workspace_bytes];
    call.workspace.download_at(0, &mut workspace).unwrap();
    assert_untouched("workspace", &workspace[64..], NAN_POISON);
    // No tokens: nothing to do, and nothing is looked at.
    unsafe {
        model.on_device.launch(Stream(0), &LayerCall { tokens: 0, output: DevicePtr::default(), ..good }).unwrap()
    };
    assert_untouched("output", &call.output_bytes(), NAN_POISON);
}

/// One expert's worth of weights that fit nothing in particular.
fn weights(device: &Device, format: WeightFormat, n: usize, k: usize) -> Weights {
    match format {
        WeightFormat::Bf16 => Matrices::Bf16(vec![bf16::ONE; n * k]),
        WeightFormat::Mxfp4 => Matrices::Mxfp4(vec![0x22; n * k / 2], vec![127; n * k / 32]),
        WeightFormat::E4m3 => Matrices::E4m3(vec![E4m3(0x38); n * k], vec![1.0; n.div_ceil(128) * k.div_ceil(128)]),
        WeightFormat::Int4 => Matrices::Int4(vec![0x99; n * k / 2], vec![bf16::ONE; n * k / 32]),
    }
    .upload(device, (1, n, k))
}

#[test]
fn layers_that_cannot_be_are_refused_when_they_are_prepared() {
    use WeightFormat::{Bf16, E4m3, Int4, Mxfp4};
    let Some(device) = hopper() else { return };
    let e4m3 = Spec { experts: 1, topk: 1, ..BASE }.config();
    let bf16 = Spec { format: Bf16, experts: 1, topk: 1, ..BASE }.config();
    let refuse =
        |w13: (WeightFormat, usize, usize), w2: (WeightFormat, usize, usize), config: LayerConfig, tokens, start| {
            let [w13, w2] = [w13, w2].map(|(format, n, k)| weights(device, format, n, k));
            let error = Layer::prepare(device, w13, w2, config, tokens).unwrap_err().to_string();
            let start: &str = start;
            assert!(error.starts_with(start), "{error}, expected {start}");
        };
    let (up, down) = ((E4m3, 256, 256), (E4m3, 256, 128));
    let (up16, down16) = ((Bf16, 256, 256), (Bf16, 256, 128));
    refuse((E4m3, 128, 256), down, e4m3, 1, "w13 has shape [1, 128, 256], expected [1, 256, 256]");
    refuse(up, down16, e4m3, 1, "w2 is packed as bf16, expected e4m3");
    refuse(up16, down16, e4m3, 1, "w13 is packed as bf16, expected e4m3, mxfp4 or int4, for e4m3 activations");
    refuse(up, down, bf16, 1, "w13 is packed as e4m3, expected bf16, mxfp4 or int4, for bf16 activations on a GPU");
    let up4 = (Int4, 192, 64);
    refuse(up4, (Int4, 64, 96), e4m3, 1, "intermediate is 96, expected a positive multiple of 64");
    refuse(up4, (Mxfp4, 64, 96), bf16, 1, "w2 is packed as mxfp4, expected int4");
    refuse((E4m3, 256, 96), (E4m3, 96, 128), e4m3, 1, "hidden is 96");
    refuse((E4m3, 128, 256), (E4m3, 256, 64), e4m3, 1, "intermediate is 64");
    refuse(up, down, LayerConfig { topk: 2, weight_on_input: true, ..e4m3 }, 1, "topk is 2, expected 1");
    refuse(up, down, LayerConfig { topk: 0, ..e4m3 }, 1, "topk is 0");
    refuse(up, down, LayerConfig { topk: 33, ..e4m3 }, 1, "topk is 33");
    refuse(up, down, LayerConfig { ids: Dtype::F32, ..e4m3 }, 1, "topk_ids has dtype f32");
    refuse(up, down, LayerConfig { input: Dtype::F32, ..e4m3 }, 1, "hidden_states has dtype f32");
    refuse(up, down, LayerConfig { output: Dtype::E4m3, ..e4m3 }, 1, "output has dtype e4m3");
    refuse(up, down, e4m3, 0, "max_tokens is 0");
    refuse(up, down, e4m3, 1 << 40, "M * topk overflows");
    refuse(up16, down16, LayerConfig { input: Dtype::F16, ..bf16 }, 1, "hidden_states has dtype f16");
    refuse(up16, down16, LayerConfig { weight_on_input: true, ..bf16 }, 1, "w13 is packed as bf16, expected e4m3");
}

#[test]
fn weights_leave_the_builder_only_when_all_of_them_have_come() {
    let Some(device) = hopper() else { return };
    let mut builder = WeightsBuilder::new(device, WeightFormat::E4m3, (2, 256, 64)).unwrap();
    let (values, scales) = (vec![E4m3(7); 256 * 64], [1.0; 2]);
    let rows = |count: usize| MatrixRef::new(&values, count, 64).unwrap();
    let blocks = |count: usize| MatrixRef::new(&scales, count, 1).unwrap();
    let refused = |result: expertile::Result<()>, start: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}, expected {start}");
    };
    builder.add_e4m3_rows(0, 128, rows(128), blocks(1)).unwrap();
    refused(builder.add_e4m3_rows(0, 0, rows(256), blocks(2)), "added_rows[0] is 128");
    refused(builder.add_e4m3_rows(0, 0, rows(64), blocks(1)), "first_row + rows is 64");
    refused(builder.add_e4m3_rows(0, 64, rows(64), blocks(1)), "first_row is 64");
    refused(builder.add_e4m3_rows(2, 0, rows(128), blocks(1)), "expert is 2");
    refused(
        builder.add_e4m3_rows(0, 256, rows(128), blocks(1)),
        "rows has shape [128, 64], expected [R, 64] with R at most 0",
    );
    refused(builder.add_e4m3_rows(0, 0, rows(128), blocks(2)), "scales has shape [2, 1]");
    refused(
        builder.add_e4m3_rows(0, 0, MatrixRef::new(&values, 128, 32).unwrap(), blocks(1)),
        "rows has shape [128, 32]",
    );
    let halves = [bf16::ONE; 64];
    refused(builder.add_bf16_rows(0, 0, MatrixRef::new(&halves, 1, 64).unwrap()), "builder is packed as e4m3");
    let scales = vec![1.0; 128];
    let channels = WeightsBuilderTrait::add_e4m3_channel_rows(&mut builder, 0, 0, rows(128), &scales);
    refused(channels, "scales is one for each row of the weights, which the cuda backend does not take");
    builder.add_e4m3_rows(0, 0, rows(128), blocks(1)).unwrap();
    let error = builder.finish().unwrap_err();
    assert!(error.to_string().starts_with("added_rows[1] is 0, expected 256"), "{error}");
}
