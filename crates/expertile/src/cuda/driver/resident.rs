//! A persistent kernel: one launch fills the device with blocks that loop over the work.

use super::device::Device;
use super::kernel::{Kernel, Resources};
use super::launch::Launch;
use super::source::Source;
use super::stream::Stream;
use crate::error::Result;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// Such a kernel, loaded, and the shape of its launches.
#[derive(Debug)]
pub(in crate::cuda) struct Resident {
    device: Device,
    kernel: Arc<Kernel>,
    shape: Launch,
}

impl Resident {
    pub(in crate::cuda) fn prepare(
        device: &Device,
        source: &Source,
        entry: &'static CStr,
        threads: u32,
    ) -> Result<Self> {
        let kernel = device.kernel(source, entry)?;
        let per_multiprocessor = device.blocks_per_multiprocessor(&kernel, threads, 0)?;
        let blocks = per_multiprocessor.max(1) * device.info().multiprocessors;
        let shape = Launch { blocks, threads, shared_bytes: 0, cooperative: false, overlap: true };
        Ok(Self { device: device.clone(), kernel, shape })
    }

    pub(in crate::cuda) fn resources(&self) -> Resources {
        self.kernel.resources()
    }

    /// # Safety
    /// The kernel takes one `Arguments`, and the addresses in it are of memory that it may use when the stream comes
    /// to it.
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn launch<Arguments>(&self, stream: Stream, arguments: &Arguments) -> Result<()> {
        let pointers = [std::ptr::from_ref(arguments).cast::<c_void>()];
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(&self.kernel, self.shape, stream, &pointers) }
    }
}
