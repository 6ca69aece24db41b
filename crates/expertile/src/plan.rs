//! How many rows the permuted buffer needs.
//!
//! Each expert's segment is padded to a multiple of the alignment `A`, so `M_sum`, the rows of the buffer, depends on
//! the routing. Three answers are offered: the reference's bound ([`compute_aligned_m_and_alignment`], number for
//! number what vLLM's `deep_gemm_utils` computes), the exact sum from counts ([`expert_num_tokens_round_up_and_sum`])
//! and the tight bound ([`tight_m_sum`]), the exact maximum over all routings. A [`Plan`] is one such answer with what
//! it was computed from: integers, no device, no allocation. All arithmetic is checked.

pub use crate::alignment::round_up;
use crate::alignment::{AlignmentRule, Arch, require_alignment};
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::routing::require_experts;

/// `sum_e round_up(n_e, A)`: the exact `M_sum` of these counts.
///
/// # Errors
/// [`Error::Alignment`] if `alignment` is zero, [`Error::Count`] for a negative count, [`Error::Overflow`].
pub fn expert_num_tokens_round_up_and_sum(expert_num_tokens: &[i32], alignment: usize) -> Result<usize> {
    require_alignment(alignment)?;
    let mut sum = 0usize;
    for (expert, &count) in expert_num_tokens.iter().enumerate() {
        let rows = usize::try_from(count).map_err(|_| Error::Count {
            argument: "expert_num_tokens",
            expert,
            actual: i64::from(count),
            expected: "at least 0".into(),
        })?;
        sum = checked_add("M_sum", sum, round_up(rows, alignment)?)?;
    }
    Ok(sum)
}

/// The reference's `(M_sum, alignment_used)`.
///
/// With counts on the host: their exact sum, the alignment unchanged. Otherwise the GEMM's rule may shrink the
/// alignment (if it picks a smaller tile for `T = M * topk`), and `M_sum = round_up(T + min(T, E) * (A - 1), A)`.
///
/// # Errors
/// [`Error::Alignment`] if `alignment` is zero, [`Error::Value`] if `topk` or `local_experts` is zero,
/// [`Error::Shape`] if the counts are not `[E]`, [`Error::Count`] for a negative one, [`Error::Overflow`].
pub fn compute_aligned_m_and_alignment(
    m: usize,
    topk: usize,
    local_experts: usize,
    alignment: usize,
    rule: Option<(AlignmentRule, Arch)>,
    expert_num_tokens: Option<&[i32]>,
) -> Result<(usize, usize)> {
    require_alignment(alignment)?;
    require_topk(topk)?;
    require_experts(local_experts)?;
    if let Some(counts) = expert_num_tokens {
        if counts.len() != local_experts {
            return Err(Error::shape("expert_num_tokens", &[counts.len()], format!("[{local_experts}]")));
        }
        return Ok((expert_num_tokens_round_up_and_sum(counts, alignment)?, alignment));
    }
    let slots = checked_mul("M * topk", m, topk)?;
    let alignment = match rule {
        Some((rule, arch)) => alignment.min(rule.theoretical(arch, Some(slots), Some(local_experts))?),
        None => alignment,
    };
    let padding = checked_mul("min(T, E) * (A - 1)", slots.min(local_experts), alignment - 1)?;
    let m_sum = round_up(checked_add("T + min(T, E) * (A - 1)", slots, padding)?, alignment)?;
    Ok((m_sum, alignment))
}

/// The first value of [`compute_aligned_m_and_alignment`].
///
/// # Errors
/// The same.
pub fn compute_aligned_m(
    m: usize,
    topk: usize,
    local_experts: usize,
    alignment: usize,
    rule: Option<(AlignmentRule, Arch)>,
    expert_num_tokens: Option<&[i32]>,
) -> Result<usize> {
    Ok(compute_aligned_m_and_alignment(m, topk, local_experts, alignment, rule, expert_num_tokens)?.0)
}

/// Whether the ids of one token are known to differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenExperts {
    /// A token goes to an expert at most once, as every router's top-k does.
    Distinct,
    /// A token may name an expert several times.
    MayRepeat,
}

/// The largest `M_sum` that any routing can need: never above the reference's bound, and reached by some routing.
///
/// With distinct experts per token, let `T' = M * min(topk, E)` and `k = min(T', E)`. Putting one row on each of `k`
/// experts opens `k` tiles; every further `A` rows open at most one more, and an expert holds at most `M` rows, that is
/// `ceil(M / A)` tiles. Hence `A * (k + min((T' - k) / A, k * (ceil(M / A) - 1)))`. If experts may repeat, the second
/// limit does not hold and `T' = M * topk`.
///
/// # Errors
/// [`Error::Alignment`] if `alignment` is zero, [`Error::Value`] if `topk` or `local_experts` is zero,
/// [`Error::Overflow`].
pub fn tight_m_sum(
    m: usize,
    topk: usize,
    local_experts: usize,
    alignment: usize,
    experts: TokenExperts,
) -> Result<usize> {
    require_alignment(alignment)?;
    require_topk(topk)?;
    require_experts(local_experts)?;
    let slots_per_token = match experts {
        TokenExperts::Distinct => topk.min(local_experts),
        TokenExperts::MayRepeat => topk,
    };
    let slots = checked_mul("M * topk", m, slots_per_token)?;
    if slots == 0 {
        return Ok(0);
    }
    let active = slots.min(local_experts);
    let mut more = (slots - active) / alignment;
    if experts == TokenExperts::Distinct {
        more = more.min(checked_mul("E * tiles per expert", active, m.div_ceil(alignment) - 1)?);
    }
    checked_mul("M_sum", alignment, checked_add("tiles", active, more)?)
}

fn require_topk(topk: usize) -> Result<()> {
    if topk == 0 {
        return Err(Error::value("topk", 0, "at least 1"));
    }
    Ok(())
}

/// A sized layout: how many tokens, slots, experts, which alignment, how many rows. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Plan {
    tokens: usize,
    topk: usize,
    local_experts: usize,
    alignment: usize,
    m_sum: usize,
}

impl Plan {
    /// A plan over a buffer of the caller's own size.
    ///
    /// # Errors
    /// [`Error::Alignment`] or [`Error::Value`] for a zero, [`Error::Value`] if `m_sum` is no multiple of `alignment`,
    /// [`Error::Overflow`] if `m_sum` or `tokens * topk` exceeds i32 (row numbers are i32).
    pub fn with_m_sum(
        tokens: usize,
        topk: usize,
        local_experts: usize,
        alignment: usize,
        m_sum: usize,
    ) -> Result<Self> {
        require_alignment(alignment)?;
        require_topk(topk)?;
        require_experts(local_experts)?;
        let slots = checked_mul("M * topk", tokens, topk)?;
        for (what, rows) in [("M * topk", slots), ("M_sum", m_sum)] {
            if i32::try_from(rows).is_err() {
                return Err(Error::Overflow { what, detail: format!("{rows} > {}", i32::MAX) });
            }
        }
        if !m_sum.is_multiple_of(alignment) {
            return Err(Error::value("m_sum", m_sum, format!("a multiple of the alignment {alignment}")));
        }
        Ok(Self { tokens, topk, local_experts, alignment, m_sum })
    }

    /// Sized by [`tight_m_sum`].
    ///
    /// # Errors
    /// As [`tight_m_sum`] and [`Plan::with_m_sum`].
    pub fn tight(
        tokens: usize,
        topk: usize,
        local_experts: usize,
        alignment: usize,
        experts: TokenExperts,
    ) -> Result<Self> {
        let m_sum = tight_m_sum(tokens, topk, local_experts, alignment, experts)?;
        Self::with_m_sum(tokens, topk, local_experts, alignment, m_sum)
    }

    /// Sized by [`compute_aligned_m_and_alignment`]; the plan's alignment is the one that it returned.
    ///
    /// # Errors
    /// As [`compute_aligned_m_and_alignment`] and [`Plan::with_m_sum`].
    pub fn reference(
        tokens: usize,
        topk: usize,
        local_experts: usize,
        alignment: usize,
        rule: Option<(AlignmentRule, Arch)>,
    ) -> Result<Self> {
        let (m_sum, alignment) = compute_aligned_m_and_alignment(tokens, topk, local_experts, alignment, rule, None)?;
        Self::with_m_sum(tokens, topk, local_experts, alignment, m_sum)
    }

    /// Sized by [`expert_num_tokens_round_up_and_sum`]; the number of experts is the number of counts.
    ///
    /// # Errors
    /// As [`expert_num_tokens_round_up_and_sum`] and [`Plan::with_m_sum`].
    pub fn exact(tokens: usize, topk: usize, expert_num_tokens: &[i32], alignment: usize) -> Result<Self> {
        let m_sum = expert_num_tokens_round_up_and_sum(expert_num_tokens, alignment)?;
        Self::with_m_sum(tokens, topk, expert_num_tokens.len(), alignment, m_sum)
    }

    /// `M`.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Slots per token.
    #[must_use]
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// `E`.
    #[must_use]
    pub fn local_experts(&self) -> usize {
        self.local_experts
    }

    /// `A`.
    #[must_use]
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Rows of the permuted buffer.
    #[must_use]
    pub fn m_sum(&self) -> usize {
        self.m_sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contracts_example_holds() {
        assert_eq!(compute_aligned_m(128, 8, 128, 128, None, None).unwrap(), 17280);
        assert_eq!(tight_m_sum(128, 8, 128, 128, TokenExperts::Distinct).unwrap(), 16384);
    }

    #[test]
    fn rules_agree_with_their_table() {
        use AlignmentRule::{DeepGemm28, DeepGemm202606, VllmFork};
        let pick = |rule: AlignmentRule, arch, m, groups| rule.theoretical(arch, m, groups).unwrap();
        for rule in AlignmentRule::ALL {
            assert_eq!(pick(rule, Arch::Sm90, Some(5), Some(3)), 128);
        }
        for (m, tile) in
            [(None, 224), (Some(0), 32), (Some(32), 32), (Some(33), 64), (Some(193), 224), (Some(999), 224)]
        {
            assert_eq!(pick(DeepGemm202606, Arch::Sm100, m, None), tile, "{m:?}");
        }
        for (m, tile) in
            [(None, 240), (Some(1), 32), (Some(33), 48), (Some(224), 224), (Some(225), 240), (Some(999), 240)]
        {
            assert_eq!(pick(VllmFork, Arch::Sm100, m, None), tile, "{m:?}");
        }
        for (m, groups, tile) in [
            (None, None, 64),
            (Some(64), None, 64),
            (Some(65), None, 128),
            (Some(512), Some(8), 64),
            (Some(513), Some(8), 128),
        ] {
            assert_eq!(pick(VllmFork, Arch::Sm120, m, groups), tile, "{m:?} {groups:?}");
        }
        assert_eq!(pick(DeepGemm28, Arch::Sm100, Some(1), None), 256);
        assert_eq!(pick(DeepGemm202606, Arch::Sm120, Some(1), Some(1)), 128);
    }

    #[test]
    fn a_rule_only_ever_shrinks_the_alignment() {
        let rule = Some((AlignmentRule::DeepGemm202606, Arch::Sm100));
        assert_eq!(compute_aligned_m_and_alignment(4, 8, 16, 128, rule, None).unwrap(), (544, 32));
        let rule = Some((AlignmentRule::DeepGemm28, Arch::Sm100));
        assert_eq!(compute_aligned_m_and_alignment(4, 8, 16, 128, rule, None).unwrap(), (2176, 128));
    }

    #[test]
    fn counts_override_the_rule() {
        let rule = Some((AlignmentRule::DeepGemm202606, Arch::Sm100));
        let counts = [0, 1, 64, 65];
        assert_eq!(compute_aligned_m_and_alignment(9, 8, 4, 64, rule, Some(&counts)).unwrap(), (256, 64));
    }

    #[test]
    fn impossible_requests_are_errors() {
        let named = |result: Result<usize>, start: &str| {
            let message = result.unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        };
        named(compute_aligned_m(1, 1, 1, 0, None, None), "alignment is 0");
        named(compute_aligned_m(1, 0, 1, 1, None, None), "topk is 0");
        named(compute_aligned_m(1, 1, 0, 1, None, None), "local_experts is 0");
        named(compute_aligned_m(usize::MAX, 2, 1, 1, None, None), "M * topk overflows");
        named(compute_aligned_m(1 << 63, 1, 3, 1 << 62, None, None), "T + min(T, E) * (A - 1) overflows");
        named(compute_aligned_m(1, 1, 2, 8, None, Some(&[1])), "expert_num_tokens has shape [1]");
        named(expert_num_tokens_round_up_and_sum(&[3, -1], 8), "expert_num_tokens[1] is -1");
        named(tight_m_sum(usize::MAX, 2, 2, 1, TokenExperts::Distinct), "M * topk overflows");
        named(AlignmentRule::VllmFork.theoretical(Arch::Sm120, None, Some(0)), "num_groups is 0");
        named("sm80".parse::<Arch>().map(|_| 0), "arch is \"sm80\"");
        named("deepgemm".parse::<AlignmentRule>().map(|_| 0), "rule is \"deepgemm\"");
        named(Plan::with_m_sum(1, 1, 1, 8, 12).map(|plan| plan.m_sum()), "m_sum is 12");
        named(Plan::with_m_sum(1, 1, 1, 1, 1 << 31).map(|plan| plan.m_sum()), "M_sum overflows");
    }
}
