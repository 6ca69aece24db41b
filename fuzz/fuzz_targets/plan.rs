//! Sizes and layouts over any integers: no panic, an error or the oracle's numbers.
#![no_main]

use arbitrary::Arbitrary;
use expertile::plan::{compute_aligned_m_and_alignment, round_up, tight_m_sum};
use expertile::{AlignmentRule, Arch, Error, Layout, MatrixRef, Plan, Routing, TokenExperts};
use expertile_oracle as oracle;
use libfuzzer_sys::fuzz_target;

/// Layouts above this many `i32` are not built: the fuzzer has memory for other things.
const MOST_SPACE: usize = 1 << 16;

#[derive(Arbitrary, Debug)]
enum Input {
    Sizes { m: usize, topk: usize, experts: usize, alignment: usize, rule: u8, arch: u8 },
    Counts { counts: Vec<i32>, alignment: usize },
    Ids { topk: u8, experts: u16, alignment: u16, extra: u8, ids: Vec<i64>, map: Option<Vec<i32>> },
    SmallIds { topk: u8, experts: u8, alignment: u8, ids: Vec<i8>, map: Option<Vec<i8>> },
    Psum { psum: Vec<i32>, alignment: usize, m_sum: usize },
    SmallPsum { psum: Vec<u8>, alignment: u8, tiles: u8 },
}

fuzz_target!(|input: Input| match input {
    Input::Sizes { m, topk, experts, alignment, rule, arch } => sizes(m, topk, experts, alignment, rule, arch),
    Input::Counts { counts, alignment } => exact(&counts, alignment),
    Input::Ids { topk, experts, alignment, extra, ids, map } => {
        layout(usize::from(topk), usize::from(experts), usize::from(alignment), usize::from(extra), &ids, map);
    }
    Input::SmallIds { topk, experts, alignment, ids, map } => {
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        let map = map.map(|map| map.into_iter().map(i32::from).collect());
        layout(usize::from(topk % 9), usize::from(experts), usize::from(alignment), 0, &ids, map);
    }
    Input::Psum { psum, alignment, m_sum } => ready(&psum, alignment, m_sum),
    Input::SmallPsum { psum, alignment, tiles } => {
        // Steps rather than places, so that most of them run forwards.
        let mut end = 0;
        let psum: Vec<i32> = psum
            .into_iter()
            .map(|step| {
                end += i32::from(step);
                end
            })
            .collect();
        ready(&psum, usize::from(alignment), usize::from(tiles) * usize::from(alignment));
    }
});

fn sizes(m: usize, topk: usize, experts: usize, alignment: usize, rule: u8, arch: u8) {
    const RULES: [(AlignmentRule, oracle::plan::Rule); 3] = [
        (AlignmentRule::DeepGemm202606, oracle::plan::Rule::DeepGemm202606),
        (AlignmentRule::VllmFork, oracle::plan::Rule::VllmFork),
        (AlignmentRule::DeepGemm28, oracle::plan::Rule::DeepGemm28),
    ];
    const ARCHS: [(Arch, u32); 3] = [(Arch::Sm90, 90), (Arch::Sm100, 100), (Arch::Sm120, 120)];
    let (rule, arch) = (RULES.get(usize::from(rule)), ARCHS[usize::from(arch) % 3]);
    let ours = rule.map(|(rule, _)| (*rule, arch.0));
    let theirs = rule.map(|(_, rule)| (*rule, arch.1));
    let answer = compute_aligned_m_and_alignment(m, topk, experts, alignment, ours, None);
    let tight = tight_m_sum(m, topk, experts, alignment, TokenExperts::Distinct);
    let repeated = tight_m_sum(m, topk, experts, alignment, TokenExperts::MayRepeat);
    let possible = topk > 0 && experts > 0 && experts <= i32::MAX as usize && alignment > 0;
    if !possible {
        assert!(answer.is_err() && tight.is_err() && repeated.is_err());
        return;
    }
    // u128 holds M * topk; beyond 2^100 the rest of the formula is an overflow for sure.
    if (m as u128 * topk as u128) >> 100 != 0 {
        assert!(matches!(answer, Err(Error::Overflow { .. })));
        return;
    }
    let (m_sum, used) = oracle::plan::reference_m_sum(m, topk, experts, alignment, theirs);
    match answer {
        Ok(answer) => assert_eq!((answer.0 as u128, answer.1 as u128), (m_sum, used)),
        Err(error) => assert!(matches!(error, Error::Overflow { .. }) && m_sum > usize::MAX as u128, "{error}"),
    }
    if ours.is_none()
        && let (Ok(tight), Ok(repeated)) = (&tight, &repeated)
    {
        assert!(tight <= repeated && *repeated as u128 <= m_sum, "{tight} {repeated} {m_sum}");
        assert_eq!(tight % alignment, 0);
    }
    match round_up(m, alignment) {
        Ok(rows) => assert_eq!(rows as u128, oracle::plan::round_up(m as u128, alignment as u128)),
        Err(error) => assert!(matches!(error, Error::Overflow { .. }), "{error}"),
    }
    let _ = Plan::with_m_sum(m, topk, experts, alignment, m_sum as usize);
}

fn exact(counts: &[i32], alignment: usize) {
    let Ok(plan) = Plan::exact(1, 1, counts, alignment) else { return };
    assert!(counts.iter().all(|&count| count >= 0));
    assert_eq!(plan.m_sum(), oracle::plan::exact_m_sum(counts, alignment));
}

fn layout(topk: usize, experts: usize, alignment: usize, extra: usize, ids: &[i64], map: Option<Vec<i32>>) {
    let tokens = ids.len() / topk.max(1);
    let ids = &ids[..tokens * topk];
    let matrix = MatrixRef::new(ids, tokens, topk).expect("the ids of whole tokens");
    let Ok(routing) = Routing::new(matrix, experts, map.as_deref()) else { return };
    let mut counts = vec![0; experts];
    routing.count_expert_num_tokens(&mut counts).expect("few slots");
    if alignment == 0 {
        return;
    }
    let needed = oracle::plan::exact_m_sum(&counts, alignment);
    let tight = Plan::tight(tokens, topk, experts, alignment, TokenExperts::MayRepeat).expect("small numbers");
    assert!(tight.m_sum() >= needed);
    let plan = Plan::with_m_sum(tokens, topk, experts, alignment, needed + extra * alignment).expect("small numbers");
    let len = Layout::space_len(&plan).expect("small numbers");
    if len > MOST_SPACE {
        return;
    }
    let mut space = vec![0x7777; len];
    let built = Layout::build(&plan, &routing, &mut space).expect("a plan that is large enough");
    let expected = oracle::layout::layout(ids, map.as_deref(), experts, alignment, plan.m_sum());
    assert_eq!(built.expert_num_tokens(), expected.expert_num_tokens);
    assert_eq!(built.expert_start(), expected.expert_start);
    assert_eq!(built.psum(), expected.psum);
    assert_eq!(built.m_indices(), expected.m_indices);
    assert_eq!(built.inv_perm(), expected.inv_perm);
    if needed > 0 {
        let short = Plan::with_m_sum(tokens, topk, experts, alignment, needed - alignment).expect("small numbers");
        let error = Layout::build(&short, &routing, &mut vec![0; len]).unwrap_err();
        assert_eq!(error, Error::MSum { m_sum: needed - alignment, needed, alignment });
    }
    ready(&expected.psum, alignment, plan.m_sum());
}

fn ready(psum: &[i32], alignment: usize, m_sum: usize) {
    let Some(len) = psum.len().checked_mul(3).and_then(|lists| lists.checked_add(m_sum)) else { return };
    if len > MOST_SPACE {
        // Without space it can only refuse.
        assert!(Layout::from_psum(psum, alignment, m_sum, &mut []).is_err());
        return;
    }
    let mut space = vec![0x7777; len];
    let Ok(layout) = Layout::from_psum(psum, alignment, m_sum, &mut space) else { return };
    let mut rows = 0;
    for expert in 0..psum.len() {
        let range = layout.expert_rows(expert);
        assert!(range.start % alignment == 0 && range.start <= range.end && range.end <= m_sum);
        assert!(layout.m_indices()[range.clone()].iter().all(|&owner| owner == expert as i32));
        rows += range.len();
    }
    assert_eq!(layout.live_rows(), rows);
    assert_eq!(layout.m_indices().iter().filter(|&&owner| owner >= 0).count(), rows);
}
