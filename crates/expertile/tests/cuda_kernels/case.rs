//! What a case is, its inputs, and how they and what comes of them are laid out.

use crate::on_device::{filled, upload};
use crate::routings::RoutingCase;
use expertile::cuda::{
    Device, DeviceBuffer, DeviceMatrix, LayoutPtrs, QuantizePermuteCall, RouteCall, RoutingPtrs, RowsPtrs, STATE_BYTES,
};
use expertile::{
    Dtype, Group, Layout, MatrixRef, Padding, Plan, Routing, ScaleFormat, ScaleLayout, ScaleRounding, TokenExperts,
    TopkIds,
};
use expertile_testkit::{POISON, Pattern, Random, expert_map};
use half::{bf16, f16};

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

impl Case {
    pub(crate) fn global_experts(&self) -> usize {
        if self.global > 0 { self.global } else { self.experts }
    }
}

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
        let map = (case.global > 0).then(|| expert_map(&mut random, case.global, case.experts));
        let experts = case.global_experts();
        let ids = case.pattern.ids(&mut random, [case.tokens, case.topk], experts, experts / 2);
        let repeat = if case.pattern == Pattern::Even { TokenExperts::Distinct } else { TokenExperts::MayRepeat };
        let plan = match case.seed % 2 {
            0 => Plan::reference(case.tokens, case.topk, case.experts, case.alignment, None),
            _ => Plan::tight(case.tokens, case.topk, case.experts, case.alignment, repeat),
        };
        Self::with_rows(case, ids, map, plan.unwrap(), &mut random)
    }

    /// Those of a case whose tokens, experts and alignment are the routing's.
    pub(crate) fn of_routing(case: &Case, routing: &RoutingCase) -> Self {
        let (ids, map) = (routing.ids.clone(), routing.expert_map.clone());
        Self::with_rows(case, ids, map, routing.plan(), &mut Random::new(case.seed))
    }

    fn with_rows(case: &Case, ids: Vec<i64>, map: Option<Vec<i32>>, plan: Plan, random: &mut Random) -> Self {
        let x = (0..case.tokens * case.hidden).map(|_| element(case, random)).collect();
        let weights = (0..case.tokens * case.topk).map(|_| random.spread()).collect();
        Self { ids, map, x, weights, plan }
    }
}

/// A bf16 or f16: mostly a number, now and then one of the special ones.
pub(crate) fn element(case: &Case, random: &mut Random) -> u16 {
    let (infinity, largest) = if case.input == Dtype::F16 { (0xfc00, 0x7bff) } else { (0xff80, 0x7f7f) };
    if case.hostile && random.one_in(97) {
        return random.of(&[0x7fff, infinity, 1, 0x8001, 0x8000, largest, 0xffc1, 0]);
    }
    let x = random.spread();
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
            global_experts: case.global_experts(),
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
