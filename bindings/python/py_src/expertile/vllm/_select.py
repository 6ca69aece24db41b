"""vLLM's choice of experts, with Expertile's before it.

vLLM chooses in ``select_fp8_moe_backend``, ``select_unquantized_moe_backend`` and, for gpt-oss, in
``select_mxfp4_moe_backend``; all are wrapped. What Expertile takes gets its class, everything else goes on to vLLM's
function, unchanged. ``backend_to_kernel_cls``, the list that they walk, would be the narrower place, but is the wrong
one: under expert parallelism FlashInfer's entry comes before Triton's, whose weights are the ones that Expertile takes
as they are, and with LoRA the first class of Triton's entry is taken without being asked what it supports.

Where vLLM has a registry of FP8 experts (its pull request 53897), the class is registered there too, and
``--moe-backend expertile`` selects it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["deselect_experts", "experts_are_selected", "select_experts"]

_ORACLE = "vllm.model_executor.layers.fused_moe.oracle"
_CLASS = "expertile.vllm.experts.ExpertileExperts"
NAME = "expertile"

_undo: list[tuple[ModuleType, str, Any, Any]] = []


def experts_are_selected() -> bool:
    """Whether :func:`select_experts` is in force."""
    return bool(_undo)


def select_experts() -> None:
    """Lets vLLM compute experts by Expertile where it takes them. Twice does nothing more.

    For layers that are made from now on. Raises ImportError if vLLM (or a function of it) is not there; then nothing
    has been changed.
    """
    if experts_are_selected():
        return
    functions = [_function(f"{_ORACLE}.{module}", name) for module, name in _CHOICES]
    importlib.import_module("expertile.vllm.mxfp4")
    _register()
    for original, kind in zip(functions, _CHOICES.values(), strict=True):
        _replace(original, _before(original, kind))


def deselect_experts() -> None:
    """Leaves the choice to vLLM again, for layers that are made from now on."""
    for module, name, original, mine in _undo:
        if getattr(module, name, None) is mine:
            setattr(module, name, original)
    # Modules that were imported meanwhile have taken ours from the module it was replaced in.
    for original, mine in {id(mine): (original, mine) for _, _, original, mine in _undo}.values():
        for module, name in _references(mine):
            setattr(module, name, original)
    _undo.clear()


def _function(module: str, name: str) -> Callable[..., Any]:
    function = getattr(importlib.import_module(module), name, None)
    if function is None:
        raise ImportError(f"{module} has no {name}, expected vLLM 0.33's module")
    return function


def _references(function: Any) -> list[tuple[ModuleType, str]]:
    """Where modules of vLLM hold a function, by whatever name."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "vllm"]
    return [
        (module, name)
        for module in modules
        for name, value in list(getattr(module, "__dict__", {}).items())
        if value is function
    ]


def _replace(original: Any, mine: Any) -> None:
    for module, name in _references(original):
        setattr(module, name, mine)
        _undo.append((module, name, original, mine))


def _before(original: Callable[..., Any], kind: _Kind) -> Callable[..., Any]:
    """A choice that asks Expertile first."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def select(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        config = given.get("config", given.get("moe_config"))
        weight_key = given.get("weight_key") if kind.weight_key is None else kind.weight_key()
        chosen = _choice(config, weight_key, given.get("activation_key"), kind)
        return original(*args, **kwargs) if chosen is None else chosen

    return select


def _choice(config: Any, weight_key: Any, activation_key: Any, kind: _Kind) -> tuple[Any, type] | None:
    """Backend and class, if Expertile takes the experts; else None, and a line in the log that says why."""
    from ._plugin import vllm_logger

    logger = vllm_logger()
    try:
        experts = kind.experts()
        reason = refusal(config, weight_key, activation_key, experts)
        if reason is None:
            chosen, what = (kind.backend(), experts), describe(config, kind.form(weight_key))
            logger.info_once("Expertile computes experts (%s)", what)
            return chosen
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning_once("Expertile does not compute these experts, vLLM's own choice does: %s", reason)
    return None


def describe(config: Any, form: str) -> str:
    """A layer of experts in a few words."""
    sizes = f"H {config.hidden_dim}, I {config.intermediate_size_per_partition}"
    return f"{form}, {sizes}, {config.num_local_experts} of {config.num_experts} experts"


def refusal(config: Any, weight_key: Any, activation_key: Any, experts: Any) -> str | None:
    """Why Expertile leaves a layer of experts to vLLM; None if that class of experts takes it."""
    from .experts import activation_format_of

    if config.moe_backend not in ("auto", NAME):
        return f"moe_backend is {config.moe_backend!r}, expected 'auto'"
    supported, reason = experts.is_supported_config(
        experts, config, weight_key, activation_key, activation_format_of(config)
    )
    return None if supported else reason or "no reason given"


def _experts() -> Any:
    return importlib.import_module("expertile.vllm.experts").ExpertileExperts


def _mxfp4_experts() -> Any:
    return importlib.import_module("expertile.vllm.mxfp4").ExpertileMxfp4Experts


def _fp8_backend() -> Any:
    """What vLLM calls the format of the weights: its registry's entry, or Triton, which takes a checkpoint's own."""
    registry = _registry()
    if registry is not None:
        return registry.get_registered_fp8_moe_backend(NAME)
    return importlib.import_module(f"{_ORACLE}.fp8").Fp8MoeBackend.TRITON


def _unquantized_backend() -> Any:
    return importlib.import_module(f"{_ORACLE}.unquantized").UnquantizedMoeBackend.TRITON


def _mxfp4_backend() -> Any:
    """The one that leaves weights as they are loaded."""
    return importlib.import_module(f"{_ORACLE}.mxfp4").Mxfp4MoeBackend.EMULATION


def _mxfp4_key() -> Any:
    return importlib.import_module("expertile.vllm.mxfp4").kMxfp4Static


def _registry() -> ModuleType | None:
    try:
        return importlib.import_module(f"{_ORACLE}.fp8_registry")
    except ImportError:
        return None


def _register() -> None:
    registry = _registry()
    if registry is not None:
        registry.register_fp8_moe_backend(NAME, _CLASS)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What one of vLLM's choices is of."""

    backend: Callable[[], Any]
    """What vLLM calls the format of the weights."""
    experts: Callable[[], Any] = _experts
    form: Callable[[Any], str] = lambda weight_key: "bf16" if weight_key is None else "e4m3 in 128 x 128 blocks"
    """In the log, by the key of the weights."""
    weight_key: Callable[[], Any] | None = None
    """The key of the weights, where the choice is not told it."""


_CHOICES = {
    ("fp8", "select_fp8_moe_backend"): _Kind(_fp8_backend),
    ("unquantized", "select_unquantized_moe_backend"): _Kind(_unquantized_backend),
    ("mxfp4", "select_mxfp4_moe_backend"): _Kind(_mxfp4_backend, _mxfp4_experts, lambda _: "MXFP4", _mxfp4_key),
}
