//! A device: what it is, its context, and the kernels loaded there.

use super::cache::CubinCache;
use super::kernel::Kernel;
use super::nvrtc::Compiler;
use super::source::Source;
use super::{check_call, driver, missing};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Arc, Mutex, PoisonError};

/// Ampere: bf16 instructions, cooperative launches, asynchronous everything the kernels assume.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its number, as the driver counts.
    pub ordinal: usize,
    /// Its name, as the driver gives it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// Level-2 cache in bytes.
    pub l2_bytes: u64,
    /// The driver's CUDA version, as 1000 * major + 10 * minor.
    pub driver_version: i32,
}

/// The first device, or why there is none.
///
/// # Errors
/// [`Error::Device`] without a driver, with one that is too old, without a device or with one older than Ampere;
/// [`Error::Cuda`] if the driver fails.
pub fn availability() -> Result<Info> {
    describe_device(0).map(|(info, _)| info)
}

#[allow(unsafe_code)]
fn describe_device(ordinal: usize) -> Result<(Info, sys::CUdevice)> {
    use sys::CUdevice_attribute as A;
    let driver_version = driver()?;
    let mut count = 0;
    let mut device = 0;
    let mut name = [0; 256];
    let mut memory_bytes = 0usize;
    // SAFETY: the driver is initialised, and every pointer is valid for its call.
    unsafe {
        check_call("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        if number >= count {
            return Err(missing(
                &format!("device {ordinal}"),
                format!("one of the {count} devices here, counted from 0"),
            ));
        }
        check_call("cuDeviceGet", sys::cuDeviceGet(&mut device, number))?;
        check_call("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        check_call("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&mut memory_bytes, device))?;
    }
    let attribute = |which| {
        let mut value = 0;
        // SAFETY: as above.
        check_call("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })?;
        Ok::<i32, Error>(value)
    };
    let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: the driver ended the name with a zero inside the array.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    if (major, minor) < OLDEST_CAPABILITY {
        return Err(missing(&format!("{name}, compute capability {major}.{minor}"), "at least 8.0"));
    }
    let info = Info {
        ordinal,
        name,
        capability: (major as u32, minor as u32),
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        memory_bytes: memory_bytes as u64,
        l2_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64,
        driver_version,
    };
    Ok((info, device))
}

/// A device in its primary context: the one the CUDA runtime, and with it every framework, uses. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    info: Info,
    device: sys::CUdevice,
    context: sys::CUcontext,
    compiler: Compiler,
    cache: Option<CubinCache>,
    /// Kernels by source, options and entry; loaded once, unloaded with the device.
    kernels: Mutex<HashMap<String, Arc<Kernel>>>,
}

// SAFETY: a context may be made current on any thread, and the driver's functions are thread-safe.
#[allow(unsafe_code)]
unsafe impl Send for Inner {}
// SAFETY: as above; the map of kernels has its own lock.
#[allow(unsafe_code)]
unsafe impl Sync for Inner {}

impl Drop for Inner {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Ok(current) = Current::of(self.context) {
            let kernels = self.kernels.get_mut().unwrap_or_else(PoisonError::into_inner);
            for (_, kernel) in kernels.drain() {
                kernel.unload();
            }
            drop(current);
        }
        // SAFETY: retained once in `open_with`. A failure at this point (the process is ending) concerns nobody.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

impl Device {
    /// Opens a device with the compiler and the cubin cache that this machine's environment names.
    ///
    /// # Errors
    /// As [`availability`], for this device; [`Error::Device`] also if NVRTC is not found.
    pub fn open(ordinal: usize) -> Result<Self> {
        driver()?;
        Self::open_with(ordinal, Compiler::find()?, CubinCache::from_environment())
    }

    /// Opens a device with a given compiler, keeping cubins in `cache` or, without one, in memory only.
    ///
    /// # Errors
    /// As [`availability`], for this device.
    #[allow(unsafe_code)]
    pub fn open_with(ordinal: usize, compiler: Compiler, cache: Option<CubinCache>) -> Result<Self> {
        let (info, device) = describe_device(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device is one the driver has just described; released when `Inner` is dropped.
        check_call("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        Ok(Self { inner: Arc::new(Inner { info, device, context, compiler, cache, kernels: Mutex::default() }) })
    }

    /// What this device is.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.inner.info
    }

    /// The name NVRTC takes for this device's instruction set.
    #[must_use]
    pub fn arch(&self) -> String {
        match self.inner.info.capability {
            (major @ (9 | 10 | 12), minor) => format!("sm_{major}{minor}a"),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }

    /// Makes this device's context current until the value is dropped.
    pub(in crate::cuda) fn current(&self) -> Result<Current> {
        Current::of(self.inner.context)
    }

    /// A kernel, loaded: from this device's memory of it, from the cubin cache, or compiled.
    pub(in crate::cuda) fn kernel(&self, source: &Source, entry: &'static CStr) -> Result<Arc<Kernel>> {
        let arch = self.arch();
        let key = source.key(&arch, self.inner.compiler.version());
        let name = format!("{}\n{key}", entry.to_string_lossy());
        let loaded = || self.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded().get(&name) {
            return Ok(kernel.clone());
        }
        // Not under the lock: other threads may compile other kernels, or (harmlessly) the same one.
        let cached = self.inner.cache.as_ref().and_then(|cache| cache.get(&key));
        let load = |cubin: &[u8]| {
            let _current = self.current()?;
            Kernel::load(source.file(), &arch, cubin, entry)
        };
        // A kept cubin that the driver refuses (it was damaged, or kept by another build) is compiled again.
        let kernel = match cached.and_then(|cubin| load(&cubin).ok()) {
            Some(kernel) => kernel,
            None => {
                let cubin = self.inner.compiler.compile(source, &arch)?;
                let kernel = load(&cubin)?;
                if let Some(cache) = &self.inner.cache {
                    // A cache that cannot be written costs the next process a compilation, and nothing else.
                    let _ = cache.put(&key, &cubin);
                }
                kernel
            }
        };
        let _current = self.current()?;
        let kernel = Arc::new(kernel);
        let mut kernels = loaded();
        if let Some(first) = kernels.get(&name) {
            kernel.unload();
            return Ok(first.clone());
        }
        kernels.insert(name, kernel.clone());
        Ok(kernel)
    }
}

/// A context that is current on this thread.
pub(in crate::cuda) struct Current {
    pushed: bool,
}

impl Current {
    #[allow(unsafe_code)]
    fn of(context: sys::CUcontext) -> Result<Self> {
        let mut current = std::ptr::null_mut();
        // SAFETY: the driver is initialised; the context is retained for as long as its device lives.
        unsafe {
            check_call("cuCtxGetCurrent", sys::cuCtxGetCurrent(&mut current))?;
            let pushed = current != context;
            if pushed {
                check_call("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context))?;
            }
            Ok(Self { pushed })
        }
    }
}

impl Drop for Current {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.pushed {
            let mut context = std::ptr::null_mut();
            // SAFETY: takes off what `of` put on.
            unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
        }
    }
}
