//! Every kernel compiles for every architecture, without a GPU, and uses no local memory. Skips, and says so, where
//! NVRTC is not found: `pip install nvidia-cuda-nvrtc` and `EXPERTILE_NVRTC=<its lib folder>` is all it takes.
#![cfg(feature = "cuda")]

mod on_device;

use expertile::cuda::{
    ActivateConfig, Compiler, ExpertParallelLayer, FewTokensConfig, GemmConfig, GemmKernel, Grouping, JoinedConfig,
    PermuteConfig, QuantizePermuteConfig, QuantizeRowsConfig, RouteConfig, RoutePermuteConfig, Source, UnpermuteConfig,
    Weights,
};
use expertile::{
    Activation, ActivationFormat, Combine, Dispatch, Dtype, Error, Group, LayerConfig, LayerShape, Padding,
    ParallelChoice, ParallelConfig, Placement, ScaleFormat, ScaleLayout, ScaleRounding, WeightFormat,
};
use std::path::PathBuf;

const ARCHITECTURES: [&str; 5] = ["sm_90a", "sm_80", "sm_89", "sm_100a", "sm_120a"];

/// Multiprocessors.
const H200: usize = 132;

const WIDE: GemmKernel = GemmKernel::Wide { shares_rows: false };

fn compiler() -> Option<Compiler> {
    match Compiler::find() {
        Ok(compiler) => Some(compiler),
        Err(error) => {
            on_device::skipped(error);
            None
        }
    }
}

/// Every scale format.
fn formats() -> Vec<ScaleFormat> {
    let mut formats = Vec::new();
    for group in [Group::G32, Group::G128] {
        for layout in [ScaleLayout::RowMajor, ScaleLayout::MnMajor, ScaleLayout::PackedUe8m0] {
            for rounding in [ScaleRounding::Exact, ScaleRounding::PowerOfTwo] {
                formats.extend(ScaleFormat::new(group, layout, rounding));
            }
        }
    }
    formats
}

/// Configurations that together take every branch of every kernel.
fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    let both = |config: &QuantizePermuteConfig| config.sources().unwrap().map(Ok);
    for (topk, ids) in [(1, Dtype::I32), (8, Dtype::I64), (16, Dtype::I32), (32, Dtype::I64)] {
        let route = RouteConfig { topk, ids, row_tile: 64 };
        sources.push(route.source());
        for (hidden, input, aligned) in [(128, Dtype::F16, false), (7168, Dtype::Bf16, true)] {
            let config = QuantizePermuteConfig {
                route,
                hidden,
                input,
                format: ScaleFormat::HOPPER,
                padding: Padding::Zero,
                weighted: topk == 1,
                aligned,
            };
            sources.extend(both(&config));
        }
        for (input, output) in [(Dtype::Bf16, Dtype::Bf16), (Dtype::F32, Dtype::Bf16), (Dtype::F16, Dtype::F32)] {
            for (hidden, aligned, weighted) in [(7168, true, true), (2881, false, false)] {
                sources.push(UnpermuteConfig { hidden, topk, input, output, weighted, aligned }.source());
            }
        }
        for (hidden, aligned) in [(2048, true), (528, false)] {
            let (input, padding, weighted) = (Dtype::Bf16, Padding::Zero, topk == 1);
            let config = RoutePermuteConfig { route, hidden, input, scales: None, padding, weighted, aligned };
            sources.push(config.source());
        }
        for (hidden, dtype, alignment_bytes) in [(7168, Dtype::Bf16, 16), (3, Dtype::U8, 1), (5, Dtype::F32, 4)] {
            let padding = Padding::Zero;
            sources.push(PermuteConfig { topk, hidden, dtype, scales: None, padding, alignment_bytes }.source());
        }
    }
    for format in formats() {
        for (hidden, topk, aligned) in [(2880, 8, true), (3584, 2, true), (128, 1, true), (4096, 3, false)] {
            let route = RouteConfig { topk, ids: Dtype::I32, row_tile: 128 };
            let padding = Padding::Untouched;
            let (input, weighted) = (Dtype::Bf16, false);
            let config = QuantizePermuteConfig { route, hidden, input, format, padding, weighted, aligned };
            sources.extend(both(&config));
            let scales = Some(format);
            let config = PermuteConfig { topk, hidden, dtype: Dtype::E4m3, scales, padding, alignment_bytes: 16 };
            sources.push(config.source());
        }
        let activation = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
        sources.push(ActivateConfig { intermediate: 1536, activation, format: Some(format) }.source());
        for input in [Dtype::Bf16, Dtype::F16] {
            sources.push(QuantizeRowsConfig { hidden: 7168, input, format }.source());
        }
    }
    for format in [None, Some(ScaleFormat::HOPPER)] {
        sources.push(ActivateConfig { intermediate: 2048, activation: Activation::default(), format }.source());
    }
    sources.extend([Grouping::Psum { alignment: 1 }, Grouping::MIndices].map(|grouping| Ok(grouping.source())));
    sources.extend(exchange_sources().into_iter().map(Ok));
    sources.into_iter().map(|source| source.unwrap()).collect()
}

/// The layer in one launch, which needs Hopper: both formats, every number of tokens, partial tiles and units.
fn few_tokens_sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for activations in [ActivationFormat::E4m3, ActivationFormat::Bf16] {
        for (hidden, intermediate, experts, topk) in
            [(512, 256, 16, 4), (7168, 2048, 256, 8), (2048, 768, 128, 8), (4096, 14336, 8, 2)]
        {
            let shape = LayerShape::new(hidden, intermediate, experts).unwrap();
            let config = LayerConfig::new(topk, experts, activations);
            sources
                .extend([1, 2, 4, 8].iter().filter_map(|&tokens| FewTokensConfig::new(&shape, &config, tokens, H200)));
        }
    }
    let shape = LayerShape::new(1008, 336, 7).unwrap();
    let config = LayerConfig { ids: Dtype::I64, ..LayerConfig::new(3, 7, ActivationFormat::Bf16) };
    sources.extend(FewTokensConfig::new(&shape, &config, 4, 10));
    let shape = LayerShape::new(640, 384, 5).unwrap();
    let activation = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
    let (input, output) = (Dtype::F16, Dtype::F32);
    let config = LayerConfig { activation, input, output, ..LayerConfig::new(1, 5, ActivationFormat::E4m3) };
    sources.extend(FewTokensConfig::new(&shape, &LayerConfig { weight_on_input: true, ..config }, 4, 12));
    sources.iter().map(|config| config.source().unwrap()).collect()
}

/// Dispatch and combine: both links, every way, every type.
fn exchange_sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for (hidden, topk, format, input, output) in [
        (7168, 8, ActivationFormat::E4m3, Dtype::Bf16, Dtype::Bf16),
        (384, 1, ActivationFormat::E4m3, Dtype::F16, Dtype::F32),
        (4112, 32, ActivationFormat::Bf16, Dtype::Bf16, Dtype::F16),
        (272, 4, ActivationFormat::Bf16, Dtype::Bf16, Dtype::Bf16),
    ] {
        let (ids, weight_on_input) = (if topk == 1 { Dtype::I64 } else { Dtype::I32 }, topk == 1);
        let config = LayerConfig { ids, input, output, weight_on_input, ..LayerConfig::new(topk, 64, format) };
        for mapped in [true, false] {
            for (combine, dispatch) in [(0, 0), (0, 1), (1, 1), (1, 0)] {
                let (combine, dispatch) = (Combine::ALL[combine], Dispatch::ALL[dispatch]);
                let placement = Placement::linear(64, 4).unwrap();
                let parallel = ParallelConfig { placement, dispatch: Some(dispatch), combine };
                let choice = ParallelChoice::new(hidden, &config, &parallel, 4096).unwrap();
                sources.extend(ExpertParallelLayer::sources(&choice, &config, mapped).unwrap());
            }
        }
    }
    sources
}

/// Every tile of the grouped GEMM, which needs Hopper.
fn gemm_sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for format in [WeightFormat::E4m3, WeightFormat::Bf16] {
        let activation_format = format.usual_activations();
        for kernel in GemmKernel::all(format).into_iter().chain(GemmKernel::all_split()) {
            sources.push(GemmConfig { format, activation_format, kernel, activation: None }.source());
        }
    }
    let limited = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
    for kernel in [GemmKernel::Large, WIDE] {
        for activation in [None, Some(Activation::default()), Some(limited)] {
            sources.push(
                GemmConfig {
                    format: WeightFormat::E4m3,
                    activation_format: ActivationFormat::E4m3,
                    kernel,
                    activation,
                }
                .source(),
            );
        }
    }
    sources.into_iter().map(|source| source.unwrap()).collect()
}

/// What arranges mxfp4 weights, and every tile of the grouped GEMM over them.
fn mxfp4_sources() -> Vec<Source> {
    let format = WeightFormat::Mxfp4;
    let of_rows = |activation_format| {
        let tiles = GemmKernel::all(format).into_iter();
        tiles.flat_map(move |kernel| {
            let config = GemmConfig { format, activation_format, kernel, activation: None };
            [config.source().unwrap(), config.spread_source().unwrap().unwrap()]
        })
    };
    let arrange = ActivationFormat::ALL.into_iter().flat_map(Weights::sources);
    arrange.chain(ActivationFormat::ALL.into_iter().flat_map(of_rows)).collect()
}

/// Every tile of the grouped GEMM over int4 weights.
fn int4_sources() -> Vec<Source> {
    let format = WeightFormat::Int4;
    let of_rows = |activation_format| {
        let tiles = GemmKernel::all(format).into_iter();
        tiles.map(move |kernel| GemmConfig { format, activation_format, kernel, activation: None }.source().unwrap())
    };
    ActivationFormat::ALL.into_iter().flat_map(of_rows).collect()
}

/// Lines of the assembler's report that speak of spills, and how many of them there are in all.
fn spills(log: &str) -> (Vec<&str>, usize) {
    let lines: Vec<_> = log.lines().filter(|line| line.contains("spill stores")).collect();
    let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
    (lines.iter().filter(|line| !line.trim_end().ends_with(clean)).copied().collect(), lines.len())
}

/// Compiles every `step`-th source: all of them for the architecture that is measured, a sample for the others.
fn compile_all(arch: &str, step: usize) {
    compile_sources(arch, "step", sources().into_iter().step_by(step).collect());
}

/// Compiles and checks sources. With `EXPERTILE_CUBINS=<folder>` the cubins are left there, named by architecture, list
/// and place in the list: `benches/hopper/compare_cubins.py` compares two such folders.
fn compile_sources(arch: &str, list: &str, sources: Vec<Source>) {
    let Some(compiler) = compiler() else { return };
    let folder = std::env::var_os("EXPERTILE_CUBINS").map(PathBuf::from);
    let mut faults = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let (cubin, log) = compiler.compile_logged(source, arch).unwrap();
        assert_eq!(cubin[..4], *b"\x7fELF", "{source} gave no cubin for {arch}");
        if let Some(folder) = &folder {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(folder.join(format!("{arch}-{list}-{index:03}.cubin")), &cubin).unwrap();
        }
        let (spilled, kernels) = spills(&log);
        assert!(kernels > 0, "the assembler said nothing about {source}:\n{log}");
        if !spilled.is_empty() {
            faults.push(format!("{source} spills: {spilled:?}"));
        }
        // (C75...: what the assembler says where it waits for products that the source does not wait for.
        if log.contains("warning") || log.contains("(C75") {
            faults.push(format!("{source}:\n{log}"));
        }
    }
    assert!(faults.is_empty(), "for {arch}:\n{}", faults.join("\n"));
    println!("{} sources compiled for {arch} by NVRTC {:?}", sources.len(), compiler.version());
}

#[test]
fn every_kernel_compiles_for_hopper_without_spills() {
    compile_all(ARCHITECTURES[0], 1);
}

#[test]
fn dispatch_and_combine_compile_for_hopper_without_spills() {
    compile_sources(ARCHITECTURES[0], "exchange", exchange_sources());
}

#[test]
fn every_tile_of_the_grouped_gemm_compiles_for_hopper_without_spills() {
    compile_sources(ARCHITECTURES[0], "gemm", gemm_sources());
}

#[test]
fn the_layer_in_one_launch_compiles_for_hopper_without_spills() {
    compile_sources(ARCHITECTURES[0], "few_tokens", few_tokens_sources());
}

/// Both GEMMs in one launch over those weights, every tile that takes it: with the plain activation and with gpt-oss's,
/// which takes more registers.
fn joined_sources(formats: &[(WeightFormat, ActivationFormat, bool)]) -> Vec<Source> {
    let mut sources = Vec::new();
    for &(format, activation_format, spread) in formats {
        let activations = [Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) }, Activation::default()];
        // Weights with spread scales are few.
        for &activation in &activations[..if spread { 1 } else { 2 }] {
            let of = |kernel| JoinedConfig { format, activation_format, spread, kernel, activation }.source();
            sources.extend(GemmKernel::all(format).into_iter().filter_map(|kernel| of(kernel).ok()));
        }
    }
    sources
}

#[test]
fn both_gemms_in_one_launch_compile_for_hopper_without_spills() {
    let formats =
        [(WeightFormat::E4m3, ActivationFormat::E4m3, false), (WeightFormat::Bf16, ActivationFormat::Bf16, false)];
    let sources = joined_sources(&formats);
    assert_eq!(sources.len(), 2 * (4 + 7), "two activations, four plain row tiles, of bf16 also three narrow ones");
    compile_sources(ARCHITECTURES[0], "joined_gemms", sources);
}

#[test]
fn both_gemms_in_one_launch_over_4_bit_weights_compile_for_hopper_without_spills() {
    use WeightFormat::{Int4, Mxfp4};
    let formats = [(Mxfp4, false), (Mxfp4, true), (Int4, false)];
    let formats = formats.map(|(format, spread)| ActivationFormat::ALL.map(|rows| (format, rows, spread)));
    let sources = joined_sources(formats.as_flattened());
    assert_eq!(
        sources.len(),
        (2 * 4 + 2) * 6,
        "of each kind of weights, rows and activation two cuts of three row tiles"
    );
    compile_sources(ARCHITECTURES[0], "joined_groups", sources);
}

#[test]
fn every_tile_over_mxfp4_weights_compiles_for_hopper_without_spills() {
    compile_sources(ARCHITECTURES[0], "mxfp4", mxfp4_sources());
}

#[test]
fn every_tile_over_int4_weights_compiles_for_hopper_without_spills() {
    compile_sources(ARCHITECTURES[0], "int4", int4_sources());
}

#[test]
fn every_kernel_compiles_for_ampere_without_spills() {
    compile_all(ARCHITECTURES[1], 5);
}

#[test]
fn every_kernel_compiles_for_ada_without_spills() {
    compile_all(ARCHITECTURES[2], 5);
}

#[test]
fn every_kernel_compiles_for_blackwell_without_spills() {
    compile_all(ARCHITECTURES[3], 5);
    compile_all(ARCHITECTURES[4], 5);
}

#[test]
fn an_architecture_that_does_not_exist_is_an_error_with_the_compilers_words() {
    let Some(compiler) = compiler() else { return };
    let source = RouteConfig { topk: 2, ids: Dtype::I32, row_tile: 1 }.source().unwrap();
    let error = compiler.compile(&source, "sm_1").unwrap_err();
    assert!(matches!(error, Error::Kernel { kernel: "route_plan.cu", .. }), "{error}");
    assert!(error.to_string().contains("sm_1"), "{error}");
}

#[test]
fn a_library_that_is_not_there_is_an_error_that_names_it() {
    let error = Compiler::load("/nowhere/libnvrtc.so".as_ref()).unwrap_err();
    assert!(matches!(error, Error::Device { argument: "nvrtc", .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/libnvrtc.so"), "{error}");
}

#[test]
fn a_machine_without_a_driver_says_so() {
    match expertile::cuda::availability() {
        Ok(info) => println!("not tried: this machine has {info:?}"),
        Err(error) => assert!(matches!(error, Error::Device { argument: "cuda", .. }), "{error}"),
    }
}

#[test]
fn configurations_that_cannot_be_are_errors() {
    let route = RouteConfig { topk: 2, ids: Dtype::I32, row_tile: 128 };
    let zero = RouteConfig { topk: 0, ..route }.source().unwrap_err();
    assert!(zero.to_string().starts_with("topk is 0"), "{zero}");
    let floats = RouteConfig { ids: Dtype::F32, ..route }.source().unwrap_err();
    assert!(matches!(floats, Error::Dtype { argument: "topk_ids", .. }), "{floats}");
    let quantize = QuantizePermuteConfig {
        route,
        hidden: 160,
        input: Dtype::Bf16,
        format: ScaleFormat::HOPPER,
        padding: Padding::Untouched,
        weighted: false,
        aligned: true,
    };
    let group = quantize.sources().unwrap_err();
    assert!(group.to_string().starts_with("hidden is 160"), "{group}");
    let weighted = QuantizePermuteConfig { hidden: 128, weighted: true, ..quantize }.sources().unwrap_err();
    assert!(weighted.to_string().starts_with("topk is 2"), "{weighted}");
    let input = QuantizePermuteConfig { hidden: 128, input: Dtype::E4m3, ..quantize }.sources().unwrap_err();
    assert!(matches!(input, Error::Dtype { argument: "x", .. }), "{input}");
    let odd = ActivateConfig { intermediate: 8, activation: Activation::default(), format: None }.source().unwrap_err();
    assert!(odd.to_string().starts_with("intermediate is 8"), "{odd}");
    for (activation, start) in [
        (Activation::GegluTanh, "activation is \"geglu-tanh\", expected one of swiglu, on a GPU"),
        (Activation::Relu2, "activation is \"relu2\", expected one of swiglu, on a GPU"),
        (Activation::Swiglu { alpha: 1.0, beta: f32::NAN, limit: None }, "beta is NaN, expected a finite number"),
    ] {
        let error = ActivateConfig { intermediate: 128, activation, format: None }.source().unwrap_err();
        assert!(error.to_string().starts_with(start), "{error}");
        let format = WeightFormat::E4m3;
        let activation_format = format.usual_activations();
        let inside = GemmConfig { format, activation_format, kernel: WIDE, activation: Some(activation) }.source();
        assert_eq!(inside.unwrap_err().to_string(), error.to_string());
    }
}
