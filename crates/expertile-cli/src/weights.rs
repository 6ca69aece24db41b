//! Where a layer's weights come from: a checkpoint, or made up.

use crate::error::Result;
use expertile::cpu::{Cpu, PackedWeights};
use expertile::gemm::WEIGHT_BLOCK;
use expertile::{E4m3, LayerShape, MatrixRef, Router, WeightFormat};
use expertile_checkpoint::{MoeLayer, WeightValues};
use half::bf16;

/// The three matrices of an expert.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Gate,
    Up,
    Down,
}

/// The rows of one of them.
pub(crate) enum PartRows<'a> {
    Bf16(MatrixRef<'a, bf16>),
    E4m3 {
        values: MatrixRef<'a, E4m3>,
        /// One for each block of 128 x 128.
        scales: MatrixRef<'a, f32>,
    },
}

/// Room for one matrix that has to be made before it can be taken.
#[derive(Default)]
pub(crate) struct Space {
    pub(crate) bf16: Vec<bf16>,
    pub(crate) e4m3: Vec<E4m3>,
}

/// Who takes a matrix.
pub(crate) type TakePart<'a> = dyn FnMut(PartRows<'_>) -> expertile::Result<()> + 'a;

/// Where a matrix stands in `w13 [E, 2 I, H]`, gate first, or in `w2 [E, H, I]`.
pub(crate) struct Place {
    pub(crate) in_w13: bool,
    pub(crate) expert: usize,
    pub(crate) first_row: usize,
}

/// Who takes a matrix to its place.
pub(crate) type TakePlaced<'a> = dyn FnMut(Place, PartRows<'_>) -> expertile::Result<()> + 'a;

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

    /// Hands over one matrix of an expert.
    fn with_part(&self, part: Part, expert: usize, space: &mut Space, take: &mut TakePart<'_>) -> Result<()>;

    /// Hands over every matrix, one expert after the other, telling `progress` how many experts are done.
    fn each_part(&self, progress: &mut dyn FnMut(usize), take: &mut TakePlaced<'_>) -> Result<()> {
        let mut space = Space::default();
        for expert in 0..self.shape().local_experts() {
            for part in [Part::Gate, Part::Up, Part::Down] {
                let (in_w13, first_row) = match part {
                    Part::Gate => (true, 0),
                    Part::Up => (true, self.shape().intermediate()),
                    Part::Down => (false, 0),
                };
                self.with_part(part, expert, &mut space, &mut |rows| take(Place { in_w13, expert, first_row }, rows))?;
            }
            progress(expert + 1);
        }
        Ok(())
    }

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

    fn with_part(&self, part: Part, expert: usize, _space: &mut Space, take: &mut TakePart<'_>) -> Result<()> {
        let expert = &self.experts()[expert];
        let matrix = match part {
            Part::Gate => &expert.gate,
            Part::Up => &expert.up,
            Part::Down => &expert.down,
        };
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let part = match matrix.values() {
            WeightValues::Bf16(values) => PartRows::Bf16(MatrixRef::new(values, rows, cols)?),
            WeightValues::E4m3 { values, scales } => {
                let [block_rows, block_cols] = [rows, cols].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
                let scales = MatrixRef::new(scales, block_rows, block_cols)?;
                PartRows::E4m3 { values: MatrixRef::new(values, rows, cols)?, scales }
            }
        };
        Ok(take(part)?)
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
