//! What torch has to know of a call that goes past its dispatcher, and what may forbid one.
//!
//! torch's own operators materialise lazily negated tensors, count the writes to a tensor (a gradient that needs what
//! was there fails instead of being wrong), and are seen by its tracers. Functions that take addresses do it here.

use crate::array::{Array, Element};
use crate::error::Wrong;
use pyo3::exceptions::{PyRuntimeError, PyUserWarning};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

/// What a call says that a trace would keep the numbers of.
pub(crate) const TRACED: &str = "a trace is being recorded, which would keep the numbers of this call: \
     expected a call outside of torch.jit.trace and make_fx, or the operators of expertile.torch in them";

/// torch's functions for it; one that a release lacks is not asked.
struct Functions {
    is_negative: Py<PyAny>,
    is_tracing: Option<Py<PyAny>>,
    modes: Option<Py<PyAny>>,
    is_grad_enabled: Py<PyAny>,
    increment_version: Option<Py<PyAny>>,
}

impl Functions {
    fn get(py: Python<'_>) -> PyResult<&'static Self> {
        static FUNCTIONS: PyOnceLock<Functions> = PyOnceLock::new();
        FUNCTIONS.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let c = torch.getattr("_C")?;
            let of_c = |name: &str| Ok::<_, PyErr>(c.getattr_opt(name)?.map(Bound::unbind));
            Ok(Self {
                is_negative: torch.getattr("Tensor")?.getattr("is_neg")?.unbind(),
                is_tracing: of_c("_is_tracing")?,
                modes: of_c("_len_torch_dispatch_stack")?,
                is_grad_enabled: torch.getattr("is_grad_enabled")?.unbind(),
                increment_version: of_c("_increment_version")?,
            })
        })
    }
}

fn says(py: Python<'_>, function: &Option<Py<PyAny>>) -> PyResult<bool> {
    function.as_ref().map_or(Ok(false), |function| function.bind(py).call0()?.is_truthy())
}

/// Whether a tensor is the negative of what its memory holds.
pub(crate) fn is_negative(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    let py = tensor.py();
    Functions::get(py)?.is_negative.bind(py).call1((tensor,))?.is_truthy()
}

/// Whether a trace records what torch's operators do now, and would keep this call's numbers in their place.
fn is_traced(py: Python<'_>, functions: &Functions) -> PyResult<bool> {
    if says(py, &functions.is_tracing)? {
        return Ok(true);
    }
    if !says(py, &functions.modes)? {
        return Ok(false);
    }
    let c = py.import("torch._C")?;
    let key = c.getattr("_TorchDispatchModeKey")?.getattr("PROXY")?;
    Ok(!c.call_method1("_get_dispatch_mode", (key,))?.is_none())
}

/// Fails where torch's tracers or its autograd would be misled by a call on these arrays; warns of a gradient that is
/// lost.
///
/// # Errors
/// `RuntimeError` under a trace, `ValueError` for an output that requires gradients.
pub(crate) fn admit(outputs: &[&Array<'_>], inputs: &[Option<&Array<'_>>]) -> PyResult<()> {
    let mut tracked =
        outputs.iter().copied().chain(inputs.iter().copied().flatten()).filter(|array| array.is_tracked());
    let Some(first) = tracked.next() else { return Ok(()) };
    let py = first.object().py();
    let functions = Functions::get(py)?;
    if is_traced(py, functions)? {
        return Err(PyRuntimeError::new_err(TRACED));
    }
    if !functions.is_grad_enabled.bind(py).call0()?.is_truthy()? {
        return Ok(());
    }
    let requires_grad = |array: &Array<'_>| {
        let float = matches!(array.element(), Element::E4m3 | Element::Bf16 | Element::F16 | Element::F32);
        Ok::<_, PyErr>(
            float && array.is_tracked() && array.object().getattr(intern!(py, "requires_grad"))?.is_truthy()?,
        )
    };
    for output in outputs {
        if requires_grad(output)? {
            let expected = "an output that does not: its gradient would be that of what it held";
            return Err(Wrong::new(output.argument(), "requires gradients", output.object(), expected).value());
        }
    }
    for input in inputs.iter().flatten() {
        if requires_grad(input)? {
            let message = format!(
                "{} requires gradients, which end here: nothing in expertile is differentiable",
                input.argument()
            );
            PyErr::warn(py, &py.get_type::<PyUserWarning>(), &std::ffi::CString::new(message)?, 2)?;
        }
    }
    Ok(())
}

/// Counts a write to each of these, as torch's own operators do.
pub(crate) fn written(py: Python<'_>, outputs: &[&Array<'_>]) -> PyResult<()> {
    let mut tracked = outputs.iter().filter(|array| array.is_tracked()).map(|array| array.object()).peekable();
    if tracked.peek().is_none() {
        return Ok(());
    }
    let Some(increment) = &Functions::get(py)?.increment_version else { return Ok(()) };
    increment.bind(py).call1((PyTuple::new(py, tracked.collect::<Vec<_>>())?,)).map(drop)
}
