//! The driver: found at run time, asked politely, its failures turned into errors.
//!
//! cudarc's bindings panic when the driver's library or one of its symbols is missing, so nothing here calls them before
//! [`driver`] has seen the library and a driver recent enough to have every symbol used.

use super::cache::CubinCache;
use super::compiler::Compiler;
use super::kernel::{Kernel, Source};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// CUDA 12.0: every driver function used here is in it.
const OLDEST_DRIVER: i32 = 12_000;
/// Ampere: bf16 instructions, cooperative launches, asynchronous everything the kernels assume.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// A CUDA stream, as the integer that frameworks hand out; 0 is the default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Stream(pub u64);

impl Stream {
    fn raw(self) -> sys::CUstream {
        self.0 as usize as sys::CUstream
    }
}

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

/// A call's result as an error that says which call it was.
pub(super) fn check_call(call: &'static str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(Error::Cuda {
        call,
        code: result as u32,
        name: describe(result, sys::cuGetErrorName),
        message: describe(result, sys::cuGetErrorString),
    })
}

type Describe = unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult;

#[allow(unsafe_code)]
fn describe(result: sys::CUresult, ask: Describe) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver is loaded (a call into it has just failed); the text it points to is static.
    unsafe {
        if ask(result, &mut text) != sys::CUresult::CUDA_SUCCESS || text.is_null() {
            return "unknown".into();
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

fn missing(what: &str, expected: impl Into<String>) -> Error {
    Error::Device { argument: "cuda", actual: what.into(), expected: expected.into() }
}

/// Finds and initialises the driver, once; its CUDA version.
#[allow(unsafe_code)]
fn driver() -> Result<i32> {
    static DRIVER: OnceLock<Result<i32>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            // SAFETY: loading the driver's library runs its initialisers, which is what it is for.
            if !unsafe { sys::is_culib_present() } {
                return Err(missing("without a driver", "the NVIDIA driver's library (libcuda.so.1) on this machine"));
            }
            let mut version = 0;
            // SAFETY: both functions exist in every driver; the pointer is valid for the call.
            unsafe {
                check_call("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version))?;
                if version < OLDEST_DRIVER {
                    return Err(missing(&format!("a driver for CUDA {version}"), format!("at least {OLDEST_DRIVER}")));
                }
                check_call("cuInit", sys::cuInit(0))?;
            }
            Ok(version)
        })
        .clone()
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
    pub(super) fn current(&self) -> Result<Current> {
        Current::of(self.inner.context)
    }

    /// A kernel, loaded: from this device's memory of it, from the cubin cache, or compiled.
    pub(super) fn kernel(&self, source: &Source, entry: &'static CStr) -> Result<Arc<Kernel>> {
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

    /// Queues a kernel.
    ///
    /// # Safety
    /// `arguments` points to the values that the kernel's parameters take, and the addresses among them to memory that
    /// the kernel may use when the stream comes to it.
    #[allow(unsafe_code)]
    pub(super) unsafe fn launch(
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
        let overlaps = self.inner.info.capability >= (9, 0);
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
    pub(super) fn blocks_per_multiprocessor(&self, kernel: &Kernel, threads: u32, shared_bytes: u32) -> Result<u32> {
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
    pub(super) fn resident_clusters(
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
        // SAFETY: the kernel, whose cluster has a size of its own, is loaded in this context; pointers are valid for the call.
        let result = unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, kernel.function(), &config) };
        check_call("cuOccupancyMaxActiveClusters", result)?;
        Ok(clusters.max(1) as u32)
    }

    /// Queues zeros.
    ///
    /// # Safety
    /// `address` is device memory of at least `bytes` bytes that nobody else uses when the stream comes to it.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn zero(&self, stream: Stream, address: u64, bytes: usize) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the caller's promise.
        check_call("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address, 0, bytes, stream.raw()) })
    }

    /// Whether what is queued on the stream goes into a graph, where memory cannot be allocated by the driver.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0).
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let _current = self.current()?;
        // SAFETY: the caller's promise; the pointer is valid for the call.
        check_call("cuStreamIsCapturing", unsafe { sys::cuStreamIsCapturing(stream.raw(), &mut status) })?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Waits for everything queued on the stream.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0).
    ///
    /// # Errors
    /// [`Error::Cuda`], also for what failed since the last wait.
    #[allow(unsafe_code)]
    pub unsafe fn synchronize(&self, stream: Stream) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the caller's promise.
        check_call("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.raw()) })
    }

    /// Waits for the stream, then reads device memory.
    ///
    /// # Safety
    /// `address` is device memory of at least `to.len()` bytes, `stream` a live stream of this device (or 0).
    #[allow(unsafe_code)]
    pub(super) unsafe fn read(&self, stream: Stream, address: u64, to: &mut [u8]) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the caller's promise; `to` is valid for the call, which returns only once it is filled.
        unsafe {
            let copied = sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), address, to.len(), stream.raw());
            check_call("cuMemcpyDtoHAsync", copied)?;
            check_call("cuStreamSynchronize", sys::cuStreamSynchronize(stream.raw()))
        }
    }

    /// Queues a copy of the whole of `from` to the start of `to`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub(super) fn copy(&self, stream: Stream, from: &Buffer, to: &Buffer) -> Result<()> {
        crate::error::require_len("to", to.bytes, from.bytes)?;
        let _current = self.current()?;
        // SAFETY: both buffers hold that many bytes; the driver keeps freed memory until queued work is done with it.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to.address, from.address, from.bytes, stream.raw()) };
        check_call("cuMemcpyDtoDAsync", result)
    }

    /// Device memory of its own, for programs that have none yet (benchmarks, tests). The steps never allocate.
    ///
    /// # Errors
    /// [`Error::Cuda`] if there is not enough.
    #[allow(unsafe_code)]
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        let mut address = 0;
        let _current = self.current()?;
        // SAFETY: the pointer is valid for the call; freed when the buffer is dropped.
        check_call("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) })?;
        Ok(Buffer { device: self.clone(), address, bytes })
    }
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    pub(super) blocks: u32,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    /// All blocks are resident at once, or the launch fails.
    pub(super) cooperative: bool,
    /// May be set up while the launch before it still runs; the kernel itself waits for that one's writes.
    pub(super) overlap: bool,
}

/// A context that is current on this thread.
pub(super) struct Current {
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

/// Device memory that frees itself.
#[derive(Debug)]
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Where it is.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies from the host to the start of the buffer, and waits.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    pub fn upload<T: bytemuck::NoUninit>(&self, from: &[T]) -> Result<()> {
        self.upload_at(0, from)
    }

    /// Copies from the host to the buffer's bytes from `start` on, and waits.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn upload_at<T: bytemuck::NoUninit>(&self, start: usize, from: &[T]) -> Result<()> {
        let from: &[u8] = bytemuck::cast_slice(from);
        crate::error::require_len("buffer", self.bytes, crate::error::checked_add("end", start, from.len())?)?;
        let _current = self.device.current()?;
        // SAFETY: both sides hold that many bytes, and stream 0 always lives. The copy may return when all has left the
        // host; a stream of the caller's own does not wait for the rest, so this call does.
        unsafe {
            let copied = sys::cuMemcpyHtoD_v2(self.address + start as u64, from.as_ptr().cast(), from.len());
            check_call("cuMemcpyHtoD", copied)?;
            check_call("cuStreamSynchronize", sys::cuStreamSynchronize(std::ptr::null_mut()))
        }
    }

    /// Copies the start of the buffer to the host, after everything queued on the default stream.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    pub fn download<T: bytemuck::Pod>(&self, to: &mut [T]) -> Result<()> {
        self.download_at(0, to)
    }

    /// Copies the buffer's bytes from `start` on to the host, after everything queued on the default stream.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn download_at<T: bytemuck::Pod>(&self, start: usize, to: &mut [T]) -> Result<()> {
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        crate::error::require_len("buffer", self.bytes, crate::error::checked_add("end", start, to.len())?)?;
        // SAFETY: the buffer is that large, and stream 0 always lives.
        unsafe { self.device.read(Stream(0), self.address + start as u64, to) }
    }

    /// Fills the buffer with one byte, after everything queued on the default stream, and waits.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn fill(&self, byte: u8) -> Result<()> {
        let _current = self.device.current()?;
        // SAFETY: the whole buffer, and stream 0 always lives.
        unsafe {
            check_call("cuMemsetD8Async", sys::cuMemsetD8Async(self.address, byte, self.bytes, std::ptr::null_mut()))?;
            check_call("cuStreamSynchronize", sys::cuStreamSynchronize(std::ptr::null_mut()))
        }
    }
}

impl Drop for Buffer {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Ok(_current) = self.device.current() {
            // SAFETY: allocated once, freed once. A failure here was reported where it happened.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}
