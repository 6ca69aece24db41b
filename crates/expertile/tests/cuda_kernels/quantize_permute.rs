//! From routing to quantized rows: lists, bytes, scales, gaps.

use crate::case::{BASE, Case, Inputs, OnDevice, download, format, with_layout, word, words_of};
use crate::on_device::device;
use crate::routings::{self, RoutingCase, routings};
use expertile::cpu::{self, Cpu};
use expertile::cuda::{Device, DevicePtr, QuantizePermute, QuantizePermuteConfig, RouteConfig, Stream};
use expertile::{Dtype, E4m3, Group, MatrixRef, Padding, Plan, ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut};
use expertile_testkit::{POISON, Pattern, assert_same};
use half::{bf16, f16};
use proptest::strategy::Strategy;
use proptest::test_runner::TestRunner;

/// What the CPU backend makes of a case.
pub(crate) struct Expected {
    pub(crate) out: Vec<E4m3>,
    pub(crate) scales: Vec<u32>,
    pub(crate) lists: Vec<i32>,
    pub(crate) worklist: Vec<[i32; 2]>,
    pub(crate) live_rows: usize,
}

pub(crate) fn expected(case: &Case, inputs: &Inputs) -> Expected {
    let m_sum = inputs.plan.m_sum();
    let mut out = vec![E4m3(POISON); m_sum * case.hidden];
    let words = case.format.words(m_sum, case.hidden).unwrap();
    let mut f32_scales = vec![word::<f32>(); words];
    let mut packed_scales = vec![word::<i32>(); words];
    let packed = case.format.layout() == ScaleLayout::PackedUe8m0;
    with_layout(inputs, case.topk, case.experts, |layout| {
        let scales = if packed {
            ScalesMut::ue8m0(case.format, &mut packed_scales)
        } else {
            ScalesMut::f32(case.format, &mut f32_scales)
        };
        let weights = MatrixRef::new(&inputs.weights, case.tokens, 1).unwrap();
        let weights = case.weighted.then_some(weights);
        let cpu = Cpu::new();
        match case.input {
            Dtype::F16 => {
                let x = MatrixRef::new(bytemuck::cast_slice::<_, f16>(&inputs.x), case.tokens, case.hidden).unwrap();
                cpu::quantize_permute(&cpu, x, weights, layout, case.padding, &mut out, scales).unwrap();
            }
            _ => {
                let x = MatrixRef::new(bytemuck::cast_slice::<_, bf16>(&inputs.x), case.tokens, case.hidden).unwrap();
                cpu::quantize_permute(&cpu, x, weights, layout, case.padding, &mut out, scales).unwrap();
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
    pub(crate) fn with_scales(self, scales: Vec<u32>) -> Self {
        Self { scales, ..self }
    }
}

/// The five lists of a layout, one behind the other, as the CPU backend keeps them.
pub(crate) fn lists(device: &OnDevice, case: &Case, plan: &Plan) -> Vec<i32> {
    let words = device.layout_space.bytes() / 4;
    let space: Vec<i32> = download(&device.layout_space, words);
    let at = |list: DevicePtr<i32>, len: usize| {
        let start = ((list.address() - device.layout_space.ptr().address()) / 4) as usize;
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

pub(crate) fn check_lists(device: &OnDevice, case: &Case, plan: &Plan, expected: &Expected) {
    assert_same("layout", case, &lists(device, case, plan), &expected.lists);
    let space: Vec<i32> = download(&device.layout_space, device.layout_space.bytes() / 4);
    let start = |list: DevicePtr<i32>| ((list.address() - device.layout_space.ptr().address()) / 4) as usize;
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

pub(crate) fn check_outputs(device: &OnDevice, case: &Case, plan: &Plan, expected: &Expected) {
    check_lists(device, case, plan, expected);
    assert_same("scales", case, &download::<u32>(&device.scales, expected.scales.len()), &expected.scales);
    assert_same("out", case, &download::<E4m3>(&device.out, expected.out.len()), &expected.out);
}

pub(crate) fn config(case: &Case) -> QuantizePermuteConfig {
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
pub(crate) fn check_quantize_permute(device: &Device, case: &Case) {
    check_inputs(device, case, &Inputs::new(case));
}

fn check_inputs(device: &Device, case: &Case, inputs: &Inputs) {
    let expected = expected(case, inputs);
    for single_launch_slots in [8192, 0] {
        if case.tokens * case.topk > single_launch_slots && single_launch_slots > 0 {
            continue;
        }
        let step =
            QuantizePermute::prepare(device, config(case)).unwrap().with_single_launch_slots(single_launch_slots);
        let on = OnDevice::new(device, case, inputs, step.workspace_bytes(&inputs.plan).unwrap());
        let stream = Stream(0);
        unsafe {
            step.initialise_state(stream, on.state.ptr()).unwrap();
            for _ in 0..2 {
                on.poison();
                step.launch(stream, &on.call(inputs.plan)).unwrap();
                step.check(stream, &on.call(inputs.plan)).unwrap();
                check_outputs(&on, case, &inputs.plan, &expected);
            }
        }
    }
}

#[test]
fn quantize_permute_is_the_cpus_over_tokens_and_experts() {
    let Some(device) = device() else { return };
    let mut seed = 10;
    for tokens in [0, 1, 2, 33, 64, 256, 512, 513, 1500] {
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
    let whole = [(128, BASE.format), (2880, mxfp8), (3584, BASE.format), (4096, mxfp8), (7168, BASE.format)];
    // Rows whose last group is half of one.
    let packed = format(Group::G128, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo);
    let partial = [(2880, BASE.format), (192, packed), (64, BASE.format)];
    for (hidden, format) in whole.into_iter().chain(partial) {
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

/// What the properties of `contract` run on the CPU.
#[test]
fn quantize_permute_is_the_cpus_for_every_kind_of_routing() {
    let Some(device) = device() else { return };
    let fits = routings().prop_filter("a GPU takes at most 32 experts of a token", |routing| routing.topk <= 32);
    let check = |routing: RoutingCase| {
        let case = Case {
            tokens: routing.tokens(),
            topk: routing.topk,
            experts: routing.local_experts,
            global: routing.expert_map.as_ref().map_or(0, Vec::len),
            hidden: 128,
            alignment: routing.alignment,
            // Two of them, and few values of topk: every pair is compiled.
            row_tile: if routing.alignment.is_multiple_of(4) { 4 } else { 1 },
            // The ids of empty slots need 64 bits.
            wide_ids: true,
            seed: 1601,
            ..BASE
        };
        check_inputs(device, &case, &Inputs::of_routing(&case, &routing));
        Ok(())
    };
    if let Err(error) = TestRunner::new(routings::config(40)).run(&fits, check) {
        panic!("{error}");
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
        step.initialise_state(Stream(0), on.state.ptr()).unwrap();
        step.launch(Stream(0), &on.call(inputs.plan)).unwrap();
        step.check(Stream(0), &on.call(inputs.plan)).unwrap();
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
        unsafe { step.initialise_state(Stream(0), on.state.ptr()).unwrap() };
        for _ in 0..50 {
            on.poison();
            unsafe {
                step.launch(Stream(0), &on.call(inputs.plan)).unwrap();
            }
            check_outputs(&on, &case, &inputs.plan, &expected);
        }
    }
}
