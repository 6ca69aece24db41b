use super::*;

const H200: usize = 132;

/// A launch for each step, whatever the number of tokens.
fn config(topk: usize, global_experts: usize, activations: ActivationFormat) -> LayerConfig {
    LayerConfig { one_launch: false, ..LayerConfig::new(topk, global_experts, activations) }
}

fn kind(config: &LayerConfig) -> WeightKind {
    WeightKind::unbiased(config.weight_format())
}

fn choose(shape: &LayerShape, config: &LayerConfig, tokens: usize) -> Result<LayerChoice> {
    LayerChoice::new(shape, config, kind(config).format, tokens, H200)
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
    choose(&shape, &config(topk, global, ActivationFormat::E4m3), tokens).unwrap()
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
fn numbers_of_tokens_within_an_eighth_have_the_same_tiles_and_all_have_those_of_the_choices() {
    assert_eq!(
        [0, 1, 7, 15, 16, 17, 18, 31, 63, 64, 71, 4096, 4607].map(alike),
        [1, 1, 7, 15, 16, 16, 18, 30, 60, 64, 64, 4096, 4096]
    );
    for (_, hidden, intermediate, experts, global, topk) in SHAPES {
        for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
            let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
            let config = config(topk, global, activations);
            let choices = Choices::new(&shape, &config, kind(&config), 3000, H200).unwrap();
            for tokens in (0..100).chain((100..=3000).step_by(37)) {
                let choice = choose(&shape, &config, tokens).unwrap();
                let Tiles { gemm1, gemm2, activation_inside_gemm1, joined, .. } = *choices.tiles(tokens);
                let tiles = (gemm1, gemm2, activation_inside_gemm1);
                assert_eq!(tiles, (choice.gemm1, choice.gemm2, choice.activation_inside_gemm1), "{tokens} tokens");
                assert_eq!(choice.joined, joined && choice.one_launch.is_none(), "{tokens} tokens");
            }
        }
    }
}

#[test]
fn k_is_split_only_where_a_layer_may() {
    let shape = LayerShape::new(7168, 2048, 1).unwrap();
    let config = |split_k| LayerConfig { split_k, ..config(1, 1, ActivationFormat::E4m3) };
    let splits = |split_k, tokens| {
        let choice = choose(&shape, &config(split_k), tokens).unwrap();
        (choice.gemm1.splits(), choice.gemm2.splits())
    };
    for tokens in (1..200).chain([1000, 10_000]) {
        assert_eq!(splits(false, tokens), (1, 1), "{tokens} tokens");
    }
    assert_eq!([1, 64, 72].map(|tokens| splits(true, tokens)), [(2, 1), (2, 1), (1, 1)]);
}

#[test]
fn launches_are_those_of_routing_and_permute_and_an_activation_inside_saves_one() {
    let with = |activations, tokens| {
        let shape = LayerShape::new(4096, 14336, 8).unwrap();
        choose(&shape, &config(2, 8, activations), tokens).unwrap()
    };
    for tokens in [1, 64, 128, 256, 4096, 4097, 16384] {
        let choice = with(ActivationFormat::E4m3, tokens);
        // Up to 8192 slots routing is part of the permute's launch.
        let apart = if tokens <= 4096 { 5 } else { 6 };
        assert_eq!(choice.launches, apart - usize::from(choice.activation_inside_gemm1), "{tokens}: {choice}");
        let choice = with(ActivationFormat::Bf16, tokens);
        assert_eq!((choice.launches, choice.activation_inside_gemm1), (apart, false), "{tokens}: {choice}");
    }
    assert_eq!([ActivationFormat::E4m3, ActivationFormat::Bf16].map(|of| with(of, 0).launches), [0, 0]);
    assert!(with(ActivationFormat::E4m3, 16384).activation_inside_gemm1);
}

#[test]
fn experts_with_few_rows_have_both_gemms_in_one_launch_unless_the_layer_may_not() {
    let shape = LayerShape::new(4096, 1536, 128).unwrap();
    for activations in ActivationFormat::ALL {
        let config = LayerConfig::new(8, 128, activations);
        let joined = |config: &LayerConfig, tokens| choose(&shape, config, tokens).unwrap();
        let choice = joined(&config, 64);
        assert!(choice.joined && choice.gemm1 == choice.gemm2 && choice.launches == 3, "{choice}");
        assert!(choice.to_string().contains(", both gemms in one launch"), "{choice}");
        assert_eq!((choice.e4m3_copy, choice.activation_inside_gemm1), ([false; 2], false));
        for config in [LayerConfig { one_launch: false, ..config }, LayerConfig { split_k: true, ..config }] {
            assert!(!joined(&config, 64).joined, "{config:?}");
        }
        assert!(!joined(&config, 1).joined, "one launch does it all");
        assert!(!joined(&config, 16384).joined, "experts have many rows");
        for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
            let joined = |config: &LayerConfig, tokens| LayerChoice::new(&shape, config, format, tokens, H200).unwrap();
            for tokens in [8, 64] {
                let choice = joined(&config, tokens);
                let expected = if choice.joined { 3 } else { 5 };
                assert!(choice.launches == expected && choice.one_launch.is_none(), "{format}: {choice}");
                assert!(choice.gemm1 == choice.gemm2 || !choice.joined, "{format}: {choice}");
                assert!(!joined(&LayerConfig { one_launch: false, ..config }, tokens).joined, "{format}");
            }
            assert!([8, 64].iter().any(|&tokens| joined(&config, tokens).joined), "{format}, {activations}");
            assert!(!joined(&config, 16384).joined, "{format}: experts have many rows");
        }
    }
    // 64 does not divide I.
    let shape = LayerShape::new(1024, 336, 64).unwrap();
    let config = LayerConfig::new(4, 64, ActivationFormat::Bf16);
    assert!(!choose(&shape, &config, 64).unwrap().joined);
}

#[test]
fn gemm2_has_a_worklist_of_its_own_where_its_row_tile_is_another() {
    for shape in 0..SHAPES.len() {
        for tokens in (0..600).chain([1024, 4096, 16384, 65536]) {
            let choice = choice(shape, tokens);
            assert_eq!(choice.gemm1.row_tile(), choice.row_tile);
            let own = (choice.gemm2.row_tile() != choice.row_tile).then_some(choice.gemm2.row_tile());
            assert_eq!(choice.second_row_tile(), own);
        }
    }
}

#[test]
fn few_tokens_take_one_launch_by_the_smallest_kernel_unless_the_layer_may_not() {
    // The most tokens of one launch with e4m3: more where few of a call's slots are on this device, but where H is small.
    let most_e4m3 = [2, 8, 2, 2, 4, 4, 2, 8];
    let more = [
        ("dsv3, two of 8 parts", 7168, 2048, 64, 256, 8),
        ("qwen235, half", 4096, 1536, 64, 128, 8),
        ("qwen30b, half", 2048, 768, 64, 128, 8),
        ("qwen30b, a sixteenth", 2048, 768, 2, 128, 8),
    ];
    for ((name, hidden, intermediate, experts, global, topk), e4m3) in SHAPES.into_iter().chain(more).zip(most_e4m3) {
        for (activations, most) in [(ActivationFormat::E4m3, e4m3), (ActivationFormat::Bf16, 4)] {
            let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
            let config = LayerConfig::new(topk, global, activations);
            let choices = Choices::new(&shape, &config, kind(&config), 40, H200).unwrap();
            for tokens in 0..40 {
                let choice = choose(&shape, &config, tokens).unwrap();
                let expected = (tokens <= most).then_some(tokens.max(1).next_power_of_two());
                assert_eq!(choice.one_launch, expected, "{name}, {tokens} tokens");
                assert_eq!(choices.of_tokens(tokens).1, expected, "{name}, {tokens} tokens");
                if expected.is_some() {
                    assert_eq!(choice.launches, tokens.min(1));
                    assert!(choice.to_string().starts_with("one launch, for up to "), "{choice}");
                    assert!(choice.workspace_bytes >= 4 * tokens * topk * intermediate, "{choice}");
                }
                let in_steps = LayerConfig { one_launch: false, ..config };
                assert_eq!(choose(&shape, &in_steps, tokens).unwrap().one_launch, None);
                let split = LayerConfig { split_k: true, ..config };
                assert_eq!(choose(&shape, &split, tokens).unwrap().one_launch, None);
            }
            // Nothing is compiled that no call needs.
            let one = Choices::new(&shape, &config, kind(&config), 1, H200).unwrap();
            assert_eq!((one.few_tokens.len(), one.gemms.len(), one.row_tiles.len()), (1, 0, 0), "{name}");
        }
    }
}

/// Every part but the layout's lists, as (start, bytes): those that are needed at the same time, one behind the other.
fn spans(
    parts: &LayerParts,
    choice: &LayerChoice,
    hidden: usize,
    intermediate: usize,
    e4m3: bool,
) -> Vec<Vec<(u64, usize)>> {
    let m_sum = choice.plan.m_sum();
    let operand = |at: DevicePtr, width: usize| (at.address(), m_sum * width * if e4m3 { 1 } else { 2 });
    let scales = |at: Option<DevicePtr<f32>>, width: usize| {
        assert_eq!(at.is_some(), e4m3);
        (at.unwrap_or(parts.front.cast()).address(), 4 * m_sum * width / 128)
    };
    let with_scales = if e4m3 { 2 } else { 1 };
    let front = &[operand(parts.front, hidden), scales(parts.front_scales, hidden)][..with_scales];
    let activated = [operand(parts.activated, intermediate), scales(parts.activated_scales, intermediate)];
    let activated = &activated[..with_scales];
    let gate_up = (parts.back.address(), 4 * m_sum * intermediate);
    let rows = (parts.back.address(), 2 * m_sum * hidden);
    if choice.joined {
        let gate_up = (parts.gate_up.address(), 4 * m_sum * intermediate);
        return vec![[activated, front, &[rows, gate_up]].concat()];
    }
    if choice.activation_inside_gemm1 {
        return vec![[activated, front].concat(), [activated, &[rows]].concat()];
    }
    vec![[front, &[gate_up]].concat(), [activated, &[gate_up]].concat(), [activated, &[rows]].concat()]
}

#[test]
fn parts_that_are_needed_together_do_not_overlap_and_stay_inside_the_workspace() {
    let (mut inside, mut with_second, mut joined) = (0, 0, 0);
    for (hidden, intermediate, experts, topk, tokens) in [
        (128, 128, 1, 1, 1),
        (2944, 384, 7, 3, 33),
        (256, 2048, 256, 8, 64),
        (256, 2048, 4, 2, 500),
        (7168, 256, 256, 8, 600),
        (4096, 1536, 128, 8, 4096),
    ] {
        for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
            let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
            let config = LayerConfig { one_launch: true, ..config(topk, experts, activations) };
            let tiles = Tiles::new(&shape, &config, kind(&config), tokens, H200).unwrap();
            let (choice, offsets) = LayerChoice::with_offsets(&shape, &config, tokens, (&tiles, None), H200).unwrap();
            let LayerChoice { plan, row_tile, activation_inside_gemm1, .. } = choice;
            inside += usize::from(activation_inside_gemm1);
            let parts = offsets.at(DevicePtr::new(4096), &choice).unwrap();
            let routing = route::workspace_bytes(&plan, H200).unwrap();
            let lists = LayoutPtrs::space_bytes(&plan, row_tile).unwrap();
            let mut before = vec![(4096, routing), (parts.layout.expert_num_tokens.address(), lists)];
            let mut after = Vec::new();
            match parts.extra {
                Some(RouteExtra::Worklist(second)) => {
                    let bytes = SecondWorklist::space_bytes(&plan, second.row_tile).unwrap();
                    before.push((second.header.address(), bytes));
                    with_second += 1;
                }
                Some(RouteExtra::Counters { counters, words }) => {
                    let row_tiles = worklist_capacity(&plan, row_tile).unwrap();
                    assert_eq!(words, 1 + row_tiles * (1 + intermediate.div_ceil(128)));
                    after.push((counters.address(), 4 * words));
                    joined += 1;
                }
                None => {}
            }
            let e4m3 = activations == ActivationFormat::E4m3;
            for spans in spans(&parts, &choice, hidden, intermediate, e4m3) {
                let spans = [spans, after.clone()].concat();
                let mut end = 4096;
                for &(at, bytes) in before.iter().chain(&spans) {
                    assert!(at >= end && at % 256 == 0, "{before:?} {spans:?} {choice}");
                    end = at + bytes as u64;
                }
                assert!(end <= 4096 + choice.workspace_bytes as u64, "{end}: {spans:?} {choice}");
            }
            assert!(offsets.at(DevicePtr::new(4096 + 16), &choice).is_err());
        }
    }
    assert!(inside > 0 && with_second > 0 && joined > 0, "{inside}, {with_second}, {joined}");
}

#[test]
fn a_workspace_serves_every_call_of_fewer_tokens() {
    for (_, hidden, intermediate, experts, global, topk) in SHAPES {
        for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
            let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
            let config = config(topk, global, activations);
            let choices = Choices::new(&shape, &config, kind(&config), 1500, H200).unwrap();
            let mut most = 0;
            for tokens in 1..=1500 {
                let choice = choose(&shape, &config, tokens).unwrap();
                most = most.max(choice.workspace_bytes);
                assert_eq!(choices.workspace_bytes(&choice), most, "{tokens} tokens");
                assert!(choices.row_tiles.contains(&choice.row_tile));
                assert!(choices.gemms.contains(&choice.first()));
                assert!(choices.gemms.contains(&choice.second()));
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let shape = LayerShape::new(256, 128, 4).unwrap();
    let good = config(2, 4, ActivationFormat::E4m3);
    let refuse = |config: LayerConfig, tokens: usize, start: &str| {
        let error = choose(&shape, &config, tokens).unwrap_err();
        assert!(error.to_string().starts_with(start), "{error}");
    };
    refuse(LayerConfig { topk: 0, ..good }, 1, "topk is 0");
    refuse(LayerConfig { global_experts: 0, ..good }, 1, "global_experts is 0");
    refuse(good, 1 << 31, "M * topk overflows");
    refuse(good, usize::MAX, "M * topk overflows");
}

#[test]
fn with_weights_of_4_bits_and_with_biases_the_activation_stays_outside() {
    let shape = LayerShape::new(2880, 2880, 128).unwrap();
    for activations in ActivationFormat::ALL {
        let config = LayerConfig::new(4, 128, activations);
        for format in [WeightFormat::Mxfp4, WeightFormat::Int4] {
            for tokens in [1, 2, 64, 4096] {
                let choice = LayerChoice::new(&shape, &config, format, tokens, H200).unwrap();
                assert_eq!((choice.one_launch, choice.activation_inside_gemm1), (None, false), "{choice}");
            }
        }
    }
    let config = LayerConfig::new(8, 128, ActivationFormat::E4m3);
    let shape = LayerShape::new(4096, 1536, 128).unwrap();
    for biased in [[true, false], [false, true], [true, true]] {
        let weights = WeightKind { biased, ..WeightKind::unbiased(WeightFormat::E4m3) };
        let choices = Choices::new(&shape, &config, weights, 600, H200).unwrap();
        assert_eq!(choices.of_tokens(1).1, Some(1), "{biased:?}");
        assert!(!biased[0] || choices.gemms.iter().all(|gemm| !gemm.activated), "{biased:?}");
    }
}

#[test]
fn a_copy_in_e4m3_is_read_by_calls_of_many_tokens_and_only_where_there_is_one() {
    for (name, hidden, intermediate, experts, topk) in
        [("qwen3-235b-a22b", 4096, 1536, 128, 8), ("gpt-oss-120b", 2880, 2880, 128, 4)]
    {
        let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
        let config = LayerConfig::new(topk, experts, ActivationFormat::E4m3);
        let unbiased = WeightKind::unbiased(WeightFormat::Mxfp4);
        let copied = |e4m3_copy, biased, tokens| {
            let kind = WeightKind { e4m3_copy, biased, ..unbiased };
            let choices = Choices::new(&shape, &config, kind, tokens, H200).unwrap();
            let choice = LayerChoice::with_offsets(&shape, &config, tokens, choices.of_tokens(tokens), H200).unwrap().0;
            let prepared = if choice.joined { &choices.joined } else { &choices.gemms };
            assert!(prepared.contains(&choice.first()) && prepared.contains(&choice.second()), "{name}");
            assert!(!biased[0] || !choice.activation_inside_gemm1, "{name}: {choice}");
            choice.e4m3_copy
        };
        for biased in [[false; 2], [true; 2]] {
            assert_eq!([8, 64, 8192].map(|tokens| copied([false; 2], biased, tokens)), [[false; 2]; 3], "{name}");
            assert_eq!([8, 64].map(|tokens| copied([true; 2], biased, tokens)), [[false; 2]; 2], "{name}");
            for copy in [[true; 2], [true, false], [false, true]] {
                assert_eq!(copied(copy, biased, 8192), copy, "{name}");
            }
        }
    }
}
