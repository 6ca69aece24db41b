//! One buffer written by several threads, each part by one of them.
//!
//! Rows of a token go to places that only the layout knows, and a GEMM task owns a block of columns: neither can be cut
//! off with `split_at_mut`. [`Disjoint`] hands out such parts; whoever takes one argues that no other task has it.

use std::marker::PhantomData;

/// A mutable slice that several tasks hold at once.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    lives: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Disjoint` only gives out parts through `part`, whose caller promises that no two of them overlap while
// both live, so sharing it is sharing disjoint `&mut [T]`, which is fine for `T: Send`.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above; it owns nothing.
#[allow(unsafe_code)]
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lives: PhantomData }
    }

    /// `slice[start..start + len]`; panics outside the slice.
    ///
    /// # Safety
    /// While the part lives, nothing else may read or write it.
    #[allow(unsafe_code)]
    #[inline]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: the range lies within the slice this was made from, which is borrowed for 'a; the caller promises
        // that nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
