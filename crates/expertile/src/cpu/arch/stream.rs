//! Copies past the cache.
//!
//! An ordinary store first reads the cache line it writes to; for a buffer larger than the cache that is half as much
//! traffic again. Non-temporal stores skip the read.

use super::Isa;

/// Below this many bytes written, a buffer is likelier read back from the cache than from memory: the last-level cache
/// of a server core complex.
pub(crate) const STREAM_BYTES: usize = 32 << 20;

/// Asks for the cache lines of `values` ahead of their use.
#[allow(unsafe_code)]
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for offset in (0..size_of_val(values)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: the address lies within `values`, and a prefetch reads nothing that the program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().cast::<i8>().wrapping_add(offset)) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = values;
}

/// Copies `source` over `target`, past the cache; panics if their lengths differ. [`fence`] before others read it.
#[allow(unsafe_code)]
#[inline]
pub(crate) fn copy(isa: Isa, target: &mut [u8], source: &[u8]) {
    assert_eq!(target.len(), source.len());
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only if the CPU has AVX-512 F.
        #[cfg(target_arch = "x86_64")]
        super::Level::Avx512 | super::Level::Amx => unsafe { copy_avx512(target, source) },
        // SAFETY: an `Isa` of this level exists only if the CPU has AVX2.
        #[cfg(target_arch = "x86_64")]
        super::Level::Avx2 => unsafe { copy_avx2(target, source) },
        _ => target.copy_from_slice(source),
    }
}

/// Makes this thread's streamed bytes visible before anything it stores afterwards.
#[allow(unsafe_code)]
#[inline]
pub(crate) fn fence() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Cuts off the part of `target` that starts and ends on 64 bytes, and copies the rest the ordinary way.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn aligned_lines<'a, 'b>(target: &'a mut [u8], source: &'b [u8]) -> (&'a mut [u8], &'b [u8]) {
    const LINE: usize = 64;
    let head = target.as_ptr().align_offset(LINE).min(target.len());
    let middle = (target.len() - head) / LINE * LINE;
    let (target_head, target) = target.split_at_mut(head);
    let (source_head, source) = source.split_at(head);
    target_head.copy_from_slice(source_head);
    let (target, target_tail) = target.split_at_mut(middle);
    let (source, source_tail) = source.split_at(middle);
    target_tail.copy_from_slice(source_tail);
    (target, source)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn copy_avx512(target: &mut [u8], source: &[u8]) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};
    let (target, source) = aligned_lines(target, source);
    for (to, from) in target.chunks_exact_mut(64).zip(source.chunks_exact(64)) {
        // SAFETY: both chunks are 64 bytes, and `to` stands on a multiple of 64 because its slice does.
        unsafe { _mm512_stream_si512(to.as_mut_ptr().cast(), _mm512_loadu_si512(from.as_ptr().cast())) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn copy_avx2(target: &mut [u8], source: &[u8]) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm256_stream_si256};
    let (target, source) = aligned_lines(target, source);
    for (to, from) in target.chunks_exact_mut(32).zip(source.chunks_exact(32)) {
        // SAFETY: both chunks are 32 bytes, and `to` stands on a multiple of 32 because its slice stands on one of 64.
        unsafe { _mm256_stream_si256(to.as_mut_ptr().cast(), _mm256_loadu_si256(from.as_ptr().cast())) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_bytes_arrive_whatever_the_alignment() {
        let source: Vec<u8> = (0..600u32).map(|i| (i * 7 % 251) as u8).collect();
        for isa in Isa::available() {
            for start in [0, 1, 31, 63] {
                for len in [0, 1, 63, 64, 65, 128, 500] {
                    let mut target = vec![0xaa; 600];
                    copy(isa, &mut target[start..start + len], &source[start + 3..start + 3 + len]);
                    fence();
                    assert_eq!(target[start..start + len], source[start + 3..start + 3 + len]);
                    assert!(target[..start].iter().chain(&target[start + len..]).all(|&byte| byte == 0xaa));
                }
            }
        }
    }
}
