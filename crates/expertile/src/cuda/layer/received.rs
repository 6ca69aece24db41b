//! Tokens that ranks have sent, with ids: rows as GEMM 1 reads them, with their scales, or as they are. From routing to GEMM 2 this is the
//! layer; combine takes its rows home.

use super::launch::{CheckedCall, each, prepared};
use super::{Layer, LayerCall, LayerChoice, LayerParts};
use crate::cuda::call::{DeviceMatrix, RoutingPtrs, RowsPtrs};
use crate::cuda::driver::{Device, DevicePtr, Stream};
use crate::cuda::permute::{Permute, PermuteCall, PermuteConfig};
use crate::cuda::route::{Route, RouteCall};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::gemm::ActivationFormat;
use crate::layer::Stage;
use crate::layout::Padding;
use crate::quantize::ScaleFormat;
use std::collections::HashMap;

/// Routing and permute of tokens that are quantized already. Others take the layer's own.
#[derive(Debug)]
pub(in crate::cuda) struct ReceivedEntry {
    quantized: Option<(HashMap<usize, Route>, Permute)>,
}

/// What was received.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct ReceivedCall {
    /// Of all ranks, whether they are there or not.
    pub(in crate::cuda) tokens: usize,
    /// `[tokens, H]`: e4m3 or bf16.
    pub(in crate::cuda) rows: DeviceMatrix,
    /// `[tokens, H / 128]` f32, of rows that are quantized already. Others are as the layer takes its own.
    pub(in crate::cuda) scales: Option<DeviceMatrix>,
    /// i32, with a map to the experts here.
    pub(in crate::cuda) routing: RoutingPtrs,
    /// As [`LayerCall::state`].
    pub(in crate::cuda) state: DevicePtr,
    /// As [`LayerCall::workspace`].
    pub(in crate::cuda) workspace: DevicePtr,
}

impl ReceivedEntry {
    pub(in crate::cuda) fn prepare(device: &Device, layer: &Layer) -> Result<Self> {
        if layer.config.activation_format == ActivationFormat::Bf16 {
            return Ok(Self { quantized: None });
        }
        let permute = PermuteConfig {
            topk: layer.config.topk,
            hidden: layer.shape.hidden(),
            dtype: Dtype::E4m3,
            scales: Some(ScaleFormat::HOPPER),
            padding: Padding::Untouched,
            alignment_bytes: 16,
        };
        let route = each(&layer.choices.row_tiles, |tile| Route::prepare(device, layer.config.route(tile)))?;
        Ok(Self { quantized: Some((route, Permute::prepare(device, permute)?)) })
    }

    /// # Safety
    /// As [`Layer::launch_received`].
    #[allow(unsafe_code)]
    unsafe fn launch(
        &self,
        layer: &Layer,
        stream: Stream,
        call: &CheckedCall<'_>,
        received: &ReceivedCall,
    ) -> Result<()> {
        let (Some((route, permute)), Some(scales)) = (&self.quantized, received.scales) else {
            // SAFETY: the caller's promise.
            return [Stage::Routing, Stage::Permute]
                .into_iter()
                .try_for_each(|stage| unsafe { layer.launch_stage(stream, call, stage) });
        };
        let ReceivedCall { rows, routing, state, workspace, .. } = *received;
        let (plan, LayerParts { layout, extra, front, front_scales, .. }) = (call.choice.plan, call.parts);
        let steps = RouteCall { plan, routing, layout, state, workspace };
        let rows = RowsPtrs {
            x: rows,
            x_scales: Some(scales),
            weights: None,
            out: front,
            scales: front_scales.map(DevicePtr::cast),
        };
        // SAFETY: the caller's promise.
        unsafe {
            prepared(route, &call.choice.row_tile).launch_with(stream, &steps, extra.as_ref())?;
            permute.launch(stream, &PermuteCall { plan, rows, layout })
        }
    }
}

impl Layer {
    /// Queues everything from routing to GEMM 2.
    ///
    /// # Safety
    /// As [`Layer::launch`], for what [`ReceivedCall`] names.
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn launch_received(
        &self,
        entry: &ReceivedEntry,
        stream: Stream,
        received: &ReceivedCall,
    ) -> Result<()> {
        let ReceivedCall { tokens, rows, routing, state, workspace, .. } = *received;
        let operands = LayerCall { tokens, hidden_states: rows, routing, state, workspace, ..LayerCall::default() };
        let (choice, offsets) = self.choose(tokens)?;
        let call = CheckedCall { choice, parts: offsets.at(workspace, &choice)?, operands: &operands };
        // SAFETY: the caller's promise.
        unsafe {
            entry.launch(self, stream, &call, received)?;
            [Stage::Gemm1, Stage::Activation, Stage::Gemm2]
                .into_iter()
                .try_for_each(|stage| self.launch_stage(stream, &call, stage))
        }
    }

    /// Launches of [`Layer::launch_received`], of tokens that are ready for GEMM 1, or not.
    pub(in crate::cuda) fn received_launches(&self, choice: &LayerChoice, ready: bool) -> usize {
        match ready {
            // Routing, permute, two GEMMs, and the activation unless it is inside.
            true => 5 - usize::from(choice.activation_inside_gemm1),
            // All but unpermute.
            false => choice.launches - 1,
        }
    }
}
