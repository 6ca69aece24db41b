//! Weights of all experts in two tensors.

use super::Expert;
use super::packed::{PACKED, SCALE_DTYPES};
use super::reader::Reader;
use crate::error::{Error, Result};
use crate::matrix::{View, WeightMatrix, WeightScales, weight_format};
use expertile::gemm::WEIGHT_BLOCK;
use expertile::layer::LayerShape;
use expertile::{GateUpOrder, MatrixRef, WeightFormat, mxfp4};
use safetensors::Dtype;

impl<'a> Reader<'a, '_> {
    /// All experts out of two tensors, `[E, 2 I, H]` and `[E, H, I]` or both transposed.
    pub(super) fn fused(&self, names: [&str; 2], order: GateUpOrder) -> Result<Vec<Expert<'a>>> {
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
    pub(super) fn fused_scales(
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

    /// All experts out of MXFP4 blocks `[E, 2 I, H / 32, 16]` and `[E, H, I / 32, 16]` and their scales, which lack the
    /// last axis.
    pub(super) fn fused_mxfp4(&self, names: [&str; 2], order: GateUpOrder) -> Result<Vec<Expert<'a>>> {
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

    /// A shared expert whose gate and up are halves of one matrix.
    pub(super) fn fused_shared(&self, gate_up: &str, down: &str, shape: LayerShape) -> Result<Expert<'a>> {
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
}
