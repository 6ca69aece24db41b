//! What a grouped GEMM is expected to take, cut in a given way: what a choice of tiles goes by.
//!
//! A tile takes a time of its own, one for each of its rows and one for each of its blocks of K; tiles are spread over
//! the multiprocessors; meanwhile weights come from memory, and rows come and go. The slower of the two decides,
//! softly. How many tiles of how many rows there are depends on how tokens choose experts, which nobody knows
//! beforehand: a cut is judged by two guesses together, that all experts are as likely, and that they are as likely as
//! 1, 1/2, 1/3, ...
//!
//! The constants were fitted to what an H200 took for layers drawn at random (`expertile bench tiles --device cuda:0`),
//! and are judged by layers of another seed.

use super::gemm::{GemmKernel, GemmKey, GemmShape, LARGE_ROW_TILE, WIDE_ROW_TILE, row_bytes, values_of_block};
use super::weights::mxfp4::{UNIT_K, UNIT_OUTPUTS, unit_bytes};
use super::weights::weight_bytes;
use crate::gemm::{ActivationFormat, WeightFormat};
use table::COSTS;

// A measured number may be close to a constant of mathematics.
#[allow(clippy::approx_constant)]
mod table;

/// What one kernel takes. Times in microseconds, of which some depend on the rows of a tile: one for each step of
/// [`GemmKernel::row_step`].
#[derive(Debug)]
pub(super) struct Cost {
    pub(super) format: WeightFormat,
    pub(super) activation_format: ActivationFormat,
    pub(super) kernel: GemmKernel,
    /// Whether the activation is inside.
    pub(super) activated: bool,
    /// Before the first tile and after the last one.
    start: f64,
    /// A tile, besides its blocks of K; see [`Cost::activates_meanwhile`].
    tile_times: &'static [f64],
    /// A block of K.
    block_times: &'static [f64],
    /// A live row of a tile, whose results are stored.
    row_time: f64,
    /// Tiles of its last round that a multiprocessor waits for, in the mean, where there are several to each.
    tail: f64,
    /// How far rounds are whole ones.
    whole: f64,
    /// Bytes of weights that are read in a microsecond.
    weight_bytes: f64,
    /// Bytes of rows and results that are moved in a microsecond.
    row_bytes: f64,
    /// How hard the larger of work and memory decides: the exponent of the norm that adds the two.
    hardness: f64,
}

/// How many experts have how many rows, but for those that have none.
#[derive(Debug)]
struct Population {
    /// `(rows, experts)`, by ascending rows.
    groups: Vec<(usize, f64)>,
    experts: f64,
    rows: f64,
}

impl Population {
    fn add(&mut self, mean: f64, experts: f64) {
        /// From this mean on, rows are taken to be spread normally.
        const MANY: f64 = 24.0;
        if mean < MANY {
            let mut share = (-mean).exp();
            for rows in 1..=(mean + 6.0 * mean.sqrt() + 6.0) as usize {
                share *= mean / rows as f64;
                if share > 1e-6 {
                    self.add_group(rows, share * experts);
                }
            }
            return;
        }
        for (deviations, share) in [(-1.6, 0.1), (-0.9, 0.18), (-0.3, 0.22), (0.3, 0.22), (0.9, 0.18), (1.6, 0.1)] {
            self.add_group((mean + deviations * mean.sqrt()).round().max(1.0) as usize, share * experts);
        }
    }

    fn add_group(&mut self, rows: usize, experts: f64) {
        self.groups.push((rows, experts));
        self.experts += experts;
        self.rows += rows as f64 * experts;
    }

    /// The most rows that so many experts have, or more of them; 1 if all are fewer.
    fn likely_rows(&self, experts: f64) -> usize {
        let mut with_as_many = 0.0;
        let likely = self.groups.iter().rev().find(|&&(_, experts_of_group)| {
            with_as_many += experts_of_group;
            with_as_many >= experts
        });
        likely.map_or(1, |&(rows, _)| rows)
    }

    fn sorted(mut self) -> Self {
        self.groups.sort_unstable_by_key(|&(rows, _)| rows);
        self
    }

    fn none() -> Self {
        Self { groups: Vec::new(), experts: 0.0, rows: 0.0 }
    }

    /// All experts are as likely.
    fn even(shape: &GemmShape) -> Self {
        let mut population = Self::none();
        population.add(shape.rows as f64 / shape.experts.max(1) as f64, shape.experts as f64);
        population.sorted()
    }

    /// Experts are as likely as 1, 1/2, 1/3, ..., but none has more rows than there are tokens.
    fn skewed(shape: &GemmShape) -> Self {
        /// From an expert to the first of the next group, which are taken together.
        const GROUP: f64 = 1.35;
        let mut groups = Vec::new();
        let mut first = 1;
        while first <= shape.experts {
            let next = ((first as f64 * GROUP) as usize).clamp(first + 1, shape.experts + 1);
            let weight = (first..next).map(|place| 1.0 / place as f64).sum::<f64>();
            groups.push((weight / (next - first) as f64, (next - first) as f64));
            first = next;
        }
        let most = shape.most_rows.max(1) as f64;
        let rows = |strength: f64, weight: f64| most * (1.0 - (-strength * weight).exp());
        let total = |strength| groups.iter().map(|&(weight, experts)| experts * rows(strength, weight)).sum::<f64>();
        let (mut low, mut high) = (1e-9f64, 1e9f64);
        for _ in 0..60 {
            let middle = (low * high).sqrt();
            if total(middle) < shape.rows as f64 { low = middle } else { high = middle }
        }
        let mut population = Self::none();
        for &(weight, experts) in &groups {
            population.add(rows(low, weight), experts);
        }
        population.sorted()
    }
}

/// What a GEMM does, cut by a kernel; times in microseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    tiles: f64,
    /// Of all tiles together.
    time: f64,
    /// Of the longest tile that is likely to be there.
    longest: f64,
    /// After the last tile.
    after: f64,
    /// Of what is read and written.
    memory: f64,
}

/// Most steps that a tile's rows have.
const MOST_STEPS: usize = 6;

impl Cost {
    /// Whether a tile is activated while the next one is multiplied: the slower of the two decides then, and the last
    /// tile's activation comes after all.
    fn activates_meanwhile(&self) -> bool {
        self.activated && matches!(self.kernel, GemmKernel::Wide { .. })
    }

    /// Microseconds.
    fn of(&self, shape: &GemmShape, population: &Population, multiprocessors: usize) -> f64 {
        self.of_launch(&[self.work(shape, population)], multiprocessors)
    }

    /// Microseconds of a launch that does this work, one behind the other.
    fn of_launch(&self, work: &[Work], multiprocessors: usize) -> f64 {
        let sum = |of: fn(&Work) -> f64| work.iter().map(of).sum::<f64>();
        let tiles = sum(|work| work.tiles);
        if tiles == 0.0 {
            return self.start;
        }
        let rounds = tiles / multiprocessors as f64;
        let spread = (1.0 - self.whole) * (rounds + self.tail * rounds.min(1.0)) + self.whole * rounds.ceil();
        let busy = (sum(|work| work.time) / tiles * spread).max(sum(|work| work.longest));
        let memory = sum(|work| work.memory);
        let both = (busy.powf(self.hardness) + memory.powf(self.hardness)).powf(1.0 / self.hardness);
        self.start + sum(|work| work.after) + both
    }

    /// Microseconds that both GEMMs take longer in one launch, for what multiprocessors hand to each other.
    fn hand_over(&self, [first, second]: &[Work; 2], multiprocessors: usize) -> f64 {
        /// From the last `gate | up` of a row tile to its activated rows in another multiprocessor.
        const LATENCY: f64 = 2.0;
        /// The same where the warps that multiply activate, and nothing is left to multiply meanwhile: less than a round
        /// of GEMM 1's tiles, or than two of GEMM 2's.
        const EXPOSED: f64 = 10.0;
        /// That those warps count and activate for each so many outputs of GEMM 1.
        const ACTIVATING: f64 = 1.5;
        const OUTPUTS: f64 = 384.0;
        if !self.format.has_groups() {
            return LATENCY;
        }
        let [first, second] = [first, second].map(|work| work.tiles / multiprocessors as f64);
        let exposed = EXPOSED * (1.0 - first.min(second / 2.0)).max(0.0);
        exposed + ACTIVATING * first * self.kernel.outputs() as f64 / OUTPUTS
    }

    /// The work of one GEMM.
    fn work(&self, shape: &GemmShape, population: &Population) -> Work {
        let (row_tile, outputs, shared) = (self.kernel.row_tile(), self.kernel.outputs(), self.kernel.shared());
        let step = self.kernel.row_step();
        let blocks = shape.k.div_ceil(values_of_block(shape.activation_format)) as f64;
        let columns = (shared * shape.n.div_ceil(outputs * shared)) as f64;
        // Tiles of each number of steps.
        let mut counts = [0.0; MOST_STEPS];
        for &(rows, experts) in &population.groups {
            let (full, rest) = (rows / row_tile, rows % row_tile);
            counts[row_tile / step - 1] += columns * experts * full as f64;
            if rest > 0 {
                counts[rest.div_ceil(step) - 1] += columns * experts;
            }
        }
        let tiles = counts.iter().sum::<f64>();
        if tiles == 0.0 {
            return Work::default();
        }
        // Of a tile, in the mean and in the largest one that is likely to be there.
        let rows_of_tile = columns * population.rows / tiles;
        let most_rows = population.likely_rows(0.5 / columns).min(row_tile) as f64;
        let (mut busy, mut longest, mut after) = (0.0, 0.0, 0.0);
        for ((&count, &of_tile), &of_block) in counts.iter().zip(self.tile_times).zip(self.block_times) {
            let time = |rows: f64| {
                let (of_rows, of_blocks) = (of_tile + rows * self.row_time, blocks * of_block);
                if self.activates_meanwhile() {
                    (of_rows.powi(4) + of_blocks.powi(4)).powf(0.25)
                } else {
                    of_rows + of_blocks
                }
            };
            busy += count * time(rows_of_tile);
            if count >= 0.5 || longest == 0.0 {
                longest = time(most_rows);
                after = if self.activates_meanwhile() { of_tile + most_rows * self.row_time } else { 0.0 };
            }
        }
        // Scales of groups come with the weights.
        let weight_bytes = match shape.format.has_groups() {
            true => unit_bytes(shape.format) as f64 / (UNIT_OUTPUTS * UNIT_K) as f64,
            false => weight_bytes(shape.format) as f64,
        };
        let result = if self.activated { 0.5 } else { 2.0 };
        // A large tile and the small one that holds the rest of an expert's rows go at different paces and read its
        // weights twice. Past the wide tile's rows that is so of the wide one too, and decides nothing between them.
        let twice = |&&(rows, _): &&(usize, f64)| {
            self.kernel == GemmKernel::Large && (LARGE_ROW_TILE + 1..=WIDE_ROW_TILE).contains(&rows)
        };
        let again: f64 = population.groups.iter().filter(twice).map(|(_, experts)| experts).sum();
        let reads = population.experts.min(shape.experts as f64) + again;
        let weights = reads * (shape.n * shape.k) as f64 * weight_bytes;
        let row_bytes = row_bytes(shape.activation_format) as f64;
        let rows = population.rows * (shape.k as f64 * row_bytes + shape.n as f64 * result);
        let memory = weights / self.weight_bytes + rows / self.row_bytes;
        Work { tiles, time: busy, longest, after, memory }
    }
}

/// Microseconds of an activation by itself, of `2 n` values a row.
fn activation(format: ActivationFormat, rows: f64, n: usize) -> f64 {
    const START: f64 = 2.2;
    const BYTES: f64 = 3.0e6;
    START + rows * (n / 2 * (4 + row_bytes(format))) as f64 / BYTES
}

/// What is expected to take least. With `activation_follows`, which is then counted, of tiles that have it inside and of
/// those that do not; with `has_copy`, of the weights' own format and of their copy in e4m3.
pub(super) fn cheapest(shape: &GemmShape, activation_follows: bool, has_copy: bool, multiprocessors: usize) -> GemmKey {
    let of = |format| least(&GemmShape { format, ..*shape }, activation_follows, multiprocessors);
    let own = of(shape.format);
    let copy = has_copy.then(|| of(WeightFormat::E4m3)).filter(|copy| copy.0 < own.0);
    let (_, cost) = copy.unwrap_or(own);
    GemmKey { kernel: cost.kernel, activated: cost.activated, e4m3_copy: copy.is_some() }
}

/// Which kernel both GEMMs of a layer should have in one launch, if that is expected to take less than what was chosen for
/// them `apart`, each with whether an activation follows it.
pub(super) fn cheapest_joined(
    shapes: &[GemmShape; 2],
    apart: [(GemmKey, bool); 2],
    takes: impl Fn(&GemmKernel) -> bool,
    multiprocessors: usize,
) -> Option<GemmKernel> {
    let guesses = shapes.each_ref().map(Guesses::new);
    let mut of_apart = 0.0;
    for ((shape, guesses), (key, activation_follows)) in shapes.iter().zip(&guesses).zip(apart) {
        let shape = GemmShape { format: key.format(shape.format), ..*shape };
        let is_key = |cost: &&Cost| (cost.kernel, cost.activated) == (key.kernel, key.activated);
        let cost = costs_of(&shape).find(is_key)?;
        of_apart += guesses.expected(cost, &shape, activation_follows, multiprocessors).sqrt();
    }
    let of_joined = |cost: &Cost| {
        let [first, second] = &guesses;
        let of_guess = |(first, second): (&Population, &Population)| {
            let work = [cost.work(&shapes[0], first), cost.work(&shapes[1], second)];
            cost.of_launch(&work, multiprocessors) + cost.hand_over(&work, multiprocessors)
        };
        first.0.iter().zip(&second.0).map(of_guess).product::<f64>().sqrt()
    };
    let joined = costs_of(&shapes[0]).filter(|cost| !cost.activated && takes(&cost.kernel));
    let (least, kernel) = joined.map(|cost| (of_joined(cost), cost.kernel)).min_by(|a, b| a.0.total_cmp(&b.0))?;
    (least < of_apart).then_some(kernel)
}

/// The costs of a shape's formats.
fn costs_of(shape: &GemmShape) -> impl Iterator<Item = &'static Cost> {
    let formats = (shape.format, shape.activation_format);
    COSTS.iter().filter(move |cost| (cost.format, cost.activation_format) == formats)
}

/// What is expected to take least, and what it takes: a product of times, to be compared with others of as many rows.
fn least(shape: &GemmShape, activation_follows: bool, multiprocessors: usize) -> (f64, &'static Cost) {
    let guesses = Guesses::new(shape);
    let fits = |cost: &&Cost| {
        (!cost.activated || (activation_follows && shape.n.is_multiple_of(256)))
            && (cost.kernel.shared() == 1 || shape.n > cost.kernel.outputs())
    };
    let of = |cost| (guesses.expected(cost, shape, activation_follows, multiprocessors), cost);
    costs_of(shape).filter(fits).map(of).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, &COSTS[0]))
}

/// How tokens may choose experts.
struct Guesses([Population; 2]);

impl Guesses {
    fn new(shape: &GemmShape) -> Self {
        Self([Population::even(shape), Population::skewed(shape)])
    }

    /// What a kernel is expected to take: the product of its times for both.
    fn expected(&self, cost: &Cost, shape: &GemmShape, activation_follows: bool, multiprocessors: usize) -> f64 {
        let one = |population: &Population| {
            let apart = activation_follows && !cost.activated;
            let after = if apart { activation(shape.activation_format, population.rows, shape.n) } else { 0.0 };
            cost.of(shape, population, multiprocessors) + after
        };
        self.0.iter().map(one).product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: usize = 132;

    fn shape(
        format: WeightFormat,
        (n, k): (usize, usize),
        experts: usize,
        (rows, most_rows): (usize, usize),
    ) -> GemmShape {
        GemmShape { n, k, format, activation_format: format.usual_activations(), experts, rows, most_rows }
    }

    #[test]
    fn a_population_has_the_rows_it_is_made_of() {
        for (experts, rows, most) in [(8, 2, 1), (8, 8192, 4096), (256, 8, 1), (256, 2048, 256), (32, 4096, 4096)] {
            let shape = shape(WeightFormat::E4m3, (128, 128), experts, (rows, most));
            for population in [Population::even(&shape), Population::skewed(&shape)] {
                assert!((population.rows / rows as f64 - 1.0).abs() < 0.1, "{population:?}, expected {rows} rows");
                assert!(population.experts <= experts as f64 * 1.01, "{population:?} of {experts} experts");
            }
        }
    }

    #[test]
    fn every_kernel_has_a_time_for_each_of_its_steps_and_more_work_takes_longer() {
        for cost in COSTS {
            let steps = cost.kernel.row_tile() / cost.kernel.row_step();
            assert_eq!((cost.tile_times.len(), cost.block_times.len()), (steps, steps), "{cost:?}");
            assert!(steps <= MOST_STEPS && cost.hardness >= 1.0 && (0.0..=1.0).contains(&cost.whole), "{cost:?}");
            let time = |sizes, experts, rows| {
                let shape = shape(cost.format, sizes, experts, rows);
                cost.of(&shape, &Population::even(&shape), H200)
            };
            let small = time((1024, 1024), 8, (64, 32));
            for larger in [
                time((8192, 1024), 8, (64, 32)),
                time((1024, 8192), 8, (64, 32)),
                time((1024, 1024), 64, (512, 32)),
                time((1024, 1024), 8, (8192, 4096)),
            ] {
                assert!(small < larger, "{small}, {larger}: {cost:?}");
            }
        }
    }

    #[test]
    fn every_pair_of_formats_that_a_gpu_multiplies_has_costs_and_more_rows_get_larger_tiles() {
        use WeightFormat::{Bf16, E4m3, Int4, Mxfp4};
        for (format, activation_format) in [
            (E4m3, ActivationFormat::E4m3),
            (Bf16, ActivationFormat::Bf16),
            (Mxfp4, ActivationFormat::E4m3),
            (Mxfp4, ActivationFormat::Bf16),
            (Int4, ActivationFormat::E4m3),
            (Int4, ActivationFormat::Bf16),
        ] {
            let of = |cost: &&Cost| (cost.format, cost.activation_format) == (format, activation_format);
            let kernels: Vec<_> = COSTS.iter().filter(of).map(|cost| cost.kernel).collect();
            assert!(kernels.iter().all(|kernel| GemmKernel::all(format).contains(kernel)), "{format:?}: {kernels:?}");
            let chosen = [(64, 2), (65536, 4096)].map(|(rows, most_rows)| {
                let (n, k, experts) = (4096, 4096, 128);
                let shape = GemmShape { n, k, format, activation_format, experts, rows, most_rows };
                cheapest(&shape, false, false, H200).kernel
            });
            assert!(chosen.iter().all(|kernel| kernels.contains(kernel)), "{format:?}: {chosen:?}");
            assert!(chosen[0].row_tile() <= 64 && chosen[1].row_tile() >= 128, "{format:?}: {chosen:?}");
        }
    }

    #[test]
    fn few_rows_get_tiles_of_few_rows_and_many_the_wide_ones() {
        use WeightFormat::{Bf16, E4m3, Int4, Mxfp4};
        let chosen =
            |format, sizes, experts, rows| cheapest(&shape(format, sizes, experts, rows), false, false, H200).kernel;
        let inside =
            |format, n| cheapest(&shape(format, (n, 7168), 256, (131_072, 16384)), true, false, H200).activated;
        for format in [E4m3, Bf16, Mxfp4, Int4] {
            let kernel = chosen(format, (4096, 4096), 128, (32, 4));
            assert!(!kernel.tokens_on_m() && kernel.row_tile() <= 64, "{kernel}");
            let kernel = chosen(format, (4096, 4096), 8, (32768, 16384));
            assert!(kernel.row_tile() >= 128, "{kernel}");
        }
        assert!(chosen(E4m3, (7168, 256), 256, (32768, 4096)).tokens_on_m(), "also where K is short");
        assert!(inside(E4m3, 4096));
        for (experts, rows) in [(256, (32768, 4096)), (32, (4096, 4096))] {
            let kernel = chosen(E4m3, (4096, 7168), experts, rows);
            assert_eq!(
                kernel.row_tile(),
                WIDE_ROW_TILE,
                "half of the experts have more rows than the large tile: {kernel}"
            );
        }
        assert!(!inside(E4m3, 4096 + 128), "256 does not divide N");
        assert!(!inside(Bf16, 4096), "there is no such kernel of bf16");
        assert_eq!(chosen(Bf16, (128, 1024), 8, (32768, 16384)).shared(), 1, "nobody to share with");
    }
}
