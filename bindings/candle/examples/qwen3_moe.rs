//! The sparse block of Qwen3-MoE in candle, its experts once in candle's own operators and once Expertile's.
//!
//! ```console
//! $ cargo run --release --example qwen3_moe                              # random weights
//! $ cargo run --release --example qwen3_moe -- --tokens 64 --experts 128 --topk 8 --hidden 2048 --intermediate 768
//! $ cargo run --release --example qwen3_moe -- --checkpoint DIR --layer 3
//! $ cargo run --release --features cuda --example qwen3_moe -- --cuda    # on a Hopper GPU
//! ```
//!
//! The router is candle's in both. What changes in a model is [`Experts`], and nothing else.

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Linear, Module, VarBuilder, linear_no_bias};
use expertile_candle::{ActivationFormat, Dtype, Layer, LayerConfig, LayerShape, Weights};
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Sizes of a block, by their names in `config.json`.
#[derive(Debug, Clone, Copy)]
struct Config {
    hidden_size: usize,
    moe_intermediate_size: usize,
    num_experts: usize,
    num_experts_per_tok: usize,
    norm_topk_prob: bool,
}

/// One expert in candle's operators.
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn new(config: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        let (hidden, intermediate) = (config.hidden_size, config.moe_intermediate_size);
        Ok(Self {
            gate_proj: linear_no_bias(hidden, intermediate, vb.pp("gate_proj"))?,
            up_proj: linear_no_bias(hidden, intermediate, vb.pp("up_proj"))?,
            down_proj: linear_no_bias(intermediate, hidden, vb.pp("down_proj"))?,
        })
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = self.gate_proj.forward(x)?.silu()?;
        self.down_proj.forward(&(gate * self.up_proj.forward(x)?)?)
    }
}

/// What is swapped.
enum Experts {
    Candle(Vec<Mlp>),
    Expertile(Layer),
}

impl Experts {
    fn candle(config: &Config, vb: &VarBuilder<'_>) -> Result<Self> {
        let experts = (0..config.num_experts).map(|expert| Mlp::new(config, vb.pp(expert)));
        Ok(Self::Candle(experts.collect::<Result<_>>()?))
    }

    fn expertile(config: &Config, vb: &VarBuilder<'_>, max_tokens: usize) -> Result<Self> {
        let Config { hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok, .. } = *config;
        let shape =
            LayerShape::new(hidden_size, moe_intermediate_size, num_experts).map_err(candle_core::Error::wrap)?;
        let weights = Weights::load(vb, &shape)?;
        let dtype = if vb.dtype() == DType::F32 { Dtype::F32 } else { Dtype::Bf16 };
        let usual = LayerConfig::new(num_experts_per_tok, num_experts, ActivationFormat::Bf16);
        let config = LayerConfig { input: dtype, output: dtype, ..usual };
        Ok(Self::Expertile(Layer::prepare(weights, config, max_tokens)?))
    }

    /// `x [M, H]`, `ids` (U32) and `weights` (F32) `[M, topk]`.
    fn forward(&self, x: &Tensor, ids: &Tensor, weights: &Tensor) -> Result<Tensor> {
        match self {
            Self::Expertile(layer) => layer.forward(x, ids, weights),
            Self::Candle(experts) => {
                let (ids, weights) = (ids.to_vec2::<u32>()?, weights.to_vec2::<f32>()?);
                let mut sum = x.zeros_like()?;
                for (expert, mlp) in experts.iter().enumerate() {
                    let slots = ids.iter().zip(&weights).enumerate().flat_map(|(token, (ids, weights))| {
                        let of_expert = ids.iter().zip(weights).filter(move |(id, _)| **id as usize == expert);
                        of_expert.map(move |(_, &weight)| (token as u32, weight))
                    });
                    let (tokens, weights): (Vec<u32>, Vec<f32>) = slots.unzip();
                    if tokens.is_empty() {
                        continue;
                    }
                    let weights = Tensor::new(weights, x.device())?.unsqueeze(1)?.to_dtype(x.dtype())?;
                    let tokens = Tensor::new(tokens, x.device())?;
                    let rows = mlp.forward(&x.index_select(&tokens, 0)?)?.broadcast_mul(&weights)?;
                    sum = sum.index_add(&tokens, &rows, 0)?;
                }
                Ok(sum)
            }
        }
    }
}

struct SparseMoeBlock {
    gate: Linear,
    experts: Experts,
    config: Config,
}

impl Module for SparseMoeBlock {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let shape = x.dims3()?;
        let x = x.flatten_to(1)?;
        let scores = candle_nn::ops::softmax_last_dim(&self.gate.forward(&x)?.to_dtype(DType::F32)?)?;
        let ids =
            scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, self.config.num_experts_per_tok)?.contiguous()?;
        let mut weights = scores.gather(&ids, D::Minus1)?;
        if self.config.norm_topk_prob {
            weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        }
        self.experts.forward(&x, &ids, &weights)?.reshape(shape)
    }
}

/// The command line.
#[derive(Debug)]
struct Options {
    config: Config,
    tokens: usize,
    checkpoint: Option<(String, usize)>,
    cuda: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let sizes = Config {
            hidden_size: 256,
            moe_intermediate_size: 96,
            num_experts: 16,
            num_experts_per_tok: 4,
            norm_topk_prob: true,
        };
        let (mut options, mut layer) = (Self { config: sizes, tokens: 64, checkpoint: None, cuda: false }, 0);
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            if name == "--cuda" {
                options.cuda = true;
                continue;
            }
            let value = arguments.next().ok_or_else(|| candle_core::Error::msg(format!("{name} without a value")))?;
            if name == "--checkpoint" {
                options.checkpoint = Some((value, 0));
                continue;
            }
            let number =
                value.parse::<usize>().map_err(|_| candle_core::Error::msg(format!("{name} {value}: no number")))?;
            *match name.as_str() {
                "--tokens" => &mut options.tokens,
                "--layer" => &mut layer,
                "--hidden" => &mut options.config.hidden_size,
                "--intermediate" => &mut options.config.moe_intermediate_size,
                "--experts" => &mut options.config.num_experts,
                "--topk" => &mut options.config.num_experts_per_tok,
                _ => candle_core::bail!("no option {name}"),
            } = number;
        }
        options.checkpoint = options.checkpoint.map(|(folder, _)| (folder, layer));
        Ok(options)
    }
}

/// A tensor of random values that bf16 holds.
fn random(shape: &[usize], scale: f32, device: &Device) -> Result<Tensor> {
    Tensor::randn(0f32, scale, shape, device)?.to_dtype(DType::BF16)
}

/// A block's tensors by their names, random.
fn random_tensors(config: &Config, device: &Device) -> Result<HashMap<String, Tensor>> {
    let (hidden, intermediate) = (config.hidden_size, config.moe_intermediate_size);
    let mut all = HashMap::from([("gate.weight".into(), random(&[config.num_experts, hidden], 0.3, device)?)]);
    for expert in 0..config.num_experts {
        for (name, shape) in [
            ("gate_proj", [intermediate, hidden]),
            ("up_proj", [intermediate, hidden]),
            ("down_proj", [hidden, intermediate]),
        ] {
            all.insert(format!("experts.{expert}.{name}.weight"), random(&shape, 0.1, device)?);
        }
    }
    Ok(all)
}

/// A checkpoint's sizes, and the files of its tensors.
fn read_config(folder: &Path) -> Result<Config> {
    let text = std::fs::read(folder.join("config.json"))?;
    let json: serde_json::Value = serde_json::from_slice(&text).map_err(candle_core::Error::wrap)?;
    let size = |key: &str| {
        let number = json[key].as_u64().ok_or_else(|| candle_core::Error::msg(format!("config.json has no {key}")));
        number.map(|number| number as usize)
    };
    Ok(Config {
        hidden_size: size("hidden_size")?,
        moe_intermediate_size: size("moe_intermediate_size")?,
        // Transformers 5 writes another name than the checkpoints of Qwen have.
        num_experts: size("num_experts").or_else(|_| size("num_local_experts"))?,
        num_experts_per_tok: size("num_experts_per_tok")?,
        norm_topk_prob: json["norm_topk_prob"].as_bool().unwrap_or(false),
    })
}

/// The result of a second call, and how long the faster of some calls took.
fn timed(block: &SparseMoeBlock, x: &Tensor) -> Result<(Tensor, Duration)> {
    let mut best = Duration::MAX;
    let mut result = block.forward(x)?;
    for _ in 0..5 {
        x.device().synchronize()?;
        let started = Instant::now();
        result = block.forward(x)?;
        x.device().synchronize()?;
        best = best.min(started.elapsed());
    }
    Ok((result, best))
}

fn main() -> Result<()> {
    let Options { mut config, tokens, checkpoint, cuda } = Options::parse()?;
    let device = if cuda { Device::new_cuda(0)? } else { Device::Cpu };
    // candle multiplies no bf16 matrices on a CPU.
    let dtype = if cuda { DType::BF16 } else { DType::F32 };
    let vb = match &checkpoint {
        None => VarBuilder::from_tensors(random_tensors(&config, &Device::Cpu)?, dtype, &device),
        Some((folder, layer)) => {
            config = read_config(Path::new(folder))?;
            let entries = std::fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
            let files = entries.iter().map(std::fs::DirEntry::path);
            let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).collect();
            #[allow(unsafe_code)]
            // SAFETY: as for every mapped checkpoint: nobody writes the files meanwhile.
            let tensors = unsafe { MmapedSafetensors::multi(&files)? };
            VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()).pp(format!("model.layers.{layer}.mlp"))
        }
    };
    let gate = linear_no_bias(config.hidden_size, config.num_experts, vb.pp("gate"))?;
    let block = |experts| SparseMoeBlock { gate: gate.clone(), experts, config };
    let of_candle = block(Experts::candle(&config, &vb.pp("experts"))?);
    let ours = block(Experts::expertile(&config, &vb.pp("experts"), tokens)?);

    let x = random(&[1, tokens, config.hidden_size], 1.0, &Device::Cpu)?.to_device(&device)?.to_dtype(dtype)?;
    let ((expected, theirs), (actual, own)) = (timed(&of_candle, &x)?, timed(&ours, &x)?);
    let (expected, actual) = (expected.to_dtype(DType::F32)?, actual.to_dtype(DType::F32)?);
    let most = |tensor: &Tensor| tensor.abs()?.max_all()?.to_scalar::<f32>();
    let (apart, largest) = (most(&(&actual - &expected)?)?, most(&expected)?);
    println!("{config:?}, {tokens} tokens, {dtype:?} on {:?}", device.location());
    println!("largest difference {apart:.1e} of values up to {largest:.1e}");
    println!("candle's operators {theirs:.2?}, Expertile's experts {own:.2?}, router included");
    if apart.is_nan() || apart > 0.02 * largest {
        candle_core::bail!("the results differ by more than rounding to bf16 explains");
    }
    Ok(())
}
