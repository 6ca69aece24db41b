//! What the calls share: ids, a layout's memory, rows and where they go.

use crate::array::{Apart, Array, Element};
use crate::error::{Wrong, exception, optional_size, size};
use crate::limits;
use crate::plan::token_experts;
use crate::pool::work;
use crate::tensor::{self, Form};
use expertile::{Error, Layout, MatrixRef, Padding, Plan, Routing, ScaleFormat, TopkIds};
use pyo3::prelude::*;
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
    pub(crate) fn count(&self, py: Python<'_>, counts: &mut [i32]) -> PyResult<()> {
        /// How much is copied at a time.
        const SLOTS_AT_ONCE: usize = 1 << 22;
        let (tokens, topk) = self.ids.matrix_shape("two dimensions")?;
        limits::at_most("local_experts", self.local_experts, limits::EXPERTS)?;
        if counts.len() < self.local_experts {
            return Err(Wrong::short("out", counts.len(), self.local_experts).value());
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
pub(crate) struct LayoutTarget<'py> {
    pub(crate) ids: Ids<'py>,
    pub(crate) plan: Plan,
    pub(crate) lists: Array<'py>,
}

impl<'py> LayoutTarget<'py> {
    /// Without `m_sum`, as many rows as any routing can need; without `lists`, some on the device of `inputs` and ids.
    pub(crate) fn new(
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
        let form = || Ok(Form::list(Element::I32, Layout::device_space_len(&plan).map_err(exception)?));
        let lists = tensor::given_or_made(py, "layout", lists, device, form)?;
        Ok(Self { ids, plan, lists })
    }

    pub(crate) fn m_sum(&self) -> usize {
        self.plan.m_sum()
    }

    pub(crate) fn made(self) -> Made<'py> {
        let Self { ids: _, plan, lists } = self;
        let (experts, alignment) = (plan.local_experts(), plan.alignment());
        (lists.into_object(), plan.tokens(), plan.topk(), experts, alignment, plan.m_sum())
    }

    /// `H`, of rows that are one to a token.
    pub(crate) fn hidden(&self, x: &Array<'_>) -> PyResult<usize> {
        let (_, hidden) = x.matrix_shape("two dimensions")?;
        x.require_shape(&[self.plan.tokens(), hidden])?;
        limits::at_most("hidden", hidden, limits::HIDDEN)?;
        Ok(hidden)
    }

    /// Builds the layout (which must have these counts, if some are given), hands it to `rows`, then writes the lists.
    ///
    /// It is built in memory of the call's own: the lists say where rows go, so nobody else may write them meanwhile,
    /// and the caller's are left as they were where something does not fit. `rows` gets the layout of some tokens at a
    /// time, and whether they are the last; in between the call looks whether it has been interrupted.
    pub(crate) fn layout(
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
            return Err(Wrong::short("layout", lists.len(), words).value());
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
            for tokens in limits::stretches(plan.tokens(), limits::at_once(values)) {
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
pub(crate) type Made<'py> = (Bound<'py, PyAny>, usize, usize, usize, usize, usize);

pub(crate) fn require_counts(given: &[i32], counted: &[i32]) -> PyResult<()> {
    if given.len() != counted.len() {
        let (actual, expected) = ([given.len()], [counted.len()]);
        let found = format_args!("has shape {actual:?}");
        return Err(Wrong::new("expert_num_tokens", found, &actual[..], format!("{expected:?}")).value());
    }
    match given.iter().zip(counted).position(|(given, counted)| given != counted) {
        Some(expert) => {
            let expected = format!("{}, which is how often topk_ids names the expert", counted[expert]);
            Err(Wrong::count("expert_num_tokens", expert, given[expert], expected).value())
        }
        None => Ok(()),
    }
}

pub(crate) fn padding(zero_padding: bool) -> Padding {
    if zero_padding { Padding::Zero } else { Padding::Untouched }
}

/// Fails unless `out` is contiguous, `[M_sum, H]` and of the elements of `like` (or e4m3 without one).
pub(crate) fn require_rows_out(out: &Array<'_>, m_sum: usize, hidden: usize, like: Option<&Array<'_>>) -> PyResult<()> {
    out.require_shape(&[m_sum, hidden])?;
    out.require_contiguous()?;
    let fits = match like {
        Some(x) => x.element() == out.element() || (x.item_bytes() == 1 && out.item_bytes() == 1),
        None => matches!(out.element(), Element::E4m3 | Element::U8 | Element::I8),
    };
    if fits { Ok(()) } else { Err(out.dtype_error(if like.is_some() { "that of x" } else { "float8_e4m3fn" })) }
}

/// `out`, or `[M_sum, H]` on the device of `x`.
pub(crate) fn rows_out<'py>(
    py: Python<'py>,
    out: Option<&Bound<'py, PyAny>>,
    x: &Array<'py>,
    element: Element,
    m_sum: usize,
    hidden: usize,
) -> PyResult<Array<'py>> {
    tensor::given_or_made(py, "out", out, x.device(), || Ok(Form::row_major(element, m_sum, hidden)))
}
