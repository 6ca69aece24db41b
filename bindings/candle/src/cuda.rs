//! CUDA tensors: weights where they are, calls on the stream of candle's device, in candle's memory.
//!
//! cudarc's guards order a call after what other streams did to its tensors, as they do for candle's own kernels.

use crate::error::{none_of_dtypes, refused, wrong_dtype};
use crate::operands::dtype;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaStream, DevicePtr as _, DevicePtrMut as _, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, DeviceLocation, Error, Layout, Result, Storage, Tensor};
use expertile::cuda::{self, DeviceBuffer, DeviceMatrix, DevicePtr, LayerCall, RoutingPtrs, STATE_BYTES, Stream};
use expertile::{Dtype, LayerConfig, LayerShape, WeightFormat};
use float8::F8E4M3;
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// A tensor on a GPU with its layout.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// Weights in candle's memory, which the tensors keep alive.
#[derive(Debug)]
pub(crate) struct Weights {
    gpu: usize,
    device: CudaDevice,
    w13: cuda::Weights,
    w2: cuda::Weights,
    /// Everything that the two point into, and where it is.
    held: Vec<(Tensor, u64)>,
}

impl Weights {
    /// `[values, scales]` of `w13`, then of `w2`.
    pub(crate) fn new(gpu: usize, format: WeightFormat, tensors: Vec<(Tensor, Option<Tensor>)>) -> Result<Self> {
        let mut held = Vec::new();
        let mut all = Vec::new();
        for ((values, scales), names) in tensors.into_iter().zip([("w13", "w13_scales"), ("w2", "w2_scales")]) {
            let sizes = values.dims3()?;
            let address = address(names.0, &values)?;
            held.push((values, address));
            let scales = scales.map(|scales| Ok::<_, Error>((self::address(names.1, &scales)?, scales))).transpose()?;
            let scales_address = scales.as_ref().map(|&(address, _)| DevicePtr::new(address));
            held.extend(scales.map(|(address, scales)| (scales, address)));
            #[allow(unsafe_code)]
            // SAFETY: contiguous tensors of these sizes; a layer keeps them, and looks before each launch whether they
            // are where they were.
            let weights = unsafe { cuda::Weights::from_device(format, sizes, DevicePtr::new(address), scales_address) };
            all.push(weights.map_err(Error::wrap)?);
        }
        let [w13, w2] = <[cuda::Weights; 2]>::try_from(all).map_err(|_| Error::msg("expected w13 and w2"))?;
        let device = held[0].0.device().as_cuda_device()?.clone();
        // What fills the tensors may be queued on another stream than the calls will be.
        Device::Cuda(device.clone()).synchronize()?;
        Ok(Self { gpu, device, w13, w2, held })
    }
}

/// Where a contiguous tensor's first element is.
fn address(argument: &'static str, tensor: &Tensor) -> Result<u64> {
    if !tensor.is_contiguous() {
        return Err(refused(
            argument,
            format_args!("has strides {:?}", tensor.stride()),
            "a contiguous tensor on a GPU",
        ));
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(refused(argument, format_args!("is on {:?}", tensor.device().location()), "Cuda"));
    };
    let stream = storage.device.cuda_stream();
    match storage.dtype() {
        DType::BF16 => Ok(pointer::<bf16>((storage, layout), &stream)?.0),
        DType::F8E4M3 => Ok(pointer::<F8E4M3>((storage, layout), &stream)?.0),
        DType::F32 if argument.ends_with("scales") => Ok(pointer::<f32>((storage, layout), &stream)?.0),
        got => Err(none_of_dtypes(argument, got, "BF16 or F8E4M3 on a GPU")),
    }
}

/// Where a tensor's first element is, and the guard to keep until what reads it is queued.
fn pointer<'a, T: CudaDType + DeviceRepr + 'a>(
    (storage, layout): Operand<'a>,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    let (start, guard) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
    Ok((start + (layout.start_offset() * size_of::<T>()) as u64, guard))
}

/// A layer on a GPU.
#[derive(Debug)]
pub(crate) struct Layer {
    layer: cuda::Layer,
    weights: Weights,
    states: Mutex<HashMap<Caller, DeviceBuffer>>,
}

/// Whose calls follow each other: candle's usual stream is another one in each thread, under one name.
type Caller = (ThreadId, u64);

impl Layer {
    pub(crate) fn prepare(weights: Weights, config: LayerConfig, max_tokens: usize) -> Result<Self> {
        let device = device(weights.gpu)?;
        let (w13, w2) = (weights.w13.clone(), weights.w2.clone());
        let layer = cuda::Layer::prepare(&device, w13, w2, config, max_tokens).map_err(Error::wrap)?;
        Ok(Self { layer, weights, states: Mutex::default() })
    }

    pub(crate) fn shape(&self) -> &LayerShape {
        self.layer.shape()
    }

    pub(crate) fn config(&self) -> &LayerConfig {
        self.layer.config()
    }

    pub(crate) fn max_tokens(&self) -> usize {
        self.layer.max_tokens()
    }

    pub(crate) fn location(&self) -> DeviceLocation {
        DeviceLocation::Cuda { gpu_id: self.weights.gpu }
    }

    /// Waits for this thread's calls, and reports what was wrong with their ids.
    pub(crate) fn check(&self) -> Result<()> {
        for (&(thread, stream), state) in &*self.states() {
            if thread == thread::current().id() {
                let call = LayerCall { tokens: self.max_tokens(), state: state.ptr(), ..LayerCall::default() };
                #[allow(unsafe_code)]
                // SAFETY: the state was initialised when it was made, on this stream, which candle keeps.
                unsafe { self.layer.check_launch(Stream(stream), &call) }.map_err(Error::wrap)?;
            }
        }
        Ok(())
    }

    /// Queues a call: `[M, H]`.
    pub(crate) fn forward(
        &self,
        tokens: usize,
        hidden_states: Operand<'_>,
        topk_ids: Operand<'_>,
        topk_weights: Operand<'_>,
    ) -> Result<CudaStorage> {
        match self.config().output {
            Dtype::Bf16 => self.with_output::<bf16>(tokens, hidden_states, topk_ids, topk_weights),
            Dtype::F16 => self.with_output::<f16>(tokens, hidden_states, topk_ids, topk_weights),
            _ => self.with_output::<f32>(tokens, hidden_states, topk_ids, topk_weights),
        }
    }

    fn with_output<O: CudaDType + DeviceRepr>(
        &self,
        tokens: usize,
        hidden_states: Operand<'_>,
        topk_ids: Operand<'_>,
        topk_weights: Operand<'_>,
    ) -> Result<CudaStorage> {
        let device = hidden_states.0.device.clone();
        let stream = device.cuda_stream();
        let (x, _reads_x) = self.hidden_states(hidden_states, &stream)?;
        let (ids, _reads_ids) = self.topk_ids(topk_ids, &stream)?;
        let (weights, _reads_weights) = match topk_weights.0.dtype() {
            DType::F32 => pointer::<f32>(topk_weights, &stream)?,
            got => return Err(wrong_dtype("topk_weights", got, DType::F32)),
        };
        let (workspace, output) = (self.layer.workspace_bytes(tokens), tokens * self.shape().hidden());
        // Nothing of length zero is allocated, and everything there is written before it is read.
        #[allow(unsafe_code)]
        // SAFETY: numbers without a niche, whatever their bits.
        let (mut workspace, mut output) =
            unsafe { (device.alloc::<u8>(workspace.map_err(Error::wrap)?.max(1))?, device.alloc::<O>(output.max(1))?) };
        {
            let (workspace, _writes_workspace) = workspace.device_ptr_mut(&stream);
            let (output, _writes_output) = output.device_ptr_mut(&stream);
            let call = LayerCall {
                tokens,
                hidden_states: strided(x, hidden_states.1)?,
                routing: RoutingPtrs {
                    ids: strided(ids, topk_ids.1)?,
                    expert_map: None,
                    global_experts: self.config().global_experts,
                },
                topk_weights: strided(weights, topk_weights.1)?,
                output: DevicePtr::new(output),
                state: DevicePtr::default(),
                workspace: DevicePtr::new(workspace),
            };
            self.launch(&stream, call)?;
        }
        Ok(O::wrap_cuda_slice(output, device))
    }

    /// Queues the launches, with this caller's state.
    fn launch(&self, stream: &CudaStream, call: LayerCall) -> Result<()> {
        let held: Vec<_> = self.weights.held.iter().map(|(tensor, _)| tensor.storage_and_layout()).collect();
        for (&(_, expected), (storage, layout)) in self.weights.held.iter().zip(&held) {
            let Storage::Cuda(storage) = &**storage else {
                return Err(refused("weights", "left the GPU", "them there"));
            };
            let at = match storage.dtype() {
                DType::BF16 => pointer::<bf16>((storage, layout), stream)?.0,
                DType::F8E4M3 => pointer::<F8E4M3>((storage, layout), stream)?.0,
                _ => pointer::<f32>((storage, layout), stream)?.0,
            };
            if at != expected {
                return Err(refused(
                    "weights",
                    format_args!("are at {at:#x}"),
                    format_args!("{expected:#x}, as prepared"),
                ));
            }
        }
        let handle = Stream(stream.cu_stream() as u64);
        let mut states = self.states();
        let caller = (thread::current().id(), handle.0);
        if !states.contains_key(&caller) {
            let state: DeviceBuffer = self.layer.device().allocate(STATE_BYTES).map_err(Error::wrap)?;
            #[allow(unsafe_code)]
            // SAFETY: memory of that size, which nobody else has.
            unsafe { self.layer.initialise_state(handle, state.ptr()) }.map_err(Error::wrap)?;
            states.insert(caller, state);
        }
        let call = LayerCall { state: states[&caller].ptr(), ..call };
        #[allow(unsafe_code)]
        // SAFETY: every address is a live tensor's or allocation's of the size that the layer asks for, ordered before
        // this stream's work by its guard; the weights are where they were, and their storages are held; the state is
        // this caller's alone. Memory is freed in the order of the stream, and dropping the layer waits.
        unsafe { self.layer.launch(handle, &call) }.map_err(Error::wrap)
    }

    fn hidden_states<'a>(&self, operand: Operand<'a>, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
        let (got, expected) = (operand.0.dtype(), dtype(self.config().input)?);
        match got {
            _ if got != expected => Err(wrong_dtype("hidden_states", got, expected)),
            DType::BF16 => pointer::<bf16>(operand, stream),
            DType::F16 => pointer::<f16>(operand, stream),
            _ => pointer::<f32>(operand, stream),
        }
    }

    fn topk_ids<'a>(&self, operand: Operand<'a>, stream: &'a CudaStream) -> Result<(u64, SyncOnDrop<'a>)> {
        match (operand.0.dtype(), self.config().ids) {
            (DType::U32, Dtype::I32) => pointer::<u32>(operand, stream),
            (DType::I32, Dtype::I32) => pointer::<i32>(operand, stream),
            (DType::I64, Dtype::I64) => pointer::<i64>(operand, stream),
            (got, Dtype::I32) => Err(none_of_dtypes("topk_ids", got, "U32 or I32, as prepared")),
            (got, _) => Err(wrong_dtype("topk_ids", got, DType::I64)),
        }
    }

    fn states(&self) -> MutexGuard<'_, HashMap<Caller, DeviceBuffer>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Layer {
    /// What is queued may still use the states.
    fn drop(&mut self) {
        // A failure (the process is ending, the context is lost) leaves nothing that runs.
        let _ = self.weights.device.cuda_stream().context().synchronize().w();
    }
}

/// A view of two dimensions.
fn strided<T>(address: u64, layout: &Layout) -> Result<DeviceMatrix<T>> {
    match *layout.stride() {
        [row_stride, col_stride] => Ok(DeviceMatrix { ptr: DevicePtr::new(address), row_stride, col_stride }),
        _ => Err(refused("tensor", format_args!("is {:?}", layout.dims()), "a matrix")),
    }
}

/// The library's device of that number. One for all layers: it holds the kernels.
fn device(gpu: usize) -> Result<cuda::Device> {
    static DEVICES: Mutex<Vec<(usize, cuda::Device)>> = Mutex::new(Vec::new());
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, device)) = devices.iter().find(|&&(known, _)| known == gpu) {
        return Ok(device.clone());
    }
    let device = cuda::Device::open(gpu).map_err(Error::wrap)?;
    devices.push((gpu, device.clone()));
    Ok(device)
}
