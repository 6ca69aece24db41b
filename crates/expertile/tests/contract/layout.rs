//! The layout, bit for bit, and ready psum layouts as input.

use crate::cases::{Strided, strides};
use crate::routings::{config, routings};
use expertile::{Layout, Plan, Routing, TokenExperts};
use expertile_oracle as oracle;
use proptest::prelude::*;

fn same(actual: &Layout<'_>, expected: &oracle::layout::Layout) -> Result<(), TestCaseError> {
    prop_assert_eq!(actual.expert_num_tokens(), &expected.expert_num_tokens[..]);
    prop_assert_eq!(actual.expert_start(), &expected.expert_start[..]);
    prop_assert_eq!(actual.psum(), &expected.psum[..]);
    prop_assert_eq!(actual.m_indices(), &expected.m_indices[..]);
    prop_assert_eq!(actual.inv_perm(), &expected.inv_perm[..]);
    Ok(())
}

proptest! {
    #![proptest_config(config(1500))]

    #[test]
    fn a_layout_is_the_oracles_bit_for_bit(case in routings(), strides in strides(), narrow: bool) {
        let plan = case.plan();
        let needed = Layout::space_len(&plan).unwrap();
        let mut space = vec![0x7777; needed + 3];
        let expected = case.oracle_layout();
        let map = case.expert_map.as_deref();
        let wide = Strided::new(&case.ids, case.tokens(), case.topk, strides, i64::MAX);
        let ids: Vec<i32> = case.ids.iter().map(|&id| id.max(i64::from(i32::MIN)) as i32).collect();
        let ids = Strided::new(&ids, case.tokens(), case.topk, strides, i32::MAX);
        let routing = if narrow {
            Routing::new(ids.matrix(), case.local_experts, map).unwrap()
        } else {
            Routing::new(wide.matrix(), case.local_experts, map).unwrap()
        };
        let layout = Layout::build(&plan, &routing, &mut space).unwrap();
        same(&layout, &expected)?;
        prop_assert_eq!(layout.alignment(), case.alignment);
        prop_assert_eq!((layout.tokens(), layout.topk()), (case.tokens(), case.topk));
        prop_assert_eq!(layout.live_rows(), expected.m_indices.iter().filter(|&&expert| expert >= 0).count());
        prop_assert_eq!(&space[needed..], [0x7777; 3], "nothing is written past what was asked for");
    }

    #[test]
    fn a_larger_buffer_changes_nothing_but_its_tail(case in routings()) {
        let exact = case.oracle_layout();
        let plan = Plan::tight(
            case.tokens(), case.topk, case.local_experts, case.alignment, TokenExperts::MayRepeat,
        ).unwrap();
        let mut space = vec![0x7777; Layout::space_len(&plan).unwrap()];
        let layout = Layout::build(&plan, &case.routing(), &mut space).unwrap();
        prop_assert_eq!(layout.inv_perm(), &exact.inv_perm[..]);
        prop_assert_eq!(layout.psum(), &exact.psum[..]);
        let live = exact.m_indices.iter().rposition(|&expert| expert >= 0).map_or(0, |last| last + 1);
        prop_assert_eq!(&layout.m_indices()[..live], &exact.m_indices[..live]);
        prop_assert!(layout.m_indices()[live..].iter().all(|&expert| expert == -1));
    }

    #[test]
    fn a_ready_psum_gives_the_layout_it_was_taken_from(case in routings()) {
        case.with_layout(|built, expected| {
            let mut space = vec![0x7777; 3 * case.local_experts + built.m_sum() + 2];
            let ready = Layout::from_psum(built.psum(), case.alignment, built.m_sum(), &mut space).unwrap();
            prop_assert_eq!(ready.expert_num_tokens(), &expected.expert_num_tokens[..]);
            prop_assert_eq!(ready.expert_start(), &expected.expert_start[..]);
            prop_assert_eq!(ready.psum(), &expected.psum[..]);
            prop_assert_eq!(ready.m_indices(), &expected.m_indices[..]);
            prop_assert_eq!(ready.live_rows(), built.live_rows());
            prop_assert_eq!((ready.tokens(), ready.inv_perm().len()), (0, 0));
            prop_assert!(space.ends_with(&[0x7777; 2]));
            Ok(())
        })?;
    }

    #[test]
    fn padding_and_expert_rows_cut_the_buffer_without_gaps(case in routings()) {
        case.with_layout(|layout, expected| {
            let mut seen = vec![-9; layout.m_sum()];
            for rows in layout.padding() {
                seen[rows].fill(-1);
            }
            for expert in 0..case.local_experts {
                seen[layout.expert_rows(expert)].fill(expert as i32);
            }
            prop_assert_eq!(&seen, &expected.m_indices);
            Ok(())
        })?;
    }

    #[test]
    fn a_row_tile_fits_only_if_no_tile_straddles_two_experts(case in routings(), row_tile in 0..300usize) {
        case.with_layout(|layout, _| {
            let fits = row_tile > 0 && case.alignment % row_tile == 0;
            prop_assert_eq!(layout.check_row_tile(row_tile).is_ok(), fits);
            prop_assert_eq!(layout.psum_for_row_tile(row_tile).is_ok(), row_tile == case.alignment);
            Ok(())
        })?;
    }
}

#[test]
fn a_thousand_experts_and_a_thousand_slots_are_laid_out() {
    let (tokens, experts) = (3usize, 1024usize);
    // Token t visits every expert, starting from its own place and running backwards.
    let ids: Vec<i64> =
        (0..tokens).flat_map(|t| (0..experts).map(move |k| ((t * 37 + experts - k) % experts) as i64)).collect();
    let matrix = expertile::MatrixRef::new(&ids, tokens, experts).unwrap();
    let routing = Routing::new(matrix, experts, None).unwrap();
    let plan = Plan::tight(tokens, experts, experts, 128, TokenExperts::Distinct).unwrap();
    assert_eq!(plan.m_sum(), experts * 128);
    let mut space = vec![0; Layout::space_len(&plan).unwrap()];
    let layout = Layout::build(&plan, &routing, &mut space).unwrap();
    same(&layout, &oracle::layout::layout(&ids, None, experts, 128, plan.m_sum())).unwrap();
}
