//! Layers that keep a copy of their mxfp4 weights in e4m3: the same bits, whichever a call reads.

use super::*;
use expertile::cuda::DeviceBuffer;
use expertile_testkit::Random;

/// Tokens of the calls that are compared: few, and so many that each GEMM reads the copy. (Of so small a layer it may
/// with few.)
const TOKENS: [usize; 6] = [1, 3, 40, 300, 1100, 3000];

const SPEC: Spec = Spec { format: WeightFormat::Mxfp4, experts: 5, topk: 2, max_tokens: 3000, ..BASE };

/// A model whose scales are as far apart in every block as the copy takes, and some of whose groups, one block of
/// 128 x 128 and one expert's `w2` are zeros of either sign under any scale.
fn model(device: &Device, spec: Spec) -> Model {
    let mut random = Random::new(12);
    let mut model = Model::new(device, spec);
    let [h, i] = [spec.hidden, spec.intermediate];
    for (matrices, [n, k]) in [(&mut model.w13, [2 * i, h]), (&mut model.w2, [h, i])] {
        let Matrices::Mxfp4(blocks, scales) = matrices else { unreachable!("the spec's format") };
        for (group, scale) in scales.iter_mut().enumerate() {
            let (row, column) = (group / (k / 32), group % (k / 32));
            *scale = 116 + random.below(12) as u8;
            let in_zero_block = (128..256).contains(&row) && column < 4;
            let in_zero_expert = [n, k] == [h, i] && row / n == 1;
            if random.below(20) == 0 || in_zero_block || in_zero_expert {
                blocks[16 * group..][..16].iter_mut().for_each(|byte| *byte &= 0x88);
                *scale = [0, 3, 254][random.below(3)];
            }
        }
    }
    let Model { w13, w2, map, .. } = model;
    Model::with_weights(device, spec, (w13, w2), map)
}

/// The model's layer over the same weights with their copies.
pub(crate) fn with_e4m3_copy(device: &Device, model: &Model) -> expertile::Result<Layer> {
    let layer = &model.on_device;
    let [w13, w2] = layer.weights().map(|weights| weights.clone().with_e4m3_copy(device));
    let config = *layer.config();
    let [b13, b2] = model.biases();
    Layer::prepare(device, w13?, w2?, config, layer.max_tokens())?.with_biases(b13, b2)
}

fn output(device: &Device, model: &Model, layer: &Layer, inputs: &Inputs) -> Vec<u8> {
    let call = Call::new(device, model, inputs);
    call.poison(device);
    let workspace: DeviceBuffer = device.allocate(layer.workspace_bytes(inputs.tokens).unwrap()).unwrap();
    workspace.fill(NAN_POISON).unwrap();
    let operands = LayerCall { workspace: workspace.ptr(), ..call.operands() };
    let mut bytes = vec![0; call.output.bytes()];
    unsafe {
        layer.launch(Stream(0), &operands).unwrap();
        layer.check_launch(Stream(0), &operands).unwrap();
    }
    call.output.download_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_copy_in_e4m3_gives_the_same_bits() {
    let Some(device) = hopper() else { return };
    let partial = Spec { hidden: 320, intermediate: 192, activation: GPT_OSS, biased: true, ..SPEC };
    for spec in [SPEC, partial] {
        let model = model(device, spec);
        let with_copy = with_e4m3_copy(device, &model).unwrap();
        let mut copied = [0; 2];
        for tokens in TOKENS {
            let choice = with_copy.choice(tokens).unwrap();
            for (count, reads) in copied.iter_mut().zip(choice.e4m3_copy) {
                *count += usize::from(reads);
            }
            let inputs = Inputs::new(&model, tokens, Pattern::Skewed, tokens as u64);
            let [expected, found] = [&model.on_device, &with_copy].map(|layer| output(device, &model, layer, &inputs));
            assert!(expected == found, "{tokens} tokens, H {}: {choice}", spec.hidden);
        }
        assert!(copied.iter().all(|&count| count > 0), "the copy was read {copied:?} times");
        for (own, copied) in model.on_device.weights().into_iter().zip(with_copy.weights()) {
            let bytes = Weights::e4m3_copy_bytes((own.experts(), own.n(), own.k())).unwrap();
            assert_eq!(copied.bytes(), own.bytes() + bytes);
            let values = own.experts() * own.n() * own.k();
            assert!((values..values * 102 / 100).contains(&bytes), "{bytes} of {values}");
        }
    }
}

/// Of 2 experts of 256 x 256 with these scales.
fn copy_of(device: &Device, scale: impl Fn(usize, usize) -> u8) -> expertile::Result<Weights> {
    let scales: Vec<u8> = (0..2 * 256 * 8).map(|group| scale(group / 8, group % 8)).collect();
    let weights = Weights::upload_mxfp4(device, &[0x21; 2 * 256 * 128], &scales, (2, 256, 256)).unwrap();
    weights.arrange(device, ActivationFormat::E4m3).unwrap().with_e4m3_copy(device)
}

#[test]
fn what_has_no_exact_copy_in_e4m3_is_refused_and_said_where() {
    let Some(device) = hopper() else { return };
    let refused = |scale: &dyn Fn(usize, usize) -> u8| copy_of(device, scale).unwrap_err().to_string();
    // Outputs of a block, 11 and 12 powers of two apart; blocks of an output likewise.
    let copied = copy_of(device, |row, _| 116 + 11 * u8::from(row % 128 == 5)).unwrap();
    assert_eq!(copied.e4m3_copy().unwrap().format(), WeightFormat::E4m3);
    let error = refused(&|row, _| 115 + 12 * u8::from(row == 256 + 128 + 5));
    assert!(error.starts_with("expert is 1, expected one whose mxfp4 scales are at most 11 powers"), "{error}");
    assert!(error.ends_with("those of outputs 128 and inputs 0 on are not"), "{error}");
    let error = refused(&|row, group| 115 + 12 * u8::from(row == 5 && group == 7));
    assert!(error.ends_with("those of outputs 0 and inputs 0 on are not"), "a slab whose scales are spread: {error}");
    copy_of(device, |row, _| 116 - 11 * u8::from(row < 128)).unwrap();
    for (exponent, is_taken) in [(86, false), (87, true), (167, true), (168, false)] {
        let found = copy_of(device, |_, _| exponent);
        assert_eq!(found.is_ok(), is_taken, "{exponent}: {found:?}");
    }
    let upload = |format, rows| {
        let spec = Spec { format, activation_format: rows, max_tokens: 4, ..BASE };
        with_e4m3_copy(device, &Model::new(device, spec)).unwrap_err().to_string()
    };
    assert!(upload(WeightFormat::Mxfp4, ActivationFormat::Bf16).contains("mxfp4 arranged for rows of another format"));
    for format in [WeightFormat::E4m3, WeightFormat::Int4] {
        let error = upload(format, ActivationFormat::E4m3);
        assert!(error.contains(format.name()) && error.ends_with("expected mxfp4"), "{error}");
    }
}
