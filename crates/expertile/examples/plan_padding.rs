//! What padding costs: rows that an expert-aligned buffer needs, before and after the routing is known.
//!
//! A grouped GEMM wants every expert's rows to start on a multiple of its row tile. Planning needs no backend and
//! allocates nothing; run this to see why a decode step should not be padded to 128.

use expertile::plan::{compute_aligned_m, tight_m_sum};
use expertile::{MatrixRef, Plan, Routing, TokenExperts};

fn main() -> expertile::Result<()> {
    let (topk, experts) = (8, 128);
    for tokens in [1, 64, 4096] {
        // A routing as routers produce it: distinct experts per token, some of them popular.
        let ids = skewed_ids(tokens, topk, experts);
        let routing = Routing::new(MatrixRef::new(&ids, tokens, topk)?, experts, None)?;
        let mut expert_num_tokens = vec![0; experts];
        routing.count_expert_num_tokens(&mut expert_num_tokens)?;

        println!("{tokens} tokens, {topk} of {experts} experts each: {} live rows", tokens * topk);
        println!("  alignment  reference  tight bound  this routing  of it padding");
        for alignment in [8, 16, 32, 64, 128, 256] {
            // Without counts on the host, a buffer must hold the worst case. The reference bounds it from above, the
            // tight bound is the worst case itself; with counts the sum is exact.
            let reference = compute_aligned_m(tokens, topk, experts, alignment, None, None)?;
            let tight = tight_m_sum(tokens, topk, experts, alignment, TokenExperts::Distinct)?;
            let exact = Plan::exact(tokens, topk, &expert_num_tokens, alignment)?.m_sum();
            let padding = 100.0 * (exact - tokens * topk) as f64 / exact as f64;
            println!("  {alignment:>9}  {reference:>9}  {tight:>11}  {exact:>12}  {padding:>12.1}%");
        }
    }
    Ok(())
}

/// `topk` distinct experts per token, low ids more often.
fn skewed_ids(tokens: usize, topk: usize, experts: usize) -> Vec<i32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    let mut ids = Vec::with_capacity(tokens * topk);
    for token in 0..tokens {
        while ids.len() < (token + 1) * topk {
            let id = (experts as f64 * uniform().powi(2)) as i32;
            if !ids[token * topk..].contains(&id) {
                ids.push(id);
            }
        }
    }
    ids
}
