"""Which activation a module of experts has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ArgumentValueError


def activation_of(module: nn.Module, gated: bool) -> tuple[dict[str, Any], bool]:
    """The options of ``Layer`` for a module's activation, and whether gate and up alternate.

    Modules say it in code of their own: it is found by what that computes of some values, small and large.
    """
    # A model is made on meta and in bfloat16 while it is loaded: these are values all the same.
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(64, 32, generator=generator, dtype=torch.float32)
        rows *= torch.logspace(-2, 1.5, 64, dtype=torch.float32).unsqueeze(1)
        if not gated:
            theirs = module.act_fn(rows)  # type: ignore[operator]
            if torch.allclose(theirs, rows.relu().square(), rtol=1e-5, atol=1e-6):
                return {"activation": "relu2"}, False
            raise ArgumentValueError("act_fn", f" is {module.act_fn}", module.act_fn, "relu squared without a gate")
        theirs = module._apply_gate(rows.clone())  # type: ignore[operator]
        for interleaved in (False, True):
            gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=-1)
            for options, function in _candidates(module):
                if torch.allclose(theirs, function(gate, up), rtol=1e-5, atol=1e-6):
                    return options, interleaved
    name = type(module).__name__
    expected = "SwiGLU (with alpha, beta and a limit) or the tanh form of GEGLU"
    raise ArgumentValueError("_apply_gate", f" of {name} is another function", module, expected)


def _candidates(module: nn.Module) -> Iterator[tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]]:
    """Activations of a layer with the parameters that a module may have."""

    def values(*names: str) -> list[float]:
        found = (getattr(module, name, None) for name in names)
        return sorted({float(value) for value in found if isinstance(value, (int, float)) and value > 0})

    def swiglu(alpha: float, beta: float, limit: float | None) -> Callable[[Tensor, Tensor], Tensor]:
        def function(gate: Tensor, up: Tensor) -> Tensor:
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + beta) * gate * torch.sigmoid(alpha * gate)

        return function

    limits: list[float | None] = [None, *values("limit", "swiglu_limit")]
    for limit, beta, alpha in itertools.product(limits, (0.0, 1.0), {1.0, *values("alpha", "swiglu_alpha")}):
        yield {"alpha": alpha, "beta": beta, "limit": limit}, swiglu(alpha, beta, limit)
    yield {"activation": "geglu_tanh"}, lambda gate, up: nn.functional.gelu(gate, approximate="tanh") * up
