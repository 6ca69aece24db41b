//! `expertile bench steps` on the CPU.

use crate::commands::bench::layer::first_experts;
use crate::commands::bench::on_cpu::{Report, Size, Subject};
use crate::commands::options::SizeOptions;
use crate::error::{Error, Result};
use crate::machine::Limits;
use crate::memory;
use crate::preset::MadeUp;
use crate::report::progress::Progress;
use crate::report::stages::StageTime;
use crate::weights::ExpertWeights;
use expertile::cpu::{Cpu, activate_quantize, quantize_permute, unpermute};
use expertile::layer::stage_cost;
use expertile::{
    Activation, ActivationFormat, E4m3, Group, LayerShape, Layout, MatrixRef, Padding, Plan, Routing, ScaleFormat,
    ScaleLayout, ScaleRounding, ScalesMut, Stage, TokenExperts, WeightFormat,
};
use expertile_checkpoint::HiddenStates;
use half::bf16;
use std::time::Instant;

/// As the CPU's layer has it: padding costs its GEMM no work.
const ALIGNMENT: usize = 1;

pub(super) fn measure(args: &SizeOptions, cpu: &Cpu) -> Result<Report> {
    // Sizes and a routing only: no weights are made, so memory need not hold them.
    let (weights, global_experts) = args.layer(WeightFormat::E4m3, None)?;
    let limits = Limits::measure(cpu, WeightFormat::E4m3, ActivationFormat::E4m3)?;
    let progress = Progress::new("timing sizes", args.tokens.len());
    let mut sizes = Vec::new();
    for &tokens in &args.tokens {
        sizes.push(measure_size(cpu, &weights, global_experts, &limits, tokens, args.repeat())?);
        progress.set(sizes.len());
    }
    let e4m3 = ActivationFormat::E4m3.name();
    let (preset, shape) = (args.preset, weights.shape());
    let subject = Subject { cpu, preset, shape, global_experts, formats: [e4m3, e4m3], weight_bytes: None };
    Ok(Report::new(&subject, args.repeat(), limits, sizes))
}

fn measure_size(
    cpu: &Cpu,
    weights: &MadeUp,
    global_experts: usize,
    limits: &Limits,
    tokens: usize,
    repeat: usize,
) -> Result<Size> {
    let (shape, topk) = (weights.shape(), weights.router().topk);
    let input = weights.tokens(tokens)?;
    let HiddenStates::Bf16(hidden_states) = input.hidden_states() else {
        return Err(Error::usage("made-up hidden states are bf16"));
    };
    let (ids, topk_weights) = weights.uniform_routing(tokens, global_experts)?;
    let map = first_experts(shape.local_experts(), global_experts);
    let ids = MatrixRef::new(&ids, tokens, topk)?;
    let routing = Routing::new(ids, shape.local_experts(), map.as_deref())?;
    let hidden_states = MatrixRef::new(hidden_states, tokens, shape.hidden())?;
    let topk_weights = MatrixRef::new(&topk_weights, tokens, topk)?;
    let mut steps =
        Steps::new(shape, Plan::tight(tokens, topk, shape.local_experts(), ALIGNMENT, TokenExperts::Distinct)?)?;
    Size::measure(&routing, limits, repeat, || steps.time_once(cpu, hidden_states, &routing, topk_weights))
}

/// The buffers of one size. In place of the GEMMs' results the activation and the unpermute read ones.
struct Steps {
    shape: LayerShape,
    plan: Plan,
    format: ScaleFormat,
    space: Vec<i32>,
    /// `[M_sum, max(H, I)]` and its scales.
    front: Vec<E4m3>,
    scales: Vec<f32>,
    /// `[M_sum, max(H, 2 I)]`.
    back: Vec<bf16>,
    output: Vec<bf16>,
}

impl Steps {
    fn new(shape: LayerShape, plan: Plan) -> Result<Self> {
        let (hidden, intermediate) = (shape.hidden(), shape.intermediate());
        let (front, back) = (hidden.max(intermediate), hidden.max(shape.w13_rows()));
        let (rows, tokens) = (plan.m_sum(), plan.tokens());
        let bytes = rows as u128 * (front + front / 32 + 2 * back) as u128 + 2 * tokens as u128 * hidden as u128;
        memory::require("the rows of the steps", bytes)?;
        let format = ScaleFormat::new(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact)?;
        let words = format.words(rows, hidden)?.max(format.words(rows, intermediate)?);
        let mut back: Vec<bf16> = memory::zeroed("gate and up", rows * back)?;
        // A page of zeros that was never written is not memory.
        back.fill(bf16::ONE);
        Ok(Self {
            shape,
            plan,
            format,
            space: memory::zeroed("the layout", Layout::space_len(&plan)?)?,
            front: memory::zeroed("the permuted rows", rows * front)?,
            scales: memory::zeroed("the scales", words)?,
            back,
            output: memory::zeroed("the output", tokens * hidden)?,
        })
    }

    fn time_once(
        &mut self,
        cpu: &Cpu,
        hidden_states: MatrixRef<'_, bf16>,
        routing: &Routing<'_>,
        topk_weights: MatrixRef<'_, f32>,
    ) -> Result<Vec<StageTime>> {
        let Self { shape, plan, format, space, front, scales, back, output } = self;
        let (hidden, intermediate, rows) = (shape.hidden(), shape.intermediate(), plan.m_sum());
        let mut seconds = Vec::new();
        let mut started = Instant::now();
        let mut done = |stage| {
            seconds.push((stage, started.elapsed().as_secs_f64()));
            started = Instant::now();
        };
        let layout = Layout::build(plan, routing, space)?;
        done(Stage::Routing);
        let padding = Padding::Untouched;
        let (permuted, row_scales) = (&mut front[..rows * hidden], ScalesMut::f32(*format, scales));
        quantize_permute(cpu, hidden_states, None, &layout, padding, permuted, row_scales)?;
        done(Stage::Permute);
        let activation = Activation::default();
        let (gate_up, activated) = (&back[..rows * shape.w13_rows()], &mut front[..rows * intermediate]);
        let row_scales = ScalesMut::f32(*format, scales);
        activate_quantize(cpu, &layout, intermediate, gate_up, &activation, activated, row_scales)?;
        done(Stage::Activation);
        let rows = MatrixRef::new(&back[..rows * hidden], rows, hidden)?;
        unpermute(cpu, rows, &layout, Some(topk_weights), output)?;
        done(Stage::Unpermute);
        let cost = |stage| stage_cost(stage, shape, &layout, WeightFormat::E4m3, ActivationFormat::E4m3, 2);
        Ok(seconds
            .into_iter()
            .map(|(stage, seconds)| StageTime { stage: Some(stage), seconds, cost: cost(stage) })
            .collect())
    }
}
