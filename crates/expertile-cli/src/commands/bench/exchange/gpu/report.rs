//! What the ranks measured, as JSON and as a table.

use super::Rank;
use crate::device::Gpu;
use crate::error::Result;
use crate::preset::RoutingName;
use crate::report::format;
use crate::weights::ExpertWeights;
use expertile::cuda::ExpertParallelLayer;
use expertile::cuda::measure::ExpertParallelTimes;
use expertile::expert_parallel::Traffic;
use expertile::{Combine, Dispatch};
use serde::Serialize;
use std::fmt::Write;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    source: String,
    #[serde(flatten)]
    gpu: Gpu,
    ranks: usize,
    nccl: Option<String>,
    placement: String,
    weights: &'static str,
    activations: &'static str,
    link_bytes_per_second: f64,
    repeats: Option<usize>,
    window_bytes: Vec<(String, usize)>,
    sizes: Vec<Size>,
}

/// One way, for one number of tokens. Times are the slowest rank's.
#[derive(Debug, Serialize)]
pub(super) struct Size {
    routing: &'static str,
    tokens_per_rank: usize,
    link: &'static str,
    dispatch: &'static str,
    combine: &'static str,
    /// Null for calls that cannot be captured.
    graph_seconds: Option<f64>,
    eager_seconds: f64,
    /// The layer of a rank's own experts over all ranks' tokens, which are there.
    local_graph_seconds: f64,
    local_eager_seconds: f64,
    /// Dispatch and combine alone; and dispatch.
    exchange_seconds: f64,
    dispatch_seconds: f64,
    /// Bytes that have to leave the rank that sends most.
    bytes_out: usize,
    /// What the exchange adds to the local layer: inside a graph, or launched from the host.
    added_seconds: f64,
    /// Of the link, those bytes in what the exchange adds to the local layer.
    share_of_link: f64,
    launches: usize,
    workspace_bytes: usize,
    /// Values that differ from one rank's (`sums`: by more than rounding), of all ranks.
    different_values: Option<u64>,
    /// Runs that differ from the first, of all ranks.
    different_runs: Option<u64>,
}

impl Size {
    pub(super) fn new(
        (routing, tokens): (RoutingName, usize),
        layer: &ExpertParallelLayer,
        traffic: &Traffic,
        times: ExpertParallelTimes,
        link_bytes_per_second: f64,
        same: Option<[u64; 2]>,
    ) -> Result<Self> {
        let choice = layer.choice(tokens)?;
        let (dispatch, combine) = (choice.parallel.dispatch, choice.parallel.combine);
        let ranks = traffic.ranks();
        let bytes_out = |rank: usize| {
            let others = (0..ranks).filter(|&to| to != rank);
            let bytes = others.map(|to| {
                traffic.dispatched(dispatch, rank, to) * choice.token_row.bytes()
                    + traffic.combined(combine, Dispatch::Routed, rank, to) * choice.parallel.combine_row_bytes
            });
            bytes.sum::<usize>()
        };
        let bytes_out = (0..ranks).map(bytes_out).max().unwrap_or(0);
        let added_eager = times.eager_seconds - times.local_eager_seconds;
        let added_seconds = times.graph_seconds.map_or(added_eager, |seconds| seconds - times.local_graph_seconds);
        Ok(Self {
            routing: routing.name(),
            tokens_per_rank: tokens,
            link: layer.link().name(),
            dispatch: dispatch.name(),
            combine: combine.name(),
            graph_seconds: times.graph_seconds,
            eager_seconds: times.eager_seconds,
            local_graph_seconds: times.local_graph_seconds,
            local_eager_seconds: times.local_eager_seconds,
            exchange_seconds: times.exchange_seconds,
            dispatch_seconds: times.dispatch_seconds,
            bytes_out,
            added_seconds,
            share_of_link: bytes_out as f64 / link_bytes_per_second / added_seconds,
            launches: choice.launches,
            workspace_bytes: choice.workspace_bytes,
            different_values: same.map(|[values, _]| values),
            different_runs: same.map(|[_, runs]| runs),
        })
    }

    fn row(&self) -> Vec<String> {
        let microseconds = |seconds: f64| format!("{:.1}", seconds * 1e6);
        let count = |number: Option<u64>| number.map_or("-".into(), |number| number.to_string());
        vec![
            self.routing.into(),
            self.tokens_per_rank.to_string(),
            self.link.into(),
            self.dispatch.into(),
            self.combine.into(),
            self.graph_seconds.map_or("-".into(), microseconds),
            microseconds(self.local_graph_seconds),
            microseconds(self.added_seconds),
            format!("{:.0} %", self.share_of_link * 100.0),
            microseconds(self.exchange_seconds),
            microseconds(self.dispatch_seconds),
            microseconds(self.eager_seconds),
            microseconds(self.eager_seconds - self.local_eager_seconds),
            self.launches.to_string(),
            count(self.different_values),
            count(self.different_runs),
        ]
    }
}

const HEADER: [&str; 16] = [
    "routing",
    "tokens",
    "link",
    "dispatch",
    "combine",
    "call",
    "local",
    "added",
    "of link",
    "alone",
    "dispatch alone",
    "eager",
    "added",
    "launches",
    "values off",
    "runs off",
];

impl Report {
    pub(super) fn new(rank: &Rank<'_>, layers: &[ExpertParallelLayer], sizes: Vec<Size>) -> Self {
        let name = |layer: &ExpertParallelLayer| {
            let (link, combine) = (layer.link().name(), layer.parallel().combine);
            let window = layer.choice(layer.max_tokens()).map_or(0, |choice| choice.window_bytes);
            (format!("{link}, {combine}"), window)
        };
        let mut window_bytes: Vec<_> = layers.iter().map(name).collect();
        window_bytes.dedup();
        Self {
            source: rank.args.preset.name(),
            gpu: rank.device.info().into(),
            ranks: rank.exchange.ranks(),
            nccl: rank.nccl.iter().flatten().next().map(|nccl| nccl.version()),
            placement: layers.first().map_or(String::new(), |layer| layer.parallel().placement.to_string()),
            weights: rank.made_up.format().name(),
            activations: rank.config.activation_format.name(),
            link_bytes_per_second: rank.args.gpus.link_bytes_per_second(),
            repeats: rank.args.gpus.same,
            window_bytes,
            sizes,
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "{}: {}; {} weights, {} activations\n{}, one of {} ranks; NCCL {}\n",
            self.source,
            self.placement,
            self.weights,
            self.activations,
            self.gpu,
            self.ranks,
            self.nccl.as_deref().unwrap_or("not used"),
        );
        let rows: Vec<_> = self.sizes.iter().map(Size::row).collect();
        text.push_str(&format::table(&HEADER, 2, &rows));
        for (name, bytes) in &self.window_bytes {
            let _ = writeln!(text, "window, {name}: {}", format::bytes(*bytes as u64));
        }
        text.push_str(
            "times in us, the slowest rank's, inside a graph but for eager, and for calls that cannot be captured; added: \
             beyond the local layer over all ranks' tokens\n",
        );
        let link = format::bytes_per_second(self.link_bytes_per_second);
        let _ = writeln!(text, "of link: bytes that have to leave a rank, at {link}, in the time added");
        if self.sizes.iter().any(|size| size.combine == Combine::Sums.name()) {
            text.push_str("values off: of sums, those that differ by more than rounding\n");
        }
        text
    }
}
