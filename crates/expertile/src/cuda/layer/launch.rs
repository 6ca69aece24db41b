//! What a call of the layer launches, stage by stage.

use super::choice::{LayerChoice, LayerParts};
use super::{Biases, Layer, LayerCall, LayerWeights};
use crate::cuda::activation::ActivateCall;
use crate::cuda::arguments::{RouteExtra, require_columns};
use crate::cuda::call::{DeviceMatrix, RoutingPtrs, RowsPtrs};
use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, Stream};
use crate::cuda::few_tokens::FewTokensCall;
use crate::cuda::gemm::{GemmCall, JoinedCall, RowEnds};
use crate::cuda::permute::{Permute, PermuteCall, PermuteConfig};
use crate::cuda::quantize_permute::{QuantizePermute, QuantizePermuteCall};
use crate::cuda::route::{Route, RouteCall};
use crate::cuda::route_permute::{RoutePermute, RoutePermuteConfig};
use crate::cuda::unpermute::UnpermuteCall;
use crate::cuda::weights::Weights;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::ActivationFormat;
use crate::layer::{LayerConfig, LayerShape, Stage};
use crate::layout::Padding;
use std::collections::HashMap;
use std::hash::Hash;

/// The steps from hidden states to rows in their places, one for each row tile: kernels are shared.
#[derive(Debug)]
pub(super) enum Entry {
    /// Quantized, routing included.
    Quantized(HashMap<usize, QuantizePermute>),
    /// As they are: routing included where the slots are few, else after it.
    Plain { few: HashMap<usize, RoutePermute>, route: HashMap<usize, Route>, permute: Box<Permute> },
}

/// A call, checked, and where the parts of its workspace are.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct CheckedCall<'a> {
    pub(super) choice: LayerChoice,
    pub(super) parts: LayerParts,
    pub(super) operands: &'a LayerCall,
}

impl Layer {
    /// Whether a stage has launches of its own: routing is part of permute but where many rows stay as they are, the
    /// activation may be of GEMM 1, and so may all that a call does.
    pub(in crate::cuda) fn has_stage(&self, call: &CheckedCall<'_>, stage: Stage) -> bool {
        match stage {
            _ if call.choice.one_launch.is_some() => stage == Stage::Gemm1,
            Stage::Routing => self.entry.routes_apart(&call.choice),
            Stage::Activation => !call.choice.activation_inside_gemm1 && !call.choice.joined,
            Stage::Gemm2 => !call.choice.joined,
            Stage::Shared => false,
            _ => true,
        }
    }

    /// Checks everything that a call's launches ask for.
    pub(in crate::cuda) fn call<'a>(&self, operands: &'a LayerCall) -> Result<CheckedCall<'a>> {
        let LayerCall { tokens, hidden_states, routing, topk_weights, output, state, workspace } = operands;
        let (choice, offsets) = self.choose(*tokens)?;
        let call = CheckedCall { choice, parts: offsets.at(*workspace, &choice)?, operands };
        state.require_aligned("state", 16)?;
        self.check_routing(routing)?;
        if *tokens > 0 {
            output.require_aligned("output", 16)?;
            check_matrix("hidden_states", hidden_states, self.shape.hidden(), *tokens, (2, 16))?;
            check_matrix("topk_weights", topk_weights, self.config.topk, *tokens, (4, 4))?;
            routing.ids.ptr.require_aligned("topk_ids", self.config.ids.bytes() as u64)?;
        }
        Ok(call)
    }

    fn check_routing(&self, routing: &RoutingPtrs) -> Result<()> {
        let (experts, global) = (self.shape.local_experts(), self.config.global_experts);
        if routing.global_experts != global {
            return Err(Error::value("global_experts", routing.global_experts, format!("{global}, as prepared")));
        }
        if routing.expert_map.is_none() && global != experts {
            return Err(Error::value("global_experts", global, format!("{experts} without an expert map")));
        }
        if let Some(map) = routing.expert_map {
            map.require_aligned("expert_map", 4)?;
        }
        Ok(())
    }

    /// Queues one stage of a call.
    ///
    /// # Safety
    /// As [`Layer::launch`]; the stages before it were queued.
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn launch_stage(
        &self,
        stream: Stream,
        call: &CheckedCall<'_>,
        stage: Stage,
    ) -> Result<()> {
        if call.choice.plan.tokens() == 0 || !self.has_stage(call, stage) {
            return Ok(());
        }
        // SAFETY: the caller's promise; the parts were carved for this call.
        unsafe {
            match stage {
                Stage::Gemm1 if let Some(most) = call.choice.one_launch => self.whole(stream, call, most),
                Stage::Routing => self.entry.route(stream, call),
                // No layer on a GPU has one.
                Stage::Shared => Ok(()),
                Stage::Permute => self.entry.permute(stream, call),
                Stage::Gemm1 if call.choice.joined => self.joined(stream, call),
                Stage::Gemm1 => self.gemm1(stream, call),
                Stage::Activation => self.activate.launch(stream, &call.activation(self.shape.local_experts())),
                Stage::Gemm2 => self.gemm2(stream, call),
                Stage::Unpermute => self.unpermute.launch(stream, &call.unpermute()),
            }
        }
    }

    /// The whole call, by a kernel for up to `most_tokens` tokens.
    ///
    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn whole(&self, stream: Stream, call: &CheckedCall<'_>, most_tokens: usize) -> Result<()> {
        let LayerCall { hidden_states, routing, topk_weights, output, state, workspace, .. } = *call.operands;
        let LayerParts { layout, gate_up, .. } = call.parts;
        let whole = FewTokensCall {
            route: RouteCall { plan: call.choice.plan, routing, layout, state, workspace },
            hidden_states,
            topk_weights,
            w13: &self.weights.w13,
            w2: &self.weights.w2,
            biases: [&self.weights.biases.b13, &self.weights.biases.b2]
                .map(|bias| bias.as_deref().map(DeviceBuffer::ptr)),
            gate_up,
            output,
        };
        // SAFETY: the caller's promise.
        unsafe { prepared(&self.few_tokens, &most_tokens).launch(stream, &whole) }
    }

    /// Both GEMMs and the activation.
    ///
    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn joined(&self, stream: Stream, call: &CheckedCall<'_>) -> Result<()> {
        let LayerParts { layout, front, front_scales, gate_up, activated, activated_scales, back, extra } = call.parts;
        let Some(RouteExtra::Counters { counters, .. }) = extra else { unreachable!("`Offsets::at` carves them") };
        let LayerWeights { w13, w2, biases: Biases { b13, b2 } } = &self.weights;
        let [copy1, copy2] = call.choice.e4m3_copy;
        let gemms = JoinedCall {
            weights: [w13.read_by(copy1), w2.read_by(copy2)],
            biases: [b13, b2].map(|bias| bias.as_deref().map(DeviceBuffer::ptr)),
            rows: [front, activated],
            scales: [front_scales, activated_scales],
            out: [gate_up, back],
            layout,
            m_sum: call.choice.plan.m_sum(),
            counters,
        };
        // SAFETY: the caller's promise.
        unsafe { prepared(&self.joined, &call.choice.first()).launch(stream, &gemms) }
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn gemm1(&self, stream: Stream, call: &CheckedCall<'_>) -> Result<()> {
        let LayerParts { front, front_scales, activated, activated_scales, back, .. } = call.parts;
        let inside = call.choice.activation_inside_gemm1;
        let (out, out_scales) = if inside { (activated, activated_scales) } else { (back.cast(), None) };
        let LayerWeights { w13, biases: Biases { b13, .. }, .. } = &self.weights;
        let w13 = w13.read_by(call.choice.e4m3_copy[0]);
        let gemm = call.gemm((w13, b13.as_deref()), (front, front_scales), (out, out_scales));
        // SAFETY: the caller's promise.
        unsafe { prepared(&self.gemms, &call.choice.first()).launch(stream, &gemm) }
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn gemm2(&self, stream: Stream, call: &CheckedCall<'_>) -> Result<()> {
        let LayerParts { activated, activated_scales, back, extra, .. } = &call.parts;
        let LayerWeights { w2, biases: Biases { b2, .. }, .. } = &self.weights;
        let w2 = w2.read_by(call.choice.e4m3_copy[1]);
        let mut gemm = call.gemm((w2, b2.as_deref()), (*activated, *activated_scales), (back.cast(), None));
        if let Some(second) = extra.as_ref().and_then(RouteExtra::second_worklist) {
            (gemm.header, gemm.worklist) = (second.header, second.worklist);
        }
        // SAFETY: the caller's promise.
        unsafe { prepared(&self.gemms, &call.choice.second()).launch(stream, &gemm) }
    }
}

impl Entry {
    pub(super) fn prepare(
        device: &Device,
        shape: &LayerShape,
        config: &LayerConfig,
        row_tiles: &[usize],
    ) -> Result<Self> {
        if config.activation_format == ActivationFormat::E4m3 {
            let prepare = |tile| QuantizePermute::prepare(device, config.quantize_permute(shape, tile));
            return Ok(Self::Quantized(each(row_tiles, prepare)?));
        }
        let permute = PermuteConfig {
            topk: config.topk,
            hidden: shape.hidden(),
            dtype: Dtype::Bf16,
            scales: None,
            padding: Padding::Untouched,
            alignment_bytes: 16,
        };
        let few = |tile| {
            let route = config.route(tile);
            let (hidden, input, padding) = (shape.hidden(), Dtype::Bf16, Padding::Untouched);
            let (scales, weighted, aligned) = (None, false, true);
            RoutePermute::prepare(
                device,
                RoutePermuteConfig { route, hidden, input, scales, padding, weighted, aligned },
            )
        };
        Ok(Self::Plain {
            few: each(row_tiles, few)?,
            route: each(row_tiles, |tile| Route::prepare(device, config.route(tile)))?,
            permute: Box::new(Permute::prepare(device, permute)?),
        })
    }

    /// Whether the routing has a launch of its own.
    fn routes_apart(&self, choice: &LayerChoice) -> bool {
        match self {
            Self::Quantized(_) => false,
            Self::Plain { few, .. } => few.get(&choice.row_tile).is_some_and(|few| !few.takes(&choice.plan)),
        }
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn route(&self, stream: Stream, call: &CheckedCall<'_>) -> Result<()> {
        let Self::Plain { route, .. } = self else { return Ok(()) };
        let LayerCall { routing, state, workspace, .. } = *call.operands;
        let LayerParts { layout, extra, .. } = &call.parts;
        let steps = RouteCall { plan: call.choice.plan, routing, layout: *layout, state, workspace };
        // SAFETY: the caller's promise.
        unsafe { prepared(route, &call.choice.row_tile).launch_with(stream, &steps, extra.as_ref()) }
    }

    /// # Safety
    /// As [`Layer::launch_stage`].
    #[allow(unsafe_code)]
    unsafe fn permute(&self, stream: Stream, call: &CheckedCall<'_>) -> Result<()> {
        let LayerChoice { plan, row_tile, .. } = call.choice;
        let LayerCall { routing, state, workspace, .. } = *call.operands;
        let LayerParts { layout, extra, .. } = call.parts;
        let rows = call.rows();
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Quantized(steps) => {
                    let call = QuantizePermuteCall { plan, routing, rows, layout, state, workspace };
                    prepared(steps, &row_tile).launch_with(stream, &call, extra.as_ref())
                }
                Self::Plain { permute, .. } if self.routes_apart(&call.choice) => {
                    permute.launch(stream, &PermuteCall { plan, rows, layout })
                }
                Self::Plain { few, .. } => {
                    let call = RouteCall { plan, routing, layout, state, workspace };
                    prepared(few, &row_tile).launch(stream, &call, &rows, extra.as_ref())
                }
            }
        }
    }
}

impl CheckedCall<'_> {
    fn rows(&self) -> RowsPtrs {
        RowsPtrs {
            x: self.operands.hidden_states,
            x_scales: None,
            weights: Some(self.operands.topk_weights),
            out: self.parts.front,
            scales: self.parts.front_scales.map(DevicePtr::cast),
        }
    }

    /// A GEMM over GEMM 1's worklist.
    fn gemm<'w>(
        &self,
        (weights, bias): (&'w Weights, Option<&DeviceBuffer<f32>>),
        (rows, scales): (DevicePtr, Option<DevicePtr<f32>>),
        (out, out_scales): (DevicePtr, Option<DevicePtr<f32>>),
    ) -> GemmCall<'w> {
        let LayerParts { layout, .. } = self.parts;
        GemmCall {
            weights,
            rows,
            scales,
            out,
            out_scales,
            bias: bias.map(DeviceBuffer::ptr),
            header: layout.header,
            worklist: layout.worklist,
            ends: RowEnds::Psum(layout.psum),
            m_sum: self.choice.plan.m_sum(),
        }
    }

    fn activation(&self, local_experts: usize) -> ActivateCall {
        let LayerParts { layout, activated, activated_scales, back, .. } = self.parts;
        let plan = &self.choice.plan;
        ActivateCall {
            gate_up: back,
            psum: layout.psum,
            out: activated,
            scales: activated_scales.map(DevicePtr::cast),
            local_experts,
            alignment: plan.alignment(),
            m_sum: plan.m_sum(),
        }
    }

    fn unpermute(&self) -> UnpermuteCall {
        UnpermuteCall {
            rows: self.parts.back.cast(),
            inv_perm: self.parts.layout.inv_perm,
            weights: Some(self.operands.topk_weights),
            out: self.operands.output,
            tokens: self.choice.plan.tokens(),
            m_sum: self.choice.plan.m_sum(),
        }
    }
}

/// Fails unless a matrix has its columns next to each other and its rows where kernels read them.
fn check_matrix<T>(
    argument: &'static str,
    matrix: &DeviceMatrix<T>,
    cols: usize,
    rows: usize,
    (element_bytes, row_bytes): (usize, usize),
) -> Result<()> {
    matrix.ptr.require_aligned(argument, row_bytes as u64)?;
    require_columns(argument, matrix, cols)?;
    if rows > 1 && !(matrix.row_stride * element_bytes).is_multiple_of(row_bytes) {
        let actual = vec![matrix.row_stride, matrix.col_stride];
        return Err(Error::Stride { argument, actual, expected: format!("rows {row_bytes} bytes apart") });
    }
    Ok(())
}

pub(super) fn each<K: Copy + Eq + Hash, V>(keys: &[K], prepare: impl Fn(K) -> Result<V>) -> Result<HashMap<K, V>> {
    keys.iter().map(|&key| Ok((key, prepare(key)?))).collect()
}

/// What `choices` found has been prepared, and a call chooses nothing else.
pub(super) fn prepared<'a, K: Eq + Hash, V>(all: &'a HashMap<K, V>, key: &K) -> &'a V {
    all.get(key).expect("every choice of up to max_tokens tokens is prepared")
}
