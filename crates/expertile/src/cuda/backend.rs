//! A CUDA device as a [`Backend`].

use super::arguments::BACKEND;
use super::driver::{Device, DeviceBuffer};
use super::layer::{Layer, LayerChoice, Workspace};
use super::weights::{Weights, WeightsBuilder};
use crate::backend::{self, Backend, ExpandedRows, ExpertLayer, LayerInputs};
use crate::dtype::{E4m3, Float};
use crate::error::{Error, Result};
use crate::gemm::WeightFormat;
use crate::int4::Int4Scales;
use crate::layer::{LayerConfig, LayerShape};
use crate::matrix::MatrixRef;
use bytemuck::Pod;
use half::bf16;

impl Backend for Device {
    type Buffer<T: Pod> = DeviceBuffer<T>;
    type Weights = Weights;
    type WeightsBuilder = WeightsBuilder;
    type Workspace = Workspace;
    type Layer = Layer;

    fn allocate<T: Pod>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        self.allocate(len)
    }

    fn upload<T: Pod>(&self, values: &[T]) -> Result<DeviceBuffer<T>> {
        self.upload(values)
    }

    fn download<T: Pod>(&self, buffer: &DeviceBuffer<T>, to: &mut [T]) -> Result<()> {
        buffer.download(to)
    }

    fn w13_builder(&self, format: WeightFormat, shape: &LayerShape) -> Result<WeightsBuilder> {
        WeightsBuilder::new(self, format, (shape.local_experts(), shape.w13_rows(), shape.hidden()))
    }

    fn w2_builder(&self, format: WeightFormat, shape: &LayerShape) -> Result<WeightsBuilder> {
        WeightsBuilder::new(self, format, (shape.local_experts(), shape.hidden(), shape.intermediate()))
    }

    fn prepare(&self, w13: Weights, w2: Weights, config: LayerConfig, max_tokens: usize) -> Result<Layer> {
        Layer::prepare(self, w13, w2, config, max_tokens)
    }
}

impl backend::WeightsBuilder for WeightsBuilder {
    type Weights = Weights;

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

    fn add_e4m3_channel_rows(&mut self, _: usize, _: usize, _: MatrixRef<'_, E4m3>, _: &[f32]) -> Result<()> {
        let (argument, actual) = ("scales", "one for each row of the weights");
        let expected = "one for each block of 128 x 128";
        Err(Error::Unsupported { argument, actual, backend: BACKEND, expected })
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

    fn finish(self) -> Result<Weights> {
        self.finish()
    }
}

impl ExpertLayer<Device> for Layer {
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

    fn workspace(&self, tokens: usize) -> Result<Workspace> {
        self.workspace(tokens)
    }

    fn run<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Device, T>,
        workspace: &mut Workspace,
        output: &mut DeviceBuffer<O>,
    ) -> Result<()> {
        self.run(inputs, workspace, output)
    }

    fn check(&self, workspace: &mut Workspace) -> Result<()> {
        self.check(workspace)
    }

    fn expanded_workspace(&self, m_sum: usize) -> Result<Workspace> {
        self.expanded_workspace(m_sum)
    }

    fn run_expanded<T: Float>(
        &self,
        rows: &ExpandedRows<'_, Device, T>,
        workspace: &mut Workspace,
        out: &mut DeviceBuffer<bf16>,
    ) -> Result<()> {
        self.run_expanded(rows, workspace, out)
    }
}
