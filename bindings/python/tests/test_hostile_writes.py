"""A call that is refused has written nothing."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertile import deep_gemm_utils
from hostile import KINDS, as_kind, needs_torch

try:
    import torch
except ImportError:
    torch = None


def scatter_arguments():
    """Good arguments of ep_scatter, as NumPy arrays."""
    return {
        "recv_x": np.arange(3 * 128, dtype=np.uint8).reshape(3, 128),
        "recv_x_scale": np.ones((3, 1), np.float32),
        "recv_topk": np.array([[0, 1], [1, -1], [0, 0]]),
        "num_recv_tokens_per_expert": np.array([3, 2], np.int32),
        "expert_map": None,
        "expert_start_loc": np.full(2, 77, np.int32),
        "output_tensor": np.full((8, 128), 77, np.uint8),
        "output_tensor_scale": np.full((8, 1), 77, np.float32),
        "m_indices": np.full(8, 77, np.int32),
        "output_index": np.full((3, 2), 77, np.int32),
    }


WRITTEN = ["expert_start_loc", "output_tensor", "output_tensor_scale", "m_indices", "output_index"]


def expanded(kind, array):
    """The shape of `array`, with several elements in one place."""
    one = array[(slice(0, 1),) * array.ndim].copy()
    if kind == "torch":
        return torch.from_numpy(one).expand(array.shape)
    return np.lib.stride_tricks.as_strided(one, array.shape, (0,) * array.ndim, writeable=True)


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_a_scatter_that_is_refused_has_written_nothing(data):
    kind = data.draw(st.sampled_from(KINDS))
    wide = data.draw(st.booleans())
    arguments = scatter_arguments()
    if wide:
        arguments["recv_x"] = arguments["recv_x"].astype(np.float32)
        arguments["output_tensor"] = arguments["output_tensor"].astype(np.float32)
    strided = data.draw(st.sets(st.sampled_from(WRITTEN)))
    bases = {}
    for name in WRITTEN:
        # A target with strides is written by way of a copy: other checks, the same promise.
        base = np.full((*arguments[name].shape[:-1], 2 * arguments[name].shape[-1]), 77, arguments[name].dtype)
        bases[name] = base if name in strided else arguments[name]
        arguments[name] = base[..., ::2] if name in strided else arguments[name]
    arguments = {name: as_kind(kind, array) for name, array in arguments.items()}
    victim = data.draw(st.sampled_from(WRITTEN))
    other = data.draw(st.sampled_from([name for name in WRITTEN if name != victim]))
    faults = ["expanded", "aliased", "wrong ids", "wrong counts", "wrong shape", "wrong dtype", "no array", "overlaps"]
    fault = data.draw(st.sampled_from([*faults, *["read-only"] * (kind == "numpy"), *["gradient"] * (kind == "torch")]))
    target = arguments[victim]
    if fault == "expanded":
        arguments[victim] = expanded(kind, scatter_arguments()[victim].astype(np.asarray(bases[victim]).dtype))
    elif fault == "aliased":
        space = np.full(4096, 77, np.uint8)
        for name in (victim, other):
            dtype, shape = np.asarray(bases[name]).dtype, tuple(arguments[name].shape)
            bases[name] = np.ndarray(shape, dtype, space.data)
            arguments[name] = as_kind(kind, bases[name])
    elif fault == "overlaps":
        arguments["recv_x"] = arguments["output_tensor"][2:5]
    elif fault == "wrong ids":
        arguments["recv_topk"] = as_kind(kind, np.array([[0, 1], [1, 2], [0, 0]]))
    elif fault == "wrong counts":
        arguments["num_recv_tokens_per_expert"] = as_kind(kind, np.array([2, 2], np.int32))
    elif fault == "wrong shape":
        arguments[victim] = target[:-1]
    elif fault == "wrong dtype":
        arguments[victim] = as_kind(kind, np.full(tuple(target.shape), 77, np.float64))
    elif fault == "no array":
        arguments[victim] = [77]
    elif fault == "read-only":
        arguments[victim] = target.view()
        arguments[victim].flags.writeable = False
    elif fault == "gradient":
        victim = (
            "output_tensor_scale" if not wide else data.draw(st.sampled_from(["output_tensor", "output_tensor_scale"]))
        )
        arguments[victim].requires_grad_() if arguments[victim].is_leaf else None
    with pytest.raises((ValueError, TypeError)):
        deep_gemm_utils.ep_scatter(**arguments, align_m=4)
    for name in WRITTEN:
        assert (np.asarray(bases[name]) == 77).all() or (fault == "aliased" and name in (victim, other)), (name, fault)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_only_stand_beside_each_other_are_written(kind):
    arguments = scatter_arguments()
    expected = scatter_arguments()
    deep_gemm_utils.ep_scatter(**expected, align_m=4)
    numbers = np.full((8, 5), 77, np.int32)
    arguments["m_indices"], arguments["output_index"] = numbers[:, 0], numbers[:3, 2:4]
    bytes_ = np.full((8, 300), 77, np.uint8)
    bytes_[:3, :128] = arguments["recv_x"]
    arguments["recv_x"], arguments["output_tensor"] = bytes_[:3, :128], bytes_[:, 150:278]
    arguments = {name: as_kind(kind, array) for name, array in arguments.items()}
    if kind == "torch":
        arguments["m_indices"] = torch.full((8,), 77, dtype=torch.int32)
    else:
        arguments["m_indices"] = np.full(8, 77, np.int32)
    deep_gemm_utils.ep_scatter(**arguments, align_m=4)
    for name in WRITTEN:
        np.testing.assert_array_equal(np.asarray(arguments[name]), expected[name])


@needs_torch
@pytest.mark.parametrize("kinds", [("numpy", "torch"), ("torch", "numpy")])
def test_a_scatter_takes_targets_of_the_other_kind(kinds):
    inputs, outputs = kinds
    expected = scatter_arguments()
    deep_gemm_utils.ep_scatter(**expected, align_m=4)
    arguments = {
        name: as_kind(outputs if name in WRITTEN else inputs, array) for name, array in scatter_arguments().items()
    }
    arguments["output_tensor"] = as_kind(inputs, np.full((8, 128), 77, np.uint8))
    deep_gemm_utils.ep_scatter(**arguments, align_m=4)
    for name in WRITTEN:
        np.testing.assert_array_equal(np.asarray(arguments[name]), expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_permute_of_wide_rows_that_is_refused_has_written_nothing(kind):
    x, ids = as_kind(kind, np.ones((3, 128), np.float32)), as_kind(kind, np.array([[0, 1], [1, 2], [-1, 0]]))
    out = as_kind(kind, np.full((512, 128), 77, np.float32))
    for scale in (np.ones((3, 1)), np.ones((3, 2), np.float32), np.ones((4, 1), np.float32), np.ones(3, np.float32)):
        with pytest.raises((TypeError, ValueError), match="^aq_scale has"):
            deep_gemm_utils.deepgemm_moe_permute(x, as_kind(kind, scale), ids, 3, None, None, aq_out=out)
    assert (np.asarray(out) == 77).all()
    rows, scales, *_ = deep_gemm_utils.deepgemm_moe_permute(
        x, as_kind(kind, np.ones((3, 1), np.float32)), ids, 3, None, None, aq_out=out
    )
    assert rows is out and tuple(scales.shape) == (512, 1) and float(scales.sum()) == 5


@needs_torch
def test_buffers_handed_in_are_left_alone_by_what_is_refused():
    import expertile.torch as et

    x, scale = torch.ones(3, 128), torch.ones(3, 1)
    bytes_, ids = x.to(torch.float8_e4m3fn), torch.tensor([[0], [1], [5]])
    sizes = et.sizes(3, 1, 2, 128, alignment=4)
    layout = torch.full((sizes.layout_len,), 77, dtype=torch.int32)
    out, scales = torch.full((sizes.m_sum, 128), 77.0), torch.full((sizes.scale_words,), 77.0)
    out8 = out.to(torch.float8_e4m3fn)
    common = {"alignment": 4, "layout": layout}
    crowded = torch.tensor([[0], [0], [0]])
    for wrong, message in ((ids, r"topk_ids\[2, 0\] is 5"), (crowded, "m_sum is 0, expected at least 4")):
        m_sum = None if wrong is ids else 0
        more = {**common, "m_sum": m_sum}
        rows = out if m_sum is None else out[:0]
        rows8 = out8 if m_sum is None else out8[:0]
        for call, arguments in (
            (et.build_layout, (wrong, 2)),
            (partial(et.permute_rows, out=rows), (x, wrong, 2)),
            (partial(et.permute_quantized, out=rows8, scales=scales), (bytes_, scale, wrong, 2)),
            (partial(et.quantize_permute, out=rows8, scales=scales), (x, wrong, 2)),
        ):
            with pytest.raises(ValueError, match=message):
                call(*arguments, **more)
    expected = torch.full_like(out, 77.0).to(out8.dtype).view(torch.uint8)
    assert (layout == 77).all() and (out == 77).all() and (scales == 77).all()
    assert torch.equal(out8.view(torch.uint8), expected)
