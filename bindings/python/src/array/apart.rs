//! What has to be true of the memory of a call before its first byte is written.

use super::Array;
use crate::autograd;
use crate::error::Wrong;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use std::ops::Range;

/// The promise that what will be written overlaps nothing else; only [`Apart::check`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Apart(());

impl Apart {
    /// Everything that can be said about the memory of a call before its first byte is written.
    ///
    /// # Errors
    /// `ValueError` if one of `outputs` shares memory with another one or with one of `inputs`, or is part of a graph
    /// that torch differentiates, `RuntimeError` if a trace is watching.
    pub(crate) fn check(outputs: &[&Array<'_>], inputs: &[Option<&Array<'_>>]) -> PyResult<Self> {
        autograd::admit(outputs, inputs)?;
        for (index, output) in outputs.iter().enumerate() {
            let others = outputs[index + 1..].iter().copied().chain(inputs.iter().copied().flatten());
            let written = output.bytes()?;
            for other in others {
                let read = other.bytes()?;
                if written.start < read.end && read.start < written.end && !output.is_beside(other) {
                    let expected = "memory of its own";
                    let shared = Wrong::new(output.argument, "shares memory with", other.argument, expected);
                    return Err(shared.beside(other.argument).value());
                }
            }
        }
        Ok(Self(()))
    }
}

impl Array<'_> {
    /// Whether two elements may have the same place: exact for what slicing, transposing and expanding make.
    pub(super) fn overlaps_itself(&self) -> bool {
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
}

/// Fails unless arrays may be written as they are, by assignment: every one of `outputs` takes values, has memory of
/// its own for each element, and none that another one or one of `inputs` has; all in one place.
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
