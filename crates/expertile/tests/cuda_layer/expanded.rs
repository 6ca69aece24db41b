//! Rows that came in their places: the bits that the layer gives the same rows when it routes them itself, wherever
//! they stand, and the oracle's numbers. Padding rows hold NaN, and so does all that is written.

use crate::e4m3_copy::with_e4m3_copy;
use crate::model::{BASE, Inputs, Model, Spec};
use crate::on_device::{hopper, upload};
use crate::{FORMATS, GPT_OSS, tolerances};
use expertile::backend::ExpandedRows;
use expertile::cpu::{Cpu, quantize_rows};
use expertile::cuda::{Device, DeviceBuffer, DeviceMatrix, ExpandedCall, ExpandedLayer, STATE_BYTES, Stream};
use expertile::{
    ActivationFormat, Dtype, E4m3, Error, ExpertLayer, Float, Layout, MatrixRef, ScaleFormat, ScalesMut, WeightFormat,
};
use expertile_oracle::compare;
use expertile_testkit::{GUARD, NAN_POISON, Pattern, Random, assert_untouched};
use half::{bf16, f16};

/// One slot to a token: the layer's output is then GEMM 2's rows, times one.
const SPEC: Spec = Spec { topk: 1, max_tokens: 700, ..BASE };

/// Rows sorted by expert, with segments on multiples of `alignment`.
struct Sorted {
    psum: Vec<i32>,
    /// The token of each row; none on padding.
    tokens: Vec<Option<usize>>,
}

impl Sorted {
    /// Of tokens with one expert each; `more` rows follow the last segment's.
    fn new(ids: &[i64], experts: usize, alignment: usize, more: usize) -> Self {
        let (mut psum, mut tokens) = (Vec::new(), Vec::new());
        for expert in 0..experts {
            tokens.resize(tokens.len().next_multiple_of(alignment), None);
            tokens.extend((0..ids.len()).filter(|&token| ids[token] == expert as i64).map(Some));
            psum.push(tokens.len() as i32);
        }
        tokens.resize(tokens.len() + more, None);
        Self { psum, tokens }
    }

    fn m_sum(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens' rows in their places; padding is NaN.
    fn rows<T: Float>(&self, inputs: &Inputs, hidden: usize) -> Vec<T> {
        let mut rows = vec![T::from_f32(f32::NAN); self.m_sum() * hidden];
        for (row, token) in self.tokens.iter().enumerate() {
            let Some(token) = token else { continue };
            for (to, &from) in rows[row * hidden..][..hidden].iter_mut().zip(&inputs.x[token * hidden..]) {
                *to = T::from_f32(from);
            }
        }
        rows
    }
}

/// A call of the raw door in poisoned memory: the bits of `out`.
fn launch(device: &Device, layer: &ExpandedLayer, call: ExpandedCall) -> Vec<u16> {
    let values = call.m_sum * layer.shape().hidden();
    let out = device.allocate::<u8>(2 * values + GUARD).unwrap();
    let bytes = layer.workspace_bytes(call.m_sum).unwrap();
    let workspace = device.allocate::<u8>(bytes + GUARD).unwrap();
    let state = device.allocate::<u8>(STATE_BYTES).unwrap();
    for memory in [&out, &workspace] {
        memory.fill(NAN_POISON).unwrap();
    }
    let call = ExpandedCall { out: out.ptr(), workspace: workspace.ptr(), state: state.ptr(), ..call };
    unsafe {
        layer.initialise_state(Stream(0), state.ptr()).unwrap();
        layer.launch(Stream(0), &call).unwrap();
        layer.check(Stream(0), state.ptr()).unwrap();
    }
    let (mut bits, mut guard) = (vec![0u16; values], vec![0u8; GUARD]);
    out.download_at(0, &mut bits).unwrap();
    out.download_at(2 * values, &mut guard).unwrap();
    assert_untouched("guard of the output", &guard, NAN_POISON);
    workspace.download_at(bytes, &mut guard).unwrap();
    assert_untouched("guard of the workspace", &guard, NAN_POISON);
    bits
}

/// Compares the rows that came out with the layer's, and padding with what was there.
fn compare_rows(found: &[u16], sorted: &Sorted, by_token: &[u16], hidden: usize, what: &str) {
    let poison = u16::from_le_bytes([NAN_POISON; 2]);
    for (row, token) in sorted.tokens.iter().enumerate() {
        let found = &found[row * hidden..][..hidden];
        match token {
            Some(token) => assert!(found == &by_token[token * hidden..][..hidden], "row {row}, {what}"),
            None => assert!(found.iter().all(|&bits| bits == poison), "padding row {row} was written, {what}"),
        }
    }
}

/// What the layer makes of each token.
fn by_token(device: &Device, model: &Model, inputs: &Inputs) -> Vec<u16> {
    let call = crate::model::Call::new(device, model, inputs);
    call.poison(device);
    call.launch(Stream(0));
    call.check(Stream(0)).unwrap();
    call.output_bytes().as_chunks::<2>().0.iter().map(|&half| u16::from_le_bytes(half)).collect()
}

fn once_each(tokens: usize) -> Vec<f32> {
    vec![1.0; tokens]
}

fn check(spec: Spec, tokens: &[usize], alignments: &[usize]) {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, spec);
    let expanded = model.on_device.expanded(4000).unwrap();
    check_with(device, &model, &expanded, tokens, alignments);
}

/// Rows of a model's tokens have the bits that its layer gives them.
fn check_with(device: &Device, model: &Model, expanded: &ExpandedLayer, tokens: &[usize], alignments: &[usize]) {
    let (spec, hidden) = (model.spec, model.spec.hidden);
    for (&tokens, pattern) in tokens.iter().flat_map(|n| [Pattern::Even, Pattern::Skewed].map(|p| (n, p))) {
        let inputs = Inputs::new(model, tokens, pattern, 3);
        let inputs = Inputs { weights: once_each(tokens), ..inputs };
        let expected = by_token(device, model, &inputs);
        let sample: Vec<usize> = (0..tokens).step_by(tokens.div_ceil(12)).collect();
        let of_sample = |token: &usize| expected[token * hidden..][..hidden].to_vec();
        let value = |bits: u16| match spec.output {
            Dtype::F16 => f16::from_bits(bits).to_f64(),
            _ => bf16::from_bits(bits).to_f64(),
        };
        let ours: Vec<f64> = sample.iter().flat_map(of_sample).map(value).collect();
        let off = compare::difference(&ours, &model.oracle(&inputs, &sample));
        assert!(off < tolerances(&spec, 1).0.whole, "{off} from the oracle: {tokens} tokens, {spec:?}");
        for (index, &alignment) in alignments.iter().enumerate() {
            let sorted = Sorted::new(&inputs.ids, spec.experts, alignment, 5 * index);
            let rows = match spec.input {
                Dtype::F16 => upload(device, &sorted.rows::<f16>(&inputs, hidden)),
                _ => upload(device, &sorted.rows::<bf16>(&inputs, hidden)),
            };
            let psum = upload(device, &sorted.psum);
            let call = ExpandedCall {
                m_sum: sorted.m_sum(),
                alignment,
                rows: rows.ptr(),
                psum: psum.ptr().cast(),
                // Whatever tile is chosen.
                expected_rows: [1, 40, 4000][index % 3],
                ..ExpandedCall::default()
            };
            let found = launch(device, expanded, call);
            let what = format!("{tokens} tokens, {pattern:?}, alignment {alignment}, {spec:?}");
            compare_rows(&found, &sorted, &expected, hidden, &what);
        }
    }
}

#[test]
fn expanded_rows_have_the_bits_that_the_layer_gives_them() {
    for (format, activation_format) in FORMATS {
        check(Spec { format, activation_format, ..SPEC }, &[1, 33, 300], &[1, 8, 128]);
    }
}

#[test]
fn expanded_rows_have_the_same_bits_over_a_copy_in_e4m3() {
    let Some(device) = hopper() else { return };
    for (intermediate, biased) in [(256, false), (192, true)] {
        let spec = Spec { format: WeightFormat::Mxfp4, intermediate, biased, ..SPEC };
        let model = Model::new(device, spec);
        let copied = with_e4m3_copy(device, &model).unwrap();
        let expanded = copied.expanded(4000).unwrap();
        let choices = [1, 40, 4000].map(|rows| expanded.choice(rows));
        assert_eq!(choices[2].e4m3_copy, [true; 2], "{choices:?}");
        assert_eq!(model.on_device.expanded(4000).unwrap().choice(4000).e4m3_copy, [false; 2]);
        check_with(device, &model, &expanded, &[1, 300], &[1, 8, 128]);
    }
}

#[test]
fn the_activation_is_inside_gemm_1_where_the_layer_has_it_there() {
    let Some(device) = hopper() else { return };
    let choices = |format, biased| {
        let expanded = Model::new(device, Spec { format, biased, ..SPEC }).on_device.expanded(4000).unwrap();
        [1, 40, 4000].map(|rows| expanded.choice(rows))
    };
    let e4m3 = choices(WeightFormat::E4m3, false);
    assert!(e4m3.iter().any(|choice| choice.activation_inside_gemm1 && choice.launches == 5), "{e4m3:?}");
    for choice in choices(WeightFormat::E4m3, true) {
        assert!(!choice.activation_inside_gemm1 && choice.launches == 6, "{choice}");
    }
    for choice in choices(WeightFormat::Bf16, false) {
        assert!(!choice.activation_inside_gemm1 && choice.launches == 5, "{choice}");
    }
}

#[test]
fn expanded_rows_of_a_layer_with_biases_and_partial_groups_have_them_too() {
    let spec = Spec { hidden: 320, intermediate: 192, experts: 6, activation: GPT_OSS, biased: true, ..SPEC };
    for activation_format in ActivationFormat::ALL {
        for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
            check(Spec { format, activation_format, ..spec }, &[7, 90], &[1, 3]);
        }
    }
    // Biases keep the activation out of GEMM 1.
    check(Spec { biased: true, ..SPEC }, &[33], &[8]);
    // One expert; f16 rows.
    check(Spec { experts: 1, input: Dtype::F16, ..SPEC }, &[1, 50], &[1, 4]);
}

#[test]
fn rows_that_came_quantized_give_what_rows_that_are_quantized_here_give() {
    let Some(device) = hopper() else { return };
    let (spec, hidden, format) = (SPEC, SPEC.hidden, ScaleFormat::HOPPER);
    let model = Model::new(device, spec);
    let expanded = model.on_device.expanded(3000).unwrap();
    let inputs = Inputs::new(&model, 60, Pattern::Skewed, 8);
    // Scales are read where they are, or copied first.
    for (alignment, segments) in [(1, 0), (1, 3), (4, 1), (128, 0), (3, 2)] {
        let used = Sorted::new(&inputs.ids, spec.experts, alignment, 0).m_sum();
        let m_sum = used.next_multiple_of(alignment) + segments * alignment;
        let sorted = Sorted::new(&inputs.ids, spec.experts, alignment, m_sum - used);
        let rows = sorted.rows::<bf16>(&inputs, hidden);
        let mut space = vec![0; 3 * spec.experts + m_sum];
        let layout = Layout::from_psum(&sorted.psum, alignment, m_sum, &mut space).unwrap();
        let mut quantized = vec![E4m3(0x7f); m_sum * hidden];
        let mut scales = vec![f32::NAN; format.words(m_sum, hidden).unwrap()];
        let matrix = MatrixRef::new(&rows, m_sum, hidden).unwrap();
        let to = ScalesMut::f32(format, &mut scales);
        quantize_rows(&Cpu::new(), matrix, &layout, &mut quantized, to).unwrap();
        let groups = hidden / 128;
        let row_major: Vec<f32> =
            (0..m_sum * groups).map(|at| scales[format.word(at / groups, at % groups, m_sum, groups)]).collect();
        let (psum, rows) = (upload(device, &sorted.psum), upload(device, &rows));
        let (quantized, scales) = (upload(device, &quantized), upload(device, &scales));
        let row_major = upload(device, &row_major);
        let stride = m_sum.next_multiple_of(4);
        let call = ExpandedCall {
            m_sum,
            alignment,
            rows: rows.ptr(),
            psum: psum.ptr().cast(),
            expected_rows: 60,
            ..ExpandedCall::default()
        };
        let here = launch(device, &expanded, call);
        let mn_major = DeviceMatrix { ptr: scales.ptr().cast(), row_stride: 1, col_stride: stride };
        for scales in [mn_major, DeviceMatrix::row_major(row_major.ptr().cast(), groups)] {
            let call = ExpandedCall { rows: quantized.ptr(), scales: Some(scales), ..call };
            assert!(launch(device, &expanded, call) == here, "alignment {alignment}, {scales:?}");
        }
    }
}

#[test]
fn the_safe_door_has_the_bits_of_the_raw_one_and_reports_a_psum_that_does_not_fit() {
    let Some(device) = hopper() else { return };
    let (spec, hidden) = (SPEC, SPEC.hidden);
    let model = Model::new(device, spec);
    let layer = &model.on_device;
    let inputs = Inputs::new(&model, 40, Pattern::Even, 2);
    let inputs = Inputs { weights: once_each(40), ..inputs };
    let expected = by_token(device, &model, &inputs);
    let used = Sorted::new(&inputs.ids, spec.experts, 8, 0).m_sum();
    let m_sum = used.next_multiple_of(8);
    let sorted = Sorted::new(&inputs.ids, spec.experts, 8, m_sum - used);
    let rows = device.upload(&sorted.rows::<bf16>(&inputs, hidden)).unwrap();
    let psum = device.upload(&sorted.psum).unwrap();
    let mut out: DeviceBuffer<bf16> = device.allocate(m_sum * hidden).unwrap();
    let bits = |out: &DeviceBuffer<bf16>| {
        let mut values = vec![bf16::ZERO; out.len()];
        out.download(&mut values).unwrap();
        values.into_iter().map(bf16::to_bits).collect::<Vec<_>>()
    };
    let given = ExpandedRows { m_sum, alignment: 8, rows: &rows, psum: &psum };

    let mut workspace = layer.workspace(700).unwrap();
    let refuse = |rows: &ExpandedRows<'_, Device, bf16>, workspace: &mut _, out: &DeviceBuffer<bf16>, start: &str| {
        out.fill(NAN_POISON).unwrap();
        let error = layer.run_expanded(rows, workspace, out).unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}, expected {start}");
        assert!(bits(out).iter().all(|&bits| bits == u16::from_le_bytes([NAN_POISON; 2])), "{error}: written");
    };
    let unprepared = format!("m_sum is {m_sum}, expected at most 0, for which expanded_workspace was asked");
    refuse(&given, &mut workspace, &out, &unprepared);
    let mut workspace = ExpertLayer::<Device>::expanded_workspace(layer, m_sum).unwrap();
    let more = format!("m_sum is {}, expected at most {m_sum}", m_sum + 8);
    refuse(&ExpandedRows { m_sum: m_sum + 8, ..given }, &mut workspace, &out, &more);
    let odd = format!("m_sum is {}, expected a multiple of the alignment 8", m_sum - 1);
    refuse(&ExpandedRows { m_sum: m_sum - 1, ..given }, &mut workspace, &out, &odd);
    refuse(&ExpandedRows { alignment: 0, ..given }, &mut workspace, &out, "alignment is 0");
    let few = device.upload(&sorted.psum[1..]).unwrap();
    refuse(&ExpandedRows { psum: &few, ..given }, &mut workspace, &out, "psum holds 15 elements, expected at least 16");
    let short = device.allocate::<bf16>(m_sum * hidden - 1).unwrap();
    refuse(&ExpandedRows { rows: &short, ..given }, &mut workspace, &out, "rows holds");
    refuse(&given, &mut workspace, &short, "out holds");
    refuse(&given, &mut layer.workspace(1).unwrap(), &out, "workspace holds");
    let f32s = device.allocate::<f32>(m_sum * hidden).unwrap();
    let wide = ExpandedRows { m_sum, alignment: 8, rows: &f32s, psum: &psum };
    let error = layer.run_expanded(&wide, &mut workspace, &out).unwrap_err();
    assert_eq!(error, Error::Dtype { argument: "rows", actual: Dtype::F32, expected: "bf16, as prepared" });

    out.fill(NAN_POISON).unwrap();
    ExpertLayer::<Device>::run_expanded(layer, &given, &mut workspace, &mut out).unwrap();
    layer.check(&mut workspace).unwrap();
    compare_rows(&bits(&out), &sorted, &expected, hidden, "by the safe door");

    // Hostile ends: nothing but rows of `out` is written, and the first of them is named.
    let mut random = Random::new(5);
    for _ in 0..6 {
        let mut hostile = sorted.psum.clone();
        hostile[random.below(16)] = random.of(&[-1, i32::MIN, i32::MAX, m_sum as i32 + 1]);
        psum.upload(&hostile).unwrap();
        layer.run_expanded(&given, &mut workspace, &out).unwrap();
        let error = layer.check(&mut workspace).unwrap_err();
        assert!(matches!(error, Error::Count { argument: "psum", .. }), "{error}: {hostile:?}");
        layer.check(&mut workspace).unwrap();
    }
    let none = ExpandedRows { m_sum: 0, ..given };
    layer.run_expanded(&none, &mut workspace, &out).unwrap();
}

#[test]
fn the_raw_door_refuses_what_does_not_fit_before_anything_is_queued() {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, Spec { format: WeightFormat::Bf16, max_tokens: 8, ..SPEC });
    let expanded = model.on_device.expanded(16).unwrap();
    let (m_sum, hidden) = (16, SPEC.hidden);
    let memory = device.allocate::<u8>(expanded.workspace_bytes(m_sum).unwrap()).unwrap();
    let [rows, out] = [0; 2].map(|_| device.allocate::<u8>(2 * m_sum * hidden).unwrap());
    let (psum, state) = (upload(device, &[0i32; 16]), device.allocate::<u8>(STATE_BYTES).unwrap());
    out.fill(NAN_POISON).unwrap();
    let good = ExpandedCall {
        m_sum,
        alignment: 1,
        rows: rows.ptr(),
        scales: None,
        psum: psum.ptr().cast(),
        expected_rows: 16,
        out: out.ptr(),
        state: state.ptr(),
        workspace: memory.ptr(),
    };
    let refuse = |call: ExpandedCall| unsafe { expanded.launch(Stream(0), &call).unwrap_err() };
    let scales = Some(DeviceMatrix::row_major(rows.ptr().cast(), hidden / 128));
    let error = refuse(ExpandedCall { scales, ..good });
    assert!(matches!(error, Error::Unsupported { argument: "scales", backend: "cuda", .. }), "{error}");
    for (call, argument) in [
        (ExpandedCall { m_sum: 17, ..good }, "m_sum"),
        (ExpandedCall { rows: rows.ptr().byte_add(8), ..good }, "rows"),
        (ExpandedCall { out: out.ptr().byte_add(2), ..good }, "out"),
        (ExpandedCall { psum: psum.ptr().byte_add(2).cast(), ..good }, "psum"),
        (ExpandedCall { state: state.ptr().byte_add(8), ..good }, "state"),
        (ExpandedCall { workspace: memory.ptr().byte_add(16), ..good }, "workspace"),
    ] {
        let error = refuse(call);
        assert!(matches!(error, Error::Value { argument: named, .. } if named == argument), "{error}: {argument}");
    }
    assert!(matches!(refuse(ExpandedCall { alignment: 0, ..good }), Error::Alignment { actual: 0, .. }));
    assert!(model.on_device.expanded(0).is_err());
    let mut bytes = vec![0u8; out.bytes()];
    out.download_at(0, &mut bytes).unwrap();
    assert_untouched("out", &bytes, NAN_POISON);
}
