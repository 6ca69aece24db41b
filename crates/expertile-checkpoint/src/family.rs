//! The model families, as data: one row says how a family names its keys and tensors, how its router works, what
//! stands between the GEMMs, which shared expert it has, and which of its layers hold experts.
//!
//! Nothing else in this crate knows a family by name. Keys are those of `config.json` (of its `text_config` where
//! models nest one). Tensor names are relative to the block, or to the layer if they begin with `/`.

mod rows;

use expertile::{GateUpOrder, GroupWorth, Normalization};

/// A model family.
#[derive(Debug)]
pub struct Family {
    /// Values of `model_type` that name it, its own first.
    pub(crate) model_types: &'static [&'static str],
    /// Values in `architectures` that name it where `model_type` is unknown.
    pub(crate) architectures: &'static [&'static str],
    /// Name of the block within its layer.
    pub(crate) block: &'static str,
    /// How experts may be named; the first naming of which there is a tensor is taken.
    pub(crate) experts: &'static [ExpertNames],
    /// Keys of the number of experts; all that are there have to agree.
    pub(crate) experts_keys: &'static [&'static str],
    /// Keys of the number of experts per token.
    pub(crate) topk_keys: &'static [&'static str],
    /// Keys of an expert's width.
    pub(crate) intermediate_keys: &'static [&'static str],
    pub(crate) router: RouterRow,
    pub(crate) activation: ActivationRow,
    /// Whether the router weight multiplies the input of an expert instead of its output.
    pub(crate) weight_on_input: bool,
    pub(crate) shared: Option<SharedRow>,
    pub(crate) layers: Layers,
    /// Keys that may have these values only (as JSON), each value one that leaves the block as this row describes it.
    pub(crate) fixed: &'static [(&'static str, &'static [&'static str])],
    /// Keys of the family that its block does not read, with the values of `fixed`.
    pub(crate) inert: &'static [&'static str],
}

impl Family {
    /// The family's own `model_type`.
    #[must_use]
    pub fn model_type(&self) -> &'static str {
        self.model_types[0]
    }

    /// Every `model_type` that is read as this family, its own first.
    #[must_use]
    pub fn model_types(&self) -> &'static [&'static str] {
        self.model_types
    }

    /// All families.
    #[must_use]
    pub fn all() -> &'static [Self] {
        rows::FAMILIES
    }
}

/// How the tensors of experts are named.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ExpertNames {
    /// `experts.N.<part>.weight`, each `[outputs, inputs]`.
    Each {
        /// Absent where experts have no gate.
        gate: Option<&'static str>,
        up: &'static str,
        down: &'static str,
    },
    /// Two tensors for all experts: `[E, 2 I, H]` with `[E, H, I]`, or both transposed; their shapes tell.
    Fused {
        gate_up: &'static str,
        down: &'static str,
        /// `[E, 2 I]` and `[E, H]`.
        biases: Option<[&'static str; 2]>,
        order: GateUpOrder,
    },
}

/// How logits become a choice.
#[derive(Debug)]
pub(crate) struct RouterRow {
    pub(crate) weight: &'static str,
    /// Added to the logits.
    pub(crate) logit_bias: Option<&'static str>,
    /// Added to the scores for choosing.
    pub(crate) correction_bias: Option<CorrectionBias>,
    pub(crate) scores: Scores,
    pub(crate) groups: GroupsRow,
    pub(crate) normalize: Normalize,
    /// Key of the factor on the weights; `null` stands for 1.
    pub(crate) factor: Option<&'static str>,
    /// Layers in which a token's number in the vocabulary chooses its experts, and the router weighs them.
    pub(crate) by_token: Option<ByToken>,
}

/// Those layers: `hash_moe` in `mlp_layer_types`, or the first ones.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByToken {
    /// The experts of every number, `[vocabulary, topk]`.
    pub(crate) table: &'static str,
    /// Key that counts the layers, where there is no list.
    pub(crate) first: &'static str,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct CorrectionBias {
    pub(crate) name: &'static str,
    /// A flag that says whether there is one.
    pub(crate) flag: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scores {
    Softmax,
    Sigmoid,
    SqrtSoftplus,
    /// With the key of its jitter.
    SparseMixer(&'static str),
}

/// Whether `n_group` and `topk_group` limit the choice.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GroupsRow {
    Never,
    Always(GroupWorth),
    /// One group where the keys are absent.
    OrOne(GroupWorth),
    /// If `topk_method` has this value.
    IfMethod(&'static str, GroupWorth),
}

/// Whether the chosen scores are divided by their sum.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Normalize {
    Never,
    Always(Normalization),
    /// As this flag says.
    Flag(&'static str, Normalization),
    /// By their sum, but at least what this key says, or this number where it is absent.
    AtLeast(&'static str, f32),
}

/// What stands between the GEMMs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ActivationRow {
    /// A gated one, named by this key: `silu` (also if absent) or tanh's approximation of GELU.
    Gated(&'static str),
    /// gpt-oss's: `swiglu_limit`, and `swiglu_alpha` where it is not 1.702.
    Clamped,
    /// A gated one, named by this key: `silu` of a gate that `swiglu_limit` bounds above, times an up within it.
    Limited(&'static str),
    /// The square of the positive part, without a gate; the key has to say `relu2`.
    Relu2(&'static str),
}

/// The shared expert, which every token visits.
#[derive(Debug)]
pub(crate) struct SharedRow {
    pub(crate) names: SharedNames,
    /// `[1, H]`: its sigmoid multiplies the shared expert's output.
    pub(crate) gate: Option<&'static str>,
    pub(crate) width: Width,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum SharedNames {
    /// `<prefix>.<part>.weight` of gate, up and down.
    Separate(&'static str, [&'static str; 3]),
    /// `<prefix>.up_proj.weight`, `down_proj`.
    Ungated(&'static str),
    /// Gate's rows, then up's, in one matrix; and down.
    Fused([&'static str; 2]),
}

/// The shared expert's width.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Width {
    /// This key; 0 or absent: no shared expert.
    Key(&'static str),
    /// The experts' width times this key; 0 or absent: no shared expert.
    Times(&'static str),
    /// The experts' width times this key, 1 if absent.
    TimesOrOnce(&'static str),
    /// The experts' width.
    Same,
}

/// Which layers hold experts. Whatever a row says, a list `mlp_layer_types` decides where there is one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layers {
    All,
    /// `mlp_only_layers` and `decoder_sparse_step`.
    Stepped,
    /// `first_k_dense_replace`, and `moe_layer_freq` as a number or a list.
    AfterFirst,
    /// This key counts the dense layers that come first.
    AfterDense(&'static str),
    /// `expert_layer_period` and `expert_layer_offset`.
    Periodic,
    /// `moe_layers`, else every `interleave_moe_layer_step`th.
    Interleaved,
    /// `moe_layer_start_index`, `moe_layer_end_index`, `moe_layer_interval`.
    Range,
    /// `layers_block_type` (`moe`) or `hybrid_override_pattern` (`E`).
    Pattern,
}

impl Layers {
    /// The keys it reads.
    pub(crate) fn keys(self) -> &'static [&'static str] {
        match self {
            Self::All => &[],
            Self::Stepped => &["mlp_only_layers", "decoder_sparse_step"],
            Self::AfterFirst => &["first_k_dense_replace", "moe_layer_freq"],
            Self::AfterDense("num_dense_layers") => &["num_dense_layers"],
            Self::AfterDense(_) => &[],
            Self::Periodic => &["expert_layer_period", "expert_layer_offset"],
            Self::Interleaved => &["moe_layers", "interleave_moe_layer_step"],
            Self::Range => &["moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"],
            Self::Pattern => &["layers_block_type", "hybrid_override_pattern"],
        }
    }
}

#[cfg(test)]
mod tests;
