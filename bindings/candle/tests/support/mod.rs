//! Layers of random weights, the same experts in candle's own operators, and how two results are compared.
#![allow(dead_code, reason = "each test program uses a part")]

use candle_core::{D, DType, Device, Result, Tensor};
use expertile_candle::{ActivationFormat, Dtype, Layer, LayerConfig, Weights};
use expertile_testkit::Random;

/// Sizes of a layer and of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) tokens: usize,
    pub(crate) topk: usize,
    pub(crate) experts: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
}

pub(crate) const SMALL: Sizes = Sizes { tokens: 7, topk: 3, experts: 6, hidden: 96, intermediate: 40 };

/// Values that bf16 holds, as F32.
pub(crate) fn random(random: &mut Random, shape: &[usize], scale: f32) -> Result<Tensor> {
    let len = shape.iter().product();
    let values: Vec<f32> = (0..len).map(|_| half::bf16::from_f32(scale * random.normal()).to_f32()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Weights as F32, and a call's tensors: hidden states of F32, ids of U32, router weights of F32.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) sizes: Sizes,
    pub(crate) w13: Tensor,
    pub(crate) w2: Tensor,
    pub(crate) x: Tensor,
    pub(crate) ids: Tensor,
    pub(crate) weights: Tensor,
}

impl Case {
    pub(crate) fn new(seed: u64, sizes: Sizes) -> Result<Self> {
        let Sizes { tokens, topk, experts, hidden, intermediate } = sizes;
        let mut numbers = Random::new(seed);
        let logits = random(&mut numbers, &[tokens, experts], 1.0)?;
        // As candle's models do: a view whose rows are further apart than it is wide.
        let ids = match tokens {
            0 => Tensor::zeros((0, topk), DType::U32, &Device::Cpu)?,
            _ => logits.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, topk)?,
        };
        Ok(Self {
            sizes,
            w13: random(&mut numbers, &[experts, 2 * intermediate, hidden], 0.1)?,
            w2: random(&mut numbers, &[experts, hidden, intermediate], 0.1)?,
            x: random(&mut numbers, &[tokens, hidden], 1.0)?,
            ids,
            weights: random(&mut numbers, &[tokens, topk], 0.3)?,
        })
    }

    pub(crate) fn bf16_weights(&self) -> Result<Weights> {
        Weights::bf16(&self.w13.to_dtype(DType::BF16)?, &self.w2.to_dtype(DType::BF16)?)
    }

    pub(crate) fn config(&self) -> LayerConfig {
        LayerConfig::new(self.sizes.topk, self.sizes.experts, ActivationFormat::Bf16)
    }

    /// bf16 experts for hidden states and results of one type.
    pub(crate) fn layer(&self, dtype: Dtype) -> Result<Layer> {
        let config = LayerConfig { input: dtype, output: dtype, ..self.config() };
        Layer::prepare(self.bf16_weights()?, config, self.sizes.tokens.max(1))
    }

    /// The experts in candle's own operators, in F32, one token and expert at a time.
    pub(crate) fn reference(&self) -> Result<Tensor> {
        experts_of_candle(&self.w13, &self.w2, &self.x, &self.ids, &self.weights)
    }
}

/// `w13 [E, 2 I, H]`, `w2 [E, H, I]`, all F32 but the ids.
pub(crate) fn experts_of_candle(
    w13: &Tensor,
    w2: &Tensor,
    x: &Tensor,
    ids: &Tensor,
    weights: &Tensor,
) -> Result<Tensor> {
    let (ids, weights) = (ids.to_vec2::<u32>()?, weights.to_vec2::<f32>()?);
    let mut rows = Vec::new();
    for (token, (ids, weights)) in ids.iter().zip(&weights).enumerate() {
        let x = x.narrow(0, token, 1)?;
        let mut row = x.zeros_like()?;
        for (&id, &weight) in ids.iter().zip(weights) {
            let gate_up = x.matmul(&w13.get(id as usize)?.t()?)?;
            let halves = gate_up.chunk(2, D::Minus1)?;
            let activated = (halves[0].silu()? * &halves[1])?;
            let expert = activated.matmul(&w2.get(id as usize)?.t()?)?;
            row = (row + (expert * f64::from(weight))?)?;
        }
        rows.push(row);
    }
    if rows.is_empty() { x.zeros_like() } else { Tensor::cat(&rows, 0) }
}

/// `1 - 2 sum(xy) / sum(x^2 + y^2)`.
pub(crate) fn difference(x: &[f32], y: &[f32]) -> f64 {
    let pairs = || x.iter().zip(y).map(|(&x, &y)| (f64::from(x), f64::from(y)));
    let squares: f64 = pairs().map(|(x, y)| x * x + y * y).sum();
    if squares == 0.0 { 0.0 } else { 1.0 - 2.0 * pairs().map(|(x, y)| x * y).sum::<f64>() / squares }
}

/// Fails unless two results are as close as `limit` as a whole, and twice that in every row.
pub(crate) fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, limit: f64) -> Result<()> {
    assert_close_by_row(what, actual, expected, [limit, 2.0 * limit])
}

/// The same with limits for the whole and for every row.
pub(crate) fn assert_close_by_row(
    what: &str,
    actual: &Tensor,
    expected: &Tensor,
    [limit, row_limit]: [f64; 2],
) -> Result<()> {
    assert_eq!(actual.dims(), expected.dims(), "{what}");
    let [actual, expected] = [values(actual)?, values(expected)?];
    let whole = difference(&actual.concat(), &expected.concat());
    assert!(whole < limit, "{what}: {whole:.2e} as a whole, expected below {limit:.0e}");
    for (row, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
        let of_row = difference(actual, expected);
        assert!(of_row < row_limit, "{what}: {of_row:.2e} in row {row}, expected below {row_limit:.0e}");
    }
    Ok(())
}

/// Rows as F32 on the host.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<Vec<f32>>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2()
}

/// Fails unless two results have the same bits.
pub(crate) fn assert_same_bits(what: &str, actual: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!(actual.dims(), expected.dims(), "{what}");
    for (row, (actual, expected)) in values(actual)?.iter().zip(&values(expected)?).enumerate() {
        let differ = actual.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        assert_eq!(differ, 0, "{what}: values that differ in row {row}");
    }
    Ok(())
}

/// e4m3 weights `[E, N, K]` with block scales, and what they stand for as F32.
pub(crate) fn e4m3(weights: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let (experts, rows, cols) = weights.dims3()?;
    let blocks = [rows.div_ceil(128), cols.div_ceil(128)];
    let mut numbers = Random::new(5);
    let scales: Vec<f32> =
        (0..experts * blocks[0] * blocks[1]).map(|_| 0.01 + 0.01 * numbers.uniform().abs()).collect();
    let scales = Tensor::from_vec(scales, (experts, blocks[0], blocks[1]), &Device::Cpu)?;
    let spread = scales.unsqueeze(2)?.unsqueeze(4)?.broadcast_as((experts, blocks[0], 128, blocks[1], 128))?;
    let spread = spread.reshape((experts, blocks[0] * 128, blocks[1] * 128))?.narrow(1, 0, rows)?.narrow(2, 0, cols)?;
    let values = (weights / &spread)?.to_dtype(DType::F8E4M3)?;
    let meant = (values.to_dtype(DType::F32)? * spread)?;
    Ok((values, scales, meant))
}
