//! Weight matrices that are tensors of their own, and their scales.

use super::Expert;
use super::packed::{PACKED, PACKED_IN_PLACE, scale_beside};
use super::reader::Reader;
use crate::error::{Error, Result};
use crate::matrix::{View, WEIGHT_DTYPES, WeightMatrix, matrix_scales, weight_format};
use crate::tensors::Tensor;
use expertile::layer::LayerShape;
use safetensors::Dtype;

impl<'a> Reader<'a, '_> {
    /// A weight tensor, whatever its shape; `rows` describes it in case there is none.
    pub(super) fn weight_tensor(&self, name: &str, rows: usize) -> Result<Tensor<'a>> {
        let tensor = self.tensor(name, || format!("{WEIGHT_DTYPES} [{rows}, ..]"))?;
        let may_be_packed = self.family.fixed.iter().any(|(key, _)| *key == "expert_dtype");
        if weight_format(tensor.dtype).is_none() && !(may_be_packed && tensor.dtype == PACKED_IN_PLACE) {
            return Err(tensor.wrong_dtype(WEIGHT_DTYPES));
        }
        Ok(tensor)
    }

    /// An expert whose matrices are tensors of their own; `dtype` is the one that they must have, if another expert's
    /// have been seen.
    pub(super) fn separate(
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

    pub(super) fn matrix(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        dtype: Option<Dtype>,
    ) -> Result<(WeightMatrix<'a>, Dtype)> {
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
    pub(super) fn scale_tensor(&self, weight: &str) -> Result<Tensor<'a>> {
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
}
