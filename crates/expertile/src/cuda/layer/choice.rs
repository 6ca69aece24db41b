//! How a call of the layer is cut: a pure function of the layer, the number of tokens and the device.

use super::{ALIGNMENT, LayerConfig};
use crate::cuda::arguments::{LayoutBuffers, require_aligned};
use crate::cuda::gemm::{GemmShape, GemmTile};
use crate::cuda::{permute, route};
use crate::error::{Error, Result, checked_add, checked_mul};
use crate::gemm::ActivationFormat;
use crate::layer::LayerShape;
use crate::plan::{Plan, TokenExperts};
use crate::quantize::ScaleFormat;
use std::fmt;

/// Parts of the workspace start on as many bytes, and so does the workspace itself.
pub(super) const PART_BYTES: usize = 256;

/// What a call with a number of tokens does. Plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerChoice {
    /// The buffer's rows: the tight bound, aligned to [`ALIGNMENT`].
    pub plan: Plan,
    /// Rows of a worklist entry, and so of both GEMMs' tiles.
    pub row_tile: usize,
    /// The tile of `[rows, H]` times `[2 I, H]`.
    pub gemm1: GemmTile,
    /// The tile of `[rows, I]` times `[H, I]`.
    pub gemm2: GemmTile,
    /// Kernels that one call launches.
    pub launches: usize,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

impl LayerChoice {
    /// The choice for `tokens` tokens on a device of that many multiprocessors.
    ///
    /// The row tile goes by the rows that an expert can expect: `M * topk` slots spread evenly over `G` experts.
    ///
    /// # Errors
    /// [`Error::Value`] for a `topk`, a number of experts or a width that the kernels do not take; as [`Plan::tight`].
    pub fn new(shape: &LayerShape, config: &LayerConfig, tokens: usize, multiprocessors: usize) -> Result<Self> {
        let (hidden, intermediate, experts) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        if config.global_experts == 0 {
            return Err(Error::value("global_experts", 0, "at least 1"));
        }
        let plan = Plan::tight(tokens, config.topk, experts, ALIGNMENT, TokenExperts::MayRepeat)?;
        let slots = tokens * config.topk;
        let rows = checked_mul("M * topk * E", slots, experts)?.div_ceil(config.global_experts).min(slots);
        let row_tile = GemmTile::row_tile_for(rows, experts);
        let format = config.weight_format();
        let tile = |n, k| GemmTile::choose(&GemmShape { n, k, format, experts, rows }, row_tile, multiprocessors);
        let parts = Offsets::new(shape, config, &plan, row_tile, multiprocessors)?;
        Ok(Self {
            plan,
            row_tile,
            gemm1: tile(2 * intermediate, hidden),
            gemm2: tile(hidden, intermediate),
            launches: launches(config.activations, slots),
            workspace_bytes: parts.end,
        })
    }
}

/// Routing and permute, two GEMMs, the activation, unpermute.
fn launches(activations: ActivationFormat, slots: usize) -> usize {
    let before = match activations {
        ActivationFormat::E4m3 if slots <= permute::FEW_SLOTS => 1,
        ActivationFormat::E4m3 => 3,
        ActivationFormat::Bf16 => 2,
    };
    if slots == 0 { 0 } else { before + 4 }
}

impl fmt::Display for LayerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows aligned to {}, gemm1 {}, gemm2 {}, {} launches, {} bytes of workspace",
            self.plan.m_sum(),
            self.plan.alignment(),
            self.gemm1,
            self.gemm2,
            self.launches,
            self.workspace_bytes
        )
    }
}

/// Where the workspace's parts start. What must survive from call to call comes first, wherever the others end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offsets {
    layout: usize,
    front: usize,
    scales: usize,
    back: usize,
    end: usize,
}

impl Offsets {
    pub(super) fn new(
        shape: &LayerShape,
        config: &LayerConfig,
        plan: &Plan,
        row_tile: usize,
        multiprocessors: usize,
    ) -> Result<Self> {
        let m_sum = plan.m_sum();
        let widest = shape.hidden().max(shape.intermediate());
        let values = checked_mul("M_sum * max(H, I)", m_sum, widest)?;
        let (routing, front, scales) = match config.activations {
            ActivationFormat::E4m3 => {
                let routing = config.quantize_permute(shape, row_tile).workspace_bytes(plan, multiprocessors)?;
                let words = ScaleFormat::HOPPER.words(m_sum, widest)?;
                (routing, values, checked_mul("bytes of scales", words, 4)?)
            }
            ActivationFormat::Bf16 => {
                let routing = route::workspace_bytes(plan, multiprocessors)?;
                (routing, checked_mul("bytes of rows", values, 2)?, 0)
            }
        };
        let widest_back = shape.hidden().max(checked_mul("2 I", shape.intermediate(), 2)?);
        let back = checked_mul("bytes of rows", checked_mul("M_sum * max(H, 2 I)", m_sum, widest_back)?, 2)?;
        let mut end = 0;
        let mut part = |bytes: usize| {
            let start = end;
            let bytes = checked_add("workspace bytes", bytes, PART_BYTES - 1)? / PART_BYTES * PART_BYTES;
            end = checked_add("workspace bytes", start, bytes)?;
            Ok::<usize, Error>(start)
        };
        part(routing)?;
        let layout = part(LayoutBuffers::space_bytes(plan, row_tile)?)?;
        let (front, scales, back) = (part(front)?, part(scales)?, part(back)?);
        Ok(Self { layout, front, scales, back, end })
    }

    /// The parts of the workspace that starts at this address.
    pub(super) fn at(&self, workspace: u64, plan: &Plan, row_tile: usize) -> Result<LayerParts> {
        require_aligned("workspace", workspace, PART_BYTES as u64)?;
        let part = |offset: usize| workspace + offset as u64;
        Ok(LayerParts {
            layout: LayoutBuffers::carve(part(self.layout), plan, row_tile)?,
            front: part(self.front),
            scales: part(self.scales),
            back: part(self.back),
        })
    }
}

/// Where the parts of a call's workspace are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerParts {
    /// The layout's lists.
    pub layout: LayoutBuffers,
    /// Permuted rows `[M_sum, H]`, then activated ones `[M_sum, I]`: e4m3 or bf16.
    pub front: u64,
    /// Scales of `front`, [`ScaleFormat::HOPPER`]; of no size where it is bf16.
    pub scales: u64,
    /// GEMM 1's `gate | up` `[M_sum, 2 I]`, then GEMM 2's rows `[M_sum, H]`: bf16. After a call the latter are there.
    pub back: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activation::Activation;
    use crate::dtype::Dtype;

    const H200: usize = 132;

    fn config(topk: usize, global_experts: usize, activations: ActivationFormat) -> LayerConfig {
        LayerConfig {
            topk,
            ids: Dtype::I32,
            global_experts,
            input: Dtype::Bf16,
            output: Dtype::Bf16,
            activation: Activation::default(),
            activations,
            weight_on_input: false,
        }
    }

    /// Name, `H`, `I`, `E`, `G`, `topk`.
    const SHAPES: [(&str, usize, usize, usize, usize, usize); 4] = [
        ("dsv3", 7168, 2048, 256, 256, 8),
        ("dsv3_ep8", 7168, 2048, 32, 256, 8),
        ("qwen235", 4096, 1536, 128, 128, 8),
        ("mixtral", 4096, 14336, 8, 8, 2),
    ];

    fn choice(shape: usize, tokens: usize) -> LayerChoice {
        let (_, hidden, intermediate, experts, global, topk) = SHAPES[shape];
        let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
        LayerChoice::new(&shape, &config(topk, global, ActivationFormat::E4m3), tokens, H200).unwrap()
    }

    #[test]
    fn a_decode_call_of_deepseek_v3_takes_a_tenth_of_the_references_workspace() {
        // 64 tokens: the reference sizes for 33,024 rows of GEMM 1's result and of GEMM 2's, both bf16.
        const REFERENCE: usize = 33_024 * (2 * 4096 + 2 * 7168);
        let choice = choice(0, 64);
        println!("{choice}; the reference: {REFERENCE}");
        assert_eq!(choice.plan.m_sum(), 2304);
        assert!(10 * choice.workspace_bytes < REFERENCE, "{choice}");
    }

    #[test]
    fn rows_row_tile_and_launches_over_shapes_and_tokens_are_as_written_down() {
        // `M_sum`, row tile, launches for 1, 8, 64, 256, 512, 513, 4096 and 16384 tokens.
        const TOKENS: [usize; 8] = [1, 8, 64, 256, 512, 513, 4096, 16384];
        let written: [[(usize, usize, usize); 8]; 4] = [
            [
                (64, 16, 5),
                (512, 16, 5),
                (2304, 16, 5),
                (3840, 16, 5),
                (5888, 32, 5),
                (5896, 32, 7),
                (34560, 192, 7),
                (132864, 192, 7),
            ],
            [
                (64, 16, 5),
                (288, 16, 5),
                (736, 16, 5),
                (2272, 16, 5),
                (4320, 32, 5),
                (4328, 32, 7),
                (32992, 192, 7),
                (131296, 192, 7),
            ],
            [
                (64, 16, 5),
                (512, 16, 5),
                (1408, 16, 5),
                (2944, 32, 5),
                (4992, 64, 5),
                (5000, 64, 7),
                (33664, 192, 7),
                (131968, 192, 7),
            ],
            [
                (16, 16, 5),
                (72, 16, 5),
                (184, 32, 5),
                (568, 128, 5),
                (1080, 192, 5),
                (1080, 192, 5),
                (8248, 192, 7),
                (32824, 192, 7),
            ],
        ];
        for (shape, expected) in written.into_iter().enumerate() {
            let found = TOKENS.map(|tokens| {
                let LayerChoice { plan, row_tile, launches, .. } = choice(shape, tokens);
                (plan.m_sum(), row_tile, launches)
            });
            assert_eq!(found, expected, "{}", SHAPES[shape].0);
        }
    }

    #[test]
    fn the_worklists_row_tile_is_both_gemms() {
        for shape in 0..SHAPES.len() {
            for tokens in (0..600).chain([1024, 4096, 16384, 65536]) {
                let choice = choice(shape, tokens);
                assert_eq!((choice.gemm1.row_tile, choice.gemm2.row_tile), (choice.row_tile, choice.row_tile));
            }
        }
    }

    #[test]
    fn parts_do_not_overlap_and_fill_the_workspace() {
        for (hidden, intermediate, experts, topk, tokens) in
            [(128, 128, 1, 1, 1), (2944, 384, 7, 3, 33), (256, 2048, 256, 8, 64)]
        {
            for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
                let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
                let config = config(topk, experts, activations);
                let choice = LayerChoice::new(&shape, &config, tokens, H200).unwrap();
                let (plan, row_tile) = (choice.plan, choice.row_tile);
                let offsets = Offsets::new(&shape, &config, &plan, row_tile, H200).unwrap();
                let parts = offsets.at(4096, &plan, row_tile).unwrap();
                let e4m3 = activations == ActivationFormat::E4m3;
                let m_sum = plan.m_sum() as u64;
                let widest = hidden.max(intermediate) as u64;
                let ends = [
                    (parts.layout.expert_num_tokens, LayoutBuffers::space_bytes(&plan, row_tile).unwrap() as u64),
                    (parts.front, m_sum * widest * if e4m3 { 1 } else { 2 }),
                    (parts.scales, if e4m3 { 4 * m_sum * widest / 128 } else { 0 }),
                    (parts.back, 2 * m_sum * hidden.max(2 * intermediate) as u64),
                ];
                let mut end = 4096 + route::workspace_bytes(&plan, H200).unwrap() as u64;
                for (at, bytes) in ends {
                    assert!(at >= end && at % 256 == 0, "{ends:?}");
                    end = at + bytes;
                }
                let all = 4096 + choice.workspace_bytes as u64;
                assert!(end <= all && all - end < 256, "{end} of {all}");
                assert!(offsets.at(4096 + 16, &plan, row_tile).is_err());
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let shape = LayerShape::new(256, 128, 4).unwrap();
        let good = config(2, 4, ActivationFormat::E4m3);
        let refuse = |config: LayerConfig, tokens: usize, start: &str| {
            let error = LayerChoice::new(&shape, &config, tokens, H200).unwrap_err();
            assert!(error.to_string().starts_with(start), "{error}");
        };
        refuse(LayerConfig { topk: 0, ..good }, 1, "topk is 0");
        refuse(LayerConfig { global_experts: 0, ..good }, 1, "global_experts is 0");
        refuse(good, 1 << 31, "M * topk overflows");
        refuse(good, usize::MAX, "M * topk overflows");
    }
}
