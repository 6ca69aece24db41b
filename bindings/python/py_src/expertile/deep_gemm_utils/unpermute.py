"""Rows back to their tokens."""

from __future__ import annotations

from .. import _arrays, _native
from .._arrays import Array
from .._errors import ArgumentError
from ._names import GATHER, UNPERMUTE, named


def ep_gather(
    input_tensor: Array,
    recv_topk_ids: Array,
    recv_topk_weight: Array,
    input_index: Array,
    expert_map: Array | None,
    output_tensor: Array,
) -> None:
    """``output_tensor[m] = sum over slots k of recv_topk_weight[m, k] * input_tensor[input_index[m, k]]``.

    input_tensor ``[M_sum, H]`` and output_tensor ``[M, H]``: bfloat16, float16 or float32. The sum is float32, in slot
    order, cast once. Slots whose id is negative, or of an expert that is not local, are skipped; a token without any
    gives zeros.

    Raises ValueError or TypeError for what does not fit.
    """
    _gather(input_tensor, recv_topk_ids, recv_topk_weight, input_index, expert_map, output_tensor, GATHER)


def _gather(
    rows: Array,
    topk_ids: Array,
    topk_weights: Array,
    inv_perm: Array,
    expert_map: Array | None,
    output: Array,
    names: dict[str, str],
) -> None:
    try:
        if _arrays.on_gpu(rows) and _native.deep_gemm_unpermute(rows, inv_perm, topk_weights, output):
            return
        _arrays.require_array("topk_weights", topk_weights, 2)
        slots = _arrays.require_array("inv_perm", inv_perm, 2)
        _, hidden = _arrays.require_array("out", output, 2)
        _arrays.require_shape("out", output, (slots[0], hidden))
        _arrays.require_shape("topk_weights", topk_weights, slots)
        _native.require_slots(*slots)
        if not _arrays.is_contiguous(output):
            inputs = [("rows", rows), ("inv_perm", inv_perm), ("topk_weights", topk_weights), ("topk_ids", topk_ids)]
            _native.require_targets([("out", output)], [*inputs, ("expert_map", expert_map)])
        out = _arrays.contiguous(output)
        weights = _arrays.as_float32(topk_weights)
        if _arrays.on_gpu(rows):
            # Ours says -1 for an empty slot; others leave such slots unwritten, and the kernel does not look at ids.
            if not _native.is_complete(inv_perm):
                inv_perm = _arrays.without_empty_slots(inv_perm, topk_ids, expert_map)
            rows, inv_perm = _arrays.contiguous(rows), _arrays.contiguous(inv_perm)
            topk_ids = expert_map = None
        _native.unpermute(rows, inv_perm, topk_ids, expert_map, weights, out)
    except ArgumentError as error:
        raise named(error, names) from None
    if out is not output:
        _arrays.assign(output, out)


def deepgemm_unpermute_and_reduce(
    a: Array,
    topk_ids: Array,
    topk_weights: Array,
    inv_perm: Array,
    expert_map: Array | None,
    output: Array,
) -> None:
    """:func:`ep_gather` under the name the layer calls: `a` ``[M_sum, H]`` to `output` ``[M, H]``, written in place."""
    _gather(a, topk_ids, topk_weights, inv_perm, expert_map, output, UNPERMUTE)
