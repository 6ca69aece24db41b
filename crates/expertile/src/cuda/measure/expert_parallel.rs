//! The layer over several GPUs: one call in device memory of its own, run, read back and timed on all ranks at once.

use super::clock::Clock;
use super::{HostInputs, LayerBench};
use crate::cuda::{DeviceBuffer, DeviceMatrix, ExpertParallelCall, ExpertParallelLayer, Graph, STATE_BYTES, Stream};
use crate::error::{Error, Result, checked_mul, require_len};
use crate::exchange::Exchange;
use half::bf16;

/// Seconds of a call, the slowest rank's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertParallelTimes {
    /// Inside a graph; none for calls that cannot be captured.
    pub graph_seconds: Option<f64>,
    /// Launched from the host, one call after the other.
    pub eager_seconds: f64,
    /// Of the local layer: the same experts over all ranks' tokens, which are there. Inside a graph.
    pub local_graph_seconds: f64,
    /// Of the local layer, launched from the host.
    pub local_eager_seconds: f64,
    /// Dispatch and combine without the experts between them, inside a graph if they can be captured.
    pub exchange_seconds: f64,
    /// Dispatch alone, likewise.
    pub dispatch_seconds: f64,
}

/// Seconds of a rank's kernels where all ranks share a device, so that nothing goes over a wire.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedDeviceTimes {
    /// Of dispatch, its two parts apart, inside a graph.
    pub dispatch_seconds: f64,
    /// Of combine, likewise.
    pub combine_seconds: f64,
}

/// A call of a layer of i32 ids and a bf16 result: inputs, workspace and output in device memory of its own. What it does
/// is done on all ranks at once: each calls the same functions in the same order.
#[derive(Debug)]
pub struct ExpertParallelBench<'a> {
    layer: &'a ExpertParallelLayer,
    call: ExpertParallelCall,
    workspace: DeviceBuffer,
    output: DeviceBuffer<bf16>,
    /// What the other addresses point into.
    _inputs: Vec<DeviceBuffer>,
}

impl<'a> ExpertParallelBench<'a> {
    /// Brings this rank's inputs to its device, for calls of that capacity. An expert map is not asked for.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] for inputs shorter than `tokens` says; as [`ExpertParallelLayer::choice`];
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn new(layer: &'a ExpertParallelLayer, inputs: &HostInputs<'_>, capacity: usize) -> Result<Self> {
        let (device, tokens) = (layer.device(), inputs.tokens);
        let (topk, hidden) = (layer.config().topk, layer.shape().hidden());
        let (values, slots) = (checked_mul("M * H", tokens, hidden)?, checked_mul("M * topk", tokens, topk)?);
        require_len("hidden_states", inputs.hidden_states.len(), values)?;
        require_len("topk_ids", inputs.topk_ids.len(), slots)?;
        require_len("topk_weights", inputs.topk_weights.len(), slots)?;
        let x = device.upload(&inputs.hidden_states[..values])?;
        let ids = device.upload(&inputs.topk_ids[..slots])?;
        let weights = device.upload(&inputs.topk_weights[..slots])?;
        let state: DeviceBuffer = device.allocate(STATE_BYTES)?;
        let workspace: DeviceBuffer = device.allocate(layer.workspace_bytes(capacity)?)?;
        let output = device.allocate(values)?;
        let call = ExpertParallelCall {
            tokens,
            capacity,
            hidden_states: DeviceMatrix::row_major(x.ptr().cast(), hidden),
            topk_ids: DeviceMatrix::row_major(ids.ptr().cast(), topk),
            topk_weights: DeviceMatrix::row_major(weights.ptr(), topk),
            output: output.ptr().cast(),
            state: state.ptr(),
            workspace: workspace.ptr(),
        };
        // SAFETY: the state is this call's own; stream 0 always lives.
        unsafe {
            layer.local().initialise_state(Stream(0), state.ptr())?;
            device.synchronize(Stream(0))?;
        }
        let inputs = [x.into_bytes(), ids.into_bytes(), weights.into_bytes(), state].into();
        Ok(Self { layer, call, workspace, output, _inputs: inputs })
    }

    /// Fills output and workspace with a byte: what is not written, or read without being written, shows.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn poison(&self, byte: u8) -> Result<()> {
        self.workspace.fill(byte)?;
        self.output.fill(byte)
    }

    /// Runs the layer, and waits.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`] and [`ExpertParallelLayer::check_launch`].
    #[allow(unsafe_code)]
    pub fn run(&self) -> Result<()> {
        // SAFETY: the buffers are this call's own, sized by the layer; stream 0 always lives.
        unsafe {
            self.layer.launch(Stream(0), &self.call)?;
            self.layer.check_launch(Stream(0), &self.call)
        }
    }

    /// Captures the call; [`ExpertParallelBench::replay`] runs it.
    ///
    /// # Errors
    /// As [`ExpertParallelLayer::launch`].
    #[allow(unsafe_code)]
    pub fn capture(&self) -> Result<Graph> {
        // SAFETY: the buffers are this call's own, sized by the layer.
        Graph::capture(self.layer.device(), |stream| unsafe { self.layer.launch(stream, &self.call) })
    }

    /// Runs what [`ExpertParallelBench::capture`] has captured, and waits.
    ///
    /// # Errors
    /// As [`ExpertParallelBench::run`].
    #[allow(unsafe_code)]
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: the graph is one of this call, whose buffers live; stream 0 always lives.
        unsafe {
            graph.replay(Stream(0))?;
            self.layer.check_launch(Stream(0), &self.call)
        }
    }

    /// `[M, H]`: the result of the last run.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn output(&self) -> Result<Vec<bf16>> {
        let mut output = vec![bf16::ZERO; self.call.tokens * self.layer.shape().hidden()];
        self.output.download(&mut output)?;
        Ok(output)
    }

    /// Times the kernels of dispatch and combine of ranks that share a device, each rank's own share of both. The parts
    /// of all of them are queued by turns, without the experts between them: combine takes home what a whole call has
    /// left, which goes first.
    ///
    /// # Errors
    /// As [`ExpertParallelBench::run`]; [`Error::Value`] without any rank.
    #[allow(unsafe_code)]
    pub fn time_shared(ranks: &[Self]) -> Result<SharedDeviceTimes> {
        let Some(first) = ranks.first() else { return Err(Error::value("ranks", 0, "at least 1")) };
        let clock = Clock::new(first.layer.device())?;
        // SAFETY: every rank's buffers are its own, sized by its layer, and outlive the clock's waits. Nobody waits for
        // what is queued later.
        let (dispatch, combine, experts) = unsafe {
            (
                |stream| {
                    ranks.iter().try_for_each(|rank| rank.layer.dispatch_send(stream, &rank.call))?;
                    ranks.iter().try_for_each(|rank| rank.layer.dispatch_receive(stream, &rank.call))
                },
                |stream| {
                    ranks.iter().try_for_each(|rank| rank.layer.combine_send(stream, &rank.call))?;
                    ranks.iter().try_for_each(|rank| rank.layer.combine_receive(stream, &rank.call))
                },
                |stream| ranks.iter().try_for_each(|rank| rank.layer.experts(stream, &rank.call)),
            )
        };
        dispatch(Stream(0))?;
        experts(Stream(0))?;
        combine(Stream(0))?;
        let check = || {
            // SAFETY: the states are the calls' own; stream 0 always lives.
            ranks.iter().try_for_each(|rank| unsafe { rank.layer.check_launch(Stream(0), &rank.call) })
        };
        check()?;
        let (dispatch_seconds, _) = clock.graph_and_eager(dispatch)?;
        let (both, _) = clock.graph_and_eager(|stream| dispatch(stream).and_then(|()| combine(stream)))?;
        check()?;
        let share = 1.0 / ranks.len() as f64;
        Ok(SharedDeviceTimes {
            dispatch_seconds: share * dispatch_seconds,
            combine_seconds: share * (both - dispatch_seconds),
        })
    }

    /// Times the call, by turns with a local layer's; medians of so many repeats, of the slowest rank.
    ///
    /// # Errors
    /// As [`ExpertParallelBench::run`]; [`Error::Device`] with a driver that is too old to time.
    #[allow(unsafe_code)]
    pub fn time(&self, local: &LayerBench<'_>, repeats: usize) -> Result<ExpertParallelTimes> {
        let clock = Clock::new(self.layer.device())?;
        let (layer, call) = (self.layer, &self.call);
        let exchange = &**layer.exchange();
        // SAFETY: the buffers are this call's own, sized by the layer, and outlive the clock's waits. Without the experts
        // between them, combine takes home what the call before has left.
        let (whole, dispatch, both) = unsafe {
            (
                |stream| layer.launch(stream, call),
                |stream| layer.dispatch(stream, call),
                |stream| {
                    layer.dispatch(stream, call)?;
                    layer.combine_send(stream, call)?;
                    layer.combine_receive(stream, call)
                },
            )
        };
        let local = |stream| local.launch(stream);
        let [eager_seconds, local_eager_seconds] =
            clock.together(exchange, (repeats, 5), [false; 2], [&whole, &local])?;
        // As many on every rank: what one queues more than another nobody answers.
        let calls = ((0.01 / eager_seconds.max(1e-9)) as usize).clamp(2, 20);
        let in_a_graph = layer.is_capturable();
        let [graph_seconds, local_graph_seconds] =
            clock.together(exchange, (repeats, calls), [in_a_graph, true], [&whole, &local])?;
        let [exchange_seconds, dispatch_seconds] =
            clock.together(exchange, (repeats, calls), [in_a_graph; 2], [&both, &dispatch])?;
        let graph_seconds = in_a_graph.then_some(graph_seconds);
        self.run()?;
        Ok(ExpertParallelTimes {
            graph_seconds,
            eager_seconds,
            local_graph_seconds,
            local_eager_seconds,
            exchange_seconds,
            dispatch_seconds,
        })
    }
}

/// The largest of the ranks' numbers.
fn slowest(exchange: &dyn Exchange, seconds: f64) -> Result<f64> {
    let mut all = vec![0; 8 * exchange.ranks()];
    exchange.all_gather(&seconds.to_le_bytes(), &mut all)?;
    let number = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    Ok(all.chunks_exact(8).map(number).fold(0.0, f64::max))
}

impl Clock<'_> {
    /// Median seconds of one of `calls` calls of each of two works that ranks do at once, each inside a graph or not, by
    /// turns; of the slowest rank. The same calls go before them, so that the ranks' devices have met when the clock starts.
    #[allow(unsafe_code)]
    fn together(
        &self,
        exchange: &dyn Exchange,
        (repeats, calls): (usize, usize),
        in_a_graph: [bool; 2],
        works: [&dyn Fn(Stream) -> Result<()>; 2],
    ) -> Result<[f64; 2]> {
        let all = |work: &dyn Fn(Stream) -> Result<()>, stream| (0..calls).try_for_each(|_| work(stream));
        let capture = |work| Graph::capture(self.device(), |stream| all(work, stream));
        let mut graphs = [None, None];
        for ((graph, work), in_a_graph) in graphs.iter_mut().zip(works).zip(in_a_graph) {
            *graph = in_a_graph.then(|| capture(work)).transpose()?;
        }
        let mut seconds = [Vec::new(), Vec::new()];
        for repeat in 0..repeats.max(1) + 1 {
            for (which, work) in works.into_iter().enumerate() {
                let once = |_: Stream| match &graphs[which] {
                    // SAFETY: the stream is the clock's own; what was captured outlives its waits, as the caller says.
                    Some(graph) => unsafe { graph.replay(self.stream()) },
                    None => all(work, self.stream()),
                };
                exchange.meet()?;
                once(self.stream())?;
                let elapsed = self.elapsed(once)? / calls as f64;
                if repeat > 0 {
                    seconds[which].push(elapsed);
                }
            }
        }
        let [mut first, mut second] = seconds;
        let median = |seconds: &mut Vec<f64>| {
            seconds.sort_by(f64::total_cmp);
            slowest(exchange, seconds[seconds.len() / 2])
        };
        Ok([median(&mut first)?, median(&mut second)?])
    }
}
