//! The worklist of a GEMM over rows that came in their places: from `psum`, or from the expert of each row.
//!
//! [`super::Route`] makes the list of a layout that it makes itself. Here somebody else has put the rows where they are,
//! and only a kernel can see where that is: what it finds wrong is noted, and comes back from [`ListTiles::check`].

use super::arguments::require_int;
use super::call::DeviceMatrix;
use super::driver::{Device, DevicePtr, Kernel, Launch, Resources, Source, Stream};
use super::route;
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::gemm::WEIGHT_BLOCK;
use crate::plan::round_up;
use crate::quantize::ScaleFormat;
use std::ffi::c_void;
use std::sync::Arc;

const THREADS: u32 = 1024;
/// Groups of a row's scales that a thread copies at a time.
const GROUPS_AT_ONCE: usize = 8;
/// Rows that a thread may look at past the last one.
const ROWS_PAST_THE_END: usize = 64;

/// What says which rows are whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grouping {
    /// `psum [E]`: the end of each expert's rows. They start where the end before, rounded up to the alignment, is.
    Psum {
        /// Of every segment's start.
        alignment: usize,
    },
    /// `m_indices [M_sum]`: the expert of each row, negative on padding. An expert may have several segments.
    MIndices,
}

impl Grouping {
    /// The kernel's source.
    #[must_use]
    pub fn source(&self) -> Source {
        let definitions = vec![
            ("FROM_PSUM", i64::from(matches!(self, Self::Psum { .. }))),
            ("HOST_THREADS", i64::from(THREADS)),
            ("HOST_MAX_EXPERTS", route::MAX_EXPERTS as i64),
        ];
        Source::new("list_tiles.cu", include_str!("kernels/route/list_tiles.cu"), definitions)
    }

    /// Entries that the worklist may have.
    fn capacity(&self, m_sum: usize, experts: usize, row_tile: usize) -> Result<usize> {
        if row_tile == 0 {
            return Err(Error::value("row_tile", 0, "at least 1"));
        }
        match self {
            // All but an expert's last are full.
            Self::Psum { .. } => checked_add("row tiles", m_sum.min(experts), m_sum / row_tile),
            // Neighbours may all be different experts'.
            Self::MIndices => Ok(m_sum),
        }
    }
}

/// Where the lists go, and scales that are copied beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TileLists {
    /// `[4]`: of the third word on as [`super::LayoutPtrs::header`]; the first two are not written.
    pub header: DevicePtr<i32>,
    /// As [`super::LayoutPtrs::worklist`].
    pub worklist: DevicePtr<i32>,
    /// `[tiles]`: rows from an entry's first to the end of its segment, or more than the row tile.
    pub rows_left: DevicePtr<i32>,
    /// [`ScaleFormat::HOPPER`], where scales are copied.
    pub scales: Option<DevicePtr<f32>>,
}

impl TileLists {
    /// Bytes that [`TileLists::carve`] takes, a multiple of 16. `width`: of rows whose scales are copied.
    ///
    /// # Errors
    /// [`Error::Value`] if `row_tile` is zero, [`Error::Overflow`].
    pub fn space_bytes(
        grouping: &Grouping,
        (m_sum, experts): (usize, usize),
        row_tile: usize,
        width: Option<usize>,
    ) -> Result<usize> {
        let what = "bytes of a worklist";
        let entries = checked_add(what, grouping.capacity(m_sum, experts, row_tile)?, 3)? / 4 * 4;
        let scales = width.map_or(Ok(0), |width| scale_words(m_sum, width))?;
        checked_mul(what, checked_add(what, checked_add(what, 4, checked_mul(what, 3, entries)?)?, scales)?, 4)
    }

    /// Lists one behind the other from `address` on, each on 16 bytes.
    ///
    /// # Errors
    /// As [`TileLists::space_bytes`]; [`Error::Value`] if `address` is not 16-byte aligned.
    pub fn carve(
        address: DevicePtr,
        grouping: &Grouping,
        (m_sum, experts): (usize, usize),
        row_tile: usize,
        width: Option<usize>,
    ) -> Result<Self> {
        Self::space_bytes(grouping, (m_sum, experts), row_tile, width)?;
        address.require_aligned("workspace", 16)?;
        let entries = grouping.capacity(m_sum, experts, row_tile)?.next_multiple_of(4);
        let scales = address.byte_add(16);
        let worklist = scales.byte_add(4 * width.map_or(Ok(0), |width| scale_words(m_sum, width))?);
        Ok(Self {
            header: address.cast(),
            worklist: worklist.cast(),
            rows_left: worklist.byte_add(8 * entries).cast(),
            scales: width.map(|_| scales.cast()),
        })
    }
}

/// Words of a row's MN-major scales, one to 128 values, the last of which may be fewer.
fn scale_words(m_sum: usize, width: usize) -> Result<usize> {
    ScaleFormat::HOPPER.words(m_sum, round_up(width, WEIGHT_BLOCK)?)
}

/// What one call works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListTilesCall {
    /// As prepared, but for the alignment.
    pub grouping: Grouping,
    /// `psum [E]` or `m_indices [M_sum]`.
    pub list: DevicePtr<i32>,
    /// `E`
    pub experts: usize,
    /// `M_sum`
    pub m_sum: usize,
    /// Rows of an entry of the worklist: the GEMM's.
    pub row_tile: usize,
    /// Scales `[M_sum, groups]` that are to be copied to where the lists say, and how many groups there are.
    pub scales: Option<(DeviceMatrix<f32>, usize)>,
    /// Where everything goes: [`TileLists::carve`]d for these sizes.
    pub lists: TileLists,
    /// [`super::STATE_BYTES`], 16-byte aligned, zeroed once. Any calls may share it.
    pub state: DevicePtr,
}

/// The kernel's `ListTilesArgs`.
#[repr(C)]
struct Arguments {
    list: u64,
    header: u64,
    worklist: u64,
    rows_left: u64,
    notes: u64,
    scales: u64,
    mn_major: u64,
    scales_row_stride: i64,
    scales_col_stride: i64,
    experts: i32,
    m_sum: i32,
    alignment: i32,
    row_tile: i32,
    groups: i32,
    reserved: i32,
}

/// Listing the tiles of rows that came in their places, prepared.
#[derive(Debug)]
pub struct ListTiles {
    device: Device,
    grouping: Grouping,
    kernel: Arc<Kernel>,
}

impl ListTiles {
    /// Compiles (or loads) the kernel: the warm-up, after which nothing compiles. One of a psum serves every alignment.
    ///
    /// # Errors
    /// [`Error::Kernel`] if it does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, grouping: Grouping) -> Result<Self> {
        Ok(Self { device: device.clone(), grouping, kernel: device.kernel(&grouping.source(), c"list_tiles")? })
    }

    /// What the kernel takes of a multiprocessor.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// Queues the launch: the lists, and copies of the scales.
    ///
    /// # Safety
    /// As [`super::Route::launch`].
    ///
    /// # Errors
    /// [`Error::Value`] and [`Error::Alignment`] for what does not fit the kernel, [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &ListTilesCall) -> Result<()> {
        let arguments = self.arguments(call)?;
        let units = call.scales.map_or(0, |(_, groups)| call.m_sum * groups.div_ceil(GROUPS_AT_ONCE));
        let copying = units.div_ceil(THREADS as usize).min(self.device.info().multiprocessors as usize);
        let shape =
            Launch { blocks: 1 + copying as u32, threads: THREADS, shared_bytes: 0, cooperative: false, overlap: true };
        let pointers = [std::ptr::from_ref(&arguments).cast::<c_void>()];
        // SAFETY: the kernel takes one `ListTilesArgs`; the rest is the caller's promise.
        unsafe { self.device.launch(&self.kernel, shape, stream, &pointers) }
    }

    fn arguments(&self, call: &ListTilesCall) -> Result<Arguments> {
        let ListTilesCall { grouping, list, experts, m_sum, row_tile, scales, lists, state } = call;
        let (argument, alignment) = match (self.grouping, *grouping) {
            (Grouping::Psum { .. }, Grouping::Psum { alignment }) => ("psum", alignment),
            (Grouping::MIndices, Grouping::MIndices) => ("m_indices", 1),
            (_, Grouping::Psum { alignment }) => {
                return Err(Error::value("alignment", alignment, "none: m_indices were prepared for"));
            }
            (Grouping::Psum { .. }, Grouping::MIndices) => {
                return Err(Error::value("m_indices", *m_sum, "none: psum was prepared for"));
            }
        };
        if alignment == 0 || i32::try_from(alignment).is_err() {
            return Err(Error::Alignment { actual: alignment, expected: format!("1 to {}", i32::MAX) });
        }
        route::require_experts(*experts)?;
        grouping.capacity(*m_sum, *experts, *row_tile)?;
        let most = i32::MAX as usize - ROWS_PAST_THE_END;
        if *m_sum > most {
            return Err(Error::value("m_sum", *m_sum, format!("at most {most}")));
        }
        list.require_aligned(argument, 4)?;
        lists.header.require_aligned("header", 4)?;
        lists.worklist.require_aligned("worklist", 8)?;
        lists.rows_left.require_aligned("rows_left", 4)?;
        state.require_aligned("state", 16)?;
        let (from, groups) = scales.unwrap_or_default();
        if scales.is_some() {
            from.ptr.require_aligned("scales", 4)?;
            DevicePtr::require(lists.scales, "scales", 16)?;
        }
        Ok(Arguments {
            list: list.address(),
            header: lists.header.address(),
            worklist: lists.worklist.address(),
            rows_left: lists.rows_left.address(),
            notes: state.address(),
            scales: from.ptr.address(),
            mn_major: DevicePtr::or_null(lists.scales),
            scales_row_stride: from.row_stride as i64,
            scales_col_stride: from.col_stride as i64,
            experts: *experts as i32,
            m_sum: *m_sum as i32,
            alignment: alignment as i32,
            row_tile: require_int("row_tile", *row_tile)?,
            groups: require_int("groups", groups)?,
            reserved: 0,
        })
    }
}

/// Waits for the stream and says what was wrong with lists since the last time; the state then knows nothing. `experts`
/// are those of the calls.
///
/// # Safety
/// `stream` is a live stream of this device (or 0), and the state was initialised.
///
/// # Errors
/// [`Error::RowExpert`] for the first row whose id is no expert's (it was treated as padding), [`Error::Count`] for the
/// first end of a psum that lies before the start of its segment (the expert had no rows) or past the last row (it had
/// those up to there); [`Error::Cuda`].
#[allow(unsafe_code)]
pub(super) unsafe fn check(device: &Device, stream: Stream, experts: usize, state: DevicePtr) -> Result<()> {
    const NOTES: usize = 4;
    let mut notes = [0u64; NOTES];
    // SAFETY: the caller's promise; the notes are the state's first bytes.
    unsafe {
        device.read(stream, state, bytemuck::must_cast_slice_mut(&mut notes))?;
        if notes == [0; NOTES] {
            return Ok(());
        }
        device.zero(stream, state, NOTES * 8)?;
    }
    let place = |note: u64| !(note >> 32) as u32 as usize;
    let value = |note: u64| note as u32 as i32;
    let [expert, early, late, _] = notes;
    if expert != 0 {
        return Err(Error::RowExpert { row: place(expert), id: value(expert), local_experts: experts });
    }
    let (note, expected) = match early {
        0 => (late, "no more than there are rows"),
        _ => (early, "at least the start of the expert's segment"),
    };
    let actual = i64::from(value(note));
    Err(Error::Count { argument: "psum", expert: place(note), actual, expected: expected.into() })
}
