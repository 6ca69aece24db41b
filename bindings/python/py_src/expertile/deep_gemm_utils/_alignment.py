"""How many rows a buffer has: the GEMM's alignment, where it comes from, and sizes by it."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .. import _native
from .._arrays import Array
from .._errors import ArgumentError
from ._names import SIZES, named


class AlignmentSource(Protocol):
    """Who knows the row tile of the GEMM that will read the layout."""

    def get(self) -> int:
        """The row tile in force."""

    def set(self, value: int) -> None:
        """Caps the row tile from now on."""

    def theoretical(self, expected_m: int | None, num_groups: int | None) -> int | None:
        """The row tile the GEMM would pick for a call; None if it never shrinks."""


class _OwnAlignment:
    """The source while no DeepGEMM is loaded: a value per context, and a rule chosen by name."""

    __slots__ = ("_value", "rule")

    def __init__(self) -> None:
        self._value: contextvars.ContextVar[int] = contextvars.ContextVar("mk_alignment", default=128)
        self.rule: tuple[str, str] | None = None

    def get(self) -> int:
        deep_gemm = _loaded_deep_gemm()
        return deep_gemm.get_mk_alignment_for_contiguous_layout() if deep_gemm else self._value.get()

    def set(self, value: int) -> None:
        deep_gemm = _loaded_deep_gemm()
        if deep_gemm:
            deep_gemm.set_mk_alignment_for_contiguous_layout(value)
        else:
            self._value.set(value)

    def theoretical(self, expected_m: int | None, num_groups: int | None) -> int | None:
        return _native.theoretical_alignment(*self.rule, expected_m, num_groups) if self.rule else None


def _loaded_deep_gemm() -> Any:
    """A DeepGEMM that this process has imported: the value must be its, or it reads the wrong expert's weights."""
    loaded = sys.modules
    return loaded.get("deep_gemm") or loaded.get("vllm.third_party.deep_gemm")


own = _OwnAlignment()
"""The source unless vLLM is patched."""

source: AlignmentSource = own
"""The source in force."""


def set_alignment_rule(rule: str | None, arch: str | None = None) -> None:
    """Chooses the rule by which the alignment may shrink for a call.

    rule: ``"deepgemm-2026-06"``, ``"vllm-fork"`` or ``"deepgemm-2.8"``; None (the default) never shrinks it, as vLLM
        0.33.0 with its own DeepGEMM.
    arch: ``"sm90"``, ``"sm100"`` or ``"sm120"``; None asks the current CUDA device, and means ``"sm90"`` without one.

    Raises ValueError for an unknown name.
    """
    if rule is None:
        own.rule = None
        return
    arch = _current_arch() if arch is None else arch
    _native.theoretical_alignment(rule, arch)
    own.rule = (rule, arch)


def _current_arch() -> str:
    return _arch_of_device() if "torch" in sys.modules else "sm90"


@functools.cache
def _arch_of_device() -> str:
    torch = sys.modules["torch"]
    return _native.arch_of(torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9)


def get_mk_alignment_for_contiguous_layout() -> list[int]:
    """The row tile in force and the scale block, ``[alignment, alignment]``: 128 unless set otherwise."""
    alignment = source.get()
    return [alignment, alignment]


def set_mk_alignment_for_contiguous_layout(value: int) -> None:
    """Sets the row tile, DeepGEMM's too if it is loaded. Raises ValueError unless `value` is at least 1."""
    _native.round_up(0, value)
    source.set(value)


@contextlib.contextmanager
def mk_alignment_scope(value: int) -> Iterator[None]:
    """Sets the row tile to `value` inside a ``with`` block, and back when it is left."""
    previous = source.get()
    set_mk_alignment_for_contiguous_layout(value)
    try:
        yield
    finally:
        source.set(previous)


def get_theoretical_mk_alignment_for_contiguous_layout(
    expected_m: int | None = None, num_groups: int | None = None
) -> int:
    """The row tile that the rule in force picks for a call.

    expected_m: rows over all groups (``M * topk``). num_groups: experts on this rank.

    Without a rule (see :func:`set_alignment_rule`): what DeepGEMM 2.8, vendored in vLLM 0.33.0, answers.
    Raises ValueError for a number below 0, or no groups.
    """
    chosen = source.theoretical(expected_m, num_groups)
    if chosen is not None:
        return chosen
    return _native.theoretical_alignment("deepgemm-2.8", _current_arch(), expected_m, num_groups)


@dataclass
class ExpertTokensMetadata:
    """Live rows per local expert, where a dispatcher knows them. vLLM's own object does as well."""

    expert_num_tokens: Array | None
    """int32 ``[E]``, on the tokens' device."""
    expert_num_tokens_cpu: Array | None
    """int32 ``[E]``, on the host."""
    psum_recv_per_rank: Array | None = None
    """Carried along, not used here."""
    rank_expert_offset: int | None = None
    """Carried along, not used here."""

    @staticmethod
    def make_from_list(expert_num_tokens_list: list[int], device: str) -> ExpertTokensMetadata:
        """Counts on the host and, copied without waiting, on `device`. Without torch: NumPy, and only ``"cpu"``."""
        try:
            import torch
        except ImportError:
            if str(device) != "cpu":
                raise ImportError(f'device is "{device}", expected "cpu" where torch is not installed') from None
            import numpy

            counts = numpy.array(expert_num_tokens_list, dtype=numpy.int32)
            return ExpertTokensMetadata(expert_num_tokens=counts, expert_num_tokens_cpu=counts)
        pinned = torch.tensor(
            expert_num_tokens_list, device="cpu", dtype=torch.int32, pin_memory=torch.cuda.is_available()
        )
        return ExpertTokensMetadata(
            expert_num_tokens=pinned.to(device, non_blocking=True), expert_num_tokens_cpu=pinned
        )


def expert_num_tokens_round_up_and_sum(expert_num_tokens: Array, alignment: int) -> int:
    """``sum_e round_up(expert_num_tokens[e], alignment)``.

    expert_num_tokens: int32 or int64 ``[E]`` on the host, or a list of integers.

    Raises ValueError for a negative count or an alignment of 0, TypeError for another dtype.
    """
    return _native.expert_num_tokens_round_up_and_sum(expert_num_tokens, alignment)


def compute_aligned_M_and_alignment(
    M: int,
    num_topk: int,
    local_num_experts: int,
    alignment: int,
    expert_tokens_meta: ExpertTokensMetadata | None,
) -> tuple[int, int]:
    """``(M_sum, alignment_used)``: rows of the permuted buffer, and what each expert's rows are padded to.

    With counts on the host (``expert_tokens_meta.expert_num_tokens_cpu``) their exact sum and `alignment` itself;
    otherwise a bound, after the rule in force may have shrunk the alignment.

    Raises ValueError for a zero, a negative count or an overflow.
    """
    counts = None if expert_tokens_meta is None else expert_tokens_meta.expert_num_tokens_cpu
    rule, arch = own.rule or (None, None)
    if source is not own and counts is None:
        per_call = source.theoretical(M * num_topk, local_num_experts)
        alignment = per_call if per_call and per_call <= alignment else alignment
        rule = arch = None
    try:
        return _native.compute_aligned_m_and_alignment(M, num_topk, local_num_experts, alignment, rule, arch, counts)
    except ArgumentError as error:
        raise named(error, SIZES) from None


def compute_aligned_M(
    M: int,
    num_topk: int,
    local_num_experts: int,
    alignment: int,
    expert_tokens_meta: ExpertTokensMetadata | None,
) -> int:
    """The first value of :func:`compute_aligned_M_and_alignment`."""
    return compute_aligned_M_and_alignment(M, num_topk, local_num_experts, alignment, expert_tokens_meta)[0]
