//! Ids where none are given.

use super::super::Args;
use crate::error::{Error, Result};
use crate::memory;
use crate::preset::{Random, RoutingName, draw_another, zipf_ids};

/// Slots that are drawn: 4096 tokens of each of 512 ranks, with 8 experts each.
const MOST_SLOTS: usize = 1 << 24;

/// Different experts for every token, each with a chance in proportion to its count, or all alike, or as
/// [`RoutingName::Zipf`] says: then they are those that `bench exchange --routing zipf` runs.
pub(super) fn draw(args: &Args, [ranks, tokens, topk]: [usize; 3], experts: usize) -> Result<Vec<i32>> {
    if topk == 0 || topk > experts {
        return Err(Error::usage(format!("--topk is {topk}, expected 1 to {experts}, the experts")));
    }
    let slots = ranks.checked_mul(tokens).and_then(|all| all.checked_mul(topk)).filter(|&all| all <= MOST_SLOTS);
    let slots = slots.ok_or_else(|| {
        Error::usage(format!("{ranks} ranks * {tokens} tokens * {topk} experts, expected at most {MOST_SLOTS} slots"))
    })?;
    memory::require("the ids", 4 * slots as u128)?;
    let seed = args.ranks.seed.unwrap_or(1);
    if args.ranks.routing == Some(RoutingName::Zipf) {
        return Ok(zipf_ids(seed, [ranks * tokens, topk], experts));
    }
    let mut ends = Vec::with_capacity(experts);
    let mut sum = 0u64;
    for expert in 0..experts {
        let count = args.counts.as_ref().map_or(1, |counts| counts[expert]);
        sum += u64::try_from(count)
            .map_err(|_| Error::usage(format!("--counts holds {count} for expert {expert}, expected at least 0")))?;
        ends.push(sum);
    }
    let mut random = Random::new(seed, [0x1d5, 0, 0]);
    let mut ids = Vec::with_capacity(slots);
    for _ in 0..ranks * tokens {
        let first = ids.len();
        for _ in 0..topk {
            let chosen = draw_another(&mut random, &ends, &ids[first..]);
            ids.push(chosen);
        }
    }
    Ok(ids)
}
