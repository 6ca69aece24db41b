//! The kernels' headers, in memory: compiling reads no file. A header's name is its path below `kernels/`, which is how
//! every `#include` names it. The entry files (`*.cu`) are included by the modules that launch them.

use std::ffi::CStr;

/// `(name, text)` of every header.
pub(super) const HEADERS: [(&CStr, &str); 40] = [
    (c"common/activation.cuh", include_str!("../kernels/common/activation.cuh")),
    (c"common/quantize.cuh", include_str!("../kernels/common/quantize.cuh")),
    (c"common/scales.cuh", include_str!("../kernels/common/scales.cuh")),
    (c"common/search.cuh", include_str!("../kernels/common/search.cuh")),
    (c"common/words.cuh", include_str!("../kernels/common/words.cuh")),
    (c"exchange/ranks.cuh", include_str!("../kernels/exchange/ranks.cuh")),
    (c"few_rows/multiply.cuh", include_str!("../kernels/few_rows/multiply.cuh")),
    (c"few_rows/storage.cuh", include_str!("../kernels/few_rows/storage.cuh")),
    (c"few_tokens/consume.cuh", include_str!("../kernels/few_tokens/consume.cuh")),
    (c"few_tokens/rows.cuh", include_str!("../kernels/few_tokens/rows.cuh")),
    (c"few_tokens/slots.cuh", include_str!("../kernels/few_tokens/slots.cuh")),
    (c"few_tokens/storage.cuh", include_str!("../kernels/few_tokens/storage.cuh")),
    (c"gemm/claims.cuh", include_str!("../kernels/gemm/claims.cuh")),
    (c"gemm/config.cuh", include_str!("../kernels/gemm/config.cuh")),
    (c"gemm/pipeline.cuh", include_str!("../kernels/gemm/pipeline.cuh")),
    (c"gemm/products.cuh", include_str!("../kernels/gemm/products.cuh")),
    (c"gemm/stage_loads.cuh", include_str!("../kernels/gemm/stage_loads.cuh")),
    (c"gemm/staging.cuh", include_str!("../kernels/gemm/staging.cuh")),
    (c"gemm/tiles.cuh", include_str!("../kernels/gemm/tiles.cuh")),
    (c"gemm/weights_on_m.cuh", include_str!("../kernels/gemm/weights_on_m.cuh")),
    (c"groups/int4.cuh", include_str!("../kernels/groups/int4.cuh")),
    (c"groups/multiply.cuh", include_str!("../kernels/groups/multiply.cuh")),
    (c"groups/multiply_folded.cuh", include_str!("../kernels/groups/multiply_folded.cuh")),
    (c"groups/multiply_int4.cuh", include_str!("../kernels/groups/multiply_int4.cuh")),
    (c"groups/multiply_spread.cuh", include_str!("../kernels/groups/multiply_spread.cuh")),
    (c"groups/mxfp4.cuh", include_str!("../kernels/groups/mxfp4.cuh")),
    (c"groups/produce.cuh", include_str!("../kernels/groups/produce.cuh")),
    (c"groups/storage.cuh", include_str!("../kernels/groups/storage.cuh")),
    (c"joined/activate.cuh", include_str!("../kernels/joined/activate.cuh")),
    (c"joined/tile_queue.cuh", include_str!("../kernels/joined/tile_queue.cuh")),
    (c"joined/tiles.cuh", include_str!("../kernels/joined/tiles.cuh")),
    (c"ptx/access.cuh", include_str!("../kernels/ptx/access.cuh")),
    (c"ptx/convert.cuh", include_str!("../kernels/ptx/convert.cuh")),
    (c"ptx/flags.cuh", include_str!("../kernels/ptx/flags.cuh")),
    (c"ptx/hopper.cuh", include_str!("../kernels/ptx/hopper.cuh")),
    (c"ptx/wgmma.cuh", include_str!("../kernels/ptx/wgmma.cuh")),
    (c"route/route.cuh", include_str!("../kernels/route/route.cuh")),
    (c"route/scan.cuh", include_str!("../kernels/route/scan.cuh")),
    (c"rows/rows.cuh", include_str!("../kernels/rows/rows.cuh")),
    (c"rows/slabs.cuh", include_str!("../kernels/rows/slabs.cuh")),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::Path;

    #[test]
    fn every_header_of_the_kernels_folder_is_there_under_its_path() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels");
        let mut found = BTreeMap::new();
        for folder in std::fs::read_dir(&root).unwrap() {
            for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
                let path = file.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "cuh") {
                    let name = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
                    found.insert(name, std::fs::read_to_string(&path).unwrap());
                }
            }
        }
        let headers = HEADERS.map(|(name, text)| (name.to_str().unwrap().to_owned(), text.to_owned()));
        assert_eq!(BTreeMap::from(headers), found);
    }
}
