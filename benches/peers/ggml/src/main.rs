//! Times an expert layer in ggml on the CPU, as llama.cpp builds it, and prints JSON.
//!
//! Two `ggml_mul_mat_id` (gate and up merged, then down) with `ggml_swiglu` between them, weights and sum after, f32
//! activations as ggml wants them, weights in bf16, q8_0 and MXFP4. Weights, tokens and routing are random; the routing of
//! a size stays the same over its repeats. Before it is timed, the layer's first columns are compared with plain
//! loops.
//!
//! `expertile-peer-ggml [--tokens 1,8,64,512] [--threads T] [--repeat N]`

use expertile_testkit::{Pattern, Random, unit_weights};
use llama_cpp_sys_2 as ggml;
use std::ffi::c_void;
use std::time::Instant;

const EXPERTS: usize = 128;
const TOPK: usize = 8;
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 768;

struct Arguments {
    tokens: Vec<usize>,
    threads: usize,
    repeat: usize,
}

fn arguments() -> Arguments {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let mut arguments = Arguments { tokens: vec![1, 8, 64, 512], threads, repeat: 9 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{word} {text} is not a number"));
        match word.as_str() {
            "--tokens" => arguments.tokens = value.split(',').map(number).collect(),
            "--threads" => arguments.threads = number(&value),
            "--repeat" => arguments.repeat = number(&value),
            _ => panic!("{word} is not one of --tokens, --threads, --repeat"),
        }
    }
    arguments
}

/// A ggml context and whatever was made in it.
struct Context(*mut ggml::ggml_context);

impl Context {
    fn new(bytes: usize) -> Self {
        let params = ggml::ggml_init_params { mem_size: bytes, mem_buffer: std::ptr::null_mut(), no_alloc: false };
        // SAFETY: no memory is passed in, so ggml allocates its own.
        let context = unsafe { ggml::ggml_init(params) };
        assert!(!context.is_null(), "ggml has no memory");
        Self(context)
    }

    fn tensor(&self, kind: ggml::ggml_type, shape: [usize; 3]) -> *mut ggml::ggml_tensor {
        let [a, b, c] = shape.map(|extent| extent as i64);
        // SAFETY: the context is alive and was given room for its tensors.
        unsafe { ggml::ggml_new_tensor_3d(self.0, kind, a, b, c) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_init`, and freed once.
        unsafe { ggml::ggml_free(self.0) }
    }
}

/// Writes a tensor's data; `values` must be of its element type and number.
fn fill<T: Copy>(tensor: *mut ggml::ggml_tensor, values: &[T]) {
    // SAFETY: the tensor's data is `ggml_nbytes` long, which is checked.
    unsafe {
        assert_eq!(ggml::ggml_nbytes(tensor), size_of_val(values));
        std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), (*tensor).data.cast::<u8>(), size_of_val(values));
    }
}

/// A value of bf16, so that the plain loops see what ggml sees.
fn to_bf16(value: f32) -> f32 {
    f32::from_bits(value.to_bits() & 0xffff_0000)
}

/// The same matrix for every expert: values do not matter here, memory does.
fn weights(context: &Context, kind: ggml::ggml_type, matrix: &[f32], rows: usize) -> *mut ggml::ggml_tensor {
    let cols = matrix.len() / rows;
    let tensor = context.tensor(kind, [cols, rows, EXPERTS]);
    // SAFETY: one expert's matrix takes an `EXPERTS`th of the tensor's bytes, and rows are whole blocks.
    unsafe {
        let bytes = ggml::ggml_nbytes(tensor) / EXPERTS;
        let data = (*tensor).data.cast::<u8>();
        ggml::ggml_quantize_chunk(
            kind,
            matrix.as_ptr(),
            data.cast::<c_void>(),
            0,
            rows as i64,
            cols as i64,
            std::ptr::null(),
        );
        for expert in 1..EXPERTS {
            std::ptr::copy_nonoverlapping(data, data.add(expert * bytes), bytes);
        }
    }
    tensor
}

/// What the layer reads besides its weights.
struct Input {
    hidden_states: Vec<f32>,
    ids: Vec<i32>,
    topk_weights: Vec<f32>,
}

impl Input {
    fn new(tokens: usize) -> Self {
        let mut random = Random::new(tokens as u64);
        let ids = Pattern::Even.ids(&mut random, [tokens, TOPK], EXPERTS, 0);
        Self {
            hidden_states: (0..tokens * HIDDEN).map(|_| random.uniform()).collect(),
            ids: ids.into_iter().map(|id| id as i32).collect(),
            topk_weights: vec![1.0 / TOPK as f32; tokens * TOPK],
        }
    }
}

struct Weights {
    w13: *mut ggml::ggml_tensor,
    w2: *mut ggml::ggml_tensor,
}

/// ggml's threads, kept from one run to the next.
struct Threads {
    pool: ggml::ggml_threadpool_t,
    count: i32,
}

impl Threads {
    fn new(count: i32) -> Self {
        // SAFETY: the parameters are ggml's own defaults.
        let pool = unsafe { ggml::ggml_threadpool_new(&mut ggml::ggml_threadpool_params_default(count)) };
        Self { pool, count }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_threadpool_new`, and freed once.
        unsafe { ggml::ggml_threadpool_free(self.pool) }
    }
}

/// Runs the layer `repeat` times: the times in seconds, and the output `[tokens, HIDDEN]`.
fn run(weights: &Weights, input: &Input, threads: &Threads, repeat: usize) -> (Vec<f64>, Vec<f32>) {
    let tokens = input.ids.len() / TOPK;
    let rows = tokens * TOPK;
    let context = Context::new((64 << 20) + rows * 4 * (4 * INTERMEDIATE + 4 * HIDDEN));
    let x = context.tensor(ggml::GGML_TYPE_F32, [HIDDEN, 1, tokens]);
    let ids = context.tensor(ggml::GGML_TYPE_I32, [TOPK, tokens, 1]);
    let topk_weights = context.tensor(ggml::GGML_TYPE_F32, [1, TOPK, tokens]);
    fill(x, &input.hidden_states);
    fill(ids, &input.ids);
    fill(topk_weights, &input.topk_weights);
    // SAFETY: all tensors live in contexts that outlive the graph, shapes fit each other, and the work buffer is as
    // long as the plan asks for.
    unsafe {
        let c = context.0;
        let gate_up = ggml::ggml_mul_mat_id(c, weights.w13, x, ids);
        let rows = ggml::ggml_mul_mat_id(c, weights.w2, ggml::ggml_swiglu(c, gate_up), ids);
        let rows = ggml::ggml_mul(c, rows, topk_weights);
        let slot =
            |slot| ggml::ggml_view_2d(c, rows, HIDDEN as i64, tokens as i64, (*rows).nb[2], slot * (*rows).nb[1]);
        let sum = (1..TOPK).fold(slot(0), |sum, at| ggml::ggml_add(c, sum, slot(at)));
        let graph = ggml::ggml_new_graph(c);
        ggml::ggml_build_forward_expand(graph, sum);
        let mut plan = ggml::ggml_graph_plan(graph, threads.count, threads.pool);
        let mut work = vec![0u8; plan.work_size];
        plan.work_data = work.as_mut_ptr();
        let mut times = Vec::new();
        for _ in 0..repeat {
            let start = Instant::now();
            assert_eq!(ggml::ggml_graph_compute(graph, &mut plan), ggml::GGML_STATUS_SUCCESS);
            times.push(start.elapsed().as_secs_f64());
        }
        let output = std::slice::from_raw_parts((*sum).data.cast::<f32>(), tokens * HIDDEN).to_vec();
        (times, output)
    }
}

/// Compares a token's first columns with plain loops over the one expert that all experts are.
fn check(w13: &[f32], w2: &[f32], input: &Input, output: &[f32], tolerance: f64) {
    let x = &input.hidden_states[..HIDDEN];
    let dot = |row: &[f32], x: &[f64]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let gate_up: Vec<f64> = w13.chunks_exact(HIDDEN).map(|row| dot(row, &x)).collect();
    let activated: Vec<f64> =
        (0..INTERMEDIATE).map(|i| gate_up[i] / (1.0 + (-gate_up[i]).exp()) * gate_up[INTERMEDIATE + i]).collect();
    let expected: Vec<f64> = w2.chunks_exact(INTERMEDIATE).take(64).map(|row| dot(row, &activated)).collect();
    let size = expected.iter().fold(0.0, |size: f64, value| size.max(value.abs()));
    for (column, (&actual, expected)) in output.iter().zip(expected).enumerate() {
        let error = (f64::from(actual) - expected).abs() / size;
        assert!(error < tolerance, "column {column} is {actual}, expected {expected}");
    }
}

fn median_milliseconds(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2] * 1e3
}

fn main() {
    let arguments = arguments();
    let threads = Threads::new(arguments.threads as i32);
    let mut random = Random::new(1);
    let w13 = unit_weights(&mut random, [1, 2 * INTERMEDIATE, HIDDEN], to_bf16);
    let w2 = unit_weights(&mut random, [1, HIDDEN, INTERMEDIATE], to_bf16);
    let mut sizes: Vec<String> = arguments.tokens.iter().map(|tokens| format!("\"tokens\": {tokens}")).collect();
    // Four bits round by an eighth of a value, and a layer multiplies three of them.
    let kinds = [
        ("bf16", ggml::GGML_TYPE_BF16, 0.03),
        ("q8_0", ggml::GGML_TYPE_Q8_0, 0.06),
        ("mxfp4", ggml::GGML_TYPE_MXFP4, 0.4),
    ];
    for (name, kind, tolerance) in kinds {
        let context = Context::new((64 << 20) + EXPERTS * 2 * (w13.len() + w2.len()));
        let packed =
            Weights { w13: weights(&context, kind, &w13, 2 * INTERMEDIATE), w2: weights(&context, kind, &w2, HIDDEN) };
        for (size, &tokens) in sizes.iter_mut().zip(&arguments.tokens) {
            let input = Input::new(tokens);
            let (_, output) = run(&packed, &input, &threads, 2);
            check(&w13, &w2, &input, &output, tolerance);
            let (times, _) = run(&packed, &input, &threads, arguments.repeat);
            size.push_str(&format!(", \"{name}_ms\": {:.3}", median_milliseconds(times)));
        }
    }
    let sizes: Vec<String> = sizes.iter().map(|size| format!("    {{{size}}}")).collect();
    println!("{{\n  \"threads\": {},\n  \"sizes\": [\n{}\n  ]\n}}", arguments.threads, sizes.join(",\n"));
}
