//! What every step of the backend uses: the driver, devices, memory, streams, kernels. Imports nothing of the steps.
//!
//! One way: [`source`] and [`nvrtc`] make a cubin, [`cache`] keeps it, [`kernel`] loads it, [`device`] holds it,
//! [`launch`] queues it. Failures of the driver are errors that name its function.
//!
//! cudarc's bindings load the driver's library, unless another crate of the program has them linked to it. Loading
//! panics when the library or one of its symbols is missing, so nothing here calls the bindings before [`driver`] has
//! seen the library and a driver recent enough to have every symbol used.

mod cache;
mod device;
mod graph;
mod headers;
mod kernel;
mod launch;
mod memory;
mod nvrtc;
mod peer;
mod resident;
mod source;
mod stream;
mod tensor_map;

pub use cache::CubinCache;
pub use device::{Device, Info, availability};
pub use graph::Graph;
pub use kernel::Resources;
pub use memory::{DeviceBuffer, DevicePtr};
pub use nvrtc::Compiler;
pub use source::Source;
pub use stream::Stream;

pub(super) use kernel::Kernel;
pub(super) use launch::Launch;
pub(super) use peer::{HANDLE_BYTES, PeerMemory, process_number};
pub(super) use resident::Resident;
pub(super) use tensor_map::TensorMap;

use crate::error::{Error, Result};
use cudarc::driver::sys;
use libloading::Library;
use std::ffi::CStr;
use std::sync::OnceLock;

/// CUDA 12.0: every driver function used here is in it.
const OLDEST_DRIVER: i32 = 12_000;

/// A call's result as an error that says which call it was.
pub(in crate::cuda) fn check_call(call: &'static str, result: sys::CUresult) -> Result<()> {
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

/// Whether there is a driver's library. cudarc can say so only where it loads the library, and tries these names too.
#[allow(unsafe_code)]
fn is_present() -> bool {
    let names = if cfg!(windows) { &["nvcuda.dll"][..] } else { &["libcuda.so", "libcuda.so.1"] };
    // SAFETY: loading the driver's library runs its initialisers, which is what it is for.
    names.iter().any(|name| unsafe { Library::new(*name) }.is_ok())
}

/// Finds and initialises the driver, once; its CUDA version.
#[allow(unsafe_code)]
fn driver() -> Result<i32> {
    static DRIVER: OnceLock<Result<i32>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            if !is_present() {
                return Err(missing("not available", "an NVIDIA driver (libcuda.so.1) on this machine"));
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
