//! The layer over several GPUs: this rank's experts, and how tokens and results get from one to the other.
//!
//! A call has five parts, which may be queued apart: `dispatch_send` quantizes this rank's tokens, once, and stores them
//! to every rank; `dispatch_receive` waits for everybody's; `experts` is the layer from routing to GEMM 2 over all of
//! them, rank by rank; `combine_send` takes results home; `combine_receive` waits for them, and sums. The received batch
//! is in the order of ranks and tokens, so every expert sees the rows, in the order, that it would see on one rank.

mod call;
mod counted;
mod kernels;
mod peers;
mod safe;
mod window;

use super::driver::{Device, DeviceBuffer, DevicePtr, PeerMemory, Source, Stream};
use super::layer::{Layer, LayerChoice, ReceivedEntry};
use super::nccl::Nccl;
use super::weights::Weights;
use crate::dispatch::{Dispatch, TokenRow};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::exchange::{Exchange, TIME_LIMIT};
use crate::expert_parallel::agreement::{Terms, agree};
use crate::expert_parallel::meeting::all_are_well;
use crate::expert_parallel::{ParallelChoice, ParallelConfig};
use crate::layer::{LayerConfig, LayerShape};
use crate::placement::Placement;
pub use call::ExpertParallelCall;
use counted::Counted;
use kernels::{Kernels, MAX_WINDOWS, Way};
pub use safe::CapturedExpertParallelLayer;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use window::{PlainTokens, WindowMemory, WindowParts};

/// How bytes get from one GPU to another.
#[derive(Debug, Clone)]
pub enum Link {
    /// Kernels store into the other ranks' memory, over NVLink or within one GPU, and wait for flags. For ranks of one
    /// host whose GPUs reach each other; up to 64.
    Mapped,
    /// NCCL's collectives: any number of hosts. Every call moves the same number of bytes, whatever the routing, unless
    /// [`Dispatch::Routed`] is asked for: it moves as many rows as there are, so its calls wait on the host until all
    /// ranks have counted theirs, and cannot be captured in a graph.
    Nccl(Arc<Nccl>),
}

impl Link {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mapped => "mapped",
            Self::Nccl(nccl) if nccl.has_windows() => "nccl-windows",
            Self::Nccl(_) => "nccl",
        }
    }

    fn is_mapped(&self) -> bool {
        matches!(self, Self::Mapped)
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a call of an expert-parallel layer does. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertParallelChoice {
    /// What travels: the same on all ranks.
    pub parallel: ParallelChoice,
    /// What a token is on its way in such a call: few travel as they are, and are quantized where they arrive.
    pub token_row: TokenRow,
    /// What this rank's experts do with the tokens of all ranks.
    pub layer: LayerChoice,
    /// Kernels that a call launches, and groups of NCCL's.
    pub launches: usize,
    /// Bytes of workspace of such a call.
    pub workspace_bytes: usize,
    /// Bytes of the window, which the layer owns.
    pub window_bytes: usize,
}

impl fmt::Display for ExpertParallelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { parallel, token_row, layer, launches, workspace_bytes, window_bytes } = self;
        write!(f, "{parallel}; {layer}; in all {launches} launches, {workspace_bytes} bytes of workspace, ")?;
        write!(f, "{window_bytes} of the window")?;
        match token_row == &parallel.token_row {
            true => Ok(()),
            false => write!(f, "; tokens as they are, {} bytes each", token_row.bytes()),
        }
    }
}

/// An expert layer over several GPUs: this rank's experts, its window, and the way to the other ranks.
///
/// Every rank makes every call, with 0 tokens too, and calls follow each other on a stream. After an
/// [`Error::Absent`] the layer is of no use any more, on any rank.
#[derive(Debug)]
pub struct ExpertParallelLayer {
    layer: Layer,
    /// Whose ids are global ones, of the caller's type.
    config: LayerConfig,
    parallel: ParallelConfig,
    choice: ParallelChoice,
    exchange: Arc<dyn Exchange>,
    link: Link,
    entry: ReceivedEntry,
    kernels: Kernels,
    parts: WindowParts,
    plain: Option<PlainTokens>,
    windows: Vec<DevicePtr>,
    /// Before the window: other ranks' are closed first.
    _opened: Vec<PeerMemory>,
    window: WindowMemory,
    state: DeviceBuffer,
    tables: Tables,
    /// Where a library moves as many rows as there are.
    counted: Option<Counted>,
    limit: Duration,
}

/// What kernels look up: which copies an expert has, and where copies are.
#[derive(Debug)]
struct Tables {
    /// `[G + 1]`
    first_choice: DeviceBuffer<i32>,
    /// `[copies]`: copies' numbers, by expert.
    choices: DeviceBuffer<i32>,
    /// `[copies]`
    copy_ranks: DeviceBuffer<i32>,
    /// `[copies]`: a copy's number to the local expert.
    copy_map: DeviceBuffer<i32>,
}

impl Tables {
    fn new(device: &Device, placement: &Placement, rank: usize) -> Result<Self> {
        let (mut first_choice, mut choices) = (vec![0], Vec::new());
        for expert in 0..placement.global_experts() {
            choices.extend(placement.copies_of(expert).iter().map(|copy| copy.number as i32));
            first_choice.push(choices.len() as i32);
        }
        let ranks = (0..placement.ranks()).flat_map(|rank| placement.experts(rank).iter().map(move |_| rank as i32));
        Ok(Self {
            first_choice: device.upload(&first_choice)?,
            choices: device.upload(&choices)?,
            copy_ranks: device.upload(&ranks.collect::<Vec<_>>())?,
            copy_map: device.upload(&placement.copy_map(rank))?,
        })
    }
}

impl ExpertParallelLayer {
    /// This rank's share of a layer: `w13` and `w2` hold the experts `placement.experts(rank)`, in that order. Ids are
    /// global; `config.global_experts` are those of the placement; `capacity` is `C`, the most tokens that a rank brings
    /// to a call, the same on all ranks. `exchange` joins the ranks' processes (or threads) on the host: it is used
    /// here, and not in calls.
    ///
    /// Kernels are compiled and windows mapped here, and it ends with a meeting of all ranks: no call finds a rank
    /// compiling. Where one is refused, or does not agree with rank 0 on what is computed, all return the same error.
    ///
    /// # Errors
    /// [`Error::OnRank`] for what is wrong on some rank: as [`Layer::prepare`] and [`ParallelChoice::new`];
    /// [`Error::Value`] unless ranks and experts are as placed, and for more ranks than the link takes;
    /// [`Error::Cuda`] if windows cannot be mapped.
    /// [`Error::Disagreement`], [`Error::Absent`], [`Error::Message`].
    pub fn prepare(
        device: &Device,
        (w13, w2): (Weights, Weights),
        config: LayerConfig,
        parallel: ParallelConfig,
        capacity: usize,
        exchange: Arc<dyn Exchange>,
        link: Link,
    ) -> Result<Self> {
        let shape = LayerShape::of_weights(
            ([w13.experts(), w13.n(), w13.k()], w13.format()),
            ([w2.experts(), w2.n(), w2.k()], w2.format()),
            config.activation.is_gated(),
        );
        let checked = shape.and_then(|shape| check(&shape, &config, parallel, capacity, &*exchange, &link));
        all_are_well(&*exchange, checked.as_ref().err())?;
        let (parallel, choice) = checked?;
        let terms = terms((w13.n() / 2, w13.format().name()), &config, &parallel, &choice, &link);
        agree(&*exchange, &terms, 0)?;
        let ready = Self::ready(device, (w13, w2), config, parallel, choice, exchange.clone(), link);
        all_are_well(&*exchange, ready.as_ref().err())?;
        let mut ready = ready?;
        match &mut ready.window {
            WindowMemory::Own(window) if ready.link.is_mapped() => {
                (ready.windows, ready._opened) = peers::map_windows(device, &*exchange, window)?;
            }
            WindowMemory::Own(_) => {}
            WindowMemory::Nccl(window) => {
                let registered = window.register();
                all_are_well(&*exchange, registered.as_ref().err())?;
            }
        }
        let met = ready.meet();
        all_are_well(&*exchange, met.as_ref().err())?;
        met.map(|()| ready)
    }

    /// All that a rank does by itself.
    fn ready(
        device: &Device,
        (w13, w2): (Weights, Weights),
        config: LayerConfig,
        parallel: ParallelConfig,
        choice: ParallelChoice,
        exchange: Arc<dyn Exchange>,
        link: Link,
    ) -> Result<Self> {
        // What travels are numbers of copies, as i32. The steps of a call are apart, also of few tokens: combine takes
        // their rows.
        let global_experts = parallel.placement.copies();
        let local = LayerConfig { global_experts, ids: Dtype::I32, one_launch: false, ..config };
        let layer = Layer::prepare(device, w13, w2, local, choice.most_received_tokens())?;
        let (rank, mapped) = (exchange.rank(), link.is_mapped());
        let plain = PlainTokens::new(&choice, &config)?;
        let way = Way::new(choice.dispatch, mapped);
        let parts = WindowParts::new(&choice, plain.as_ref(), way)?;
        let window = WindowMemory::allocate(device, &link, parts.bytes)?;
        let state = device.allocate(call::state_bytes(choice.ranks))?;
        // Flags and what has been waited for begin at zero; and slots that no rank has filled are nobody's.
        state.fill(0)?;
        window.clear(device, parts.bytes)?;
        let mut windows = vec![DevicePtr::default(); choice.ranks];
        windows[rank] = window.ptr();
        Ok(Self {
            entry: ReceivedEntry::prepare(device, &layer)?,
            kernels: Kernels::prepare(device, &choice, plain.as_ref().map(|plain| &plain.row), &config, mapped)?,
            tables: Tables::new(device, &parallel.placement, rank)?,
            counted: (way == Way::Counted).then(|| Counted::new(device, &choice)).transpose()?,
            limit: TIME_LIMIT,
            _opened: Vec::new(),
            layer,
            config,
            parallel,
            choice,
            exchange,
            link,
            parts,
            plain,
            windows,
            window,
            state,
        })
    }

    /// NCCL connects ranks at the first call of a kind, which must not be one that is captured.
    #[allow(unsafe_code)]
    fn meet(&self) -> Result<()> {
        let Link::Nccl(nccl) = &self.link else { return Ok(()) };
        for capacity in [1, self.choice.capacity] {
            // SAFETY: the window is the layer's own and as large as that; the default stream always lives.
            unsafe {
                self.move_headers(nccl, Stream(0))?;
                self.move_tokens(nccl, Stream(0), capacity)?;
                self.move_results(nccl, Stream(0), capacity)?;
            }
        }
        // SAFETY: the default stream always lives.
        if !unsafe { self.device().synchronize_within(Stream(0), self.limit)? } {
            return Err(self.absent());
        }
        // What came is nobody's.
        self.window.clear(self.device(), self.parts.bytes)
    }

    /// The same with biases of this rank's experts: as [`Layer::with_biases`]. Every rank calls, before any call of the
    /// layer; where one has a bias of a GEMM all have.
    ///
    /// # Errors
    /// As [`Layer::with_biases`], on all ranks, by [`Error::OnRank`]; [`Error::Disagreement`] where ranks do not have the
    /// same; [`Error::Absent`].
    pub fn with_biases(self, b13: Option<Vec<f32>>, b2: Option<Vec<f32>>) -> Result<Self> {
        let given = |bias: &Option<Vec<f32>>| if bias.is_some() { "given" } else { "none" }.to_owned();
        agree(&*self.exchange, &vec![("w13_bias", given(&b13)), ("w2_bias", given(&b2))], 0)?;
        if b13.is_none() && b2.is_none() {
            return Ok(self);
        }
        let (exchange, device) = (self.exchange.clone(), self.layer.device().clone());
        let Self { layer, .. } = self;
        let with = layer.with_biases(b13, b2).and_then(|layer| Ok((ReceivedEntry::prepare(&device, &layer)?, layer)));
        all_are_well(&*exchange, with.as_ref().err())?;
        let (entry, layer) = with?;
        Ok(Self { entry, layer, ..self })
    }

    /// Waits of calls from now on end after that long. The same on all ranks, or the first to give up is named.
    #[must_use]
    pub fn with_time_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// How long a call waits for another rank.
    #[must_use]
    pub fn time_limit(&self) -> Duration {
        self.limit
    }

    /// The sources of the kernels of dispatch and combine, with mapped windows or over NCCL. It needs no device.
    ///
    /// # Errors
    /// [`Error::Dtype`] for types that the kernels do not take, [`Error::Value`] for an `H` that a group of scales does
    /// not divide.
    pub fn sources(choice: &ParallelChoice, config: &LayerConfig, mapped: bool) -> Result<Vec<Source>> {
        let plain = PlainTokens::new(choice, config)?.map(|plain| plain.row);
        let rows = [Some(choice.token_row), plain].into_iter().flatten();
        let dispatch = rows.map(|row| kernels::dispatch_source(choice, &row, config, mapped));
        dispatch.chain([kernels::combine_source(choice, config, mapped)]).collect()
    }

    /// The layer of this rank's experts. Its ids are numbers of copies.
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
        &self.config
    }

    /// Where experts are, and how rows travel.
    #[must_use]
    pub fn parallel(&self) -> &ParallelConfig {
        &self.parallel
    }

    /// The exchange of the ranks on the host.
    #[must_use]
    pub fn exchange(&self) -> &Arc<dyn Exchange> {
        &self.exchange
    }

    /// How bytes get to other GPUs.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// `C`: the most tokens that this rank, and every other, brings to a call.
    #[must_use]
    pub fn max_tokens(&self) -> usize {
        self.choice.capacity
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.layer.device()
    }

    /// Whether calls can be captured in a graph: not those that wait on the host.
    #[must_use]
    pub fn is_capturable(&self) -> bool {
        self.counted.is_none()
    }

    /// What a call does whose ranks bring up to `capacity` tokens each.
    ///
    /// # Errors
    /// [`Error::Value`] for more than the layer was prepared for.
    pub fn choice(&self, capacity: usize) -> Result<ExpertParallelChoice> {
        LayerConfig::require_tokens(capacity, self.choice.capacity)?;
        let layer = self.layer.choice(self.choice.ranks * capacity)?;
        let around = match self.parts.way {
            // Dispatch, and two kernels of combine.
            Way::Stored => 3,
            // One of dispatch, two of combine, and two of NCCL's.
            Way::Gathered => 5,
            // Three of dispatch, two of combine, and three of NCCL's.
            Way::Counted => 8,
        };
        let (token_row, ready) = (*self.token_row(capacity), !self.is_plain(capacity));
        Ok(ExpertParallelChoice {
            parallel: self.choice,
            token_row,
            layer,
            launches: around + self.layer.received_launches(&layer, ready),
            workspace_bytes: self.workspace_bytes(capacity)?,
            window_bytes: self.parts.bytes,
        })
    }

    /// Whether tokens of calls of that capacity travel as they are, though GEMM 1 reads them quantized.
    fn is_plain(&self, capacity: usize) -> bool {
        self.plain.is_some_and(|plain| capacity <= plain.most_tokens)
    }

    fn token_row(&self, capacity: usize) -> &TokenRow {
        self.plain
            .as_ref()
            .filter(|plain| capacity <= plain.most_tokens)
            .map_or(&self.choice.token_row, |plain| &plain.row)
    }

    /// Bytes of workspace of a call whose ranks bring up to `capacity` tokens each, whatever the routing.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::choice`].
    pub fn workspace_bytes(&self, capacity: usize) -> Result<usize> {
        LayerConfig::require_tokens(capacity, self.choice.capacity)?;
        self.layer.workspace_bytes(self.choice.ranks * capacity)
    }
}

/// What can be said before anything is prepared.
fn check(
    shape: &LayerShape,
    config: &LayerConfig,
    parallel: ParallelConfig,
    capacity: usize,
    exchange: &dyn Exchange,
    link: &Link,
) -> Result<(ParallelConfig, ParallelChoice)> {
    let (placement, rank, ranks) = (&parallel.placement, exchange.rank(), exchange.ranks());
    if placement.ranks() != ranks {
        return Err(Error::value("ranks of the placement", placement.ranks(), format!("{ranks}, the exchange's")));
    }
    let (local, placed) = (shape.local_experts(), placement.experts(rank).len());
    if local != placed {
        return Err(Error::value("local_experts", local, format!("{placed}, as placed")));
    }
    if ranks > MAX_WINDOWS {
        return Err(Error::value("ranks", ranks, format!("at most {MAX_WINDOWS} on GPUs")));
    }
    let mut parallel = parallel;
    if let Link::Nccl(nccl) = link {
        if (nccl.rank(), nccl.ranks()) != (rank, ranks) {
            let expected = format!("{ranks}, the exchange's, in the same order");
            return Err(Error::value("ranks of NCCL", nccl.ranks(), expected));
        }
        // Counts that the host waits for are for those who ask for them.
        parallel.dispatch = parallel.dispatch.or(Some(Dispatch::Gather));
    }
    let choice = ParallelChoice::new(shape.hidden(), config, &parallel, capacity)?;
    Ok((parallel, choice))
}

/// What ranks must have in common, in words.
fn terms(
    (intermediate, weights): (usize, &str),
    config: &LayerConfig,
    parallel: &ParallelConfig,
    choice: &ParallelChoice,
    link: &Link,
) -> Terms {
    let placement = &parallel.placement;
    vec![
        ("hidden", choice.token_row.hidden().to_string()),
        ("intermediate", intermediate.to_string()),
        ("topk", config.topk.to_string()),
        ("placement", format!("{placement}, fingerprint {:016x}", placement.fingerprint())),
        ("capacity", choice.capacity.to_string()),
        ("dispatch", choice.dispatch.to_string()),
        ("combine", choice.combine.to_string()),
        ("link", link.to_string()),
        ("bytes of a token's row", choice.token_row.bytes().to_string()),
        ("activation_format", config.activation_format.name().to_owned()),
        ("weight format", weights.to_owned()),
        ("activation", format!("{:?}", config.activation)),
        ("alignment", format!("{:?}", config.alignment)),
        ("weight_on_input", config.weight_on_input.to_string()),
        ("split_k", config.split_k.to_string()),
    ]
}
