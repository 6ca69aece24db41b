//! What the tests and benchmarks of Expertile make up: random numbers, routings, rows, weights, and the poison that
//! shows what was written.
//!
//! Everything is drawn from a [`Random`] with a fixed seed, so a failure that prints its seed can be run again. The
//! types are plain, and what rounds a number to another type comes from the caller: this crate imports nothing, so the
//! library's unit tests, its integration tests and the programs outside the workspace all use it. It must never judge
//! a result: that is the oracle's.

mod poison;
mod random;
mod routing;
mod rows;
mod weights;

pub use poison::{GUARD, NAN_POISON, POISON, assert_same, assert_untouched};
pub use random::Random;
pub use routing::{Pattern, expert_map};
pub use rows::{Fill, numbers, unit_rows};
pub use weights::{block_scaled_weights, unit_weights};
