"""Expertile in an installed vLLM.

``EXPERTILE_VLLM=experts``
    Experts are computed whole by Expertile (:class:`ExpertileExperts`, gpt-oss's by :class:`ExpertileMxfp4Experts`),
    where it takes them; :func:`select_experts` does the same from Python. ``EXPERTILE_VLLM_ACTIVATIONS=e4m3``
    multiplies gpt-oss's weights by activations in e4m3 instead of bf16.
``EXPERTILE_VLLM=1``
    :mod:`expertile.deep_gemm_utils` takes the place of vLLM's own module; :func:`patch` does the same from Python.

vLLM calls :func:`plugin` in each of its processes (entry point ``vllm.general_plugins``). Importing this package does
not import vLLM.
"""

from __future__ import annotations

from typing import Any

from ._patch import is_patched, patch, unpatch
from ._plugin import plugin
from ._select import deselect_experts, experts_are_selected, select_experts

__all__ = [
    "ExpertileExperts",
    "ExpertileMxfp4Experts",
    "deselect_experts",
    "experts_are_selected",
    "is_patched",
    "patch",
    "plugin",
    "select_experts",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """The experts are subclasses of a class of vLLM: they are made when they are asked for."""
    if name == "ExpertileExperts":
        from .experts import ExpertileExperts

        return ExpertileExperts
    if name == "ExpertileMxfp4Experts":
        from .mxfp4 import ExpertileMxfp4Experts

        return ExpertileMxfp4Experts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
