//! Every way to cut a layer's GEMMs, timed in turns on one routing: what a choice of tiles is judged by.

use super::clock::Clock;
use super::random_bytes;
use super::steps::repeat;
use crate::activation::Activation;
use crate::cuda::prepare::each_at_once;
use crate::cuda::{
    ALIGNMENT, Activate, ActivateCall, ActivateConfig, Device, DeviceBuffer, DeviceMatrix, Gemm, GemmCall, GemmConfig,
    GemmKernel, LayoutPtrs, ROW_TILES, Route, RouteCall, RouteConfig, RoutingPtrs, RowEnds, STATE_BYTES, Stream,
    Weights, route,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result, checked_mul};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK, WeightFormat};
use crate::layer::{LayerShape, Stage};
use crate::mxfp4::GROUP;
use crate::plan::{Plan, TokenExperts};
use crate::quantize::ScaleFormat;
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::Hash;

/// Weights are read from as many different places as have that many bytes, several times the cache.
const ROTATED_BYTES: usize = 200 << 20;
const MOST_ROTATED: usize = 8;
/// Bytes of random values that operands repeat.
const PERIOD: usize = 32 << 20;
/// Rows of every result that are compared.
const COMPARED_ROWS: usize = 48;
/// Rows of an expert over rows of a tile, above which a tile is not tried: its weights would be read that often.
const MOST_TILES_OF_AN_EXPERT: usize = 24;
const POISON: u8 = 0xa5;

/// One layer call's routing.
#[derive(Debug, Clone, Copy)]
pub struct TileInputs<'a> {
    /// The layer.
    pub shape: LayerShape,
    /// What weights are made of.
    pub format: WeightFormat,
    /// What rows are made of.
    pub activation_format: ActivationFormat,
    /// The local expert of every slot that has one, in the order of the slots.
    pub experts: &'a [i32],
    /// Runs of each tile whose bits are compared, at least 1.
    pub same: usize,
}

/// How long a GEMM takes, cut in one way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TileTime {
    /// [`Stage::Gemm1`] or [`Stage::Gemm2`].
    pub gemm: Stage,
    /// How it is cut.
    pub kernel: GemmKernel,
    /// Whether the activation is inside.
    pub activated: bool,
    /// Seconds of one of many calls, weights not in the cache.
    pub seconds: f64,
}

/// The GEMMs of a call, cut in every way.
#[derive(Debug, Clone, PartialEq)]
pub struct TileTimes {
    /// Seconds of an activation that is not inside GEMM 1.
    pub activation_seconds: f64,
    /// Every way.
    pub gemms: Vec<TileTime>,
}

/// What weights and rows are made of.
type Formats = (WeightFormat, ActivationFormat);

/// A tile of one pair of formats, and whether the activation is inside.
type Way = (Formats, GemmKernel, bool);

/// Everything that is compiled, for any number of calls.
#[derive(Debug)]
pub struct TileBench<'a> {
    device: &'a Device,
    /// By row tile: one kernel.
    routes: HashMap<usize, Route>,
    gemms: HashMap<Way, Gemm>,
    /// By the format of the rows that they leave, and the intermediate size.
    activations: HashMap<(ActivationFormat, usize), Activate>,
}

impl<'a> TileBench<'a> {
    /// Compiles (or loads) every tile of the layers' formats, and the activations of their formats and intermediate
    /// sizes.
    ///
    /// # Errors
    /// As [`Gemm::prepare`], [`Activate::prepare`] and [`Route::prepare`].
    pub fn prepare(device: &'a Device, layers: &[(WeightFormat, ActivationFormat, usize)]) -> Result<Self> {
        let mut ways: Vec<Way> = Vec::new();
        for formats in distinct(layers.iter().map(|&(weights, rows, _)| (weights, rows))) {
            let split = GemmKernel::all_split().filter(|_| !formats.0.has_groups());
            for kernel in GemmKernel::all(formats.0).into_iter().chain(split) {
                ways.push((formats, kernel, false));
                if formats.0 == WeightFormat::E4m3 && kernel.takes_activation() {
                    ways.push((formats, kernel, true));
                }
            }
        }
        let gemms = each_at_once(&ways, |((format, activation_format), kernel, activated)| {
            let activation = activated.then(Activation::default);
            Gemm::prepare(device, GemmConfig { format, activation_format, kernel, activation })
        })?;
        let layers = distinct(layers.iter().map(|&(_, rows, intermediate)| (rows, intermediate)));
        let activations = each_at_once(&layers, |(rows, intermediate)| {
            let format = (rows == ActivationFormat::E4m3).then_some(ScaleFormat::HOPPER);
            Activate::prepare(device, ActivateConfig { intermediate, activation: Activation::default(), format })
        })?;
        let routes = ROW_TILES.map(|row_tile| {
            Ok((row_tile, Route::prepare(device, RouteConfig { topk: 1, ids: Dtype::I32, row_tile })?))
        });
        Ok(Self { device, routes: routes.into_iter().collect::<Result<_>>()?, gemms, activations })
    }

    /// Times every tile, after its results, in as many runs as [`TileInputs::same`] says, were found to be those of the
    /// first one, bit for bit; and where there are few tiles, what it takes to split K, whose results are not.
    ///
    /// # Errors
    /// [`Error::Value`] for no slots, no run to compare or results that differ; whatever preparing and launching the
    /// steps may refuse.
    #[allow(unsafe_code)]
    pub fn time(&self, inputs: &TileInputs<'_>) -> Result<TileTimes> {
        let TileInputs { shape, format, activation_format, experts, same } = *inputs;
        if same == 0 {
            return Err(Error::value("same", 0, "at least 1 run of each tile"));
        }
        let Some(activate) = self.activations.get(&(activation_format, shape.intermediate())) else {
            return Err(Error::value("intermediate", shape.intermediate(), "one that was prepared"));
        };
        let call = Call::new(self, inputs)?;
        let clock = Clock::new(self.device)?;
        // SAFETY: `call` owns every buffer, each as large as its step asks, and outlives the clock's waits.
        let activation_seconds = clock.graph_and_eager(|stream| unsafe { activate.launch(stream, &call.activate) })?.0;
        let active = experts.iter().collect::<BTreeSet<_>>().len();
        let mut gemms = Vec::new();
        for (gemm, n, k) in [
            (Stage::Gemm1, 2 * shape.intermediate(), shape.hidden()),
            (Stage::Gemm2, shape.hidden(), shape.intermediate()),
        ] {
            let mut ways: Vec<_> = self
                .gemms
                .iter()
                .filter(|((formats, kernel, activated), _)| {
                    let splits = kernel.splits();
                    let fits =
                        !activated || (gemm == Stage::Gemm1 && shape.intermediate().is_multiple_of(WEIGHT_BLOCK));
                    let few = active * n.div_ceil(128) * splits <= 2 * self.device.info().multiprocessors as usize;
                    let splits = splits == 1 || (few && splits * WEIGHT_BLOCK < k);
                    *formats == (format, activation_format)
                        && fits
                        && splits
                        && call.layouts.contains_key(&kernel.row_tile())
                })
                .collect();
            ways.sort_by_key(|((_, kernel, activated), _)| (*activated, kernel.splits(), *kernel));
            let sets = call.weights(self.device, inputs, (n, k))?;
            let mut first = HashMap::new();
            for _ in 0..same {
                call.compare(self.device, &ways, &sets[0], n, &mut first)?;
            }
            let next = Cell::new(0);
            let works: Vec<_> = ways
                .iter()
                .map(|((_, kernel, activated), gemm)| {
                    let (sets, next, call) = (&sets, &next, &call);
                    move |stream| {
                        next.set(next.get() + 1);
                        let weights = &sets[next.get() % sets.len()];
                        // SAFETY: as above.
                        unsafe { gemm.launch(stream, &call.gemm(kernel, *activated, weights)) }
                    }
                })
                .collect();
            let seconds = clock.in_turns(&works)?;
            let times = ways.iter().zip(seconds);
            gemms.extend(times.map(|(&(&(_, kernel, activated), _), seconds)| TileTime {
                gemm,
                kernel,
                activated,
                seconds,
            }));
        }
        Ok(TileTimes { activation_seconds, gemms })
    }
}

/// Each of several things once.
fn distinct<T: Eq + Hash + Copy>(things: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen = HashSet::new();
    things.filter(|&thing| seen.insert(thing)).collect()
}

/// Device memory of one call, with a layout for each row tile.
struct Call {
    plan: Plan,
    layouts: HashMap<usize, LayoutPtrs>,
    /// A live row of each of several experts.
    compared: Vec<usize>,
    activate: ActivateCall,
    rows: DeviceBuffer,
    row_scales: DeviceBuffer,
    out: DeviceBuffer,
    out_scales: DeviceBuffer,
    values: DeviceBuffer,
    /// f32 of e4m3, bytes of mxfp4, bf16 of int4.
    value_scales: DeviceBuffer,
    _memory: Vec<DeviceBuffer>,
}

impl Call {
    #[allow(unsafe_code)]
    fn new(bench: &TileBench<'_>, inputs: &TileInputs<'_>) -> Result<Self> {
        let TileInputs { shape, format, activation_format, experts, .. } = *inputs;
        let device = bench.device;
        let (hidden, intermediate, local) = (shape.hidden(), shape.intermediate(), shape.local_experts());
        if experts.is_empty() {
            return Err(Error::value("experts", 0, "at least one slot, to time tiles"));
        }
        let plan = Plan::tight(experts.len(), 1, local, ALIGNMENT, TokenExperts::MayRepeat)?;
        let m_sum = plan.m_sum();
        let mut counts = vec![0usize; local];
        for &expert in experts {
            let expert = usize::try_from(expert).ok().filter(|&expert| expert < local);
            let Some(expert) = expert else { return Err(Error::value("experts", 0, format!("ids below {local}"))) };
            counts[expert] += 1;
        }
        let ids = device.upload(experts)?;
        let matrix = DeviceMatrix::row_major(ids.ptr().cast(), 1);
        let routing = RoutingPtrs { ids: matrix, expert_map: None, global_experts: local };
        let state: DeviceBuffer = device.allocate(STATE_BYTES)?;
        let workspace: DeviceBuffer =
            device.allocate(route::workspace_bytes(&plan, device.info().multiprocessors as usize)?)?;
        let most = counts.iter().copied().max().unwrap_or(0);
        let (mut layouts, mut memory) = (HashMap::new(), Vec::new());
        for (&row_tile, route) in &bench.routes {
            let slots_of_tile = row_tile * MOST_TILES_OF_AN_EXPERT;
            if row_tile < 128 && most > slots_of_tile && experts.len() > slots_of_tile * local / 8 {
                continue;
            }
            let lists: DeviceBuffer = device.allocate(LayoutPtrs::space_bytes(&plan, row_tile)?)?;
            let layout = LayoutPtrs::carve(lists.ptr(), &plan, row_tile)?;
            let call = RouteCall { plan, routing, layout, state: state.ptr(), workspace: workspace.ptr() };
            // SAFETY: every buffer is as large as its step says and outlives the wait of `check`.
            unsafe {
                route.initialise_state(Stream(0), state.ptr())?;
                route.launch(Stream(0), &call)?;
                route.check(Stream(0), &call)?;
            }
            layouts.insert(row_tile, layout);
            memory.push(lists);
        }
        let mut compared = Vec::new();
        let (mut start, active) = (0, counts.iter().filter(|&&count| count > 0).count());
        for (index, &count) in counts.iter().filter(|&&count| count > 0).enumerate() {
            if index * COMPARED_ROWS / active != (index + 1) * COMPARED_ROWS / active || active <= COMPARED_ROWS {
                compared.extend([start, start + count / 2, start + count - 1]);
            }
            start += count.next_multiple_of(ALIGNMENT);
        }

        let widest = hidden.max(intermediate);
        let values = match activation_format {
            ActivationFormat::E4m3 => WeightFormat::E4m3,
            ActivationFormat::Bf16 => WeightFormat::Bf16,
        };
        let rows = random(device, values, checked_mul("rows", m_sum, widest)?)?;
        let row_scales = scales(device, ScaleFormat::HOPPER.words(m_sum, widest.next_multiple_of(WEIGHT_BLOCK))?)?;
        let out: DeviceBuffer = device.allocate(checked_mul("results", 2 * m_sum, hidden.max(2 * intermediate))?)?;
        out.fill(0)?;
        let out_scales =
            scales(device, ScaleFormat::HOPPER.words(m_sum, intermediate.next_multiple_of(WEIGHT_BLOCK))?)?;
        let activated: DeviceBuffer = device.allocate(checked_mul("activated rows", 2 * m_sum, intermediate)?)?;
        let any = layouts.values().next().copied().unwrap_or_default();
        let activate = ActivateCall {
            gate_up: out.ptr().cast(),
            psum: any.psum,
            out: activated.ptr(),
            scales: Some(out_scales.ptr()),
            local_experts: local,
            alignment: plan.alignment(),
            m_sum,
        };
        memory.extend([ids.into_bytes(), state, workspace, activated]);
        // Weights of either GEMM, and as many again of those that a call reads, or as one expert has.
        let expert = checked_mul("an expert's weights", 2 * intermediate, hidden)?;
        let (places, step) = places(expert * format.bits() / 8, local, active);
        let values = random(device, format, (local + (places - 1) * step) * expert)?;
        let value_scales = match format {
            // GEMM 2 has weights in up to twice as many places, at half the size.
            WeightFormat::Mxfp4 => exponents(device, (local + 2 * places * step) * expert / GROUP)?,
            WeightFormat::Int4 => random(device, WeightFormat::Bf16, (local + 2 * places * step) * expert / GROUP)?,
            WeightFormat::E4m3 | WeightFormat::Bf16 => {
                let blocks = checked_mul(
                    "scales",
                    2 * intermediate.div_ceil(WEIGHT_BLOCK) + 1,
                    hidden.div_ceil(WEIGHT_BLOCK) + 1,
                )?;
                scales(device, (local + 2 * places * step) * blocks)?
            }
        };
        Ok(Self {
            plan,
            layouts,
            compared,
            activate,
            rows,
            row_scales,
            out,
            out_scales,
            values,
            value_scales,
            _memory: memory,
        })
    }

    /// The weights of a GEMM, in several places.
    #[allow(unsafe_code)]
    fn weights(&self, device: &Device, inputs: &TileInputs<'_>, (n, k): (usize, usize)) -> Result<Vec<Weights>> {
        let TileInputs { shape, format, activation_format, experts: ids, .. } = *inputs;
        let active = ids.iter().collect::<BTreeSet<_>>().len();
        let experts = shape.local_experts();
        let (places, step) = places(n * k * format.bits() / 8, experts, active);
        let sizes = (experts + (places - 1) * step, n, k);
        let (values, scales) = (self.values.ptr(), self.value_scales.ptr());
        // SAFETY: the buffers have room for every place of the larger GEMM's, and outlive the values.
        let all = unsafe {
            match format {
                WeightFormat::Mxfp4 => Weights::from_device_mxfp4(sizes, values, scales)?,
                WeightFormat::Int4 => Weights::from_device_int4(sizes, values, (Dtype::Bf16, scales))?,
                WeightFormat::E4m3 => Weights::from_device(format, sizes, values, Some(scales.cast()))?,
                WeightFormat::Bf16 => Weights::from_device(format, sizes, values, None)?,
            }
        };
        let all = all.arrange(device, activation_format)?;
        Ok((0..places).map(|place| all.of_experts(place * step..place * step + experts)).collect())
    }

    fn gemm<'w>(&self, kernel: &GemmKernel, activated: bool, weights: &'w Weights) -> GemmCall<'w> {
        let layout = &self.layouts[&kernel.row_tile()];
        GemmCall {
            weights,
            rows: self.rows.ptr(),
            scales: Some(self.row_scales.ptr().cast()),
            out: self.out.ptr(),
            bias: None,
            out_scales: activated.then(|| self.out_scales.ptr().cast()),
            header: layout.header,
            worklist: layout.worklist,
            ends: RowEnds::Psum(layout.psum),
            m_sum: self.plan.m_sum(),
        }
    }

    /// Fails unless every way gives the first one's results, with the activation inside and without. `first` has them,
    /// by whether the activation is inside.
    #[allow(unsafe_code)]
    fn compare(
        &self,
        device: &Device,
        ways: &[(&Way, &Gemm)],
        weights: &Weights,
        n: usize,
        first: &mut HashMap<bool, Vec<u8>>,
    ) -> Result<()> {
        for ((_, kernel, activated), gemm) in ways.iter().filter(|((_, kernel, _), _)| kernel.splits() == 1) {
            let row_bytes = if *activated { n / 2 } else { 2 * n };
            self.out.fill(POISON)?;
            let mut found = vec![0u8; self.compared.len() * row_bytes];
            // SAFETY: every buffer is the call's own, and outlives the wait.
            unsafe {
                gemm.launch(Stream(0), &self.gemm(kernel, *activated, weights))?;
                device.synchronize(Stream(0))?;
            }
            for (&row, found) in self.compared.iter().zip(found.chunks_mut(row_bytes)) {
                self.out.download_at(row * row_bytes, found)?;
            }
            let expected = first.entry(*activated).or_insert_with(|| found.clone());
            if *expected != found {
                let differing = expected.iter().zip(&found).filter(|(a, b)| a != b).count();
                let (k, experts) = (weights.k(), weights.experts());
                let expected = format!(
                    "the bits of the first tile, in {kernel}, activated {activated}, N {n}, K {k}, {experts} experts"
                );
                return Err(Error::value("differing bytes", differing, expected));
            }
        }
        Ok(())
    }
}

/// In how many places a GEMM's weights should be, and the experts from one to the next: all of them, or one, where a
/// call reads few.
fn places(expert_bytes: usize, experts: usize, active: usize) -> (usize, usize) {
    let places = ROTATED_BYTES.div_ceil(expert_bytes * active.max(1)).clamp(1, MOST_ROTATED);
    (places, if active * 4 > experts { experts } else { 1 })
}

/// So many random values.
fn random(device: &Device, format: WeightFormat, count: usize) -> Result<DeviceBuffer> {
    let bytes = checked_mul("bits", count, format.bits())? / 8;
    let period = PERIOD.min(bytes.next_multiple_of(8)) * 8 / format.bits();
    let period = device.upload(&random_bytes(format, period))?;
    let buffer: DeviceBuffer = device.allocate(bytes)?;
    repeat(device, period.ptr(), period.bytes().min(bytes), buffer.ptr(), bytes)?;
    Ok(buffer)
}

/// So many powers of two, as mxfp4's scales, near enough to each other to be folded into the values.
fn exponents(device: &Device, count: usize) -> Result<DeviceBuffer> {
    repeated(device, count, |i| 116 + (i * 37 % 101 % 8) as u8)
}

/// So many scales, all different from their neighbours.
fn scales(device: &Device, count: usize) -> Result<DeviceBuffer> {
    repeated(device, count, |i| 0.5 + (i * 37 % 101) as f32 / 101.0)
}

/// So many values, of which the first few are made and the others repeat them.
fn repeated<T: bytemuck::Pod>(device: &Device, count: usize, value: impl Fn(usize) -> T) -> Result<DeviceBuffer> {
    let period = device.upload(&(0..count.clamp(1, 1 << 20)).map(value).collect::<Vec<_>>())?;
    let buffer: DeviceBuffer = device.allocate(size_of::<T>() * count.max(1))?;
    repeat(device, period.ptr().cast(), period.bytes(), buffer.ptr(), buffer.bytes())?;
    Ok(buffer)
}
