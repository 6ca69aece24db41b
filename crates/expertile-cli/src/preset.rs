//! Layers of known models with made-up weights: the same numbers for the same seed, on every machine.
//!
//! Every row of every matrix has its own stream of random numbers, so rows can be made in any order, by any thread, and
//! again for the check. Only the packed weights are kept; beside them there is one expert's matrix at a time.

use crate::error::{Error, Result};
use crate::weights::{ExpertWeights, Part, Space, TakePart};
use crate::{memory, output};
use clap::ValueEnum;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::int4::{self, Int4Scales};
use expertile::{
    Activation, E4m3, Float, GroupWorth, Groups, LayerShape, MatrixRef, Normalization, Router, Scoring, WeightFormat,
    mxfp4,
};
use expertile_checkpoint::{Biases, HiddenStates, LayerInput, WeightRows, WeightScales};
use half::bf16;
use rayon::prelude::*;

/// A known model's layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preset {
    /// H 2048, I 768, 128 experts, 8 per token.
    #[value(name = "qwen3-30b-a3b")]
    Qwen3,
    /// H 7168, I 2048, 256 experts, 8 per token.
    #[value(name = "deepseek-v3")]
    DeepSeekV3,
    /// H 4096, I 1536, 128 experts, 8 per token.
    #[value(name = "qwen3-235b-a22b")]
    Qwen3Large,
    /// H 4096, I 14336, 8 experts, 2 per token.
    #[value(name = "mixtral-8x7b")]
    Mixtral,
    /// H 2880, I 2880, 32 experts, 4 per token, with biases and the clamped activation.
    #[value(name = "gpt-oss-20b")]
    GptOss20b,
    /// H 2880, I 2880, 128 experts, 4 per token, with biases and the clamped activation.
    #[value(name = "gpt-oss-120b")]
    GptOss120b,
    /// H 4096, I 2048, 256 experts, 6 per token, with the clamped activation.
    #[value(name = "deepseek-v4-flash")]
    DeepSeekV4,
    /// H 7168, I 2048, 384 experts, 8 per token.
    #[value(name = "kimi-k2-thinking")]
    KimiK2,
}

impl Preset {
    /// `H`, `I`, experts, experts per token.
    fn sizes(self) -> (usize, usize, usize, usize) {
        match self {
            Self::Qwen3 => (2048, 768, 128, 8),
            Self::DeepSeekV3 => (7168, 2048, 256, 8),
            Self::Qwen3Large => (4096, 1536, 128, 8),
            Self::Mixtral => (4096, 14336, 8, 2),
            Self::GptOss20b => (2880, 2880, 32, 4),
            Self::GptOss120b => (2880, 2880, 128, 4),
            Self::DeepSeekV4 => (4096, 2048, 256, 6),
            Self::KimiK2 => (7168, 2048, 384, 8),
        }
    }

    /// The model's sizes.
    pub(crate) fn shape(self) -> Result<LayerShape> {
        let (hidden, intermediate, experts, _) = self.sizes();
        Ok(LayerShape::new(hidden, intermediate, experts)?)
    }

    /// What the model is published in.
    pub(crate) fn usual_format(self) -> WeightFormat {
        match self {
            Self::Qwen3 | Self::Qwen3Large | Self::Mixtral => WeightFormat::Bf16,
            Self::DeepSeekV3 => WeightFormat::E4m3,
            Self::GptOss20b | Self::GptOss120b | Self::DeepSeekV4 => WeightFormat::Mxfp4,
            Self::KimiK2 => WeightFormat::Int4,
        }
    }

    fn is_gpt_oss(self) -> bool {
        matches!(self, Self::GptOss20b | Self::GptOss120b)
    }

    /// What stands between the GEMMs.
    fn activation(self) -> Activation {
        match self {
            Self::GptOss20b | Self::GptOss120b => Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) },
            Self::DeepSeekV4 => Activation::Swiglu { alpha: 1.0, beta: 0.0, limit: Some(10.0) },
            _ => Activation::SWIGLU,
        }
    }

    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Experts of the model.
    pub(crate) fn experts(self) -> usize {
        self.sizes().2
    }

    /// Experts per token.
    pub(crate) fn topk(self) -> usize {
        self.sizes().3
    }

    fn router(self, experts: usize, seed: u64) -> Router {
        let topk = self.topk();
        let mut random = Random::new(seed, [BIAS, 0, 0]);
        if self.is_gpt_oss() {
            let logit_bias = (0..experts).map(|_| 0.5 * random.uniform()).collect();
            return Router { logit_bias, ..Router::softmax(topk, true) };
        }
        let (scoring, scaling_factor, groups) = match self {
            Self::DeepSeekV3 => (Scoring::Sigmoid, 2.5, (8, 4)),
            Self::DeepSeekV4 => (Scoring::SqrtSoftplus, 1.5, (1, 1)),
            Self::KimiK2 => (Scoring::Sigmoid, 2.827, (1, 1)),
            _ => return Router::softmax(topk, true),
        };
        // Fewer experts than the model has may not be cut into its groups.
        let grouped = experts.is_multiple_of(groups.0) && experts / groups.0 * groups.1 >= topk;
        let (count, topk_groups) = if grouped { groups } else { (1, 1) };
        Router {
            scoring,
            correction_bias: (0..experts).map(|_| 0.05 * random.uniform()).collect(),
            groups: Some(Groups { count, topk: topk_groups, worth: GroupWorth::BestTwo }),
            normalization: Normalization::SumPlus(1e-20),
            scaling_factor,
            ..Router::sigmoid(topk)
        }
    }
}

/// A preset's layer with made-up weights.
#[derive(Debug)]
pub(crate) struct MadeUp {
    shape: LayerShape,
    format: WeightFormat,
    router: Router,
    router_weight: Vec<f32>,
    activation: Activation,
    biases: Option<Biases>,
    seed: u64,
}

/// Streams of random numbers, apart from those of the weights.
const ROUTER: u64 = 10;
const BIAS: u64 = 11;
const TOKENS: u64 = 12;
const ROUTING: u64 = 13;
const EXPERT_BIASES: u64 = 14;

impl MadeUp {
    /// The layer, with `experts` of them or as many as the model has; with fewer, and a line on stderr that says so, if
    /// the `available` bytes of memory do not hold them.
    pub(crate) fn new(
        preset: Preset,
        experts: Option<usize>,
        format: WeightFormat,
        seed: u64,
        available: Option<u64>,
    ) -> Result<Self> {
        let (hidden, intermediate, usual, topk) = preset.sizes();
        let asked = experts.unwrap_or(usual);
        if asked < topk {
            return Err(Error::usage(format!("--experts is {asked}, expected at least {topk}, the experts per token")));
        }
        let matrix = |n: usize, k: usize| format.matrix_bytes(n as u64, k as u64);
        let expert_bytes = matrix(2 * intermediate, hidden) + matrix(hidden, intermediate);
        let fit = available.map_or(asked, |bytes| experts_that_fit(bytes, expert_bytes, asked));
        if fit < topk {
            return Err(Error::usage(format!(
                "{} needs {topk} experts of {} in memory, which holds {fit}",
                preset.name(),
                crate::report::format::bytes(expert_bytes)
            )));
        }
        if fit < asked {
            let bytes = crate::report::format::bytes(expert_bytes.saturating_mul(asked as u64));
            output::tell(&format!("note: {asked} experts take {bytes}, more than the memory available; using {fit}"));
        }
        let shape = LayerShape::new(hidden, intermediate, fit)?;
        memory::require("the router's weight", 4 * fit as u128 * hidden as u128)?;
        let mut random = Random::new(seed, [ROUTER, 0, 0]);
        // Logits of a spread that gives experts unlike, but not wildly unlike, shares.
        let size = 1.5 * unit_size(hidden);
        let router_weight = (0..fit * hidden).map(|_| bf16::from_f32(size * random.uniform()).to_f32()).collect();
        let biases = preset.is_gpt_oss().then(|| made_up_biases(&shape, seed));
        let (router, activation) = (preset.router(fit, seed), preset.activation());
        Ok(Self { shape, format, router, router_weight, activation, biases, seed })
    }

    /// The same with another `I`: what a rank holds where experts are split.
    pub(crate) fn with_intermediate(mut self, intermediate: Option<usize>) -> Result<Self> {
        if let Some(intermediate) = intermediate {
            self.shape = LayerShape::new(self.shape.hidden(), intermediate, self.shape.local_experts())?;
            self.biases = self.biases.map(|_| made_up_biases(&self.shape, self.seed));
        }
        Ok(self)
    }

    /// Made-up hidden states `[tokens, H]` of unit variance, bf16.
    pub(crate) fn tokens(&self, tokens: usize) -> Result<LayerInput> {
        let hidden = self.shape.hidden();
        let budget = memory::budget().map_or(u64::MAX, |budget| budget.bytes);
        let values = tokens.checked_mul(hidden).filter(|&values| values as u64 <= budget / 4).ok_or_else(|| {
            let budget = crate::report::format::bytes(budget);
            Error::usage(format!(
                "--tokens is {tokens}, expected fewer: [{tokens}, {hidden}] does not fit into {budget} of memory"
            ))
        })?;
        let mut random = Random::new(self.seed, [TOKENS, 0, 0]);
        let values = (0..values).map(|_| bf16::from_f32(3f32.sqrt() * random.uniform())).collect();
        Ok(LayerInput::from_hidden_states(HiddenStates::Bf16(values), hidden)?)
    }

    /// Made-up `topk_ids` and `topk_weights [tokens, topk]`: every choice of distinct ones of `experts` experts equally
    /// likely.
    pub(crate) fn uniform_routing(&self, tokens: usize, experts: usize) -> Result<(Vec<i32>, Vec<f32>)> {
        let topk = self.router.topk;
        memory::require("the made-up routing", 8 * tokens as u128 * topk as u128 + 4 * experts as u128)?;
        let mut random = Random::new(self.seed, [ROUTING, 0, 0]);
        let mut all: Vec<i32> = (0..experts as i32).collect();
        let mut ids = Vec::with_capacity(tokens * topk);
        for _ in 0..tokens {
            for slot in 0..topk {
                let other = slot + (random.draw() % (experts - slot) as u64) as usize;
                all.swap(slot, other);
            }
            ids.extend_from_slice(&all[..topk]);
        }
        let weights = (0..tokens * topk).map(|_| (1.0 + 0.5 * random.uniform()) / topk as f32).collect();
        Ok((ids, weights))
    }

    /// The same for experts that differ: [`RoutingName::Zipf`].
    pub(crate) fn zipf_routing(&self, tokens: usize, experts: usize) -> Result<(Vec<i32>, Vec<f32>)> {
        let (_, weights) = self.uniform_routing(tokens, experts)?;
        let ids = zipf_ids(self.seed, [tokens, self.router.topk], experts);
        Ok((ids, weights))
    }

    fn random(&self, part: Part, expert: usize, row: usize) -> Random {
        Random::new(self.seed, [part as u64, expert as u64, row as u64])
    }

    fn bf16_row(&self, part: Part, expert: usize, row: usize, out: &mut [bf16]) {
        let mut random = self.random(part, expert, row);
        let size = unit_size(out.len()) / 32768.0;
        for values in out.chunks_mut(4) {
            let mut bits = random.draw();
            for value in values {
                *value = Float::from_f32(size * f32::from(bits as i16));
                bits >>= 16;
            }
        }
    }

    fn e4m3_row(&self, part: Part, expert: usize, row: usize, out: &mut [E4m3]) {
        let mut random = self.random(part, expert, row);
        for values in out.chunks_mut(8) {
            let bytes = random.draw().to_le_bytes();
            for (value, byte) in values.iter_mut().zip(bytes) {
                *value = EVEN_E4M3[usize::from(byte)];
            }
        }
    }

    /// The scale of a block of 128 x 128.
    fn scale(&self, part: Part, expert: usize, block_row: usize, block_col: usize, cols: usize) -> f32 {
        // Rows of weights never get this far, so these streams are the scales' own.
        let row = 1 << 40 | block_row << 20 | block_col;
        unit_size(cols) / E4m3::MAX * (1.0 + 0.25 * self.random(part, expert, row).uniform())
    }

    /// Two values to a byte: nibbles at random.
    fn nibble_row(&self, part: Part, expert: usize, row: usize, out: &mut [u8]) {
        let mut random = self.random(part, expert, row);
        for bytes in out.chunks_mut(8) {
            let drawn = random.draw().to_le_bytes();
            bytes.copy_from_slice(&drawn[..bytes.len()]);
        }
    }

    /// The scale bytes of a row of `cols` MXFP4 weights: of two neighbours at random.
    fn mxfp4_scales(&self, part: Part, expert: usize, row: usize, cols: usize, out: &mut [u8]) {
        let mut random = self.random(part, expert, 1 << 40 | row);
        // The mean square of a nibble at random is 2.9^2; with a scale that is `least` or its double it is 4.6^2.
        let least = (unit_size(cols) / 3f32.sqrt() / 4.6).log2().round() as i32;
        out.iter_mut().for_each(|scale| *scale = (127 + least + (random.draw() & 1) as i32).clamp(0, 254) as u8);
    }

    /// The scales of a row of `cols` int4 weights.
    fn int4_scales(&self, part: Part, expert: usize, row: usize, cols: usize, out: &mut [bf16]) {
        let mut random = self.random(part, expert, 1 << 40 | row);
        // The mean square of a nibble at random is 21.5.
        let size = unit_size(cols) / 3f32.sqrt() / 21.5f32.sqrt();
        out.iter_mut().for_each(|scale| *scale = bf16::from_f32(size * (1.0 + 0.5 * random.uniform())));
    }

    fn row(&self, part: Part, expert: usize, row: usize, out: &mut [f64]) {
        match self.format {
            WeightFormat::Int4 => {
                let cols = out.len();
                let (mut blocks, mut scales) = (vec![0; cols / 2], vec![bf16::ZERO; cols / int4::GROUP]);
                self.nibble_row(part, expert, row, &mut blocks);
                self.int4_scales(part, expert, row, cols, &mut scales);
                for (col, out) in out.iter_mut().enumerate() {
                    let nibble = blocks[col / 2] >> (col % 2 * 4);
                    *out = f64::from(int4::decode(nibble, scales[col / int4::GROUP].to_f32()));
                }
            }
            WeightFormat::Mxfp4 => {
                let cols = out.len();
                let (mut blocks, mut scales) = (vec![0; cols / 2], vec![0; cols / mxfp4::GROUP]);
                self.nibble_row(part, expert, row, &mut blocks);
                self.mxfp4_scales(part, expert, row, cols, &mut scales);
                for (col, out) in out.iter_mut().enumerate() {
                    let nibble = blocks[col / 2] >> (col % 2 * 4);
                    *out = f64::from(mxfp4::decode(nibble, scales[col / mxfp4::GROUP]));
                }
            }
            WeightFormat::Bf16 => {
                let mut values = vec![bf16::ZERO; out.len()];
                self.bf16_row(part, expert, row, &mut values);
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_f64());
            }
            WeightFormat::E4m3 => {
                let mut values = vec![E4m3(0); out.len()];
                self.e4m3_row(part, expert, row, &mut values);
                let cols = out.len();
                for (block, (out, values)) in out.chunks_mut(WEIGHT_BLOCK).zip(values.chunks(WEIGHT_BLOCK)).enumerate()
                {
                    let scale = f64::from(self.scale(part, expert, row / WEIGHT_BLOCK, block, cols));
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = f64::from(value.to_f32()) * scale);
                }
            }
        }
    }
}

impl ExpertWeights for MadeUp {
    fn shape(&self) -> LayerShape {
        self.shape
    }

    fn format(&self) -> WeightFormat {
        self.format
    }

    fn activation(&self) -> Activation {
        self.activation
    }

    fn biases(&self) -> Option<&Biases> {
        self.biases.as_ref()
    }

    fn router(&self) -> &Router {
        &self.router
    }

    fn router_weight(&self) -> &[f32] {
        &self.router_weight
    }

    fn with_part(&self, part: Part, expert: usize, space: &mut Space, take: &mut TakePart<'_>) -> Result<()> {
        let (hidden, intermediate) = (self.shape.hidden(), self.shape.intermediate());
        let (rows, cols) = match part {
            Part::Gate | Part::Up => (intermediate, hidden),
            Part::Down => (hidden, intermediate),
        };
        match self.format {
            WeightFormat::Bf16 => {
                space.bf16.resize(rows * cols, bf16::ZERO);
                let each = space.bf16.par_chunks_mut(cols).enumerate();
                each.for_each(|(row, out)| self.bf16_row(part, expert, row, out));
                take(WeightRows::Bf16(MatrixRef::new(&space.bf16, rows, cols)?))?;
            }
            WeightFormat::E4m3 => {
                space.e4m3.resize(rows * cols, E4m3(0));
                let each = space.e4m3.par_chunks_mut(cols).enumerate();
                each.for_each(|(row, out)| self.e4m3_row(part, expert, row, out));
                let blocks = [rows, cols].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
                let scale = |block: usize| self.scale(part, expert, block / blocks[1], block % blocks[1], cols);
                let scales = WeightScales::Block((0..blocks[0] * blocks[1]).map(scale).collect());
                take(WeightRows::E4m3 { values: MatrixRef::new(&space.e4m3, rows, cols)?, scales: &scales })?;
            }
            WeightFormat::Mxfp4 => {
                let groups = mxfp4::groups(cols)?;
                space.blocks.resize(rows * cols / 2, 0);
                let each = space.blocks.par_chunks_mut(cols / 2).enumerate();
                each.for_each(|(row, out)| self.nibble_row(part, expert, row, out));
                let mut scales = vec![0; rows * groups];
                let each = scales.par_chunks_mut(groups).enumerate();
                each.for_each(|(row, out)| self.mxfp4_scales(part, expert, row, cols, out));
                let blocks = MatrixRef::new(&space.blocks, rows, cols / 2)?;
                take(WeightRows::Mxfp4 { blocks, scales: MatrixRef::new(&scales, rows, groups)? })?;
            }
            WeightFormat::Int4 => {
                let groups = int4::groups(cols)?;
                space.blocks.resize(rows * cols / 2, 0);
                let each = space.blocks.par_chunks_mut(cols / 2).enumerate();
                each.for_each(|(row, out)| self.nibble_row(part, expert, row, out));
                space.bf16.resize(rows * groups, bf16::ZERO);
                let each = space.bf16.par_chunks_mut(groups).enumerate();
                each.for_each(|(row, out)| self.int4_scales(part, expert, row, cols, out));
                let blocks = MatrixRef::new(&space.blocks, rows, cols / 2)?;
                let scales = Int4Scales::Bf16(MatrixRef::new(&space.bf16, rows, groups)?);
                take(WeightRows::Int4 { blocks, scales })?;
            }
        }
        Ok(())
    }

    fn w13_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        match row.checked_sub(self.shape.intermediate()) {
            None => self.row(Part::Gate, expert, row, out),
            Some(row) => self.row(Part::Up, expert, row, out),
        }
    }

    fn w2_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        self.row(Part::Down, expert, row, out);
    }
}

/// Biases of a size that shows in every output.
fn made_up_biases(shape: &LayerShape, seed: u64) -> Biases {
    let mut random = Random::new(seed, [EXPERT_BIASES, 0, 0]);
    let [w13, w2] = [shape.w13_rows(), shape.hidden()]
        .map(|n| (0..shape.local_experts() * n).map(|_| bf16::from_f32(0.5 * random.uniform()).to_f32()).collect());
    Biases { w13, w2 }
}

/// How many experts memory holds beside what a run needs and what others do: a quarter of it is left alone.
fn experts_that_fit(available: u64, expert_bytes: u64, asked: usize) -> usize {
    let usable = available / 4 * 3;
    usize::try_from(usable / expert_bytes).unwrap_or(usize::MAX).min(asked)
}

/// The largest magnitude of evenly spread weights that keep a sum of `cols` products at unit variance.
fn unit_size(cols: usize) -> f32 {
    (3.0 / cols as f32).sqrt()
}

/// 256 values evenly spread over e4m3's range.
static EVEN_E4M3: [E4m3; 256] = even_e4m3();

const fn even_e4m3() -> [E4m3; 256] {
    // Built in place of 256 roundings at run time: the byte of the largest value not above each magnitude.
    let mut table = [E4m3(0); 256];
    let mut index = 0;
    while index < 256 {
        let target = (index as f32 - 127.5) * (E4m3::MAX / 127.5);
        let magnitude = if target < 0.0 { -target } else { target };
        let mut byte = 0x7e;
        while E4m3(byte).to_f32() > magnitude {
            byte -= 1;
        }
        table[index] = E4m3(if target < 0.0 { byte | 0x80 } else { byte });
        index += 1;
    }
    table
}

/// SplitMix64, one stream for every choice of three numbers.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    pub(crate) fn new(seed: u64, stream: [u64; 3]) -> Self {
        let mut random = Self(seed);
        for number in stream {
            random.0 = random.draw() ^ number;
        }
        Self(random.draw())
    }

    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::STEP);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly spread in [-1, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.draw() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// How tokens choose experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RoutingName {
    /// All alike.
    Uniform,
    /// The n-th most frequent one with a chance that goes with 1 / sqrt(n); which one that is, is drawn.
    Zipf,
}

impl RoutingName {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
        }
    }
}

/// Different experts of each token as [`RoutingName::Zipf`] says: the same for the same seed, wherever they are drawn.
pub(crate) fn zipf_ids(seed: u64, [tokens, topk]: [usize; 2], experts: usize) -> Vec<i32> {
    let mut random = Random::new(seed, [ROUTING, 1, 0]);
    let mut shares: Vec<u64> = (1..=experts).map(|n| (1e6 / (n as f64).sqrt()) as u64).collect();
    for last in (1..experts).rev() {
        shares.swap(last, (random.draw() % (last as u64 + 1)) as usize);
    }
    let mut sum = 0;
    shares.iter_mut().for_each(|share| {
        sum += *share;
        *share = sum;
    });
    let mut ids = Vec::with_capacity(tokens * topk);
    for _ in 0..tokens {
        let first = ids.len();
        for _ in 0..topk {
            let chosen = draw_another(&mut random, &shares, &ids[first..]);
            ids.push(chosen);
        }
    }
    ids
}

/// An expert that is not among `chosen`, with a chance in proportion to its count; -1 if none is left that has one.
/// `ends` are the counts, added up.
pub(crate) fn draw_another(random: &mut Random, ends: &[u64], chosen: &[i32]) -> i32 {
    /// Draws until one is new; where few experts have nearly all rows, that may take for ever.
    const TRIES: usize = 32;
    let Some(sum) = ends.last().copied().filter(|&sum| sum > 0) else { return -1 };
    for _ in 0..TRIES {
        let at = random.draw() % sum;
        let expert = ends.partition_point(|&end| end <= at) as i32;
        if !chosen.contains(&expert) {
            return expert;
        }
    }
    let count = |expert: usize| match chosen.contains(&(expert as i32)) {
        true => 0,
        false => ends[expert] - if expert == 0 { 0 } else { ends[expert - 1] },
    };
    let left: u64 = (0..ends.len()).map(count).sum();
    let mut at = if left == 0 { return -1 } else { random.draw() % left };
    for expert in 0..ends.len() {
        match at.checked_sub(count(expert)) {
            Some(rest) => at = rest,
            None => return expert as i32,
        }
    }
    -1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_decides_how_many_experts_there_are() {
        assert_eq!(experts_that_fit(8 << 30, 1 << 30, 4), 4);
        assert_eq!(experts_that_fit(8 << 30, 1 << 30, 8), 6);
        assert_eq!(experts_that_fit(0, 1 << 30, 8), 0);
    }

    #[test]
    fn made_up_routing_names_each_expert_at_most_once_per_token() {
        let layer = MadeUp::new(Preset::Qwen3, Some(11), WeightFormat::E4m3, 3, None).unwrap();
        let (ids, weights) = layer.uniform_routing(200, 11).unwrap();
        assert_eq!((ids.len(), weights.len()), (1600, 1600));
        let mut counts = [0; 11];
        for token in ids.chunks(8) {
            let mut sorted = token.to_vec();
            sorted.sort_unstable();
            assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]), "{token:?}");
            token.iter().for_each(|&id| counts[id as usize] += 1);
        }
        assert!(counts.iter().all(|&count| (120..170).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_even_values_span_the_range_without_nan() {
        assert_eq!((EVEN_E4M3[0].to_f32(), EVEN_E4M3[255].to_f32()), (-448.0, 448.0));
        assert!(EVEN_E4M3.windows(2).all(|pair| pair[0].to_f32() <= pair[1].to_f32()));
        assert!(EVEN_E4M3.iter().all(|value| !value.is_nan()));
    }

    #[test]
    fn rows_have_unit_variance_and_depend_on_every_number() {
        for format in WeightFormat::ALL {
            let layer = MadeUp::new(Preset::Qwen3, Some(8), format, 3, None).unwrap();
            let row = |expert, row| {
                let mut out = vec![0.0; 2048];
                layer.w13_row(expert, row, &mut out);
                out
            };
            let variance = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
            assert!((0.6..1.6).contains(&variance(&row(5, 700))), "{format}: {}", variance(&row(5, 700)));
            assert_eq!(row(1, 2), row(1, 2));
            assert_ne!(row(1, 2), row(1, 3));
            assert_ne!(row(1, 2), row(2, 2));
            assert_ne!(row(1, 2), row(1, 768 + 2));
            let other = MadeUp::new(Preset::Qwen3, Some(8), format, 4, None).unwrap();
            let mut out = vec![0.0; 2048];
            other.w13_row(1, 2, &mut out);
            assert_ne!(row(1, 2), out);
        }
    }
}
