"""The grouped GEMM alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _arrays, _native
from .._errors import ArgumentValueError
from ._dispatch import call, gemms, unwatched
from .layer import FOUR_BITS, blocks_in_halves, flat_blocks, in_place, name_of_blocks, on_a_gpu, scales_in_place
from .layout import empty, matrix


class Gemm:
    """Rows times the weights of their experts: ``out[r] = weights[expert of r] @ rows[r]``, in bfloat16.

    weights: ``[E, N, K]``, bfloat16, or float8_e4m3fn with block scales: weight_scale float32 ``[E, ceil(N / 128),
    ceil(K / 128)]`` (or bfloat16, float16 or float8_e8m0fnu, which are widened exactly). Or MXFP4: uint8
    ``[E, N, K / 2]`` or ``[E, N, K / 32, 16]`` with uint8 or float8_e8m0fnu scales ``[E, N, K / 32]``. Or int4 as
    compressed-tensors packs it: int32 ``[E, N, K / 8]`` with bfloat16 or float16 scales ``[E, N, K / 32]``.

    On the CPU, weights are packed, once, into memory of the object's own. On a Hopper GPU they are used where they are,
    and the object keeps them alive; what cannot be used so, such as MXFP4 and int4, is copied once, with a warning. The
    object has to live as long as the CUDA graphs that captured a call of it.

    activations: what rows MXFP4 and int4 weights are to be multiplied by on a GPU, ``"bf16"`` (if not given) or
    ``"e4m3"``. The CPU takes both.

    Raises ValueError or TypeError for what does not fit.
    """

    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, weights: Tensor, weight_scale: Tensor | None = None, *, activations: str | None = None) -> None:
        self._native: _native.Gemm | _native.CudaGemm
        self._on_gpu = isinstance(weights, Tensor) and weights.is_cuda
        self._weights: Tensor | None = None
        self._weight_scale: Tensor | None = None
        if self._on_gpu and weights.dtype in FOUR_BITS:
            activations = on_a_gpu(weights, activations)
            what = f"weights are {name_of_blocks(weight_scale)}"
            message = f"{what}: the object holds a copy of them, arranged for {activations} rows"
            warnings.warn(message, stacklevel=2)
            parts = blocks_in_halves(("weights", weights), ("weight_scale", weight_scale), "halves")
            self._native = _native.CudaGemm(*parts, activations)
        elif self._on_gpu:
            on_a_gpu(weights, activations)
            self._weights = in_place("weights", weights)
            self._weight_scale = scales_in_place("weight_scale", weight_scale)
            self._native = _native.CudaGemm(self._weights)
        else:
            if activations not in (None, "bf16", "e4m3"):
                raise ArgumentValueError("activations", f' is "{activations}"', activations, "one of bf16, e4m3")
            self._native = _native.Gemm(flat_blocks("weights", weights), weight_scale)
        self._device = weights.device if isinstance(weights, Tensor) else torch.device("cpu")
        self._dtype = weights.dtype
        # Operators take numbers and tensors: an object is passed to its operator by number.
        self._number = next(Gemm._numbers)
        gemms[self._number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Gemm:
        # Nothing changes in it, so that copies of what holds it share it.
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a Gemm cannot be pickled: its weights are packed for this machine, expected to be packed anew")

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._device

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, N, K)``."""
        return self._native.shape

    def unpack(self) -> Tensor:
        """A copy of the weights ``[E, N, K]``: the bits that the object was made of. Scales are not among them.

        MXFP4 blocks are ``[E, N, K / 2]``, int4 words as they came; blocks that were arranged on a GPU are ValueError.
        """
        if self._weights is not None:
            return self._weights.clone()
        if isinstance(self._native, _native.CudaGemm):
            raise ArgumentValueError("weights", " are arranged", "arranged", "weights that are used in place")
        experts, n, k = self.shape
        dtype = torch.uint8 if self._dtype == torch.int32 else self._dtype
        width = k // 2 if dtype == torch.uint8 else k
        weights = _arrays.empty_tensor("weights", (experts, n, width), dtype, self._device)
        self._native.unpack(weights)
        return weights.view(self._dtype)

    def prepare(self, max_rows: int) -> None:
        """Compiles (or loads) whatever calls of up to `max_rows` rows can launch; a call compiles nothing.

        Needed on a GPU, before the first call; on the CPU there is nothing to do.
        """
        if isinstance(self._native, _native.CudaGemm):
            self._native.prepare(max_rows)

    def check(self) -> None:
        """Waits for the current stream, and raises ValueError for what lists said wrong since the last time.

        On the CPU a call checks its list itself. On a GPU, until then, a row whose id is no expert's counts as padding,
        an expert whose end lies before its start has no rows, and one whose end lies past the last row has those up to
        there.
        """
        if isinstance(self._native, _native.CudaGemm):
            self._native.check()

    def __call__(
        self,
        rows: Tensor,
        scale: Tensor | None = None,
        *,
        psum: Tensor | None = None,
        m_indices: Tensor | None = None,
        alignment: int = 128,
        expected_rows: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """rows ``[M_sum, K]`` to bfloat16 ``[M_sum, N]``, of which only rows of experts are written.

        rows: of the weights' type (on the CPU, bfloat16 also with float8_e4m3fn weights; with MXFP4 and int4 weights
        bfloat16 or float8_e4m3fn, on a GPU what they were arranged for), contiguous. scale: of
        float8_e4m3fn rows, float32 ``[M_sum, ceil(K / 128)]`` with any strides; on a GPU those of
        ``scale_layout="mn_major"`` are read where they are, others are copied first.

        One of these two says whose a row is:

        - psum: int32 ``[E]``, the end of each expert's rows. They start where the end before, rounded up to
          `alignment`, is; an expert without rows stores its start.
        - m_indices: int32 ``[M_sum]``, the expert of each row, negative on padding, in any order.

        A row's result has the same bits in every place, with either list and beside any other rows. expected_rows: how
        many rows all experts together are likely to have, if that is known better than from the size of `rows`: on a
        GPU the kernel is chosen for it.

        On a GPU the call is queued on torch's current stream. Raises ValueError or TypeError for what does not fit.
        """
        if self._on_gpu and unwatched(rows) and isinstance(self._native, _native.CudaGemm):
            return self._native.run(
                rows, scale, self._weights, self._weight_scale, psum, m_indices, alignment, expected_rows, out
            )
        shape = matrix("rows", rows)
        if out is None:
            out = empty("out", (shape[0], self.shape[1]), torch.bfloat16, rows)
        call("gemm", self._number, rows, scale, psum, m_indices, alignment, expected_rows, out)
        return out
