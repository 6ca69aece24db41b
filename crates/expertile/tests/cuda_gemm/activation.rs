//! The activation inside the GEMM.

use crate::case::*;
use crate::on_device::{filled, hopper};
use crate::tiles::*;
use expertile::cuda::{Activate, ActivateCall, ActivateConfig, Device, DeviceBuffer, Gemm, Stream};
use expertile::{Activation, ScaleFormat};
use expertile_testkit::POISON;

/// With an activation in the GEMM: the bits of the GEMM, then the activation.
pub(crate) fn check_activation(device: &Device, case: &Case, activation: Activation) {
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
