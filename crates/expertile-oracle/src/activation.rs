//! The activation between the two GEMMs, in f64.

/// The activation and its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `glu = gate * sigmoid(alpha * gate)`, `y = (up + beta) * glu`, gate and up clamped first if there is a limit.
    Swiglu {
        /// Factor inside the sigmoid.
        alpha: f64,
        /// Added to `up`.
        beta: f64,
        /// Clamp: gate from above, up on both sides.
        limit: Option<f64>,
    },
    /// `y = gelu(gate) * up`, `gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GegluTanh,
    /// `y = max(x, 0)^2`, where there is no gate.
    Relu2,
}

/// `silu(gate) * up`.
pub const SWIGLU: Activation = Activation::Swiglu { alpha: 1.0, beta: 0.0, limit: None };

impl Activation {
    /// Whether the first GEMM gives gate and up, or one value only.
    #[must_use]
    pub fn is_gated(&self) -> bool {
        *self != Self::Relu2
    }

    /// One value, by the definitions above; without a gate that of `gate`, whatever `up` is. NaN in gives NaN out.
    #[must_use]
    pub fn apply(&self, gate: f64, up: f64) -> f64 {
        if gate.is_nan() || (self.is_gated() && up.is_nan()) {
            return f64::NAN;
        }
        match *self {
            Self::Swiglu { alpha, beta, limit } => {
                let (gate, up) = match limit {
                    Some(limit) => (gate.min(limit), up.clamp(-limit, limit)),
                    None => (gate, up),
                };
                let sigmoid = 1.0 / (1.0 + (-alpha * gate).exp());
                (up + beta) * (gate * sigmoid)
            }
            Self::GegluTanh => {
                let root = (2.0 / std::f64::consts::PI).sqrt();
                let tanh = (root * (gate + 0.044715 * gate * gate * gate)).tanh();
                0.5 * gate * (1.0 + tanh) * up
            }
            Self::Relu2 => gate.max(0.0) * gate.max(0.0),
        }
    }

    /// Rows `[gate | up]` of `2 * intermediate` values, or of `intermediate` without a gate, to rows of `intermediate`.
    #[must_use]
    pub fn rows(&self, gate_up: &[f64], intermediate: usize) -> Vec<f64> {
        if !self.is_gated() {
            return gate_up.iter().map(|&x| self.apply(x, 0.0)).collect();
        }
        let mut out = Vec::new();
        for row in gate_up.chunks(2 * intermediate) {
            let (gate, up) = row.split_at(intermediate);
            out.extend(gate.iter().zip(up).map(|(&gate, &up)| self.apply(gate, up)));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_comes_first_and_is_the_one_inside_the_sigmoid() {
        let y = SWIGLU.rows(&[1e9, 0.0, 2.0, 5.0], 2);
        assert_eq!(y, [2e9, 0.0]);
        let clamped = Activation::Swiglu { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
        assert_eq!(clamped.apply(-100.0, 3.0), (3.0 + 1.0) * (-100.0 / (1.0 + 170.2f64.exp())));
        assert_eq!(clamped.apply(100.0, -100.0), (-7.0 + 1.0) * (7.0 / (1.0 + (-1.702 * 7.0f64).exp())));
        assert!(clamped.apply(f64::NAN, 0.0).is_nan() && clamped.apply(0.0, f64::NAN).is_nan());
    }

    #[test]
    fn the_other_activations_are_as_written_by_hand() {
        // tanh(sqrt(2 / pi) * 1.044715) = 0.6823838...: gelu(1) = 0.841192.
        assert!((Activation::GegluTanh.apply(1.0, 2.0) - 2.0 * 0.841_191_990_6).abs() < 1e-9);
        assert!((Activation::GegluTanh.apply(-1.0, 2.0) + 2.0 * 0.158_808_009_4).abs() < 1e-9);
        assert!(Activation::GegluTanh.apply(1.0, f64::NAN).is_nan());
        assert_eq!(Activation::Relu2.rows(&[3.0, -2.0, 0.5], 3), [9.0, 0.0, 0.25]);
        assert!(Activation::Relu2.apply(f64::NAN, 0.0).is_nan());
    }
}
