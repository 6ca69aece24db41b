//! A made-up layer on the host, on the CPU backend, for the oracle, and on a device.

use crate::on_device::upload;
use expertile::cpu::{self, Cpu, PackedWeights};
use expertile::cuda::{
    Device, DeviceBuffer, DeviceMatrix, DevicePtr, Layer, LayerCall, RoutingPtrs, STATE_BYTES, Stream, Weights,
};
use expertile::int4::{self, Int4Scales};
use expertile::{
    Activation, ActivationFormat, Dtype, E4m3, Float, LayerConfig, LayerShape, Layout, MatrixRef, Routing, ScaleFormat,
    Scales, TopkIds, WeightFormat, mxfp4,
};
use expertile_oracle::layer as oracle;
use expertile_testkit::{
    GUARD, NAN_POISON, Pattern, Random, assert_untouched, block_scaled_weights, expert_map, unit_rows, unit_weights,
};
use half::{bf16, f16};
use std::ops::Range;

/// What a made-up layer is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) experts: usize,
    /// Global experts, of which some are local; 0 without a map.
    pub(crate) global: usize,
    pub(crate) topk: usize,
    pub(crate) format: WeightFormat,
    pub(crate) activation_format: ActivationFormat,
    pub(crate) biased: bool,
    pub(crate) input: Dtype,
    pub(crate) output: Dtype,
    pub(crate) ids: Dtype,
    pub(crate) activation: Activation,
    pub(crate) weight_on_input: bool,
    pub(crate) split_k: bool,
    pub(crate) one_launch: bool,
    pub(crate) max_tokens: usize,
}

pub(crate) const BASE: Spec = Spec {
    hidden: 512,
    intermediate: 256,
    experts: 16,
    global: 0,
    topk: 4,
    format: WeightFormat::E4m3,
    activation_format: ActivationFormat::E4m3,
    biased: false,
    input: Dtype::Bf16,
    output: Dtype::Bf16,
    ids: Dtype::I32,
    activation: Activation::SWIGLU,
    weight_on_input: false,
    split_k: false,
    one_launch: true,
    max_tokens: 600,
};

impl Spec {
    /// mxfp4 and int4 go with either; the others with their own.
    pub(crate) fn activations(&self) -> ActivationFormat {
        match self.format {
            WeightFormat::E4m3 => ActivationFormat::E4m3,
            WeightFormat::Bf16 => ActivationFormat::Bf16,
            WeightFormat::Mxfp4 | WeightFormat::Int4 => self.activation_format,
        }
    }

    pub(crate) fn global_experts(&self) -> usize {
        if self.global > 0 { self.global } else { self.experts }
    }

    pub(crate) fn config(&self) -> LayerConfig {
        LayerConfig {
            ids: self.ids,
            input: self.input,
            output: self.output,
            activation: self.activation,
            weight_on_input: self.weight_on_input,
            split_k: self.split_k,
            one_launch: self.one_launch,
            ..LayerConfig::new(self.topk, self.global_experts(), self.activations())
        }
    }
}

/// One matrix of every expert, `[experts, n, k]`.
pub(crate) enum Matrices {
    Bf16(Vec<bf16>),
    E4m3(Vec<E4m3>, Vec<f32>),
    /// Blocks and scales.
    Mxfp4(Vec<u8>, Vec<u8>),
    /// Blocks and scales.
    Int4(Vec<u8>, Vec<bf16>),
}

/// `[rows, K / 32]`, of which a matrix of so many rows has these.
fn int4_scales(scales: &[bf16], rows: usize) -> Int4Scales<'_> {
    Int4Scales::Bf16(MatrixRef::new(scales, rows, scales.len() / rows).unwrap())
}

impl Matrices {
    fn new(format: WeightFormat, extents: [usize; 3], random: &mut Random) -> Self {
        match format {
            WeightFormat::Bf16 => Self::Bf16(unit_weights(random, extents, bf16::from_f32)),
            WeightFormat::Mxfp4 => {
                let values: Vec<f32> = unit_weights(random, extents, |value| value);
                let k = extents[2];
                let (mut blocks, mut scales) = (vec![0; values.len() / 2], vec![0; values.len() / mxfp4::GROUP]);
                mxfp4::quantize_rows(&values, k, &mut blocks, &mut scales).unwrap();
                Self::Mxfp4(blocks, scales)
            }
            WeightFormat::E4m3 => {
                let (values, scales) = block_scaled_weights(random, extents, E4m3::MAX, E4m3::from_f32);
                Self::E4m3(values, scales)
            }
            WeightFormat::Int4 => {
                let values: Vec<f32> = unit_weights(random, extents, |value| value);
                let (mut blocks, mut scales) =
                    (vec![0; values.len() / 2], vec![bf16::ZERO; values.len() / int4::GROUP]);
                int4::quantize_rows(&values, extents[2], &mut blocks, &mut scales).unwrap();
                Self::Int4(blocks, scales)
            }
        }
    }

    pub(crate) fn upload(&self, device: &Device, sizes: (usize, usize, usize)) -> Weights {
        match self {
            Self::Bf16(values) => Weights::upload_bf16(device, values, sizes),
            Self::E4m3(values, scales) => Weights::upload_e4m3(device, values, scales, sizes),
            Self::Mxfp4(blocks, scales) => Weights::upload_mxfp4(device, blocks, scales, sizes),
            Self::Int4(blocks, scales) => {
                Weights::upload_int4(device, blocks, int4_scales(scales, sizes.0 * sizes.1), sizes)
            }
        }
        .unwrap()
    }

    fn pack(&self, cpu: &Cpu, (experts, n, k): (usize, usize, usize)) -> PackedWeights {
        match self {
            Self::Bf16(values) => PackedWeights::pack_bf16(cpu, values, experts, n, k),
            Self::E4m3(values, scales) => PackedWeights::pack_e4m3(cpu, values, scales, experts, n, k),
            Self::Mxfp4(blocks, scales) => PackedWeights::pack_mxfp4(cpu, blocks, scales, experts, n, k),
            Self::Int4(blocks, scales) => {
                PackedWeights::pack_int4(cpu, blocks, int4_scales(scales, experts * n), experts, n, k)
            }
        }
        .unwrap()
    }

    /// Some of the experts'.
    fn of_experts(&self, experts: Range<usize>, all: usize) -> Self {
        let part = |len: usize| experts.start * (len / all)..experts.end * (len / all);
        match self {
            Self::Bf16(values) => Self::Bf16(values[part(values.len())].to_vec()),
            Self::E4m3(values, scales) => {
                Self::E4m3(values[part(values.len())].to_vec(), scales[part(scales.len())].to_vec())
            }
            Self::Mxfp4(blocks, scales) => {
                Self::Mxfp4(blocks[part(blocks.len())].to_vec(), scales[part(scales.len())].to_vec())
            }
            Self::Int4(blocks, scales) => {
                Self::Int4(blocks[part(blocks.len())].to_vec(), scales[part(scales.len())].to_vec())
            }
        }
    }

    fn row(&self, (n, k): (usize, usize), expert: usize, row: usize, out: &mut [f64]) {
        let start = (expert * n + row) * k;
        for (col, out) in out.iter_mut().enumerate() {
            *out = match self {
                Self::Bf16(values) => values[start + col].to_f64(),
                Self::E4m3(values, scales) => {
                    let block = (expert * n.div_ceil(128) + row / 128) * k.div_ceil(128) + col / 128;
                    f64::from(values[start + col].to_f32()) * f64::from(scales[block])
                }
                Self::Mxfp4(blocks, scales) => {
                    let (byte, scale) = (blocks[(start + col) / 2], scales[(start + col) / mxfp4::GROUP]);
                    f64::from(mxfp4::decode(byte >> (4 * (col % 2)), scale))
                }
                Self::Int4(blocks, scales) => {
                    let (byte, scale) = (blocks[(start + col) / 2], scales[(start + col) / int4::GROUP]);
                    f64::from(int4::decode(byte >> (4 * (col % 2)), scale.to_f32()))
                }
            };
        }
    }
}

/// A made-up layer, everywhere.
pub(crate) struct Model {
    pub(crate) spec: Spec,
    pub(crate) w13: Matrices,
    pub(crate) w2: Matrices,
    pub(crate) map: Option<Vec<i32>>,
    pub(crate) on_cpu: cpu::Layer,
    packed_w2: PackedWeights,
    b13: Option<Vec<f32>>,
    b2: Option<Vec<f32>>,
    pub(crate) on_device: Layer,
    /// The same, with a launch for each step whatever the number of tokens.
    pub(crate) in_steps: Layer,
    cpu: Cpu,
}

impl Model {
    pub(crate) fn new(device: &Device, spec: Spec) -> Self {
        let mut random = Random::new(spec.hidden as u64 + spec.experts as u64);
        let Spec { hidden, intermediate, experts, .. } = spec;
        let sizes = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate));
        let w13 = Matrices::new(spec.format, sizes.0.into(), &mut random);
        let w2 = Matrices::new(spec.format, sizes.1.into(), &mut random);
        let map = (spec.global > 0).then(|| expert_map(&mut random, spec.global, experts));
        Self::with_weights(device, spec, (w13, w2), map)
    }

    /// The same experts, but only some of them: a rank of an expert-parallel layer.
    pub(crate) fn rank(&self, device: &Device, experts: Range<usize>) -> Self {
        let all = self.spec.experts;
        let local = |id: usize| if experts.contains(&id) { (id - experts.start) as i32 } else { -1 };
        let weights = (self.w13.of_experts(experts.clone(), all), self.w2.of_experts(experts.clone(), all));
        let spec = Spec { experts: experts.len(), global: all, ..self.spec };
        Self::with_weights(device, spec, weights, Some((0..all).map(local).collect()))
    }

    pub(crate) fn with_weights(
        device: &Device,
        spec: Spec,
        (w13, w2): (Matrices, Matrices),
        map: Option<Vec<i32>>,
    ) -> Self {
        let Spec { hidden, intermediate, experts, .. } = spec;
        let sizes = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate));
        let cpu = Cpu::new();
        let packed = (w13.pack(&cpu, sizes.0), w2.pack(&cpu, sizes.1));
        let on_cpu = cpu::Layer::prepare(&cpu, packed.0, packed.1, spec.config(), spec.max_tokens).unwrap();
        let packed_w2 = w2.pack(&cpu, sizes.1);
        let (up, down) = (w13.upload(device, sizes.0), w2.upload(device, sizes.1));
        let in_steps = LayerConfig { one_launch: false, ..spec.config() };
        let in_steps = Layer::prepare(device, up.clone(), down.clone(), in_steps, spec.max_tokens).unwrap();
        let on_device = Layer::prepare(device, up, down, spec.config(), spec.max_tokens).unwrap();
        let mut random = Random::new(55);
        let mut bias = |width| spec.biased.then(|| (0..experts * width).map(|_| random.uniform()).collect::<Vec<_>>());
        let (b13, b2) = (bias(2 * intermediate), bias(hidden));
        let on_cpu = on_cpu.with_biases(b13.clone(), b2.clone()).unwrap();
        let with_biases = |layer: Layer| match spec.biased {
            true => layer.with_biases(b13.clone(), b2.clone()).unwrap(),
            false => layer,
        };
        let [on_device, in_steps] = [on_device, in_steps].map(with_biases);
        assert_eq!(on_device.shape(), &LayerShape::new(hidden, intermediate, experts).unwrap());
        Self { spec, w13, w2, map, on_cpu, packed_w2, b13, b2, on_device, in_steps, cpu }
    }

    /// Of `w13` and `w2`.
    pub(crate) fn biases(&self) -> [Option<Vec<f32>>; 2] {
        [self.b13.clone(), self.b2.clone()]
    }

    /// The CPU backend's output.
    pub(crate) fn cpu(&self, inputs: &Inputs) -> Vec<f64> {
        match (self.spec.input, self.spec.output) {
            (Dtype::Bf16, Dtype::Bf16) => self.cpu_typed::<bf16, bf16>(inputs),
            (Dtype::Bf16, Dtype::F32) => self.cpu_typed::<bf16, f32>(inputs),
            (Dtype::F16, Dtype::F16) => self.cpu_typed::<f16, f16>(inputs),
            (Dtype::F16, Dtype::F32) => self.cpu_typed::<f16, f32>(inputs),
            types => panic!("no test has {types:?}"),
        }
    }

    fn cpu_typed<T: Float, O: Float>(&self, inputs: &Inputs) -> Vec<f64> {
        let (tokens, topk) = (inputs.tokens, self.spec.topk);
        let x: Vec<T> = inputs.x.iter().map(|&x| T::from_f32(x)).collect();
        let ids = TopkIds::from(MatrixRef::new(&inputs.ids, tokens, topk).unwrap());
        let routing = Routing::new(ids, self.spec.experts, self.map.as_deref()).unwrap();
        let mut workspace = vec![0; self.on_cpu.workspace_bytes(tokens).unwrap()];
        let mut output = vec![O::from_f32(f32::NAN); tokens * self.spec.hidden];
        let x = MatrixRef::new(&x, tokens, self.spec.hidden).unwrap();
        let weights = MatrixRef::new(&inputs.weights, tokens, topk).unwrap();
        self.on_cpu.run(x, &routing, weights, &mut workspace, &mut output).unwrap();
        output.into_iter().map(|value| f64::from(value.to_f32())).collect()
    }

    /// What the CPU backend makes of the activated rows that a call in steps has left on the device: GEMM 2's rows, and
    /// which of them are live; and of the device's rows of GEMM 2: the output. With the device's own rows.
    pub(crate) fn second_half(&self, inputs: &Inputs, call: &Call<'_>) -> SecondHalf {
        let Spec { hidden, intermediate, topk, experts, .. } = self.spec;
        let plan = self.in_steps.choice(inputs.tokens).unwrap().plan;
        let parts = self.in_steps.parts(inputs.tokens, call.workspace.ptr()).unwrap();
        let ids = TopkIds::from(MatrixRef::new(&inputs.ids, inputs.tokens, topk).unwrap());
        let routing = Routing::new(ids, experts, self.map.as_deref()).unwrap();
        let mut space = vec![0; Layout::space_len(&plan).unwrap()];
        let layout = Layout::build(&plan, &routing, &mut space).unwrap();

        let values = plan.m_sum() * intermediate;
        let format = ScaleFormat::HOPPER;
        let (e4m3, halves, scales);
        let activations = match self.spec.activations() {
            ActivationFormat::E4m3 => {
                e4m3 = call.part::<E4m3>(parts.activated, values);
                scales = call.part::<f32>(
                    parts.activated_scales.unwrap().cast(),
                    format.words(plan.m_sum(), intermediate).unwrap(),
                );
                cpu::Activations::E4m3 { rows: &e4m3, scales: Scales::f32(format, &scales) }
            }
            ActivationFormat::Bf16 => {
                halves = call.part::<bf16>(parts.activated, values);
                cpu::Activations::Bf16(&halves)
            }
        };
        let bytes = cpu::grouped_gemm_workspace_bytes(plan.m_sum(), intermediate, activations.format()).unwrap();
        let mut from_cpu = vec![bf16::ZERO; plan.m_sum() * hidden];
        let workspace = &mut vec![0; bytes];
        let b2 = self.b2.as_deref();
        cpu::grouped_gemm_with_bias(&self.cpu, &layout, activations, &self.packed_w2, b2, workspace, &mut from_cpu)
            .unwrap();

        let from_device = call.part::<bf16>(parts.back.cast(), plan.m_sum() * hidden);
        let live = (0..plan.m_sum()).filter(|&row| layout.m_indices()[row] >= 0);
        let live: Vec<usize> = live.flat_map(|row| row * hidden..(row + 1) * hidden).collect();
        let f64s = |rows: &[bf16]| live.iter().map(|&at| rows[at].to_f64()).collect();
        let output = match self.spec.output {
            Dtype::F16 => self.unpermuted::<f16>(inputs, &layout, &from_device),
            Dtype::F32 => self.unpermuted::<f32>(inputs, &layout, &from_device),
            _ => self.unpermuted::<bf16>(inputs, &layout, &from_device),
        };
        SecondHalf { from_cpu: f64s(&from_cpu), from_device: f64s(&from_device), output }
    }

    fn unpermuted<O: Float>(&self, inputs: &Inputs, layout: &Layout<'_>, rows: &[bf16]) -> Vec<f64> {
        let rows = MatrixRef::new(rows, layout.m_sum(), self.spec.hidden).unwrap();
        let weights = MatrixRef::new(&inputs.weights, inputs.tokens, self.spec.topk).unwrap();
        let weights = (!self.spec.weight_on_input).then_some(weights);
        let mut output = vec![O::from_f32(f32::NAN); inputs.tokens * self.spec.hidden];
        cpu::unpermute(&self.cpu, rows, layout, weights, &mut output).unwrap();
        output.into_iter().map(|value| f64::from(value.to_f32())).collect()
    }

    /// The oracle's output for some of the tokens.
    pub(crate) fn oracle(&self, inputs: &Inputs, tokens: &[usize]) -> Vec<f64> {
        let Spec { hidden, intermediate, topk, activation, weight_on_input, .. } = self.spec;
        let Activation::Swiglu { alpha, beta, limit } = activation else { unreachable!("{activation:?} on a GPU") };
        let rows = |width: usize| tokens.iter().flat_map(move |token| token * width..(token + 1) * width);
        let x: Vec<f32> = rows(hidden).map(|at| inputs.x[at]).collect();
        let ids: Vec<i64> = rows(topk).map(|at| inputs.ids[at]).collect();
        let weights: Vec<f32> = rows(topk).map(|at| inputs.weights[at]).collect();
        let layer = oracle::Layer {
            hidden,
            intermediate,
            activation: expertile_oracle::activation::Activation::Swiglu {
                alpha: f64::from(alpha),
                beta: f64::from(beta),
                limit: limit.map(f64::from),
            },
            weight_on_input,
            w13_row: &|expert, row, out| self.w13.row((2 * intermediate, hidden), expert, row, out),
            w2_row: &|expert, row, out| self.w2.row((hidden, intermediate), expert, row, out),
            b13: self.b13.as_deref(),
            b2: self.b2.as_deref(),
            shared: None,
        };
        layer.run(&x, &ids, topk, Some(&weights), self.map.as_deref()).output
    }
}

/// See [`Model::second_half`]; the rows are live ones only.
pub(crate) struct SecondHalf {
    pub(crate) from_cpu: Vec<f64>,
    pub(crate) from_device: Vec<f64>,
    pub(crate) output: Vec<f64>,
}

/// One call's inputs on the host; values are exact in the layer's input type.
pub(crate) struct Inputs {
    pub(crate) tokens: usize,
    pub(crate) x: Vec<f32>,
    pub(crate) ids: Vec<i64>,
    pub(crate) weights: Vec<f32>,
}

impl Inputs {
    pub(crate) fn new(model: &Model, tokens: usize, pattern: Pattern, seed: u64) -> Self {
        let spec = &model.spec;
        let mut random = Random::new(seed + 31 * tokens as u64);
        let round = |x: f32| match spec.input {
            Dtype::F16 => f16::from_f32(x).to_f32(),
            _ => bf16::from_f32(x).to_f32(),
        };
        let x = unit_rows(&mut random, tokens * spec.hidden, round);
        let local = model.map.as_ref().and_then(|map| map.iter().position(|&expert| expert >= 0)).unwrap_or(0);
        let ids = pattern.ids(&mut random, [tokens, spec.topk], spec.global_experts(), local);
        let weights = (0..tokens * spec.topk).map(|_| (1.0 + 0.9 * random.uniform()) / spec.topk as f32).collect();
        Self { tokens, x, ids, weights }
    }
}

impl Inputs {
    /// Some of the tokens, in the same order.
    pub(crate) fn some(&self, tokens: Range<usize>) -> Self {
        let rows = |len: usize| tokens.start * (len / self.tokens)..tokens.end * (len / self.tokens);
        Self {
            tokens: tokens.len(),
            x: self.x[rows(self.x.len())].to_vec(),
            ids: self.ids[rows(self.ids.len())].to_vec(),
            weights: self.weights[rows(self.weights.len())].to_vec(),
        }
    }
}

/// A call's inputs, poisoned output and poisoned workspace on the device.
pub(crate) struct Call<'a> {
    pub(crate) model: &'a Model,
    pub(crate) tokens: usize,
    pub(crate) x: DeviceBuffer,
    pub(crate) ids: DeviceBuffer,
    pub(crate) weights: DeviceBuffer,
    map: Option<DeviceBuffer>,
    pub(crate) output: DeviceBuffer,
    pub(crate) state: DeviceBuffer,
    pub(crate) workspace: DeviceBuffer,
    pub(crate) workspace_bytes: usize,
}

impl<'a> Call<'a> {
    pub(crate) fn new(device: &Device, model: &'a Model, inputs: &Inputs) -> Self {
        let spec = &model.spec;
        let element_bytes = if spec.output == Dtype::F32 { 4 } else { 2 };
        let bytes = |layer: &Layer| layer.workspace_bytes(inputs.tokens).unwrap();
        let workspace_bytes = bytes(&model.on_device).max(bytes(&model.in_steps));
        let call = Self {
            model,
            tokens: inputs.tokens,
            x: device.allocate(2 * inputs.x.len()).unwrap(),
            ids: device.allocate(8 * inputs.ids.len()).unwrap(),
            weights: device.allocate(4 * inputs.weights.len()).unwrap(),
            map: model.map.as_ref().map(|map| upload(device, map)),
            output: device.allocate(inputs.tokens * spec.hidden * element_bytes + GUARD).unwrap(),
            state: device.allocate(STATE_BYTES).unwrap(),
            workspace: device.allocate(workspace_bytes + GUARD).unwrap(),
            workspace_bytes,
        };
        call.upload(inputs);
        call.output.fill(NAN_POISON).unwrap();
        call
    }

    pub(crate) fn upload(&self, inputs: &Inputs) {
        let spec = &self.model.spec;
        let bits = |&x: &f32| match spec.input {
            Dtype::F16 => f16::from_f32(x).to_bits(),
            _ => bf16::from_f32(x).to_bits(),
        };
        self.x.upload_at(0, &inputs.x.iter().map(bits).collect::<Vec<_>>()).unwrap();
        match spec.ids {
            Dtype::I64 => self.ids.upload_at(0, &inputs.ids).unwrap(),
            _ => self.ids.upload_at(0, &inputs.ids.iter().map(|&id| id as i32).collect::<Vec<_>>()).unwrap(),
        }
        self.weights.upload_at(0, &inputs.weights).unwrap();
    }

    pub(crate) fn operands(&self) -> LayerCall {
        let spec = &self.model.spec;
        LayerCall {
            tokens: self.tokens,
            hidden_states: DeviceMatrix::row_major(self.x.ptr(), spec.hidden),
            routing: RoutingPtrs {
                ids: DeviceMatrix::row_major(self.ids.ptr(), spec.topk),
                expert_map: self.map.as_ref().map(|map| map.ptr().cast()),
                global_experts: spec.global_experts(),
            },
            topk_weights: DeviceMatrix::row_major(self.weights.ptr().cast(), spec.topk),
            output: self.output.ptr(),
            state: self.state.ptr(),
            workspace: self.workspace.ptr(),
        }
    }

    /// Poisons the output and all of the workspace, and readies the state.
    pub(crate) fn poison(&self, device: &Device) {
        self.output.fill(NAN_POISON).unwrap();
        self.workspace.fill(NAN_POISON).unwrap();
        unsafe {
            self.model.on_device.initialise_state(Stream(0), self.state.ptr()).unwrap();
            device.synchronize(Stream(0)).unwrap();
        }
    }

    pub(crate) fn launch(&self, stream: Stream) {
        unsafe { self.model.on_device.launch(stream, &self.operands()).unwrap() }
    }

    pub(crate) fn launch_in_steps(&self, stream: Stream) {
        unsafe { self.model.in_steps.launch(stream, &self.operands()).unwrap() }
    }

    pub(crate) fn check(&self, stream: Stream) -> expertile::Result<()> {
        unsafe { self.model.on_device.check_launch(stream, &self.operands()) }
    }

    /// A part of the workspace.
    fn part<T: bytemuck::Pod>(&self, part: DevicePtr, len: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); len];
        self.workspace.download_at((part.address() - self.workspace.ptr().address()) as usize, &mut values).unwrap();
        values
    }

    /// The output's bytes, after a look at what nobody may have touched.
    pub(crate) fn output_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.output.bytes()];
        self.output.download_at(0, &mut bytes).unwrap();
        let guard = bytes.split_off(bytes.len() - GUARD);
        assert_untouched("guard of the output", &guard, NAN_POISON);
        bytes
    }

    pub(crate) fn check_workspace_guard(&self) {
        let mut bytes = vec![0; self.workspace.bytes()];
        self.workspace.download_at(0, &mut bytes).unwrap();
        assert_untouched("guard of the workspace", &bytes[self.workspace_bytes..], NAN_POISON);
    }

    pub(crate) fn output(&self) -> Vec<f64> {
        let bytes = self.output_bytes();
        let halves = || bytes.as_chunks::<2>().0.iter().map(|&half| u16::from_le_bytes(half));
        match self.model.spec.output {
            Dtype::F16 => halves().map(|bits| f16::from_bits(bits).to_f64()).collect(),
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&word| f64::from(f32::from_le_bytes(word))).collect(),
            _ => halves().map(|bits| bf16::from_bits(bits).to_f64()).collect(),
        }
    }
}
