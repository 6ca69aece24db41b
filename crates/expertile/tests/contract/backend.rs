//! The trait that unites the backends, on the CPU: the bits of the layer's own calls, and refusals that name the
//! argument.

use crate::cases::bits;
use expertile::backend::{ExpandedRows, Ids, LayerInputs};
use expertile::cpu::{self, Cpu};
use expertile::{
    ActivationFormat, Backend, Dtype, Error, ExpertLayer, LayerConfig, LayerShape, Layout, MatrixRef, Padding, Plan,
    Result, Routing, TokenExperts, WeightFormat, WeightsBuilder,
};
use expertile_testkit::Random;
use half::bf16;

const EXPERTS: usize = 3;
const GLOBAL: usize = 5;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 96;
const TOPK: usize = 2;
const TOKENS: usize = 7;
const MAP: [i32; GLOBAL] = [-1, 2, 0, -1, 1];

fn config() -> LayerConfig {
    LayerConfig { ids: Dtype::I64, output: Dtype::F32, ..LayerConfig::new(TOPK, GLOBAL, ActivationFormat::Bf16) }
}

/// A layer of random weights, as an engine that knows no backend makes it.
fn layer<B: Backend>(backend: &B, config: LayerConfig) -> Result<B::Layer> {
    let mut numbers = Random::new(5);
    let mut random =
        |rows: usize, cols: usize| -> Vec<f32> { (0..rows * cols).map(|_| numbers.normal() / 16.0).collect() };
    let shape = LayerShape::new(HIDDEN, INTERMEDIATE, EXPERTS)?;
    let mut w13 = backend.w13_builder(WeightFormat::Bf16, &shape)?;
    let mut w2 = backend.w2_builder(WeightFormat::Bf16, &shape)?;
    for expert in 0..EXPERTS {
        for first_row in [0, INTERMEDIATE] {
            // f32, to be rounded.
            let rows = random(INTERMEDIATE, HIDDEN);
            w13.add_bf16_rows(expert, first_row, MatrixRef::new(&rows, INTERMEDIATE, HIDDEN)?)?;
        }
        // Columns of a transposed matrix.
        let rows = random(INTERMEDIATE, HIDDEN);
        w2.add_bf16_rows(expert, 0, MatrixRef::with_strides(&rows, HIDDEN, INTERMEDIATE, 1, HIDDEN)?)?;
    }
    backend.prepare(w13.finish()?, w2.finish()?, config, TOKENS)
}

struct Inputs {
    x: Vec<bf16>,
    ids: Vec<i64>,
    weights: Vec<f32>,
}

impl Inputs {
    fn new() -> Self {
        let mut random = Random::new(9);
        Self {
            x: (0..TOKENS * HIDDEN).map(|_| bf16::from_f32(random.normal())).collect(),
            ids: (0..TOKENS * TOPK).map(|_| random.below(6) as i64 - 1).collect(),
            weights: (0..TOKENS * TOPK).map(|_| random.uniform().abs()).collect(),
        }
    }
}

#[test]
fn a_call_through_the_trait_has_the_bits_of_the_layers_own() {
    let (cpu, inputs) = (Cpu::new(), Inputs::new());
    let layer = layer(&cpu, config()).unwrap();
    let (x, ids, weights) = (&inputs.x, &inputs.ids, &inputs.weights);
    let mut expected = vec![f32::NAN; TOKENS * HIDDEN];
    let mut workspace = vec![0xff; layer.workspace_bytes(TOKENS).unwrap()];
    let routing = Routing::new(MatrixRef::new(ids, TOKENS, TOPK).unwrap(), EXPERTS, Some(&MAP)).unwrap();
    let rows = MatrixRef::new(x, TOKENS, HIDDEN).unwrap();
    layer.run(rows, &routing, MatrixRef::new(weights, TOKENS, TOPK).unwrap(), &mut workspace, &mut expected).unwrap();

    let (x, ids, map) = (cpu.upload(x).unwrap(), cpu.upload(ids).unwrap(), cpu.upload(&MAP).unwrap());
    let weights = cpu.upload(weights).unwrap();
    let call = LayerInputs {
        tokens: TOKENS,
        hidden_states: &x,
        topk_ids: Ids::<Cpu>::I64(&ids),
        topk_weights: &weights,
        expert_map: Some(&map),
    };
    let mut workspace = ExpertLayer::workspace(&layer, TOKENS).unwrap();
    assert_eq!(workspace.len(), layer.choice(TOKENS).unwrap().workspace_bytes);
    let mut output = cpu.allocate::<f32>(TOKENS * HIDDEN).unwrap();
    ExpertLayer::run(&layer, &call, &mut workspace, &mut output).unwrap();
    ExpertLayer::check(&layer, &mut workspace).unwrap();
    let mut found = vec![0.0; output.len()];
    cpu.download(&output, &mut found).unwrap();
    assert_eq!(bits(&found), bits(&expected));
    assert!(found.iter().any(|&value| value != 0.0));
}

#[test]
fn expanded_rows_through_the_trait_are_the_layers_own() {
    let (cpu, inputs) = (Cpu::new(), Inputs::new());
    let layer = layer(&cpu, config()).unwrap();
    let routing = Routing::new(MatrixRef::new(&inputs.ids, TOKENS, TOPK).unwrap(), EXPERTS, Some(&MAP)).unwrap();
    let plan = Plan::tight(TOKENS, TOPK, EXPERTS, 4, TokenExperts::MayRepeat).unwrap();
    let (m_sum, mut space) = (plan.m_sum(), vec![0; Layout::space_len(&plan).unwrap()]);
    let layout = Layout::build(&plan, &routing, &mut space).unwrap();
    let mut rows = vec![bf16::NAN; m_sum * HIDDEN];
    let x = MatrixRef::new(&inputs.x, TOKENS, HIDDEN).unwrap();
    cpu::permute_rows(&cpu, x, &layout, Padding::Untouched, &mut rows).unwrap();
    let mut space = vec![0; 3 * EXPERTS + m_sum];
    let given = Layout::from_psum(layout.psum(), 4, m_sum, &mut space).unwrap();
    let mut expected = vec![bf16::NAN; m_sum * HIDDEN];
    let mut workspace = vec![0; layer.expanded_workspace_bytes(m_sum).unwrap()];
    layer.run_expanded(MatrixRef::new(&rows, m_sum, HIDDEN).unwrap(), &given, &mut workspace, &mut expected).unwrap();

    let psum = layout.psum().to_vec();
    let mut out = vec![bf16::NAN; m_sum * HIDDEN];
    let mut workspace = ExpertLayer::expanded_workspace(&layer, m_sum).unwrap();
    let run = |rows: &ExpandedRows<'_, Cpu, bf16>, workspace: &mut Vec<u8>, out: &mut Vec<bf16>| {
        ExpertLayer::run_expanded(&layer, rows, workspace, out).map_err(|error| error.to_string())
    };
    let call = ExpandedRows { m_sum, alignment: 4, rows: &rows, psum: &psum };
    run(&call, &mut workspace, &mut out).unwrap();
    assert_eq!(bits(&out), bits(&expected));

    let (short, before) = (rows[1..].to_vec(), out.clone());
    let error = run(&ExpandedRows { rows: &short, ..call_of(&call) }, &mut workspace, &mut out).unwrap_err();
    assert!(error.starts_with("rows holds"), "{error}");
    let error = run(&ExpandedRows { psum: &vec![0; EXPERTS - 1], ..call_of(&call) }, &mut workspace, &mut out);
    assert!(error.unwrap_err().starts_with("psum holds 2 elements, expected at least 3"));
    let error = run(&ExpandedRows { psum: &vec![m_sum as i32 + 1; 3], ..call_of(&call) }, &mut workspace, &mut out);
    assert!(error.unwrap_err().starts_with("m_sum is"));
    let error = run(&call, &mut vec![0; 64], &mut out).unwrap_err();
    assert!(error.starts_with("workspace holds 64 elements"), "{error}");
    assert_eq!(bits(&out), bits(&before));
}

/// The same call once more: it is not `Copy`.
fn call_of<'a>(call: &ExpandedRows<'a, Cpu, bf16>) -> ExpandedRows<'a, Cpu, bf16> {
    ExpandedRows { m_sum: call.m_sum, alignment: call.alignment, rows: call.rows, psum: call.psum }
}

#[test]
fn what_does_not_fit_the_layer_is_named_and_nothing_is_written() {
    let (cpu, inputs) = (Cpu::new(), Inputs::new());
    let layer = layer(&cpu, config()).unwrap();
    let (map, narrow) = (MAP.to_vec(), vec![0i32; TOKENS * TOPK]);
    let good = LayerInputs {
        tokens: TOKENS,
        hidden_states: &inputs.x,
        topk_ids: Ids::<Cpu>::I64(&inputs.ids),
        topk_weights: &inputs.weights,
        expert_map: Some(&map),
    };
    let refuse = |call: &LayerInputs<'_, Cpu, bf16>, output: usize, start: &str| {
        let mut workspace = ExpertLayer::workspace(&layer, TOKENS).unwrap();
        let mut output = vec![7.0f32; output];
        let error = ExpertLayer::run(&layer, call, &mut workspace, &mut output).unwrap_err();
        assert!(error.to_string().starts_with(start), "{error}, expected {start}");
        assert!(output.iter().all(|&value| value == 7.0));
    };
    let all = TOKENS * HIDDEN;
    refuse(&LayerInputs { tokens: TOKENS + 1, ..good }, all, "topk_ids holds 14 elements, expected at least 16");
    refuse(&LayerInputs { hidden_states: &vec![bf16::ONE; all - 1], ..good }, all, "hidden_states holds 1791 elements");
    refuse(&LayerInputs { topk_weights: &vec![1.0; 13], ..good }, all, "topk_weights holds 13 elements");
    refuse(
        &LayerInputs { topk_ids: Ids::I32(&narrow), ..good },
        all,
        "topk_ids has dtype i32, expected i64, as prepared",
    );
    refuse(&LayerInputs { expert_map: None, ..good }, all, "global_experts is 5, expected 3 without an expert map");
    refuse(&LayerInputs { expert_map: Some(&vec![0; 4]), ..good }, all, "topk_ids[");
    refuse(&good, all - 1, "output holds 1791 elements, expected at least 1792");
    let mut wrong = vec![bf16::ZERO; all];
    let error = ExpertLayer::run(&layer, &good, &mut vec![0; 1 << 20], &mut wrong).unwrap_err();
    assert_eq!(error, Error::Dtype { argument: "output", actual: Dtype::Bf16, expected: "f32, as prepared" });
    let error = cpu.download(&vec![0u8; 3], &mut [0; 4]).unwrap_err();
    assert!(matches!(error, Error::BufferTooSmall { argument: "buffer", actual: 3, needed: 4 }), "{error}");
    let error = cpu.allocate::<u64>(usize::MAX).unwrap_err();
    assert!(matches!(error, Error::Overflow { .. }), "{error}");
}
