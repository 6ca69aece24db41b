//! Rows that came in their places: which of them belong to which expert.

use crate::error::{Error, Result};
use crate::plan::round_up;
use crate::routing::require_experts;
use std::ops::Range;

/// Which rows of a buffer belong to which expert, where somebody else has put them: read from a list, checked once.
#[derive(Debug, Clone, Copy)]
pub struct Segments<'a> {
    list: List<'a>,
    local_experts: usize,
    m_sum: usize,
    live_rows: usize,
}

#[derive(Debug, Clone, Copy)]
enum List<'a> {
    Psum { psum: &'a [i32], alignment: usize },
    MIndices(&'a [i32]),
}

impl<'a> Segments<'a> {
    /// From `psum [E]`, the end of each expert's rows in a buffer of `m_sum` rows. An expert's rows start where the end
    /// before, rounded up to the alignment, is; an expert without rows stores its start.
    ///
    /// # Errors
    /// [`Error::Alignment`] if `alignment` is zero, [`Error::Value`] if there are no experts, [`Error::Count`] if an end
    /// lies before its segment's start or past `m_sum`, [`Error::Overflow`].
    pub fn from_psum(psum: &'a [i32], alignment: usize, m_sum: usize) -> Result<Self> {
        require_experts(psum.len())?;
        let mut live_rows = 0;
        let mut previous_end = 0;
        for (expert, &end) in psum.iter().enumerate() {
            let rows = rows_of_expert(expert, end, previous_end, alignment)?;
            if rows.end > m_sum && !rows.is_empty() {
                let (actual, expected) = (i64::from(end), format!("at most {m_sum}, the number of rows"));
                return Err(Error::Count { argument: "psum", expert, actual, expected });
            }
            live_rows += rows.len();
            previous_end = rows.end;
        }
        Ok(Self { list: List::Psum { psum, alignment }, local_experts: psum.len(), m_sum, live_rows })
    }

    /// From `m_indices [M_sum]`, the expert of each row, negative on padding. An expert may have any number of segments,
    /// in any order.
    ///
    /// # Errors
    /// [`Error::Value`] if there are no experts, [`Error::RowExpert`] for an id that is no expert's.
    pub fn from_m_indices(m_indices: &'a [i32], local_experts: usize) -> Result<Self> {
        require_experts(local_experts)?;
        let mut live_rows = 0;
        for (row, &id) in m_indices.iter().enumerate() {
            if usize::try_from(id).is_ok_and(|expert| expert >= local_experts) {
                return Err(Error::RowExpert { row, id, local_experts });
            }
            live_rows += usize::from(id >= 0);
        }
        Ok(Self { list: List::MIndices(m_indices), local_experts, m_sum: m_indices.len(), live_rows })
    }

    /// `E`.
    #[must_use]
    pub fn local_experts(&self) -> usize {
        self.local_experts
    }

    /// Rows of the buffer.
    #[must_use]
    pub fn m_sum(&self) -> usize {
        self.m_sum
    }

    /// Rows that are an expert's.
    #[must_use]
    pub fn live_rows(&self) -> usize {
        self.live_rows
    }

    /// Experts and their rows, in the order of the rows; each has one or more.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<'a> {
        let (psum, alignment, m_indices) = match self.list {
            List::Psum { psum, alignment } => (psum, alignment, &[][..]),
            List::MIndices(m_indices) => (&[][..], 1, m_indices),
        };
        let of_psum = psum.iter().enumerate().scan(0usize, move |previous_end, (expert, &end)| {
            let start = previous_end.next_multiple_of(alignment);
            *previous_end = end as usize;
            Some((expert, start..end as usize))
        });
        let mut next = 0;
        let of_m_indices = m_indices.chunk_by(|a, b| a == b).filter_map(move |rows| {
            let start = next;
            next += rows.len();
            usize::try_from(rows[0]).ok().map(|expert| (expert, start..next))
        });
        of_psum.filter(|(_, rows)| !rows.is_empty()).chain(of_m_indices)
    }
}

/// An expert's rows in a `psum`.
pub(super) fn rows_of_expert(expert: usize, end: i32, previous_end: usize, alignment: usize) -> Result<Range<usize>> {
    let start = round_up(previous_end, alignment)?;
    let end_row = usize::try_from(end).ok().filter(|&end| end >= start).ok_or_else(|| Error::Count {
        argument: "psum",
        expert,
        actual: i64::from(end),
        expected: format!("at least {start}, the start of the expert's segment"),
    })?;
    Ok(start..end_row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lists_give_the_same_segments() {
        let psum = Segments::from_psum(&[3, 4, 6], 4, 9).unwrap();
        let m_indices = [0, 0, 0, -1, 2, 2, -1, -1, -1];
        let rows = Segments::from_m_indices(&m_indices, 3).unwrap();
        for segments in [&psum, &rows] {
            assert_eq!(segments.iter().collect::<Vec<_>>(), [(0, 0..3), (2, 4..6)]);
            assert_eq!((segments.live_rows(), segments.m_sum(), segments.local_experts()), (5, 9, 3));
        }
    }

    #[test]
    fn an_expert_may_have_several_segments_in_any_order() {
        let m_indices = [2, 2, -7, 2, 0, 1, 1, 0];
        let segments = Segments::from_m_indices(&m_indices, 3).unwrap();
        assert_eq!(segments.live_rows(), 7);
        let found: Vec<_> = segments.iter().collect();
        assert_eq!(found, [(2, 0..2), (2, 3..4), (0, 4..5), (1, 5..7), (0, 7..8)]);
    }

    #[test]
    fn an_empty_expert_may_start_past_the_last_row() {
        let segments = Segments::from_psum(&[10, 16, 16], 8, 10).unwrap();
        assert_eq!(segments.iter().collect::<Vec<_>>(), [(0, 0..10)]);
    }

    #[test]
    fn lists_that_cannot_be_are_errors() {
        for (psum, alignment, start) in [
            (&[5, 7][..], 8, "psum[1] is 7, expected at least 8"),
            (&[-1], 8, "psum[0] is -1, expected at least 0"),
            (&[4, 17], 8, "psum[1] is 17, expected at most 16"),
            (&[4], 0, "alignment is 0"),
            (&[], 8, "local_experts is 0"),
        ] {
            let error = Segments::from_psum(psum, alignment, 16).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
        let error = Segments::from_m_indices(&[0, -1, 3, 9], 3).unwrap_err();
        assert_eq!(error, Error::RowExpert { row: 2, id: 3, local_experts: 3 });
        let error = Segments::from_m_indices(&[], 0).unwrap_err().to_string();
        assert!(error.starts_with("local_experts is 0"), "{error}");
    }
}
