//! Sizing.

use crate::array::{Array, Element};
use crate::error::{Actual, Wrong, exception, optional_size, size};
use expertile::layout::{Extent, List};
use expertile::plan::{self, Plan, TokenExperts};
use expertile::{AlignmentRule, Arch, Layout};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use std::str::FromStr;

/// How many tokens, slots, experts, which alignment, how many rows: what `expertile.Plan` documents.
#[pyclass(frozen, eq, hash, name = "Plan", module = "expertile")]
#[derive(PartialEq, Eq, Hash)]
pub(crate) struct PyPlan(Plan);

#[pymethods]
impl PyPlan {
    #[new]
    #[pyo3(signature = (tokens, topk, local_experts, alignment, m_sum))]
    fn new(
        tokens: &Bound<'_, PyAny>,
        topk: &Bound<'_, PyAny>,
        local_experts: &Bound<'_, PyAny>,
        alignment: &Bound<'_, PyAny>,
        m_sum: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let plan = Plan::with_m_sum(
            size("tokens", tokens)?,
            size("topk", topk)?,
            size("local_experts", local_experts)?,
            size("alignment", alignment)?,
            size("m_sum", m_sum)?,
        );
        plan.map(Self).map_err(exception)
    }

    /// Sized by the largest `m_sum` that any routing can need.
    #[staticmethod]
    #[pyo3(signature = (tokens, topk, local_experts, alignment=None, *, distinct=true))]
    fn tight(
        tokens: &Bound<'_, PyAny>,
        topk: &Bound<'_, PyAny>,
        local_experts: &Bound<'_, PyAny>,
        alignment: Option<&Bound<'_, PyAny>>,
        distinct: bool,
    ) -> PyResult<Self> {
        Plan::tight(
            size("tokens", tokens)?,
            size("topk", topk)?,
            size("local_experts", local_experts)?,
            optional_size("alignment", alignment)?.unwrap_or(128),
            token_experts(distinct),
        )
        .map(Self)
        .map_err(exception)
    }

    /// Sized by the reference's bound; a rule may shrink the alignment.
    #[staticmethod]
    #[pyo3(signature = (tokens, topk, local_experts, alignment=None, *, rule=None, arch=None))]
    fn reference(
        tokens: &Bound<'_, PyAny>,
        topk: &Bound<'_, PyAny>,
        local_experts: &Bound<'_, PyAny>,
        alignment: Option<&Bound<'_, PyAny>>,
        rule: Option<&str>,
        arch: Option<&str>,
    ) -> PyResult<Self> {
        Plan::reference(
            size("tokens", tokens)?,
            size("topk", topk)?,
            size("local_experts", local_experts)?,
            optional_size("alignment", alignment)?.unwrap_or(128),
            parse_rule(rule, arch)?,
        )
        .map(Self)
        .map_err(exception)
    }

    /// Sized by counts.
    #[staticmethod]
    #[pyo3(signature = (tokens, topk, expert_num_tokens, alignment=None))]
    fn exact(
        tokens: &Bound<'_, PyAny>,
        topk: &Bound<'_, PyAny>,
        expert_num_tokens: &Bound<'_, PyAny>,
        alignment: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Plan::exact(
            size("tokens", tokens)?,
            size("topk", topk)?,
            &counts(expert_num_tokens)?,
            optional_size("alignment", alignment)?.unwrap_or(128),
        )
        .map(Self)
        .map_err(exception)
    }

    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens()
    }

    #[getter]
    fn topk(&self) -> usize {
        self.0.topk()
    }

    #[getter]
    fn local_experts(&self) -> usize {
        self.0.local_experts()
    }

    #[getter]
    fn alignment(&self) -> usize {
        self.0.alignment()
    }

    #[getter]
    fn m_sum(&self) -> usize {
        self.0.m_sum()
    }

    /// How many int32 a layout takes.
    #[getter]
    fn layout_len(&self) -> PyResult<usize> {
        Layout::device_space_len(&self.0).map_err(exception)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyAny>, (usize, usize, usize, usize, usize)) {
        let plan = &self.0;
        let fields = (plan.tokens(), plan.topk(), plan.local_experts(), plan.alignment(), plan.m_sum());
        (py.get_type::<Self>().into_any(), fields)
    }

    fn __repr__(&self) -> String {
        let plan = &self.0;
        format!(
            "Plan(tokens={}, topk={}, local_experts={}, alignment={}, m_sum={})",
            plan.tokens(),
            plan.topk(),
            plan.local_experts(),
            plan.alignment(),
            plan.m_sum()
        )
    }
}

/// The smallest multiple of `alignment` that is at least `rows`.
#[pyfunction]
pub(crate) fn round_up(rows: &Bound<'_, PyAny>, alignment: &Bound<'_, PyAny>) -> PyResult<usize> {
    plan::round_up(size("rows", rows)?, size("alignment", alignment)?).map_err(exception)
}

/// `sum_e round_up(n_e, alignment)`.
#[pyfunction]
pub(crate) fn expert_num_tokens_round_up_and_sum(
    expert_num_tokens: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
) -> PyResult<usize> {
    let alignment = size("alignment", alignment)?;
    plan::expert_num_tokens_round_up_and_sum(&counts(expert_num_tokens)?, alignment).map_err(exception)
}

/// The reference's `(M_sum, alignment_used)`.
#[pyfunction]
#[pyo3(signature = (m, topk, local_experts, alignment, rule=None, arch=None, expert_num_tokens=None))]
pub(crate) fn compute_aligned_m_and_alignment(
    m: &Bound<'_, PyAny>,
    topk: &Bound<'_, PyAny>,
    local_experts: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
    rule: Option<&str>,
    arch: Option<&str>,
    expert_num_tokens: Option<&Bound<'_, PyAny>>,
) -> PyResult<(usize, usize)> {
    let counts = expert_num_tokens.map(counts).transpose()?;
    plan::compute_aligned_m_and_alignment(
        size("M", m)?,
        size("topk", topk)?,
        size("local_experts", local_experts)?,
        size("alignment", alignment)?,
        parse_rule(rule, arch)?,
        counts.as_deref(),
    )
    .map_err(exception)
}

/// The largest `M_sum` that any routing can need.
#[pyfunction]
#[pyo3(signature = (m, topk, local_experts, alignment, distinct=true))]
pub(crate) fn tight_m_sum(
    m: &Bound<'_, PyAny>,
    topk: &Bound<'_, PyAny>,
    local_experts: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
    distinct: bool,
) -> PyResult<usize> {
    plan::tight_m_sum(
        size("M", m)?,
        size("topk", topk)?,
        size("local_experts", local_experts)?,
        size("alignment", alignment)?,
        token_experts(distinct),
    )
    .map_err(exception)
}

/// The row tile that a rule picks.
#[pyfunction]
#[pyo3(signature = (rule, arch, expected_m=None, num_groups=None))]
pub(crate) fn theoretical_alignment(
    rule: &str,
    arch: &str,
    expected_m: Option<&Bound<'_, PyAny>>,
    num_groups: Option<&Bound<'_, PyAny>>,
) -> PyResult<usize> {
    let rule = AlignmentRule::from_str(rule).map_err(exception)?;
    let arch = Arch::from_str(arch).map_err(exception)?;
    rule.theoretical(arch, optional_size("expected_m", expected_m)?, optional_size("num_groups", num_groups)?)
        .map_err(exception)
}

/// How many int32 a layout takes, the GPU's part included.
#[pyfunction]
pub(crate) fn layout_len(
    tokens: &Bound<'_, PyAny>,
    topk: &Bound<'_, PyAny>,
    local_experts: &Bound<'_, PyAny>,
    alignment: &Bound<'_, PyAny>,
    m_sum: &Bound<'_, PyAny>,
) -> PyResult<usize> {
    PyPlan::new(tokens, topk, local_experts, alignment, m_sum)?.layout_len()
}

/// The name of the architecture of a compute capability's major number.
#[pyfunction]
pub(crate) fn arch_of(major: u32) -> &'static str {
    Arch::from_compute_capability_major(major).name()
}

/// For code that computes with numbers that are not known yet: the lists of a layout's memory in their order, each with
/// what it has elements for and how many for each.
pub(crate) fn layout_lists<'py>(py: Python<'py>, lists: &[List]) -> PyResult<Bound<'py, PyTuple>> {
    let facts = lists.iter().map(|list| {
        let per = match list.per {
            Extent::Layout => "layout",
            Extent::Expert => "expert",
            Extent::Row => "row",
            Extent::Slot => "slot",
            Extent::Tile => "tile",
        };
        (list.name, per, list.words)
    });
    PyTuple::new(py, facts)
}

pub(crate) fn token_experts(distinct: bool) -> TokenExperts {
    if distinct { TokenExperts::Distinct } else { TokenExperts::MayRepeat }
}

pub(crate) fn parse_rule(rule: Option<&str>, arch: Option<&str>) -> PyResult<Option<(AlignmentRule, Arch)>> {
    match (rule, arch) {
        (None, None) => Ok(None),
        (Some(rule), Some(arch)) => Ok(Some((rule.parse().map_err(exception)?, arch.parse().map_err(exception)?))),
        (Some(rule), None) => Err(missing("arch", format!("one with the rule \"{rule}\""))),
        (None, Some(arch)) => Err(missing("rule", format!("one with the arch \"{arch}\""))),
    }
}

fn missing(argument: &str, expected: String) -> PyErr {
    Wrong::new(argument, "is None", Actual::Nothing, expected).value()
}

/// Counts from an int32 or int64 array, or from a list or tuple of integers.
pub(crate) fn counts(counts: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    const ARGUMENT: &str = "expert_num_tokens";
    if counts.is_instance_of::<PyList>() || counts.is_instance_of::<PyTuple>() {
        let wide = counts.extract::<Vec<i64>>().map_err(|error| {
            let wrong = Wrong::new(ARGUMENT, "is a list", counts, "one of integers that fit 64 bits").of_type();
            wrong.set_cause(counts.py(), Some(error));
            wrong
        })?;
        return narrow(ARGUMENT, &wide);
    }
    let array = Array::new(ARGUMENT, counts)?;
    match array.element() {
        Element::I32 => array.copied_list::<i32>(counts.py()),
        Element::I64 => narrow(ARGUMENT, &array.copied_list::<i64>(counts.py())?),
        _ => Err(array.dtype_error("int32 or int64")),
    }
}

fn narrow(argument: &str, wide: &[i64]) -> PyResult<Vec<i32>> {
    let number = |(expert, &count): (usize, &i64)| {
        i32::try_from(count).map_err(|_| Wrong::count(argument, expert, count, format!("at most {}", i32::MAX)).value())
    };
    wide.iter().enumerate().map(number).collect()
}
