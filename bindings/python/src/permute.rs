//! Rows to their place.

use crate::array::{Apart, Array, Element};
use crate::autograd::written;
use crate::cuda;
use crate::error::{exception, optional_size, size};
use crate::limits;
use crate::plan::{counts, layout_words, parse_rule, token_experts};
use crate::pool::{cpu, work};
use crate::tensor::{self, Form};
use expertile::cpu::{self, RowScales};
use expertile::{
    Error, Group, Layout, MatrixRef, Padding, Plan, Routing, ScaleFormat, ScaleLayout, ScaleRounding, ScalesMut,
    TopkIds,
};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use std::ops::Range;

/// `topk_ids` and what they are read with.
pub(crate) struct Ids<'py> {
    pub(crate) ids: Array<'py>,
    pub(crate) map: Option<Array<'py>>,
    pub(crate) local_experts: usize,
}

impl<'py> Ids<'py> {
    pub(crate) fn new(
        topk_ids: &Bound<'py, PyAny>,
        expert_map: Option<&Bound<'py, PyAny>>,
        local_experts: &Bound<'py, PyAny>,
    ) -> PyResult<Self> {
        let ids = Self {
            ids: Array::new("topk_ids", topk_ids)?,
            map: Array::optional("expert_map", expert_map)?,
            local_experts: size("local_experts", local_experts)?,
        };
        if let [tokens, topk] = *ids.ids.shape() {
            limits::slots(tokens, topk)?;
        }
        Ok(ids)
    }

    fn dtype_error(&self) -> PyErr {
        self.ids.dtype_error("int32 or int64")
    }

    pub(crate) fn arrays(&self) -> [Option<&Array<'py>>; 2] {
        [Some(&self.ids), self.map.as_ref()]
    }

    /// Writes how many rows each expert has, a stretch of tokens at a time.
    fn count(&self, py: Python<'_>, counts: &mut [i32]) -> PyResult<()> {
        /// How much is copied at a time.
        const SLOTS_AT_ONCE: usize = 1 << 22;
        let (tokens, topk) = self.ids.matrix_shape("two dimensions")?;
        limits::at_most("local_experts", self.local_experts, limits::EXPERTS)?;
        if counts.len() < self.local_experts {
            let (len, needed) = (counts.len(), self.local_experts);
            return Err(PyValueError::new_err(format!("out holds {len} elements, expected at least {needed}")));
        }
        let at_once = (SLOTS_AT_ONCE / topk.max(1)).max(1);
        let mut sums: Vec<i32> = limits::vec("out", self.local_experts)?;
        let mut counted: Vec<i32> = limits::vec("out", self.local_experts)?;
        sums.resize(self.local_experts, 0);
        counted.resize(self.local_experts, 0);
        let map = self.map_list(py)?;
        // Also where there are no tokens: what else is wrong is said all the same.
        for first in (0..tokens.max(1)).step_by(at_once) {
            self.routing_of(py, first.min(tokens)..tokens.min(first + at_once), map.as_deref(), |routing| {
                work(py, || routing.count_expert_num_tokens(&mut counted).map_err(exception))
            })?;
            for (sum, count) in sums.iter_mut().zip(&counted) {
                *sum += count;
            }
        }
        counts[..self.local_experts].copy_from_slice(&sums);
        Ok(())
    }

    /// Checks a copy of the ids and hands the routing to `then`.
    pub(crate) fn routing<R>(&self, py: Python<'_>, then: impl FnOnce(Routing<'_>) -> PyResult<R>) -> PyResult<R> {
        let (tokens, _) = self.ids.matrix_shape("two dimensions")?;
        self.routing_of(py, 0..tokens, self.map_list(py)?.as_deref(), then)
    }

    /// A copy of the map.
    pub(crate) fn map_list(&self, py: Python<'_>) -> PyResult<Option<Vec<i32>>> {
        self.map.as_ref().map(|map| map.copied_list(py)).transpose()
    }

    /// The same as [`Ids::routing`] for some of the tokens, by a copy of the map.
    pub(crate) fn routing_of<R>(
        &self,
        py: Python<'_>,
        tokens: Range<usize>,
        map: Option<&[i32]>,
        then: impl FnOnce(Routing<'_>) -> PyResult<R>,
    ) -> PyResult<R> {
        let (_, topk) = self.ids.matrix_shape("two dimensions")?;
        let (first, len, experts) = (tokens.start, tokens.len(), self.local_experts);
        let route = |ids: TopkIds<'_>| {
            let of_all = |error| match error {
                Error::ExpertId { token, slot, id, limit } => Error::ExpertId { token: token + first, slot, id, limit },
                other => other,
            };
            let routing = || Routing::new(ids, experts, map).map_err(|error| exception(of_all(error)));
            then(work(py, routing)?)
        };
        match self.ids.element() {
            Element::I32 => route(TopkIds::I32(copy_of(&self.ids.copied_rows(py, tokens)?, len, topk)?)),
            Element::I64 => route(TopkIds::I64(copy_of(&self.ids.copied_rows(py, tokens)?, len, topk)?)),
            _ => Err(self.dtype_error()),
        }
    }
}

fn copy_of<T: Copy>(copy: &[T], rows: usize, cols: usize) -> PyResult<MatrixRef<'_, T>> {
    MatrixRef::new(copy, rows, cols).map_err(exception)
}

/// Where a layout's lists go, and how many rows it may have.
pub(crate) struct Place<'py> {
    pub(crate) ids: Ids<'py>,
    pub(crate) plan: Plan,
    pub(crate) lists: Array<'py>,
}

impl<'py> Place<'py> {
    /// Without `m_sum`, as many rows as any routing can need; without `lists`, some on the device of `inputs` and ids.
    fn new(
        py: Python<'py>,
        inputs: [Option<&Array<'py>>; 2],
        ids: Ids<'py>,
        alignment: &Bound<'py, PyAny>,
        m_sum: Option<&Bound<'py, PyAny>>,
        distinct: bool,
        lists: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let ([first, second], [id_list, map]) = (inputs, ids.arrays());
        let device = Array::common_device(&[first, second, id_list, map])?;
        let (tokens, topk) = ids.ids.matrix_shape("two dimensions")?;
        let (experts, alignment) = (ids.local_experts, size("alignment", alignment)?);
        limits::at_most("local_experts", experts, limits::EXPERTS)?;
        let plan = match optional_size("m_sum", m_sum)? {
            Some(m_sum) => Plan::with_m_sum(tokens, topk, experts, alignment, m_sum),
            None => Plan::tight(tokens, topk, experts, alignment, token_experts(distinct)),
        };
        let plan = plan.map_err(exception)?;
        let form = || Ok(Form::list(Element::I32, layout_words(&plan)?));
        let lists = tensor::given_or_made(py, "layout", lists, device, form)?;
        Ok(Self { ids, plan, lists })
    }

    fn m_sum(&self) -> usize {
        self.plan.m_sum()
    }

    fn made(self) -> Made<'py> {
        let Self { ids: _, plan, lists } = self;
        let (experts, alignment) = (plan.local_experts(), plan.alignment());
        (lists.into_object(), plan.tokens(), plan.topk(), experts, alignment, plan.m_sum())
    }

    /// `H`, of rows that are one to a token.
    fn hidden(&self, x: &Array<'_>) -> PyResult<usize> {
        let (_, hidden) = x.matrix_shape("two dimensions")?;
        x.require_shape(&[self.plan.tokens(), hidden])?;
        limits::at_most("hidden", hidden, limits::HIDDEN)?;
        Ok(hidden)
    }

    /// Builds the layout (which must have these counts, if some are given), hands it to `rows`, then writes the lists.
    ///
    /// It is built in memory of the call's own: the lists say where rows go, so nobody else may write them meanwhile, and
    /// the caller's are left as they were where something does not fit. `rows` gets the layout of some tokens at a time,
    /// and whether they are the last; in between the call looks whether it has been interrupted.
    fn layout(
        &self,
        py: Python<'_>,
        apart: Apart,
        expected_counts: Option<&[i32]>,
        values_of_token: usize,
        mut rows: impl FnMut(&Layout<'_>, Range<usize>, bool) -> PyResult<()>,
    ) -> PyResult<()> {
        let lists = self.lists.contiguous_mut::<i32>(apart)?;
        let words = Layout::space_len(&self.plan).map_err(exception)?;
        if lists.len() < words {
            let message = format!("layout holds {} elements, expected at least {words}", lists.len());
            return Err(PyValueError::new_err(message));
        }
        let mut space = limits::vec("layout", words)?;
        let plan = &self.plan;
        self.ids.routing(py, |routing| {
            let layout = work(py, || {
                space.resize(words, 0);
                let layout = Layout::build(plan, &routing, &mut space).map_err(exception)?;
                if let Some(expected) = expected_counts {
                    require_counts(expected, layout.expert_num_tokens())?;
                }
                Ok(layout)
            })?;
            let values = plan.topk().saturating_mul(values_of_token);
            for tokens in limits::stretches(plan.tokens(), values, 1) {
                let last = tokens.end == plan.tokens();
                rows(&layout.of_tokens(tokens.clone()), tokens, last)?;
                if !last {
                    py.check_signals()?;
                }
            }
            Ok(())
        })?;
        lists[..words].copy_from_slice(&space);
        Ok(())
    }
}

/// For a GPU: rows as they are, with their scales if there are any, and where they go.
pub(crate) struct Rows<'a> {
    pub(crate) x: &'a Array<'a>,
    pub(crate) out: &'a Array<'a>,
    pub(crate) scales: Option<(&'a Array<'a>, &'a Array<'a>, ScaleFormat)>,
    pub(crate) zero_padding: bool,
}

/// For a GPU: where the lists go that outlive a call; the others are only the call's.
pub(crate) struct Lists<'a> {
    pub(crate) psum: Option<&'a Array<'a>>,
    pub(crate) m_indices: Option<&'a Array<'a>>,
    pub(crate) inv_perm: &'a Array<'a>,
}

/// What a call that makes a layout says about it: its lists, and what Python's `Layout` takes besides, in its order.
type Made<'py> = (Bound<'py, PyAny>, usize, usize, usize, usize, usize);

/// Rows, their layout.
type MadeRows<'py> = (Bound<'py, PyAny>, Made<'py>);

/// Rows, scales (and the matrix to read them as, if they are flat), layout.
type MadeQuantized<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Option<ScaleMatrix>, Made<'py>);

/// Shape and strides of the matrix that a flat array of scales is read as.
type ScaleMatrix = ((usize, usize), (usize, usize));

fn require_counts(given: &[i32], counted: &[i32]) -> PyResult<()> {
    if given.len() != counted.len() {
        return Err(PyValueError::new_err(format!(
            "expert_num_tokens has shape [{}], expected [{}]",
            given.len(),
            counted.len()
        )));
    }
    match given.iter().zip(counted).position(|(given, counted)| given != counted) {
        Some(expert) => Err(PyValueError::new_err(format!(
            "expert_num_tokens[{expert}] is {}, expected {}, which is how often topk_ids names the expert",
            given[expert], counted[expert]
        ))),
        None => Ok(()),
    }
}

pub(crate) fn padding(zero_padding: bool) -> Padding {
    if zero_padding { Padding::Zero } else { Padding::Untouched }
}

/// The format of that name, group and rounding; by default a power of two only where the layout holds nothing else.
fn scale_format(layout: &str, group: &Bound<'_, PyAny>, power_of_two: Option<bool>) -> PyResult<ScaleFormat> {
    const LAYOUTS: [(&str, ScaleLayout); 3] = [
        ("row_major", ScaleLayout::RowMajor),
        ("mn_major", ScaleLayout::MnMajor),
        ("packed_ue8m0", ScaleLayout::PackedUe8m0),
    ];
    let group = Group::from_size(size("group", group)?).map_err(exception)?;
    let Some(&(_, layout)) = LAYOUTS.iter().find(|(name, _)| *name == layout) else {
        return Err(PyValueError::new_err(format!(
            "scale_layout is \"{layout}\", expected one of row_major, mn_major, packed_ue8m0"
        )));
    };
    let power_of_two = power_of_two.unwrap_or(layout == ScaleLayout::PackedUe8m0);
    let rounding = if power_of_two { ScaleRounding::PowerOfTwo } else { ScaleRounding::Exact };
    ScaleFormat::new(group, layout, rounding).map_err(exception)
}

/// Fails unless a scale array is flat, or a matrix with the strides that its format asks for, and large enough. The matrix
/// of a flat one.
fn require_scales(
    scales: &Array<'_>,
    format: ScaleFormat,
    m_sum: usize,
    hidden: usize,
) -> PyResult<Option<ScaleMatrix>> {
    let packed = format.layout() == ScaleLayout::PackedUe8m0;
    if scales.element() != if packed { Element::I32 } else { Element::F32 } {
        return Err(scales.dtype_error(if packed { "int32 for packed UE8M0 scales" } else { "float32" }));
    }
    let matrix = scale_matrix(format, m_sum, hidden)?;
    let ((rows, columns), (of_row, of_column)) = matrix;
    let flat = scales.shape().len() == 1;
    if flat {
        scales.require_strides(&[1])?;
    } else {
        scales.require_shape(&[rows, columns])?;
        scales.require_strides(&[of_row, of_column])?;
    }
    scales.require_span(format.words(m_sum, hidden).map_err(exception)?)?;
    Ok(flat.then_some(matrix))
}

fn scale_matrix(format: ScaleFormat, m_sum: usize, hidden: usize) -> PyResult<ScaleMatrix> {
    let groups = format.groups(hidden).map_err(exception)?;
    let column = m_sum.next_multiple_of(4);
    Ok(match format.layout() {
        ScaleLayout::RowMajor => ((m_sum, groups), (groups, 1)),
        ScaleLayout::MnMajor => ((m_sum, groups), (1, column)),
        ScaleLayout::PackedUe8m0 => ((m_sum, groups.div_ceil(4)), (1, column)),
    })
}

/// The words of a scale array that fits its format.
fn scale_memory<'a>(scales: &'a Array<'_>, apart: Apart) -> PyResult<ScalesMut<'a>> {
    match scales.element() {
        Element::I32 => Ok(ScalesMut::Ue8m0(scales.memory_mut(apart)?)),
        _ => Ok(ScalesMut::F32(scales.memory_mut(apart)?)),
    }
}

fn reborrowed<'s>(words: &'s mut ScalesMut<'_>) -> ScalesMut<'s> {
    match words {
        ScalesMut::F32(words) => ScalesMut::F32(words),
        ScalesMut::Ue8m0(words) => ScalesMut::Ue8m0(words),
    }
}

/// Fails unless rows quantized by others have scales `[M, H / group]` of the type that the format takes.
fn require_row_scales(x: &Array<'_>, x_scales: &Array<'_>, format: ScaleFormat) -> PyResult<()> {
    let (tokens, hidden) = x.matrix_shape("[M, H]")?;
    let (element, expected) = match format.layout() {
        ScaleLayout::PackedUe8m0 => (Element::U8, "uint8, for packed UE8M0"),
        _ => (Element::F32, "float32, or uint8 for packed UE8M0"),
    };
    if x_scales.element() != element {
        return Err(x_scales.dtype_error(expected));
    }
    x_scales.require_shape(&[tokens, format.groups(hidden).map_err(exception)?])
}

/// Fails unless `out` is contiguous, `[M_sum, H]` and of the elements of `like` (or e4m3 without one).
fn require_rows_out(out: &Array<'_>, m_sum: usize, hidden: usize, like: Option<&Array<'_>>) -> PyResult<()> {
    out.require_shape(&[m_sum, hidden])?;
    out.require_contiguous()?;
    let fits = match like {
        Some(x) => x.element() == out.element() || (x.item_bytes() == 1 && out.item_bytes() == 1),
        None => matches!(out.element(), Element::E4m3 | Element::U8 | Element::I8),
    };
    if fits { Ok(()) } else { Err(out.dtype_error(if like.is_some() { "that of x" } else { "float8_e4m3fn" })) }
}

/// `out`, or `[M_sum, H]` on the device of `x`.
fn rows_out<'py>(
    py: Python<'py>,
    out: Option<&Bound<'py, PyAny>>,
    x: &Array<'py>,
    element: Element,
    m_sum: usize,
    hidden: usize,
) -> PyResult<Array<'py>> {
    tensor::given_or_made(py, "out", out, x.device(), || Ok(Form::row_major(element, m_sum, hidden)))
}

/// `scales`, or new ones on the device of `x`: the matrix of their layout, or flat where a matrix would not own all words.
fn scales_out<'py>(
    py: Python<'py>,
    scales: Option<&Bound<'py, PyAny>>,
    x: &Array<'py>,
    format: ScaleFormat,
    m_sum: usize,
    hidden: usize,
) -> PyResult<Array<'py>> {
    tensor::given_or_made(py, "scales", scales, x.device(), || {
        let element = if format.layout() == ScaleLayout::PackedUe8m0 { Element::I32 } else { Element::F32 };
        if format.layout() == ScaleLayout::RowMajor || m_sum.is_multiple_of(4) {
            let (shape, strides) = scale_matrix(format, m_sum, hidden)?;
            return Ok(Form::matrix(element, shape, strides));
        }
        Ok(Form::list(element, format.words(m_sum, hidden).map_err(exception)?))
    })
}

/// Where quantized rows and their scales go: made where they are not handed in, and checked.
struct Quantized<'py> {
    out: Array<'py>,
    scales: Array<'py>,
    /// What flat scales are read as.
    matrix: Option<ScaleMatrix>,
    apart: Apart,
    device: Option<usize>,
}

impl<'py> Quantized<'py> {
    /// For rows `x` of `hidden` values, with the array (scales or weights) that goes with them.
    fn new(
        py: Python<'py>,
        place: &Place<'py>,
        (x, with_x, hidden): (&Array<'py>, Option<&Array<'py>>, usize),
        (element, format): (Element, ScaleFormat),
        out: Option<&Bound<'py, PyAny>>,
        scales: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let m_sum = place.m_sum();
        let out = rows_out(py, out, x, element, m_sum, hidden)?;
        let scales = scales_out(py, scales, x, format, m_sum, hidden)?;
        let [ids, map] = place.ids.arrays();
        let apart = Apart::check(&[&out, &scales, &place.lists], &[Some(x), with_x, ids, map])?;
        require_rows_out(&out, m_sum, hidden, None)?;
        let matrix = require_scales(&scales, format, m_sum, hidden)?;
        let all = [Some(x), with_x, ids, map, Some(&out), Some(&scales), Some(&place.lists)];
        let device = Array::common_device(&all)?;
        Ok(Self { out, scales, matrix, apart, device })
    }

    /// What a call returns that is done, or has failed: after an interruption rows that are done stay written.
    fn made(self, py: Python<'py>, place: Place<'py>, done: PyResult<()>) -> PyResult<MadeQuantized<'py>> {
        written(py, &[&self.out, &self.scales, &place.lists])?;
        done?;
        Ok((self.out.into_object(), self.scales.into_object(), self.matrix, place.made()))
    }
}

/// 4-byte words that the scales of `[m_sum, hidden]` take.
#[pyfunction]
pub(crate) fn scale_words(
    m_sum: &Bound<'_, PyAny>,
    hidden: &Bound<'_, PyAny>,
    scale_layout: &str,
    group: &Bound<'_, PyAny>,
) -> PyResult<usize> {
    let format = scale_format(scale_layout, group, None)?;
    format.words(size("m_sum", m_sum)?, size("hidden", hidden)?).map_err(exception)
}

/// Writes live rows per local expert to `out [E]`.
#[pyfunction]
pub(crate) fn count_expert_num_tokens(
    py: Python<'_>,
    topk_ids: &Bound<'_, PyAny>,
    expert_map: Option<&Bound<'_, PyAny>>,
    local_experts: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let out = Array::output("out", out)?;
    let apart = Apart::check(&[&out], &ids.arrays())?;
    let counts = out.contiguous_mut(apart)?;
    ids.count(py, counts)?;
    written(py, &[&out])
}

/// Writes a layout's lists.
#[pyfunction]
#[pyo3(signature = (topk_ids, expert_map, local_experts, alignment, m_sum, layout, *, distinct=true))]
pub(crate) fn build_layout<'py>(
    py: Python<'py>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<Made<'py>> {
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let place = Place::new(py, [None, None], ids, alignment, m_sum, distinct, layout)?;
    let [ids, map] = place.ids.arrays();
    let apart = Apart::check(&[&place.lists], &[ids, map])?;
    match Array::common_device(&[ids, map, Some(&place.lists)])? {
        Some(ordinal) => cuda::build_layout(py, ordinal, &place)?,
        None => place.layout(py, apart, None, 0, |_, _, _| Ok(()))?,
    }
    written(py, &[&place.lists])?;
    Ok(place.made())
}

/// `x [M, H]` to `out [M_sum, H]`, any element of 1, 2 or 4 bytes.
#[pyfunction]
#[pyo3(signature = (x, topk_ids, expert_map, local_experts, alignment, m_sum, expert_num_tokens, zero_padding, out, layout, *, distinct=true))]
pub(crate) fn permute_rows<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    expert_num_tokens: Option<&Bound<'py, PyAny>>,
    zero_padding: bool,
    out: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<MadeRows<'py>> {
    let x = Array::new("x", x)?;
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let place = Place::new(py, [Some(&x), None], ids, alignment, m_sum, distinct, layout)?;
    let hidden = place.hidden(&x)?;
    let out = rows_out(py, out, &x, x.element(), place.m_sum(), hidden)?;
    let [ids, map] = place.ids.arrays();
    let apart = Apart::check(&[&out, &place.lists], &[Some(&x), ids, map])?;
    require_rows_out(&out, place.m_sum(), hidden, Some(&x))?;
    let all = [Some(&x), ids, map, Some(&out), Some(&place.lists)];
    if let Some(ordinal) = Array::common_device(&all)? {
        let rows = Rows { x: &x, out: &out, scales: None, zero_padding };
        cuda::permute(py, ordinal, &place, &rows)?;
        written(py, &[&out, &place.lists])?;
        return Ok((out.into_object(), place.made()));
    }
    let given = expert_num_tokens.map(counts).transpose()?;
    let cpu = cpu()?;
    macro_rules! rows_of {
        ($type:ty) => {{
            let to = out.contiguous_mut::<$type>(apart)?;
            place.layout(py, apart, given.as_deref(), hidden, |layout, tokens, last| {
                let rows = x.matrix_rows::<$type>(tokens)?;
                let padding = padding(zero_padding && last);
                work(py, || cpu::permute_rows(&cpu, rows, layout, padding, to).map_err(exception))
            })
        }};
    }
    let done = match x.element() {
        Element::E4m3 | Element::U8 | Element::I8 => rows_of!(u8),
        Element::Bf16 => rows_of!(bf16),
        Element::F16 => rows_of!(f16),
        Element::F32 => rows_of!(f32),
        Element::I32 => rows_of!(i32),
        Element::E8m0 | Element::I64 | Element::Other => {
            Err(x.dtype_error("float8_e4m3fn, bfloat16, float16, float32, int32 or uint8"))
        }
    };
    // Also after an interruption, which leaves rows that are done.
    written(py, &[&out, &place.lists])?;
    done?;
    Ok((out.into_object(), place.made()))
}

/// e4m3 `x [M, H]` and its scales `[M, H / group]` to `out [M_sum, H]` and `scales`.
#[pyfunction]
#[pyo3(signature = (x, x_scales, topk_ids, expert_map, local_experts, alignment, m_sum, expert_num_tokens, group, scale_layout, zero_padding, out, scales, layout, *, distinct=true))]
pub(crate) fn permute_quantized<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    x_scales: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    expert_num_tokens: Option<&Bound<'py, PyAny>>,
    group: &Bound<'py, PyAny>,
    scale_layout: &str,
    zero_padding: bool,
    out: Option<&Bound<'py, PyAny>>,
    scales: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<MadeQuantized<'py>> {
    let (x, x_scales) = (Array::new("x", x)?, Array::new("x_scales", x_scales)?);
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let place = Place::new(py, [Some(&x), Some(&x_scales)], ids, alignment, m_sum, distinct, layout)?;
    let hidden = place.hidden(&x)?;
    let format = scale_format(scale_layout, group, None)?;
    require_row_scales(&x, &x_scales, format)?;
    let to = Quantized::new(py, &place, (&x, Some(&x_scales), hidden), (x.element(), format), out, scales)?;
    if let Some(ordinal) = to.device {
        let rows = Rows { x: &x, out: &to.out, scales: Some((&x_scales, &to.scales, format)), zero_padding };
        let done = cuda::permute(py, ordinal, &place, &rows);
        return to.made(py, place, done);
    }
    let given = expert_num_tokens.map(counts).transpose()?;
    let mut words = scale_memory(&to.scales, to.apart)?;
    let packed = match x_scales.element() {
        Element::F32 => false,
        Element::U8 => true,
        _ => return Err(x_scales.dtype_error("float32, or uint8 for packed UE8M0")),
    };
    let out = to.out.contiguous_mut(to.apart)?;
    let cpu = cpu()?;
    let done = place.layout(py, to.apart, given.as_deref(), hidden, |layout, tokens, last| {
        let rows = x.matrix_rows(tokens.clone())?;
        let row_scales = match packed {
            false => RowScales::F32(x_scales.matrix_rows(tokens)?),
            true => RowScales::Ue8m0(x_scales.matrix_rows(tokens)?),
        };
        let (padding, words) = (padding(zero_padding && last), reborrowed(&mut words));
        work(py, || {
            cpu::permute_quantized(&cpu, rows, row_scales, layout, format, padding, out, words).map_err(exception)
        })
    });
    to.made(py, place, done)
}

/// What `expertile.deep_gemm_utils.deepgemm_moe_permute` returns: rows, scales, grouped layout, inv_perm, alignment.
type DeepGemm<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>, usize);

/// `permute_quantized` on a GPU, with the scales' layout that their type asks for, into tensors made here: `out` (unless
/// it is given), scales, the grouped layout, inv_perm. Without `m_sum`, as many rows as the reference has. None, and nothing
/// done, for what `permute_quantized` has to be asked.
#[pyfunction]
pub(crate) fn deep_gemm_permute<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    x_scales: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    group: &Bound<'py, PyAny>,
    use_psum_layout: bool,
    out: Option<&Bound<'py, PyAny>>,
    rule: Option<(PyBackedStr, PyBackedStr)>,
) -> PyResult<Option<DeepGemm<'py>>> {
    let x = Array::new("x", x)?;
    let Some(ordinal) = x.device() else { return Ok(None) };
    let (x_scales, ids) = (Array::new("x_scales", x_scales)?, Ids::new(topk_ids, expert_map, local_experts)?);
    let out = out.map(|out| Array::output("out", out)).transpose()?;
    let (tokens, topk) = ids.ids.matrix_shape("2 dimensions")?;
    let alignment = size("alignment", alignment)?;
    let plan = match optional_size("m_sum", m_sum)? {
        Some(m_sum) => Plan::with_m_sum(tokens, topk, ids.local_experts, alignment, m_sum),
        None => {
            let (rule, arch) = rule.unzip();
            Plan::reference(tokens, topk, ids.local_experts, alignment, parse_rule(rule.as_deref(), arch.as_deref())?)
        }
    };
    let plan = plan.map_err(exception)?;
    let (m_sum, alignment) = (plan.m_sum(), plan.alignment());
    let packed = x_scales.element() == Element::U8;
    let as_it_is =
        |out: &Array<'_>| out.element() == x.element() && out.require_contiguous().is_ok() && out.shape().len() == 2;
    // Packed columns end on four rows, which a matrix of fewer does not own.
    if x.item_bytes() != 1 || (packed && !m_sum.is_multiple_of(4)) || !out.as_ref().is_none_or(as_it_is) {
        return Ok(None);
    }
    let (_, hidden) = x.matrix_shape("2 dimensions")?;
    x.require_shape(&[tokens, hidden])?;
    limits::at_most("local_experts", ids.local_experts, limits::EXPERTS)?;
    limits::at_most("hidden", hidden, limits::HIDDEN)?;
    let format = scale_format(if packed { "packed_ue8m0" } else { "row_major" }, group, None)?;
    require_row_scales(&x, &x_scales, format)?;
    let [id_list, map] = ids.arrays();
    let inputs = [Some(&x), Some(&x_scales), id_list, map];
    Array::common_device(&[inputs[0], inputs[1], id_list, map, out.as_ref()])?;
    Apart::check(out.as_ref().as_slice(), &inputs)?;
    let out = match out {
        Some(out) => {
            require_rows_out(&out, m_sum, hidden, None)?;
            out
        }
        None => rows_out(py, None, &x, x.element(), m_sum, hidden)?,
    };
    let scales = scales_out(py, None, &x, format, m_sum, hidden)?;
    let rows_or_experts = if use_psum_layout { ids.local_experts } else { m_sum };
    let grouped = tensor::empty(py, ordinal, Form::list(Element::I32, rows_or_experts))?;
    let inv_perm = tensor::empty(py, ordinal, Form::row_major(Element::I32, tokens, topk))?;
    let rows = Rows { x: &x, out: &out, scales: Some((&x_scales, &scales, format)), zero_padding: false };
    let (psum, m_indices) = if use_psum_layout { (Some(&grouped), None) } else { (None, Some(&grouped)) };
    cuda::permute_to_lists(py, ordinal, &ids, plan, &rows, &Lists { psum, m_indices, inv_perm: &inv_perm })?;
    written(py, &[&out])?;
    let inv_perm = inv_perm.into_object();
    // For the way back: a negative entry says all there is to know about an empty slot.
    inv_perm.setattr(intern!(py, "_expertile_complete"), true)?;
    Ok(Some((out.into_object(), scales.into_object(), grouped.into_object(), inv_perm, alignment)))
}

/// bf16, f16 or f32 `x [M, H]` (times `topk_weights [M, 1]`, if given) to e4m3 `out [M_sum, H]` and `scales`.
#[pyfunction]
#[pyo3(signature = (x, topk_weights, topk_ids, expert_map, local_experts, alignment, m_sum, group, scale_layout, power_of_two, zero_padding, out, scales, layout, *, distinct=true))]
pub(crate) fn quantize_permute<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    topk_weights: Option<&Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    expert_map: Option<&Bound<'py, PyAny>>,
    local_experts: &Bound<'py, PyAny>,
    alignment: &Bound<'py, PyAny>,
    m_sum: Option<&Bound<'py, PyAny>>,
    group: &Bound<'py, PyAny>,
    scale_layout: &str,
    power_of_two: Option<bool>,
    zero_padding: bool,
    out: Option<&Bound<'py, PyAny>>,
    scales: Option<&Bound<'py, PyAny>>,
    layout: Option<&Bound<'py, PyAny>>,
    distinct: bool,
) -> PyResult<MadeQuantized<'py>> {
    let (x, weights) = (Array::new("x", x)?, Array::optional("topk_weights", topk_weights)?);
    let ids = Ids::new(topk_ids, expert_map, local_experts)?;
    let place = Place::new(py, [Some(&x), weights.as_ref()], ids, alignment, m_sum, distinct, layout)?;
    let hidden = place.hidden(&x)?;
    let format = scale_format(scale_layout, group, power_of_two)?;
    let to = Quantized::new(py, &place, (&x, weights.as_ref(), hidden), (Element::E4m3, format), out, scales)?;
    if let Some(ordinal) = to.device {
        let rows = (&x, weights.as_ref(), &to.out, &to.scales);
        let done = cuda::quantize_permute(py, ordinal, &place, rows, format, zero_padding);
        return to.made(py, place, done);
    }
    let mut words = scale_memory(&to.scales, to.apart)?;
    if let Some(weights) = weights.as_ref().filter(|_| place.plan.topk() == 1) {
        weights.require_shape(&[place.plan.tokens(), 1])?;
    }
    let out = to.out.contiguous_mut(to.apart)?;
    let cpu = cpu()?;
    macro_rules! rows_of {
        ($type:ty) => {
            place.layout(py, to.apart, None, hidden, |layout, tokens, last| {
                let rows = x.matrix_rows::<$type>(tokens.clone())?;
                let weights = weights.as_ref().map(|weights| weights.matrix_rows::<f32>(tokens)).transpose()?;
                let (padding, words) = (padding(zero_padding && last), reborrowed(&mut words));
                work(py, || {
                    cpu::quantize_permute(&cpu, rows, weights, layout, format, padding, out, words).map_err(exception)
                })
            })
        };
    }
    let done = match x.element() {
        Element::Bf16 => rows_of!(bf16),
        Element::F16 => rows_of!(f16),
        Element::F32 => rows_of!(f32),
        _ => Err(x.dtype_error("bfloat16, float16 or float32")),
    };
    to.made(py, place, done)
}
