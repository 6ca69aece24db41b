//! The tensors that go into a layer and come out of it, as safetensors files.
//!
//! In: `hidden_states [M, H]` in bf16, f16 or f32, and, if the router's choice is already known, `topk_ids [M, topk]`
//! (i32 or i64) with `topk_weights [M, topk]` (f32); `input_ids [M]` (i32 or i64), the tokens' numbers in the vocabulary,
//! where those choose experts. Out: `output [M, H]` bf16, `topk_ids` i32, `topk_weights` f32.

use crate::error::{Error, Result};
use crate::ids::{Ids, MOST_ROWS, TOPK_IDS};
use crate::read;
use crate::tensors::{Header, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::Path;

const HIDDEN_STATES: &str = "hidden_states";
const TOPK_WEIGHTS: &str = "topk_weights";
const INPUT_IDS: &str = "input_ids";
const OUTPUT: &str = "output";

/// The tokens that a layer gets.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInput {
    hidden_states: HiddenStates,
    tokens: usize,
    hidden: usize,
    routing: Option<(Ids, Vec<f32>)>,
    input_ids: Option<Vec<i64>>,
}

/// `hidden_states [M, H]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum HiddenStates {
    /// bf16.
    Bf16(Vec<bf16>),
    /// f16.
    F16(Vec<f16>),
    /// f32.
    F32(Vec<f32>),
}

impl LayerInput {
    /// Hidden states `[M, hidden]` for the router to place.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `hidden` is positive and divides the number of values.
    pub fn from_hidden_states(hidden_states: HiddenStates, hidden: usize) -> Result<Self> {
        let values = hidden_states.len();
        match values.checked_div(hidden) {
            Some(tokens) if tokens * hidden == values => {
                Ok(Self { hidden_states, tokens, hidden, routing: None, input_ids: None })
            }
            _ => Err(Error::shape(
                Path::new("input"),
                HIDDEN_STATES,
                &[values],
                format!("a multiple of {hidden} values"),
            )),
        }
    }

    /// Reads a regular file, or a pipe that is open already (`/dev/stdin`, a shell's `<(command)`).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for another kind of file, [`Error::Memory`], and as [`LayerInput::from_bytes`].
    pub fn open(file: &Path) -> Result<Self> {
        let bytes = read::read_argument(file, |start| Header::needed_bytes(file, start))?;
        Self::from_bytes(file, &bytes)
    }

    /// Reads the bytes of a whole file; `file` is its name in messages.
    ///
    /// # Errors
    /// [`Error::Format`] or [`Error::Json`] for a header that cannot be, [`Error::MissingTensor`] for `hidden_states`,
    /// or for ids without weights or weights without ids, [`Error::Dtype`], [`Error::Shape`].
    pub fn from_bytes(file: &Path, bytes: &[u8]) -> Result<Self> {
        let header = Header::parse(file, bytes)?;
        let find = |name: &'static str| header.tensor(bytes, name);
        let missing = |tensor: &str, expected: &str| Error::MissingTensor {
            file: header.file().to_owned(),
            tensor: tensor.into(),
            expected: expected.into(),
        };
        let states = find(HIDDEN_STATES).ok_or_else(|| missing(HIDDEN_STATES, "BF16, F16 or F32 [M, H]"))?;
        let &[tokens, hidden] = states.shape else {
            return Err(Error::shape(file, HIDDEN_STATES, states.shape, "[M, H]"));
        };
        // Without values, the file's length says nothing about the other dimension.
        if tokens > MOST_ROWS || hidden > MOST_ROWS {
            let expected = format!("[M, H] with both at most {MOST_ROWS}");
            return Err(Error::shape(file, HIDDEN_STATES, states.shape, expected));
        }
        let routing = match (find(TOPK_IDS), find(TOPK_WEIGHTS)) {
            (None, None) => None,
            (Some(ids), Some(weights)) => Some(read_routing(tokens, &ids, &weights)?),
            (None, Some(_)) => return Err(missing(TOPK_IDS, "I32 or I64 [M, topk], as there are topk_weights")),
            (Some(_), None) => return Err(missing(TOPK_WEIGHTS, "F32 [M, topk], as there are topk_ids")),
        };
        let input_ids = find(INPUT_IDS).map(|ids| read_input_ids(tokens, &ids)).transpose()?;
        Ok(Self { hidden_states: HiddenStates::read(&states)?, tokens, hidden, routing, input_ids })
    }

    /// The hidden states, `[M, H]`.
    #[must_use]
    pub fn hidden_states(&self) -> &HiddenStates {
        &self.hidden_states
    }

    /// `M`.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// `H`.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// `topk_ids` and `topk_weights [M, topk]`, if the file holds them.
    #[must_use]
    pub fn routing(&self) -> Option<(&Ids, &[f32])> {
        self.routing.as_ref().map(|(ids, weights)| (ids, &weights[..]))
    }

    /// The tokens' numbers in the vocabulary `[M]`, if the file holds them.
    #[must_use]
    pub fn input_ids(&self) -> Option<&[i64]> {
        self.input_ids.as_deref()
    }
}

fn read_input_ids(tokens: usize, ids: &Tensor<'_>) -> Result<Vec<i64>> {
    if !matches!(ids.shape, [count] | [1, count] if *count == tokens) {
        return Err(Error::shape(ids.file, &ids.name, ids.shape, format!("[{tokens}], as hidden_states")));
    }
    match ids.dtype {
        Dtype::I32 => Ok(ids.decode(i32::from_le_bytes)?.into_iter().map(i64::from).collect()),
        Dtype::I64 => ids.decode(i64::from_le_bytes),
        _ => Err(ids.wrong_dtype("I32 or I64")),
    }
}

fn read_routing(tokens: usize, ids: &Tensor<'_>, weights: &Tensor<'_>) -> Result<(Ids, Vec<f32>)> {
    let read = Ids::from_tensor(ids)?;
    if read.tokens() != tokens {
        return Err(Error::shape(ids.file, &ids.name, ids.shape, format!("[{tokens}, topk], as hidden_states")));
    }
    if weights.dtype != Dtype::F32 {
        return Err(weights.wrong_dtype("F32"));
    }
    weights.require_shape(ids.shape)?;
    Ok((read, weights.to_f32()?))
}

impl HiddenStates {
    /// Their type.
    #[must_use]
    pub fn dtype(&self) -> expertile::Dtype {
        match self {
            Self::Bf16(_) => expertile::Dtype::Bf16,
            Self::F16(_) => expertile::Dtype::F16,
            Self::F32(_) => expertile::Dtype::F32,
        }
    }

    fn read(tensor: &Tensor<'_>) -> Result<Self> {
        match tensor.dtype {
            Dtype::BF16 => Ok(Self::Bf16(tensor.decode(bf16::from_le_bytes)?)),
            Dtype::F16 => Ok(Self::F16(tensor.decode(f16::from_le_bytes)?)),
            Dtype::F32 => Ok(Self::F32(tensor.decode(f32::from_le_bytes)?)),
            _ => Err(tensor.wrong_dtype("BF16, F16 or F32")),
        }
    }

    /// The number of values, `M * H`.
    fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }

    /// Bytes of one value.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        match self {
            Self::Bf16(_) | Self::F16(_) => 2,
            Self::F32(_) => 4,
        }
    }

    /// The values, widened.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Bf16(values) => values.iter().map(|value| value.to_f32()).collect(),
            Self::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
            Self::F32(values) => values.clone(),
        }
    }
}

/// What a layer gives back.
#[derive(Debug, Clone, Copy)]
pub struct LayerOutput<'a> {
    /// `M`.
    pub tokens: usize,
    /// `H`.
    pub hidden: usize,
    /// Slots per token.
    pub topk: usize,
    /// `[M, H]`.
    pub output: &'a [bf16],
    /// `[M, topk]`.
    pub topk_ids: &'a [i32],
    /// `[M, topk]`.
    pub topk_weights: &'a [f32],
}

impl LayerOutput<'_> {
    /// The bytes of a safetensors file with the three tensors; `file` is its name in messages.
    ///
    /// # Errors
    /// [`Error::Shape`] if a list does not have its shape.
    pub fn to_bytes(&self, file: &Path) -> Result<Vec<u8>> {
        let output: Vec<u8> = self.output.iter().flat_map(|value| value.to_le_bytes()).collect();
        let ids: Vec<u8> = self.topk_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let weights: Vec<u8> = self.topk_weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let view = |name, dtype, width, bytes| {
            let shape = vec![self.tokens, width];
            TensorView::new(dtype, shape.clone(), bytes)
                .map(|view| (name, view))
                .map_err(|_| Error::shape(file, name, &shape, format!("a shape of {} bytes of {dtype}", bytes.len())))
        };
        let tensors = [
            view(OUTPUT, Dtype::BF16, self.hidden, &output[..])?,
            view(TOPK_IDS, Dtype::I32, self.topk, &ids)?,
            view(TOPK_WEIGHTS, Dtype::F32, self.topk, &weights)?,
        ];
        Ok(safetensors::serialize(tensors, None).expect("three named tensors always have a header"))
    }
}
