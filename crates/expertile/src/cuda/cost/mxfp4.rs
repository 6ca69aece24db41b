//! Which tile mxfp4 and int4 weights get. Their kernels have no costs yet: the rule goes by the rows of an expert.

use crate::cuda::gemm::{FewRowsCut, GemmKernel, GemmShape, ROW_TILES};

/// The tile for a shape.
pub(super) fn choose(shape: &GemmShape, multiprocessors: usize) -> GemmKernel {
    let experts = shape.experts.max(1);
    // Experts that have rows, and how many: where rows are few, each has about one.
    let absent = (1.0 - 1.0 / experts as f64).powi(shape.rows.min(1 << 20) as i32);
    let active = (experts as f64 * (1.0 - absent)).max(1.0);
    let mean = shape.rows as f64 / active;
    // Rows are spread about their mean.
    let most = (mean + mean.sqrt()).min(shape.most_rows.max(1) as f64);
    let row_tile = ROW_TILES.into_iter().find(|&tile| most <= tile as f64).unwrap_or(192);
    // A multiprocessor takes two tiles of 128 outputs at once, or three narrow ones: a second round of those takes
    // longer than one of the others.
    let tiles = active * shape.n.div_ceil(128) as f64;
    let narrow = row_tile <= 64 && 2.0 * tiles <= 3.0 * multiprocessors as f64;
    GemmKernel::FewRows { row_tile, cut: if narrow { FewRowsCut::Narrow } else { FewRowsCut::Plain } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::{ActivationFormat, WeightFormat};

    #[test]
    fn more_rows_get_larger_tiles_and_few_tiles_are_narrow() {
        let chosen = |experts, rows, most_rows| {
            let activation_format = ActivationFormat::E4m3;
            let format = WeightFormat::Int4;
            choose(&GemmShape { n: 1536, k: 2048, format, activation_format, experts, rows, most_rows }, 132)
        };
        let narrow = chosen(128, 8, 1);
        assert_eq!((narrow.row_tile(), narrow.outputs()), (16, 64));
        let tiles: Vec<usize> =
            [64, 512, 2048, 8192, 65536].map(|rows| chosen(128, rows, rows / 8).row_tile()).to_vec();
        assert!(tiles.windows(2).all(|pair| pair[0] <= pair[1]), "{tiles:?}");
        assert_eq!((tiles[0], tiles[4]), (16, 192));
    }
}
