//! The CUDA driver and NVRTC as far as Expertile uses them, on the CPU: the kernels' own sources, compiled by a C++
//! compiler, run thread by thread where there is no GPU.
//!
//! | module | what it does |
//! |---|---|
//! | `driver` | `cu...`: one device, its memory, launches, graphs |
//! | `compiler` | `nvrtc...`: CUDA C++ to C++, and that to a shared object, which is what this driver calls a cubin |
//! | `queue` | what is queued, in order; launches that overlap |
//! | `launch` | a grid: its blocks on threads of the operating system, clusters side by side |
//! | `block` | a block: its threads as coroutines that take turns, and where they meet |
//! | `machine` | what a kernel calls: barriers, the copy engine, clusters |
//! | `nccl` | `nccl...`: ranks that are threads of this process |
//! | `memory` | device memory that ends at a page nobody may touch; shared memory below 4 GiB |
//!
//! Order is hostile on purpose. Threads of a warp run apart from each other between the points where they meet; what
//! the copy engine does comes late; products of the matrix unit come as late as they may, and their registers hold NaN
//! until then. What is not emulated: the weak order of memory between threads, and time.

mod block;
mod compiler;
mod driver;
mod launch;
mod machine;
mod memory;
mod nccl;
mod queue;

/// Ends the process: a kernel did what would fail, or hang, on a GPU, or something that this emulator does not know.
macro_rules! fault {
    ($($argument:tt)*) => {{
        eprintln!("emulator: {}", format_args!($($argument)*));
        std::process::abort()
    }};
}
pub(crate) use fault;
