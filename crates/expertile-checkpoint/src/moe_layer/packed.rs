//! 4-bit weights: MXFP4 and int4, by their several names.

use super::reader::Reader;
use crate::error::{Error, Result};
use crate::family::ExpertNames;
use crate::matrix::{HalfScales, WeightMatrix};
use expertile::{MatrixRef, int4, mxfp4};
use half::{bf16, f16};
use safetensors::Dtype;

/// The dtype of packed 4-bit weights.
pub(super) const PACKED: Dtype = Dtype::U8;
/// The same, of weights under a name without an ending (DeepSeek-V4).
pub(super) const PACKED_IN_PLACE: Dtype = Dtype::I8;
/// Those of their scales: exponents.
pub(super) const SCALE_DTYPES: &[Dtype] = &[Dtype::U8, Dtype::F8_E8M0];

/// The name of a weight's scales where it has no ending: `w1.scale` of `w1.weight`.
pub(super) fn scale_beside(weight: &str) -> String {
    format!("{}scale", weight.strip_suffix("weight").unwrap_or(weight))
}

impl<'a> Reader<'a, '_> {
    /// The name under which a weight stands as packed 4-bit values, if it does.
    pub(super) fn packed_name(&self, names: &ExpertNames, weight: &str) -> Result<Option<String>> {
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
    pub(super) fn bytes(&self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Result<&'a [u8]> {
        let expected = || dtypes.iter().map(Dtype::to_string).collect::<Vec<_>>().join(" or ");
        let tensor = self.tensor(name, || format!("{} {shape:?}", expected()))?;
        if !dtypes.contains(&tensor.dtype) {
            return Err(tensor.wrong_dtype(expected()));
        }
        tensor.require_shape(shape)?;
        Ok(tensor.bytes)
    }

    /// Groups of 32 to a row of `cols` weights called `name`.
    pub(super) fn groups(&self, name: &str, cols: usize) -> Result<usize> {
        let failed = |source| Error::Pack { what: self.name(name), source };
        mxfp4::groups(cols).map_err(failed)
    }

    /// A matrix of its own as packed 4-bit values: MXFP4, or int4 if the config says so.
    pub(super) fn packed_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix<'a>> {
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
    pub(super) fn packed_int4(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix<'a>> {
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
    pub(super) fn packed_in_place(&self, name: &str, rows: usize, cols: usize) -> Result<WeightMatrix<'a>> {
        self.checkpoint.config().quantization.require_fp4_experts()?;
        let groups = self.groups(name, cols)?;
        let blocks = self.bytes(name, &[PACKED_IN_PLACE], &[rows, cols / 2])?;
        let scales = self.bytes(&scale_beside(name), SCALE_DTYPES, &[rows, groups])?;
        self.mxfp4_matrix(name, blocks, scales, [rows, cols])
    }

    pub(super) fn mxfp4_matrix(
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
}
