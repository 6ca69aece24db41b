//! The CUDA backend against the CPU backend, bit for bit. Every output is poisoned first and compared whole, gaps included.
//! Skips, and says so, on a machine without a device.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]
// Every unsafe block here does one of two things: it hands a step the addresses of buffers that live until after the next
// wait and are as large as the step's own functions ask, or it calls the driver with handles made a few lines above.
#![allow(clippy::undocumented_unsafe_blocks)]

mod on_device;

use cudarc::driver::sys;
use expertile::cpu::{self, Cpu, RowScales};
use expertile::cuda::{
    Activate, ActivateBuffers, ActivateConfig, Buffer, Device, LayoutBuffers, Permute, PermuteConfig, QuantizePermute,
    QuantizePermuteConfig, Route, RouteConfig, RoutingBuffers, RowsBuffers, Stream, Tensor2, Unpermute,
    UnpermuteBuffers, UnpermuteConfig,
};
use expertile::{
    Activation, Dtype, E4m3, Error, Group, Layout, MatrixRef, Padding, Plan, Routing, ScaleFormat, ScaleLayout,
    ScaleRounding, ScalesMut, TokenExperts, TopkIds,
};
use half::{bf16, f16};
use on_device::{Random, device, filled, upload};

const POISON: u8 = 0xa5;

/// How tokens choose experts.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Pattern {
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
struct Case {
    tokens: usize,
    topk: usize,
    experts: usize,
    /// Global experts, of which every third or so is local; 0 for local ids.
    global: usize,
    hidden: usize,
    alignment: usize,
    row_tile: usize,
    pattern: Pattern,
    wide_ids: bool,
    hostile: bool,
    input: Dtype,
    format: ScaleFormat,
    padding: Padding,
    weighted: bool,
    seed: u64,
}

const BASE: Case = Case {
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
struct Inputs {
    ids: Vec<i64>,
    map: Option<Vec<i32>>,
    x: Vec<u16>,
    weights: Vec<f32>,
    plan: Plan,
}

impl Inputs {
    fn new(case: &Case) -> Self {
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

fn expert_map(case: &Case, random: &mut Random) -> Vec<i32> {
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

fn ids(case: &Case, global: usize, random: &mut Random) -> Vec<i64> {
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

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A bf16 or f16: mostly a number, now and then one of the special ones.
fn element(case: &Case, random: &mut Random) -> u16 {
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

fn poisoned(device: &Device, bytes: usize) -> Buffer {
    filled(device, bytes, POISON)
}

fn download<T: bytemuck::Pod>(buffer: &Buffer, len: usize) -> Vec<T> {
    let mut values = vec![T::zeroed(); len];
    buffer.download(&mut values).unwrap();
    values
}

fn words_of<T: bytemuck::Pod>(values: &[T]) -> Vec<u32> {
    bytemuck::cast_slice(values).to_vec()
}

fn word<T: bytemuck::Pod>() -> T {
    bytemuck::pod_read_unaligned(&[POISON; 8][..size_of::<T>()])
}

/// Fails with the first place where two lists differ.
fn assert_same<T: PartialEq + std::fmt::Debug>(what: &str, case: &dyn std::fmt::Debug, actual: &[T], expected: &[T]) {
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
struct OnDevice {
    ids: Buffer,
    map: Option<Buffer>,
    x: Buffer,
    weights: Buffer,
    out: Buffer,
    scales: Buffer,
    layout_space: Buffer,
    layout: LayoutBuffers,
    workspace: Buffer,
    routing: RoutingBuffers,
    rows: RowsBuffers,
}

impl OnDevice {
    fn new(device: &Device, case: &Case, inputs: &Inputs, workspace_bytes: usize) -> Self {
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
        let layout_space = poisoned(device, LayoutBuffers::space_bytes(plan, case.row_tile).unwrap());
        let layout = LayoutBuffers::carve(layout_space.address(), plan, case.row_tile).unwrap();
        let workspace = poisoned(device, workspace_bytes);
        let routing = RoutingBuffers {
            ids: Tensor2 { address: ids.address(), row_stride: case.topk, col_stride: 1 },
            expert_map: map.as_ref().map_or(0, Buffer::address),
            global_experts: if case.global > 0 { case.global } else { case.experts },
        };
        let rows = RowsBuffers {
            x: Tensor2 { address: x.address(), row_stride: case.hidden, col_stride: 1 },
            weights: Tensor2 { address: weights.address(), row_stride: 1, col_stride: 1 },
            out: out.address(),
            scales: scales.address(),
            ..RowsBuffers::default()
        };
        Self { ids, map, x, weights, out, scales, layout_space, layout, workspace, routing, rows }
    }

    fn poison(&self) {
        for buffer in [&self.out, &self.scales, &self.layout_space] {
            buffer.fill(POISON).unwrap();
        }
    }
}

/// What the CPU backend makes of a case.
struct Expected {
    out: Vec<E4m3>,
    scales: Vec<u32>,
    lists: Vec<i32>,
    worklist: Vec<[i32; 2]>,
    live_rows: usize,
}

fn with_layout<R>(inputs: &Inputs, topk: usize, local: usize, work: impl FnOnce(&Layout<'_>) -> R) -> R {
    let ids = MatrixRef::new(&inputs.ids, inputs.plan.tokens(), topk).unwrap();
    let routing = Routing::new(TopkIds::from(ids), local, inputs.map.as_deref()).unwrap();
    let mut space = vec![0; Layout::space_len(&inputs.plan).unwrap()];
    let layout = Layout::build(&inputs.plan, &routing, &mut space).unwrap();
    work(&layout)
}

fn expected(case: &Case, inputs: &Inputs) -> Expected {
    let m_sum = inputs.plan.m_sum();
    let mut out = vec![E4m3(POISON); m_sum * case.hidden];
    let words = case.format.words(m_sum, case.hidden).unwrap();
    let mut f32_scales = vec![word::<f32>(); words];
    let mut packed_scales = vec![word::<i32>(); words];
    let packed = case.format.layout() == ScaleLayout::PackedUe8m0;
    with_layout(inputs, case.topk, case.experts, |layout| {
        let scales = if packed { ScalesMut::Ue8m0(&mut packed_scales) } else { ScalesMut::F32(&mut f32_scales) };
        let weights = MatrixRef::new(&inputs.weights, case.tokens, 1).unwrap();
        let weights = case.weighted.then_some(weights);
        let cpu = Cpu::new();
        match case.input {
            Dtype::F16 => {
                let x = MatrixRef::new(bytemuck::cast_slice::<_, f16>(&inputs.x), case.tokens, case.hidden).unwrap();
                cpu::quantize_permute(&cpu, x, weights, layout, case.format, case.padding, &mut out, scales).unwrap();
            }
            _ => {
                let x = MatrixRef::new(bytemuck::cast_slice::<_, bf16>(&inputs.x), case.tokens, case.hidden).unwrap();
                cpu::quantize_permute(&cpu, x, weights, layout, case.format, case.padding, &mut out, scales).unwrap();
            }
        }
        let lists =
            [layout.expert_num_tokens(), layout.expert_start(), layout.psum(), layout.m_indices(), layout.inv_perm()];
        let tiles = |expert: usize| {
            layout.expert_rows(expert).step_by(case.row_tile).map(move |row| [expert as i32, row as i32])
        };
        Expected {
            out: std::mem::take(&mut out),
            lists: lists.concat(),
            worklist: (0..case.experts).flat_map(tiles).collect(),
            live_rows: layout.live_rows(),
            scales: Vec::new(),
        }
    })
    .with_scales(if packed { words_of(&packed_scales) } else { words_of(&f32_scales) })
}

impl Expected {
    fn with_scales(self, scales: Vec<u32>) -> Self {
        Self { scales, ..self }
    }
}

/// The five lists of a layout, one behind the other, as the CPU backend keeps them.
fn lists(device: &OnDevice, case: &Case, plan: &Plan) -> Vec<i32> {
    let words = device.layout_space.bytes() / 4;
    let space: Vec<i32> = download(&device.layout_space, words);
    let at = |address: u64, len: usize| {
        let start = ((address - device.layout_space.address()) / 4) as usize;
        &space[start..start + len]
    };
    let layout = &device.layout;
    [
        at(layout.expert_num_tokens, case.experts),
        at(layout.expert_start, case.experts),
        at(layout.psum, case.experts),
        at(layout.m_indices, plan.m_sum()),
        at(layout.inv_perm, plan.tokens() * plan.topk()),
    ]
    .concat()
}

fn check_lists(device: &OnDevice, case: &Case, plan: &Plan, expected: &Expected) {
    assert_same("layout", case, &lists(device, case, plan), &expected.lists);
    let space: Vec<i32> = download(&device.layout_space, device.layout_space.bytes() / 4);
    let start = |address: u64| ((address - device.layout_space.address()) / 4) as usize;
    let tiles = expected.worklist.len();
    let header = &space[start(device.layout.header)..][..4];
    let starts = &expected.lists[case.experts..2 * case.experts];
    let counts = &expected.lists[..case.experts];
    let used = starts[case.experts - 1] as usize + (counts[case.experts - 1] as usize).next_multiple_of(case.alignment);
    assert_eq!(header, [expected.live_rows as i32, used as i32, tiles as i32, 0], "header of {case:?}");
    let inv_perm = &expected.lists[expected.lists.len() - plan.tokens() * plan.topk()..];
    let mut row_tokens = vec![-1; plan.m_sum()];
    for (slot, &row) in inv_perm.iter().enumerate().filter(|(_, row)| **row >= 0) {
        row_tokens[row as usize] = (slot / plan.topk()) as i32;
    }
    assert_same("row_tokens", case, &space[start(device.layout.row_tokens)..][..plan.m_sum()], &row_tokens);
    let worklist: Vec<[i32; 2]> =
        space[start(device.layout.worklist)..][..2 * tiles].chunks(2).map(|pair| [pair[0], pair[1]]).collect();
    assert_same("worklist", case, &worklist, &expected.worklist);
}

fn check_outputs(device: &OnDevice, case: &Case, plan: &Plan, expected: &Expected) {
    check_lists(device, case, plan, expected);
    assert_same("scales", case, &download::<u32>(&device.scales, expected.scales.len()), &expected.scales);
    assert_same("out", case, &download::<E4m3>(&device.out, expected.out.len()), &expected.out);
}

fn config(case: &Case) -> QuantizePermuteConfig {
    let ids = if case.wide_ids { Dtype::I64 } else { Dtype::I32 };
    QuantizePermuteConfig {
        route: RouteConfig { topk: case.topk, ids, row_tile: case.row_tile },
        hidden: case.hidden,
        input: case.input,
        format: case.format,
        padding: case.padding,
        weighted: case.weighted,
        aligned: case.seed % 5 != 3,
    }
}

/// One launch where the slots allow it, and two; the same bits.
fn check_quantize_permute(device: &Device, case: &Case) {
    let inputs = Inputs::new(case);
    let expected = expected(case, &inputs);
    for single_launch_slots in [4096, 0] {
        if case.tokens * case.topk > 4096 && single_launch_slots > 0 {
            continue;
        }
        let step =
            QuantizePermute::prepare(device, config(case)).unwrap().with_single_launch_slots(single_launch_slots);
        let on = OnDevice::new(device, case, &inputs, step.workspace_bytes(&inputs.plan).unwrap());
        let stream = Stream(0);
        unsafe {
            step.initialise_workspace(stream, on.workspace.address()).unwrap();
            for _ in 0..2 {
                on.poison();
                step.launch(stream, &inputs.plan, &on.routing, &on.rows, &on.layout, on.workspace.address()).unwrap();
                step.check(stream, &inputs.plan, &on.routing, on.workspace.address()).unwrap();
                check_outputs(&on, case, &inputs.plan, &expected);
            }
        }
    }
}

fn format(group: Group, layout: ScaleLayout, rounding: ScaleRounding) -> ScaleFormat {
    ScaleFormat::new(group, layout, rounding).unwrap()
}

#[test]
fn quantize_permute_is_the_cpus_over_tokens_and_experts() {
    let Some(device) = device() else { return };
    let mut seed = 10;
    for tokens in [0, 1, 2, 33, 64, 256, 257, 1500] {
        for (topk, experts) in [(1, 1), (2, 8), (8, 256), (6, 1024)] {
            for pattern in [Pattern::Even, Pattern::Skewed] {
                seed += 1;
                check_quantize_permute(device, &Case { tokens, topk, experts, pattern, hidden: 1024, seed, ..BASE });
            }
        }
    }
}

#[test]
fn quantize_permute_is_the_cpus_in_every_format() {
    let Some(device) = device() else { return };
    let mut seed = 100;
    for group in [Group::G32, Group::G128] {
        for layout in [ScaleLayout::RowMajor, ScaleLayout::MnMajor, ScaleLayout::PackedUe8m0] {
            for rounding in [ScaleRounding::Exact, ScaleRounding::PowerOfTwo] {
                let Ok(format) = ScaleFormat::new(group, layout, rounding) else { continue };
                for (hidden, tokens, input) in [(128, 40, Dtype::F16), (3584, 70, Dtype::Bf16), (640, 300, Dtype::F16)]
                {
                    seed += 1;
                    let padding = if seed % 2 == 0 { Padding::Zero } else { Padding::Untouched };
                    let case = Case {
                        tokens,
                        hidden,
                        input,
                        format,
                        padding,
                        seed,
                        experts: 13,
                        alignment: 10,
                        row_tile: 5,
                        ..BASE
                    };
                    check_quantize_permute(device, &case);
                }
            }
        }
    }
}

#[test]
fn quantize_permute_is_the_cpus_over_hidden_sizes_slots_and_maps() {
    let Some(device) = device() else { return };
    let mxfp8 = format(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo);
    let mut seed = 200;
    for (hidden, format) in [(128, BASE.format), (2880, mxfp8), (3584, BASE.format), (4096, mxfp8), (7168, BASE.format)]
    {
        for (topk, experts, global, wide_ids) in
            [(1, 3, 0, true), (3, 32, 256, false), (8, 5, 40, true), (16, 64, 0, true)]
        {
            for (tokens, pattern) in [(17, Pattern::Skewed), (600, Pattern::Even)] {
                seed += 1;
                let weighted = topk == 1;
                let case =
                    Case { tokens, topk, experts, global, hidden, format, pattern, wide_ids, weighted, seed, ..BASE };
                check_quantize_permute(device, &case);
            }
        }
    }
}

#[test]
fn quantize_permute_is_the_cpus_when_all_tokens_go_one_way_or_none() {
    let Some(device) = device() else { return };
    for (pattern, tokens, alignment) in [
        (Pattern::One, 100, 128),
        (Pattern::One, 127, 127),
        (Pattern::One, 3000, 64),
        (Pattern::Empty, 50, 128),
        (Pattern::Empty, 2000, 128),
    ] {
        let case = Case {
            pattern,
            tokens,
            alignment,
            row_tile: alignment,
            topk: 4,
            hidden: 512,
            seed: 300 + tokens as u64,
            ..BASE
        };
        check_quantize_permute(device, &case);
    }
}

#[test]
fn quantize_permute_is_the_cpus_at_32768_tokens() {
    let Some(device) = device() else { return };
    for (topk, experts, hidden, seed) in [(8, 256, 512, 401), (16, 1024, 256, 402)] {
        let case = Case { tokens: 32768, topk, experts, hidden, seed, ..BASE };
        check_quantize_permute(device, &case);
    }
}

#[test]
fn a_permuted_buffer_of_more_than_4_gib_is_the_cpus() {
    let Some(device) = device() else { return };
    let case = Case { tokens: 32768, topk: 20, experts: 64, hidden: 7168, seed: 501, ..BASE };
    assert!(Inputs::new(&Case { hidden: 1, ..case }).plan.m_sum() * case.hidden > 1 << 32);
    let inputs = Inputs::new(&case);
    let expected = expected(&case, &inputs);
    let step = QuantizePermute::prepare(device, config(&case)).unwrap();
    let on = OnDevice::new(device, &case, &inputs, step.workspace_bytes(&inputs.plan).unwrap());
    unsafe {
        step.initialise_workspace(Stream(0), on.workspace.address()).unwrap();
        step.launch(Stream(0), &inputs.plan, &on.routing, &on.rows, &on.layout, on.workspace.address()).unwrap();
        step.check(Stream(0), &inputs.plan, &on.routing, on.workspace.address()).unwrap();
    }
    check_outputs(&on, &case, &inputs.plan, &expected);
}

#[test]
fn fifty_repeats_give_the_same_bits() {
    let Some(device) = device() else { return };
    for (tokens, seed) in [(256, 601), (4096, 602)] {
        let case = Case { tokens, experts: 256, hidden: 1024, seed, pattern: Pattern::Skewed, ..BASE };
        let inputs = Inputs::new(&case);
        let expected = expected(&case, &inputs);
        let step = QuantizePermute::prepare(device, config(&case)).unwrap();
        let on = OnDevice::new(device, &case, &inputs, step.workspace_bytes(&inputs.plan).unwrap());
        unsafe { step.initialise_workspace(Stream(0), on.workspace.address()).unwrap() };
        for _ in 0..50 {
            on.poison();
            unsafe {
                step.launch(Stream(0), &inputs.plan, &on.routing, &on.rows, &on.layout, on.workspace.address())
                    .unwrap();
            }
            check_outputs(&on, &case, &inputs.plan, &expected);
        }
    }
}

#[test]
fn ready_rows_are_permuted_with_their_scales() {
    let Some(device) = device() else { return };
    let mut seed = 700;
    for (hidden, topk, tokens) in [(128, 1, 5), (3584, 8, 300), (7168, 2, 40)] {
        for format in [
            BASE.format,
            format(Group::G32, ScaleLayout::RowMajor, ScaleRounding::Exact),
            format(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo),
            format(Group::G128, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo),
        ] {
            seed += 1;
            let padding = if seed % 2 == 0 { Padding::Zero } else { Padding::Untouched };
            check_permute_quantized(
                device,
                &Case { tokens, topk, hidden, format, padding, seed, experts: 16, alignment: 24, row_tile: 8, ..BASE },
            );
        }
    }
}

fn check_permute_quantized(device: &Device, case: &Case) {
    let inputs = Inputs::new(case);
    let mut random = Random::new(case.seed + 1);
    let rows: Vec<E4m3> = (0..case.tokens * case.hidden).map(|_| E4m3(random.next() as u8)).collect();
    let groups = case.format.groups(case.hidden).unwrap();
    let f32_scales: Vec<f32> = (0..case.tokens * groups).map(|_| random.float()).collect();
    let bytes: Vec<u8> = (0..case.tokens * groups).map(|_| random.next() as u8).collect();
    let packed = case.format.layout() == ScaleLayout::PackedUe8m0;
    let words = case.format.words(inputs.plan.m_sum(), case.hidden).unwrap();
    let mut out = vec![E4m3(POISON); inputs.plan.m_sum() * case.hidden];
    let mut out_f32 = vec![word::<f32>(); words];
    let mut out_packed = vec![word::<i32>(); words];
    with_layout(&inputs, case.topk, case.experts, |layout| {
        let x = MatrixRef::new(&rows, case.tokens, case.hidden).unwrap();
        let (from, to) = if packed {
            (RowScales::Ue8m0(MatrixRef::new(&bytes, case.tokens, groups).unwrap()), ScalesMut::Ue8m0(&mut out_packed))
        } else {
            (RowScales::F32(MatrixRef::new(&f32_scales, case.tokens, groups).unwrap()), ScalesMut::F32(&mut out_f32))
        };
        cpu::permute_quantized(&Cpu::new(), x, from, layout, case.format, case.padding, &mut out, to).unwrap();
    });
    let expected_scales: Vec<u32> = if packed { words_of(&out_packed) } else { words_of(&out_f32) };
    let route = Route::prepare(device, config(case).route).unwrap();
    let permute = Permute::prepare(
        device,
        PermuteConfig {
            topk: case.topk,
            hidden: case.hidden,
            dtype: Dtype::E4m3,
            scales: Some(case.format),
            padding: case.padding,
            alignment_bytes: 16,
        },
    )
    .unwrap();
    let on = OnDevice::new(device, case, &inputs, route.workspace_bytes(&inputs.plan).unwrap());
    let x = upload(device, &rows);
    let scales = if packed { upload(device, &bytes) } else { upload(device, &f32_scales) };
    let buffers = RowsBuffers {
        x: Tensor2 { address: x.address(), row_stride: case.hidden, col_stride: 1 },
        x_scales: Tensor2 { address: scales.address(), row_stride: groups, col_stride: 1 },
        ..on.rows
    };
    unsafe {
        route.initialise_workspace(Stream(0), on.workspace.address()).unwrap();
        route.launch(Stream(0), &inputs.plan, &on.routing, &on.layout, on.workspace.address()).unwrap();
        permute.launch(Stream(0), &inputs.plan, &buffers, &on.layout).unwrap();
        route.check(Stream(0), &inputs.plan, &on.routing, on.workspace.address()).unwrap();
    }
    assert_same("scales", case, &download::<u32>(&on.scales, words), &expected_scales);
    assert_same("out", case, &download::<E4m3>(&on.out, out.len()), &out);
}

#[test]
fn rows_without_scales_are_permuted_whatever_their_type_and_length() {
    let Some(device) = device() else { return };
    for (hidden, alignment_bytes, seed) in [(1, 2, 801), (3, 2, 802), (2880, 16, 803), (2884, 8, 804), (7168, 16, 805)]
    {
        for (tokens, topk, padding) in [(9, 3, Padding::Zero), (500, 8, Padding::Untouched)] {
            let case =
                Case { tokens, topk, hidden: hidden * 128, experts: 7, alignment: 16, row_tile: 16, seed, ..BASE };
            let inputs = Inputs::new(&Case { hidden, ..case });
            let mut out = vec![word::<bf16>(); inputs.plan.m_sum() * hidden];
            with_layout(&inputs, topk, case.experts, |layout| {
                let x = MatrixRef::new(bytemuck::cast_slice::<_, bf16>(&inputs.x), tokens, hidden).unwrap();
                cpu::permute_rows(&Cpu::new(), x, layout, padding, &mut out).unwrap();
            });
            let route = Route::prepare(device, config(&case).route).unwrap();
            let config = PermuteConfig { topk, hidden, dtype: Dtype::Bf16, scales: None, padding, alignment_bytes };
            let permute = Permute::prepare(device, config).unwrap();
            let on = OnDevice::new(device, &case, &inputs, route.workspace_bytes(&inputs.plan).unwrap());
            let to = poisoned(device, out.len() * 2);
            let rows = RowsBuffers {
                x: Tensor2 { address: on.x.address(), row_stride: hidden, col_stride: 1 },
                out: to.address(),
                ..RowsBuffers::default()
            };
            unsafe {
                route.initialise_workspace(Stream(0), on.workspace.address()).unwrap();
                route.launch(Stream(0), &inputs.plan, &on.routing, &on.layout, on.workspace.address()).unwrap();
                permute.launch(Stream(0), &inputs.plan, &rows, &on.layout).unwrap();
            }
            let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_same("out", &case, &bits(&download(&to, out.len())), &bits(&out));
        }
    }
}

/// The bits of numbers; one value for every NaN, whose payload is nobody's promise.
fn number_bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|value| if value.is_nan() { 0x7fc0 } else { value.to_bits() }).collect()
}

#[test]
fn unpermute_is_the_cpus() {
    let Some(device) = device() else { return };
    let mut seed = 900;
    for (hidden, topk, aligned) in
        [(128, 1, true), (2880, 8, true), (7168, 8, true), (4096, 16, true), (1003, 3, false)]
    {
        for (tokens, pattern) in [(1, Pattern::Even), (70, Pattern::Skewed), (1100, Pattern::Even)] {
            for weighted in [true, false] {
                seed += 1;
                let global = if seed % 3 == 0 { 96 } else { 0 };
                let case = Case {
                    tokens,
                    topk,
                    hidden,
                    pattern,
                    experts: 32,
                    global,
                    seed,
                    alignment: 8,
                    row_tile: 8,
                    ..BASE
                };
                check_unpermute(device, &case, aligned, weighted);
            }
        }
    }
}

fn check_unpermute(device: &Device, case: &Case, aligned: bool, weighted: bool) {
    let inputs = Inputs::new(&Case { hidden: 1, ..*case });
    let mut random = Random::new(case.seed + 7);
    let m_sum = inputs.plan.m_sum();
    let rows: Vec<u16> = (0..m_sum * case.hidden).map(|_| element(case, &mut random)).collect();
    let mut out = vec![word::<bf16>(); case.tokens * case.hidden];
    let inv_perm = with_layout(&inputs, case.topk, case.experts, |layout| {
        let x = MatrixRef::new(bytemuck::cast_slice::<_, bf16>(&rows), m_sum, case.hidden).unwrap();
        let weights = MatrixRef::new(&inputs.weights, case.tokens, case.topk).unwrap();
        cpu::unpermute(&Cpu::new(), x, layout, weighted.then_some(weights), &mut out).unwrap();
        layout.inv_perm().to_vec()
    });
    let config = UnpermuteConfig {
        hidden: case.hidden,
        topk: case.topk,
        input: Dtype::Bf16,
        output: Dtype::Bf16,
        weighted,
        aligned,
    };
    let step = Unpermute::prepare(device, config).unwrap();
    let (from, places, weights) = (upload(device, &rows), upload(device, &inv_perm), upload(device, &inputs.weights));
    let to = poisoned(device, out.len() * 2);
    let call = UnpermuteBuffers {
        rows: from.address(),
        inv_perm: places.address(),
        weights: Tensor2 { address: weights.address(), row_stride: case.topk, col_stride: 1 },
        out: to.address(),
        tokens: case.tokens,
        m_sum,
    };
    unsafe { step.launch(Stream(0), &call).unwrap() };
    assert_same("out", case, &number_bits(&download(&to, out.len())), &number_bits(&out));
}

#[test]
fn activation_is_the_cpus_quantized_and_not() {
    let Some(device) = device() else { return };
    let swiglu = Activation::default();
    let clamped = Activation { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
    let packed = format(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo);
    let row_major = format(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact);
    let mut seed = 1000;
    for (intermediate, activation, format) in [
        (2048, swiglu, Some(BASE.format)),
        (1536, clamped, Some(packed)),
        (768, swiglu, Some(row_major)),
        (14336, swiglu, Some(BASE.format)),
        (14336, clamped, Some(packed)),
        (512, Activation { alpha: 0.0, ..swiglu }, None),
        (2048, clamped, None),
        (48, swiglu, None),
    ] {
        for (tokens, pattern, experts) in
            [(1, Pattern::Even, 1024), (60, Pattern::Skewed, 32), (700, Pattern::One, 9), (40, Pattern::Empty, 3)]
        {
            seed += 1;
            let case = Case {
                tokens,
                pattern,
                experts,
                topk: 2,
                alignment: 20,
                row_tile: 20,
                hidden: intermediate,
                format: format.unwrap_or(BASE.format),
                seed,
                ..BASE
            };
            check_activation(device, &case, activation, format);
        }
    }
}

fn check_activation(device: &Device, case: &Case, activation: Activation, format: Option<ScaleFormat>) {
    let intermediate = case.hidden;
    let inputs = Inputs::new(&Case { hidden: 1, ..*case });
    let mut random = Random::new(case.seed + 7);
    let m_sum = inputs.plan.m_sum();
    let gate_up: Vec<u16> = (0..m_sum * 2 * intermediate).map(|_| element(case, &mut random)).collect();
    let values = bytemuck::cast_slice::<_, bf16>(&gate_up);
    let words = format.map_or(0, |format| format.words(m_sum, intermediate).unwrap());
    let (mut f32_scales, mut packed_scales) = (vec![word::<f32>(); words], vec![word::<i32>(); words]);
    let packed = case.format.layout() == ScaleLayout::PackedUe8m0;
    let mut bytes = vec![E4m3(POISON); m_sum * intermediate];
    let mut halves = vec![word::<bf16>(); m_sum * intermediate];
    let psum = with_layout(&inputs, case.topk, case.experts, |layout| {
        let cpu = Cpu::new();
        match format {
            Some(format) => {
                let scales =
                    if packed { ScalesMut::Ue8m0(&mut packed_scales) } else { ScalesMut::F32(&mut f32_scales) };
                cpu::activate_quantize(&cpu, layout, intermediate, values, &activation, format, &mut bytes, scales)
                    .unwrap();
            }
            None => cpu::activate(&cpu, layout, intermediate, values, &activation, &mut halves).unwrap(),
        }
        layout.psum().to_vec()
    });
    let step = Activate::prepare(device, ActivateConfig { intermediate, activation, format }).unwrap();
    let (from, ends) = (upload(device, &gate_up), upload(device, &psum));
    let (to, scales) = (poisoned(device, halves.len() * 2), poisoned(device, words * 4));
    let call = ActivateBuffers {
        gate_up: from.address(),
        psum: ends.address(),
        out: to.address(),
        scales: scales.address(),
        local_experts: case.experts,
        alignment: case.alignment,
        m_sum,
    };
    unsafe { step.launch(Stream(0), &call).unwrap() };
    if format.is_none() {
        return assert_same("out", case, &number_bits(&download(&to, halves.len())), &number_bits(&halves));
    }
    let expected: Vec<u32> = if packed { words_of(&packed_scales) } else { words_of(&f32_scales) };
    assert_same("scales", case, &download::<u32>(&scales, words), &expected);
    assert_same("out", case, &download::<E4m3>(&to, bytes.len()), &bytes);
}

#[test]
fn ids_past_the_limit_write_nothing_outside_and_are_reported_at_the_next_wait() {
    let Some(device) = device() else { return };
    for tokens in [64, 900] {
        let case = Case { tokens, hidden: 256, experts: 16, seed: 1101, ..BASE };
        let good = Inputs::new(&case);
        let mut bad = Inputs::new(&case);
        bad.ids[tokens * 8 - 3] = 1 << 20;
        bad.ids[5 * 8 + 2] = 16;
        let mut emptied = Inputs::new(&case);
        emptied.ids[tokens * 8 - 3] = -1;
        emptied.ids[5 * 8 + 2] = -1;
        let expected_bad = expected(&case, &emptied);
        let step = QuantizePermute::prepare(device, config(&case)).unwrap();
        let on = OnDevice::new(device, &case, &bad, step.workspace_bytes(&bad.plan).unwrap());
        let workspace = on.workspace.address();
        unsafe {
            step.initialise_workspace(Stream(0), workspace).unwrap();
            step.launch(Stream(0), &bad.plan, &on.routing, &on.rows, &on.layout, workspace).unwrap();
            let error = step.check(Stream(0), &bad.plan, &on.routing, workspace).unwrap_err();
            assert_eq!(error, Error::ExpertId { token: 5, slot: 2, id: 16, limit: 16 });
            check_outputs(&on, &case, &bad.plan, &expected_bad);
            step.check(Stream(0), &bad.plan, &on.routing, workspace).unwrap();
            on.ids.upload(&good.ids.iter().map(|&id| id as i32).collect::<Vec<_>>()).unwrap();
            on.poison();
            step.launch(Stream(0), &good.plan, &on.routing, &on.rows, &on.layout, workspace).unwrap();
            step.check(Stream(0), &good.plan, &on.routing, workspace).unwrap();
            check_outputs(&on, &case, &good.plan, &expected(&case, &good));
        }
    }
}

#[test]
fn a_map_entry_past_the_experts_is_reported() {
    let Some(device) = device() else { return };
    let case = Case { tokens: 30, global: 40, experts: 10, hidden: 256, seed: 1201, ..BASE };
    let mut inputs = Inputs::new(&case);
    let map = inputs.map.as_mut().unwrap();
    let used = inputs.ids[11] as usize;
    map[used] = 10;
    let step = QuantizePermute::prepare(device, config(&case)).unwrap();
    let on = OnDevice::new(device, &case, &inputs, step.workspace_bytes(&inputs.plan).unwrap());
    assert!(on.map.is_some());
    unsafe {
        step.initialise_workspace(Stream(0), on.workspace.address()).unwrap();
        step.launch(Stream(0), &inputs.plan, &on.routing, &on.rows, &on.layout, on.workspace.address()).unwrap();
        let error = step.check(Stream(0), &inputs.plan, &on.routing, on.workspace.address()).unwrap_err();
        assert_eq!(error, Error::MapEntry { index: used, value: 10, local_experts: 10 });
    }
}

#[test]
fn a_routing_that_needs_more_rows_than_planned_stays_inside_and_is_reported() {
    let Some(device) = device() else { return };
    for tokens in [100, 1000] {
        let case = Case { tokens, topk: 4, experts: 8, hidden: 256, seed: 1301, alignment: 16, row_tile: 16, ..BASE };
        let mut inputs = Inputs::new(&case);
        let needed = with_layout(&inputs, 4, 8, |layout| layout.psum()[7].max(0) as usize).next_multiple_of(16);
        let small = needed / 2 / 16 * 16;
        inputs.plan = Plan::with_m_sum(tokens, 4, 8, 16, small).unwrap();
        let step = QuantizePermute::prepare(device, config(&case)).unwrap();
        let on = OnDevice::new(device, &case, &inputs, step.workspace_bytes(&inputs.plan).unwrap());
        // Whatever stands behind the rows must not change.
        let guarded = poisoned(device, needed * 256 * 2);
        let rows = RowsBuffers { out: guarded.address(), ..on.rows };
        unsafe {
            step.initialise_workspace(Stream(0), on.workspace.address()).unwrap();
            step.launch(Stream(0), &inputs.plan, &on.routing, &rows, &on.layout, on.workspace.address()).unwrap();
            let error = step.check(Stream(0), &inputs.plan, &on.routing, on.workspace.address()).unwrap_err();
            assert_eq!(error, Error::MSum { m_sum: small, needed, alignment: 16 });
        }
        let after: Vec<u8> = download(&guarded, guarded.bytes());
        assert!(after[small * 256..].iter().all(|&byte| byte == POISON), "rows past the buffer were written");
        let lists = lists(&on, &case, &inputs.plan);
        assert!(lists[..24].iter().all(|&row| (0..=small as i32).contains(&row)), "{:?}", &lists[..24]);
        assert!(lists[24 + small..].iter().all(|&row| row < small as i32));
    }
}

/// A captured launch, replayable.
struct Graph {
    exec: sys::CUgraphExec,
    stream: sys::CUstream,
}

impl Graph {
    fn capture(work: impl FnOnce(Stream)) -> Self {
        unsafe {
            let mut stream = std::ptr::null_mut();
            assert_eq!(sys::cuStreamCreate(&mut stream, 1), sys::CUresult::CUDA_SUCCESS);
            let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            assert_eq!(sys::cuStreamBeginCapture_v2(stream, relaxed), sys::CUresult::CUDA_SUCCESS);
            work(Stream(stream as usize as u64));
            let mut graph = std::ptr::null_mut();
            assert_eq!(sys::cuStreamEndCapture(stream, &mut graph), sys::CUresult::CUDA_SUCCESS);
            let mut exec = std::ptr::null_mut();
            assert_eq!(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0), sys::CUresult::CUDA_SUCCESS);
            Self { exec, stream }
        }
    }

    fn replay(&self) {
        unsafe {
            assert_eq!(sys::cuGraphLaunch(self.exec, self.stream), sys::CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamSynchronize(self.stream), sys::CUresult::CUDA_SUCCESS);
        }
    }
}

/// Makes the device's primary context current on this thread, as a framework would have.
fn adopt_primary_context() {
    unsafe {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        assert_eq!(sys::cuDeviceGet(&mut device, 0), sys::CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut context, device), sys::CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxSetCurrent(context), sys::CUresult::CUDA_SUCCESS);
    }
}

#[test]
fn a_captured_chain_replays_right_with_changed_inputs_in_a_worst_case_buffer() {
    let Some(device) = device() else { return };
    adopt_primary_context();
    for (tokens, single_launch_slots) in [(64, 4096), (64, 0), (700, 4096)] {
        // Twice in one graph: the second launch meets the first one's barrier and counters.
        let case =
            Case { tokens, experts: 32, global: 256, hidden: 1024, seed: 1402, pattern: Pattern::Skewed, ..BASE };
        let first = Inputs::new(&case);
        let step =
            QuantizePermute::prepare(device, config(&case)).unwrap().with_single_launch_slots(single_launch_slots);
        let on = OnDevice::new(device, &case, &first, step.workspace_bytes(&first.plan).unwrap());
        let workspace = on.workspace.address();
        let config = UnpermuteConfig {
            hidden: 1024,
            topk: 8,
            input: Dtype::Bf16,
            output: Dtype::Bf16,
            weighted: true,
            aligned: true,
        };
        let unpermute = Unpermute::prepare(device, config).unwrap();
        let m_sum = first.plan.m_sum();
        let mut random = Random::new(5);
        let rows: Vec<u16> = (0..m_sum * 1024).map(|_| bf16::from_f32(random.float()).to_bits()).collect();
        let (from, to) = (upload(device, &rows), poisoned(device, tokens * 1024 * 2));
        let call = UnpermuteBuffers {
            rows: from.address(),
            inv_perm: on.layout.inv_perm,
            weights: Tensor2 { address: on.weights.address(), row_stride: 8, col_stride: 1 },
            out: to.address(),
            tokens,
            m_sum,
        };
        unsafe { step.initialise_workspace(Stream(0), workspace).unwrap() };
        unsafe { device.synchronize(Stream(0)).unwrap() };
        let graph = Graph::capture(|stream| unsafe {
            for _ in 0..2 {
                step.launch(stream, &first.plan, &on.routing, &on.rows, &on.layout, workspace).unwrap();
            }
            unpermute.launch(stream, &call).unwrap();
        });
        for seed in [1402, 1404, 1406] {
            let changed = Case { seed, pattern: if seed == 1404 { Pattern::Empty } else { Pattern::Skewed }, ..case };
            let mut inputs = Inputs::new(&changed);
            // The captured map stays: only ids, rows and weights change.
            inputs.map = first.map.clone();
            assert_eq!(inputs.plan, first.plan);
            on.ids.upload(&inputs.ids.iter().map(|&id| id as i32).collect::<Vec<_>>()).unwrap();
            on.x.upload(&inputs.x).unwrap();
            on.weights.upload(&inputs.weights).unwrap();
            on.poison();
            to.fill(POISON).unwrap();
            graph.replay();
            check_outputs(&on, &case, &inputs.plan, &expected(&case, &inputs));
            let mut out = vec![bf16::ZERO; tokens * 1024];
            with_layout(&inputs, 8, 32, |layout| {
                let x = MatrixRef::new(bytemuck::cast_slice::<_, bf16>(&rows), m_sum, 1024).unwrap();
                let weights = MatrixRef::new(&inputs.weights, tokens, 8).unwrap();
                cpu::unpermute(&Cpu::new(), x, layout, Some(weights), &mut out).unwrap();
            });
            assert_same("unpermuted", &case, &number_bits(&download(&to, out.len())), &number_bits(&out));
        }
    }
}

#[test]
fn no_kernel_uses_local_memory_and_every_one_says_its_registers() {
    let Some(device) = device() else { return };
    let step = QuantizePermute::prepare(device, config(&BASE)).unwrap();
    for resources in step.resources() {
        println!("quantize_permute: {resources:?}");
        assert!(resources.local_bytes == 0 && resources.registers > 0);
    }
}

/// Small cases that take every kernel and both paths: what a run under compute-sanitizer can afford.
#[test]
fn sanitizer_runs_every_kernel_once() {
    let Some(device) = device() else { return };
    let packed = format(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo);
    let row_major = format(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact);
    for (tokens, format, padding, seed) in [
        (40, BASE.format, Padding::Zero, 1501),
        (300, packed, Padding::Untouched, 1502),
        (33, row_major, Padding::Zero, 1503),
    ] {
        let case = Case {
            tokens,
            format,
            padding,
            hidden: 640,
            experts: 37,
            alignment: 12,
            row_tile: 6,
            pattern: Pattern::Skewed,
            seed,
            ..BASE
        };
        check_quantize_permute(device, &case);
        check_permute_quantized(device, &case);
        check_unpermute(device, &case, true, true);
        check_activation(device, &Case { topk: 2, ..case }, Activation::default(), Some(format));
        check_activation(device, &Case { topk: 2, ..case }, Activation::default(), None);
    }
    // Rows enough for the activation to use its table.
    let many = Case { tokens: 520, topk: 2, experts: 5, hidden: 14336, seed: 1505, ..BASE };
    check_activation(device, &many, Activation::default(), Some(BASE.format));
    check_quantize_permute(device, &Case { tokens: 1200, hidden: 256, global: 90, experts: 30, seed: 1504, ..BASE });
}
