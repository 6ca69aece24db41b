//! One layer's experts in another format, as a checkpoint of its own that this crate reads.
//!
//! | format | experts | `quantization_config` |
//! |---|---|---|
//! | e4m3 | `<weight>` with `<weight>_scale_inv`, blocks of 128 x 128 | `fp8` |
//! | MXFP4 | `<weight>_packed` with `<weight>_scale` | `compressed-tensors`, `mxfp4-pack-quantized` |
//! | int4 | `<weight>_packed` with `<weight>_scale` in BF16 and `<weight>_shape` | `compressed-tensors`, `pack-quantized` |
//! | MXFP4, families of fused experts (gpt-oss) | `<weight>_blocks` with `<weight>_scales` | `mxfp4` |
//!
//! What else belongs to the block is copied: the router, biases, the shared expert.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::family::ExpertNames;
use crate::matrix::WeightMatrix;
use crate::moe_layer::MoeLayer;
use expertile::gemm::WEIGHT_BLOCK;
use expertile::quantize::quantize_blocks;
use expertile::{E4m3, GateUpOrder, WeightFormat, int4, mxfp4};
use half::bf16;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::io::{self, Write};

/// A matrix in another format, as its tensors hold it.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedMatrix {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// e4m3 `[rows, cols]`, or MXFP4's and int4's `[rows, cols / 2]`.
    pub values: Vec<u8>,
    /// Little-endian f32 `[ceil(rows / 128), ceil(cols / 128)]`, or MXFP4's `[rows, cols / 32]`, or as many of bf16 for
    /// int4.
    pub scales: Vec<u8>,
}

/// The matrices of one expert in another format.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedExpert {
    /// As [`crate::Expert::gate`].
    pub gate: Option<QuantizedMatrix>,
    /// As [`crate::Expert::up`].
    pub up: QuantizedMatrix,
    /// As [`crate::Expert::down`].
    pub down: QuantizedMatrix,
}

impl WeightMatrix<'_> {
    /// The matrix in another format: rounded to nearest even, e4m3 with the exact scale of each 128 x 128 block, MXFP4
    /// with the OCP's, int4 with the largest magnitude of 32 over 7 in bf16.
    ///
    /// # Errors
    /// [`expertile::Error::Value`] for 4 bits unless 32 divides the columns, [`expertile::Error::Parameter`] for a value
    /// that is not finite, [`expertile::Error::WeightFormat`] for bf16, which is no quantized format.
    pub fn quantize(&self, format: WeightFormat) -> expertile::Result<QuantizedMatrix> {
        let (rows, cols) = (self.rows(), self.cols());
        let mut row = vec![0.0; cols];
        let mut values = Vec::with_capacity(rows * cols);
        for index in 0..rows {
            self.write_row(index, &mut row);
            // f32 holds every bf16, f16 and f32 value.
            values.extend(row.iter().map(|&value| value as f32));
        }
        if let Some(&actual) = values.iter().find(|value| !value.is_finite()) {
            return Err(expertile::Error::Parameter { argument: "weight", actual, expected: "a finite number" });
        }
        let (values, scales) = match format {
            WeightFormat::E4m3 => {
                let mut bytes = vec![E4m3(0); values.len()];
                let mut scales = vec![0.0; rows.div_ceil(WEIGHT_BLOCK) * cols.div_ceil(WEIGHT_BLOCK)];
                quantize_blocks(&values, rows, cols, &mut bytes, &mut scales)?;
                (bytemuck::cast_vec(bytes), scales.into_iter().flat_map(f32::to_le_bytes).collect())
            }
            WeightFormat::Mxfp4 => {
                let groups = mxfp4::groups(cols)?;
                let (mut blocks, mut scales) = (vec![0; values.len() / 2], vec![0; rows * groups]);
                mxfp4::quantize_rows(&values, cols, &mut blocks, &mut scales)?;
                (blocks, scales)
            }
            WeightFormat::Int4 => {
                let groups = int4::groups(cols)?;
                let (mut blocks, mut scales) = (vec![0; values.len() / 2], vec![bf16::ZERO; rows * groups]);
                int4::quantize_rows(&values, cols, &mut blocks, &mut scales)?;
                (blocks, scales.into_iter().flat_map(bf16::to_le_bytes).collect())
            }
            WeightFormat::Bf16 => {
                let (argument, actual) = ("weights", format.name());
                return Err(expertile::Error::WeightFormat { argument, actual, expected: "e4m3, mxfp4 or int4" });
            }
        };
        Ok(QuantizedMatrix { rows, cols, values, scales })
    }
}

/// A tensor on its way into a file.
struct NewTensor<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

/// A layer whose experts are written in another format.
#[derive(Debug)]
pub struct QuantizedLayer<'a, 'c> {
    checkpoint: &'a Checkpoint<'c>,
    layer: &'a MoeLayer<'a>,
    format: WeightFormat,
    names: &'static ExpertNames,
}

impl<'a, 'c> QuantizedLayer<'a, 'c> {
    /// `layer` of that checkpoint in `format`.
    ///
    /// # Errors
    /// [`Error::Format`] if the layer's weights are quantized already, or if its family has no names for experts of
    /// that format.
    pub fn new(checkpoint: &'a Checkpoint<'c>, layer: &'a MoeLayer<'a>, format: WeightFormat) -> Result<Self> {
        let file = &checkpoint.config().file;
        let shared = layer.shared().map_or(WeightFormat::Bf16, crate::SharedExpert::weight_format);
        for (part, found, dtype) in [
            ("the experts' dtype", layer.weight_format(), layer.weight_dtype()),
            ("the shared expert's dtype", shared, shared.name()),
        ] {
            if found != WeightFormat::Bf16 {
                return Err(Error::format(file, part, dtype, "BF16, F16 or F32, to be quantized"));
            }
        }
        let family = checkpoint.family();
        let each = family.experts.iter().find(|names| matches!(names, ExpertNames::Each { .. }));
        let names = match (each, format) {
            (Some(names), WeightFormat::E4m3 | WeightFormat::Mxfp4 | WeightFormat::Int4) => names,
            (None, WeightFormat::Mxfp4) => &family.experts[0],
            _ => {
                let expected = format!("another format for {}, which has no names for it", family.model_type());
                return Err(Error::format(file, "the new format", format.name(), expected));
            }
        };
        Ok(Self { checkpoint, layer, format, names })
    }

    /// The text of its `config.json`: the checkpoint's, with another `quantization_config`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], if the file has changed since.
    pub fn config(&self) -> Result<String> {
        let mut config = self.checkpoint.config_json()?;
        if let Some(Value::Object(inner)) = config.get_mut("text_config") {
            inner.remove("quantization_config");
        }
        config["quantization_config"] = match (self.format, self.names) {
            (WeightFormat::Mxfp4, ExpertNames::Fused { .. }) => json!({"quant_method": "mxfp4"}),
            (WeightFormat::Mxfp4, ExpertNames::Each { .. }) => packed_config("mxfp4-pack-quantized", "float"),
            (WeightFormat::Int4, _) => packed_config("pack-quantized", "int"),
            _ => json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [WEIGHT_BLOCK, WEIGHT_BLOCK]
            }),
        };
        Ok(serde_json::to_string_pretty(&config).unwrap_or_default() + "\n")
    }

    /// Writes its `model.safetensors`: the experts, which [`WeightMatrix::quantize`] made, and what is copied.
    ///
    /// # Errors
    /// What writing meets.
    ///
    /// # Panics
    /// Unless there are as many experts as the layer has, each of its sizes.
    pub fn write(&self, experts: &[QuantizedExpert], out: &mut dyn Write) -> io::Result<()> {
        assert_eq!(experts.len(), self.layer.shape().local_experts());
        let mut tensors = self.kept();
        match *self.names {
            ExpertNames::Each { gate, up, down } => {
                for (id, expert) in experts.iter().enumerate() {
                    let parts =
                        [(gate, expert.gate.as_ref()), (Some(up), Some(&expert.up)), (Some(down), Some(&expert.down))];
                    for (part, matrix) in parts {
                        if let (Some(part), Some(matrix)) = (part, matrix) {
                            self.push_matrix(&mut tensors, &format!("experts.{id}.{part}.weight"), matrix);
                        }
                    }
                }
            }
            ExpertNames::Fused { gate_up, down, order, .. } => {
                let gate_up_rows = |expert: &QuantizedExpert, of: fn(&QuantizedMatrix) -> &[u8]| {
                    let gate = expert.gate.as_ref().expect("fused experts have a gate");
                    in_order(of(gate), of(&expert.up), gate.rows, order)
                };
                let [intermediate, hidden] = [experts[0].up.rows, experts[0].up.cols];
                let of_all = |of: fn(&QuantizedMatrix) -> &[u8]| -> [Vec<u8>; 2] {
                    let gate_up = experts.iter().flat_map(|expert| gate_up_rows(expert, of)).collect();
                    [gate_up, experts.iter().flat_map(|expert| of(&expert.down).to_vec()).collect()]
                };
                let [values, scales] = [of_all(|matrix| &matrix.values), of_all(|matrix| &matrix.scales)];
                let sizes = [(gate_up, 2 * intermediate, hidden), (down, hidden, intermediate)];
                for (((name, rows, cols), values), scales) in sizes.into_iter().zip(values).zip(scales) {
                    let (name, groups) = (self.layer.block_name(name), cols / mxfp4::GROUP);
                    let mut push = |ending: &str, shape: Vec<usize>, bytes: Vec<u8>| {
                        let name = format!("{name}_{ending}");
                        tensors.push(NewTensor { name, dtype: Dtype::U8, shape, bytes: bytes.into() });
                    };
                    push("blocks", vec![experts.len(), rows, groups, mxfp4::GROUP / 2], values);
                    push("scales", vec![experts.len(), rows, groups], scales);
                }
            }
        }
        write_safetensors(tensors, out)
    }

    fn push_matrix<'m>(&self, tensors: &mut Vec<NewTensor<'m>>, name: &str, matrix: &'m QuantizedMatrix) {
        let name = self.layer.block_name(name);
        let QuantizedMatrix { rows, cols, values, scales } = matrix;
        let (values_as, scales_as) = match self.format {
            WeightFormat::Mxfp4 => (
                (format!("{name}_packed"), Dtype::U8, vec![*rows, cols / 2]),
                (format!("{name}_scale"), Dtype::U8, vec![*rows, cols / mxfp4::GROUP]),
            ),
            // Eight values to a word, the first in the lowest bits: the bytes as they are.
            WeightFormat::Int4 => (
                (format!("{name}_packed"), Dtype::I32, vec![*rows, cols / 8]),
                (format!("{name}_scale"), Dtype::BF16, vec![*rows, cols / int4::GROUP]),
            ),
            _ => (
                (name.clone(), Dtype::F8_E4M3, vec![*rows, *cols]),
                (
                    format!("{name}_scale_inv"),
                    Dtype::F32,
                    vec![rows.div_ceil(WEIGHT_BLOCK), cols.div_ceil(WEIGHT_BLOCK)],
                ),
            ),
        };
        for ((name, dtype, shape), bytes) in [(values_as, values), (scales_as, scales)] {
            tensors.push(NewTensor { name, dtype, shape, bytes: bytes.into() });
        }
        if self.format == WeightFormat::Int4 {
            let bytes: Vec<u8> = [*rows, *cols].into_iter().flat_map(|extent| (extent as i64).to_le_bytes()).collect();
            let name = format!("{name}_shape");
            tensors.push(NewTensor { name, dtype: Dtype::I64, shape: vec![2], bytes: bytes.into() });
        }
    }

    /// The block's other tensors.
    fn kept(&self) -> Vec<NewTensor<'a>> {
        let tensor = |name: &String| {
            let tensor = self.checkpoint.tensor(name, String::new).expect("it was read before");
            NewTensor {
                name: name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.to_vec(),
                bytes: tensor.bytes.into(),
            }
        };
        self.layer.other_tensors().iter().map(tensor).collect()
    }
}

/// What compressed-tensors says of weights of 4 bits in groups of 32.
fn packed_config(format: &str, kind: &str) -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {
            "targets": ["re:.*experts.*"],
            "input_activations": null,
            "weights": {
                "num_bits": 4, "type": kind, "strategy": "group", "group_size": mxfp4::GROUP,
                "symmetric": true, "dynamic": false
            }
        }}
    })
}

/// Rows of gate and up as a tensor in that order.
fn in_order(gate: &[u8], up: &[u8], rows: usize, order: GateUpOrder) -> Vec<u8> {
    let width = gate.len() / rows;
    match order {
        GateUpOrder::Halves => [gate, up].concat(),
        GateUpOrder::Interleaved => {
            gate.chunks(width).zip(up.chunks(width)).flat_map(|(gate, up)| [gate, up].concat()).collect()
        }
    }
}

/// A safetensors file. Wide elements come first, so that all are aligned.
fn write_safetensors(mut tensors: Vec<NewTensor<'_>>, out: &mut dyn Write) -> io::Result<()> {
    tensors.sort_by(|a, b| (b.dtype.bitsize(), &a.name).cmp(&(a.dtype.bitsize(), &b.name)));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for NewTensor { name, dtype, shape, bytes } in &tensors {
        let start = end;
        end += bytes.len();
        let entry = json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    tensors.iter().try_for_each(|tensor| out.write_all(&tensor.bytes))
}
