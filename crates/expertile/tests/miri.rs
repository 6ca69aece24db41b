//! The whole path once, in sizes that miri walks through in minutes: it watches every read, write and thread.
//!
//! `CONTRIBUTING.md` has the command. Natively this is a small smoke test; the properties are in `tests/contract`.

use expertile::cpu::{
    self, Activations, Cpu, Isa, Layer, PackedWeights, RowScales, grouped_gemm, grouped_gemm_workspace_bytes,
};
use expertile::{
    Activation, ActivationFormat, Dtype, E4m3, Group, GroupWorth, Groups, LayerConfig, Layout, MatrixRef,
    Normalization, Padding, Plan, Router, Routing, ScaleFormat, ScaleLayout, ScaleRounding, Scales, ScalesMut, Scoring,
    TokenExperts,
};
use expertile_oracle as oracle;
use half::bf16;
use std::sync::Arc;

const EXPERTS: usize = 3;
const TOPK: usize = 2;
const TOKENS: usize = 4;
/// Expert 1 is empty, token 2 goes nowhere.
const IDS: [i64; TOKENS * TOPK] = [2, 0, 0, 2, -1, -1, 2, -1];
const ALIGNMENT: usize = 4;

/// The instruction sets there are (only the portable one under miri), on two threads.
fn machines() -> Vec<Cpu> {
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
    Isa::available().into_iter().map(|isa| Cpu::with_isa(isa).in_pool(pool.clone())).collect()
}

fn values(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + seed * 11) % 41) as f32 / 16.0 - 1.25).collect()
}

fn to_bf16(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&x| bf16::from_f32(x)).collect()
}

fn routing() -> Routing<'static> {
    Routing::new(MatrixRef::new(&IDS[..], TOKENS, TOPK).unwrap(), EXPERTS, None).unwrap()
}

fn with_layout(check: impl Fn(&Layout<'_>, &oracle::layout::Layout)) {
    let plan = Plan::tight(TOKENS, TOPK, EXPERTS, ALIGNMENT, TokenExperts::Distinct).unwrap();
    let mut space = vec![7; Layout::space_len(&plan).unwrap()];
    let layout = Layout::build(&plan, &routing(), &mut space).unwrap();
    check(&layout, &oracle::layout::layout(&IDS, None, EXPERTS, ALIGNMENT, plan.m_sum()));
}

#[test]
fn layouts_are_built_and_taken_over() {
    with_layout(|layout, expected| {
        assert_eq!(layout.inv_perm(), expected.inv_perm);
        assert_eq!(layout.m_indices(), expected.m_indices);
        let mut space = vec![7; 3 * EXPERTS + layout.m_sum()];
        let ready = Layout::from_psum(layout.psum(), ALIGNMENT, layout.m_sum(), &mut space).unwrap();
        assert_eq!(ready.m_indices(), expected.m_indices);
    });
}

#[test]
fn routers_choose() {
    let logits = values(2 * 6, 3);
    let logits = MatrixRef::new(&logits, 2, 6).unwrap();
    let (mut ids, mut weights) = ([0; 4], [0.0; 4]);
    Router::softmax(2, true).route(logits, &mut ids, &mut weights).unwrap();
    let sigmoid = Router {
        correction_bias: vec![0.5; 6],
        groups: Some(Groups { count: 3, topk: 2, worth: GroupWorth::BestTwo }),
        normalization: Normalization::SumPlus(1e-20),
        scaling_factor: 2.5,
        ..Router::sigmoid(2)
    };
    sigmoid.route(logits, &mut ids, &mut weights).unwrap();
    let mixer = Router { scoring: Scoring::SparseMixer { jitter: 0.01 }, ..Router::softmax(2, false) };
    mixer.route(logits, &mut ids, &mut weights).unwrap();
    assert!(ids.iter().all(|&id| (0..6).contains(&id)));
}

#[test]
fn rows_are_moved_quantized_and_summed() {
    use ScaleLayout::{MnMajor, PackedUe8m0, RowMajor};
    use ScaleRounding::{Exact, PowerOfTwo};
    let hidden = 32;
    let x = to_bf16(&values(TOKENS * hidden, 1));
    let strided: Vec<bf16> = x.iter().flat_map(|&x| [x, bf16::NAN]).collect();
    let strided = MatrixRef::with_strides(&strided, TOKENS, hidden, 2 * hidden, 2).unwrap();
    let exact: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
    with_layout(|layout, oracle_layout| {
        let m_sum = layout.m_sum();
        for cpu in machines() {
            for (scales, rounding) in [(RowMajor, Exact), (MnMajor, Exact), (PackedUe8m0, PowerOfTwo)] {
                let format = ScaleFormat::new(Group::G32, scales, rounding).unwrap();
                let power_of_two = rounding == PowerOfTwo;
                let expected =
                    oracle::quantize::quantize_permute(&exact, hidden, TOPK, oracle_layout, 32, power_of_two);
                let mut out = vec![E4m3(0xaa); m_sum * hidden];
                let words = format.words(m_sum, hidden).unwrap();
                let (mut floats, mut packed) = (vec![7.0f32; words], vec![7i32; words]);
                let sink = if scales == PackedUe8m0 {
                    ScalesMut::ue8m0(format, &mut packed)
                } else {
                    ScalesMut::f32(format, &mut floats)
                };
                cpu::quantize_permute(&cpu, strided, None, layout, Padding::Zero, &mut out, sink).unwrap();
                assert!(out.iter().map(|byte| byte.0).eq(expected.bytes.iter().copied()));
                match scales {
                    RowMajor => assert_eq!(floats, expected.row_major()),
                    MnMajor => assert_eq!(floats, expected.mn_major()),
                    PackedUe8m0 => assert_eq!(packed, expected.packed_ue8m0()),
                }
            }
            let mut rows = vec![bf16::NAN; m_sum * hidden];
            cpu::permute_rows(&cpu, strided, layout, Padding::Untouched, &mut rows).unwrap();
            let mut floats = vec![f32::NAN; m_sum * hidden];
            cpu::permute_convert(&cpu, strided, None, layout, Padding::Zero, &mut floats).unwrap();
            assert_eq!(floats, oracle_layout.permute(&exact, hidden, TOPK, 0.0));

            let weights = values(TOKENS * TOPK, 5);
            let rows = MatrixRef::new(&rows, m_sum, hidden).unwrap();
            let mut sums = vec![f32::NAN; TOKENS * hidden];
            let matrix = MatrixRef::new(&weights, TOKENS, TOPK).unwrap();
            cpu::unpermute(&cpu, rows, layout, Some(matrix), &mut sums).unwrap();
            let inv_perm = &oracle_layout.inv_perm;
            assert_eq!(sums, oracle::unpermute::unpermute_f32(&floats, hidden, inv_perm, TOPK, Some(&weights)));
            let inv_perm = MatrixRef::new(inv_perm, TOKENS, TOPK).unwrap();
            let mut again = vec![f32::NAN; TOKENS * hidden];
            cpu::unpermute_slots(&cpu, rows, inv_perm, Some(&routing()), Some(matrix), &mut again).unwrap();
            assert_eq!(sums, again);
        }
    });
}

#[test]
fn ready_rows_keep_their_scales() {
    let hidden = 32;
    let bytes: Vec<E4m3> = (0..TOKENS * hidden).map(|i| E4m3(i as u8)).collect();
    let bytes = MatrixRef::new(&bytes, TOKENS, hidden).unwrap();
    let format = ScaleFormat::new(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo).unwrap();
    with_layout(|layout, oracle_layout| {
        for cpu in machines() {
            let mut out = vec![E4m3(0xaa); layout.m_sum() * hidden];
            let mut packed = vec![-1; format.words(layout.m_sum(), hidden).unwrap()];
            let scales = MatrixRef::new(&[0u8, 100, 127, 255], TOKENS, 1).unwrap();
            let (scales, sink) = (RowScales::Ue8m0(scales), ScalesMut::ue8m0(format, &mut packed));
            cpu::permute_quantized(&cpu, bytes, scales, layout, Padding::Zero, &mut out, sink).unwrap();
            let expected = oracle_layout.permute(&[0, 100, 127, 255], 1, TOPK, 0);
            assert_eq!(packed[..layout.m_sum()], expected);
        }
    });
}

#[test]
fn a_product_of_e4m3_is_the_oracles() {
    let (n, k) = (33, 128);
    let weights: Vec<E4m3> = (0..EXPERTS * n * k).map(|i| E4m3((i % 113) as u8)).collect();
    let bytes: Vec<u8> = weights.iter().map(|byte| byte.0).collect();
    let weight_scales = [0.01, 0.02, 0.03];
    with_layout(|layout, oracle_layout| {
        let m_sum = layout.m_sum();
        let quantized = oracle::quantize::Quantized {
            bytes: (0..m_sum * k).map(|i| (i * 5 % 100) as u8).collect(),
            scales: values(m_sum, 6),
            width: k,
            group: 128,
        };
        let a: Vec<E4m3> = quantized.bytes.iter().map(|&byte| E4m3(byte)).collect();
        let scales = quantized.mn_major();
        let expected = oracle::gemm::grouped_gemm(&quantized.values(), &oracle_layout.m_indices, n, k, |e, j, row| {
            oracle::gemm::e4m3_weight_row(&bytes[e * n * k..], &weight_scales[e..], k, j, row);
        });
        for cpu in machines() {
            let packed = PackedWeights::pack_e4m3(&cpu, &weights, &weight_scales, EXPERTS, n, k).unwrap();
            let bytes = grouped_gemm_workspace_bytes(layout.live_rows(), k, ActivationFormat::E4m3).unwrap();
            let mut workspace = vec![0xff; bytes + 1];
            let mut out = vec![bf16::ZERO; m_sum * n];
            let activations = Activations::E4m3 { rows: &a, scales: Scales::f32(ScaleFormat::HOPPER, &scales) };
            grouped_gemm(&cpu, layout, activations, &packed, &mut workspace[1..], &mut out).unwrap();
            for (row, &expert) in oracle_layout.m_indices.iter().enumerate().filter(|(_, expert)| **expert >= 0) {
                let out: Vec<f64> = out[row * n..][..n].iter().map(|x| x.to_f64()).collect();
                let difference = oracle::compare::difference(&out, &expected[row * n..][..n]);
                assert!(difference < oracle::compare::BF16_GEMM.row, "row {row}, expert {expert}: {difference}");
            }
        }
    });
}

/// Odd sizes, a workspace that starts anywhere, and rows that a dispatcher has expanded.
#[test]
fn a_layer_runs() {
    let (hidden, intermediate) = (5, 3);
    let w13 = values(EXPERTS * 2 * intermediate * hidden, 7);
    let w2 = values(EXPERTS * hidden * intermediate, 8);
    let x = values(TOKENS * hidden, 9);
    let weights = values(TOKENS * TOPK, 10);
    let weight_row = |weights: &[f32], n: usize, e: usize, j: usize, row: &mut [f64]| {
        let len = row.len();
        row.iter_mut().zip(&weights[(e * n + j) * len..]).for_each(|(to, &from)| *to = f64::from(from));
    };
    let expected = oracle::layer::Layer {
        hidden,
        intermediate,
        activation: oracle::activation::SWIGLU,
        weight_on_input: false,
        w13_row: &|e, j, row| weight_row(&w13, 2 * intermediate, e, j, row),
        w2_row: &|e, j, row| weight_row(&w2, hidden, e, j, row),
        b13: None,
        b2: None,
        shared: None,
    }
    .run(&x, &IDS, TOPK, Some(&weights), None);
    for cpu in machines() {
        let config = LayerConfig {
            input: Dtype::F32,
            output: Dtype::F32,
            alignment: Some(ALIGNMENT),
            ..LayerConfig::new(TOPK, EXPERTS, ActivationFormat::Bf16)
        };
        let w13 = PackedWeights::pack_bf16(&cpu, &to_bf16(&w13), EXPERTS, 2 * intermediate, hidden).unwrap();
        let w2 = PackedWeights::pack_bf16(&cpu, &to_bf16(&w2), EXPERTS, hidden, intermediate).unwrap();
        let layer = Layer::prepare(&cpu, w13, w2, config, TOKENS).unwrap();
        let mut workspace = vec![0xff; layer.workspace_bytes(TOKENS).unwrap() + 1];
        let mut output = vec![f32::NAN; TOKENS * hidden];
        let x = MatrixRef::new(&x, TOKENS, hidden).unwrap();
        let weights = MatrixRef::new(&weights, TOKENS, TOPK).unwrap();
        layer.run(x, &routing(), weights, &mut workspace[1..], &mut output).unwrap();
        let output: Vec<f64> = output.into_iter().map(f64::from).collect();
        let difference = oracle::compare::difference(&output, &expected.output);
        assert!(difference < oracle::compare::BF16_LAYER.whole, "{difference}");

        let mut space = vec![0; 3 * EXPERTS + 8];
        let layout = Layout::from_psum(&[2, 4, 7], 4, 8, &mut space).unwrap();
        let mut workspace = vec![0xff; layer.expanded_workspace_bytes(8).unwrap() + 1];
        let rows = to_bf16(&values(8 * hidden, 2));
        let layer = layer.with_config(LayerConfig { input: Dtype::Bf16, ..config }, TOKENS).unwrap();
        let mut out = vec![bf16::NAN; 8 * hidden];
        let rows = MatrixRef::new(&rows, 8, hidden).unwrap();
        layer.run_expanded(rows, &layout, &mut workspace[1..], &mut out).unwrap();
        let nan = |row: usize| out[row * hidden..][..hidden].iter().all(|x| x.is_nan());
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(nan), [false, false, true, true, false, false, false, true]);
    }
}

/// A quantized activation: the one step that the tests above leave out.
#[test]
fn activations_are_quantized() {
    let intermediate = 128;
    with_layout(|layout, oracle_layout| {
        let gate_up = to_bf16(&values(layout.m_sum() * 2 * intermediate, 4));
        for cpu in machines() {
            let activation = Activation::default();
            let mut floats = vec![0.0f32; layout.m_sum() * intermediate];
            cpu::activate(&cpu, layout, intermediate, &gate_up, &activation, &mut floats).unwrap();
            let mut out = vec![E4m3(0); layout.m_sum() * intermediate];
            let mut scales = vec![7.0; layout.m_sum()];
            let format = ScaleFormat::new(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact).unwrap();
            let sink = ScalesMut::f32(format, &mut scales);
            cpu::activate_quantize(&cpu, layout, intermediate, &gate_up, &activation, &mut out, sink).unwrap();
            for (row, &expert) in oracle_layout.m_indices.iter().enumerate() {
                let values = &floats[row * intermediate..][..intermediate];
                assert_eq!(scales[row], if expert < 0 { 0.0 } else { oracle::quantize::scale(values, false) });
            }
        }
    });
}

/// Miri's CPU has no AVX: asking for it is the error it should be.
#[test]
#[cfg(miri)]
fn an_instruction_set_that_is_not_there_is_a_device_error() {
    for name in ["avx2", "avx512-bf16", "amx-bf16"] {
        let error = Isa::named(name).unwrap_err();
        assert!(matches!(error, expertile::Error::Device { argument: "isa", .. }), "{error}");
        assert_eq!(error.to_string(), format!("isa is {name}, expected one that this CPU has: portable"));
    }
}
