//! What a grouped GEMM is specialised for, and the source that this makes.

use super::shared_memory::{self, groups, stages};
use super::{FewRowsCut, GemmKernel};
use crate::activation::Activation;
use crate::cuda::definitions::activation_definitions;
use crate::cuda::driver::Source;
use crate::error::{Error, Result};
use crate::gemm::{ActivationFormat, WeightFormat};

/// Values in the 128 bytes that a block of K has of each row.
pub(in crate::cuda) fn values_of_block(rows: ActivationFormat) -> usize {
    128 / row_bytes(rows)
}

/// Bytes of a value of a row.
pub(in crate::cuda) fn row_bytes(rows: ActivationFormat) -> usize {
    match rows {
        ActivationFormat::E4m3 => 1,
        ActivationFormat::Bf16 => 2,
    }
}

/// What the GEMM is specialised for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GemmConfig {
    /// What weights are made of.
    pub format: WeightFormat,
    /// What rows are made of: the same as the weights; for mxfp4 and int4 either.
    pub activation_format: ActivationFormat,
    /// How the work is cut.
    pub kernel: GemmKernel,
    /// The activation that turns `[gate | up]` into the next GEMM's e4m3 rows before anything is stored. Only for e4m3
    /// with a kernel that [takes one](GemmKernel::takes_activation), and an `N / 2` that 128 divides; the results are
    /// those of [`crate::cuda::Activate`].
    pub activation: Option<Activation>,
}

impl GemmConfig {
    /// Blocks of K in flight: as many as fit in shared memory.
    #[must_use]
    pub fn stages(&self) -> usize {
        match self.format {
            WeightFormat::Mxfp4 | WeightFormat::Int4 => groups::stages(&self.storage(false)),
            WeightFormat::E4m3 | WeightFormat::Bf16 => stages(&self.kernel, self.activation.is_some()),
        }
    }

    /// What `SharedStorage` depends on, of weights with groups.
    pub(super) fn storage(&self, joined: bool) -> groups::Storage {
        groups::Storage { kernel: self.kernel, weights: self.format, rows: self.activation_format, joined }
    }

    /// Blocks of a cluster; with an activation a pair, whose results share scales, unless a tile has all of those.
    pub(super) fn cluster(&self) -> usize {
        match self.kernel {
            GemmKernel::Wide { .. } if self.activation.is_some() => 2 * self.kernel.cluster(),
            GemmKernel::FewRows { .. } | GemmKernel::Wide { .. } | GemmKernel::Large => self.kernel.cluster(),
        }
    }

    /// Weight rows that are loaded at once: all of a tile's, or those that have a place or a scale of their own.
    pub(super) fn weight_box_rows(&self) -> usize {
        self.kernel.outputs() / shared_memory::weight_boxes(&self.kernel, self.activation.is_some())
    }

    /// Bytes of dynamic shared memory. Passed to the kernel, which compares them with the size of its `SharedStorage`.
    pub(super) fn shared_bytes(&self) -> u32 {
        let bytes = match self.format {
            WeightFormat::Mxfp4 | WeightFormat::Int4 => groups::bytes(&self.storage(false), self.stages()),
            format => shared_memory::bytes(&self.kernel, format, self.activation.is_some(), self.stages()),
        };
        bytes as u32
    }

    /// Fails unless there is a kernel for the format, with the activation.
    pub(super) fn check(&self) -> Result<()> {
        self.kernel.check()?;
        let own = match self.format {
            WeightFormat::Mxfp4 | WeightFormat::Int4 => return self.check_groups(),
            WeightFormat::E4m3 => ActivationFormat::E4m3,
            WeightFormat::Bf16 => ActivationFormat::Bf16,
        };
        if self.activation_format != own {
            let (actual, expected) = (self.format.name(), format_of_rows(self.activation_format));
            return Err(Error::WeightFormat { argument: "weights", actual, expected });
        }
        let expected = match (self.activation.is_some(), self.kernel) {
            (true, _) => "e4m3, for a GEMM with an activation",
            (false, kernel) if kernel.is_broad() => {
                let expected = "mxfp4 or int4, for a broad tile";
                return Err(Error::WeightFormat { argument: "weights", actual: self.format.name(), expected });
            }
            (false, GemmKernel::Large) => "e4m3, for a tile of 256 outputs",
            (false, GemmKernel::FewRows { .. } | GemmKernel::Wide { .. }) => return Ok(()),
        };
        if self.format != WeightFormat::E4m3 {
            return Err(Error::WeightFormat { argument: "weights", actual: self.format.name(), expected });
        }
        if self.activation.is_some() && !self.kernel.takes_activation() {
            let expected = "128 x 256, or 192 x 128 without shared rows, for a GEMM with an activation";
            return Err(Error::Name { argument: "kernel", actual: self.kernel.to_string(), expected });
        }
        Ok(())
    }

    /// The same for mxfp4 and int4.
    fn check_groups(&self) -> Result<()> {
        if self.activation.is_some() {
            let (actual, expected) = (self.format.name(), "e4m3, for a GEMM with an activation");
            return Err(Error::WeightFormat { argument: "weights", actual, expected });
        }
        match self.kernel {
            GemmKernel::FewRows { cut: FewRowsCut::Narrow | FewRowsCut::Plain | FewRowsCut::Broad, .. } => Ok(()),
            kernel => {
                let expected = "one block to a tile, with weights on M, for mxfp4 and int4";
                Err(Error::Name { argument: "kernel", actual: kernel.to_string(), expected })
            }
        }
    }

    /// The kernel's source for this configuration. What the definitions are is written down in kernels/gemm/config.cuh.
    ///
    /// # Errors
    /// [`Error::Value`] for a cut that there is no kernel for, [`Error::WeightFormat`] for bf16 with an activation or
    /// in [`GemmKernel::Large`] and for e4m3 and bf16 with [`FewRowsCut::Broad`], [`Error::Name`] for a kernel that takes
    /// no activation.
    pub fn source(&self) -> Result<Source> {
        self.source_of(false)
    }

    /// The source for mxfp4 weights some of whose scales are too far apart to be folded into the decoded values; none
    /// for other weights.
    ///
    /// # Errors
    /// As [`GemmConfig::source`].
    pub fn spread_source(&self) -> Result<Option<Source>> {
        (self.format == WeightFormat::Mxfp4).then(|| self.source_of(true)).transpose()
    }

    /// What every kernel's `HostConfig` is made of.
    pub(super) fn definitions(&self, stages: usize, threads: u32, shared_bytes: u32) -> Vec<(&'static str, i64)> {
        vec![
            ("HOST_BF16", i64::from(self.activation_format == ActivationFormat::Bf16)),
            ("HOST_ROW_TILE", self.kernel.row_tile() as i64),
            ("HOST_ROW_STEP", self.kernel.row_step() as i64),
            ("HOST_MULTICAST", self.kernel.shared() as i64),
            ("HOST_K_SPLITS", self.kernel.splits() as i64),
            ("HOST_STAGES", stages as i64),
            ("HOST_THREADS", i64::from(threads)),
            ("HOST_SHARED_BYTES", i64::from(shared_bytes)),
        ]
    }

    /// What kernels for weights with groups have besides. `spread`: some slabs' scales are too far apart to be folded in.
    pub(super) fn group_definitions(&self, spread: bool) -> [(&'static str, i64); 4] {
        let blocks = if spread { 1 } else { groups::blocks(&self.kernel) };
        [
            ("HOST_OUTPUTS", self.kernel.outputs() as i64),
            ("HOST_BLOCKS", blocks as i64),
            ("HOST_SPREAD", i64::from(spread)),
            ("HOST_INT4", i64::from(self.format == WeightFormat::Int4)),
        ]
    }

    fn source_of(&self, spread: bool) -> Result<Source> {
        self.check()?;
        let mut definitions = self.definitions(self.stages(), self.kernel.threads(), self.shared_bytes());
        let activation = ("HOST_ACTIVATION", i64::from(self.activation.is_some()));
        let (file, text) = match self.kernel {
            GemmKernel::FewRows { .. } if self.format.has_groups() => {
                definitions.extend(self.group_definitions(spread));
                definitions.push(("HOST_JOINED", 0));
                ("sm90_gemm_groups.cu", include_str!("../kernels/gemm/sm90_gemm_groups.cu"))
            }
            GemmKernel::FewRows { .. } => {
                definitions.extend([("HOST_OUTPUTS", self.kernel.outputs() as i64), ("HOST_JOINED", 0)]);
                ("sm90_gemm_few_rows.cu", include_str!("../kernels/gemm/sm90_gemm_few_rows.cu"))
            }
            GemmKernel::Wide { .. } => {
                definitions.push(activation);
                ("sm90_gemm_192x128.cu", include_str!("../kernels/gemm/sm90_gemm_192x128.cu"))
            }
            GemmKernel::Large => {
                definitions.push(activation);
                ("sm90_gemm_128x256.cu", include_str!("../kernels/gemm/sm90_gemm_128x256.cu"))
            }
        };
        if let Some(activation) = &self.activation {
            definitions.extend(activation_definitions(activation)?);
        }
        Ok(Source::new(file, text, definitions))
    }
}

/// The name of weights of the rows' own format.
fn format_of_rows(rows: ActivationFormat) -> &'static str {
    match rows {
        ActivationFormat::E4m3 => "e4m3, mxfp4 or int4, for e4m3 rows",
        ActivationFormat::Bf16 => "bf16, mxfp4 or int4, for bf16 rows on a GPU",
    }
}

#[cfg(test)]
mod tests {
    use super::super::FewRowsCut;
    use super::*;

    #[test]
    fn configurations_without_a_kernel_are_refused() {
        let with = Some(Activation::default());
        let refuse = |format: WeightFormat, kernel, activation| {
            let activation_format = format.usual_activations();
            GemmConfig { format, activation_format, kernel, activation }.source().unwrap_err()
        };
        let few = GemmKernel::FewRows { row_tile: 64, cut: FewRowsCut::Plain };
        for kernel in [few, GemmKernel::Wide { shares_rows: true }] {
            let error = refuse(WeightFormat::E4m3, kernel, with);
            assert!(error.to_string().starts_with("kernel is "), "{error}");
        }
        let wide = GemmKernel::Wide { shares_rows: false };
        for (kernel, activation) in [(GemmKernel::Large, None), (GemmKernel::Large, with), (wide, with)] {
            let error = refuse(WeightFormat::Bf16, kernel, activation);
            assert!(matches!(error, Error::WeightFormat { argument: "weights", actual: "bf16", .. }), "{error}");
        }
        for format in [WeightFormat::E4m3, WeightFormat::Bf16] {
            let broad = GemmKernel::FewRows { row_tile: 16, cut: FewRowsCut::Broad };
            let error = refuse(format, broad, None).to_string();
            assert!(error.starts_with("weights ") && error.contains("mxfp4 or int4"), "{error}");
        }
        let split = GemmKernel::FewRows { row_tile: 16, cut: FewRowsCut::SplitK { parts: 3 } };
        assert!(refuse(WeightFormat::E4m3, split, None).to_string().starts_with("parts is 3"));
        let sharing = GemmKernel::FewRows { row_tile: 64, cut: FewRowsCut::SharedRows };
        for kernel in [wide, GemmKernel::Wide { shares_rows: true }, GemmKernel::Large, sharing] {
            for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
                let error = refuse(format, kernel, None).to_string();
                assert!(error.starts_with("kernel is ") && error.contains("with weights on M"), "{error}");
            }
        }
        for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
            assert!(matches!(refuse(format, few, with), Error::WeightFormat { .. }));
        }
        let config = GemmConfig {
            format: WeightFormat::E4m3,
            activation_format: ActivationFormat::Bf16,
            kernel: few,
            activation: None,
        };
        assert!(matches!(config.source(), Err(Error::WeightFormat { argument: "weights", actual: "e4m3", .. })));
    }
}
