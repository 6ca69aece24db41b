//! The activation over live rows: `gate_up [M_sum, 2 I]` (`[M_sum, I]` without a gate) to `[M_sum, I]`, as bf16 or
//! quantized.

use super::Cpu;
use super::arch::multiversion;
use super::quantize::{ScaleSink, quantize_row};
use crate::activation::{Activation, gelu_tanh, relu2, swiglu};
use crate::dtype::{E4m3, Float, RowElement};
use crate::error::{Error, Result, checked_mul, require_len};
use crate::layout::Layout;
use crate::quantize::ScalesMut;
use half::bf16;
use rayon::prelude::*;

/// Rows to a task: a few hundred kilobytes.
const ROWS_PER_TASK: usize = 16;

/// Writes `activation(gate, up)` of every live row of `gate_up [M_sum, 2 I]` to `out [M_sum, I]`; padding is untouched.
///
/// For an activation without a gate, `gate_up` is `[M_sum, I]`.
///
/// # Errors
/// [`Error::Value`] if `intermediate` (`I`) is zero, [`Error::BufferTooSmall`], [`Error::Overflow`].
pub fn activate<O: Float>(
    cpu: &Cpu,
    layout: &Layout<'_>,
    intermediate: usize,
    gate_up: &[bf16],
    activation: &Activation,
    out: &mut [O],
) -> Result<()> {
    let out = rows_out(layout, intermediate, gate_up, activation, out)?;
    each_row(
        cpu,
        layout,
        [activation.columns(intermediate), intermediate],
        gate_up,
        out,
        || (),
        |(), _, gate_up, out| {
            activate_row(cpu.isa(), gate_up, activation, out);
        },
    );
    Ok(())
}

/// The same, quantized: `out [M_sum, I]` e4m3 and its scales. Scales of padding are zero.
///
/// The activation's f32 value is quantized directly, without a rounding to bf16 in between.
///
/// # Errors
/// As [`activate`]; [`Error::Value`] unless the groups fit `I`, [`Error::Dtype`] if `scales` is not of the format's
/// word type.
pub fn activate_quantize(
    cpu: &Cpu,
    layout: &Layout<'_>,
    intermediate: usize,
    gate_up: &[bf16],
    activation: &Activation,
    out: &mut [E4m3],
    scales: ScalesMut<'_>,
) -> Result<()> {
    let format = scales.format();
    let groups = format.groups(intermediate)?;
    scales.check("scales", layout.m_sum(), intermediate)?;
    let out = rows_out(layout, intermediate, gate_up, activation, out)?;
    let sink = ScaleSink::new(layout, groups, scales);
    each_row(
        cpu,
        layout,
        [activation.columns(intermediate), intermediate],
        gate_up,
        out,
        || (vec![0.0f32; intermediate], vec![0.0; groups]),
        |(values, scales), row, gate_up, out| {
            activate_row(cpu.isa(), gate_up, activation, values);
            quantize_row(cpu.isa(), values, format.group().size(), format.rounding(), out, scales);
            #[allow(unsafe_code)]
            // SAFETY: `each_row` gives a row to one task.
            unsafe {
                sink.write_row(row, scales);
            }
        },
    );
    Ok(())
}

multiversion! {
    /// One row: `gate_up [2 I]` (or `[I]`) to `out [I]`.
    fn activate_row<O: Float>(isa: Isa, gate_up: &[bf16], activation: &Activation, out: &mut [O]) {
        // A loop for each kind: within one there is nothing to decide.
        match *activation {
            Activation::Swiglu { alpha, beta, limit } => {
                each_pair(gate_up, out, |gate, up| swiglu(alpha, beta, limit, gate, up));
            }
            Activation::GegluTanh => each_pair(gate_up, out, |gate, up| gelu_tanh(gate) * up),
            Activation::Relu2 => {
                for (out, x) in out.iter_mut().zip(gate_up) {
                    *out = O::from_f32(relu2(Float::to_f32(*x)));
                }
            }
        }
    }
}

#[inline(always)]
fn each_pair<O: Float>(gate_up: &[bf16], out: &mut [O], apply: impl Fn(f32, f32) -> f32) {
    let (gate, up) = gate_up.split_at(out.len());
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = O::from_f32(apply(Float::to_f32(*gate), Float::to_f32(*up)));
    }
}

fn rows_out<'o, O>(
    layout: &Layout<'_>,
    intermediate: usize,
    gate_up: &[bf16],
    activation: &Activation,
    out: &'o mut [O],
) -> Result<&'o mut [O]> {
    if intermediate == 0 {
        return Err(Error::value("intermediate", 0, "at least 1"));
    }
    let needed = checked_mul("M_sum * I", layout.m_sum(), intermediate)?;
    let columns = if activation.is_gated() { checked_mul("M_sum * 2 I", needed, 2)? } else { needed };
    require_len("gate_up", gate_up.len(), columns)?;
    require_len("out", out.len(), needed)?;
    Ok(&mut out[..needed])
}

/// Calls `work` with every live row: its number, its `gate_up` and its part of `out`, of so many columns.
fn each_row<O: RowElement, S>(
    cpu: &Cpu,
    layout: &Layout<'_>,
    [columns, intermediate]: [usize; 2],
    gate_up: &[bf16],
    out: &mut [O],
    space: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, usize, &[bf16], &mut [O]) + Sync + Send,
) {
    if out.is_empty() {
        // Without rows nothing bounds their width, and even no row would have its space.
        return;
    }
    cpu.install(|| {
        out.par_chunks_mut(ROWS_PER_TASK * intermediate).enumerate().for_each_init(&space, |space, (task, out)| {
            for (offset, out) in out.chunks_exact_mut(intermediate).enumerate() {
                let row = task * ROWS_PER_TASK + offset;
                if layout.m_indices()[row] >= 0 {
                    work(space, row, &gate_up[row * columns..][..columns], out);
                }
            }
        });
    });
}
