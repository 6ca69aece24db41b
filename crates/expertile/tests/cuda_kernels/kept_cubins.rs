//! Cubins that were kept, and are no cubins any more.

use crate::on_device::{device, skipped};
use expertile::Dtype;
use expertile::cuda::Compiler;
use expertile::cuda::{CubinCache, Device, Unpermute, UnpermuteConfig};
use std::path::{Path, PathBuf};

/// The cache's own check sum, which says that a file is whole and not that it is right.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Where the cubin starts in a file of the cache: after a name, the length of the key, the check sum and the key.
fn start_of_cubin(file: &[u8]) -> usize {
    32 + u64::from_le_bytes(file[16..24].try_into().unwrap()) as usize
}

fn only_file(folder: &Path) -> PathBuf {
    let files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files[0].clone()
}

#[test]
fn a_kept_cubin_that_the_driver_refuses_is_compiled_again() {
    if device().is_none() {
        return;
    }
    let Ok(compiler) = Compiler::find() else { return skipped("no compiler") };
    let folder = std::env::temp_dir().join(format!("expertile-kept-cubins-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    let prepare = || {
        let device = Device::open_with(0, compiler.clone(), Some(CubinCache::new(&folder)))?;
        let (input, output) = (Dtype::Bf16, Dtype::Bf16);
        let config = UnpermuteConfig { hidden: 64, topk: 2, input, output, weighted: true, aligned: true };
        Unpermute::prepare(&device, config)
    };
    prepare().unwrap();
    let file = only_file(&folder);
    let whole = std::fs::read(&file).unwrap();
    let start = start_of_cubin(&whole);
    let text = b".version 8.0 .target sm_90 this is no program".repeat(100);
    for wrong in [&b""[..], b"\0", b"\x7fELF", &text, &[0xff; 5000]] {
        let damaged = [&whole[..24], &checksum(wrong).to_le_bytes(), &whole[32..start], wrong].concat();
        std::fs::write(&file, damaged).unwrap();
        prepare().unwrap();
        assert!(std::fs::read(only_file(&folder)).unwrap() == whole, "{} bytes were kept", wrong.len());
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
