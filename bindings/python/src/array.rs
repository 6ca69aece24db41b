//! Arrays from Python (torch tensors, NumPy arrays) as checked views of their memory.
//!
//! Here a pointer that Python vouches for becomes slices, after checking the element type, the strides, the alignment and,
//! for what will be written, that nothing else overlaps it. Numbers that say where to read or write next (ids, rows, counts)
//! are copied out of the caller's memory first, so that what was checked is what is used.

use crate::autograd;
use crate::exchange::{self, View};
use crate::limits;
use bytemuck::Pod;
use expertile::{E4m3, MatrixRef};
use half::{bf16, f16};
use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use std::ops::{Deref, Range};

/// What an array is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    E4m3,
    /// A power of two, `2^(byte - 127)`.
    E8m0,
    Bf16,
    F16,
    F32,
    I32,
    I64,
    U8,
    I8,
    /// Anything else: no operation takes it, and its error says its name.
    Other,
}

impl Element {
    /// Names as torch and NumPy (with ml_dtypes) spell them.
    const NAMED: [(&'static str, Self); 9] = [
        ("float8_e4m3fn", Self::E4m3),
        ("float8_e8m0fnu", Self::E8m0),
        ("bfloat16", Self::Bf16),
        ("float16", Self::F16),
        ("float32", Self::F32),
        ("int32", Self::I32),
        ("int64", Self::I64),
        ("uint8", Self::U8),
        ("int8", Self::I8),
    ];

    /// Its size; `None` if that has to be asked.
    fn bytes(self) -> Option<usize> {
        match self {
            Self::E4m3 | Self::E8m0 | Self::U8 | Self::I8 => Some(1),
            Self::Bf16 | Self::F16 => Some(2),
            Self::F32 | Self::I32 => Some(4),
            Self::I64 => Some(8),
            Self::Other => None,
        }
    }

    /// By DLPack's type code, bits and lanes.
    fn exchanged(dtype: (u8, u8, u16)) -> Self {
        const INT: u8 = 0;
        const UINT: u8 = 1;
        const FLOAT: u8 = 2;
        const BFLOAT: u8 = 4;
        const E4M3FN: u8 = 10;
        const E8M0FNU: u8 = 14;
        match dtype {
            (E4M3FN, 8, 1) => Self::E4m3,
            (E8M0FNU, 8, 1) => Self::E8m0,
            (BFLOAT, 16, 1) => Self::Bf16,
            (FLOAT, 16, 1) => Self::F16,
            (FLOAT, 32, 1) => Self::F32,
            (INT, 32, 1) => Self::I32,
            (INT, 64, 1) => Self::I64,
            (UINT, 8, 1) => Self::U8,
            (INT, 8, 1) => Self::I8,
            _ => Self::Other,
        }
    }

    fn named(name: &str) -> Self {
        Self::NAMED.iter().find(|(known, _)| *known == name).map_or(Self::Other, |&(_, element)| element)
    }
}

/// A Rust type that arrays of some elements may be read and written as.
pub(crate) trait Native: Pod {
    /// Whether an array of `element` is made of these.
    fn is(element: Element) -> bool;
}

macro_rules! native {
    ($($type:ty: $($element:ident)|+;)+) => {
        $(impl Native for $type {
            fn is(element: Element) -> bool {
                matches!(element, $(Element::$element)|+)
            }
        })+
    };
}

native! {
    // NumPy has no e4m3 of its own: bytes are taken for it.
    E4m3: E4m3 | U8 | I8;
    u8: U8 | I8 | E4m3 | E8m0;
    bf16: Bf16;
    f16: F16;
    f32: F32;
    i32: I32;
    i64: I64;
}

const FEW: usize = 2;

/// Sizes or strides. A few are kept in place: a call looks at many arrays, and none should cost an allocation.
#[derive(Debug)]
struct Dims<N> {
    few: [N; FEW],
    len: usize,
    /// All of them, if they are not a few.
    many: Option<Box<[N]>>,
}

impl<N: Copy + Default> FromIterator<N> for Dims<N> {
    fn from_iter<I: IntoIterator<Item = N>>(numbers: I) -> Self {
        let mut dims = Self { few: [N::default(); FEW], len: 0, many: None };
        let mut numbers = numbers.into_iter();
        while let Some(number) = numbers.next() {
            if dims.len == FEW {
                dims.many = Some(dims.few.into_iter().chain([number]).chain(numbers).collect());
                break;
            }
            dims.few[dims.len] = number;
            dims.len += 1;
        }
        dims
    }
}

impl<N> Deref for Dims<N> {
    type Target = [N];

    fn deref(&self) -> &[N] {
        self.many.as_deref().unwrap_or(&self.few[..self.len])
    }
}

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

/// The promise that what will be written overlaps nothing else; only [`Apart::check`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Apart(());

impl Apart {
    /// Everything that can be said about the memory of a call before its first byte is written.
    ///
    /// # Errors
    /// `ValueError` if one of `outputs` shares memory with another one or with one of `inputs`, or is part of a graph that
    /// torch differentiates, `RuntimeError` if a trace is watching.
    pub(crate) fn check(outputs: &[&Array<'_>], inputs: &[Option<&Array<'_>>]) -> PyResult<Self> {
        autograd::admit(outputs, inputs)?;
        for (index, output) in outputs.iter().enumerate() {
            let others = outputs[index + 1..].iter().copied().chain(inputs.iter().copied().flatten());
            let written = output.bytes()?;
            for other in others {
                let read = other.bytes()?;
                if written.start < read.end && read.start < written.end && !output.is_beside(other) {
                    let (output, other) = (output.argument, other.argument);
                    return Err(PyValueError::new_err(format!(
                        "{output} shares memory with {other}, expected memory of its own"
                    )));
                }
            }
        }
        Ok(Self(()))
    }
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
    /// As [`Array::new`]; `ValueError` for one that is read-only, that has several elements in one place, or whose memory
    /// holds the negative of its values.
    pub(crate) fn output(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let array = Self::target(argument, object)?;
        if array.may_be_negative() && autograd::is_negative(object)? {
            return Err(PyValueError::new_err(format!(
                "{argument} is a view of negative values, expected a tensor that holds its values themselves"
            )));
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
            Err(PyTypeError::new_err(format!("{argument} is a {found}, expected a torch tensor or a NumPy array")))
        }
    }

    /// The same, where `None` may stand for nothing.
    pub(crate) fn optional(argument: &'static str, object: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        object.map(|object| Self::new(argument, object)).transpose()
    }

    /// `None` for what is not dense memory.
    fn from_view(argument: &'static str, object: &Bound<'py, PyAny>, view: &View<'_>) -> Option<Self> {
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

    fn from_torch(argument: &'static str, object: &Bound<'py, PyAny>, data_ptr: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let device = if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            None
        } else if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            Some(object.call_method0(intern!(py, "get_device"))?.extract()?)
        } else {
            let device = object.getattr(intern!(py, "device"))?;
            return Err(PyValueError::new_err(format!("{argument} is on {device}, expected the CPU or a CUDA device")));
        };
        let opaque = |error: PyErr| {
            PyTypeError::new_err(format!(
                "{argument} is a tensor without memory of its own, expected a dense one: {error}"
            ))
        };
        let strides = dims(&object.call_method0(intern!(py, "stride")).map_err(opaque)?)?;
        let pointer = data_ptr.call0().map_err(opaque)?.extract()?;
        let shape: Dims<usize> = dims(&object.getattr(intern!(py, "shape"))?)?;
        if pointer == 0 && !shape.contains(&0) {
            return Err(opaque(PyValueError::new_err("its elements are nowhere")));
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

    fn from_numpy(argument: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let dtype = object.getattr(intern!(py, "dtype"))?;
        let native = dtype.getattr(intern!(py, "isnative"))?.is_truthy()?;
        let name: String = dtype.getattr(intern!(py, "name"))?.extract()?;
        let item_bytes: usize = dtype.getattr(intern!(py, "itemsize"))?.extract()?;
        let byte_strides: Dims<isize> = dims(&object.getattr(intern!(py, "strides"))?)?;
        let whole = item_bytes as isize;
        if whole == 0 || byte_strides.iter().any(|stride| stride % whole != 0) {
            return Err(PyValueError::new_err(format!(
                "{argument} has strides of {:?} bytes, expected multiples of its items' {item_bytes}",
                &byte_strides[..]
            )));
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

    /// The CUDA device that all arrays are on, or `None` for the CPU.
    ///
    /// # Errors
    /// `ValueError` if they are not all in one place.
    pub(crate) fn common_device(arrays: &[Option<&Self>]) -> PyResult<Option<usize>> {
        let mut arrays = arrays.iter().flatten();
        let Some(first) = arrays.next() else { return Ok(None) };
        for array in arrays {
            if array.device != first.device {
                return Err(PyValueError::new_err(format!(
                    "{} is on {}, expected {}, as {}",
                    array.argument,
                    place(array.device),
                    place(first.device),
                    first.argument
                )));
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
            let argument = self.argument;
            return Err(PyValueError::new_err(format!("{argument} holds {held} elements, expected at least {len}")));
        }
        Ok(())
    }

    /// The address of at least `len` contiguous `T` on a device, aligned to `alignment` bytes.
    pub(crate) fn require_device_memory<T: Native>(&self, len: usize, alignment: usize) -> PyResult<u64> {
        self.require_contiguous()?;
        self.check::<T>()?;
        self.require_span(len)?;
        if !self.pointer.is_multiple_of(alignment) {
            return Err(PyValueError::new_err(format!(
                "{} starts at address {:#x}, expected a multiple of {alignment}",
                self.argument, self.pointer
            )));
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
        let dtype = self.object.getattr("dtype").map_or_else(|_| "unknown".into(), |dtype| dtype.to_string());
        PyTypeError::new_err(format!("{} has dtype {dtype}, expected {expected}", self.argument))
    }

    pub(crate) fn shape_error(&self, expected: &str) -> PyErr {
        PyValueError::new_err(format!("{} has shape {:?}, expected {expected}", self.argument, self.shape()))
    }

    fn stride_error(&self, expected: &str) -> PyErr {
        PyValueError::new_err(format!("{} has strides {:?}, expected {expected}", self.argument, &self.strides[..]))
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

    /// Whether torch has to be asked if the tensor is a negative. That takes a tenth of a microsecond: on a GPU, where a call
    /// takes few, not for what no public function of torch makes such a view of.
    fn may_be_negative(&self) -> bool {
        self.tracked
            && (self.device.is_none()
                || matches!(self.element, Element::Bf16 | Element::F16 | Element::F32 | Element::Other))
    }

    /// Whether two elements may have the same place: exact for what slicing, transposing and expanding make.
    fn overlaps_itself(&self) -> bool {
        if self.require_contiguous().is_ok() {
            return false;
        }
        let strides = self.strides.iter().map(|stride| stride.unsigned_abs());
        let mut dims: Vec<(usize, usize)> =
            strides.zip(self.shape.iter().copied()).filter(|&(_, size)| size > 1).collect();
        dims.sort_unstable();
        let mut reached = 0usize;
        dims.into_iter().any(|(stride, size)| {
            let apart = stride > reached;
            reached = reached.saturating_add(stride.saturating_mul(size - 1));
            !apart
        })
    }

    /// Whether two matrices of the same row stride stand side by side in it: columns of one wider matrix.
    fn is_beside(&self, other: &Self) -> bool {
        let columns = |array: &Self| match (&*array.shape, &*array.strides) {
            (&[_, columns], &[row, 1]) if row > 0 => {
                Some((row as usize * array.item_bytes, columns * array.item_bytes))
            }
            _ => None,
        };
        let (Some((row, mine)), Some((same_row, its))) = (columns(self), columns(other)) else { return false };
        let offset = other.pointer.wrapping_sub(self.pointer) as isize;
        row == same_row && {
            let offset = offset.rem_euclid(row as isize) as usize;
            offset >= mine && offset + its <= row
        }
    }

    fn read_only_error(&self) -> PyErr {
        PyValueError::new_err(format!("{} is read-only, expected to write to it", self.argument))
    }

    /// The memory the array covers, gaps included.
    fn bytes(&self) -> PyResult<Range<usize>> {
        if let Some(covered) = self.covered {
            return Ok(self.pointer..self.pointer.saturating_add(covered.saturating_mul(self.item_bytes)));
        }
        // Strides below zero start at the end of what they cover.
        let (mut before, mut after) = (0usize, 0usize);
        for (&size, &stride) in self.shape.iter().zip(&*self.strides).filter(|&(&size, _)| size > 1) {
            let side = if stride < 0 { &mut before } else { &mut after };
            let reach = (size - 1).checked_mul(stride.unsigned_abs()).and_then(|reach| side.checked_add(reach));
            *side = reach.ok_or_else(|| self.stride_error("offsets that fit the address space"))?;
        }
        let [before, after] =
            [before, after.saturating_add(1)].map(|elements| elements.saturating_mul(self.item_bytes));
        Ok(self.pointer.saturating_sub(before)..self.pointer.saturating_add(after))
    }

    /// Fails unless the array is made of `T`.
    pub(crate) fn require_dtype<T: Native>(&self) -> PyResult<()> {
        if !T::is(self.element) || size_of::<T>() != self.item_bytes {
            return Err(self.dtype_error(std::any::type_name::<T>().rsplit("::").next().unwrap_or("another")));
        }
        Ok(())
    }

    /// Checks that a slice of `T` may stand where the array does, and says how long it is.
    fn check<T: Native>(&self) -> PyResult<usize> {
        self.require_dtype::<T>()?;
        if !self.pointer.is_multiple_of(align_of::<T>()) {
            return Err(PyValueError::new_err(format!(
                "{} starts at address {:#x}, expected a multiple of {}",
                self.argument,
                self.pointer,
                align_of::<T>()
            )));
        }
        self.span()
    }

    fn check_on_cpu<T: Native>(&self) -> PyResult<usize> {
        if self.device.is_some() {
            return Err(PyValueError::new_err(format!(
                "{} is on {}, expected the CPU",
                self.argument,
                place(self.device)
            )));
        }
        self.check::<T>()
    }

    /// Everything from the first element to the last, in memory order.
    pub(crate) fn memory<T: Native>(&self) -> PyResult<&[T]> {
        let len = self.check_on_cpu::<T>()?;
        if len == 0 {
            return Ok(&[]);
        }
        #[allow(unsafe_code)]
        // SAFETY: the owner, which `self` holds, says that elements of this type (plain data, any bits are a value) stand
        // at these strides from this pointer; `check` found the pointer aligned and the last element at `len - 1`. That
        // nobody else writes there meanwhile is what `Apart` checks within a call; another thread that writes a tensor
        // while it is being read is a race in the caller, as with torch's own functions.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer as *const T, len) })
    }

    /// The same, to be written.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn memory_mut<T: Native>(&self, _apart: Apart) -> PyResult<&mut [T]> {
        let len = self.check_on_cpu::<T>()?;
        if !self.writable {
            return Err(self.read_only_error());
        }
        if len == 0 {
            return Ok(&mut []);
        }
        #[allow(unsafe_code)]
        // SAFETY: as in `memory`; that no other slice of this call overlaps it is what `_apart` promises, and each
        // function of this crate asks for an output's memory once.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer as *mut T, len) })
    }

    /// A contiguous array.
    pub(crate) fn contiguous<T: Native>(&self) -> PyResult<&[T]> {
        self.require_contiguous()?;
        self.memory()
    }

    /// A contiguous array, to be written.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn contiguous_mut<T: Native>(&self, apart: Apart) -> PyResult<&mut [T]> {
        self.require_contiguous()?;
        self.memory_mut(apart)
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

    /// A matrix with any (not negative) strides.
    pub(crate) fn matrix<T: Native>(&self) -> PyResult<MatrixRef<'_, T>> {
        let (rows, cols) = self.matrix_shape("two dimensions")?;
        let memory = self.memory()?;
        let stride = |dimension: usize| usize::try_from(self.strides[dimension]).unwrap_or(0);
        MatrixRef::with_strides(memory, rows, cols, stride(0), stride(1)).map_err(crate::error::exception)
    }

    /// The rows `rows` of a matrix with any (not negative) strides.
    pub(crate) fn matrix_rows<T: Native>(&self, rows: Range<usize>) -> PyResult<MatrixRef<'_, T>> {
        let (all, cols) = self.matrix_shape("two dimensions")?;
        let memory = self.memory()?;
        let stride = |dimension: usize| usize::try_from(self.strides[dimension]).unwrap_or(0);
        let (start, rows) = (rows.start.min(all), rows.end.min(all).saturating_sub(rows.start));
        let memory = if rows == 0 || cols == 0 { &[] } else { &memory[start * stride(0)..] };
        MatrixRef::with_strides(memory, rows, cols, stride(0), stride(1)).map_err(crate::error::exception)
    }

    /// A copy of some rows of a matrix. Each element is read once: another thread may write it at any time, and what was
    /// checked has to be what is used.
    pub(crate) fn copied_rows<T: Native + Send>(&self, py: Python<'_>, rows: Range<usize>) -> PyResult<Vec<T>> {
        let (all, cols) = self.matrix_shape("two dimensions")?;
        self.copied(py, rows.start.min(all)..rows.end.min(all), cols, (self.strides[0], self.strides[1]))
    }

    /// A copy of a list with at most as many elements as there may be experts.
    pub(crate) fn copied_list<T: Native + Send>(&self, py: Python<'_>) -> PyResult<Vec<T>> {
        let [len] = *self.shape else { return Err(self.shape_error("one dimension")) };
        if len > limits::EXPERTS {
            return Err(self.shape_error(&format!("at most {} elements", limits::EXPERTS)));
        }
        self.copied(py, 0..1, len, (0, self.strides[0]))
    }

    fn copied<T: Native + Send>(
        &self,
        py: Python<'_>,
        rows: Range<usize>,
        cols: usize,
        (row_stride, col_stride): (isize, isize),
    ) -> PyResult<Vec<T>> {
        /// Between looks at whether the caller has been interrupted: a few milliseconds of copying.
        const ELEMENTS_AT_ONCE: usize = 1 << 22;
        self.check_on_cpu::<T>()?;
        let len = rows.len().checked_mul(cols).ok_or_else(|| self.shape_error("as many elements as can be counted"))?;
        let mut copy: Vec<T> = limits::vec(self.argument, len)?;
        let start = self.pointer;
        let mut from = 0;
        while from < len {
            let to = len.min(from + ELEMENTS_AT_ONCE);
            let mut append = || {
                let (mut row, mut col) = (rows.start + from / cols, from % cols);
                for _ in from..to {
                    let offset = row as isize * row_stride + col as isize * col_stride;
                    let address = start.wrapping_add_signed(offset * size_of::<T>() as isize);
                    #[allow(unsafe_code)]
                    // SAFETY: `check_on_cpu` found the pointer aligned and every element of these strides within memory
                    // that `self` keeps alive; the read is volatile because others may write there meanwhile.
                    copy.push(unsafe { (address as *const T).read_volatile() });
                    col += 1;
                    if col == cols {
                        (row, col) = (row + 1, 0);
                    }
                }
            };
            if to == len && from == 0 && len < 1 << 16 {
                append();
            } else {
                py.detach(append);
                py.check_signals()?;
            }
            from = to;
        }
        Ok(copy)
    }
}

/// Fails unless arrays may be written as they are, by assignment: every one of `outputs` takes values, has memory of its own
/// for each element, and none that another one or one of `inputs` has; all in one place.
#[pyfunction]
pub(crate) fn require_targets(
    outputs: Vec<(PyBackedStr, Bound<'_, PyAny>)>,
    inputs: Vec<(PyBackedStr, Option<Bound<'_, PyAny>>)>,
) -> PyResult<()> {
    let given = inputs.iter().filter_map(|(name, array)| array.as_ref().map(|array| (name, array)));
    let inputs: Vec<_> = given.map(|(name, array)| Array::of(known(name), array)).collect::<PyResult<_>>()?;
    let outputs: Vec<_> =
        outputs.iter().map(|(name, array)| Array::target(known(name), array)).collect::<PyResult<_>>()?;
    let of_outputs: Vec<_> = outputs.iter().collect();
    let of_inputs: Vec<_> = inputs.iter().map(Some).collect();
    Apart::check(&of_outputs, &of_inputs)?;
    let all: Vec<_> = of_outputs.into_iter().map(Some).chain(of_inputs).collect();
    Array::common_device(&all).map(drop)
}

/// The name of an argument, as arrays keep it.
fn known(name: &str) -> &'static str {
    const NAMES: [&str; 13] = [
        "expert_map",
        "expert_num_tokens",
        "expert_start_loc",
        "inv_perm",
        "m_indices",
        "out",
        "output_index",
        "rows",
        "scales",
        "topk_ids",
        "topk_weights",
        "x",
        "x_scales",
    ];
    NAMES.into_iter().find(|known| *known == name).unwrap_or("an array")
}

fn place(device: Option<usize>) -> String {
    device.map_or_else(|| "the CPU".into(), |ordinal| format!("cuda:{ordinal}"))
}

/// Elements from the first to the last in memory.
fn covered(shape: &[usize], strides: &[isize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0usize;
    for (&size, &stride) in shape.iter().zip(strides).filter(|&(&size, _)| size > 1) {
        last = last.checked_add((size - 1).checked_mul(usize::try_from(stride).ok()?)?)?;
    }
    last.checked_add(1)
}

/// The integers of a tuple; quicker than going through the sequence protocol.
fn dims<'py, N: FromPyObjectOwned<'py, Error = PyErr> + Copy + Default>(
    tuple: &Bound<'py, PyAny>,
) -> PyResult<Dims<N>> {
    tuple.cast::<PyTuple>()?.iter().map(|number| number.extract()).collect()
}

/// torch's dtypes are objects that live as long as torch: they are told apart by address.
fn torch_dtypes(py: Python<'_>) -> PyResult<&'static [(Py<PyAny>, Element)]> {
    static DTYPES: PyOnceLock<Vec<(Py<PyAny>, Element)>> = PyOnceLock::new();
    let known = DTYPES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let known = Element::NAMED.iter().map(|&(name, element)| Ok((torch.getattr(name)?.unbind(), element)));
        known.collect::<PyResult<_>>()
    })?;
    Ok(known)
}

fn torch_element(dtype: &Bound<'_, PyAny>) -> PyResult<Element> {
    let known = torch_dtypes(dtype.py())?;
    Ok(known.iter().find(|(known, _)| known.is(dtype)).map_or(Element::Other, |&(_, element)| element))
}

/// torch's dtype for an element.
pub(crate) fn torch_dtype(py: Python<'_>, element: Element) -> PyResult<Bound<'_, PyAny>> {
    let known = torch_dtypes(py)?.iter().find(|&&(_, known)| known == element);
    let (dtype, _) = known.ok_or_else(|| PyTypeError::new_err("no dtype of torch stands for the elements"))?;
    Ok(dtype.bind(py).clone())
}
