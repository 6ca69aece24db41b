//! An array's memory as slices and matrices, and copies of what says where to read or write next.

use super::{Apart, Array, Native, place};
use crate::error::{Wrong, exception};
use crate::limits;
use expertile::MatrixRef;
use pyo3::prelude::*;
use std::ops::Range;

impl Array<'_> {
    /// Fails unless the array is made of `T`.
    pub(crate) fn require_dtype<T: Native>(&self) -> PyResult<()> {
        if !T::is(self.element) || size_of::<T>() != self.item_bytes {
            return Err(self.dtype_error(std::any::type_name::<T>().rsplit("::").next().unwrap_or("another")));
        }
        Ok(())
    }

    /// Checks that a slice of `T` may stand where the array does, and says how long it is.
    pub(super) fn check<T: Native>(&self) -> PyResult<usize> {
        self.require_dtype::<T>()?;
        if !self.pointer.is_multiple_of(align_of::<T>()) {
            return Err(self.address_error(align_of::<T>()));
        }
        self.span()
    }

    fn check_on_cpu<T: Native>(&self) -> PyResult<usize> {
        if self.device.is_some() {
            let actual = place(self.device);
            return Err(Wrong::new(self.argument, format_args!("is on {actual}"), &actual[..], "the CPU").value());
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
        // SAFETY: the owner, which `self` holds, says that elements of this type (plain data, any bits are a value)
        // are at these strides from this pointer; `check` found the pointer aligned and the last element at `len -
        // 1`. That nobody else writes there meanwhile is what `Apart` checks within a call; another thread that writes
        // a tensor while it is being read is a race in the caller, as with torch's own functions.
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

    /// A matrix with any (not negative) strides.
    pub(crate) fn matrix<T: Native>(&self) -> PyResult<MatrixRef<'_, T>> {
        let (rows, cols) = self.matrix_shape("two dimensions")?;
        let memory = self.memory()?;
        let stride = |dimension: usize| usize::try_from(self.strides[dimension]).unwrap_or(0);
        MatrixRef::with_strides(memory, rows, cols, stride(0), stride(1)).map_err(exception)
    }

    /// The rows `rows` of a matrix with any (not negative) strides.
    pub(crate) fn matrix_rows<T: Native>(&self, rows: Range<usize>) -> PyResult<MatrixRef<'_, T>> {
        let (all, cols) = self.matrix_shape("two dimensions")?;
        let memory = self.memory()?;
        let stride = |dimension: usize| usize::try_from(self.strides[dimension]).unwrap_or(0);
        let (start, rows) = (rows.start.min(all), rows.end.min(all).saturating_sub(rows.start));
        let memory = if rows == 0 || cols == 0 { &[] } else { &memory[start * stride(0)..] };
        MatrixRef::with_strides(memory, rows, cols, stride(0), stride(1)).map_err(exception)
    }

    /// The memory of a stack of matrices with any (not negative) strides, and the strides.
    pub(crate) fn stack<T: Native>(&self) -> PyResult<(&[T], [usize; 3])> {
        let &[_, _, _] = self.shape() else { return Err(self.shape_error("three dimensions")) };
        let memory = self.memory()?;
        Ok((memory, [0, 1, 2].map(|dimension| usize::try_from(self.strides[dimension]).unwrap_or(0))))
    }

    /// A copy of some rows of a matrix. Each element is read once: another thread may write it at any time, and what
    /// was checked has to be what is used.
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
