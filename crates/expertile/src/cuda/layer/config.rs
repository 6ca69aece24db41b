//! A layer's configuration in the terms of the steps.

use super::ALIGNMENT;
use crate::cuda::activation::ActivateConfig;
use crate::cuda::quantize_permute::QuantizePermuteConfig;
use crate::cuda::route::RouteConfig;
use crate::cuda::unpermute::UnpermuteConfig;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK, WeightFormat};
use crate::layer::{LayerConfig, LayerShape};
use crate::layout::Padding;
use crate::quantize::ScaleFormat;
use crate::{int4, mxfp4};

/// A segment's scales start on 16 bytes.
const SCALES_ALIGNMENT: usize = 4;

/// What of a layer's weights a choice depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cuda) struct WeightKind {
    pub(in crate::cuda) format: WeightFormat,
    /// Whether GEMM 1 has biases, and whether GEMM 2 has.
    pub(in crate::cuda) biased: [bool; 2],
    /// Whether GEMM 1's are there in e4m3, too, and whether GEMM 2's are.
    pub(in crate::cuda) e4m3_copy: [bool; 2],
}

impl WeightKind {
    pub(in crate::cuda) fn unbiased(format: WeightFormat) -> Self {
        Self { format, biased: [false; 2], e4m3_copy: [false; 2] }
    }

    /// Whether the kernel that does a call in one launch takes them, of those widths: groups of e4m3 are whole.
    pub(super) fn fits_one_launch(self, widths: [usize; 2]) -> bool {
        match self.format {
            WeightFormat::E4m3 => widths.iter().all(|width| width.is_multiple_of(WEIGHT_BLOCK)),
            WeightFormat::Bf16 => true,
            WeightFormat::Mxfp4 | WeightFormat::Int4 => false,
        }
    }
}

/// What the CUDA backend makes of a [`LayerConfig`].
impl LayerConfig {
    /// Weights of the activations' own format.
    pub(in crate::cuda) fn weight_format(&self) -> WeightFormat {
        match self.activation_format {
            ActivationFormat::E4m3 => WeightFormat::E4m3,
            ActivationFormat::Bf16 => WeightFormat::Bf16,
        }
    }

    /// Fails for what is not computed here, of what [`LayerConfig::check`] allows.
    pub(super) fn check_on_gpu(&self, shape: &LayerShape, weights: WeightFormat) -> Result<()> {
        self.check()?;
        let expected = match (self.activation_format, weights) {
            (_, WeightFormat::Mxfp4 | WeightFormat::Int4)
            | (ActivationFormat::E4m3, WeightFormat::E4m3)
            | (ActivationFormat::Bf16, WeightFormat::Bf16) => None,
            (ActivationFormat::E4m3, _) => Some("e4m3, mxfp4 or int4, for e4m3 activations"),
            (ActivationFormat::Bf16, _) => Some("bf16, mxfp4 or int4, for bf16 activations on a GPU"),
        };
        if let Some(expected) = expected {
            return Err(Error::WeightFormat { argument: "w13", actual: weights.name(), expected });
        }
        if weights.has_groups() {
            let groups = if weights == WeightFormat::Int4 { int4::groups } else { mxfp4::groups };
            groups(shape.hidden())?;
            groups(shape.intermediate()).map_err(|_| {
                let expected = format!("a multiple of 32 for {weights} weights");
                Error::value("intermediate", shape.intermediate(), expected)
            })?;
        }
        let dtype = |expected| Err(Error::Dtype { argument: "hidden_states", actual: self.input, expected });
        match (self.activation_format, self.input) {
            (ActivationFormat::E4m3, Dtype::Bf16 | Dtype::F16) => {
                ScaleFormat::HOPPER.groups(shape.hidden())?;
                let intermediate = shape.intermediate();
                ScaleFormat::HOPPER.groups(intermediate).map_err(|_| {
                    let expected = "a positive multiple of 64: groups of 128, the last one half at least";
                    Error::value("intermediate", intermediate, expected)
                })?;
                if weights == WeightFormat::E4m3 && !intermediate.is_multiple_of(WEIGHT_BLOCK) {
                    let expected =
                        "a positive multiple of 128: on a GPU gate and up have row blocks of scales of their own";
                    return Err(Error::value("intermediate", intermediate, expected));
                }
                if !self.layout_alignment().is_multiple_of(SCALES_ALIGNMENT) {
                    let expected = format!("a multiple of {SCALES_ALIGNMENT} for e4m3 rows on a GPU");
                    return Err(Error::Alignment { actual: self.layout_alignment(), expected });
                }
                Ok(())
            }
            (ActivationFormat::E4m3, _) => dtype("bf16 or f16 on a GPU"),
            (ActivationFormat::Bf16, Dtype::Bf16) if self.weight_on_input => {
                let expected = "e4m3, where router weights multiply the input on a GPU";
                Err(Error::WeightFormat { argument: "w13", actual: weights.name(), expected })
            }
            (ActivationFormat::Bf16, Dtype::Bf16) => Ok(()),
            (ActivationFormat::Bf16, _) => dtype("bf16, with bf16 weights on a GPU"),
        }
    }

    /// The layout's alignment.
    pub(super) fn layout_alignment(&self) -> usize {
        self.alignment.unwrap_or(ALIGNMENT)
    }

    pub(super) fn route(&self, row_tile: usize) -> RouteConfig {
        RouteConfig { topk: self.topk, ids: self.ids, row_tile }
    }

    pub(super) fn quantize_permute(&self, shape: &LayerShape, row_tile: usize) -> QuantizePermuteConfig {
        QuantizePermuteConfig {
            route: self.route(row_tile),
            hidden: shape.hidden(),
            input: self.input,
            format: ScaleFormat::HOPPER,
            padding: Padding::Untouched,
            weighted: self.weight_on_input,
            aligned: true,
        }
    }

    pub(super) fn activate(&self, shape: &LayerShape) -> ActivateConfig {
        let quantized = self.activation_format == ActivationFormat::E4m3;
        ActivateConfig {
            intermediate: shape.intermediate(),
            activation: self.activation,
            format: quantized.then_some(ScaleFormat::HOPPER),
        }
    }

    pub(super) fn unpermute(&self, shape: &LayerShape) -> UnpermuteConfig {
        UnpermuteConfig {
            hidden: shape.hidden(),
            topk: self.topk,
            input: Dtype::Bf16,
            output: self.output,
            weighted: !self.weight_on_input,
            aligned: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of scales that gate and up share are refused with the reason, whatever the number of blocks.
    #[test]
    fn e4m3_takes_an_intermediate_size_that_blocks_of_scales_divide() {
        let config = LayerConfig::new(2, 4, ActivationFormat::E4m3);
        let check =
            |intermediate| config.check_on_gpu(&LayerShape::new(256, intermediate, 4).unwrap(), WeightFormat::E4m3);
        assert_eq!(check(128), Ok(()));
        for (intermediate, multiple) in [(64, 128), (96, 64), (192, 128)] {
            let error = check(intermediate).unwrap_err().to_string();
            let start = format!("intermediate is {intermediate}, expected a positive multiple of {multiple}: ");
            assert!(error.starts_with(&start), "{error}");
        }
        for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
            let check = |intermediate| config.check_on_gpu(&LayerShape::new(192, intermediate, 4).unwrap(), format);
            assert_eq!((check(192), check(2880)), (Ok(()), Ok(())));
            assert!(matches!(check(96), Err(Error::Value { argument: "intermediate", actual: 96, .. })));
            let error = check(40).unwrap_err().to_string();
            assert!(error.contains(&format!("a multiple of 32 for {format} weights")), "{error}");
        }
    }
}
