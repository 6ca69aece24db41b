//! One block of experts as views of its tensors.

mod fused;
mod matrices;
mod packed;
mod reader;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::ids::Ids;
use crate::matrix::WeightMatrix;
use expertile::layer::LayerShape;
use expertile::{Activation, Backend, Router, WeightFormat, WeightsBuilder};
use reader::Reader;

/// The experts of one layer of a checkpoint, with their router and their shared expert; weights stay in the mapped
/// files until they are packed.
#[derive(Debug)]
pub struct MoeLayer<'a> {
    shape: LayerShape,
    weight_format: WeightFormat,
    activation: Activation,
    weight_on_input: bool,
    router: Router,
    router_weight: Vec<f32>,
    token_experts: Option<Ids>,
    experts: Vec<Expert<'a>>,
    biases: Option<Biases>,
    shared: Option<SharedExpert<'a>>,
    /// `model.layers.7.mlp.`
    block_prefix: String,
    /// Names of the block's tensors but the routed experts' weights.
    other_tensors: Vec<String>,
}

/// The matrices of one expert.
#[derive(Debug)]
pub struct Expert<'a> {
    /// `[I, H]`: what goes through the activation (Mixtral's `w1`); `None` where experts have no gate.
    pub gate: Option<WeightMatrix<'a>>,
    /// `[I, H]` (Mixtral's `w3`).
    pub up: WeightMatrix<'a>,
    /// `[H, I]` (Mixtral's `w2`).
    pub down: WeightMatrix<'a>,
}

/// Biases of all experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Biases {
    /// `[E, 2 I]`, gate's first (or `[E, I]` where experts have no gate): added to the first GEMM's sums.
    pub w13: Vec<f32>,
    /// `[E, H]`: added to the second GEMM's sums.
    pub w2: Vec<f32>,
}

/// The expert that every token visits.
#[derive(Debug)]
pub struct SharedExpert<'a> {
    /// `H`, its own `I`, and one expert.
    pub shape: LayerShape,
    /// Its matrices.
    pub expert: Expert<'a>,
    /// `[H]`: the sigmoid of its product with a token multiplies that token's output; `None` for no such gate.
    pub gate: Option<Vec<f32>>,
}

impl<'a> MoeLayer<'a> {
    pub(crate) fn read(checkpoint: &'a Checkpoint<'_>, layer: usize) -> Result<Self> {
        let config = checkpoint.config();
        let block = config.block(layer)?;
        let reader = Reader::find(checkpoint, block.clone(), layer)?;
        let (router, router_weight) = reader.router()?;
        let token_experts = reader.token_experts()?;
        let (experts, biases) = reader.experts()?;
        let shared = reader.shared()?;
        reader.check_all_read()?;
        let weight_format = experts[0].up.format();
        Ok(Self {
            shape: block.shape,
            weight_format,
            activation: block.activation,
            weight_on_input: config.family.weight_on_input,
            router,
            router_weight,
            token_experts,
            experts,
            biases,
            shared,
            block_prefix: reader.name(""),
            other_tensors: reader.other_tensors(),
        })
    }

    /// `H`, `I` and the number of experts.
    #[must_use]
    pub fn shape(&self) -> LayerShape {
        self.shape
    }

    /// What all of the routed experts' weights are packed as.
    #[must_use]
    pub fn weight_format(&self) -> WeightFormat {
        self.weight_format
    }

    /// The type that the checkpoint holds them in, as safetensors names it.
    #[must_use]
    pub fn weight_dtype(&self) -> &'static str {
        self.experts[0].up.dtype()
    }

    /// Whether packing rounds them: F16 and F32 become bf16.
    #[must_use]
    pub fn weights_are_rounded(&self) -> bool {
        self.experts[0].up.is_rounded()
    }

    /// What stands between the GEMMs.
    #[must_use]
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// Whether the router weight multiplies an expert's input instead of its output.
    #[must_use]
    pub fn weight_on_input(&self) -> bool {
        self.weight_on_input
    }

    /// How logits become a choice of experts.
    #[must_use]
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The router's weight `[experts, H]`, widened to f32: `logits = hidden_states * router_weight^T`.
    #[must_use]
    pub fn router_weight(&self) -> &[f32] {
        &self.router_weight
    }

    /// The experts of every number in the vocabulary, `[vocabulary, topk]`, in a layer where a token's number chooses
    /// them and the router only weighs them; `None` where the router chooses.
    #[must_use]
    pub fn token_experts(&self) -> Option<&Ids> {
        self.token_experts.as_ref()
    }

    /// The routed experts, by id.
    #[must_use]
    pub fn experts(&self) -> &[Expert<'a>] {
        &self.experts
    }

    /// Their biases, if they have any.
    #[must_use]
    pub fn biases(&self) -> Option<&Biases> {
        self.biases.as_ref()
    }

    /// The shared expert, if the block has one.
    #[must_use]
    pub fn shared(&self) -> Option<&SharedExpert<'a>> {
        self.shared.as_ref()
    }

    /// The full name of a tensor of the block.
    pub(crate) fn block_name(&self, name: &str) -> String {
        format!("{}{name}", self.block_prefix)
    }

    /// Names of the block's tensors but the routed experts' weights, sorted.
    pub(crate) fn other_tensors(&self) -> &[String] {
        &self.other_tensors
    }

    /// Loads the routed experts into a backend: `w13 [E, 2 I, H]` (gate rows first; `[E, I, H]` without a gate) and
    /// `w2 [E, H, I]`.
    ///
    /// `progress` gets the number of experts that are done, after each. This is where the file is read, so the time it
    /// takes is the disk's unless the file is in memory already.
    ///
    /// # Errors
    /// [`Error::Pack`] with the library's reason.
    pub fn load<B: Backend>(&self, backend: &B, progress: &mut dyn FnMut(usize)) -> Result<(B::Weights, B::Weights)> {
        load(backend, self.shape, &self.experts, progress)
    }
}

impl Checkpoint<'_> {
    /// One MoE layer: its shape, its router, views of its weights. Maps the shards that hold it.
    ///
    /// # Errors
    /// [`Error::Layer`] or [`Error::DenseLayer`] if there are no experts, [`Error::MissingTensor`],
    /// [`Error::UnknownTensor`] for one that could change the block and that the family is not known to have,
    /// [`Error::AmbiguousTensor`], [`Error::Shape`], [`Error::Dtype`], [`Error::Config`] for a key that is missing or
    /// has a value that this crate does not take, [`Error::Router`], and whatever opening a shard meets.
    pub fn layer(&self, layer: usize) -> Result<MoeLayer<'_>> {
        MoeLayer::read(self, layer)
    }
}

impl SharedExpert<'_> {
    /// What its weights are loaded as.
    #[must_use]
    pub fn weight_format(&self) -> WeightFormat {
        self.expert.up.format()
    }

    /// Loads its weights, as those of a layer with one expert.
    ///
    /// # Errors
    /// [`Error::Pack`] with the library's reason.
    pub fn load<B: Backend>(&self, backend: &B) -> Result<(B::Weights, B::Weights)> {
        load(backend, self.shape, std::slice::from_ref(&self.expert), &mut |_| {})
    }
}

fn load<B: Backend>(
    backend: &B,
    shape: LayerShape,
    experts: &[Expert<'_>],
    progress: &mut dyn FnMut(usize),
) -> Result<(B::Weights, B::Weights)> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |source| Error::Pack { what, source }
    };
    let format = experts[0].up.format();
    let mut w13 = backend.w13_builder(format, &shape).map_err(failed("w13"))?;
    let mut w2 = backend.w2_builder(format, &shape).map_err(failed("w2"))?;
    for (id, expert) in experts.iter().enumerate() {
        let mut first_row = 0;
        if let Some(gate) = &expert.gate {
            gate.view()
                .and_then(|rows| rows.add_to(&mut w13, id, 0))
                .map_err(failed(&format!("gate of expert {id}")))?;
            first_row = shape.intermediate();
        }
        expert
            .up
            .view()
            .and_then(|rows| rows.add_to(&mut w13, id, first_row))
            .map_err(failed(&format!("up of expert {id}")))?;
        expert
            .down
            .view()
            .and_then(|rows| rows.add_to(&mut w2, id, 0))
            .map_err(failed(&format!("down of expert {id}")))?;
        progress(id + 1);
    }
    Ok((w13.finish().map_err(failed("w13"))?, w2.finish().map_err(failed("w2"))?))
}
