//! CPU tensors: weights are packed, calls read hidden states, ids and router weights where they are.

use crate::error::{none_of_dtypes, refused, wrong_dtype};
use crate::operands::{dtype, matrix, require_bf16_values};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Error, Layout, Result, Storage, Tensor, WithDType};
use expertile::cpu::{Cpu, Layer, PackedWeights, PackedWeightsBuilder};
use expertile::{Backend, Dtype, E4m3, Float, LayerConfig, MatrixRef, Routing, TopkIds};
use float8::F8E4M3;
use half::{bf16, f16};
use std::cell::Cell;

/// A tensor on the CPU with its layout.
pub(crate) type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// Adds the matrix `rows` as rows `first_row..` of an expert. Values that bf16 does not hold are refused.
pub(crate) fn add_bf16_rows(
    builder: &mut PackedWeightsBuilder,
    (argument, expert, first_row): (&'static str, usize, usize),
    rows: &Tensor,
) -> Result<()> {
    fn add<T: Float + WithDType>(
        builder: &mut PackedWeightsBuilder,
        (argument, expert, first_row): (&'static str, usize, usize),
        (storage, layout): Operand<'_>,
    ) -> Result<()> {
        let rows = matrix(storage.as_slice::<T>()?, layout)?;
        if storage.dtype() != DType::BF16 {
            require_bf16_values(argument, &rows)?;
        }
        builder.add_bf16_rows(expert, first_row, rows).map_err(Error::wrap)
    }
    let place = (argument, expert, first_row);
    on_cpu(argument, rows, |operand| match operand.0.dtype() {
        DType::BF16 => add::<bf16>(builder, place, operand),
        DType::F16 => add::<f16>(builder, place, operand),
        DType::F32 => add::<f32>(builder, place, operand),
        got => Err(none_of_dtypes(argument, got, "BF16, or F32 or F16 with values that bf16 holds")),
    })
}

/// Adds the matrix `rows` with its block scales (F32) as rows `first_row..` of an expert.
pub(crate) fn add_e4m3_rows(
    builder: &mut PackedWeightsBuilder,
    (argument, expert, first_row): (&'static str, usize, usize),
    rows: &Tensor,
    scales: &Tensor,
) -> Result<()> {
    on_cpu(argument, rows, |(values, layout)| {
        let values = bytemuck::cast_slice::<F8E4M3, E4m3>(values.as_slice()?);
        let rows = matrix(values, layout)?;
        on_cpu(argument, scales, |(scales, layout)| {
            let scales = matrix(scales.as_slice::<f32>()?, layout)?;
            builder.add_e4m3_rows(expert, first_row, rows, scales).map_err(Error::wrap)
        })
    })
}

/// Hands a tensor's storage to `read`.
fn on_cpu<R>(argument: &str, tensor: &Tensor, read: impl FnOnce(Operand<'_>) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => read((storage, layout)),
        _ => Err(refused(argument, format_args!("is on {:?}", tensor.device().location()), "Cpu")),
    }
}

/// A layer of packed weights.
pub(crate) fn prepare(w13: PackedWeights, w2: PackedWeights, config: LayerConfig, max_tokens: usize) -> Result<Layer> {
    Layer::prepare(&Cpu::new(), w13, w2, config, max_tokens).map_err(Error::wrap)
}

/// `[M, H]`, in a storage of its own.
pub(crate) fn forward(
    layer: &Layer,
    hidden_states: Operand<'_>,
    topk_ids: Operand<'_>,
    topk_weights: Operand<'_>,
) -> Result<CpuStorage> {
    match layer.config().input {
        Dtype::Bf16 => with_input::<bf16>(layer, hidden_states, topk_ids, topk_weights),
        Dtype::F16 => with_input::<f16>(layer, hidden_states, topk_ids, topk_weights),
        _ => with_input::<f32>(layer, hidden_states, topk_ids, topk_weights),
    }
}

fn with_input<T: Float + WithDType>(
    layer: &Layer,
    hidden_states: Operand<'_>,
    topk_ids: Operand<'_>,
    topk_weights: Operand<'_>,
) -> Result<CpuStorage> {
    let hidden_states = operand::<T>("hidden_states", hidden_states)?;
    let topk_weights = operand::<f32>("topk_weights", topk_weights)?;
    let topk_ids = ids(layer, topk_ids)?;
    let routing = Routing::new(topk_ids, layer.shape().local_experts(), None).map_err(Error::wrap)?;
    match layer.config().output {
        Dtype::Bf16 => run::<T, bf16>(layer, hidden_states, &routing, topk_weights),
        Dtype::F16 => run::<T, f16>(layer, hidden_states, &routing, topk_weights),
        _ => run::<T, f32>(layer, hidden_states, &routing, topk_weights),
    }
}

fn run<T: Float, O: Float + WithDType>(
    layer: &Layer,
    hidden_states: MatrixRef<'_, T>,
    routing: &Routing<'_>,
    topk_weights: MatrixRef<'_, f32>,
) -> Result<CpuStorage> {
    let cpu = layer.cpu();
    let bytes = layer.workspace_bytes(routing.tokens()).map_err(Error::wrap)?;
    let mut output = cpu.allocate::<O>(routing.tokens() * layer.shape().hidden()).map_err(Error::wrap)?;
    let mut workspace = WORKSPACE.take();
    if workspace.len() < bytes {
        workspace = cpu.allocate(bytes).map_err(Error::wrap)?;
    }
    let done = layer.run(hidden_states, routing, topk_weights, &mut workspace, &mut output);
    WORKSPACE.set(workspace);
    done.map_err(Error::wrap)?;
    Ok(O::to_cpu_storage_owned(output))
}

thread_local! {
    /// The workspace of this thread's largest call so far, for every layer. Taken out during a call: what rayon runs on
    /// this thread meanwhile may call a layer, too.
    static WORKSPACE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

fn operand<'a, T: WithDType>(argument: &'static str, (storage, layout): Operand<'a>) -> Result<MatrixRef<'a, T>> {
    let got = storage.dtype();
    if got != T::DTYPE {
        return Err(wrong_dtype(argument, got, T::DTYPE));
    }
    matrix(storage.as_slice()?, layout)
}

/// Ids of the type that the layer was prepared for. candle's own are U32: the same bits as I32 below 2^31, and an
/// error from there on, where I32 would mean an empty slot.
fn ids<'a>(layer: &Layer, (storage, layout): Operand<'a>) -> Result<TopkIds<'a>> {
    let prepared = layer.config().ids;
    match (storage.dtype(), prepared) {
        (DType::U32, Dtype::I32) => {
            let ids = matrix(bytemuck::cast_slice::<u32, i32>(storage.as_slice()?), layout)?;
            let slots = (0..ids.rows()).flat_map(|token| (0..ids.cols()).map(move |slot| (token, slot)));
            for (token, slot) in slots {
                let id = i64::from(ids.get(token, slot).cast_unsigned());
                let limit = layer.shape().local_experts();
                if id > i64::from(i32::MAX) {
                    return Err(Error::wrap(expertile::Error::ExpertId { token, slot, id, limit }));
                }
            }
            Ok(ids.into())
        }
        (DType::I32, Dtype::I32) => Ok(matrix(storage.as_slice::<i32>()?, layout)?.into()),
        (DType::I64, Dtype::I64) => Ok(matrix(storage.as_slice::<i64>()?, layout)?.into()),
        (got, Dtype::I32) => Err(none_of_dtypes("topk_ids", got, "U32 or I32, as prepared")),
        (got, _) => Err(wrong_dtype("topk_ids", got, dtype(prepared)?)),
    }
}
