//! The activation between the two GEMMs, in f64.

/// The activation's parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Activation {
    /// Factor inside the sigmoid.
    pub alpha: f64,
    /// Added to `up`.
    pub beta: f64,
    /// Clamp: gate from above, up on both sides.
    pub limit: Option<f64>,
}

/// `silu(gate) * up`.
pub const SWIGLU: Activation = Activation { alpha: 1.0, beta: 0.0, limit: None };

impl Activation {
    /// `glu = gate * sigmoid(alpha * gate)`, `y = (up + beta) * glu`, gate and up clamped first if there is a limit.
    /// NaN in gives NaN out.
    #[must_use]
    pub fn apply(&self, gate: f64, up: f64) -> f64 {
        if gate.is_nan() || up.is_nan() {
            return f64::NAN;
        }
        let (gate, up) = match self.limit {
            Some(limit) => (gate.min(limit), up.clamp(-limit, limit)),
            None => (gate, up),
        };
        let sigmoid = 1.0 / (1.0 + (-self.alpha * gate).exp());
        (up + self.beta) * (gate * sigmoid)
    }

    /// Rows `[gate | up]` of `2 * intermediate` values to rows of `intermediate`.
    #[must_use]
    pub fn rows(&self, gate_up: &[f64], intermediate: usize) -> Vec<f64> {
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
        let clamped = Activation { alpha: 1.702, beta: 1.0, limit: Some(7.0) };
        assert_eq!(clamped.apply(-100.0, 3.0), (3.0 + 1.0) * (-100.0 / (1.0 + 170.2f64.exp())));
        assert_eq!(clamped.apply(100.0, -100.0), (-7.0 + 1.0) * (7.0 / (1.0 + (-1.702 * 7.0f64).exp())));
        assert!(clamped.apply(f64::NAN, 0.0).is_nan() && clamped.apply(0.0, f64::NAN).is_nan());
    }
}
