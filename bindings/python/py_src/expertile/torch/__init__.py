"""What vLLM's ``deep_gemm_utils`` lacks, as torch operators.

Every function here allocates what is not handed to it and calls one operator of ``torch.ops.expertile``, which writes
the caller's memory: operators can be compiled (``torch.compile(fullgraph=True)``) and, with buffers handed in, called
without making a tensor. On CUDA tensors the call goes past torch's dispatcher, unless a compiler, a mode, a transform,
a profiler or autograd is there to see it. Nothing here is differentiable.

Shapes: ``M`` tokens, ``H`` values each, ``topk`` slots, ``E`` local experts, ``A`` alignment, ``M_sum`` rows.

- ``topk_ids``: int32 or int64 ``[M, topk]``, any strides; a negative id is an empty slot.
- ``expert_map``: int32 ``[G]``, global id to local, negative for an expert of another rank. Without it ids are local.
- ``m_sum``: rows of the permuted buffer, a multiple of the alignment; by default the tight bound, the most that any
  routing can need (with ``distinct=False``: even if a token names an expert twice).
- ``scale_layout``: ``"row_major"`` (float32 ``[M_sum, ceil(H / group)]``), ``"mn_major"`` (the same with strides
  ``(1, round_up(M_sum, 4))``, as TMA loads want it) or ``"packed_ue8m0"`` (int32 ``[M_sum, ceil(H / group / 4)]``,
  strides as before, byte ``j`` of word ``p`` the exponent of group ``4 p + j``).
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "expertile.torch needs torch, which is not installed (pip install torch); "
        "planning and expertile.deep_gemm_utils work without it"
    ) from error

from ..deep_gemm_utils import check
from .expert_parallel import ExpertParallelLayer
from .gemm import Gemm
from .layer import Layer
from .layout import Layout, Permuted, Sizes, sizes
from .ops import build_layout, permute_quantized, permute_rows, quantize_permute, unpermute

__all__ = [
    "ExpertParallelLayer",
    "Gemm",
    "Layer",
    "Layout",
    "Permuted",
    "Sizes",
    "build_layout",
    "check",
    "permute_quantized",
    "permute_rows",
    "quantize_permute",
    "sizes",
    "unpermute",
]
