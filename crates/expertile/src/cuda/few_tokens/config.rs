//! What the kernel of few tokens is specialised for, and how its shared memory is used.

use crate::activation::Activation;
use crate::cuda::definitions::{activation_definitions, float_number, half_number};
use crate::cuda::driver::Source;
use crate::cuda::gemm::values_of_block;
use crate::cuda::route::RouteConfig;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::{WEIGHT_BLOCK, WeightFormat};
use crate::layer::{LayerConfig, LayerShape};

/// Most tokens of a kernel, one for each. Beyond, the consumers would be slower than memory.
pub(in crate::cuda) const TOKENS: [usize; 4] = [1, 2, 4, 8];

/// Slots of a call, whose experts have a counter each: the most tokens with the most slots.
const COUNTED_EXPERTS: usize = 256;
/// Bytes of the counters that survive a launch: `Counters` in kernels/few_tokens/storage.cuh.
pub(in crate::cuda) const COUNTER_BYTES: usize = 64 + 2 * 4 * COUNTED_EXPERTS;

pub(super) const THREADS: u32 = 640;
/// Shared memory that a block may have on Hopper.
const MOST_BYTES: usize = 227 * 1024;
/// More stages are not worth their barriers.
const MOST_STAGES: usize = 24;
/// With fewer, memory would wait for the multiprocessors.
const LEAST_STAGES: usize = 8;
const MOST_ACTIVATED_STAGES: usize = 32;
/// Warps that activate, each 128 columns at a time: so many are in the ring at once.
const ACTIVATING_WARPS: usize = 8;

/// Weight rows of a stage.
const STAGE_ROWS: usize = 64;
/// Rows of a pattern of the swizzle, of which a tile has whole ones.
const PATTERN_ROWS: usize = 8;
const ROW_BYTES: usize = 128;
/// What beginning and ending a tile takes, in rows that could be loaded meanwhile.
const ROWS_OF_A_PAUSE: usize = 6;
/// Columns of the products that there are registers for.
const MOST_COLUMNS: usize = 32;
const TILE_SLOTS: usize = 4;
const CONSUMERS: usize = 2;
const BARRIER: usize = 8;
const WORD: usize = 4;

/// What the kernel that computes a layer of few tokens in one launch is specialised for. Plain data: a pure function of
/// the layer and the most tokens of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FewTokensConfig {
    hidden: usize,
    intermediate: usize,
    experts: usize,
    route: RouteConfig,
    format: WeightFormat,
    input: Dtype,
    output: Dtype,
    activation: Activation,
    weight_on_input: bool,
    /// Most tokens of a call: one of [`TOKENS`].
    tokens: usize,
    /// Weight rows of a tile of GEMM 1, and of an expert in a tile of GEMM 2.
    first_rows: usize,
    second_rows: usize,
    /// Blocks of K whose weights are in flight.
    stages: usize,
    /// Blocks of K of activated rows that wait to be multiplied.
    activated_stages: usize,
}

impl FewTokensConfig {
    /// The kernel for up to `tokens` tokens (1, 2, 4 or 8) of a layer on a device of that many multiprocessors; none if its
    /// rows leave too little shared memory for weights.
    #[must_use]
    pub fn new(shape: &LayerShape, config: &LayerConfig, tokens: usize, multiprocessors: usize) -> Option<Self> {
        let (hidden, intermediate) = (shape.hidden(), shape.intermediate());
        let slots = tokens * config.topk;
        if slots > COUNTED_EXPERTS || config.global_experts == 0 {
            return None;
        }
        let format = config.weight_format();
        let live = live_slots(shape, config, tokens).min(shape.local_experts());
        let whole = Self {
            hidden,
            intermediate,
            experts: shape.local_experts(),
            // The kernel makes no tiles of rows.
            route: RouteConfig { topk: config.topk, ids: config.ids, row_tile: 1 },
            format,
            input: config.input,
            output: config.output,
            activation: config.activation,
            weight_on_input: config.weight_on_input,
            tokens,
            first_rows: rows_of_tile(live, 2 * intermediate, multiprocessors),
            second_rows: rows_of_tile(1, hidden, multiprocessors),
            stages: 0,
            activated_stages: 0,
        };
        // Activated rows of two tiles if there is room for as many, else of one, else as few as go.
        let of_tile = intermediate.div_ceil(values_of_block(config.activation_format));
        let least = ACTIVATING_WARPS * WEIGHT_BLOCK / values_of_block(config.activation_format);
        let activated = [2 * of_tile, of_tile, least].map(|stages| stages.clamp(least, MOST_ACTIVATED_STAGES));
        let with = |activated_stages, stages| Self { stages, activated_stages, ..whole };
        let fits = |activated_stages| {
            let mut candidates = (LEAST_STAGES..=MOST_STAGES).rev().map(|stages| with(activated_stages, stages));
            candidates.find(|config| config.shared_bytes() <= MOST_BYTES)
        };
        let enough = |config: &Self| config.stages >= 2 * LEAST_STAGES;
        let found: Vec<Self> = activated.into_iter().filter_map(fits).collect();
        found.iter().copied().find(enough).or_else(|| found.into_iter().max_by_key(|config| config.stages))
    }

    /// The kernels that a layer uses for calls of up to `max_tokens` tokens, ascending.
    pub(in crate::cuda) fn all(
        shape: &LayerShape,
        config: &LayerConfig,
        max_tokens: usize,
        multiprocessors: usize,
    ) -> Vec<Self> {
        if !config.one_launch || config.split_k {
            return Vec::new();
        }
        let takes_less = |tokens| tokens < 2 * max_tokens.max(1) && takes_less_than_steps(shape, config, tokens);
        let needed = TOKENS.iter().take_while(|&&tokens| takes_less(tokens));
        needed.map_while(|&tokens| Self::new(shape, config, tokens, multiprocessors)).collect()
    }

    /// Most tokens of a call.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Experts in a tile of GEMM 2.
    fn group(&self) -> usize {
        (STAGE_ROWS / self.second_rows).min(MOST_COLUMNS / self.tokens)
    }

    /// Columns of the products of both GEMMs.
    fn columns(&self) -> [usize; 2] {
        [self.tokens, self.group() * self.tokens].map(|columns| columns.next_multiple_of(8))
    }

    fn blocks(&self, values: usize) -> usize {
        values.div_ceil(values_of_block(self.format.usual_activations()))
    }

    fn scaled(&self) -> bool {
        self.format == WeightFormat::E4m3
    }

    /// `sizeof(SharedStorage)`, member by member. The kernel compares.
    pub(super) fn shared_bytes(&self) -> usize {
        let [up_columns, down_columns] = self.columns();
        let blocks = [self.blocks(self.hidden), self.blocks(self.intermediate)];
        let slots = self.tokens * self.route.topk;
        let rows = (blocks[0] * up_columns + self.activated_stages * down_columns) * ROW_BYTES;
        let (row_scales, weight_scales) = match self.scaled() {
            true => (
                blocks[0] * up_columns + self.activated_stages * down_columns,
                (2 * blocks[0]).max(2 * self.group() * blocks[1]),
            ),
            false => (up_columns + down_columns, 1),
        };
        let words = row_scales + 2 * self.counted_experts() + TILE_SLOTS * weight_scales + 4 * slots + 4;
        let results = slots * self.second_rows * 2;
        let before_barriers = self.stages * STAGE_ROWS * ROW_BYTES + rows + TILE_SLOTS * 16 + words * WORD + results;
        let barriers = 2 * self.stages + 2 * self.activated_stages + 4 * TILE_SLOTS + CONSUMERS + 1;
        (before_barriers.next_multiple_of(BARRIER) + barriers * BARRIER).next_multiple_of(16)
    }

    fn counted_experts(&self) -> usize {
        self.experts.next_multiple_of(4)
    }

    /// Rows of a box of `w13` and of `w2`.
    pub(super) fn weight_box_rows(&self) -> [usize; 2] {
        [self.first_rows, self.second_rows]
    }

    pub(super) fn format(&self) -> WeightFormat {
        self.format
    }

    pub(super) fn route(&self) -> RouteConfig {
        self.route
    }

    /// The kernel's source.
    ///
    /// # Errors
    /// [`Error::Value`] for other numbers of tokens, [`Error::Dtype`] for types and [`Error::Name`] and [`Error::Parameter`] for
    /// an activation that the kernels do not take, as those of the steps that it replaces.
    pub fn source(&self) -> Result<Source> {
        if !TOKENS.contains(&self.tokens) {
            return Err(Error::value("tokens", self.tokens, format!("one of {TOKENS:?}")));
        }
        let mut definitions = self.route.definitions()?;
        definitions.extend([
            ("HOST_BF16", i64::from(!self.scaled())),
            ("HOST_TOKENS", self.tokens as i64),
            ("HOST_EXPERTS", self.counted_experts() as i64),
            ("HOST_HIDDEN", self.hidden as i64),
            ("HOST_INTERMEDIATE", self.intermediate as i64),
            ("HOST_FIRST_ROWS", self.first_rows as i64),
            ("HOST_SECOND_ROWS", self.second_rows as i64),
            ("HOST_STAGES", self.stages as i64),
            ("HOST_ACTIVATED_STAGES", self.activated_stages as i64),
            ("HOST_THREADS", i64::from(THREADS)),
            ("HOST_SHARED_BYTES", self.shared_bytes() as i64),
            ("HOST_COUNTED_EXPERTS", COUNTED_EXPERTS as i64),
            ("HOST_WEIGHT_ON_INPUT", i64::from(self.weight_on_input)),
            ("INPUT", half_number("hidden_states", self.input)?),
            ("OUTPUT", float_number("output", self.output)?),
        ]);
        definitions.extend(activation_definitions(&self.activation)?);
        let text = include_str!("../kernels/few_tokens/sm90_few_tokens.cu");
        Ok(Source::new("sm90_few_tokens.cu", text, definitions))
    }
}

/// Slots that are expected on this device: experts that have tokens, if no two slots have the same.
fn live_slots(shape: &LayerShape, config: &LayerConfig, tokens: usize) -> usize {
    (tokens * config.topk * shape.local_experts()).div_ceil(config.global_experts.max(1))
}

/// Whether one launch for up to so many tokens takes less time than several, as measured on an H200
/// (`benches/results/2026-11-30-h200-few-tokens.md`). Several take about the same time beyond the reading of weights,
/// whatever the layer. One takes more the more live slots there are, and with e4m3, whose products are scaled outside the
/// matrix unit, the more tokens each of them is multiplied with.
fn takes_less_than_steps(shape: &LayerShape, config: &LayerConfig, tokens: usize) -> bool {
    /// Up to so many tokens one launch was never slower, whatever the layer.
    const ALWAYS: usize = 2;
    const MOST_BF16_TOKENS: usize = 4;
    /// Products of e4m3: tokens times live slots. Where H is small (2048 was measured), one launch was slower from 32 of
    /// them on.
    const MOST_PRODUCTS: usize = 64;
    const MOST_PRODUCTS_OF_SMALL_ROWS: usize = 16;
    const SMALL_ROWS: usize = 3072;
    /// From here on several launches are as fast: reading an expert's weights takes long beside what a launch takes.
    const LARGEST_INTERMEDIATE: usize = 8192;
    match config.weight_format() {
        WeightFormat::Bf16 => tokens <= MOST_BF16_TOKENS,
        _ if tokens <= ALWAYS => true,
        _ => {
            let most = if shape.hidden() < SMALL_ROWS { MOST_PRODUCTS_OF_SMALL_ROWS } else { MOST_PRODUCTS };
            shape.intermediate() < LARGEST_INTERMEDIATE && tokens * live_slots(shape, config, tokens) <= most
        }
    }
}

/// Rows of a tile, of `matrices` matrices of `outputs` rows each: those with which the busiest multiprocessor has least
/// to load, and of these the most.
fn rows_of_tile(matrices: usize, outputs: usize, multiprocessors: usize) -> usize {
    let busiest = |rows: &usize| {
        let tiles = (matrices * outputs.div_ceil(*rows)).div_ceil(multiprocessors.max(1));
        tiles * (rows + ROWS_OF_A_PAUSE)
    };
    let candidates = (1..=STAGE_ROWS / PATTERN_ROWS).rev().map(|patterns| patterns * PATTERN_ROWS);
    candidates.min_by_key(busiest).unwrap_or(STAGE_ROWS)
}

/// Bytes of `gate | up` of every slot: `[M * topk, 2 I]` bf16.
pub(in crate::cuda) const fn gate_up_bytes_of_slot(intermediate: usize) -> usize {
    2 * 2 * intermediate
}

const _: () = assert!(WEIGHT_BLOCK == 128, "SCALE_BLOCK of the kernels");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::ActivationFormat;

    const H200: usize = 132;

    #[test]
    fn tiles_have_the_rows_with_which_the_busiest_multiprocessor_has_least_to_load() {
        // 192 tiles of 64 rows would leave 72 multiprocessors with one where the others have two.
        assert_eq!(rows_of_tile(8, 2 * 768, H200), 48);
        assert_eq!(rows_of_tile(8, 2 * 256, H200), 32);
        // Many tiles: small ones gain less than their pauses cost.
        assert_eq!(rows_of_tile(16, 2 * 1536, H200), 64);
        assert_eq!([2048, 2880, 4096, 7168].map(|hidden| rows_of_tile(1, hidden, H200)), [16, 24, 32, 56]);
        assert_eq!(rows_of_tile(1, 128, 0), 64);
    }

    #[test]
    fn a_kernel_fits_or_there_is_none() {
        for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
            for hidden in [128, 2048, 7168, 16384, 65536] {
                for intermediate in [128, 768, 2048, 14336] {
                    let shape = LayerShape::new(hidden, intermediate, 256).unwrap();
                    let config = LayerConfig::new(8, 256, activations);
                    for tokens in TOKENS {
                        let Some(kernel) = FewTokensConfig::new(&shape, &config, tokens, H200) else {
                            assert!(hidden >= 16384, "none for H {hidden}, I {intermediate}, {tokens} tokens");
                            continue;
                        };
                        assert!(kernel.shared_bytes() <= MOST_BYTES, "{kernel:?}");
                        assert!(kernel.stages >= LEAST_STAGES, "{kernel:?}");
                        // A warp that activates meets every phase of its barriers.
                        let least =
                            ACTIVATING_WARPS * WEIGHT_BLOCK / values_of_block(kernel.format.usual_activations());
                        assert!(kernel.activated_stages >= least, "{kernel:?}");
                    }
                }
            }
        }
    }
}
