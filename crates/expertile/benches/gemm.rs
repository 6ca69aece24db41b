//! Times the grouped GEMM at the Qwen3-30B-A3B layer (H 2048, I 768, 128 experts, 8 of them per token).
//!
//! `cargo bench -p expertile --bench gemm -- [threads] [isa]` prints, for every number of tokens, the median and the
//! best of the repeats, GFLOP/s of live rows, and GB/s of weights beside what this machine reads at most. Every repeat
//! has another routing, so that the last one's weights are not what the caches hold.

use expertile::cpu::{self, Activations, Cpu, Isa, PackedWeights, PackedWeightsBuilder};
use expertile::int4::{self, Int4Scales};
use expertile::quantize::{Group, ScaleFormat, ScaleLayout, ScaleRounding, Scales};
use expertile::{E4m3, Layout, MatrixRef, WeightFormat, mxfp4};
use expertile_testkit::{Pattern, Random, block_scaled_weights, unit_rows, unit_weights};
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

const EXPERTS: usize = 128;
const TOPK: usize = 8;
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 768;

/// Rows per expert for `tokens` tokens that go to `TOPK` distinct experts each.
fn route(tokens: usize, random: &mut Random) -> Vec<usize> {
    let mut counts = vec![0; EXPERTS];
    for id in Pattern::Even.ids(random, [tokens, TOPK], EXPERTS, 0) {
        counts[id as usize] += 1;
    }
    counts
}

/// One expert's random weights, packed for each of them: the values do not matter here, the memory does.
fn weights(cpu: &Cpu, format: WeightFormat, n: usize, k: usize) -> PackedWeights {
    let mut random = Random::new(1);
    let mut builder = PackedWeightsBuilder::new(cpu, format, EXPERTS, n, k).unwrap();
    match format {
        WeightFormat::Bf16 => {
            let values = unit_weights(&mut random, [1, n, k], bf16::from_f32);
            for expert in 0..EXPERTS {
                builder.add_bf16_rows(expert, 0, MatrixRef::new(&values, n, k).unwrap()).unwrap();
            }
        }
        WeightFormat::E4m3 => {
            let (values, scales) = block_scaled_weights(&mut random, [1, n, k], E4m3::MAX, E4m3::from_f32);
            let scales = MatrixRef::new(&scales, n.div_ceil(128), k.div_ceil(128)).unwrap();
            for expert in 0..EXPERTS {
                builder.add_e4m3_rows(expert, 0, MatrixRef::new(&values, n, k).unwrap(), scales).unwrap();
            }
        }
        WeightFormat::Mxfp4 => {
            let values = unit_weights(&mut random, [1, n, k], |value| value);
            let (mut blocks, mut scales) = (vec![0; n * k / 2], vec![0; n * k / mxfp4::GROUP]);
            mxfp4::quantize_rows(&values, k, &mut blocks, &mut scales).unwrap();
            let blocks = MatrixRef::new(&blocks, n, k / 2).unwrap();
            let scales = MatrixRef::new(&scales, n, k / mxfp4::GROUP).unwrap();
            for expert in 0..EXPERTS {
                builder.add_mxfp4_rows(expert, 0, blocks, scales).unwrap();
            }
        }
        WeightFormat::Int4 => {
            let values = unit_weights(&mut random, [1, n, k], |value| value);
            let (mut blocks, mut scales) = (vec![0; n * k / 2], vec![bf16::ZERO; n * k / int4::GROUP]);
            int4::quantize_rows(&values, k, &mut blocks, &mut scales).unwrap();
            let blocks = MatrixRef::new(&blocks, n, k / 2).unwrap();
            let scales = Int4Scales::Bf16(MatrixRef::new(&scales, n, k / int4::GROUP).unwrap());
            for expert in 0..EXPERTS {
                builder.add_int4_rows(expert, 0, blocks, scales).unwrap();
            }
        }
    }
    builder.finish().unwrap()
}

/// GB/s at which all threads together read a block no cache holds.
fn read_bandwidth(cpu: &Cpu, block: &[u64]) -> f64 {
    let best = (0..7).map(|_| {
        let start = Instant::now();
        let parts = block.par_chunks(block.len().div_ceil(cpu.threads()));
        std::hint::black_box(parts.map(|part| part.iter().fold(0, |all, x| all | x)).reduce(|| 0, |a, b| a | b));
        start.elapsed()
    });
    size_of_val(block) as f64 / best.min().unwrap().as_secs_f64() / 1e9
}

struct Timing {
    median: Duration,
    best: Duration,
    flops: f64,
    weight_bytes: f64,
}

fn time(cpu: &Cpu, weights: &PackedWeights, e4m3_rows: bool, tokens: usize) -> Timing {
    let (n, k) = (weights.n(), weights.k());
    let mut random = Random::new(tokens as u64);
    let m_sum = tokens * TOPK;
    let rows = unit_rows(&mut random, m_sum * k, bf16::from_f32);
    let bytes: Vec<E4m3> = rows.iter().map(|x| E4m3::from_f32(x.to_f32())).collect();
    let scales = vec![0.01; m_sum * k.div_ceil(128)];
    let activations = match e4m3_rows {
        true => Activations::E4m3 {
            rows: &bytes,
            scales: Scales::f32(
                ScaleFormat::new(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact).unwrap(),
                &scales,
            ),
        },
        false => Activations::Bf16(&rows),
    };
    let needed = cpu::grouped_gemm_workspace_bytes(m_sum, k, activations.format()).unwrap();
    let (mut workspace, mut out) = (vec![0; needed], vec![bf16::ZERO; m_sum * n]);
    let mut times = Vec::new();
    let mut active = 0;
    let repeats = if tokens > 64 { 7 } else { 15 };
    for _ in 0..repeats {
        let counts = route(tokens, &mut random);
        active += counts.iter().filter(|&&count| count > 0).count();
        let psum: Vec<i32> = counts
            .iter()
            .scan(0, |end, &count| {
                *end += count as i32;
                Some(*end)
            })
            .collect();
        let mut space = vec![0; 3 * EXPERTS + m_sum];
        let layout = Layout::from_psum(&psum, 1, m_sum, &mut space).unwrap();
        let start = Instant::now();
        cpu::grouped_gemm(cpu, &layout, activations, weights, &mut workspace, &mut out).unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    Timing {
        median: times[repeats / 2],
        best: times[0],
        flops: 2.0 * (m_sum * n * k) as f64,
        weight_bytes: weights.bytes() as f64 / EXPERTS as f64 * active as f64 / repeats as f64,
    }
}

fn main() {
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with("--"));
    let threads = words.next().map_or(0, |word| word.parse().expect("a number of threads"));
    let isa = words.next().map_or_else(Isa::best, |name| Isa::named(&name).expect("an instruction set"));
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    let cpu = Cpu::with_isa(isa).in_pool(pool.clone());
    let block = vec![1u64; 1 << 26];
    let bandwidth = || pool.install(|| read_bandwidth(&cpu, &block));
    println!("{isa}, {} threads, reads {:.1} GB/s", cpu.threads(), bandwidth());
    println!("gemm  weights rows  tokens  median us   best us  GFLOP/s   GB/s  of read");
    for (gemm, n, k) in [("gemm1", 2 * INTERMEDIATE, HIDDEN), ("gemm2", HIDDEN, INTERMEDIATE)] {
        let formats = WeightFormat::ALL;
        let with_rows = formats.into_iter().flat_map(|format| [(format, false), (format, true)]);
        for (format, e4m3_rows) in with_rows.filter(|&pair| pair != (WeightFormat::Bf16, true)) {
            let weights = weights(&cpu, format, n, k);
            for tokens in [1, 8, 64, 512] {
                let timing = time(&cpu, &weights, e4m3_rows, tokens);
                let rows = if e4m3_rows { "e4m3" } else { "bf16" };
                let best = timing.best.as_secs_f64();
                println!(
                    "{gemm} {:>8} {rows:>5} {tokens:>7} {:>10.0} {:>9.0} {:>8.0} {:>6.1} {:>8.2}",
                    format.name(),
                    timing.median.as_secs_f64() * 1e6,
                    best * 1e6,
                    timing.flops / best / 1e9,
                    timing.weight_bytes / best / 1e9,
                    timing.weight_bytes / best / 1e9 / bandwidth(),
                );
            }
        }
    }
}
