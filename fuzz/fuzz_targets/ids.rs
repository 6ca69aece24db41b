//! The ids reader over any bytes, and over whole `.npy` and `.safetensors` files with damage done to them.
//!
//! Whatever comes out has as many ids as its shape says, and the library takes or refuses it.
#![no_main]

mod edits;

use arbitrary::Arbitrary;
use edits::Edit;
use expertile::Routing;
use expertile_checkpoint::Ids;
use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::Path;

#[derive(Arbitrary, Debug)]
enum Input {
    Noise(Vec<u8>),
    Npy { version: u8, wide: bool, fortran_order: bool, tokens: u8, topk: u8, data: Vec<u8>, edits: Vec<Edit> },
    Safetensors { wide: bool, tokens: u8, topk: u8, named: bool, edits: Vec<Edit> },
}

fuzz_target!(|input: Input| {
    let (mut bytes, edits) = match input {
        Input::Noise(bytes) => (bytes, vec![]),
        Input::Npy { version, wide, fortran_order, tokens, topk, data, edits } => {
            (npy(version, wide, fortran_order, [tokens, topk], data), edits)
        }
        Input::Safetensors { wide, tokens, topk, named, edits } => (safetensors(wide, [tokens, topk], named), edits),
    };
    edits::apply(&edits, &mut bytes);
    let Ok(ids) = Ids::from_bytes(Path::new("ids"), &bytes) else { return };
    let view = ids.view();
    assert_eq!((view.tokens(), view.topk()), (ids.tokens(), ids.topk()));
    if ids.topk() > 0 {
        assert!(ids.tokens() * ids.topk() * 4 <= bytes.len(), "more ids than bytes");
        for token in 0..ids.tokens() {
            for slot in 0..ids.topk() {
                let _ = view.get(token, slot);
            }
        }
    }
    let _ = Routing::new(view, 8, None);
});

fn npy(version: u8, wide: bool, fortran_order: bool, [tokens, topk]: [u8; 2], mut data: Vec<u8>) -> Vec<u8> {
    let (descr, width) = if wide { ("<i8", 8) } else { ("<i4", 4) };
    let order = if fortran_order { "True" } else { "False" };
    let header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': ({tokens}, {topk}), }}\n");
    let mut bytes = b"\x93NUMPY".to_vec();
    bytes.extend([version % 4, 0]);
    match version % 4 {
        0 | 1 => bytes.extend((header.len() as u16).to_le_bytes()),
        _ => bytes.extend((header.len() as u32).to_le_bytes()),
    }
    bytes.extend(header.into_bytes());
    data.resize(usize::from(tokens) * usize::from(topk) * width, 0);
    bytes.extend(data);
    bytes
}

fn safetensors(wide: bool, [tokens, topk]: [u8; 2], named: bool) -> Vec<u8> {
    let (dtype, width) = if wide { (Dtype::I64, 8) } else { (Dtype::I32, 4) };
    let shape = vec![usize::from(tokens), usize::from(topk)];
    let data = vec![1; shape[0] * shape[1] * width];
    let view = TensorView::new(dtype, shape, &data).expect("as many bytes as the shape asks for");
    let other = TensorView::new(Dtype::U8, vec![1], &[0]).expect("one byte");
    let mut tensors = vec![("topk_ids", view)];
    if named {
        tensors.push(("other", other));
    }
    safetensors::serialize(tensors, None).expect("a header of two tensors")
}
