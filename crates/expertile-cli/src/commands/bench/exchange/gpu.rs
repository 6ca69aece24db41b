//! `expertile bench exchange --device cuda --ranks R`: a process for each GPU, and what each of them measures.

mod fault;
mod one_gpu;
mod processes;
mod report;

use super::Args;
use crate::device;
use crate::error::{Error, Result};
use crate::preset::{MadeUp, RoutingName};
use crate::ranks::Share;
use crate::report::progress::Progress;
use crate::weights::{self, ExpertWeights};
use expertile::cuda::measure::{ExpertParallelBench, HostInputs, LayerBench};
use expertile::cuda::{Device, ExpertParallelLayer, Layer, Link, Nccl, Weights};
use expertile::exchange::{Exchange, Files};
use expertile::expert_parallel::Traffic;
use expertile::{Combine, Dispatch, LayerConfig, MatrixRef, ParallelConfig};
use expertile_checkpoint::LayerInput;
use half::bf16;
use report::{Report, Size};
use std::path::PathBuf;
use std::sync::Arc;

/// Where ranks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Where {
    Cpu,
    Cuda,
}

/// How bytes get from one GPU to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum LinkName {
    /// Kernels store into the other GPUs' memory.
    Mapped,
    /// NCCL's collectives.
    Nccl,
    /// The same in NCCL's own memory, which it moves without copies in between.
    NcclWindows,
}

/// What goes with GPUs.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Where the ranks run: cpu, or cuda: one GPU of this machine each, the first ones.
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: Where,
    /// GPUs, with --device cuda; the command starts a process for each.
    #[arg(long, value_name = "R")]
    ranks: Option<usize>,
    /// How bytes travel between GPUs: mapped, nccl, nccl-windows, or several [default: mapped,nccl].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    link: Vec<LinkName>,
    /// How tokens choose experts: uniform, zipf, or both [default: uniform].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    routing: Vec<RoutingName>,
    /// Compare with all experts on one GPU, bit for bit, and that many runs with each other; every GPU then holds all
    /// experts.
    #[arg(long, value_name = "N")]
    same: Option<usize>,
    /// Let all ranks share the first GPU, and time the kernels of dispatch and combine: what they cost apart from the
    /// wire.
    #[arg(long)]
    one_gpu: bool,
    /// Speed of the link between two GPUs, one way, in GB/s; the report gives the share of it that is used.
    #[arg(long, value_name = "GBS")]
    link_gbs: Option<f64>,
    /// Time nothing; let the last rank do something wrong, and tell what each rank says: bad-id, late or killed.
    #[arg(long, value_name = "NAME")]
    fault: Option<fault::Fault>,
    /// The rank that this process is; the command sets it.
    #[arg(long, hide = true)]
    rank: Option<usize>,
    /// The folder that ranks meet in; the command sets it.
    #[arg(long, hide = true)]
    folder: Option<PathBuf>,
}

impl Options {
    pub(super) fn is_asked(&self) -> bool {
        self.device == Where::Cuda
    }

    /// Fails for an option that is given without GPUs.
    pub(super) fn require_none(&self) -> Result<()> {
        let given = [
            ("--ranks", self.ranks.is_some()),
            ("--link", !self.link.is_empty()),
            ("--routing", !self.routing.is_empty()),
            ("--same", self.same.is_some()),
            ("--one-gpu", self.one_gpu),
            ("--link-gbs", self.link_gbs.is_some()),
            ("--fault", self.fault.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(Error::usage(format!("{option} goes with --device cuda only"))),
            None => Ok(()),
        }
    }

    fn links(&self) -> Vec<LinkName> {
        if self.link.is_empty() { vec![LinkName::Mapped, LinkName::Nccl] } else { self.link.clone() }
    }

    fn routings(&self) -> Vec<RoutingName> {
        if self.routing.is_empty() { vec![RoutingName::Uniform] } else { self.routing.clone() }
    }

    /// What two GPUs of one host give each other over NVLink, one way.
    pub(super) fn link_bytes_per_second(&self) -> f64 {
        const MEASURED_GBS: f64 = 392.0;
        self.link_gbs.unwrap_or(MEASURED_GBS) * 1e9
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    let ranks = args.gpus.ranks.ok_or_else(|| Error::usage("--ranks is missing, expected the number of GPUs"))?;
    if ranks == 0 || args.tokens.contains(&0) {
        return Err(Error::usage("--ranks and --tokens, expected at least 1"));
    }
    if args.gpus.one_gpu {
        return one_gpu::run(args, ranks);
    }
    let (Some(rank), Some(folder)) = (args.gpus.rank, &args.gpus.folder) else {
        return processes::start(ranks, args.gpus.fault.is_some());
    };
    let exchange: Arc<dyn Exchange> = Arc::new(Files::join(folder, rank, ranks, args.placement.limit()?)?);
    let rank = Rank::new(args, exchange, Device::open(rank)?, &args.gpus.links())?;
    if let Some(fault) = args.gpus.fault {
        return rank.commit(fault);
    }
    let report = rank.measure()?;
    // Nobody leaves while another one still works: its memory may be mapped there.
    rank.exchange.meet()?;
    if rank.exchange.rank() == 0 { args.report.tell(&report, Report::text) } else { Ok(()) }
}

/// One of the ranks.
pub(super) struct Rank<'a> {
    args: &'a Args,
    exchange: Arc<dyn Exchange>,
    device: Device,
    made_up: MadeUp,
    config: LayerConfig,
    /// Of this rank's experts.
    weights: (Weights, Weights),
    /// Without windows, and with them.
    nccl: [Option<Arc<Nccl>>; 2],
}

impl<'a> Rank<'a> {
    fn new(args: &'a Args, exchange: Arc<dyn Exchange>, device: Device, links: &[LinkName]) -> Result<Self> {
        let made_up =
            MadeUp::new(args.preset, args.made_up.experts, args.formats.weights(args.preset), args.made_up.seed, None)?;
        let activations = args.formats.activations(made_up.format(), made_up.shape())?;
        let experts = made_up.shape().local_experts();
        let config = LayerConfig::new(made_up.router().topk, experts, activations);
        let placement = args.placement.config(experts, exchange.ranks())?.placement;
        let share = Share::new(&made_up, placement.experts(exchange.rank()))?;
        let progress = Progress::new("uploading experts", share.shape().local_experts());
        let weights = weights::load(&share, &device, &mut |done| progress.set(done))?;
        let mut nccl = [None, None];
        for (nccl, link) in nccl.iter_mut().zip([LinkName::Nccl, LinkName::NcclWindows]) {
            if links.contains(&link) {
                let joined = Nccl::join(&device, &*exchange, args.placement.limit()?)?;
                *nccl = Some(Arc::new(if link == LinkName::Nccl { joined } else { joined.with_windows() }));
            }
        }
        Ok(Self { args, exchange, device, made_up, config, weights, nccl })
    }

    fn parallel(&self, dispatch: Dispatch, combine: Combine) -> Result<ParallelConfig> {
        let placed = self.args.placement.config(self.config.global_experts, self.exchange.ranks())?;
        Ok(ParallelConfig { dispatch: Some(dispatch), combine, ..placed })
    }

    /// A layer of these ways.
    fn layer(
        &self,
        link: LinkName,
        dispatch: Dispatch,
        combine: Combine,
        capacity: usize,
    ) -> Result<ExpertParallelLayer> {
        let joined = match link {
            LinkName::Mapped => None,
            LinkName::Nccl => self.nccl[0].clone(),
            LinkName::NcclWindows => self.nccl[1].clone(),
        };
        let link = match joined {
            Some(nccl) => Link::Nccl(nccl),
            None if link == LinkName::Mapped => Link::Mapped,
            None => return Err(Error::usage("--link has no nccl")),
        };
        let layer = ExpertParallelLayer::prepare(
            &self.device,
            self.weights.clone(),
            self.config,
            self.parallel(dispatch, combine)?,
            capacity,
            self.exchange.clone(),
            link,
        )?;
        Ok(layer.with_time_limit(self.args.placement.limit()?))
    }

    fn inputs(&self, routing: RoutingName, tokens: usize) -> Result<Inputs> {
        let (ranks, experts) = (self.exchange.ranks(), self.config.global_experts);
        let all = tokens.checked_mul(ranks).ok_or_else(|| Error::usage("--tokens, expected fewer"))?;
        let (ids, weights) = match routing {
            RoutingName::Uniform => self.made_up.uniform_routing(all, experts)?,
            RoutingName::Zipf => self.made_up.zipf_routing(all, experts)?,
        };
        let (rank, topk) = (self.exchange.rank(), self.config.topk);
        Ok(Inputs { states: self.made_up.tokens(all)?, ids, weights, tokens, rank, topk })
    }

    fn measure(&self) -> Result<Report> {
        let capacity = self.args.tokens.iter().copied().max().unwrap_or(1);
        let (dispatches, combines) = self.args.placement.ways();
        let mut layers = Vec::new();
        for link in self.args.gpus.links() {
            for &combine in &combines {
                for &dispatch in &dispatches {
                    layers.push(self.layer(link, dispatch, combine, capacity)?);
                }
            }
        }
        let most = capacity * self.exchange.ranks();
        let local = Layer::prepare(&self.device, self.weights.0.clone(), self.weights.1.clone(), self.config, most)?;
        let whole = match self.args.gpus.same {
            Some(_) => Some(device::prepare(&self.device, &self.made_up, self.config, most, false)?),
            None => None,
        };
        let (mut sizes, routings) = (Vec::new(), self.args.gpus.routings());
        let progress = Progress::new("timing sizes", routings.len() * self.args.tokens.len());
        for &routing in &routings {
            for &tokens in &self.args.tokens {
                self.measure_tokens((routing, tokens), &layers, (&local, whole.as_ref()), &mut sizes)?;
                progress.set(sizes.len() / layers.len().max(1));
            }
        }
        Ok(Report::new(self, &layers, sizes))
    }

    fn measure_tokens(
        &self,
        (routing, tokens): (RoutingName, usize),
        layers: &[ExpertParallelLayer],
        (local, whole): (&Layer, Option<&Layer>),
        sizes: &mut Vec<Size>,
    ) -> Result<()> {
        let inputs = self.inputs(routing, tokens)?;
        let (rank, ranks, topk) = (self.exchange.rank(), self.exchange.ranks(), self.config.topk);
        let map = self.parallel(Dispatch::Gather, Combine::Rows)?.placement.expert_map(rank);
        let all = HostInputs { expert_map: Some(&map), ..inputs.all()? };
        let local = LayerBench::new(&self.device, local, &all)?;
        let expected = match whole {
            Some(whole) => {
                let bench = LayerBench::new(&self.device, whole, &inputs.all()?)?;
                bench.run()?;
                let hidden = whole.shape().hidden();
                Some(bench.output()?[rank * tokens * hidden..(rank + 1) * tokens * hidden].to_vec())
            }
            None => None,
        };
        let ids = MatrixRef::new(&inputs.ids, tokens * ranks, topk)?;
        for layer in layers {
            let traffic = Traffic::count(ids, &vec![tokens; ranks], &layer.parallel().placement)?;
            let bench = ExpertParallelBench::new(layer, &inputs.own()?, tokens)?;
            let same = match (&expected, self.args.gpus.same) {
                (Some(expected), Some(repeats)) => Some(self.compare(&bench, layer, expected, repeats)?),
                _ => None,
            };
            bench.run()?;
            let times = bench.time(&local, self.args.repeat)?;
            let link = self.args.gpus.link_bytes_per_second();
            sizes.push(Size::new((routing, tokens), layer, &traffic, times, link, same)?);
        }
        Ok(())
    }

    /// Values of the first run that are not one rank's, and runs that are not like the first: of all ranks.
    fn compare(
        &self,
        bench: &ExpertParallelBench<'_>,
        layer: &ExpertParallelLayer,
        expected: &[bf16],
        repeats: usize,
    ) -> Result<[u64; 2]> {
        const POISON: u8 = 0xff;
        bench.poison(POISON)?;
        bench.run()?;
        let first = bench.output()?;
        let rows = layer.parallel().combine == Combine::Rows;
        let differ = |(a, b): &(&bf16, &bf16)| {
            // Sums are made in another order: what counts there is that they are near.
            if rows {
                a.to_bits() != b.to_bits()
            } else {
                (a.to_f32() - b.to_f32()).abs() > 0.02 * (1.0 + b.to_f32().abs()) || a.is_nan()
            }
        };
        let values = first.iter().zip(expected).filter(differ).count();
        let graph = layer.is_capturable().then(|| bench.capture()).transpose()?;
        let mut runs = 0;
        for repeat in 0..repeats {
            bench.poison(POISON)?;
            // No rank stores into what another one still fills.
            match graph.as_ref().filter(|_| repeat % 2 == 1) {
                Some(graph) => bench.replay(graph)?,
                None => bench.run()?,
            }
            runs += u64::from(bench.output()? != first);
        }
        let mut all = vec![0u64; 2 * self.exchange.ranks()];
        self.exchange.all_gather(bytemuck::cast_slice(&[values as u64, runs]), bytemuck::cast_slice_mut(&mut all))?;
        Ok([all.iter().step_by(2).sum(), all.iter().skip(1).step_by(2).sum()])
    }
}

/// Tokens of all ranks on the host.
struct Inputs {
    states: LayerInput,
    ids: Vec<i32>,
    weights: Vec<f32>,
    /// Of each rank.
    tokens: usize,
    rank: usize,
    topk: usize,
}

impl Inputs {
    fn all(&self) -> Result<HostInputs<'_>> {
        Ok(HostInputs {
            tokens: self.ids.len() / self.topk,
            hidden_states: device::half_bits(self.states.hidden_states())?.1,
            topk_ids: &self.ids,
            topk_weights: &self.weights,
            expert_map: None,
        })
    }

    fn own(&self) -> Result<HostInputs<'_>> {
        let all = self.all()?;
        let hidden = all.hidden_states.len() / all.tokens;
        let (first, slots) = (self.rank * self.tokens, self.tokens * self.topk);
        Ok(HostInputs {
            tokens: self.tokens,
            hidden_states: &all.hidden_states[first * hidden..][..self.tokens * hidden],
            topk_ids: &all.topk_ids[first * self.topk..][..slots],
            topk_weights: &all.topk_weights[first * self.topk..][..slots],
            expert_map: None,
        })
    }
}
