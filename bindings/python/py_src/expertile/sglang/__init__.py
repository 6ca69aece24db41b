"""SGLang's experts computed by ``expertile.torch.Layer``, in the place of its Triton runner.

Set ``EXPERTILE_SGLANG=experts``: SGLang calls :func:`plugin` in each of its processes (entry point
``sglang.srt.plugins``), which registers a runner core under the name of the Triton runner, the one that SGLang chooses
by itself on Hopper for e4m3 experts with 128 x 128 blocks and for bf16 ones. What the layer does not compute stays with
the function that SGLang would have called, and a line in the log says why.

Importing this module imports neither torch nor SGLang.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys

from .. import _native

__all__ = ["is_registered", "plugin", "register"]

_logger = logging.getLogger(__name__)

SWITCH = "EXPERTILE_SGLANG"
_RUNNER = "sglang.srt.layers.moe.moe_runner.runner"

_registered = False


def is_registered() -> bool:
    """Whether :func:`register` has registered the runner core in this process."""
    return _registered


def register() -> None:
    """Registers the runner core for the name ``triton``, and the hook that hands its runners over. Once a process.

    Triton's own function for a whole call comes before any core of that name: after a runner has been built with our
    core, the hook takes that function out of the runner and gives it to the core, as what it falls back on. Hooks take
    effect when SGLang has loaded all plugins.

    Raises ImportError if SGLang (or a part of it that is needed) is not there, RuntimeError if torch sees a GPU that
    this package cannot use, ValueError if another plugin has registered a core for that name.
    """
    global _registered
    if _registered:
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        reason = _native.cuda_unavailable()
        if reason is not None:
            raise RuntimeError(f"SGLang keeps its own runners: {reason}")
    runner = importlib.import_module(_RUNNER)
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    for module, name in ((runner, "register_moe_runner_core"), (runner, "MoeRunner"), (hooks, "HookRegistry")):
        if not hasattr(module, name):
            raise ImportError(f"{module.__name__} has no {name}, expected SGLang 0.5.23's module")
    core = importlib.import_module(".runner_core", __name__)
    runner.register_moe_runner_core("triton", core.core_for)
    hooks.HookRegistry.register(f"{_RUNNER}.MoeRunner.__init__", core.hand_over, hooks.HookType.AFTER)
    _registered = True
    _logger.info("expertile computes the experts of SGLang's Triton runner where it can")


def plugin() -> None:
    """What SGLang calls at start: :func:`register`, if ``EXPERTILE_SGLANG`` is ``experts``. Never raises."""
    value = os.environ.get(SWITCH, "")
    if value in ("", "0"):
        return
    if value != "experts":
        _logger.warning('%s is "%s", expected "experts": SGLang keeps its own runners', SWITCH, value)
        return
    try:
        register()
    except Exception as reason:
        _logger.warning("expertile does not compute SGLang's experts: %s: %s", type(reason).__name__, reason)
