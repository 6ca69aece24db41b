//! A layer's configuration in the terms of the steps.

use super::ALIGNMENT;
use crate::cuda::activation::ActivateConfig;
use crate::cuda::quantize_permute::QuantizePermuteConfig;
use crate::cuda::route::RouteConfig;
use crate::cuda::unpermute::UnpermuteConfig;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::gemm::{ActivationFormat, WeightFormat};
use crate::layer::{LayerConfig, LayerShape};
use crate::layout::Padding;
use crate::quantize::ScaleFormat;

/// A segment's scales start on 16 bytes.
const SCALES_ALIGNMENT: usize = 4;

/// What the CUDA backend makes of a [`LayerConfig`].
impl LayerConfig {
    /// What goes with the activations.
    pub(in crate::cuda) fn weight_format(&self) -> WeightFormat {
        match self.activation_format {
            ActivationFormat::E4m3 => WeightFormat::E4m3,
            ActivationFormat::Bf16 => WeightFormat::Bf16,
        }
    }

    /// Fails for what is not computed here, of what [`LayerConfig::check`] allows.
    pub(super) fn check_on_gpu(&self, shape: &LayerShape, weights: WeightFormat) -> Result<()> {
        self.check()?;
        let expected = self.weight_format();
        if weights != expected {
            let expected = match expected {
                WeightFormat::E4m3 => "e4m3, for e4m3 activations",
                WeightFormat::Bf16 | WeightFormat::Mxfp4 => "bf16, for bf16 activations on a GPU",
            };
            return Err(Error::WeightFormat { argument: "w13", actual: weights.name(), expected });
        }
        let dtype = |expected| Err(Error::Dtype { argument: "hidden_states", actual: self.input, expected });
        match (self.activation_format, self.input) {
            (ActivationFormat::E4m3, Dtype::Bf16 | Dtype::F16) => {
                ScaleFormat::HOPPER.whole_groups(shape.hidden())?;
                ScaleFormat::HOPPER.whole_groups(shape.intermediate()).map_err(|_| {
                    let expected =
                        "a positive multiple of the group, 128: gate and up have row blocks of scales of their own";
                    Error::value("intermediate", shape.intermediate(), expected)
                })?;
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
        for intermediate in [64, 96, 192] {
            let error = check(intermediate).unwrap_err().to_string();
            let start = format!("intermediate is {intermediate}, expected a positive multiple of the group, 128: gate");
            assert!(error.starts_with(&start), "{error}");
        }
    }
}
