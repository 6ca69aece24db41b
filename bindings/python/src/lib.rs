//! `expertile._native`: the library as Python sees it, argument by argument.
//!
//! Nothing is decided here. A function turns Python values into the library's (checking what Rust's types would have
//! checked), releases the interpreter lock, calls the function of the same name and turns its error into an exception.

#![cfg_attr(not(feature = "cuda"), allow(dead_code))] // What only CUDA tensors need.

mod array;
mod autograd;
mod complete;
#[cfg_attr(not(feature = "cuda"), path = "no_cuda.rs")]
mod cuda;
mod deep_gemm;
mod error;
mod exchange;
mod expanded;
mod expert_parallel;
mod gemm;
mod layer;
mod limits;
mod operands;
mod permute;
mod placed_rows;
mod plan;
mod pool;
mod scales;
mod tensor;
mod unpermute;

use expertile::{Group, Layout};
use pyo3::prelude::*;

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("LAYOUT_LISTS", plan::layout_lists(module.py(), &Layout::LISTS)?)?;
    module.add("DEVICE_LISTS", plan::layout_lists(module.py(), &Layout::DEVICE_LISTS)?)?;
    module.add("SCALE_LAYOUTS", scales::scale_layouts(module.py())?)?;
    module.add("TRACED", autograd::TRACED)?;
    module.add("SCALE_GROUPS", (Group::G32.size(), Group::G128.size()))?;
    module.add_class::<plan::PyPlan>()?;
    module.add_class::<layer::PyLayer>()?;
    module.add_class::<expert_parallel::PyExpertParallelLayer>()?;
    module.add_class::<cuda::CudaLayer>()?;
    module.add_class::<cuda::CudaExpertParallelLayer>()?;
    module.add_class::<gemm::PyGemm>()?;
    module.add_class::<cuda::CudaGemm>()?;
    module.add_function(wrap_pyfunction!(plan::round_up, module)?)?;
    module.add_function(wrap_pyfunction!(plan::expert_num_tokens_round_up_and_sum, module)?)?;
    module.add_function(wrap_pyfunction!(plan::compute_aligned_m_and_alignment, module)?)?;
    module.add_function(wrap_pyfunction!(plan::tight_m_sum, module)?)?;
    module.add_function(wrap_pyfunction!(plan::theoretical_alignment, module)?)?;
    module.add_function(wrap_pyfunction!(plan::arch_of, module)?)?;
    module.add_function(wrap_pyfunction!(plan::layout_len, module)?)?;
    module.add_function(wrap_pyfunction!(array::require_targets, module)?)?;
    module.add_function(wrap_pyfunction!(limits::require_memory_for, module)?)?;
    module.add_function(wrap_pyfunction!(limits::require_slots, module)?)?;
    module.add_function(wrap_pyfunction!(permute::count_expert_num_tokens, module)?)?;
    module.add_function(wrap_pyfunction!(permute::build_layout, module)?)?;
    module.add_function(wrap_pyfunction!(permute::permute_rows, module)?)?;
    module.add_function(wrap_pyfunction!(permute::permute_quantized, module)?)?;
    module.add_function(wrap_pyfunction!(deep_gemm::deep_gemm_permute, module)?)?;
    module.add_function(wrap_pyfunction!(permute::quantize_permute, module)?)?;
    module.add_function(wrap_pyfunction!(scales::scale_matrix, module)?)?;
    module.add_function(wrap_pyfunction!(deep_gemm::deep_gemm_unpermute, module)?)?;
    module.add_function(wrap_pyfunction!(unpermute::unpermute, module)?)?;
    module.add_function(wrap_pyfunction!(complete::is_complete, module)?)?;
    module.add_function(wrap_pyfunction!(complete::mark_complete, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_unavailable, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_check, module)?)?;
    module.add_function(wrap_pyfunction!(pool::get_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(pool::set_num_threads, module)?)?;
    Ok(())
}
