//! `expertile bench tiles`: layers drawn at random, both GEMMs cut in every way, and by how much the layer's own choice
//! misses the best.

use crate::commands::options::ReportOptions;
use crate::device::{self, DeviceNumber, Gpu};
use crate::error::{Error, Result};
use crate::output;
use crate::report::format;
use crate::report::progress::Progress;
use expertile::cuda::measure::{TileBench, TileInputs, TileTime};
use expertile::cuda::{Device, GemmKernel, LayerChoice};
use expertile::{ActivationFormat, LayerConfig, LayerShape, Stage, WeightFormat};
use serde::Serialize;
use std::fmt::Write;

/// What a draw may take: bytes of weights, bytes of rows and results, and operations of both GEMMs.
const MOST_WEIGHT_BYTES: usize = 24 << 30;
const MOST_ROW_BYTES: usize = 32 << 30;
const MOST_FLOPS: f64 = 3e13;

/// Draw layers at random, cut their GEMMs in every way, and say by how much the choice of tiles misses the best.
///
/// Layers have H 1024 to 8192, I 128 to 16384, 8 to 512 experts, 1 to 10 of them per token, and 1 to 16384 tokens, as
/// far as they fit in 24 GiB of weights, 32 GiB of rows and 30 TFLOP. Needs a Hopper GPU.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  expertile bench tiles --draws 20 --weights mxfp4 --same 10
  expertile bench tiles --device cuda:0 --seed 7 --json tiles.json")]
pub(crate) struct Args {
    /// Device: cuda:N.
    #[arg(long, value_name = "NAME", default_value = "cuda:0", value_parser = device::parse)]
    device: DeviceNumber,
    /// Layers to draw.
    #[arg(long, value_name = "N", default_value_t = 60)]
    draws: usize,
    /// Experts of every layer [default: drawn].
    #[arg(long, value_name = "N")]
    experts: Option<usize>,
    /// What weights are made of: e4m3, bf16, mxfp4 or int4 [default: e4m3 and bf16, drawn].
    #[arg(long, value_name = "FORMAT")]
    weights: Option<WeightFormat>,
    /// What rows are made of, beside mxfp4 and int4 weights: e4m3 or bf16 [default: e4m3, bf16 for int4].
    #[arg(long, value_name = "FORMAT")]
    activations: Option<ActivationFormat>,
    /// Seed of the draws.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Runs of each tile whose bits are compared with the first tile's, before any is timed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    same: usize,
    #[command(flatten)]
    report: ReportOptions,
}

/// One layer and one call of it.
#[derive(Debug, Clone, Serialize)]
struct Draw {
    hidden: usize,
    intermediate: usize,
    experts: usize,
    topk: usize,
    tokens: usize,
    format: &'static str,
    activations: &'static str,
    #[serde(skip)]
    formats: (WeightFormat, ActivationFormat),
    /// Experts by how often they are asked for, as 1, 1/2, 1/3, ...; else all alike.
    zipf: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    gpu: Gpu,
    multiprocessors: u32,
    seed: u64,
    /// Of both GEMMs and the activation: how much longer the choice takes than the best, as a share of the best.
    most: f64,
    mean: f64,
    /// How much shorter the best takes if K may be split by the size of a call, which gives up that a row's bits do
    /// not depend on it; as a share of the best that does not.
    most_of_splits: f64,
    mean_of_splits: f64,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Layer {
    #[serde(flatten)]
    draw: Draw,
    active_experts: usize,
    most_rows: usize,
    activation_seconds: f64,
    chosen: Way,
    best: Way,
    best_with_splits: Way,
    miss: f64,
    saved_by_splits: f64,
    gemm1_miss: f64,
    gemm2_miss: f64,
    tiles: Vec<Tile>,
}

/// Both GEMMs, cut in one way each.
#[derive(Debug, Clone, Serialize)]
struct Way {
    gemm1: String,
    activation_inside_gemm1: bool,
    gemm2: String,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Tile {
    gemm: &'static str,
    row_tile: usize,
    outputs: usize,
    shared: usize,
    splits: usize,
    wide: bool,
    activated: bool,
    seconds: f64,
}

pub(super) fn run(args: &Args) -> Result<()> {
    output::prepare(&[("--json", args.report.file())], &[])?;
    let ordinal =
        args.device.ok_or_else(|| Error::usage("--device is cpu, expected cuda:N: a CPU chooses no tiles"))?;
    let formats = formats(args.weights, args.activations)?;
    if let Some(experts) = args.experts.filter(|experts| !(1..=512).contains(experts)) {
        return Err(Error::usage(format!("--experts is {experts}, expected 1 to 512")));
    }
    if args.same == 0 {
        return Err(Error::usage("--same is 0, expected at least 1"));
    }
    let report = measure(args, formats, &Device::open(ordinal)?)?;
    args.report.tell(&report, Report::text)
}

/// The formats asked for; none where they are drawn.
fn formats(
    weights: Option<WeightFormat>,
    activations: Option<ActivationFormat>,
) -> Result<Option<(WeightFormat, ActivationFormat)>> {
    let Some(weights) = weights else {
        return match activations {
            None => Ok(None),
            Some(rows) => {
                let rows = rows.name();
                Err(Error::usage(format!("--activations is {rows}, expected none without --weights")))
            }
        };
    };
    let rows = activations.unwrap_or(weights.usual_activations());
    if !weights.has_groups() && rows != weights.usual_activations() {
        let (rows, weights) = (rows.name(), weights.name());
        return Err(Error::usage(format!("--activations is {rows}, expected {weights} as the weights")));
    }
    Ok(Some((weights, rows)))
}

/// Random numbers, the same for the same seed (splitmix64).
struct Random(u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Evenly spread on a logarithmic scale, ends included.
    fn between(&mut self, low: usize, high: usize) -> usize {
        let (low, high) = (low as f64, high as f64 + 1.0);
        (low * (high / low).powf(self.unit())) as usize
    }
}

impl Draw {
    fn new(random: &mut Random, experts: Option<usize>, formats: Option<(WeightFormat, ActivationFormat)>) -> Self {
        loop {
            let experts = experts.unwrap_or_else(|| random.between(8, 512));
            let drawn = if random.draw().is_multiple_of(2) { WeightFormat::E4m3 } else { WeightFormat::Bf16 };
            let formats = formats.unwrap_or((drawn, drawn.usual_activations()));
            let draw = Self {
                hidden: random.between(8, 64) * 128,
                intermediate: random.between(1, 128) * 128,
                experts,
                topk: random.between(1, 10.min(experts)),
                tokens: random.between(1, 16384),
                format: formats.0.name(),
                activations: formats.1.name(),
                formats,
                zipf: random.draw().is_multiple_of(2),
            };
            let slots = draw.tokens * draw.topk;
            let weights = 3 * draw.hidden * draw.intermediate;
            let rows = slots * (2 * (draw.hidden.max(2 * draw.intermediate) + draw.intermediate) + 2 * draw.hidden);
            if weights * experts * formats.0.bits() / 8 <= MOST_WEIGHT_BYTES
                && rows <= MOST_ROW_BYTES
                && 2.0 * slots as f64 * weights as f64 <= MOST_FLOPS
            {
                return draw;
            }
        }
    }

    /// The expert of every slot: distinct ones of each token, drawn in proportion to how often they are asked for.
    fn routing(&self, random: &mut Random) -> Vec<i32> {
        let mut order: Vec<i32> = (0..self.experts as i32).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, (random.draw() % (last as u64 + 1)) as usize);
        }
        let mut sums = Vec::with_capacity(self.experts);
        let mut sum = 0.0;
        for place in 0..self.experts {
            sum += if self.zipf { 1.0 / (place + 1) as f64 } else { 1.0 };
            sums.push(sum);
        }
        let mut ids: Vec<i32> = Vec::with_capacity(self.tokens * self.topk);
        for _ in 0..self.tokens {
            let first = ids.len();
            while ids.len() < first + self.topk {
                let at = random.unit() * sum;
                let expert = order[sums.partition_point(|&sum| sum <= at).min(self.experts - 1)];
                if !ids[first..].contains(&expert) {
                    ids.push(expert);
                }
            }
        }
        ids
    }

    fn choice(&self, multiprocessors: usize) -> Result<LayerChoice> {
        let shape = LayerShape::new(self.hidden, self.intermediate, self.experts)?;
        let (format, activations) = self.formats;
        // Each GEMM is timed by itself.
        let config = LayerConfig { one_launch: false, ..LayerConfig::new(self.topk, self.experts, activations) };
        Ok(LayerChoice::new(&shape, &config, format, self.tokens, multiprocessors)?)
    }
}

fn measure(args: &Args, formats: Option<(WeightFormat, ActivationFormat)>, device: &Device) -> Result<Report> {
    let mut random = Random(args.seed);
    let draws: Vec<_> = (0..args.draws).map(|_| Draw::new(&mut random, args.experts, formats)).collect();
    let layers: Vec<_> = draws.iter().map(|draw| (draw.formats.0, draw.formats.1, draw.intermediate)).collect();
    let bench = TileBench::prepare(device, &layers)?;
    let multiprocessors = device.info().multiprocessors;
    let progress = Progress::new("timing layers", draws.len());
    let mut layers = Vec::new();
    for draw in draws {
        layers.push(Layer::measure(&bench, draw, &mut random, multiprocessors as usize, args.same)?);
        progress.set(layers.len());
    }
    let (misses, splits) = (layers.iter().map(|layer| layer.miss), layers.iter().map(|layer| layer.saved_by_splits));
    Ok(Report {
        gpu: device.info().into(),
        multiprocessors,
        seed: args.seed,
        most: misses.clone().fold(0.0, f64::max),
        mean: mean(misses),
        most_of_splits: splits.clone().fold(0.0, f64::max),
        mean_of_splits: mean(splits),
        layers,
    })
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

impl Layer {
    fn measure(
        bench: &TileBench<'_>,
        draw: Draw,
        random: &mut Random,
        multiprocessors: usize,
        same: usize,
    ) -> Result<Self> {
        let routing = draw.routing(random);
        let mut counts = vec![0; draw.experts];
        routing.iter().for_each(|&expert| counts[expert as usize] += 1);
        let shape = LayerShape::new(draw.hidden, draw.intermediate, draw.experts)?;
        let (format, activation_format) = draw.formats;
        let times = bench.time(&TileInputs { shape, format, activation_format, experts: &routing, same })?;
        // GEMM 1 with what its activation takes.
        let cost = |time: &TileTime| match (time.gemm, time.activated) {
            (Stage::Gemm1, false) => time.seconds + times.activation_seconds,
            _ => time.seconds,
        };
        let best = |gemm, splits| {
            let ways = times.gemms.iter().filter(move |time| time.gemm == gemm && time.kernel.splits() <= splits);
            ways.min_by(|a, b| cost(a).total_cmp(&cost(b))).copied()
        };
        let timed = |gemm, kernel: GemmKernel, activated| {
            let of_choice = |time: &&TileTime| (time.gemm, time.kernel, time.activated) == (gemm, kernel, activated);
            times.gemms.iter().find(of_choice).copied()
        };
        let choice = draw.choice(multiprocessors)?;
        let chosen = [
            timed(Stage::Gemm1, choice.gemm1, choice.activation_inside_gemm1),
            timed(Stage::Gemm2, choice.gemm2, false),
        ];
        // A choice that was not timed is as far off as can be said.
        let seconds = |time: &Option<TileTime>| time.as_ref().map_or(f64::INFINITY, cost);
        let way = |[gemm1, gemm2]: [Option<TileTime>; 2]| Way {
            gemm1: gemm1.map_or_else(String::new, |time| time.kernel.to_string()),
            activation_inside_gemm1: gemm1.is_some_and(|time| time.activated),
            gemm2: gemm2.map_or_else(String::new, |time| time.kernel.to_string()),
            seconds: seconds(&gemm1) + seconds(&gemm2),
        };
        let bests = [best(Stage::Gemm1, 1), best(Stage::Gemm2, 1)];
        let with_splits = way([best(Stage::Gemm1, 8), best(Stage::Gemm2, 8)]);
        let [gemm1_miss, gemm2_miss] = [0, 1].map(|i| seconds(&chosen[i]) / seconds(&bests[i]) - 1.0);
        let (chosen, best) = (way(chosen), way(bests));
        let tiles = times.gemms.iter().map(|time| Tile {
            gemm: time.gemm.name(),
            row_tile: time.kernel.row_tile(),
            outputs: time.kernel.outputs(),
            shared: time.kernel.shared(),
            splits: time.kernel.splits(),
            wide: time.kernel.tokens_on_m(),
            activated: time.activated,
            seconds: time.seconds,
        });
        Ok(Self {
            active_experts: counts.iter().filter(|&&count| count > 0).count(),
            most_rows: counts.iter().copied().max().unwrap_or(0),
            activation_seconds: times.activation_seconds,
            miss: chosen.seconds / best.seconds - 1.0,
            saved_by_splits: 1.0 - with_splits.seconds / best.seconds,
            best_with_splits: with_splits,
            gemm1_miss,
            gemm2_miss,
            tiles: tiles.collect(),
            chosen,
            best,
            draw,
        })
    }
}

impl Way {
    fn text(&self) -> String {
        let inside = if self.activation_inside_gemm1 { " + activation" } else { "" };
        format!("{}{inside}; {}", self.gemm1, self.gemm2)
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(text, "{}, {} layers of seed {}", self.gpu, self.layers.len(), self.seed);
        let header = ["H", "I", "E", "topk", "tokens", "format", "routing", "chosen", "best", "miss"];
        let row = |layer: &Layer| {
            let Draw { hidden, intermediate, experts, topk, tokens, format, zipf, .. } = &layer.draw;
            let mut cells: Vec<_> = [hidden, intermediate, experts, topk, tokens].map(ToString::to_string).into();
            cells.extend([(*format).to_owned(), if *zipf { "zipf" } else { "even" }.to_owned()]);
            cells.extend([&layer.chosen, &layer.best].map(|way| format::seconds(way.seconds)));
            cells.push(format::percent(layer.miss));
            cells
        };
        text.push_str(&format::table(&header, 0, &self.layers.iter().map(row).collect::<Vec<_>>()));
        for layer in self.layers.iter().filter(|layer| layer.miss > 0.08) {
            let Draw { hidden, intermediate, tokens, .. } = layer.draw;
            let _ = writeln!(
                text,
                "{hidden} x {intermediate}, {tokens} tokens: {} chosen, {} is best",
                layer.chosen.text(),
                layer.best.text()
            );
        }
        let _ = writeln!(
            text,
            "the choice misses the best by {} in the mean and {} at most",
            format::percent(self.mean),
            format::percent(self.most)
        );
        let _ = writeln!(
            text,
            "splitting K by the size of the call would save {} in the mean and {} at most",
            format::percent(self.mean_of_splits),
            format::percent(self.most_of_splits)
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_the_same_for_a_seed_and_inside_their_bounds() {
        let draws = |seed| {
            let mut random = Random(seed);
            (0..200).map(|_| Draw::new(&mut random, None, None)).collect::<Vec<_>>()
        };
        let first = draws(1);
        assert_eq!(format!("{first:?}"), format!("{:?}", draws(1)));
        assert_ne!(format!("{first:?}"), format!("{:?}", draws(2)));
        for draw in &first {
            assert!((1024..=8192).contains(&draw.hidden) && draw.hidden.is_multiple_of(128), "{draw:?}");
            assert!((128..=16384).contains(&draw.intermediate) && draw.intermediate.is_multiple_of(128), "{draw:?}");
            assert!((8..=512).contains(&draw.experts) && (1..=10).contains(&draw.topk), "{draw:?}");
            assert!((1..=16384).contains(&draw.tokens) && draw.choice(132).is_ok(), "{draw:?}");
        }
        for is in [|draw: &Draw| draw.formats.0 == WeightFormat::E4m3, |draw: &Draw| draw.zipf] {
            assert!((60..140).contains(&first.iter().filter(|draw| is(draw)).count()));
        }
    }

    #[test]
    fn rows_are_those_that_a_gpu_multiplies_the_weights_by() {
        use {ActivationFormat as Rows, WeightFormat as Weights};
        assert_eq!(formats(None, None).unwrap(), None);
        for (weights, asked, rows) in [
            (Weights::E4m3, None, Rows::E4m3),
            (Weights::Bf16, Some(Rows::Bf16), Rows::Bf16),
            (Weights::Mxfp4, None, Rows::E4m3),
            (Weights::Mxfp4, Some(Rows::Bf16), Rows::Bf16),
            (Weights::Int4, None, Rows::Bf16),
        ] {
            assert_eq!(formats(Some(weights), asked).unwrap(), Some((weights, rows)));
        }
        for (weights, rows, message) in [
            (None, Rows::E4m3, "--activations is e4m3, expected none without --weights"),
            (Some(Weights::E4m3), Rows::Bf16, "--activations is bf16, expected e4m3 as the weights"),
            (Some(Weights::Bf16), Rows::E4m3, "--activations is e4m3, expected bf16 as the weights"),
        ] {
            assert_eq!(formats(weights, Some(rows)).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn a_token_has_distinct_experts_and_skewed_routing_prefers_a_few() {
        let draw = Draw {
            hidden: 1024,
            intermediate: 128,
            experts: 64,
            topk: 4,
            tokens: 500,
            format: "e4m3",
            activations: "e4m3",
            formats: (WeightFormat::E4m3, ActivationFormat::E4m3),
            zipf: true,
        };
        let most = |draw: &Draw| {
            let mut counts = vec![0; 64];
            for token in draw.routing(&mut Random(7)).chunks(4) {
                assert!((1..4).all(|slot| !token[..slot].contains(&token[slot])), "{token:?}");
                token.iter().for_each(|&expert| counts[expert as usize] += 1);
            }
            counts.into_iter().max().unwrap()
        };
        assert!(most(&draw) > 200, "the first of them is in most tokens");
        assert!(most(&Draw { zipf: false, ..draw }) < 70);
    }
}
