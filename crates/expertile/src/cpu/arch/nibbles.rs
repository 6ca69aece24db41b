//! The grouped GEMM's innermost loops over 4-bit weights, MXFP4 and int4: a tile of rows times one panel.
//!
//! Nibbles become the bf16 of their value, and every group of 32 of K has a fresh sum, which the group's scale then
//! multiplies: no scale is out of range for what is multiplied, and none is rounded. As in [`super::gemm`], a row's
//! sums have the same bits however callers cut K and rows.

use super::panel::{
    Ahead, BLOCK_GROUPS, GROUP_PAIRS, GroupScale, MAX_ROWS, NibbleGroup, NibbleLine, PANEL, PairLine, Sums,
    nibble_position,
};
use super::{Isa, Level, portable};

/// `sums[r][c] += sum_group (scale[r, block] * sum_k rows[r, k] * panel[c, k]) * scale[c, group]`, with a fresh sum for
/// every group.
///
/// `row_scales` is `[blocks][rows]`, if the rows have scales. `decoded` is empty, or as long as the groups' lines and
/// keeps the weights for [`multiply_nibbles_decoded`] with the next tile. `ahead` as in [`super::gemm::multiply`].
pub(crate) fn multiply_nibbles<S: GroupScale>(
    isa: Isa,
    rows: &[u32],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    decoded: &mut [PairLine],
    ahead: Ahead<'_>,
) {
    check(rows, groups, row_scales, sums);
    assert!(decoded.is_empty() || decoded.len() == groups.len() * GROUP_PAIRS);
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Avx512 | Level::Amx => {
            return super::x86_64::avx512::nibbles::multiply_nibbles(
                isa, rows, groups, row_scales, sums, decoded, ahead,
            );
        }
        Level::Avx2 => {
            return super::x86_64::avx2::nibbles::multiply_nibbles(isa, rows, groups, row_scales, sums, decoded, ahead);
        }
        Level::Portable => {}
    }
    let _ = (isa, ahead);
    let mut scratch = [[0; PANEL]; GROUP_PAIRS];
    for (index, group) in groups.iter().enumerate() {
        let lines = match decoded.chunks_mut(GROUP_PAIRS).nth(index) {
            Some(decoded) => decoded,
            None => &mut scratch[..],
        };
        group.lines.iter().zip(&mut *lines).for_each(|(line, pairs)| decode_line::<S>(line, pairs));
        promote(rows, lines, group, row_scales, index, sums);
    }
}

/// [`multiply_nibbles`] with the weights as it left them.
pub(crate) fn multiply_nibbles_decoded<S: GroupScale>(
    isa: Isa,
    rows: &[u32],
    lines: &[PairLine],
    groups: &[NibbleGroup<S>],
    row_scales: Option<&[f32]>,
    sums: &mut [Sums],
    ahead: Ahead<'_>,
) {
    check(rows, groups, row_scales, sums);
    assert_eq!(lines.len(), groups.len() * GROUP_PAIRS);
    #[cfg(target_arch = "x86_64")]
    {
        use super::x86_64::{avx2::nibbles as avx2, avx512::nibbles as avx512};
        match isa.level() {
            Level::Avx512 | Level::Amx => {
                return avx512::multiply_nibbles_decoded(isa, rows, lines, groups, row_scales, sums, ahead);
            }
            Level::Avx2 => return avx2::multiply_nibbles_decoded(isa, rows, lines, groups, row_scales, sums, ahead),
            Level::Portable => {}
        }
    }
    let _ = (isa, ahead);
    for (index, (lines, group)) in lines.chunks(GROUP_PAIRS).zip(groups).enumerate() {
        promote(rows, lines, group, row_scales, index, sums);
    }
}

fn check<S>(rows: &[u32], groups: &[NibbleGroup<S>], row_scales: Option<&[f32]>, sums: &[Sums]) {
    assert!((1..=MAX_ROWS).contains(&sums.len()), "a tile of {} rows", sums.len());
    assert_eq!(rows.len(), groups.len() * GROUP_PAIRS * sums.len());
    let scales = groups.len().div_ceil(BLOCK_GROUPS) * sums.len();
    assert!(row_scales.is_none_or(|row_scales| row_scales.len() == scales));
}

/// One group of K: a fresh sum, scaled, onto `sums`.
fn promote<S: GroupScale>(
    rows: &[u32],
    lines: &[PairLine],
    group: &NibbleGroup<S>,
    row_scales: Option<&[f32]>,
    index: usize,
    sums: &mut [Sums],
) {
    let tile = sums.len();
    let mut fresh = [[0.0; PANEL]; MAX_ROWS];
    portable::multiply(&rows[index * GROUP_PAIRS * tile..][..lines.len() * tile], lines, &mut fresh[..tile]);
    for (row, (sums, fresh)) in sums.iter_mut().zip(&fresh).enumerate() {
        let row_scale = row_scales.map_or(1.0, |scales| scales[index / BLOCK_GROUPS * tile + row]);
        for ((sum, fresh), &scale) in sums.iter_mut().zip(fresh).zip(&group.scales) {
            *sum += fresh * row_scale * scale.widened();
        }
    }
}

/// Every nibble as bf16.
fn decode_line<S: GroupScale>(line: &NibbleLine, pairs: &mut PairLine) {
    for (column, pair) in pairs.iter_mut().enumerate() {
        let [even, odd] = [0, 1].map(|parity| {
            let (at, up) = nibble_position(column, parity);
            u32::from(S::NIBBLES[usize::from(line[at] >> up & 15)])
        });
        *pair = even | odd << 16;
    }
}
