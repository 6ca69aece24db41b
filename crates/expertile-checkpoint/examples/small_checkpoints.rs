//! Writes small checkpoints with made-up weights into a folder, one in each naming and weight format, and hidden
//! states to run them on:
//!
//! ```console
//! $ cargo run --release -p expertile-checkpoint --example small_checkpoints -- small
//! $ cargo run --release -- layer --model small/mixtral-e4m3 --layer 1 --input small/tokens.safetensors --output out.safetensors --check
//! ```

// The tests make theirs with the same code, and use more of it.
#[allow(dead_code)]
#[path = "../tests/files/made_up.rs"]
mod made_up;

use expertile_testkit::Random;
use half::bf16;
use made_up::{FAMILIES, LAYER, Model, NewTensor, Sizes, serialize};
use safetensors::Dtype;
use std::path::PathBuf;

const TOKENS: usize = 32;
const SIZES: Sizes = Sizes { hidden: 512, intermediate: 256, experts: 16, topk: 4 };

fn main() -> std::io::Result<()> {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: small_checkpoints FOLDER");
        std::process::exit(2);
    };
    for family in FAMILIES {
        for (e4m3, shards) in [(false, 1), (true, 3)] {
            let checkpoint = folder.join(if e4m3 { format!("{family}-e4m3") } else { family.into() });
            std::fs::create_dir_all(&checkpoint)?;
            Model::new(family, SIZES, e4m3).write(&checkpoint, shards);
            println!("{}: layer {LAYER}, {} experts", checkpoint.display(), SIZES.experts);
        }
    }
    let mut random = Random::new(5);
    let values = (0..TOKENS * SIZES.hidden).flat_map(|_| bf16::from_f32(random.uniform()).to_le_bytes()).collect();
    let states = NewTensor {
        name: "hidden_states".into(),
        dtype: Dtype::BF16,
        shape: vec![TOKENS, SIZES.hidden],
        bytes: values,
    };
    let file = folder.join("tokens.safetensors");
    std::fs::write(&file, serialize(&[states]))?;
    println!("{}: hidden_states [{TOKENS}, {}]", file.display(), SIZES.hidden);
    Ok(())
}
