//! A made-up grouped GEMM: its operands on the host and on the device, and what its results should be.

use crate::on_device::upload;
use expertile::cuda::{
    Device, DeviceBuffer, DeviceMatrix, DevicePtr, Gemm, GemmCall, GemmConfig, GemmKernel, LayoutPtrs, Route,
    RouteCall, RouteConfig, RoutingPtrs, RowEnds, STATE_BYTES, Stream, Weights,
};
use expertile::int4::{self, Int4Scales};
use expertile::{Activation, ActivationFormat, Dtype, E4m3, Error, MatrixRef, Plan, WeightFormat, mxfp4};
use expertile_testkit::{POISON, Random};
use half::{bf16, f16};

pub(crate) const BLOCK: usize = 128;

/// What weights and rows are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) weights: WeightFormat,
    pub(crate) rows: ActivationFormat,
}

pub(crate) const E4M3: Format = Format { weights: WeightFormat::E4m3, rows: ActivationFormat::E4m3 };
pub(crate) const BF16: Format = Format { weights: WeightFormat::Bf16, rows: ActivationFormat::Bf16 };
pub(crate) const W4A8: Format = Format { weights: WeightFormat::Mxfp4, rows: ActivationFormat::E4m3 };
pub(crate) const W4A16: Format = Format { weights: WeightFormat::Mxfp4, rows: ActivationFormat::Bf16 };
pub(crate) const INT4_A8: Format = Format { weights: WeightFormat::Int4, rows: ActivationFormat::E4m3 };
pub(crate) const INT4_A16: Format = Format { weights: WeightFormat::Int4, rows: ActivationFormat::Bf16 };

impl Format {
    pub(crate) fn row_bytes(self) -> usize {
        if self.rows == ActivationFormat::E4m3 { 1 } else { 2 }
    }

    /// A K near this one that the weights can have.
    pub(crate) fn k(self, k: usize) -> usize {
        if self.weights.has_groups() { k.next_multiple_of(mxfp4::GROUP) } else { k }
    }

    pub(crate) fn config(self, kernel: GemmKernel, activation: Option<Activation>) -> GemmConfig {
        GemmConfig { format: self.weights, activation_format: self.rows, kernel, activation }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Live rows of each expert.
    pub(crate) counts: Vec<usize>,
    pub(crate) alignment: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) format: Format,
    pub(crate) kernel: GemmKernel,
    /// Outputs have biases where it is even; scales of int4 are f16 where half of it is odd.
    pub(crate) seed: u64,
}

/// A case's operands in the layout that the kernels read; a bf16 value is stored as its bits.
pub(crate) struct Operands {
    pub(crate) plan: Plan,
    pub(crate) starts: Vec<usize>,
    pub(crate) ids: Vec<i32>,
    pub(crate) rows: Vec<u8>,
    pub(crate) row_scales: Vec<f32>,
    pub(crate) weights: Vec<u8>,
    /// Of e4m3.
    pub(crate) weight_scales: Vec<f32>,
    /// Of mxfp4.
    pub(crate) group_scales: Vec<u8>,
    /// Of int4.
    pub(crate) int4_scales: Int4Bits,
    pub(crate) bias: Option<Vec<f32>>,
}

/// Scales of int4 as their bits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Int4Bits {
    pub(crate) are_f16: bool,
    pub(crate) bits: Vec<u16>,
}

impl Int4Bits {
    pub(crate) fn get(&self, index: usize) -> f64 {
        let bits = self.bits[index];
        if self.are_f16 { f16::from_bits(bits).to_f64() } else { bf16::from_bits(bits).to_f64() }
    }

    pub(crate) fn upload(
        &self,
        device: &Device,
        blocks: &[u8],
        sizes: (usize, usize, usize),
    ) -> Result<Weights, Error> {
        let (rows, groups) = (sizes.0 * sizes.1, sizes.2 / int4::GROUP);
        let (bf16s, f16s): (Vec<bf16>, Vec<f16>) =
            self.bits.iter().map(|&bits| (bf16::from_bits(bits), f16::from_bits(bits))).unzip();
        let scales = match self.are_f16 {
            true => Int4Scales::F16(MatrixRef::new(&f16s, rows, groups).unwrap()),
            false => Int4Scales::Bf16(MatrixRef::new(&bf16s, rows, groups).unwrap()),
        };
        Weights::upload_int4(device, blocks, scales, sizes)
    }

    /// A scale for weights of an output: of its 64 neighbours they are close, some powers of two apart, or anywhere.
    pub(crate) fn push(&mut self, random: &mut Random, expert: usize, output: usize) {
        let bits = match (expert + output / 64) % 3 {
            2 if self.are_f16 => (random.below(0x7c00) + (random.below(2) << 15)) as u16,
            2 => (0x0100 + random.below(0x5f00) + (random.below(2) << 15)) as u16,
            kind => {
                let scale = (random.uniform() + 2.0) * 2f32.powi(-(random.below([2, 12][kind]) as i32));
                if self.are_f16 { f16::from_f32(scale).to_bits() } else { bf16::from_f32(scale).to_bits() }
            }
        };
        self.bits.push(if random.below(20) == 0 { 0 } else { bits });
    }
}

/// Bytes of a bf16 or e4m3 value of about ±1.
pub(crate) fn push_value(bytes: &mut Vec<u8>, format: ActivationFormat, value: f32) {
    match format {
        ActivationFormat::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
        ActivationFormat::E4m3 => bytes.push(E4m3::from_f32(value).0),
    }
}

pub(crate) fn value(bytes: &[u8], format: ActivationFormat, index: usize) -> f64 {
    match format {
        ActivationFormat::Bf16 => bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f64(),
        ActivationFormat::E4m3 => f64::from(E4m3(bytes[index]).to_f32()),
    }
}

/// A scale of mxfp4 weights: of an output's 64 neighbours they are close, as far apart as may be folded into the
/// decoded values, or further.
pub(crate) fn group_scale(random: &mut Random, rows: ActivationFormat, expert: usize, output: usize) -> u8 {
    let most_folded = if rows == ActivationFormat::E4m3 { 11 } else { 125 };
    let (least, most) = [(122, 127), (127 - most_folded, 127), (2, 190)][(expert + output / 64) % 3];
    (least + random.below(most - least + 1)) as u8
}

impl Operands {
    pub(crate) fn new(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let Case { alignment, n, k, format, .. } = *case;
        let counts: Vec<i32> = case.counts.iter().map(|&count| count as i32).collect();
        let live: usize = case.counts.iter().sum();
        let plan = Plan::exact(live, 1, &counts, alignment).unwrap();
        let mut starts = Vec::new();
        let mut next = 0;
        for &count in &case.counts {
            starts.push(next);
            next += count.next_multiple_of(alignment);
        }
        let ids = case.counts.iter().enumerate().flat_map(|(expert, &count)| vec![expert as i32; count]).collect();
        let (m_sum, stride) = (plan.m_sum(), plan.m_sum().next_multiple_of(4));
        let mut rows = Vec::with_capacity(m_sum * k * format.row_bytes());
        let mut row_scales = vec![f32::NAN; stride * k.div_ceil(BLOCK)];
        for (start, &count) in starts.iter().zip(&case.counts) {
            for row in 0..count.next_multiple_of(alignment) {
                for _ in 0..k {
                    push_value(&mut rows, format.rows, if row < count { random.uniform() * 4.0 } else { f32::NAN });
                }
                if row < count {
                    for block in 0..k.div_ceil(BLOCK) {
                        row_scales[block * stride + start + row] = 0.5 + random.uniform().abs();
                    }
                }
            }
        }
        let (mut weights, mut group_scales) = (Vec::new(), Vec::new());
        let mut int4_scales = Int4Bits { are_f16: case.seed % 4 >= 2, bits: Vec::new() };
        match format.weights {
            WeightFormat::Mxfp4 => {
                for row in 0..case.counts.len() * n {
                    for _ in 0..k / mxfp4::GROUP {
                        let mut bytes: Vec<u8> = (0..16).map(|_| random.draw() as u8).collect();
                        let mut scale = group_scale(&mut random, format.rows, row / n, row % n);
                        if random.below(10) == 0 {
                            // Zeros of either sign, whose scale may be anything.
                            bytes.iter_mut().for_each(|byte| *byte &= 0x88);
                            scale = [0, 127, 254][random.below(3)];
                        }
                        weights.extend(bytes);
                        group_scales.push(scale);
                    }
                }
            }
            WeightFormat::Int4 => {
                for row in 0..case.counts.len() * n {
                    for _ in 0..k / int4::GROUP {
                        weights.extend((0..16).map(|_| random.draw() as u8));
                        int4_scales.push(&mut random, row / n, row % n);
                    }
                }
            }
            WeightFormat::E4m3 | WeightFormat::Bf16 => {
                for _ in 0..case.counts.len() * n * k {
                    push_value(&mut weights, format.rows, random.uniform() * 4.0);
                }
            }
        }
        let biased = case.seed.is_multiple_of(2);
        let bias = biased.then(|| (0..case.counts.len() * n).map(|_| random.uniform() * 20.0).collect());
        let blocks = case.counts.len() * n.div_ceil(BLOCK) * k.div_ceil(BLOCK);
        let weight_scales = (0..blocks).map(|_| 0.5 + random.uniform().abs()).collect();
        Self { plan, starts, ids, rows, row_scales, weights, weight_scales, group_scales, int4_scales, bias }
    }

    /// The first rows of each expert, among poison again.
    pub(crate) fn first_rows(&self, case: &Case, counts: &[usize]) -> (Case, Self) {
        let case = Case { counts: counts.to_vec(), ..case.clone() };
        let mut fewer = Self::new(&case);
        fewer.weights.clone_from(&self.weights);
        fewer.weight_scales.clone_from(&self.weight_scales);
        fewer.group_scales.clone_from(&self.group_scales);
        fewer.int4_scales.clone_from(&self.int4_scales);
        fewer.bias.clone_from(&self.bias);
        let row_bytes = case.k * case.format.row_bytes();
        let strides = [self, &fewer].map(|operands| operands.plan.m_sum().next_multiple_of(4));
        for (expert, &count) in counts.iter().enumerate() {
            let [from, to] = [self, &fewer].map(|operands| operands.starts[expert]);
            let rows = &self.rows[from * row_bytes..(from + count) * row_bytes];
            fewer.rows[to * row_bytes..(to + count) * row_bytes].copy_from_slice(rows);
            for block in 0..case.k.div_ceil(BLOCK) {
                let scales = &self.row_scales[block * strides[0] + from..][..count];
                fewer.row_scales[block * strides[1] + to..][..count].copy_from_slice(scales);
            }
        }
        (case, fewer)
    }

    /// `(sum, sum of magnitudes)` for one live row and output.
    pub(crate) fn product(&self, case: &Case, expert: usize, row: usize, output: usize) -> (f64, f64) {
        let Case { n, k, format, .. } = *case;
        let stride = self.plan.m_sum().next_multiple_of(4);
        let (mut sum, mut magnitude) = (0.0, 0.0);
        for block in 0..k.div_ceil(BLOCK) {
            let mut part = 0.0;
            let mut part_magnitude = 0.0;
            for i in block * BLOCK..k.min((block + 1) * BLOCK) {
                let product =
                    value(&self.rows, format.rows, row * k + i) * self.weight(format, (expert * n + output) * k + i);
                part += product;
                part_magnitude += product.abs();
            }
            let of_rows = match format.rows {
                ActivationFormat::Bf16 => 1.0,
                ActivationFormat::E4m3 => f64::from(self.row_scales[block * stride + row]),
            };
            let of_weights = match format.weights {
                WeightFormat::E4m3 => {
                    let block = (expert * n.div_ceil(BLOCK) + output / BLOCK) * k.div_ceil(BLOCK) + block;
                    f64::from(self.weight_scales[block])
                }
                WeightFormat::Bf16 | WeightFormat::Mxfp4 | WeightFormat::Int4 => 1.0,
            };
            let scale = of_rows * of_weights;
            sum += part * scale;
            magnitude += part_magnitude * scale;
        }
        let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[expert * n + output]));
        (sum + bias, magnitude + bias.abs())
    }

    /// Weight number `index`, without an e4m3 block's scale.
    pub(crate) fn weight(&self, format: Format, index: usize) -> f64 {
        match format.weights {
            WeightFormat::Mxfp4 => {
                let nibble = self.weights[index / 2] >> (4 * (index % 2)) & 15;
                let power = 2f64.powi(i32::from(self.group_scales[index / mxfp4::GROUP]) - 127);
                expertile_oracle::mxfp4::e2m1_value(nibble) * power
            }
            WeightFormat::E4m3 | WeightFormat::Bf16 => value(&self.weights, format.rows, index),
            WeightFormat::Int4 => {
                let mut weight = [0.0];
                let nibble = self.weights[index / 2] >> (4 * (index % 2)) & 15;
                let scale = self.int4_scales.get(index / int4::GROUP);
                expertile_oracle::int4::weight_row(&[nibble], &[scale], 1, 0, &mut weight);
                weight[0]
            }
        }
    }
}

/// What a call works on, but for the weights.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) rows: DevicePtr,
    pub(crate) scales: Option<DevicePtr<f32>>,
    pub(crate) bias: Option<DevicePtr<f32>>,
    pub(crate) out: DevicePtr,
    pub(crate) out_scales: Option<DevicePtr<f32>>,
    pub(crate) layout: LayoutPtrs,
    pub(crate) m_sum: usize,
}

impl Operand {
    pub(crate) fn call<'a>(&self, weights: &'a Weights) -> GemmCall<'a> {
        let Self { rows, scales, bias, out, out_scales, layout, m_sum } = *self;
        let LayoutPtrs { header, worklist, psum, .. } = layout;
        let ends = RowEnds::Psum(psum);
        GemmCall { weights, rows, scales, bias, out, out_scales, header, worklist, ends, m_sum }
    }
}

/// Device memory of one case, with its layout in place.
pub(crate) struct Call {
    pub(crate) gemm: Gemm,
    pub(crate) weights: Weights,
    pub(crate) operands: Operand,
    pub(crate) out: DeviceBuffer,
    _memory: Vec<DeviceBuffer>,
}

impl Call {
    pub(crate) fn new(device: &Device, case: &Case, operands: &Operands) -> Self {
        let plan = &operands.plan;
        let row_tile = case.kernel.row_tile();
        let route = Route::prepare(device, RouteConfig { topk: 1, ids: Dtype::I32, row_tile }).unwrap();
        let lists: DeviceBuffer = device.allocate(LayoutPtrs::space_bytes(plan, row_tile).unwrap()).unwrap();
        lists.fill(POISON).unwrap();
        let layout = LayoutPtrs::carve(lists.ptr(), plan, row_tile).unwrap();
        let state: DeviceBuffer = device.allocate(STATE_BYTES).unwrap();
        let workspace: DeviceBuffer = device.allocate(route.workspace_bytes(plan).unwrap()).unwrap();
        let ids = upload(device, &operands.ids);
        let matrix = DeviceMatrix::row_major(ids.ptr(), 1);
        let routing = RoutingPtrs { ids: matrix, expert_map: None, global_experts: case.counts.len() };
        let route_call = RouteCall { plan: *plan, routing, layout, state: state.ptr(), workspace: workspace.ptr() };
        unsafe {
            route.initialise_state(Stream(0), state.ptr()).unwrap();
            route.launch(Stream(0), &route_call).unwrap();
            route.check(Stream(0), &route_call).unwrap();
        }
        let sizes = (case.counts.len(), case.n, case.k);
        let weights = match case.format.weights {
            WeightFormat::Bf16 => {
                let values: Vec<_> =
                    operands.weights.chunks_exact(2).map(|bytes| bf16::from_le_bytes([bytes[0], bytes[1]])).collect();
                Weights::upload_bf16(device, &values, sizes).unwrap()
            }
            WeightFormat::Mxfp4 => {
                let plain = Weights::upload_mxfp4(device, &operands.weights, &operands.group_scales, sizes).unwrap();
                plain.arrange(device, case.format.rows).unwrap()
            }
            WeightFormat::E4m3 => {
                let values: Vec<_> = operands.weights.iter().map(|&byte| E4m3(byte)).collect();
                Weights::upload_e4m3(device, &values, &operands.weight_scales, sizes).unwrap()
            }
            WeightFormat::Int4 => {
                let plain = operands.int4_scales.upload(device, &operands.weights, sizes).unwrap();
                plain.arrange(device, case.format.rows).unwrap()
            }
        };
        let rows = upload(device, &operands.rows);
        let scales = upload(device, &operands.row_scales);
        let bias = upload(device, operands.bias.as_deref().unwrap_or_default());
        let has_bias = operands.bias.is_some();
        let out: DeviceBuffer = device.allocate((2 * plan.m_sum() * case.n).max(16)).unwrap();
        let operands = Operand {
            rows: rows.ptr(),
            scales: (case.format.rows == ActivationFormat::E4m3).then(|| scales.ptr().cast()),
            bias: has_bias.then(|| bias.ptr().cast()),
            out: out.ptr(),
            out_scales: None,
            layout,
            m_sum: plan.m_sum(),
        };
        let gemm = Gemm::prepare(device, case.format.config(case.kernel, None)).unwrap();
        Self { gemm, weights, operands, out, _memory: vec![lists, state, workspace, ids, rows, scales, bias] }
    }

    pub(crate) fn run(&self, m_sum: usize, n: usize) -> Vec<u16> {
        self.out.fill(POISON).unwrap();
        unsafe { self.gemm.launch(Stream(0), &self.operands.call(&self.weights)).unwrap() };
        let mut out = vec![0; m_sum * n];
        self.out.download_at(0, &mut out).unwrap();
        out
    }
}

/// Compares every live row, and that nothing else was written; then once more, bit for bit.
pub(crate) fn check(device: &Device, case: &Case) {
    let operands = Operands::new(case);
    let call = Call::new(device, case, &operands);
    let (m_sum, n) = (operands.plan.m_sum(), case.n);
    let out = call.run(m_sum, n);
    let live: Vec<(usize, usize)> = (0..case.counts.len())
        .flat_map(|expert| (0..case.counts[expert]).map(move |row| (expert, row)))
        .map(|(expert, row)| (expert, operands.starts[expert] + row))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for part in live.chunks(live.len().div_ceil(threads).max(1)) {
            let (operands, out) = (&operands, &out);
            scope.spawn(move || {
                for &(expert, row) in part {
                    check_row(case, operands, expert, row, &out[row * n..(row + 1) * n]);
                }
            });
        }
    });
    let mut is_live = vec![false; m_sum];
    for &(_, row) in &live {
        is_live[row] = true;
    }
    for row in (0..m_sum).filter(|&row| !is_live[row]) {
        assert!(
            out[row * n..(row + 1) * n].iter().all(|&v| v == 0xa5a5),
            "row {row} is a gap and was written: {case:?}"
        );
    }
    assert!(call.run(m_sum, n) == out, "a second run gave other bits: {case:?}");
}

pub(crate) fn check_row(case: &Case, operands: &Operands, expert: usize, row: usize, out: &[u16]) {
    let (mut difference, mut squares) = (0.0, 0.0);
    for (output, &bits) in out.iter().enumerate() {
        let actual = bf16::from_bits(bits).to_f64();
        let (expected, magnitude) = operands.product(case, expert, row, output);
        // Half a unit of bf16, and the matrix unit's sums, which keep at least 13 bits below the largest product.
        let bound = expected.abs() / 256.0 + magnitude / 4096.0;
        assert!(
            (actual - expected).abs() <= bound,
            "row {row} of expert {expert}, output {output}: {actual}, expected {expected} within {bound}: {case:?}"
        );
        difference += (actual - expected).powi(2);
        squares += actual.powi(2) + expected.powi(2);
    }
    // 1 - 2 xy / (x^2 + y^2), the contract's measure, without its cancellation.
    let measure = difference / squares.max(f64::MIN_POSITIVE);
    assert!(measure < 1e-5, "row {row} of expert {expert} differs by {measure}: {case:?}");
}
