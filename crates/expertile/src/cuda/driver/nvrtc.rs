//! NVRTC, NVIDIA's run-time compiler: found at run time, handed sources from memory, asked for a cubin.
//!
//! Loaded by path through `libloading` rather than by cudarc, which looks under fixed names only and panics where it
//! finds nothing. No toolkit is needed: NVRTC's own library is enough (`pip install nvidia-cuda-nvrtc`, or PyTorch,
//! which brings it), because the kernels include no header of CUDA's.
//!
//! Looked for in this order: `$EXPERTILE_NVRTC` (the library or its folder), the loader's own path, the toolkit
//! (`$CUDA_HOME`, `$CUDA_PATH`, `/usr/local/cuda`), and Python environments (`$VIRTUAL_ENV`, `$CONDA_PREFIX`).

use super::headers::HEADERS;
use super::source::Source;
use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names of the library, newest first.
#[cfg(not(windows))]
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
#[cfg(windows)]
const NAMES: [&str; 2] = ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];

/// The compiler, loaded. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Compiler {
    functions: Arc<Functions>,
    version: (i32, i32),
}

type Program = *mut c_void;
type SizeOf = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// NVRTC's functions, valid as long as the libraries beside them are loaded.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: SizeOf,
    log: Get,
    cubin_size: SizeOf,
    cubin: Get,
    describe: unsafe extern "C" fn(c_int) -> *const c_char,
    _libraries: Vec<Library>,
}

impl std::fmt::Debug for Functions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nvrtc")
    }
}

impl Compiler {
    /// Finds NVRTC where this machine's environment says, or where it usually is.
    ///
    /// # Errors
    /// [`Error::Device`] that lists where it was looked for.
    pub fn find() -> Result<Self> {
        let candidates = candidates();
        for path in &candidates {
            if let Ok(compiler) = Self::load(path) {
                return Ok(compiler);
            }
        }
        let tried: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        Err(Error::Device {
            argument: "nvrtc",
            actual: "not found".into(),
            expected: format!(
                "the CUDA compiler library (pip install nvidia-cuda-nvrtc, or set EXPERTILE_NVRTC) as one of {}",
                tried.join(", ")
            ),
        })
    }

    /// Loads NVRTC from a file, or by a name that the system's loader knows.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot be loaded or lacks a function.
    #[allow(unsafe_code)]
    pub fn load(path: &Path) -> Result<Self> {
        let failed = |error: libloading::Error| Error::Device {
            argument: "nvrtc",
            actual: format!("{} ({error})", path.display()),
            expected: "a CUDA compiler library, version 12 or later".into(),
        };
        // The loader would wait for a FIFO's writer. (A bare name is the loader's to find.)
        if let Ok(there) = std::fs::metadata(path)
            && path.components().count() > 1
            && !there.is_file()
        {
            return Err(Error::Device {
                argument: "nvrtc",
                actual: format!("{} (no regular file)", path.display()),
                expected: "a CUDA compiler library, version 12 or later".into(),
            });
        }
        let mut libraries = Vec::new();
        // NVRTC opens its builtins by name, which a loader that was given a path does not find: open them first.
        for builtins in builtins_beside(path) {
            // SAFETY: NVIDIA's library of tables; loading it runs no code that matters to us.
            if let Ok(library) = unsafe { Library::new(builtins) } {
                libraries.push(library);
            }
        }
        // SAFETY: loading NVRTC runs its initialisers, which is what it is for.
        let library = unsafe { Library::new(path) }.map_err(failed)?;
        // SAFETY: the types are those of NVRTC's header, unchanged since version 11.
        let functions = unsafe {
            Functions {
                version: *library.get(c"nvrtcVersion").map_err(failed)?,
                create: *library.get(c"nvrtcCreateProgram").map_err(failed)?,
                destroy: *library.get(c"nvrtcDestroyProgram").map_err(failed)?,
                compile: *library.get(c"nvrtcCompileProgram").map_err(failed)?,
                log_size: *library.get(c"nvrtcGetProgramLogSize").map_err(failed)?,
                log: *library.get(c"nvrtcGetProgramLog").map_err(failed)?,
                cubin_size: *library.get(c"nvrtcGetCUBINSize").map_err(failed)?,
                cubin: *library.get(c"nvrtcGetCUBIN").map_err(failed)?,
                describe: *library.get(c"nvrtcGetErrorString").map_err(failed)?,
                _libraries: {
                    libraries.push(library);
                    libraries
                },
            }
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the pointers are valid for the call.
        unsafe { (functions.version)(&mut major, &mut minor) };
        Ok(Self { functions: Arc::new(functions), version: (major, minor) })
    }

    /// NVRTC's version, major and minor.
    #[must_use]
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles a source to a cubin for one architecture (`sm_90a`, `sm_80`, ...).
    ///
    /// # Errors
    /// [`Error::Kernel`] with the compiler's log.
    pub fn compile(&self, source: &Source, arch: &str) -> Result<Vec<u8>> {
        self.compile_logged(source, arch).map(|(cubin, _)| cubin)
    }

    /// The same, with the compiler's log: registers, stack and spills of each kernel, as its assembler reports them.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    #[allow(unsafe_code)]
    pub fn compile_logged(&self, source: &Source, arch: &str) -> Result<(Vec<u8>, String)> {
        let options = strings(source.options(arch))?;
        let option_pointers = pointers(&options);
        let text = strings([source.text().into(), source.file().into()])?;
        let headers = strings(HEADERS.map(|(_, text)| text.into()))?;
        let header_pointers = pointers(&headers);
        let names = HEADERS.map(|(name, _)| name.as_ptr());
        let mut program = OwnedProgram { functions: &self.functions, program: std::ptr::null_mut() };
        let refused = |call: &str, code: c_int, log: String| Error::Kernel {
            kernel: source.file(),
            arch: arch.into(),
            detail: format!("{call}: {}\n{log}", self.describe(code)),
        };
        // SAFETY: all strings outlive the calls that take them, and their counts are right.
        unsafe {
            let created = (self.functions.create)(
                &mut program.program,
                text[0].as_ptr(),
                text[1].as_ptr(),
                HEADERS.len() as c_int,
                header_pointers.as_ptr(),
                names.as_ptr(),
            );
            if created != 0 {
                return Err(refused("nvrtcCreateProgram", created, String::new()));
            }
            let compiled = (self.functions.compile)(program.program, options.len() as c_int, option_pointers.as_ptr());
            let log = program.bytes(self.functions.log_size, self.functions.log);
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
            if compiled != 0 {
                return Err(refused("nvrtcCompileProgram", compiled, log));
            }
            let cubin = program.bytes(self.functions.cubin_size, self.functions.cubin);
            if cubin.is_empty() {
                return Err(refused("nvrtcGetCUBIN", 0, log));
            }
            Ok((cubin, log))
        }
    }

    #[allow(unsafe_code)]
    fn describe(&self, code: c_int) -> String {
        // SAFETY: the text is static in the library, which `self` keeps loaded.
        unsafe { CStr::from_ptr((self.functions.describe)(code)) }.to_string_lossy().into_owned()
    }
}

/// A program that is destroyed however its compilation ends.
struct OwnedProgram<'a> {
    functions: &'a Functions,
    program: Program,
}

impl OwnedProgram<'_> {
    /// What a pair of "how long" and "give me" functions returns; empty if either fails.
    #[allow(unsafe_code)]
    unsafe fn bytes(&self, size: SizeOf, get: Get) -> Vec<u8> {
        let mut length = 0;
        // SAFETY: the program is live, and the buffer is as long as the library asked for.
        unsafe {
            if size(self.program, &mut length) != 0 {
                return Vec::new();
            }
            let mut bytes = vec![0u8; length];
            if get(self.program, bytes.as_mut_ptr().cast()) != 0 {
                bytes.clear();
            }
            bytes
        }
    }
}

impl Drop for OwnedProgram<'_> {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: created once, destroyed once.
            unsafe { (self.functions.destroy)(&mut self.program) };
        }
    }
}

fn strings(texts: impl IntoIterator<Item = String>) -> Result<Vec<CString>> {
    let string = |text| {
        CString::new(text).map_err(|error| Error::Name {
            argument: "source",
            actual: error.to_string(),
            expected: "text without a zero byte",
        })
    };
    texts.into_iter().map(string).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

/// Where NVRTC may be, best first.
fn candidates() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut found = Vec::new();
    if let Some(path) = variable("EXPERTILE_NVRTC") {
        if path.is_dir() {
            found.extend(NAMES.map(|name| path.join(name)));
        } else {
            found.push(path);
        }
    }
    found.extend(NAMES.map(PathBuf::from));
    let toolkits = [variable("CUDA_HOME"), variable("CUDA_PATH"), Some(PathBuf::from("/usr/local/cuda"))];
    for folder in toolkits.into_iter().flatten() {
        found.extend(NAMES.map(|name| folder.join("lib64").join(name)));
    }
    for environment in [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX")].into_iter().flatten() {
        for folder in python_nvidia_folders(&environment) {
            found.extend(NAMES.map(|name| folder.join("lib").join(name)));
        }
    }
    found
}

/// `lib/python*/site-packages/nvidia/*`: where NVIDIA's wheels put their libraries.
fn python_nvidia_folders(environment: &Path) -> Vec<PathBuf> {
    let children = |folder: PathBuf| {
        let mut paths: Vec<_> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let pythons = children(environment.join("lib"));
    let is_python = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"));
    pythons.into_iter().filter(is_python).flat_map(|python| children(python.join("site-packages/nvidia"))).collect()
}

/// The builtins libraries in the same folder as an NVRTC that was given by path.
fn builtins_beside(path: &Path) -> Vec<PathBuf> {
    let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) else { return Vec::new() };
    let is_builtins = |path: &PathBuf| {
        path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with("libnvrtc-builtins.so") || name.starts_with("nvrtc-builtins64")
        })
    };
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).filter(is_builtins).collect()
}
