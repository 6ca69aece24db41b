//! How a call of the layer is cut: a pure function of the layer, the number of tokens and the device.

use super::config::WeightKind;
use crate::cuda::arguments::{RouteExtra, SecondWorklist};
use crate::cuda::call::{LayoutPtrs, worklist_capacity};
use crate::cuda::cost;
use crate::cuda::driver::DevicePtr;
use crate::cuda::few_tokens::{FewTokensConfig, gate_up_bytes_of_slot};
use crate::cuda::gemm::{GemmKernel, GemmKey, GemmShape, JoinedConfig, row_bytes};
use crate::cuda::prepare::alike;
use crate::cuda::{route, route_permute};
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::layer::{LayerConfig, LayerShape};
use crate::plan::{Plan, TokenExperts};
use crate::quantize::ScaleFormat;
use half::bf16;
use std::fmt;

/// Parts of the workspace start on as many bytes, and so does the workspace itself.
pub(super) const PART_BYTES: usize = 256;

/// What a call with a number of tokens does. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerChoice {
    /// The buffer's rows: the tight bound, aligned to [`super::ALIGNMENT`] unless the configuration says otherwise.
    pub plan: Plan,
    /// Rows of an entry of the layout's worklist, and so of GEMM 1's tiles. GEMM 2 has another list where its row tile
    /// is another.
    pub row_tile: usize,
    /// How `[rows, H]` times `[2 I, H]` is cut.
    pub gemm1: GemmKernel,
    /// How `[rows, I]` times `[H, I]` is cut.
    pub gemm2: GemmKernel,
    /// Whether GEMM 1, and whether GEMM 2, reads the weights' [copy in e4m3](crate::cuda::Weights::with_e4m3_copy).
    pub e4m3_copy: [bool; 2],
    /// Whether GEMM 1 stores activated, quantized rows, so that `gate | up` never reaches memory.
    pub activation_inside_gemm1: bool,
    /// Whether GEMM 1, the activation and GEMM 2 are one launch.
    pub joined: bool,
    /// In one launch, by a kernel for up to so many tokens, none of the above are used, and no layout is made.
    pub one_launch: Option<usize>,
    /// Kernels that one call launches.
    pub launches: usize,
    /// Bytes of workspace of such a call; see [`super::Layer::workspace_bytes`] for a workspace that serves smaller
    /// calls, too.
    pub workspace_bytes: usize,
}

impl LayerChoice {
    /// The choice for `tokens` tokens on a device of that many multiprocessors, of weights of that format without
    /// biases.
    ///
    /// Tiles are those that are expected to take least for `M * topk` slots of which `E / G` are here; numbers of
    /// tokens within an eighth of each other have the same.
    ///
    /// # Errors
    /// [`Error::Value`] for a `topk`, a number of experts or a width that the kernels do not take; as [`Plan::tight`].
    pub fn new(
        shape: &LayerShape,
        config: &LayerConfig,
        weights: WeightFormat,
        tokens: usize,
        multiprocessors: usize,
    ) -> Result<Self> {
        let weights = WeightKind::unbiased(weights);
        let tiles = Tiles::new(shape, config, weights, alike(tokens), multiprocessors)?;
        let kernels = few_tokens_kernels(shape, config, weights, tokens, multiprocessors);
        let one_launch = one_launch(&kernels, tokens);
        Ok(Self::with_offsets(shape, config, tokens, (&tiles, one_launch), multiprocessors)?.0)
    }

    /// The same with tiles that have been chosen, and where the workspace's parts are.
    pub(super) fn with_offsets(
        shape: &LayerShape,
        config: &LayerConfig,
        tokens: usize,
        (tiles, one_launch): (&Tiles, Option<usize>),
        multiprocessors: usize,
    ) -> Result<(Self, Offsets)> {
        let plan = Plan::tight(
            tokens,
            config.topk,
            shape.local_experts(),
            config.layout_alignment(),
            TokenExperts::MayRepeat,
        )?;
        let Tiles { gemm1, gemm2, e4m3_copy, activation_inside_gemm1, joined } = *tiles;
        let slots = tokens * config.topk;
        let offsets = match one_launch {
            Some(_) => Offsets::of_one_launch(shape, config, &plan, gemm1.row_tile())?,
            None => Offsets::new(shape, config, &plan, tiles, multiprocessors)?,
        };
        let choice = Self {
            plan,
            row_tile: gemm1.row_tile(),
            gemm1,
            gemm2,
            e4m3_copy,
            activation_inside_gemm1,
            joined: joined && one_launch.is_none(),
            one_launch,
            launches: match one_launch {
                _ if slots == 0 => 0,
                Some(_) => 1,
                // Routing and permute, what is between, unpermute.
                None => route_permute::launches(slots) + 1 + tiles.launches(),
            },
            workspace_bytes: offsets.end,
        };
        Ok((choice, offsets))
    }

    /// Which prepared kernel GEMM 1 is.
    pub(super) fn first(&self) -> GemmKey {
        GemmKey { kernel: self.gemm1, activated: self.activation_inside_gemm1, e4m3_copy: self.e4m3_copy[0] }
    }

    /// Which prepared kernel GEMM 2 is.
    pub(super) fn second(&self) -> GemmKey {
        GemmKey { kernel: self.gemm2, activated: false, e4m3_copy: self.e4m3_copy[1] }
    }

    /// The row tile of GEMM 2's own worklist, if it has one.
    pub(super) fn second_row_tile(&self) -> Option<usize> {
        second_row_tile(&self.gemm1, &self.gemm2).filter(|_| self.one_launch.is_none())
    }
}

fn second_row_tile(gemm1: &GemmKernel, gemm2: &GemmKernel) -> Option<usize> {
    (gemm1.row_tile() != gemm2.row_tile()).then_some(gemm2.row_tile())
}

/// How both GEMMs are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tiles {
    pub(super) gemm1: GemmKernel,
    pub(super) gemm2: GemmKernel,
    /// Whether each reads the copy in e4m3.
    pub(super) e4m3_copy: [bool; 2],
    pub(super) activation_inside_gemm1: bool,
    /// Whether both GEMMs and the activation are one launch.
    pub(super) joined: bool,
}

impl Tiles {
    /// Launches of the GEMMs and the activation.
    fn launches(&self) -> usize {
        if self.joined { 1 } else { 3 - usize::from(self.activation_inside_gemm1) }
    }

    /// What is expected to take least for so many tokens.
    fn new(
        shape: &LayerShape,
        config: &LayerConfig,
        weights: WeightKind,
        tokens: usize,
        multiprocessors: usize,
    ) -> Result<Self> {
        let (hidden, intermediate, experts) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        if config.global_experts == 0 {
            return Err(Error::value("global_experts", 0, "at least 1"));
        }
        let slots = checked_mul("M * topk", tokens, config.topk)?;
        let rows = checked_mul("M * topk * E", slots, experts)?.div_ceil(config.global_experts).min(slots);
        let format = weights.format;
        let of = |n, k| GemmShape {
            n,
            k,
            format,
            activation_format: config.activation_format,
            experts,
            rows,
            most_rows: tokens,
        };
        let split = |shape: &GemmShape| GemmKernel::choose_split(shape, multiprocessors).filter(|_| config.split_k);
        let choose = |shape: &GemmShape, activation_follows, has_copy| match split(shape) {
            Some(kernel) => GemmKey { kernel, activated: false, e4m3_copy: false },
            None => cost::cheapest(shape, activation_follows, has_copy, multiprocessors),
        };
        let gemms = [of(2 * intermediate, hidden), of(hidden, intermediate)];
        // A bias comes before the activation.
        let first = choose(&gemms[0], !weights.biased[0], weights.e4m3_copy[0]);
        let second = choose(&gemms[1], false, weights.e4m3_copy[1]);
        if config.one_launch && !config.split_k {
            let takes = |kernel: &GemmKernel| JoinedConfig::takes(format, kernel, intermediate);
            let apart = [(first, !weights.biased[0]), (second, false)];
            if let Some(kernel) = cost::cheapest_joined(&gemms, apart, takes, multiprocessors) {
                return Ok(Self {
                    gemm1: kernel,
                    gemm2: kernel,
                    e4m3_copy: [false; 2],
                    activation_inside_gemm1: false,
                    joined: true,
                });
            }
        }
        Ok(Self {
            gemm1: first.kernel,
            gemm2: second.kernel,
            e4m3_copy: [first.e4m3_copy, second.e4m3_copy],
            activation_inside_gemm1: first.activated,
            joined: false,
        })
    }
}

/// The kernels that do calls of up to so many tokens in one launch, if they take the weights.
fn few_tokens_kernels(
    shape: &LayerShape,
    config: &LayerConfig,
    weights: WeightKind,
    tokens: usize,
    multiprocessors: usize,
) -> Vec<FewTokensConfig> {
    if weights.fits_one_launch([shape.hidden(), shape.intermediate()]) {
        FewTokensConfig::all(shape, config, tokens, multiprocessors)
    } else {
        Vec::new()
    }
}

/// The smallest kernel for so many tokens.
fn one_launch(kernels: &[FewTokensConfig], tokens: usize) -> Option<usize> {
    kernels.iter().map(FewTokensConfig::tokens).find(|&most| tokens <= most)
}

/// What a GEMM's line says of the weights it reads.
pub(super) fn over_copy(reads: bool) -> &'static str {
    if reads { " over the e4m3 copy" } else { "" }
}

impl fmt::Display for LayerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(most) = self.one_launch {
            return write!(f, "one launch, for up to {most} tokens, {} bytes of workspace", self.workspace_bytes);
        }
        let [first, second] = self.e4m3_copy.map(over_copy);
        write!(f, "{} rows aligned to {}, gemm1 {}{first}", self.plan.m_sum(), self.plan.alignment(), self.gemm1)?;
        if self.activation_inside_gemm1 {
            write!(f, ", activation inside gemm1")?;
        }
        if self.joined {
            write!(f, ", both gemms in one launch")?;
        }
        let Self { gemm2, launches, workspace_bytes, .. } = self;
        write!(f, ", gemm2 {gemm2}{second}, {launches} launches, {workspace_bytes} bytes of workspace")
    }
}

/// Everything that calls of up to a number of tokens choose.
#[derive(Debug, Default)]
pub(super) struct Choices {
    pub(super) row_tiles: Vec<usize>,
    /// Both GEMMs' of any call.
    pub(super) gemms: Vec<GemmKey>,
    /// Of both GEMMs in one launch.
    pub(super) joined: Vec<GemmKey>,
    /// Kernels for few tokens.
    pub(super) few_tokens: Vec<FewTokensConfig>,
    /// From how many tokens on which tiles are chosen, ascending.
    tiles: Vec<(usize, Tiles)>,
    /// Numbers of tokens after which one token more takes less workspace, with the bytes up to there.
    peaks: Vec<(usize, usize)>,
}

impl Choices {
    pub(super) fn new(
        shape: &LayerShape,
        config: &LayerConfig,
        weights: WeightKind,
        max_tokens: usize,
        multiprocessors: usize,
    ) -> Result<Self> {
        if max_tokens == 0 {
            return Err(Error::value("max_tokens", 0, "at least 1"));
        }
        // The largest first: what is too large is refused at once.
        LayerChoice::new(shape, config, weights.format, max_tokens, multiprocessors)?;
        let few_tokens = few_tokens_kernels(shape, config, weights, max_tokens, multiprocessors);
        let (mut all, mut most) = (Self { few_tokens, ..Self::default() }, 0);
        for tokens in 1..=max_tokens {
            if alike(tokens) == tokens {
                let tiles = Tiles::new(shape, config, weights, tokens, multiprocessors)?;
                if all.tiles.last().is_none_or(|(_, last)| *last != tiles) {
                    all.tiles.push((tokens, tiles));
                }
            }
            let found = all.of_tokens(tokens);
            let choice = LayerChoice::with_offsets(shape, config, tokens, found, multiprocessors)?.0;
            if choice.one_launch.is_none() {
                if !all.row_tiles.contains(&choice.row_tile) {
                    all.row_tiles.push(choice.row_tile);
                }
                let prepared = if choice.joined { &mut all.joined } else { &mut all.gemms };
                for gemm in [choice.first(), choice.second()] {
                    if !prepared.contains(&gemm) {
                        prepared.push(gemm);
                    }
                }
            }
            let peaked = all.peaks.last().is_some_and(|&(_, bytes)| bytes == most);
            if choice.workspace_bytes < most && !peaked {
                all.peaks.push((tokens - 1, most));
            }
            most = most.max(choice.workspace_bytes);
        }
        Ok(all)
    }

    /// What a call of so many tokens chooses: tiles, and the kernel that does without.
    pub(super) fn of_tokens(&self, tokens: usize) -> (&Tiles, Option<usize>) {
        (self.tiles(tokens), one_launch(&self.few_tokens, tokens))
    }

    /// The tiles of a call of so many tokens.
    pub(super) fn tiles(&self, tokens: usize) -> &Tiles {
        &self.tiles[self.tiles.partition_point(|&(first, _)| first <= tokens.max(1)) - 1].1
    }

    /// Bytes that serve calls of up to as many tokens as this choice is for.
    pub(super) fn workspace_bytes(&self, choice: &LayerChoice) -> usize {
        let before = self.peaks.iter().filter(|(tokens, _)| *tokens < choice.plan.tokens());
        before.map(|&(_, bytes)| bytes).fold(choice.workspace_bytes, usize::max)
    }
}

/// Where the workspace's parts start; 0 for those that a call does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Offsets {
    layout: usize,
    second_worklist: usize,
    front: usize,
    front_scales: usize,
    activated: usize,
    activated_scales: usize,
    back: usize,
    /// Where one launch does it all, of every slot; where both GEMMs are one launch, of every row.
    gate_up: usize,
    /// Where both GEMMs are one launch; and how many words.
    counters: (usize, usize),
    end: usize,
    /// Whether rows have scales.
    scaled: bool,
}

/// Parts one behind the other.
#[derive(Debug, Default)]
pub(super) struct Carver(usize);

impl Carver {
    /// Where all parts end.
    pub(super) fn end(&self) -> usize {
        self.0
    }

    pub(super) fn part(&mut self, bytes: usize) -> Result<usize> {
        let start = self.0;
        let bytes = checked_add("workspace bytes", bytes, PART_BYTES - 1)? / PART_BYTES * PART_BYTES;
        self.0 = checked_add("workspace bytes", start, bytes)?;
        Ok(start)
    }
}

impl Offsets {
    fn new(
        shape: &LayerShape,
        config: &LayerConfig,
        plan: &Plan,
        tiles: &Tiles,
        multiprocessors: usize,
    ) -> Result<Self> {
        let row_tile = tiles.gemm1.row_tile();
        let second_row_tile = second_row_tile(&tiles.gemm1, &tiles.gemm2);
        let (m_sum, hidden, intermediate) = (plan.m_sum(), shape.hidden(), shape.intermediate());
        let e4m3 = config.activation_format == ActivationFormat::E4m3;
        let rows =
            |width: usize, bytes: usize| checked_mul("bytes of rows", m_sum, checked_mul("width", width, bytes)?);
        let operand = |width: usize| rows(width, row_bytes(config.activation_format));
        let scales = |width: usize| match e4m3 {
            true => checked_mul("bytes of scales", ScaleFormat::HOPPER.words(m_sum, width)?, 4),
            false => Ok(0),
        };
        let routing = match e4m3 {
            true => config.quantize_permute(shape, row_tile).workspace_bytes(plan, multiprocessors)?,
            false => route::workspace_bytes(plan, multiprocessors)?,
        };
        let mut carver = Carver(0);
        carver.part(routing)?;
        let layout = carver.part(LayoutPtrs::space_bytes(plan, row_tile)?)?;
        let second_bytes = second_row_tile.map_or(Ok(0), |tile| SecondWorklist::space_bytes(plan, tile))?;
        let second_worklist = carver.part(second_bytes)?;
        let mut with_scales =
            |width| -> Result<_> { Ok((carver.part(operand(width)?)?, carver.part(scales(width)?)?)) };
        let gate_up_width = checked_mul("2 I", intermediate, 2)?;
        let parts = Self { layout, second_worklist, scaled: e4m3, ..Self::default() };
        if tiles.joined || tiles.activation_inside_gemm1 {
            let (activated, activated_scales) = with_scales(intermediate)?;
            let (front, front_scales) = with_scales(hidden)?;
            let parts = Self { front, front_scales, activated, activated_scales, ..parts };
            if tiles.joined {
                // Rows come and go at the same time: nothing shares memory.
                let (back, gate_up) = (carver.part(rows(hidden, 2)?)?, carver.part(rows(gate_up_width, 2)?)?);
                let words = JoinedConfig::counters(worklist_capacity(plan, row_tile)?, intermediate)?;
                let counters = (carver.part(checked_mul("bytes of counters", words, 4)?)?, words);
                return Ok(Self { back, gate_up, counters, end: carver.0, ..parts });
            }
            // GEMM 2's rows may stand where the permuted ones, which are half as wide, stood before.
            let mut back = Carver(front);
            back.part(rows(hidden, 2)?)?;
            return Ok(Self { back: front, end: carver.0.max(back.0), ..parts });
        }
        // The permuted rows have been multiplied when the activated ones are written, and so have `gate | up` by then.
        let (front, front_scales) = with_scales(hidden.max(intermediate))?;
        let back = carver.part(rows(hidden.max(gate_up_width), 2)?)?;
        let (activated, activated_scales, end) = (front, front_scales, carver.0);
        Ok(Self { front, front_scales, activated, activated_scales, back, end, ..parts })
    }

    /// Of a call in one launch: GEMM 1's results of every slot. The layout has a place only because the routing's
    /// arguments name one.
    fn of_one_launch(shape: &LayerShape, config: &LayerConfig, plan: &Plan, row_tile: usize) -> Result<Self> {
        let slots = checked_mul("M * topk", plan.tokens(), config.topk)?;
        let bytes = |of_slot| checked_mul("bytes of rows", slots, of_slot);
        let mut carver = Carver(0);
        let layout = carver.part(LayoutPtrs::space_bytes(plan, row_tile)?)?;
        let gate_up = carver.part(bytes(gate_up_bytes_of_slot(shape.intermediate()))?)?;
        let end = carver.0;
        Ok(Self {
            layout,
            front: gate_up,
            front_scales: gate_up,
            activated: gate_up,
            activated_scales: gate_up,
            back: gate_up,
            gate_up,
            end,
            ..Self::default()
        })
    }

    /// The parts of the workspace that starts at this address.
    pub(super) fn at(&self, workspace: DevicePtr, choice: &LayerChoice) -> Result<LayerParts> {
        workspace.require_aligned("workspace", PART_BYTES as u64)?;
        let part = |offset: usize| workspace.byte_add(offset);
        let scales = |offset: usize| self.scaled.then(|| part(offset).cast());
        let second = choice.second_row_tile().map(|tile| SecondWorklist::carve(part(self.second_worklist), tile));
        let (counters, words) = (part(self.counters.0).cast(), self.counters.1);
        let counters = choice.joined.then_some(RouteExtra::Counters { counters, words });
        Ok(LayerParts {
            layout: LayoutPtrs::carve(part(self.layout), &choice.plan, choice.row_tile)?,
            extra: second.map(RouteExtra::Worklist).or(counters),
            front: part(self.front),
            front_scales: scales(self.front_scales),
            activated: part(self.activated),
            activated_scales: scales(self.activated_scales),
            back: part(self.back).cast(),
            gate_up: part(self.gate_up).cast(),
        })
    }
}

/// Where the parts of a call's workspace are. Parts that are not needed at the same time may share their memory: after
/// a call, the layout, the activated rows and GEMM 2's are there; after a call in one launch, none of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerParts {
    /// The layout's lists.
    pub layout: LayoutPtrs,
    /// GEMM 2's own worklist, where its row tile is another than GEMM 1's; counters, where both are one launch.
    pub(super) extra: Option<RouteExtra>,
    /// Permuted rows `[M_sum, H]`: e4m3 or bf16.
    pub front: DevicePtr,
    /// Scales of `front`, [`ScaleFormat::HOPPER`]; none where it is bf16.
    pub front_scales: Option<DevicePtr<f32>>,
    /// Activated rows `[M_sum, I]`: e4m3 or bf16.
    pub activated: DevicePtr,
    /// Scales of `activated`, as those of `front`.
    pub activated_scales: Option<DevicePtr<f32>>,
    /// GEMM 1's `gate | up` `[M_sum, 2 I]` unless the activation is inside it or both GEMMs are one launch, then GEMM 2's
    /// rows `[M_sum, H]`: bf16.
    pub back: DevicePtr<bf16>,
    /// Where one launch does it all, GEMM 1's results of every slot; where both GEMMs are one launch, of every row.
    pub(super) gate_up: DevicePtr<bf16>,
}

#[cfg(test)]
mod tests;
