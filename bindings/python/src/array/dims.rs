//! Sizes and strides.

use pyo3::conversion::FromPyObjectOwned;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::ops::Deref;

const FEW: usize = 2;

/// Sizes or strides. A few are kept in place: a call looks at many arrays, and none should cost an allocation.
#[derive(Debug)]
pub(super) struct Dims<N> {
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

/// Elements from the first to the last in memory.
pub(super) fn covered(shape: &[usize], strides: &[isize]) -> Option<usize> {
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
pub(super) fn dims<'py, N: FromPyObjectOwned<'py, Error = PyErr> + Copy + Default>(
    tuple: &Bound<'py, PyAny>,
) -> PyResult<Dims<N>> {
    tuple.cast::<PyTuple>()?.iter().map(|number| number.extract()).collect()
}
