//! One block of experts as views of its tensors.

use crate::checkpoint::Checkpoint;
use crate::config::BlockConfig;
use crate::error::{Error, Result};
use crate::family::{ExpertNames, Family, SharedNames};
use crate::ids::Ids;
use crate::matrix::{HalfScales, View, WEIGHT_DTYPES, WeightMatrix, WeightScales, matrix_scales, weight_format};
use crate::tensors::Tensor;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::layer::LayerShape;
use expertile::{Activation, Backend, GateUpOrder, MatrixRef, Router, WeightFormat, WeightsBuilder, int4, mxfp4};
use half::{bf16, f16};
use safetensors::Dtype;
use std::cell::RefCell;
use std::collections::HashSet;

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

/// What may stand before the number of a layer: language models alone, inside multimodal ones, and without a head.
const LAYER_PREFIXES: [&str; 7] = [
    "model.layers.",
    "model.language_model.layers.",
    "language_model.model.layers.",
    "layers.",
    "language_model.layers.",
    "backbone.layers.",
    "thinker.model.layers.",
];

/// The dtype of packed 4-bit weights.
const PACKED: Dtype = Dtype::U8;
/// The same, of weights under a name without an ending (DeepSeek-V4).
const PACKED_IN_PLACE: Dtype = Dtype::I8;
/// Those of their scales: exponents.
const SCALE_DTYPES: &[Dtype] = &[Dtype::U8, Dtype::F8_E8M0];

/// The name of a weight's scales where it has no ending: `w1.scale` of `w1.weight`.
fn scale_beside(weight: &str) -> String {
    format!("{}scale", weight.strip_suffix("weight").unwrap_or(weight))
}

/// Finds and checks the tensors of one layer.
struct Reader<'a, 'c> {
    checkpoint: &'a Checkpoint<'c>,
    family: &'static Family,
    block: BlockConfig,
    /// `model.layers.7.`
    layer_prefix: String,
    /// Names that were read; any other tensor of the block is an error.
    read: RefCell<HashSet<String>>,
    /// Of these, the routed experts' weights.
    expert_weights: RefCell<HashSet<String>>,
}

impl<'a, 'c> Reader<'a, 'c> {
    /// Finds out where the layer's tensors are, by the router's weight.
    fn find(checkpoint: &'a Checkpoint<'c>, block: BlockConfig, layer: usize) -> Result<Self> {
        let config = checkpoint.config();
        let family = config.family;
        let prefixes = LAYER_PREFIXES.map(|prefix| format!("{prefix}{layer}."));
        let router = |prefix: &str| format!("{prefix}{}.{}", family.block, family.router.weight);
        let mut found = Vec::new();
        for prefix in &prefixes {
            if checkpoint.has(&router(prefix))? {
                found.push(prefix);
            }
        }
        let layer_prefix = match found[..] {
            [prefix] => prefix.clone(),
            [] => {
                for prefix in &prefixes {
                    let name = format!("{prefix}{}.gate_proj.weight", family.block);
                    if checkpoint.has(&name)? {
                        let because = format!("there is a {name}");
                        return Err(Error::DenseLayer { file: config.file.clone(), layer, because });
                    }
                }
                prefixes[0].clone()
            }
            [first, second, ..] => {
                return Err(Error::AmbiguousTensor {
                    file: config.file.clone(),
                    tensor: router(first),
                    other: router(second),
                });
            }
        };
        let (read, expert_weights) = Default::default();
        Ok(Self { checkpoint, family, block, layer_prefix, read, expert_weights })
    }

    /// A tensor's full name.
    fn name(&self, name: &str) -> String {
        match name.strip_prefix('/') {
            Some(of_layer) => format!("{}{of_layer}", self.layer_prefix),
            None => format!("{}{}.{name}", self.layer_prefix, self.family.block),
        }
    }

    fn has(&self, name: &str) -> Result<bool> {
        self.checkpoint.has(&self.name(name))
    }

    /// The tensor of that name, from now on known to have been read.
    fn tensor(&self, name: &str, expected: impl Fn() -> String) -> Result<Tensor<'a>> {
        let name = self.name(name);
        let tensor = self.checkpoint.tensor(&name, expected)?;
        self.read.borrow_mut().insert(name);
        Ok(tensor)
    }

    /// A tensor of floats in one of these shapes.
    fn floats(&self, name: &str, shapes: &[&[usize]]) -> Result<Vec<f32>> {
        let expected = || shapes.iter().map(|shape| format!("{shape:?}")).collect::<Vec<_>>().join(" or ");
        let tensor = self.tensor(name, || format!("BF16, F16 or F32 {}", expected()))?;
        if !shapes.contains(&tensor.shape) {
            return Err(Error::shape(tensor.file, &tensor.name, tensor.shape, expected()));
        }
        tensor.to_f32()
    }

    fn router(&self) -> Result<(Router, Vec<f32>)> {
        let (experts, hidden) = (self.block.shape.local_experts(), self.block.shape.hidden());
        let weight = self.floats(self.family.router.weight, &[&[experts, hidden]])?;
        let mut router = self.block.router.clone();
        if let Some(name) = self.block.logit_bias {
            router.logit_bias = self.floats(name, &[&[experts]])?;
        }
        if let Some(name) = self.block.correction_bias {
            router.correction_bias = self.floats(name, &[&[experts], &[1, experts]])?;
        }
        Ok((router, weight))
    }

    fn token_experts(&self) -> Result<Option<Ids>> {
        let Some(name) = self.block.token_table else { return Ok(None) };
        let topk = self.block.router.topk;
        let tensor = self.tensor(name, || format!("I32 or I64 [vocabulary, {topk}]"))?;
        let vocabulary = self.checkpoint.config().vocabulary()?.unwrap_or(tensor.shape.first().copied().unwrap_or(0));
        tensor.require_shape(&[vocabulary, topk])?;
        Ids::from_tensor(&tensor).map(Some)
    }

    /// Notes that what was read since `before` are weights of routed experts.
    fn note_expert_weights(&self, before: &HashSet<String>) {
        let weights = self.read.borrow().difference(before).cloned().collect();
        self.expert_weights.replace(weights);
    }

    /// Names that were read and are not the routed experts' weights, sorted.
    fn other_tensors(&self) -> Vec<String> {
        let mut names: Vec<_> = self.read.borrow().difference(&self.expert_weights.borrow()).cloned().collect();
        names.sort_unstable();
        names
    }

    fn experts(&self) -> Result<(Vec<Expert<'a>>, Option<Biases>)> {
        let before = self.read.borrow().clone();
        let first_tensor = |names: &ExpertNames| match *names {
            ExpertNames::Each { gate, up, .. } => format!("experts.0.{}.weight", gate.unwrap_or(up)),
            ExpertNames::Fused { gate_up, .. } => gate_up.to_owned(),
        };
        for names in self.family.experts {
            let first = first_tensor(names);
            let packed = self.packed_name(names, &first)?;
            if packed.is_none() && !self.has(&first)? {
                continue;
            }
            return match *names {
                ExpertNames::Each { gate, up, down } => {
                    let count = self.block.shape.local_experts();
                    let dtype = match packed {
                        Some(_) => PACKED,
                        None => self.weight_tensor(&first, self.block.shape.intermediate())?.dtype,
                    };
                    let expert = |expert: usize| {
                        let name = |part: &str| format!("experts.{expert}.{part}.weight");
                        self.separate(gate.map(name), &name(up), &name(down), self.block.shape, Some(dtype))
                    };
                    let experts = (0..count).map(expert).collect::<Result<_>>()?;
                    self.note_expert_weights(&before);
                    Ok((experts, None))
                }
                ExpertNames::Fused { gate_up, down, biases, order } => {
                    let experts = match packed {
                        Some(_) => self.fused_mxfp4([gate_up, down], order)?,
                        None => self.fused([gate_up, down], order)?,
                    };
                    self.note_expert_weights(&before);
                    Ok((experts, biases.map(|names| self.biases(names, order)).transpose()?))
                }
            };
        }
        // Before a tensor is called missing: other methods have other tensors.
        self.checkpoint.config().quantization.check_method()?;
        let (intermediate, hidden) = (self.block.shape.intermediate(), self.block.shape.hidden());
        self.tensor(&first_tensor(&self.family.experts[0]), || format!("{WEIGHT_DTYPES} [{intermediate}, {hidden}]"))?;
        unreachable!("the tensor is not there")
    }

    /// The name under which a weight stands as packed 4-bit values, if it does.
    fn packed_name(&self, names: &ExpertNames, weight: &str) -> Result<Option<String>> {
        let packed = match names {
            ExpertNames::Each { .. } => format!("{weight}_packed"),
            ExpertNames::Fused { .. } => format!("{weight}_blocks"),
        };
        match [self.has(weight)?, self.has(&packed)?] {
            [true, true] => Err(Error::AmbiguousTensor {
                file: self.checkpoint.config().file.clone(),
                tensor: self.name(weight),
                other: self.name(&packed),
            }),
            [false, true] => Ok(Some(packed)),
            _ => Ok(None),
        }
    }

    /// Bytes of MXFP4 weights: a tensor of that shape.
    fn bytes(&self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<&'a [u8]> {
        let expected = || dtypes.iter().map(Dtype::to_string).collect::<Vec<_>>().join(" or ");
        let tensor = self.tensor(name, || format!("{} {shape:?}", expected()))?;
        if !dtypes.contains(&tensor.dtype) {
            return Err(tensor.wrong_dtype(expected()));
        }
        tensor.require_shape(shape)?;
        Ok(tensor.bytes)
    }

    /// Groups of 32 to a row of `cols` weights called `name`.
    fn groups(&self, name: &str, cols: usize) -> Result<usize> {
        let failed = |source| Error::Pack { what: self.name(name), source };
        mxfp4::groups(cols).map_err(failed)
    }

    /// All experts out of MXFP4 blocks `[E, 2 I, H / 32, 16]` and `[E, H, I / 32, 16]` and their scales, which lack the
    /// last axis.
    fn fused_mxfp4(&self, names: [&str; 2], order: GateUpOrder) -> Result<Vec<Expert<'a>>> {
        self.checkpoint.config().quantization.require_mxfp4()?;
        let shape = self.block.shape;
        let (hidden, intermediate, count) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        let failed = |source| Error::Pack { what: self.name(names[0]), source };
        let load = |name: &str, rows: usize, cols: usize| -> Result<_> {
            let groups = self.groups(name, cols)?;
            let blocks = self.bytes(&format!("{name}_blocks"), &[PACKED], &[count, rows, groups, mxfp4::GROUP / 2])?;
            let scales = self.bytes(&format!("{name}_scales"), SCALE_DTYPES, &[count, rows, groups])?;
            // `taken` rows of an expert, every `step`-th from `first` on.
            Ok(move |expert: usize, (first, step): (usize, usize), taken: usize| -> expertile::Result<_> {
                let [blocks, scales] = [(blocks, cols / 2), (scales, groups)].map(|(bytes, width)| {
                    let bytes = &bytes[(expert * rows + first) * width..];
                    MatrixRef::with_strides(bytes, taken, width, step * width, 1)
                });
                Ok(WeightMatrix::mxfp4(blocks?, scales?))
            })
        };
        let (gate_up, down) = (load(names[0], 2 * intermediate, hidden)?, load(names[1], hidden, intermediate)?);
        let [gate_at, up_at] = match order {
            GateUpOrder::Halves => [(0, 1), (intermediate, 1)],
            GateUpOrder::Interleaved => [(0, 2), (1, 2)],
        };
        let expert = |expert: usize| {
            Ok(Expert {
                gate: Some(gate_up(expert, gate_at, intermediate)?),
                up: gate_up(expert, up_at, intermediate)?,
                down: down(expert, (0, 1), hidden)?,
            })
        };
        (0..count).map(expert).collect::<expertile::Result<_>>().map_err(failed)
    }

    /// A matrix of its own as packed 4-bit values: MXFP4, or int4 if the config says so.
    fn packed_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix<'a>> {
        if self.checkpoint.config().quantization.speaks_of_int4() {
            return self.packed_int4(name, rows, cols);
        }
        self.checkpoint.config().quantization.require_packed_mxfp4()?;
        let groups = self.groups(name, cols)?;
        let blocks = self.bytes(&format!("{name}_packed"), &[PACKED], &[rows, cols / 2])?;
        let scales = self.bytes(&format!("{name}_scale"), SCALE_DTYPES, &[rows, groups])?;
        self.mxfp4_matrix(name, blocks, scales, [rows, cols])
    }

    /// A matrix of int4 values, eight to a word.
    fn packed_int4(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix<'a>> {
        self.checkpoint.config().quantization.require_packed_int4()?;
        let failed = |source| Error::Pack { what: self.name(name), source };
        let groups = int4::groups(cols).map_err(failed)?;
        let blocks = self.bytes(&format!("{name}_packed"), &[Dtype::I32], &[rows, cols / 8])?;
        let scales = self.tensor(&format!("{name}_scale"), || format!("BF16 or F16 [{rows}, {groups}]"))?;
        scales.require_shape(&[rows, groups])?;
        let scales = match scales.dtype {
            Dtype::BF16 => HalfScales::Bf16(scales.values(scales.bytes, bf16::from_le_bytes)?),
            Dtype::F16 => HalfScales::F16(scales.values(scales.bytes, f16::from_le_bytes)?),
            _ => return Err(scales.wrong_dtype("BF16 or F16")),
        };
        let shape_name = format!("{name}_shape");
        if self.has(&shape_name)? {
            let shape = self.tensor(&shape_name, || "I64 or I32 [2]".into())?;
            let extents: Vec<i64> = match shape.dtype {
                Dtype::I64 => shape.decode(i64::from_le_bytes)?,
                Dtype::I32 => shape.decode(i32::from_le_bytes)?.into_iter().map(i64::from).collect(),
                _ => return Err(shape.wrong_dtype("I64 or I32")),
            };
            if extents != [rows as i64, cols as i64] {
                let found: Vec<usize> = extents.iter().map(|&extent| usize::try_from(extent).unwrap_or(0)).collect();
                return Err(Error::shape(shape.file, &shape.name, &found, format!("[{rows}, {cols}] in it")));
            }
        }
        // The first of eight values is in a word's lowest bits: bytes of two values each, in their order.
        Ok(WeightMatrix::int4(MatrixRef::new(blocks, rows, cols / 2).map_err(failed)?, scales))
    }

    /// MXFP4 under the weight's own name, and its scales beside it.
    fn packed_in_place(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix<'a>> {
        self.checkpoint.config().quantization.require_fp4_experts()?;
        let groups = self.groups(name, cols)?;
        let blocks = self.bytes(name, &[PACKED_IN_PLACE], &[rows, cols / 2])?;
        let scales = self.bytes(&scale_beside(name), SCALE_DTYPES, &[rows, groups])?;
        self.mxfp4_matrix(name, blocks, scales, [rows, cols])
    }

    fn mxfp4_matrix(
        &self,
        name: &str,
        blocks: &'a [u8],
        scales: &'a [u8],
        [rows, cols]: [usize; 2],
    ) -> Result<WeightMatrix<'a>> {
        let groups = self.groups(name, cols)?;
        let failed = |source| Error::Pack { what: self.name(name), source };
        let blocks = MatrixRef::new(blocks, rows, cols / 2).map_err(failed)?;
        Ok(WeightMatrix::mxfp4(blocks, MatrixRef::new(scales, rows, groups).map_err(failed)?))
    }

    /// A weight tensor, whatever its shape; `rows` describes it in case there is none.
    fn weight_tensor(&self, name: &str, rows: usize) -> Result<Tensor<'a>> {
        let tensor = self.tensor(name, || format!("{WEIGHT_DTYPES} [{rows}, ..]"))?;
        let may_be_packed = self.family.fixed.iter().any(|(key, _)| *key == "expert_dtype");
        if weight_format(tensor.dtype).is_none() && !(may_be_packed && tensor.dtype == PACKED_IN_PLACE) {
            return Err(tensor.wrong_dtype(WEIGHT_DTYPES));
        }
        Ok(tensor)
    }

    /// An expert whose matrices are tensors of their own; `dtype` is the one that they must have, if another expert's
    /// have been seen.
    fn separate(
        &self,
        gate: Option<String>,
        up: &str,
        down: &str,
        shape: LayerShape,
        dtype: Option<Dtype>,
    ) -> Result<Expert<'a>> {
        let (hidden, intermediate) = (shape.hidden(), shape.intermediate());
        let gate = gate.map(|gate| self.matrix(&gate, intermediate, hidden, dtype)).transpose()?;
        let dtype = gate.as_ref().map(|gate| gate.1).or(dtype);
        let (up, dtype) = self.matrix(up, intermediate, hidden, dtype)?;
        let (down, _) = self.matrix(down, hidden, intermediate, Some(dtype))?;
        Ok(Expert { gate: gate.map(|gate| gate.0), up, down })
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize, dtype: Option<Dtype>) -> Result<(WeightMatrix<'a>, Dtype)> {
        if dtype == Some(PACKED) || (dtype.is_none() && self.has(&format!("{name}_packed"))?) {
            return Ok((self.packed_matrix(name, rows, cols)?, PACKED));
        }
        if dtype == Some(PACKED_IN_PLACE) {
            return Ok((self.packed_in_place(name, rows, cols)?, PACKED_IN_PLACE));
        }
        let expected = || format!("{} [{rows}, {cols}]", dtype.map_or(WEIGHT_DTYPES.into(), |dtype| dtype.to_string()));
        let tensor = self.tensor(name, expected)?;
        tensor.require_shape(&[rows, cols])?;
        match dtype {
            Some(dtype) if dtype != tensor.dtype => return Err(tensor.wrong_dtype(dtype.to_string())),
            None if weight_format(tensor.dtype).is_none() => return Err(tensor.wrong_dtype(WEIGHT_DTYPES)),
            _ => {}
        }
        let scales = match tensor.dtype {
            Dtype::F8_E4M3 => {
                let scheme = self.checkpoint.config().quantization.scheme()?;
                Some(matrix_scales(&self.scale_tensor(name)?, scheme, rows, cols)?)
            }
            _ => None,
        };
        let matrix = WeightMatrix::new(&tensor, View::whole(rows, cols), scales)?;
        Ok((matrix, tensor.dtype))
    }

    /// The tensor of a weight's scales, by one of its names.
    fn scale_tensor(&self, weight: &str) -> Result<Tensor<'a>> {
        let names = [format!("{weight}_scale_inv"), format!("{weight}_scale"), scale_beside(weight)];
        let expected = || "F32, BF16, F16 or F8_E8M0 scales (the weights are F8_E4M3)".to_owned();
        let mut found = Vec::new();
        for name in &names {
            if self.has(name)? {
                found.push(name);
            }
        }
        match found[..] {
            [first, second, ..] => Err(Error::AmbiguousTensor {
                file: self.checkpoint.config().file.clone(),
                tensor: self.name(first),
                other: self.name(second),
            }),
            [name] => self.tensor(name, expected),
            [] => self.tensor(&names[0], expected),
        }
    }

    /// All experts out of two tensors, `[E, 2 I, H]` and `[E, H, I]` or both transposed.
    fn fused(&self, names: [&str; 2], order: GateUpOrder) -> Result<Vec<Expert<'a>>> {
        let shape = self.block.shape;
        let (hidden, intermediate, count) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        let gate_up = self.weight_tensor(names[0], 2 * intermediate)?;
        let down = self.weight_tensor(names[1], hidden)?;
        if down.dtype != gate_up.dtype {
            return Err(down.wrong_dtype(gate_up.dtype.to_string()));
        }
        let plain = [[count, 2 * intermediate, hidden], [count, hidden, intermediate]];
        let turned = [[count, hidden, 2 * intermediate], [count, intermediate, hidden]];
        // The two shapes are never both the same turned: that would need 2 I = H and H = I.
        let transposed = match (gate_up.shape == turned[0], down.shape == turned[1]) {
            (true, true) if gate_up.shape != plain[0] || down.shape != plain[1] => true,
            _ => {
                let expected = |at: usize| format!("{:?}, or transposed with the other {:?}", plain[at], turned[at]);
                for (at, tensor) in [(0, &gate_up), (1, &down)] {
                    if tensor.shape != plain[at] {
                        return Err(Error::shape(tensor.file, &tensor.name, tensor.shape, expected(at)));
                    }
                }
                false
            }
        };
        let mut scales = match gate_up.dtype {
            Dtype::F8_E4M3 => Some([
                self.fused_scales(names[0], true, transposed, order)?,
                self.fused_scales(names[1], false, transposed, order)?,
            ]),
            _ => None,
        };
        let mut experts = Vec::new();
        for expert in 0..count {
            // Rows of a tensor `[2 I, H]` lie H apart, those of its transpose next to each other.
            let (row, col) = if transposed { (1, 2 * intermediate) } else { (hidden, 1) };
            let (up_start, step) = match order {
                GateUpOrder::Halves => (intermediate * row, row),
                GateUpOrder::Interleaved => (row, 2 * row),
            };
            let len = 2 * intermediate * hidden;
            let gate = View {
                rows: intermediate,
                cols: hidden,
                first: expert * len,
                len,
                start: 0,
                row_stride: step,
                col_stride: col,
            };
            let up = View { start: up_start, ..gate };
            let len = hidden * intermediate;
            let (row_stride, col_stride) = if transposed { (1, hidden) } else { (intermediate, 1) };
            let down_view =
                View { rows: hidden, cols: intermediate, first: expert * len, len, start: 0, row_stride, col_stride };
            let mut take = |tensor: usize, part: usize| {
                scales.as_mut().map(|scales| WeightScales::Block(std::mem::take(&mut scales[tensor][expert][part])))
            };
            experts.push(Expert {
                gate: Some(WeightMatrix::new(&gate_up, gate, take(0, 0))?),
                up: WeightMatrix::new(&gate_up, up, take(0, 1))?,
                down: WeightMatrix::new(&down, down_view, take(1, 0))?,
            });
        }
        Ok(experts)
    }

    /// Block scales of a fused tensor, by expert and part (gate and up, or down), each
    /// `[ceil(R / 128), ceil(C / 128)]`.
    fn fused_scales(
        &self,
        weight: &str,
        is_gate_up: bool,
        transposed: bool,
        order: GateUpOrder,
    ) -> Result<Vec<Vec<Vec<f32>>>> {
        let shape = self.block.shape;
        let (hidden, intermediate, count) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        let config = self.checkpoint.config();
        config.quantization.require_blocks(&self.name(weight))?;
        let tensor = self.scale_tensor(weight)?;
        let [rows, cols] = if is_gate_up { [intermediate, hidden] } else { [hidden, intermediate] };
        let [row_blocks, col_blocks] = [rows, cols].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
        let parts = if is_gate_up { 2 } else { 1 };
        if is_gate_up && !intermediate.is_multiple_of(WEIGHT_BLOCK) {
            // Blocks that count from up's first row and blocks over the joined rows cannot be told apart by their
            // number.
            let expected = "gate and up in tensors of their own, or an intermediate size that 128 divides";
            return Err(Error::shape(tensor.file, &tensor.name, tensor.shape, expected));
        }
        if is_gate_up && order == GateUpOrder::Interleaved {
            let expected = "weights in BF16, F16 or F32 where gate and up are interleaved";
            return Err(Error::shape(tensor.file, &tensor.name, tensor.shape, expected));
        }
        let extents =
            if transposed { [count, col_blocks, parts * row_blocks] } else { [count, parts * row_blocks, col_blocks] };
        tensor.require_shape(&extents)?;
        let values = tensor.to_f32()?;
        let at = |expert: usize, row: usize, col: usize| {
            let (first, second) = if transposed { (col, row) } else { (row, col) };
            values[(expert * extents[1] + first) * extents[2] + second]
        };
        let part = |expert: usize, part: usize| {
            let rows = part * row_blocks..(part + 1) * row_blocks;
            rows.flat_map(|row| (0..col_blocks).map(move |col| (row, col)))
                .map(|(row, col)| at(expert, row, col))
                .collect()
        };
        Ok((0..count).map(|expert| (0..parts).map(|index| part(expert, index)).collect()).collect())
    }

    fn biases(&self, names: [&str; 2], order: GateUpOrder) -> Result<Biases> {
        let shape = self.block.shape;
        let (hidden, intermediate, count) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        let mut w13 = self.floats(names[0], &[&[count, 2 * intermediate]])?;
        let w2 = self.floats(names[1], &[&[count, hidden]])?;
        if order == GateUpOrder::Interleaved {
            for expert in w13.chunks_exact_mut(2 * intermediate) {
                let (gate, up): (Vec<f32>, Vec<f32>) = expert.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
                expert[..intermediate].copy_from_slice(&gate);
                expert[intermediate..].copy_from_slice(&up);
            }
        }
        Ok(Biases { w13, w2 })
    }

    fn shared(&self) -> Result<Option<SharedExpert<'a>>> {
        let (Some(row), Some(width)) = (&self.family.shared, self.block.shared) else { return Ok(None) };
        let hidden = self.block.shape.hidden();
        let shape = self.checkpoint.config().shape(hidden, width, 1, self.block.activation)?;
        let expert = match row.names {
            SharedNames::Separate(prefix, names) => {
                let [gate, up, down] = names.map(|part| format!("{prefix}.{part}.weight"));
                self.separate(Some(gate), &up, &down, shape, None)?
            }
            SharedNames::Ungated(prefix) => {
                let [up, down] = ["up", "down"].map(|part| format!("{prefix}.{part}_proj.weight"));
                self.separate(None, &up, &down, shape, None)?
            }
            SharedNames::Fused([gate_up, down]) => self.fused_shared(gate_up, down, shape)?,
        };
        let gate = row.gate.map(|name| self.floats(name, &[&[1, hidden], &[hidden]])).transpose()?;
        Ok(Some(SharedExpert { shape, expert, gate }))
    }

    /// A shared expert whose gate and up are halves of one matrix.
    fn fused_shared(&self, gate_up: &str, down: &str, shape: LayerShape) -> Result<Expert<'a>> {
        let (hidden, width) = (shape.hidden(), shape.intermediate());
        let tensor = self.tensor(gate_up, || format!("BF16, F16 or F32 [{}, {hidden}]", 2 * width))?;
        tensor.require_shape(&[2 * width, hidden])?;
        if weight_format(tensor.dtype) != Some(WeightFormat::Bf16) {
            return Err(tensor.wrong_dtype("BF16, F16 or F32"));
        }
        let half = View { len: 2 * width * hidden, ..View::whole(width, hidden) };
        Ok(Expert {
            gate: Some(WeightMatrix::new(&tensor, half, None)?),
            up: WeightMatrix::new(&tensor, View { start: width * hidden, ..half }, None)?,
            down: self.matrix(down, hidden, width, Some(tensor.dtype))?.0,
        })
    }

    /// Fails if the block has a tensor that was not read: it could change the numbers.
    fn check_all_read(&self) -> Result<()> {
        let mut prefixes = vec![format!("{}{}.", self.layer_prefix, self.family.block)];
        if let Some(SharedNames::Fused(names)) = self.family.shared.as_ref().map(|shared| shared.names) {
            let folder = |name: &str| name.split_once('.').map_or(name.to_owned(), |(folder, _)| format!("{folder}."));
            prefixes.push(self.name(&folder(names[0])));
        }
        let read = self.read.borrow();
        let unread =
            |name: &&str| prefixes.iter().any(|prefix| name.starts_with(prefix.as_str())) && !read.contains(*name);
        // The first by name, so that the message does not depend on a map's order.
        match self.checkpoint.names()?.into_iter().filter(unread).min() {
            None => Ok(()),
            Some(name) => Err(Error::UnknownTensor {
                file: self.checkpoint.file_of(name).to_owned(),
                tensor: name.to_owned(),
                family: self.family.model_type(),
            }),
        }
    }
}
