//! Both GEMMs and the activation in one launch: the bits of the steps, for all weights.

use super::*;
use expertile_testkit::Random;

/// Fails unless a call of so many tokens has both GEMMs in one launch.
fn require_joined(model: &Model, tokens: usize) {
    let choice = model.on_device.choice(tokens).unwrap();
    assert!(choice.joined, "{tokens} tokens: {choice}");
    println!("{tokens} tokens: {choice}");
}

#[test]
fn both_gemms_in_one_launch_have_the_bits_of_the_steps() {
    let Some(device) = hopper() else { return };
    let spec = Spec { hidden: 640, intermediate: 384, experts: 24, topk: 3, max_tokens: 300, ..BASE };
    // The last group of columns is half a one; a tile of 128 outputs is half gate, half up.
    let partial = Spec { format: WeightFormat::Bf16, intermediate: 192, ..spec };
    for (spec, tokens) in [
        (spec, &[10, 70][..]),
        (partial, &[9, 120]),
        (Spec { biased: true, ..spec }, &[33]),
        (Spec { biased: true, ..partial }, &[50]),
    ] {
        let model = Model::new(device, spec);
        for &tokens in tokens {
            require_joined(&model, tokens);
        }
        check_model(spec, tokens, &[Pattern::Skewed, Pattern::One]);
    }
}

/// Of 4 bits; the last group of columns is half a one, and neither gate nor all outputs end with a tile. So many experts
/// that multiprocessors have a tile of each GEMM: fewer are not worth one launch.
fn spec(device: &Device) -> Spec {
    let (hidden, intermediate, experts) = if is_emulated(device) { (448, 192, 8) } else { (832, 448, 64) };
    let spec = Spec { hidden, intermediate, experts, topk: 3, max_tokens: 100, ..BASE };
    Spec { biased: true, activation: GPT_OSS, ..spec }
}

#[test]
fn both_gemms_of_4_bits_in_one_launch_have_the_bits_of_the_steps() {
    let Some(device) = hopper() else { return };
    for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
        for activation_format in ActivationFormat::ALL {
            let spec = Spec { format, activation_format, ..spec(device) };
            let model = Model::new(device, spec);
            let calls = [(20, Pattern::Even), (100, Pattern::Skewed)];
            // Every kernel is compiled anew in the emulator.
            for &(tokens, pattern) in if is_emulated(device) { &calls[1..] } else { &calls } {
                require_joined(&model, tokens);
                check_model(spec, &[tokens], &[pattern]);
            }
        }
    }
}

#[test]
fn both_gemms_of_mxfp4_in_one_launch_have_the_bits_of_the_steps_where_scales_are_far_apart() {
    let Some(device) = hopper() else { return };
    for (activation_format, steps) in [(ActivationFormat::E4m3, 12), (ActivationFormat::Bf16, 126)] {
        let spec = Spec { format: WeightFormat::Mxfp4, activation_format, ..spec(device) };
        let Model { mut w13, mut w2, map, .. } = Model::new(device, spec);
        let mut random = Random::new(7);
        for matrices in [&mut w13, &mut w2] {
            let Matrices::Mxfp4(_, scales) = matrices else { unreachable!("the spec's format") };
            // In some outputs of some slabs.
            for scale in scales.iter_mut() {
                *scale = if random.below(5000) == 0 { 126 - steps } else { 126 - random.below(4) as u8 };
            }
        }
        let model = Model::with_weights(device, spec, (w13, w2), map);
        let tokens = 100;
        require_joined(&model, tokens);
        let inputs = Inputs::new(&model, tokens, Pattern::Skewed, 3);
        let call = Call::new(device, &model, &inputs);
        call.poison(device);
        call.launch(Stream(0));
        call.check(Stream(0)).unwrap();
        let found = call.output_bytes();
        assert!(call.output().iter().all(|value| value.is_finite()), "{activation_format}");
        call.poison(device);
        call.launch_in_steps(Stream(0));
        assert!(found == call.output_bytes(), "{activation_format}");
    }
}
