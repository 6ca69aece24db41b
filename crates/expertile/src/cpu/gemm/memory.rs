//! Memory for packed weights: zeroed, on cache lines, in huge pages where that pays.
//!
//! A decode step streams gigabytes through a few kernels; with 4 KiB pages every panel would miss the TLB.

use bytemuck::{Pod, Zeroable};

/// One cache line, and one AVX-512 register.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Sizes from which on huge pages are asked for.
#[cfg(all(target_os = "linux", not(miri)))]
const HUGE_FROM_BYTES: usize = 4 << 20;
#[cfg(all(target_os = "linux", not(miri)))]
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed bytes that start on 64 bytes, or on a huge page if there are many.
pub(super) struct AlignedBytes {
    memory: Memory,
    len: usize,
}

enum Memory {
    Lines(Vec<Line>),
    /// A mapping and the offset of its first huge page.
    #[cfg(all(target_os = "linux", not(miri)))]
    Map(memmap2::MmapMut, usize),
}

impl AlignedBytes {
    /// `None` where memory cannot be had.
    pub(super) fn zeroed(len: usize) -> Option<Self> {
        let lines = || bytemuck::allocation::try_zeroed_vec(len.div_ceil(64)).ok().map(Memory::Lines);
        let memory = huge_pages(len).or_else(lines)?;
        Some(Self { memory, len })
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        match &self.memory {
            Memory::Lines(lines) => &bytemuck::must_cast_slice(lines)[..self.len],
            #[cfg(all(target_os = "linux", not(miri)))]
            Memory::Map(map, start) => &map[*start..][..self.len],
        }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Lines(lines) => &mut bytemuck::must_cast_slice_mut(lines)[..self.len],
            #[cfg(all(target_os = "linux", not(miri)))]
            Memory::Map(map, start) => &mut map[*start..][..self.len],
        }
    }
}

/// A mapping in huge pages, unless the block is small or the system refuses: then plain memory will do.
#[cfg(all(target_os = "linux", not(miri)))]
fn huge_pages(len: usize) -> Option<Memory> {
    if len < HUGE_FROM_BYTES {
        return None;
    }
    let map = memmap2::MmapMut::map_anon(len.checked_add(HUGE_PAGE_BYTES)?).ok()?;
    // Advice may be refused (huge pages off): the mapping is as good as any then.
    let _ = map.advise(memmap2::Advice::HugePage);
    let start = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
    Some(Memory::Map(map, start))
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn huge_pages(_len: usize) -> Option<Memory> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_of_the_length_asked_for() {
        for len in [0, 1, 64, 1000, if cfg!(miri) { 4096 } else { 5 << 20 }] {
            let mut bytes = AlignedBytes::zeroed(len).unwrap();
            assert_eq!(bytes.as_slice().len(), len);
            assert!(bytes.as_slice().iter().all(|&byte| byte == 0));
            assert!(len == 0 || bytes.as_slice().as_ptr().addr().is_multiple_of(64));
            bytes.as_mut_slice().fill(7);
            assert!(bytes.as_slice().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn memory_that_cannot_be_had_is_no_abort() {
        for len in [usize::MAX, usize::MAX / 2, 1 << 60] {
            assert!(AlignedBytes::zeroed(len).is_none());
        }
    }
}
