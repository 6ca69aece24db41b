"""Errors say which argument, what it was and what was expected: in words and as attributes."""

import pickle

import numpy as np
import pytest

import expertile
from expertile import deep_gemm_utils
from hostile import KINDS, as_kind, needs_torch

try:
    import torch
except ImportError:
    torch = None


@needs_torch
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limit": -1.0}, "limit is -1, expected a number above 0"),
        ({"limit": 0.0}, "limit is 0, expected"),
        ({"limit": float("nan")}, "limit is NaN, expected"),
        ({"alpha": float("nan")}, "alpha is NaN, expected a finite number"),
        ({"alpha": float("inf")}, "alpha is inf, expected"),
        ({"beta": float("nan")}, "beta is NaN, expected a finite number"),
        ({"beta": 1e39}, "beta is inf, expected"),
    ],
)
def test_an_activation_that_is_no_function_is_refused(changed, message):
    import expertile.torch as et

    w13, w2 = torch.ones(2, 64, 128).bfloat16(), torch.ones(2, 128, 32).bfloat16()
    with pytest.raises(ValueError, match=message):
        et.Layer(w13, w2, **changed)
    et.Layer(w13, w2, limit=float("inf"), alpha=-1.5, beta=0.0)


@needs_torch
def test_numbers_of_ours_raise_exceptions_of_ours():
    import expertile.torch as et

    x, ids = torch.ones(2, 128), torch.tensor([[0], [1]])
    values = [
        ({"m_sum": -1}, ValueError, "m_sum is -1, expected an integer of at least 0"),
        ({"m_sum": 2**70}, ValueError, "m_sum is 1180591620717411303424"),
        ({"m_sum": "many"}, TypeError, "m_sum is 'many'"),
        ({"m_sum": 100}, ValueError, "m_sum is 100, expected a multiple"),
        ({"alignment": -1}, ValueError, "alignment is -1"),
        ({"alignment": 0}, ValueError, "alignment is 0"),
        ({"alignment": 1.5}, TypeError, "alignment is 1.5"),
        ({"expert_map": [0, 1]}, TypeError, "expert_map is a list"),
        ({"out": [1]}, TypeError, "out is a list"),
        ({"layout": [1]}, TypeError, "layout is a list"),
        ({"zero_padding": "yes"}, TypeError, "zero_padding is a str"),
    ]
    for changed, kind, message in values:
        for call in (et.permute_rows, et.quantize_permute):
            with pytest.raises(kind, match=message):
                call(x, ids, 2, **changed)
    for experts, kind in ((-1, ValueError), ("two", TypeError), (2**40, ValueError), (None, TypeError)):
        with pytest.raises(kind, match="local_experts is"):
            et.quantize_permute(x, ids, experts)
    with pytest.raises(TypeError, match="scales is a list"):
        et.quantize_permute(x, ids, 2, scales=[1])
    with pytest.raises(ValueError, match="m_sum is -1"):
        et.sizes(2, 1, 2, 128, m_sum=-1)
    with pytest.raises(TypeError, match="x is a tensor of layout"):
        et.permute_rows(x.to_sparse(), ids, 2)


def caught(call):
    with pytest.raises(expertile.ArgumentError) as error:
        call()
    return error.value


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_carries_what_its_message_says(kind):
    def of(shape, dtype):
        return as_kind(kind, np.zeros(shape, dtype))

    def permute(**changed):
        good = {"aq": of((3, 128), np.uint8), "aq_scale": of((3, 1), np.float32), "topk_ids": of((3, 1), np.int64)}
        deep_gemm_utils.deepgemm_moe_permute(
            **{**good, "local_num_experts": 2, "expert_map": None, "expert_tokens_meta": None, **changed}
        )

    shared = as_kind(kind, np.zeros((384, 128), np.uint8))
    inv_perm = as_kind(kind, np.array([[5]], np.int32))
    gather = [of((4, 8), np.float32), of((1, 1), np.int64), of((1, 1), np.float32), inv_perm, None]
    wide = of((1, 8), np.float64)
    cases = [
        (lambda: permute(aq_scale=of((3, 2), np.float32)), ValueError, "aq_scale", [3, 2], "[3, 1]", None),
        (lambda: permute(topk_ids=of((3, 1), np.int64) + 7), ValueError, "topk_ids", 7, "an id below 2", None),
        (lambda: permute(local_num_experts=-3), ValueError, "local_num_experts", -3, "an integer of at least 0", None),
        (lambda: permute(local_num_experts="a"), TypeError, "local_num_experts", "a", "an integer of at least 0", None),
        (lambda: permute(block_size=64), ValueError, "block_size", 64, "32 or 128", None),
        (lambda: permute(aq=[[1]]), TypeError, "aq", [[1]], "a torch tensor or a NumPy array", None),
        (lambda: permute(aq=shared[:3], aq_out=shared), ValueError, "aq_out", None, "memory of its own", "aq"),
        (
            lambda: deep_gemm_utils.ep_gather(*gather, of((1, 8), np.float32)),
            ValueError,
            "input_index",
            5,
            "a row below 4",
            None,
        ),
        (lambda: deep_gemm_utils.ep_gather(*gather, wide), TypeError, "output_tensor", wide.dtype, "bfloat16", None),
        (lambda: expertile.Plan.tight(1, 2, 0), ValueError, "local_experts", 0, "", None),
        (lambda: expertile.Plan.reference(1, 1, 1, rule="vllm-fork"), ValueError, "arch", None, "one with", None),
        (lambda: expertile.Plan.tight(2**63, 2, 3), ValueError, "M * topk", None, "a result that fits", None),
        (lambda: expertile._native.require_memory("x", 2**62), MemoryError, "x", 2**62, "at most", None),
    ]
    for call, kind_of_error, argument, actual, expected, other in cases:
        error = caught(call)
        assert isinstance(error, kind_of_error), error
        assert (error.argument, error.other) == (argument, other), error
        assert error.actual == actual or (actual is None and error.actual is not None) or argument == "arch", error
        assert error.expected.startswith(expected), error
        assert str(error).startswith(argument) and str(error).endswith(f", expected {error.expected}")
        assert other is None or f" {other}, expected" in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error) and type(again) is type(error)


@needs_torch
def test_errors_of_operators_are_found_by_their_schema_and_not_by_words():
    import expertile.torch as et

    x, ids = torch.ones(2, 128), torch.tensor([[0], [1]])
    for changed, argument, expected in [
        ({"expert_map": [0, 1]}, "expert_map", "Tensor or None"),
        ({"zero_padding": "yes"}, "zero_padding", "bool"),
        ({"expert_map": torch.zeros(2, dtype=torch.int32).to_sparse()}, "expert_map", "a dense one"),
        ({"expert_map": torch.zeros(2, dtype=torch.int32, device="meta")}, "expert_map", "CPU or CUDA"),
    ]:
        error = caught(lambda changed=changed: et.permute_rows(x, ids, 2, **changed))
        assert (error.argument, error.expected) == (argument, expected), error


@needs_torch
def test_row_numbers_are_complete_until_somebody_writes_them():
    from expertile import _native

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inv_perm = torch.zeros(2, 2, dtype=torch.int32)
            assert not _native.is_complete(inv_perm)
            _native.mark_complete(inv_perm)
            assert _native.is_complete(inv_perm) and not _native.is_complete(inv_perm.clone())
    inv_perm = torch.zeros(2, 2, dtype=torch.int32)
    _native.mark_complete(inv_perm)
    inv_perm[0, 0] = 7
    assert not _native.is_complete(inv_perm)
