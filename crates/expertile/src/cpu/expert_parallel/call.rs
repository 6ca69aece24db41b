//! A call under way: the parts of its workspace, and its stages.
//!
//! Nothing here runs inside the thread pool while it waits for other ranks: ranks of one process may share a pool.

use super::{ExpertParallelLayer, ParallelStageDone};
use crate::combine::Combine;
use crate::cpu::dispatch::{Received, pack, pick};
use crate::cpu::unpermute::reduce;
use crate::cpu::workspace::Carver;
use crate::dispatch::Dispatch;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::expert_parallel::ParallelStage;
use crate::expert_parallel::meeting::meet;
use crate::expert_parallel::routes::Routes;
use crate::matrix::MatrixRef;
use crate::routing::Routing;
use half::bf16;
use std::time::Instant;

/// A rank's operands, checked.
pub(super) struct Inputs<'a, T> {
    pub(super) hidden_states: MatrixRef<'a, T>,
    /// Over the placement's experts.
    pub(super) routing: Routing<'a>,
    pub(super) topk_weights: MatrixRef<'a, f32>,
}

/// A call after its meeting.
pub(super) struct Call<'a, T> {
    layer: &'a ExpertParallelLayer,
    inputs: Inputs<'a, T>,
    routes: Routes<'a>,
    /// `[R]`: token rows that come from each rank.
    rows_in: Vec<usize>,
    buffers: Buffers<'a>,
    clock: Clock<'a>,
}

/// The parts of the workspace behind the routes, in the order in which they were sized.
struct Buffers<'a> {
    /// `[M, topk]` or `[M, R]`: where the terms of a token's sum stand in `back`.
    inv_perm: &'a mut [i32],
    /// Own tokens.
    packed: &'a mut [u8],
    /// Own tokens, by rank.
    picked: &'a mut [u8],
    /// Tokens of all ranks.
    received: &'a mut [u8],
    /// The workspace of the local experts, then of the shared one.
    experts: &'a mut [u8],
    /// What the local experts say, by rank.
    out: &'a mut [u8],
    /// What all ranks' experts say to own tokens.
    back: &'a mut [u8],
}

/// Times the stages, and tells about them.
struct Clock<'a> {
    rank: usize,
    started: Instant,
    observe: &'a mut dyn FnMut(&ParallelStageDone),
}

impl Clock<'_> {
    /// `sent[r]` and `received[r]` are bytes; a rank's own do not travel.
    fn done(&mut self, stage: ParallelStage, sent: &[usize], received: &[usize], row_bytes: usize) {
        let travelled = |rows: &[usize]| {
            let others = rows.iter().enumerate().filter(|&(rank, _)| rank != self.rank);
            others.map(|(_, &rows)| (rows * row_bytes) as u64).sum()
        };
        let (sent, received) = (travelled(sent), travelled(received));
        (self.observe)(&ParallelStageDone { stage, elapsed: self.started.elapsed(), sent, received });
        self.started = Instant::now();
    }
}

impl<'a, T: Float> Call<'a, T> {
    /// Routes and meeting. Whether operands were refused, here or elsewhere, all ranks know when it returns.
    pub(super) fn begin(
        layer: &'a ExpertParallelLayer,
        number: u64,
        inputs: Result<Inputs<'a, T>>,
        workspace: &'a mut [u8],
        observe: &'a mut dyn FnMut(&ParallelStageDone),
    ) -> Result<Self> {
        let exchange = &*layer.exchange;
        let mut clock = Clock { rank: exchange.rank(), started: Instant::now(), observe };
        let carved = inputs.and_then(|inputs| {
            let (routes, buffers) = carve(layer, &inputs.routing, workspace)?;
            Ok((inputs, routes, buffers))
        });
        let rows_out = match &carved {
            Ok((_, routes, _)) => routes.rows_out(),
            Err(_) => vec![0; exchange.ranks()],
        };
        let rows_in = meet(exchange, (layer.number, number), carved.as_ref().err(), &rows_out)?;
        let (inputs, routes, buffers) = carved?;
        let (capacity, bytes) = (layer.choice.capacity, layer.choice.token_row.bytes());
        if let Some(rank) = rows_in.iter().position(|&rows| rows > capacity) {
            // It has told this rank what it would have refused itself: it is no rank of this layer.
            return Err(Error::Message {
                rank,
                actual: rows_in[rank].saturating_mul(bytes),
                expected: capacity * bytes,
            });
        }
        clock.done(ParallelStage::Meeting, &[], &[], 0);
        Ok(Self { layer, inputs, routes, rows_in, buffers, clock })
    }

    /// Own tokens out, all ranks' tokens in.
    pub(super) fn dispatch(&mut self) -> Result<()> {
        let ExpertParallelLayer { layer, choice, exchange, .. } = self.layer;
        let (row, cpu, routes) = (&choice.token_row, layer.cpu(), &self.routes);
        let Inputs { hidden_states, topk_weights, .. } = self.inputs;
        let on_input = layer.config().weight_on_input;
        let weights = (choice.combine == Combine::Sums && !on_input).then_some(topk_weights);
        let packed = &mut self.buffers.packed[..routes.own_tokens() * row.bytes()];
        pack(cpu, row, hidden_states, on_input.then_some(topk_weights), routes.copies(), weights, packed);
        let rows_out = routes.rows_out();
        let send = match choice.dispatch {
            Dispatch::Gather => vec![&*packed; choice.ranks],
            Dispatch::Routed => {
                let picked = &mut self.buffers.picked[..routes.tokens().len() * row.bytes()];
                pick(cpu, row, packed, routes.tokens(), picked);
                split(picked, &rows_out, row.bytes())
            }
        };
        exchange.all_to_all_v(&send, &mut split_mut(self.buffers.received, &self.rows_in, row.bytes()))?;
        self.clock.done(ParallelStage::Dispatch, &rows_out, &self.rows_in, row.bytes());
        Ok(())
    }

    /// The local experts over what came. Returns how many of their rows go to each rank.
    pub(super) fn experts(&mut self) -> Result<Vec<usize>> {
        let ExpertParallelLayer { layer, choice, copy_map, .. } = self.layer;
        let Buffers { received, experts, out, .. } = &mut self.buffers;
        let tokens: usize = self.rows_in.iter().sum();
        let received = Received::new(choice.token_row, &received[..tokens * choice.token_row.bytes()]);
        let routing = Routing::new(received.copies()?, layer.shape().local_experts(), Some(copy_map))?;
        let rows_out = match choice.combine {
            Combine::Rows => {
                layer.run_slots(received.rows()?, &routing, experts, bytemuck::cast_slice_mut(out))?;
                live_slots(&routing, &self.rows_in)
            }
            Combine::Sums => {
                let out = bytemuck::cast_slice_mut(out);
                layer.run_sums(received.rows()?, &routing, received.weights()?, experts, out)?;
                self.rows_in.clone()
            }
        };
        self.clock.done(ParallelStage::Experts, &[], &[], 0);
        Ok(rows_out)
    }

    /// The experts' rows out, what all ranks' experts say to own tokens in.
    pub(super) fn combine(&mut self, rows_out: &[usize]) -> Result<()> {
        let choice = &self.layer.choice;
        let (rows_back, bytes) = (self.routes.rows_back(choice.combine), choice.combine_row_bytes);
        let send = split(self.buffers.out, rows_out, bytes);
        self.layer.exchange.all_to_all_v(&send, &mut split_mut(self.buffers.back, &rows_back, bytes))?;
        self.clock.done(ParallelStage::Combine, rows_out, &rows_back, bytes);
        Ok(())
    }

    /// The shared expert, and the sum of every own token.
    pub(super) fn unpermute<O: Float>(mut self, output: &mut [O]) -> Result<()> {
        let ExpertParallelLayer { layer, choice, .. } = self.layer;
        let Buffers { inv_perm, experts, back, .. } = self.buffers;
        let Inputs { hidden_states, topk_weights, .. } = self.inputs;
        let (tokens, hidden, cpu) = (self.routes.own_tokens(), layer.shape().hidden(), layer.cpu());
        let shared = layer.run_shared(hidden_states, experts)?;
        self.routes.write_inv_perm(choice.combine, inv_perm);
        let rows: usize = self.routes.rows_back(choice.combine).iter().sum();
        let back = &back[..rows * choice.combine_row_bytes];
        let terms = (tokens, Routes::terms(choice.combine, layer.config().topk, choice.ranks));
        match choice.combine {
            Combine::Rows => {
                let weights = (!layer.config().weight_on_input).then_some(topk_weights);
                let rows = MatrixRef::<bf16>::new(bytemuck::cast_slice(back), rows, hidden)?;
                reduce(cpu, rows, inv_perm, terms, weights, shared, output)?;
            }
            Combine::Sums => {
                let rows = MatrixRef::<f32>::new(bytemuck::cast_slice(back), rows, hidden)?;
                reduce(cpu, rows, inv_perm, terms, None, shared, output)?;
            }
        }
        self.clock.done(ParallelStage::Unpermute, &[], &[], 0);
        Ok(())
    }
}

fn carve<'a>(
    layer: &'a ExpertParallelLayer,
    routing: &Routing<'_>,
    workspace: &'a mut [u8],
) -> Result<(Routes<'a>, Buffers<'a>)> {
    let ExpertParallelLayer { parallel, choice, exchange, .. } = layer;
    let sizes = layer.sizes(routing.tokens())?;
    let mut carver = Carver::new(workspace, sizes.sizing()?.bytes())?;
    let space = carver.take(sizes.routes);
    let routes = Routes::new(routing, &parallel.placement, exchange.rank(), choice.dispatch, space);
    let buffers = Buffers {
        inv_perm: carver.take(sizes.inv_perm),
        packed: carver.take(sizes.packed),
        picked: carver.take(sizes.picked),
        received: carver.take(sizes.received),
        experts: carver.take(sizes.experts),
        out: carver.take(sizes.out),
        back: carver.take(sizes.back),
    };
    Ok((routes, buffers))
}

/// `[R]`: live slots among the tokens of each rank.
fn live_slots(routing: &Routing<'_>, tokens: &[usize]) -> Vec<usize> {
    let mut slots = routing.slots();
    tokens.iter().map(|&tokens| slots.by_ref().take(tokens * routing.topk()).flatten().count()).collect()
}

fn split<'s>(bytes: &'s [u8], rows: &[usize], row_bytes: usize) -> Vec<&'s [u8]> {
    let mut rest = bytes;
    let part = |&rows: &usize| {
        let (part, others) = rest.split_at(rows * row_bytes);
        rest = others;
        part
    };
    rows.iter().map(part).collect()
}

fn split_mut<'s>(bytes: &'s mut [u8], rows: &[usize], row_bytes: usize) -> Vec<&'s mut [u8]> {
    let mut rest = bytes;
    let part = |&rows: &usize| {
        let (part, others) = std::mem::take(&mut rest).split_at_mut(rows * row_bytes);
        rest = others;
        part
    };
    rows.iter().map(part).collect()
}
