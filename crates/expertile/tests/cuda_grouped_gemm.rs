//! The grouped GEMM alone on a Hopper GPU, of rows that came in their places: the lists of tiles against plain code, the
//! results bit for bit against those of a layout that the library has made itself, whatever says which rows are whose,
//! hostile lists included. Padding rows and their scales hold NaN. Skips, and says so, on a machine without such a
//! device.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]
// Every unsafe block here hands a step the addresses of buffers that live until after the next wait and are as large
// as the step's own functions ask.
#![allow(clippy::undocumented_unsafe_blocks)]

mod on_device;

use expertile::cuda::{
    Device, DeviceBuffer, DeviceMatrix, DevicePtr, FewRowsCut, Gemm, GemmCall, GemmConfig, GemmKernel, Graph,
    GroupedGemm, GroupedGemmCall, GroupedGemmShape, Grouping, LayoutPtrs, ListTiles, ListTilesCall, Route, RouteCall,
    RouteConfig, RoutingPtrs, RowEnds, STATE_BYTES, Stream, TileLists, Weights,
};
use expertile::int4::{self, Int4Scales};
use expertile::{ActivationFormat, Dtype, E4m3, Error, MatrixRef, Plan, ScaleFormat, WeightFormat, mxfp4};
use expertile_testkit::{POISON, Random};
use half::bf16;
use on_device::{filled, hopper, upload};

const BLOCK: usize = 128;
const POISONED: u16 = u16::from_le_bytes([POISON; 2]);

/// What a list says, by plain code: `(expert, first row, rows)` of each segment.
fn segments(grouping: &Grouping, list: &[i32], experts: usize, m_sum: usize) -> Vec<(usize, usize, usize)> {
    let mut segments: Vec<(usize, usize, usize)> = Vec::new();
    match grouping {
        Grouping::Psum { alignment } => {
            let mut highest = 0;
            for (expert, &end) in list.iter().enumerate() {
                let start = usize::next_multiple_of(highest, *alignment);
                let end = usize::try_from(end).unwrap_or(0).min(m_sum);
                if end > start {
                    segments.push((expert, start, end - start));
                }
                highest = highest.max(end);
            }
        }
        Grouping::MIndices => {
            for (row, &id) in list.iter().enumerate() {
                let Some(expert) = usize::try_from(id).ok().filter(|&expert| expert < experts) else { continue };
                match segments.last_mut() {
                    Some((last, first, rows)) if *last == expert && *first + *rows == row => *rows += 1,
                    _ => segments.push((expert, row, 1)),
                }
            }
        }
    }
    segments
}

/// The tiles of the segments, with the rows that are left from each on, held at one more than the tile's.
fn tiles(segments: &[(usize, usize, usize)], row_tile: usize) -> Vec<([i32; 2], i32)> {
    let of_segment = |&(expert, first, rows): &(usize, usize, usize)| {
        (0..rows).step_by(row_tile).map(move |at| {
            let left = (rows - at).min(row_tile + 1);
            ([expert as i32, (first + at) as i32], left as i32)
        })
    };
    segments.iter().flat_map(of_segment).collect()
}

/// Hostile lists: `(grouping, list, experts, rows)`.
fn lists(random: &mut Random) -> Vec<(Grouping, Vec<i32>, usize, usize)> {
    let mut lists = Vec::new();
    for (experts, alignment, most) in [(1, 1, 40), (5, 128, 300), (300, 3, 9), (1024, 8, 5), (40, 4, 700)] {
        let mut psum = Vec::new();
        let mut end = 0usize;
        for _ in 0..experts {
            end = end.next_multiple_of(alignment) + if random.one_in(3) { 0 } else { random.below(most) };
            psum.push(end as i32);
        }
        lists.push((Grouping::Psum { alignment }, psum.clone(), experts, end + random.below(9)));
        // Ends out of order, below zero, past the last row; rows that are not there.
        let mut hostile = psum;
        for _ in 0..3 {
            hostile[random.below(experts)] = random.of(&[-1, i32::MIN, i32::MAX, 0, end as i32 + 1, 7]);
        }
        lists.push((Grouping::Psum { alignment }, hostile, experts, end / 2 + 1));
    }
    for (experts, m_sum, most) in [(1, 1, 1), (3, 40, 5), (8, 20_000, 600), (1024, 9000, 3), (7, 8192, 9000)] {
        let mut m_indices: Vec<i32> = Vec::new();
        while m_indices.len() < m_sum {
            // In any order, with padding and ids that are no expert's anywhere.
            let id = match random.below(8) {
                0 => random.of(&[-1, -1, -7, i32::MIN]),
                1 => random.of(&[experts as i32, i32::MAX, -1, -1]),
                _ => random.below(experts) as i32,
            };
            m_indices.extend(vec![id; 1 + random.below(most)]);
        }
        m_indices.truncate(m_sum);
        lists.push((Grouping::MIndices, m_indices, experts, m_sum));
    }
    lists
}

#[test]
fn tiles_are_listed_as_by_plain_code_whatever_the_list_says() {
    let Some(device) = hopper() else { return };
    let state: DeviceBuffer = filled(device, STATE_BYTES, 0);
    for (grouping, list, experts, m_sum) in (0..3).flat_map(|seed| lists(&mut Random::new(seed))) {
        let step = ListTiles::prepare(device, grouping).unwrap();
        let on_device = upload(device, &list);
        for row_tile in [16, 192] {
            let bytes = TileLists::space_bytes(&grouping, (m_sum, experts), row_tile, None).unwrap();
            let space = filled(device, bytes, POISON);
            let lists = TileLists::carve(space.ptr(), &grouping, (m_sum, experts), row_tile, None).unwrap();
            let list_ptr = on_device.ptr().cast();
            let state = state.ptr();
            let call = ListTilesCall { grouping, list: list_ptr, experts, m_sum, row_tile, scales: None, lists, state };
            unsafe { step.launch(Stream(0), &call).unwrap() };
            let mut words = vec![0i32; bytes / 4];
            space.download_at(0, &mut words).unwrap();
            let at = |list: DevicePtr<i32>| (list.address() - space.ptr().address()) as usize / 4;
            let expected = tiles(&segments(&grouping, &list, experts, m_sum), row_tile);
            let what = format!("{grouping:?}, {experts} experts, {m_sum} rows, tiles of {row_tile}");
            assert_eq!(words[2..4], [expected.len() as i32, 0], "{what}");
            let found = (0..expected.len()).map(|tile| {
                let entry = &words[at(lists.worklist) + 2 * tile..][..2];
                ([entry[0], entry[1]], words[at(lists.rows_left) + tile])
            });
            for (tile, (found, expected)) in found.zip(&expected).enumerate() {
                assert_eq!(found, *expected, "tile {tile} of {what}");
            }
        }
    }
}

/// Operands in their places, as they stand in memory; bf16 as its bits.
struct Operands {
    shape: GroupedGemmShape,
    weights: Weights,
    /// Of rows that are an expert's, in their order: the expert, the row's bytes, its scales.
    live: Vec<(usize, Vec<u8>, Vec<f32>)>,
}

impl Operands {
    /// So many rows of experts drawn at random.
    fn new(device: &Device, shape: GroupedGemmShape, rows: usize, random: &mut Random) -> Self {
        let GroupedGemmShape { format, activation_format, experts, n, k } = shape;
        let sizes = (experts, n, k);
        let mut values = |count: usize| -> Vec<f32> { (0..count).map(|_| random.uniform() * 4.0).collect() };
        let weights = values(experts * n * k);
        let weights = match format {
            WeightFormat::Bf16 => {
                let weights: Vec<_> = weights.into_iter().map(bf16::from_f32).collect();
                Weights::upload_bf16(device, &weights, sizes).unwrap()
            }
            WeightFormat::E4m3 => {
                let weights: Vec<_> = weights.into_iter().map(E4m3::from_f32).collect();
                let scales: Vec<f32> = values(experts * n.div_ceil(BLOCK) * k.div_ceil(BLOCK));
                let scales: Vec<f32> = scales.iter().map(|scale| 0.5 + scale.abs()).collect();
                Weights::upload_e4m3(device, &weights, &scales, sizes).unwrap()
            }
            WeightFormat::Mxfp4 => {
                let (mut blocks, mut scales) = (vec![0; weights.len() / 2], vec![0; weights.len() / mxfp4::GROUP]);
                mxfp4::quantize_rows(&weights, k, &mut blocks, &mut scales).unwrap();
                let plain = Weights::upload_mxfp4(device, &blocks, &scales, sizes).unwrap();
                plain.arrange(device, activation_format).unwrap()
            }
            WeightFormat::Int4 => {
                let groups = weights.len() / int4::GROUP;
                let (mut blocks, mut scales) = (vec![0; weights.len() / 2], vec![bf16::ZERO; groups]);
                int4::quantize_rows(&weights, k, &mut blocks, &mut scales).unwrap();
                let scales = MatrixRef::new(&scales, experts * n, k / int4::GROUP).unwrap();
                let plain = Weights::upload_int4(device, &blocks, Int4Scales::Bf16(scales), sizes).unwrap();
                plain.arrange(device, activation_format).unwrap()
            }
        };
        let mut live = Vec::new();
        for _ in 0..rows {
            let row = (0..k).map(|_| random.uniform() * 4.0).flat_map(|value| match activation_format {
                ActivationFormat::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                ActivationFormat::E4m3 => vec![E4m3::from_f32(value).0],
            });
            let row = row.collect();
            let scales = (0..k.div_ceil(BLOCK)).map(|_| 0.5 + random.uniform().abs()).collect();
            live.push((random.below(experts), row, scales));
        }
        Self { shape, weights, live }
    }

    /// Bytes of rows and scales `[M_sum, groups]` in which live row `i` stands at `places[i]`; NaN everywhere else.
    fn place(&self, places: &[usize], m_sum: usize) -> (Vec<u8>, Vec<f32>) {
        let groups = self.shape.k.div_ceil(BLOCK);
        let is_bf16 = self.shape.activation_format == ActivationFormat::Bf16;
        let bytes = self.shape.k * if is_bf16 { 2 } else { 1 };
        let mut rows = vec![0x7f; m_sum * bytes];
        if is_bf16 {
            rows = bf16::NAN.to_le_bytes().repeat(m_sum * self.shape.k);
        }
        let mut scales = vec![f32::NAN; m_sum * groups];
        for ((_, row, of_row), &place) in self.live.iter().zip(places) {
            rows[place * bytes..][..bytes].copy_from_slice(row);
            scales[place * groups..][..groups].copy_from_slice(of_row);
        }
        (rows, scales)
    }

    /// The results of the live rows from a layout of the library's own, as a layer computes them.
    fn of_a_layer(&self, device: &Device) -> Vec<Vec<u16>> {
        let GroupedGemmShape { format, activation_format, experts, n, k } = self.shape;
        let kernel = GemmKernel::FewRows { row_tile: 64, cut: FewRowsCut::Plain };
        let row_tile = kernel.row_tile();
        let ids: Vec<i32> = self.live.iter().map(|(expert, ..)| *expert as i32).collect();
        let mut counts = vec![0; experts];
        ids.iter().for_each(|&id| counts[id as usize] += 1);
        let plan = Plan::exact(ids.len(), 1, &counts, 8).unwrap();
        let route = Route::prepare(device, RouteConfig { topk: 1, ids: Dtype::I32, row_tile }).unwrap();
        let space = filled(device, LayoutPtrs::space_bytes(&plan, row_tile).unwrap(), POISON);
        let layout = LayoutPtrs::carve(space.ptr(), &plan, row_tile).unwrap();
        let workspace: DeviceBuffer = device.allocate(route.workspace_bytes(&plan).unwrap()).unwrap();
        let (state, on_device) = (filled(device, STATE_BYTES, 0), upload(device, &ids));
        let ids = DeviceMatrix::row_major(on_device.ptr(), 1);
        let routing = RoutingPtrs { ids, expert_map: None, global_experts: experts };
        let call = RouteCall { plan, routing, layout, state: state.ptr(), workspace: workspace.ptr() };
        unsafe { route.launch(Stream(0), &call).unwrap() };
        let mut places = vec![0i32; self.live.len()];
        let inv_perm = (layout.inv_perm.address() - space.ptr().address()) as usize;
        space.download_at(inv_perm, &mut places).unwrap();
        let places: Vec<usize> = places.into_iter().map(|place| place as usize).collect();
        let m_sum = plan.m_sum();
        let (rows, scales) = self.place(&places, m_sum);
        let groups = k.div_ceil(BLOCK);
        let mut mn_major = vec![f32::NAN; m_sum.next_multiple_of(4) * groups];
        for (at, &scale) in scales.iter().enumerate() {
            mn_major[ScaleFormat::HOPPER.word(at / groups, at % groups, m_sum, groups)] = scale;
        }
        let (rows, scales) = (upload(device, &rows), upload(device, &mn_major));
        let out = filled(device, 2 * m_sum * n, POISON);
        let gemm = Gemm::prepare(device, GemmConfig { format, activation_format, kernel, activation: None }).unwrap();
        let call = GemmCall {
            bias: None,
            weights: &self.weights,
            rows: rows.ptr(),
            scales: (activation_format == ActivationFormat::E4m3).then(|| scales.ptr().cast()),
            out: out.ptr(),
            out_scales: None,
            header: layout.header,
            worklist: layout.worklist,
            ends: RowEnds::Psum(layout.psum),
            m_sum,
        };
        unsafe { gemm.launch(Stream(0), &call).unwrap() };
        let mut results = vec![0u16; m_sum * n];
        out.download_at(0, &mut results).unwrap();
        places.iter().map(|place| results[place * n..][..n].to_vec()).collect()
    }
}

/// Where the scales of a call's rows stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scales {
    RowMajor,
    MnMajor,
    /// Rows and columns with something in between.
    Apart,
}

/// A call's list, with the place of each live row in it.
struct Placed {
    grouping: Grouping,
    list: Vec<i32>,
    m_sum: usize,
    places: Vec<usize>,
}

/// Rows sorted by expert, segments aligned, as psum; and the same as m_indices.
fn sorted(live: &[usize], experts: usize, alignment: usize) -> [Placed; 2] {
    let mut places = vec![0; live.len()];
    let (mut psum, mut end) = (Vec::new(), 0usize);
    for expert in 0..experts {
        end = end.next_multiple_of(alignment);
        for (row, _) in live.iter().enumerate().filter(|&(_, &of)| of == expert) {
            places[row] = end;
            end += 1;
        }
        psum.push(end as i32);
    }
    // MN-major scales of a number of rows that 4 divides are read where they are.
    let m_sum = end.next_multiple_of(alignment).next_multiple_of(4);
    let mut m_indices = vec![-1; m_sum + 3];
    places.iter().zip(live).for_each(|(&place, &expert)| m_indices[place] = expert as i32);
    let of_psum = Placed { grouping: Grouping::Psum { alignment }, list: psum, m_sum, places: places.clone() };
    [of_psum, Placed { grouping: Grouping::MIndices, list: m_indices, m_sum: m_sum + 3, places }]
}

/// Rows in the order in which they came, with padding and ids past the experts between them.
fn scattered(live: &[usize], experts: usize, random: &mut Random) -> Placed {
    let (mut m_indices, mut places) = (Vec::new(), Vec::new());
    for &expert in live {
        while random.one_in(3) {
            m_indices.push(random.of(&[-1, -5, experts as i32, i32::MAX]));
        }
        places.push(m_indices.len());
        m_indices.push(expert as i32);
    }
    Placed { grouping: Grouping::MIndices, m_sum: m_indices.len(), list: m_indices, places }
}

/// Runs a call for each number of expected rows, and compares live rows with `expected` and all others with poison.
fn check(device: &Device, gemm: &GroupedGemm, operands: &Operands, placed: &Placed, expected: &[Vec<u16>]) {
    let GroupedGemmShape { format, activation_format, n, k, .. } = operands.shape;
    let Placed { grouping, list, m_sum, places } = placed;
    let (m_sum, groups) = (*m_sum, k.div_ceil(BLOCK));
    let (rows, row_major) = operands.place(places, m_sum);
    let (rows, list) = (upload(device, &rows), upload(device, list));
    let out: DeviceBuffer = device.allocate(2 * m_sum * n).unwrap();
    let state = filled(device, STATE_BYTES, 0);
    let forms = [Scales::RowMajor, Scales::MnMajor, Scales::Apart];
    for (form, expected_rows) in forms.into_iter().zip([1, m_sum, m_sum / 3]) {
        let (row_stride, col_stride) = match form {
            Scales::RowMajor => (groups, 1),
            Scales::MnMajor => (1, m_sum.next_multiple_of(4)),
            Scales::Apart => (2 * groups + 3, 2),
        };
        let mut scales = vec![f32::NAN; (m_sum * (2 * groups + 3)).max(m_sum.next_multiple_of(4) * groups)];
        for (at, &scale) in row_major.iter().enumerate() {
            scales[at / groups * row_stride + at % groups * col_stride] = scale;
        }
        let scales = upload(device, &scales);
        let scaled = activation_format == ActivationFormat::E4m3;
        let scales = scaled.then_some((scales.ptr().cast(), scales));
        let scales_matrix = scales.as_ref().map(|&(ptr, _)| DeviceMatrix { ptr, row_stride, col_stride });
        let copies = scales_matrix.is_some_and(|scales| !gemm.reads_in_place(&scales, m_sum));
        let in_place = form == Scales::MnMajor && m_sum % 4 == 0;
        assert_eq!(copies, scaled && !in_place, "{form:?} of {m_sum} rows");
        let workspace = filled(device, gemm.workspace_bytes(m_sum, grouping, copies).unwrap(), POISON);
        out.fill(POISON).unwrap();
        let call = GroupedGemmCall {
            bias: None,
            weights: &operands.weights,
            rows: rows.ptr(),
            scales: scales_matrix,
            out: out.ptr(),
            m_sum,
            grouping: *grouping,
            list: list.ptr().cast(),
            expected_rows,
            state: state.ptr(),
            workspace: workspace.ptr(),
        };
        unsafe { gemm.launch(Stream(0), &call).unwrap() };
        let mut results = vec![0u16; m_sum * n];
        out.download_at(0, &mut results).unwrap();
        let mut left: Vec<bool> = vec![true; m_sum];
        for (row, (&place, expected)) in places.iter().zip(expected).enumerate() {
            left[place] = false;
            let what =
                format!("row {row} at {place}: {grouping:?}, {form:?}, {format}, {}", gemm.choice(expected_rows));
            assert!(results[place * n..][..n] == expected[..], "{what}");
        }
        for row in (0..m_sum).filter(|&row| left[row]) {
            let untouched = results[row * n..][..n].iter().all(|&bits| bits == POISONED);
            assert!(untouched, "row {row} is padding and was written: {grouping:?}, {form:?}, {format}");
        }
    }
}

const fn small(format: WeightFormat, activation_format: ActivationFormat, k: usize) -> GroupedGemmShape {
    GroupedGemmShape { format, activation_format, experts: 5, n: 136, k }
}

const SHAPES: [GroupedGemmShape; 6] = [
    small(WeightFormat::E4m3, ActivationFormat::E4m3, 272),
    small(WeightFormat::Bf16, ActivationFormat::Bf16, 208),
    small(WeightFormat::Mxfp4, ActivationFormat::E4m3, 288),
    small(WeightFormat::Mxfp4, ActivationFormat::Bf16, 192),
    small(WeightFormat::Int4, ActivationFormat::E4m3, 288),
    small(WeightFormat::Int4, ActivationFormat::Bf16, 192),
];

fn check_placements(device: &Device, shape: GroupedGemmShape, rows: usize, alignments: &[usize]) {
    let mut random = Random::new(rows as u64);
    let operands = Operands::new(device, shape, rows, &mut random);
    let expected = operands.of_a_layer(device);
    let gemm = GroupedGemm::prepare(device, shape, 4096).unwrap();
    let live: Vec<usize> = operands.live.iter().map(|(expert, ..)| *expert).collect();
    for &alignment in alignments {
        for placed in sorted(&live, shape.experts, alignment) {
            check(device, &gemm, &operands, &placed, &expected);
        }
    }
    check(device, &gemm, &operands, &scattered(&live, shape.experts, &mut random), &expected);
}

/// A row's results have the bits that a layer gives it, wherever it stands and whatever says so.
#[test]
fn rows_have_a_layers_bits_in_every_place() {
    let Some(device) = hopper() else { return };
    for shape in SHAPES {
        check_placements(device, shape, 83, &[1, 3, 8, 128]);
        check_placements(device, shape, 1, &[4]);
    }
}

/// Small, but takes every branch; for the sanitizer, which is slow.
#[test]
fn sanitizer_runs_the_grouped_gemm_alone() {
    let Some(device) = hopper() else { return };
    for shape in SHAPES {
        check_placements(device, shape, 300, &[2, 64]);
    }
}

/// One call's results after another of its kind: in graphs and out of them.
#[test]
fn a_captured_call_gives_the_same_bits() {
    let Some(device) = hopper() else { return };
    let shape = SHAPES[0];
    let mut random = Random::new(11);
    let operands = Operands::new(device, shape, 40, &mut random);
    let expected = operands.of_a_layer(device);
    let gemm = GroupedGemm::prepare(device, shape, 256).unwrap();
    let live: Vec<usize> = operands.live.iter().map(|(expert, ..)| *expert).collect();
    let [placed, _] = sorted(&live, shape.experts, 8);
    let (rows, scales) = operands.place(&placed.places, placed.m_sum);
    let (rows, scales, list) = (upload(device, &rows), upload(device, &scales), upload(device, &placed.list));
    let out = filled(device, 2 * placed.m_sum * shape.n, POISON);
    let state = filled(device, STATE_BYTES, 0);
    let workspace = filled(device, gemm.workspace_bytes(placed.m_sum, &placed.grouping, true).unwrap(), POISON);
    let call = GroupedGemmCall {
        bias: None,
        weights: &operands.weights,
        rows: rows.ptr(),
        scales: Some(DeviceMatrix::row_major(scales.ptr().cast(), shape.k.div_ceil(BLOCK))),
        out: out.ptr(),
        m_sum: placed.m_sum,
        grouping: placed.grouping,
        list: list.ptr().cast(),
        expected_rows: 40,
        state: state.ptr(),
        workspace: workspace.ptr(),
    };
    let graph = Graph::capture(device, |stream| unsafe { gemm.launch(stream, &call) }).unwrap();
    for _ in 0..2 {
        out.fill(POISON).unwrap();
        unsafe { graph.replay(Stream(0)).unwrap() };
        let mut results = vec![0u16; placed.m_sum * shape.n];
        out.download_at(0, &mut results).unwrap();
        for (row, &place) in placed.places.iter().enumerate() {
            assert!(results[place * shape.n..][..shape.n] == expected[row][..], "row {row}");
        }
    }
}

#[test]
fn what_a_list_says_wrong_is_noted_once() {
    let Some(device) = hopper() else { return };
    let shape = SHAPES[1];
    let gemm = GroupedGemm::prepare(device, shape, 64).unwrap();
    let operands = Operands::new(device, shape, 1, &mut Random::new(3));
    let (m_sum, alignment) = (16, 4);
    let rows = filled(device, m_sum * shape.k * 2, 0);
    let out = filled(device, 2 * m_sum * shape.n, POISON);
    let state = filled(device, STATE_BYTES, 0);
    let check = |grouping: Grouping, list: &[i32]| {
        let list = upload(device, list);
        let workspace = filled(device, gemm.workspace_bytes(m_sum, &grouping, false).unwrap(), POISON);
        let call = GroupedGemmCall {
            bias: None,
            weights: &operands.weights,
            rows: rows.ptr(),
            scales: None,
            out: out.ptr(),
            m_sum,
            grouping,
            list: list.ptr().cast(),
            expected_rows: 8,
            state: state.ptr(),
            workspace: workspace.ptr(),
        };
        unsafe {
            gemm.launch(Stream(0), &call).unwrap();
            let found = gemm.check(Stream(0), state.ptr());
            assert_eq!(gemm.check(Stream(0), state.ptr()), Ok(()), "the state then knows nothing");
            found
        }
    };
    let psum = Grouping::Psum { alignment };
    assert_eq!(check(psum, &[2, 4, 8, 8, 16]), Ok(()));
    // An empty expert at the end stores its start, which may be where no row is.
    assert_eq!(check(Grouping::Psum { alignment: 15 }, &[16, 30, 30, 30, 30]), Ok(()));
    assert_eq!(check(Grouping::MIndices, &[-1, 4, 4, 0, -9, 1, 2, 0, 0, 0, 0, 0, 0, 0, 3, 3]), Ok(()));
    let error = check(psum, &[5, 9, 3, 2, 16]).unwrap_err();
    assert!(matches!(error, Error::Count { argument: "psum", expert: 2, actual: 3, .. }), "{error}");
    assert!(error.to_string().starts_with("psum[2] is 3, expected at least the start"), "{error}");
    let error = check(psum, &[-3, 8, 8, 8, 8]).unwrap_err();
    assert!(matches!(error, Error::Count { argument: "psum", expert: 0, actual: -3, .. }), "{error}");
    let error = check(psum, &[4, 17, 20, 90, 90]).unwrap_err();
    assert_eq!(error.to_string(), "psum[1] is 17, expected no more than there are rows");
    let mut m_indices = vec![0; m_sum];
    (m_indices[9], m_indices[12]) = (5, 77);
    let error = check(Grouping::MIndices, &m_indices).unwrap_err();
    assert_eq!(error, Error::RowExpert { row: 9, id: 5, local_experts: 5 });
}

#[test]
fn calls_that_do_not_fit_are_errors() {
    let Some(device) = hopper() else { return };
    let [e4m3, shape, ..] = SHAPES;
    let gemm = GroupedGemm::prepare(device, shape, 64).unwrap();
    let operands = Operands::new(device, shape, 1, &mut Random::new(3));
    let others = Operands::new(device, e4m3, 1, &mut Random::new(3));
    let memory = filled(device, 1 << 16, POISON);
    let grouping = Grouping::Psum { alignment: 8 };
    let call = GroupedGemmCall {
        bias: None,
        weights: &operands.weights,
        rows: memory.ptr(),
        scales: None,
        out: memory.ptr(),
        m_sum: 16,
        grouping,
        list: memory.ptr().cast(),
        expected_rows: 16,
        state: memory.ptr(),
        workspace: memory.ptr(),
    };
    let launch = |call: &GroupedGemmCall<'_>| unsafe { gemm.launch(Stream(0), call).unwrap_err() };
    let zero = Grouping::Psum { alignment: 0 };
    for (call, start) in [
        (GroupedGemmCall { m_sum: 65, ..call }, "m_sum is 65, expected at most 64"),
        (GroupedGemmCall { weights: &others.weights, ..call }, "weights is packed as e4m3, expected bf16"),
        (GroupedGemmCall { grouping: zero, ..call }, "alignment is 0, expected 1 to"),
        (GroupedGemmCall { list: memory.ptr().byte_add(2).cast(), ..call }, "psum is "),
        (GroupedGemmCall { workspace: memory.ptr().byte_add(8), ..call }, "workspace is "),
        (GroupedGemmCall { rows: memory.ptr().byte_add(8), ..call }, "rows is "),
        (GroupedGemmCall { state: DevicePtr::default(), ..call }, "state is 0"),
        (GroupedGemmCall { scales: Some(DeviceMatrix::row_major(memory.ptr().cast(), 2)), ..call }, "scales is "),
    ] {
        let error = launch(&call).to_string();
        assert!(error.starts_with(start), "{error}, expected {start}");
    }
    let mut bytes = vec![0u8; 1 << 16];
    memory.download_at(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == POISON), "something was written");
    for (shape, start) in [
        (GroupedGemmShape { experts: 0, ..shape }, "local_experts is 0"),
        (GroupedGemmShape { n: 12, ..shape }, "n is 12"),
        (GroupedGemmShape { k: 24, ..shape }, "k is 24"),
    ] {
        let error = GroupedGemm::prepare(device, shape, 64).unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}, expected {start}");
    }
    let error = GroupedGemm::prepare(device, shape, 0).unwrap_err().to_string();
    assert!(error.starts_with("max_rows is 0"), "{error}");
}
