//! What the activation between the two GEMMs is.
//!
//! A row of GEMM 1 is `[gate | up]`, `I` values each:
//!
//! ```text
//! gate = min(gate, limit)          up = clamp(up, -limit, limit)      (with a limit)
//! glu  = gate * sigmoid(alpha * gate)
//! y    = (up + beta) * glu
//! ```
//!
//! `alpha = 1, beta = 0`, no limit is SwiGLU; `alpha = 1.702, beta = 1, limit = 7` is gpt-oss's. NaN in gives NaN out.

/// The activation's parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Activation {
    /// Factor inside the sigmoid.
    pub alpha: f32,
    /// Added to `up`.
    pub beta: f32,
    /// Clamp: gate from above, up on both sides.
    pub limit: Option<f32>,
}

impl Default for Activation {
    /// `silu(gate) * up`.
    fn default() -> Self {
        Self { alpha: 1.0, beta: 0.0, limit: None }
    }
}

impl Activation {
    /// One value.
    #[must_use]
    #[inline(always)]
    pub fn apply(&self, gate: f32, up: f32) -> f32 {
        // Without a limit the comparisons below are never true; NaN passes them, which `f32::min` would not grant.
        let limit = self.limit.unwrap_or(f32::INFINITY);
        let gate = if gate > limit { limit } else { gate };
        let up = if up > limit { limit } else { up };
        let up = if up < -limit { -limit } else { up };
        let glu = gate * sigmoid(self.alpha * gate);
        // Adding a zero of either sign would change the sign of a zero only; as -0 it does not.
        let beta = if self.beta == 0.0 { -0.0 } else { self.beta };
        (up + beta) * glu
    }
}

/// `1 / (1 + exp(-x))`, within 4 units in the last place for `|x| <= 20` and 6 elsewhere, as a fixed sequence of IEEE f32
/// operations, fused multiply-adds among them.
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
/// `|r| <= ln 2 / 2` (2^-23) among those that start with `1 + r`. Multiplications and additions are fused, so that a step is
/// one rounding and one instruction; f32's ln 2 is so near the true one that a second part of it is not needed.
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
        let swiglu = Activation::default();
        assert!(swiglu.apply(f32::NAN, 1.0).is_nan() && swiglu.apply(1.0, f32::NAN).is_nan());
        let clamped = Activation { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
        assert!(clamped.apply(f32::NAN, 1.0).is_nan() && clamped.apply(1.0, f32::NAN).is_nan());
        assert_eq!(clamped.apply(100.0, 100.0), clamped.apply(7.0, 7.0));
        assert_eq!(clamped.apply(1.0, -100.0), clamped.apply(1.0, -7.0));
        assert_ne!(clamped.apply(-100.0, 1.0), clamped.apply(-7.0, 1.0));
        assert_eq!(swiglu.apply(1.0, -0.0).to_bits(), (-0.0f32).to_bits());
        assert_eq!(Activation { beta: -0.0, ..swiglu }.apply(1.0, -0.0).to_bits(), (-0.0f32).to_bits());
    }
}
