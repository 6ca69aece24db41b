//! The contract, property by property: every step against the slow oracle, on random and on hostile inputs.
//!
//! Cases come from a fixed seed, so that a run today and a run tomorrow test the same thing; `PROPTEST_RNG_SEED=<u64>`
//! picks other cases and `PROPTEST_CASES=<n>` more of them.
#![cfg(not(miri))]

mod activation;
mod backend;
mod cases;
mod errors;
mod expert_parallel;
mod extremes;
mod gemm;
mod int4;
mod layer;
mod layout;
mod mxfp4;
mod permute;
mod plan;
mod quantize;
mod routing;
#[path = "../routings/mod.rs"]
mod routings;
mod unpermute;
mod weights;
