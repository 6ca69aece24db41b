//! Shapes, strides and numbers that no model has, over a few elements of memory: an error or a result, never a panic,
//! an abort or a walk without end, and outputs that an error leaves as they were.

use expertile::cpu::{self, Cpu, PackedWeights, PackedWeightsBuilder, grouped_gemm_workspace_bytes};
use expertile::plan::{compute_aligned_m_and_alignment, round_up, tight_m_sum};
use expertile::{
    ActivationFormat, E4m3, GroupWorth, Groups, LayerShape, Layout, MatrixRef, Normalization, Padding, Plan, Result,
    Router, Routing, ScaleFormat, ScalesMut, TokenExperts, WeightFormat,
};
use expertile_testkit::Random;
use half::bf16;

const EXTENTS: [usize; 14] = [0, 1, 2, 3, 7, 64, 128, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63, usize::MAX];
const STRIDES: [usize; 6] = [0, 0, 1, 2, 1 << 40, usize::MAX];

fn extent(random: &mut Random) -> usize {
    // Half of them ordinary, so that what meets an absurd one is not refused for another.
    if random.one_in(2) { random.of(&EXTENTS[..7]) } else { random.of(&EXTENTS) }
}

fn matrix<'a, T: Copy>(random: &mut Random, data: &'a [T]) -> Result<MatrixRef<'a, T>> {
    let data = &data[..random.of(&[0, 1, 6, data.len()])];
    let (rows, cols) = (extent(random), extent(random));
    if random.one_in(4) {
        return MatrixRef::new(data, rows, cols);
    }
    MatrixRef::with_strides(data, rows, cols, random.of(&STRIDES), random.of(&STRIDES))
}

/// What a case may write; a case that fails leaves it as it was.
#[derive(Clone, PartialEq, Debug)]
struct Outputs {
    bf16: Vec<bf16>,
    e4m3: Vec<E4m3>,
    f32: Vec<f32>,
    i32: Vec<i32>,
}

fn case(random: &mut Random, out: &mut Outputs) -> Result<()> {
    let cpu = Cpu::new();
    let ids: Vec<i64> = (0..16).map(|_| random.of(&[0, 0, 1, -1, 2, 9, i64::MAX, i64::MIN])).collect();
    let rows: Vec<i32> = (0..16).map(|_| random.of(&[0, 0, 1, -1, 5, i32::MAX, i32::MIN])).collect();
    let (values, bytes, floats) = ([bf16::ONE; 256], [E4m3(0x38); 256], [1.0f32; 256]);
    match random.below(9) {
        0 => {
            let map: Vec<i32> = rows[..random.of(&[0, 1, 3])].to_vec();
            let routing =
                Routing::new(matrix(random, &ids)?, extent(random), Some(&map[..]).filter(|map| map.len() > 1))?;
            routing.count_expert_num_tokens(&mut out.i32)
        }
        1 => {
            let weights = if random.one_in(2) { Some(matrix(random, &floats)?) } else { None };
            let (x, inv_perm) = (matrix(random, &values)?, matrix(random, &rows)?);
            cpu::unpermute_slots(&cpu, x, inv_perm, None, weights, &mut out.bf16)
        }
        2 => {
            let router = match random.below(2) {
                0 => Router::softmax(extent(random), true),
                _ => Router {
                    correction_bias: floats[..random.of(&[0, 1, 7])].to_vec(),
                    groups: Some(Groups { count: extent(random), topk: extent(random), worth: GroupWorth::BestTwo }),
                    normalization: Normalization::Sum,
                    ..Router::sigmoid(extent(random))
                },
            };
            router.route(matrix(random, &floats)?, &mut out.i32, &mut out.f32)
        }
        3 => {
            let [experts, n, k] = [extent(random), extent(random), extent(random)];
            match random.below(3) {
                0 => PackedWeights::pack_bf16(&cpu, &values, experts, n, k).map(drop),
                1 => PackedWeights::pack_e4m3(&cpu, &bytes, &floats, experts, n, k).map(drop),
                // A builder asks for memory before it has weights: as much as this is not to be had, or little.
                _ if experts.saturating_mul(n).saturating_mul(k) < 1 << 20 || experts > 1 << 40 => {
                    PackedWeightsBuilder::new(&Cpu::new(), WeightFormat::Bf16, experts, n, k).map(drop)
                }
                _ => Ok(()),
            }
        }
        4 => {
            let [m, topk, experts, alignment] = [(); 4].map(|()| extent(random));
            let _ = compute_aligned_m_and_alignment(m, topk, experts, alignment, None, Some(&rows));
            let _ =
                tight_m_sum(m, topk, experts, alignment, random.of(&[TokenExperts::Distinct, TokenExperts::MayRepeat]));
            let _ = round_up(m, alignment);
            let plan = Plan::with_m_sum(m, topk, experts, alignment, extent(random))?;
            Layout::space_len(&plan).map(drop)
        }
        5 => {
            let format = random.of(&[ActivationFormat::Bf16, ActivationFormat::E4m3]);
            let _ = grouped_gemm_workspace_bytes(extent(random), extent(random), format);
            let _ = ScaleFormat::HOPPER.words(extent(random), extent(random));
            LayerShape::new(extent(random), extent(random), extent(random)).map(drop)
        }
        6 => Layout::from_psum(&rows[..random.of(&[0, 1, 3, 16])], extent(random), extent(random), &mut out.i32)
            .map(drop),
        _ => {
            // A layout of two tokens over two experts, of rows for both or of none, and rows of any shape for it.
            let (ids, m_sum) = random.of(&[([0i64, 1], 8), ([-1, -1], 0)]);
            let plan = Plan::with_m_sum(2, 1, 2, 4, m_sum)?;
            let mut space = vec![0; Layout::space_len(&plan)?];
            let layout = Layout::build(&plan, &Routing::new(MatrixRef::new(&ids, 2, 1)?, 2, None)?, &mut space)?;
            let padding = random.of(&[Padding::Zero, Padding::Untouched]);
            let (swiglu, format) = (expertile::Activation::default(), ScaleFormat::HOPPER);
            match random.below(7) {
                0 => cpu::permute_rows(&cpu, matrix(random, &values)?, &layout, padding, &mut out.bf16),
                1 => cpu::permute_convert(&cpu, matrix(random, &floats)?, None, &layout, padding, &mut out.bf16),
                2 => cpu::unpermute(&cpu, matrix(random, &values)?, &layout, None, &mut out.bf16),
                // Gate and up have twice these columns, which are to fit.
                3 => {
                    let width = extent(random);
                    cpu::activate(&cpu, &layout, width, &values, &swiglu, &mut out.bf16)
                }
                4 => {
                    let (width, scales) = (extent(random), ScalesMut::f32(format, &mut out.f32));
                    cpu::activate_quantize(&cpu, &layout, width, &values, &swiglu, &mut out.e4m3, scales)
                }
                5 => {
                    let (x, scales) = (matrix(random, &floats)?, ScalesMut::f32(format, &mut out.f32));
                    cpu::quantize_rows(&cpu, x, &layout, &mut out.e4m3, scales)
                }
                _ => {
                    let (x, scales) = (matrix(random, &floats)?, ScalesMut::f32(format, &mut out.f32));
                    cpu::quantize_permute(&cpu, x, None, &layout, padding, &mut out.e4m3, scales)
                }
            }
        }
    }
}

#[test]
fn no_shape_does_worse_than_an_error() {
    let seed: u64 = std::env::var("PROPTEST_RNG_SEED").map_or(2026, |seed| seed.parse().unwrap());
    let cases: u64 = std::env::var("PROPTEST_CASES").map_or(20_000, |cases| cases.parse().unwrap());
    let untouched =
        Outputs { bf16: vec![bf16::NAN; 64], e4m3: vec![E4m3(7); 64], f32: vec![7.0; 64], i32: vec![7; 64] };
    let bits = |out: &Outputs| {
        (out.bf16.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), out.e4m3.clone(), out.f32.clone(), out.i32.clone())
    };
    let mut worked = 0;
    for number in 0..cases {
        let mut out = untouched.clone();
        match case(&mut Random::new(seed << 32 | number), &mut out) {
            Ok(()) => worked += 1,
            Err(error) => {
                assert!(bits(&out) == bits(&untouched), "case {number} of seed {seed} wrote before it failed: {error}");
                let text = error.to_string();
                assert!(text.len() < 400 && !text.contains('\n'), "case {number} of seed {seed}: {text}");
            }
        }
    }
    assert!(worked > cases / 50, "only {worked} of {cases} cases worked: nothing but refusals was tried");
}
