//! A call's five parts, and what was wrong with calls.

use super::kernels::{CombineArgs, DispatchArgs, MAX_WINDOWS, RankArgs, Way};
use super::window::token_bytes;
use super::{ExpertParallelLayer, Link};
use crate::cuda::arguments::{require_columns, require_int};
use crate::cuda::call::{DeviceMatrix, RoutingPtrs};
use crate::cuda::driver::{DevicePtr, Stream};
use crate::cuda::layer::ReceivedCall;
use crate::cuda::nccl::Nccl;
use crate::cuda::route;
use crate::error::{Error, Result};
use crate::gemm::ActivationFormat;
use crate::layer::LayerConfig;

/// The kernels' `RankState` without faults, and a `Fault`.
const STATE_BYTES: usize = 32;
const FAULT_BYTES: usize = 16;
const ABSENT: usize = 2;

/// Bytes of the state that kernels keep between calls.
pub(super) fn state_bytes(ranks: usize) -> usize {
    STATE_BYTES + ranks * FAULT_BYTES
}

/// What one call works on: this rank's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExpertParallelCall {
    /// `M`, of this rank; 0 is a call like any other.
    pub tokens: usize,
    /// The most tokens that any rank brings to this call: the same number on all of them, at most what the layer was
    /// prepared for. All that a call does is as large as this asks for.
    pub capacity: usize,
    /// `[M, H]`; columns next to each other, every row on 16 bytes.
    pub hidden_states: DeviceMatrix,
    /// `[M, topk]`: global, i32 or i64 as prepared.
    pub topk_ids: DeviceMatrix,
    /// `[M, topk]`; columns next to each other.
    pub topk_weights: DeviceMatrix<f32>,
    /// `[M, H]`, row-major, 16-byte aligned.
    pub output: DevicePtr,
    /// [`super::STATE_BYTES`](crate::cuda::STATE_BYTES), 16-byte aligned, initialised once by
    /// [`Layer::initialise_state`](crate::cuda::Layer::initialise_state). Calls that share it follow each other.
    pub state: DevicePtr,
    /// [`ExpertParallelLayer::workspace_bytes`] of the capacity, 256-byte aligned, whatever is in it.
    pub workspace: DevicePtr,
}

/// A rank that has taken another capacity for the call's.
pub(super) fn disagreement(rank: usize, its: u32, own: u32) -> Error {
    Error::Disagreement { argument: "capacity", rank, actual: its.to_string(), expected: own.to_string() }
}

impl ExpertParallelLayer {
    /// Queues the whole call: `output`, every element. Nothing is waited for on the host, but for
    /// [`Dispatch::Routed`](crate::Dispatch::Routed) over NCCL.
    ///
    /// # Safety
    /// As [`Layer::launch`](crate::cuda::Layer::launch). Every rank makes the call; ranks that share a GPU queue its
    /// parts by turns instead, or one waits for what the other can no longer start.
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Stride`] for what does not fit the layer or the kernels, before anything is queued;
    /// [`Error::Cuda`], [`Error::Nccl`]. A rank that gets an error here has not taken part in the call, and the others
    /// will find it absent.
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        self.check_call(call)?;
        // SAFETY: the caller's promise.
        unsafe {
            self.dispatch(stream, call)?;
            self.experts(stream, call)?;
            self.combine_send(stream, call)?;
            self.combine_receive(stream, call)
        }
    }

    /// The first two parts; where windows are mapped, in one launch.
    ///
    /// # Safety
    /// As [`ExpertParallelLayer::launch`].
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub unsafe fn dispatch(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        self.check_call(call)?;
        // SAFETY: the caller's promise; the window, the state and the tables are the layer's own.
        unsafe {
            if self.link.is_mapped() {
                return self.kernels.dispatch(stream, self.is_plain(call.capacity), &self.dispatch_args(call)?);
            }
            self.dispatch_send(stream, call)?;
            self.dispatch_receive(stream, call)
        }
    }

    /// Fails for what does not fit the layer or the kernels.
    fn check_call(&self, call: &ExpertParallelCall) -> Result<()> {
        let ExpertParallelCall { tokens, capacity, hidden_states, topk_ids, topk_weights, output, state, workspace } =
            call;
        LayerConfig::require_tokens(*capacity, self.choice.capacity)?;
        if *capacity == 0 {
            return Err(Error::value("capacity", 0, "at least 1"));
        }
        if tokens > capacity {
            return Err(Error::value("tokens", *tokens, format!("at most {capacity}, the call's capacity")));
        }
        state.require_aligned("state", 16)?;
        workspace.require_aligned("workspace", 256)?;
        if *tokens == 0 {
            return Ok(());
        }
        output.require_aligned("output", 16)?;
        hidden_states.ptr.require_aligned("hidden_states", 16)?;
        require_columns("hidden_states", hidden_states, self.shape().hidden())?;
        if *tokens > 1 && !(hidden_states.row_stride * 2).is_multiple_of(16) {
            let actual = vec![hidden_states.row_stride, hidden_states.col_stride];
            let expected = "rows 16 bytes apart".into();
            return Err(Error::Stride { argument: "hidden_states", actual, expected });
        }
        topk_ids.ptr.require_aligned("topk_ids", self.config.ids.bytes() as u64)?;
        topk_weights.ptr.require_aligned("topk_weights", 4)?;
        require_columns("topk_weights", topk_weights, self.config.topk)
    }

    fn rank_args(&self, call: &ExpertParallelCall) -> Result<RankArgs> {
        let mut windows = [0; MAX_WINDOWS];
        let row = self.token_row(call.capacity);
        let row_bytes = self.parts.row_bytes(row);
        // Behind a rank's first row, where one collective moves both.
        let (headers_at, header_bytes) = match self.parts.way {
            Way::Gathered => (self.parts.rows + row.bytes(), call.capacity * row_bytes),
            Way::Stored | Way::Counted => (self.parts.headers, self.parts.header_bytes),
        };
        let outgoing = self.window.ptr().byte_add(self.parts.outgoing).address();
        let counted = self.counted.as_ref();
        windows.iter_mut().zip(&self.windows).for_each(|(to, window)| *to = window.address());
        Ok(RankArgs {
            state: self.state.ptr().address(),
            limit_ns: u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX),
            ranks: require_int("ranks", self.choice.ranks)?,
            rank: require_int("rank", self.exchange.rank())?,
            tokens: require_int("tokens", call.tokens)?,
            capacity: require_int("capacity", call.capacity)?,
            headers_at: headers_at as i64,
            header_bytes: header_bytes as i64,
            rows_at: self.parts.rows as i64,
            returned_at: self.parts.returned as i64,
            outgoing: if self.link.is_mapped() { 0 } else { outgoing },
            copies: counted.map_or(0, |counted| counted.copies.ptr().address()),
            places: counted.map_or(0, |counted| counted.places.ptr().address()),
            slot_places: counted.map_or(0, |counted| counted.slot_places.ptr().address()),
            row_bytes: require_int("bytes of a token's row", row_bytes)?,
            copies_at: row.copies().start as i32,
            weights_at: row.weights().start as i32,
            place_at: row.bytes() as i32,
            windows,
        })
    }

    fn dispatch_args(&self, call: &ExpertParallelCall) -> Result<DispatchArgs> {
        Ok(DispatchArgs {
            ranks: self.rank_args(call)?,
            x: call.hidden_states.ptr.address(),
            x_row_stride: call.hidden_states.row_stride as i64,
            ids: call.topk_ids.ptr.address(),
            ids_row_stride: call.topk_ids.row_stride as i64,
            ids_col_stride: call.topk_ids.col_stride as i64,
            weights: call.topk_weights.ptr.address(),
            weights_row_stride: call.topk_weights.row_stride as i64,
            first_choice: self.tables.first_choice.ptr().address(),
            choices: self.tables.choices.ptr().address(),
            copy_ranks: self.tables.copy_ranks.ptr().address(),
            experts: require_int("global_experts", self.config.global_experts)?,
            reserved: 0,
        })
    }

    fn combine_args(&self, call: &ExpertParallelCall) -> Result<CombineArgs> {
        let tokens = self.choice.ranks * call.capacity;
        let plan = self.layer.choice(tokens)?.plan;
        let parts = self.layer.parts(tokens, call.workspace)?;
        Ok(CombineArgs {
            ranks: self.rank_args(call)?,
            rows: parts.back.address(),
            inv_perm: parts.layout.inv_perm.address(),
            copy_ranks: self.tables.copy_ranks.ptr().address(),
            weights: call.topk_weights.ptr.address(),
            weights_row_stride: call.topk_weights.row_stride as i64,
            out: call.output.address(),
            m_sum: require_int("m_sum", plan.m_sum())?,
            reserved: 0,
        })
    }

    /// The call's first part: this rank's tokens to all ranks, quantized if the layer's are. Waits for nobody.
    ///
    /// # Safety
    /// As [`ExpertParallelLayer::launch`]; the parts of a call follow each other on one stream.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub unsafe fn dispatch_send(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        self.check_call(call)?;
        // SAFETY: the caller's promise; the window, the state and the tables are the layer's own.
        unsafe {
            self.require_no_graph(stream)?;
            self.kernels.dispatch_send(stream, self.is_plain(call.capacity), &self.dispatch_args(call)?)
        }
    }

    /// The second part: waits for all ranks' tokens.
    ///
    /// # Safety
    /// As [`ExpertParallelLayer::dispatch_send`].
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub unsafe fn dispatch_receive(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        self.check_call(call)?;
        // SAFETY: the caller's promise, as in `dispatch_send`.
        unsafe {
            match (&self.link, &self.counted) {
                (Link::Nccl(nccl), Some(counted)) => self.move_counted_tokens(nccl, stream, call, counted)?,
                (Link::Nccl(nccl), None) => self.move_tokens(nccl, stream, call.capacity)?,
                (Link::Mapped, _) => {}
            }
            self.kernels.dispatch_receive(stream, self.is_plain(call.capacity), &self.dispatch_args(call)?)
        }
    }

    /// The third part: the experts here over all ranks' tokens, from routing to GEMM 2.
    ///
    /// # Safety
    /// As [`ExpertParallelLayer::dispatch_send`].
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub unsafe fn experts(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        self.check_call(call)?;
        let row = self.token_row(call.capacity);
        let rows = self.window.ptr().byte_add(self.parts.rows);
        let row_bytes = self.parts.row_bytes(row);
        let value_bytes = if row.activation_format() == ActivationFormat::E4m3 { 1 } else { 2 };
        let matrix = |at: usize, bytes: usize| DeviceMatrix {
            ptr: rows.byte_add(at),
            row_stride: row_bytes / bytes,
            col_stride: 1,
        };
        let received = ReceivedCall {
            tokens: self.choice.ranks * call.capacity,
            rows: matrix(0, value_bytes),
            scales: (row.activation_format() == ActivationFormat::E4m3).then(|| matrix(row.scales().start, 4)),
            routing: RoutingPtrs {
                ids: matrix(row.copies().start, 4),
                expert_map: Some(self.tables.copy_map.ptr()),
                global_experts: self.parallel.placement.copies(),
            },
            state: call.state,
            workspace: call.workspace,
        };
        // SAFETY: the caller's promise; the window holds rows of as many tokens.
        unsafe { self.layer.launch_received(&self.entry, stream, &received) }
    }

    /// The fourth part: results to the tokens' own ranks. Waits for nobody.
    ///
    /// # Safety
    /// As [`ExpertParallelLayer::dispatch_send`].
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub unsafe fn combine_send(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        self.check_call(call)?;
        // SAFETY: the caller's promise.
        unsafe {
            self.kernels.combine_send(stream, &self.combine_args(call)?)?;
            match (&self.link, &self.counted) {
                (Link::Nccl(nccl), Some(counted)) => self.move_counted_results(nccl, stream, call.capacity, counted),
                (Link::Nccl(nccl), None) => self.move_results(nccl, stream, call.capacity),
                (Link::Mapped, _) => Ok(()),
            }
        }
    }

    /// The last part: waits for results of all ranks, and sums each token's.
    ///
    /// # Safety
    /// As [`ExpertParallelLayer::dispatch_send`].
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub unsafe fn combine_receive(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        self.check_call(call)?;
        // SAFETY: the caller's promise.
        unsafe { self.kernels.combine_receive(stream, &self.combine_args(call)?) }
    }

    /// Tokens of all ranks, with their headers, in place.
    ///
    /// # Safety
    /// As [`Nccl::all_gather`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn move_tokens(&self, nccl: &Nccl, stream: Stream, capacity: usize) -> Result<()> {
        let start = self.window.ptr().byte_add(self.parts.rows).address();
        let bytes = capacity * self.parts.row_bytes(self.token_row(capacity));
        // SAFETY: the caller's promise.
        unsafe { nccl.all_gather(stream, start, bytes) }
    }

    /// Headers of all ranks that stand by themselves, in place.
    ///
    /// # Safety
    /// As [`Nccl::all_gather`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn move_headers(&self, nccl: &Nccl, stream: Stream) -> Result<()> {
        let start = self.window.ptr().byte_add(self.parts.headers).address();
        // SAFETY: the caller's promise.
        unsafe { nccl.all_gather(stream, start, self.parts.header_bytes) }
    }

    /// Each rank's results.
    ///
    /// # Safety
    /// As [`Nccl::all_gather`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn move_results(&self, nccl: &Nccl, stream: Stream, capacity: usize) -> Result<()> {
        let at = |offset: usize| self.window.ptr().byte_add(offset).address();
        let bytes = capacity * token_bytes(&self.choice)?;
        let (outgoing, returned) = (self.parts.outgoing, self.parts.returned);
        let part = |start: usize, rank: usize| (at(start + rank * bytes), bytes);
        // SAFETY: the caller's promise.
        unsafe { nccl.exchange(stream, |to| part(outgoing, to), |from| part(returned, from)) }
    }

    /// Waits for the stream, up to the time limit, and says what was wrong with calls since the last time: the same on
    /// every rank that asks after the same call.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0), and the call's state was initialised.
    ///
    /// # Errors
    /// [`Error::Absent`] for a rank that was waited for in vain; the layer is then of no use any more.
    /// [`Error::OnRank`] with an [`Error::ExpertId`] for the first bad id of the lowest rank that had one (such slots
    /// were treated as empty). [`Error::Disagreement`] for a rank with another capacity. [`Error::Cuda`], [`Error::Nccl`].
    #[allow(unsafe_code)]
    pub unsafe fn check_launch(&self, stream: Stream, call: &ExpertParallelCall) -> Result<()> {
        let device = self.device();
        // A kernel of ours gives up by itself, after which those behind it still run.
        let limit = if self.link.is_mapped() { self.limit.saturating_mul(3) } else { self.limit };
        // SAFETY: the caller's promise.
        if !unsafe { device.synchronize_within(stream, limit)? } {
            return Err(self.absent());
        }
        if let Link::Nccl(nccl) = &self.link {
            nccl.check()?;
        }
        let ranks = self.choice.ranks;
        let mut state = vec![0u64; state_bytes(ranks) / 8];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut state);
        // SAFETY: the state is the layer's own and as large as that.
        unsafe { device.read(stream, self.state.ptr(), bytes)? };
        let absent = u32::from_le_bytes(bytes[4 * ABSENT..][..4].try_into().expect("four bytes")) as usize;
        if absent != 0 {
            return Err(Error::Absent { rank: ranks - absent, waited: self.limit });
        }
        let faults: Vec<[u64; 2]> =
            state[STATE_BYTES / 8..].chunks_exact(2).map(|fault| [fault[0], fault[1]]).collect();
        if faults.iter().any(|fault| *fault != [0; 2]) {
            let start = self.state.ptr().byte_add(STATE_BYTES);
            // SAFETY: as above.
            unsafe { device.zero(stream, start, ranks * FAULT_BYTES)? };
        }
        for (rank, [bad_id, capacity]) in faults.into_iter().enumerate() {
            self.fault(rank, bad_id, capacity)?;
        }
        let plan = self.layer.choice(ranks * call.capacity)?.plan;
        // SAFETY: the caller's promise.
        unsafe { route::check(device, stream, &plan, self.parallel.placement.copies(), call.state) }
    }

    fn fault(&self, rank: usize, bad_id: u64, capacities: u64) -> Result<()> {
        let (its, own) = (capacities as u32, (capacities >> 32) as u32);
        if its != 0 {
            return Err(disagreement(rank, its - 1, own));
        }
        if bad_id != 0 {
            let (slot, topk) = (!(bad_id >> 32) as u32 as usize, self.config.topk);
            let (token, slot, id) = (slot / topk, slot % topk, i64::from(bad_id as u32));
            let error = Error::ExpertId { token, slot, id, limit: self.config.global_experts };
            return Err(Error::OnRank { rank, message: error.to_string() });
        }
        Ok(())
    }

    /// Who it is that does not come: NCCL does not say, so the ranks meet on the host.
    pub(super) fn absent(&self) -> Error {
        let next = (self.exchange.rank() + 1) % self.choice.ranks;
        let named = self.exchange.meet().err().filter(|error| matches!(error, Error::Absent { .. }));
        let error = named.unwrap_or(Error::Absent { rank: next, waited: self.limit });
        if let Link::Nccl(nccl) = &self.link {
            nccl.give_up(error.clone());
        }
        error
    }
}
