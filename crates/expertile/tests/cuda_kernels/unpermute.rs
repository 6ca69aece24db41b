//! Rows back to their tokens.

use crate::case::{BASE, Case, Inputs, download, element, poisoned, with_layout, word};
use crate::on_device::{device, upload};
use expertile::cpu::{self, Cpu};
use expertile::cuda::{Device, DeviceMatrix, Stream, Unpermute, UnpermuteCall, UnpermuteConfig};
use expertile::{Dtype, MatrixRef};
use expertile_testkit::{Pattern, Random, assert_same};
use half::bf16;

/// The bits of numbers; one value for every NaN, whose payload is nobody's promise.
pub(crate) fn number_bits(values: &[bf16]) -> Vec<u16> {
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

pub(crate) fn check_unpermute(device: &Device, case: &Case, aligned: bool, weighted: bool) {
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
    let call = UnpermuteCall {
        rows: from.ptr(),
        inv_perm: places.ptr().cast(),
        weights: Some(DeviceMatrix::row_major(weights.ptr().cast(), case.topk)),
        out: to.ptr(),
        tokens: case.tokens,
        m_sum,
    };
    unsafe { step.launch(Stream(0), &call).unwrap() };
    assert_same("out", case, &number_bits(&download(&to, out.len())), &number_bits(&out));
}
