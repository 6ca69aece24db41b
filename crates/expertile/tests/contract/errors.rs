//! Everything the library refuses: the variant, the message, and that nothing was written.

use expertile::cpu::{
    self, Activations, Cpu, ExpertParallelLayer, Isa, Layer, PackedWeights, PackedWeightsBuilder, RowScales,
    SharedExpert, TokenRows, grouped_gemm, grouped_gemm_of_segments, grouped_gemm_with_bias,
    grouped_gemm_workspace_bytes,
};
use expertile::exchange::{self, Alone, Exchange, Threads};
use expertile::int4::Int4Scales;
use expertile::plan::{
    compute_aligned_m, compute_aligned_m_and_alignment, expert_num_tokens_round_up_and_sum, round_up, tight_m_sum,
};
use expertile::{
    Activation, ActivationFormat, AlignmentRule, Arch, Combine, Dispatch, Dtype, E4m3, Error, GateUpOrder, Group,
    GroupWorth, Groups, LayerConfig, LayerShape, Layout, MatrixRef, Padding, ParallelConfig, Placement, Plan, Result,
    Router, Routing, ScaleFormat, ScaleLayout, ScaleRounding, Scales, ScalesMut, Scoring, Segments, TokenExperts,
    WeightFormat,
};
use half::bf16;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Poisoned outputs, large enough for every refused call had it been accepted.
#[derive(Debug, Clone, PartialEq)]
struct Outputs {
    e4m3: Vec<E4m3>,
    bf16: Vec<bf16>,
    f32: Vec<f32>,
    i32: Vec<i32>,
}

impl Outputs {
    fn poisoned() -> Self {
        Self {
            e4m3: vec![E4m3(0xaa); 8192],
            bf16: vec![bf16::from_f32(-77.0); 8192],
            f32: vec![-77.0; 8192],
            i32: vec![0x7777; 8192],
        }
    }
}

/// Two tokens of two slots over two experts, aligned to 4: `M_sum` = 8. The layout's space is leaked: a few bytes a
/// test.
fn layout() -> Layout<'static> {
    let plan = Plan::with_m_sum(2, 2, 2, 4, 8).unwrap();
    let space = vec![0; Layout::space_len(&plan).unwrap()].leak();
    let ids = MatrixRef::new(&[0i64, 1, 1, -1], 2, 2).unwrap();
    Layout::build(&plan, &Routing::new(ids, 2, None).unwrap(), space).unwrap()
}

/// Two tokens of one slot.
fn layout_of_one_slot() -> Layout<'static> {
    let plan = Plan::with_m_sum(2, 1, 2, 4, 8).unwrap();
    let space = vec![0; Layout::space_len(&plan).unwrap()].leak();
    let ids = MatrixRef::new(&[0i64, 1], 2, 1).unwrap();
    Layout::build(&plan, &Routing::new(ids, 2, None).unwrap(), space).unwrap()
}

fn zeros<T: bytemuck::Zeroable + Copy>(rows: usize, cols: usize) -> MatrixRef<'static, T> {
    MatrixRef::new(vec![T::zeroed(); rows * cols].leak(), rows, cols).unwrap()
}

fn ids(rows: usize, cols: usize, id: i64) -> MatrixRef<'static, i64> {
    MatrixRef::new(vec![id; rows * cols].leak(), rows, cols).unwrap()
}

fn quantize(out: &mut Outputs, layout: &Layout<'_>, x: MatrixRef<'_, f32>, weights: Option<usize>) -> Result<()> {
    let weights = weights.map(|rows| zeros::<f32>(rows, 1));
    let scales = ScalesMut::f32(ScaleFormat::HOPPER, &mut out.f32);
    cpu::quantize_permute(&Cpu::new(), x, weights, layout, Padding::Zero, &mut out.e4m3, scales)
}

fn ready(out: &mut Outputs, scales: RowScales<'_>) -> Result<()> {
    let x = zeros::<E4m3>(2, 128);
    let format = ScaleFormat::HOPPER;
    let sink = ScalesMut::f32(format, &mut out.f32);
    cpu::permute_quantized(&Cpu::new(), x, scales, &layout(), Padding::Zero, &mut out.e4m3, sink)
}

fn packed() -> ScaleFormat {
    ScaleFormat::new(Group::G128, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo).unwrap()
}

fn route(out: &mut Outputs, router: Router) -> Result<()> {
    router.route(zeros::<f32>(2, 6), &mut out.i32, &mut out.f32)
}

fn sigmoid(topk: usize, groups: usize, topk_groups: usize, bias: usize) -> Router {
    Router {
        correction_bias: vec![0.0; bias],
        groups: Some(Groups { count: groups, topk: topk_groups, worth: GroupWorth::BestTwo }),
        ..Router::sigmoid(topk)
    }
}

fn sparse_mixer(topk: usize, jitter: f32) -> Router {
    Router { scoring: Scoring::SparseMixer { jitter }, ..Router::softmax(topk, false) }
}

/// A call that must be refused: the variant, how its message begins, the call.
type Refusal = (&'static str, &'static str, fn(&mut Outputs) -> Result<()>);

const MATRICES: &[Refusal] = &[
    ("Stride", "data has strides [8, 1]", |_| MatrixRef::with_strides(&[0.0f32; 10], 2, 3, 8, 1).map(drop)),
    ("Stride", "data has strides [3, 1]", |_| MatrixRef::with_strides(&[0.0f32; 0], 1, 1, 3, 1).map(drop)),
    ("Overflow", "(rows - 1) * row_stride overflows", |_| {
        MatrixRef::with_strides(&[0.0f32; 9], 3, 1, usize::MAX, 1).map(drop)
    }),
    ("Overflow", "offset of the last element overflows", |_| {
        MatrixRef::with_strides(&[0.0f32; 9], 2, 2, usize::MAX, 1).map(drop)
    }),
    ("Overflow", "rows * cols overflows", |_| MatrixRef::new(&[0.0f32; 9], usize::MAX, 2).map(drop)),
    ("BufferTooSmall", "data holds 9 elements, expected at least 10", |_| MatrixRef::new(&[0.0f32; 9], 2, 5).map(drop)),
];

const ROUTING: &[Refusal] = &[
    ("Value", "topk is 0", |_| Routing::new(ids(3, 0, 0), 2, None).map(drop)),
    ("Value", "local_experts is 0", |_| Routing::new(ids(3, 1, -1), 0, None).map(drop)),
    ("Value", "local_experts is 2147483648", |_| Routing::new(ids(3, 1, -1), 1 << 31, None).map(drop)),
    ("ExpertId", "topk_ids[0, 0] is 2, expected an id below 2", |_| Routing::new(ids(1, 1, 2), 2, None).map(drop)),
    ("ExpertId", "topk_ids[0, 0] is 9223372036854775807", |_| Routing::new(ids(1, 1, i64::MAX), 2, None).map(drop)),
    ("ExpertId", "topk_ids[0, 0] is 3, expected an id below 3", |_| {
        Routing::new(ids(1, 1, 3), 2, Some(&[0, 1, -1])).map(drop)
    }),
    ("ExpertId", "topk_ids[0, 0] is 0, expected an id below 0", |_| Routing::new(ids(1, 1, 0), 2, Some(&[])).map(drop)),
    ("MapEntry", "expert_map[1] is 2, expected a local expert below 2", |_| {
        Routing::new(ids(1, 1, 0), 2, Some(&[0, 2])).map(drop)
    }),
    ("BufferTooSmall", "expert_num_tokens holds 1 elements, expected at least 2", |out| {
        Routing::new(ids(1, 1, 0), 2, None)?.count_expert_num_tokens(&mut out.i32[..1])
    }),
    // One element in memory, by strides of zero more than could ever be walked.
    ("Overflow", "M * topk overflows: 1099511627776 * 8 > 2147483647", |_| {
        Routing::new(MatrixRef::with_strides(&[0i64], 1 << 40, 8, 0, 0)?, 2, None).map(drop)
    }),
    ("Overflow", "M * topk overflows: 4611686018427387904 * 4", |out| {
        let logits = MatrixRef::with_strides(&[0.0f32], 1 << 62, 8, 0, 0)?;
        Router::softmax(4, true).route(logits, &mut out.i32, &mut out.f32)
    }),
    ("Value", "topk is 0", |out| route(out, Router::softmax(0, true))),
    ("Value", "topk is 7", |out| route(out, Router::softmax(7, true))),
    ("Value", "topk is 3, expected 1 to 2", |out| route(out, sigmoid(3, 3, 1, 6))),
    ("Value", "groups is 0", |out| route(out, sigmoid(1, 0, 1, 6))),
    ("Value", "groups is 4", |out| route(out, sigmoid(1, 4, 1, 6))),
    ("Value", "topk_groups is 0", |out| route(out, sigmoid(1, 3, 0, 6))),
    ("Value", "topk_groups is 4", |out| route(out, sigmoid(1, 3, 4, 6))),
    ("Shape", "correction_bias has shape [5], expected [6]", |out| route(out, sigmoid(1, 3, 3, 5))),
    ("Shape", "logit_bias has shape [5], expected [6]", |out| {
        route(out, Router { logit_bias: vec![0.0; 5], ..Router::softmax(1, true) })
    }),
    ("Value", "topk is 1, expected 2 for a sparse mixer", |out| route(out, sparse_mixer(1, 0.01))),
    ("Parameter", "jitter is -1, expected a finite number of at least 0", |out| route(out, sparse_mixer(2, -1.0))),
    ("BufferTooSmall", "topk_ids holds 3 elements, expected at least 4", |out| {
        let router = Router::softmax(2, true);
        router.route(zeros::<f32>(2, 6), &mut out.i32[..3], &mut out.f32)
    }),
    ("BufferTooSmall", "topk_weights holds 3 elements, expected at least 4", |out| {
        let router = Router::softmax(2, true);
        router.route(zeros::<f32>(2, 6), &mut out.i32, &mut out.f32[..3])
    }),
];

const PLAN: &[Refusal] = &[
    ("Alignment", "alignment is 0, expected at least 1", |_| compute_aligned_m(1, 1, 1, 0, None, None).map(drop)),
    ("Alignment", "alignment is 0", |_| tight_m_sum(1, 1, 1, 0, TokenExperts::Distinct).map(drop)),
    ("Alignment", "alignment is 0", |_| round_up(1, 0).map(drop)),
    ("Alignment", "alignment is 0", |_| expert_num_tokens_round_up_and_sum(&[1], 0).map(drop)),
    ("Alignment", "alignment is 0", |_| Plan::with_m_sum(1, 1, 1, 0, 0).map(drop)),
    ("Value", "topk is 0", |_| compute_aligned_m(1, 0, 1, 1, None, None).map(drop)),
    ("Value", "topk is 0", |_| tight_m_sum(1, 0, 1, 1, TokenExperts::Distinct).map(drop)),
    ("Value", "topk is 0", |_| Plan::with_m_sum(1, 0, 1, 1, 1).map(drop)),
    ("Value", "local_experts is 0", |_| compute_aligned_m(1, 1, 0, 1, None, None).map(drop)),
    ("Value", "local_experts is 0", |_| tight_m_sum(1, 1, 0, 1, TokenExperts::Distinct).map(drop)),
    ("Value", "local_experts is 0", |_| Plan::exact(1, 1, &[], 1).map(drop)),
    ("Value", "num_groups is 0", |_| AlignmentRule::VllmFork.theoretical(Arch::Sm120, None, Some(0)).map(drop)),
    ("Value", "m_sum is 12, expected a multiple of the alignment 8", |_| Plan::with_m_sum(1, 1, 1, 8, 12).map(drop)),
    ("Count", "expert_num_tokens[1] is -1, expected at least 0", |_| {
        expert_num_tokens_round_up_and_sum(&[3, -1], 8).map(drop)
    }),
    ("Shape", "expert_num_tokens has shape [1], expected [2]", |_| {
        compute_aligned_m_and_alignment(1, 1, 2, 8, None, Some(&[1])).map(drop)
    }),
    ("Overflow", "M * topk overflows", |_| compute_aligned_m(usize::MAX, 2, 1, 1, None, None).map(drop)),
    ("Overflow", "min(T, E) * (A - 1) overflows", |_| compute_aligned_m(9, 1, 9, usize::MAX, None, None).map(drop)),
    ("Overflow", "rows rounded up to the alignment overflows", |_| round_up(usize::MAX, 2).map(drop)),
    ("Overflow", "M_sum overflows", |_| tight_m_sum(1 << 40, 8, 128, 1 << 62, TokenExperts::Distinct).map(drop)),
    ("Overflow", "M_sum overflows: 2147483648 > 2147483647", |_| Plan::with_m_sum(1, 1, 1, 1, 1 << 31).map(drop)),
    ("Overflow", "M * topk overflows: 2147483648 > 2147483647", |_| Plan::with_m_sum(1 << 30, 2, 1, 1, 1).map(drop)),
    ("Name", "arch is \"sm80\", expected one of", |_| "sm80".parse::<Arch>().map(drop)),
    ("Name", "rule is \"deepgemm\", expected one of", |_| "deepgemm".parse::<AlignmentRule>().map(drop)),
    ("Name", "weights is \"f32\", expected one of e4m3, bf16, mxfp4", |_| "f32".parse::<WeightFormat>().map(drop)),
    ("Name", "activations is \"fp8\", expected one of e4m3", |_| "fp8".parse::<ActivationFormat>().map(drop)),
    ("Name", "scale_layout is \"tma\", expected one of row_major", |_| "tma".parse::<ScaleLayout>().map(drop)),
];

const LAYOUT: &[Refusal] = &[
    ("Shape", "topk_ids has shape [4, 1], expected [2, 2], as planned", |out| {
        let plan = Plan::with_m_sum(2, 2, 2, 2, 8)?;
        Layout::build(&plan, &Routing::new(ids(4, 1, 0), 2, None)?, &mut out.i32).map(drop)
    }),
    ("Value", "local_experts is 2, expected 3, as planned", |out| {
        let plan = Plan::with_m_sum(4, 1, 3, 2, 8)?;
        Layout::build(&plan, &Routing::new(ids(4, 1, 0), 2, None)?, &mut out.i32).map(drop)
    }),
    ("BufferTooSmall", "space holds 17 elements, expected at least 18", |out| {
        let plan = Plan::with_m_sum(4, 1, 2, 2, 8)?;
        Layout::build(&plan, &Routing::new(ids(4, 1, 0), 2, None)?, &mut out.i32[..17]).map(drop)
    }),
    ("MSum", "m_sum is 2, expected at least 4 for these counts at alignment 2", |_| {
        // A layout that does not come to be leaves its space unspecified, as `Layout::build` says: not `out`.
        let plan = Plan::with_m_sum(4, 1, 2, 2, 2)?;
        Layout::build(&plan, &Routing::new(ids(4, 1, 0), 2, None)?, &mut [0; 64]).map(drop)
    }),
    ("Alignment", "alignment is 0", |out| Layout::from_psum(&[5], 0, 8, &mut out.i32).map(drop)),
    ("Value", "local_experts is 0", |out| Layout::from_psum(&[], 8, 8, &mut out.i32).map(drop)),
    ("Value", "m_sum is 9", |out| Layout::from_psum(&[5], 8, 9, &mut out.i32).map(drop)),
    ("Count", "psum[0] is -1, expected at least 0", |out| Layout::from_psum(&[-1], 8, 8, &mut out.i32).map(drop)),
    ("Count", "psum[1] is 7, expected at least 8", |out| Layout::from_psum(&[5, 7], 8, 16, &mut out.i32).map(drop)),
    ("MSum", "m_sum is 16, expected at least 24", |out| Layout::from_psum(&[5, 17], 8, 16, &mut out.i32).map(drop)),
    ("BufferTooSmall", "space holds 10 elements, expected at least 11", |out| {
        Layout::from_psum(&[5], 8, 8, &mut out.i32[..10]).map(drop)
    }),
    ("Alignment", "alignment is 4, expected a multiple of the GEMM's row tile, 8", |_| layout().check_row_tile(8)),
    ("Alignment", "alignment is 4, expected a multiple of the GEMM's row tile, 0", |_| layout().check_row_tile(0)),
    ("Alignment", "alignment is 4, expected the GEMM's row tile, 2", |_| layout().psum_for_row_tile(2).map(drop)),
];

const PERMUTE: &[Refusal] = &[
    ("Name", "rounding is \"Exact\", expected one of PowerOfTwo", |_| {
        ScaleFormat::new(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::Exact).map(drop)
    }),
    ("Value", "group is 64, expected 32 or 128", |_| Group::from_size(64).map(drop)),
    ("Value", "hidden is 160, expected a positive multiple of 64: groups of 128", |out| {
        quantize(out, &layout(), zeros(2, 160), None)
    }),
    ("Value", "hidden is 0", |out| quantize(out, &layout(), zeros(2, 0), None)),
    ("Shape", "x has shape [3, 128], expected [2, 128]", |out| quantize(out, &layout(), zeros(3, 128), None)),
    ("Value", "topk is 2, expected 1, where router weights multiply the input", |out| {
        quantize(out, &layout(), zeros(2, 128), Some(2))
    }),
    ("Shape", "topk_weights has shape [3, 1], expected [2, 1]", |out| {
        quantize(out, &layout_of_one_slot(), zeros(2, 128), Some(3))
    }),
    ("Dtype", "scales has dtype i32, expected f32", |out| {
        let (x, format) = (zeros::<f32>(2, 128), ScaleFormat::HOPPER);
        let scales = ScalesMut::ue8m0(format, &mut out.i32);
        cpu::quantize_permute(&Cpu::new(), x, None, &layout(), Padding::Zero, &mut out.e4m3, scales)
    }),
    ("Dtype", "scales has dtype f32, expected i32", |out| {
        let x = zeros::<f32>(2, 128);
        let scales = ScalesMut::f32(packed(), &mut out.f32);
        cpu::quantize_permute(&Cpu::new(), x, None, &layout(), Padding::Zero, &mut out.e4m3, scales)
    }),
    ("BufferTooSmall", "scales holds 7 elements, expected at least 8", |out| {
        let (x, format) = (zeros::<f32>(2, 128), ScaleFormat::HOPPER);
        let scales = ScalesMut::f32(format, &mut out.f32[..7]);
        cpu::quantize_permute(&Cpu::new(), x, None, &layout(), Padding::Zero, &mut out.e4m3, scales)
    }),
    ("BufferTooSmall", "out holds 1023 elements, expected at least 1024", |out| {
        let (x, format) = (zeros::<f32>(2, 128), ScaleFormat::HOPPER);
        let (rows, scales) = (&mut out.e4m3[..1023], ScalesMut::f32(format, &mut out.f32));
        cpu::quantize_permute(&Cpu::new(), x, None, &layout(), Padding::Zero, rows, scales)
    }),
    ("Dtype", "x_scales has dtype u8, expected f32", |out| ready(out, RowScales::Ue8m0(zeros(2, 1)))),
    ("Dtype", "x_scales has dtype f32, expected u8", |out| {
        let (x, scales) = (zeros::<E4m3>(2, 128), RowScales::F32(zeros(2, 1)));
        let sink = ScalesMut::ue8m0(packed(), &mut out.i32);
        cpu::permute_quantized(&Cpu::new(), x, scales, &layout(), Padding::Zero, &mut out.e4m3, sink)
    }),
    ("Shape", "x_scales has shape [2, 2], expected [2, 1]", |out| ready(out, RowScales::F32(zeros(2, 2)))),
    ("Shape", "x_scales has shape [1, 1], expected [2, 1]", |out| ready(out, RowScales::F32(zeros(1, 1)))),
    ("Shape", "x has shape [1, 5], expected [2, 5]", |out| {
        cpu::permute_rows(&Cpu::new(), zeros::<bf16>(1, 5), &layout(), Padding::Zero, &mut out.bf16)
    }),
    ("Value", "hidden is 0", |out| {
        cpu::permute_rows(&Cpu::new(), zeros::<bf16>(2, 0), &layout(), Padding::Zero, &mut out.bf16)
    }),
    ("BufferTooSmall", "out holds 39 elements, expected at least 40", |out| {
        cpu::permute_rows(&Cpu::new(), zeros::<bf16>(2, 5), &layout(), Padding::Zero, &mut out.bf16[..39])
    }),
    ("Value", "topk is 2, expected 1, where router weights multiply the input", |out| {
        let (x, weights) = (zeros::<f32>(2, 5), Some(zeros::<f32>(2, 2)));
        cpu::permute_convert(&Cpu::new(), x, weights, &layout(), Padding::Zero, &mut out.bf16)
    }),
    ("Overflow", "M_sum * H overflows", |out| {
        // Strides of zero: one row, read again and again.
        let x = MatrixRef::with_strides(&[bf16::ZERO], 2, usize::MAX, 0, 0)?;
        cpu::permute_rows(&Cpu::new(), x, &layout(), Padding::Zero, &mut out.bf16)
    }),
];

fn in_place(out: &mut [E4m3], scales: ScalesMut<'_>, rows: usize, hidden: usize) -> Result<()> {
    cpu::quantize_rows(&Cpu::new(), zeros::<f32>(rows, hidden), &layout(), out, scales)
}

const IN_PLACE: &[Refusal] = &[
    ("Shape", "rows has shape [7, 128], expected [8, 128]", |out| {
        in_place(&mut out.e4m3, ScalesMut::f32(ScaleFormat::HOPPER, &mut out.f32), 7, 128)
    }),
    ("Value", "hidden is 100", |out| {
        in_place(&mut out.e4m3, ScalesMut::f32(ScaleFormat::HOPPER, &mut out.f32), 8, 100)
    }),
    ("Dtype", "scales has dtype i32", |out| {
        in_place(&mut out.e4m3, ScalesMut::ue8m0(ScaleFormat::HOPPER, &mut out.i32), 8, 128)
    }),
    ("BufferTooSmall", "scales holds 7 elements", |out| {
        in_place(&mut out.e4m3, ScalesMut::f32(ScaleFormat::HOPPER, &mut out.f32[..7]), 8, 128)
    }),
    ("BufferTooSmall", "out holds 1023 elements", |out| {
        in_place(&mut out.e4m3[..1023], ScalesMut::f32(ScaleFormat::HOPPER, &mut out.f32), 8, 128)
    }),
];

const ACTIVATION: &[Refusal] = &[
    ("Value", "intermediate is 0, expected at least 1", |out| {
        cpu::activate(&Cpu::new(), &layout(), 0, &[], &Activation::default(), &mut out.bf16)
    }),
    ("BufferTooSmall", "gate_up holds 47 elements, expected at least 48", |out| {
        cpu::activate(&Cpu::new(), &layout(), 3, &[bf16::ZERO; 47], &Activation::default(), &mut out.bf16)
    }),
    ("BufferTooSmall", "out holds 23 elements, expected at least 24", |out| {
        cpu::activate(&Cpu::new(), &layout(), 3, &[bf16::ZERO; 48], &Activation::default(), &mut out.bf16[..23])
    }),
    ("Overflow", "M_sum * I overflows", |out| {
        cpu::activate(&Cpu::new(), &layout(), usize::MAX, &[], &Activation::default(), &mut out.bf16)
    }),
    ("Value", "hidden is 32, expected a positive multiple of 64: groups of 128", |out| {
        let (gate_up, scales) = (vec![bf16::ZERO; 1024], ScalesMut::f32(ScaleFormat::HOPPER, &mut out.f32));
        let activation = Activation::default();
        cpu::activate_quantize(&Cpu::new(), &layout(), 32, &gate_up, &activation, &mut out.e4m3, scales)
    }),
    ("Dtype", "scales has dtype i32, expected f32", |out| {
        let (gate_up, scales) = (vec![bf16::ZERO; 2048], ScalesMut::ue8m0(ScaleFormat::HOPPER, &mut out.i32));
        let activation = Activation::default();
        cpu::activate_quantize(&Cpu::new(), &layout(), 128, &gate_up, &activation, &mut out.e4m3, scales)
    }),
    ("BufferTooSmall", "gate_up holds 2047 elements, expected at least 2048", |out| {
        let (gate_up, scales) = (vec![bf16::ZERO; 2047], ScalesMut::f32(ScaleFormat::HOPPER, &mut out.f32));
        let activation = Activation::default();
        cpu::activate_quantize(&Cpu::new(), &layout(), 128, &gate_up, &activation, &mut out.e4m3, scales)
    }),
];

const UNGATED: &[Refusal] = &[("BufferTooSmall", "gate_up holds 23 elements, expected at least 24", |out| {
    cpu::activate(&Cpu::new(), &layout(), 3, &[bf16::ZERO; 23], &Activation::Relu2, &mut out.bf16)
})];

const UNPERMUTE: &[Refusal] = &[
    ("Shape", "rows has shape [7, 3], expected [8, 3]", |out| {
        cpu::unpermute(&Cpu::new(), zeros::<bf16>(7, 3), &layout(), None, &mut out.bf16)
    }),
    ("Shape", "topk_weights has shape [2, 1], expected [2, 2]", |out| {
        cpu::unpermute(&Cpu::new(), zeros::<bf16>(8, 3), &layout(), Some(zeros(2, 1)), &mut out.bf16)
    }),
    ("Value", "hidden is 0, expected at least 1", |out| {
        cpu::unpermute(&Cpu::new(), zeros::<bf16>(8, 0), &layout(), None, &mut out.bf16)
    }),
    ("BufferTooSmall", "out holds 5 elements, expected at least 6", |out| {
        cpu::unpermute(&Cpu::new(), zeros::<bf16>(8, 3), &layout(), None, &mut out.bf16[..5])
    }),
];

/// `inv_perm [2, 2]` with `last` in its last slot, over eight rows of three values.
fn unpermute_slots(out: &mut [bf16], last: i32, routing: Option<(usize, usize)>, weight_cols: usize) -> Result<()> {
    let inv_perm = [0, 7, -1, last];
    let inv_perm = MatrixRef::new(&inv_perm, 2, 2)?;
    let routing = routing.map(|(tokens, topk)| Routing::new(ids(tokens, topk, 0), 1, None)).transpose()?;
    let weights = zeros(2, weight_cols);
    cpu::unpermute_slots(&Cpu::new(), zeros::<bf16>(8, 3), inv_perm, routing.as_ref(), Some(weights), out)
}

const UNPERMUTE_SLOTS: &[Refusal] = &[
    ("SlotRow", "inv_perm[1, 1] is 8, expected a row below 8", |out| unpermute_slots(&mut out.bf16, 8, None, 2)),
    ("SlotRow", "inv_perm[1, 1] is 2147483647", |out| unpermute_slots(&mut out.bf16, i32::MAX, Some((2, 2)), 2)),
    ("Shape", "topk_ids has shape [2, 3], expected [2, 2], as inv_perm", |out| {
        unpermute_slots(&mut out.bf16, 1, Some((2, 3)), 2)
    }),
    ("Shape", "topk_weights has shape [2, 3], expected [2, 2]", |out| unpermute_slots(&mut out.bf16, 1, None, 3)),
    ("BufferTooSmall", "out holds 5 elements, expected at least 6", |out| {
        unpermute_slots(&mut out.bf16[..5], 1, None, 2)
    }),
    ("BufferTooSmall", "out holds 5 elements, expected at least 3298534883328", |out| {
        let expanded = MatrixRef::with_strides(&[0i32], 1 << 40, 1 << 20, 0, 0)?;
        cpu::unpermute_slots(&Cpu::new(), zeros::<bf16>(8, 3), expanded, None, None, &mut out.bf16[..5])
    }),
    ("Overflow", "M * topk overflows: 1 * 1099511627776 > 2147483647", |out| {
        let expanded = MatrixRef::with_strides(&[0i32], 1, 1 << 40, 0, 0)?;
        cpu::unpermute_slots(&Cpu::new(), zeros::<bf16>(8, 3), expanded, None, None, &mut out.bf16)
    }),
    ("Value", "topk is 0", |out| {
        cpu::unpermute_slots(&Cpu::new(), zeros::<bf16>(8, 3), zeros(2, 0), None, None, &mut out.bf16)
    }),
    ("Value", "hidden is 0", |out| {
        cpu::unpermute_slots(&Cpu::new(), zeros::<bf16>(8, 0), zeros(2, 2), None, None, &mut out.bf16)
    }),
];

fn bf16_weights([experts, n, k]: [usize; 3]) -> PackedWeights {
    PackedWeights::pack_bf16(&Cpu::new(), &vec![bf16::ONE; experts * n * k], experts, n, k).unwrap()
}

fn e4m3_weights([experts, n, k]: [usize; 3]) -> PackedWeights {
    let scales = vec![1.0; experts * n.div_ceil(128) * k.div_ceil(128)];
    PackedWeights::pack_e4m3(&Cpu::new(), &vec![E4m3(0); experts * n * k], &scales, experts, n, k).unwrap()
}

/// Weights of zero whose last scale is that.
fn mxfp4_weights([experts, n, k]: [usize; 3], last_scale: u8) -> Result<PackedWeights> {
    let (blocks, mut scales) = (vec![0; experts * n * k / 2], vec![0; experts * n * (k / 32)]);
    *scales.last_mut().unwrap() = last_scale;
    PackedWeights::pack_mxfp4(&Cpu::new(), &blocks, &scales, experts, n, k)
}

/// MXFP4 rows, 32 of blocks and of scales, each so wide.
fn mxfp4_rows(first_row: usize, expert: usize, [width, groups]: [usize; 2]) -> Result<()> {
    let mut builder = builder(WeightFormat::Mxfp4);
    builder.add_mxfp4_rows(0, 0, zeros(32, 64), zeros(32, 4))?;
    builder.add_mxfp4_rows(expert, first_row, zeros(32, width), zeros(32, groups))
}

/// int4 rows, 32 of blocks and of scales, each so wide, after others with scales of bf16.
fn int4_rows(first_row: usize, expert: usize, [width, groups]: [usize; 2], scale: f32) -> Result<()> {
    let mut builder = builder(WeightFormat::Int4);
    builder.add_int4_rows(0, 0, zeros(32, 64), Int4Scales::Bf16(zeros(32, 4)))?;
    let scales = vec![bf16::from_f32(scale); 32 * groups];
    let scales = Int4Scales::Bf16(MatrixRef::new(&scales, 32, groups)?);
    builder.add_int4_rows(expert, first_row, zeros(32, width), scales)
}

fn int4_weights() -> Result<PackedWeights> {
    let mut builder = builder(WeightFormat::Int4);
    for expert in 0..2 {
        builder.add_int4_rows(expert, 0, zeros(64, 64), Int4Scales::F16(zeros(64, 4)))?;
    }
    builder.finish()
}

fn builder(format: WeightFormat) -> PackedWeightsBuilder {
    PackedWeightsBuilder::new(&Cpu::new(), format, 2, 64, 128).unwrap()
}

fn add_rows(first_row: usize, expert: usize, rows: usize, k: usize) -> Result<PackedWeightsBuilder> {
    let mut builder = builder(WeightFormat::Bf16);
    builder.add_bf16_rows(0, 0, zeros::<bf16>(32, 128))?;
    builder.add_bf16_rows(expert, first_row, zeros::<bf16>(rows, k))?;
    Ok(builder)
}

fn add_e4m3_rows(format: WeightFormat, first_row: usize, scale_rows: usize) -> Result<()> {
    builder(format).add_e4m3_rows(0, first_row, zeros(32, 128), zeros(scale_rows, 1))
}

fn channel_rows(format: WeightFormat, first_row: usize, scales: usize) -> Result<()> {
    builder(format).add_e4m3_channel_rows(0, first_row, zeros(32, 128), &vec![1.0; scales])
}

/// Two experts' gate and up of 192 rows, K = 3.
fn gate_up(weights: usize, scales: usize) -> Result<PackedWeights> {
    let (weights, scales) = (vec![E4m3(0); weights], vec![1.0; scales]);
    PackedWeights::pack_gate_up_e4m3(&Cpu::new(), &weights, &scales, 2, 192, 3, GateUpOrder::Halves)
}

/// Rows of gate and up of 70 rows each.
fn gate_up_rows(first_row: usize, rows: usize, scale_rows: usize) -> Result<()> {
    let mut builder = PackedWeightsBuilder::gate_up(&Cpu::new(), WeightFormat::E4m3, 2, 70, 128)?;
    builder.add_e4m3_rows(0, first_row, zeros(rows, 128), zeros(scale_rows, 1))
}

/// Rows of two experts of 64 x 128.
fn unpack(format: WeightFormat, expert: usize, first_row: usize, out: &mut [bf16]) -> Result<()> {
    let weights = match format {
        WeightFormat::Bf16 => bf16_weights([2, 64, 128]),
        WeightFormat::E4m3 => e4m3_weights([2, 64, 128]),
        WeightFormat::Mxfp4 => mxfp4_weights([2, 64, 128], 0).unwrap(),
        WeightFormat::Int4 => int4_weights().unwrap(),
    };
    weights.unpack_bf16_rows(&Cpu::new(), expert, first_row, out)
}

const WEIGHTS: &[Refusal] = &[
    ("WeightFormat", "weights is packed as e4m3, expected bf16", |out| {
        unpack(WeightFormat::E4m3, 0, 0, &mut out.bf16[..128])
    }),
    ("WeightFormat", "weights is packed as bf16, expected e4m3", |out| {
        bf16_weights([2, 64, 128]).unpack_e4m3_rows(&Cpu::new(), 0, 0, &mut out.e4m3[..128])
    }),
    ("WeightFormat", "weights is packed as bf16, expected mxfp4", |_| {
        bf16_weights([2, 64, 128]).unpack_mxfp4_rows(&Cpu::new(), 0, 0, &mut [0; 64], &mut [0; 4])
    }),
    ("Shape", "scales has shape [3], expected [4], the elements of [1, 4]", |_| {
        mxfp4_weights([2, 64, 128], 0)?.unpack_mxfp4_rows(&Cpu::new(), 0, 0, &mut [0; 64], &mut [0; 3])
    }),
    ("Value", "k is 48, expected a positive multiple of 32 for mxfp4 weights", |_| {
        mxfp4_weights([1, 1, 48], 0).map(drop)
    }),
    ("Value", "k is 33, expected a positive multiple of 32", |_| {
        PackedWeightsBuilder::gate_up(&Cpu::new(), WeightFormat::Mxfp4, 1, 1, 33).map(drop)
    }),
    ("Value", "scales is 255, expected at most 254, as 255 is NaN: that of row 63, group 3", |_| {
        mxfp4_weights([2, 64, 128], 255).map(drop)
    }),
    ("Shape", "blocks has shape [63], expected [64], the elements of [1, 2, 32]", |_| {
        PackedWeights::pack_mxfp4(&Cpu::new(), &[0; 63], &[0; 4], 1, 2, 64).map(drop)
    }),
    ("Shape", "scales has shape [5], expected [4], the elements of [1, 2, 2]", |_| {
        PackedWeights::pack_mxfp4(&Cpu::new(), &[0; 64], &[0; 5], 1, 2, 64).map(drop)
    }),
    ("WeightFormat", "builder is packed as bf16, expected mxfp4", |_| {
        builder(WeightFormat::Bf16).add_mxfp4_rows(0, 0, zeros(32, 64), zeros(32, 4))
    }),
    ("WeightFormat", "builder is packed as mxfp4, expected bf16", |_| {
        builder(WeightFormat::Mxfp4).add_bf16_rows(0, 0, zeros::<bf16>(32, 128))
    }),
    ("Shape", "blocks has shape [32, 63], expected [R, 64]: two values to a byte", |_| mxfp4_rows(32, 0, [63, 4])),
    ("Shape", "scales has shape [32, 3], expected [32, 4]", |_| mxfp4_rows(32, 0, [64, 3])),
    ("Value", "expert is 2, expected below 2", |_| mxfp4_rows(32, 2, [64, 4])),
    ("Shape", "rows has shape [32, 128], expected [R, 128] with R at most 31", |_| mxfp4_rows(33, 0, [64, 4])),
    ("Count", "added_rows[0] is 31, expected a row that was not added before", |_| mxfp4_rows(31, 0, [64, 4])),
    ("Shape", "blocks has shape [128, 64], expected those of a builder that was made for gate and up", |_| {
        builder(WeightFormat::Mxfp4).add_gate_up_mxfp4_rows(0, zeros(128, 64), zeros(128, 4), GateUpOrder::Halves)
    }),
    ("WeightFormat", "weights is packed as int4, expected bf16", |out| {
        unpack(WeightFormat::Int4, 0, 0, &mut out.bf16[..128])
    }),
    ("WeightFormat", "weights is packed as bf16, expected int4", |_| {
        bf16_weights([2, 64, 128]).unpack_int4_rows(&Cpu::new(), 0, 0, &mut [0; 64])
    }),
    ("Shape", "out has shape [126], expected [R, 128] with R at most 64", |_| {
        int4_weights()?.unpack_int4_rows(&Cpu::new(), 0, 0, &mut [0; 63])
    }),
    ("Value", "k is 48, expected a positive multiple of 32 for int4 weights", |_| {
        PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::Int4, 1, 1, 48).map(drop)
    }),
    ("Value", "scales is 32704, expected the bits of a finite bf16: that of row 32, group 0 is none", |_| {
        int4_rows(32, 0, [64, 4], f32::NAN)
    }),
    ("Value", "scales is 32640, expected the bits of a finite bf16", |_| int4_rows(32, 0, [64, 4], f32::INFINITY)),
    ("WeightFormat", "scales is packed as f16, expected bf16, as those before", |_| {
        let mut builder = builder(WeightFormat::Int4);
        builder.add_int4_rows(0, 0, zeros(32, 64), Int4Scales::Bf16(zeros(32, 4)))?;
        builder.add_int4_rows(0, 32, zeros(32, 64), Int4Scales::F16(zeros(32, 4)))
    }),
    ("WeightFormat", "builder is packed as mxfp4, expected int4", |_| {
        builder(WeightFormat::Mxfp4).add_int4_rows(0, 0, zeros(32, 64), Int4Scales::Bf16(zeros(32, 4)))
    }),
    ("WeightFormat", "builder is packed as int4, expected mxfp4", |_| {
        builder(WeightFormat::Int4).add_mxfp4_rows(0, 0, zeros(32, 64), zeros(32, 4))
    }),
    ("Shape", "blocks has shape [32, 63], expected [R, 64]: two values to a byte", |_| int4_rows(32, 0, [63, 4], 1.0)),
    ("Shape", "scales has shape [32, 3], expected [32, 4]", |_| int4_rows(32, 0, [64, 3], 1.0)),
    ("Value", "expert is 2, expected below 2", |_| int4_rows(32, 2, [64, 4], 1.0)),
    ("Shape", "rows has shape [32, 128], expected [R, 128] with R at most 31", |_| int4_rows(33, 0, [64, 4], 1.0)),
    ("Count", "added_rows[0] is 31, expected a row that was not added before", |_| int4_rows(31, 0, [64, 4], 1.0)),
    ("Shape", "blocks has shape [128, 64], expected those of a builder that was made for gate and up", |_| {
        let scales = Int4Scales::Bf16(zeros(128, 4));
        builder(WeightFormat::Int4).add_gate_up_int4_rows(0, zeros(128, 64), scales, GateUpOrder::Halves)
    }),
    ("Value", "expert is 2, expected below 2", |out| unpack(WeightFormat::Bf16, 2, 0, &mut out.bf16[..128])),
    ("Shape", "out has shape [127], expected [R, 128] with R at most 64", |out| {
        unpack(WeightFormat::Bf16, 0, 0, &mut out.bf16[..127])
    }),
    ("Shape", "out has shape [256], expected [R, 128] with R at most 1", |out| {
        unpack(WeightFormat::Bf16, 0, 63, &mut out.bf16[..256])
    }),
    ("Shape", "out has shape [128], expected [R, 128] with R at most 0", |out| {
        unpack(WeightFormat::Bf16, 1, 99, &mut out.bf16[..128])
    }),
    ("Value", "experts is 0, expected at least 1", |_| {
        PackedWeights::pack_bf16(&Cpu::new(), &[bf16::ONE], 0, 1, 1).map(drop)
    }),
    ("Value", "n is 0", |_| PackedWeights::pack_bf16(&Cpu::new(), &[bf16::ONE], 1, 0, 1).map(drop)),
    ("Value", "k is 0", |_| PackedWeights::pack_e4m3(&Cpu::new(), &[], &[], 1, 1, 0).map(drop)),
    ("Shape", "weights has shape [5], expected [6], the elements of [1, 2, 3]", |_| {
        PackedWeights::pack_bf16(&Cpu::new(), &[bf16::ONE; 5], 1, 2, 3).map(drop)
    }),
    ("Shape", "weights has shape [7], expected [6]", |_| {
        PackedWeights::pack_bf16(&Cpu::new(), &[bf16::ONE; 7], 1, 2, 3).map(drop)
    }),
    ("Shape", "weights has shape [5], expected [6]", |_| {
        PackedWeights::pack_e4m3(&Cpu::new(), &[E4m3(0); 5], &[1.0], 1, 2, 3).map(drop)
    }),
    ("Shape", "weights has shape [7], expected [6]", |_| {
        PackedWeights::pack_e4m3(&Cpu::new(), &[E4m3(0); 7], &[1.0], 1, 2, 3).map(drop)
    }),
    ("Shape", "scales has shape [3], expected [4], the elements of [2, 2, 1]", |_| {
        PackedWeights::pack_e4m3(&Cpu::new(), &[E4m3(0); 2 * 129 * 3], &[1.0; 3], 2, 129, 3).map(drop)
    }),
    ("Shape", "scales has shape [8], expected [6], the elements of [2, 3, 1]", |_| {
        // Two row blocks for each of gate and up, given for the two as one matrix.
        PackedWeights::pack_e4m3(&Cpu::new(), &[E4m3(0); 2 * 384 * 3], &[1.0; 8], 2, 384, 3).map(drop)
    }),
    ("Shape", "scales has shape [6], expected [8], the elements of [2, 4, 1]", |_| gate_up(2 * 384 * 3, 6).map(drop)),
    ("Shape", "scales has shape [9], expected [8]", |_| gate_up(2 * 384 * 3, 9).map(drop)),
    ("Shape", "weights has shape [2303], expected [2304]", |_| gate_up(2 * 384 * 3 - 1, 8).map(drop)),
    ("Shape", "weights has shape [2305], expected [2304]", |_| gate_up(2 * 384 * 3 + 1, 8).map(drop)),
    ("Shape", "weights has shape [7], expected [6]", |_| {
        let order = GateUpOrder::Interleaved;
        PackedWeights::pack_gate_up_bf16(&Cpu::new(), &[bf16::ONE; 7], 1, 1, 3, order).map(drop)
    }),
    ("Value", "intermediate is 0, expected at least 1", |_| {
        PackedWeightsBuilder::gate_up(&Cpu::new(), WeightFormat::Bf16, 1, 0, 1).map(drop)
    }),
    ("Overflow", "2 I overflows", |_| {
        PackedWeightsBuilder::gate_up(&Cpu::new(), WeightFormat::Bf16, 1, usize::MAX, 1).map(drop)
    }),
    ("Value", "first_row is 65, expected a multiple of 32 of gate's or up's rows", |_| gate_up_rows(65, 8, 1)),
    ("Shape", "rows has shape [40, 128], expected [R, 128] with R at most 38, the rest of gate's rows", |_| {
        gate_up_rows(32, 40, 1)
    }),
    ("Shape", "scales has shape [2, 1], expected [1, 1]", |_| gate_up_rows(70, 70, 2)),
    ("Shape", "scales has shape [31], expected [32], the elements of [32]", |_| {
        channel_rows(WeightFormat::E4m3, 0, 31)
    }),
    ("Value", "first_row is 8, expected a multiple of 32", |_| channel_rows(WeightFormat::E4m3, 8, 32)),
    ("WeightFormat", "builder is packed as bf16, expected e4m3", |_| channel_rows(WeightFormat::Bf16, 0, 32)),
    ("Shape", "rows has shape [64, 128], expected those of a builder that was made for gate and up", |_| {
        builder(WeightFormat::Bf16).add_gate_up_bf16_rows(0, zeros::<f32>(64, 128), GateUpOrder::Halves)
    }),
    ("Shape", "rows has shape [139, 128], expected [140, 128]", |_| {
        let mut builder = PackedWeightsBuilder::gate_up(&Cpu::new(), WeightFormat::Bf16, 2, 70, 128)?;
        builder.add_gate_up_bf16_rows(0, zeros::<bf16>(139, 128), GateUpOrder::Halves)
    }),
    ("Shape", "scales has shape [1, 1], expected [2, 1]", |_| {
        let mut builder = PackedWeightsBuilder::gate_up(&Cpu::new(), WeightFormat::E4m3, 2, 70, 128)?;
        builder.add_gate_up_e4m3_rows(0, zeros(140, 128), zeros(1, 1), GateUpOrder::Halves)
    }),
    ("Value", "values is 3, expected an even number of values, gate's and up's", |_| {
        GateUpOrder::Interleaved.to_halves(&[1, 2, 3]).map(drop)
    }),
    ("Overflow", "bytes of the packed weights overflows", |_| {
        PackedWeights::pack_bf16(&Cpu::new(), &[], 1 << 40, 1 << 20, 1 << 20).map(drop)
    }),
    ("Memory", "packed_weights takes 2305843009213693952 bytes, expected", |_| {
        PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::Bf16, 1 << 20, 1 << 20, 1 << 20).map(drop)
    }),
    // Nothing is allocated for weights that are not there.
    ("Shape", "weights has shape [1], expected [1152921504606846976]", |_| {
        PackedWeights::pack_bf16(&Cpu::new(), &[bf16::ONE], 1 << 20, 1 << 20, 1 << 20).map(drop)
    }),
    ("Shape", "weights has shape [1], expected [1152921504606846976]", |_| {
        PackedWeights::pack_e4m3(&Cpu::new(), &[E4m3(0)], &[], 1 << 20, 1 << 20, 1 << 20).map(drop)
    }),
    ("WeightFormat", "builder is packed as e4m3, expected bf16", |_| {
        builder(WeightFormat::E4m3).add_bf16_rows(0, 0, zeros::<bf16>(32, 128))
    }),
    ("WeightFormat", "builder is packed as bf16, expected e4m3", |_| add_e4m3_rows(WeightFormat::Bf16, 0, 1)),
    ("Value", "first_row is 33, expected a multiple of 32", |_| add_e4m3_rows(WeightFormat::E4m3, 33, 1)),
    ("Shape", "scales has shape [2, 1], expected [1, 1]", |_| add_e4m3_rows(WeightFormat::E4m3, 32, 2)),
    ("Value", "expert is 2, expected below 2", |_| add_rows(0, 2, 32, 128).map(drop)),
    ("Shape", "rows has shape [33, 128], expected [R, 128] with R at most 32", |_| add_rows(32, 0, 33, 128).map(drop)),
    ("Shape", "rows has shape [1, 128], expected [R, 128] with R at most 0", |_| add_rows(99, 0, 1, 128).map(drop)),
    ("Shape", "rows has shape [32, 127], expected [R, 128]", |_| add_rows(32, 0, 32, 127).map(drop)),
    ("Count", "added_rows[0] is 31, expected a row that was not added before", |_| add_rows(31, 0, 2, 128).map(drop)),
    ("Count", "added_rows[1] is 0, expected 64", |_| add_rows(32, 0, 32, 128)?.finish().map(drop)),
    ("Count", "added_rows[0] is 63, expected 64", |_| add_rows(32, 0, 31, 128)?.finish().map(drop)),
];

/// A product over [`layout`]: `M_sum` = 8, three live rows, N = 64.
fn product(out: &mut Outputs, activations: Activations<'_>, weights: &PackedWeights, workspace: usize) -> Result<()> {
    grouped_gemm(&Cpu::new(), &layout(), activations, weights, &mut vec![0; workspace], &mut out.bf16)
}

fn e4m3_product(out: &mut Outputs, k: usize, scales: Scales<'_>, rows: usize) -> Result<()> {
    let rows = vec![E4m3(0); rows * k];
    product(out, Activations::E4m3 { rows: &rows, scales }, &e4m3_weights([2, 64, k]), 1 << 20)
}

const GEMM: &[Refusal] = &[
    ("Value", "k is 0, expected at least 1", |_| grouped_gemm_workspace_bytes(1, 0, ActivationFormat::Bf16).map(drop)),
    ("Overflow", "workspace bytes of the grouped GEMM overflows", |_| {
        grouped_gemm_workspace_bytes(1 << 40, 1 << 40, ActivationFormat::E4m3).map(drop)
    }),
    ("Value", "local_experts is 2, expected 3, as many as the weights have", |out| {
        product(out, Activations::Bf16(&[bf16::ONE; 1024]), &bf16_weights([3, 64, 128]), 1 << 20)
    }),
    ("WeightFormat", "weights is packed as bf16, expected e4m3, mxfp4 or int4, for e4m3 activations", |out| {
        let (rows, scales) = ([E4m3(0); 1024], Scales::f32(ScaleFormat::HOPPER, &[1.0; 8]));
        let activations = Activations::E4m3 { rows: &rows, scales };
        product(out, activations, &bf16_weights([2, 64, 128]), 1 << 20)
    }),
    ("Value", "group is 32, expected 128, as the weights' blocks", |out| {
        let format = ScaleFormat::new(Group::G32, ScaleLayout::RowMajor, ScaleRounding::Exact)?;
        e4m3_product(out, 128, Scales::f32(format, &[1.0; 32]), 8)
    }),
    ("Value", "hidden is 160, expected a positive multiple of 64: groups of 128", |out| {
        e4m3_product(out, 160, Scales::f32(ScaleFormat::HOPPER, &[1.0; 32]), 8)
    }),
    ("Dtype", "activation_scales has dtype i32, expected f32", |out| {
        e4m3_product(out, 128, Scales::ue8m0(ScaleFormat::HOPPER, &[1; 32]), 8)
    }),
    ("Dtype", "activation_scales has dtype f32, expected i32", |out| {
        e4m3_product(out, 128, Scales::f32(packed(), &[1.0; 32]), 8)
    }),
    ("BufferTooSmall", "activation_scales holds 7 elements, expected at least 8", |out| {
        e4m3_product(out, 128, Scales::f32(ScaleFormat::HOPPER, &[1.0; 7]), 8)
    }),
    ("BufferTooSmall", "activations holds 896 elements, expected at least 1024", |out| {
        e4m3_product(out, 128, Scales::f32(ScaleFormat::HOPPER, &[1.0; 8]), 7)
    }),
    ("BufferTooSmall", "activations holds 1023 elements, expected at least 1024", |out| {
        product(out, Activations::Bf16(&[bf16::ONE; 1023]), &bf16_weights([2, 64, 128]), 1 << 20)
    }),
    ("BufferTooSmall", "workspace holds", |out| {
        let bytes = grouped_gemm_workspace_bytes(layout().live_rows(), 128, ActivationFormat::Bf16)?;
        product(out, Activations::Bf16(&[bf16::ONE; 1024]), &bf16_weights([2, 64, 128]), bytes - 1)
    }),
    ("Shape", "bias has shape [127], expected [128], the elements of [2, 64]", |out| {
        let (x, weights) = (Activations::Bf16(&[bf16::ONE; 1024]), bf16_weights([2, 64, 128]));
        let (bias, workspace) = ([0.0; 127], &mut [0; 1 << 16]);
        grouped_gemm_with_bias(&Cpu::new(), &layout(), x, &weights, Some(&bias), workspace, &mut out.bf16)
    }),
    ("BufferTooSmall", "out holds 511 elements, expected at least 512", |out| {
        let (x, weights) = (Activations::Bf16(&[bf16::ONE; 1024]), bf16_weights([2, 64, 128]));
        grouped_gemm(&Cpu::new(), &layout(), x, &weights, &mut [0; 1 << 16], &mut out.bf16[..511])
    }),
];

/// A layer for calls of up to as many tokens as can be counted.
fn prepared(w13: PackedWeights, w2: PackedWeights, config: LayerConfig) -> Result<Layer> {
    Layer::prepare(&Cpu::new(), w13, w2, config, usize::MAX)
}

fn layer(weight_on_input: bool) -> Layer {
    let topk = if weight_on_input { 1 } else { 2 };
    let config =
        LayerConfig { weight_on_input, alignment: Some(4), ..LayerConfig::new(topk, 2, ActivationFormat::Bf16) };
    prepared(bf16_weights([2, 64, 48]), bf16_weights([2, 48, 32]), config).unwrap()
}

/// Two tokens of `topk` slots, all on expert 0, of a layer of H = 48, I = 32, E = 2.
fn run(
    out: &mut [bf16],
    weight_on_input: bool,
    [tokens, hidden, topk, weight_cols, experts]: [usize; 5],
    missing: usize,
) -> Result<()> {
    let layer = layer(weight_on_input);
    let routing = Routing::new(ids(2, topk, 0), experts, None)?;
    let mut workspace = vec![0; layer.workspace_bytes(2)? - missing];
    let (x, weights) = (zeros::<bf16>(tokens, hidden), zeros(2, weight_cols));
    layer.run(x, &routing, weights, &mut workspace, out)
}

/// [`layout`]'s `M_sum` = 8 rows through the same layer.
fn run_expanded(out: &mut [bf16], rows: usize, experts: usize, missing: usize) -> Result<()> {
    let (layer, layout) = (layer(false), Layout::from_psum(&vec![0; experts], 4, 8, vec![0; 64].leak())?);
    let mut workspace = vec![0; layer.expanded_workspace_bytes(8)? - missing];
    layer.run_expanded(zeros::<bf16>(rows, 48), &layout, &mut workspace, out)
}

fn new_layer(
    w13: PackedWeights,
    w2: PackedWeights,
    activation_format: ActivationFormat,
    alignment: usize,
) -> Result<()> {
    let experts = w13.experts();
    let config = LayerConfig::new(2, experts, activation_format);
    prepared(w13, w2, LayerConfig { alignment: Some(alignment), ..config }).map(drop)
}

/// A layer of plain bf16 weights with that activation.
fn activated(activation: Activation) -> Result<()> {
    let config = LayerConfig { activation, ..LayerConfig::new(1, 1, ActivationFormat::Bf16) };
    prepared(bf16_weights([1, 128, 128]), bf16_weights([1, 128, 64]), config).map(drop)
}

/// A layer of plain bf16 weights, its configuration changed.
fn configured(change: impl FnOnce(&mut LayerConfig)) -> Result<()> {
    let mut config = LayerConfig::new(2, 2, ActivationFormat::Bf16);
    change(&mut config);
    prepared(bf16_weights([2, 64, 48]), bf16_weights([2, 48, 32]), config).map(drop)
}

fn with_shared(w13: [usize; 3], w2: [usize; 3], gate: usize) -> Result<()> {
    let (w13, w2, gate) = (bf16_weights(w13), bf16_weights(w2), Some(vec![0.0; gate]));
    layer(false).with_shared_expert(SharedExpert { w13, w2, gate }).map(drop)
}

fn biased(b13: usize, b2: usize) -> Result<()> {
    layer(false).with_biases(Some(vec![0.0; b13]), Some(vec![0.0; b2])).map(drop)
}

fn swiglu(alpha: f32, beta: f32, limit: Option<f32>) -> Result<()> {
    activated(Activation::Swiglu { alpha, beta, limit })
}

/// The GEMM of rows that came in their places, each of them of the first of two experts.
fn of_segments(out: &mut Outputs, segments: Result<Segments<'_>>, rows: usize) -> Result<()> {
    let (weights, rows) = (bf16_weights([2, 64, 48]), vec![bf16::ZERO; rows * 48]);
    let mut workspace = vec![0; 1 << 14];
    let activations = Activations::Bf16(&rows);
    grouped_gemm_of_segments(&Cpu::new(), &segments?, activations, &weights, &mut workspace, &mut out.bf16)
}

const SEGMENTS: &[Refusal] = &[
    ("RowExpert", "m_indices[1] is 2, expected a local expert below 2 (or a negative value for padding)", |out| {
        of_segments(out, Segments::from_m_indices(&[0, 2, -1, 5], 2), 4)
    }),
    ("Value", "local_experts is 0", |out| of_segments(out, Segments::from_m_indices(&[-1], 0), 1)),
    ("Value", "local_experts is 3, expected 2", |out| of_segments(out, Segments::from_m_indices(&[0], 3), 1)),
    ("Count", "psum[1] is 3, expected at least 4", |out| of_segments(out, Segments::from_psum(&[2, 3], 4, 8), 8)),
    ("Count", "psum[1] is 9, expected at most 8", |out| of_segments(out, Segments::from_psum(&[2, 9], 4, 8), 8)),
    ("Alignment", "alignment is 0", |out| of_segments(out, Segments::from_psum(&[2, 3], 0, 8), 8)),
    ("BufferTooSmall", "activations holds 336 elements", |out| of_segments(out, Segments::from_psum(&[2, 8], 4, 8), 7)),
];

const LAYER: &[Refusal] = &[
    ("Parameter", "alpha is NaN, expected a finite number", |_| swiglu(f32::NAN, 0.0, None)),
    ("Parameter", "beta is -inf, expected a finite number", |_| swiglu(1.0, f32::NEG_INFINITY, None)),
    ("Parameter", "limit is -1, expected a number above 0, or none", |_| swiglu(1.0, 0.0, Some(-1.0))),
    ("Parameter", "limit is NaN, expected a number above 0, or none", |_| swiglu(1.0, 0.0, Some(f32::NAN))),
    ("Shape", "w13 has shape [1, 128, 128], expected [1, 64, 128], which w2 asks for without a gate", |_| {
        activated(Activation::Relu2)
    }),
    ("Value", "intermediate is 0", |_| LayerShape::ungated(1, 0, 1).map(drop)),
    ("Value", "intermediate is 96, expected a multiple of 128, or a w13 packed as gate and up", |_| {
        new_layer(e4m3_weights([1, 192, 128]), e4m3_weights([1, 128, 96]), ActivationFormat::Bf16, 1)
    }),
    ("Shape", "shared w2 has shape [2, 48, 32], expected [1, 48, I]", |_| with_shared([2, 64, 48], [2, 48, 32], 48)),
    ("Shape", "shared w2 has shape [1, 40, 32], expected [1, 48, I]", |_| with_shared([1, 64, 40], [1, 40, 32], 48)),
    ("Shape", "w13 has shape [1, 32, 48], expected [1, 64, 48]", |_| with_shared([1, 32, 48], [1, 48, 32], 48)),
    ("Shape", "shared gate has shape [47], expected [48]", |_| with_shared([1, 64, 48], [1, 48, 32], 47)),
    ("WeightFormat", "w2 is packed as e4m3, expected bf16", |_| {
        let shared = SharedExpert { w13: bf16_weights([1, 64, 48]), w2: e4m3_weights([1, 48, 32]), gate: None };
        layer(false).with_shared_expert(shared).map(drop)
    }),
    ("Value", "intermediate is 96, expected a multiple of 128, or a w13 packed as gate and up", |_| {
        let shared = SharedExpert { w13: e4m3_weights([1, 192, 48]), w2: e4m3_weights([1, 48, 96]), gate: None };
        layer(false).with_shared_expert(shared).map(drop)
    }),
    ("Value", "intermediate is 32, expected a positive multiple of 64: groups of 128", |_| {
        let config = LayerConfig::new(1, 1, ActivationFormat::E4m3);
        let layer = prepared(e4m3_weights([1, 256, 128]), e4m3_weights([1, 128, 128]), config)?;
        let shared = SharedExpert { w13: e4m3_weights([1, 64, 128]), w2: e4m3_weights([1, 128, 32]), gate: None };
        layer.with_shared_expert(shared).map(drop)
    }),
    ("BufferTooSmall", "workspace holds", |out| {
        // What serves the layer without its shared expert does not serve it with one.
        let bytes = layer(false).workspace_bytes(2)?;
        let shared = SharedExpert { w13: bf16_weights([1, 64, 48]), w2: bf16_weights([1, 48, 32]), gate: None };
        let layer = layer(false).with_shared_expert(shared)?;
        let (x, routing) = (zeros::<bf16>(2, 48), Routing::new(ids(2, 2, 0), 2, None)?);
        layer.run(x, &routing, zeros(2, 2), &mut vec![0; bytes], &mut out.bf16)
    }),
    ("Shape", "b13 has shape [127], expected [128], the elements of [2, 64]", |_| biased(127, 96)),
    ("Shape", "b13 has shape [129], expected [128]", |_| biased(129, 96)),
    ("Shape", "b2 has shape [97], expected [96], the elements of [2, 48]", |_| biased(128, 97)),
    ("Value", "hidden is 0", |_| LayerShape::new(0, 1, 1).map(drop)),
    ("Value", "intermediate is 0", |_| LayerShape::new(1, 0, 1).map(drop)),
    ("Value", "local_experts is 0", |_| LayerShape::new(1, 1, 0).map(drop)),
    ("Overflow", "E * 2 I * H overflows", |_| LayerShape::new(1 << 30, 1 << 30, 1 << 30).map(drop)),
    ("Shape", "w13 has shape [1, 64, 128], expected [1, 128, 128], which w2 asks for", |_| {
        new_layer(bf16_weights([1, 64, 128]), bf16_weights([1, 128, 64]), ActivationFormat::Bf16, 1)
    }),
    ("Shape", "w13 has shape [2, 128, 128], expected [1, 128, 128]", |_| {
        new_layer(bf16_weights([2, 128, 128]), bf16_weights([1, 128, 64]), ActivationFormat::Bf16, 1)
    }),
    ("WeightFormat", "w2 is packed as e4m3, expected bf16", |_| {
        new_layer(bf16_weights([1, 128, 128]), e4m3_weights([1, 128, 64]), ActivationFormat::Bf16, 1)
    }),
    ("WeightFormat", "w13 is packed as bf16, expected e4m3, mxfp4 or int4, for e4m3 activations", |_| {
        new_layer(bf16_weights([1, 256, 128]), bf16_weights([1, 128, 128]), ActivationFormat::E4m3, 1)
    }),
    ("Value", "hidden is 32, expected a positive multiple of 64: groups of 128", |_| {
        new_layer(e4m3_weights([1, 256, 32]), e4m3_weights([1, 32, 128]), ActivationFormat::E4m3, 1)
    }),
    ("Value", "intermediate is 32, expected a positive multiple of 64: groups of 128", |_| {
        new_layer(e4m3_weights([1, 64, 128]), e4m3_weights([1, 128, 32]), ActivationFormat::E4m3, 1)
    }),
    ("Alignment", "alignment is 0", |_| {
        new_layer(bf16_weights([1, 128, 128]), bf16_weights([1, 128, 64]), ActivationFormat::Bf16, 0)
    }),
    ("Value", "topk is 0, expected at least 1", |_| configured(|config| config.topk = 0)),
    ("Value", "topk is 2, expected 1, where router weights multiply", |_| {
        configured(|config| config.weight_on_input = true)
    }),
    ("Value", "global_experts is 0, expected at least 1", |_| configured(|config| config.global_experts = 0)),
    ("Dtype", "topk_ids has dtype f32, expected i32 or i64", |_| configured(|config| config.ids = Dtype::F32)),
    ("Dtype", "hidden_states has dtype e4m3, expected bf16, f16 or f32", |_| {
        configured(|config| config.input = Dtype::E4m3)
    }),
    ("Dtype", "output has dtype i32, expected bf16, f16 or f32", |_| configured(|config| config.output = Dtype::I32)),
    ("Value", "max_tokens is 0, expected at least 1", |_| {
        let weights = (bf16_weights([2, 64, 48]), bf16_weights([2, 48, 32]));
        let config = LayerConfig::new(2, 2, ActivationFormat::Bf16);
        Layer::prepare(&Cpu::new(), weights.0, weights.1, config, 0).map(drop)
    }),
    ("Value", "tokens is 17, expected at most 16, as prepared", |_| {
        let layer = layer(false).with_config(*layer(false).config(), 16)?;
        layer.choice(17).map(drop)
    }),
    ("WeightFormat", "w13 is packed as bf16, expected e4m3, mxfp4 or int4, for e4m3 activations", |_| {
        let config = LayerConfig { activation_format: ActivationFormat::E4m3, ..*layer(false).config() };
        layer(false).with_config(config, 1).map(drop)
    }),
    ("Value", "intermediate is 32, expected a positive multiple of 64: groups of 128", |_| {
        // A shared expert that takes bf16 rows and no quantized ones.
        let config = LayerConfig::new(1, 1, ActivationFormat::Bf16);
        let layer = prepared(e4m3_weights([1, 256, 128]), e4m3_weights([1, 128, 128]), config)?;
        let gate_up = (&[E4m3(0); 64 * 128][..], &[1.0; 2][..]);
        let (cpu, order) = (Cpu::new(), GateUpOrder::Halves);
        let w13 = PackedWeights::pack_gate_up_e4m3(&cpu, gate_up.0, gate_up.1, 1, 32, 128, order)?;
        let shared = SharedExpert { w13, w2: e4m3_weights([1, 128, 32]), gate: None };
        let layer = layer.with_shared_expert(shared).expect("bf16 rows need no groups");
        layer.with_config(LayerConfig::new(1, 1, ActivationFormat::E4m3), 1).map(drop)
    }),
    ("Dtype", "hidden_states has dtype f32, expected bf16, as prepared", |out| {
        let routing = Routing::new(ids(2, 2, 0), 2, None)?;
        layer(false).run(zeros::<f32>(2, 48), &routing, zeros(2, 2), &mut [0; 1 << 16], &mut out.bf16)
    }),
    ("Dtype", "output has dtype f32, expected bf16, as prepared", |_| {
        let routing = Routing::new(ids(2, 2, 0), 2, None)?;
        layer(false).run(zeros::<bf16>(2, 48), &routing, zeros(2, 2), &mut [0; 1 << 16], &mut [0f32; 96])
    }),
    ("Value", "global_experts is 3, expected 2, as prepared", |out| {
        let routing = Routing::new(ids(2, 2, 0), 2, Some(&[0, 1, -1]))?;
        layer(false).run(zeros::<bf16>(2, 48), &routing, zeros(2, 2), &mut [0; 1 << 16], &mut out.bf16)
    }),
    ("Overflow", "M * topk overflows", |_| layer(false).workspace_bytes(usize::MAX).map(drop)),
    ("Overflow", "M_sum", |_| layer(false).expanded_workspace_bytes(usize::MAX).map(drop)),
    ("Shape", "hidden_states has shape [3, 48], expected [2, 48]", |out| {
        run(&mut out.bf16, false, [3, 48, 2, 2, 2], 0)
    }),
    ("Shape", "hidden_states has shape [2, 47], expected [2, 48]", |out| {
        run(&mut out.bf16, false, [2, 47, 2, 2, 2], 0)
    }),
    ("Shape", "topk_weights has shape [2, 3], expected [2, 2]", |out| run(&mut out.bf16, false, [2, 48, 2, 3, 2], 0)),
    ("Value", "local_experts is 1, expected 2, as prepared", |out| run(&mut out.bf16, false, [2, 48, 2, 2, 1], 0)),
    ("Value", "topk is 2, expected 1, as prepared", |out| run(&mut out.bf16, true, [2, 48, 2, 2, 2], 0)),
    ("BufferTooSmall", "workspace holds", |out| run(&mut out.bf16, false, [2, 48, 2, 2, 2], 1)),
    ("BufferTooSmall", "output holds 95 elements, expected at least 96", |out| {
        run(&mut out.bf16[..95], false, [2, 48, 2, 2, 2], 0)
    }),
    ("Shape", "rows has shape [7, 48], expected [8, 48]", |out| run_expanded(&mut out.bf16, 7, 2, 0)),
    ("Value", "local_experts is 3, expected 2", |out| run_expanded(&mut out.bf16, 8, 3, 0)),
    ("BufferTooSmall", "workspace holds", |out| run_expanded(&mut out.bf16, 8, 2, 1)),
    ("BufferTooSmall", "out holds 383 elements, expected at least 384", |out| {
        run_expanded(&mut out.bf16[..383], 8, 2, 0)
    }),
];

const MACHINE: &[Refusal] = &[("Name", "isa is \"sse9\", expected one of portable", |_| Isa::named("sse9").map(drop))];

/// A layer of two experts (H 128, I 64, bf16) for up to 4 tokens of two slots.
fn two_experts() -> Layer {
    let weights = |n, k| PackedWeights::pack_bf16(&Cpu::new(), &vec![bf16::ONE; 2 * n * k], 2, n, k).unwrap();
    let config = LayerConfig::new(2, 2, ActivationFormat::Bf16);
    Layer::prepare(&Cpu::new(), weights(128, 128), weights(128, 64), config, 4).unwrap()
}

/// Two received tokens through [`two_experts`].
fn received(
    out: &mut Outputs,
    tokens: TokenRows<'_>,
    routing: (usize, usize),
    room: usize,
    bytes: usize,
) -> Result<()> {
    let ids = ids(routing.0, routing.1, 0);
    let mut workspace = vec![0; bytes];
    two_experts().run_slots(tokens, &Routing::new(ids, 2, None)?, &mut workspace, &mut out.bf16[..room]).map(drop)
}

fn bf16_tokens(rows: usize) -> TokenRows<'static> {
    TokenRows::Bf16(zeros(rows, 128))
}

fn place(lists: &[&[usize]]) -> Result<()> {
    Placement::from_lists(3, lists.iter().map(|list| list.to_vec()).collect()).map(drop)
}

const EXPERT_PARALLEL: &[Refusal] = &[
    ("Placement", "placement has no expert on rank 1, expected at least one on every rank", |_| {
        place(&[&[0, 1, 2], &[]])
    }),
    ("Placement", "placement has expert 3 on rank 0, expected an id below 3", |_| place(&[&[0, 3], &[1, 2]])),
    ("Placement", "placement has expert 1 twice on rank 1, expected a copy", |_| place(&[&[0, 1, 2], &[1, 1]])),
    ("Placement", "placement has expert 2 on no rank, expected every expert", |_| place(&[&[0], &[1]])),
    ("Value", "ranks is 0, expected at least 1", |_| place(&[])),
    ("Value", "ranks is 4, expected 1 to 3, an expert for every rank", |_| Placement::linear(3, 4).map(drop)),
    ("Value", "ranks is 0, expected 1 to 3", |_| Placement::round_robin(3, 0).map(drop)),
    ("Value", "global_experts is 0, expected 1 to", |_| Placement::linear(0, 1).map(drop)),
    ("Shape", "loads has shape [2], expected [3]", |_| Placement::linear(3, 1)?.rank_loads(&[1, 2]).map(drop)),
    ("Name", "combine is \"sum\", expected one of rows, sums", |_| "sum".parse::<Combine>().map(drop)),
    ("Name", "dispatch is \"all\", expected one of gather, routed", |_| "all".parse::<Dispatch>().map(drop)),
    ("Value", "ranks is 0, expected at least 1", |_| Threads::new(0, exchange::TIME_LIMIT).map(drop)),
    ("Message", "rank 0 sent 1 bytes, expected 2", |_| Alone.all_to_all_v(&[&[0]], &mut [&mut [0; 2]])),
    ("Absent", "rank 1 was waited for", |_| Threads::new(2, std::time::Duration::from_millis(1))?[0].meet()),
    ("OnRank", "on rank 0: global_experts is 2, expected 3, as placed", |_| {
        let parallel = ParallelConfig::new(Placement::from_lists(3, vec![vec![0, 1, 2]])?);
        let weights = |n, k| PackedWeights::pack_bf16(&Cpu::new(), &vec![bf16::ONE; 3 * n * k], 3, n, k);
        let config = LayerConfig::new(2, 2, ActivationFormat::Bf16);
        let layer = Layer::prepare(&Cpu::new(), weights(2, 1)?, weights(1, 1)?, config, 1)?;
        ExpertParallelLayer::prepare(layer, parallel, Arc::new(Alone)).map(drop)
    }),
    ("Shape", "tokens has shape [3, 128], expected [2, 128]", |out| {
        received(out, bf16_tokens(3), (2, 2), 512, 1 << 20)
    }),
    ("Value", "topk is 3, expected 2, as prepared", |out| received(out, bf16_tokens(2), (2, 3), 1024, 1 << 20)),
    ("Value", "tokens is 5, expected at most 4, as prepared", |out| {
        received(out, bf16_tokens(5), (5, 2), 4096, 1 << 20)
    }),
    ("Dtype", "tokens has dtype e4m3, expected bf16, as prepared", |out| {
        let (rows, scales) = (zeros(2, 128), zeros(2, 1));
        received(out, TokenRows::E4m3 { rows, scales }, (2, 2), 512, 1 << 20)
    }),
    ("BufferTooSmall", "out holds 511 elements, expected at least 512", |out| {
        received(out, bf16_tokens(2), (2, 2), 511, 1 << 20)
    }),
    ("BufferTooSmall", "workspace holds 100 elements, expected at least", |out| {
        received(out, bf16_tokens(2), (2, 2), 512, 100)
    }),
    ("Shape", "topk_weights has shape [2, 1], expected [2, 2]", |out| {
        let (routing, weights) = (Routing::new(ids(2, 2, 0), 2, None)?, zeros(2, 1));
        two_experts().run_sums(bf16_tokens(2), &routing, Some(weights), &mut [0; 1 << 16], &mut out.f32)
    }),
    ("BufferTooSmall", "out holds 255 elements, expected at least 256", |out| {
        let routing = Routing::new(ids(2, 2, 0), 2, None)?;
        two_experts().run_sums(bf16_tokens(2), &routing, None, &mut [0; 1 << 16], &mut out.f32[..255])
    }),
];

fn variant(error: &Error) -> &'static str {
    match error {
        Error::Shape { .. } => "Shape",
        Error::Stride { .. } => "Stride",
        Error::Dtype { .. } => "Dtype",
        Error::Device { .. } => "Device",
        Error::Value { .. } => "Value",
        Error::Parameter { .. } => "Parameter",
        Error::Alignment { .. } => "Alignment",
        Error::Name { .. } => "Name",
        Error::ExpertId { .. } => "ExpertId",
        Error::MapEntry { .. } => "MapEntry",
        Error::RowExpert { .. } => "RowExpert",
        Error::SlotRow { .. } => "SlotRow",
        Error::Count { .. } => "Count",
        Error::MSum { .. } => "MSum",
        Error::Overflow { .. } => "Overflow",
        Error::BufferTooSmall { .. } => "BufferTooSmall",
        Error::WeightFormat { .. } => "WeightFormat",
        Error::Memory { .. } => "Memory",
        Error::Cuda { .. } => "Cuda",
        Error::Nccl { .. } => "Nccl",
        Error::Kernel { .. } => "Kernel",
        Error::Placement { .. } => "Placement",
        Error::OnRank { .. } => "OnRank",
        Error::Message { .. } => "Message",
        Error::Absent { .. } => "Absent",
        _ => "a variant this test does not know",
    }
}

fn tables() -> Vec<Refusal> {
    [
        MATRICES,
        ROUTING,
        PLAN,
        LAYOUT,
        PERMUTE,
        IN_PLACE,
        WEIGHTS,
        GEMM,
        ACTIVATION,
        UNGATED,
        UNPERMUTE,
        UNPERMUTE_SLOTS,
        SEGMENTS,
        LAYER,
        EXPERT_PARALLEL,
        MACHINE,
    ]
    .concat()
}

#[test]
fn every_refusal_names_what_is_wrong_and_writes_nothing() {
    for (kind, message, call) in tables() {
        let mut out = Outputs::poisoned();
        let error = call(&mut out).expect_err(message);
        assert_eq!(variant(&error), kind, "{error}");
        let text = error.to_string();
        assert!(text.starts_with(message), "\"{text}\" does not start with \"{message}\"");
        assert!(text.contains("expected") || text.contains("overflows: "), "{text}");
        assert!(!text.ends_with('.'), "{text}");
        assert!(out == Outputs::poisoned(), "outputs were touched: {text}");
    }
}

#[test]
fn an_instruction_set_that_is_not_there_is_a_device_error() {
    // Whether there is one depends on the CPU; under miri there always is, see `tests/miri.rs`.
    for name in ["avx2", "avx512-bf16", "amx-bf16"] {
        if let Err(error) = Isa::named(name) {
            assert!(matches!(error, Error::Device { argument: "isa", .. }), "{error}");
        }
    }
}

/// The variants of the enum, read from its source: a new one without a refusal in the tables fails here.
#[test]
fn every_variant_is_refused_somewhere() {
    let source = include_str!("../../src/error.rs");
    let body = source.split("pub enum Error {").nth(1).expect("the enum");
    let body = body.split("\n}").next().expect("its end");
    let variants: BTreeSet<&str> = body
        .lines()
        .filter(|line| line.starts_with("    ") && line.as_bytes().get(4).is_some_and(u8::is_ascii_uppercase))
        .map(|line| line.trim().trim_end_matches([' ', '{', ',']))
        .collect();
    assert!(variants.contains("ExpertId"), "{variants:?}");
    let mut refused: BTreeSet<&str> = tables().iter().map(|(kind, ..)| *kind).collect();
    // What only another machine refuses: one that lacks an instruction set, one that compiles for a GPU, one that has
    // it; and what takes two ranks, or an MPI.
    let elsewhere = [
        ("Device", include_str!("../miri.rs")),
        ("Kernel", include_str!("../cuda_compile.rs")),
        ("Unsupported", include_str!("../cuda_layer/expanded.rs")),
        ("Disagreement", include_str!("expert_parallel.rs")),
        ("Mpi", include_str!("../mpi.rs")),
    ];
    for (variant, tests) in elsewhere {
        assert!(tests.contains(&format!("Error::{variant} ")), "no test names {variant}");
        refused.insert(variant);
    }
    // No argument makes a driver or NCCL fail. That the message is whole is all that can be said without them.
    let error = Error::Nccl { call: "ncclAllGather", code: 6, message: "remote process exited".into() };
    assert_eq!(error.to_string(), "ncclAllGather failed with 6: remote process exited");
    refused.insert(variant(&error));
    let (call, name, message) = ("cuLaunchKernel", "CUDA_ERROR_LAUNCH_FAILED".into(), "unspecified".into());
    let error = Error::Cuda { call, code: 719, name, message };
    assert_eq!(error.to_string(), "cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED (719): unspecified");
    refused.insert(variant(&error));
    assert_eq!(variants, refused);
}
