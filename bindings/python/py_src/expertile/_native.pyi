"""The extension. What users call is in the package's other modules.

Bad arguments raise the classes of ``expertile._errors``: ``ArgumentValueError`` (a ValueError), ``ArgumentTypeError``
(a TypeError), ``ArgumentMemoryError`` (a MemoryError) and ``ArgumentDeviceError`` (a RuntimeError), with the attributes
``argument``, ``actual``, ``expected`` and, where two arguments do not go together, ``other``.
"""

from collections.abc import Sequence
from typing import Any, final

__all__ = [
    "DEVICE_LISTS",
    "LAYOUT_LISTS",
    "SCALE_GROUPS",
    "SCALE_LAYOUTS",
    "TRACED",
    "CudaExpertParallelLayer",
    "CudaGemm",
    "CudaLayer",
    "ExpertParallelLayer",
    "Gemm",
    "Layer",
    "Plan",
    "__version__",
    "arch_of",
    "build_layout",
    "compute_aligned_m_and_alignment",
    "count_expert_num_tokens",
    "cuda_check",
    "cuda_unavailable",
    "deep_gemm_permute",
    "deep_gemm_unpermute",
    "expert_num_tokens_round_up_and_sum",
    "get_num_threads",
    "is_complete",
    "layout_len",
    "mark_complete",
    "permute_quantized",
    "permute_rows",
    "quantize_permute",
    "require_memory",
    "require_slots",
    "require_targets",
    "round_up",
    "scale_matrix",
    "set_num_threads",
    "theoretical_alignment",
    "tight_m_sum",
    "unpermute",
]

__version__: str

LAYOUT_LISTS: tuple[tuple[str, str, int], ...]
"""A layout's lists in their order: name, what it has elements for (layout, expert, row, slot, tile), how many for
each."""

DEVICE_LISTS: tuple[tuple[str, str, int], ...]
"""What a GPU adds behind them."""

SCALE_LAYOUTS: dict[str, tuple[str, int, int | None]]
"""By name: dtype, groups to a word, what the words between two columns are a multiple of (None: rows stand
together)."""

SCALE_GROUPS: tuple[int, ...]
"""How many values may share a scale."""

TRACED: str
"""What a call says that a trace would keep the numbers of."""

@final
class Plan:
    """A sized layout: how many tokens, slots, experts, which alignment, how many rows.

    A value: equal plans compare and hash equal, and plans can be pickled. Raises ValueError for a zero, for an `m_sum`
    that is no multiple of the alignment, and for numbers that do not fit.
    """

    def __new__(cls, tokens: int, topk: int, local_experts: int, alignment: int, m_sum: int) -> Plan: ...
    @staticmethod
    def tight(
        tokens: int, topk: int, local_experts: int, alignment: int | None = None, *, distinct: bool = True
    ) -> Plan:
        """Sized by the most rows that any routing can need; `distinct`: a token names an expert at most once."""

    @staticmethod
    def reference(
        tokens: int,
        topk: int,
        local_experts: int,
        alignment: int | None = None,
        *,
        rule: str | None = None,
        arch: str | None = None,
    ) -> Plan:
        """Sized by vLLM's bound; a rule (with an arch) may shrink the alignment."""

    @staticmethod
    def exact(tokens: int, topk: int, expert_num_tokens: Any, alignment: int | None = None) -> Plan:
        """Sized by counts: an int32 or int64 array ``[E]``, or a list."""

    @property
    def tokens(self) -> int:
        """``M``."""

    @property
    def topk(self) -> int:
        """Slots per token."""

    @property
    def local_experts(self) -> int:
        """``E``."""

    @property
    def alignment(self) -> int:
        """What each expert's rows are padded to; 128 unless given."""

    @property
    def m_sum(self) -> int:
        """Rows of the permuted buffer."""

    @property
    def layout_len(self) -> int:
        """int32 elements that a layout takes."""

    def __hash__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[type[Plan], tuple[int, int, int, int, int]]: ...

@final
class Layer:
    """Packed weights of one layer on the CPU: see `expertile.torch.Layer`."""

    def __new__(
        cls,
        w13: Any,
        w2: Any,
        w13_scale: Any | None,
        w2_scale: Any | None,
        activations: str,
        alignment: int,
        alpha: float,
        beta: float,
        limit: float | None,
        weight_on_input: bool,
        *,
        activation: str = "swiglu",
        w13_bias: Any | None = None,
        w2_bias: Any | None = None,
        gate_up: str = "halves",
        rows_at_once: int | None = None,
    ) -> Layer:
        """Packs as many rows at once as take a fraction of a second; then it looks whether it has been interrupted."""

    @property
    def local_experts(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    def unpack(self, w13: Any, w2: Any, *, gate_up: str = "halves") -> None:
        """Writes the weights as they were packed, bit for bit: `w13 [E, N, H]` in that order, and `w2 [E, H, I]`."""

    def workspace_bytes(self, tokens: int, topk: int) -> int: ...
    def run(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        expert_map: Any | None,
        workspace: Any,
        out: Any,
        *,
        tokens_at_once: int | None = None,
    ) -> None:
        """By default as many tokens at once as take some seconds; then it looks whether it has been interrupted."""

    def run_expanded(
        self,
        rows: Any,
        scale: Any | None,
        psum: Any,
        alignment: int,
        out: Any,
        *,
        rows_at_once: int | None = None,
    ) -> None:
        """The experts alone, of about `rows_at_once` rows at a time, on rows in their places."""

@final
class ExpertParallelLayer:
    """What `expertile.torch.ExpertParallelLayer` documents, on the CPU."""

    choice: str

    def __new__(
        cls,
        layer: Layer,
        placement: list[list[int]],
        capacity: int,
        topk: int,
        input: Any,
        output: Any,
        exchange: Any,
        rank: int,
        *,
        dispatch: str | None,
        combine: str,
    ) -> ExpertParallelLayer: ...
    def workspace_bytes(self, tokens: int) -> int: ...
    def run(self, hidden_states: Any, topk_ids: Any, topk_weights: Any, workspace: Any, out: Any) -> None: ...

@final
class CudaExpertParallelLayer:
    """What `expertile.torch.ExpertParallelLayer` documents."""

    choice: str

    def __new__(
        cls,
        w13: Any,
        w2: Any,
        w13_scale: Any | None,
        w2_scale: Any | None,
        activations: str,
        placement: list[list[int]],
        capacity: int,
        topk: int,
        ids: Any,
        input: Any,
        output: Any,
        exchange: Any,
        rank: int,
        *,
        link: str,
        dispatch: str | None,
        combine: str,
        alpha: float,
        beta: float,
        limit: float | None,
        weight_on_input: bool,
        time_limit: float,
        w13_bias: Any | None = None,
        w2_bias: Any | None = None,
        gate_up: str = "halves",
    ) -> CudaExpertParallelLayer: ...
    def workspace_bytes(self, capacity: int) -> int: ...
    def run(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        capacity: int,
        workspace: Any | None = None,
        out: Any | None = None,
    ) -> Any: ...
    def check(self) -> None: ...

@final
class CudaLayer:
    """Weights of one layer on a GPU, used in place unless they are MXFP4: see `expertile.torch.Layer`."""

    def __new__(
        cls,
        w13: Any,
        w2: Any,
        w13_scale: Any | None,
        w2_scale: Any | None,
        activations: str,
        alignment: int | None,
        alpha: float,
        beta: float,
        limit: float | None,
        weight_on_input: bool,
        *,
        activation: str = "swiglu",
        w13_bias: Any | None = None,
        w2_bias: Any | None = None,
        gate_up: str = "halves",
        e4m3_copy: bool = False,
    ) -> CudaLayer:
        """Weights are in halves; biases are on the CPU, and `gate_up` is their order."""

    @property
    def local_experts(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    def unpack(self, w13: Any, w2: Any) -> None:
        """Queues the blocks of MXFP4 weights, in halves."""

    def prepare(
        self, max_tokens: int, topk: int, global_experts: int | None, ids: Any, input: Any, output: Any
    ) -> None: ...
    def workspace_bytes(self, tokens: int, topk: int) -> int: ...
    def run(
        self,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        expert_map: Any | None = None,
        workspace: Any | None = None,
        out: Any | None = None,
    ) -> Any:
        """The result: `out`, or the tensor made in its place."""

    def prepare_expanded(self, max_rows: int) -> None: ...
    def run_expanded(
        self,
        rows: Any,
        scale: Any | None,
        psum: Any,
        alignment: int,
        expected_rows: int | None = None,
        out: Any | None = None,
    ) -> Any:
        """The result: `out`, or the tensor made in its place."""

    def check(self) -> None: ...

@final
class Gemm:
    """Prepacked weights of one GEMM: see `expertile.torch.Gemm`."""

    def __new__(cls, weights: Any, weight_scale: Any | None) -> Gemm: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    def unpack(self, weights: Any) -> None: ...
    def run(
        self,
        rows: Any,
        scale: Any | None,
        psum: Any | None,
        m_indices: Any | None,
        alignment: int,
        out: Any,
        *,
        rows_at_once: int | None = None,
    ) -> None: ...

@final
class CudaGemm:
    """What has been prepared for weights of one shape on a GPU: see `expertile.torch.Gemm`.

    It holds no tensor but MXFP4 weights, which are arranged, and which calls do not bring.
    """

    def __new__(cls, weights: Any, weight_scale: Any | None = None, activations: str | None = None) -> CudaGemm: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def max_rows(self) -> int: ...
    @staticmethod
    def expected_rows(m_sum: int, experts: int, alignment: int) -> int:
        """How many rows all experts are likely to have in a buffer for whatever routing, with aligned segments."""

    def prepare(self, max_rows: int) -> None: ...
    def run(
        self,
        rows: Any,
        scale: Any | None,
        weights: Any | None,
        weight_scale: Any | None,
        psum: Any | None,
        m_indices: Any | None,
        alignment: int,
        expected_rows: int | None = None,
        out: Any | None = None,
    ) -> Any:
        """The result: `out`, or the tensor made in its place."""

    def check(self) -> None: ...

def round_up(rows: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `rows`."""

def expert_num_tokens_round_up_and_sum(expert_num_tokens: Any | Sequence[int], alignment: int) -> int:
    """``sum_e round_up(expert_num_tokens[e], alignment)``."""

def compute_aligned_m_and_alignment(
    m: int,
    topk: int,
    local_experts: int,
    alignment: int,
    rule: str | None = None,
    arch: str | None = None,
    expert_num_tokens: Any | Sequence[int] | None = None,
) -> tuple[int, int]:
    """vLLM's ``(M_sum, alignment_used)``."""

def tight_m_sum(m: int, topk: int, local_experts: int, alignment: int, distinct: bool = True) -> int:
    """The most rows that any routing can need."""

def theoretical_alignment(rule: str, arch: str, expected_m: int | None = None, num_groups: int | None = None) -> int:
    """The row tile that a rule picks: ``deepgemm-2026-06``, ``vllm-fork`` or ``deepgemm-2.8``."""

def layout_len(tokens: int, topk: int, local_experts: int, alignment: int, m_sum: int) -> int: ...
def scale_matrix(
    m_sum: int, hidden: int, scale_layout: str, group: int
) -> tuple[int, str, tuple[int, int], tuple[int, int], bool]:
    """Words, then dtype, shape and strides of the matrix that they are, and whether such an array has all the words."""

def arch_of(major: int) -> str:
    """The name of the architecture of a compute capability's major number."""

def mark_complete(inv_perm: Any) -> None:
    """Says of a tensor of row numbers that it has a negative one for every empty slot."""

def is_complete(inv_perm: Any) -> bool:
    """Whether that was said, and nothing has been written since."""

def get_num_threads() -> int:
    """Threads that CPU work is spread over."""

def set_num_threads(threads: int) -> None:
    """Spreads CPU work over `threads` threads from now on. Raises ValueError outside 1 to 1024."""

def require_memory(argument: str, bytes: int) -> None:
    """Raises MemoryError if the machine has not as many bytes left."""

def require_slots(tokens: int, topk: int) -> None:
    """Raises ValueError for more slots than a call may have."""

def require_targets(outputs: Sequence[tuple[str, Any]], inputs: Sequence[tuple[str, Any | None]]) -> None:
    """Raises ValueError unless every output may be written: not read-only, each element in memory of its own."""

def count_expert_num_tokens(topk_ids: Any, expert_map: Any | None, local_experts: int, out: Any) -> None: ...

# What a call that makes a layout says about it: the layout's memory, tokens, topk, local experts, alignment, m_sum. On
# a GPU, out, scales and layout that are None are made; without m_sum there are as many rows as any routing can need.

_Made = tuple[Any, int, int, int, int, int]
_ScaleMatrix = tuple[tuple[int, int], tuple[int, int]]

def build_layout(
    topk_ids: Any,
    expert_map: Any | None,
    local_experts: int,
    alignment: int,
    m_sum: int | None,
    layout: Any | None,
    *,
    distinct: bool = True,
) -> _Made: ...
def permute_rows(
    x: Any,
    topk_ids: Any,
    expert_map: Any | None,
    local_experts: int,
    alignment: int,
    m_sum: int | None,
    expert_num_tokens: Any | None,
    zero_padding: bool,
    out: Any | None,
    layout: Any | None,
    *,
    distinct: bool = True,
) -> tuple[Any, _Made]:
    """Rows, layout."""

def permute_quantized(
    x: Any,
    x_scales: Any,
    topk_ids: Any,
    expert_map: Any | None,
    local_experts: int,
    alignment: int,
    m_sum: int | None,
    expert_num_tokens: Any | None,
    group: int,
    scale_layout: str,
    zero_padding: bool,
    out: Any | None,
    scales: Any | None,
    layout: Any | None,
    *,
    distinct: bool = True,
) -> tuple[Any, Any, _ScaleMatrix | None, _Made]:
    """Rows, scales, (shape, strides) of the matrix that flat scales are read as, layout."""

def quantize_permute(
    x: Any,
    topk_weights: Any | None,
    topk_ids: Any,
    expert_map: Any | None,
    local_experts: int,
    alignment: int,
    m_sum: int | None,
    group: int,
    scale_layout: str,
    power_of_two: bool | None,
    zero_padding: bool,
    out: Any | None,
    scales: Any | None,
    layout: Any | None,
    *,
    distinct: bool = True,
) -> tuple[Any, Any, _ScaleMatrix | None, _Made]:
    """As permute_quantized."""

def deep_gemm_permute(
    x: Any,
    x_scales: Any,
    topk_ids: Any,
    expert_map: Any | None,
    local_experts: int,
    alignment: int,
    m_sum: int | None,
    group: int,
    use_psum_layout: bool,
    out: Any | None,
    rule: tuple[str, str] | None,
) -> tuple[Any, Any, Any, Any, int] | None:
    """What `deepgemm_moe_permute` returns; None, and nothing done, for what is not for this path.

    Without m_sum as many rows as vLLM has, after the rule and arch (if they are given) have chosen the alignment.
    """

def deep_gemm_unpermute(rows: Any, inv_perm: Any, topk_weights: Any, out: Any) -> bool:
    """Whether it was done; False for what is not for this path."""

def unpermute(
    rows: Any,
    inv_perm: Any,
    topk_ids: Any | None,
    expert_map: Any | None,
    topk_weights: Any | None,
    out: Any,
) -> None: ...
def cuda_unavailable() -> str | None: ...
def cuda_check(ordinal: int) -> None: ...
