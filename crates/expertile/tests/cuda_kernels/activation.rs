//! The activation, quantized and not.

use crate::case::{BASE, Case, Inputs, download, element, format, poisoned, with_layout, word, words_of};
use crate::on_device::{device, upload};
use crate::unpermute::number_bits;
use expertile::cpu::{self, Cpu};
use expertile::cuda::{Activate, ActivateCall, ActivateConfig, Device, Stream};
use expertile::{Activation, E4m3, Group, ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut};
use expertile_testkit::{POISON, Pattern, Random, assert_same};
use half::bf16;

#[test]
fn activation_is_the_cpus_quantized_and_not() {
    let Some(device) = device() else { return };
    let swiglu = Activation::default();
    let clamped = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
    let packed = format(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo);
    let row_major = format(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact);
    let mut seed = 1000;
    for (intermediate, activation, format) in [
        (2048, swiglu, Some(BASE.format)),
        (1536, clamped, Some(packed)),
        (768, swiglu, Some(row_major)),
        (14336, swiglu, Some(BASE.format)),
        (14336, clamped, Some(packed)),
        (2880, clamped, Some(BASE.format)),
        (192, swiglu, Some(row_major)),
        (512, Activation::Swiglu { alpha: 0.0, beta: 0.0, limit: None }, None),
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

pub(crate) fn check_activation(device: &Device, case: &Case, activation: Activation, format: Option<ScaleFormat>) {
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
                let scales = if packed {
                    ScalesMut::ue8m0(format, &mut packed_scales)
                } else {
                    ScalesMut::f32(format, &mut f32_scales)
                };
                cpu::activate_quantize(&cpu, layout, intermediate, values, &activation, &mut bytes, scales).unwrap();
            }
            None => cpu::activate(&cpu, layout, intermediate, values, &activation, &mut halves).unwrap(),
        }
        layout.psum().to_vec()
    });
    let step = Activate::prepare(device, ActivateConfig { intermediate, activation, format }).unwrap();
    let (from, ends) = (upload(device, &gate_up), upload(device, &psum));
    let (to, scales) = (poisoned(device, halves.len() * 2), poisoned(device, words * 4));
    let call = ActivateCall {
        gate_up: from.ptr().cast(),
        psum: ends.ptr().cast(),
        out: to.ptr(),
        scales: Some(scales.ptr()),
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
