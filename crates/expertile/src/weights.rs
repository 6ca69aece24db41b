//! Weights that come in parts: which rows have come, for the builders of every backend.

use crate::error::{Error, Result};
use crate::gemm::WeightFormat;

/// Which rows of `[E, N, K]` have come.
#[derive(Debug)]
pub(crate) struct RowLedger {
    format: WeightFormat,
    n: usize,
    k: usize,
    /// `[E, N]`
    added: Vec<bool>,
}

impl RowLedger {
    /// No row of `[added.len() / n, n, k]`; `added` is all false.
    pub(crate) fn new(format: WeightFormat, n: usize, k: usize, added: Vec<bool>) -> Self {
        Self { format, n, k, added }
    }

    /// `E * N`
    pub(crate) fn rows(&self) -> usize {
        self.added.len()
    }

    pub(crate) fn require_format(&self, given: WeightFormat) -> Result<()> {
        if self.format != given {
            let (actual, expected) = (self.format.name(), given.name());
            return Err(Error::WeightFormat { argument: "builder", actual, expected });
        }
        Ok(())
    }

    /// Notes that `[rows, cols]` come now, as rows from `first_row` on of an expert; fails before noting anything.
    pub(crate) fn add(&mut self, expert: usize, first_row: usize, rows: usize, cols: usize) -> Result<()> {
        let Self { n, k, .. } = *self;
        let experts = self.added.len() / n;
        if expert >= experts {
            return Err(Error::value("expert", expert, format!("below {experts}")));
        }
        let room = n.saturating_sub(first_row);
        if cols != k || first_row > n || rows > room {
            return Err(Error::shape("rows", &[rows, cols], format!("[R, {k}] with R at most {room}")));
        }
        let part = &mut self.added[expert * n + first_row..][..rows];
        if let Some(row) = part.iter().position(|&added| added) {
            let actual = (first_row + row) as i64;
            let expected = "a row that was not added before".into();
            return Err(Error::Count { argument: "added_rows", expert, actual, expected });
        }
        part.fill(true);
        Ok(())
    }

    /// Fails unless every row of every expert has come.
    pub(crate) fn finish(&self) -> Result<()> {
        for (expert, added) in self.added.chunks_exact(self.n).enumerate() {
            let count = added.iter().filter(|&&added| added).count();
            if count != self.n {
                let expected = format!("{}: every row of every expert", self.n);
                return Err(Error::Count { argument: "added_rows", expert, actual: count as i64, expected });
            }
        }
        Ok(())
    }
}
