//! CUDA graphs: launches captured once, replayed with one call.

use super::check_call;
use super::device::Device;
use super::stream::Stream;
use crate::error::Result;
use cudarc::driver::sys;
use std::ptr::null_mut;

/// Launches captured together, to be replayed in order.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: handles of the driver, which may be used from any thread; a replay takes `&self` and the driver orders
// launches of one graph.
#[allow(unsafe_code)]
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `work` queues on the stream that it is given.
    ///
    /// # Errors
    /// Whatever `work` returns; [`crate::Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn capture(device: &Device, work: impl FnOnce(Stream) -> Result<()>) -> Result<Self> {
        let _current = device.current()?;
        let mut stream = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is valid for the call.
        check_call("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        let captured = Self::capture_on(device, stream, work);
        // SAFETY: made above, destroyed once; nothing is queued on it.
        unsafe { sys::cuStreamDestroy_v2(stream) };
        captured
    }

    #[allow(unsafe_code)]
    fn capture_on(device: &Device, stream: sys::CUstream, work: impl FnOnce(Stream) -> Result<()>) -> Result<Self> {
        let mut graph = Self { device: device.clone(), graph: null_mut(), executable: null_mut() };
        let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives; pointers are valid for their calls; `Graph` destroys what was made.
        unsafe {
            check_call("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(stream, relaxed))?;
            let queued = work(Stream(stream as usize as u64));
            // The capture has to end even if the work failed.
            let ended = check_call("cuStreamEndCapture", sys::cuStreamEndCapture(stream, &mut graph.graph));
            queued?;
            ended?;
            let made = sys::cuGraphInstantiateWithFlags(&mut graph.executable, graph.graph, 0);
            check_call("cuGraphInstantiateWithFlags", made)?;
        }
        Ok(graph)
    }

    /// Queues the captured launches.
    ///
    /// # Safety
    /// As for each of the launches that were captured: their memory lives, and nobody else uses it when the stream
    /// comes to them. `stream` is a live stream of the device (or 0).
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn replay(&self, stream: Stream) -> Result<()> {
        let _current = self.device.current()?;
        // SAFETY: the graph is instantiated; the rest is the caller's promise.
        check_call("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, stream.raw()) })
    }
}

impl Drop for Graph {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let Ok(_current) = self.device.current() else { return };
        // SAFETY: made once, destroyed once; the driver keeps a running graph alive until it is done.
        unsafe {
            if !self.executable.is_null() {
                sys::cuGraphExecDestroy(self.executable);
            }
            if !self.graph.is_null() {
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}
