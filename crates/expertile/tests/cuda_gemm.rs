//! The grouped GEMM on a Hopper GPU against sums in f64 over the same operands: every live row, poisoned outputs, gaps
//! that stay as they were. Padding rows and their scales hold NaN. Skips, and says so, on a machine without such a
//! device.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]
// Every unsafe block here hands a step the addresses of buffers that live until after the next wait and are as large
// as the step's own functions ask.
#![allow(clippy::undocumented_unsafe_blocks)]

mod on_device;

use expertile::cuda::{
    Activate, ActivateCall, ActivateConfig, Device, DeviceBuffer, DeviceMatrix, DevicePtr, FewRowsCut, Gemm, GemmCall,
    GemmConfig, GemmKernel, LayoutPtrs, Route, RouteCall, RouteConfig, RoutingPtrs, RowEnds, STATE_BYTES, Stream,
    Weights, WeightsBuilder,
};
use expertile::int4::{self, Int4Scales};
use expertile::{Activation, ActivationFormat, Dtype, E4m3, Error, MatrixRef, Plan, ScaleFormat, WeightFormat, mxfp4};
use expertile_testkit::{POISON, Random, assert_untouched};
use half::{bf16, f16};
use on_device::{filled, hopper, is_emulated, upload};

const BLOCK: usize = 128;

/// What weights and rows are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    weights: WeightFormat,
    rows: ActivationFormat,
}

const E4M3: Format = Format { weights: WeightFormat::E4m3, rows: ActivationFormat::E4m3 };
const BF16: Format = Format { weights: WeightFormat::Bf16, rows: ActivationFormat::Bf16 };
const W4A8: Format = Format { weights: WeightFormat::Mxfp4, rows: ActivationFormat::E4m3 };
const W4A16: Format = Format { weights: WeightFormat::Mxfp4, rows: ActivationFormat::Bf16 };
const INT4_A8: Format = Format { weights: WeightFormat::Int4, rows: ActivationFormat::E4m3 };
const INT4_A16: Format = Format { weights: WeightFormat::Int4, rows: ActivationFormat::Bf16 };

impl Format {
    fn row_bytes(self) -> usize {
        if self.rows == ActivationFormat::E4m3 { 1 } else { 2 }
    }

    /// A K near this one that the weights can have.
    fn k(self, k: usize) -> usize {
        if self.weights.has_groups() { k.next_multiple_of(mxfp4::GROUP) } else { k }
    }

    fn config(self, kernel: GemmKernel, activation: Option<Activation>) -> GemmConfig {
        GemmConfig { format: self.weights, activation_format: self.rows, kernel, activation }
    }
}

#[derive(Debug, Clone)]
struct Case {
    /// Live rows of each expert.
    counts: Vec<usize>,
    alignment: usize,
    n: usize,
    k: usize,
    format: Format,
    kernel: GemmKernel,
    /// Outputs have biases where it is even; scales of int4 are f16 where half of it is odd.
    seed: u64,
}

/// A case's operands, as they stand in memory; bf16 as its bits.
struct Operands {
    plan: Plan,
    starts: Vec<usize>,
    ids: Vec<i32>,
    rows: Vec<u8>,
    row_scales: Vec<f32>,
    weights: Vec<u8>,
    /// Of e4m3.
    weight_scales: Vec<f32>,
    /// Of mxfp4.
    group_scales: Vec<u8>,
    /// Of int4.
    int4_scales: Int4Bits,
    bias: Option<Vec<f32>>,
}

/// Scales of int4 as their bits.
#[derive(Debug, Clone, Default)]
struct Int4Bits {
    are_f16: bool,
    bits: Vec<u16>,
}

impl Int4Bits {
    fn get(&self, index: usize) -> f64 {
        let bits = self.bits[index];
        if self.are_f16 { f16::from_bits(bits).to_f64() } else { bf16::from_bits(bits).to_f64() }
    }

    fn upload(&self, device: &Device, blocks: &[u8], sizes: (usize, usize, usize)) -> Result<Weights, Error> {
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
    fn push(&mut self, random: &mut Random, expert: usize, output: usize) {
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
fn push_value(bytes: &mut Vec<u8>, format: ActivationFormat, value: f32) {
    match format {
        ActivationFormat::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
        ActivationFormat::E4m3 => bytes.push(E4m3::from_f32(value).0),
    }
}

fn value(bytes: &[u8], format: ActivationFormat, index: usize) -> f64 {
    match format {
        ActivationFormat::Bf16 => bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f64(),
        ActivationFormat::E4m3 => f64::from(E4m3(bytes[index]).to_f32()),
    }
}

/// A scale of mxfp4 weights: of an output's 64 neighbours they are close, as far apart as may be folded into the
/// decoded values, or further.
fn group_scale(random: &mut Random, rows: ActivationFormat, expert: usize, output: usize) -> u8 {
    let most_folded = if rows == ActivationFormat::E4m3 { 11 } else { 125 };
    let (least, most) = [(122, 127), (127 - most_folded, 127), (2, 190)][(expert + output / 64) % 3];
    (least + random.below(most - least + 1)) as u8
}

impl Operands {
    fn new(case: &Case) -> Self {
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
    fn first_rows(&self, case: &Case, counts: &[usize]) -> (Case, Self) {
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
    fn product(&self, case: &Case, expert: usize, row: usize, output: usize) -> (f64, f64) {
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
    fn weight(&self, format: Format, index: usize) -> f64 {
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
struct Operand {
    rows: DevicePtr,
    scales: Option<DevicePtr<f32>>,
    bias: Option<DevicePtr<f32>>,
    out: DevicePtr,
    out_scales: Option<DevicePtr<f32>>,
    layout: LayoutPtrs,
    m_sum: usize,
}

impl Operand {
    fn call<'a>(&self, weights: &'a Weights) -> GemmCall<'a> {
        let Self { rows, scales, bias, out, out_scales, layout, m_sum } = *self;
        let LayoutPtrs { header, worklist, psum, .. } = layout;
        let ends = RowEnds::Psum(psum);
        GemmCall { weights, rows, scales, bias, out, out_scales, header, worklist, ends, m_sum }
    }
}

/// Device memory of one case, with its layout in place.
struct Call {
    gemm: Gemm,
    weights: Weights,
    operands: Operand,
    out: DeviceBuffer,
    _memory: Vec<DeviceBuffer>,
}

impl Call {
    fn new(device: &Device, case: &Case, operands: &Operands) -> Self {
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

    fn run(&self, m_sum: usize, n: usize) -> Vec<u16> {
        self.out.fill(POISON).unwrap();
        unsafe { self.gemm.launch(Stream(0), &self.operands.call(&self.weights)).unwrap() };
        let mut out = vec![0; m_sum * n];
        self.out.download_at(0, &mut out).unwrap();
        out
    }
}

/// Compares every live row, and that nothing else was written; then once more, bit for bit.
fn check(device: &Device, case: &Case) {
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

fn check_row(case: &Case, operands: &Operands, expert: usize, row: usize, out: &[u16]) {
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

const FORMATS: [Format; 6] = [E4M3, BF16, W4A8, W4A16, INT4_A8, INT4_A16];
/// Those with kernels that split K and that take tokens as the M operand.
const WHOLE_BYTES: [Format; 2] = [E4M3, BF16];

fn few_rows(row_tile: usize, cut: FewRowsCut) -> GemmKernel {
    GemmKernel::FewRows { row_tile, cut }
}

fn plain(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::Plain)
}

fn narrow(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::Narrow)
}

fn broad(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::Broad)
}

fn sharing(row_tile: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::SharedRows)
}

fn split(row_tile: usize, parts: usize) -> GemmKernel {
    few_rows(row_tile, FewRowsCut::SplitK { parts })
}

const WIDE: GemmKernel = GemmKernel::Wide { shares_rows: false };
const WIDE_SHARING: GemmKernel = GemmKernel::Wide { shares_rows: true };
const LARGE: GemmKernel = GemmKernel::Large;

/// Whether a kernel is one of the format's.
fn runs(kernel: &GemmKernel, format: Format) -> bool {
    format.config(*kernel, None).source().is_ok()
}

/// Those for many rows.
fn wide_kernels(format: Format) -> Vec<GemmKernel> {
    if format.weights.has_groups() {
        return vec![plain(128), plain(192)];
    }
    let mut kernels = vec![WIDE, WIDE_SHARING];
    if format == E4M3 {
        kernels.push(LARGE);
    }
    kernels
}

#[test]
fn every_row_tile_multiplies_hostile_layouts() {
    let Some(device) = hopper() else { return };
    // Empty experts, one row, whole tiles, tails of one and of one less than the alignment.
    let counts = vec![0, 1, 16, 17, 0, 64, 63, 193, 128, 5, 0, 31];
    for format in FORMATS {
        for kernel in GemmKernel::all(format.weights) {
            let alignment = 8 * kernel.shared();
            check(device, &Case { counts: counts.clone(), alignment, n: 256, k: 384, format, kernel, seed: 1 });
        }
    }
}

#[test]
fn every_alignment_runs_with_every_row_tile() {
    let Some(device) = hopper() else { return };
    // What 4 does not divide: scales of segments that do not start on 16 bytes.
    for alignment in [1, 2, 3, 4, 6, 8, 16, 32, 64, 128] {
        let whole = [plain(32), sharing(64), sharing(192), WIDE_SHARING, LARGE].map(|kernel| (E4M3, kernel));
        let packed = [W4A8, INT4_A8]
            .map(|format| [narrow(32), broad(32), broad(128), plain(128)].map(|kernel| (format, kernel)));
        for (format, kernel) in whole.into_iter().chain(packed.into_iter().flatten()) {
            let counts = vec![alignment - 1, 1, alignment, 0, alignment + 1, 200, 3];
            let case = Case { counts, alignment, n: 128, k: 256, format, kernel, seed: 2 };
            check(device, &case);
        }
    }
}

#[test]
fn partial_n_and_k_are_right_to_the_last_column() {
    let Some(device) = hopper() else { return };
    for format in FORMATS {
        for (n, k) in [(8, 16), (136, 144), (264, 2880), (120, 400), (384, 3584), (776, 96)] {
            let few = [plain(16), narrow(64), broad(16), broad(32), broad(128), sharing(64), sharing(192)];
            for kernel in few.into_iter().filter(|few| runs(few, format)).chain(wide_kernels(format)) {
                let k = format.k(k);
                check(device, &Case { counts: vec![3, 0, 33, 70], alignment: 8, n, k, format, kernel, seed: 3 });
            }
        }
    }
}

/// A row's results depend on the row and on its expert's weights, not on the kernel that makes them nor on what else
/// is there.
#[test]
fn a_row_has_the_same_bits_in_every_tile_and_beside_any_others() {
    let Some(device) = hopper() else { return };
    for format in FORMATS {
        // Nine blocks of K for e4m3 and seventeen for bf16, the last in part.
        let (n, k) = (136, format.k(1040));
        let all = Case { counts: vec![193, 0, 17, 66], alignment: 8, n, k, format, kernel: plain(64), seed: 10 };
        let whole = Operands::new(&all);
        let expected = Call::new(device, &all, &whole).run(whole.plan.m_sum(), n);
        for kernel in GemmKernel::all(format.weights) {
            for counts in [[193, 0, 17, 66], [1, 0, 5, 33]] {
                let (case, operands) = whole.first_rows(&Case { kernel, ..all.clone() }, &counts);
                let found = Call::new(device, &case, &operands).run(operands.plan.m_sum(), n);
                for (expert, &count) in counts.iter().enumerate() {
                    for row in 0..count {
                        let [at, of] = [&operands, &whole].map(|operands| (operands.starts[expert] + row) * n);
                        assert!(
                            found[at..at + n] == expected[of..of + n],
                            "row {row} of expert {expert} has other bits: {kernel}, {counts:?}, {format:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn parts_of_k_add_up() {
    let Some(device) = hopper() else { return };
    for format in WHOLE_BYTES {
        for splits in [2, 4, 8] {
            for row_tile in [16, 32, 64] {
                let kernel = split(row_tile, splits);
                let counts = vec![1, 0, row_tile, 7, 2 * row_tile + 1];
                check(device, &Case { counts, alignment: 8, n: 200, k: 1168, format, kernel, seed: 4 });
            }
        }
    }
}

#[test]
fn all_rows_on_one_expert_and_none_at_all() {
    let Some(device) = hopper() else { return };
    for format in FORMATS {
        for counts in [vec![0, 0, 700, 0], vec![0, 0, 0], vec![1000]] {
            for kernel in wide_kernels(format) {
                let counts = counts.clone();
                check(device, &Case { counts, alignment: 128, n: 512, k: 512, format, kernel, seed: 5 });
            }
        }
    }
}

#[test]
fn many_tiles_go_round_the_ring_and_fifty_runs_give_the_same_bits() {
    let Some(device) = hopper() else { return };
    for format in FORMATS {
        let few = [
            (sharing(128), 400),
            (broad(128), 400),
            (plain(64), 100),
            (broad(64), 100),
            (narrow(32), 40),
            (broad(16), 20),
            (split(16, 4), 20),
        ];
        let few = few.into_iter().filter(|(kernel, _)| runs(kernel, format));
        for (kernel, most) in wide_kernels(format).into_iter().map(|kernel| (kernel, 400)).chain(few) {
            let mut random = Random::new(77);
            let counts: Vec<usize> = (0..24).map(|_| random.below(most)).collect();
            let case = Case { counts, alignment: 16, n: 1024, k: 640, format, kernel, seed: 6 };
            let operands = Operands::new(&case);
            let call = Call::new(device, &case, &operands);
            let first = call.run(operands.plan.m_sum(), case.n);
            for run in 1..50 {
                assert!(call.run(operands.plan.m_sum(), case.n) == first, "run {run} gave other bits: {case:?}");
            }
            for expert in (0..24).filter(|&expert| case.counts[expert] > 0).step_by(5) {
                let row = operands.starts[expert];
                check_row(&case, &operands, expert, row, &first[row * case.n..(row + 1) * case.n]);
            }
        }
    }
}

/// Tiles of few rows, whose consumers wait for weights all the time, and give every stage back as soon as they have it.
#[test]
fn a_ring_that_runs_empty_gives_the_same_bits() {
    let Some(device) = hopper() else { return };
    // More weights than a GPU's cache holds; the emulator has none.
    let is_small = is_emulated(device);
    let (n, k, runs_of_each) = if is_small { (192, 320, 1) } else { (3584, 2176, 20) };
    for format in [W4A8, W4A16, E4M3, BF16] {
        let experts = match (is_small, format.weights.has_groups()) {
            (true, _) => 3,
            (false, true) => 48,
            (false, false) => 16,
        };
        let mut random = Random::new(78);
        let counts: Vec<usize> = (0..experts).map(|_| random.below(40)).collect();
        let case = |kernel| Case { counts: counts.clone(), alignment: 8, n, k, format, kernel, seed: 8 };
        let operands = Operands::new(&case(plain(16)));
        let mut first: Option<Vec<u16>> = None;
        let kernels = [plain(16), narrow(64), plain(64), broad(64), broad(128), plain(192)];
        for kernel in kernels.into_iter().filter(|kernel| runs(kernel, format)) {
            let call = Call::new(device, &case(kernel), &operands);
            for run in 0..runs_of_each {
                let out = call.run(operands.plan.m_sum(), n);
                let differing =
                    first.as_ref().map_or(0, |first| first.iter().zip(&out).filter(|(a, b)| a != b).count());
                assert_eq!(differing, 0, "{format:?}, {kernel}: results that differ in run {run}");
                first.get_or_insert(out);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_writes_nothing() {
    let Some(device) = hopper() else { return };
    let case = Case { counts: vec![3, 4], alignment: 8, n: 64, k: 128, format: E4M3, kernel: plain(16), seed: 7 };
    let operands = Operands::new(&case);
    let call = Call::new(device, &case, &operands);
    call.out.fill(POISON).unwrap();
    let launch = |gemm: &Gemm, operands: Operand| unsafe { gemm.launch(Stream(0), &operands.call(&call.weights)) };
    let error = launch(&call.gemm, Operand { rows: call.operands.rows.byte_add(8), ..call.operands }).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "rows", .. }), "{error}");
    let wide = Gemm::prepare(device, BF16.config(plain(16), None)).unwrap();
    let error = launch(&wide, call.operands).unwrap_err();
    assert!(matches!(error, Error::WeightFormat { argument: "weights", .. }), "{error}");
    let kernel = split(16, 2);
    let split = Gemm::prepare(device, E4M3.config(kernel, None)).unwrap();
    let error = launch(&split, call.operands).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "k", actual: 128, .. }), "{error}");
    let mut out = vec![0u8; call.out.bytes()];
    call.out.download_at(0, &mut out).unwrap();
    assert_untouched("out", &out, POISON);
}

/// Rows that each pick one of K give the weights back: every nibble with every scale, folded in and not.
#[test]
fn every_weight_of_mxfp4_is_decoded_exactly() {
    let Some(device) = hopper() else { return };
    let (experts, n, k) = (4, 64, 256);
    for format in [W4A8, W4A16] {
        for kernel in
            [plain(16), narrow(32), broad(16), broad(32), broad(64), broad(128), plain(64), plain(128), plain(192)]
        {
            let case = Case { counts: vec![k; experts], alignment: 8, n, k, format, kernel, seed: 11 };
            let mut operands = Operands::new(&case);
            operands.rows.clear();
            for row in 0..experts * k {
                (0..k).for_each(|i| push_value(&mut operands.rows, format.rows, f32::from(u8::from(i == row % k))));
            }
            operands.row_scales.fill(1.0);
            // A nibble of each kind in every group; its scale is any (expert 0), the same in a row (1), as many steps
            // apart as are folded in (2), or a step more (3).
            let fold = if format.rows == ActivationFormat::E4m3 { 11 } else { 125 };
            for row in 0..experts * n {
                let (expert, output) = (row / n, row % n);
                for group in 0..k / 32 {
                    let at = row * (k / 32) + group;
                    operands.group_scales[at] = match expert {
                        0 => (8 * output + group) % 255,
                        1 => 4 * output + group % 2,
                        2 => 130 + output - (group * 5 + output) % (fold + 1),
                        _ => 130 + output - if group % 2 == 0 { fold + 1 } else { 0 },
                    } as u8;
                    for i in 0..16 {
                        operands.weights[16 * at + i] = ((i + group + output) % 16) as u8 | ((15 - i as u8) << 4);
                    }
                }
            }
            let out = Call::new(device, &case, &operands).run(operands.plan.m_sum(), n);
            for row in 0..experts * k {
                for output in 0..n {
                    let exact = operands.weight(format, (row / k * n + output) * k + row % k);
                    let found = bf16::from_bits(out[row * n + output]).to_f64();
                    // f32 ends at 2^128.
                    let expected = if exact.abs() < 2f64.powi(128) { exact } else { exact.signum() * f64::INFINITY };
                    assert!(
                        found == expected,
                        "expert {}, output {output}, k {}: {found}, expected {expected}, {kernel}, {format:?}",
                        row / k,
                        row % k
                    );
                }
            }
        }
    }
}

/// The same of int4: every nibble with scales all over both types, negative ones, subnormals and zeros among them.
#[test]
fn every_weight_of_int4_is_decoded_exactly() {
    let Some(device) = hopper() else { return };
    let (experts, n, k) = (4, 64, 256);
    for (format, are_f16) in [(INT4_A8, false), (INT4_A8, true), (INT4_A16, false), (INT4_A16, true)] {
        for kernel in [plain(16), narrow(32), broad(16), broad(32), broad(64), broad(128), plain(64), plain(192)] {
            let case = Case { counts: vec![k; experts], alignment: 8, n, k, format, kernel, seed: 11 };
            let mut operands = Operands::new(&case);
            operands.rows.clear();
            for row in 0..experts * k {
                (0..k).for_each(|i| push_value(&mut operands.rows, format.rows, f32::from(u8::from(i == row % k))));
            }
            operands.row_scales.fill(1.0);
            operands.int4_scales.are_f16 = are_f16;
            for (at, bits) in operands.int4_scales.bits.iter_mut().enumerate() {
                let exponent = if are_f16 { 0x7c00 } else { 0x7f80 };
                // 2048 of all 65536.
                *bits = (at * 32 + at * 7 % 32) as u16;
                if *bits & exponent == exponent {
                    *bits &= !exponent;
                }
                for i in 0..16 {
                    operands.weights[16 * at + i] = ((i + at) % 16) as u8 | (15 - i as u8) << 4;
                }
            }
            let out = Call::new(device, &case, &operands).run(operands.plan.m_sum(), n);
            for row in 0..experts * k {
                for output in 0..n {
                    let exact = operands.weight(format, (row / k * n + output) * k + row % k);
                    // f32 holds it, or ends before.
                    let expected = bf16::from_f32(exact as f32);
                    let found = bf16::from_bits(out[row * n + output]);
                    assert!(
                        found == expected,
                        "expert {}, output {output}, k {}: {found}, expected {expected}, {kernel}, {format:?}, {are_f16}",
                        row / k,
                        row % k
                    );
                }
            }
        }
    }
}

#[test]
fn int4_weights_that_are_not_arranged_or_not_numbers_are_refused() {
    let Some(device) = hopper() else { return };
    for (seed, name, infinity) in [(13, "bf16", 0xff80), (14, "f16", 0x7c00)] {
        let (format, kernel, sizes) = (INT4_A8, plain(16), (2, 72, 96));
        let case = Case { counts: vec![3, 4], alignment: 8, n: 72, k: 96, format, kernel, seed };
        let mut operands = Operands::new(&case);
        let call = Call::new(device, &case, &operands);
        let plain_weights = operands.int4_scales.upload(device, &operands.weights, sizes).unwrap();
        assert_eq!(plain_weights.bytes(), 2 * 72 * (48 + 6));
        let refuse = |weights: &Weights, actual: &str| {
            let error = unsafe { call.gemm.launch(Stream(0), &call.operands.call(weights)) }.unwrap_err().to_string();
            let expected = format!("weights is packed as {actual}, expected int4 arranged for e4m3 rows");
            assert_eq!(error, expected);
        };
        refuse(&plain_weights, "int4, not arranged");
        let for_bf16 = plain_weights.clone().arrange(device, ActivationFormat::Bf16).unwrap();
        refuse(&for_bf16, "int4 arranged for rows of another format");
        assert!(matches!(for_bf16.arrange(device, ActivationFormat::E4m3), Err(Error::WeightFormat { .. })));
        operands.int4_scales.bits[(72 + 5) * 3 + 2] = infinity;
        let start = format!("scales is {infinity}, expected the bits of a finite {name}: ");
        let error = operands.int4_scales.upload(device, &operands.weights, sizes).unwrap_err().to_string();
        assert!(error.starts_with(&start) && error.contains("row 77, group 2"), "{error}");
        let [blocks, scales] = [upload(device, &operands.weights), upload(device, &operands.int4_scales.bits)];
        let in_place =
            |sizes, scale_type| unsafe { Weights::from_device_int4(sizes, blocks.ptr(), (scale_type, scales.ptr())) };
        let scale_type = if name == "f16" { Dtype::F16 } else { Dtype::Bf16 };
        let weights = in_place(sizes, scale_type).unwrap();
        let error = weights.arrange(device, ActivationFormat::E4m3).unwrap_err().to_string();
        assert!(error.starts_with(&start) && error.contains("row 5 of expert 1"), "{error}");
        let error = in_place((2, 72, 48), scale_type).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "k", actual: 48, .. }), "{error}");
        let error = in_place(sizes, Dtype::F32).unwrap_err();
        assert!(matches!(error, Error::Dtype { argument: "scales", actual: Dtype::F32, .. }), "{error}");
        let error = operands.int4_scales.upload(device, &operands.weights[1..], sizes).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "blocks", .. }), "{error}");
    }
    let mut builder = WeightsBuilder::new(device, WeightFormat::Int4, (2, 32, 128)).unwrap();
    let blocks = MatrixRef::new(&[0u8; 1024], 16, 64).unwrap();
    let bf16s = MatrixRef::new(&[bf16::ONE; 64], 16, 4).unwrap();
    let f16s = MatrixRef::new(&[f16::ONE; 64], 16, 4).unwrap();
    builder.add_int4_rows(0, 16, blocks, Int4Scales::F16(f16s)).unwrap();
    let error = builder.add_int4_rows(0, 0, blocks, Int4Scales::Bf16(bf16s)).unwrap_err().to_string();
    assert_eq!(error, "scales is packed as bf16, expected f16, as those before");
    let error = builder.add_int4_rows(0, 16, blocks, Int4Scales::F16(f16s)).unwrap_err();
    assert!(matches!(error, Error::Count { argument: "added_rows", .. }), "{error}");
    builder.add_int4_rows(0, 0, blocks, Int4Scales::F16(f16s)).unwrap();
    assert!(matches!(builder.finish(), Err(Error::Count { argument: "added_rows", expert: 1, .. })));
    let error = WeightsBuilder::new(device, WeightFormat::Int4, (2, 32, 48)).unwrap_err();
    assert!(error.to_string().starts_with("k is 48, expected a positive multiple of 32 for int4"), "{error}");
    let error = Weights::arranged_bytes(WeightFormat::Bf16, (2, 32, 64)).unwrap_err();
    assert!(matches!(error, Error::WeightFormat { argument: "format", actual: "bf16", .. }), "{error}");
}

#[test]
fn mxfp4_weights_that_are_not_arranged_or_not_numbers_are_refused() {
    let Some(device) = hopper() else { return };
    let case = Case { counts: vec![3, 4], alignment: 8, n: 72, k: 96, format: W4A8, kernel: plain(16), seed: 12 };
    let mut operands = Operands::new(&case);
    let call = Call::new(device, &case, &operands);
    let sizes = (2, 72, 96);
    let upload_weights = |scales: &[u8]| Weights::upload_mxfp4(device, &operands.weights, scales, sizes);
    let plain_weights = upload_weights(&operands.group_scales).unwrap();
    assert_eq!(plain_weights.bytes(), 2 * 72 * (48 + 3));
    let refuse = |weights: &Weights| {
        let error = unsafe { call.gemm.launch(Stream(0), &call.operands.call(weights)) }.unwrap_err();
        assert!(matches!(error, Error::WeightFormat { argument: "weights", .. }), "{error}");
    };
    refuse(&plain_weights);
    let for_bf16 = plain_weights.clone().arrange(device, ActivationFormat::Bf16).unwrap();
    refuse(&for_bf16);
    assert!(matches!(for_bf16.arrange(device, ActivationFormat::E4m3), Err(Error::WeightFormat { .. })));
    let scales = &mut operands.group_scales;
    scales[(72 + 5) * 3 + 2] = 255;
    let nan = scales.clone();
    let error = Weights::upload_mxfp4(device, &operands.weights, &nan, sizes).unwrap_err();
    assert!(error.to_string().contains("row 5, group 2"), "{error}");
    let [blocks, scales] = [upload(device, &operands.weights), upload(device, &nan)];
    let in_place = unsafe { Weights::from_device_mxfp4(sizes, blocks.ptr(), scales.ptr()) }.unwrap();
    let error = in_place.arrange(device, ActivationFormat::E4m3).unwrap_err();
    assert!(error.to_string().contains("row 5 of expert 1"), "{error}");
    let error = unsafe { Weights::from_device_mxfp4((2, 72, 48), blocks.ptr(), scales.ptr()) }.unwrap_err();
    assert!(matches!(error, Error::Value { argument: "k", actual: 48, .. }), "{error}");
    let error = Weights::upload_mxfp4(device, &operands.weights[1..], &nan, sizes).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "blocks", .. }), "{error}");
}

/// 4.25 bits to a weight, of int4 4.5, and at most 2 % more.
#[test]
fn arranged_weights_take_their_bits() {
    let Some(device) = hopper() else { return };
    for (experts, n, k) in [(2, 5760, 2880), (2, 2880, 2880), (1, 512, 7168), (3, 7168, 256)] {
        let (blocks, scales) = (vec![0x21; experts * n * k / 2], vec![127; experts * n * k / 32]);
        for rows in ActivationFormat::ALL {
            let weights = Weights::upload_mxfp4(device, &blocks, &scales, (experts, n, k)).unwrap();
            let bytes = weights.arrange(device, rows).unwrap().bytes() as f64;
            let least = (experts * n * k) as f64 * 4.25 / 8.0;
            assert!((1.0..1.02).contains(&(bytes / least)), "{n} x {k}: {bytes} of {least}");
            let scales = Int4Bits { are_f16: false, bits: vec![0x3f80; experts * n * k / 32] };
            let weights = scales.upload(device, &blocks, (experts, n, k)).unwrap();
            let bytes = weights.arrange(device, rows).unwrap().bytes() as f64;
            let least = (experts * n * k) as f64 * 4.5 / 8.0;
            assert!((1.0..1.02).contains(&(bytes / least)), "int4 {n} x {k}: {bytes} of {least}");
        }
    }
}

/// In memory of the caller's, and back: blocks bit for bit, scales but for those of zeros. Also where the last unit and
/// the last slab are partial, and where scales are too far apart to be folded in.
#[test]
fn arranged_mxfp4_gives_back_what_it_was_made_of() {
    let Some(device) = hopper() else { return };
    for (format, n, k, seed) in [(W4A8, 200, 160, 3), (W4A8, 64, 64, 4), (W4A16, 200, 160, 5), (W4A16, 8, 32, 6)] {
        let experts = 5;
        let case = Case { counts: vec![1; experts], alignment: 8, n, k, format, kernel: plain(16), seed };
        let Operands { weights: blocks, group_scales: scales, .. } = Operands::new(&case);
        let sizes = (experts, n, k);
        let plain_weights = || Weights::upload_mxfp4(device, &blocks, &scales, sizes).unwrap();
        let bytes = Weights::arranged_bytes(WeightFormat::Mxfp4, sizes).unwrap();
        let memory = filled(device, bytes + 256, POISON);
        let arrange = |at: DevicePtr| unsafe { plain_weights().arrange_in(device, Stream(0), format.rows, at) };
        let error = arrange(memory.ptr().byte_add(64)).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "memory", .. }), "{error}");
        let arranged = arrange(memory.ptr()).unwrap();
        assert_eq!((arranged.bytes(), arranged.values()), (bytes, memory.ptr()));
        let mut beyond = vec![0u8; 256];
        memory.download_at(bytes, &mut beyond).unwrap();
        assert!(beyond.iter().all(|&byte| byte == POISON));

        let found_blocks = filled(device, blocks.len() + 16, POISON);
        let found_scales = filled(device, scales.len() + 16, POISON);
        let read = |buffer: &DeviceBuffer| {
            let mut bytes = vec![0u8; buffer.bytes()];
            buffer.download_at(0, &mut bytes).unwrap();
            bytes
        };
        let unpack =
            |weights: &Weights, scales| unsafe { weights.unpack_mxfp4(device, Stream(0), found_blocks.ptr(), scales) };
        let error = unpack(&plain_weights(), None).unwrap_err();
        assert!(matches!(error, Error::WeightFormat { argument: "weights", .. }), "{error}");
        unpack(&arranged, None).unwrap();
        let (found, rest) = (read(&found_blocks), read(&found_scales));
        assert!(found[..blocks.len()] == blocks, "{n} x {k}");
        assert!(found[blocks.len()..].iter().chain(&rest).all(|&byte| byte == POISON));
        unpack(&arranged, Some(found_scales.ptr())).unwrap();
        let found = read(&found_scales);
        assert!(found[scales.len()..].iter().all(|&byte| byte == POISON));
        for (group, (&found, &scale)) in found.iter().zip(&scales).enumerate() {
            let zeros = blocks[group * 16..][..16].iter().all(|byte| byte & 0x77 == 0);
            assert!(zeros || found == scale, "group {group} of {n} x {k}: {found}, expected {scale}");
        }
    }
}

/// The same of int4, of which scales are kept bit for bit, too.
#[test]
fn arranged_int4_gives_back_what_it_was_made_of() {
    let Some(device) = hopper() else { return };
    for (format, n, k, seed) in
        [(INT4_A8, 200, 160, 3), (INT4_A8, 64, 64, 4), (INT4_A16, 200, 160, 5), (INT4_A16, 8, 32, 6)]
    {
        let experts = 5;
        let case = Case { counts: vec![1; experts], alignment: 8, n, k, format, kernel: plain(16), seed };
        let Operands { weights: blocks, int4_scales: scales, .. } = Operands::new(&case);
        let plain_weights = || scales.upload(device, &blocks, (experts, n, k)).unwrap();
        let bytes = Weights::arranged_bytes(WeightFormat::Int4, (experts, n, k)).unwrap();
        let memory = filled(device, bytes + 256, POISON);
        let arranged = unsafe { plain_weights().arrange_in(device, Stream(0), format.rows, memory.ptr()) }.unwrap();
        assert_eq!((arranged.bytes(), arranged.values()), (bytes, memory.ptr()));
        let mut beyond = vec![0u8; 256];
        memory.download_at(bytes, &mut beyond).unwrap();
        assert!(beyond.iter().all(|&byte| byte == POISON));

        let found_blocks = filled(device, blocks.len() + 16, POISON);
        let found_scales = filled(device, 2 * scales.bits.len() + 16, POISON);
        let read = |buffer: &DeviceBuffer| {
            let mut bytes = vec![0u8; buffer.bytes()];
            buffer.download_at(0, &mut bytes).unwrap();
            bytes
        };
        let unpack =
            |weights: &Weights, scales| unsafe { weights.unpack_int4(device, Stream(0), found_blocks.ptr(), scales) };
        assert!(matches!(
            unpack(&plain_weights(), None),
            Err(Error::WeightFormat { actual: "int4, not arranged", .. })
        ));
        unpack(&arranged, None).unwrap();
        let (found, rest) = (read(&found_blocks), read(&found_scales));
        assert!(found[..blocks.len()] == blocks, "{n} x {k}");
        assert!(found[blocks.len()..].iter().chain(&rest).all(|&byte| byte == POISON));
        unpack(&arranged, Some(found_scales.ptr())).unwrap();
        let found = read(&found_scales);
        let expected: Vec<u8> = scales.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        assert!(found[..expected.len()] == expected, "{n} x {k}");
        assert!(found[expected.len()..].iter().all(|&byte| byte == POISON));
        let error = unsafe { arranged.unpack_mxfp4(device, Stream(0), found_blocks.ptr(), None) }.unwrap_err();
        assert!(matches!(error, Error::WeightFormat { actual: "int4", expected: "arranged mxfp4", .. }), "{error}");
    }
}

/// With an activation in the GEMM: the bits of the GEMM, then the activation.
fn check_activation(device: &Device, case: &Case, activation: Activation) {
    let operands = Operands::new(case);
    let call = Call::new(device, case, &operands);
    let (m_sum, intermediate) = (operands.plan.m_sum(), case.n / 2);
    let stride = m_sum.next_multiple_of(4);
    let scale_words = intermediate / BLOCK * stride;
    let new = |bytes: usize| filled(device, bytes, POISON);
    let read = |buffer: &DeviceBuffer| {
        let mut bytes = vec![0u8; buffer.bytes()];
        buffer.download_at(0, &mut bytes).unwrap();
        bytes
    };
    let (apart, apart_scales) = (new(m_sum * intermediate), new(4 * scale_words));
    call.run(m_sum, case.n);
    let config = ActivateConfig { intermediate, activation, format: Some(ScaleFormat::HOPPER) };
    let buffers = ActivateCall {
        gate_up: call.out.ptr().cast(),
        psum: call.operands.layout.psum,
        out: apart.ptr(),
        scales: Some(apart_scales.ptr()),
        local_experts: case.counts.len(),
        alignment: case.alignment,
        m_sum,
    };
    unsafe { Activate::prepare(device, config).unwrap().launch(Stream(0), &buffers).unwrap() };
    let config = case.format.config(case.kernel, Some(activation));
    let gemm = Gemm::prepare(device, config).unwrap();
    let (expected, expected_scales) = (read(&apart), read(&apart_scales));
    for run in 0..3 {
        let (out, scales) = (new(m_sum * intermediate), new(4 * scale_words));
        let inside = Operand { out: out.ptr(), out_scales: Some(scales.ptr().cast()), ..call.operands };
        unsafe { gemm.launch(Stream(0), &inside.call(&call.weights)).unwrap() };
        assert!(read(&out) == expected, "run {run}: rows differ: {case:?}");
        let scales = read(&scales);
        for (expert, &count) in case.counts.iter().enumerate() {
            for row in operands.starts[expert]..operands.starts[expert] + count {
                for group in 0..intermediate / BLOCK {
                    let at = 4 * (group * stride + row);
                    let (actual, expected) = (&scales[at..at + 4], &expected_scales[at..at + 4]);
                    assert_eq!(actual, expected, "run {run}: scale of row {row}, group {group}: {case:?}");
                }
            }
        }
    }
}

#[test]
fn an_activation_in_the_gemm_gives_the_bits_of_one_after_it() {
    let Some(device) = hopper() else { return };
    let limited = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
    for (counts, alignment, n, k) in [
        (vec![0, 1, 16, 64, 65, 0, 193, 130, 500, 7], 8, 512, 640),
        (vec![33, 200], 64, 256, 128),
        (vec![70; 24], 16, 768, 400),
    ] {
        for (activation, kernel) in
            [(Activation::default(), WIDE), (limited, WIDE), (Activation::default(), LARGE), (limited, LARGE)]
        {
            let (counts, format) = (counts.clone(), E4M3);
            check_activation(device, &Case { counts, alignment, n, k, format, kernel, seed: 9 }, activation);
        }
    }
}

/// Small, but takes every branch; for the sanitizer, which is slow.
#[test]
fn sanitizer_runs_the_grouped_gemm() {
    let Some(device) = hopper() else { return };
    for format in FORMATS {
        let few = [plain(16), narrow(32), broad(32), split(32, 2), split(16, 8), sharing(64), sharing(192)];
        for kernel in few.into_iter().filter(|kernel| runs(kernel, format)).chain(wide_kernels(format)) {
            let k = format.k(1040);
            check(device, &Case { counts: vec![3, 0, 41, 100], alignment: 8, n: 200, k, format, kernel, seed: 8 });
        }
    }
    // More tiles than an H200 has multiprocessors, so that blocks claim them.
    let (counts, format) = (vec![130; 36], E4M3);
    check(device, &Case { counts, alignment: 8, n: 512, k: 144, format, kernel: LARGE, seed: 8 });
    for kernel in [WIDE, LARGE] {
        let (counts, format) = (vec![3, 0, 41, 200], E4M3);
        let case = Case { counts, alignment: 8, n: 512, k: 272, format, kernel, seed: 9 };
        check_activation(device, &case, Activation::default());
    }
}
