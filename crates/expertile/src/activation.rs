//! What the activation between the two GEMMs is.
//!
//! A row of GEMM 1 is `[gate | up]`, `I` values each, or `I` values alone where the layer has no gate. NaN in gives
//! NaN out, and every function is a fixed sequence of IEEE f32 operations: the same bits on every instruction set.

use crate::error::{Error, Result};

/// The activation and its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Activation {
    /// SwiGLU and its clamped forms:
    ///
    /// ```text
    /// gate = min(gate, limit)          up = clamp(up, -limit, limit)      (with a limit)
    /// glu  = gate * sigmoid(alpha * gate)
    /// y    = (up + beta) * glu
    /// ```
    ///
    /// `alpha = 1, beta = 0`, no limit is [`Activation::SWIGLU`]; `alpha = 1.702, beta = 1, limit = 7` is gpt-oss's.
    Swiglu {
        /// Factor inside the sigmoid.
        alpha: f32,
        /// Added to `up`.
        beta: f32,
        /// Clamp: gate from above, up on both sides.
        limit: Option<f32>,
    },
    /// `y = gelu(gate) * up` with the tanh form `gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GegluTanh,
    /// `y = max(x, 0)^2`: the first GEMM has no gate, its weights are `[E, I, H]`.
    Relu2,
}

impl Default for Activation {
    /// [`Activation::SWIGLU`].
    fn default() -> Self {
        Self::SWIGLU
    }
}

impl Activation {
    /// `silu(gate) * up`.
    pub const SWIGLU: Self = Self::Swiglu { alpha: 1.0, beta: 0.0, limit: None };

    /// The name that messages and tables print; parameters are not part of it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Swiglu { .. } => "swiglu",
            Self::GegluTanh => "geglu-tanh",
            Self::Relu2 => "relu2",
        }
    }

    /// Whether a row of GEMM 1 holds gate and up (`2 I` values), or `I` values alone.
    #[must_use]
    pub fn is_gated(&self) -> bool {
        !matches!(self, Self::Relu2)
    }

    /// Values of GEMM 1 to a row of `intermediate` activated ones.
    pub(crate) fn columns(&self, intermediate: usize) -> usize {
        if self.is_gated() { intermediate.saturating_mul(2) } else { intermediate }
    }

    /// Fails for parameters that no input has a meaning with.
    ///
    /// # Errors
    /// [`Error::Parameter`] if alpha or beta is not finite, or the limit is NaN or not above 0.
    pub fn check(&self) -> Result<()> {
        let Self::Swiglu { alpha, beta, limit } = *self else { return Ok(()) };
        for (argument, actual) in [("alpha", alpha), ("beta", beta)] {
            if !actual.is_finite() {
                return Err(Error::Parameter { argument, actual, expected: "a finite number" });
            }
        }
        match limit {
            Some(actual) if actual.is_nan() || actual <= 0.0 => {
                Err(Error::Parameter { argument: "limit", actual, expected: "a number above 0, or none" })
            }
            _ => Ok(()),
        }
    }

    /// One value. Without a gate it is that of `gate`, and `up` is not looked at.
    #[must_use]
    #[inline(always)]
    pub fn apply(&self, gate: f32, up: f32) -> f32 {
        match *self {
            Self::Swiglu { alpha, beta, limit } => swiglu(alpha, beta, limit, gate, up),
            Self::GegluTanh => gelu_tanh(gate) * up,
            Self::Relu2 => relu2(gate),
        }
    }
}

/// See [`Activation::Swiglu`].
#[inline(always)]
pub(crate) fn swiglu(alpha: f32, beta: f32, limit: Option<f32>, gate: f32, up: f32) -> f32 {
    // Without a limit the comparisons below are never true; NaN passes them, which `f32::min` would not grant.
    let limit = limit.unwrap_or(f32::INFINITY);
    let gate = if gate > limit { limit } else { gate };
    let up = if up > limit { limit } else { up };
    let up = if up < -limit { -limit } else { up };
    let glu = gate * sigmoid(alpha * gate);
    // Adding a zero of either sign would change the sign of a zero only; as -0 it does not.
    let beta = if beta == 0.0 { -0.0 } else { beta };
    (up + beta) * glu
}

/// GELU's tanh form, by way of `(1 + tanh(u)) / 2 = sigmoid(2 u)`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    /// `2 sqrt(2 / pi)`.
    const TWICE_ROOT: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;
    let cubed = (x * x).mul_add(0.044_715, 1.0);
    x * sigmoid(TWICE_ROOT * x * cubed)
}

/// `max(x, 0)^2`; NaN passes the comparison.
#[inline(always)]
pub(crate) fn relu2(x: f32) -> f32 {
    let positive = if x < 0.0 { 0.0 } else { x };
    positive * positive
}

/// `1 / (1 + exp(-x))`, within 4 units in the last place for `|x| <= 20` and 6 elsewhere, as a fixed sequence of IEEE
/// f32 operations, fused multiply-adds among them.
///
/// A library's `exp` differs from platform to platform; this one gives the same bits on every backend and turns into
/// vector code. For `|x| > 87` the exponent is held there: the result is then within 2e-38 of the true one.
#[must_use]
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `exp(x)` for `x` held within ±87, NaN included as whatever its comparisons make of it.
///
/// Range reduction `x = n ln 2 + r`, then a polynomial of degree 5 with the smallest largest relative error on
/// `|r| <= ln 2 / 2` (2^-23) among those that start with `1 + r`. Multiplications and additions are fused, so that a
/// step is one rounding and one instruction; f32's ln 2 is so near the true one that a second part of it is not
/// needed.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const HOLD: f32 = 87.0;
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x > HOLD { HOLD } else { x };
    let x = if x < -HOLD { -HOLD } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-std::f32::consts::LN_2, x);
    let mut p = 0.008_312_5_f32;
    p = p.mul_add(r, 0.041_890_33);
    p = p.mul_add(r, 0.166_671_15);
    p = p.mul_add(r, 0.499_992_3);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    p * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigmoid_is_within_four_units_in_the_last_place_and_six_far_out() {
        for step in -8_600_000..8_600_000i32 {
            if step % 37 != 0 {
                continue;
            }
            let x = step as f32 * 1e-5;
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            let unit = f64::from((exact as f32).next_up() - exact as f32);
            let error = (f64::from(sigmoid(x)) - exact).abs() / unit;
            let most = if x.abs() <= 20.0 { 4.0 } else { 6.0 };
            assert!(error <= most, "sigmoid({x}) is {error} units off");
        }
    }

    #[test]
    fn extremes_behave() {
        assert_eq!(sigmoid(1e30), 1.0);
        assert!(sigmoid(-1e30) < 2e-38 && sigmoid(-1e30) >= 0.0);
        assert!(sigmoid(f32::NAN).is_nan());
        let swiglu = Activation::SWIGLU;
        assert!(swiglu.apply(f32::NAN, 1.0).is_nan() && swiglu.apply(1.0, f32::NAN).is_nan());
        let clamped = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
        assert!(clamped.apply(f32::NAN, 1.0).is_nan() && clamped.apply(1.0, f32::NAN).is_nan());
        assert_eq!(clamped.apply(100.0, 100.0), clamped.apply(7.0, 7.0));
        assert_eq!(clamped.apply(1.0, -100.0), clamped.apply(1.0, -7.0));
        assert_ne!(clamped.apply(-100.0, 1.0), clamped.apply(-7.0, 1.0));
        assert_eq!(swiglu.apply(1.0, -0.0).to_bits(), (-0.0f32).to_bits());
        let negative = Activation::Swiglu { alpha: 1.0, beta: -0.0, limit: None };
        assert_eq!(negative.apply(1.0, -0.0).to_bits(), (-0.0f32).to_bits());
        assert_eq!(Activation::GegluTanh.apply(f32::INFINITY, 2.0), f32::INFINITY);
        assert!(Activation::GegluTanh.apply(-1e30, 1.0).abs() < 1e-7);
        assert!(Activation::Relu2.apply(f32::NAN, 0.0).is_nan());
        assert_eq!(Activation::Relu2.apply(3.0, f32::NAN), 9.0);
        assert_eq!(Activation::Relu2.apply(f32::NEG_INFINITY, 0.0), 0.0);
    }
}
