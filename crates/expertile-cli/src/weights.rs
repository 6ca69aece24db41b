//! Where a layer's weights come from: a checkpoint, or made up.

use crate::error::{Error, Result};
use expertile::cpu::{Cpu, PackedWeights};
use expertile::gemm::WEIGHT_BLOCK;
use expertile::{Activation, E4m3, LayerShape, MatrixRef, Router, WeightFormat};
use expertile_checkpoint::{Biases, Expert, MoeLayer, SharedExpert, WeightMatrix, WeightRows, WeightScales};
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

/// Callback that receives one matrix.
pub(crate) type TakePart<'a> = dyn FnMut(PartRows<'_>) -> expertile::Result<()> + 'a;

/// The place of a matrix in `w13 [E, 2 I, H]`, gate first, or in `w2 [E, H, I]`.
pub(crate) struct Place {
    pub(crate) in_w13: bool,
    pub(crate) expert: usize,
    pub(crate) first_row: usize,
}

/// Callback that receives one matrix and its place.
pub(crate) type TakePlaced<'a> = dyn FnMut(Place, PartRows<'_>) -> expertile::Result<()> + 'a;

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

    /// Packs `w13 [E, 2 I, H]` and `w2 [E, H, I]`, reporting to `progress` how many experts are done.
    fn pack(&self, cpu: &Cpu, progress: &mut dyn FnMut(usize)) -> Result<(PackedWeights, PackedWeights)>;

    /// Hands over one matrix of an expert.
    fn with_part(&self, part: Part, expert: usize, space: &mut Space, take: &mut TakePart<'_>) -> Result<()>;

    /// Hands over every matrix, one expert after the other, reporting to `progress` how many experts are done.
    fn each_part(&self, progress: &mut dyn FnMut(usize), take: &mut TakePlaced<'_>) -> Result<()> {
        let mut space = Space::default();
        for expert in 0..self.shape().local_experts() {
            for part in [Part::Gate, Part::Up, Part::Down] {
                let gated = self.shape().is_gated();
                let (in_w13, first_row) = match part {
                    Part::Gate if !gated => continue,
                    Part::Gate => (true, 0),
                    Part::Up => (true, if gated { self.shape().intermediate() } else { 0 }),
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

    fn with_part(&self, part: Part, expert: usize, space: &mut Space, take: &mut TakePart<'_>) -> Result<()> {
        let expert = &self.experts()[expert];
        let matrix = match part {
            Part::Gate => expert.gate.as_ref().expect("ungated layers are not asked for their gate"),
            Part::Up => &expert.up,
            Part::Down => &expert.down,
        };
        with_rows(matrix, space, take)
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

/// Hands over a matrix of a checkpoint with its rows one behind the other, as bf16 or e4m3.
fn with_rows(matrix: &WeightMatrix<'_>, space: &mut Space, take: &mut TakePart<'_>) -> Result<()> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let part = match matrix.view()? {
        WeightRows::Bf16(values) if values.is_row_contiguous() => PartRows::Bf16(values),
        WeightRows::E4m3 { values, scales: WeightScales::Block(scales) } => {
            let [block_rows, block_cols] = [rows, cols].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
            let scales = MatrixRef::new(scales, block_rows, block_cols)?;
            let values = if values.is_row_contiguous() {
                values
            } else {
                space.e4m3 = (0..rows * cols).map(|at| values.get(at / cols, at % cols)).collect();
                MatrixRef::new(&space.e4m3, rows, cols)?
            };
            PartRows::E4m3 { values, scales }
        }
        WeightRows::E4m3 { scales: WeightScales::Row(_), .. } => {
            return Err(Error::usage("--device is a GPU, expected cpu: the e4m3 weights have one scale per row"));
        }
        WeightRows::Bf16(_) | WeightRows::F16(_) | WeightRows::F32(_) => {
            space.bf16 = matrix.to_bf16();
            PartRows::Bf16(MatrixRef::new(&space.bf16, rows, cols)?)
        }
    };
    Ok(take(part)?)
}
