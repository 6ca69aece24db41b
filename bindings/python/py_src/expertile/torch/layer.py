"""The whole layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _native
from ._dispatch import call, layers
from .layout import empty, matrix


class Layer:
    """The expert half of a layer on the CPU: permute, GEMM 1, activation, GEMM 2, unpermute.

    w13: ``[E, 2 I, H]``, gate rows first; w2: ``[E, H, I]``. Both bfloat16, or both float8_e4m3fn with block scales:
    w13_scale ``[E, 2 ceil(I / 128), ceil(H / 128)]``, gate's row blocks, then up's; w2_scale ``[E, ceil(H / 128),
    ceil(I / 128)]``. Scales are float32, or bfloat16, float16 or float8_e8m0fnu, which are widened exactly. Weights are
    packed, once, into memory of the layer's own.

    activations: ``"bf16"``, or ``"e4m3"`` to quantize them (needs e4m3 weights, and 128 to divide H and I).
    alpha, beta, limit: ``glu = gate * sigmoid(alpha * gate)``, ``(up + beta) * glu``, gate clamped to at most `limit`,
    up to within it. weight_on_input: router weights multiply the input (``topk = 1`` only).

    Raises ValueError or TypeError for what does not fit.
    """

    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        w13: Tensor,
        w2: Tensor,
        *,
        w13_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        activations: str = "bf16",
        alignment: int = 1,
        alpha: float = 1.0,
        beta: float = 0.0,
        limit: float | None = None,
        weight_on_input: bool = False,
    ) -> None:
        self._native = _native.Layer(
            w13, w2, w13_scale, w2_scale, activations, alignment, alpha, beta, limit, weight_on_input
        )
        # Operators take numbers and tensors: a layer is passed to its operator by number.
        self._number = next(Layer._numbers)
        layers[self._number] = self

    def __copy__(self) -> Layer:
        """Another layer with the same packed weights, which nothing can change."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._number = next(Layer._numbers)
        layers[other._number] = other
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return self.__copy__()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Layer cannot be pickled: its weights are packed for this machine, expected to be packed anew"
        )

    @property
    def local_experts(self) -> int:
        """``E``."""
        return self._native.local_experts

    @property
    def hidden(self) -> int:
        """``H``."""
        return self._native.hidden

    @property
    def intermediate(self) -> int:
        """``I``."""
        return self._native.intermediate

    def workspace_bytes(self, tokens: int, topk: int) -> int:
        """Bytes of uint8 workspace that a call with ``topk_ids [tokens, topk]`` needs at most."""
        return self._native.workspace_bytes(tokens, topk)

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        expert_map: Tensor | None = None,
        workspace: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """hidden_states ``[M, H]`` (bfloat16, float16 or float32), topk_weights float32 ``[M, topk]`` to ``[M, H]``.

        `dtype` of the result is that of `hidden_states` unless given. workspace: uint8, contiguous.

        Raises ValueError or TypeError for what does not fit.
        """
        shape = matrix("hidden_states", hidden_states)
        if out is None:
            out = empty("out", shape, hidden_states.dtype if dtype is None else dtype, hidden_states)
        call("layer", self._number, hidden_states, topk_ids, topk_weights, expert_map, workspace, out)
        return out
