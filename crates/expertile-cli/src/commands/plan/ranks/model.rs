//! The model: what the experts of a rank, a way between ranks, and a call's memory take. Its constants are measured ones.

use expertile::expert_parallel::Traffic;
use expertile::plan::tight_m_sum;
use expertile::{ActivationFormat, Combine, Dispatch, ParallelChoice, TokenExperts};
use serde::Serialize;

/// Between two H200s of one host, each way: what NCCL 2.28.9's all-to-all makes of 18 NVLinks (59 MB in 225 us, in a
/// graph; 2026-11-29). Stores over mapped memory reached 387.
pub(super) const LINK_GBS: f64 = 270.0;
/// Between hosts, for each GPU and each way: what DeepEP reports over 400 Gb/s InfiniBand (43 to 47). Not ours.
pub(super) const HOST_LINK_GBS: f64 = 45.0;
/// A call of NCCL's in a graph, on the same two GPUs (10.4 us at one token).
pub(super) const LATENCY_US: f64 = 10.0;
/// What one H200 reads, and what its matrix units do under load at 700 W: docs/performance.md.
pub(super) const READ_BYTES_PER_SECOND: f64 = 4.43e12;
pub(super) const E4M3_FLOPS_PER_SECOND: f64 = 1300e12;
pub(super) const BF16_FLOPS_PER_SECOND: f64 = 700e12;
/// Memory of one H200.
pub(super) const MEMORY_GB: f64 = 141.0;

/// What a way between ranks takes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Links {
    pub(super) ranks_per_host: usize,
    pub(super) bytes_per_second: f64,
    pub(super) between_hosts_bytes_per_second: f64,
    pub(super) latency_seconds: f64,
}

/// One way: dispatch or combine.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Way {
    /// Bytes of the rank that sends most, and of the one that receives most; to other ranks.
    pub(super) most_sent_bytes: u64,
    pub(super) most_received_bytes: u64,
    /// Of both, what crosses to other hosts.
    pub(super) most_between_hosts_bytes: u64,
    pub(super) seconds: f64,
}

/// A layer, and the ranks that share it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Model {
    pub(super) ranks: usize,
    pub(super) topk: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) activations: ActivationFormat,
    pub(super) links: Links,
    /// Of a rank.
    pub(super) memory_bytes: f64,
    /// Whose weights it holds.
    pub(super) layers: usize,
}

impl Model {
    /// Bytes of one expert, its block scales included.
    pub(super) fn expert_bytes(&self) -> f64 {
        let weights = 3.0 * self.hidden as f64 * self.intermediate as f64;
        match self.activations {
            ActivationFormat::E4m3 => weights * (1.0 + 4.0 / (128.0 * 128.0)),
            ActivationFormat::Bf16 => 2.0 * weights,
        }
    }

    /// The larger of the active experts' weights read once, and the products of all rows.
    pub(super) fn experts_seconds(&self, rows: &[u64]) -> f64 {
        let active = rows.iter().filter(|&&rows| rows > 0).count() as f64;
        let products = 6.0 * self.hidden as f64 * self.intermediate as f64 * rows.iter().sum::<u64>() as f64;
        let rate = match self.activations {
            ActivationFormat::E4m3 => E4M3_FLOPS_PER_SECOND,
            ActivationFormat::Bf16 => BF16_FLOPS_PER_SECOND,
        };
        (active * self.expert_bytes() / READ_BYTES_PER_SECOND).max(products / rate)
    }

    /// Counts go before the rows where tokens are routed: one call more.
    pub(super) fn dispatch(&self, traffic: &Traffic, dispatch: Dispatch, row_bytes: usize) -> Way {
        let calls = if dispatch == Dispatch::Routed { 2 } else { 1 };
        self.way(calls, |from, to| traffic.dispatched(dispatch, from, to).saturating_mul(row_bytes))
    }

    pub(super) fn combine(&self, traffic: &Traffic, combine: Combine, dispatch: Dispatch) -> Way {
        let row_bytes = self.hidden.saturating_mul(combine.value_bytes());
        self.way(1, |from, to| traffic.combined(combine, dispatch, from, to).saturating_mul(row_bytes))
    }

    fn way(&self, calls: usize, bytes: impl Fn(usize, usize) -> usize) -> Way {
        let Links { ranks_per_host, bytes_per_second, between_hosts_bytes_per_second, latency_seconds } = self.links;
        // Bytes of each rank: out and in, within the host and to others.
        let mut all = vec![[0u64; 4]; self.ranks];
        for from in 0..self.ranks {
            for to in (0..self.ranks).filter(|&to| to != from) {
                let (bytes, across) =
                    (bytes(from, to) as u64, usize::from(from / ranks_per_host != to / ranks_per_host));
                for (rank, part) in [(from, across), (to, 2 + across)] {
                    all[rank][part] = all[rank][part].saturating_add(bytes);
                }
            }
        }
        let most = |of: &dyn Fn(&[u64; 4]) -> u64| all.iter().map(of).max().unwrap_or_default();
        let (within, between) = (most(&|b| b[0].max(b[2])), most(&|b| b[1].max(b[3])));
        let busiest = (within as f64 / bytes_per_second).max(between as f64 / between_hosts_bytes_per_second);
        let is_alone = self.ranks == 1;
        Way {
            most_sent_bytes: most(&|b| b[0].saturating_add(b[1])),
            most_received_bytes: most(&|b| b[2].saturating_add(b[3])),
            most_between_hosts_bytes: between,
            seconds: if is_alone { 0.0 } else { calls as f64 * latency_seconds + busiest },
        }
    }

    /// The most tokens of a rank that memory is enough for: all its layers' weights, and one call's windows and
    /// workspace. Rows are those of the worst routing, or a share of all slots.
    pub(super) fn capacity(&self, choice: &ParallelChoice, experts: usize, share: Option<f64>) -> usize {
        let weights = self.layers as f64 * experts as f64 * self.expert_bytes();
        let fits = |tokens: usize| weights + self.call_bytes(choice, experts, tokens, share) <= self.memory_bytes;
        let (mut fit, mut too_many) = (0, 1);
        while too_many < 1 << 24 && fits(too_many) {
            (fit, too_many) = (too_many, 2 * too_many);
        }
        while too_many - fit > 1 {
            let middle = fit + (too_many - fit) / 2;
            if fits(middle) { fit = middle } else { too_many = middle }
        }
        fit
    }

    fn call_bytes(&self, choice: &ParallelChoice, experts: usize, tokens: usize, share: Option<f64>) -> f64 {
        let (ranks, received) = (self.ranks as f64, self.ranks.saturating_mul(tokens));
        let rows = match share {
            Some(share) => share * received as f64 * self.topk as f64,
            None => {
                tight_m_sum(received, self.topk, experts.max(1), 1, TokenExperts::Distinct).unwrap_or(usize::MAX) as f64
            }
        };
        let (hidden, intermediate) = (self.hidden as f64, self.intermediate as f64);
        let value = match self.activations {
            ActivationFormat::E4m3 => 1.0 + 4.0 / 128.0,
            ActivationFormat::Bf16 => 2.0,
        };
        // Permuted rows, then activated ones; gate and up, then the rows of GEMM 2.
        let row = value * hidden.max(intermediate) + 2.0 * (2.0 * intermediate).max(hidden);
        let back = match choice.combine {
            Combine::Rows => (rows + tokens as f64 * self.topk as f64) * 2.0 * hidden,
            Combine::Sums => (received as f64 + tokens as f64 * ranks) * 4.0 * hidden,
        };
        (received + tokens) as f64 * choice.token_row.bytes() as f64 + rows * row + back
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expertile::{MatrixRef, Placement};

    /// Two H200s, DeepSeek-V3's rows, the same number of rows from each to the other: microseconds of NCCL's all-to-all
    /// in a graph, of e4m3 values with their scales (7392 bytes a row) and of bf16 values, 2026-11-29.
    const MEASURED: [(usize, f64, f64); 7] = [
        (1, 10.4, 10.5),
        (8, 10.6, 11.6),
        (64, 15.4, 17.4),
        (128, 17.9, 22.2),
        (256, 21.8, 30.7),
        (1024, 49.7, 76.8),
        (4096, 129.0, 225.0),
    ];

    #[test]
    fn a_way_takes_what_two_gpus_have_taken_within_30_percent() {
        let model = Model {
            ranks: 2,
            topk: 1,
            hidden: 7168,
            intermediate: 2048,
            activations: ActivationFormat::E4m3,
            links: Links {
                ranks_per_host: 8,
                bytes_per_second: 1e9 * LINK_GBS,
                between_hosts_bytes_per_second: 1e9 * HOST_LINK_GBS,
                latency_seconds: 1e-6 * LATENCY_US,
            },
            memory_bytes: 1e9 * MEMORY_GB,
            layers: 1,
        };
        let placement = Placement::linear(2, 2).unwrap();
        for (tokens, e4m3, bf16) in MEASURED {
            // Every token goes to the other rank's expert.
            let ids = [vec![1; tokens], vec![0; tokens]].concat();
            let ids = MatrixRef::new(&ids[..], 2 * tokens, 1).unwrap();
            let traffic = Traffic::count(ids, &[tokens; 2], &placement).unwrap();
            let out = model.dispatch(&traffic, Dispatch::Gather, 7392);
            let back = model.combine(&traffic, Combine::Rows, Dispatch::Gather);
            assert_eq!((out.most_sent_bytes, back.most_sent_bytes), (7392 * tokens as u64, 14336 * tokens as u64));
            for (modelled, measured) in [(out.seconds, e4m3), (back.seconds, bf16)] {
                let ratio = 1e6 * modelled / measured;
                assert!((0.7..1.3).contains(&ratio), "{tokens} tokens: {ratio}");
            }
        }
    }
}
