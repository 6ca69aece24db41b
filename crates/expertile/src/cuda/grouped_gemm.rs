//! The grouped GEMM alone, of rows that came in their places: the list of their tiles, then the tile's kernel.
//!
//! How a call is cut depends on how many live rows are expected. Whatever calls of up to `max_rows` rows can choose is
//! compiled when it is prepared; a row has the same bits in all of them, and in a [`super::Layer`].

use super::call::DeviceMatrix;
use super::cost;
use super::driver::{Device, DevicePtr, Stream};
use super::gemm::{Gemm, GemmCall, GemmConfig, GemmKernel, GemmKey, GemmShape, RowEnds};
use super::list_tiles::{self, Grouping, ListTiles, ListTilesCall, TileLists};
use super::prepare::{alike, each_at_once};
use super::route;
use super::weights::{Weights, check_sizes};
use crate::activation::Activation;
use crate::error::{Error, Result};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK, WeightFormat};
use crate::quantize::ScaleFormat;
use std::collections::HashMap;

/// What a grouped GEMM is prepared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupedGemmShape {
    /// Of the weights.
    pub format: WeightFormat,
    /// Of the rows.
    pub activation_format: ActivationFormat,
    /// `E`
    pub experts: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// What one call works on.
#[derive(Debug, Clone, Copy)]
pub struct GroupedGemmCall<'a> {
    /// `[E, N, K]`, as prepared; mxfp4 and int4 [arranged](Weights::arrange) for the rows' format.
    pub weights: &'a Weights,
    /// `[M_sum, K]`, 16-byte aligned.
    pub rows: DevicePtr,
    /// `[M_sum, ceil(K / 128)]`, of e4m3 rows; any strides. In [`ScaleFormat::HOPPER`] on 16 bytes they are read where
    /// they are, else copied first.
    pub scales: Option<DeviceMatrix<f32>>,
    /// `[E, N]`, added to the f32 sums before they are rounded.
    pub bias: Option<DevicePtr<f32>>,
    /// `[M_sum, N]` bf16, 16-byte aligned. Only rows of experts are written.
    pub out: DevicePtr,
    /// `M_sum`
    pub m_sum: usize,
    /// What says which rows are whose.
    pub grouping: Grouping,
    /// `psum [E]` or `m_indices [M_sum]`.
    pub list: DevicePtr<i32>,
    /// How many rows are likely to be live: the tile is chosen for them, and the results are the same for any number.
    pub expected_rows: usize,
    /// [`super::STATE_BYTES`], 16-byte aligned, zeroed once. Any calls may share it.
    pub state: DevicePtr,
    /// [`GroupedGemm::workspace_bytes`], 16-byte aligned, whatever is in it.
    pub workspace: DevicePtr,
}

/// The grouped GEMM alone, prepared: for any weights of one shape.
#[derive(Debug)]
pub struct GroupedGemm {
    device: Device,
    shape: GroupedGemmShape,
    max_rows: usize,
    of_psum: ListTiles,
    of_m_indices: ListTiles,
    gemms: HashMap<GemmKey, Gemm>,
    /// From how many expected rows on what is chosen, ascending.
    choices: Vec<(usize, GemmKey)>,
}

impl GroupedGemm {
    /// For calls of up to `max_rows` rows. This is the warm-up: what such calls can choose is compiled (or loaded) here,
    /// several kernels at a time, and nothing afterwards.
    ///
    /// # Errors
    /// [`Error::Value`] for sizes that the kernels do not take, [`Error::Device`] unless the device is a Hopper,
    /// [`Error::Kernel`] if a kernel does not compile, [`Error::Cuda`].
    pub fn prepare(device: &Device, shape: GroupedGemmShape, max_rows: usize) -> Result<Self> {
        Self::prepare_with(device, shape, (None, false), max_rows)
    }

    /// The same of a GEMM whose `[gate | up]` an activation follows: inside it, where that is expected to take least; and
    /// of weights with a copy in e4m3: by the copy, where that is.
    ///
    /// # Errors
    /// As [`GroupedGemm::prepare`].
    pub(super) fn prepare_with(
        device: &Device,
        shape: GroupedGemmShape,
        (before, has_copy): (Option<Activation>, bool),
        max_rows: usize,
    ) -> Result<Self> {
        check_sizes(shape.experts, shape.n, shape.k)?;
        if max_rows == 0 {
            return Err(Error::value("max_rows", 0, "at least 1"));
        }
        let with = (before.is_some(), has_copy);
        let choices = shape.choices(with, max_rows, device.info().multiprocessors as usize);
        let mut all: Vec<GemmKey> = choices.iter().map(|&(_, choice)| choice).collect();
        all.sort_unstable();
        all.dedup();
        let GroupedGemmShape { format, activation_format, .. } = shape;
        Ok(Self {
            device: device.clone(),
            shape,
            max_rows,
            of_psum: ListTiles::prepare(device, Grouping::Psum { alignment: 1 })?,
            of_m_indices: ListTiles::prepare(device, Grouping::MIndices)?,
            gemms: each_at_once(&all, |key: GemmKey| {
                let (format, activation) = (key.format(format), before.filter(|_| key.activated));
                Gemm::prepare(device, GemmConfig { format, activation_format, kernel: key.kernel, activation })
            })?,
            choices,
        })
    }

    /// What it is prepared for.
    #[must_use]
    pub fn shape(&self) -> &GroupedGemmShape {
        &self.shape
    }

    /// The most rows of a call.
    #[must_use]
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// The kernel of a call in which so many rows are expected.
    #[must_use]
    pub fn choice(&self, expected_rows: usize) -> GemmKernel {
        self.choose(expected_rows).kernel
    }

    fn choose(&self, expected_rows: usize) -> GemmKey {
        self.choices[self.choices.partition_point(|&(first, _)| first <= expected_rows.max(1)) - 1].1
    }

    /// Whether the activation is inside, in a call in which so many rows are expected.
    pub(super) fn activates(&self, expected_rows: usize) -> bool {
        self.choose(expected_rows).activated
    }

    /// Whether it reads the weights' copy in e4m3.
    pub(super) fn reads_copy(&self, expected_rows: usize) -> bool {
        self.choose(expected_rows).e4m3_copy
    }

    /// Bytes of workspace that any call of `m_sum` rows needs, a multiple of 16. `copies_scales`: unless the rows'
    /// scales are in [`ScaleFormat::HOPPER`], or there are none.
    ///
    /// # Errors
    /// [`Error::Value`] for more rows than it was prepared for.
    pub fn workspace_bytes(&self, m_sum: usize, grouping: &Grouping, copies_scales: bool) -> Result<usize> {
        self.require_rows(m_sum)?;
        let width = copies_scales.then_some(self.shape.k);
        let bytes =
            |key: &GemmKey| TileLists::space_bytes(grouping, (m_sum, self.shape.experts), key.kernel.row_tile(), width);
        self.gemms.keys().try_fold(0, |most, choice| Ok(most.max(bytes(choice)?)))
    }

    /// Readies the state of calls; once, before the first. Any calls may share it.
    ///
    /// # Safety
    /// As [`super::Route::initialise_state`].
    ///
    /// # Errors
    /// As [`super::Route::initialise_state`].
    #[allow(unsafe_code)]
    pub unsafe fn initialise_state(&self, stream: Stream, state: DevicePtr) -> Result<()> {
        state.require_aligned("state", 16)?;
        // SAFETY: the caller's promise.
        unsafe { route::initialise_state(&self.device, stream, state) }
    }

    /// Queues the call: two launches, which write the rows of experts in `out` and nothing else.
    ///
    /// # Safety
    /// As [`super::Route::launch`]; the state was initialised, and the weights' memory outlives the launch (for a graph:
    /// its replays), as `self` does.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Alignment`] and [`Error::WeightFormat`] for what does not fit what was prepared,
    /// before anything is queued; [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn launch(&self, stream: Stream, call: &GroupedGemmCall<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(stream, call, None) }
    }

    /// The same with a place for the scales of results, for a call that [activates](GroupedGemm::activates): `out` is
    /// then `[M_sum, N / 2]` e4m3.
    ///
    /// # Safety
    /// As [`GroupedGemm::launch`].
    ///
    /// # Errors
    /// As [`GroupedGemm::launch`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch_with(
        &self,
        stream: Stream,
        call: &GroupedGemmCall<'_>,
        out_scales: Option<DevicePtr<f32>>,
    ) -> Result<()> {
        self.check_call(call)?;
        let GroupedGemmCall {
            weights,
            rows,
            scales,
            bias,
            out,
            m_sum,
            grouping,
            list,
            expected_rows,
            state,
            workspace,
        } = *call;
        if m_sum == 0 {
            return Ok(());
        }
        let experts = self.shape.experts;
        let choice = self.choose(expected_rows);
        let row_tile = choice.kernel.row_tile();
        let copied = scales.filter(|scales| !self.reads_in_place(scales, m_sum));
        let width = copied.map(|_| self.shape.k);
        let lists = TileLists::carve(workspace, &grouping, (m_sum, experts), row_tile, width)?;
        let list_tiles = match grouping {
            Grouping::Psum { .. } => &self.of_psum,
            Grouping::MIndices => &self.of_m_indices,
        };
        let copies = copied.map(|scales| (scales, self.shape.k.div_ceil(WEIGHT_BLOCK)));
        let tiles = ListTilesCall { grouping, list, experts, m_sum, row_tile, scales: copies, lists, state };
        let gemm = GemmCall {
            weights: weights.read_by(choice.e4m3_copy),
            rows,
            scales: lists.scales.or(scales.map(|scales| scales.ptr)),
            out,
            out_scales,
            bias,
            header: lists.header,
            worklist: lists.worklist,
            ends: RowEnds::Tiles(lists.rows_left),
            m_sum,
        };
        let step = &self.gemms[&choice];
        step.check(&gemm)?;
        // SAFETY: the caller's promise; the workspace holds the lists, and the GEMM comes after the launch that writes
        // them.
        unsafe {
            list_tiles.launch(stream, &tiles)?;
            step.launch_checked(stream, &gemm)
        }
    }

    /// As [`super::Route::check`], for what calls' lists said since the last time.
    ///
    /// # Safety
    /// As [`super::Route::check`].
    ///
    /// # Errors
    /// [`Error::RowExpert`] for the first row of `m_indices` whose id is no expert's (it was treated as padding),
    /// [`Error::Count`] for the first end in `psum` that lies before its segment's start (the expert had no rows) or past
    /// the last row (it had those up to there); [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn check(&self, stream: Stream, state: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { list_tiles::check(&self.device, stream, self.shape.experts, state) }
    }

    /// Whether the kernels can read scales where they are.
    #[must_use]
    pub fn reads_in_place(&self, scales: &DeviceMatrix<f32>, m_sum: usize) -> bool {
        let groups = self.shape.k.div_ceil(WEIGHT_BLOCK);
        let next = |row, group| ScaleFormat::HOPPER.word(row, group, m_sum, groups);
        let strides = scales.row_stride == next(1, 0) && (scales.col_stride == next(0, 1) || groups == 1);
        // Columns are read in parts of 16 bytes, the last one too.
        strides && scales.ptr.address().is_multiple_of(16) && m_sum.is_multiple_of(4)
    }

    fn check_call(&self, call: &GroupedGemmCall<'_>) -> Result<()> {
        let GroupedGemmShape { format, activation_format, experts, n, k } = self.shape;
        self.require_rows(call.m_sum)?;
        if call.weights.format() != format {
            let (actual, expected) = (call.weights.format().name(), format.name());
            return Err(Error::WeightFormat { argument: "weights", actual, expected });
        }
        for (argument, actual, prepared) in
            [("experts", call.weights.experts(), experts), ("n", call.weights.n(), n), ("k", call.weights.k(), k)]
        {
            if actual != prepared {
                return Err(Error::value(argument, actual, format!("{prepared}, as prepared")));
            }
        }
        match (activation_format, call.scales) {
            (ActivationFormat::E4m3, None) => DevicePtr::require(None::<DevicePtr<f32>>, "scales", 4),
            (ActivationFormat::Bf16, Some(scales)) => {
                Err(Error::value("scales", scales.ptr.address() as usize, "none for rows of bf16"))
            }
            _ => Ok(()),
        }
    }

    fn require_rows(&self, m_sum: usize) -> Result<()> {
        if m_sum > self.max_rows {
            return Err(Error::value("m_sum", m_sum, format!("at most {}, as prepared", self.max_rows)));
        }
        // Tiles are counted in an int, and so are their outputs; each row may have a tile of its own.
        let most = i32::MAX as usize / self.shape.n.div_ceil(64);
        if m_sum > most {
            return Err(Error::value("m_sum", m_sum, format!("at most {most}, for {} outputs", self.shape.n)));
        }
        Ok(())
    }
}

impl GroupedGemmShape {
    /// From how many expected rows on what is expected to take least.
    fn choices(
        &self,
        (before_activation, has_copy): (bool, bool),
        max_rows: usize,
        multiprocessors: usize,
    ) -> Vec<(usize, GemmKey)> {
        let Self { format, activation_format, experts, n, k } = *self;
        let mut choices: Vec<(usize, GemmKey)> = Vec::new();
        let mut rows = 1;
        while rows <= max_rows {
            let shape = GemmShape { n, k, format, activation_format, experts, rows, most_rows: rows };
            let choice = cost::cheapest(&shape, before_activation, has_copy, multiprocessors);
            if choices.last().is_none_or(|&(_, last)| last != choice) {
                choices.push((rows, choice));
            }
            rows = (rows + 1..).find(|&next| alike(next) == next).unwrap_or(usize::MAX);
        }
        choices
    }
}

/// How many rows are likely to be live in a buffer of `m_sum` rows that holds whatever routing a number of slots may
/// have, with segments aligned to `alignment`.
#[must_use]
pub fn expected_rows(m_sum: usize, experts: usize, alignment: usize) -> usize {
    let alignment = alignment.max(1);
    // Each slot has had a tile of padding to itself, or each expert has.
    (m_sum / alignment).max(m_sum.saturating_sub(experts.saturating_mul(alignment - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Plan, TokenExperts};

    #[test]
    fn as_many_rows_are_expected_as_there_are_slots() {
        for (tokens, topk, experts, alignment) in [(1, 1, 8, 128), (1, 8, 128, 128), (64, 8, 128, 128), (9, 2, 4, 1)] {
            let plan = Plan::tight(tokens, topk, experts, alignment, TokenExperts::MayRepeat).unwrap();
            let (expected, slots) = (expected_rows(plan.m_sum(), experts, alignment), tokens * topk);
            assert!((slots..=slots + alignment).contains(&expected), "{expected} of {slots}: {plan:?}");
        }
    }

    #[test]
    fn kernels_are_chosen_for_ever_more_rows() {
        let shape = GroupedGemmShape {
            format: WeightFormat::E4m3,
            activation_format: ActivationFormat::E4m3,
            experts: 64,
            n: 1024,
            k: 2048,
        };
        let kernels: Vec<(usize, GemmKernel)> =
            shape.choices((false, false), 1 << 20, 132).into_iter().map(|(first, key)| (first, key.kernel)).collect();
        assert_eq!(kernels[0].0, 1);
        assert!(kernels.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 != pair[1].1), "{kernels:?}");
        let (few, many) = (kernels[0].1, kernels[kernels.len() - 1].1);
        assert!(!few.tokens_on_m() && many.tokens_on_m(), "{kernels:?}");
        for &(first, kernel) in &kernels {
            let rows = alike(first);
            let exact = GemmShape {
                n: 1024,
                k: 2048,
                format: WeightFormat::E4m3,
                activation_format: ActivationFormat::E4m3,
                experts: 64,
                rows,
                most_rows: rows,
            };
            assert_eq!((rows, GemmKernel::choose(&exact, 132)), (first, kernel));
        }
    }
}
