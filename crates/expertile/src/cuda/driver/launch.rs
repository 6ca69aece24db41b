//! Queueing kernels, and how many of their blocks a device holds.

use super::check_call;
use super::device::Device;
use super::kernel::Kernel;
use super::stream::Stream;
use crate::error::Result;
use cudarc::driver::sys;
use std::ffi::c_void;

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct Launch {
    pub(in crate::cuda) blocks: u32,
    pub(in crate::cuda) threads: u32,
    pub(in crate::cuda) shared_bytes: u32,
    /// All blocks are resident at once, or the launch fails.
    pub(in crate::cuda) cooperative: bool,
    /// May begin before the launch before it has ended, where that one lets it; the kernel itself waits for its writes.
    pub(in crate::cuda) overlap: bool,
}

impl Device {
    /// Queues a kernel.
    ///
    /// # Safety
    /// `arguments` points to the values that the kernel's parameters take, and the addresses among them to memory that
    /// the kernel may use when the stream comes to it.
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn launch(
        &self,
        kernel: &Kernel,
        shape: Launch,
        stream: Stream,
        arguments: &[*const c_void],
    ) -> Result<()> {
        use sys::CUlaunchAttributeID as Id;
        let attribute = |id, value| {
            let mut attribute =
                sys::CUlaunchAttribute { id, pad: [0; 4], value: sys::CUlaunchAttributeValue { pad: [0; 64] } };
            // Both attributes used are an int.
            attribute.value.cooperative = value;
            attribute
        };
        let mut attributes = [
            attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, i32::from(shape.cooperative)),
            attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, i32::from(shape.overlap)),
        ];
        let overlaps = self.info().capability >= (9, 0);
        let config = sys::CUlaunchConfig {
            gridDimX: shape.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared_bytes,
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: if overlaps { 2 } else { 1 },
        };
        let _current = self.current()?;
        // SAFETY: the driver copies the arguments and attributes before it returns and does not write to them; the rest
        // is the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                kernel.function(),
                arguments.as_ptr().cast_mut().cast(),
                std::ptr::null_mut(),
            )
        };
        check_call("cuLaunchKernelEx", result)
    }

    /// How many blocks of this kernel a multiprocessor holds at once.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn blocks_per_multiprocessor(
        &self,
        kernel: &Kernel,
        threads: u32,
        shared_bytes: u32,
    ) -> Result<u32> {
        let mut blocks = 0;
        let _current = self.current()?;
        // SAFETY: the kernel is loaded in this context; the pointer is valid for the call.
        let result = unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                kernel.function(),
                threads as i32,
                shared_bytes as usize,
            )
        };
        check_call("cuOccupancyMaxActiveBlocksPerMultiprocessor", result)?;
        Ok(blocks.max(0) as u32)
    }

    /// How many clusters of this many blocks of a kernel the device holds at once.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn resident_clusters(
        &self,
        kernel: &Kernel,
        threads: u32,
        shared_bytes: u32,
        cluster: u32,
    ) -> Result<u32> {
        if cluster == 1 {
            return Ok(
                self.blocks_per_multiprocessor(kernel, threads, shared_bytes)?.max(1) * self.info().multiprocessors
            );
        }
        let config = sys::CUlaunchConfig {
            gridDimX: cluster * self.info().multiprocessors,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes,
            hStream: std::ptr::null_mut(),
            attrs: std::ptr::null_mut(),
            numAttrs: 0,
        };
        let mut clusters = 0;
        let _current = self.current()?;
        // SAFETY: the kernel, whose cluster has a size of its own, is loaded in this context; pointers are valid for
        // the call.
        let result = unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, kernel.function(), &config) };
        check_call("cuOccupancyMaxActiveClusters", result)?;
        Ok(clusters.max(1) as u32)
    }
}
