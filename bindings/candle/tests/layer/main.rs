//! The layer on CPU tensors: its numbers against candle's own operators, and what it refuses.

mod loading;
mod numbers;
mod refusals;
#[path = "../support/mod.rs"]
mod support;
