//! The layer as plain data: its shape, its stages, and what each stage must move and compute.

use crate::activation::Activation;
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::layout::Layout;
use crate::routing::require_experts;
use std::fmt;

/// The sizes of one expert layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerShape {
    hidden: usize,
    intermediate: usize,
    local_experts: usize,
    gated: bool,
}

impl LayerShape {
    /// `H`, `I` and `E` of a layer with gate and up: `w13 [E, 2 I, H]`.
    ///
    /// # Errors
    /// [`Error::Value`] if one of them is zero, [`Error::Overflow`] if `E * 2 I * H` does not fit.
    pub fn new(hidden: usize, intermediate: usize, local_experts: usize) -> Result<Self> {
        Self::with_gate(hidden, intermediate, local_experts, true)
    }

    /// `H`, `I` and `E` of a layer without a gate: `w13 [E, I, H]`.
    ///
    /// # Errors
    /// As [`LayerShape::new`].
    pub fn ungated(hidden: usize, intermediate: usize, local_experts: usize) -> Result<Self> {
        Self::with_gate(hidden, intermediate, local_experts, false)
    }

    fn with_gate(hidden: usize, intermediate: usize, local_experts: usize, gated: bool) -> Result<Self> {
        for (argument, value) in [("hidden", hidden), ("intermediate", intermediate)] {
            if value == 0 {
                return Err(Error::value(argument, 0, "at least 1"));
            }
        }
        require_experts(local_experts)?;
        let columns = checked_mul("2 I", intermediate, 2)?;
        checked_mul("E * 2 I * H", checked_mul("2 I * H", columns, hidden)?, local_experts)?;
        Ok(Self { hidden, intermediate, local_experts, gated })
    }

    /// The sizes of a layer of `w13 [E, 2 I, H]` (`[E, I, H]` without a gate) and `w2 [E, H, I]`; each given as
    /// `[E, N, K]` and its format.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::WeightFormat`] if the two do not fit each other; as [`LayerShape::new`].
    pub fn of_weights(w13: ([usize; 3], WeightFormat), w2: ([usize; 3], WeightFormat), gated: bool) -> Result<Self> {
        let [experts, hidden, intermediate] = w2.0;
        let shape = Self::with_gate(hidden, intermediate, experts, gated)?;
        let expected = [experts, shape.w13_rows(), hidden];
        if w13.0 != expected {
            let kind = if gated { "" } else { " without a gate" };
            return Err(Error::shape("w13", &w13.0, format!("{expected:?}, which w2 asks for{kind}")));
        }
        if w13.1 != w2.1 {
            return Err(Error::WeightFormat { argument: "w2", actual: w2.1.name(), expected: w13.1.name() });
        }
        Ok(shape)
    }

    /// `H`.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// `I`.
    #[must_use]
    pub fn intermediate(&self) -> usize {
        self.intermediate
    }

    /// `E`.
    #[must_use]
    pub fn local_experts(&self) -> usize {
        self.local_experts
    }

    /// Whether `w13` holds gate and up.
    #[must_use]
    pub fn is_gated(&self) -> bool {
        self.gated
    }

    /// Rows of an expert's `w13`: `2 I`, or `I` without a gate.
    #[must_use]
    pub fn w13_rows(&self) -> usize {
        if self.gated { 2 * self.intermediate } else { self.intermediate }
    }
}

/// What a layer computes and what its calls are made of; its weights and sizes apart. The same on every backend.
///
/// ```
/// use expertile::{ActivationFormat, LayerConfig};
/// let usual = LayerConfig::new(8, 256, ActivationFormat::E4m3);
/// let config = LayerConfig { weight_on_input: false, ..usual };
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// Slots per token.
    pub topk: usize,
    /// `G`: the length of the expert map; `E` without one.
    pub global_experts: usize,
    /// Type of the ids: [`Dtype::I32`] or [`Dtype::I64`].
    pub ids: Dtype,
    /// Type of the hidden states: [`Dtype::Bf16`], [`Dtype::F16`] or [`Dtype::F32`].
    pub input: Dtype,
    /// Type of the result: the same three.
    pub output: Dtype,
    /// The activation between the GEMMs.
    pub activation: Activation,
    /// What the GEMMs' rows are made of.
    pub activation_format: ActivationFormat,
    /// `apply_router_weight_on_input`: weights multiply the input instead of the output; only with `topk` 1.
    pub weight_on_input: bool,
    /// Alignment of the layout; `None` for the backend's own, which is its fastest (1 on a CPU, 8 on a GPU). Results do
    /// not depend on it.
    pub alignment: Option<usize>,
    /// Whether K may be split, by the size of a call, where few experts have few rows: up to twice as fast there on a
    /// GPU. **A token's result then depends on how many tokens the call has**: sums are added up in another order for
    /// some numbers of tokens than for others. Without it, which is the usual, a result has the same bits whatever
    /// other tokens there are. The CPU never splits K.
    pub split_k: bool,
    /// Whether a GPU may join steps in one launch where that is faster: all of a call of few tokens, or both GEMMs and the
    /// activation where experts have few rows. Results have the same bits; of a call in one launch no intermediate buffers
    /// are left for inspection.
    pub one_launch: bool,
}

impl LayerConfig {
    /// The usual layer: i32 ids, bf16 in and out, SwiGLU, weights on the output, the backend's own alignment, K never
    /// split, few tokens in one launch where there is one.
    #[must_use]
    pub const fn new(topk: usize, global_experts: usize, activation_format: ActivationFormat) -> Self {
        Self {
            topk,
            global_experts,
            ids: Dtype::I32,
            input: Dtype::Bf16,
            output: Dtype::Bf16,
            activation: Activation::SWIGLU,
            activation_format,
            weight_on_input: false,
            alignment: None,
            split_k: false,
            one_launch: true,
        }
    }

    /// Checks what no backend takes.
    ///
    /// # Errors
    /// [`Error::Value`] for `topk` 0, or more than 1 where router weights multiply the input, and for
    /// `global_experts` 0; [`Error::Dtype`] for other types than the fields name; [`Error::Alignment`] for alignment
    /// 0; [`Error::Parameter`] as [`Activation::check`].
    pub fn check(&self) -> Result<()> {
        self.activation.check()?;
        if self.topk == 0 {
            return Err(Error::value("topk", 0, "at least 1"));
        }
        if self.weight_on_input && self.topk != 1 {
            return Err(Error::value("topk", self.topk, "1, where router weights multiply the input"));
        }
        if self.global_experts == 0 {
            return Err(Error::value("global_experts", 0, "at least 1"));
        }
        if !matches!(self.ids, Dtype::I32 | Dtype::I64) {
            return Err(Error::Dtype { argument: "topk_ids", actual: self.ids, expected: "i32 or i64" });
        }
        for (argument, actual) in [("hidden_states", self.input), ("output", self.output)] {
            if !matches!(actual, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
                return Err(Error::Dtype { argument, actual, expected: "bf16, f16 or f32" });
            }
        }
        if self.alignment == Some(0) {
            return Err(Error::Alignment { actual: 0, expected: "at least 1".into() });
        }
        Ok(())
    }

    /// Fails unless a call's types are those that the layer was prepared for.
    pub(crate) fn require_types(&self, input: Dtype, output: Dtype) -> Result<()> {
        for (argument, actual, prepared) in [("hidden_states", input, self.input), ("output", output, self.output)] {
            if actual != prepared {
                return Err(Error::Dtype { argument, actual, expected: prepared.as_prepared() });
            }
        }
        Ok(())
    }

    /// Fails for more tokens than the layer was prepared for.
    pub(crate) fn require_tokens(tokens: usize, max_tokens: usize) -> Result<()> {
        if tokens > max_tokens {
            return Err(Error::value("tokens", tokens, format!("at most {max_tokens}, as prepared")));
        }
        Ok(())
    }
}

/// A stage of the layer, in the order of a token's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Counting, aligning and ranking: the layout.
    Routing,
    /// The shared expert, whole, if the layer has one.
    Shared,
    /// Rows to their place, quantized or converted on the way.
    Permute,
    /// `[rows, H]` times `[2 I, H]` (`[I, H]` without a gate).
    Gemm1,
    /// `silu(gate) * up`, or another activation; quantized if the activations are e4m3.
    Activation,
    /// `[rows, I]` times `[H, I]`.
    Gemm2,
    /// The weighted sum.
    Unpermute,
}

impl Stage {
    /// Every stage, in order; a layer without a shared expert leaves [`Stage::Shared`] out.
    pub const ALL: [Self; 7] =
        [Self::Routing, Self::Shared, Self::Permute, Self::Gemm1, Self::Activation, Self::Gemm2, Self::Unpermute];

    /// The name that tables and JSON print.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Routing => "routing",
            Self::Shared => "shared",
            Self::Permute => "permute",
            Self::Gemm1 => "gemm1",
            Self::Activation => "activation",
            Self::Gemm2 => "gemm2",
            Self::Unpermute => "unpermute",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a stage cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct StageCost {
    /// Bytes read and written, each operand once; weights of active experts only.
    pub bytes: u64,
    /// Floating-point operations of the matrix products over live rows (2 per multiply-add); 0 for the other stages.
    pub flops: u64,
}

/// Bytes of a row of so many activations, their scales included.
fn row_bytes(activations: ActivationFormat, cols: u64) -> u64 {
    match activations {
        ActivationFormat::Bf16 => 2 * cols,
        ActivationFormat::E4m3 => cols + cols.div_ceil(128) * 4,
    }
}

/// The cost of [`Stage::Shared`]: a dense MLP of that shape (`E` = 1) over all tokens.
///
/// Its rows are read once and written once; what stands between its two products counts as it does for the other
/// experts.
#[must_use]
pub fn shared_cost(
    shape: &LayerShape,
    tokens: usize,
    weights: WeightFormat,
    activations: ActivationFormat,
    input_bytes: usize,
) -> StageCost {
    let (hidden, intermediate) = (shape.hidden as u64, shape.intermediate as u64);
    let (tokens, w13_rows) = (tokens as u64, shape.w13_rows() as u64);
    let row = |cols| row_bytes(activations, cols);
    let weights = weights.matrix_bytes(w13_rows, hidden) + weights.matrix_bytes(hidden, intermediate);
    // The input, converted and read again; gate and up, and what they become, written and read; the result.
    let moved = hidden * input_bytes as u64 + 2 * row(hidden) + 4 * w13_rows + 2 * row(intermediate) + 2 * hidden;
    StageCost {
        bytes: if tokens == 0 { 0 } else { weights + tokens * moved },
        flops: 2 * tokens * (w13_rows * hidden + hidden * intermediate),
    }
}

/// The cost of every stage for one layout; of [`Stage::Shared`], which the layout does not know, see [`shared_cost`].
#[must_use]
pub fn stage_cost(
    stage: Stage,
    shape: &LayerShape,
    layout: &Layout<'_>,
    weights: WeightFormat,
    activations: ActivationFormat,
    input_bytes: usize,
) -> StageCost {
    let live = layout.live_rows() as u64;
    let (hidden, intermediate, w13_rows) = (shape.hidden as u64, shape.intermediate as u64, shape.w13_rows() as u64);
    let active = layout.expert_num_tokens().iter().filter(|&&count| count > 0).count() as u64;
    let row = |cols| row_bytes(activations, cols);
    let gemm = |n: u64, k: u64| {
        let bytes = active * weights.matrix_bytes(n, k) + live * (row(k) + 2 * n);
        StageCost { bytes, flops: 2 * live * n * k }
    };
    let moved = |bytes| StageCost { bytes, flops: 0 };
    match stage {
        Stage::Routing => {
            let lists = 3 * layout.local_experts() + layout.m_sum() + 2 * layout.inv_perm().len();
            moved(4 * lists as u64)
        }
        Stage::Shared => StageCost::default(),
        Stage::Permute => {
            let routed =
                layout.inv_perm().chunks_exact(layout.topk()).filter(|slots| slots.iter().any(|&row| row >= 0));
            moved(routed.count() as u64 * hidden * input_bytes as u64 + live * row(hidden))
        }
        Stage::Gemm1 => gemm(w13_rows, hidden),
        Stage::Activation => moved(live * (2 * w13_rows + row(intermediate))),
        Stage::Gemm2 => gemm(hidden, intermediate),
        Stage::Unpermute => moved((live + layout.tokens() as u64) * 2 * hidden),
    }
}
