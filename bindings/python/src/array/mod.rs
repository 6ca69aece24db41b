//! Arrays from Python (torch tensors, NumPy arrays) as checked views of their memory.
//!
//! Here a pointer that Python vouches for becomes slices, after checking the element type, the strides, the alignment
//! and, for what will be written, that nothing else overlaps it. Numbers that say where to read or write next (ids,
//! rows, counts) are copied out of the caller's memory first, so that what was checked is what is used.

mod apart;
mod dims;
mod element;
mod memory;
mod read;

pub(crate) use apart::{Apart, require_targets};
pub(crate) use element::{Element, Native, torch_dtype};

use crate::autograd;
use crate::error::Wrong;
use crate::exchange;
use dims::Dims;
use pyo3::intern;
use pyo3::prelude::*;

/// An array: who owns it, where it is and how it is laid out.
pub(crate) struct Array<'py> {
    argument: &'static str,
    /// Keeps the memory alive.
    object: Bound<'py, PyAny>,
    pointer: usize,
    shape: Dims<usize>,
    strides: Dims<isize>,
    /// Elements from the first to the last in memory; `None` if the strides do not allow to say.
    covered: Option<usize>,
    element: Element,
    item_bytes: usize,
    writable: bool,
    /// The CUDA device it is on, or the CPU.
    device: Option<usize>,
    /// Whether torch keeps a record of it: a tensor that the caller has handed over.
    tracked: bool,
}

impl<'py> Array<'py> {
    /// An array to be read. Where torch keeps a tensor as the negative of what its memory holds, a true copy of it.
    ///
    /// # Errors
    /// `TypeError` for anything but a dense torch tensor or a NumPy array, `ValueError` for one that is not on the CPU.
    pub(crate) fn new(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = Self::of(argument, object)?;
        if array.may_be_negative() && autograd::is_negative(object)? {
            return Self::of(argument, &object.call_method0(intern!(object.py(), "resolve_neg"))?);
        }
        Ok(array)
    }

    /// An array to be written.
    ///
    /// # Errors
    /// As [`Array::new`]; `ValueError` for one that is read-only, that has several elements in one place, or whose
    /// memory holds the negative of its values.
    pub(crate) fn output(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = Self::target(argument, object)?;
        if array.may_be_negative() && autograd::is_negative(object)? {
            let expected = "a tensor that holds its values themselves";
            return Err(Wrong::new(argument, "is a view of negative values", object, expected).value());
        }
        Ok(array)
    }

    /// An array to be written by assignment, which knows of negative values.
    fn target(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = Self::of(argument, object)?;
        if !array.writable {
            return Err(array.read_only_error());
        }
        if array.overlaps_itself() {
            return Err(array.stride_error("memory of its own for each element"));
        }
        Ok(array)
    }

    /// A tensor that this call has made for its caller: nobody else knows of it.
    pub(crate) fn made(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        Ok(Self { tracked: false, ..Self::of(argument, object)? })
    }

    /// An array of which only the memory matters.
    fn of(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        if let Some(Some(array)) = exchange::view(object, |view| Self::from_view(argument, object, &view)) {
            Ok(array)
        } else if let Some(data_ptr) = object.getattr_opt(intern!(py, "data_ptr"))? {
            exchange::find(py)?;
            Self::from_torch(argument, object, &data_ptr)
        } else if object.hasattr(intern!(py, "__array_interface__"))? {
            Self::from_numpy(argument, object)
        } else {
            let found = object.get_type().fully_qualified_name()?;
            let expected = "a torch tensor or a NumPy array";
            Err(Wrong::new(argument, format_args!("is a {found}"), object, expected).of_type())
        }
    }

    /// The same, where `None` may stand for nothing.
    pub(crate) fn optional(argument: &'static str, object: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        object.map(|object| Self::new(argument, object)).transpose()
    }

    /// The CUDA device that all arrays are on, or `None` for the CPU.
    ///
    /// # Errors
    /// `ValueError` if they are not all in one place.
    pub(crate) fn common_device(arrays: &[Option<&Self>]) -> PyResult<Option<usize>> {
        let mut arrays = arrays.iter().flatten();
        let Some(first) = arrays.next() else { return Ok(None) };
        for array in arrays {
            if array.device != first.device {
                let (actual, expected) = (place(array.device), place(first.device));
                let found = format_args!("is on {actual}, unlike");
                return Err(Wrong::new(array.argument, found, &actual[..], expected).beside(first.argument).value());
            }
        }
        Ok(first.device)
    }

    /// The CUDA device it is on, or `None` for the CPU.
    pub(crate) fn device(&self) -> Option<usize> {
        self.device
    }

    /// The name it goes by in errors.
    pub(crate) fn argument(&self) -> &'static str {
        self.argument
    }

    /// Whether it is a tensor that torch keeps a record of.
    pub(crate) fn is_tracked(&self) -> bool {
        self.tracked
    }

    /// The tensor or NumPy array itself.
    pub(crate) fn object(&self) -> &Bound<'py, PyAny> {
        &self.object
    }

    /// The tensor or NumPy array itself.
    pub(crate) fn into_object(self) -> Bound<'py, PyAny> {
        self.object
    }

    /// Where the first element is.
    pub(crate) fn address(&self) -> u64 {
        self.pointer as u64
    }

    pub(crate) fn item_bytes(&self) -> usize {
        self.item_bytes
    }

    /// Row and column stride of a matrix, in elements.
    pub(crate) fn matrix_strides(&self) -> PyResult<(usize, usize)> {
        self.matrix_shape("two dimensions")?;
        self.span()?;
        Ok((self.strides[0].unsigned_abs(), self.strides[1].unsigned_abs()))
    }

    /// Fails unless the array covers at least `len` elements of memory.
    pub(crate) fn require_span(&self, len: usize) -> PyResult<()> {
        let held = self.span()?;
        if held < len {
            return Err(Wrong::short(self.argument, held, len).value());
        }
        Ok(())
    }

    /// The address of at least `len` contiguous `T` on a device, aligned to `alignment` bytes.
    pub(crate) fn require_device_memory<T: Native>(&self, len: usize, alignment: usize) -> PyResult<u64> {
        self.require_contiguous()?;
        self.check::<T>()?;
        self.require_span(len)?;
        self.require_aligned(alignment)
    }

    /// The address, aligned to `alignment` bytes.
    pub(crate) fn require_aligned(&self, alignment: usize) -> PyResult<u64> {
        if !self.pointer.is_multiple_of(alignment) {
            return Err(self.address_error(alignment));
        }
        Ok(self.address())
    }

    pub(crate) fn element(&self) -> Element {
        self.element
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The two sizes of a matrix.
    pub(crate) fn matrix_shape(&self, expected: &str) -> PyResult<(usize, usize)> {
        match *self.shape {
            [rows, cols] => Ok((rows, cols)),
            _ => Err(self.shape_error(expected)),
        }
    }

    pub(crate) fn dtype_error(&self, expected: &str) -> PyErr {
        match self.object.getattr(intern!(self.object.py(), "dtype")) {
            Ok(dtype) => Wrong::new(self.argument, format_args!("has dtype {dtype}"), &dtype, expected).of_type(),
            Err(error) => error,
        }
    }

    pub(crate) fn shape_error(&self, expected: &str) -> PyErr {
        Wrong::new(self.argument, format_args!("has shape {:?}", self.shape()), self.shape(), expected).value()
    }

    fn stride_error(&self, expected: &str) -> PyErr {
        let strides = &self.strides[..];
        Wrong::new(self.argument, format_args!("has strides {strides:?}"), strides, expected).value()
    }

    fn address_error(&self, alignment: usize) -> PyErr {
        let found = format_args!("starts at address {:#x}", self.pointer);
        Wrong::new(self.argument, found, self.pointer, format!("a multiple of {alignment}")).value()
    }

    pub(crate) fn require_shape(&self, shape: &[usize]) -> PyResult<()> {
        if *self.shape == *shape { Ok(()) } else { Err(self.shape_error(&format!("{shape:?}"))) }
    }

    /// Fails unless an array of this shape has these strides, dimensions of one element apart.
    pub(crate) fn require_strides(&self, strides: &[usize]) -> PyResult<()> {
        let differ =
            |((&size, &actual), &expected): ((&usize, &isize), &usize)| size > 1 && actual != expected as isize;
        if !self.is_empty() && self.shape.iter().zip(&*self.strides).zip(strides).any(differ) {
            return Err(self.stride_error(&format!("{strides:?}")));
        }
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Elements from the first to the last in memory.
    fn span(&self) -> PyResult<usize> {
        self.covered.ok_or_else(|| {
            let negative = self.shape.iter().zip(&*self.strides).any(|(&size, &stride)| size > 1 && stride < 0);
            self.stride_error(if negative { "none of them negative" } else { "offsets that fit the address space" })
        })
    }

    /// Whether torch has to be asked if the tensor is a negative. That takes a tenth of a microsecond: on a GPU, where
    /// a call takes few, not for what no public function of torch makes such a view of.
    fn may_be_negative(&self) -> bool {
        self.tracked
            && (self.device.is_none()
                || matches!(self.element, Element::Bf16 | Element::F16 | Element::F32 | Element::Other))
    }

    fn read_only_error(&self) -> PyErr {
        Wrong::new(self.argument, "is read-only", &self.object, "to write to it").value()
    }

    pub(crate) fn require_contiguous(&self) -> PyResult<()> {
        let mut expected = 1usize;
        let mut differ = false;
        for (&size, &stride) in self.shape.iter().zip(&*self.strides).rev() {
            differ |= size > 1 && stride != expected as isize;
            expected = expected.wrapping_mul(size);
        }
        if !differ || self.is_empty() {
            return Ok(());
        }
        let mut expected = vec![1; self.shape.len()];
        for dimension in (1..self.shape.len()).rev() {
            expected[dimension - 1] = expected[dimension] * self.shape[dimension];
        }
        Err(self.stride_error(&format!("{expected:?}")))
    }
}

pub(crate) fn place(device: Option<usize>) -> String {
    device.map_or_else(|| "the CPU".into(), |ordinal| format!("cuda:{ordinal}"))
}
