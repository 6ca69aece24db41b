//! The strided view through which rows, ids and weights come in.

use crate::error::{Error, Result, checked_add, checked_mul, require_len};

/// A borrowed matrix `[rows, cols]` with any strides (in elements), checked once against its slice.
#[derive(Debug, Clone, Copy)]
pub struct MatrixRef<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Copy> MatrixRef<'a, T> {
    /// A contiguous row-major matrix over the start of `data`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if `data` holds fewer than `rows * cols` elements, [`Error::Overflow`] if that product
    /// does not fit.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        require_len("data", data.len(), checked_mul("rows * cols", rows, cols)?)?;
        Ok(Self { data, rows, cols, row_stride: cols, col_stride: 1 })
    }

    /// A matrix whose element `[r, c]` is `data[r * row_stride + c * col_stride]`.
    ///
    /// # Errors
    /// [`Error::Stride`] if the last element lies outside `data`, [`Error::Overflow`] if its offset does not fit.
    pub fn with_strides(data: &'a [T], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Result<Self> {
        if rows > 0 && cols > 0 {
            let last = checked_add(
                "offset of the last element",
                checked_mul("(rows - 1) * row_stride", rows - 1, row_stride)?,
                checked_mul("(cols - 1) * col_stride", cols - 1, col_stride)?,
            )?;
            if last >= data.len() {
                return Err(Error::Stride {
                    argument: "data",
                    actual: vec![row_stride, col_stride],
                    expected: format!("the last element of [{rows}, {cols}] within {} elements", data.len()),
                });
            }
        }
        Ok(Self { data, rows, cols, row_stride, col_stride })
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The element at `[row, col]`; panics outside the matrix.
    #[must_use]
    #[inline]
    pub fn get(&self, row: usize, col: usize) -> T {
        assert!(row < self.rows && col < self.cols);
        self.data[row * self.row_stride + col * self.col_stride]
    }

    /// A row as a slice, if its elements stand next to each other; panics outside the matrix.
    #[must_use]
    #[inline]
    pub fn row(&self, row: usize) -> Option<&'a [T]> {
        assert!(row < self.rows);
        if self.cols == 0 {
            return Some(&[]);
        }
        self.is_row_contiguous().then(|| &self.data[row * self.row_stride..][..self.cols])
    }

    /// Whether the elements of a row stand next to each other, so that [`MatrixRef::row`] gives slices.
    #[must_use]
    pub fn is_row_contiguous(&self) -> bool {
        self.col_stride == 1 || self.cols <= 1
    }

    /// Rows `first`, `first + step` and so on, `count` of them; panics outside the matrix.
    pub(crate) fn every(&self, first: usize, step: usize, count: usize) -> Self {
        if count == 0 || self.cols == 0 {
            return Self { data: &[], rows: count, ..*self };
        }
        assert!(first + (count - 1) * step < self.rows);
        let data = &self.data[first * self.row_stride..];
        Self { data, rows: count, row_stride: step * self.row_stride, ..*self }
    }

    /// All elements as one slice, if there are no gaps.
    #[cfg(feature = "cuda")]
    pub(crate) fn contiguous(&self) -> Option<&'a [T]> {
        let contiguous = self.is_row_contiguous() && (self.row_stride == self.cols || self.rows <= 1);
        contiguous.then(|| &self.data[..self.rows * self.cols])
    }

    pub(crate) fn require_shape(&self, argument: &'static str, rows: usize, cols: usize) -> Result<()> {
        if (self.rows, self.cols) != (rows, cols) {
            return Err(Error::shape(argument, &[self.rows, self.cols], format!("[{rows}, {cols}]")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_past_the_slice_are_an_error() {
        let data = [0f32; 10];
        assert!(MatrixRef::with_strides(&data, 2, 3, 7, 1).is_ok());
        let error = MatrixRef::with_strides(&data, 2, 3, 8, 1).unwrap_err();
        assert!(matches!(error, Error::Stride { .. }), "{error}");
        assert!(matches!(MatrixRef::new(&data, usize::MAX, 2).unwrap_err(), Error::Overflow { .. }));
        assert!(matches!(MatrixRef::new(&data, 3, 4).unwrap_err(), Error::BufferTooSmall { .. }));
    }
}
