//! Kernels for x86-64.

pub(crate) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
mod prefetch;
