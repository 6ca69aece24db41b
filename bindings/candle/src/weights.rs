//! Expert weights out of candle's tensors.

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::{none_of_dtypes, refused, require_shape, three_extents, wrong_dtype};
use candle_core::{D, DType, DeviceLocation, Error, Result, Tensor};
use candle_nn::VarBuilder;
use expertile::cpu::{Cpu, PackedWeights};
use expertile::gemm::WEIGHT_BLOCK;
use expertile::{Backend, LayerShape, WeightFormat};

/// The weights of all experts of a layer.
///
/// On the CPU they are packed, and the tensors they came from are not kept. On a GPU they are used where they are, and
/// the tensors are kept alive; their values must not be replaced while a layer uses them.
#[derive(Debug)]
pub struct Weights {
    pub(crate) place: Place,
    shape: LayerShape,
    format: WeightFormat,
}

#[derive(Debug)]
pub(crate) enum Place {
    Cpu {
        w13: PackedWeights,
        w2: PackedWeights,
    },
    #[cfg(feature = "cuda")]
    Cuda(cuda::Weights),
}

/// Tensors of one format, stacked or of one expert.
struct Stacked<'a> {
    w13: (&'a Tensor, Option<Tensor>),
    w2: (&'a Tensor, Option<Tensor>),
}

impl Weights {
    /// bf16 weights `w13 [E, 2 I, H]` (gate's rows first, then up's; `[E, I, H]` for an activation without a gate) and
    /// `w2 [E, H, I]`.
    ///
    /// On the CPU they may be any views, also of F32 or F16 as long as bf16 holds every value: nothing is rounded
    /// unasked. On a GPU they are BF16 and contiguous.
    ///
    /// # Errors
    /// For a type, shape, view or device that does not fit, and a value that would be rounded.
    pub fn bf16(w13: &Tensor, w2: &Tensor) -> Result<Self> {
        Self::stacked(WeightFormat::Bf16, &Stacked { w13: (w13, None), w2: (w2, None) })
    }

    /// e4m3 weights, as [`Weights::bf16`], with a scale for each block of 128 x 128:
    /// `w13_scales [E, 2 I / 128, ceil(H / 128)]`, where 128 has to divide `I`, and
    /// `w2_scales [E, ceil(H / 128), ceil(I / 128)]`. Scales are F32; those of BF16 or F16 are widened.
    ///
    /// # Errors
    /// As [`Weights::bf16`].
    pub fn e4m3(w13: &Tensor, w13_scales: &Tensor, w2: &Tensor, w2_scales: &Tensor) -> Result<Self> {
        let (w13_scales, w2_scales) = (widened("w13_scales", w13_scales)?, widened("w2_scales", w2_scales)?);
        let stacked = Stacked { w13: (w13, Some(w13_scales)), w2: (w2, Some(w2_scales)) };
        Self::stacked(WeightFormat::E4m3, &stacked)
    }

    /// The experts of a checkpoint, `vb` being at their path: `{e}.gate_proj.weight` and `{e}.up_proj.weight` `[I, H]`,
    /// `{e}.down_proj.weight` `[H, I]`. Where there are `{e}.gate_proj.weight_scale_inv`, the weights are e4m3 with
    /// block scales, else they are read as `vb`'s type.
    ///
    /// One expert at a time: on the CPU the tensors of all experts are never there at once.
    ///
    /// # Errors
    /// As [`Weights::bf16`]; for a tensor that is missing, and for one beside the weights that would change the
    /// result: a bias, scales of another kind.
    pub fn load(vb: &VarBuilder<'_>, shape: &LayerShape) -> Result<Self> {
        refuse_others(vb, shape)?;
        let e4m3 = vb.contains_tensor("0.gate_proj.weight_scale_inv");
        let format = if e4m3 { WeightFormat::E4m3 } else { WeightFormat::Bf16 };
        let place = match vb.device().location() {
            DeviceLocation::Cpu => load_on_cpu(vb, shape, format)?,
            location => placed(location, format, || load_stacked(vb, shape, format))?,
        };
        Ok(Self { place, shape: *shape, format })
    }

    /// The sizes of the layer that they make.
    #[must_use]
    pub fn shape(&self) -> &LayerShape {
        &self.shape
    }

    /// What they are made of.
    #[must_use]
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    fn stacked(format: WeightFormat, tensors: &Stacked<'_>) -> Result<Self> {
        let Stacked { w13: (w13, w13_scales), w2: (w2, w2_scales) } = tensors;
        let shape = shape_of(format, w13, w2)?;
        let location = w13.device().location();
        let arguments = [("w2", Some(*w2)), ("w13_scales", w13_scales.as_ref()), ("w2_scales", w2_scales.as_ref())];
        for (argument, tensor) in arguments.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))) {
            if tensor.device().location() != location {
                let actual = format!("is on {:?}", tensor.device().location());
                return Err(refused(argument, actual, format_args!("{location:?}, as w13")));
            }
        }
        check_scales("w13_scales", &shape, w13, w13_scales.as_ref())?;
        check_scales("w2_scales", &shape, w2, w2_scales.as_ref())?;
        let place = match location {
            DeviceLocation::Cpu => pack(format, &shape, tensors)?,
            location => placed(location, format, || {
                Ok([(*w13).clone(), (*w2).clone()].into_iter().zip([w13_scales.clone(), w2_scales.clone()]).collect())
            })?,
        };
        Ok(Self { place, shape, format })
    }
}

/// The sizes that two stacked tensors make: without a gate where `w13` has as many rows as `w2` has columns.
fn shape_of(format: WeightFormat, w13: &Tensor, w2: &Tensor) -> Result<LayerShape> {
    let sizes13 = three_extents("w13", w13.layout(), "[E, 2 I, H]")?;
    let sizes2 = three_extents("w2", w2.layout(), "[E, H, I]")?;
    for (argument, tensor) in [("w13", w13), ("w2", w2)] {
        if format == WeightFormat::E4m3 && tensor.dtype() != DType::F8E4M3 {
            return Err(wrong_dtype(argument, tensor.dtype(), DType::F8E4M3));
        }
    }
    let gated = sizes13[1] != sizes2[2];
    LayerShape::of_weights((sizes13, format), (sizes2, format), gated).map_err(Error::wrap)
}

/// Scales as F32, exactly.
fn widened(argument: &'static str, scales: &Tensor) -> Result<Tensor> {
    match scales.dtype() {
        DType::F32 | DType::BF16 | DType::F16 => scales.to_dtype(DType::F32),
        got => Err(none_of_dtypes(argument, got, "F32, BF16 or F16")),
    }
}

fn check_scales(argument: &'static str, shape: &LayerShape, values: &Tensor, scales: Option<&Tensor>) -> Result<()> {
    let Some(scales) = scales else { return Ok(()) };
    let (experts, rows, cols) = values.dims3()?;
    if argument == "w13_scales" && shape.is_gated() && !shape.intermediate().is_multiple_of(WEIGHT_BLOCK) {
        let actual = format!("is of I = {}", shape.intermediate());
        return Err(refused(argument, actual, "a multiple of 128: a block's scale is gate's or up's, not both's"));
    }
    let expected = [experts, rows.div_ceil(WEIGHT_BLOCK), cols.div_ceil(WEIGHT_BLOCK)];
    require_shape(argument, scales.layout(), &expected)
}

/// What is on no CPU: on a GPU the tensors are kept, `[values, scales]` of `w13` and `w2`.
#[cfg(feature = "cuda")]
fn placed(
    location: DeviceLocation,
    format: WeightFormat,
    tensors: impl FnOnce() -> Result<Vec<(Tensor, Option<Tensor>)>>,
) -> Result<Place> {
    match location {
        DeviceLocation::Cuda { gpu_id } => Ok(Place::Cuda(cuda::Weights::new(gpu_id, format, tensors()?)?)),
        location => Err(refused("w13", format_args!("is on {location:?}"), "Cpu or Cuda")),
    }
}

#[cfg(not(feature = "cuda"))]
fn placed(
    location: DeviceLocation,
    _: WeightFormat,
    _: impl FnOnce() -> Result<Vec<(Tensor, Option<Tensor>)>>,
) -> Result<Place> {
    Err(refused("w13", format_args!("is on {location:?}"), "Cpu: this build is without the feature cuda"))
}

/// Packs stacked tensors, expert by expert and gate and up apart.
fn pack(format: WeightFormat, shape: &LayerShape, tensors: &Stacked<'_>) -> Result<Place> {
    let cpu = Cpu::new();
    let mut w13 = cpu.w13_builder(format, shape).map_err(Error::wrap)?;
    let mut w2 = cpu.w2_builder(format, shape).map_err(Error::wrap)?;
    let parts =
        [("w13", &mut w13, &tensors.w13, shape.w13_rows() / shape.intermediate()), ("w2", &mut w2, &tensors.w2, 1)];
    for (argument, builder, (values, scales), segments) in parts {
        let rows = values.dim(1)? / segments;
        for expert in 0..shape.local_experts() {
            for first_row in (0..segments).map(|segment| segment * rows) {
                let place = (argument, expert, first_row);
                let values = values.get(expert)?.narrow(0, first_row, rows)?;
                match scales {
                    None => cpu::add_bf16_rows(builder, place, &values)?,
                    Some(scales) => {
                        let (first, blocks) = (first_row / WEIGHT_BLOCK, rows.div_ceil(WEIGHT_BLOCK));
                        cpu::add_e4m3_rows(builder, place, &values, &scales.get(expert)?.narrow(0, first, blocks)?)?;
                    }
                }
            }
        }
    }
    Ok(Place::Cpu { w13: w13.finish().map_err(Error::wrap)?, w2: w2.finish().map_err(Error::wrap)? })
}

/// The matrices of an expert: their names, whether they are of `w13`, and their first row there.
fn matrices(shape: &LayerShape) -> impl Iterator<Item = (&'static str, bool, usize)> {
    let up = if shape.is_gated() { shape.intermediate() } else { 0 };
    let all = [("gate_proj", true, 0), ("up_proj", true, up), ("down_proj", false, 0)];
    all.into_iter().skip(usize::from(!shape.is_gated()))
}

/// Fails for tensors beside the weights that would change the result.
fn refuse_others(vb: &VarBuilder<'_>, shape: &LayerShape) -> Result<()> {
    const OTHERS: [&str; 6] = ["bias", "weight_scale", "weight_scale_2", "input_scale", "weight_packed", "qweight"];
    for expert in 0..shape.local_experts() {
        for (name, ..) in matrices(shape) {
            for other in OTHERS {
                let path = format!("{expert}.{name}.{other}");
                if vb.contains_tensor(&path) {
                    let expected = "weight alone, or weight and weight_scale_inv";
                    return Err(refused(&format!("{}.{path}", vb.prefix()), "is there", expected));
                }
            }
        }
    }
    Ok(())
}

/// One matrix `[rows, cols]` of an expert and, for e4m3, its scales as F32.
fn load_matrix(
    vb: &VarBuilder<'_>,
    path: &str,
    (rows, cols): (usize, usize),
    format: WeightFormat,
) -> Result<(Tensor, Option<Tensor>)> {
    let get = |shape: (usize, usize), name: &str, dtype: DType| {
        vb.get_with_hints_dtype(shape, &format!("{path}.{name}"), Default::default(), dtype)
    };
    match format {
        WeightFormat::Bf16 => Ok((get((rows, cols), "weight", vb.dtype())?, None)),
        WeightFormat::E4m3 => {
            let blocks = (rows.div_ceil(WEIGHT_BLOCK), cols.div_ceil(WEIGHT_BLOCK));
            let scales = get(blocks, "weight_scale_inv", DType::F32)?;
            Ok((get((rows, cols), "weight", DType::F8E4M3)?, Some(scales)))
        }
        WeightFormat::Mxfp4 | WeightFormat::Int4 => unreachable!("no checkpoint is taken for it"),
    }
}

fn load_on_cpu(vb: &VarBuilder<'_>, shape: &LayerShape, format: WeightFormat) -> Result<Place> {
    let cpu = Cpu::new();
    let mut w13 = cpu.w13_builder(format, shape).map_err(Error::wrap)?;
    let mut w2 = cpu.w2_builder(format, shape).map_err(Error::wrap)?;
    for expert in 0..shape.local_experts() {
        for (name, is_w13, first_row) in matrices(shape) {
            let (builder, sizes) = if is_w13 {
                (&mut w13, (shape.intermediate(), shape.hidden()))
            } else {
                (&mut w2, (shape.hidden(), shape.intermediate()))
            };
            let (values, scales) = load_matrix(vb, &format!("{expert}.{name}"), sizes, format)?;
            match scales {
                None => cpu::add_bf16_rows(builder, (name, expert, first_row), &values)?,
                Some(scales) => cpu::add_e4m3_rows(builder, (name, expert, first_row), &values, &scales)?,
            }
        }
    }
    Ok(Place::Cpu { w13: w13.finish().map_err(Error::wrap)?, w2: w2.finish().map_err(Error::wrap)? })
}

/// Stacked tensors on `vb`'s device, filled expert by expert.
fn load_stacked(
    vb: &VarBuilder<'_>,
    shape: &LayerShape,
    format: WeightFormat,
) -> Result<Vec<(Tensor, Option<Tensor>)>> {
    let (experts, hidden, intermediate) = (shape.local_experts(), shape.hidden(), shape.intermediate());
    if format == WeightFormat::E4m3 && !intermediate.is_multiple_of(WEIGHT_BLOCK) {
        return Err(refused("intermediate", format_args!("is {intermediate}"), "a multiple of 128 on a GPU"));
    }
    let dtype = if format == WeightFormat::E4m3 { DType::F8E4M3 } else { vb.dtype() };
    let blocks = |extent: usize| extent.div_ceil(WEIGHT_BLOCK);
    // Of all experts, one below the other: a row's place is a multiple of its matrix's height.
    let room = |rows: usize, cols: usize| -> Result<(Tensor, Option<Tensor>)> {
        let zeros = |rows, cols, dtype| Tensor::zeros((experts * rows, cols), dtype, vb.device());
        let scales = (format == WeightFormat::E4m3).then(|| zeros(blocks(rows), blocks(cols), DType::F32));
        Ok((zeros(rows, cols, dtype)?, scales.transpose()?))
    };
    let (w13, w2) = (room(shape.w13_rows(), hidden)?, room(hidden, intermediate)?);
    for expert in 0..experts {
        for (name, is_w13, first_row) in matrices(shape) {
            let (to, height, sizes) = if is_w13 {
                (&w13, shape.w13_rows(), (intermediate, hidden))
            } else {
                (&w2, hidden, (hidden, intermediate))
            };
            let (values, scales) = load_matrix(vb, &format!("{expert}.{name}"), sizes, format)?;
            to.0.slice_set(&values.contiguous()?, 0, expert * height + first_row)?;
            if let (Some(to), Some(scales)) = (&to.1, scales) {
                to.slice_set(&scales.contiguous()?, 0, expert * blocks(height) + first_row / WEIGHT_BLOCK)?;
            }
        }
    }
    let stack = |tensor: Tensor| tensor.reshape((experts, (), tensor.dim(D::Minus1)?));
    [w13, w2].into_iter().map(|(values, scales)| Ok((stack(values)?, scales.map(stack).transpose()?))).collect()
}
