//! This process as one rank of several: options, the share of a layer's weights, a call, and what all ranks tell rank 0.

use crate::error::{Error, Result};
use crate::memory;
use crate::packed::Packed;
use crate::parts::Parts;
use crate::placement_file::PlacementChoice;
use crate::report::format;
use crate::report::stages::median;
use crate::weights::{ExpertWeights, Part, Space, TakePart};
use expertile::cpu::{Cpu, ExpertParallelLayer, ParallelStageDone};
use expertile::exchange::{Exchange, Mpi, TIME_LIMIT};
use expertile::{
    Activation, Combine, Dispatch, LayerConfig, LayerShape, MatrixRef, ParallelConfig, ParallelStage, Placement,
    Router, WeightFormat,
};
use expertile_checkpoint::{Biases, HiddenStates, SharedExpert};
use half::bf16;
use serde::Serialize;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How ranks hand bytes to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ExchangeName {
    /// Processes that mpiexec has started.
    Mpi,
}

/// Where experts are, and how rows travel.
#[derive(Debug, clap::Args)]
pub(crate) struct PlacementOptions {
    /// Where experts are: linear, round-robin, or a file that `plan --placement-output` has written [default: linear].
    #[arg(long, value_name = "NAME")]
    placement: Option<PlacementChoice>,
    /// How tokens travel: gather or routed [default: as the number of ranks asks for].
    #[arg(long, value_name = "WAY")]
    dispatch: Option<Dispatch>,
    /// How results travel: rows, with the same bits on any number of ranks, or sums [default: rows].
    #[arg(long, value_name = "WAY")]
    combine: Option<Combine>,
    /// Seconds after which a rank that does not come is given up [default: 60].
    #[arg(long, value_name = "S")]
    time_limit: Option<f64>,
}

impl PlacementOptions {
    pub(crate) fn inputs(&self) -> Option<PathBuf> {
        self.placement.as_ref().and_then(PlacementChoice::file).map(PathBuf::from)
    }

    /// The option that is given, if one is.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let given = [
            ("--placement", self.placement.is_some()),
            ("--dispatch", self.dispatch.is_some()),
            ("--combine", self.combine.is_some()),
            ("--time-limit", self.time_limit.is_some()),
        ];
        given.into_iter().find(|(_, is_given)| *is_given).map(|(name, _)| name)
    }

    /// How long a rank waits for another.
    pub(crate) fn limit(&self) -> Result<Duration> {
        let seconds = self.time_limit.unwrap_or(TIME_LIMIT.as_secs_f64());
        let limit = Duration::try_from_secs_f64(seconds).ok().filter(|limit| !limit.is_zero());
        limit.ok_or_else(|| Error::usage(format!("--time-limit is {seconds}, expected a number of seconds above 0")))
    }

    /// Joins the ranks that mpiexec has started.
    pub(crate) fn join(&self) -> Result<Group> {
        Ok(Group { exchange: Arc::new(Mpi::open_with(None, self.limit()?)?) })
    }

    /// The ways asked for, of dispatch and of combine; all of them where none is.
    pub(crate) fn ways(&self) -> (Vec<Dispatch>, Vec<Combine>) {
        let dispatch = self.dispatch.map_or(Dispatch::ALL.to_vec(), |way| vec![way]);
        (dispatch, self.combine.map_or(Combine::ALL.to_vec(), |way| vec![way]))
    }

    pub(crate) fn config(&self, experts: usize, ranks: usize) -> Result<ParallelConfig> {
        let placement = self.placement.clone().unwrap_or(PlacementChoice::Linear).placement(experts, ranks)?;
        let combine = self.combine.unwrap_or_default();
        Ok(ParallelConfig { dispatch: self.dispatch, combine, ..ParallelConfig::new(placement) })
    }
}

/// All ranks, as this one sees them.
pub(crate) struct Group {
    exchange: Arc<Mpi>,
}

impl Group {
    pub(crate) fn rank(&self) -> usize {
        self.exchange.rank()
    }

    pub(crate) fn ranks(&self) -> usize {
        self.exchange.ranks()
    }

    pub(crate) fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// What the MPI library calls itself.
    pub(crate) fn library(&self) -> &str {
        self.exchange.library()
    }

    /// Threads of this rank: the number asked for, or its part of the machine's processors.
    pub(crate) fn threads(&self, asked: Option<usize>) -> Option<usize> {
        let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok().filter(|&ranks| ranks > 0);
        let on_this_host = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"].into_iter().find_map(number);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let share = (processors / on_this_host.unwrap_or(self.ranks())).max(1);
        asked.or_else(|| number("RAYON_NUM_THREADS")).or(Some(share))
    }

    /// This rank's part of so many tokens.
    pub(crate) fn share_of(&self, tokens: usize) -> Range<usize> {
        let start = |rank: usize| (tokens as u128 * rank as u128 / self.ranks() as u128) as usize;
        start(self.rank())..start(self.rank() + 1)
    }

    /// The numbers of every rank, as many from each.
    pub(crate) fn gather(&self, mine: &[f64]) -> Result<Vec<Vec<f64>>> {
        let mut all = vec![0.0; mine.len() * self.ranks()];
        self.exchange.all_gather(bytemuck::cast_slice(mine), bytemuck::cast_slice_mut(&mut all))?;
        Ok(match mine.len() {
            0 => vec![Vec::new(); self.ranks()],
            len => all.chunks(len).map(<[f64]>::to_vec).collect(),
        })
    }

    /// Every rank's outputs, one behind the other, on rank 0; nothing on the others. `tokens` of `hidden` values in all.
    pub(crate) fn collect(&self, mine: &[bf16], tokens: usize, hidden: usize) -> Result<Vec<bf16>> {
        let (rank, ranks) = (self.rank(), self.ranks());
        let mut all: Vec<bf16> = memory::zeroed("the output", if rank == 0 { tokens * hidden } else { 0 })?;
        let send: Vec<&[u8]> =
            (0..ranks).map(|to| if to == 0 { bytemuck::cast_slice(mine) } else { &[][..] }).collect();
        let mut rest: &mut [u8] = bytemuck::cast_slice_mut(&mut all);
        let mut receive: Vec<&mut [u8]> = Vec::new();
        for from in 0..ranks {
            let start = |rank: usize| (tokens as u128 * rank as u128 / ranks as u128) as usize;
            let len = if rank == 0 { 2 * hidden * (start(from + 1) - start(from)) } else { 0 };
            let (part, others) = rest.split_at_mut(len);
            receive.push(part);
            rest = others;
        }
        self.exchange.all_to_all_v(&send, &mut receive)?;
        Ok(all)
    }

    /// The seconds of one exchange of so many bytes, without anything else: after a meeting, the slowest rank's.
    /// `sent[r]` and `received[r]` are this rank's.
    pub(crate) fn exchange_seconds(&self, sent: &[usize], received: &[usize], repeat: usize) -> Result<f64> {
        let out: Vec<Vec<u8>> = sent.iter().map(|&bytes| vec![1; bytes]).collect();
        let mut back: Vec<Vec<u8>> = received.iter().map(|&bytes| vec![0; bytes]).collect();
        let mut times = Vec::new();
        for _ in 0..repeat + 1 {
            self.exchange.meet()?;
            let started = std::time::Instant::now();
            let out: Vec<&[u8]> = out.iter().map(Vec::as_slice).collect();
            let mut back: Vec<&mut [u8]> = back.iter_mut().map(Vec::as_mut_slice).collect();
            self.exchange.all_to_all_v(&out, &mut back)?;
            times.push(started.elapsed().as_secs_f64());
        }
        // The first one warms up.
        let mine = median(times.split_off(1));
        Ok(self.gather(&[mine])?.into_iter().flatten().fold(0.0, f64::max))
    }

    /// The error that this rank ends with. Only the first rank prints an error that all ranks have returned. After an
    /// error of this rank alone MPI is not finalized: that would wait for the other ranks.
    pub(crate) fn leave(&self, error: Error) -> Error {
        match error {
            Error::Library(expertile::Error::OnRank { .. } | expertile::Error::Disagreement { .. }) => {
                if self.is_first() { error } else { Error::Told }
            }
            Error::Check(_) => error,
            error => {
                self.exchange.abandon();
                Error::Rank { rank: self.rank(), source: Box::new(error) }
            }
        }
    }
}

/// Some experts of a layer, as a layer.
pub(crate) struct Share<'a> {
    weights: &'a dyn ExpertWeights,
    experts: &'a [usize],
    shape: LayerShape,
    biases: Option<Biases>,
}

impl<'a> Share<'a> {
    pub(crate) fn new(weights: &'a dyn ExpertWeights, experts: &'a [usize]) -> Result<Self> {
        let (hidden, intermediate) = (weights.shape().hidden(), weights.shape().intermediate());
        let shape = if weights.shape().is_gated() {
            LayerShape::new(hidden, intermediate, experts.len())?
        } else {
            LayerShape::ungated(hidden, intermediate, experts.len())?
        };
        let all = weights.shape().local_experts();
        let picked = |values: &[f32]| {
            let each = values.len() / all;
            experts.iter().flat_map(|&expert| values[expert * each..][..each].to_vec()).collect()
        };
        let biases = weights.biases().map(|biases| Biases { w13: picked(&biases.w13), w2: picked(&biases.w2) });
        Ok(Self { weights, experts, shape, biases })
    }
}

impl ExpertWeights for Share<'_> {
    fn shape(&self) -> LayerShape {
        self.shape
    }

    fn format(&self) -> WeightFormat {
        self.weights.format()
    }

    fn dtype(&self) -> &'static str {
        self.weights.dtype()
    }

    fn are_rounded(&self) -> bool {
        self.weights.are_rounded()
    }

    fn activation(&self) -> Activation {
        self.weights.activation()
    }

    fn weight_on_input(&self) -> bool {
        self.weights.weight_on_input()
    }

    fn biases(&self) -> Option<&Biases> {
        self.biases.as_ref()
    }

    fn shared(&self) -> Option<&SharedExpert<'_>> {
        self.weights.shared()
    }

    fn router(&self) -> &Router {
        self.weights.router()
    }

    fn router_weight(&self) -> &[f32] {
        self.weights.router_weight()
    }

    fn with_part(&self, part: Part, expert: usize, space: &mut Space, take: &mut TakePart<'_>) -> Result<()> {
        self.weights.with_part(part, self.experts[expert], space, take)
    }

    fn w13_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        self.weights.w13_row(self.experts[expert], row, out);
    }

    fn w2_row(&self, expert: usize, row: usize, out: &mut [f64]) {
        self.weights.w2_row(self.experts[expert], row, out);
    }
}

/// This rank's part of a layer, packed.
pub(crate) struct ParallelLayer {
    pub(crate) layer: ExpertParallelLayer,
    pub(crate) bytes: usize,
    pub(crate) seconds: f64,
}

impl ParallelLayer {
    /// Packs this rank's experts alone, then meets the others.
    pub(crate) fn new(
        cpu: &Cpu,
        group: &Group,
        options: &PlacementOptions,
        weights: &dyn ExpertWeights,
        config: LayerConfig,
        parts: Parts,
        capacity: usize,
    ) -> Result<Self> {
        let parallel = options.config(weights.shape().local_experts(), group.ranks())?;
        let placement: Placement = parallel.placement.clone();
        let share = Share::new(weights, placement.experts(group.rank()))?;
        let Packed { layer, bytes, seconds } = Packed::new(cpu, &share, config, parts)?;
        let layer = layer.with_config(*layer.config(), capacity.max(1))?;
        let layer = ExpertParallelLayer::prepare(layer, parallel, group.exchange.clone())?;
        Ok(Self { layer, bytes, seconds })
    }
}

/// A call of this rank's own tokens.
pub(crate) struct ParallelCall<'a> {
    layer: &'a ExpertParallelLayer,
    hidden_states: &'a HiddenStates,
    /// This rank's among the tokens of `hidden_states`.
    mine: Range<usize>,
    ids: &'a [i32],
    weights: &'a [f32],
    workspace: Vec<u8>,
    pub(crate) output: Vec<bf16>,
}

/// The stages of a call on all ranks.
#[derive(Debug)]
pub(crate) struct RankTimes {
    pub(crate) stages: Vec<RankStage>,
    /// All stages of the slowest rank.
    pub(crate) total_seconds: f64,
}

/// A stage on all ranks.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RankStage {
    pub(crate) stage: &'static str,
    pub(crate) mean_seconds: f64,
    /// Of the slowest rank; waiting for others is part of a stage that exchanges.
    pub(crate) most_seconds: f64,
    /// Of the rank that sends, or receives, most.
    pub(crate) most_sent_bytes: u64,
    pub(crate) most_received_bytes: u64,
}

impl<'a> ParallelCall<'a> {
    /// `ids` and `weights` are `[M, topk]` of this rank's own tokens.
    pub(crate) fn new(
        layer: &'a ExpertParallelLayer,
        hidden_states: &'a HiddenStates,
        mine: Range<usize>,
        ids: &'a [i32],
        weights: &'a [f32],
    ) -> Result<Self> {
        let workspace = memory::zeroed("the workspace", layer.workspace_bytes(mine.len())?)?;
        let output = memory::zeroed("the output", mine.len() * layer.shape().hidden())?;
        Ok(Self { layer, hidden_states, mine, ids, weights, workspace, output })
    }

    pub(crate) fn workspace_bytes(&self) -> usize {
        self.workspace.len()
    }

    fn run(&mut self, observe: &mut dyn FnMut(&ParallelStageDone)) -> Result<()> {
        let (hidden, topk, tokens) = (self.layer.shape().hidden(), self.layer.config().topk, self.mine.len());
        let ids = MatrixRef::new(self.ids, tokens, topk)?;
        let weights = MatrixRef::new(self.weights, tokens, topk)?;
        let range = self.mine.start * hidden..self.mine.end * hidden;
        let (workspace, output) = (&mut self.workspace[..], &mut self.output[..]);
        macro_rules! run {
            ($values:expr) => {{
                let x = MatrixRef::new(&$values[range], tokens, hidden)?;
                self.layer.run_observed(x, ids, weights, workspace, output, observe)
            }};
        }
        match self.hidden_states {
            HiddenStates::Bf16(values) => run!(values),
            HiddenStates::F16(values) => run!(values),
            HiddenStates::F32(values) => run!(values),
        }?;
        Ok(())
    }

    fn run_once(&mut self) -> Result<Vec<ParallelStageDone>> {
        let mut stages = Vec::with_capacity(ParallelStage::ALL.len());
        self.run(&mut |done| stages.push(*done))?;
        Ok(stages)
    }

    /// Runs once to warm up, then as often as `repeats(seconds of the slowest rank's first run)` says: every stage's
    /// median, over all ranks.
    pub(crate) fn time(&mut self, group: &Group, repeats: impl Fn(f64) -> usize) -> Result<RankTimes> {
        let first: f64 = self.run_once()?.iter().map(|done| done.elapsed.as_secs_f64()).sum();
        let slowest = group.gather(&[first])?.into_iter().flatten().fold(0.0, f64::max);
        let mut runs = Vec::new();
        for _ in 0..repeats(slowest).max(1) {
            runs.push(self.run_once()?);
        }
        let mut mine = Vec::new();
        for (at, done) in runs[0].iter().enumerate() {
            let seconds = median(runs.iter().map(|run| run[at].elapsed.as_secs_f64()).collect());
            mine.extend([seconds, done.sent as f64, done.received as f64]);
        }
        let all = group.gather(&mine)?;
        let total = |rank: &Vec<f64>| rank.iter().step_by(3).sum::<f64>();
        let total_seconds = all.iter().map(total).fold(0.0, f64::max);
        let stages = runs[0].iter().enumerate().map(|(at, done)| {
            let of = |part: usize| all.iter().map(move |rank| rank[3 * at + part]);
            let most = |part: usize| of(part).fold(0.0, f64::max);
            RankStage {
                stage: done.stage.name(),
                mean_seconds: of(0).sum::<f64>() / all.len() as f64,
                most_seconds: most(0),
                most_sent_bytes: most(1) as u64,
                most_received_bytes: most(2) as u64,
            }
        });
        Ok(RankTimes { stages: stages.collect(), total_seconds })
    }
}

impl RankStage {
    pub(crate) const HEADER: [&'static str; 5] = ["stage", "mean rank", "slowest", "most sent", "most received"];

    /// Cells for a table with [`RankStage::HEADER`].
    pub(crate) fn row(&self) -> Vec<String> {
        let bytes = |bytes: u64| if bytes == 0 { "-".into() } else { format::bytes(bytes) };
        vec![
            self.stage.into(),
            format::seconds(self.mean_seconds),
            format::seconds(self.most_seconds),
            bytes(self.most_sent_bytes),
            bytes(self.most_received_bytes),
        ]
    }
}
