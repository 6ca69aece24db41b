//! The slow reference that Expertile is judged by.
//!
//! Every function restates one formula of the definitions in nested loops over plain slices, shares no code with what
//! it judges, and depends on nothing but the standard library. It must stay obvious: whoever doubts a fast path reads
//! the same step here. Modules follow a token's path: [`routing`], [`plan`], [`layout`], [`quantize`], [`gemm`],
//! [`activation`], [`unpermute`], [`layer`]; [`compare`] says how far two results are apart.
//!
//! Matrices are row-major slices. Ids are `i64`, numbers come in as `f32` (bf16 and f16 convert to it exactly) and
//! results that are not defined bit by bit leave as `f64`. Shapes are the caller's duty: a wrong one panics.

pub mod activation;
pub mod compare;
pub mod gemm;
pub mod int4;
pub mod layer;
pub mod layout;
pub mod mxfp4;
pub mod plan;
pub mod quantize;
pub mod routing;
pub mod unpermute;
