//! Files as they are found, and as they should never be.

mod checkpoints;
mod int4;
mod made_up;
mod mxfp4;
mod tokens;
