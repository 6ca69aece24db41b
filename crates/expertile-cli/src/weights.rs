//! Where a layer's weights come from: a checkpoint, or made up.

use crate::error::Result;
use expertile::{Activation, Backend, E4m3, LayerShape, Router, WeightFormat, WeightsBuilder};
use expertile_checkpoint::{Biases, Expert, Ids, MoeLayer, SharedExpert, WeightRows};
use half::bf16;

/// The three matrices of an expert.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Gate,
    Up,
    Down,
}

/// Room for one matrix that has to be made before it can be loaded.
#[derive(Default)]
pub(crate) struct Space {
    pub(crate) bf16: Vec<bf16>,
    pub(crate) e4m3: Vec<E4m3>,
    /// Two 4-bit values to a byte.
    pub(crate) blocks: Vec<u8>,
}

/// Callback that receives one matrix.
pub(crate) type TakePart<'a> = dyn FnMut(WeightRows<'_>) -> expertile::Result<()> + 'a;

/// The weights of one MoE layer and its router.
pub(crate) trait ExpertWeights: Sync {
    /// `H`, `I`, `E`.
    fn shape(&self) -> LayerShape;

    /// What the weights are made of.
    fn format(&self) -> WeightFormat;

    /// Their type where they came from, as safetensors names it.
    fn dtype(&self) -> &'static str {
        match self.format() {
            WeightFormat::E4m3 => "F8_E4M3",
            WeightFormat::Bf16 => "BF16",
            WeightFormat::Mxfp4 => "MXFP4",
            WeightFormat::Int4 => "INT4",
        }
    }

    /// Whether they are rounded to their format.
    fn are_rounded(&self) -> bool {
        false
    }

    /// The function between the GEMMs.
    fn activation(&self) -> Activation {
        Activation::SWIGLU
    }

    /// Whether the router weight multiplies an expert's input.
    fn weight_on_input(&self) -> bool {
        false
    }

    /// Biases of the routed experts.
    fn biases(&self) -> Option<&Biases> {
        None
    }

    /// The expert that every token visits.
    fn shared(&self) -> Option<&SharedExpert<'_>> {
        None
    }

    /// How logits become a choice.
    fn router(&self) -> &Router;

    /// `[E, H]`: logits are `hidden_states * router_weight^T`.
    fn router_weight(&self) -> &[f32];

    /// The experts of every number in the vocabulary, where those choose.
    fn token_experts(&self) -> Option<&Ids> {
        None
    }

    /// Calls `take` with one matrix of an expert.
    fn with_part(&self, part: Part, expert: usize, space: &mut Space, take: &mut TakePart<'_>) -> Result<()>;

    /// Row `row` of an expert's `[2 I, H]`, gate first, scales applied.
    fn w13_row(&self, expert: usize, row: usize, out: &mut [f64]);

    /// Row `row` of an expert's `[H, I]`, scales applied.
    fn w2_row(&self, expert: usize, row: usize, out: &mut [f64]);
}

/// Loads `w13 [E, 2 I, H]` and `w2 [E, H, I]` into a backend, expert by expert; `progress` gets how many are done.
pub(crate) fn load<B: Backend>(
    weights: &dyn ExpertWeights,
    backend: &B,
    progress: &mut dyn FnMut(usize),
) -> Result<(B::Weights, B::Weights)> {
    let (shape, format) = (weights.shape(), weights.format());
    let (mut w13, mut w2) = (backend.w13_builder(format, &shape)?, backend.w2_builder(format, &shape)?);
    let mut space = Space::default();
    let up_row = if shape.is_gated() { shape.intermediate() } else { 0 };
    for expert in 0..shape.local_experts() {
        if shape.is_gated() {
            weights.with_part(Part::Gate, expert, &mut space, &mut |rows| rows.add_to(&mut w13, expert, 0))?;
        }
        weights.with_part(Part::Up, expert, &mut space, &mut |rows| rows.add_to(&mut w13, expert, up_row))?;
        weights.with_part(Part::Down, expert, &mut space, &mut |rows| rows.add_to(&mut w2, expert, 0))?;
        progress(expert + 1);
    }
    Ok((w13.finish()?, w2.finish()?))
}

impl ExpertWeights for MoeLayer<'_> {
    fn shape(&self) -> LayerShape {
        self.shape()
    }

    fn format(&self) -> WeightFormat {
        self.weight_format()
    }

    fn router(&self) -> &Router {
        self.router()
    }

    fn router_weight(&self) -> &[f32] {
        self.router_weight()
    }

    fn token_experts(&self) -> Option<&Ids> {
        self.token_experts()
    }

    fn dtype(&self) -> &'static str {
        self.weight_dtype()
    }

    fn are_rounded(&self) -> bool {
        self.weights_are_rounded()
    }

    fn activation(&self) -> Activation {
        self.activation()
    }

    fn weight_on_input(&self) -> bool {
        self.weight_on_input()
    }

    fn biases(&self) -> Option<&Biases> {
        self.biases()
    }

    fn shared(&self) -> Option<&SharedExpert<'_>> {
        self.shared()
    }

    fn with_part(&self, part: Part, expert: usize, _: &mut Space, take: &mut TakePart<'_>) -> Result<()> {
        let expert = &self.experts()[expert];
        let matrix = match part {
            Part::Gate => expert.gate.as_ref().expect("ungated layers are not asked for their gate"),
            Part::Up => &expert.up,
            Part::Down => &expert.down,
        };
        Ok(take(matrix.view()?)?)
    }

    fn w13_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        expert_w13_row(&self.experts()[expert], row, out);
    }

    fn w2_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        self.experts()[expert].down.write_row(row, out);
    }
}

/// Row `row` of an expert's `[2 I, H]`, gate first, or of its `[I, H]` without a gate.
pub(crate) fn expert_w13_row(expert: &Expert<'_>, row: usize, out: &mut [f64]) {
    match &expert.gate {
        None => expert.up.write_row(row, out),
        Some(gate) => match row.checked_sub(gate.rows()) {
            None => gate.write_row(row, out),
            Some(row) => expert.up.write_row(row, out),
        },
    }
}
