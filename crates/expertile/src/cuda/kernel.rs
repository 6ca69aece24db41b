//! Kernels: their sources, what they were compiled with, and the loaded function.

use super::device::check_call;
use super::kernels::HEADERS;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::ffi::CStr;
use std::fmt::Write as _;

/// A kernel's source file and the values it is specialised for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    file: &'static str,
    text: &'static str,
    definitions: Vec<(&'static str, i64)>,
}

impl Source {
    pub(super) fn new(file: &'static str, text: &'static str, definitions: Vec<(&'static str, i64)>) -> Self {
        Self { file, text, definitions }
    }

    /// The source file's name.
    #[must_use]
    pub fn file(&self) -> &'static str {
        self.file
    }

    pub(super) fn text(&self) -> &'static str {
        self.text
    }

    /// The compiler's options. Contraction is off: results are defined one rounding per operation.
    pub(super) fn options(&self, arch: &str) -> Vec<String> {
        let mut options: Vec<String> =
            [&format!("--gpu-architecture={arch}"), "--std=c++17", "--fmad=false", "--ptxas-options=-v"]
                .map(String::from)
                .into();
        options.extend(self.definitions.iter().map(|(name, value)| format!("--define-macro={name}={value}")));
        options
    }

    /// Everything that a cubin depends on.
    pub(super) fn key(&self, arch: &str, compiler: (i32, i32)) -> String {
        let mut key = format!("nvrtc {}.{}\n", compiler.0, compiler.1);
        for option in self.options(arch) {
            let _ = writeln!(key, "{option}");
        }
        for (name, text) in HEADERS {
            let _ = writeln!(key, "== {}\n{text}", name.to_string_lossy());
        }
        let _ = writeln!(key, "== {}\n{}", self.file, self.text);
        key
    }
}

/// What a kernel takes of a multiprocessor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Local memory of a thread in bytes: spilled registers and arrays that could not stay in registers.
    pub local_bytes: u32,
    /// Static shared memory of a block in bytes.
    pub shared_bytes: u32,
}

/// A kernel loaded in its device's context.
#[derive(Debug)]
pub(super) struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
    resources: Resources,
}

// SAFETY: handles of the driver, which may be used from any thread.
#[allow(unsafe_code)]
unsafe impl Send for Kernel {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Loads a cubin in the current context. A kernel with local memory is refused: on these paths a spill is a defect.
    #[allow(unsafe_code)]
    pub(super) fn load(file: &'static str, arch: &str, cubin: &[u8], entry: &CStr) -> Result<Self> {
        let refused = |error: Error| Error::Kernel {
            kernel: file,
            arch: arch.into(),
            detail: format!("the driver does not take its cubin of {} bytes: {error}", cubin.len()),
        };
        // What does not begin as a cubin is text to the driver, which ends with a zero: let there be one, and room to look.
        let image = [cubin, &[0; 256]].concat();
        let mut module = std::ptr::null_mut();
        let mut function = std::ptr::null_mut();
        // SAFETY: a cubin is self-contained and says its own length; pointers are valid for the calls.
        unsafe {
            check_call("cuModuleLoadData", sys::cuModuleLoadData(&mut module, image.as_ptr().cast()))
                .map_err(refused)?;
            check_call("cuModuleGetFunction", sys::cuModuleGetFunction(&mut function, module, entry.as_ptr()))
                .map_err(refused)?;
        }
        let resources = read_resources(function)?;
        if resources.local_bytes != 0 {
            return Err(Error::Kernel {
                kernel: file,
                arch: arch.into(),
                detail: format!("{entry:?} uses {} bytes of local memory, expected none", resources.local_bytes),
            });
        }
        Ok(Self { module, function, resources })
    }

    /// Allows launches with that much dynamic shared memory.
    #[allow(unsafe_code)]
    pub(super) fn allow_shared_bytes(&self, bytes: u32) -> Result<()> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        check_call("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(self.function, attribute, bytes as i32) })
    }

    pub(super) fn function(&self) -> sys::CUfunction {
        self.function
    }

    pub(super) fn resources(&self) -> Resources {
        self.resources
    }

    /// Unloads the module; nothing may launch the kernel afterwards.
    #[allow(unsafe_code)]
    pub(super) fn unload(&self) {
        // SAFETY: called once: when the device that owns the kernel goes, or at once where another thread's came first.
        unsafe { sys::cuModuleUnload(self.module) };
    }
}

#[allow(unsafe_code)]
fn read_resources(function: sys::CUfunction) -> Result<Resources> {
    use sys::CUfunction_attribute as A;
    let read = |attribute| {
        let mut value = 0;
        // SAFETY: the function is loaded; the pointer is valid for the call.
        check_call("cuFuncGetAttribute", unsafe { sys::cuFuncGetAttribute(&mut value, attribute, function) })?;
        Ok::<u32, Error>(value.max(0) as u32)
    };
    Ok(Resources {
        registers: read(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
        local_bytes: read(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
        shared_bytes: read(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
    })
}
