//! The CPU as a [`Backend`]: buffers are vectors, and a call has run when it returns.

use super::workspace::{Carver, Sizing};
use super::{Cpu, Layer, LayerChoice, PackedWeights, PackedWeightsBuilder};
use crate::backend::{Backend, ExpandedRows, ExpertLayer, Ids, LayerInputs, WeightsBuilder};
use crate::dtype::{E4m3, Float};
use crate::error::{Error, Result, checked_add, checked_mul, require_len};
use crate::gemm::WeightFormat;
use crate::int4::Int4Scales;
use crate::layer::{LayerConfig, LayerShape};
use crate::layout::Layout;
use crate::matrix::MatrixRef;
use crate::routing::{Routing, TopkIds};
use bytemuck::Pod;
use half::bf16;

impl Backend for Cpu {
    type Buffer<T: Pod> = Vec<T>;
    type Weights = PackedWeights;
    type WeightsBuilder = PackedWeightsBuilder;
    type Workspace = Vec<u8>;
    type Layer = Layer;

    fn allocate<T: Pod>(&self, len: usize) -> Result<Vec<T>> {
        let bytes = checked_mul("bytes of a buffer", len, size_of::<T>())?;
        bytemuck::allocation::try_zeroed_vec(len).map_err(|()| Error::Memory { what: "buffer", bytes })
    }

    fn upload<T: Pod>(&self, values: &[T]) -> Result<Vec<T>> {
        let mut buffer = self.allocate(values.len())?;
        buffer.copy_from_slice(values);
        Ok(buffer)
    }

    fn download<T: Pod>(&self, buffer: &Vec<T>, to: &mut [T]) -> Result<()> {
        require_len("buffer", buffer.len(), to.len())?;
        to.copy_from_slice(&buffer[..to.len()]);
        Ok(())
    }

    fn w13_builder(&self, format: WeightFormat, shape: &LayerShape) -> Result<PackedWeightsBuilder> {
        let (experts, hidden, intermediate) = (shape.local_experts(), shape.hidden(), shape.intermediate());
        if shape.is_gated() {
            PackedWeightsBuilder::gate_up(self, format, experts, intermediate, hidden)
        } else {
            PackedWeightsBuilder::new(self, format, experts, intermediate, hidden)
        }
    }

    fn w2_builder(&self, format: WeightFormat, shape: &LayerShape) -> Result<PackedWeightsBuilder> {
        PackedWeightsBuilder::new(self, format, shape.local_experts(), shape.hidden(), shape.intermediate())
    }

    fn prepare(&self, w13: PackedWeights, w2: PackedWeights, config: LayerConfig, max_tokens: usize) -> Result<Layer> {
        Layer::prepare(self, w13, w2, config, max_tokens)
    }
}

impl WeightsBuilder for PackedWeightsBuilder {
    type Weights = PackedWeights;

    fn add_bf16_rows<T: Float>(&mut self, expert: usize, first_row: usize, rows: MatrixRef<'_, T>) -> Result<()> {
        self.add_bf16_rows(expert, first_row, rows)
    }

    fn add_e4m3_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: MatrixRef<'_, f32>,
    ) -> Result<()> {
        self.add_e4m3_rows(expert, first_row, rows, scales)
    }

    fn add_e4m3_channel_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        rows: MatrixRef<'_, E4m3>,
        scales: &[f32],
    ) -> Result<()> {
        self.add_e4m3_channel_rows(expert, first_row, rows, scales)
    }

    fn add_mxfp4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: MatrixRef<'_, u8>,
    ) -> Result<()> {
        self.add_mxfp4_rows(expert, first_row, blocks, scales)
    }

    fn add_int4_rows(
        &mut self,
        expert: usize,
        first_row: usize,
        blocks: MatrixRef<'_, u8>,
        scales: Int4Scales<'_>,
    ) -> Result<()> {
        self.add_int4_rows(expert, first_row, blocks, scales)
    }

    fn finish(self) -> Result<PackedWeights> {
        self.finish()
    }
}

/// The start of a buffer as a matrix; fails with the argument's name.
pub(super) fn matrix<'a, T: Copy>(
    argument: &'static str,
    values: &'a [T],
    rows: usize,
    cols: usize,
) -> Result<MatrixRef<'a, T>> {
    require_len(argument, values.len(), checked_mul(argument, rows, cols)?)?;
    MatrixRef::new(values, rows, cols)
}

/// Integers of a layout over a dispatcher's rows.
fn layout_len(layer: &Layer, m_sum: usize) -> Result<usize> {
    let lists = checked_mul("3 E", layer.shape().local_experts(), 3)?;
    checked_add("integers of a layout", lists, m_sum)
}

/// What [`ExpertLayer::run_expanded`] takes: the layout, and the layer's own workspace.
fn expanded_sizing(layer: &Layer, m_sum: usize) -> Result<Sizing> {
    Sizing::new().add::<i32>(layout_len(layer, m_sum)?)?.add::<u8>(layer.expanded_workspace_bytes(m_sum)?)
}

impl ExpertLayer<Cpu> for Layer {
    type Choice = LayerChoice;

    fn shape(&self) -> &LayerShape {
        self.shape()
    }

    fn config(&self) -> &LayerConfig {
        self.config()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens()
    }

    fn choice(&self, tokens: usize) -> Result<LayerChoice> {
        self.choice(tokens)
    }

    fn workspace_bytes(&self, tokens: usize) -> Result<usize> {
        self.workspace_bytes(tokens)
    }

    fn workspace(&self, tokens: usize) -> Result<Vec<u8>> {
        self.cpu().allocate(self.workspace_bytes(tokens)?)
    }

    fn run<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Cpu, T>,
        workspace: &mut Vec<u8>,
        output: &mut Vec<O>,
    ) -> Result<()> {
        let (experts, topk) = (self.shape().local_experts(), self.config().topk);
        inputs.check::<O>(self.config(), experts)?;
        let tokens = inputs.tokens;
        let ids = match inputs.topk_ids {
            Ids::I32(ids) => TopkIds::I32(matrix("topk_ids", ids, tokens, topk)?),
            Ids::I64(ids) => TopkIds::I64(matrix("topk_ids", ids, tokens, topk)?),
        };
        let hidden_states = matrix("hidden_states", inputs.hidden_states, tokens, self.shape().hidden())?;
        let topk_weights = matrix("topk_weights", inputs.topk_weights, tokens, topk)?;
        let routing = Routing::new(ids, experts, inputs.expert_map.map(Vec::as_slice))?;
        self.run(hidden_states, &routing, topk_weights, workspace, output)
    }

    /// A call of the CPU has reported everything when it returns.
    fn check(&self, _: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }

    fn expanded_workspace(&self, m_sum: usize) -> Result<Vec<u8>> {
        self.cpu().allocate(expanded_sizing(self, m_sum)?.bytes())
    }

    fn run_expanded<T: Float>(
        &self,
        rows: &ExpandedRows<'_, Cpu, T>,
        workspace: &mut Vec<u8>,
        out: &mut Vec<bf16>,
    ) -> Result<()> {
        let ExpandedRows { m_sum, alignment, rows, psum } = *rows;
        require_len("psum", psum.len(), self.shape().local_experts())?;
        let rows = matrix("rows", rows, m_sum, self.shape().hidden())?;
        let mut carver = Carver::new(workspace, expanded_sizing(self, m_sum)?.bytes())?;
        let space = carver.take(layout_len(self, m_sum)?);
        let workspace = carver.take(self.expanded_workspace_bytes(m_sum)?);
        let layout = Layout::from_psum(&psum[..self.shape().local_experts()], alignment, m_sum, space)?;
        self.run_expanded(rows, &layout, workspace, out)
    }
}
