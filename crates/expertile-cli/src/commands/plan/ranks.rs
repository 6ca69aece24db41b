//! `expertile plan --ranks`: what expert parallelism costs, by placement.
//!
//! Rows and bytes are counted from ids, given or drawn (`draw`). Times are modelled (`model`): a rank's experts take the
//! larger of their weights read once and their products; a way between ranks takes its calls' latency and the bytes of
//! the busiest link.

mod draw;
mod model;
mod report;

use self::draw::draw;
use self::model::{HOST_LINK_GBS, Link, Links, MEMORY_GB, Model};
use self::report::{Report, Row};
use super::Args;
use crate::error::{Error, Result};
use crate::placement_file::{self, PlacementChoice};
use crate::preset::RoutingName;
use crate::report::plot;
use crate::{memory, output};
use expertile::expert_parallel::Traffic;
use expertile::{Combine, Dispatch, LayerConfig, MatrixRef, ParallelChoice, ParallelConfig, Placement, TopkIds};
use expertile_checkpoint::Ids;
use std::path::PathBuf;

/// Ranks that are counted one by one.
const MOST_RANKS: usize = 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct RankOptions {
    /// Ranks R that share the experts: rows and bytes of each, modelled times, memory, and what copies of busy experts
    /// buy. --tokens is then of each rank; --ids holds all ranks' tokens, rank 0's first, as many of each; --counts are
    /// rows of each expert, from which ids are drawn (without both, every expert is as likely).
    #[arg(long, value_name = "R", requires_all = ["hidden", "intermediate"], conflicts_with_all = ["local_experts", "rule", "alignment"])]
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
    /// How GPUs reach each other: mapped, by stores into each other's memory, or nccl [default: mapped on one host].
    #[arg(long, value_name = "NAME", requires = "ranks")]
    link: Option<Link>,
    /// Gigabytes per second of a rank's link within a host, each way [default: 310, mapped, or 240, nccl, on H200s].
    #[arg(long, value_name = "GB/s", requires = "ranks")]
    link_gbs: Option<f64>,
    /// The same to other hosts [default: 45, as DeepEP reports over 400 Gb/s InfiniBand].
    #[arg(long, value_name = "GB/s", requires = "ranks")]
    host_link_gbs: Option<f64>,
    /// Microseconds of one exchange of nothing [default: 6.5, mapped, or 11, nccl, in a graph on H200s].
    #[arg(long, value_name = "US", requires = "ranks")]
    latency_us: Option<f64>,
    /// Gigabytes of memory of a rank [default: 141, an H200].
    #[arg(long, value_name = "GB", requires = "ranks")]
    memory_gb: Option<f64>,
    /// Layers whose weights a rank holds [default: 1].
    #[arg(long, value_name = "N", requires = "ranks")]
    layers: Option<usize>,
    /// How tokens choose experts where neither --ids nor --counts say it: uniform, or zipf, the n-th most frequent one
    /// with a chance that goes with 1 / sqrt(n) [default: uniform].
    #[arg(long, value_name = "NAME", requires = "ranks", conflicts_with_all = ["ids", "counts"])]
    routing: Option<RoutingName>,
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
    model: Model,
    /// Of each rank.
    tokens: usize,
    experts: usize,
    ids: Drawn,
}

/// The ids of all ranks' tokens.
enum Drawn {
    File(Ids),
    Made(Vec<i32>),
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
            Some(ids) if ids.tokens().is_multiple_of(ranks) => (
                super::agree("--tokens", args.tokens, ids.tokens() / ranks)?,
                super::agree("--topk", args.topk, ids.topk())?,
            ),
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
        let (per_host, layers) = (options.ranks_per_host.unwrap_or(8), options.layers.unwrap_or(1));
        for (option, value) in [("--ranks-per-host", per_host), ("--layers", layers)] {
            if value == 0 {
                return Err(Error::usage(format!("{option} is 0, expected at least 1")));
            }
        }
        if let Some(redundant) = options.redundant.filter(|&redundant| redundant > super::MOST_EXPERTS) {
            let most = super::MOST_EXPERTS;
            return Err(Error::usage(format!("--redundant is {redundant}, expected at most {most}")));
        }
        let one_host = ranks <= per_host;
        let link = options.link.unwrap_or(if one_host { Link::Mapped } else { Link::Nccl });
        if link == Link::Mapped && !one_host {
            let expected = format!("nccl for more ranks than the {per_host} of a host");
            return Err(Error::usage(format!("--link is mapped, expected {expected}")));
        }
        let latency = options.latency_us.unwrap_or(link.latency_us());
        if !(latency.is_finite() && latency >= 0.0) {
            return Err(Error::usage(format!("--latency-us is {latency}, expected a number of at least 0")));
        }
        let model = Model {
            ranks,
            topk,
            hidden: args.hidden.unwrap_or_default(),
            intermediate: args.intermediate.unwrap_or_default(),
            activations: args.activations,
            links: Links {
                link,
                ranks_per_host: per_host,
                bytes_per_second: 1e9 * positive("--link-gbs", options.link_gbs, link.gbs())?,
                between_hosts_bytes_per_second: 1e9
                    * positive("--host-link-gbs", options.host_link_gbs, HOST_LINK_GBS)?,
                latency_seconds: 1e-6 * latency,
            },
            memory_bytes: 1e9 * positive("--memory-gb", options.memory_gb, MEMORY_GB)?,
            layers,
        };
        Ok(Self { model, tokens, experts, ids })
    }

    /// What calls do, and the placements that are set side by side.
    fn placements(&self, args: &Args) -> Result<(ParallelChoice, Vec<(String, Placement)>)> {
        let (options, ranks) = (&args.ranks, self.model.ranks);
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
        let config = LayerConfig::new(self.model.topk, self.experts, self.model.activations);
        let choice = ParallelChoice::new(self.model.hidden, &config, &parallel, self.tokens.max(1))?;
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
            Drawn::Made(ids) => MatrixRef::new(&ids[..], self.model.ranks * self.tokens, self.model.topk)?.into(),
        })
    }

    fn traffic(&self, placement: &Placement) -> Result<Traffic> {
        Ok(Traffic::count(self.ids()?, &vec![self.tokens; self.model.ranks], placement)?)
    }

    /// `[G]`: rows of each expert.
    fn loads(&self, placement: &Placement) -> Result<Vec<u64>> {
        let traffic = self.traffic(placement)?;
        let mut loads = vec![0; self.experts];
        for rank in 0..self.model.ranks {
            let rows = placement.experts(rank).iter().zip(traffic.rows_of_experts(rank));
            rows.for_each(|(&expert, rows)| loads[expert] += rows);
        }
        Ok(loads)
    }

    fn row(&self, choice: &ParallelChoice, placement: String, placed: Placement) -> Result<Row> {
        let traffic = self.traffic(&placed)?;
        let rows: Vec<u64> = (0..self.model.ranks).map(|rank| traffic.rows(rank)).collect();
        let (all, rows_most) = (rows.iter().sum::<u64>(), rows.iter().copied().max().unwrap_or_default());
        let rows_mean = all as f64 / self.model.ranks as f64;
        let experts: Vec<f64> =
            (0..self.model.ranks).map(|rank| self.model.experts_seconds(traffic.rows_of_experts(rank))).collect();
        let experts_most_seconds = experts.iter().copied().fold(0.0, f64::max);
        let dispatch = self.model.dispatch(&traffic, choice.dispatch, choice.token_row.bytes());
        let combine = self.model.combine(&traffic, choice.combine, choice.dispatch);
        let most_experts = (0..self.model.ranks).map(|rank| placed.experts(rank).len()).max().unwrap_or_default();
        let share = if all == 0 { 1.0 } else { rows_most as f64 / all as f64 };
        Ok(Row {
            placement,
            copies: placed.copies(),
            rows_mean,
            rows_most,
            imbalance: (all > 0).then(|| rows_most as f64 / rows_mean),
            experts_mean_seconds: experts.iter().sum::<f64>() / self.model.ranks as f64,
            experts_most_seconds,
            total_seconds: dispatch.seconds + experts_most_seconds + combine.seconds,
            dispatch,
            combine,
            weight_bytes: (most_experts as f64 * self.model.expert_bytes()) as u64,
            capacity_worst: self.model.capacity(choice, most_experts, None),
            capacity_expected: self.model.capacity(choice, most_experts, Some(share)),
            rows,
            placed,
        })
    }

    fn report(&self, choice: &ParallelChoice, placements: Vec<Row>) -> Result<Report> {
        let first = self.traffic(&placements[0].placed)?;
        let mut ways = Vec::new();
        for dispatch in Dispatch::ALL {
            let way = self.model.dispatch(&first, dispatch, choice.token_row.bytes());
            ways.push((format!("dispatch {dispatch}"), way.most_sent_bytes, way.seconds));
            for combine in Combine::ALL {
                let way = self.model.combine(&first, combine, dispatch);
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
            ranks: self.model.ranks,
            tokens_per_rank: self.tokens,
            topk: self.model.topk,
            experts: self.experts,
            hidden: self.model.hidden,
            intermediate: self.model.intermediate,
            activations: self.model.activations.name(),
            ids: if matches!(self.ids, Drawn::File(_)) { "given" } else { "drawn" },
            choice: choice.to_string(),
            links: self.model.links,
            token_row_bytes: choice.token_row.bytes(),
            combine_row_bytes: choice.combine_row_bytes,
            ways,
            placements,
        })
    }
}
