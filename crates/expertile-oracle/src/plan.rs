//! How many rows the permuted buffer needs: restated sizing formulas, and the answer by trying every routing.

use std::collections::BTreeSet;

/// The smallest multiple of `alignment` that is at least `rows`.
///
/// # Panics
/// If `alignment` is zero.
#[must_use]
pub fn round_up(rows: u128, alignment: u128) -> u128 {
    let remainder = rows % alignment;
    if remainder == 0 { rows } else { rows - remainder + alignment }
}

/// `M_sum = sum_e round_up(n_e, A)`.
#[must_use]
pub fn exact_m_sum(expert_num_tokens: &[i32], alignment: usize) -> usize {
    let mut rows = 0;
    for &count in expert_num_tokens {
        rows += round_up(count as u128, alignment as u128);
    }
    rows as usize
}

/// Which of the known alignment rules: each is a list of row tiles and a way to choose among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// `deepgemm-2026-06`.
    DeepGemm202606,
    /// `vllm-fork`.
    VllmFork,
    /// `deepgemm-2.8`.
    DeepGemm28,
}

/// `theoretical(arch, expected_m, num_groups)` for `arch` 90, 100 or 120.
///
/// On SM100 the first two rules take the smallest of their tiles that covers `expected_m`, else the largest:
/// 32, 64, ... 224 and 32, 48, ... 240. SM120 of the fork: 64 when `ceil(expected_m / num_groups) <= 64` or without
/// `expected_m`, else 128. 256 on SM100 for `deepgemm-2.8`; 128 everywhere else.
#[must_use]
pub fn theoretical(rule: Rule, arch: u32, expected_m: Option<u128>, num_groups: u128) -> u128 {
    let covering = |tiles: &[u128]| {
        let largest = tiles[tiles.len() - 1];
        let Some(rows) = expected_m else { return largest };
        tiles.iter().copied().find(|&tile| tile >= rows).unwrap_or(largest)
    };
    match (rule, arch) {
        (Rule::DeepGemm202606, 100) => covering(&[32, 64, 96, 128, 160, 192, 224]),
        (Rule::VllmFork, 100) => covering(&[32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240]),
        (Rule::DeepGemm28, 100) => 256,
        (Rule::VllmFork, 120) => match expected_m {
            // ceil(rows / groups) <= 64 says the same as rows <= 64 * groups.
            Some(rows) if rows > 64 * num_groups => 128,
            _ => 64,
        },
        _ => 128,
    }
}

/// The reference's `(M_sum, alignment_used)` without counts: `T = M * topk`, the alignment shrinks to the rule's tile
/// if that is smaller, `M_sum = round_up(T + min(T, E) * (A - 1), A)`.
#[must_use]
pub fn reference_m_sum(
    m: usize,
    topk: usize,
    local_experts: usize,
    alignment: usize,
    rule: Option<(Rule, u32)>,
) -> (u128, u128) {
    let slots = m as u128 * topk as u128;
    let mut alignment = alignment as u128;
    if let Some((rule, arch)) = rule {
        let tile = theoretical(rule, arch, Some(slots), local_experts as u128);
        if 0 < tile && tile <= alignment {
            alignment = tile;
        }
    }
    let most_experts = slots.min(local_experts as u128);
    (round_up(slots + most_experts * (alignment - 1), alignment), alignment)
}

/// The largest `M_sum` over all routings of `m` tokens, found by trying them all. For tiny cases only.
///
/// A token may leave slots empty; with `distinct` it names an expert at most once.
#[must_use]
pub fn largest_m_sum(m: usize, topk: usize, local_experts: usize, alignment: usize, distinct: bool) -> usize {
    let mut reachable = BTreeSet::from([vec![0i32; local_experts]]);
    for _ in 0..m {
        let mut next = BTreeSet::new();
        for counts in &reachable {
            add_token(counts.clone(), 0, topk, distinct, &mut next);
        }
        reachable = next;
    }
    reachable.iter().map(|counts| exact_m_sum(counts, alignment)).max().unwrap_or(0)
}

/// Adds to `next` every way to send one more token to up to `slots` of the experts from `first` on.
fn add_token(counts: Vec<i32>, first: usize, slots: usize, distinct: bool, next: &mut BTreeSet<Vec<i32>>) {
    if slots > 0 {
        for expert in first..counts.len() {
            let mut more = counts.clone();
            more[expert] += 1;
            add_token(more, if distinct { expert + 1 } else { expert }, slots - 1, distinct, next);
        }
    }
    next.insert(counts);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contracts_example_holds() {
        assert_eq!(reference_m_sum(128, 8, 128, 128, None), (17280, 128));
    }

    #[test]
    fn every_routing_of_two_tokens_is_tried() {
        // Two tokens on two of three experts each: at most three experts hold rows, none more than two.
        assert_eq!(largest_m_sum(2, 2, 3, 2, true), 6);
        assert_eq!(largest_m_sum(2, 2, 3, 1, true), 4);
        // Both tokens of one slot each: one row on either of two experts.
        assert_eq!(largest_m_sum(2, 1, 2, 8, true), 16);
        // Repeats: 3 rows on one expert and 1 on the other need two tiles of two and one.
        assert_eq!(largest_m_sum(2, 2, 2, 2, false), 6);
        assert_eq!(largest_m_sum(2, 2, 2, 2, true), 4);
        assert_eq!(largest_m_sum(0, 2, 2, 2, true), 0);
    }
}
