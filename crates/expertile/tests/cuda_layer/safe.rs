//! The safe door: the bits of the raw one, refusals before anything is queued, graphs.

use crate::model::{BASE, Inputs, Model, Spec};
use crate::on_device::hopper;
use expertile::cuda::{Device, DeviceBuffer, Ids, LayerInputs};
use expertile::{Dtype, Error, ExpertLayer};
use expertile_testkit::{NAN_POISON, Pattern};
use half::bf16;

/// A call's inputs in typed buffers.
struct Typed {
    x: DeviceBuffer<bf16>,
    ids: DeviceBuffer<i64>,
    weights: DeviceBuffer<f32>,
    map: Option<DeviceBuffer<i32>>,
}

impl Typed {
    fn new(device: &Device, model: &Model, inputs: &Inputs) -> Self {
        Self {
            x: device.upload(&inputs.x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()).unwrap(),
            ids: device.upload(&inputs.ids).unwrap(),
            weights: device.upload(&inputs.weights).unwrap(),
            map: model.map.as_ref().map(|map| device.upload(map).unwrap()),
        }
    }

    fn inputs(&self, tokens: usize) -> LayerInputs<'_, bf16> {
        LayerInputs {
            tokens,
            hidden_states: &self.x,
            topk_ids: Ids::I64(&self.ids),
            topk_weights: &self.weights,
            expert_map: self.map.as_ref(),
        }
    }
}

fn values(output: &DeviceBuffer<f32>) -> Vec<f64> {
    let mut values = vec![f32::NAN; output.len()];
    output.download(&mut values).unwrap();
    values.into_iter().map(f64::from).collect()
}

const SPEC: Spec = Spec { ids: Dtype::I64, output: Dtype::F32, global: 40, max_tokens: 100, ..BASE };

#[test]
fn a_safe_call_and_its_graph_have_the_bits_of_the_raw_call() {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, SPEC);
    let (tokens, layer) = (33, &model.on_device);
    let first = Inputs::new(&model, tokens, Pattern::Skewed, 1);
    let raw = crate::model::Call::new(device, &model, &first);
    let expected = |inputs: &Inputs| {
        raw.upload(inputs);
        raw.poison(device);
        raw.launch(expertile::cuda::Stream(0));
        raw.check(expertile::cuda::Stream(0)).unwrap();
        raw.output()
    };
    let typed = Typed::new(device, &model, &first);
    let output = device.allocate::<f32>(tokens * SPEC.hidden).unwrap();
    output.fill(NAN_POISON).unwrap();
    // A workspace for more tokens serves fewer.
    let mut workspace = layer.workspace(SPEC.max_tokens).unwrap();
    layer.run(&typed.inputs(tokens), &mut workspace, &output).unwrap();
    layer.check(&mut workspace).unwrap();
    assert_eq!(values(&output), expected(&first));

    let mut graph = layer.capture(&typed.inputs(tokens), &mut workspace, &output).unwrap();
    for seed in 2..5 {
        let inputs = Inputs::new(&model, tokens, Pattern::Even, seed);
        typed.x.upload(&inputs.x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()).unwrap();
        typed.ids.upload(&inputs.ids).unwrap();
        typed.weights.upload(&inputs.weights).unwrap();
        output.fill(NAN_POISON).unwrap();
        graph.replay().unwrap();
        graph.check().unwrap();
        assert_eq!(values(&output), expected(&inputs), "replay {seed}");
    }
    typed.ids.upload(&[SPEC.global as i64]).unwrap();
    graph.replay().unwrap();
    let limit = SPEC.global;
    assert_eq!(graph.check(), Err(Error::ExpertId { token: 0, slot: 0, id: limit as i64, limit }));
}

#[test]
fn a_safe_call_refuses_what_does_not_fit_before_it_queues_anything() {
    let Some(device) = hopper() else { return };
    let model = Model::new(device, SPEC);
    let (tokens, layer) = (33, &model.on_device);
    let typed = Typed::new(device, &model, &Inputs::new(&model, tokens, Pattern::Even, 1));
    let mut output = device.allocate::<f32>(tokens * SPEC.hidden).unwrap();
    output.fill(NAN_POISON).unwrap();
    let mut workspace = layer.workspace(tokens).unwrap();
    let small = |len| device.allocate::<bf16>(len).unwrap();
    let good = typed.inputs(tokens);
    let mut refuse = |inputs: &LayerInputs<'_, bf16>, start: &str| {
        let error = layer.run(inputs, &mut workspace, &output).unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}, expected {start}");
    };
    refuse(
        &LayerInputs { hidden_states: &small(33 * 512 - 1), ..good },
        "hidden_states holds 16895 elements, expected",
    );
    refuse(&LayerInputs { tokens: 34, ..good }, "hidden_states holds 16896 elements, expected at least 17408");
    refuse(&LayerInputs { tokens: 101, ..good }, "tokens is 101, expected at most 100");
    let narrow = device.upload(&[0i32; 33 * 4]).unwrap();
    refuse(&LayerInputs { topk_ids: Ids::I32(&narrow), ..good }, "topk_ids has dtype i32, expected i64");
    let few = device.upload(&[0i64; 33 * 4 - 1]).unwrap();
    refuse(&LayerInputs { topk_ids: Ids::I64(&few), ..good }, "topk_ids holds 131 elements, expected at least 132");
    let weights = device.upload(&[0f32; 3]).unwrap();
    refuse(&LayerInputs { topk_weights: &weights, ..good }, "topk_weights holds 3 elements");
    let map = device.upload(&[0i32; 39]).unwrap();
    refuse(&LayerInputs { expert_map: Some(&map), ..good }, "expert_map holds 39 elements, expected at least 40");
    refuse(&LayerInputs { expert_map: None, ..good }, "global_experts is 40, expected 16 without an expert map");

    let halves = small(tokens * SPEC.hidden);
    let error = layer.run(&good, &mut workspace, &halves).unwrap_err();
    assert_eq!(error, Error::Dtype { argument: "output", actual: Dtype::Bf16, expected: "f32, as prepared" });
    let short = device.allocate::<f32>(tokens * SPEC.hidden - 1).unwrap();
    let error = layer.run(&good, &mut workspace, &short).unwrap_err();
    assert!(matches!(error, Error::BufferTooSmall { argument: "output", .. }), "{error}");
    let error = layer.run(&good, &mut layer.workspace(1).unwrap(), &output).unwrap_err();
    assert!(matches!(error, Error::BufferTooSmall { argument: "workspace", .. }), "{error}");
    let mut wide = vec![0f32; 4];
    assert!(matches!(short.upload(&vec![0.0; short.len() + 1]), Err(Error::BufferTooSmall { argument: "buffer", .. })));
    assert!(device.allocate::<f32>(3).unwrap().download(&mut wide).is_err());

    let mut bytes = vec![0f32; output.len()];
    output.download(&mut bytes).unwrap();
    assert!(bytes.iter().all(|value| value.is_nan()), "a refused call has written");
    ExpertLayer::<Device>::run(layer, &good, &mut workspace, &mut output).unwrap();
    layer.check(&mut workspace).unwrap();
}
