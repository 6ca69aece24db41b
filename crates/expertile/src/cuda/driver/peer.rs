//! Memory of other devices, and of other processes, that kernels here may store into.

use super::check_call;
use super::device::Device;
use super::memory::DevicePtr;
use super::stream::Stream;
use crate::error::Result;
use cudarc::driver::sys;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

/// Bytes by which another process finds an allocation.
pub(in crate::cuda) const HANDLE_BYTES: usize = 64;

/// Another rank's allocation, as this device sees it.
#[derive(Debug)]
pub(in crate::cuda) struct PeerMemory {
    device: Device,
    address: u64,
    /// Whether it is of another process, and has to be closed here.
    opened: bool,
}

impl PeerMemory {
    /// Where it is for kernels of this device.
    pub(in crate::cuda) fn ptr(&self) -> DevicePtr {
        DevicePtr::new(self.address)
    }
}

impl Drop for PeerMemory {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let (true, Ok(_current)) = (self.opened, self.device.current()) {
            // SAFETY: opened once, closed once.
            unsafe { sys::cuIpcCloseMemHandle(self.address) };
        }
    }
}

impl Device {
    /// What another process opens to reach an allocation of this one. `address` is where it starts.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn handle_of(&self, address: DevicePtr) -> Result<[u8; HANDLE_BYTES]> {
        let _current = self.current()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE_BYTES] };
        // SAFETY: the pointer is valid for the call.
        check_call("cuIpcGetMemHandle", unsafe { sys::cuIpcGetMemHandle(&mut handle, address.address()) })?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// An allocation of another process of this host.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn open_handle(&self, handle: [u8; HANDLE_BYTES]) -> Result<PeerMemory> {
        let _current = self.current()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as _) };
        let lazily = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the pointer is valid for the call; closed when the value is dropped.
        let opened = unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, lazily) };
        check_call("cuIpcOpenMemHandle", opened)?;
        Ok(PeerMemory { device: self.clone(), address, opened: true })
    }

    /// An allocation of this process, of this device or of another one.
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn reach(&self, ordinal: usize, address: DevicePtr) -> Result<PeerMemory> {
        if ordinal != self.info().ordinal {
            let (mut there, mut context) = (0, std::ptr::null_mut());
            let _current = self.current()?;
            // SAFETY: the driver is initialised; pointers are valid for their calls. The other device's context lives as
            // long as the allocation, whose owner has retained it; it is retained once more and never released.
            unsafe {
                check_call("cuDeviceGet", sys::cuDeviceGet(&mut there, ordinal as i32))?;
                check_call("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, there))?;
                let enabled = sys::cuCtxEnablePeerAccess(context, 0);
                if enabled != sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED {
                    check_call("cuCtxEnablePeerAccess", enabled)?;
                }
            }
        }
        Ok(PeerMemory { device: self.clone(), address: address.address(), opened: false })
    }

    /// Waits for everything queued on the stream, up to `limit`. Returns whether it is done.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0).
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn synchronize_within(&self, stream: Stream, limit: Duration) -> Result<bool> {
        let _current = self.current()?;
        let started = Instant::now();
        loop {
            // SAFETY: the caller's promise.
            match unsafe { sys::cuStreamQuery(stream.raw()) } {
                sys::CUresult::CUDA_ERROR_NOT_READY if started.elapsed() < limit => std::thread::yield_now(),
                sys::CUresult::CUDA_ERROR_NOT_READY => return Ok(false),
                result => return check_call("cuStreamQuery", result).map(|()| true),
            }
        }
    }
}

/// A number that no other process of this host is likely to have: what two ranks compare to see whether they share one.
pub(in crate::cuda) fn process_number() -> u64 {
    static NUMBER: OnceLock<u64> = OnceLock::new();
    *NUMBER.get_or_init(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let place = std::ptr::from_ref(&NUMBER).addr() as u64;
        now ^ place.rotate_left(32) ^ u64::from(std::process::id()).rotate_left(48)
    })
}
