//! A layer's stages: their times, and how these compare with what the machine can do.

use super::format;
use crate::machine::{Bound, Limits};
use expertile::{Stage, StageCost};
use serde::Serialize;

/// What a stage took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StageTime {
    /// `None` for the router, which is not the layer's own.
    pub(crate) stage: Option<Stage>,
    pub(crate) seconds: f64,
    pub(crate) cost: StageCost,
}

/// A stage's time beside the least it could be.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StageReport {
    pub(crate) stage: &'static str,
    pub(crate) seconds: f64,
    pub(crate) bytes: u64,
    pub(crate) flops: u64,
    /// What the stage cannot outrun.
    pub(crate) bound: Bound,
    /// The least time over the time taken; above 1 where caches hold what memory would have to bring.
    pub(crate) share: f64,
}

/// Stage by stage, the median over runs that all have the same stages.
pub(crate) fn medians(runs: &[Vec<StageTime>]) -> Vec<StageTime> {
    let stages = runs.first().map_or(&[][..], Vec::as_slice);
    let median_of = |(at, time): (usize, &StageTime)| {
        let seconds = median(runs.iter().map(|run| run[at].seconds).collect());
        StageTime { seconds, ..*time }
    };
    stages.iter().enumerate().map(median_of).collect()
}

/// The middle value (the mean of the two middle ones); 0 for an empty list.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        len => 0.5 * (values[(len - 1) / 2] + values[len / 2]),
    }
}

impl StageReport {
    pub(crate) fn new(time: &StageTime, limits: &Limits) -> Self {
        let (least, bound) = limits.least_seconds(time.stage, time.cost);
        Self {
            stage: time.stage.map_or("router", Stage::name),
            seconds: time.seconds,
            bytes: time.cost.bytes,
            flops: time.cost.flops,
            bound,
            share: if time.seconds > 0.0 { least / time.seconds } else { 0.0 },
        }
    }

    /// The same work in another time.
    pub(crate) fn taking(self, seconds: f64) -> Self {
        let share = if seconds > 0.0 { self.share * self.seconds / seconds } else { 0.0 };
        Self { seconds, share, ..self }
    }

    /// Cells for a table with [`StageReport::HEADER`].
    pub(crate) fn row(&self) -> Vec<String> {
        let rate = |amount: u64| amount as f64 / self.seconds.max(1e-12);
        let bound = match self.bound {
            Bound::Memory => "memory",
            Bound::Compute => "compute",
        };
        vec![
            self.stage.to_owned(),
            format::seconds(self.seconds),
            format::bytes(self.bytes),
            format::bytes_per_second(rate(self.bytes)),
            if self.flops == 0 { "-".into() } else { format::flops(self.flops) },
            if self.flops == 0 { "-".into() } else { format::flops_per_second(rate(self.flops)) },
            bound.to_owned(),
            format::percent(self.share),
        ]
    }

    /// Titles of [`StageReport::row`].
    pub(crate) const HEADER: [&'static str; 8] =
        ["stage", "time", "bytes", "rate", "FLOP", "rate", "limit", "of limit"];
}

/// A line that explains shares above 100 %, where there are any.
pub(crate) fn explain_shares(shares: impl IntoIterator<Item = f64>) -> &'static str {
    if shares.into_iter().any(|share| share > 1.0 && format::percent(share) != format::percent(1.0)) {
        "above 100 %: a cache held bytes that the limit takes to come from memory, or the machine was busy when the \
         limit was measured\n"
    } else {
        ""
    }
}

/// All stages as one: the whole layer.
pub(crate) fn whole(times: &[StageTime], limits: &Limits) -> StageReport {
    let least: f64 = times.iter().map(|time| limits.least_seconds(time.stage, time.cost).0).sum();
    let mut by_bound = [0.0; 2];
    for time in times {
        let (least, bound) = limits.least_seconds(time.stage, time.cost);
        by_bound[usize::from(bound == Bound::Compute)] += least;
    }
    let seconds: f64 = times.iter().map(|time| time.seconds).sum();
    StageReport {
        stage: "layer",
        seconds,
        bytes: times.iter().map(|time| time.cost.bytes).sum(),
        flops: times.iter().map(|time| time.cost.flops).sum(),
        bound: if by_bound[1] > by_bound[0] { Bound::Compute } else { Bound::Memory },
        share: if seconds > 0.0 { least / seconds } else { 0.0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn only_shares_that_are_printed_above_100_percent_are_explained() {
        assert_eq!(explain_shares([0.3, 1.0, 1.0004]), "");
        assert!(explain_shares([0.3, 1.0006]).starts_with("above 100 %: "));
    }
}
