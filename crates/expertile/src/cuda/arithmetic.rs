//! The device's arithmetic against IEEE division, over every operand that matters. Skips, and says so, without a
//! device.

use super::driver::{Device, Launch, Source, Stream};
use std::io::Write;

/// Runs one of `arithmetic_test.cu`'s kernels and returns how many operands disagreed, and the first of them.
#[allow(unsafe_code)]
fn disagreements(entry: &'static std::ffi::CStr, input: i64) -> Option<[u64; 2]> {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            // Past the test harness, which shows what a test prints only if it fails.
            let _ = writeln!(std::io::stderr(), "skipped: {error}");
            return None;
        }
    };
    let source =
        Source::new("arithmetic_test.cu", include_str!("kernels/common/arithmetic_test.cu"), vec![("INPUT", input)]);
    let kernel = device.kernel(&source, entry).unwrap();
    let result = device.upload(&[0u64, u64::MAX]).unwrap();
    let address = result.ptr();
    let shape = Launch { blocks: 4096, threads: 256, shared_bytes: 0, cooperative: false, overlap: false };
    // SAFETY: the kernels take the address of two words.
    unsafe {
        device.launch(&kernel, shape, Stream(0), &[std::ptr::from_ref(&address).cast()]).unwrap();
        device.synchronize(Stream(0)).unwrap();
    }
    let mut found = [0; 2];
    result.download(&mut found).unwrap();
    Some(found)
}

#[test]
fn reciprocals_are_the_ieee_ones() {
    let Some([count, first]) = disagreements(c"every_reciprocal", 0) else { return };
    assert_eq!(count, 0, "the first is 1 / {:e}", f32::from_bits(first as u32));
}

#[test]
fn quotients_of_bf16_round_to_the_same_e4m3_for_every_pair_of_mantissas() {
    let Some([count, first]) = disagreements(c"every_quotient", 0) else { return };
    assert_eq!(count, 0, "the first is mantissa {:#x} by {:#x}", first >> 32, first as u32);
}

#[test]
fn quotients_of_f16_round_to_the_same_e4m3_for_every_pair_of_mantissas() {
    let Some([count, first]) = disagreements(c"every_quotient", 1) else { return };
    assert_eq!(count, 0, "the first is mantissa {:#x} by {:#x}", first >> 32, first as u32);
}

#[test]
fn quotients_of_f32_round_to_the_same_e4m3_next_to_every_boundary_of_every_scale() {
    let Some([count, first]) = disagreements(c"every_quotient_near_a_boundary", 0) else { return };
    assert_eq!(count, 0, "the first is {:#x} by mantissa {:#x}", first >> 32, first as u32);
}

#[test]
fn conversion_to_e4m3_is_the_definition_for_every_f32() {
    let Some([count, first]) = disagreements(c"every_conversion", 0) else { return };
    assert_eq!(count, 0, "the first is {:#x}", first);
}
