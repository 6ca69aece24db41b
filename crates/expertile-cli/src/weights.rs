//! Where a layer's weights come from: a checkpoint, or made up.

use crate::error::Result;
use expertile::cpu::{Cpu, PackedWeights};
use expertile::{LayerShape, Router, WeightFormat};
use expertile_checkpoint::MoeLayer;

/// The weights of one MoE layer and its router.
pub(crate) trait ExpertWeights: Sync {
    /// `H`, `I`, `E`.
    fn shape(&self) -> LayerShape;

    /// What the weights are made of.
    fn format(&self) -> WeightFormat;

    /// How logits become a choice.
    fn router(&self) -> &Router;

    /// `[E, H]`: logits are `hidden_states * router_weight^T`.
    fn router_weight(&self) -> &[f32];

    /// Packs `w13 [E, 2 I, H]` and `w2 [E, H, I]`, telling `progress` how many experts are done.
    fn pack(&self, cpu: &Cpu, progress: &mut dyn FnMut(usize)) -> Result<(PackedWeights, PackedWeights)>;

    /// Row `row` of an expert's `[2 I, H]`, gate first, scales applied.
    fn w13_row(&self, expert: usize, row: usize, out: &mut [f64]);

    /// Row `row` of an expert's `[H, I]`, scales applied.
    fn w2_row(&self, expert: usize, row: usize, out: &mut [f64]);
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

    fn pack(&self, cpu: &Cpu, progress: &mut dyn FnMut(usize)) -> Result<(PackedWeights, PackedWeights)> {
        Ok(self.pack(cpu, progress)?)
    }

    fn w13_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        let (expert, intermediate) = (&self.experts()[expert], self.shape().intermediate());
        match row.checked_sub(intermediate) {
            None => expert.gate.write_row(row, out),
            Some(row) => expert.up.write_row(row, out),
        }
    }

    fn w2_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        self.experts()[expert].down.write_row(row, out);
    }
}
