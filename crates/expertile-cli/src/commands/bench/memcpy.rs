//! Copies to compare stages with that move rows and do little else.

use crate::error::Result;
use crate::machine::parallel_copy;
use crate::memory;
use crate::report::stages::{StageTime, median};
use expertile::Stage;
use std::time::Instant;

/// A memcpy that moves as many bytes as a stage, half of them read and half written.
pub(super) struct Memcpy {
    stage: Stage,
    from: Vec<u64>,
    to: Vec<u64>,
    seconds: Vec<f64>,
}

impl Memcpy {
    /// For the stages that move rows and do little else.
    pub(super) fn new(time: &StageTime) -> Option<Result<Self>> {
        let stage = time.stage.filter(|stage| matches!(stage, Stage::Permute | Stage::Unpermute))?;
        let words = (time.cost.bytes as usize).div_ceil(2 * size_of::<u64>());
        let written = |value: u64| {
            let mut words = memory::zeroed("a copy to compare with", words)?;
            // A page of zeros that was never written is not memory.
            words.fill(value);
            Ok(words)
        };
        Some(written(1).and_then(|from| Ok(Self { stage, from, to: written(2)?, seconds: Vec::new() })))
    }

    pub(super) fn run(&mut self) {
        let started = Instant::now();
        parallel_copy(&self.from, &mut self.to);
        self.seconds.push(started.elapsed().as_secs_f64());
    }

    /// Forgets the runs so far.
    pub(super) fn clear(&mut self) {
        self.seconds.clear();
    }

    /// The median over its runs, if it belongs to that stage.
    pub(super) fn seconds_of(&self, stage: Option<Stage>) -> Option<f64> {
        (stage == Some(self.stage)).then(|| median(self.seconds.clone()))
    }
}
