//! Rows that a dispatcher has already sorted by expert: only its `psum` is needed.
//!
//! Expert-parallel dispatchers deliver tokens expanded (one row per token and expert) with every expert's rows on an
//! aligned start. [`Layout::from_psum`] takes such a buffer over, and the layout remembers the alignment: a GEMM with
//! another row tile, which would read some rows with the wrong expert's weights, is refused.

use expertile::cpu::{Cpu, Layer, PackedWeights};
use expertile::{ActivationFormat, LayerConfig, Layout, MatrixRef};
use half::bf16;

const EXPERTS: usize = 4;
const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 128;

fn main() -> expertile::Result<()> {
    // As it arrives: 16 rows of room, segments on multiples of 4. Expert 0 has rows 0..3, expert 1 none, expert 2 rows
    // 4..9 and expert 3 rows 12..14; an empty expert stores its start.
    let (alignment, m_sum) = (4, 16);
    let psum = [3, 4, 9, 14];
    let rows: Vec<bf16> = (0..m_sum * HIDDEN).map(|i| bf16::from_f32((i % 17) as f32 / 8.0 - 1.0)).collect();

    let mut space = vec![0; 3 * EXPERTS + m_sum];
    let layout = Layout::from_psum(&psum, alignment, m_sum, &mut space)?;
    for expert in 0..EXPERTS {
        println!("expert {expert}: rows {:?}", layout.expert_rows(expert));
    }
    println!("experts by row: {:?}", layout.m_indices());
    println!("a row tile of 4: {:?}", layout.check_row_tile(4));
    println!("a row tile of 8: {}", layout.check_row_tile(8).expect_err("tiles of 8 would straddle experts"));

    let cpu = Cpu::new();
    let w13 = vec![bf16::from_f32(0.01); EXPERTS * 2 * INTERMEDIATE * HIDDEN];
    let w2 = vec![bf16::from_f32(0.02); EXPERTS * HIDDEN * INTERMEDIATE];
    let w13 = PackedWeights::pack_bf16(&cpu, &w13, EXPERTS, 2 * INTERMEDIATE, HIDDEN)?;
    let w2 = PackedWeights::pack_bf16(&cpu, &w2, EXPERTS, HIDDEN, INTERMEDIATE)?;
    let layer = Layer::prepare(&cpu, w13, w2, LayerConfig::new(1, EXPERTS, ActivationFormat::Bf16), m_sum)?;

    // Live rows only: padding is neither read nor written, so the buffer may hold anything there.
    let mut workspace = vec![0; layer.expanded_workspace_bytes(m_sum)?];
    let mut out = vec![bf16::NAN; m_sum * HIDDEN];
    layer.run_expanded(MatrixRef::new(&rows, m_sum, HIDDEN)?, &layout, &mut workspace, &mut out)?;
    let written = out.chunks(HIDDEN).filter(|row| row.iter().all(|x| !x.is_nan())).count();
    println!("rows written: {written} of {m_sum}, live rows: {}", layout.live_rows());
    assert_eq!(written, layout.live_rows());
    Ok(())
}
