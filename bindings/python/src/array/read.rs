//! What torch and NumPy say about an array.

use super::Array;
use super::dims::{Dims, covered, dims};
use super::element::{Element, torch_element};
use crate::error::Wrong;
use crate::exchange::View;
use pyo3::intern;
use pyo3::prelude::*;

impl<'py> Array<'py> {
    /// `None` for what is not dense memory.
    pub(super) fn from_view(argument: &'static str, object: &Bound<'py, PyAny>, view: &View<'_>) -> Option<Self> {
        let shape: Dims<usize> = view.shape.iter().map(|&size| size as usize).collect();
        if view.pointer == 0 && !shape.contains(&0) {
            return None;
        }
        let strides: Dims<isize> = view.strides.iter().map(|&stride| stride as isize).collect();
        let (_, bits, lanes) = view.dtype;
        Some(Self {
            argument,
            pointer: view.pointer,
            covered: covered(&shape, &strides),
            shape,
            strides,
            element: Element::exchanged(view.dtype),
            item_bytes: (usize::from(bits) * usize::from(lanes)).div_ceil(8),
            writable: true,
            device: view.device,
            tracked: true,
            object: object.clone(),
        })
    }

    pub(super) fn from_torch(
        argument: &'static str,
        object: &Bound<'py, PyAny>,
        data_ptr: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        let py = object.py();
        let device = if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            None
        } else if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            Some(object.call_method0(intern!(py, "get_device"))?.extract()?)
        } else {
            let device = object.getattr(intern!(py, "device"))?;
            let expected = "the CPU or a CUDA device";
            return Err(Wrong::new(argument, format_args!("is on {device}"), &device, expected).value());
        };
        let opaque = |cause: Option<PyErr>| {
            let error = Wrong::new(argument, "is a tensor without memory of its own", object, "a dense one").of_type();
            error.set_cause(py, cause);
            error
        };
        let strides = dims(&object.call_method0(intern!(py, "stride")).map_err(|error| opaque(Some(error)))?)?;
        let pointer = data_ptr.call0().map_err(|error| opaque(Some(error)))?.extract()?;
        let shape: Dims<usize> = dims(&object.getattr(intern!(py, "shape"))?)?;
        if pointer == 0 && !shape.contains(&0) {
            return Err(opaque(None));
        }
        let element = torch_element(&object.getattr(intern!(py, "dtype"))?)?;
        Ok(Self {
            argument,
            pointer,
            covered: covered(&shape, &strides),
            shape,
            strides,
            element,
            item_bytes: match element.bytes() {
                Some(bytes) => bytes,
                None => object.getattr(intern!(py, "itemsize"))?.extract()?,
            },
            writable: true,
            device,
            tracked: true,
            object: object.clone(),
        })
    }

    pub(super) fn from_numpy(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let dtype = object.getattr(intern!(py, "dtype"))?;
        let native = dtype.getattr(intern!(py, "isnative"))?.is_truthy()?;
        let name: String = dtype.getattr(intern!(py, "name"))?.extract()?;
        let item_bytes: usize = dtype.getattr(intern!(py, "itemsize"))?.extract()?;
        let byte_strides: Dims<isize> = dims(&object.getattr(intern!(py, "strides"))?)?;
        let whole = item_bytes as isize;
        if whole == 0 || byte_strides.iter().any(|stride| stride % whole != 0) {
            let (strides, expected) = (&byte_strides[..], format!("multiples of its items' {item_bytes}"));
            return Err(
                Wrong::new(argument, format_args!("has strides of {strides:?} bytes"), strides, expected).value()
            );
        }
        let interface = object.getattr(intern!(py, "__array_interface__"))?;
        let (pointer, readonly): (usize, bool) = interface.get_item(intern!(py, "data"))?.extract()?;
        let shape: Dims<usize> = dims(&object.getattr(intern!(py, "shape"))?)?;
        let strides: Dims<isize> = byte_strides.iter().map(|stride| stride / whole).collect();
        Ok(Self {
            argument,
            pointer,
            covered: covered(&shape, &strides),
            shape,
            strides,
            element: if native { Element::named(&name) } else { Element::Other },
            item_bytes,
            writable: !readonly,
            device: None,
            tracked: false,
            object: object.clone(),
        })
    }
}
