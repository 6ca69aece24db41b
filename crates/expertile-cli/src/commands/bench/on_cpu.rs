//! What `bench layer` and `bench steps` share on the CPU: runs of a call with copies in between, and their report.

use super::memcpy::Memcpy;
use crate::commands::options::SizeOptions;
use crate::error::Result;
use crate::machine::Limits;
use crate::report::plot::SizeTimes;
use crate::report::stages::{StageReport, StageTime, explain_shares, medians, whole};
use crate::report::{format, plot};
use crate::{output, preset};
use expertile::LayerShape;
use expertile::cpu::Cpu;
use serde::Serialize;
use std::fmt::Write;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) source: String,
    isa: &'static str,
    threads: usize,
    hidden: usize,
    intermediate: usize,
    /// On this device.
    experts: usize,
    global_experts: usize,
    topk: usize,
    weights: &'static str,
    activations: &'static str,
    /// Of the packed weights; absent where no GEMM is timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_bytes: Option<usize>,
    repeat: usize,
    limits: Limits,
    pub(super) sizes: Vec<Size>,
}

/// The stages at one number of tokens.
#[derive(Debug, Serialize)]
pub(super) struct Size {
    tokens: usize,
    live_rows: usize,
    active_experts: usize,
    stages: Vec<Row>,
    total: StageReport,
    /// The least that the whole can take on this machine.
    least_seconds: f64,
}

/// A stage, and for those that only move rows a copy of the same bytes.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    report: StageReport,
    memcpy_seconds: Option<f64>,
    /// The copy's time over the stage's.
    share_of_memcpy: Option<f64>,
}

/// What a report says of a layer, beside its sizes.
pub(super) struct Subject<'a> {
    pub(super) cpu: &'a Cpu,
    pub(super) preset: preset::Preset,
    pub(super) shape: LayerShape,
    pub(super) global_experts: usize,
    /// Names of what weights and activations are made of.
    pub(super) formats: [&'static str; 2],
    pub(super) weight_bytes: Option<usize>,
}

impl Report {
    pub(super) fn new(subject: &Subject<'_>, repeat: usize, limits: Limits, sizes: Vec<Size>) -> Self {
        let Subject { cpu, preset, shape, global_experts, formats: [weights, activations], weight_bytes } = *subject;
        Self {
            source: preset.name(),
            isa: cpu.isa().name(),
            threads: cpu.threads(),
            hidden: shape.hidden(),
            intermediate: shape.intermediate(),
            experts: shape.local_experts(),
            global_experts,
            topk: preset.topk(),
            weights,
            activations,
            weight_bytes,
            repeat,
            limits,
            sizes,
        }
    }

    fn title(&self) -> String {
        let experts = format::experts(self.experts, self.global_experts);
        format!(
            "{}: {experts}, {} each, {} weights, {} activations, {} threads of {}",
            self.source, self.topk, self.weights, self.activations, self.threads, self.isa
        )
    }

    pub(super) fn text(&self) -> String {
        let mut text = self.title();
        let _ = writeln!(
            text,
            "\nmemory reads {}, copies {}; gemm in cache {}; medians of {} runs",
            format::bytes_per_second(self.limits.bandwidth.read_bytes_per_second),
            format::bytes_per_second(self.limits.bandwidth.copy_bytes_per_second),
            format::flops_per_second(self.limits.gemm_flops_per_second),
            self.repeat
        );
        let mut rows = Vec::new();
        for size in &self.sizes {
            for stage in &size.stages {
                let memcpy = stage.share_of_memcpy.map_or_else(|| "-".into(), format::percent);
                rows.push(table_row(size.tokens, &stage.report, memcpy));
            }
            rows.push(table_row(size.tokens, &size.total, "-".into()));
        }
        let header = [&["tokens"], &StageReport::HEADER[..], &["of memcpy"]].concat();
        text.push_str(&format::table(&header, 2, &rows));
        let stages = || self.sizes.iter().flat_map(|size| &size.stages);
        let shares = stages().flat_map(|stage| [Some(stage.report.share), stage.share_of_memcpy]);
        let totals = self.sizes.iter().map(|size| size.total.share);
        text.push_str(explain_shares(shares.flatten().chain(totals)));
        text
    }

    /// Writes the picture, if one is asked for.
    pub(super) fn draw(&self, args: &SizeOptions, what: &str) -> Result<()> {
        let Some(file) = &args.plot else { return Ok(()) };
        let sizes: Vec<SizeTimes> = self.sizes.iter().map(Size::times).collect();
        output::write_file(file, plot::time_by_size(what, &self.title(), &sizes).as_bytes())
    }
}

impl Size {
    /// Runs once to warm up and then `repeat` times, a copy after each run.
    pub(super) fn measure(
        routing: &expertile::Routing<'_>,
        limits: &Limits,
        repeat: usize,
        mut time_once: impl FnMut() -> Result<Vec<StageTime>>,
    ) -> Result<Self> {
        let mut copies = time_once()?.iter().filter_map(Memcpy::new).collect::<Result<Vec<_>>>()?;
        copies.iter_mut().for_each(Memcpy::run);
        copies.iter_mut().for_each(Memcpy::clear);
        let mut runs = Vec::new();
        for _ in 0..repeat {
            runs.push(time_once()?);
            copies.iter_mut().for_each(Memcpy::run);
        }
        let times = medians(&runs);
        let row = |time: &StageTime| {
            let memcpy_seconds = copies.iter().find_map(|copy| copy.seconds_of(time.stage));
            let share_of_memcpy = memcpy_seconds.map(|seconds| seconds / time.seconds.max(1e-12));
            Row { report: StageReport::new(time, limits), memcpy_seconds, share_of_memcpy }
        };
        Ok(Self {
            tokens: routing.tokens(),
            live_rows: routing.slots().flatten().count(),
            active_experts: routing.active_experts(),
            stages: times.iter().map(row).collect(),
            total: whole(&times, limits),
            least_seconds: times.iter().map(|time| limits.least_seconds(time.stage, time.cost).0).sum(),
        })
    }

    fn times(&self) -> SizeTimes {
        SizeTimes {
            tokens: self.tokens,
            seconds: self.total.seconds,
            least_seconds: self.least_seconds,
            parts: self.stages.iter().map(|stage| (stage.report.stage, stage.report.seconds)).collect(),
        }
    }
}

fn table_row(tokens: usize, report: &StageReport, of_memcpy: String) -> Vec<String> {
    let mut row = vec![tokens.to_string()];
    row.extend(report.row());
    row.push(of_memcpy);
    row
}
