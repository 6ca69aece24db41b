//! The driver's functions: one device. Pointers and handles are the caller's word, as they are to the driver.
#![allow(non_snake_case, clippy::not_unsafe_ptr_arg_deref)]

use crate::compiler::MAGIC;
use crate::launch::{Kernel, Launch, Parameter};
use crate::machine::TensorMap;
use crate::memory;
use crate::queue::{self, Work};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute as Attribute, CUdeviceptr, CUevent, CUfunction, CUfunction_attribute,
    CUgraph, CUgraphExec, CUmodule, CUresult, CUstream, CUstreamCaptureStatus, CUtensorMap,
};
use libloading::Library;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::io::Write as _;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

const SUCCESS: CUresult = CUresult::CUDA_SUCCESS;
const INVALID: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;
const CONTEXT: CUcontext = 1 as CUcontext;
const MEMORY_BYTES: usize = 32 << 30;

/// How many multiprocessors the device has: few, as blocks are threads of this machine's processor.
fn multiprocessors() -> u32 {
    static COUNT: OnceLock<u32> = OnceLock::new();
    *COUNT.get_or_init(|| std::env::var("EMULATOR_MULTIPROCESSORS").ok().and_then(|n| n.parse().ok()).unwrap_or(12))
}

/// Blocks that a multiprocessor holds at once; a GPU may have fewer, for the registers, or more.
fn blocks_per_multiprocessor(threads: u32, shared_bytes: usize) -> u32 {
    if threads > 512 || shared_bytes > memory::DYNAMIC_BYTES / 2 { 1 } else { 2 }
}

struct Function {
    kernel: Kernel,
    parameter_sizes: Vec<usize>,
}

struct Module {
    library: Library,
    functions: Mutex<HashMap<CString, Box<Function>>>,
}

fn queue(stream: CUstream, work: Work) -> CUresult {
    queue::push(stream as usize, work);
    SUCCESS
}

/// As `queue`, and done when this returns.
fn run(work: Work) -> CUresult {
    queue::push(usize::MAX, work);
    queue::drain();
    SUCCESS
}

/// Stores through a pointer of the caller's.
fn set<T>(to: *mut T, value: T) -> CUresult {
    if to.is_null() {
        return INVALID;
    }
    // SAFETY: the driver's callers give it pointers to write to.
    unsafe { to.write(value) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> CUresult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CUresult {
    set(version, 13000)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: *mut c_int) -> CUresult {
    set(count, 1)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) -> CUresult {
    if ordinal == 0 { set(device, 0) } else { CUresult::CUDA_ERROR_INVALID_DEVICE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: CUdevice) -> CUresult {
    let text = c"Hopper, emulated".to_bytes_with_nul();
    if (length as usize) < text.len() {
        return INVALID;
    }
    // SAFETY: the caller's buffer is long enough.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), text.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: CUdevice) -> CUresult {
    set(bytes, MEMORY_BYTES)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: Attribute, _device: CUdevice) -> CUresult {
    use sys::CUdevice_attribute as A;
    let found = match attribute {
        A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => 9,
        A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => 0,
        A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => multiprocessors() as c_int,
        A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => memory::DYNAMIC_BYTES as c_int,
        A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR => memory::DYNAMIC_BYTES as c_int + 1024,
        A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE => 50 << 20,
        A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE => 1_000_000,
        A::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH => 1,
        _ => 0,
    };
    set(value, found)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, _device: CUdevice) -> CUresult {
    set(context, CONTEXT)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: CUdevice) -> CUresult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(context: *mut CUcontext) -> CUresult {
    set(context, CONTEXT)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(_context: CUcontext) -> CUresult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(_context: CUcontext) -> CUresult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPopCurrent_v2(context: *mut CUcontext) -> CUresult {
    set(context, CONTEXT)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(code: CUresult, text: *mut *const c_char) -> CUresult {
    let name = if code == INVALID { c"CUDA_ERROR_INVALID_VALUE" } else { c"CUDA_ERROR" };
    set(text, name.as_ptr())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(_code: CUresult, text: *mut *const c_char) -> CUresult {
    set(text, c"refused by the emulator".as_ptr())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(_stream: CUstream) -> CUresult {
    queue::drain();
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize) -> CUresult {
    match memory::allocate(bytes) {
        Some(allocated) => set(address, allocated),
        None => CUresult::CUDA_ERROR_OUT_OF_MEMORY,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: CUdeviceptr) -> CUresult {
    queue::drain();
    if memory::free(address) { SUCCESS } else { INVALID }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: CUdeviceptr, byte: u8, bytes: usize, stream: CUstream) -> CUresult {
    queue(stream, Work::Fill { to, byte, bytes })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: CUdeviceptr, from: *const c_void, bytes: usize) -> CUresult {
    run(Work::Copy { to, from: from as u64, bytes })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoD_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize) -> CUresult {
    run(Work::Copy { to, from, bytes })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream) -> CUresult {
    queue(stream, Work::Copy { to: to as u64, from, bytes })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize, stream: CUstream) -> CUresult {
    queue(stream, Work::Copy { to, from, bytes })
}

/// A cubin of this emulator's compiler: loaded from memory.
unsafe fn load(image: *const u8) -> Option<Library> {
    // SAFETY: the image says its own length.
    let object = unsafe {
        if std::slice::from_raw_parts(image, MAGIC.len()) != MAGIC {
            return None;
        }
        let length = image.add(MAGIC.len()).cast::<u64>().read_unaligned() as usize;
        std::slice::from_raw_parts(image.add(MAGIC.len() + 8), length)
    };
    let mut file = tempfile::NamedTempFile::new().ok()?;
    file.write_all(object).ok()?;
    // SAFETY: compiled from the kernels' sources; its initialisers do nothing but fill tables. Every file is another
    // library.
    unsafe { Library::new(file.path()) }.ok()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(module: *mut CUmodule, image: *const c_void) -> CUresult {
    // SAFETY: the caller's image.
    let Some(library) = (unsafe { load(image.cast()) }) else { return CUresult::CUDA_ERROR_INVALID_IMAGE };
    let loaded = Box::new(Module { library, functions: Mutex::default() });
    set(module, Box::into_raw(loaded).cast())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: CUmodule) -> CUresult {
    queue::drain();
    // SAFETY: made by cuModuleLoadData, unloaded once.
    drop(unsafe { Box::from_raw(module.cast::<Module>()) });
    SUCCESS
}

unsafe fn find(library: &Library, name: &CStr) -> Result<Function, libloading::Error> {
    let prefixed = |prefix: &str| format!("{prefix}{}", name.to_string_lossy());
    // SAFETY: the types are those that the compiler gave these symbols.
    unsafe {
        let info: *const u32 = *library.get(prefixed("emulated_info_"))?;
        let count = *info.add(1) as usize;
        Ok(Function {
            kernel: Kernel {
                connect: *library.get("emulated_connect")?,
                resume: *library.get("emulated_resume")?,
                end: library.get("emulated_end").ok().map(|end| *end),
                call: *library.get(prefixed("emulated_call_"))?,
                cluster: *info,
            },
            parameter_sizes: (0..count).map(|i| *info.add(2 + i) as usize).collect(),
        })
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char) -> CUresult {
    // SAFETY: the caller's module and string.
    let (module, name) = unsafe { (&*module.cast::<Module>(), CStr::from_ptr(name)) };
    let mut functions = module.functions.lock().unwrap();
    if !functions.contains_key(name) {
        // SAFETY: a module of this emulator's.
        let Ok(found) = (unsafe { find(&module.library, name) }) else { return CUresult::CUDA_ERROR_NOT_FOUND };
        functions.insert(name.into(), Box::new(found));
    }
    set(function, (&raw const **functions.get(name).expect("it is there")).cast_mut().cast())
}

/// Registers are the compiler's business here: a number that no test can take for a spill.
#[unsafe(no_mangle)]
pub extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: CUfunction_attribute,
    _function: CUfunction,
) -> CUresult {
    let found = match attribute {
        CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS => 32,
        _ => 0,
    };
    set(value, found)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(_function: CUfunction, attribute: CUfunction_attribute, value: c_int) -> CUresult {
    let most = memory::DYNAMIC_BYTES as c_int;
    match attribute {
        CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES if value > most => INVALID,
        _ => SUCCESS,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    _function: CUfunction,
    threads: c_int,
    shared_bytes: usize,
) -> CUresult {
    set(blocks, blocks_per_multiprocessor(threads as u32, shared_bytes) as c_int)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyMaxActiveClusters(
    clusters: *mut c_int,
    function: CUfunction,
    _config: *const sys::CUlaunchConfig,
) -> CUresult {
    // SAFETY: a function of this emulator's.
    let size = unsafe { (*function.cast::<Function>()).kernel.cluster };
    set(clusters, (multiprocessors() / size).max(1) as c_int)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernelEx(
    config: *const sys::CUlaunchConfig,
    function: CUfunction,
    parameters: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> CUresult {
    // SAFETY: the caller's configuration, function and parameters.
    let (config, function) = unsafe { (&*config, &*function.cast::<Function>()) };
    if config.gridDimY * config.gridDimZ * config.blockDimY * config.blockDimZ != 1 || config.gridDimX == 0 {
        return INVALID;
    }
    let size = |(i, size): (usize, &usize)| {
        // SAFETY: as many parameters as the kernel has, each of its size.
        Parameter::new(unsafe { std::slice::from_raw_parts((*parameters.add(i)).cast::<u8>(), *size) })
    };
    let attribute = |id| {
        // SAFETY: the caller's list, and both attributes in use are an int.
        let set = |i: usize| unsafe {
            let attribute = &*config.attrs.add(i);
            attribute.id == id && attribute.value.cooperative != 0
        };
        (0..config.numAttrs as usize).any(set)
    };
    let (threads, shared_bytes) = (config.blockDimX, config.sharedMemBytes);
    if !(1..=1024).contains(&threads) || shared_bytes as usize > memory::DYNAMIC_BYTES {
        return INVALID;
    }
    let resident = multiprocessors() * blocks_per_multiprocessor(threads, shared_bytes as usize);
    if attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE) && config.gridDimX > resident {
        return CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    }
    let launch = Launch {
        kernel: function.kernel,
        blocks: config.gridDimX,
        threads,
        shared_bytes,
        parameters: Arc::new(function.parameter_sizes.iter().enumerate().map(size).collect()),
        resident,
        overlaps: attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION),
    };
    queue(config.hStream, Work::Launch(launch))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuTensorMapEncodeTiled(
    map: *mut CUtensorMap,
    kind: sys::CUtensorMapDataType,
    rank: c_uint,
    address: *mut c_void,
    sizes: *const u64,
    strides: *const u64,
    extents: *const u32,
    _element_strides: *const u32,
    _interleave: sys::CUtensorMapInterleave,
    swizzle: sys::CUtensorMapSwizzle,
    _promotion: sys::CUtensorMapL2promotion,
    _fill: sys::CUtensorMapFloatOOBfill,
) -> CUresult {
    let element_bytes = match kind {
        sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8 => 1,
        sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 => 2,
        _ => return INVALID,
    };
    let rank = rank as usize;
    if !(2..=3).contains(&rank)
        || swizzle != sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B
        || !(address as usize).is_multiple_of(16)
    {
        return INVALID;
    }
    // SAFETY: the caller's lists, as long as the rank says, that of the strides one shorter.
    let (given_sizes, given_strides, given_extents) = unsafe {
        (
            std::slice::from_raw_parts(sizes, rank),
            std::slice::from_raw_parts(strides, rank - 1),
            std::slice::from_raw_parts(extents, rank),
        )
    };
    let sizes = [0, 1, 2].map(|i| given_sizes.get(i).copied().unwrap_or(1));
    let strides = [0, 1].map(|i| given_strides.get(i).copied().unwrap_or(0));
    let extents = [0, 1, 2].map(|i| given_extents.get(i).map_or(1, |&extent| u64::from(extent)));
    let is_right = strides.iter().all(|stride| stride % 16 == 0)
        && extents[0] * element_bytes == 128
        && extents.iter().all(|extent| (1..=256).contains(extent));
    if !is_right {
        return INVALID;
    }
    // SAFETY: the caller's map, which is as large.
    unsafe {
        map.cast::<TensorMap>().write_unaligned(TensorMap::new(address as u64, element_bytes, sizes, strides, extents))
    };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: *mut CUstream, _flags: c_uint) -> CUresult {
    set(stream, Box::into_raw(Box::new(0u8)).cast())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: CUstream) -> CUresult {
    // SAFETY: made by cuStreamCreate, destroyed once.
    drop(unsafe { Box::from_raw(stream.cast::<u8>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_stream: CUstream) -> CUresult {
    queue::drain();
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamIsCapturing(stream: CUstream, status: *mut CUstreamCaptureStatus) -> CUresult {
    let captures = queue::captures(stream as usize);
    let found = if captures {
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE
    } else {
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
    };
    set(status, found)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: CUstream, _mode: sys::CUstreamCaptureMode) -> CUresult {
    queue::begin_capture(stream as usize);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph) -> CUresult {
    let Some(works) = queue::end_capture(stream as usize) else {
        return INVALID;
    };
    set(graph, Box::into_raw(Box::new(works)).cast())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphInstantiateWithFlags(executable: *mut CUgraphExec, graph: CUgraph, _flags: u64) -> CUresult {
    // SAFETY: a graph of cuStreamEndCapture.
    let works = unsafe { (*graph.cast::<Vec<Work>>()).clone() };
    set(executable, Box::into_raw(Box::new(works)).cast())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(executable: CUgraphExec, stream: CUstream) -> CUresult {
    // SAFETY: a graph of cuGraphInstantiateWithFlags.
    for work in unsafe { &*executable.cast::<Vec<Work>>() } {
        queue(stream, work.clone());
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(executable: CUgraphExec) -> CUresult {
    // SAFETY: destroyed once.
    drop(unsafe { Box::from_raw(executable.cast::<Vec<Work>>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: CUgraph) -> CUresult {
    // SAFETY: destroyed once.
    drop(unsafe { Box::from_raw(graph.cast::<Vec<Work>>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: *mut CUevent, _flags: c_uint) -> CUresult {
    set(event, Box::into_raw(Box::new(Instant::now())).cast())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: CUevent, _stream: CUstream) -> CUresult {
    queue::drain();
    set(event.cast(), Instant::now())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(_event: CUevent) -> CUresult {
    queue::drain();
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: CUevent, end: CUevent) -> CUresult {
    // SAFETY: events of cuEventCreate.
    let elapsed = unsafe { end.cast::<Instant>().read().duration_since(start.cast::<Instant>().read()) };
    set(milliseconds, elapsed.as_secs_f32() * 1e3)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: CUevent) -> CUresult {
    // SAFETY: destroyed once.
    drop(unsafe { Box::from_raw(event.cast::<Instant>()) });
    SUCCESS
}
