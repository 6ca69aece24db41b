//! The experts alone, on rows that a dispatcher has expanded and sorted: no routing, no permute, no unpermute.
//!
//! Rows are read where they are. Each GEMM lists the tiles of `psum` itself.

use super::choice::{Carver, PART_BYTES, over_copy};
use super::{Biases, Layer, LayerWeights, Workspace};
use crate::backend::ExpandedRows;
use crate::cuda::activation::{Activate, ActivateCall};
use crate::cuda::arguments::BACKEND;
use crate::cuda::call::DeviceMatrix;
use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, Stream};
use crate::cuda::gemm::{GemmKernel, row_bytes};
use crate::cuda::grouped_gemm::{GroupedGemm, GroupedGemmCall, GroupedGemmShape, expected_rows};
use crate::cuda::list_tiles::Grouping;
use crate::cuda::quantize_rows::{QuantizeRows, QuantizeRowsCall, QuantizeRowsConfig};
use crate::cuda::weights::Weights;
use crate::dtype::Float;
use crate::error::{Error, Result, checked_mul};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK};
use crate::layer::{LayerConfig, LayerShape};
use crate::quantize::ScaleFormat;
use half::bf16;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExpandedCall {
    /// `M_sum`
    pub m_sum: usize,
    /// `A`: every expert's rows start on a multiple of it.
    pub alignment: usize,
    /// `[M_sum, H]`, row-major, 16-byte aligned: of the layer's input type, or e4m3 with scales.
    pub rows: DevicePtr,
    /// `[M_sum, ceil(H / 128)]` of e4m3 rows, any strides; as [`GroupedGemmCall::scales`]. Only where the layer's
    /// activations are e4m3.
    pub scales: Option<DeviceMatrix<f32>>,
    /// `[E]`: the end of each expert's rows; an expert without rows stores its start.
    pub psum: DevicePtr<i32>,
    /// How many rows are likely to be live: tiles are chosen for them, and results are the same for any number.
    /// [`expected_rows`] guesses.
    pub expected_rows: usize,
    /// `[M_sum, H]` bf16, 16-byte aligned. Only live rows are written.
    pub out: DevicePtr,
    /// [`crate::cuda::STATE_BYTES`], 16-byte aligned, initialised once. Any calls may share it.
    pub state: DevicePtr,
    /// [`ExpandedLayer::workspace_bytes`], 256-byte aligned, whatever is in it.
    pub workspace: DevicePtr,
}

/// The experts of a layer, prepared for rows that are in their places. A row has the bits that [`Layer`] gives it, unless
/// the layer [splits K](LayerConfig::split_k).
#[derive(Debug)]
pub struct ExpandedLayer {
    device: Device,
    shape: LayerShape,
    config: LayerConfig,
    weights: LayerWeights,
    /// Of rows in 16 bits, for e4m3 activations.
    quantize: Option<QuantizeRows>,
    gemm1: GroupedGemm,
    activate: Activate,
    gemm2: GroupedGemm,
}

/// What a call does. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExpandedChoice {
    /// How `[rows, H]` times `[2 I, H]` is cut.
    pub gemm1: GemmKernel,
    /// How `[rows, I]` times `[H, I]` is cut.
    pub gemm2: GemmKernel,
    /// Whether GEMM 1, and whether GEMM 2, reads the weights' [copy in e4m3](Weights::with_e4m3_copy).
    pub e4m3_copy: [bool; 2],
    /// Whether GEMM 1 stores activated, quantized rows, so that `gate | up` never reaches memory.
    pub activation_inside_gemm1: bool,
    /// Kernels that one call launches; of a layer of e4m3 activations one fewer, where rows come with scales.
    pub launches: usize,
}

impl fmt::Display for ExpandedChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gemm1, gemm2, e4m3_copy, activation_inside_gemm1, launches } = self;
        let [first, second] = e4m3_copy.map(over_copy);
        let inside = if *activation_inside_gemm1 { ", activation inside gemm1" } else { "" };
        write!(f, "gemm1 {gemm1}{first}{inside}, gemm2 {gemm2}{second}, {launches} launches")
    }
}

/// Where the parts of a call's workspace start.
struct Parts {
    lists: usize,
    front: usize,
    front_scales: usize,
    gate_up: usize,
    activated: usize,
    activated_scales: usize,
    end: usize,
}

impl ExpandedLayer {
    /// Of weights and biases as [`Layer::prepare_with_biases`] takes them, for calls of up to `max_rows` rows. Of the
    /// configuration what belongs to tokens is not looked at: `topk`, `ids`, `output`, `weight_on_input`.
    ///
    /// This is the warm-up: what such calls can choose is compiled (or loaded) here, and nothing afterwards.
    ///
    /// # Errors
    /// As [`Layer::prepare_with_biases`]; [`Error::Value`] for `max_rows` 0.
    pub fn prepare(
        device: &Device,
        weights: (Weights, Weights),
        biases: Biases,
        config: LayerConfig,
        max_rows: usize,
    ) -> Result<Self> {
        let (shape, weights) = LayerWeights::ready(device, weights, biases, &config)?;
        Self::with_weights(device, shape, weights, config, max_rows)
    }

    fn with_weights(
        device: &Device,
        shape: LayerShape,
        weights: LayerWeights,
        config: LayerConfig,
        max_rows: usize,
    ) -> Result<Self> {
        let activation_format = config.activation_format;
        let gemm = |weights: &Weights, before| {
            let (format, experts, n, k) = (weights.format(), weights.experts(), weights.n(), weights.k());
            let shape = GroupedGemmShape { format, activation_format, experts, n, k };
            GroupedGemm::prepare_with(device, shape, (before, weights.e4m3_copy().is_some()), max_rows)
        };
        // A bias comes before the activation.
        let before = weights.biases.b13.is_none().then_some(config.activation);
        let quantize = QuantizeRowsConfig { hidden: shape.hidden(), input: config.input, format: ScaleFormat::HOPPER };
        let quantize = (activation_format == ActivationFormat::E4m3).then(|| QuantizeRows::prepare(device, quantize));
        Ok(Self {
            device: device.clone(),
            shape,
            config,
            quantize: quantize.transpose()?,
            gemm1: gemm(&weights.w13, before)?,
            activate: Activate::prepare(device, config.activate(&shape))?,
            gemm2: gemm(&weights.w2, None)?,
            weights,
        })
    }

    /// The layer's sizes.
    #[must_use]
    pub fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// What it is specialised for.
    #[must_use]
    pub fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The most rows of a call.
    #[must_use]
    pub fn max_rows(&self) -> usize {
        self.gemm1.max_rows()
    }

    /// What a call does in which so many rows are expected.
    #[must_use]
    pub fn choice(&self, expected_rows: usize) -> ExpandedChoice {
        let activation_inside_gemm1 = self.gemm1.activates(expected_rows);
        ExpandedChoice {
            gemm1: self.gemm1.choice(expected_rows),
            gemm2: self.gemm2.choice(expected_rows),
            e4m3_copy: [&self.gemm1, &self.gemm2].map(|gemm| gemm.reads_copy(expected_rows)),
            activation_inside_gemm1,
            launches: 5 - usize::from(activation_inside_gemm1) + usize::from(self.quantize.is_some()),
        }
    }

    /// Bytes of workspace that a call of `m_sum` rows needs, a multiple of 256.
    ///
    /// # Errors
    /// [`Error::Value`] for more rows than it was prepared for, [`Error::Overflow`].
    pub fn workspace_bytes(&self, m_sum: usize) -> Result<usize> {
        Ok(self.parts(m_sum)?.end)
    }

    fn parts(&self, m_sum: usize) -> Result<Parts> {
        let (hidden, intermediate) = (self.shape.hidden(), self.shape.intermediate());
        let e4m3 = self.config.activation_format == ActivationFormat::E4m3;
        let rows =
            |width: usize, bytes: usize| checked_mul("bytes of rows", m_sum, checked_mul("width", width, bytes)?);
        let scales = |width: usize| match e4m3 {
            true => checked_mul("bytes of scales", ScaleFormat::HOPPER.words(m_sum, width)?, 4),
            false => Ok(0),
        };
        let grouping = Grouping::Psum { alignment: 1 };
        // Scales of a call's own rows may have any strides.
        let lists = |gemm: &GroupedGemm| gemm.workspace_bytes(m_sum, &grouping, e4m3);
        let mut carver = Carver::default();
        let lists = carver.part(lists(&self.gemm1)?.max(lists(&self.gemm2)?))?;
        let front = carver.part(if e4m3 { rows(hidden, 1)? } else { 0 })?;
        let front_scales = carver.part(scales(hidden)?)?;
        let gate_up = carver.part(rows(checked_mul("2 I", intermediate, 2)?, 2)?)?;
        let activated = carver.part(rows(intermediate, row_bytes(self.config.activation_format))?)?;
        let activated_scales = carver.part(scales(intermediate)?)?;
        Ok(Parts { lists, front, front_scales, gate_up, activated, activated_scales, end: carver.end() })
    }

    /// Readies the state of calls; once, before the first.
    ///
    /// # Safety
    /// As [`crate::cuda::Route::initialise_state`].
    ///
    /// # Errors
    /// As [`crate::cuda::Route::initialise_state`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_state(&self, stream: Stream, state: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.gemm1.initialise_state(stream, state) }
    }

    /// Queues the call: live rows of `out`, as [`ExpandedLayer::choice`] says.
    ///
    /// # Safety
    /// As [`GroupedGemm::launch`].
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Alignment`] and [`Error::Unsupported`] for what does not fit what was prepared, before
    /// anything is queued; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &ExpandedCall) -> Result<()> {
        let ExpandedCall { m_sum, alignment, rows, scales, psum, expected_rows, out, state, workspace } = *call;
        let parts = self.parts(m_sum)?;
        if m_sum == 0 {
            return Ok(());
        }
        workspace.require_aligned("workspace", PART_BYTES as u64)?;
        state.require_aligned("state", 16)?;
        rows.require_aligned("rows", 16)?;
        out.require_aligned("out", 16)?;
        psum.require_aligned("psum", 4)?;
        if alignment == 0 || i32::try_from(alignment).is_err() {
            return Err(Error::Alignment { actual: alignment, expected: format!("1 to {}", i32::MAX) });
        }
        if scales.is_some() && self.quantize.is_none() {
            let (argument, actual, backend) = ("scales", "given", BACKEND);
            return Err(Error::Unsupported { argument, actual, backend, expected: "none, for bf16 activations" });
        }
        if let Some(scales) = scales {
            scales.ptr.require_aligned("scales", 4)?;
        }
        let part = |offset: usize| workspace.byte_add(offset);
        let own_scales = |offset: usize, width: usize| hopper_scales(part(offset).cast(), m_sum, width);
        let (hidden, intermediate) = (self.shape.hidden(), self.shape.intermediate());
        let quantize = self.quantize.as_ref().filter(|_| scales.is_none());
        let (front, front_scales) = match quantize {
            Some(_) => (part(parts.front), Some(own_scales(parts.front_scales, hidden))),
            None => (rows, scales),
        };
        let activated_scales = self.quantize.is_some().then(|| own_scales(parts.activated_scales, intermediate));
        let LayerWeights { w13, w2, biases: Biases { b13, b2 }, .. } = &self.weights;
        let gemm = |weights, bias: &Option<Arc<DeviceBuffer<f32>>>, rows, scales, out| GroupedGemmCall {
            weights,
            rows,
            scales,
            bias: bias.as_deref().map(DeviceBuffer::ptr),
            out,
            m_sum,
            grouping: Grouping::Psum { alignment },
            list: psum,
            expected_rows,
            state,
            workspace: part(parts.lists),
        };
        let activate = ActivateCall {
            gate_up: part(parts.gate_up).cast(),
            psum,
            out: part(parts.activated),
            scales: activated_scales.map(|scales| scales.ptr.cast()),
            local_experts: self.shape.local_experts(),
            alignment,
            m_sum,
        };
        // SAFETY: the caller's promise; the parts were carved for this call, and each step's results are read by the
        // steps after it.
        unsafe {
            if let Some(quantize) = quantize {
                let ActivateCall { psum, local_experts, alignment, m_sum, .. } = activate;
                let scales = part(parts.front_scales);
                let call = QuantizeRowsCall { rows, psum, out: front, scales, local_experts, alignment, m_sum };
                quantize.launch(stream, &call)?;
            }
            if self.gemm1.activates(expected_rows) {
                let call = gemm(w13, b13, front, front_scales, part(parts.activated));
                self.gemm1.launch_with(stream, &call, activated_scales.map(|scales| scales.ptr))?;
            } else {
                self.gemm1.launch(stream, &gemm(w13, b13, front, front_scales, part(parts.gate_up)))?;
                self.activate.launch(stream, &activate)?;
            }
            self.gemm2.launch(stream, &gemm(w2, b2, part(parts.activated), activated_scales, out))
        }
    }

    /// Waits for the stream, and reports what was wrong with `psum` of calls since the last time.
    ///
    /// # Safety
    /// As [`GroupedGemm::check`].
    ///
    /// # Errors
    /// As [`GroupedGemm::check`].
    #[allow(unsafe_code)]
    pub unsafe fn check(&self, stream: Stream, state: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.gemm1.check(stream, state) }
    }
}

/// Scales in [`ScaleFormat::HOPPER`] as a matrix.
fn hopper_scales(ptr: DevicePtr<f32>, m_sum: usize, width: usize) -> DeviceMatrix<f32> {
    let groups = width.div_ceil(WEIGHT_BLOCK);
    let at = |row, group| ScaleFormat::HOPPER.word(row, group, m_sum, groups);
    DeviceMatrix { ptr, row_stride: at(1, 0), col_stride: at(0, 1) }
}

/// What a [`Layer`] has prepared for rows that are in their places: when a workspace for them is made.
#[derive(Debug, Default)]
pub(super) struct Expanded(Mutex<Option<Arc<ExpandedLayer>>>);

impl Expanded {
    fn get(&self) -> Option<Arc<ExpandedLayer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, layer: ExpandedLayer) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(layer));
    }
}

impl Layer {
    /// Its experts alone, for calls of up to `max_rows` rows that are in their places. Weights are shared.
    ///
    /// # Errors
    /// As [`ExpandedLayer::prepare`].
    pub fn expanded(&self, max_rows: usize) -> Result<ExpandedLayer> {
        ExpandedLayer::with_weights(self.device(), self.shape, self.weights.clone(), self.config, max_rows)
    }

    /// A workspace for [`Layer::run_expanded`] of up to `m_sum` rows, made ready. What such calls launch is compiled
    /// here, the first time.
    ///
    /// # Errors
    /// As [`Layer::expanded`]; [`Error::Cuda`].
    pub fn expanded_workspace(&self, m_sum: usize) -> Result<Workspace> {
        let known = self.expanded.get().filter(|layer| layer.max_rows() >= m_sum);
        if known.is_none() {
            self.expanded.set(self.expanded(m_sum.max(1))?);
        }
        let layer = self.prepared_for(m_sum)?;
        Workspace::new(self.device(), layer.workspace_bytes(m_sum)?)
    }

    fn prepared_for(&self, m_sum: usize) -> Result<Arc<ExpandedLayer>> {
        let known = self.expanded.get();
        let most = known.as_ref().map_or(0, |layer| layer.max_rows());
        known.filter(|_| m_sum <= most).ok_or_else(|| {
            Error::value("m_sum", m_sum, format!("at most {most}, for which expanded_workspace was asked"))
        })
    }

    /// Queues the experts alone on the default stream, on rows that are in their places: live rows of `out [M_sum, H]`.
    /// Their bits are those that [`Layer::run`] gives them before unpermute.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Dtype`], [`Error::Value`], [`Error::Alignment`] and [`Error::Device`] for
    /// what does not fit the layer or what [`Layer::expanded_workspace`] was asked for, before anything is queued;
    /// [`Error::Cuda`]. What is wrong with `psum` comes back from [`Layer::check`].
    #[allow(unsafe_code)]
    pub fn run_expanded<T: Float>(
        &self,
        rows: &ExpandedRows<'_, Device, T>,
        workspace: &mut Workspace,
        out: &DeviceBuffer<bf16>,
    ) -> Result<()> {
        let ExpandedRows { m_sum, alignment, rows, psum } = *rows;
        let (device, hidden, experts) = (self.device(), self.shape.hidden(), self.shape.local_experts());
        if T::DTYPE != self.config.input {
            let expected = self.config.input.as_prepared();
            return Err(Error::Dtype { argument: "rows", actual: T::DTYPE, expected });
        }
        if alignment == 0 {
            return Err(Error::Alignment { actual: 0, expected: "at least 1".into() });
        }
        if !m_sum.is_multiple_of(alignment) {
            return Err(Error::value("m_sum", m_sum, format!("a multiple of the alignment {alignment}")));
        }
        let layer = self.prepared_for(m_sum)?;
        let values = checked_mul("M_sum * H", m_sum, hidden)?;
        rows.require("rows", device, values)?;
        psum.require("psum", device, experts)?;
        out.require("out", device, values)?;
        workspace.memory().require("workspace", device, layer.workspace_bytes(m_sum)?)?;
        let call = ExpandedCall {
            m_sum,
            alignment,
            rows: rows.ptr().cast(),
            scales: None,
            psum: psum.ptr(),
            expected_rows: expected_rows(m_sum, experts, alignment),
            out: out.ptr().cast(),
            state: workspace.expanded_state(),
            workspace: workspace.memory().ptr(),
        };
        // SAFETY: every buffer is on this device and as large as the call reads or writes, as was checked. The default
        // stream orders the call before the buffers are freed or copied to, and the workspace is borrowed exclusively.
        unsafe { layer.launch(Stream(0), &call) }
    }

    /// The part of [`Layer::check`] that looks at calls whose rows came in their places.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn check_expanded(&self, workspace: &mut Workspace) -> Result<()> {
        let Some(layer) = self.expanded.get() else { return Ok(()) };
        // SAFETY: the state was made ready, is borrowed exclusively, and stream 0 always lives.
        unsafe { layer.check(Stream(0), workspace.expanded_state()) }
    }
}
