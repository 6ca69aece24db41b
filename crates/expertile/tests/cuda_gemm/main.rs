//! The grouped GEMM on a Hopper GPU against sums in f64 over the same operands: every live row, poisoned outputs, gaps
//! that stay as they were. Padding rows and their scales hold NaN. Skips, and says so, on a machine without such a
//! device.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]
// Every unsafe block here hands a step the addresses of buffers that live until after the next wait and are as large
// as the step's own functions ask.
#![allow(clippy::undocumented_unsafe_blocks)]

mod activation;
mod case;
mod four_bits;
#[path = "../on_device/mod.rs"]
mod on_device;
mod tiles;

use activation::check_activation;
use case::*;
use expertile::cuda::{Gemm, GemmKernel, Stream};
use expertile::{Activation, Error};
use expertile_testkit::{POISON, Random, assert_untouched};
use on_device::{hopper, is_emulated};
use tiles::*;

#[test]
fn every_row_tile_multiplies_hostile_layouts() {
    let Some(device) = hopper() else { return };
    // Empty experts, one row, whole tiles, tails of one and of one less than the alignment.
    let counts = vec![0, 1, 16, 17, 0, 64, 63, 193, 128, 5, 0, 31];
    for format in FORMATS {
        for kernel in GemmKernel::all(format.weights) {
            let alignment = 8 * kernel.shared();
            check(device, &Case { counts: counts.clone(), alignment, n: 256, k: 384, format, kernel, seed: 1 });
        }
    }
}

#[test]
fn every_alignment_runs_with_every_row_tile() {
    let Some(device) = hopper() else { return };
    // What 4 does not divide: scales of segments that do not start on 16 bytes.
    for alignment in [1, 2, 3, 4, 6, 8, 16, 32, 64, 128] {
        let whole = [plain(32), sharing(64), sharing(192), WIDE_SHARING, LARGE].map(|kernel| (E4M3, kernel));
        let packed = [W4A8, INT4_A8]
            .map(|format| [narrow(32), broad(32), broad(128), plain(128)].map(|kernel| (format, kernel)));
        for (format, kernel) in whole.into_iter().chain(packed.into_iter().flatten()) {
            let counts = vec![alignment - 1, 1, alignment, 0, alignment + 1, 200, 3];
            let case = Case { counts, alignment, n: 128, k: 256, format, kernel, seed: 2 };
            check(device, &case);
        }
    }
}

#[test]
fn partial_n_and_k_are_right_to_the_last_column() {
    let Some(device) = hopper() else { return };
    let sizes: &[_] = if is_emulated(device) {
        &[(8, 16), (136, 144), (264, 1184), (776, 96)]
    } else {
        &[(8, 16), (136, 144), (264, 2880), (120, 400), (384, 3584), (776, 96)]
    };
    for format in FORMATS {
        for &(n, k) in sizes {
            let few = [plain(16), narrow(64), broad(16), broad(32), broad(128), sharing(64), sharing(192)];
            for kernel in few.into_iter().filter(|few| runs(few, format)).chain(wide_kernels(format)) {
                let k = format.k(k);
                check(device, &Case { counts: vec![3, 0, 33, 70], alignment: 8, n, k, format, kernel, seed: 3 });
            }
        }
    }
}

/// A row's results depend on the row and on its expert's weights, not on the kernel that makes them nor on what else
/// is there.
#[test]
fn a_row_has_the_same_bits_in_every_tile_and_beside_any_others() {
    let Some(device) = hopper() else { return };
    // Nine blocks of K for e4m3 and seventeen for bf16, the last in part; in the emulator five and nine.
    let k = if is_emulated(device) { 528 } else { 1040 };
    for format in FORMATS {
        let (n, k) = (136, format.k(k));
        let all = Case { counts: vec![193, 0, 17, 66], alignment: 8, n, k, format, kernel: plain(64), seed: 10 };
        let whole = Operands::new(&all);
        let expected = Call::new(device, &all, &whole).run(whole.plan.m_sum(), n);
        for kernel in GemmKernel::all(format.weights) {
            for counts in [[193, 0, 17, 66], [1, 0, 5, 33]] {
                let (case, operands) = whole.first_rows(&Case { kernel, ..all.clone() }, &counts);
                let found = Call::new(device, &case, &operands).run(operands.plan.m_sum(), n);
                for (expert, &count) in counts.iter().enumerate() {
                    for row in 0..count {
                        let [at, of] = [&operands, &whole].map(|operands| (operands.starts[expert] + row) * n);
                        assert!(
                            found[at..at + n] == expected[of..of + n],
                            "row {row} of expert {expert} has other bits: {kernel}, {counts:?}, {format:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn parts_of_k_add_up() {
    let Some(device) = hopper() else { return };
    for format in WHOLE_BYTES {
        for splits in [2, 4, 8] {
            for row_tile in [16, 32, 64] {
                let kernel = split(row_tile, splits);
                let counts = vec![1, 0, row_tile, 7, 2 * row_tile + 1];
                check(device, &Case { counts, alignment: 8, n: 200, k: 1168, format, kernel, seed: 4 });
            }
        }
    }
}

#[test]
fn all_rows_on_one_expert_and_none_at_all() {
    let Some(device) = hopper() else { return };
    // As many tiles as make a difference, of rows and of outputs.
    let (rows, n, k) = if is_emulated(device) { (400, 264, 192) } else { (1000, 512, 512) };
    for format in FORMATS {
        for counts in [vec![0, 0, rows - 300, 0], vec![0, 0, 0], vec![rows]] {
            for kernel in wide_kernels(format) {
                let counts = counts.clone();
                check(device, &Case { counts, alignment: 128, n, k, format, kernel, seed: 5 });
            }
        }
    }
}

#[test]
fn many_tiles_go_round_the_ring_and_fifty_runs_give_the_same_bits() {
    let Some(device) = hopper() else { return };
    for format in FORMATS {
        let few = [
            (sharing(128), 400),
            (broad(128), 400),
            (plain(64), 100),
            (broad(64), 100),
            (narrow(32), 40),
            (broad(16), 20),
            (split(16, 4), 20),
        ];
        let few = few.into_iter().filter(|(kernel, _)| runs(kernel, format));
        for (kernel, most) in wide_kernels(format).into_iter().map(|kernel| (kernel, 400)).chain(few) {
            let mut random = Random::new(77);
            let counts: Vec<usize> = (0..24).map(|_| random.below(most)).collect();
            let case = Case { counts, alignment: 16, n: 1024, k: 640, format, kernel, seed: 6 };
            let operands = Operands::new(&case);
            let call = Call::new(device, &case, &operands);
            let first = call.run(operands.plan.m_sum(), case.n);
            for run in 1..50 {
                assert!(call.run(operands.plan.m_sum(), case.n) == first, "run {run} gave other bits: {case:?}");
            }
            for expert in (0..24).filter(|&expert| case.counts[expert] > 0).step_by(5) {
                let row = operands.starts[expert];
                check_row(&case, &operands, expert, row, &first[row * case.n..(row + 1) * case.n]);
            }
        }
    }
}

/// Tiles of few rows, whose consumers wait for weights all the time, and give every stage back as soon as they have it.
#[test]
fn a_ring_that_runs_empty_gives_the_same_bits() {
    let Some(device) = hopper() else { return };
    // More weights than a GPU's cache holds; the emulator has none.
    let is_small = is_emulated(device);
    let (n, k, runs_of_each) = if is_small { (192, 320, 1) } else { (3584, 2176, 20) };
    for format in [W4A8, W4A16, E4M3, BF16] {
        let experts = match (is_small, format.weights.has_groups()) {
            (true, _) => 3,
            (false, true) => 48,
            (false, false) => 16,
        };
        let mut random = Random::new(78);
        let counts: Vec<usize> = (0..experts).map(|_| random.below(40)).collect();
        let case = |kernel| Case { counts: counts.clone(), alignment: 8, n, k, format, kernel, seed: 8 };
        let operands = Operands::new(&case(plain(16)));
        let mut first: Option<Vec<u16>> = None;
        let kernels = [plain(16), narrow(64), plain(64), broad(64), broad(128), plain(192)];
        for kernel in kernels.into_iter().filter(|kernel| runs(kernel, format)) {
            let call = Call::new(device, &case(kernel), &operands);
            for run in 0..runs_of_each {
                let out = call.run(operands.plan.m_sum(), n);
                let differing =
                    first.as_ref().map_or(0, |first| first.iter().zip(&out).filter(|(a, b)| a != b).count());
                assert_eq!(differing, 0, "{format:?}, {kernel}: results that differ in run {run}");
                first.get_or_insert(out);
            }
        }
    }
}

/// More large tiles than the first two rounds have, so that blocks claim the others. Each case runs twice: the counter
/// has to be 0 again.
#[test]
fn large_tiles_of_few_rows_are_claimed() {
    /// Weights of a tile from which on it is claimed: the kernels' own.
    const CLAIMED_BYTES: usize = 48 * 1024;
    let source = include_str!("../../src/cuda/kernels/gemm/claims.cuh");
    assert!(source.contains("constexpr int CLAIMED_BYTES = 48 * 1024;"), "tiles of this test may not be claimed");
    let Some(device) = hopper() else { return };
    // One block to each multiprocessor, as these tiles have.
    let blocks = device.info().multiprocessors as usize;
    for format in FORMATS {
        let kernels = if format.weights.has_groups() {
            vec![broad(16), broad(64)]
        } else {
            vec![plain(16), narrow(32), plain(128)]
        };
        let kernels = if is_emulated(device) { &kernels[..1] } else { &kernels[..] };
        for &kernel in kernels {
            let k = (CLAIMED_BYTES * 8 / format.weights.bits() / kernel.outputs()).next_multiple_of(64) + 32;
            let counts = (0..blocks.div_ceil(2) + 3).map(|expert| [3, 1, 2, 0, 1][expert % 5]).collect();
            check(device, &Case { counts, alignment: 8, n: 6 * kernel.outputs() - 56, k, format, kernel, seed: 12 });
        }
    }
}

/// Row tiles past those that a block lists in shared memory are read from the worklist.
#[test]
fn more_row_tiles_than_a_block_lists_are_right() {
    let Some(device) = hopper() else { return };
    for (format, kernel) in [(E4M3, plain(16)), (BF16, narrow(16)), (W4A8, broad(16))] {
        // 405 tiles, then 140 of one expert.
        let counts = (0..540).map(|expert| [1, 2, 0, 1][expert % 4]).chain([16 * 140]).collect();
        check(device, &Case { counts, alignment: 8, n: 72, k: 64, format, kernel, seed: 13 });
    }
    // The kernels for many rows list more.
    if !is_emulated(device) {
        for kernel in [WIDE, LARGE] {
            let counts = vec![192 * 1030, 5];
            check(device, &Case { counts, alignment: 8, n: 136, k: 128, format: E4M3, kernel, seed: 14 });
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_writes_nothing() {
    let Some(device) = hopper() else { return };
    let case = Case { counts: vec![3, 4], alignment: 8, n: 64, k: 128, format: E4M3, kernel: plain(16), seed: 7 };
    let operands = Operands::new(&case);
    let call = Call::new(device, &case, &operands);
    call.out.fill(POISON).unwrap();
    let launch = |gemm: &Gemm, operands: Operand| unsafe { gemm.launch(Stream(0), &operands.call(&call.weights)) };
    let error = launch(&call.gemm, Operand { rows: call.operands.rows.byte_add(8), ..call.operands }).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "rows", .. }), "{error}");
    let wide = Gemm::prepare(device, BF16.config(plain(16), None)).unwrap();
    let error = launch(&wide, call.operands).unwrap_err();
    assert!(matches!(error, Error::WeightFormat { argument: "weights", .. }), "{error}");
    let kernel = split(16, 2);
    let split = Gemm::prepare(device, E4M3.config(kernel, None)).unwrap();
    let error = launch(&split, call.operands).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "k", actual: 128, .. }), "{error}");
    let mut out = vec![0u8; call.out.bytes()];
    call.out.download_at(0, &mut out).unwrap();
    assert_untouched("out", &out, POISON);
}

/// Small, but takes every branch; for the sanitizer, which is slow.
#[test]
fn sanitizer_runs_the_grouped_gemm() {
    let Some(device) = hopper() else { return };
    for format in FORMATS {
        let few = [plain(16), narrow(32), broad(32), split(32, 2), split(16, 8), sharing(64), sharing(192)];
        for kernel in few.into_iter().filter(|kernel| runs(kernel, format)).chain(wide_kernels(format)) {
            let k = format.k(1040);
            check(device, &Case { counts: vec![3, 0, 41, 100], alignment: 8, n: 200, k, format, kernel, seed: 8 });
        }
    }
    // More tiles than an H200 has multiprocessors, so that blocks claim them.
    let (counts, format) = (vec![130; 36], E4M3);
    check(device, &Case { counts, alignment: 8, n: 512, k: 144, format, kernel: LARGE, seed: 8 });
    for kernel in [WIDE, LARGE] {
        let (counts, format) = (vec![3, 0, 41, 200], E4M3);
        let case = Case { counts, alignment: 8, n: 512, k: 272, format, kernel, seed: 9 };
        check_activation(device, &case, Activation::default());
    }
}
