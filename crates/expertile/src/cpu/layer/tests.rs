use super::*;
use crate::cpu::{Isa, quantize_rows, unpermute};
use crate::dtype::Dtype;
use expertile_oracle::{activation::SWIGLU, compare, layer as oracle};
use expertile_testkit::Random;

const EXPERTS: usize = 3;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 128;
const TOKENS: usize = 5;
const F32: LayerConfig =
    LayerConfig { input: Dtype::F32, output: Dtype::F32, ..LayerConfig::new(2, EXPERTS, ActivationFormat::Bf16) };
const IDS: [i64; 2 * TOKENS] = [0, 2, 2, 0, -1, 2, 0, -1, -1, -1];

/// Values exact in bf16, different for every seed.
fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| bf16::from_f32(random.uniform()).to_f32()).collect()
}

fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

fn bf16_layer(cpu: &Cpu, w13: &[f32], w2: &[f32]) -> Layer {
    let w13 = PackedWeights::pack_bf16(cpu, &to_bf16(w13), EXPERTS, 2 * INTERMEDIATE, HIDDEN).unwrap();
    let w2 = PackedWeights::pack_bf16(cpu, &to_bf16(w2), EXPERTS, HIDDEN, INTERMEDIATE).unwrap();
    Layer::prepare(cpu, w13, w2, F32, TOKENS).unwrap()
}

/// e4m3 weights with every block scale 0.5, and what they stand for.
fn e4m3_layer(cpu: &Cpu, w13: &mut [f32], w2: &mut [f32], activations: ActivationFormat) -> Layer {
    let pack = |values: &mut [f32], n: usize, k: usize| {
        let bytes: Vec<E4m3> = values.iter().map(|&value| E4m3::from_f32(2.0 * value)).collect();
        values.iter_mut().zip(&bytes).for_each(|(value, byte)| *value = 0.5 * byte.to_f32());
        let scales = vec![0.5; EXPERTS * n.div_ceil(128) * k.div_ceil(128)];
        PackedWeights::pack_e4m3(cpu, &bytes, &scales, EXPERTS, n, k).unwrap()
    };
    let (w13, w2) = (pack(w13, 2 * INTERMEDIATE, HIDDEN), pack(w2, HIDDEN, INTERMEDIATE));
    Layer::prepare(cpu, w13, w2, LayerConfig { activation_format: activations, ..F32 }, TOKENS).unwrap()
}

fn expected(x: &[f32], weights: &[f32], w13: &[f32], w2: &[f32]) -> Vec<f64> {
    let row = |weights: &[f32], n: usize, e: usize, j: usize, row: &mut [f64]| {
        let len = row.len();
        row.iter_mut().zip(&weights[(e * n + j) * len..]).for_each(|(to, &from)| *to = f64::from(from));
    };
    let layer = oracle::Layer {
        hidden: HIDDEN,
        intermediate: INTERMEDIATE,
        activation: SWIGLU,
        weight_on_input: false,
        w13_row: &|e, j, to| row(w13, 2 * INTERMEDIATE, e, j, to),
        w2_row: &|e, j, to| row(w2, HIDDEN, e, j, to),
        b13: None,
        b2: None,
        shared: None,
    };
    layer.run(x, &IDS, 2, Some(weights), None).output
}

fn run(layer: &Layer, x: &[f32], weights: &[f32]) -> Vec<f64> {
    let ids = MatrixRef::new(&IDS[..], TOKENS, 2).unwrap();
    let routing = Routing::new(ids, EXPERTS, None).unwrap();
    let mut workspace = vec![0xff; layer.workspace_bytes(TOKENS).unwrap()];
    let mut output = vec![f32::NAN; TOKENS * HIDDEN];
    let x = MatrixRef::new(x, TOKENS, HIDDEN).unwrap();
    let weights = MatrixRef::new(weights, TOKENS, 2).unwrap();
    layer.run(x, &routing, weights, &mut workspace, &mut output).unwrap();
    output.into_iter().map(f64::from).collect()
}

#[test]
fn every_format_gives_the_oracles_numbers_on_every_instruction_set() {
    let (x, weights) = (values(1, TOKENS * HIDDEN), values(2, 2 * TOKENS));
    for isa in Isa::available() {
        let cpu = &Cpu::with_isa(isa);
        let mut w13 = values(3, EXPERTS * 2 * INTERMEDIATE * HIDDEN);
        let mut w2 = values(4, EXPERTS * HIDDEN * INTERMEDIATE);
        let check = |layer: Layer, w13: &[f32], w2: &[f32], tolerance: compare::Tolerance| {
            let (ours, exact) = (run(&layer, &x, &weights), expected(&x, &weights, w13, w2));
            let whole = compare::difference(&ours, &exact);
            let (row, worst) = compare::worst(&compare::by_row(&ours, &exact, HIDDEN)).unwrap();
            assert!(whole < tolerance.whole, "{isa}: {whole}");
            assert!(worst < tolerance.row, "{isa}: row {row} is off by {worst}");
        };
        check(bf16_layer(cpu, &w13, &w2), &w13, &w2, compare::BF16_LAYER);
        let layer = e4m3_layer(cpu, &mut w13, &mut w2, ActivationFormat::Bf16);
        check(layer, &w13, &w2, compare::BF16_LAYER);
        let layer = e4m3_layer(cpu, &mut w13, &mut w2, ActivationFormat::E4m3);
        check(layer, &w13, &w2, compare::E4M3_LAYER);
    }
}

#[test]
fn expanded_rows_come_out_as_the_layers_own_rows_do() {
    let cpu = &Cpu::new();
    let (x, weights) = (values(1, TOKENS * HIDDEN), values(2, 2 * TOKENS));
    let layer =
        bf16_layer(cpu, &values(3, EXPERTS * 2 * INTERMEDIATE * HIDDEN), &values(4, EXPERTS * HIDDEN * INTERMEDIATE));
    let routing = Routing::new(MatrixRef::new(&IDS[..], TOKENS, 2).unwrap(), EXPERTS, None).unwrap();
    let plan = Plan::tight(TOKENS, 2, EXPERTS, 4, TokenExperts::Distinct).unwrap();
    let mut space = vec![0; Layout::space_len(&plan).unwrap()];
    let built = Layout::build(&plan, &routing, &mut space).unwrap();
    let mut rows = vec![bf16::NAN; plan.m_sum() * HIDDEN];
    let x_rows = MatrixRef::new(&x[..], TOKENS, HIDDEN).unwrap();
    permute_convert(cpu, x_rows, None, &built, Padding::Untouched, &mut rows).unwrap();

    let expanded = layer.with_config(LayerConfig { input: Dtype::Bf16, ..F32 }, TOKENS).unwrap();
    let mut space = vec![0; 3 * EXPERTS + plan.m_sum()];
    let given = Layout::from_psum(built.psum(), 4, plan.m_sum(), &mut space).unwrap();
    let mut workspace = vec![0; expanded.expanded_workspace_bytes(plan.m_sum()).unwrap()];
    let mut out = vec![bf16::NAN; plan.m_sum() * HIDDEN];
    let rows = MatrixRef::new(&rows[..], plan.m_sum(), HIDDEN).unwrap();
    expanded.run_expanded(rows, &given, &mut workspace, &mut out).unwrap();
    for (row, &expert) in built.m_indices().iter().enumerate() {
        let untouched = out[row * HIDDEN..][..HIDDEN].iter().all(|value| value.is_nan());
        assert_eq!(untouched, expert < 0, "row {row}");
    }
    let mut output = vec![0.0f32; TOKENS * HIDDEN];
    let out = MatrixRef::new(&out[..], plan.m_sum(), HIDDEN).unwrap();
    let weights_matrix = MatrixRef::new(&weights[..], TOKENS, 2).unwrap();
    unpermute(cpu, out, &built, Some(weights_matrix), &mut output).unwrap();
    let output: Vec<f64> = output.into_iter().map(f64::from).collect();
    assert_eq!(output, run(&layer, &x, &weights));
}

#[test]
fn expanded_rows_that_came_quantized_give_what_rows_that_are_quantized_here_give() {
    let cpu = &Cpu::new();
    let (mut w13, mut w2) =
        (values(3, EXPERTS * 2 * INTERMEDIATE * HIDDEN), values(4, EXPERTS * HIDDEN * INTERMEDIATE));
    let m_sum = 12;
    let mut space = vec![0; 3 * EXPERTS + m_sum];
    let layout = Layout::from_psum(&[3, 5, 11], 4, m_sum, &mut space).unwrap();
    let x: Vec<bf16> = values(9, m_sum * HIDDEN).into_iter().map(bf16::from_f32).collect();
    let rows = MatrixRef::new(&x[..], m_sum, HIDDEN).unwrap();
    let groups = HIDDEN / 128;
    let (mut quantized, mut scales) = (vec![E4m3(0x7f); m_sum * HIDDEN], vec![f32::NAN; m_sum * groups]);
    quantize_rows(cpu, rows, &layout, &mut quantized, ScalesMut::f32(SCALES, &mut scales)).unwrap();
    // Columns of scales one behind the other, as DeepGEMM has them.
    let columns: Vec<f32> = (0..m_sum * groups).map(|at| scales[at % m_sum * groups + at / m_sum]).collect();
    let scales = MatrixRef::with_strides(&columns[..], m_sum, groups, 1, m_sum).unwrap();
    let ready = TokenRows::E4m3 { rows: MatrixRef::new(&quantized[..], m_sum, HIDDEN).unwrap(), scales };

    let config = LayerConfig { input: Dtype::Bf16, ..F32 };
    let layer = e4m3_layer(cpu, &mut w13, &mut w2, ActivationFormat::E4m3);
    let layer = layer.with_config(LayerConfig { activation_format: ActivationFormat::E4m3, ..config }, 1).unwrap();
    let mut workspace = vec![0xff; layer.expanded_workspace_bytes(m_sum).unwrap()];
    let mut here = vec![bf16::NAN; m_sum * HIDDEN];
    layer.run_expanded(rows, &layout, &mut workspace, &mut here).unwrap();
    workspace.fill(0xff);
    let mut out = vec![bf16::NAN; m_sum * HIDDEN];
    layer.run_expanded_ready(ready, &layout, &mut workspace, &mut out).unwrap();
    let bits = |rows: &[bf16]| rows.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&out), bits(&here));
    for (row, &expert) in layout.m_indices().iter().enumerate() {
        assert_eq!(out[row * HIDDEN].is_nan(), expert < 0, "row {row}");
    }

    let narrow = MatrixRef::new(&quantized[..], m_sum, HIDDEN / 2).unwrap();
    let narrow = TokenRows::E4m3 { rows: narrow, scales };
    let error = layer.run_expanded_ready(narrow, &layout, &mut workspace, &mut out).unwrap_err();
    assert!(error.to_string().starts_with("rows has shape [12, 128], expected [12, 256]"), "{error}");
    let error = layer.run_expanded_ready(TokenRows::Bf16(rows), &layout, &mut workspace, &mut out).unwrap_err();
    assert_eq!(error, Error::Dtype { argument: "rows", actual: Dtype::Bf16, expected: "e4m3, as prepared" });
}

#[test]
fn operands_that_do_not_fit_are_refused_before_anything_is_written() {
    let cpu = &Cpu::new();
    let layer =
        bf16_layer(cpu, &values(3, EXPERTS * 2 * INTERMEDIATE * HIDDEN), &values(4, EXPERTS * HIDDEN * INTERMEDIATE));
    let x = vec![0.0f32; TOKENS * HIDDEN];
    let weights = [1.0; 2 * TOKENS];
    let routing = Routing::new(MatrixRef::new(&IDS[..], TOKENS, 2).unwrap(), EXPERTS, None).unwrap();
    let refuse = |hidden: usize, slots: usize, workspace: usize, output: usize, start: &str| {
        let x = MatrixRef::new(&x[..], TOKENS, hidden).unwrap();
        let weights = MatrixRef::new(&weights[..], TOKENS, slots).unwrap();
        let mut output = vec![7.0f32; output];
        let error = layer.run(x, &routing, weights, &mut vec![0; workspace], &mut output).unwrap_err();
        assert!(error.to_string().starts_with(start), "{error}");
        assert!(output.iter().all(|&value| value == 7.0));
    };
    let (workspace, output) = (layer.workspace_bytes(TOKENS).unwrap(), TOKENS * HIDDEN);
    refuse(HIDDEN - 1, 2, workspace, output, "hidden_states has shape [5, 255]");
    refuse(HIDDEN, 1, workspace, output, "topk_weights has shape [5, 1]");
    refuse(HIDDEN, 2, workspace - 1, output, "workspace holds");
    refuse(HIDDEN, 2, workspace, output - 1, "output holds");
}

#[test]
fn weights_that_do_not_fit_each_other_or_the_activations_are_refused() {
    let cpu = &Cpu::new();
    let bf16_weights = |n: usize, k: usize| PackedWeights::pack_bf16(cpu, &vec![bf16::ONE; n * k], 1, n, k).unwrap();
    let e4m3_weights = |n: usize, k: usize| {
        let scales = vec![1.0; n.div_ceil(128) * k.div_ceil(128)];
        PackedWeights::pack_e4m3(cpu, &vec![E4m3(0); n * k], &scales, 1, n, k).unwrap()
    };
    let refuse = |w13, w2, config, start: &str| {
        let error = Layer::prepare(cpu, w13, w2, config, 1).unwrap_err();
        assert!(error.to_string().starts_with(start), "{error}");
    };
    let plain = LayerConfig::new(2, 1, ActivationFormat::Bf16);
    let e4m3 = LayerConfig { activation_format: ActivationFormat::E4m3, ..plain };
    refuse(bf16_weights(64, 128), bf16_weights(128, 64), plain, "w13 has shape [1, 64, 128]");
    refuse(bf16_weights(128, 128), e4m3_weights(128, 64), plain, "w2 is packed as e4m3, expected bf16");
    refuse(bf16_weights(256, 128), bf16_weights(128, 128), e4m3, "w13 is packed as bf16, expected e4m3");
    refuse(e4m3_weights(64, 128), e4m3_weights(128, 32), e4m3, "intermediate is 32");
    refuse(e4m3_weights(256, 32), e4m3_weights(32, 128), e4m3, "hidden is 32");
    let unaligned = LayerConfig { alignment: Some(0), ..plain };
    refuse(bf16_weights(128, 128), bf16_weights(128, 64), unaligned, "alignment is 0");
}
