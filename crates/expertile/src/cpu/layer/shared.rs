//! The expert that every token visits: a dense MLP of its own width, with a gate of its own if it has one.

use super::{Buffers, fit};
use crate::activation::{Activation, sigmoid};
use crate::cpu::Cpu;
use crate::cpu::arch::multiversion;
use crate::cpu::gemm::PackedWeights;
use crate::cpu::unpermute::SharedRows;
use crate::cpu::workspace::{Carver, Sizing};
use crate::dtype::Float;
use crate::error::{Error, Result, checked_add, checked_mul, require_exact};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::layer::{LayerConfig, LayerShape, StageCost, shared_cost};
use crate::layout::Layout;
use crate::matrix::MatrixRef;
use half::bf16;
use rayon::prelude::*;
use std::sync::Arc;

/// An expert that every token visits.
#[derive(Debug)]
pub struct SharedExpert {
    /// `[1, 2 Is, H]`, gate's rows first (`[1, Is, H]` where the layer's activation has no gate); `Is` is its own.
    pub w13: PackedWeights,
    /// `[1, H, Is]`.
    pub w2: PackedWeights,
    /// `[H]`: what the expert says to token `x` is multiplied by `sigmoid(x . gate)`, all in f32.
    pub gate: Option<Vec<f32>>,
}

/// A shared expert that fits its layer.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) shape: LayerShape,
    pub(super) activations: ActivationFormat,
    expert: Arc<SharedExpert>,
}

/// What a call's workspace holds for it.
pub(super) struct SharedSpace<'a> {
    layout: &'a mut [i32],
    gates: &'a mut [f32],
    rows: &'a mut [bf16],
}

/// Integers of a layout that has `tokens` rows of one expert.
fn layout_len(tokens: usize) -> Result<usize> {
    checked_add("layout of the shared expert", tokens, 3)
}

impl Shared {
    pub(super) fn new(expert: Arc<SharedExpert>, layer: &LayerShape, config: &LayerConfig) -> Result<Self> {
        let SharedExpert { w13, w2, gate } = &*expert;
        let activations = match w13.format() {
            WeightFormat::E4m3 | WeightFormat::Mxfp4 | WeightFormat::Int4 => config.activation_format,
            WeightFormat::Bf16 => ActivationFormat::Bf16,
        };
        let (hidden, w2_shape) = (layer.hidden(), [w2.experts(), w2.n(), w2.k()]);
        if w2.experts() != 1 || w2.n() != hidden {
            let expected = format!("[1, {hidden}, I], for one expert of the layer's H");
            return Err(Error::shape("shared w2", &w2_shape, expected));
        }
        let shape = fit(w13, w2, &config.activation, activations)?;
        if let Some(gate) = gate {
            require_exact("shared gate", gate.len(), &[hidden])?;
        }
        Ok(Self { shape, activations, expert })
    }

    /// The same expert in a layer of another configuration.
    pub(super) fn with_config(&self, layer: &LayerShape, config: &LayerConfig) -> Result<Self> {
        Self::new(self.expert.clone(), layer, config)
    }

    pub(super) fn size(&self, sizing: Sizing, tokens: usize) -> Result<Sizing> {
        let rows = checked_mul("M * H", tokens, self.shape.hidden())?;
        sizing.add::<i32>(layout_len(tokens)?)?.add::<f32>(tokens)?.add::<bf16>(rows)
    }

    /// Takes what [`Shared::size`] counted.
    pub(super) fn carve<'a>(&self, carver: &mut Carver<'a>, tokens: usize) -> SharedSpace<'a> {
        SharedSpace {
            layout: carver.take(tokens + 3),
            gates: carver.take(tokens),
            rows: carver.take(tokens * self.shape.hidden()),
        }
    }

    pub(super) fn cost(&self, tokens: usize, input_bytes: usize) -> StageCost {
        shared_cost(&self.shape, tokens, self.expert.w13.format(), self.activations, input_bytes)
    }

    /// All tokens through the expert.
    pub(super) fn run<'s, T: Float>(
        &self,
        cpu: &Cpu,
        activation: &Activation,
        x: MatrixRef<'_, T>,
        buffers: &mut Buffers<'_>,
        space: SharedSpace<'s>,
    ) -> Result<SharedRows<'s, bf16>> {
        let (tokens, hidden) = (x.rows(), self.shape.hidden());
        let SharedSpace { layout, gates, rows } = space;
        let end = i32::try_from(tokens)
            .map_err(|_| Error::Overflow { what: "M", detail: format!("{tokens} > {}", i32::MAX) })?;
        let layout = &Layout::from_psum(&[end], 1, tokens, layout)?;
        let SharedExpert { w13, w2, gate } = &*self.expert;
        buffers.take(cpu, layout, self.activations, x)?;
        buffers.multiply(cpu, layout, self.activations, (w13, None), None)?;
        buffers.activate(cpu, layout, self.activations, self.shape.intermediate(), activation)?;
        buffers.multiply(cpu, layout, self.activations, (w2, None), Some(&mut *rows))?;
        if let Some(gate) = gate {
            cpu.install(|| {
                let all = gates.par_iter_mut().enumerate().with_min_len(16);
                all.for_each(|(token, out)| *out = sigmoid(dot(cpu.isa(), x, token, gate)));
            });
        }
        Ok(SharedRows { rows: MatrixRef::new(rows, tokens, hidden)?, weights: gate.as_ref().map(|_| &*gates) })
    }
}

/// Sums of products side by side: as many as the widest registers hold.
const LANES: usize = 16;

/// Columns widened to f32 at a time, a multiple of [`LANES`].
const COLUMNS: usize = 256;

multiversion! {
    /// `x[token] . gate` in f32: products and sums rounded one by one, column `c` onto sum `c % LANES`, the sums then
    /// added in order. The same bits on every instruction set, whatever the strides.
    fn dot<T: Float>(isa: Isa, x: MatrixRef<'_, T>, token: usize, gate: &[f32]) -> f32 {
        let mut sums = [0.0f32; LANES];
        let mut widened = [0.0f32; COLUMNS];
        for (block, gate) in gate.chunks(COLUMNS).enumerate() {
            let first = block * COLUMNS;
            match x.row(token) {
                Some(row) => {
                    widened.iter_mut().zip(&row[first..][..gate.len()]).for_each(|(to, from)| *to = from.to_f32());
                }
                None => {
                    for (offset, to) in widened[..gate.len()].iter_mut().enumerate() {
                        *to = x.get(token, first + offset).to_f32();
                    }
                }
            }
            for (values, gate) in widened[..gate.len()].chunks(LANES).zip(gate.chunks(LANES)) {
                for ((sum, value), gate) in sums.iter_mut().zip(values).zip(gate) {
                    *sum += value * gate;
                }
            }
        }
        sums.iter().sum()
    }
}
