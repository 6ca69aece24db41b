//! A made-up layer over ranks that share one device, and the same layer on one rank.

use crate::on_device::{filled, upload};
use expertile::backend::Backend;
use expertile::cuda::{
    Device, DeviceBuffer, DeviceMatrix, DevicePtr, ExpertParallelCall, ExpertParallelLayer, Layer, LayerCall, Link,
    RoutingPtrs, STATE_BYTES, Stream, Weights,
};
use expertile::exchange::{Exchange, Threads};
use expertile::int4::{self, Int4Scales};
use expertile::{ActivationFormat, Dtype, E4m3, LayerConfig, MatrixRef, ParallelConfig, Result, WeightFormat, mxfp4};
use expertile_testkit::{NAN_POISON, Random, block_scaled_weights, unit_rows, unit_weights};
use half::{bf16, f16};
use std::sync::Arc;
use std::time::Duration;

/// What a made-up layer is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) experts: usize,
    pub(crate) topk: usize,
    pub(crate) weights: WeightFormat,
    /// Of rows.
    pub(crate) format: ActivationFormat,
    pub(crate) input: Dtype,
    pub(crate) output: Dtype,
    pub(crate) ids: Dtype,
    pub(crate) weight_on_input: bool,
    pub(crate) biased: bool,
}

pub(crate) const BASE: Spec = Spec {
    hidden: 512,
    intermediate: 256,
    experts: 12,
    topk: 4,
    weights: WeightFormat::E4m3,
    format: ActivationFormat::E4m3,
    input: Dtype::Bf16,
    output: Dtype::Bf16,
    ids: Dtype::I32,
    weight_on_input: false,
    biased: false,
};

impl Spec {
    pub(crate) fn config(&self) -> LayerConfig {
        LayerConfig {
            ids: self.ids,
            input: self.input,
            output: self.output,
            weight_on_input: self.weight_on_input,
            ..LayerConfig::new(self.topk, self.experts, self.format)
        }
    }
}

/// One matrix of every expert.
enum Matrices {
    Bf16(Vec<bf16>),
    E4m3(Vec<E4m3>, Vec<f32>),
    /// Blocks and scales.
    Mxfp4(Vec<u8>, Vec<u8>),
    Int4(Vec<u8>, Vec<bf16>),
}

/// The weights of all experts, on the host.
pub(crate) struct Model {
    pub(crate) spec: Spec,
    w13: Matrices,
    w2: Matrices,
}

impl Model {
    pub(crate) fn new(spec: Spec) -> Self {
        let mut random = Random::new(7 + spec.hidden as u64);
        let mut make = |extents: [usize; 3]| match spec.weights {
            WeightFormat::Bf16 => Matrices::Bf16(unit_weights(&mut random, extents, bf16::from_f32)),
            WeightFormat::Mxfp4 => {
                let values: Vec<f32> = unit_weights(&mut random, extents, |value| value);
                let (mut blocks, mut scales) = (vec![0; values.len() / 2], vec![0; values.len() / mxfp4::GROUP]);
                mxfp4::quantize_rows(&values, extents[2], &mut blocks, &mut scales).unwrap();
                Matrices::Mxfp4(blocks, scales)
            }
            WeightFormat::Int4 => {
                let values: Vec<f32> = unit_weights(&mut random, extents, |value| value);
                let mut blocks = vec![0; values.len() / 2];
                let mut scales = vec![bf16::ZERO; values.len() / int4::GROUP];
                int4::quantize_rows(&values, extents[2], &mut blocks, &mut scales).unwrap();
                Matrices::Int4(blocks, scales)
            }
            WeightFormat::E4m3 => {
                let (values, scales) = block_scaled_weights(&mut random, extents, E4m3::MAX, E4m3::from_f32);
                Matrices::E4m3(values, scales)
            }
        };
        let Spec { hidden, intermediate, experts, .. } = spec;
        let w13 = make([experts, 2 * intermediate, hidden]);
        Self { spec, w13, w2: make([experts, hidden, intermediate]) }
    }

    /// The biases of some experts, in that order; none if there are none.
    pub(crate) fn biases(&self, experts: &[usize]) -> (Option<Vec<f32>>, Option<Vec<f32>>) {
        let Spec { hidden, intermediate, experts: all, biased, .. } = self.spec;
        let mut random = Random::new(55);
        let mut make = |width: usize| {
            let values: Vec<f32> = (0..all * width).map(|_| random.uniform()).collect();
            biased.then(|| pick(&values, experts, all))
        };
        (make(2 * intermediate), make(hidden))
    }

    /// The weights of some experts, in that order.
    pub(crate) fn weights(&self, device: &Device, experts: &[usize]) -> (Weights, Weights) {
        let Spec { hidden, intermediate, experts: all, .. } = self.spec;
        let upload = |matrices: &Matrices, n: usize, k: usize| {
            let sizes = (experts.len(), n, k);
            match matrices {
                Matrices::Bf16(values) => Weights::upload_bf16(device, &pick(values, experts, all), sizes),
                Matrices::E4m3(values, scales) => {
                    let (values, scales) = (pick(values, experts, all), pick(scales, experts, all));
                    Weights::upload_e4m3(device, &values, &scales, sizes)
                }
                Matrices::Mxfp4(blocks, scales) => {
                    let (blocks, scales) = (pick(blocks, experts, all), pick(scales, experts, all));
                    Weights::upload_mxfp4(device, &blocks, &scales, sizes)
                }
                Matrices::Int4(blocks, scales) => {
                    let (blocks, scales) = (pick(blocks, experts, all), pick(scales, experts, all));
                    let rows = MatrixRef::new(&scales[..], experts.len() * n, k / int4::GROUP).unwrap();
                    Weights::upload_int4(device, &blocks, Int4Scales::Bf16(rows), sizes)
                }
            }
            .unwrap()
        };
        (upload(&self.w13, 2 * intermediate, hidden), upload(&self.w2, hidden, intermediate))
    }
}

fn pick<T: Copy>(values: &[T], experts: &[usize], all: usize) -> Vec<T> {
    let len = values.len() / all;
    experts.iter().flat_map(|&expert| values[expert * len..][..len].iter().copied()).collect()
}

/// Tokens of all ranks, one behind the other.
pub(crate) struct Tokens {
    pub(crate) x: Vec<f32>,
    pub(crate) ids: Vec<i64>,
    pub(crate) weights: Vec<f32>,
}

impl Tokens {
    pub(crate) fn new(spec: &Spec, ids: Vec<i64>, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let tokens = ids.len() / spec.topk;
        let x = unit_rows(&mut random, tokens * spec.hidden, |x| x);
        let weights = (0..ids.len()).map(|_| random.uniform() + 0.1).collect();
        Self { x, ids, weights }
    }

    fn upload(&self, device: &Device, spec: &Spec, first: usize, tokens: usize) -> [DeviceBuffer; 3] {
        let x = &self.x[first * spec.hidden..][..tokens * spec.hidden];
        let (slots, count) = (first * spec.topk, tokens * spec.topk);
        let ids = &self.ids[slots..][..count];
        let x = match spec.input {
            Dtype::F16 => upload(device, &x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()),
            _ => upload(device, &x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
        };
        let ids = match spec.ids {
            Dtype::I64 => upload(device, ids),
            _ => upload(device, &ids.iter().map(|&id| id as i32).collect::<Vec<_>>()),
        };
        [x, ids, upload(device, &self.weights[slots..][..count])]
    }
}

/// What one rank (or the only one) has.
pub(crate) struct Operands {
    _inputs: [DeviceBuffer; 3],
    pub(crate) output: DeviceBuffer,
    pub(crate) workspace: DeviceBuffer,
    pub(crate) call: ExpertParallelCall,
    _state: DeviceBuffer,
}

impl Operands {
    pub(crate) fn new(
        device: &Device,
        spec: &Spec,
        tokens: &Tokens,
        (first, count, capacity): (usize, usize, usize),
        workspace_bytes: usize,
    ) -> Self {
        let inputs = tokens.upload(device, spec, first, count);
        let output = filled(device, count * spec.hidden * spec.output.bytes(), NAN_POISON);
        let workspace = filled(device, workspace_bytes, NAN_POISON);
        let state = filled(device, STATE_BYTES, 0);
        let call = ExpertParallelCall {
            tokens: count,
            capacity,
            hidden_states: DeviceMatrix::row_major(inputs[0].ptr(), spec.hidden),
            topk_ids: DeviceMatrix::row_major(inputs[1].ptr(), spec.topk),
            topk_weights: DeviceMatrix::row_major(inputs[2].ptr().cast(), spec.topk),
            output: output.ptr(),
            state: state.ptr(),
            workspace: workspace.ptr(),
        };
        Self { _inputs: inputs, output, workspace, call, _state: state }
    }

    pub(crate) fn poison(&self) {
        self.output.fill(NAN_POISON).unwrap();
        self.workspace.fill(NAN_POISON).unwrap();
    }

    pub(crate) fn output(&self, device: &Device, spec: &Spec) -> Vec<u8> {
        let mut bytes = vec![0; self.output.bytes()];
        device.download(&self.output, &mut bytes).unwrap();
        bytes.truncate(self.call.tokens * spec.hidden * spec.output.bytes());
        bytes
    }
}

/// The output of all tokens on one rank.
pub(crate) fn on_one_rank(device: &Device, model: &Model, tokens: &Tokens) -> Vec<u8> {
    let spec = &model.spec;
    let count = tokens.ids.len() / spec.topk;
    let all: Vec<usize> = (0..spec.experts).collect();
    let (w13, w2) = model.weights(device, &all);
    let (b13, b2) = model.biases(&all);
    let layer = Layer::prepare(device, w13, w2, spec.config(), count.max(1)).unwrap().with_biases(b13, b2).unwrap();
    let operands = Operands::new(device, spec, tokens, (0, count, count), layer.workspace_bytes(count).unwrap());
    let ExpertParallelCall { hidden_states, topk_ids, topk_weights, output, state, workspace, .. } = operands.call;
    let routing = RoutingPtrs { ids: topk_ids, expert_map: None, global_experts: spec.experts };
    let call = LayerCall { tokens: count, hidden_states, routing, topk_weights, output, state, workspace };
    unsafe { layer.launch(Stream(0), &call) }.unwrap();
    operands.output(device, spec)
}

/// Ranks on one device, by mapped windows.
pub(crate) fn prepare(
    device: &Device,
    model: &Model,
    parallel: &ParallelConfig,
    capacity: usize,
    limit: Duration,
) -> Vec<Result<ExpertParallelLayer>> {
    on_ranks(parallel.placement.ranks(), |exchange| {
        prepare_rank(device, model, parallel, capacity, exchange, Link::Mapped)
            .map(|layer| layer.with_time_limit(limit))
    })
}

/// One of the ranks.
pub(crate) fn prepare_rank(
    device: &Device,
    model: &Model,
    parallel: &ParallelConfig,
    capacity: usize,
    exchange: Arc<dyn Exchange>,
    link: Link,
) -> Result<ExpertParallelLayer> {
    let experts = parallel.placement.experts(exchange.rank());
    let (weights, (b13, b2)) = (model.weights(device, experts), model.biases(experts));
    let (config, parallel) = (model.spec.config(), parallel.clone());
    let layer = ExpertParallelLayer::prepare(device, weights, config, parallel, capacity, exchange, link)?;
    if model.spec.biased { layer.with_biases(b13, b2) } else { Ok(layer) }
}

/// What each of the ranks does, in a thread of its own.
pub(crate) fn on_ranks<T: Send>(ranks: usize, work: impl Fn(Arc<dyn Exchange>) -> T + Sync) -> Vec<T> {
    let exchanges = Threads::new(ranks, Duration::from_secs(120)).unwrap();
    let work = &work;
    std::thread::scope(|scope| {
        let start = |exchange: Threads| scope.spawn(move || work(Arc::new(exchange)));
        let threads: Vec<_> = exchanges.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Queues the calls of ranks on one stream, part by part: nobody waits for what is queued later.
pub(crate) fn launch(stream: Stream, ranks: &[(&ExpertParallelLayer, &ExpertParallelCall)]) -> Result<()> {
    unsafe {
        ranks.iter().try_for_each(|(layer, call)| layer.dispatch_send(stream, call))?;
        ranks.iter().rev().try_for_each(|(layer, call)| layer.dispatch_receive(stream, call))?;
        for (layer, call) in ranks {
            layer.experts(stream, call)?;
            layer.combine_send(stream, call)?;
        }
        ranks.iter().rev().try_for_each(|(layer, call)| layer.combine_receive(stream, call))
    }
}

/// An address that nothing may be read from.
pub(crate) fn nowhere<T>() -> DevicePtr<T> {
    DevicePtr::new(0)
}
