//! The weighted sum, bit for bit.

use crate::cases::{Number, Strided, Strides, bits, exact, fills, machines, numbers, strides};
use crate::routings::{RoutingCase, config, routings};
use expertile::cpu;
use expertile_oracle as oracle;
use expertile_testkit::{Fill, Random};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::sample::select;

/// Padding rows hold NaN and empty slots have NaN weights: neither may be looked at.
fn check<T: Number, O: Number>(
    case: &RoutingCase,
    hidden: usize,
    (fill, seed): (Fill, u64),
    (row_strides, weight_strides): (Strides, Strides),
    weighted: bool,
) -> Result<(), TestCaseError> {
    case.with_layout(|layout, oracle_layout| {
        let mut rows: Vec<T> = numbers(layout.m_sum() * hidden, fill, seed);
        for (row, &expert) in oracle_layout.m_indices.iter().enumerate() {
            if expert < 0 {
                rows[row * hidden..][..hidden].fill(T::nearest(f32::NAN));
            }
        }
        let mut weights: Vec<f32> = numbers(case.ids.len(), Fill::Ordinary, !seed);
        for (weight, &row) in weights.iter_mut().zip(&oracle_layout.inv_perm) {
            if row < 0 {
                *weight = f32::NAN;
            }
        }
        let row_matrix = Strided::new(&rows, layout.m_sum(), hidden, row_strides, T::nearest(f32::NAN));
        let weight_matrix = Strided::new(&weights, case.tokens(), case.topk, weight_strides, f32::NAN);
        let expected: Vec<O> = oracle::unpermute::unpermute_f32(
            &exact(&rows),
            hidden,
            &oracle_layout.inv_perm,
            case.topk,
            weighted.then_some(&weights),
        )
        .into_iter()
        .map(O::nearest)
        .collect();
        let poison = O::nearest(-77.0);
        for cpu in machines() {
            let mut out = vec![poison; case.tokens() * hidden + 5];
            let weights = weighted.then(|| weight_matrix.matrix());
            cpu::unpermute(&cpu, row_matrix.matrix(), layout, weights, &mut out).unwrap();
            prop_assert_eq!(bits(&out[..expected.len()]), bits(&expected), "{:?}", cpu.isa());
            prop_assert!(out[expected.len()..].iter().all(|value| value.bits() == poison.bits()));
        }
        Ok(())
    })
}

proptest! {
    #![proptest_config(config(80))]

    #[test]
    fn sums_run_in_slot_order_with_one_rounding_each(
        case in routings(),
        hidden in select(&[1, 3, 130, 256, 257, 600][..]),
        fill in fills(),
        seed: u64,
        strides in (strides(), strides()),
        weighted: bool,
    ) {
        check::<bf16, bf16>(&case, hidden, (fill, seed), strides, weighted)?;
        check::<f32, f32>(&case, hidden, (fill, seed), strides, weighted)?;
        check::<f16, f16>(&case, hidden, (fill, seed), strides, weighted)?;
        check::<bf16, f32>(&case, hidden, (fill, seed), strides, weighted)?;
        check::<f32, bf16>(&case, hidden, (fill, seed), strides, weighted)?;
    }
}

proptest! {
    #![proptest_config(config(150))]

    /// Someone else's rows in any order, even shared ones; what stands in slots that are not local is anything at all.
    #[test]
    fn a_bare_inv_perm_is_summed_like_a_layouts(
        case in routings(),
        hidden in select(&[1, 130, 513][..]),
        held in 1..=40usize,
        seed: u64,
        strides in (strides(), strides(), strides()),
        weighted: bool,
        with_routing: bool,
    ) {
        let mut random = Random::new(seed);
        let rows: Vec<bf16> = numbers(held * hidden, Fill::Ordinary, seed);
        let weights: Vec<f32> = numbers(case.ids.len(), Fill::Ordinary, !seed);
        let mut given = Vec::new();
        let mut meant = Vec::new();
        for &id in &case.ids {
            let row = random.below(held) as i32;
            let local = oracle::layout::local_expert(id, case.expert_map.as_deref()).is_some();
            meant.push(if local { row } else { -1 });
            let junk = random.of(&[-1, i32::MIN, i32::MAX, row]);
            given.push(if local { row } else if with_routing { junk } else { -5 });
        }
        let expected: Vec<u32> =
            oracle::unpermute::unpermute_f32(&exact(&rows), hidden, &meant, case.topk, weighted.then_some(&weights))
                .into_iter()
                .map(|sum| bf16::nearest(sum).bits())
                .collect();
        let rows = Strided::new(&rows, held, hidden, strides.0, bf16::NAN);
        let weights = Strided::new(&weights, case.tokens(), case.topk, strides.1, f32::NAN);
        let inv_perm = Strided::new(&given, case.tokens(), case.topk, strides.2, i32::MAX);
        let routing = case.routing();
        for cpu in machines() {
            let mut out = vec![bf16::NAN; case.tokens() * hidden];
            let (routing, weights) = (with_routing.then_some(&routing), weighted.then(|| weights.matrix()));
            cpu::unpermute_slots(&cpu, rows.matrix(), inv_perm.matrix(), routing, weights, &mut out).unwrap();
            prop_assert_eq!(bits(&out), &expected[..], "{:?}", cpu.isa());
        }
    }
}

#[test]
fn real_hidden_sizes_give_the_same_bits() {
    for hidden in [2880, 3584, 7168] {
        let ids = vec![0, 3, 1, 2, -1, 3, 3, -1, -1];
        let case = RoutingCase { topk: 3, local_experts: 4, alignment: 8, ids, expert_map: None, slack: 0 };
        let strides = (Strides::Contiguous, Strides::Contiguous);
        check::<bf16, bf16>(&case, hidden, (Fill::Ordinary, 3), strides, true).unwrap();
    }
}
