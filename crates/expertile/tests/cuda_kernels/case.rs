//! What a case is, its inputs, and how they and what comes of them are laid out.

use crate::on_device::{Random, filled, upload};
use expertile::cuda::{
    Device, DeviceBuffer, DeviceMatrix, LayoutPtrs, QuantizePermuteCall, RouteCall, RoutingPtrs, RowsPtrs, STATE_BYTES,
};
use expertile::{
    Dtype, Group, Layout, MatrixRef, Padding, Plan, Routing, ScaleFormat, ScaleLayout, ScaleRounding, TokenExperts,
    TopkIds,
};
use half::{bf16, f16};

pub(crate) const POISON: u8 = 0xa5;

/// How tokens choose experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Pattern {
    /// Distinct experts, evenly.
    Even,
    /// Half of all slots on few experts, repeats within a token, some slots empty.
    Skewed,
    /// Every slot on one expert.
    One,
    /// No slot at all.
    Empty,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Case {
    pub(crate) tokens: usize,
    pub(crate) topk: usize,
    pub(crate) experts: usize,
    /// Global experts, of which every third or so is local; 0 for local ids.
    pub(crate) global: usize,
    pub(crate) hidden: usize,
    pub(crate) alignment: usize,
    pub(crate) row_tile: usize,
    pub(crate) pattern: Pattern,
    pub(crate) wide_ids: bool,
    pub(crate) hostile: bool,
    pub(crate) input: Dtype,
    pub(crate) format: ScaleFormat,
    pub(crate) padding: Padding,
    pub(crate) weighted: bool,
    pub(crate) seed: u64,
}

pub(crate) const BASE: Case = Case {
    tokens: 64,
    topk: 8,
    experts: 64,
    global: 0,
    hidden: 4096,
    alignment: 128,
    row_tile: 128,
    pattern: Pattern::Even,
    wide_ids: false,
    hostile: true,
    input: Dtype::Bf16,
    format: ScaleFormat::HOPPER,
    padding: Padding::Untouched,
    weighted: false,
    seed: 1,
};

/// A case's inputs on the host.
pub(crate) struct Inputs {
    pub(crate) ids: Vec<i64>,
    pub(crate) map: Option<Vec<i32>>,
    pub(crate) x: Vec<u16>,
    pub(crate) weights: Vec<f32>,
    pub(crate) plan: Plan,
}

impl Inputs {
    pub(crate) fn new(case: &Case) -> Self {
        let mut random = Random::new(case.seed);
        let map = (case.global > 0).then(|| expert_map(case, &mut random));
        let ids = ids(case, if case.global > 0 { case.global } else { case.experts }, &mut random);
        let x = (0..case.tokens * case.hidden).map(|_| element(case, &mut random)).collect();
        let weights = (0..case.tokens * case.topk).map(|_| random.float()).collect();
        let repeat = if case.pattern == Pattern::Even { TokenExperts::Distinct } else { TokenExperts::MayRepeat };
        let plan = match case.seed % 2 {
            0 => Plan::reference(case.tokens, case.topk, case.experts, case.alignment, None),
            _ => Plan::tight(case.tokens, case.topk, case.experts, case.alignment, repeat),
        };
        Self { ids, map, x, weights, plan: plan.unwrap() }
    }
}

pub(crate) fn expert_map(case: &Case, random: &mut Random) -> Vec<i32> {
    let mut map = vec![-1; case.global];
    for local in 0..case.experts {
        let mut at = random.below(case.global);
        while map[at] >= 0 {
            at = (at + 1) % case.global;
        }
        map[at] = local as i32;
    }
    map
}

pub(crate) fn ids(case: &Case, global: usize, random: &mut Random) -> Vec<i64> {
    let mut ids = Vec::with_capacity(case.tokens * case.topk);
    for _ in 0..case.tokens {
        let first = random.below(global);
        let step = 1 + random.below(global.max(2) - 1);
        for slot in 0..case.topk {
            ids.push(match case.pattern {
                Pattern::Even if slot < global && gcd(step, global) == 1 => ((first + slot * step) % global) as i64,
                Pattern::Even if slot < global => ((first + slot) % global) as i64,
                Pattern::Even | Pattern::Empty => -1 - (slot as i64),
                Pattern::One => (global / 2) as i64,
                Pattern::Skewed if random.below(5) == 0 => -1,
                Pattern::Skewed if random.below(2) == 0 => random.below(global.min(3)) as i64,
                Pattern::Skewed => random.below(global) as i64,
            });
        }
    }
    ids
}

pub(crate) fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A bf16 or f16: mostly a number, now and then one of the special ones.
pub(crate) fn element(case: &Case, random: &mut Random) -> u16 {
    if case.hostile && random.below(97) == 0 {
        return match (random.below(8), case.input) {
            (0, _) => 0x7fff,
            (1, Dtype::F16) => 0xfc00,
            (1, _) => 0xff80,
            (2, _) => 1,
            (3, _) => 0x8001,
            (4, _) => 0x8000,
            (5, Dtype::F16) => 0x7bff,
            (5, _) => 0x7f7f,
            (6, _) => 0xffc1,
            _ => 0,
        };
    }
    let x = random.float();
    if case.input == Dtype::F16 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() }
}

pub(crate) fn poisoned(device: &Device, bytes: usize) -> DeviceBuffer {
    filled(device, bytes, POISON)
}

pub(crate) fn download<T: bytemuck::Pod>(buffer: &DeviceBuffer, len: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); len];
    buffer.download_at(0, &mut values).unwrap();
    values
}

pub(crate) fn words_of<T: bytemuck::Pod>(values: &[T]) -> Vec<u32> {
    bytemuck::cast_slice(values).to_vec()
}

pub(crate) fn word<T: bytemuck::Pod>() -> T {
    bytemuck::pod_read_unaligned(&[POISON; 8][..size_of::<T>()])
}

/// Fails with the first place where two lists differ.
pub(crate) fn assert_same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    case: &dyn std::fmt::Debug,
    actual: &[T],
    expected: &[T],
) {
    assert_eq!(actual.len(), expected.len(), "{what} of {case:?}");
    let differs = |&at: &usize| actual[at] != expected[at];
    if actual != expected
        && let Some(at) = (0..actual.len()).find(differs)
    {
        let count = (0..actual.len()).filter(differs).count();
        panic!("{what}[{at}] is {:?}, expected {:?} ({count} differ) in {case:?}", actual[at], expected[at]);
    }
}

/// A case's inputs and poisoned outputs on the device.
pub(crate) struct OnDevice {
    pub(crate) ids: DeviceBuffer,
    pub(crate) map: Option<DeviceBuffer>,
    pub(crate) x: DeviceBuffer,
    pub(crate) weights: DeviceBuffer,
    pub(crate) out: DeviceBuffer,
    pub(crate) scales: DeviceBuffer,
    pub(crate) layout_space: DeviceBuffer,
    pub(crate) layout: LayoutPtrs,
    pub(crate) state: DeviceBuffer,
    pub(crate) workspace: DeviceBuffer,
    pub(crate) routing: RoutingPtrs,
    pub(crate) rows: RowsPtrs,
}

impl OnDevice {
    pub(crate) fn new(device: &Device, case: &Case, inputs: &Inputs, workspace_bytes: usize) -> Self {
        let ids = if case.wide_ids {
            upload(device, &inputs.ids)
        } else {
            upload(device, &inputs.ids.iter().map(|&id| id as i32).collect::<Vec<_>>())
        };
        let map = inputs.map.as_ref().map(|map| upload(device, map));
        let x = upload(device, &inputs.x);
        let weights = upload(device, &inputs.weights);
        let plan = &inputs.plan;
        let out = poisoned(device, plan.m_sum() * case.hidden);
        let scales = poisoned(device, case.format.words(plan.m_sum(), case.hidden).unwrap() * 4);
        let layout_space = poisoned(device, LayoutPtrs::space_bytes(plan, case.row_tile).unwrap());
        let layout = LayoutPtrs::carve(layout_space.ptr(), plan, case.row_tile).unwrap();
        let (state, workspace) = (poisoned(device, STATE_BYTES), poisoned(device, workspace_bytes));
        let routing = RoutingPtrs {
            ids: DeviceMatrix::row_major(ids.ptr(), case.topk),
            expert_map: map.as_ref().map(|map| map.ptr().cast()),
            global_experts: if case.global > 0 { case.global } else { case.experts },
        };
        let rows = RowsPtrs {
            x: DeviceMatrix::row_major(x.ptr(), case.hidden),
            weights: Some(DeviceMatrix::row_major(weights.ptr().cast(), 1)),
            out: out.ptr(),
            scales: Some(scales.ptr()),
            ..RowsPtrs::default()
        };
        Self { ids, map, x, weights, out, scales, layout_space, layout, state, workspace, routing, rows }
    }

    pub(crate) fn route_call(&self, plan: Plan) -> RouteCall {
        RouteCall {
            plan,
            routing: self.routing,
            layout: self.layout,
            state: self.state.ptr(),
            workspace: self.workspace.ptr(),
        }
    }

    pub(crate) fn call(&self, plan: Plan) -> QuantizePermuteCall {
        let (routing, rows, layout) = (self.routing, self.rows, self.layout);
        QuantizePermuteCall { plan, routing, rows, layout, state: self.state.ptr(), workspace: self.workspace.ptr() }
    }

    pub(crate) fn poison(&self) {
        for buffer in [&self.out, &self.scales, &self.layout_space] {
            buffer.fill(POISON).unwrap();
        }
    }
}

pub(crate) fn with_layout<R>(inputs: &Inputs, topk: usize, local: usize, work: impl FnOnce(&Layout<'_>) -> R) -> R {
    let ids = MatrixRef::new(&inputs.ids, inputs.plan.tokens(), topk).unwrap();
    let routing = Routing::new(TopkIds::from(ids), local, inputs.map.as_deref()).unwrap();
    let mut space = vec![0; Layout::space_len(&inputs.plan).unwrap()];
    let layout = Layout::build(&inputs.plan, &routing, &mut space).unwrap();
    work(&layout)
}

pub(crate) fn format(group: Group, layout: ScaleLayout, rounding: ScaleRounding) -> ScaleFormat {
    ScaleFormat::new(group, layout, rounding).unwrap()
}
