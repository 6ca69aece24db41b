//! The layer over several ranks, in host memory.
//!
//! A call: the routes of this rank's tokens, a meeting (how much comes from whom, and is anything wrong), tokens out
//! and in, the local experts over what came, their rows out and in, the sum at home. The received batch is in the order
//! of ranks and tokens, so every expert sees the rows, in the order, that it would see on one rank; summed at home in
//! slot order they give the same bits.

mod backend;
mod call;

use super::layer::{Layer, LayerChoice};
use super::workspace::Sizing;
use crate::combine::Combine;
use crate::dispatch::Dispatch;
use crate::dtype::Float;
use crate::error::{Error, Result, checked_mul, require_len};
use crate::exchange::Exchange;
use crate::expert_parallel::agreement::{Terms, agree};
use crate::expert_parallel::meeting::all_are_well;
use crate::expert_parallel::routes::Routes;
use crate::expert_parallel::{ParallelChoice, ParallelConfig, ParallelStage};
use crate::layer::{LayerConfig, LayerShape};
use crate::matrix::MatrixRef;
use crate::routing::{Routing, TopkIds};
use call::{Call, Inputs};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What [`ExpertParallelLayer::run_observed`] reports after each stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParallelStageDone {
    /// The stage.
    pub stage: ParallelStage,
    /// How long it took, waiting for other ranks included.
    pub elapsed: Duration,
    /// Bytes that this rank sent to others.
    pub sent: u64,
    /// Bytes that it received from others.
    pub received: u64,
}

/// What a call of an expert-parallel layer does. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertParallelChoice {
    /// What travels: the same on all ranks.
    pub parallel: ParallelChoice,
    /// What this rank's experts do if every token of every rank comes here: the worst case.
    pub layer: LayerChoice,
    /// Bytes of workspace of such a call.
    pub workspace_bytes: usize,
}

impl fmt::Display for ExpertParallelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { parallel, layer, workspace_bytes } = self;
        write!(f, "{parallel}; at most {layer}; {workspace_bytes} bytes of workspace in all")
    }
}

/// An expert layer over several ranks: this rank's experts, and the exchange with the others.
///
/// ```
/// use expertile::cpu::{Cpu, ExpertParallelLayer, Layer, PackedWeights};
/// use expertile::exchange::{Exchange, Threads};
/// use expertile::{ActivationFormat, LayerConfig, MatrixRef, ParallelConfig, Placement};
/// use half::bf16;
/// use std::sync::Arc;
///
/// /// One token of `rank` through two experts on two ranks.
/// fn rank(exchange: Threads) -> expertile::Result<bf16> {
///     let (cpu, rank, hidden) = (Cpu::new(), exchange.rank(), 64);
///     let parallel = ParallelConfig::new(Placement::linear(2, 2)?);
///     // This rank's expert alone is loaded.
///     let w = vec![bf16::from_f32(0.1 * (rank + 1) as f32); 2 * hidden * hidden];
///     let w13 = PackedWeights::pack_bf16(&cpu, &w, 1, 2 * hidden, hidden)?;
///     let w2 = PackedWeights::pack_bf16(&cpu, &w[..hidden * hidden], 1, hidden, hidden)?;
///     let layer = Layer::prepare(&cpu, w13, w2, LayerConfig::new(1, 2, ActivationFormat::Bf16), 16)?;
///     let layer = ExpertParallelLayer::prepare(layer, parallel, Arc::new(exchange))?;
///
///     let (x, ids) = ([bf16::ONE; 64], [1 - rank as i32]); // ids are global: each token goes to the other rank
///     let (mut workspace, mut output) = (vec![0; layer.workspace_bytes(1)?], [bf16::ZERO; 64]);
///     let (x, ids) = (MatrixRef::new(&x, 1, hidden)?, MatrixRef::new(&ids, 1, 1)?);
///     layer.run(x, ids, MatrixRef::new(&[1.0], 1, 1)?, &mut workspace, &mut output)?;
///     Ok(output[0])
/// }
///
/// let ranks = Threads::new(2, std::time::Duration::from_secs(60))?;
/// let said: Vec<bf16> = std::thread::scope(|scope| {
///     let ranks: Vec<_> = ranks.into_iter().map(|exchange| scope.spawn(|| rank(exchange))).collect();
///     ranks.into_iter().map(|thread| thread.join().unwrap()).collect::<expertile::Result<_>>()
/// })?;
/// assert!(said[0] > said[1]);
/// # Ok::<(), expertile::Error>(())
/// ```
#[derive(Debug)]
pub struct ExpertParallelLayer {
    layer: Layer,
    parallel: ParallelConfig,
    choice: ParallelChoice,
    exchange: Arc<dyn Exchange>,
    /// `[copies]`: a copy's number to the local expert.
    copy_map: Vec<i32>,
    /// The number that rank 0 gave this layer.
    number: u64,
    calls: AtomicU64,
}

/// Layers that this process has given a number to.
static LAYERS: AtomicU64 = AtomicU64::new(1);

impl ExpertParallelLayer {
    /// This rank's share of a layer: `layer` holds the experts `placement.experts(rank)`, in that order, and every rank
    /// the same shared expert. Its `global_experts` are those of the placement, its `max_tokens` the capacity `C`: the
    /// most tokens that a rank brings to a call, the same on all ranks.
    ///
    /// Ends with a meeting of all ranks: each must come. Where one is refused, or does not agree with rank 0 on what is
    /// computed, all return the same error.
    ///
    /// # Errors
    /// [`Error::OnRank`] for what is wrong on some rank: [`Error::Value`] unless the placement's ranks are the
    /// exchange's and its experts on this rank are as many as the layer's, and as [`ParallelChoice::new`].
    /// [`Error::Disagreement`], [`Error::Absent`], [`Error::Message`], [`Error::Mpi`].
    pub fn prepare(layer: Layer, parallel: ParallelConfig, exchange: Arc<dyn Exchange>) -> Result<Self> {
        let checked = Self::check(&layer, &parallel, &*exchange);
        all_are_well(&*exchange, checked.as_ref().err())?;
        let (layer, choice) = checked?;
        let number = agree(&*exchange, &terms(&layer, &parallel, &choice), LAYERS.fetch_add(1, Ordering::Relaxed))?;
        let copy_map = parallel.placement.copy_map(exchange.rank());
        Ok(Self { layer, parallel, choice, exchange, copy_map, number, calls: AtomicU64::new(0) })
    }

    /// The layer as it runs on what is received, and what calls do.
    fn check(layer: &Layer, parallel: &ParallelConfig, exchange: &dyn Exchange) -> Result<(Layer, ParallelChoice)> {
        let (placement, rank, ranks) = (&parallel.placement, exchange.rank(), exchange.ranks());
        if placement.ranks() != ranks {
            return Err(Error::value("ranks of the placement", placement.ranks(), format!("{ranks}, the exchange's")));
        }
        let (local, placed) = (layer.shape().local_experts(), placement.experts(rank).len());
        if local != placed {
            return Err(Error::value("local_experts", local, format!("{placed}, as placed")));
        }
        let (config, capacity) = (*layer.config(), layer.max_tokens());
        let choice = ParallelChoice::new(layer.shape().hidden(), &config, parallel, capacity)?;
        Ok((layer.with_config(config, choice.most_received_tokens())?, choice))
    }

    /// The layer of this rank's experts.
    #[must_use]
    pub fn local(&self) -> &Layer {
        &self.layer
    }

    /// The sizes of this rank's share: `E` is the experts that it holds.
    #[must_use]
    pub fn shape(&self) -> &LayerShape {
        self.layer.shape()
    }

    /// How it computes, and what its calls are made of.
    #[must_use]
    pub fn config(&self) -> &LayerConfig {
        self.layer.config()
    }

    /// Where experts are, and how rows travel.
    #[must_use]
    pub fn parallel(&self) -> &ParallelConfig {
        &self.parallel
    }

    /// The exchange with the other ranks.
    #[must_use]
    pub fn exchange(&self) -> &Arc<dyn Exchange> {
        &self.exchange
    }

    /// `C`: the most tokens that this rank, and every other, brings to a call.
    #[must_use]
    pub fn max_tokens(&self) -> usize {
        self.choice.capacity
    }

    /// What a call with that many tokens of this rank does.
    ///
    /// # Errors
    /// [`Error::Value`] for more tokens than the layer was prepared for; [`Error::Overflow`].
    pub fn choice(&self, tokens: usize) -> Result<ExpertParallelChoice> {
        LayerConfig::require_tokens(tokens, self.choice.capacity)?;
        let layer = self.layer.choice(self.choice.most_received_tokens())?;
        Ok(ExpertParallelChoice { parallel: self.choice, layer, workspace_bytes: self.workspace_bytes(tokens)? })
    }

    /// Bytes that [`ExpertParallelLayer::run`] needs for any routing of that many tokens of this rank, whatever the
    /// others bring: room for every token of every rank, most of which a usual call never touches.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::choice`].
    pub fn workspace_bytes(&self, tokens: usize) -> Result<usize> {
        LayerConfig::require_tokens(tokens, self.choice.capacity)?;
        Ok(self.sizes(tokens)?.sizing()?.bytes())
    }

    /// The parts of a call's workspace.
    fn sizes(&self, tokens: usize) -> Result<Sizes> {
        let ParallelChoice { ranks, combine, token_row, combine_row_bytes, .. } = self.choice;
        let (topk, what, received) = (self.config().topk, "workspace bytes", self.choice.most_received_tokens());
        let terms = checked_mul(what, tokens, Routes::terms(combine, topk, ranks))?;
        let token_rows = |tokens: usize| checked_mul(what, tokens, token_row.bytes());
        let rows_out = match combine {
            Combine::Rows => checked_mul(what, received, topk)?,
            Combine::Sums => received,
        };
        let picked = match self.choice.dispatch {
            Dispatch::Gather => 0,
            Dispatch::Routed => checked_mul(what, tokens, topk.min(ranks))?,
        };
        let experts = self.layer.received_workspace_bytes(received)?;
        Ok(Sizes {
            routes: Routes::space_len(tokens, topk, ranks)?,
            inv_perm: terms,
            packed: token_rows(tokens)?,
            picked: token_rows(picked)?,
            received: token_rows(received)?,
            experts: experts.max(self.layer.shared_workspace_bytes(tokens)?),
            out: checked_mul(what, rows_out, combine_row_bytes)?,
            // Sums of gathered tokens come back from every rank, whether it has a part in them or not.
            back: checked_mul(what, terms, combine_row_bytes)?,
        })
    }

    /// Runs the layer on this rank's tokens: `hidden_states [M, H]`, `topk_ids` and `topk_weights` `[M, topk]` to
    /// `output [M, H]`. Ids are global. Every rank must make the call, with 0 tokens too.
    ///
    /// # Errors
    /// [`Error::OnRank`], on all ranks alike, for operands of some rank that do not fit each other or what was
    /// prepared, and for its bad ids; [`Error::Disagreement`] if ranks are in different calls; [`Error::Absent`],
    /// [`Error::Message`], [`Error::Mpi`]. Nothing is written to `output` then.
    pub fn run<'i, T: Float, O: Float>(
        &self,
        hidden_states: MatrixRef<'_, T>,
        topk_ids: impl Into<TopkIds<'i>>,
        topk_weights: MatrixRef<'_, f32>,
        workspace: &mut [u8],
        output: &mut [O],
    ) -> Result<()> {
        self.run_observed(hidden_states, topk_ids, topk_weights, workspace, output, &mut |_| {})
    }

    /// [`ExpertParallelLayer::run`], telling `observe` about every stage when it is done.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::run`].
    pub fn run_observed<'i, T: Float, O: Float>(
        &self,
        hidden_states: MatrixRef<'_, T>,
        topk_ids: impl Into<TopkIds<'i>>,
        topk_weights: MatrixRef<'_, f32>,
        workspace: &mut [u8],
        output: &mut [O],
        observe: &mut dyn FnMut(&ParallelStageDone),
    ) -> Result<()> {
        let inputs = self.inputs(hidden_states, topk_ids.into(), topk_weights, workspace.len(), output);
        self.run_checked(inputs, workspace, output, observe)
    }

    /// The operands, if they fit. They are looked at before the call begins, and what is wrong is told in its meeting.
    fn inputs<'a, T: Float, O: Float>(
        &self,
        hidden_states: MatrixRef<'a, T>,
        topk_ids: TopkIds<'a>,
        topk_weights: MatrixRef<'a, f32>,
        workspace: usize,
        output: &[O],
    ) -> Result<Inputs<'a, T>> {
        let (tokens, topk, hidden) = (topk_ids.tokens(), self.config().topk, self.shape().hidden());
        self.config().require_types(T::DTYPE, O::DTYPE)?;
        if topk_ids.topk() != topk {
            return Err(Error::value("topk", topk_ids.topk(), format!("{topk}, as prepared")));
        }
        let needed = self.workspace_bytes(tokens)?;
        let routing = Routing::new(topk_ids, self.parallel.placement.global_experts(), None)?;
        hidden_states.require_shape("hidden_states", tokens, hidden)?;
        topk_weights.require_shape("topk_weights", tokens, topk)?;
        require_len("output", output.len(), checked_mul("M * H", tokens, hidden)?)?;
        require_len("workspace", workspace, needed)?;
        Ok(Inputs { hidden_states, routing, topk_weights })
    }

    fn run_checked<T: Float, O: Float>(
        &self,
        inputs: Result<Inputs<'_, T>>,
        workspace: &mut [u8],
        output: &mut [O],
        observe: &mut dyn FnMut(&ParallelStageDone),
    ) -> Result<()> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut call = Call::begin(self, number, inputs, workspace, observe)?;
        call.dispatch()?;
        let rows_out = call.experts()?;
        call.combine(&rows_out)?;
        call.unpermute(output)
    }
}

/// Elements of the parts of a call's workspace, as the call names them.
struct Sizes {
    routes: usize,
    inv_perm: usize,
    packed: usize,
    picked: usize,
    received: usize,
    experts: usize,
    out: usize,
    back: usize,
}

impl Sizes {
    fn sizing(&self) -> Result<Sizing> {
        let Self { routes, inv_perm, packed, picked, received, experts, out, back } = *self;
        let integers = Sizing::new().add::<i32>(routes)?.add::<i32>(inv_perm)?;
        [packed, picked, received, experts, out, back]
            .into_iter()
            .try_fold(integers, |sizing, bytes| sizing.add::<u8>(bytes))
    }
}

/// What ranks must have in common, in words.
fn terms(layer: &Layer, parallel: &ParallelConfig, choice: &ParallelChoice) -> Terms {
    let (shape, config, placement) = (layer.shape(), layer.config(), &parallel.placement);
    let shared = layer.shared_shape().map_or("none".into(), |shared| format!("of {} values", shared.intermediate()));
    vec![
        ("hidden", shape.hidden().to_string()),
        ("intermediate", shape.intermediate().to_string()),
        ("topk", config.topk.to_string()),
        ("placement", format!("{placement}, fingerprint {:016x}", placement.fingerprint())),
        ("capacity", choice.capacity.to_string()),
        ("dispatch", choice.dispatch.to_string()),
        ("combine", choice.combine.to_string()),
        ("bytes of a token's row", choice.token_row.bytes().to_string()),
        ("activation_format", config.activation_format.name().to_owned()),
        ("weight format", layer.weight_format().name().to_owned()),
        ("activation", format!("{:?}", config.activation)),
        ("biases", layer.has_biases().map(|has| if has { "given" } else { "none" }).join(", ")),
        ("shared expert", shared),
        ("weight_on_input", config.weight_on_input.to_string()),
        ("isa", layer.cpu().isa().to_string()),
    ]
}
