//! NVRTC's functions: CUDA C++ to C++ for the CPU, and that to a shared object by the system's compiler.
//!
//! Most of the language is macros and functions of device/prelude.h. What they cannot express is rewritten here:
//! shared variables (one for all threads of a block) and entry points (called with the addresses of their parameters).
//! The headers that hold inline PTX are replaced by those in device/ptx/. Pointers and handles are the caller's word,
//! as they are to NVRTC.
#![allow(non_snake_case, clippy::not_unsafe_ptr_arg_deref)]

use regex::{Captures, Regex};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::process::Command;

const REPLACED: [(&str, &str); 7] = [
    ("machine.h", include_str!("../device/machine.h")),
    ("prelude.h", include_str!("../device/prelude.h")),
    ("ptx/access.cuh", include_str!("../device/ptx/access.cuh")),
    ("ptx/convert.cuh", include_str!("../device/ptx/convert.cuh")),
    ("ptx/flags.cuh", include_str!("../device/ptx/flags.cuh")),
    ("ptx/hopper.cuh", include_str!("../device/ptx/hopper.cuh")),
    ("ptx/wgmma.cuh", include_str!("../device/ptx/wgmma.cuh")),
];

/// What a "cubin" of this driver starts with; its length in 8 bytes and a shared object follow.
pub const MAGIC: &[u8; 8] = b"EMULATED";

struct Program {
    source: String,
    file: String,
    headers: Vec<(String, String)>,
    log: Vec<u8>,
    cubin: Vec<u8>,
}

const SUCCESS: c_int = 0;
const COMPILATION: c_int = 6;

unsafe fn text(pointer: *const c_char) -> String {
    // SAFETY: the caller's string.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    // SAFETY: the caller's pointers. No version of NVRTC's, so that caches keep the two apart.
    unsafe { (*major, *minor) = (0, 1) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    file: *const c_char,
    count: c_int,
    headers: *const *const c_char,
    names: *const *const c_char,
) -> c_int {
    // SAFETY: the caller's strings and lists, `count` long.
    unsafe {
        let header = |i| (text(*names.add(i)), text(*headers.add(i)));
        let headers = (0..count as usize).map(header).collect();
        let created = Program { source: text(source), file: text(file), headers, log: Vec::new(), cubin: Vec::new() };
        *program = Box::into_raw(Box::new(created)).cast();
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> c_int {
    // SAFETY: made by nvrtcCreateProgram, destroyed once.
    drop(unsafe { Box::from_raw((*program).cast::<Program>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcCompileProgram(program: *mut c_void, count: c_int, options: *const *const c_char) -> c_int {
    // SAFETY: the caller's program and its list of options, `count` long.
    let (program, options) = unsafe {
        let options: Vec<_> = (0..count as usize).map(|i| text(*options.add(i))).collect();
        (&mut *program.cast::<Program>(), options)
    };
    match compile(program, &options) {
        Ok(object) => {
            program.cubin = [&MAGIC[..], &(object.len() as u64).to_le_bytes(), &object].concat();
            SUCCESS
        }
        Err(log) => {
            program.log = log.into_bytes();
            COMPILATION
        }
    }
}

macro_rules! answers {
    ($size:ident, $get:ident, $field:ident) => {
        #[unsafe(no_mangle)]
        pub extern "C" fn $size(program: *mut c_void, size: *mut usize) -> c_int {
            // SAFETY: the caller's program and pointer.
            unsafe { *size = (*program.cast::<Program>()).$field.len() };
            SUCCESS
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $get(program: *mut c_void, to: *mut c_char) -> c_int {
            // SAFETY: the caller's program, and its buffer, as long as it was told.
            unsafe {
                let bytes = &(*program.cast::<Program>()).$field;
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), bytes.len());
            }
            SUCCESS
        }
    };
}

answers!(nvrtcGetProgramLogSize, nvrtcGetProgramLog, log);
answers!(nvrtcGetCUBINSize, nvrtcGetCUBIN, cubin);

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetErrorString(code: c_int) -> *const c_char {
    match code {
        SUCCESS => c"success",
        COMPILATION => c"the emulator's compilation failed",
        _ => c"unknown",
    }
    .as_ptr()
}

fn compile(program: &Program, options: &[String]) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        let parent = path.parent().unwrap_or(folder.path());
        std::fs::create_dir_all(parent).and_then(|()| std::fs::write(&path, text)).map_err(|error| error.to_string())
    };
    for (name, header) in &program.headers {
        write(name, &shared_variables(header))?;
    }
    for (name, header) in REPLACED {
        write(name, header)?;
    }
    let source = shared_variables(&program.source);
    write(&program.file, &(source + &entry_points(&program.source)))?;
    let object = folder.path().join("kernel.so");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(&compiler);
    command.args([
        "-std=c++17",
        "-O2",
        "-march=native",
        "-fPIC",
        "-shared",
        "-w",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
    ]);
    // Headers are named by their path from the folder, in headers too.
    command.args(["-I.", "-fno-math-errno", "-include", "prelude.h", "-x", "c++"]).current_dir(folder.path());
    for option in options {
        if let Some(definition) = option.strip_prefix("--define-macro=") {
            command.arg(format!("-D{definition}"));
        } else if let Some(digits) = option.strip_prefix("--gpu-architecture=sm_") {
            let number: String = digits.chars().filter(char::is_ascii_digit).collect();
            command.arg(format!("-D__CUDA_ARCH__={number}0"));
        }
    }
    let output =
        command.arg(&program.file).arg("-o").arg(&object).output().map_err(|error| format!("{compiler}: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    std::fs::read(&object).map_err(|error| error.to_string())
}

/// Declarations of shared variables, made references to what the emulator keeps for the block.
fn shared_variables(source: &str) -> String {
    let dynamic = Regex::new(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];").expect("a pattern");
    let source = dynamic.replace_all(source, "$1* const $2 = reinterpret_cast<$1*>(emulated_self->dynamic_shared);");
    let fixed = Regex::new(r"__shared__ ((?:alignas\(\d+\) )?)(\w+) (\w+)((?:\[[^\]]+\])*);").expect("a pattern");
    let declare = |found: &Captures| {
        let (aligned, kind, name, sizes) = (&found[1], &found[2], &found[3], &found[4]);
        let alignment =
            if aligned.is_empty() { format!("alignof({kind})") } else { aligned.trim().replace("alignas", "") };
        format!(
            "typedef {kind} emulated_{name}{sizes}; emulated_{name}& {name} = *static_cast<emulated_{name}*>(\
             emulated_machine->shared_variable(\"{name}\", sizeof(emulated_{name}), {alignment}));"
        )
    };
    fixed.replace_all(&source, declare).into_owned()
}

/// For every entry point, a function that calls it with parameters by address, and what a launch has to know of it:
/// blocks of its cluster, how many parameters, and their sizes.
fn entry_points(source: &str) -> String {
    let entry = Regex::new(r#"extern "C" __global__ void((?:\s+__\w+__\([^)]*\))*)\s+(\w+)\(([^)]*)\)\s*\{"#)
        .expect("a pattern");
    let cluster = Regex::new(r"__cluster_dims__\(([\w:]+)").expect("a pattern");
    let mut added = String::new();
    for found in entry.captures_iter(source) {
        let (attributes, name) = (&found[1], &found[2]);
        let blocks = cluster.captures(attributes).map_or("1", |found| found.get(1).expect("a group").as_str());
        let types: Vec<&str> = found[3]
            .split(',')
            .filter_map(|parameter| parameter.trim().rsplit_once(' '))
            .map(|(kind, _)| kind.trim_start_matches("const __grid_constant__ "))
            .collect();
        let values: Vec<_> = types.iter().enumerate().map(|(i, kind)| format!("*({kind}*)parameters[{i}]")).collect();
        let sizes: String = types.iter().map(|kind| format!(", sizeof({kind})")).collect();
        let _ = write!(
            added,
            "\nextern \"C\" void emulated_call_{name}(void** parameters) {{ {name}({}); }}\n\
             extern \"C\" {{ extern const unsigned emulated_info_{name}[]; const unsigned emulated_info_{name}[] = {{{blocks}, {}{sizes}}}; }}\n",
            values.join(", "),
            types.len(),
        );
    }
    added
}
