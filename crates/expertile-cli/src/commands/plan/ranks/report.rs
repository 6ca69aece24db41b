//! What `expertile plan --ranks` reports.

use super::model::{BF16_FLOPS_PER_SECOND, E4M3_FLOPS_PER_SECOND, Link, Links, READ_BYTES_PER_SECOND, Way};
use crate::report::format;
use expertile::Placement;
use serde::Serialize;
use std::fmt::Write;

/// One placement, and what it makes of the ids.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) placement: String,
    pub(super) copies: usize,
    pub(super) rows_mean: f64,
    pub(super) rows_most: u64,
    /// Most over mean; null without rows.
    pub(super) imbalance: Option<f64>,
    pub(super) dispatch: Way,
    pub(super) combine: Way,
    /// The local experts: of the mean rank, and of the slowest, which all wait for.
    pub(super) experts_mean_seconds: f64,
    pub(super) experts_most_seconds: f64,
    pub(super) total_seconds: f64,
    /// Of the rank with most.
    pub(super) weight_bytes: u64,
    /// The most tokens of a rank for which memory is enough whatever the routing, and for rows as they are here.
    pub(super) capacity_worst: usize,
    pub(super) capacity_expected: usize,
    /// `[R]`
    pub(super) rows: Vec<u64>,
    #[serde(skip)]
    pub(super) placed: Placement,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) ranks: usize,
    pub(super) tokens_per_rank: usize,
    pub(super) topk: usize,
    pub(super) experts: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) activations: &'static str,
    pub(super) ids: &'static str,
    pub(super) choice: String,
    pub(super) links: Links,
    pub(super) token_row_bytes: usize,
    pub(super) combine_row_bytes: usize,
    /// Every way for the first placement: name, bytes that the busiest rank sends, seconds.
    pub(super) ways: Vec<(String, u64, f64)>,
    pub(super) placements: Vec<Row>,
}

impl Report {
    pub(super) fn text(&self) -> String {
        let mut text = format!(
            "{} ranks of {} tokens, {} of {} experts each (ids {}), H {}, I {}, {} activations\n",
            self.ranks,
            self.tokens_per_rank,
            self.topk,
            self.experts,
            self.ids,
            self.hidden,
            self.intermediate,
            self.activations
        );
        let _ = writeln!(text, "{}", self.choice);
        let header = [
            "placement",
            "rows, mean",
            "most",
            "most / mean",
            "dispatch out",
            "in",
            "time",
            "experts, mean",
            "slowest",
            "combine out",
            "in",
            "time",
            "total",
            "weights",
            "fit, worst",
            "fit, here",
        ];
        let rows: Vec<Vec<String>> = self.placements.iter().map(Row::cells).collect();
        text.push_str(&format::table(&header, 1, &rows));
        text.push_str(
            "fit: the most tokens of a rank that memory is enough for, at the worst routing and at rows as here\n",
        );
        let ways = self
            .ways
            .iter()
            .map(|(name, bytes, seconds)| vec![name.clone(), format::bytes(*bytes), format::seconds(*seconds)]);
        text.push_str(&format::table(&["way, first placement", "most sent", "time"], 1, &ways.collect::<Vec<_>>()));
        let Links { link, ranks_per_host, bytes_per_second, between_hosts_bytes_per_second, latency_seconds } =
            self.links;
        let _ = writeln!(
            text,
            "modelled, of one layer, {}: {} each way within {ranks_per_host} ranks, {} between hosts, {} a call; experts at an \
             H200's {} and {} (bf16: {})",
            if link == Link::Mapped { "mapped" } else { "NCCL" },
            format::bytes_per_second(bytes_per_second),
            format::bytes_per_second(between_hosts_bytes_per_second),
            format::seconds(latency_seconds),
            format::bytes_per_second(READ_BYTES_PER_SECOND),
            format::flops_per_second(E4M3_FLOPS_PER_SECOND),
            format::flops_per_second(BF16_FLOPS_PER_SECOND),
        );
        text
    }
}

impl Row {
    fn cells(&self) -> Vec<String> {
        let imbalance = self.imbalance.map_or_else(|| "-".into(), |imbalance| format!("{imbalance:.2}"));
        vec![
            self.placement.clone(),
            format!("{:.1}", self.rows_mean),
            self.rows_most.to_string(),
            imbalance,
            format::bytes(self.dispatch.most_sent_bytes),
            format::bytes(self.dispatch.most_received_bytes),
            format::seconds(self.dispatch.seconds),
            format::seconds(self.experts_mean_seconds),
            format::seconds(self.experts_most_seconds),
            format::bytes(self.combine.most_sent_bytes),
            format::bytes(self.combine.most_received_bytes),
            format::seconds(self.combine.seconds),
            format::seconds(self.total_seconds),
            format::bytes(self.weight_bytes),
            self.capacity_worst.to_string(),
            self.capacity_expected.to_string(),
        ]
    }
}
