//! What this machine offers, measured: memory bandwidth and the GEMM's rate.
//!
//! The measurements take a fraction of a second. They set the limit that a stage's time is compared with: memory that
//! must move at the bandwidth, or operations at the rate, whichever takes longer.

use crate::error::{Error, Result};
use crate::memory;
use expertile::cpu::{Activations, Cpu, Isa, PackedWeights, grouped_gemm, grouped_gemm_workspace_bytes};
use expertile::int4::{self, Int4Scales};
use expertile::{
    ActivationFormat, E4m3, Layout, MatrixRef, ScaleFormat, Scales, Stage, StageCost, WeightFormat, mxfp4,
};
use half::bf16;
use rayon::prelude::*;
use serde::Serialize;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Bytes per second that memory gives.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Bandwidth {
    /// Reading only.
    pub(crate) read_bytes_per_second: f64,
    /// A copy, bytes read and written added up.
    pub(crate) copy_bytes_per_second: f64,
}

/// What a stage's time is compared with.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Limits {
    #[serde(flatten)]
    pub(crate) bandwidth: Bandwidth,
    /// The grouped GEMM of these formats on operands that stay in cache.
    pub(crate) gemm_flops_per_second: f64,
}

/// Which resource a stage cannot outrun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Bound {
    Memory,
    Compute,
}

impl Limits {
    pub(crate) fn measure(cpu: &Cpu, weights: WeightFormat, activations: ActivationFormat) -> Result<Self> {
        Ok(Self {
            bandwidth: Bandwidth::measure()?,
            gemm_flops_per_second: gemm_flops_per_second(cpu, weights, activations)?,
        })
    }

    /// The least time that a stage can take here, and why.
    pub(crate) fn least_seconds(&self, stage: Option<Stage>, cost: StageCost) -> (f64, Bound) {
        // Matrix products mostly read weights; the other stages read and write alike.
        let bandwidth = match stage {
            None | Some(Stage::Gemm1 | Stage::Gemm2) => self.bandwidth.read_bytes_per_second,
            Some(_) => self.bandwidth.copy_bytes_per_second,
        };
        let memory = cost.bytes as f64 / bandwidth;
        let compute = cost.flops as f64 / self.gemm_flops_per_second;
        if compute > memory { (compute, Bound::Compute) } else { (memory, Bound::Memory) }
    }
}

impl Bandwidth {
    /// Best of a few passes over buffers that no cache holds, by all threads of the current pool.
    pub(crate) fn measure() -> Result<Self> {
        const PASSES: usize = 4;
        const LEAST_BYTES: usize = 4 << 20;
        // Where little memory is left, less of it is measured rather than nothing.
        let bytes = memory::available().map_or(usize::MAX, |bytes| usize::try_from(bytes / 4).unwrap_or(usize::MAX));
        let len = uncached_bytes().min(bytes).max(LEAST_BYTES) / size_of::<u64>();
        let mut words = memory::zeroed::<u64>("measuring the bandwidth", len)?;
        // First touch by the threads that use it; a page of zeros that was never written is not memory.
        words.par_chunks_mut(CHUNK_WORDS).for_each(|chunk| chunk.fill(1));
        let read = best(PASSES, || {
            black_box(words.par_chunks(CHUNK_WORDS).map(sum).reduce(|| 0, u64::wrapping_add));
        });
        let (from, to) = words.split_at_mut(len / 2);
        let copy = best(PASSES, || parallel_copy(from, to));
        Ok(Self {
            read_bytes_per_second: (len * size_of::<u64>()) as f64 / read.as_secs_f64(),
            copy_bytes_per_second: (len * size_of::<u64>()) as f64 / copy.as_secs_f64(),
        })
    }
}

/// Several times the largest cache, as far as the system says, within reason.
fn uncached_bytes() -> usize {
    const LEAST: usize = 128 << 20;
    let text = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    let kibibytes: Option<usize> = text.trim().strip_suffix('K').and_then(|number| number.parse().ok());
    kibibytes.map_or(LEAST, |kibibytes| (kibibytes << 12).clamp(LEAST, 8 * LEAST))
}

const CHUNK_WORDS: usize = 128 << 10;

/// Copies `from` to `to`, which must be as long, by all threads of the current pool.
pub(crate) fn parallel_copy(from: &[u64], to: &mut [u64]) {
    // A few chunks to each thread, none so small that handing it out costs more than copying it.
    let chunk = (from.len() / (4 * rayon::current_num_threads())).clamp(CHUNK_WORDS / 32, CHUNK_WORDS);
    to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
}

/// Several sums side by side, so that loads and not additions are what takes time.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    for chunk in words.as_chunks::<16>().0 {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

fn best(passes: usize, mut work: impl FnMut()) -> Duration {
    let time = || {
        let started = Instant::now();
        work();
        started.elapsed()
    };
    std::iter::repeat_with(time).take(passes).min().unwrap_or_default()
}

/// The rate of the grouped GEMM where memory plays no part: one expert, a few hundred kilobytes, again and again.
pub(crate) fn gemm_flops_per_second(cpu: &Cpu, weights: WeightFormat, activations: ActivationFormat) -> Result<f64> {
    const ROWS: usize = 384;
    const N: usize = 512;
    const K: usize = 512;
    let packed = match weights {
        WeightFormat::Bf16 => PackedWeights::pack_bf16(cpu, &vec![bf16::ONE; N * K], 1, N, K)?,
        WeightFormat::E4m3 => PackedWeights::pack_e4m3(cpu, &vec![E4m3(0x38); N * K], &[1.0; (N * K) >> 14], 1, N, K)?,
        WeightFormat::Mxfp4 => {
            PackedWeights::pack_mxfp4(cpu, &vec![0x22; N * K / 2], &[127; N * K / mxfp4::GROUP], 1, N, K)?
        }
        WeightFormat::Int4 => {
            let scales = vec![bf16::ONE; N * K / int4::GROUP];
            let scales = Int4Scales::Bf16(MatrixRef::new(&scales, N, K / int4::GROUP)?);
            PackedWeights::pack_int4(cpu, &vec![0x99; N * K / 2], scales, 1, N, K)?
        }
    };
    let mut space = vec![0; 3 + ROWS];
    let layout = Layout::from_psum(&[ROWS as i32], 1, ROWS, &mut space)?;
    let (bf16_rows, e4m3_rows) = (vec![bf16::ONE; ROWS * K], vec![E4m3(0x38); ROWS * K]);
    let format = ScaleFormat::HOPPER;
    let scales = vec![1.0; format.words(ROWS, K)?];
    let rows = match activations {
        ActivationFormat::Bf16 => Activations::Bf16(&bf16_rows),
        ActivationFormat::E4m3 => Activations::E4m3 { rows: &e4m3_rows, scales: Scales::f32(format, &scales) },
    };
    let mut workspace = vec![0; grouped_gemm_workspace_bytes(ROWS, K, activations)?];
    let mut out = vec![bf16::ZERO; ROWS * N];
    grouped_gemm(cpu, &layout, rows, &packed, &mut workspace, &mut out)?;
    let started = Instant::now();
    let mut least = Duration::MAX;
    while started.elapsed() < Duration::from_millis(40) {
        let started = Instant::now();
        grouped_gemm(cpu, &layout, rows, &packed, &mut workspace, &mut out)?;
        least = least.min(started.elapsed());
    }
    Ok((2 * ROWS * N * K) as f64 / least.as_secs_f64())
}

/// The CPU backend with the instruction set of that name, or the best one.
pub(crate) fn cpu(isa: Option<&str>) -> Result<Cpu> {
    Ok(Cpu::with_isa(isa.map_or(Ok(Isa::best()), Isa::named)?))
}

/// A pool of that many threads, or of as many as rayon would start by itself.
pub(crate) fn pool(threads: Option<usize>) -> Result<rayon::ThreadPool> {
    // Rayon's own default: its variable, else the processors that this process may use.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let variable = || std::env::var("RAYON_NUM_THREADS").ok()?.parse().ok().filter(|&threads| threads > 0);
    let (name, threads) = match (threads, variable()) {
        (Some(threads), _) => ("--threads", threads),
        (None, Some(threads)) => ("RAYON_NUM_THREADS", threads),
        (None, None) => ("the number of threads", processors),
    };
    let most = most_threads(processors);
    if threads == 0 || threads > most {
        return Err(Error::usage(format!("{name} is {threads}, expected 1 to {most} on {processors} processors")));
    }
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    builder.build().map_err(|error| Error::usage(format!("{threads} threads cannot be started: {error}")))
}

/// Threads beyond the processors only wait for each other: thousands of them take a minute to do nothing. A few times
/// as many are let be, and what a small machine may want to try.
fn most_threads(processors: usize) -> usize {
    processors.saturating_mul(4).max(64)
}

/// The processor's name, if the system says.
pub(crate) fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("model name"))?;
    Some(name.trim_start_matches(['\t', ' ', ':']).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_bound_by_what_takes_longer() {
        let bandwidth = Bandwidth { read_bytes_per_second: 10.0, copy_bytes_per_second: 5.0 };
        let limits = Limits { bandwidth, gemm_flops_per_second: 100.0 };
        let least = |stage, bytes, flops| limits.least_seconds(stage, StageCost { bytes, flops });
        assert_eq!(least(Some(Stage::Gemm1), 100, 500), (10.0, Bound::Memory));
        assert_eq!(least(Some(Stage::Gemm1), 100, 5000), (50.0, Bound::Compute));
        assert_eq!(least(Some(Stage::Permute), 100, 0), (20.0, Bound::Memory));
    }

    #[test]
    fn more_threads_than_a_machine_could_use_are_refused() {
        assert_eq!((most_threads(2), most_threads(128), most_threads(usize::MAX)), (64, 512, usize::MAX));
        for threads in [0, 4096, usize::MAX] {
            let error = pool(Some(threads)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--threads is {threads}, expected 1 to ")), "{error}");
        }
        assert_eq!(pool(Some(5)).unwrap().current_num_threads(), 5);
    }

    #[test]
    fn measurements_are_positive_in_every_format() {
        let cpu = Cpu::new();
        for (weights, activations) in [
            (WeightFormat::Bf16, ActivationFormat::Bf16),
            (WeightFormat::E4m3, ActivationFormat::Bf16),
            (WeightFormat::E4m3, ActivationFormat::E4m3),
            (WeightFormat::Mxfp4, ActivationFormat::Bf16),
            (WeightFormat::Mxfp4, ActivationFormat::E4m3),
            (WeightFormat::Int4, ActivationFormat::Bf16),
            (WeightFormat::Int4, ActivationFormat::E4m3),
        ] {
            assert!(gemm_flops_per_second(&cpu, weights, activations).unwrap() > 1e6);
        }
        let measured = Bandwidth::measure().unwrap();
        assert!(measured.read_bytes_per_second > 1e7 && measured.copy_bytes_per_second > 1e7, "{measured:?}");
    }
}
