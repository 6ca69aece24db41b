//! Finds and checks the tensors of one layer: the router, the experts by their names, the shared one.

use super::packed::PACKED;
use super::{Biases, Expert, SharedExpert};
use crate::checkpoint::Checkpoint;
use crate::config::BlockConfig;
use crate::error::{Error, Result};
use crate::family::{ExpertNames, Family, SharedNames};
use crate::ids::Ids;
use crate::matrix::WEIGHT_DTYPES;
use crate::tensors::Tensor;
use expertile::{GateUpOrder, Router};
use std::cell::RefCell;
use std::collections::HashSet;

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

/// Finds and checks the tensors of one layer.
pub(super) struct Reader<'a, 'c> {
    pub(super) checkpoint: &'a Checkpoint<'c>,
    pub(super) family: &'static Family,
    pub(super) block: BlockConfig,
    /// `model.layers.7.`
    layer_prefix: String,
    /// Names that were read; any other tensor of the block is an error.
    read: RefCell<HashSet<String>>,
    /// Of these, the routed experts' weights.
    expert_weights: RefCell<HashSet<String>>,
}

impl<'a, 'c> Reader<'a, 'c> {
    /// Finds out where the layer's tensors are, by the router's weight.
    pub(super) fn find(checkpoint: &'a Checkpoint<'c>, block: BlockConfig, layer: usize) -> Result<Self> {
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
    pub(super) fn name(&self, name: &str) -> String {
        match name.strip_prefix('/') {
            Some(of_layer) => format!("{}{of_layer}", self.layer_prefix),
            None => format!("{}{}.{name}", self.layer_prefix, self.family.block),
        }
    }

    pub(super) fn has(&self, name: &str) -> Result<bool> {
        self.checkpoint.has(&self.name(name))
    }

    /// The tensor of that name, from now on known to have been read.
    pub(super) fn tensor(&self, name: &str, expected: impl Fn() -> String) -> Result<Tensor<'a>> {
        let name = self.name(name);
        let tensor = self.checkpoint.tensor(&name, expected)?;
        self.read.borrow_mut().insert(name);
        Ok(tensor)
    }

    /// A tensor of floats in one of these shapes.
    pub(super) fn floats(&self, name: &str, shapes: &[&[usize]]) -> Result<Vec<f32>> {
        let expected = || shapes.iter().map(|shape| format!("{shape:?}")).collect::<Vec<_>>().join(" or ");
        let tensor = self.tensor(name, || format!("BF16, F16 or F32 {}", expected()))?;
        if !shapes.contains(&tensor.shape) {
            return Err(Error::shape(tensor.file, &tensor.name, tensor.shape, expected()));
        }
        tensor.to_f32()
    }

    pub(super) fn router(&self) -> Result<(Router, Vec<f32>)> {
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

    pub(super) fn token_experts(&self) -> Result<Option<Ids>> {
        let Some(name) = self.block.token_table else { return Ok(None) };
        let topk = self.block.router.topk;
        let tensor = self.tensor(name, || format!("I32 or I64 [vocabulary, {topk}]"))?;
        let vocabulary = self.checkpoint.config().vocabulary()?.unwrap_or(tensor.shape.first().copied().unwrap_or(0));
        tensor.require_shape(&[vocabulary, topk])?;
        Ids::from_tensor(&tensor).map(Some)
    }

    /// Notes that what was read since `before` are weights of routed experts.
    pub(super) fn note_expert_weights(&self, before: &HashSet<String>) {
        let weights = self.read.borrow().difference(before).cloned().collect();
        self.expert_weights.replace(weights);
    }

    /// Names that were read and are not the routed experts' weights, sorted.
    pub(super) fn other_tensors(&self) -> Vec<String> {
        let mut names: Vec<_> = self.read.borrow().difference(&self.expert_weights.borrow()).cloned().collect();
        names.sort_unstable();
        names
    }

    pub(super) fn experts(&self) -> Result<(Vec<Expert<'a>>, Option<Biases>)> {
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

    pub(super) fn biases(&self, names: [&str; 2], order: GateUpOrder) -> Result<Biases> {
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

    pub(super) fn shared(&self) -> Result<Option<SharedExpert<'a>>> {
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

    /// Fails if the block has a tensor that was not read: it could change the numbers.
    pub(super) fn check_all_read(&self) -> Result<()> {
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
