//! The files of one call of a layer.

use crate::made_up::{NewTensor, serialize};
use expertile_checkpoint::{HiddenStates, LayerInput, LayerOutput};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

fn tensor(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> NewTensor {
    NewTensor { name: name.into(), dtype, shape: shape.to_vec(), bytes }
}

fn read(tensors: &[NewTensor]) -> Result<LayerInput, String> {
    LayerInput::from_bytes(Path::new("in"), &serialize(tensors)).map_err(|error| error.to_string())
}

fn states() -> NewTensor {
    let bytes = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    tensor("hidden_states", Dtype::F32, &[2, 3], bytes)
}

#[test]
fn hidden_states_keep_their_type() {
    let input = read(&[states()]).unwrap();
    assert_eq!((input.tokens(), input.hidden(), input.routing()), (2, 3, None));
    assert_eq!(input.hidden_states(), &HiddenStates::F32(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let bytes = [1.5, -2.0].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let input = read(&[tensor("hidden_states", Dtype::BF16, &[2, 1], bytes)]).unwrap();
    assert!(matches!(input.hidden_states(), HiddenStates::Bf16(_)));
    assert_eq!(input.hidden_states().to_f32(), [1.5, -2.0]);
    let bytes = [1.5, -2.0].iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
    let input = read(&[tensor("hidden_states", Dtype::F16, &[1, 2], bytes)]).unwrap();
    assert!(matches!(input.hidden_states(), HiddenStates::F16(_)));
    assert_eq!(input.hidden_states().to_f32(), [1.5, -2.0]);
    assert_eq!(read(&[tensor("hidden_states", Dtype::F16, &[0, 2], vec![])]).unwrap().tokens(), 0);
}

#[test]
fn hidden_states_may_come_from_elsewhere() {
    let values = || HiddenStates::F32(vec![0.0; 6]);
    let input = LayerInput::from_hidden_states(values(), 3).unwrap();
    assert_eq!((input.tokens(), input.hidden(), input.routing()), (2, 3, None));
    for hidden in [0, 4] {
        let error = LayerInput::from_hidden_states(values(), hidden).unwrap_err().to_string();
        assert!(error.contains(&format!("shape [6], expected a multiple of {hidden}")), "{error}");
    }
}

#[test]
fn ids_and_weights_come_together() {
    let ids = || tensor("topk_ids", Dtype::I64, &[2, 1], [7i64, -1].iter().flat_map(|x| x.to_le_bytes()).collect());
    let weights =
        || tensor("topk_weights", Dtype::F32, &[2, 1], [0.5f32, 0.0].iter().flat_map(|x| x.to_le_bytes()).collect());
    let input = read(&[states(), ids(), weights()]).unwrap();
    let (read_ids, read_weights) = input.routing().unwrap();
    assert_eq!((read_ids.view().get(0, 0), read_ids.view().get(1, 0), read_weights), (7, -1, &[0.5, 0.0][..]));
    let refuse = |tensors: &[NewTensor], part: &str| {
        let message = read(tensors).unwrap_err();
        assert!(message.contains(part), "{message}");
    };
    refuse(&[], "tensor hidden_states is missing");
    refuse(&[states(), ids()], "tensor topk_weights is missing");
    refuse(&[states(), weights()], "tensor topk_ids is missing");
    refuse(&[tensor("hidden_states", Dtype::I8, &[1, 1], vec![1])], "dtype I8, expected BF16, F16 or F32");
    refuse(&[tensor("hidden_states", Dtype::F32, &[1], vec![1; 4])], "shape [1], expected [M, H]");
    refuse(&[states(), NewTensor { shape: vec![1, 2], ..ids() }, weights()], "shape [1, 2], expected [2, topk]");
    refuse(&[states(), ids(), NewTensor { shape: vec![1, 2], ..weights() }], "shape [1, 2], expected [2, 1]");
    refuse(&[states(), ids(), NewTensor { dtype: Dtype::I32, ..weights() }], "dtype I32, expected F32");
    refuse(&[states(), NewTensor { dtype: Dtype::F64, ..ids() }, weights()], "dtype F64, expected I32 or I64");
}

#[test]
fn what_is_written_reads_back() {
    let output = LayerOutput {
        tokens: 2,
        hidden: 3,
        topk: 1,
        output: &[1.0, 2.0, 3.0, 4.0, 5.0, f32::NAN].map(bf16::from_f32),
        topk_ids: &[3, -1],
        topk_weights: &[0.25, 0.75],
    };
    let bytes = output.to_bytes(Path::new("out")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let rows = tensors.tensor("output").unwrap();
    assert_eq!((rows.dtype(), rows.shape()), (Dtype::BF16, &[2, 3][..]));
    assert_eq!(rows.data()[..2], bf16::ONE.to_le_bytes());
    let ids = tensors.tensor("topk_ids").unwrap();
    assert_eq!((ids.dtype(), ids.shape(), ids.data()[0]), (Dtype::I32, &[2, 1][..], 3));
    let weights = tensors.tensor("topk_weights").unwrap();
    assert_eq!((weights.dtype(), &weights.data()[4..]), (Dtype::F32, &0.75f32.to_le_bytes()[..]));
    let error = LayerOutput { hidden: 4, ..output }.to_bytes(Path::new("out")).unwrap_err().to_string();
    assert!(error.starts_with("out: tensor output has shape [2, 4]"), "{error}");
}
