//! The whole layer against f64 on unquantized inputs, by row and by expert; the same bits on any number of threads.

use crate::activation::in_f64;
use crate::cases::{Number, Strided, Strides, bits, exact, machines, strides};
use crate::gemm::within;
use crate::routings::{RoutingCase, config, routings, routings_of_one_slot};
use crate::weights::Weights;
use expertile::cpu::{self, Cpu, Isa, Layer, SharedExpert};
use expertile::{Activation, ActivationFormat, LayerConfig, Layout, MatrixRef, Padding, Stage, WeightFormat};
use expertile_oracle as oracle;
use expertile_testkit::Random;
use half::{bf16, f16};
use oracle::compare::{BF16_LAYER, E4M3_LAYER, Tolerance, by_row, difference, worst};
use proptest::prelude::*;
use proptest::sample::select;

/// What a layer is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Make {
    pub(crate) hidden: usize,
    intermediate: usize,
    weights: WeightFormat,
    activations: ActivationFormat,
    activation: Activation,
    biases: bool,
    shared: Option<SharedMake>,
    weight_on_input: bool,
    seed: u64,
}

/// A shared expert's width, weights and gate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedMake {
    intermediate: usize,
    weights: WeightFormat,
    gate: bool,
}

impl Make {
    pub(crate) fn tolerance(&self) -> Tolerance {
        let Tolerance { whole, row } = match self.activations {
            ActivationFormat::E4m3 => E4M3_LAYER,
            ActivationFormat::Bf16 => BF16_LAYER,
        };
        // A square doubles the relative error of what it is taken of, and distances are squares of those.
        let factor = if self.activation == Activation::Relu2 { 4.0 } else { 1.0 };
        Tolerance { whole: factor * whole, row: factor * row }
    }

    /// The same with router weights that multiply the input.
    pub(crate) fn weighted_on_input(self) -> Self {
        Self { weight_on_input: true, ..self }
    }

    /// Rows of `w13`.
    fn w13_rows(&self) -> usize {
        if self.activation.is_gated() { 2 * self.intermediate } else { self.intermediate }
    }
}

pub(crate) fn makes() -> impl Strategy<Value = Make> {
    use {ActivationFormat as A, WeightFormat as W};
    let all = [
        (W::Bf16, A::Bf16),
        (W::E4m3, A::Bf16),
        (W::E4m3, A::E4m3),
        (W::Mxfp4, A::Bf16),
        (W::Mxfp4, A::E4m3),
        (W::Int4, A::Bf16),
        (W::Int4, A::E4m3),
    ];
    let formats = select(all.to_vec());
    let gpt_oss = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
    let kinds = select(vec![Activation::SWIGLU, gpt_oss, Activation::GegluTanh, Activation::Relu2]);
    (formats, kinds, any::<bool>(), any::<u64>()).prop_flat_map(|((weights, activations), activation, biases, seed)| {
        let sizes: &[(usize, usize)] = match activations {
            A::E4m3 => &[(128, 128), (256, 128), (384, 256), (192, 64), (64, 320)],
            A::Bf16 if weights.bits() == 4 => &[(128, 128), (32, 64), (192, 96), (384, 160)],
            A::Bf16 => &[(128, 128), (200, 72), (129, 65), (384, 192), (130, 96), (33, 40)],
        };
        let shared_widths: &[usize] = match activations {
            A::E4m3 => &[64, 128, 384],
            A::Bf16 if weights.bits() == 4 => &[32, 96, 320],
            A::Bf16 => &[1, 40, 96, 300],
        };
        let shared_formats: &[W] = match weights {
            W::Bf16 => &[W::Bf16],
            W::E4m3 => &[W::Bf16, W::E4m3],
            W::Mxfp4 | W::Int4 => &W::ALL,
        };
        let shared = (select(shared_widths), select(shared_formats), any::<bool>());
        let shared = shared.prop_map(|(intermediate, weights, gate)| SharedMake { intermediate, weights, gate });
        (select(sizes), prop::option::of(shared)).prop_map(move |((hidden, intermediate), shared)| Make {
            hidden,
            intermediate,
            weights,
            activations,
            activation,
            biases,
            shared,
            weight_on_input: false,
            seed,
        })
    })
}

/// A layer's operands, in the library's form and in the oracle's.
pub(crate) struct Bench<T> {
    pub(crate) make: Make,
    w13: Weights,
    w2: Weights,
    /// `[E, 2 I]` (or `[E, I]`) and `[E, H]`.
    biases: Option<[Vec<f32>; 2]>,
    shared: Option<SharedBench>,
    pub(crate) x: Vec<T>,
    pub(crate) topk_weights: Vec<f32>,
}

pub(crate) struct SharedBench {
    w13: Weights,
    w2: Weights,
    gate: Option<Vec<f32>>,
}

impl<T: Number> Bench<T> {
    pub(crate) fn new(make: Make, case: &RoutingCase) -> Self {
        let Make { hidden, intermediate, weights, seed, .. } = make;
        let mut random = Random::new(seed);
        let extents = [case.local_experts, intermediate, hidden];
        let w13 = if make.activation.is_gated() { Weights::gate_up } else { Weights::random };
        Self {
            make,
            w13: w13(weights, extents, random.draw()),
            w2: Weights::random(weights, [case.local_experts, hidden, intermediate], random.draw()),
            biases: make.biases.then(|| {
                [make.w13_rows(), hidden].map(|n| (0..case.local_experts * n).map(|_| 0.5 * random.normal()).collect())
            }),
            shared: make.shared.map(|shared| SharedBench {
                w13: if make.activation.is_gated() {
                    Weights::gate_up(shared.weights, [1, shared.intermediate, hidden], random.draw())
                } else {
                    Weights::random(shared.weights, [1, shared.intermediate, hidden], random.draw())
                },
                w2: Weights::random(shared.weights, [1, hidden, shared.intermediate], random.draw()),
                gate: shared.gate.then(|| (0..hidden).map(|_| random.normal() / (hidden as f32).sqrt()).collect()),
            }),
            x: (0..case.tokens() * hidden).map(|_| T::nearest(random.normal())).collect(),
            topk_weights: (0..case.ids.len()).map(|_| 0.1 + random.uniform().abs()).collect(),
        }
    }

    fn layer<O: Number>(&self, cpu: &Cpu, case: &RoutingCase, alignment: usize) -> Layer {
        let everyone: Vec<usize> = (0..case.local_experts).collect();
        self.layer_of::<O>(cpu, case, alignment, &everyone, case.tokens().max(1))
    }

    /// A layer of some of the experts, for calls of up to `max_tokens`.
    pub(crate) fn layer_of<O: Number>(
        &self,
        cpu: &Cpu,
        case: &RoutingCase,
        alignment: usize,
        experts: &[usize],
        max_tokens: usize,
    ) -> Layer {
        let config = LayerConfig {
            input: T::DTYPE,
            output: O::DTYPE,
            activation: self.make.activation,
            alignment: Some(alignment),
            weight_on_input: self.make.weight_on_input,
            ..LayerConfig::new(case.topk, case.routing().global_experts(), self.make.activations)
        };
        let (w13, w2) = (self.w13.of_experts(experts).pack(cpu), self.w2.of_experts(experts).pack(cpu));
        let mut layer = Layer::prepare(cpu, w13, w2, config, max_tokens).unwrap();
        if let Some(biases) = &self.biases {
            let of_expert = |bias: &[f32], e: usize| {
                let width = bias.len() / case.local_experts;
                bias[e * width..][..width].to_vec()
            };
            let [b13, b2] = biases.each_ref().map(|bias| experts.iter().flat_map(|&e| of_expert(bias, e)).collect());
            layer = layer.with_biases(Some(b13), Some(b2)).unwrap();
        }
        if let Some(SharedBench { w13, w2, gate }) = &self.shared {
            let shared = SharedExpert { w13: w13.pack(cpu), w2: w2.pack(cpu), gate: gate.clone() };
            layer = layer.with_shared_expert(shared).unwrap();
        }
        layer
    }

    pub(crate) fn expected(&self, case: &RoutingCase) -> oracle::layer::LayerResult {
        let shared = || self.shared.as_ref().expect("only asked for if there is one");
        let shared_w13_row = |j: usize, row: &mut [f64]| shared().w13.row(0, j, row);
        let shared_w2_row = |j: usize, row: &mut [f64]| shared().w2.row(0, j, row);
        let layer = oracle::layer::Layer {
            hidden: self.make.hidden,
            intermediate: self.make.intermediate,
            activation: in_f64(self.make.activation),
            weight_on_input: self.make.weight_on_input,
            w13_row: &|e, j, row| self.w13.row(e, j, row),
            w2_row: &|e, j, row| self.w2.row(e, j, row),
            b13: self.biases.as_ref().map(|[b13, _]| &b13[..]),
            b2: self.biases.as_ref().map(|[_, b2]| &b2[..]),
            shared: self.shared.as_ref().map(|shared| oracle::layer::SharedExpert {
                intermediate: shared.w2.k,
                w13_row: &shared_w13_row,
                w2_row: &shared_w2_row,
                gate: shared.gate.as_deref(),
            }),
        };
        layer.run(&exact(&self.x), &case.ids, case.topk, Some(&self.topk_weights), case.expert_map.as_deref())
    }

    /// Runs in a poisoned, unaligned workspace of exactly the size asked for; also the rows of GEMM 2, by slot.
    pub(crate) fn run<O: Number>(&self, cpu: &Cpu, case: &RoutingCase, strides: Strides) -> (Vec<O>, Vec<f64>) {
        self.run_in(&self.layer::<O>(cpu, case, case.alignment), case, strides)
    }

    /// The same in a layer that [`Bench::layer`] made.
    fn run_in<O: Number>(&self, layer: &Layer, case: &RoutingCase, strides: Strides) -> (Vec<O>, Vec<f64>) {
        let (tokens, hidden) = (case.tokens(), self.make.hidden);
        let x = Strided::new(&self.x, tokens, hidden, strides, T::nearest(f32::NAN));
        let weights = Strided::new(&self.topk_weights, tokens, case.topk, strides, f32::NAN);
        let mut workspace = vec![0xff; layer.workspace_bytes(tokens).unwrap() + 1];
        let poison = O::nearest(-77.0);
        let mut output = vec![poison; tokens * hidden + 3];
        let mut slot_rows = vec![f64::NAN; case.ids.len() * hidden];
        let mut stages = Vec::new();
        layer
            .run_observed(
                x.matrix(),
                &case.routing(),
                weights.matrix(),
                &mut workspace[1..],
                &mut output,
                &mut |done| {
                    stages.push(done.stage);
                    assert_eq!(done.rows.is_some(), done.stage == Stage::Gemm2);
                    let Some(rows) = done.rows else { return };
                    for (slot, &row) in done.layout.inv_perm().iter().enumerate() {
                        if row >= 0 {
                            let row = &rows[row as usize * hidden..][..hidden];
                            slot_rows[slot * hidden..][..hidden]
                                .iter_mut()
                                .zip(row)
                                .for_each(|(to, x)| *to = x.to_f64());
                        }
                    }
                },
            )
            .unwrap();
        let has_shared = self.shared.is_some();
        let expected: Vec<Stage> = Stage::ALL.into_iter().filter(|&s| has_shared || s != Stage::Shared).collect();
        assert_eq!(stages, expected);
        assert!(output[tokens * hidden..].iter().all(|value| value.bits() == poison.bits()));
        output.truncate(tokens * hidden);
        (output, slot_rows)
    }

    fn check<O: Number>(&self, case: &RoutingCase, strides: Strides, cpus: &[Cpu]) -> Result<(), TestCaseError> {
        let (hidden, tolerance) = (self.make.hidden, self.make.tolerance());
        let expected = self.expected(case);
        let mut first: Option<(Isa, Vec<u32>)> = None;
        for cpu in cpus {
            let (output, slot_rows) = self.run::<O>(cpu, case, strides);
            match &first {
                Some((isa, first)) if *isa == cpu.isa() => {
                    prop_assert!(*first == bits(&output), "{}: {} threads give other bits", isa, cpu.threads());
                    continue;
                }
                _ => first = Some((cpu.isa(), bits(&output))),
            }
            within(tolerance, &slot_rows, &expected.slot_rows, &expected.expert_of_slot, hidden)?;
            let output: Vec<f64> = output.iter().map(|value| f64::from(value.exact())).collect();
            let whole = difference(&output, &expected.output);
            prop_assert!(whole < tolerance.whole, "{}: {} of {:?}", cpu.isa(), whole, tolerance);
            if let Some((token, most)) = worst(&by_row(&output, &expected.output, hidden)) {
                prop_assert!(most < tolerance.row, "{}: token {}: {} of {:?}", cpu.isa(), token, most, tolerance);
            }
        }
        Ok(())
    }
}

/// Few enough experts that the weights of a case take a moment and not a minute.
fn small_routings() -> impl Strategy<Value = RoutingCase> {
    routings().prop_filter("at most 12 experts", |case| case.local_experts <= 12)
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn bf16_tokens_come_out_within_tolerance(case in small_routings(), make in makes(), strides in strides()) {
        Bench::<bf16>::new(make, &case).check::<bf16>(&case, strides, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn f16_and_f32_tokens_come_out_within_tolerance(case in small_routings(), make in makes(), strides in strides()) {
        // Rounding an input to the bf16 of the GEMM is an error of its own, so these are numbers that all three types
        // have.
        let common = |x: &f32| {
            let x = bf16::from_f32(*x).to_f32();
            if f16::from_f32(x).to_f32() == x { x } else { 0.0 }
        };
        let cpus: Vec<Cpu> = Isa::available().into_iter().map(Cpu::with_isa).collect();
        let mut bench = Bench::<f32>::new(make, &case);
        bench.x = bench.x.iter().map(common).collect();
        bench.check::<f32>(&case, strides, &cpus)?;
        let x = bench.x.iter().map(|&x| f16::from_f32(x)).collect();
        Bench { x, ..Bench::<f16>::new(make, &case) }.check::<f16>(&case, strides, &cpus)?;
    }

    #[test]
    fn router_weights_on_the_input_come_out_within_tolerance(
        case in routings_of_one_slot(),
        make in makes(),
        strides in strides(),
    ) {
        // Powers of two, so that rounding `weight * x` costs nothing.
        let make = Make { weight_on_input: true, ..make };
        let mut bench = Bench::<bf16>::new(make, &case);
        for (token, weight) in bench.topk_weights.iter_mut().enumerate() {
            *weight = [0.5, 2.0, 1.0, 0.25][token % 4];
        }
        bench.check::<bf16>(&case, strides, &machines().collect::<Vec<_>>())?;
    }

    #[test]
    fn expanded_rows_come_out_with_the_bits_of_the_layers_own(case in small_routings(), make in makes()) {
        let bench = Bench::<bf16>::new(make, &case);
        for cpu in machines() {
            let (_, slot_rows) = bench.run::<bf16>(&cpu, &case, Strides::Contiguous);
            case.with_layout(|layout, oracle_layout| {
                let (m_sum, hidden) = (layout.m_sum(), make.hidden);
                let x = MatrixRef::new(&bench.x, case.tokens(), hidden).unwrap();
                let mut rows = vec![bf16::NAN; m_sum * hidden];
                cpu::permute_rows(&cpu, x, layout, Padding::Untouched, &mut rows).unwrap();
                let mut space = vec![0; 3 * case.local_experts + m_sum];
                let ready = Layout::from_psum(layout.psum(), case.alignment, m_sum, &mut space).unwrap();
                let layer = bench.layer::<bf16>(&cpu, &case, 1);
                let mut workspace = vec![0xff; layer.expanded_workspace_bytes(m_sum).unwrap() + 1];
                let poison = bf16::from_f32(-77.0);
                let mut out = vec![poison; m_sum * hidden + 3];
                let rows = MatrixRef::new(&rows, m_sum, hidden).unwrap();
                layer.run_expanded(rows, &ready, &mut workspace[1..], &mut out).unwrap();
                let mut expected = vec![poison; out.len()];
                for (slot, &row) in oracle_layout.inv_perm.iter().enumerate().filter(|(_, row)| **row >= 0) {
                    let from = &slot_rows[slot * hidden..][..hidden];
                    let to = &mut expected[row as usize * hidden..][..hidden];
                    to.iter_mut().zip(from).for_each(|(to, &x)| *to = bf16::from_f64(x));
                }
                prop_assert!(bits(&out) == bits(&expected), "{}, {} threads", cpu.isa(), cpu.threads());
                Ok(())
            })?;
        }
    }
}

pub(crate) fn plain(hidden: usize, intermediate: usize, weights: WeightFormat, activations: ActivationFormat) -> Make {
    let activation = Activation::SWIGLU;
    Make {
        hidden,
        intermediate,
        weights,
        activations,
        activation,
        biases: false,
        shared: None,
        weight_on_input: false,
        seed: 11,
    }
}

fn crowd(tokens: usize) -> RoutingCase {
    let ids = (0..3 * tokens as i64).map(|slot| [0, 2, 3, 2, -1, 3, 2, 0, 3, -1, -1, -1][slot as usize % 12]).collect();
    RoutingCase { topk: 3, local_experts: 4, alignment: 8, ids, expert_map: None, slack: 0 }
}

#[test]
fn real_hidden_sizes_come_out_within_tolerance() {
    use {ActivationFormat as A, WeightFormat as W};
    let cpus: Vec<Cpu> = Isa::available().into_iter().map(Cpu::with_isa).collect();
    for (hidden, weights, activations) in
        [(2880, W::Bf16, A::Bf16), (3584, W::E4m3, A::E4m3), (7168, W::E4m3, A::E4m3), (7168, W::E4m3, A::Bf16)]
    {
        let case = crowd(8);
        let make = plain(hidden, 128, weights, activations);
        Bench::<bf16>::new(make, &case).check::<bf16>(&case, Strides::Contiguous, &cpus).unwrap();
    }
}

/// A row of one value has no direction to compare: the tokens together must do.
#[test]
fn a_hidden_size_of_one_comes_out_within_tolerance() {
    let case = crowd(128);
    let bench = Bench::<bf16>::new(plain(1, 64, WeightFormat::Bf16, ActivationFormat::Bf16), &case);
    let expected = bench.expected(&case).output;
    for cpu in machines() {
        let (output, _) = bench.run::<f32>(&cpu, &case, Strides::Contiguous);
        let output: Vec<f64> = output.into_iter().map(f64::from).collect();
        assert!(difference(&output, &expected) < BF16_LAYER.whole, "{}", cpu.isa());
    }
}

#[test]
fn no_tokens_and_no_live_slots_give_nothing_and_zeros() {
    for tokens in [0, 1, 5] {
        let case = RoutingCase {
            topk: 2,
            local_experts: 3,
            alignment: 4,
            ids: vec![-1; 2 * tokens],
            expert_map: None,
            slack: 0,
        };
        for activations in [ActivationFormat::Bf16, ActivationFormat::E4m3] {
            let bench = Bench::<bf16>::new(plain(128, 128, WeightFormat::E4m3, activations), &case);
            for cpu in machines() {
                let (output, _) = bench.run::<bf16>(&cpu, &case, Strides::Contiguous);
                assert_eq!(bits(&output), vec![0; tokens * 128]);
            }
        }
    }
}

/// NaN, infinity and a NaN weight reach the token they belong to and nobody else; an empty slot's weight is not read.
#[test]
fn special_numbers_stay_with_their_token() {
    let case = crowd(8);
    for activations in [ActivationFormat::Bf16, ActivationFormat::E4m3] {
        let make = plain(256, 128, WeightFormat::E4m3, activations);
        for cpu in machines() {
            let mut bench = Bench::<bf16>::new(make, &case);
            let (clean, _) = bench.run::<bf16>(&cpu, &case, Strides::Contiguous);
            // Tokens 0 and 2 get bad values, token 4 a bad weight. Token 3 has no live slot: its values are not read.
            bench.x[0] = bf16::NAN;
            bench.x[2 * 256 + 200] = bf16::NEG_INFINITY;
            bench.x[3 * 256..4 * 256].fill(bf16::NAN);
            bench.topk_weights[4 * 3] = f32::NAN;
            // Slot 4 is empty.
            bench.topk_weights[4] = f32::NAN;
            let (output, _) = bench.run::<bf16>(&cpu, &case, Strides::Contiguous);
            for token in 0..8 {
                let (clean, output) = (&clean[token * 256..][..256], &output[token * 256..][..256]);
                match token {
                    0 | 2 | 4 => assert!(output.iter().all(|x| !x.is_finite()), "{} token {token}", cpu.isa()),
                    3 => assert_eq!(bits(output), [0; 256]),
                    _ => assert_eq!(bits(output), bits(clean), "{} token {token}", cpu.isa()),
                }
            }
        }
    }
}

#[test]
fn costs_count_live_rows_and_active_experts_once() {
    use expertile::layer::stage_cost;
    // Five live rows on two of four experts, one of three tokens nowhere.
    let ids = vec![0, 2, 2, 2, 0, -1, -1, -1, -1];
    let case = RoutingCase { topk: 3, local_experts: 4, alignment: 8, ids, expert_map: None, slack: 0 };
    case.with_layout(|layout, _| {
        let shape = expertile::LayerShape::new(256, 128, 4).unwrap();
        let cost = |stage, weights, activations| {
            let cost = stage_cost(stage, &shape, layout, weights, activations, 4);
            (cost.bytes, cost.flops)
        };
        let (e4m3, bf16) = (ActivationFormat::E4m3, ActivationFormat::Bf16);
        // Two tokens of 256 f32 read; five rows of 256 bytes and two scales (or 256 bf16) written.
        assert_eq!(cost(Stage::Permute, WeightFormat::E4m3, e4m3), (2 * 1024 + 5 * (256 + 8), 0));
        assert_eq!(cost(Stage::Permute, WeightFormat::Bf16, bf16), (2 * 1024 + 5 * 512, 0));
        // Two experts' weights, [2 I, H] and [H, I], with 4 and 2 scales; five rows in and out.
        let gemm1 = 2 * (256 * 256 + 4 * 4) + 5 * (256 + 8 + 2 * 256);
        assert_eq!(cost(Stage::Gemm1, WeightFormat::E4m3, e4m3), (gemm1, 2 * 5 * 256 * 256));
        let gemm2 = 2 * 2 * 256 * 128 + 5 * (2 * 128 + 2 * 256);
        assert_eq!(cost(Stage::Gemm2, WeightFormat::Bf16, bf16), (gemm2, 2 * 5 * 256 * 128));
        assert_eq!(cost(Stage::Activation, WeightFormat::Bf16, bf16), (5 * (512 + 256), 0));
        assert_eq!(cost(Stage::Unpermute, WeightFormat::Bf16, bf16), ((5 + 3) * 512, 0));
        // Without a gate there are I rows of first weights, and I values to activate.
        let shape = expertile::LayerShape::ungated(256, 128, 4).unwrap();
        assert_eq!((shape.w13_rows(), shape.is_gated()), (128, false));
        let cost = |stage| stage_cost(stage, &shape, layout, WeightFormat::Bf16, bf16, 4);
        assert_eq!(cost(Stage::Gemm1).flops, 2 * 5 * 128 * 256);
        assert_eq!(cost(Stage::Activation).bytes, 5 * (256 + 256));
        Ok(())
    })
    .unwrap();
}

/// The shared expert's rows reach every token: those that no expert has, too. A gate of zeros halves them; a NaN in a
/// token or in its gate's sum stays with the token.
#[test]
fn a_shared_expert_reaches_every_token_and_no_other() {
    let shared = SharedMake { intermediate: 96, weights: WeightFormat::Bf16, gate: true };
    for activations in [ActivationFormat::Bf16, ActivationFormat::E4m3] {
        let make = Make { shared: Some(shared), ..plain(256, 128, WeightFormat::E4m3, activations) };
        let nowhere = RoutingCase { ids: vec![-1; 3 * 8], ..crowd(8) };
        for cpu in machines() {
            let mut bench = Bench::<bf16>::new(make, &nowhere);
            let mut ungated = Bench::<bf16>::new(make, &nowhere);
            ungated.shared.as_mut().unwrap().gate = None;
            bench.shared.as_mut().unwrap().gate = Some(vec![0.0; 256]);
            let (halved, _) = bench.run::<f32>(&cpu, &nowhere, Strides::Contiguous);
            let (whole, _) = ungated.run::<f32>(&cpu, &nowhere, Strides::GapsEverywhere);
            assert!(whole.iter().all(|value| *value != 0.0) && halved.len() == 8 * 256);
            assert!(halved.iter().zip(&whole).all(|(half, whole)| 2.0 * half == *whole), "{}", cpu.isa());

            ungated.x[3 * 256 + 9] = bf16::NAN;
            let (output, _) = ungated.run::<f32>(&cpu, &nowhere, Strides::Contiguous);
            for token in 0..8 {
                let (output, whole) = (&output[token * 256..][..256], &whole[token * 256..][..256]);
                if token == 3 {
                    assert!(output.iter().all(|value| value.is_nan()), "{}", cpu.isa());
                } else {
                    assert_eq!(bits(output), bits(whole), "{} token {token}", cpu.isa());
                }
            }
        }
    }
}

/// A router weight on the input is the routed experts' alone.
#[test]
fn a_weight_on_the_input_does_not_touch_the_shared_expert() {
    let case = RoutingCase { topk: 1, local_experts: 2, alignment: 1, ids: vec![-1; 5], expert_map: None, slack: 0 };
    let shared = Some(SharedMake { intermediate: 64, weights: WeightFormat::Bf16, gate: false });
    let make = Make { shared, ..plain(64, 64, WeightFormat::Bf16, ActivationFormat::Bf16) };
    let mut bench = Bench::<bf16>::new(make, &case);
    for cpu in machines() {
        bench.make.weight_on_input = false;
        let (expected, _) = bench.run::<bf16>(&cpu, &case, Strides::Contiguous);
        bench.make.weight_on_input = true;
        let (output, _) = bench.run::<bf16>(&cpu, &case, Strides::Contiguous);
        assert_eq!(bits(&output), bits(&expected), "{}", cpu.isa());
    }
}

#[test]
fn the_shared_experts_cost_counts_its_weights_once_and_every_token() {
    use expertile::layer::shared_cost;
    let shape = expertile::LayerShape::new(256, 128, 1).unwrap();
    let cost = shared_cost(&shape, 5, WeightFormat::Bf16, ActivationFormat::Bf16, 4);
    let rows = 5 * (256 * 4 + 2 * 2 * 256 + 2 * 2 * 256 + 2 * 2 * 128 + 2 * 256);
    assert_eq!(cost.bytes, 2 * (256 * 256 + 256 * 128) + rows);
    assert_eq!(cost.flops, 2 * 5 * (256 * 256 + 256 * 128));
    assert_eq!(shared_cost(&shape, 0, WeightFormat::E4m3, ActivationFormat::E4m3, 4), Default::default());
}

/// Promise 2 of the contract: a token has the same bits whatever the number of tokens is and whatever they are.
#[test]
fn a_token_comes_out_with_the_same_bits_in_any_company() {
    use {ActivationFormat as A, WeightFormat as W};
    const TOKENS: usize = 260;
    let mut random = Random::new(3);
    let ids: Vec<i64> = (0..3 * TOKENS)
        .map(|_| match random.below(16) {
            // Half of all slots on one expert, so that it has several blocks of rows.
            0..8 => 1,
            8..15 => random.below(4) as i64,
            _ => -1,
        })
        .collect();
    let all = RoutingCase { topk: 3, local_experts: 4, alignment: 1, ids, expert_map: None, slack: 0 };
    for (weights, activations) in [(W::Bf16, A::Bf16), (W::E4m3, A::Bf16), (W::E4m3, A::E4m3)] {
        let shared = Some(SharedMake { intermediate: 256, weights, gate: true });
        // K = 384 and 256: several blocks of it in both GEMMs.
        let make = Make { biases: true, shared, ..plain(384, 256, weights, activations) };
        let bench = Bench::<bf16>::new(make, &all);
        let mut part = Bench::<bf16>::new(make, &all);
        let layer = bench.layer::<f32>(&Cpu::new(), &all, 1);
        for isa in Isa::available() {
            let (expected, _) = bench.run_in::<f32>(&layer.on(&Cpu::with_isa(isa)), &all, Strides::Contiguous);
            let sizes = [1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 16, 17, 24, 25, 31, 48, 64, 97, 130, 200];
            for (step, tokens) in sizes.into_iter().enumerate() {
                // Another first token for each size, and backwards for every second.
                let first = step * 37 % (TOKENS - tokens + 1);
                let mut chosen: Vec<usize> = (first..first + tokens).collect();
                if step % 2 == 1 {
                    chosen.reverse();
                }
                let case = RoutingCase {
                    ids: chosen.iter().flat_map(|token| all.ids[3 * token..][..3].to_vec()).collect(),
                    ..all.clone()
                };
                part.x = chosen.iter().flat_map(|token| bench.x[384 * token..][..384].to_vec()).collect();
                part.topk_weights =
                    chosen.iter().flat_map(|token| bench.topk_weights[3 * token..][..3].to_vec()).collect();
                for cpu in machines().filter(|cpu| cpu.isa() == isa) {
                    let (output, _) = part.run_in::<f32>(&layer.on(&cpu), &case, Strides::Contiguous);
                    for (at, token) in chosen.iter().enumerate() {
                        assert!(
                            bits(&output[384 * at..][..384]) == bits(&expected[384 * token..][..384]),
                            "{isa}, {} threads, {weights} weights, {activations} rows: token {token} as {at} of {tokens}",
                            cpu.threads()
                        );
                    }
                }
            }
        }
    }
}
