"""What vLLM calls when it starts. It never keeps vLLM from starting."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from ._patch import patch
from ._select import select_experts

__all__ = ["plugin"]

VARIABLE = "EXPERTILE_VLLM"

_WHAT: dict[str, Callable[[], None]] = {"1": patch, "experts": select_experts}
_OFF = ("", "0")


def plugin() -> None:
    """Does what ``EXPERTILE_VLLM`` asks for; nothing if it is not set.

    What goes wrong is a warning in vLLM's log, and vLLM keeps its own functions.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked in _OFF:
        return
    what = _WHAT.get(asked)
    if what is None:
        expected = " or ".join(f'"{value}"' for value in _WHAT)
        vllm_logger().warning('%s is "%s", expected %s: vLLM stays as it is', VARIABLE, asked, expected)
        return
    try:
        what()
    except Exception as error:
        vllm_logger().warning("%s=%s: vLLM stays as it is: %s: %s", VARIABLE, asked, type(error).__name__, error)


def vllm_logger() -> Any:
    """A logger whose lines vLLM shows, with its ``info_once`` and ``warning_once``; a plain one without vLLM."""
    try:
        from vllm.logger import init_logger
    except Exception:
        return logging.getLogger("expertile.vllm")
    return init_logger("vllm.expertile")
