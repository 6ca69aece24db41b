//! A rank's window: the memory that other ranks store into, or that a library fills for them.

use super::Link;
use super::kernels::Way;
use crate::combine::Combine;
use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, Stream};
use crate::cuda::nccl::NcclMemory;
use crate::cuda::route_permute;
use crate::dispatch::TokenRow;
use crate::error::{Result, checked_add, checked_mul};
use crate::expert_parallel::ParallelChoice;
use crate::gemm::ActivationFormat;
use crate::layer::LayerConfig;

/// The kernels' `FLAG_STRIDE`, in bytes.
const FLAG_BYTES: usize = 128;
/// The kernels' `Header`.
pub(super) const HEADER_BYTES: usize = 32;
/// The kernels' `Counts`.
const COUNTS_BYTES: usize = 8;
const PART_BYTES: usize = 256;
const ALLOCATION: usize = 2 << 20;

/// A window's memory.
#[derive(Debug)]
pub(super) enum WindowMemory {
    Own(DeviceBuffer),
    /// NCCL's, which it moves without a copy.
    Nccl(NcclMemory),
}

impl WindowMemory {
    pub(super) fn allocate(device: &Device, link: &Link, bytes: usize) -> Result<Self> {
        match link {
            Link::Nccl(nccl) if nccl.has_windows() => Ok(Self::Nccl(nccl.allocate(bytes)?)),
            Link::Nccl(_) | Link::Mapped => Ok(Self::Own(device.allocate(bytes)?)),
        }
    }

    pub(super) fn ptr(&self) -> DevicePtr {
        match self {
            Self::Own(window) => window.ptr(),
            Self::Nccl(window) => window.ptr(),
        }
    }

    /// Zeros, and waits.
    #[allow(unsafe_code)]
    pub(super) fn clear(&self, device: &Device, bytes: usize) -> Result<()> {
        // SAFETY: the window is as large as that; the default stream always lives.
        unsafe {
            device.zero(Stream(0), self.ptr(), bytes)?;
            device.synchronize(Stream(0))
        }
    }
}

/// Where the parts of a window start. The same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowParts {
    pub(super) way: Way,
    pub(super) headers: usize,
    /// From one rank's header to the next, of those that stand by themselves; a rank's counts are behind its own.
    pub(super) header_bytes: usize,
    /// `[R * C]` tokens' rows.
    pub(super) rows: usize,
    /// What comes home.
    pub(super) returned: usize,
    /// What goes to other ranks, where a library takes it.
    pub(super) outgoing: usize,
    pub(super) bytes: usize,
}

impl WindowParts {
    pub(super) fn new(choice: &ParallelChoice, plain: Option<&PlainTokens>, way: Way) -> Result<Self> {
        let what = "bytes of a window";
        let (ranks, capacity) = (choice.ranks, choice.capacity);
        let next = |start: usize, bytes: usize| {
            Ok::<_, crate::Error>(
                checked_add(what, checked_add(what, start, bytes)?, PART_BYTES - 1)? / PART_BYTES * PART_BYTES,
            )
        };
        let headers = if way == Way::Stored { 2 * ranks * FLAG_BYTES } else { 0 };
        let header_bytes = HEADER_BYTES + if way == Way::Counted { ranks * COUNTS_BYTES } else { 0 };
        let rows = next(headers, ranks * header_bytes)?;
        let of_all = |row: &TokenRow, tokens: usize| {
            let bytes = checked_add(what, row.bytes(), extra_bytes(way))?;
            checked_mul(what, checked_mul(what, ranks, tokens)?, bytes)
        };
        let plain = plain.map_or(Ok(0), |plain| of_all(&plain.row, plain.most_tokens))?;
        let of_tokens = of_all(&choice.token_row, capacity)?.max(plain);
        let returned = next(rows, of_tokens)?;
        let of_a_rank = checked_mul(what, capacity, token_bytes(choice)?)?;
        let from_all = checked_mul(what, ranks, of_a_rank)?;
        // Rows that are stored straight into their places need no room for each rank.
        let is_one = way == Way::Stored && choice.combine == Combine::Rows;
        let outgoing = next(returned, if is_one { of_a_rank } else { from_all })?;
        let end = match way {
            Way::Stored => outgoing,
            Way::Gathered => next(outgoing, from_all)?,
            // Tokens have left when results are stored.
            Way::Counted => next(outgoing, from_all.max(of_tokens))?,
        };
        // An allocation of its own for the driver: smaller ones may share what another process opens.
        let bytes = checked_add(what, end, ALLOCATION - 1)? / ALLOCATION * ALLOCATION;
        Ok(Self { way, headers, header_bytes, rows, returned, outgoing, bytes })
    }

    /// Bytes from one token's row to the next.
    pub(super) fn row_bytes(&self, row: &TokenRow) -> usize {
        row.bytes() + extra_bytes(self.way)
    }
}

/// Behind a token's row: the header of its rank, where one collective moves both, or where its results have their place.
fn extra_bytes(way: Way) -> usize {
    if way == Way::Stored { 0 } else { HEADER_BYTES }
}

/// Tokens that travel as they are, though GEMM 1 reads e4m3: where they are few, they take longer to be quantized here
/// and permuted there, in launches of their own, than twice their bytes take on their way. Quantizing is per row, so
/// their values are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PlainTokens {
    pub(super) row: TokenRow,
    /// Of a rank, at most.
    pub(super) most_tokens: usize,
}

impl PlainTokens {
    /// Bytes more that a rank sends, at most: what an H200's links take in about the time of a launch.
    const MORE_BYTES: usize = 512 << 10;

    /// None where rows are bf16 anyway, or weighted before they are quantized.
    pub(super) fn new(choice: &ParallelChoice, config: &LayerConfig) -> Result<Option<Self>> {
        let row = choice.token_row;
        if row.activation_format() == ActivationFormat::Bf16 || config.weight_on_input {
            return Ok(None);
        }
        let of_slots = route_permute::MOST_SLOTS / choice.ranks / row.topk();
        let of_bytes = Self::MORE_BYTES / row.hidden() / (choice.ranks - 1).max(1);
        let most_tokens = choice.capacity.min(of_slots).min(of_bytes);
        let plain = TokenRow::new(row.hidden(), row.topk(), ActivationFormat::Bf16, !row.weights().is_empty())?;
        Ok((most_tokens > 0).then_some(Self { row: plain, most_tokens }))
    }
}

/// Bytes that come home of a token, from each rank.
pub(super) fn token_bytes(choice: &ParallelChoice) -> Result<usize> {
    let rows = match choice.combine {
        Combine::Rows => choice.token_row.topk(),
        Combine::Sums => 1,
    };
    checked_mul("bytes of a token's results", rows, choice.combine_row_bytes)
}
