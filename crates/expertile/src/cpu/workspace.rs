//! Carving typed, aligned parts out of the caller's bytes.

use crate::error::{Result, checked_add, checked_mul, require_len};
use bytemuck::AnyBitPattern;
use bytemuck::NoUninit;

/// Parts start on a cache line, so that rows of 64 bytes and more can be streamed.
const LINE: usize = 64;

/// Adds up what parts take before there is a buffer; room to reach the first cache line included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizing(usize);

impl Sizing {
    pub(crate) fn new() -> Self {
        Self(LINE)
    }

    pub(crate) fn add<T>(self, len: usize) -> Result<Self> {
        let what = "workspace bytes";
        let bytes = checked_mul(what, len, size_of::<T>())?;
        Ok(Self(checked_add(what, self.0, checked_add(what, bytes, LINE - 1)? / LINE * LINE)?))
    }

    pub(crate) fn bytes(self) -> usize {
        self.0
    }
}

/// What is left of the caller's bytes.
pub(crate) struct Carver<'a>(&'a mut [u8]);

impl<'a> Carver<'a> {
    /// Fails unless `workspace` holds `needed` bytes, as a [`Sizing`] of the same parts gave them.
    pub(crate) fn new(workspace: &'a mut [u8], needed: usize) -> Result<Self> {
        require_len("workspace", workspace.len(), needed)?;
        let skip = workspace.as_ptr().align_offset(LINE);
        Ok(Self(&mut workspace[skip..]))
    }

    /// The next `len` elements; panics past what was sized.
    pub(crate) fn take<T: AnyBitPattern + NoUninit>(&mut self, len: usize) -> &'a mut [T] {
        let bytes = len * size_of::<T>();
        let rest = std::mem::take(&mut self.0);
        let (part, rest) = rest.split_at_mut(bytes.next_multiple_of(LINE));
        self.0 = rest;
        bytemuck::cast_slice_mut(&mut part[..bytes])
    }
}
