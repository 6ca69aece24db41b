//! Rows that are ready, with their scales or without.

use crate::case::{BASE, Case, Inputs, OnDevice, download, format, poisoned, with_layout, word, words_of};
use crate::on_device::{device, upload};
use crate::quantize_permute::config;
use expertile::cpu::{self, Cpu, RowScales};
use expertile::cuda::{Device, DeviceMatrix, Permute, PermuteCall, PermuteConfig, Route, RowsPtrs, Stream};
use expertile::{Dtype, E4m3, Group, MatrixRef, Padding, ScaleLayout, ScaleRounding, ScalesMut};
use expertile_testkit::{POISON, Random, assert_same};
use half::bf16;

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

pub(crate) fn check_permute_quantized(device: &Device, case: &Case) {
    let inputs = Inputs::new(case);
    let mut random = Random::new(case.seed + 1);
    let rows: Vec<E4m3> = (0..case.tokens * case.hidden).map(|_| E4m3(random.draw() as u8)).collect();
    let groups = case.format.groups(case.hidden).unwrap();
    let f32_scales: Vec<f32> = (0..case.tokens * groups).map(|_| random.spread()).collect();
    let bytes: Vec<u8> = (0..case.tokens * groups).map(|_| random.draw() as u8).collect();
    let packed = case.format.layout() == ScaleLayout::PackedUe8m0;
    let words = case.format.words(inputs.plan.m_sum(), case.hidden).unwrap();
    let mut out = vec![E4m3(POISON); inputs.plan.m_sum() * case.hidden];
    let mut out_f32 = vec![word::<f32>(); words];
    let mut out_packed = vec![word::<i32>(); words];
    with_layout(&inputs, case.topk, case.experts, |layout| {
        let x = MatrixRef::new(&rows, case.tokens, case.hidden).unwrap();
        let (from, to) = if packed {
            (
                RowScales::Ue8m0(MatrixRef::new(&bytes, case.tokens, groups).unwrap()),
                ScalesMut::ue8m0(case.format, &mut out_packed),
            )
        } else {
            (
                RowScales::F32(MatrixRef::new(&f32_scales, case.tokens, groups).unwrap()),
                ScalesMut::f32(case.format, &mut out_f32),
            )
        };
        cpu::permute_quantized(&Cpu::new(), x, from, layout, case.padding, &mut out, to).unwrap();
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
    let buffers = RowsPtrs {
        x: DeviceMatrix::row_major(x.ptr(), case.hidden),
        x_scales: Some(DeviceMatrix::row_major(scales.ptr(), groups)),
        ..on.rows
    };
    unsafe {
        route.initialise_state(Stream(0), on.state.ptr()).unwrap();
        route.launch(Stream(0), &on.route_call(inputs.plan)).unwrap();
        permute.launch(Stream(0), &PermuteCall { plan: inputs.plan, rows: buffers, layout: on.layout }).unwrap();
        route.check(Stream(0), &on.route_call(inputs.plan)).unwrap();
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
            let rows =
                RowsPtrs { x: DeviceMatrix::row_major(on.x.ptr(), hidden), out: to.ptr(), ..RowsPtrs::default() };
            unsafe {
                route.initialise_state(Stream(0), on.state.ptr()).unwrap();
                route.launch(Stream(0), &on.route_call(inputs.plan)).unwrap();
                permute.launch(Stream(0), &PermuteCall { plan: inputs.plan, rows, layout: on.layout }).unwrap();
            }
            let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_same("out", &case, &bits(&download(&to, out.len())), &bits(&out));
        }
    }
}
