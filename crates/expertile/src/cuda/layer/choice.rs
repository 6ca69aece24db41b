//! How a call of the layer is cut: a pure function of the layer, the number of tokens and the device.

use super::{ALIGNMENT, LayerConfig};
use crate::cuda::arguments::{LayoutBuffers, SecondWorklist, require_aligned};
use crate::cuda::gemm::{GemmKernel, GemmShape};
use crate::cuda::{permute, route};
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::gemm::ActivationFormat;
use crate::layer::LayerShape;
use crate::plan::{Plan, TokenExperts};
use crate::quantize::ScaleFormat;
use std::fmt;

/// Parts of the workspace start on as many bytes, and so does the workspace itself.
pub(super) const PART_BYTES: usize = 256;

/// What a call with a number of tokens does. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerChoice {
    /// The buffer's rows: the tight bound, aligned to [`ALIGNMENT`].
    pub plan: Plan,
    /// Rows of an entry of the layout's worklist, and so of GEMM 1's tiles. GEMM 2 has another list where its row tile is another.
    pub row_tile: usize,
    /// How `[rows, H]` times `[2 I, H]` is cut.
    pub gemm1: GemmKernel,
    /// How `[rows, I]` times `[H, I]` is cut.
    pub gemm2: GemmKernel,
    /// Whether GEMM 1 stores activated, quantized rows, so that `gate | up` never reaches memory.
    pub activation_inside_gemm1: bool,
    /// Kernels that one call launches.
    pub launches: usize,
    /// Bytes of workspace of such a call; see [`super::Layer::workspace_bytes`] for a workspace that serves smaller calls, too.
    pub workspace_bytes: usize,
}

impl LayerChoice {
    /// The choice for `tokens` tokens on a device of that many multiprocessors.
    ///
    /// Tiles are those that are expected to take least for `M * topk` slots of which `E / G` are here; numbers of tokens within an
    /// eighth of each other have the same.
    ///
    /// # Errors
    /// [`Error::Value`] for a `topk`, a number of experts or a width that the kernels do not take; as [`Plan::tight`].
    pub fn new(shape: &LayerShape, config: &LayerConfig, tokens: usize, multiprocessors: usize) -> Result<Self> {
        let tiles = Tiles::new(shape, config, alike(tokens), multiprocessors)?;
        Ok(Self::with_offsets(shape, config, tokens, &tiles, multiprocessors)?.0)
    }

    /// The same with tiles that have been chosen, and where the workspace's parts are.
    pub(super) fn with_offsets(
        shape: &LayerShape,
        config: &LayerConfig,
        tokens: usize,
        tiles: &Tiles,
        multiprocessors: usize,
    ) -> Result<(Self, Offsets)> {
        let plan = Plan::tight(tokens, config.topk, shape.local_experts(), ALIGNMENT, TokenExperts::MayRepeat)?;
        let Tiles { gemm1, gemm2, activation_inside_gemm1 } = *tiles;
        let slots = tokens * config.topk;
        let row_tiles = (gemm1.row_tile(), second_row_tile(&gemm1, &gemm2));
        let offsets = Offsets::new(shape, config, &plan, row_tiles, activation_inside_gemm1, multiprocessors)?;
        let choice = Self {
            plan,
            row_tile: gemm1.row_tile(),
            gemm1,
            gemm2,
            activation_inside_gemm1,
            launches: launches(config.activations, slots, activation_inside_gemm1),
            workspace_bytes: offsets.end,
        };
        Ok((choice, offsets))
    }

    /// The row tile of GEMM 2's own worklist, if it has one.
    pub(super) fn second_row_tile(&self) -> Option<usize> {
        second_row_tile(&self.gemm1, &self.gemm2)
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
    pub(super) activation_inside_gemm1: bool,
}

impl Tiles {
    /// What is expected to take least for so many tokens.
    fn new(shape: &LayerShape, config: &LayerConfig, tokens: usize, multiprocessors: usize) -> Result<Self> {
        let (hidden, intermediate, experts) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        if config.global_experts == 0 {
            return Err(Error::value("global_experts", 0, "at least 1"));
        }
        let slots = checked_mul("M * topk", tokens, config.topk)?;
        let rows = checked_mul("M * topk * E", slots, experts)?.div_ceil(config.global_experts).min(slots);
        let format = config.weight_format();
        let of = |n, k| GemmShape { n, k, format, experts, rows, most_rows: tokens };
        let split = |shape: &GemmShape| GemmKernel::choose_split(shape, multiprocessors).filter(|_| config.split_k);
        let (up, down) = (of(2 * intermediate, hidden), of(hidden, intermediate));
        let (gemm1, activation_inside_gemm1) = split(&up)
            .map_or_else(|| GemmKernel::choose_before_activation(&up, multiprocessors), |kernel| (kernel, false));
        let gemm2 = split(&down).unwrap_or_else(|| GemmKernel::choose(&down, multiprocessors));
        Ok(Self { gemm1, gemm2, activation_inside_gemm1 })
    }
}

/// The least number of tokens that has the same tiles: of each power of two on its way to the next, every eighth.
fn alike(tokens: usize) -> usize {
    let step = tokens.max(8).ilog2() - 3;
    (tokens >> step << step).max(1)
}

/// Routing and permute, two GEMMs, the activation unless it is inside, unpermute.
fn launches(activations: ActivationFormat, slots: usize, activation_inside: bool) -> usize {
    let before = match activations {
        ActivationFormat::E4m3 => permute::launches(slots),
        ActivationFormat::Bf16 => 2,
    };
    if slots == 0 { 0 } else { before + 4 - usize::from(activation_inside) }
}

impl fmt::Display for LayerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows aligned to {}, gemm1 {}", self.plan.m_sum(), self.plan.alignment(), self.gemm1)?;
        if self.activation_inside_gemm1 {
            write!(f, ", activation inside gemm1")?;
        }
        write!(f, ", gemm2 {}, {} launches, {} bytes of workspace", self.gemm2, self.launches, self.workspace_bytes)
    }
}

/// Everything that calls of up to a number of tokens choose.
#[derive(Debug, Default)]
pub(super) struct Choices {
    pub(super) row_tiles: Vec<usize>,
    /// How GEMMs are cut, and whether the activation is inside.
    pub(super) gemms: Vec<(GemmKernel, bool)>,
    /// From how many tokens on which tiles are chosen, ascending.
    tiles: Vec<(usize, Tiles)>,
    /// Numbers of tokens after which one token more takes less workspace, with the bytes up to there.
    peaks: Vec<(usize, usize)>,
}

impl Choices {
    pub(super) fn new(
        shape: &LayerShape,
        config: &LayerConfig,
        max_tokens: usize,
        multiprocessors: usize,
    ) -> Result<Self> {
        if max_tokens == 0 {
            return Err(Error::value("max_tokens", 0, "at least 1"));
        }
        // The largest first: what is too large is refused at once.
        LayerChoice::new(shape, config, max_tokens, multiprocessors)?;
        let (mut all, mut most) = (Self::default(), 0);
        for tokens in 1..=max_tokens {
            if alike(tokens) == tokens {
                let tiles = Tiles::new(shape, config, tokens, multiprocessors)?;
                if all.tiles.last().is_none_or(|(_, last)| *last != tiles) {
                    all.tiles.push((tokens, tiles));
                }
            }
            let tiles = all.tiles(tokens);
            let choice = LayerChoice::with_offsets(shape, config, tokens, tiles, multiprocessors)?.0;
            if !all.row_tiles.contains(&choice.row_tile) {
                all.row_tiles.push(choice.row_tile);
            }
            for gemm in [(choice.gemm1, choice.activation_inside_gemm1), (choice.gemm2, false)] {
                if !all.gemms.contains(&gemm) {
                    all.gemms.push(gemm);
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

    /// What a call of so many tokens chooses.
    pub(super) fn tiles(&self, tokens: usize) -> &Tiles {
        &self.tiles[self.tiles.partition_point(|&(first, _)| first <= tokens.max(1)) - 1].1
    }

    /// Bytes that serve calls of up to as many tokens as this choice is for.
    pub(super) fn workspace_bytes(&self, choice: &LayerChoice) -> usize {
        let before = self.peaks.iter().filter(|(tokens, _)| *tokens < choice.plan.tokens());
        before.map(|&(_, bytes)| bytes).fold(choice.workspace_bytes, usize::max)
    }
}

/// Where the workspace's parts start. What must survive from call to call comes first, wherever the others end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offsets {
    layout: usize,
    second_worklist: usize,
    front: usize,
    front_scales: usize,
    activated: usize,
    activated_scales: usize,
    back: usize,
    end: usize,
}

/// Parts one behind the other.
struct Carver(usize);

impl Carver {
    fn part(&mut self, bytes: usize) -> Result<usize> {
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
        (row_tile, second_row_tile): (usize, Option<usize>),
        activation_inside_gemm1: bool,
        multiprocessors: usize,
    ) -> Result<Self> {
        let (m_sum, hidden, intermediate) = (plan.m_sum(), shape.hidden(), shape.intermediate());
        let e4m3 = config.activations == ActivationFormat::E4m3;
        let rows =
            |width: usize, bytes: usize| checked_mul("bytes of rows", m_sum, checked_mul("width", width, bytes)?);
        let operand = |width: usize| rows(width, config.weight_format().bytes());
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
        let layout = carver.part(LayoutBuffers::space_bytes(plan, row_tile)?)?;
        let second_bytes = second_row_tile.map_or(Ok(0), |tile| SecondWorklist::space_bytes(plan, tile))?;
        let second_worklist = carver.part(second_bytes)?;
        if activation_inside_gemm1 {
            // GEMM 2's rows may stand where the permuted ones, which are half as wide, stood before.
            let (activated, activated_scales) =
                (carver.part(operand(intermediate)?)?, carver.part(scales(intermediate)?)?);
            let (front, front_scales) = (carver.part(operand(hidden)?)?, carver.part(scales(hidden)?)?);
            let mut back = Carver(front);
            back.part(rows(hidden, 2)?)?;
            let end = carver.0.max(back.0);
            return Ok(Self {
                layout,
                second_worklist,
                front,
                front_scales,
                activated,
                activated_scales,
                back: front,
                end,
            });
        }
        // The permuted rows have been multiplied when the activated ones are written, and so have `gate | up` by then.
        let widest = hidden.max(intermediate);
        let (front, front_scales) = (carver.part(operand(widest)?)?, carver.part(scales(widest)?)?);
        let back = carver.part(rows(hidden.max(checked_mul("2 I", intermediate, 2)?), 2)?)?;
        Ok(Self {
            layout,
            second_worklist,
            front,
            front_scales,
            activated: front,
            activated_scales: front_scales,
            back,
            end: carver.0,
        })
    }

    /// The parts of the workspace that starts at this address.
    pub(super) fn at(&self, workspace: u64, choice: &LayerChoice) -> Result<LayerParts> {
        require_aligned("workspace", workspace, PART_BYTES as u64)?;
        let part = |offset: usize| workspace + offset as u64;
        let second = choice.second_row_tile().map(|tile| SecondWorklist::carve(part(self.second_worklist), tile));
        Ok(LayerParts {
            layout: LayoutBuffers::carve(part(self.layout), &choice.plan, choice.row_tile)?,
            second_worklist: second,
            front: part(self.front),
            front_scales: part(self.front_scales),
            activated: part(self.activated),
            activated_scales: part(self.activated_scales),
            back: part(self.back),
        })
    }
}

/// Where the parts of a call's workspace are. Parts that are not needed at the same time may share their memory: after a call,
/// the layout, the activated rows and GEMM 2's are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerParts {
    /// The layout's lists.
    pub layout: LayoutBuffers,
    /// GEMM 2's own, where its row tile is another than GEMM 1's.
    pub(super) second_worklist: Option<SecondWorklist>,
    /// Permuted rows `[M_sum, H]`: e4m3 or bf16.
    pub front: u64,
    /// Scales of `front`, [`ScaleFormat::HOPPER`]; of no size where it is bf16.
    pub front_scales: u64,
    /// Activated rows `[M_sum, I]`: e4m3 or bf16.
    pub activated: u64,
    /// Scales of `activated`, as those of `front`.
    pub activated_scales: u64,
    /// GEMM 1's `gate | up` `[M_sum, 2 I]` unless the activation is inside it, then GEMM 2's rows `[M_sum, H]`: bf16.
    pub back: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::Activation;
    use crate::dtype::Dtype;

    const H200: usize = 132;

    fn config(topk: usize, global_experts: usize, activations: ActivationFormat) -> LayerConfig {
        LayerConfig {
            topk,
            ids: Dtype::I32,
            global_experts,
            input: Dtype::Bf16,
            output: Dtype::Bf16,
            activation: Activation::default(),
            activations,
            weight_on_input: false,
            split_k: false,
        }
    }

    /// Name, `H`, `I`, `E`, `G`, `topk`.
    const SHAPES: [(&str, usize, usize, usize, usize, usize); 4] = [
        ("dsv3", 7168, 2048, 256, 256, 8),
        ("dsv3_ep8", 7168, 2048, 32, 256, 8),
        ("qwen235", 4096, 1536, 128, 128, 8),
        ("mixtral", 4096, 14336, 8, 8, 2),
    ];

    fn choice(shape: usize, tokens: usize) -> LayerChoice {
        let (_, hidden, intermediate, experts, global, topk) = SHAPES[shape];
        let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
        LayerChoice::new(&shape, &config(topk, global, ActivationFormat::E4m3), tokens, H200).unwrap()
    }

    #[test]
    fn a_decode_call_of_deepseek_v3_takes_a_tenth_of_the_references_workspace() {
        // 64 tokens: the reference sizes for 33,024 rows of GEMM 1's result and of GEMM 2's, both bf16.
        const REFERENCE: usize = 33_024 * (2 * 4096 + 2 * 7168);
        let choice = choice(0, 64);
        println!("{choice}; the reference: {REFERENCE}");
        assert_eq!(choice.plan.m_sum(), 2304);
        assert!(10 * choice.workspace_bytes < REFERENCE, "{choice}");
    }

    #[test]
    fn numbers_of_tokens_within_an_eighth_have_the_same_tiles_and_all_have_those_of_the_choices() {
        assert_eq!(
            [0, 1, 7, 15, 16, 17, 18, 31, 63, 64, 71, 4096, 4607].map(alike),
            [1, 1, 7, 15, 16, 16, 18, 30, 60, 64, 64, 4096, 4096]
        );
        for (_, hidden, intermediate, experts, global, topk) in SHAPES {
            for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
                let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
                let config = config(topk, global, activations);
                let choices = Choices::new(&shape, &config, 3000, H200).unwrap();
                for tokens in (0..100).chain((100..=3000).step_by(37)) {
                    let choice = LayerChoice::new(&shape, &config, tokens, H200).unwrap();
                    let Tiles { gemm1, gemm2, activation_inside_gemm1 } = *choices.tiles(tokens);
                    let tiles = (gemm1, gemm2, activation_inside_gemm1);
                    assert_eq!(tiles, (choice.gemm1, choice.gemm2, choice.activation_inside_gemm1), "{tokens} tokens");
                }
            }
        }
    }

    #[test]
    fn k_is_split_only_where_a_layer_may() {
        let shape = LayerShape::new(7168, 2048, 1).unwrap();
        let config = |split_k| LayerConfig { split_k, ..config(1, 1, ActivationFormat::E4m3) };
        let splits = |split_k, tokens| {
            let choice = LayerChoice::new(&shape, &config(split_k), tokens, H200).unwrap();
            (choice.gemm1.splits(), choice.gemm2.splits())
        };
        for tokens in (1..200).chain([1000, 10_000]) {
            assert_eq!(splits(false, tokens), (1, 1), "{tokens} tokens");
        }
        assert_eq!([1, 64, 72].map(|tokens| splits(true, tokens)), [(2, 1), (2, 1), (1, 1)]);
    }

    #[test]
    fn launches_are_those_of_routing_and_permute_and_an_activation_inside_saves_one() {
        let with = |activations, tokens| {
            let shape = LayerShape::new(4096, 14336, 8).unwrap();
            LayerChoice::new(&shape, &config(2, 8, activations), tokens, H200).unwrap()
        };
        for tokens in [1, 64, 128, 256, 4096, 4097, 16384] {
            let choice = with(ActivationFormat::E4m3, tokens);
            // Up to 8192 slots routing is part of the permute's launch.
            let apart = if tokens <= 4096 { 5 } else { 6 };
            assert_eq!(choice.launches, apart - usize::from(choice.activation_inside_gemm1), "{tokens}: {choice}");
            let choice = with(ActivationFormat::Bf16, tokens);
            assert_eq!((choice.launches, choice.activation_inside_gemm1), (6, false), "{tokens}: {choice}");
        }
        assert_eq!([ActivationFormat::E4m3, ActivationFormat::Bf16].map(|of| with(of, 0).launches), [0, 0]);
        assert!(with(ActivationFormat::E4m3, 16384).activation_inside_gemm1);
    }

    #[test]
    fn gemm2_has_a_worklist_of_its_own_where_its_row_tile_is_another() {
        for shape in 0..SHAPES.len() {
            for tokens in (0..600).chain([1024, 4096, 16384, 65536]) {
                let choice = choice(shape, tokens);
                assert_eq!(choice.gemm1.row_tile(), choice.row_tile);
                let own = (choice.gemm2.row_tile() != choice.row_tile).then_some(choice.gemm2.row_tile());
                assert_eq!(choice.second_row_tile(), own);
            }
        }
    }

    /// Every part but the layout's lists, as (start, bytes): those that are needed at the same time, one behind the other.
    fn spans(
        parts: &LayerParts,
        choice: &LayerChoice,
        hidden: usize,
        intermediate: usize,
        e4m3: bool,
    ) -> Vec<Vec<(u64, usize)>> {
        let m_sum = choice.plan.m_sum();
        let operand = |at: u64, width: usize| (at, m_sum * width * if e4m3 { 1 } else { 2 });
        let scales = |at: u64, width: usize| (at, if e4m3 { 4 * m_sum * width / 128 } else { 0 });
        let front = [operand(parts.front, hidden), scales(parts.front_scales, hidden)];
        let activated = [operand(parts.activated, intermediate), scales(parts.activated_scales, intermediate)];
        let gate_up = (parts.back, 4 * m_sum * intermediate);
        let rows = (parts.back, 2 * m_sum * hidden);
        if choice.activation_inside_gemm1 {
            return vec![[activated, front].concat(), [&activated[..], &[rows]].concat()];
        }
        vec![
            [&front[..], &[gate_up]].concat(),
            [&activated[..], &[gate_up]].concat(),
            [&activated[..], &[rows]].concat(),
        ]
    }

    #[test]
    fn parts_that_are_needed_together_do_not_overlap_and_stay_inside_the_workspace() {
        let (mut inside, mut with_second) = (0, 0);
        for (hidden, intermediate, experts, topk, tokens) in [
            (128, 128, 1, 1, 1),
            (2944, 384, 7, 3, 33),
            (256, 2048, 256, 8, 64),
            (256, 2048, 4, 2, 500),
            (7168, 256, 256, 8, 600),
        ] {
            for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
                let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
                let config = config(topk, experts, activations);
                let tiles = Tiles::new(&shape, &config, tokens, H200).unwrap();
                let (choice, offsets) = LayerChoice::with_offsets(&shape, &config, tokens, &tiles, H200).unwrap();
                let LayerChoice { plan, row_tile, activation_inside_gemm1, .. } = choice;
                inside += usize::from(activation_inside_gemm1);
                let parts = offsets.at(4096, &choice).unwrap();
                let routing = route::workspace_bytes(&plan, H200).unwrap();
                let lists = LayoutBuffers::space_bytes(&plan, row_tile).unwrap();
                let mut before = vec![(4096, routing), (parts.layout.expert_num_tokens, lists)];
                if let Some(second) = parts.second_worklist {
                    before.push((second.header, SecondWorklist::space_bytes(&plan, second.row_tile).unwrap()));
                    with_second += 1;
                }
                let e4m3 = activations == ActivationFormat::E4m3;
                for spans in spans(&parts, &choice, hidden, intermediate, e4m3) {
                    let mut end = 4096;
                    for &(at, bytes) in before.iter().chain(&spans) {
                        assert!(at >= end && at % 256 == 0, "{before:?} {spans:?} {choice}");
                        end = at + bytes as u64;
                    }
                    assert!(end <= 4096 + choice.workspace_bytes as u64, "{end}: {spans:?} {choice}");
                }
                assert!(offsets.at(4096 + 16, &choice).is_err());
            }
        }
        assert!(inside > 0 && with_second > 0, "{inside}, {with_second}");
    }

    #[test]
    fn a_workspace_serves_every_call_of_fewer_tokens() {
        for (_, hidden, intermediate, experts, global, topk) in SHAPES {
            for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
                let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
                let config = config(topk, global, activations);
                let choices = Choices::new(&shape, &config, 1500, H200).unwrap();
                let mut most = 0;
                for tokens in 1..=1500 {
                    let choice = LayerChoice::new(&shape, &config, tokens, H200).unwrap();
                    most = most.max(choice.workspace_bytes);
                    assert_eq!(choices.workspace_bytes(&choice), most, "{tokens} tokens");
                    assert!(choices.row_tiles.contains(&choice.row_tile));
                    assert!(choices.gemms.contains(&(choice.gemm1, choice.activation_inside_gemm1)));
                    assert!(choices.gemms.contains(&(choice.gemm2, false)));
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let shape = LayerShape::new(256, 128, 4).unwrap();
        let good = config(2, 4, ActivationFormat::E4m3);
        let refuse = |config: LayerConfig, tokens: usize, start: &str| {
            let error = LayerChoice::new(&shape, &config, tokens, H200).unwrap_err();
            assert!(error.to_string().starts_with(start), "{error}");
        };
        refuse(LayerConfig { topk: 0, ..good }, 1, "topk is 0");
        refuse(LayerConfig { global_experts: 0, ..good }, 1, "global_experts is 0");
        refuse(good, 1 << 31, "M * topk overflows");
        refuse(good, usize::MAX, "M * topk overflows");
    }
}
