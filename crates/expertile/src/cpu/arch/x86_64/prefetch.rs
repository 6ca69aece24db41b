//! Requests for memory, spread over a kernel's steps.

use crate::cpu::arch::panel::Ahead;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

/// What a kernel asks for as it goes.
pub(super) struct Prefetch {
    next: *const i8,
    half_step_bytes: usize,
    soon: bool,
}

impl Prefetch {
    /// Requests for all of `ahead` in so many steps.
    #[inline(always)]
    pub(super) fn new(ahead: Ahead<'_>, steps: usize) -> Self {
        let Ahead { bytes, soon } = ahead;
        Self { next: bytes.as_ptr().cast(), half_step_bytes: bytes.len() / (2 * steps), soon }
    }

    /// Two requests, for up to two lines: asking for the same line again costs less than finding out.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn step(&mut self) {
        for _ in 0..2 {
            // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that the program can see, whatever its
            // address.
            unsafe {
                if self.soon {
                    _mm_prefetch::<_MM_HINT_T0>(self.next);
                } else {
                    _mm_prefetch::<_MM_HINT_T1>(self.next);
                }
            }
            self.next = self.next.wrapping_add(self.half_step_bytes);
        }
    }
}
