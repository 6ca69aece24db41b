//! One MoE layer as views of its tensors.

use crate::checkpoint::Checkpoint;
use crate::config::{Config, Family, Scoring};
use crate::error::{Error, Result};
use crate::tensors::Tensor;
use expertile::cpu::{Cpu, PackedWeights, PackedWeightsBuilder};
use expertile::gemm::WEIGHT_BLOCK;
use expertile::layer::LayerShape;
use expertile::{E4m3, MatrixRef, Router, WeightFormat};
use half::bf16;
use safetensors::Dtype;
use std::borrow::Cow;

/// One MoE layer of a checkpoint; weights stay in the mapped files until they are packed.
///
/// DeepSeek-V3's shared expert is a dense layer beside the routed experts and no part of this value.
#[derive(Debug)]
pub struct MoeLayer<'a> {
    shape: LayerShape,
    weight_format: WeightFormat,
    router: Router,
    router_weight: Vec<f32>,
    experts: Vec<Expert<'a>>,
}

/// The three matrices of one expert.
#[derive(Debug)]
pub struct Expert<'a> {
    /// `[I, H]`: what goes through the SiLU (Mixtral's `w1`).
    pub gate: WeightMatrix<'a>,
    /// `[I, H]` (Mixtral's `w3`).
    pub up: WeightMatrix<'a>,
    /// `[H, I]` (Mixtral's `w2`).
    pub down: WeightMatrix<'a>,
}

/// A weight matrix `[rows, cols]`, row-major.
#[derive(Debug)]
pub struct WeightMatrix<'a> {
    rows: usize,
    cols: usize,
    values: WeightValues<'a>,
}

/// The values of a weight matrix.
#[derive(Debug)]
pub enum WeightValues<'a> {
    /// bf16 (a copy only if the file does not align them).
    Bf16(Cow<'a, [bf16]>),
    /// e4m3 with f32 scales `[ceil(rows / 128), ceil(cols / 128)]`.
    E4m3 {
        /// The values.
        values: &'a [E4m3],
        /// One scale per block of 128 x 128; the weight is `value * scale`.
        scales: Vec<f32>,
    },
}

impl<'a> MoeLayer<'a> {
    pub(crate) fn read(checkpoint: &'a Checkpoint<'_>, layer: usize) -> Result<Self> {
        let config = checkpoint.config();
        let reader = Reader { checkpoint, config, prefix: prefix(config.family, layer) };
        let (router, router_weight) = reader.router(layer)?;
        let shape = LayerShape::new(config.hidden, config.intermediate, config.experts)
            .map_err(|source| Error::Router { file: config.file.clone(), source })?;
        let weight_format = reader.weight_format()?;
        let mut experts = Vec::new();
        for expert in 0..config.experts {
            experts.push(reader.expert(expert, weight_format)?);
        }
        Ok(Self { shape, weight_format, router, router_weight, experts })
    }

    /// `H`, `I` and the number of experts.
    #[must_use]
    pub fn shape(&self) -> LayerShape {
        self.shape
    }

    /// What all of the layer's weights are made of.
    #[must_use]
    pub fn weight_format(&self) -> WeightFormat {
        self.weight_format
    }

    /// How logits become a choice of experts.
    #[must_use]
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The router's weight `[experts, H]`, widened to f32: `logits = hidden_states * router_weight^T`.
    #[must_use]
    pub fn router_weight(&self) -> &[f32] {
        &self.router_weight
    }

    /// The experts, by id.
    #[must_use]
    pub fn experts(&self) -> &[Expert<'a>] {
        &self.experts
    }

    /// Packs the weights for the CPU: `w13 [E, 2 I, H]` (gate rows first) and `w2 [E, H, I]`.
    ///
    /// `progress` is told the number of experts that are done, after each. This is where the file is read, so the time it
    /// takes is the disk's unless the file is in memory already.
    ///
    /// # Errors
    /// [`Error::Pack`] with the library's reason; e4m3 asks for an `I` that is a multiple of 32.
    pub fn pack(&self, cpu: &Cpu, progress: &mut dyn FnMut(usize)) -> Result<(PackedWeights, PackedWeights)> {
        let (hidden, intermediate) = (self.shape.hidden(), self.shape.intermediate());
        let pack = |what: &str| {
            let what = what.to_owned();
            move |source| Error::Pack { what, source }
        };
        let count = self.experts.len();
        let builder = |n, k| PackedWeightsBuilder::new(self.weight_format, count, n, k);
        let mut w13 = builder(2 * intermediate, hidden).map_err(pack("w13"))?;
        let mut w2 = builder(hidden, intermediate).map_err(pack("w2"))?;
        for (id, expert) in self.experts.iter().enumerate() {
            expert.gate.pack(cpu, &mut w13, id, 0).map_err(pack(&format!("gate of expert {id}")))?;
            expert.up.pack(cpu, &mut w13, id, intermediate).map_err(pack(&format!("up of expert {id}")))?;
            expert.down.pack(cpu, &mut w2, id, 0).map_err(pack(&format!("down of expert {id}")))?;
            progress(id + 1);
        }
        Ok((w13.finish().map_err(pack("w13"))?, w2.finish().map_err(pack("w2"))?))
    }
}

impl WeightMatrix<'_> {
    /// Rows: outputs.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values.
    #[must_use]
    pub fn values(&self) -> &WeightValues<'_> {
        &self.values
    }

    fn pack(
        &self,
        cpu: &Cpu,
        builder: &mut PackedWeightsBuilder,
        expert: usize,
        first_row: usize,
    ) -> expertile::Result<()> {
        let Self { rows, cols, .. } = *self;
        match &self.values {
            WeightValues::Bf16(values) => {
                builder.pack_bf16_rows(cpu, expert, first_row, MatrixRef::new(values, rows, cols)?)
            }
            WeightValues::E4m3 { values, scales } => {
                let blocks = [rows, cols].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
                let scales = MatrixRef::new(scales, blocks[0], blocks[1])?;
                builder.pack_e4m3_rows(cpu, expert, first_row, MatrixRef::new(values, rows, cols)?, scales)
            }
        }
    }

    /// Writes row `row` as f64, scales applied; panics outside the matrix or if `out` is not one row long.
    pub fn write_row(&self, row: usize, out: &mut [f64]) {
        assert_eq!(out.len(), self.cols, "a row has {} values", self.cols);
        let own = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            WeightValues::Bf16(values) => {
                for (out, value) in out.iter_mut().zip(&values[own]) {
                    *out = value.to_f64();
                }
            }
            WeightValues::E4m3 { values, scales } => {
                let blocks = self.cols.div_ceil(WEIGHT_BLOCK);
                let scales = &scales[row / WEIGHT_BLOCK * blocks..][..blocks];
                for (col, (out, value)) in out.iter_mut().zip(&values[own]).enumerate() {
                    *out = f64::from(value.to_f32()) * f64::from(scales[col / WEIGHT_BLOCK]);
                }
            }
        }
    }
}

fn prefix(family: Family, layer: usize) -> String {
    match family {
        Family::Qwen3Moe | Family::DeepSeekV3 => format!("model.layers.{layer}.mlp"),
        Family::Mixtral => format!("model.layers.{layer}.block_sparse_moe"),
    }
}

/// Names of gate, up and down within an expert.
fn parts(family: Family) -> [&'static str; 3] {
    match family {
        Family::Qwen3Moe | Family::DeepSeekV3 => ["gate_proj", "up_proj", "down_proj"],
        Family::Mixtral => ["w1", "w3", "w2"],
    }
}

/// Finds and checks the tensors of one layer.
struct Reader<'a, 'c> {
    checkpoint: &'a Checkpoint<'c>,
    config: &'a Config,
    prefix: String,
}

impl<'a> Reader<'a, '_> {
    fn router(&self, layer: usize) -> Result<(Router, Vec<f32>)> {
        let Config { experts, hidden, topk, .. } = *self.config;
        let weight = match self.floats("gate.weight", &[experts, hidden]) {
            Err(Error::MissingTensor { .. }) if self.is_dense() => {
                let because = format!("there is a {}.gate_proj.weight", self.prefix);
                return Err(Error::DenseLayer { file: self.config.file.clone(), layer, because });
            }
            weight => weight?,
        };
        let router = match self.config.scoring {
            Scoring::Softmax { renormalize } => Router::Softmax { topk, renormalize },
            Scoring::Sigmoid { groups, topk_groups, renormalize, scaling_factor } => Router::Sigmoid {
                topk,
                correction_bias: self.floats("gate.e_score_correction_bias", &[experts])?,
                groups,
                topk_groups,
                renormalize,
                scaling_factor,
            },
        };
        // Routing no tokens checks everything that does not depend on them.
        MatrixRef::new(&[], 0, experts)
            .and_then(|no_logits| router.route(no_logits, &mut [], &mut []))
            .map_err(|source| Error::Router { file: self.config.file.clone(), source })?;
        Ok((router, weight))
    }

    /// Whether the layer has one dense block where others have experts.
    fn is_dense(&self) -> bool {
        let name = format!("{}.gate_proj.weight", self.prefix);
        self.checkpoint.tensor(&name, String::new).is_ok()
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let name = format!("{}.{name}", self.prefix);
        let tensor = self.checkpoint.tensor(&name, || format!("BF16, F16 or F32 {shape:?}"))?;
        tensor.require_shape(shape)?;
        tensor.to_f32()
    }

    /// The format of the first expert's first matrix, which all others must share.
    fn weight_format(&self) -> Result<WeightFormat> {
        let Config { hidden, intermediate, .. } = *self.config;
        let name = format!("{}.experts.0.{}.weight", self.prefix, parts(self.config.family)[0]);
        let tensor = self.checkpoint.tensor(&name, || format!("BF16 or F8_E4M3 [{intermediate}, {hidden}]"))?;
        match tensor.dtype {
            Dtype::BF16 => Ok(WeightFormat::Bf16),
            Dtype::F8_E4M3 => self.check_weight_block().map(|()| WeightFormat::E4m3),
            _ => Err(tensor.wrong_dtype("BF16 or F8_E4M3")),
        }
    }

    fn check_weight_block(&self) -> Result<()> {
        if self.config.weight_block.as_deref() == Some(&[WEIGHT_BLOCK, WEIGHT_BLOCK]) {
            return Ok(());
        }
        Err(Error::Config {
            file: self.config.file.clone(),
            key: "quantization_config.weight_block_size".into(),
            actual: self.config.weight_block.as_ref().map_or("missing".into(), |block| format!("{block:?}")),
            expected: format!("[{WEIGHT_BLOCK}, {WEIGHT_BLOCK}] (the weights are F8_E4M3)"),
        })
    }

    fn expert(&self, expert: usize, format: WeightFormat) -> Result<Expert<'a>> {
        let Config { hidden, intermediate, .. } = *self.config;
        let [gate, up, down] =
            parts(self.config.family).map(|part| format!("{}.experts.{expert}.{part}.weight", self.prefix));
        Ok(Expert {
            gate: self.matrix(&gate, intermediate, hidden, format)?,
            up: self.matrix(&up, intermediate, hidden, format)?,
            down: self.matrix(&down, hidden, intermediate, format)?,
        })
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize, format: WeightFormat) -> Result<WeightMatrix<'a>> {
        let dtype = match format {
            WeightFormat::Bf16 => Dtype::BF16,
            WeightFormat::E4m3 => Dtype::F8_E4M3,
        };
        let tensor = self.typed(name, dtype, &[rows, cols])?;
        let values = match format {
            WeightFormat::Bf16 => WeightValues::Bf16(tensor.bf16()?),
            WeightFormat::E4m3 => {
                let blocks = [rows.div_ceil(WEIGHT_BLOCK), cols.div_ceil(WEIGHT_BLOCK)];
                let scales = self.typed(&format!("{name}_scale_inv"), Dtype::F32, &blocks)?.to_f32()?;
                WeightValues::E4m3 { values: bytemuck::cast_slice(tensor.bytes), scales }
            }
        };
        Ok(WeightMatrix { rows, cols, values })
    }

    fn typed(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Tensor<'a>> {
        let tensor = self.checkpoint.tensor(name, || format!("{dtype} {shape:?}"))?;
        tensor.require_shape(shape)?;
        if tensor.dtype != dtype {
            return Err(tensor.wrong_dtype(dtype.to_string()));
        }
        Ok(tensor)
    }
}
