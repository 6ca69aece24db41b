//! What can be wrong with an argument: one enum for the whole library.
//!
//! Every variant names the argument, its value and what was expected, and is returned before anything is written.

use crate::dtype::Dtype;

/// Shorthand for a result of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything this library refuses.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A matrix or list whose shape does not fit the others.
    #[error("{argument} has shape {actual:?}, expected {expected}")]
    Shape {
        /// The argument's name.
        argument: &'static str,
        /// The shape it came with.
        actual: Vec<usize>,
        /// The shape that would fit, in words or numbers.
        expected: String,
    },
    /// Strides that leave the slice they index, or that an operation cannot honour.
    #[error("{argument} has strides {actual:?}, expected {expected}")]
    Stride {
        /// The argument's name.
        argument: &'static str,
        /// The strides it came with, in elements.
        actual: Vec<usize>,
        /// The strides that would fit.
        expected: String,
    },
    /// An element type that the operation does not take.
    #[error("{argument} has dtype {actual}, expected {expected}")]
    Dtype {
        /// The argument's name.
        argument: &'static str,
        /// The element type it came with.
        actual: Dtype,
        /// The element types that would fit.
        expected: &'static str,
    },
    /// A device, or a part of one, that is not there.
    #[error("{argument} is {actual}, expected {expected}")]
    Device {
        /// The argument's name.
        argument: &'static str,
        /// What was asked for.
        actual: String,
        /// What this machine offers.
        expected: String,
    },
    /// A number outside its range: `topk` or the number of experts zero, a group that does not divide `H`, and the
    /// like.
    #[error("{argument} is {actual}, expected {expected}")]
    Value {
        /// The argument's name.
        argument: &'static str,
        /// Its value.
        actual: i128,
        /// The range that would fit.
        expected: String,
    },
    /// A parameter that must be a number of some kind, and is not.
    #[error("{argument} is {actual}, expected {expected}")]
    Parameter {
        /// The argument's name.
        argument: &'static str,
        /// Its value.
        actual: f32,
        /// The numbers that would fit.
        expected: &'static str,
    },
    /// An alignment of zero, or one that a GEMM's row tile does not divide.
    #[error("alignment is {actual}, expected {expected}")]
    Alignment {
        /// The alignment asked for, or the one a layout carries.
        actual: usize,
        /// The alignments that would fit.
        expected: String,
    },
    /// A name that is not one of the known ones.
    #[error("{argument} is \"{actual}\", expected one of {expected}")]
    Name {
        /// The argument's name.
        argument: &'static str,
        /// The name given.
        actual: String,
        /// The known names, separated by commas.
        expected: &'static str,
    },
    /// A token's expert id that no expert (or no entry of the expert map) stands for.
    #[error("topk_ids[{token}, {slot}] is {id}, expected an id below {limit} (or a negative one for an empty slot)")]
    ExpertId {
        /// The token's row in `topk_ids`.
        token: usize,
        /// The slot's column in `topk_ids`.
        slot: usize,
        /// The id found there.
        id: i64,
        /// The number of ids there are: local experts, or the length of the expert map.
        limit: usize,
    },
    /// An entry of the expert map that is not a local expert.
    #[error("expert_map[{index}] is {value}, expected a local expert below {local_experts} (or a negative value)")]
    MapEntry {
        /// The global expert id.
        index: usize,
        /// What the map says it is.
        value: i32,
        /// The number of local experts.
        local_experts: usize,
    },
    /// A row's expert that is not a local one.
    #[error(
        "m_indices[{row}] is {id}, expected a local expert below {local_experts} (or a negative value for padding)"
    )]
    RowExpert {
        /// The row.
        row: usize,
        /// The id found there.
        id: i32,
        /// The number of local experts.
        local_experts: usize,
    },
    /// A slot's row that the permuted buffer does not have.
    #[error("inv_perm[{token}, {slot}] is {row}, expected a row below {rows} (or a negative one for an empty slot)")]
    SlotRow {
        /// The token's row in `inv_perm`.
        token: usize,
        /// The slot's column in `inv_perm`.
        slot: usize,
        /// The row found there.
        row: i32,
        /// Rows of the permuted buffer.
        rows: usize,
    },
    /// A count or an offset of one expert that is negative, or out of order.
    #[error("{argument}[{expert}] is {actual}, expected {expected}")]
    Count {
        /// The argument's name.
        argument: &'static str,
        /// The local expert.
        expert: usize,
        /// The value found there.
        actual: i64,
        /// The values that would fit.
        expected: String,
    },
    /// More rows than the permuted buffer has.
    #[error("m_sum is {m_sum}, expected at least {needed} for these counts at alignment {alignment}")]
    MSum {
        /// Rows of the buffer.
        m_sum: usize,
        /// Rows the counts need.
        needed: usize,
        /// The alignment that was used.
        alignment: usize,
    },
    /// A product or a sum that does not fit its integer.
    #[error("{what} overflows: {detail}")]
    Overflow {
        /// What was being computed.
        what: &'static str,
        /// The numbers it was computed from.
        detail: String,
    },
    /// A slice with fewer elements than the operation reads or writes.
    #[error("{argument} holds {actual} elements, expected at least {needed}")]
    BufferTooSmall {
        /// The argument's name.
        argument: &'static str,
        /// Elements it holds.
        actual: usize,
        /// Elements that are needed.
        needed: usize,
    },
    /// Memory that cannot be had.
    #[error("{what} takes {bytes} bytes, expected no more than memory can be had for")]
    Memory {
        /// What takes it.
        what: &'static str,
        /// Bytes that it takes.
        bytes: usize,
    },
    /// Prepacked weights of a format that the operation does not take.
    #[error("{argument} is packed as {actual}, expected {expected}")]
    WeightFormat {
        /// The argument's name.
        argument: &'static str,
        /// The format the packed value carries.
        actual: &'static str,
        /// The formats that would fit.
        expected: &'static str,
    },
    /// What one backend does and this one does not.
    #[error("{argument} is {actual}, which the {backend} backend does not take; expected {expected}")]
    Unsupported {
        /// The argument's name.
        argument: &'static str,
        /// What it is.
        actual: &'static str,
        /// The backend.
        backend: &'static str,
        /// What the backend takes instead.
        expected: &'static str,
    },
    /// Experts that are not where a placement needs them.
    #[error("placement has {actual}, expected {expected}")]
    Placement {
        /// What it has.
        actual: String,
        /// What would fit.
        expected: String,
    },
    /// What another rank, or this one, was called with: every rank returns it, so that none waits for an answer.
    #[error("on rank {rank}: {message}")]
    OnRank {
        /// The lowest rank whose call was refused.
        rank: usize,
        /// Its error, in words.
        message: String,
    },
    /// Ranks that do not agree on what they compute together.
    #[error("{argument} is {actual} on rank {rank}, expected {expected}, as on rank 0")]
    Disagreement {
        /// What they do not agree on.
        argument: &'static str,
        /// The lowest rank that differs from rank 0.
        rank: usize,
        /// What it has.
        actual: String,
        /// What rank 0 has.
        expected: String,
    },
    /// A message between ranks that is not what the receiver waits for.
    #[error("rank {rank} sent {actual} bytes, expected {expected}: ranks have not made the same calls")]
    Message {
        /// The rank that sent it.
        rank: usize,
        /// Its bytes, as far as they are known.
        actual: usize,
        /// The bytes that this rank waits for.
        expected: usize,
    },
    /// A rank that never came, died, or left.
    #[error("rank {rank} was waited for {waited:.1?} and is absent, expected every rank in every call")]
    Absent {
        /// The rank that was waited for.
        rank: usize,
        /// How long.
        waited: std::time::Duration,
    },
    /// A call into an MPI library that failed.
    #[error("{call} failed with {code}: {message}")]
    Mpi {
        /// MPI's function.
        call: &'static str,
        /// Its result.
        code: i32,
        /// What the library says about it.
        message: String,
    },
    /// A call into NCCL that failed.
    #[error("{call} failed with {code}: {message}")]
    Nccl {
        /// NCCL's function.
        call: &'static str,
        /// Its result.
        code: i32,
        /// What the library says about it.
        message: String,
    },
    /// A call into the CUDA driver that failed. After some of these (an illegal address, say) the context is lost.
    #[error("{call} failed with {name} ({code}): {message}")]
    Cuda {
        /// The driver's function.
        call: &'static str,
        /// Its result.
        code: u32,
        /// The result's name.
        name: String,
        /// What the driver says about it.
        message: String,
    },
    /// A kernel that could not be compiled or must not be used.
    #[error("{kernel} for {arch} cannot be used: {detail}")]
    Kernel {
        /// The source file.
        kernel: &'static str,
        /// The architecture it was compiled for.
        arch: String,
        /// What is wrong: the compiler's log, or the resource that it may not use.
        detail: String,
    },
}

impl Error {
    pub(crate) fn shape(argument: &'static str, actual: &[usize], expected: impl Into<String>) -> Self {
        Self::Shape { argument, actual: actual.to_vec(), expected: expected.into() }
    }

    pub(crate) fn placement(actual: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Placement { actual: actual.into(), expected: expected.into() }
    }

    pub(crate) fn value(argument: &'static str, actual: usize, expected: impl Into<String>) -> Self {
        Self::Value { argument, actual: actual as i128, expected: expected.into() }
    }
}

/// Fails unless a slice of `actual` elements is exactly a tensor of that shape.
pub(crate) fn require_exact(argument: &'static str, actual: usize, shape: &[usize]) -> Result<()> {
    let needed = shape.iter().try_fold(1usize, |all, &extent| all.checked_mul(extent));
    let needed = needed.ok_or_else(|| Error::Overflow { what: argument, detail: format!("elements of {shape:?}") })?;
    if actual != needed {
        let expected = format!("[{needed}], the elements of {shape:?}");
        return Err(Error::shape(argument, &[actual], expected));
    }
    Ok(())
}

/// Fails unless `actual >= needed`.
pub(crate) fn require_len(argument: &'static str, actual: usize, needed: usize) -> Result<()> {
    if actual < needed {
        return Err(Error::BufferTooSmall { argument, actual, needed });
    }
    Ok(())
}

/// `a * b` as a `usize`, or [`Error::Overflow`] naming what was computed.
pub(crate) fn checked_mul(what: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::Overflow { what, detail: format!("{a} * {b}") })
}

/// `a + b` as a `usize`, or [`Error::Overflow`] naming what was computed.
pub(crate) fn checked_add(what: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_add(b).ok_or_else(|| Error::Overflow { what, detail: format!("{a} + {b}") })
}
