//! A captured chain of steps.

use crate::case::{BASE, Case, Inputs, OnDevice, download, poisoned, with_layout};
use crate::on_device::{device, upload};
use crate::quantize_permute::{check_outputs, config, expected};
use crate::unpermute::number_bits;
use cudarc::driver::sys;
use expertile::cpu::{self, Cpu};
use expertile::cuda::{DeviceMatrix, QuantizePermute, Stream, Unpermute, UnpermuteCall, UnpermuteConfig};
use expertile::{Dtype, MatrixRef};
use expertile_testkit::{POISON, Pattern, Random, assert_same};
use half::bf16;

/// A captured launch, replayable.
struct Graph {
    exec: sys::CUgraphExec,
    stream: sys::CUstream,
}

impl Graph {
    fn capture(work: impl FnOnce(Stream)) -> Self {
        unsafe {
            let mut stream = std::ptr::null_mut();
            assert_eq!(sys::cuStreamCreate(&mut stream, 1), sys::CUresult::CUDA_SUCCESS);
            let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            assert_eq!(sys::cuStreamBeginCapture_v2(stream, relaxed), sys::CUresult::CUDA_SUCCESS);
            work(Stream(stream as usize as u64));
            let mut graph = std::ptr::null_mut();
            assert_eq!(sys::cuStreamEndCapture(stream, &mut graph), sys::CUresult::CUDA_SUCCESS);
            let mut exec = std::ptr::null_mut();
            assert_eq!(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0), sys::CUresult::CUDA_SUCCESS);
            Self { exec, stream }
        }
    }

    fn replay(&self) {
        unsafe {
            assert_eq!(sys::cuGraphLaunch(self.exec, self.stream), sys::CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamSynchronize(self.stream), sys::CUresult::CUDA_SUCCESS);
        }
    }
}

/// Makes the device's primary context current on this thread, as a framework would have.
fn adopt_primary_context() {
    unsafe {
        let (mut device, mut context) = (0, std::ptr::null_mut());
        assert_eq!(sys::cuDeviceGet(&mut device, 0), sys::CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuDevicePrimaryCtxRetain(&mut context, device), sys::CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuCtxSetCurrent(context), sys::CUresult::CUDA_SUCCESS);
    }
}

#[test]
fn a_captured_chain_replays_right_with_changed_inputs_in_a_worst_case_buffer() {
    let Some(device) = device() else { return };
    adopt_primary_context();
    for (tokens, single_launch_slots) in [(64, usize::MAX), (64, 0), (700, usize::MAX), (1100, usize::MAX)] {
        // Twice in one graph: the second launch meets the first one's barrier and counters.
        let case =
            Case { tokens, experts: 32, global: 256, hidden: 1024, seed: 1402, pattern: Pattern::Skewed, ..BASE };
        let first = Inputs::new(&case);
        let step =
            QuantizePermute::prepare(device, config(&case)).unwrap().with_single_launch_slots(single_launch_slots);
        let on = OnDevice::new(device, &case, &first, step.workspace_bytes(&first.plan).unwrap());
        let config = UnpermuteConfig {
            hidden: 1024,
            topk: 8,
            input: Dtype::Bf16,
            output: Dtype::Bf16,
            weighted: true,
            aligned: true,
        };
        let unpermute = Unpermute::prepare(device, config).unwrap();
        let m_sum = first.plan.m_sum();
        let mut random = Random::new(5);
        let rows: Vec<u16> = (0..m_sum * 1024).map(|_| bf16::from_f32(random.spread()).to_bits()).collect();
        let (from, to) = (upload(device, &rows), poisoned(device, tokens * 1024 * 2));
        let call = UnpermuteCall {
            rows: from.ptr(),
            inv_perm: on.layout.inv_perm,
            weights: Some(DeviceMatrix::row_major(on.weights.ptr().cast(), 8)),
            out: to.ptr(),
            tokens,
            m_sum,
        };
        unsafe { step.initialise_state(Stream(0), on.state.ptr()).unwrap() };
        unsafe { device.synchronize(Stream(0)).unwrap() };
        let graph = Graph::capture(|stream| unsafe {
            for _ in 0..2 {
                step.launch(stream, &on.call(first.plan)).unwrap();
            }
            unpermute.launch(stream, &call).unwrap();
        });
        for seed in [1402, 1404, 1406] {
            let changed = Case { seed, pattern: if seed == 1404 { Pattern::Empty } else { Pattern::Skewed }, ..case };
            let mut inputs = Inputs::new(&changed);
            // The captured map stays: only ids, rows and weights change.
            inputs.map = first.map.clone();
            assert_eq!(inputs.plan, first.plan);
            on.ids.upload_at(0, &inputs.ids.iter().map(|&id| id as i32).collect::<Vec<_>>()).unwrap();
            on.x.upload_at(0, &inputs.x).unwrap();
            on.weights.upload_at(0, &inputs.weights).unwrap();
            on.poison();
            to.fill(POISON).unwrap();
            graph.replay();
            check_outputs(&on, &case, &inputs.plan, &expected(&case, &inputs));
            let mut out = vec![bf16::ZERO; tokens * 1024];
            with_layout(&inputs, 8, 32, |layout| {
                let x = MatrixRef::new(bytemuck::cast_slice::<_, bf16>(&rows), m_sum, 1024).unwrap();
                let weights = MatrixRef::new(&inputs.weights, tokens, 8).unwrap();
                cpu::unpermute(&Cpu::new(), x, layout, Some(weights), &mut out).unwrap();
            });
            assert_same("unpermuted", &case, &number_bits(&download(&to, out.len())), &number_bits(&out));
        }
    }
}
