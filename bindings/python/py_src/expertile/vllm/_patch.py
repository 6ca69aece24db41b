"""Puts :mod:`expertile.deep_gemm_utils` in the place of an installed vLLM's own module.

>>> import expertile.vllm
>>> expertile.vllm.patch()      # doctest: +SKIP
>>> expertile.vllm.unpatch()    # doctest: +SKIP

The GEMM's alignment stays vLLM's to know: while patched, ``expertile.deep_gemm_utils`` asks vLLM's DeepGEMM for it.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import Any

from .. import _native, deep_gemm_utils
from ..deep_gemm_utils import _alignment

__all__ = ["is_patched", "patch", "unpatch"]

_logger = logging.getLogger(__name__)

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_REPLACED = {
    f"{_FUSED_MOE}.deep_gemm_utils": (
        "compute_aligned_M",
        "compute_aligned_M_and_alignment",
        "deepgemm_moe_permute",
        "deepgemm_unpermute_and_reduce",
        "ep_gather",
        "ep_scatter",
        "expert_num_tokens_round_up_and_sum",
    ),
    f"{_FUSED_MOE}.utils": ("count_expert_num_tokens",),
}
"""What is replaced where it is there. Releases differ in what else their modules hold, which stays as it is."""
_MAIN = ("deepgemm_moe_permute", "deepgemm_unpermute_and_reduce")
"""A vLLM with neither of these has nothing to replace."""

_undo: list[tuple[ModuleType, str, Any]] = []


class _VllmAlignment:
    """vLLM's DeepGEMM, as the source of the alignment."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        # vLLM asks for a row tile per call and takes any exception for "no". Asked once, it is a fact, not a surprise.
        try:
            self._answers = module.get_theoretical_mk_alignment_for_contiguous_layout(expected_m=1, num_groups=1) > 0
        except Exception as reason:
            _logger.info("vLLM's DeepGEMM picks no row tile per call (%s): the alignment is never shrunk", reason)
            self._answers = False

    def get(self) -> int:
        return int(self._module.get_mk_alignment_for_contiguous_layout()[0])

    def set(self, value: int) -> None:
        self._module.set_mk_alignment_for_contiguous_layout(value)

    def theoretical(self, expected_m: int | None, num_groups: int | None) -> int | None:
        if not self._answers:
            return None
        theoretical = self._module.get_theoretical_mk_alignment_for_contiguous_layout
        return int(theoretical(expected_m=expected_m, num_groups=num_groups))


def is_patched() -> bool:
    """Whether :func:`patch` is in force."""
    return bool(_undo)


def patch() -> None:
    """Replaces vLLM's functions, in their module and in every module that has imported them. Twice does nothing more.

    Functions that this vLLM does not have are left out, with a line in the log. Raises ImportError if vLLM, or what the
    rest is for (its permute and its unpermute), is not there, RuntimeError if torch sees a GPU that this package cannot
    use (and says why); then nothing has been replaced.
    """
    if is_patched():
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        reason = _native.cuda_unavailable()
        if reason is not None:
            raise RuntimeError(f"vLLM keeps its own functions: {reason}")
    found = []
    for module_name, names in _REPLACED.items():
        module = importlib.import_module(module_name)
        missing = [name for name in names if not hasattr(module, name)]
        if missing:
            _logger.info("%s has no %s, which is left out", module_name, ", ".join(missing))
        found += [(name, getattr(module, name)) for name in names if name not in missing]
    if not any(name in _MAIN for name, _ in found):
        raise ImportError(f"{next(iter(_REPLACED))} has neither {' nor '.join(_MAIN)}, expected vLLM 0.33's module")
    _alignment.source = _VllmAlignment(importlib.import_module("vllm.utils.deep_gemm"))
    for module in list(sys.modules.values()):
        names_in_module = getattr(module, "__dict__", {})
        for name, original in found:
            if names_in_module.get(name) is original:
                _undo.append((module, name, original))
                setattr(module, name, getattr(deep_gemm_utils, name))
    _logger.info("expertile has replaced %d references to vLLM's deep_gemm_utils", len(_undo))


def unpatch() -> None:
    """Puts vLLM's own functions back, also where they were imported while patched."""
    originals = {getattr(deep_gemm_utils, name): (name, original) for _, name, original in _undo}
    for module in list(sys.modules.values()):
        if module is deep_gemm_utils or getattr(module, "__name__", "").startswith("expertile"):
            continue
        names_in_module = getattr(module, "__dict__", {})
        for ours, (name, original) in originals.items():
            if names_in_module.get(name) is ours:
                setattr(module, name, original)
    _undo.clear()
    _alignment.source = _alignment.own
