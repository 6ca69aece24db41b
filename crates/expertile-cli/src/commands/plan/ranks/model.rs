//! The model: what the experts of a rank, a way between ranks, and a call's memory take. Its constants are measured ones.

use expertile::expert_parallel::Traffic;
use expertile::plan::tight_m_sum;
use expertile::{ActivationFormat, Combine, Dispatch, ParallelChoice, TokenExperts};
use serde::Serialize;

/// How ranks of GPUs reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(in crate::commands::plan) enum Link {
    /// Kernels store into the memory of the other GPUs of a host.
    Mapped,
    /// NCCL's collectives, within hosts and between them.
    Nccl,
}

impl Link {
    /// What a rank sends each way within a host, in GB/s. Mapped: dispatch and combine of this library on 2 and on 4
    /// H200s of one host (benches/results/2026-11-29-h200-expert-parallel.md), the sum at home included: 300 to 334. NCCL
    /// 2.28: the same over its windows on two of them: 200 to 300.
    pub(super) fn gbs(self) -> f64 {
        match self {
            Self::Mapped => 310.0,
            Self::Nccl => 240.0,
        }
    }

    /// Microseconds of one way at one token, in a graph, on the same GPUs.
    pub(super) fn latency_us(self) -> f64 {
        match self {
            Self::Mapped => 6.5,
            Self::Nccl => 11.0,
        }
    }
}

/// Between hosts, for each GPU and each way: what DeepEP reports over 400 Gb/s InfiniBand (43 to 47). Not ours.
pub(super) const HOST_LINK_GBS: f64 = 45.0;
/// What one H200 reads, and what its matrix units do under load at 700 W: docs/performance.md.
pub(super) const READ_BYTES_PER_SECOND: f64 = 4.43e12;
pub(super) const E4M3_FLOPS_PER_SECOND: f64 = 1300e12;
pub(super) const BF16_FLOPS_PER_SECOND: f64 = 700e12;
/// Memory of one H200.
pub(super) const MEMORY_GB: f64 = 141.0;

/// What a way between ranks takes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Links {
    pub(super) link: Link,
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

    /// Counts go before the rows where tokens are routed, but in mapped memory: one call more.
    pub(super) fn dispatch(&self, traffic: &Traffic, dispatch: Dispatch, row_bytes: usize) -> Way {
        let calls = if dispatch == Dispatch::Routed && self.links.link == Link::Nccl { 2 } else { 1 };
        self.way(calls, |from, to| traffic.dispatched(dispatch, from, to).saturating_mul(row_bytes))
    }

    pub(super) fn combine(&self, traffic: &Traffic, combine: Combine, dispatch: Dispatch) -> Way {
        let row_bytes = self.hidden.saturating_mul(combine.value_bytes());
        self.way(1, |from, to| {
            let rows = match (self.links.link, dispatch, combine) {
                // Kernels store results of tokens that have an expert here, and no others, however tokens came.
                (Link::Mapped, ..) => traffic.combined(combine, Dispatch::Routed, from, to),
                // The same number of bytes whatever the routing is: a row for each slot.
                (Link::Nccl, Dispatch::Gather, Combine::Rows) => {
                    traffic.dispatched(Dispatch::Gather, to, from).saturating_mul(self.topk)
                }
                (Link::Nccl, ..) => traffic.combined(combine, dispatch, from, to),
            };
            rows.saturating_mul(row_bytes)
        })
    }

    fn way(&self, calls: usize, bytes: impl Fn(usize, usize) -> usize) -> Way {
        let Links { ranks_per_host, bytes_per_second, between_hosts_bytes_per_second, latency_seconds, .. } =
            self.links;
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
    use crate::preset::{Random, draw_another, zipf_ids};
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

    fn model(ranks: usize, topk: usize, link: Link) -> Model {
        Model {
            ranks,
            topk,
            hidden: 7168,
            intermediate: 2048,
            activations: ActivationFormat::E4m3,
            links: Links {
                link,
                ranks_per_host: 8,
                bytes_per_second: 1e9 * link.gbs(),
                between_hosts_bytes_per_second: 1e9 * HOST_LINK_GBS,
                latency_seconds: 1e-6 * link.latency_us(),
            },
            memory_bytes: 1e9 * MEMORY_GB,
            layers: 1,
        }
    }

    #[test]
    fn a_way_takes_what_two_gpus_have_taken_within_30_percent() {
        let model = model(2, 1, Link::Nccl);
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

    /// DeepSeek-V3's layer on two ranks over NCCL's windows, uniform routing, gather: tokens of each, microseconds of
    /// dispatch, of combine of rows, and of sums, 2026-11-29.
    const NCCL: [(usize, f64, f64, f64); 6] = [
        (8, 10.4, 19.6, 16.5),
        (64, 14.9, 43.3, 30.0),
        (128, 15.2, 71.4, 34.2),
        (256, 17.1, 124.4, 84.1),
        (1024, 51.9, 439.2, 187.0),
        (4096, 130.2, 1564.4, 602.9),
    ];

    /// Sums take longer than their bytes on the way: they are made before, and added after.
    #[test]
    fn nccl_takes_what_two_gpus_have_taken_within_30_percent_and_for_sums_up_to_twice_the_model() {
        for (tokens, dispatch, rows, sums) in NCCL {
            let (model, traffic) = (model(2, 8, Link::Nccl), uniform(2, tokens, 256, 8));
            let out = model.dispatch(&traffic, Dispatch::Gather, 7424);
            let back = |combine| model.combine(&traffic, combine, Dispatch::Gather).seconds;
            for (modelled, measured) in [(out.seconds, dispatch), (back(Combine::Rows), rows)] {
                let ratio = 1e6 * modelled / measured;
                assert!((0.7..1.3).contains(&ratio), "{tokens} tokens: {ratio}");
            }
            let ratio = 1e6 * back(Combine::Sums) / sums;
            assert!((0.45..1.3).contains(&ratio), "{tokens} tokens: {ratio}");
        }
    }

    /// The same on mapped windows, of the Zipf routing that the bench has run: microseconds of dispatch and of combine of
    /// rows; and the bytes of both, which are counted exactly.
    const MAPPED_ZIPF: [(usize, f64, f64, u64); 5] = [
        (8, 6.3, 8.6, 631_040),
        (128, 11.5, 33.2, 8_376_320),
        (256, 14.6, 58.2, 16_867_328),
        (1024, 30.9, 217.1, 67_999_744),
        (4096, 99.2, 831.0, 277_504_000),
    ];

    #[test]
    fn zipf_routing_takes_what_two_gpus_have_taken_within_30_percent() {
        for (tokens, dispatch, combine, bytes) in MAPPED_ZIPF {
            let model = model(2, 8, Link::Mapped);
            let traffic = count(&zipf_ids(1, [2 * tokens, 8], 256), 8, &Placement::linear(256, 2).unwrap());
            // Few tokens travel as they are.
            let row_bytes = if tokens > 64 { 7424 } else { 14_368 };
            let out = model.dispatch(&traffic, Dispatch::Gather, row_bytes);
            let back = model.combine(&traffic, Combine::Rows, Dispatch::Gather);
            assert_eq!(out.most_sent_bytes + back.most_sent_bytes, bytes, "{tokens} tokens");
            for (modelled, measured) in [(out.seconds, dispatch), (back.seconds, combine)] {
                let ratio = 1e6 * modelled / measured;
                assert!((0.7..1.3).contains(&ratio), "{tokens} tokens: {ratio}");
            }
        }
    }

    /// DeepSeek-V3's layer on mapped windows, uniform routing, gather and rows: ranks, tokens of each, microseconds of
    /// dispatch and of combine, 2026-11-29.
    const MAPPED: [(usize, usize, f64, f64); 14] = [
        (2, 1, 6.2, 6.8),
        (2, 8, 6.3, 8.2),
        (2, 64, 10.5, 20.1),
        (2, 128, 11.0, 32.9),
        (2, 256, 13.5, 57.3),
        (2, 1024, 30.0, 213.8),
        (2, 4096, 98.2, 793.3),
        (4, 1, 6.5, 7.3),
        (4, 8, 7.9, 9.8),
        (4, 64, 11.6, 26.1),
        (4, 128, 16.3, 43.3),
        (4, 256, 24.8, 78.7),
        (4, 1024, 75.7, 294.1),
        (4, 4096, 279.5, 1120.9),
    ];

    fn uniform_ids(tokens: usize, experts: usize, topk: usize) -> Vec<i32> {
        let mut random = Random::new(3, [0, 0, 0]);
        let ends: Vec<u64> = (1..=experts as u64).collect();
        let mut ids: Vec<i32> = Vec::new();
        for _ in 0..tokens {
            let first = ids.len();
            (0..topk).for_each(|_| ids.push(draw_another(&mut random, &ends, &ids[first..])));
        }
        ids
    }

    fn count(ids: &[i32], topk: usize, placement: &Placement) -> Traffic {
        let (tokens, ranks) = (ids.len() / topk, placement.ranks());
        let ids = MatrixRef::new(ids, tokens, topk).unwrap();
        Traffic::count(ids, &vec![tokens / ranks; ranks], placement).unwrap()
    }

    fn uniform(ranks: usize, tokens: usize, experts: usize, topk: usize) -> Traffic {
        count(&uniform_ids(ranks * tokens, experts, topk), topk, &Placement::linear(experts, ranks).unwrap())
    }

    /// Most over mean of the ranks' rows.
    fn imbalance(traffic: &Traffic) -> f64 {
        let rows = || (0..traffic.ranks()).map(|rank| traffic.rows(rank));
        rows().max().unwrap() as f64 * traffic.ranks() as f64 / rows().sum::<u64>() as f64
    }

    #[test]
    fn mapped_ways_take_what_two_and_four_gpus_have_taken_within_30_percent() {
        for (ranks, tokens, dispatch, combine) in MAPPED {
            let (model, traffic) = (model(ranks, 8, Link::Mapped), uniform(ranks, tokens, 256, 8));
            let out = model.dispatch(&traffic, Dispatch::Gather, 7424);
            let back = model.combine(&traffic, Combine::Rows, Dispatch::Gather);
            for (modelled, measured) in [(out.seconds, dispatch), (back.seconds, combine)] {
                let ratio = 1e6 * modelled / measured;
                assert!((0.7..1.3).contains(&ratio), "{ranks} ranks, {tokens} tokens: {ratio}");
            }
        }
    }

    /// From the ranks that were measured to those that were not: rows are neither lost nor made, and bytes are those of
    /// the formulas.
    #[test]
    fn eight_to_512_ranks_are_counted_like_the_two_that_were_measured() {
        let (tokens, experts, topk) = (16, 512, 8);
        for ranks in [2, 4, 8, 32, 128, 512] {
            let link = if ranks <= 8 { Link::Mapped } else { Link::Nccl };
            let (model, traffic) = (model(ranks, topk, link), uniform(ranks, tokens, experts, topk));
            let rows: u64 = (0..ranks).map(|rank| traffic.rows(rank)).sum();
            assert_eq!(rows, (ranks * tokens * topk) as u64);
            let gather = model.dispatch(&traffic, Dispatch::Gather, 7424);
            assert_eq!(gather.most_sent_bytes, ((ranks - 1) * tokens * 7424) as u64);
            let routed = model.dispatch(&traffic, Dispatch::Routed, 7424);
            let expected = expertile::dispatch::expected_ranks(experts, ranks, topk) * (1.0 - 1.0 / ranks as f64);
            let of_the_mean = routed.most_sent_bytes as f64 / (tokens as f64 * 7424.0 * expected);
            assert!((0.9..1.3).contains(&of_the_mean), "{ranks} ranks: {of_the_mean}");
            assert!(routed.most_sent_bytes <= gather.most_sent_bytes);
            let back = model.combine(&traffic, Combine::Rows, Dispatch::Routed);
            let slots = (tokens * topk) as f64 * (1.0 - 1.0 / ranks as f64);
            let (sent, received) = (back.most_sent_bytes as f64, back.most_received_bytes as f64);
            assert!(received <= slots * 14336.0 * 1.3 && sent >= slots * 14336.0 * 0.9, "{ranks} ranks");
            // What goes to other hosts takes longer than the same within one.
            let between = gather.most_between_hosts_bytes as f64 / (1e9 * HOST_LINK_GBS);
            assert!(gather.seconds >= between && (ranks > 8) == (between > 0.0));
        }
    }

    /// The same of Zipf routing, whose experts differ by 22 to 1: rows and bytes as the formulas have them, and what a
    /// rank more takes is taken from others. Packing by load helps as long as the busiest expert is no rank's load by
    /// itself; copies help beyond that.
    #[test]
    fn eight_to_512_ranks_of_zipf_routing_wait_for_the_busiest_and_copies_help() {
        let (all, experts, topk) = (8192, 512, 8);
        let ids = zipf_ids(1, [all, topk], experts);
        let mut loads = vec![0u64; experts];
        ids.iter().for_each(|&id| loads[id as usize] += 1);
        // As they were drawn: a token's second expert is never its first, so the most frequent ones lose some.
        let (most, mean) = (loads.iter().copied().max().unwrap() as f64, (all * topk / experts) as f64);
        assert!((9.0..12.0).contains(&(most / mean)), "{}", most / mean);
        let mut before = 1.0;
        for ranks in [2, 4, 8, 32, 128, 256, 512] {
            let link = if ranks <= 8 { Link::Mapped } else { Link::Nccl };
            let model = model(ranks, topk, link);
            let packed = count(&ids, topk, &Placement::balanced(&loads, ranks, 0).unwrap());
            assert_eq!((0..ranks).map(|rank| packed.rows(rank)).sum::<u64>(), (all * topk) as u64);
            let copied = count(&ids, topk, &Placement::balanced(&loads, ranks, 2 * ranks).unwrap());
            let least = (most / (all * topk) as f64 * ranks as f64).max(1.0);
            assert!(imbalance(&packed) >= 0.99 * least, "{ranks} ranks: {}", imbalance(&packed));
            assert!(imbalance(&packed) <= 1.5 * least, "{ranks} ranks: {} {least}", imbalance(&packed));
            assert!(imbalance(&packed) >= 0.9 * before, "{ranks} ranks");
            before = imbalance(&packed);
            assert!(imbalance(&copied) <= 1.01 * imbalance(&packed), "{ranks} ranks: {}", imbalance(&copied));
            let (gather, routed) =
                (model.dispatch(&packed, Dispatch::Gather, 7424), model.dispatch(&packed, Dispatch::Routed, 7424));
            let tokens = all / ranks;
            assert_eq!(gather.most_sent_bytes, ((ranks - 1) * tokens * 7424) as u64);
            assert!(routed.most_sent_bytes <= gather.most_sent_bytes.min((tokens * topk * 7424) as u64));
            // The busiest rank sends its rows home, but for its own tokens'.
            let back = model.combine(&packed, Combine::Rows, Dispatch::Routed);
            let busiest = imbalance(&packed) * (all * topk) as f64 / ranks as f64 * 14336.0;
            assert!(back.most_sent_bytes as f64 <= busiest && back.most_sent_bytes as f64 >= 0.45 * busiest);
        }
    }
}
