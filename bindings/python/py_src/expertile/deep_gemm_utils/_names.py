"""What vLLM calls the arguments: errors name them so."""

from __future__ import annotations

from .. import _arrays, _native
from .._errors import ArgumentError

SIZES = {"topk": "num_topk", "local_experts": "local_num_experts"}
PERMUTE = {
    **SIZES,
    "x": "aq",
    "x_scales": "aq_scale",
    "out": "aq_out",
    "group": "block_size",
    "hidden": "H",
}
SCATTER = {
    "x": "recv_x",
    "x_scales": "recv_x_scale",
    "topk_ids": "recv_topk",
    "expert_num_tokens": "num_recv_tokens_per_expert",
    "out": "output_tensor",
    "scales": "output_tensor_scale",
    "group": "block_size",
    "alignment": "align_m",
    "hidden": "H",
}
GATHER = {
    "rows": "input_tensor",
    "topk_ids": "recv_topk_ids",
    "topk_weights": "recv_topk_weight",
    "inv_perm": "input_index",
    "out": "output_tensor",
}
UNPERMUTE = {"rows": "a", "out": "output"}


def named(error: ArgumentError, names: dict[str, str]) -> Exception:
    """The same error, where it is about an argument that has another name here."""
    if _arrays.is_traced():
        return RuntimeError(_native.TRACED)
    error.rename(names)
    return error
