//! Rows that a library moves, as many as there are: every rank counts its own, all of them tell each other, and the host
//! waits for that.

use super::call::{ExpertParallelCall, disagreement};
use super::window::HEADER_BYTES;
use super::{ExpertParallelLayer, Nccl};
use crate::combine::Combine;
use crate::cuda::driver::{Device, DeviceBuffer, Stream};
use crate::error::{Error, Result};
use crate::expert_parallel::ParallelChoice;
use std::sync::{Mutex, PoisonError};

/// The kernels' `Counts`: rows from one rank to another.
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Counts {
    /// Of dispatch.
    tokens: u32,
    /// Of combine, the way back.
    slots: u32,
}

/// Of this rank's tokens, for the kernels of one call; and all ranks' counts of it.
#[derive(Debug)]
pub(super) struct Counted {
    /// `[C, topk]`
    pub(super) copies: DeviceBuffer<i32>,
    /// `[R, C]`
    pub(super) places: DeviceBuffer<i32>,
    /// `[R, C]`
    pub(super) slot_places: DeviceBuffer<i32>,
    /// `[R, R]`, from a rank to another.
    counts: Mutex<Vec<Counts>>,
}

impl Counted {
    pub(super) fn new(device: &Device, choice: &ParallelChoice) -> Result<Self> {
        let (ranks, capacity, topk) = (choice.ranks, choice.capacity, choice.token_row.topk());
        Ok(Self {
            copies: device.allocate(capacity * topk)?,
            places: device.allocate(ranks * capacity)?,
            slot_places: device.allocate(ranks * capacity)?,
            counts: Mutex::new(vec![Counts::default(); ranks * ranks]),
        })
    }
}

impl ExpertParallelLayer {
    /// Fails in a graph: the counts of a call that is replayed would be those of the call that was captured.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0).
    #[allow(unsafe_code)]
    pub(super) unsafe fn require_no_graph(&self, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.counted.is_some() && unsafe { self.device().is_capturing(stream)? } {
            let (argument, actual) = ("dispatch", "routed, over NCCL, in a graph");
            return Err(Error::Unsupported { argument, actual, backend: "cuda", expected: "gather" });
        }
        Ok(())
    }

    /// Tokens of all ranks, packed, once the host knows how many there are.
    ///
    /// # Safety
    /// As [`Nccl::all_gather`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn move_counted_tokens(
        &self,
        nccl: &Nccl,
        stream: Stream,
        call: &ExpertParallelCall,
        counted: &Counted,
    ) -> Result<()> {
        let (rank, ranks) = (self.exchange.rank(), self.choice.ranks);
        let of_a_rank = self.parts.header_bytes;
        let mut headers = vec![0u64; ranks * of_a_rank / 8];
        // SAFETY: the caller's promise; the window is as large as that.
        unsafe {
            self.require_no_graph(stream)?;
            self.move_headers(nccl, stream)?;
            if !self.device().synchronize_within(stream, self.limit)? {
                return Err(self.absent());
            }
            let start = self.window.ptr().byte_add(self.parts.headers);
            self.device().read(stream, start, bytemuck::cast_slice_mut(&mut headers))?;
        }
        let bytes: &[u8] = bytemuck::cast_slice(&headers);
        let mut all = Vec::with_capacity(ranks * ranks);
        for (from, message) in bytes.chunks_exact(of_a_rank).enumerate() {
            let (header, counts) = message.split_at(HEADER_BYTES);
            let capacity = u32::from_le_bytes(header[12..16].try_into().expect("four bytes"));
            // All ranks see this, and none of them goes on.
            if capacity as usize != call.capacity {
                return Err(disagreement(from, capacity, call.capacity as u32));
            }
            all.extend_from_slice(bytemuck::cast_slice::<u8, Counts>(counts));
        }
        let row = self.parts.row_bytes(self.token_row(call.capacity));
        let part = call.capacity * row;
        let tokens = |from: usize, to: usize| all[from * ranks + to].tokens as usize * row;
        let (outgoing, rows) = (self.parts.outgoing, self.parts.rows);
        let at = |start: usize, other: usize| self.window.ptr().byte_add(start + other * part).address();
        // SAFETY: the caller's promise; a rank sends no more than its tokens.
        unsafe {
            nccl.exchange(
                stream,
                |to| (at(outgoing, to), tokens(rank, to)),
                |from| (at(rows, from), tokens(from, rank)),
            )?;
        }
        *counted.counts.lock().unwrap_or_else(PoisonError::into_inner) = all;
        Ok(())
    }

    /// Results of the call whose tokens were moved last.
    ///
    /// # Safety
    /// As [`Nccl::all_gather`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn move_counted_results(
        &self,
        nccl: &Nccl,
        stream: Stream,
        capacity: usize,
        counted: &Counted,
    ) -> Result<()> {
        let (rank, ranks) = (self.exchange.rank(), self.choice.ranks);
        let part = capacity * super::window::token_bytes(&self.choice)?;
        let all = counted.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let results = |home: usize, from: usize| {
            let counts = all[home * ranks + from];
            let rows = match self.choice.combine {
                Combine::Rows => counts.slots,
                Combine::Sums => counts.tokens,
            };
            rows as usize * self.choice.combine_row_bytes
        };
        let at = |start: usize, other: usize| self.window.ptr().byte_add(start + other * part).address();
        let (outgoing, returned) = (self.parts.outgoing, self.parts.returned);
        // SAFETY: the caller's promise; what comes back is no more than a rank's slots.
        unsafe {
            nccl.exchange(
                stream,
                |home| (at(outgoing, home), results(home, rank)),
                |from| (at(returned, from), results(rank, from)),
            )
        }
    }
}
