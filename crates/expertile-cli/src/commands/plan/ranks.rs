//! `expertile plan --ranks`: what expert parallelism costs, by placement.
//!
//! Rows and bytes are counted from ids, given or drawn. Times are modelled: a rank's experts take the larger of their
//! weights read once and their products; a way between ranks takes its calls' latency and the bytes of the busiest link.
//! The constants are measured ones, named below with their source.

use super::Args;
use crate::error::{Error, Result};
use crate::placement_file::{self, PlacementChoice};
use crate::preset::Random;
use crate::report::{format, plot};
use crate::{memory, output};
use expertile::expert_parallel::Traffic;
use expertile::plan::tight_m_sum;
use expertile::{
    ActivationFormat, Combine, Dispatch, LayerConfig, MatrixRef, ParallelChoice, ParallelConfig, Placement,
    TokenExperts, TopkIds,
};
use expertile_checkpoint::Ids;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

/// Between two H200s of one host, each way: a peer copy gives 392 GB/s, NCCL 2.28.9's all-to-all of 30 MB close to it.
/// Two GPUs, 18 NVLinks, 2026-11-29.
const LINK_GBS: f64 = 390.0;
/// Between hosts, for each GPU and each way: what DeepEP reports over 400 Gb/s InfiniBand (43 to 47). Not ours.
const HOST_LINK_GBS: f64 = 45.0;
/// A call of NCCL's in a graph, on the same two GPUs (8.8 to 10.6 us at one token).
const LATENCY_US: f64 = 10.0;
/// What one H200 reads, and what its matrix units do under load at 700 W: docs/performance.md.
const READ_BYTES_PER_SECOND: f64 = 4.43e12;
const E4M3_FLOPS_PER_SECOND: f64 = 1300e12;
const BF16_FLOPS_PER_SECOND: f64 = 700e12;
/// Memory of one H200.
const MEMORY_GB: f64 = 141.0;

/// Ranks that are counted one by one.
const MOST_RANKS: usize = 4096;

#[derive(Debug, clap::Args)]
pub(crate) struct RankOptions {
    /// Ranks R that share the experts: rows and bytes of each, modelled times, memory, and what copies of busy experts
    /// buy. --tokens is then of each rank; --ids holds all ranks' tokens, rank 0's first, as many of each; --counts are
    /// rows of each expert, from which ids are drawn (without both, every expert is as likely).
    #[arg(long, value_name = "R", requires_all = ["hidden", "intermediate"], conflicts_with_all = ["local_experts", "rule"])]
    pub(super) ranks: Option<usize>,
    /// Ranks of one host, between which links are fast [default: 8].
    #[arg(long, value_name = "N", requires = "ranks")]
    ranks_per_host: Option<usize>,
    /// Copies of experts beyond one of each, placed where they help most [default: none, R and 2 R are shown].
    #[arg(long, value_name = "N", requires = "ranks")]
    redundant: Option<usize>,
    /// Where experts are: linear, round-robin, or a file that --placement-output has written [default: linear].
    #[arg(long, value_name = "NAME", requires = "ranks")]
    placement: Option<PlacementChoice>,
    /// Where to write the last placement of the table, for `layer --placement`.
    #[arg(long, value_name = "FILE.json", requires = "ranks")]
    pub(super) placement_output: Option<PathBuf>,
    /// How tokens travel: gather or routed [default: as the layer chooses].
    #[arg(long, value_name = "WAY", requires = "ranks")]
    dispatch: Option<Dispatch>,
    /// How results travel: rows or sums [default: rows].
    #[arg(long, value_name = "WAY", requires = "ranks")]
    combine: Option<Combine>,
    /// Gigabytes per second of a rank's link within a host, each way [default: 390, measured between two H200s].
    #[arg(long, value_name = "GB/s", requires = "ranks")]
    link_gbs: Option<f64>,
    /// The same to other hosts [default: 45, as DeepEP reports over 400 Gb/s InfiniBand].
    #[arg(long, value_name = "GB/s", requires = "ranks")]
    host_link_gbs: Option<f64>,
    /// Microseconds of one exchange of nothing [default: 10, NCCL's in a graph between two H200s].
    #[arg(long, value_name = "US", requires = "ranks")]
    latency_us: Option<f64>,
    /// Gigabytes of memory of a rank [default: 141, an H200].
    #[arg(long, value_name = "GB", requires = "ranks")]
    memory_gb: Option<f64>,
    /// Layers whose weights a rank holds [default: 1].
    #[arg(long, value_name = "N", requires = "ranks")]
    layers: Option<usize>,
    /// Seed of the ids that are drawn [default: 1].
    #[arg(long, value_name = "S", requires = "ranks")]
    seed: Option<u64>,
}

impl RankOptions {
    pub(super) fn inputs(&self) -> Option<PathBuf> {
        self.placement.as_ref().and_then(PlacementChoice::file).map(PathBuf::from)
    }
}

/// What is asked, whatever options it came from.
struct Question {
    ranks: usize,
    /// Of each rank.
    tokens: usize,
    topk: usize,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    activations: ActivationFormat,
    ids: Drawn,
    links: Links,
    memory_bytes: f64,
    layers: usize,
}

/// The ids of all ranks' tokens.
enum Drawn {
    File(Ids),
    Made(Vec<i32>),
}

/// What a way between ranks takes.
#[derive(Debug, Clone, Copy, Serialize)]
struct Links {
    ranks_per_host: usize,
    bytes_per_second: f64,
    between_hosts_bytes_per_second: f64,
    latency_seconds: f64,
}

/// One way: dispatch or combine.
#[derive(Debug, Clone, Copy, Serialize)]
struct Way {
    /// Bytes of the rank that sends most, and of the one that receives most; to other ranks.
    most_sent_bytes: u64,
    most_received_bytes: u64,
    /// Of both, what crosses to other hosts.
    most_between_hosts_bytes: u64,
    seconds: f64,
}

/// One placement, and what it makes of the ids.
#[derive(Debug, Serialize)]
struct Row {
    placement: String,
    copies: usize,
    rows_mean: f64,
    rows_most: u64,
    /// Most over mean; null without rows.
    imbalance: Option<f64>,
    dispatch: Way,
    combine: Way,
    /// The local experts: of the mean rank, and of the slowest, which all wait for.
    experts_mean_seconds: f64,
    experts_most_seconds: f64,
    total_seconds: f64,
    /// Of the rank with most.
    weight_bytes: u64,
    /// The most tokens of a rank for which memory is enough whatever the routing, and for rows as they are here.
    capacity_worst: usize,
    capacity_expected: usize,
    /// `[R]`
    rows: Vec<u64>,
    #[serde(skip)]
    placed: Placement,
}

#[derive(Debug, Serialize)]
struct Report {
    ranks: usize,
    tokens_per_rank: usize,
    topk: usize,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    activations: &'static str,
    ids: &'static str,
    choice: String,
    links: Links,
    token_row_bytes: usize,
    combine_row_bytes: usize,
    /// Every way for the first placement: name, bytes that the busiest rank sends, seconds.
    ways: Vec<(String, u64, f64)>,
    placements: Vec<Row>,
}

pub(super) fn run(args: &Args, ranks: usize) -> Result<()> {
    let question = Question::new(args, ranks)?;
    let (choice, placements) = question.placements(args)?;
    let placements: Vec<Row> =
        placements.into_iter().map(|(name, placed)| question.row(&choice, name, placed)).collect::<Result<_>>()?;
    if let Some(file) = &args.ranks.placement_output {
        let last = placements.last().expect("at least one placement is asked about");
        placement_file::write(file, &last.placed)?;
    }
    if let Some(file) = &args.plot {
        let rows: Vec<(&str, &[u64])> = placements.iter().map(|row| (&row.placement[..], &row.rows[..])).collect();
        output::write_file(file, plot::rows_per_rank(&rows).as_bytes())?;
    }
    let report = question.report(&choice, placements)?;
    args.report.tell(&report, Report::text)
}

fn positive(option: &str, given: Option<f64>, default: f64) -> Result<f64> {
    match given {
        Some(value) if !(value.is_finite() && value > 0.0) => {
            Err(Error::usage(format!("{option} is {value}, expected a number above 0")))
        }
        given => Ok(given.unwrap_or(default)),
    }
}

impl Question {
    fn new(args: &Args, ranks: usize) -> Result<Self> {
        if ranks == 0 || ranks > MOST_RANKS {
            return Err(Error::usage(format!("--ranks is {ranks}, expected 1 to {MOST_RANKS}")));
        }
        let options = &args.ranks;
        args.ids.as_deref().map_or(Ok(()), memory::require_file)?;
        let file = args.ids.as_deref().map(Ids::open).transpose()?;
        let experts = args.experts.or(args.counts.as_ref().map(Vec::len)).unwrap_or_default();
        if args.counts.as_ref().is_some_and(|counts| counts.len() != experts) {
            return Err(Error::usage(format!("--counts holds another number of experts than {experts}")));
        }
        if experts > super::MOST_EXPERTS {
            return Err(Error::usage(format!("--experts is {experts}, expected at most {}", super::MOST_EXPERTS)));
        }
        let (tokens, topk) = match &file {
            Some(ids) if ids.tokens().is_multiple_of(ranks) => (ids.tokens() / ranks, ids.topk()),
            Some(ids) => {
                let expected = format!("a multiple of --ranks {ranks}: as many of each rank");
                return Err(Error::usage(format!("--ids has {} tokens, expected {expected}", ids.tokens())));
            }
            None => (args.tokens.unwrap_or_default(), args.topk.unwrap_or_default()),
        };
        let ids = match file {
            Some(ids) => Drawn::File(ids),
            None => Drawn::Made(draw(args, [ranks, tokens, topk], experts)?),
        };
        let per_host = options.ranks_per_host.unwrap_or(8);
        if per_host == 0 {
            return Err(Error::usage("--ranks-per-host is 0, expected at least 1"));
        }
        let latency = options.latency_us.unwrap_or(LATENCY_US);
        if !(latency.is_finite() && latency >= 0.0) {
            return Err(Error::usage(format!("--latency-us is {latency}, expected a number of at least 0")));
        }
        Ok(Self {
            ranks,
            tokens,
            topk,
            experts,
            hidden: args.hidden.unwrap_or_default(),
            intermediate: args.intermediate.unwrap_or_default(),
            activations: args.activations,
            ids,
            links: Links {
                ranks_per_host: per_host,
                bytes_per_second: 1e9 * positive("--link-gbs", options.link_gbs, LINK_GBS)?,
                between_hosts_bytes_per_second: 1e9
                    * positive("--host-link-gbs", options.host_link_gbs, HOST_LINK_GBS)?,
                latency_seconds: 1e-6 * latency,
            },
            memory_bytes: 1e9 * positive("--memory-gb", options.memory_gb, MEMORY_GB)?,
            layers: options.layers.unwrap_or(1),
        })
    }

    /// What calls do, and the placements that are set side by side.
    fn placements(&self, args: &Args) -> Result<(ParallelChoice, Vec<(String, Placement)>)> {
        let (options, ranks) = (&args.ranks, self.ranks);
        let chosen = options.placement.clone().unwrap_or(PlacementChoice::Linear);
        let first = chosen.placement(self.experts, ranks)?;
        let loads = self.loads(&first)?;
        let most = self.experts.saturating_mul(ranks - 1);
        let counts = match options.redundant {
            Some(redundant) => vec![redundant],
            None => vec![0, ranks.min(most), (2 * ranks).min(most)],
        };
        let name = match &chosen {
            PlacementChoice::Linear => "linear".into(),
            PlacementChoice::RoundRobin => "round-robin".into(),
            PlacementChoice::File(file) => file.display().to_string(),
        };
        let parallel = ParallelConfig {
            dispatch: options.dispatch,
            combine: options.combine.unwrap_or_default(),
            ..ParallelConfig::new(first.clone())
        };
        let config = LayerConfig::new(self.topk, self.experts, self.activations);
        let choice = ParallelChoice::new(self.hidden, &config, &parallel, self.tokens.max(1))?;
        let mut all = vec![(name, first)];
        for redundant in counts {
            let placement = Placement::balanced(&loads, ranks, redundant)?;
            let name = if redundant == 0 { "balanced".into() } else { format!("balanced, {redundant} redundant") };
            // Few experts on few ranks leave no room for more copies.
            if all.iter().all(|(known, _)| *known != name) {
                all.push((name, placement));
            }
        }
        Ok((choice, all))
    }

    fn ids(&self) -> Result<TopkIds<'_>> {
        Ok(match &self.ids {
            Drawn::File(ids) => ids.view(),
            Drawn::Made(ids) => MatrixRef::new(&ids[..], self.ranks * self.tokens, self.topk)?.into(),
        })
    }

    fn traffic(&self, placement: &Placement) -> Result<Traffic> {
        Ok(Traffic::count(self.ids()?, &vec![self.tokens; self.ranks], placement)?)
    }

    /// `[G]`: rows of each expert.
    fn loads(&self, placement: &Placement) -> Result<Vec<u64>> {
        let traffic = self.traffic(placement)?;
        let mut loads = vec![0; self.experts];
        for rank in 0..self.ranks {
            let rows = placement.experts(rank).iter().zip(traffic.rows_of_experts(rank));
            rows.for_each(|(&expert, rows)| loads[expert] += rows);
        }
        Ok(loads)
    }

    fn row(&self, choice: &ParallelChoice, placement: String, placed: Placement) -> Result<Row> {
        let traffic = self.traffic(&placed)?;
        let rows: Vec<u64> = (0..self.ranks).map(|rank| traffic.rows(rank)).collect();
        let (all, rows_most) = (rows.iter().sum::<u64>(), rows.iter().copied().max().unwrap_or_default());
        let rows_mean = all as f64 / self.ranks as f64;
        let experts: Vec<f64> =
            (0..self.ranks).map(|rank| self.experts_seconds(traffic.rows_of_experts(rank))).collect();
        let experts_most_seconds = experts.iter().copied().fold(0.0, f64::max);
        let dispatch = self.dispatch(&traffic, choice.dispatch, choice.token_row.bytes());
        let combine = self.combine(&traffic, choice.combine, choice.dispatch);
        let most_experts = (0..self.ranks).map(|rank| placed.experts(rank).len()).max().unwrap_or_default();
        let share = if all == 0 { 1.0 } else { rows_most as f64 / all as f64 };
        Ok(Row {
            placement,
            copies: placed.copies(),
            rows_mean,
            rows_most,
            imbalance: (all > 0).then(|| rows_most as f64 / rows_mean),
            experts_mean_seconds: experts.iter().sum::<f64>() / self.ranks as f64,
            experts_most_seconds,
            total_seconds: dispatch.seconds + experts_most_seconds + combine.seconds,
            dispatch,
            combine,
            weight_bytes: (most_experts as f64 * self.expert_bytes()) as u64,
            capacity_worst: self.capacity(choice, most_experts, None),
            capacity_expected: self.capacity(choice, most_experts, Some(share)),
            rows,
            placed,
        })
    }

    /// Bytes of one expert, its block scales included.
    fn expert_bytes(&self) -> f64 {
        let weights = 3.0 * self.hidden as f64 * self.intermediate as f64;
        match self.activations {
            ActivationFormat::E4m3 => weights * (1.0 + 4.0 / (128.0 * 128.0)),
            ActivationFormat::Bf16 => 2.0 * weights,
        }
    }

    /// The larger of the active experts' weights read once, and the products of all rows.
    fn experts_seconds(&self, rows: &[u64]) -> f64 {
        let active = rows.iter().filter(|&&rows| rows > 0).count() as f64;
        let products = 6.0 * self.hidden as f64 * self.intermediate as f64 * rows.iter().sum::<u64>() as f64;
        let rate = match self.activations {
            ActivationFormat::E4m3 => E4M3_FLOPS_PER_SECOND,
            ActivationFormat::Bf16 => BF16_FLOPS_PER_SECOND,
        };
        (active * self.expert_bytes() / READ_BYTES_PER_SECOND).max(products / rate)
    }

    /// Counts go before the rows where tokens are routed: one call more.
    fn dispatch(&self, traffic: &Traffic, dispatch: Dispatch, row_bytes: usize) -> Way {
        let calls = if dispatch == Dispatch::Routed { 2 } else { 1 };
        self.way(calls, |from, to| traffic.dispatched(dispatch, from, to) * row_bytes)
    }

    fn combine(&self, traffic: &Traffic, combine: Combine, dispatch: Dispatch) -> Way {
        let row_bytes = combine.row_bytes(self.hidden);
        self.way(1, |from, to| traffic.combined(combine, dispatch, from, to) * row_bytes)
    }

    fn way(&self, calls: usize, bytes: impl Fn(usize, usize) -> usize) -> Way {
        let Links { ranks_per_host, bytes_per_second, between_hosts_bytes_per_second, latency_seconds } = self.links;
        // Bytes of each rank: out and in, within the host and to others.
        let mut all = vec![[0u64; 4]; self.ranks];
        for from in 0..self.ranks {
            for to in (0..self.ranks).filter(|&to| to != from) {
                let (bytes, across) =
                    (bytes(from, to) as u64, usize::from(from / ranks_per_host != to / ranks_per_host));
                all[from][across] += bytes;
                all[to][2 + across] += bytes;
            }
        }
        let most = |of: &dyn Fn(&[u64; 4]) -> u64| all.iter().map(of).max().unwrap_or_default();
        let (within, between) = (most(&|b| b[0].max(b[2])), most(&|b| b[1].max(b[3])));
        let busiest = (within as f64 / bytes_per_second).max(between as f64 / between_hosts_bytes_per_second);
        let is_alone = self.ranks == 1;
        Way {
            most_sent_bytes: most(&|b| b[0] + b[1]),
            most_received_bytes: most(&|b| b[2] + b[3]),
            most_between_hosts_bytes: between,
            seconds: if is_alone { 0.0 } else { calls as f64 * latency_seconds + busiest },
        }
    }

    /// The most tokens of a rank that memory is enough for: all its layers' weights, and one call's windows and
    /// workspace. Rows are those of the worst routing, or a share of all slots.
    fn capacity(&self, choice: &ParallelChoice, experts: usize, share: Option<f64>) -> usize {
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

    fn report(&self, choice: &ParallelChoice, placements: Vec<Row>) -> Result<Report> {
        let first = self.traffic(&placements[0].placed)?;
        let mut ways = Vec::new();
        for dispatch in Dispatch::ALL {
            let way = self.dispatch(&first, dispatch, choice.token_row.bytes());
            ways.push((format!("dispatch {dispatch}"), way.most_sent_bytes, way.seconds));
            for combine in Combine::ALL {
                let way = self.combine(&first, combine, dispatch);
                // Rows are the same whichever way tokens came.
                if combine == Combine::Sums || dispatch == Dispatch::Gather {
                    let name = if combine == Combine::Sums {
                        format!("combine sums of {dispatch}")
                    } else {
                        "combine rows".into()
                    };
                    ways.push((name, way.most_sent_bytes, way.seconds));
                }
            }
        }
        Ok(Report {
            ranks: self.ranks,
            tokens_per_rank: self.tokens,
            topk: self.topk,
            experts: self.experts,
            hidden: self.hidden,
            intermediate: self.intermediate,
            activations: self.activations.name(),
            ids: if matches!(self.ids, Drawn::File(_)) { "given" } else { "drawn" },
            choice: choice.to_string(),
            links: self.links,
            token_row_bytes: choice.token_row.bytes(),
            combine_row_bytes: choice.combine_row_bytes,
            ways,
            placements,
        })
    }
}

/// Different experts for every token, each with a chance in proportion to its count, or all alike.
fn draw(args: &Args, [ranks, tokens, topk]: [usize; 3], experts: usize) -> Result<Vec<i32>> {
    if topk > experts {
        return Err(Error::usage(format!("--topk is {topk}, expected at most {experts}, the experts")));
    }
    let slots =
        ranks.checked_mul(tokens).and_then(|all| all.checked_mul(topk)).filter(|&all| i32::try_from(all).is_ok());
    let slots = slots.ok_or_else(|| {
        Error::usage(format!("{ranks} ranks * {tokens} tokens * {topk} experts is more than {}", i32::MAX))
    })?;
    memory::require("the ids", 4 * slots as u128)?;
    let mut ends = Vec::with_capacity(experts);
    let mut sum = 0u64;
    for expert in 0..experts {
        let count = args.counts.as_ref().map_or(1, |counts| counts[expert]);
        sum += u64::try_from(count)
            .map_err(|_| Error::usage(format!("--counts holds {count} for expert {expert}, expected at least 0")))?;
        ends.push(sum);
    }
    let mut random = Random::new(args.ranks.seed.unwrap_or(1), [0x1d5, 0, 0]);
    let mut ids = Vec::with_capacity(slots);
    for _ in 0..ranks * tokens {
        let first = ids.len();
        for _ in 0..topk {
            let chosen = draw_another(&mut random, &ends, &ids[first..]);
            ids.push(chosen);
        }
    }
    Ok(ids)
}

/// An expert that is not among `chosen`, with a chance in proportion to its count; -1 if none is left that has one.
/// `ends` are the counts, added up.
fn draw_another(random: &mut Random, ends: &[u64], chosen: &[i32]) -> i32 {
    /// Draws until one is new; where few experts have nearly all rows, that may take for ever.
    const TRIES: usize = 32;
    let Some(sum) = ends.last().copied().filter(|&sum| sum > 0) else { return -1 };
    for _ in 0..TRIES {
        let at = random.draw() % sum;
        let expert = ends.partition_point(|&end| end <= at) as i32;
        if !chosen.contains(&expert) {
            return expert;
        }
    }
    let count = |expert: usize| match chosen.contains(&(expert as i32)) {
        true => 0,
        false => ends[expert] - if expert == 0 { 0 } else { ends[expert - 1] },
    };
    let left: u64 = (0..ends.len()).map(count).sum();
    let mut at = if left == 0 { return -1 } else { random.draw() % left };
    for expert in 0..ends.len() {
        match at.checked_sub(count(expert)) {
            Some(rest) => at = rest,
            None => return expert as i32,
        }
    }
    -1
}

impl Report {
    fn text(&self) -> String {
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
        let Links { ranks_per_host, bytes_per_second, between_hosts_bytes_per_second, latency_seconds } = self.links;
        let _ = writeln!(
            text,
            "modelled, of one layer: {} each way within {ranks_per_host} ranks, {} between hosts, {} a call; experts at an \
             H200's {} and {} (bf16: {})",
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
