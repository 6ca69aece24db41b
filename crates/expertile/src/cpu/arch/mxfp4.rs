//! The grouped GEMM's innermost loops over MXFP4 weights: a tile of rows times one panel.
//!
//! Nibbles become the bf16 of their e2m1 value, and every group of 32 of K has a fresh sum, which the group's power of
//! two then multiplies: no scale is out of range for what is multiplied, and none is rounded. As in
//! [`super::gemm`], a row's sums have the same bits however callers cut K and rows.

use super::Isa;
use super::gemm::multiply;
use super::panel::{
    Ahead, BLOCK_GROUPS, BLOCK_PAIRS, E2M1_AS_BF16, GROUP_PAIRS, MAX_ROWS, Mxfp4Group, NibbleLine, PANEL, PairLine,
    Sums, mxfp4_position,
};
use crate::quantize::ue8m0_value;

/// `sums[r][c] += sum_group (scale[r, block] * sum_k rows[r, k] * panel[c, k]) * scale[c, group]`, with a fresh sum for
/// every group.
///
/// `row_scales` is `[blocks][rows]`, if the rows have scales. `decoded` is empty, or as long as the groups' lines and
/// keeps the weights for [`multiply_mxfp4_decoded`] with the next tile. `ahead` as in [`multiply`].
pub(crate) fn multiply_mxfp4(
    isa: Isa,
    rows: &[u32],
    groups: &[Mxfp4Group],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    check(rows, groups, row_scales, sums);
    assert!(decoded.is_empty() || decoded.len() == groups.len() * GROUP_PAIRS);
    let mut scratch = [[0; PANEL]; BLOCK_PAIRS];
    let blocks = groups.len().div_ceil(BLOCK_GROUPS);
    for (block, groups) in groups.chunks(BLOCK_GROUPS).enumerate() {
        let lines = match decoded.chunks_mut(BLOCK_PAIRS).nth(block) {
            Some(decoded) => decoded,
            None => &mut scratch[..groups.len() * GROUP_PAIRS],
        };
        decode(groups, lines);
        promote_block(isa, rows, lines, groups, row_scales, block, sums, ahead.part(block, blocks));
    }
}

/// [`multiply_mxfp4`] with the weights as it left them.
pub(crate) fn multiply_mxfp4_decoded(
    isa: Isa,
    rows: &[u32],
    lines: &[PairLine],
    groups: &[Mxfp4Group],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    check(rows, groups, row_scales, sums);
    assert_eq!(lines.len(), groups.len() * GROUP_PAIRS);
    let blocks = groups.len().div_ceil(BLOCK_GROUPS);
    for (block, (lines, groups)) in lines.chunks(BLOCK_PAIRS).zip(groups.chunks(BLOCK_GROUPS)).enumerate() {
        promote_block(isa, rows, lines, groups, row_scales, block, sums, ahead.part(block, blocks));
    }
}

fn check(rows: &[u32], groups: &[Mxfp4Group], row_scales: Option<&[f32]>, sums: &[Sums]) {
    assert!((1..=MAX_ROWS).contains(&sums.len()), "a tile of {} rows", sums.len());
    assert_eq!(rows.len(), groups.len() * GROUP_PAIRS * sums.len());
    let scales = groups.len().div_ceil(BLOCK_GROUPS) * sums.len();
    assert!(row_scales.is_none_or(|row_scales| row_scales.len() == scales));
}

/// The groups of one block of K.
fn promote_block(
    isa: Isa,
    rows: &[u32],
    lines: &[PairLine],
    groups: &[Mxfp4Group],
    row_scales: Option<&[f32]>,
    block: usize,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    let tile = sums.len();
    let rows = &rows[block * BLOCK_PAIRS * tile..][..lines.len() * tile];
    let row_scales = row_scales.map(|scales| &scales[block * tile..][..tile]);
    let parts = rows.chunks(GROUP_PAIRS * tile).zip(lines.chunks(GROUP_PAIRS)).zip(groups);
    for (index, ((rows, lines), group)) in parts.enumerate() {
        let mut fresh = [[0.0; PANEL]; MAX_ROWS];
        multiply(isa, rows, lines, &mut fresh[..tile], ahead.part(index, groups.len()));
        for (row, (sums, fresh)) in sums.iter_mut().zip(&fresh).enumerate() {
            let row_scale = row_scales.map_or(1.0, |scales| scales[row]);
            for ((sum, fresh), &scale) in sums.iter_mut().zip(fresh).zip(&group.scales) {
                *sum += fresh * row_scale * ue8m0_value(scale);
            }
        }
    }
}

/// Every nibble as bf16.
fn decode(groups: &[Mxfp4Group], pairs: &mut [PairLine]) {
    for (line, pairs) in groups.iter().flat_map(|group| &group.lines).zip(pairs) {
        decode_line(line, pairs);
    }
}

fn decode_line(line: &NibbleLine, pairs: &mut PairLine) {
    for (column, pair) in pairs.iter_mut().enumerate() {
        let [even, odd] = [0, 1].map(|parity| {
            let (at, up) = mxfp4_position(column, parity);
            u32::from(E2M1_AS_BF16[usize::from(line[at] >> up & 15)])
        });
        *pair = even | odd << 16;
    }
}
