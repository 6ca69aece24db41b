//! Streams: the order in which queued work runs.

use cudarc::driver::sys;

/// A CUDA stream, as the integer that frameworks hand out; 0 is the default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Stream(pub u64);

impl Stream {
    pub(in crate::cuda) fn raw(self) -> sys::CUstream {
        self.0 as usize as sys::CUstream
    }
}
