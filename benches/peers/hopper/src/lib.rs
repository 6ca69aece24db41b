//! Expertile's GPU steps behind a C interface: one Python process times them beside the kernels of others, on the same
//! tensors and the same stream.
//!
//! A step is made once (which compiles), bound to addresses once per set of buffers, and launched many times: what a
//! serving loop does. Functions return 0 or null on failure, and `expertile_error` then says what was wrong.

use expertile::cuda::{
    Activate, ActivateCall, ActivateConfig, Biases, Device, DeviceBuffer, DeviceMatrix, DevicePtr, Gemm, GemmCall,
    GemmConfig, GemmKernel, Layer, LayerCall, LayoutPtrs, QuantizePermute, QuantizePermuteCall, QuantizePermuteConfig,
    RouteConfig, RoutingPtrs, RowEnds, RowsPtrs, STATE_BYTES, Stream, Unpermute, UnpermuteCall, UnpermuteConfig,
    Weights,
};
use expertile::{
    Activation, ActivationFormat, Dtype, Error, LayerConfig, LayerShape, Padding, Plan, Result, ScaleFormat,
    TokenExperts, WeightFormat,
};
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::sync::{Arc, OnceLock};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn device() -> Result<Device> {
    static DEVICE: OnceLock<Result<Device>> = OnceLock::new();
    DEVICE.get_or_init(|| Device::open(0)).clone()
}

fn report(error: &Error) {
    let text = CString::new(error.to_string().replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.with(|last| *last.borrow_mut() = text);
}

/// Hands a value to the caller as an address; 0 on failure.
fn hand_over<T>(value: Result<T>) -> usize {
    match value {
        Ok(value) => Box::into_raw(Box::new(value)) as usize,
        Err(error) => {
            report(&error);
            0
        }
    }
}

/// What the last failure on this thread was.
#[unsafe(no_mangle)]
pub extern "C" fn expertile_error() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// An address that is 0 where there is nothing.
fn optional<T>(address: u64) -> Option<DevicePtr<T>> {
    (address != 0).then(|| DevicePtr::new(address))
}

/// What a GEMM works on, but for its weights, which it borrows.
pub struct GemmOperands {
    rows: DevicePtr,
    scales: Option<DevicePtr<f32>>,
    out: DevicePtr,
    out_scales: Option<DevicePtr<f32>>,
    header: DevicePtr<i32>,
    worklist: DevicePtr<i32>,
    ends: RowEnds,
    m_sum: usize,
}

impl GemmOperands {
    fn call<'a>(&self, weights: &'a Weights) -> GemmCall<'a> {
        let &Self { rows, scales, out, out_scales, header, worklist, ends, m_sum } = self;
        GemmCall { weights, rows, scales, bias: None, out, out_scales, header, worklist, ends, m_sum }
    }
}

/// A step bound to addresses.
pub enum Bound {
    QuantizePermute { step: Arc<QuantizePermute>, call: QuantizePermuteCall, _state: DeviceBuffer },
    Activate { step: Arc<Activate>, call: ActivateCall },
    Unpermute { step: Arc<Unpermute>, call: UnpermuteCall },
    Gemm { step: Arc<Gemm>, weights: Weights, operands: GemmOperands },
    Layer { layer: Arc<Layer>, call: LayerCall, _state: DeviceBuffer },
}

/// Quantize + permute for one shape, and the sizes of its buffers.
pub struct Permutation {
    step: Arc<QuantizePermute>,
    plan: Plan,
    row_tile: usize,
}

/// Prepares quantize + permute; rows are bf16, scales MN-major f32 over 128 values, ids i32 (or i64).
#[unsafe(no_mangle)]
pub extern "C" fn expertile_permutation(
    tokens: usize,
    topk: usize,
    experts: usize,
    hidden: usize,
    alignment: usize,
    row_tile: usize,
    reference_size: bool,
    wide_ids: bool,
    single_launch_slots: usize,
) -> usize {
    let make = || {
        let config = QuantizePermuteConfig {
            route: RouteConfig { topk, ids: if wide_ids { Dtype::I64 } else { Dtype::I32 }, row_tile },
            hidden,
            input: Dtype::Bf16,
            format: ScaleFormat::HOPPER,
            padding: Padding::Untouched,
            weighted: false,
            aligned: true,
        };
        let plan = if reference_size {
            Plan::reference(tokens, topk, experts, alignment, None)?
        } else {
            Plan::tight(tokens, topk, experts, alignment, TokenExperts::Distinct)?
        };
        let step = QuantizePermute::prepare(&device()?, config)?.with_single_launch_slots(single_launch_slots);
        Ok(Permutation { step: Arc::new(step), plan, row_tile })
    };
    hand_over(make())
}

/// Writes M_sum, the words of the scales, and the bytes of layout and workspace; 1, or 0 on failure.
///
/// # Safety
/// `permutation` came from `expertile_permutation`, `sizes` holds four.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_permutation_sizes(
    permutation: *const Permutation,
    hidden: usize,
    sizes: *mut usize,
) -> i32 {
    // SAFETY: the caller's promise.
    let (permutation, sizes) = unsafe { (&*permutation, std::slice::from_raw_parts_mut(sizes, 4)) };
    let plan = &permutation.plan;
    let compute = || {
        Ok([
            plan.m_sum(),
            ScaleFormat::HOPPER.words(plan.m_sum(), hidden)?,
            LayoutPtrs::space_bytes(plan, permutation.row_tile)?,
            permutation.step.workspace_bytes(plan)?,
        ])
    };
    match compute() {
        Ok(values) => {
            sizes.copy_from_slice(&values);
            1
        }
        Err(error) => {
            report(&error);
            0
        }
    }
}

/// Writes the byte offsets of a layout's eight lists; 1, or 0 on failure.
///
/// # Safety
/// As [`expertile_permutation_sizes`]; `offsets` holds eight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_layout_offsets(permutation: *const Permutation, offsets: *mut u64) -> i32 {
    // SAFETY: the caller's promise.
    let (permutation, offsets) = unsafe { (&*permutation, std::slice::from_raw_parts_mut(offsets, 8)) };
    let base = DevicePtr::<u8>::new(1 << 20);
    match LayoutPtrs::carve(base, &permutation.plan, permutation.row_tile) {
        Ok(l) => {
            let lists = [
                l.expert_num_tokens,
                l.expert_start,
                l.psum,
                l.m_indices,
                l.row_tokens,
                l.inv_perm,
                l.header,
                l.worklist,
            ];
            for (offset, list) in offsets.iter_mut().zip(lists) {
                *offset = list.address() - base.address();
            }
            1
        }
        Err(error) => {
            report(&error);
            0
        }
    }
}

/// Binds quantize + permute to addresses and makes its state.
///
/// # Safety
/// As [`expertile_permutation_sizes`]; the addresses are device memory of the sizes given there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_bind_permutation(
    permutation: *const Permutation,
    ids: u64,
    expert_map: u64,
    global_experts: usize,
    x: u64,
    hidden: usize,
    out: u64,
    scales: u64,
    layout: u64,
    workspace: u64,
) -> usize {
    // SAFETY: the caller's promise.
    let permutation = unsafe { &*permutation };
    let plan = permutation.plan;
    let make = || {
        let workspace = DevicePtr::new(workspace);
        let state: DeviceBuffer = device()?.allocate(STATE_BYTES)?;
        // SAFETY: the state is new, and stream 0 always lives.
        unsafe { permutation.step.initialise_state(Stream(0), state.ptr())? };
        let ids = DeviceMatrix::row_major(DevicePtr::new(ids), plan.topk());
        let rows = RowsPtrs {
            x: DeviceMatrix::row_major(DevicePtr::new(x), hidden),
            x_scales: None,
            weights: None,
            out: DevicePtr::new(out),
            scales: optional(scales),
        };
        let call = QuantizePermuteCall {
            plan,
            routing: RoutingPtrs { ids, expert_map: optional(expert_map), global_experts },
            rows,
            layout: LayoutPtrs::carve(DevicePtr::new(layout), &plan, permutation.row_tile)?,
            state: state.ptr(),
            workspace,
        };
        Ok(Bound::QuantizePermute { step: permutation.step.clone(), call, _state: state })
    };
    hand_over(make())
}

/// Prepares and binds the activation: SwiGLU of bf16 to e4m3 with MN-major f32 scales over 128 values.
#[unsafe(no_mangle)]
pub extern "C" fn expertile_bind_activation(
    intermediate: usize,
    gate_up: u64,
    psum: u64,
    out: u64,
    scales: u64,
    local_experts: usize,
    alignment: usize,
    m_sum: usize,
) -> usize {
    let make = || {
        let config =
            ActivateConfig { intermediate, activation: Activation::default(), format: Some(ScaleFormat::HOPPER) };
        let step = Arc::new(Activate::prepare(&device()?, config)?);
        let call = ActivateCall {
            gate_up: DevicePtr::new(gate_up),
            psum: DevicePtr::new(psum),
            out: DevicePtr::new(out),
            scales: optional(scales),
            local_experts,
            alignment,
            m_sum,
        };
        Ok(Bound::Activate { step, call })
    };
    hand_over(make())
}

/// Prepares and binds unpermute + reduce of bf16 rows with f32 weights.
#[unsafe(no_mangle)]
pub extern "C" fn expertile_bind_unpermute(
    hidden: usize,
    topk: usize,
    tokens: usize,
    m_sum: usize,
    rows: u64,
    inv_perm: u64,
    weights: u64,
    out: u64,
) -> usize {
    let make = || {
        let (input, output) = (Dtype::Bf16, Dtype::Bf16);
        let config = UnpermuteConfig { hidden, topk, input, output, weighted: true, aligned: true };
        let step = Arc::new(Unpermute::prepare(&device()?, config)?);
        let call = UnpermuteCall {
            rows: DevicePtr::new(rows),
            inv_perm: DevicePtr::new(inv_perm),
            weights: Some(DeviceMatrix::row_major(DevicePtr::new(weights), topk)),
            out: DevicePtr::new(out),
            tokens,
            m_sum,
        };
        Ok(Bound::Unpermute { step, call })
    };
    hand_over(make())
}

/// A GEMM kernel as five words: row tile, blocks that share rows, parts of K, 1 where tokens are the M operand,
/// outputs.
fn words_of_kernel(kernel: GemmKernel) -> [usize; 5] {
    let tokens_on_m = usize::from(kernel.tokens_on_m());
    [kernel.row_tile(), kernel.shared(), kernel.splits(), tokens_on_m, kernel.outputs()]
}

/// The kernel that has these words, if there is one.
fn kernel_of_words(format: WeightFormat, words: [usize; 5]) -> Result<GemmKernel> {
    let mut kernels = GemmKernel::all(format).into_iter().chain(GemmKernel::all_split());
    let expected = "the words of a GEMM kernel: row tile, sharing blocks, parts of K, tokens on M, outputs".into();
    kernels.find(|&kernel| words_of_kernel(kernel) == words).ok_or(Error::Value {
        argument: "row_tile",
        actual: words[0] as i128,
        expected,
    })
}

/// Prepares and binds the grouped GEMM of e4m3 rows and weights `[experts, n, k]`, whose worklist has `row_tile`; with
/// `out_scales` its results go through SwiGLU and are quantized, too.
///
/// # Safety
/// The addresses are device memory of the sizes that `Weights` and `GemmCall` say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_bind_gemm(
    row_tile: usize,
    shared: usize,
    splits: usize,
    wide: usize,
    outputs: usize,
    experts: usize,
    n: usize,
    k: usize,
    weights: u64,
    weight_scales: u64,
    rows: u64,
    scales: u64,
    out: u64,
    out_scales: u64,
    header: u64,
    worklist: u64,
    psum: u64,
    m_sum: usize,
) -> usize {
    let make = || {
        let config = GemmConfig {
            format: WeightFormat::E4m3,
            activation_format: ActivationFormat::E4m3,
            kernel: kernel_of_words(WeightFormat::E4m3, [row_tile, shared, splits, usize::from(wide != 0), outputs])?,
            activation: (out_scales != 0).then(Activation::default),
        };
        let step = Arc::new(Gemm::prepare(&device()?, config)?);
        // SAFETY: the caller's promise.
        let weights = unsafe { on_device((experts, n, k), weights, weight_scales)? };
        let operands = GemmOperands {
            rows: DevicePtr::new(rows),
            scales: optional(scales),
            out: DevicePtr::new(out),
            out_scales: optional(out_scales),
            header: DevicePtr::new(header),
            worklist: DevicePtr::new(worklist),
            ends: RowEnds::Psum(DevicePtr::new(psum)),
            m_sum,
        };
        Ok(Bound::Gemm { step, weights, operands })
    };
    hand_over(make())
}

/// MXFP4 weights `[E, N, K]`, of `blocks` and `scales` as checkpoints have them, arranged for e4m3 rows or for bf16 ones.
/// They are never freed.
///
/// # Safety
/// The addresses are device memory of the sizes that `Weights` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_mxfp4_weights(
    experts: usize,
    n: usize,
    k: usize,
    blocks: u64,
    scales: u64,
    bf16_rows: bool,
) -> usize {
    let make = || {
        let (blocks, scales) = (DevicePtr::new(blocks), DevicePtr::new(scales));
        // SAFETY: the caller's promise.
        let weights = unsafe { Weights::from_device_mxfp4((experts, n, k), blocks, scales)? };
        Ok(Mxfp4 { weights: weights.arrange(&device()?, rows_of(bf16_rows))?, rows: rows_of(bf16_rows) })
    };
    hand_over(make())
}

/// Arranged weights, and what rows they are for.
pub struct Mxfp4 {
    weights: Weights,
    rows: ActivationFormat,
}

fn rows_of(bf16: bool) -> ActivationFormat {
    if bf16 { ActivationFormat::Bf16 } else { ActivationFormat::E4m3 }
}

/// Bytes of MXFP4 weights as they are arranged.
///
/// # Safety
/// `weights` came from [`expertile_mxfp4_weights`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_mxfp4_bytes(weights: *const Mxfp4) -> usize {
    // SAFETY: the caller's promise.
    unsafe { &*weights }.weights.bytes()
}

/// Gives MXFP4 weights, arranged for e4m3 rows, their copy in e4m3: writes the addresses of its values and of its scales;
/// 1, or 0 on failure.
///
/// # Safety
/// As [`expertile_mxfp4_bytes`], nobody else uses the weights meanwhile, and `addresses` holds two.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_mxfp4_copy(weights: *mut Mxfp4, addresses: *mut u64) -> i32 {
    // SAFETY: the caller's promise.
    let (weights, addresses) = unsafe { (&mut *weights, std::slice::from_raw_parts_mut(addresses, 2)) };
    match device().and_then(|device| weights.weights.clone().with_e4m3_copy(&device)) {
        Ok(copied) => {
            weights.weights = copied;
            let copy = weights.weights.e4m3_copy().expect("it has been made");
            let scales = copy.scales().map_or(0, DevicePtr::address);
            addresses.copy_from_slice(&[copy.values().address(), scales]);
            1
        }
        Err(error) => {
            report(&error);
            0
        }
    }
}

/// Prepares and binds the grouped GEMM of MXFP4 weights, whose tiles have that many rows and outputs.
///
/// # Safety
/// As [`expertile_mxfp4_bytes`] and [`expertile_bind_gemm`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_bind_mxfp4_gemm(
    row_tile: usize,
    outputs: usize,
    weights: *const Mxfp4,
    rows: u64,
    scales: u64,
    out: u64,
    header: u64,
    worklist: u64,
    psum: u64,
    m_sum: usize,
) -> usize {
    // SAFETY: the caller's promise.
    let weights = unsafe { &*weights };
    let make = || {
        let format = WeightFormat::Mxfp4;
        let kernel = kernel_of_words(format, [row_tile, 1, 1, 0, outputs])?;
        let config = GemmConfig { format, activation_format: weights.rows, kernel, activation: None };
        let step = Arc::new(Gemm::prepare(&device()?, config)?);
        let operands = GemmOperands {
            rows: DevicePtr::new(rows),
            scales: optional(scales),
            out: DevicePtr::new(out),
            out_scales: None,
            header: DevicePtr::new(header),
            worklist: DevicePtr::new(worklist),
            ends: RowEnds::Psum(DevicePtr::new(psum)),
            m_sum,
        };
        Ok(Bound::Gemm { step, weights: weights.weights.clone(), operands })
    };
    hand_over(make())
}

/// Prepares the whole layer of MXFP4 weights `[E, 2 I, H]` and `[E, H, I]`; else as [`expertile_layer`].
///
/// # Safety
/// As [`expertile_mxfp4_bytes`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_mxfp4_layer(
    topk: usize,
    global_experts: usize,
    max_tokens: usize,
    w13: *const Mxfp4,
    w2: *const Mxfp4,
) -> usize {
    // SAFETY: the caller's promise.
    let (w13, w2) = unsafe { (&*w13, &*w2) };
    hand_over(w13.layer(w2, (topk, global_experts, max_tokens), Activation::default(), [None, None]))
}

/// The same with biases `b13 [E, 2 I]` (gate's first, then up's) and `b2 [E, H]`, f32 in host memory, each absent where
/// the address is null, and with SwiGLU's parameters; there is no limit where it is 0.
///
/// # Safety
/// As [`expertile_mxfp4_layer`]; the biases have that many values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_mxfp4_layer_with(
    topk: usize,
    global_experts: usize,
    max_tokens: usize,
    w13: *const Mxfp4,
    w2: *const Mxfp4,
    b13: *const f32,
    b2: *const f32,
    alpha: f32,
    beta: f32,
    limit: f32,
) -> usize {
    // SAFETY: the caller's promise.
    let (w13, w2) = unsafe { (&*w13, &*w2) };
    let biases = [(b13, w13), (b2, w2)].map(|(bias, of)| {
        let values = of.weights.experts() * of.weights.n();
        // SAFETY: the caller's promise.
        (!bias.is_null()).then(|| unsafe { std::slice::from_raw_parts(bias, values) })
    });
    let activation = Activation::Swiglu { alpha, beta, limit: (limit != 0.0).then_some(limit) };
    hand_over(w13.layer(w2, (topk, global_experts, max_tokens), activation, biases))
}

impl Mxfp4 {
    /// The layer of these weights and GEMM 2's: experts per token, all experts there are, and the most tokens of a call.
    fn layer(
        &self,
        down: &Self,
        (topk, global_experts, max_tokens): (usize, usize, usize),
        activation: Activation,
        [b13, b2]: [Option<&[f32]>; 2],
    ) -> Result<Arc<Layer>> {
        let config = LayerConfig { activation, ..LayerConfig::new(topk, global_experts, self.rows) };
        let device = device()?;
        let shape = LayerShape::new(self.weights.k(), down.weights.k(), self.weights.experts())?;
        let biases = Biases::upload(&device, &shape, b13, b2)?;
        let weights = (self.weights.clone(), down.weights.clone());
        Ok(Arc::new(Layer::prepare_with_biases(&device, weights, biases, config, max_tokens)?))
    }
}

/// Weights that are on the device: e4m3, or bf16 where there are no scales.
///
/// # Safety
/// As [`Weights::from_device`].
unsafe fn on_device(sizes: (usize, usize, usize), values: u64, scales: u64) -> Result<Weights> {
    let format = if scales == 0 { WeightFormat::Bf16 } else { WeightFormat::E4m3 };
    // SAFETY: the caller's promise.
    unsafe { Weights::from_device(format, sizes, DevicePtr::new(values), optional(scales)) }
}

/// Prepares the whole layer of weights `[E, 2 I, H]` and `[E, H, I]` for calls of up to `max_tokens` tokens; weights
/// are e4m3, and so are the rows of the GEMMs, or both are bf16 where there are no scales; hidden states and output are
/// bf16, ids i32.
///
/// # Safety
/// The addresses are device memory of the sizes that `Weights` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_layer(
    hidden: usize,
    intermediate: usize,
    experts: usize,
    topk: usize,
    global_experts: usize,
    max_tokens: usize,
    w13: u64,
    w13_scales: u64,
    w2: u64,
    w2_scales: u64,
) -> usize {
    let make = || {
        let (up, down) = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate));
        // SAFETY: the caller's promise.
        let (w13, w2) = unsafe { (on_device(up, w13, w13_scales)?, on_device(down, w2, w2_scales)?) };
        let activations = if w13_scales == 0 { ActivationFormat::Bf16 } else { ActivationFormat::E4m3 };
        let config = LayerConfig::new(topk, global_experts, activations);
        Ok(Arc::new(Layer::prepare(&device()?, w13, w2, config, max_tokens)?))
    };
    hand_over(make())
}

/// Writes what a call of the layer does: bytes of workspace, alignment, launches, 1 if GEMM 1 has the activation
/// inside, each GEMM's kernel as [`words_of_kernel`], and 1 for each GEMM that reads the copy in e4m3; 1, or 0 on failure.
///
/// # Safety
/// `layer` came from [`expertile_layer`], `choice` holds sixteen.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_layer_choice(layer: *const Arc<Layer>, tokens: usize, choice: *mut usize) -> i32 {
    // SAFETY: the caller's promise.
    let (layer, choice) = unsafe { (&*layer, std::slice::from_raw_parts_mut(choice, 16)) };
    match layer.workspace_bytes(tokens).and_then(|bytes| Ok((bytes, layer.choice(tokens)?))) {
        Ok((bytes, found)) => {
            let inside = usize::from(found.activation_inside_gemm1);
            choice[..4].copy_from_slice(&[bytes, found.plan.alignment(), found.launches, inside]);
            choice[4..9].copy_from_slice(&words_of_kernel(found.gemm1));
            choice[9..14].copy_from_slice(&words_of_kernel(found.gemm2));
            choice[14..].copy_from_slice(&found.e4m3_copy.map(usize::from));
            1
        }
        Err(error) => {
            report(&error);
            0
        }
    }
}

/// Binds a call of the layer to addresses and makes its state.
///
/// # Safety
/// As [`expertile_layer_choice`]; the addresses are device memory of the sizes that `LayerCall` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_bind_layer(
    layer: *const Arc<Layer>,
    tokens: usize,
    x: u64,
    ids: u64,
    expert_map: u64,
    weights: u64,
    output: u64,
    workspace: u64,
) -> usize {
    // SAFETY: the caller's promise.
    let layer = unsafe { &*layer }.clone();
    let make = || {
        let workspace = DevicePtr::new(workspace);
        let state: DeviceBuffer = device()?.allocate(STATE_BYTES)?;
        // SAFETY: the state is new, and stream 0 always lives.
        unsafe { layer.initialise_state(Stream(0), state.ptr())? };
        let &LayerConfig { topk, global_experts, .. } = layer.config();
        let call = LayerCall {
            tokens,
            hidden_states: DeviceMatrix::row_major(DevicePtr::new(x), layer.shape().hidden()),
            routing: RoutingPtrs {
                ids: DeviceMatrix::row_major(DevicePtr::new(ids), topk),
                expert_map: optional(expert_map),
                global_experts,
            },
            topk_weights: DeviceMatrix::row_major(DevicePtr::new(weights), topk),
            output: DevicePtr::new(output),
            state: state.ptr(),
            workspace,
        };
        Ok(Bound::Layer { layer, call, _state: state })
    };
    hand_over(make())
}

/// Queues a bound step on a stream; 1, or 0 on failure.
///
/// # Safety
/// `bound` came from one of the functions above, its memory is live, and `stream` is a stream of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_launch(bound: *const Bound, stream: u64) -> i32 {
    let stream = Stream(stream);
    // SAFETY: the caller's promise.
    let queued = unsafe {
        match &*bound {
            Bound::QuantizePermute { step, call, .. } => step.launch(stream, call),
            Bound::Activate { step, call } => step.launch(stream, call),
            Bound::Unpermute { step, call } => step.launch(stream, call),
            Bound::Gemm { step, weights, operands } => step.launch(stream, &operands.call(weights)),
            Bound::Layer { layer, call, .. } => layer.launch(stream, call),
        }
    };
    match queued {
        Ok(()) => 1,
        Err(error) => {
            report(&error);
            0
        }
    }
}

/// Waits, and says what was wrong with the ids of a bound quantize + permute or layer; 1 if nothing.
///
/// # Safety
/// As [`expertile_launch`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn expertile_check(bound: *const Bound, stream: u64) -> i32 {
    // SAFETY: the caller's promise.
    let checked = unsafe {
        match &*bound {
            Bound::QuantizePermute { step, call, .. } => step.check(Stream(stream), call),
            Bound::Layer { layer, call, .. } => layer.check_launch(Stream(stream), call),
            _ => Ok(()),
        }
    };
    match checked {
        Ok(()) => 1,
        Err(error) => {
            report(&error);
            0
        }
    }
}
