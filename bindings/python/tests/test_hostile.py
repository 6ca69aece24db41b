"""Arrays nobody should hand over, and threads that change them: an error of the right kind, nothing written, no crash.

What could take the process with it runs in one of its own. EXPERTILE_HOSTILE_SCALE=full repeats what is repeated as often as
a release's proof asks: 400 forks, 100 subinterpreters, 114,280 calls.
"""

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import expertile
from expertile import deep_gemm_utils

try:
    import torch
except ImportError:
    torch = None

FULL = os.environ.get("EXPERTILE_HOSTILE_SCALE") == "full"
"""Counts of a release's proof instead of the suite's: minutes instead of seconds."""

KINDS = ["numpy"] + (["torch"] if torch else [])
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
TRACED = "a trace is being recorded"


def run_python(program, timeout=120, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


# -- sizes --------------------------------------------------------------------------------------------------------------

HUGE = """
import resource, sys, time
import numpy as np
from expertile import deep_gemm_utils as dg
import expertile
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
try:
    import torch, expertile.torch as et
except ImportError:
    torch = None
def huge(shape, dtype, kind):
    one = np.zeros((1,) * len(shape), dtype)
    return torch.from_numpy(one).expand(shape) if kind == "torch" else np.broadcast_to(one, shape)
def refused(call, *kinds):
    started = time.monotonic()
    try:
        call()
    except kinds as error:
        assert str(error), type(error)
    else:
        raise AssertionError("not refused")
    assert time.monotonic() - started < 10
many = 2**40
for kind in ("numpy", "torch") if torch else ("numpy",):
    of = lambda shape, dtype: huge(shape, dtype, kind)
    new = (lambda *a: torch.from_numpy(np.zeros(*a))) if kind == "torch" else np.zeros
    for shape in ((many, 1), (1, many), (2**20, 2**20), (2**31, 2)):
        for dtype in (np.int32, np.int64):
            refused(lambda: dg.count_expert_num_tokens(of(shape, dtype), 4, None), ValueError)
            refused(
                lambda: dg.deepgemm_moe_permute(
                    of((shape[0], 128), np.uint8), of((shape[0], 1), np.float32), of(shape, dtype), 4, None, None
                ),
                ValueError, MemoryError,
            )
        for output in (new((1, 4), np.float32), of((shape[0], 4), np.float32)):
            for ids in (of(shape, np.int64), new((1, 1), np.int64)):
                refused(
                    lambda: dg.deepgemm_unpermute_and_reduce(
                        new((8, 4), np.float32), ids, of(shape, np.float32), of(shape, np.int32), None, output
                    ),
                    ValueError,
                )
                refused(
                    lambda: dg.deepgemm_unpermute_and_reduce(
                        new((8, 4), np.float32), ids, of(shape, np.float16), of(shape, np.int32), None, output
                    ),
                    ValueError, MemoryError,
                )
    refused(lambda: dg.count_expert_num_tokens(new((1, 1), np.int64), 4, of((many,), np.int32)), ValueError)
    refused(lambda: dg.count_expert_num_tokens(new((1, 1), np.int64), 2**31 - 1, None), ValueError)
    refused(lambda: dg.expert_num_tokens_round_up_and_sum(of((many,), np.int32), 8), ValueError)
    refused(lambda: dg.expert_num_tokens_round_up_and_sum(of((many,), np.int64), 8), ValueError)
    refused(lambda: expertile.Plan.exact(1, 1, of((many,), np.int32)), ValueError)
    refused(
        lambda: dg.deepgemm_moe_permute(
            new((0, many), np.uint8), new((0, many // 128), np.float32), new((0, 1), np.int64), 4, None, None
        ),
        ValueError,
    )
    # No rows, so nothing to write, and still rows too long to be gathered.
    refused(
        lambda: expertile._native.permute_rows(
            of((1, many), np.float32), new((1, 1), np.int64) - 1, None, 4, 1, 0, None, False, new((0, many), np.float32),
            new((100,), np.int32),
        ),
        ValueError,
    )
    refused(
        lambda: dg.deepgemm_unpermute_and_reduce(
            new((0, many), np.float32), new((0, 1), np.int64), new((0, 1), np.float32), new((0, 1), np.int32), None,
            new((0, many), np.float32),
        ),
        ValueError,
    )
# Shapes that do not go together are found before a slot is read or memory is asked for.
for shape, out, more in (
    ((2**31 - 1, 1), np.zeros((2**31 - 1, 0), np.float32), {"rows": np.zeros((4, 0), np.float32)}),
    ((2**31 - 1, 1), np.zeros((1, 4), np.float32), {}),
    ((2**15, 2**16 - 1), np.zeros((2**15, 4), np.float32), {"weights": np.ones((2**15, 1), np.float32)}),
    ((2**15, 2**16 - 1), np.zeros((2**15, 4), np.float32), {"ids": np.zeros((2**15, 1), np.int64)}),
):
    for kind in ("numpy", "torch") if torch else ("numpy",):
        new = torch.from_numpy if kind == "torch" else lambda array: array
        of = {"rows": np.zeros((4, 4), np.float32), "ids": None, "weights": None, **more}
        rows, ids, weights, result = (None if x is None else new(x) for x in (of["rows"], of["ids"], of["weights"], out))
        inv_perm = huge(shape, np.int32, kind)
        refused(lambda: expertile._native.unpermute(rows, inv_perm, ids, None, weights, result), ValueError)
        refused(
            lambda: expertile._native.unpermute(rows, inv_perm, huge(shape, np.int64, kind), None, weights, result[:-1]),
            ValueError,
        )
if torch:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for shape in ((many, 1), (1, many)):
        wide = ids.expand(shape)
        refused(lambda: et.build_layout(wide, 4), ValueError)
        refused(lambda: et.quantize_permute(torch.zeros(1, 128).expand(shape[0], 128), wide, 4), ValueError)
        refused(lambda: et.unpermute(torch.zeros(2, 4), ids.int().expand(shape)), ValueError, MemoryError)
    refused(lambda: et.quantize_permute(torch.empty(0, many), ids[:0], 4), ValueError)
    refused(lambda: et.permute_rows(torch.zeros(1, 1).expand(1, many), ids, 4, m_sum=128), ValueError, MemoryError)
    layer = et.Layer(torch.zeros(2, 64, 32).bfloat16(), torch.zeros(2, 32, 32).bfloat16())
    x, w = torch.zeros(1, 32), torch.zeros(1, 1)
    for shape in ((many, 1), (1, many)):
        call = lambda: layer(x.expand(shape[0], 32), ids.expand(shape), w.expand(shape))
        refused(call, ValueError, MemoryError)
        refused(lambda: layer.workspace_bytes(*shape), ValueError, MemoryError) if shape[0] > 1 else None
    for shape in ((many, 0, 32), (many, 64, 32), (1, 2**20, 2**20)):
        wide = torch.zeros(1, 1, 1).bfloat16().expand(shape)
        refused(lambda: et.Layer(wide, torch.zeros(2, 32, 32).bfloat16()), ValueError)
assert peak() < 1 << 30, peak()
print("done")
"""


def test_arrays_that_only_say_they_are_huge_are_refused_at_once():
    assert run_python(HUGE).strip() == "done"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")
def test_memory_that_is_not_there_is_a_memory_error():
    program = """
    import resource, sys
    import numpy as np
    from expertile import deep_gemm_utils as dg, _native
    dg.count_expert_num_tokens(np.zeros((1, 1), np.int64), 4, None)  # Starts the threads.
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (300 << 20),) * 2)
    tokens = 40_000_000
    ids = np.broadcast_to(np.zeros((1, 1), np.int64), (tokens, 1))
    for call in (
        lambda: _native.build_layout(ids, None, 1, 1, tokens, np.zeros(1, np.int32)),
        lambda: dg.deepgemm_moe_permute(np.broadcast_to(np.zeros((1, 128), np.uint8), (tokens, 128)),
                                        np.broadcast_to(np.ones((1, 1), np.float32), (tokens, 1)), ids, 1, None, None),
    ):
        try:
            call()
        except MemoryError as error:
            print("memory", error)
        except ValueError as error:
            print("value", error)
    try:
        _native.require_memory("an array", 2**62)
    except MemoryError as error:
        print(error)
    # Counting needs no memory that grows with the tokens.
    assert dg.count_expert_num_tokens(ids, 1, None)[0] == tokens
    """
    printed = run_python(program).splitlines()
    assert printed[0].startswith("value layout holds 1 elements") and printed[1].startswith("memory "), printed
    assert printed[2].startswith("an array needs 4611686018427387904 bytes"), printed


# -- what torch keeps beside a tensor's memory --------------------------------------------------------------------------


def negative(x):
    """Two views that are the negative of what their memory holds, and equal to `x`."""
    yield torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype == torch.float32 else torch._neg_view(-x)
    yield torch._neg_view(-x)


@needs_torch
def test_views_of_negative_values_are_read_as_what_they_are():
    generator = torch.Generator().manual_seed(1)
    x, scale = torch.randn(5, 128, generator=generator), torch.rand(5, 1, generator=generator)
    ids = torch.tensor([[0, 1], [1, 2], [-1, 0], [2, 2], [0, 0]])
    expert_map = torch.tensor([1, 0, 2], dtype=torch.int32)
    counts = deep_gemm_utils.count_expert_num_tokens(ids, 3, expert_map)
    meta = deep_gemm_utils.ExpertTokensMetadata(counts, counts)
    good = {"aq": x, "aq_scale": scale, "topk_ids": ids, "expert_map": expert_map, "expert_tokens_meta": meta}
    expected = deep_gemm_utils.deepgemm_moe_permute(local_num_experts=3, **good)
    live = expected[2] >= 0
    for name in ("aq", "aq_scale", "topk_ids", "expert_map"):
        for view in negative(good[name]):
            assert view.is_neg() and torch.equal(view, good[name])
            found = deep_gemm_utils.deepgemm_moe_permute(local_num_experts=3, **{**good, name: view})
            assert torch.equal(found[0][live], expected[0][live]), name
            assert all(torch.equal(mine, its) for mine, its in zip(found[1:4], expected[1:4], strict=True)), name
    for view in negative(counts):
        minus = deep_gemm_utils.ExpertTokensMetadata(view, view)
        found = deep_gemm_utils.deepgemm_moe_permute(local_num_experts=3, **{**good, "expert_tokens_meta": minus})
        assert torch.equal(found[0][live], expected[0][live])
        assert deep_gemm_utils.expert_num_tokens_round_up_and_sum(view, 4) == int(((counts + 3) // 4 * 4).sum())
    rows, weights, inv_perm = expected[0], torch.rand(5, 2, generator=generator), expected[3]
    rows = torch.where(live[:, None], rows, 0.0)
    good = {"a": rows, "topk_ids": ids, "topk_weights": weights, "inv_perm": inv_perm, "expert_map": expert_map}
    out = torch.empty(5, 128)
    deep_gemm_utils.deepgemm_unpermute_and_reduce(output=out, **good)
    for name, value in good.items():
        for view in negative(value):
            again = torch.empty(5, 128)
            deep_gemm_utils.deepgemm_unpermute_and_reduce(output=again, **{**good, name: view})
            assert torch.equal(again, out), name
    target = torch._neg_view(torch.zeros(5, 128))
    with pytest.raises(ValueError, match="output is a view of negative values"):
        deep_gemm_utils.deepgemm_unpermute_and_reduce(output=target, **good)
    assert not target.any()
    # A copy of it is written and comes back, as any target that is not contiguous.
    target = torch.zeros(5, 128, dtype=torch.complex64).conj().imag
    deep_gemm_utils.deepgemm_unpermute_and_reduce(output=target, **good)
    assert torch.equal(target, out)


@needs_torch
def test_complex_values_are_refused_conjugate_or_not():
    x = torch.zeros(3, 128, dtype=torch.complex64)
    ids, scale = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    for wrong in (x, x.conj()):
        with pytest.raises(TypeError, match="aq has dtype torch.complex64"):
            deep_gemm_utils.deepgemm_moe_permute(wrong, scale, ids, 2, None, None)
        with pytest.raises(TypeError, match="aq_scale has dtype"):
            deep_gemm_utils.deepgemm_moe_permute(x.real.to(torch.uint8), wrong[:, :1], ids, 2, None, None)


def calls():
    """Every function that writes into tensors of its caller: the call, what it writes."""
    import expertile.torch as et

    ids = torch.tensor([[0], [1], [-1]])
    x, scale, weights = torch.ones(3, 128), torch.ones(3, 1), torch.ones(3, 1)
    bytes_ = x.to(torch.float8_e4m3fn)
    sizes = et.sizes(3, 1, 2, 128, alignment=4)
    layout, out = torch.empty(sizes.layout_len, dtype=torch.int32), torch.empty(sizes.m_sum, 128)
    out8, scales = out.to(torch.float8_e4m3fn), torch.empty(sizes.scale_words)
    inv_perm = torch.tensor([[0], [4], [-1]], dtype=torch.int32)
    rows, result = torch.ones(8, 128), torch.empty(3, 128)
    wide = torch.empty(3, 200)[:, :128]
    layer = et.Layer(torch.ones(2, 64, 128).bfloat16(), torch.ones(2, 128, 32).bfloat16())
    workspace = torch.empty(layer.workspace_bytes(3, 1), dtype=torch.uint8)
    meta = torch.tensor([1, 1], dtype=torch.int32)
    start, index = torch.empty(2, dtype=torch.int32), torch.empty(3, 1, dtype=torch.int32)
    m_indices, row_scales = torch.empty(8, dtype=torch.int32), torch.empty(8, 1)
    aq_out = torch.empty(384, 128).to(torch.float8_e4m3fn)
    scatter = (bytes_, scale, ids, meta, None, start, out8[:8], row_scales, m_indices, index, 4)
    common = {"alignment": 4, "layout": layout}
    return [
        ("build_layout", lambda: et.build_layout(ids, 2, **common), [layout]),
        ("permute_rows", lambda: et.permute_rows(x, ids, 2, out=out, **common), [out, layout]),
        (
            "permute_quantized",
            lambda: et.permute_quantized(bytes_, scale, ids, 2, out=out8, scales=scales, **common),
            [out8, scales, layout],
        ),
        (
            "quantize_permute",
            lambda: et.quantize_permute(x, ids, 2, out=out8, scales=scales, **common),
            [out8, scales, layout],
        ),
        ("unpermute", lambda: et.unpermute(rows, inv_perm, weights, out=result), [result]),
        ("Layer", lambda: layer(x, ids, weights, workspace=workspace, out=result), [result, workspace]),
        ("ep_gather", lambda: deep_gemm_utils.ep_gather(rows, ids, weights, inv_perm, None, result), [result]),
        ("ep_gather, strided", lambda: deep_gemm_utils.ep_gather(rows, ids, weights, inv_perm, None, wide), [wide]),
        ("ep_scatter", lambda: deep_gemm_utils.ep_scatter(*scatter), [start, out8, row_scales, m_indices, index]),
        (
            "deepgemm_moe_permute",
            lambda: deep_gemm_utils.deepgemm_moe_permute(bytes_, scale, ids, 2, None, None, aq_out=aq_out),
            [aq_out],
        ),
    ]


@needs_torch
def test_a_write_is_counted_so_that_no_gradient_is_silently_wrong():
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for name, call, outputs in calls():
            before = [output._version for output in outputs]
            with mode():
                call()
            after = [output._version for output in outputs]
            assert all(new > old for old, new in zip(before, after, strict=True)), (mode, name, before, after)
    weight, buffer = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4)
    loss = (weight * buffer).sum()
    inv_perm = torch.zeros(3, 1, dtype=torch.int32)
    ids, ones = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    deep_gemm_utils.ep_gather(torch.full((1, 4), 7.0), ids, ones, inv_perm, None, buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_torch
def test_tensors_of_inference_are_written_wherever_one_is():
    with torch.inference_mode():
        made = calls()
        for _, call, _ in made:
            call()
    for _, call, _ in made:
        call()


@needs_torch
def test_an_output_that_requires_gradients_is_refused_and_an_input_warns():
    import expertile.torch as et

    inv_perm, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    rows, out = torch.ones(1, 4), torch.zeros(3, 4, requires_grad=True)
    for call in (
        lambda: deep_gemm_utils.ep_gather(rows, ids, weights, inv_perm, None, out),
        lambda: et.unpermute(rows, inv_perm, weights, out=out),
        lambda: et.unpermute(rows, inv_perm, weights, out=out * 1),
    ):
        with pytest.raises(ValueError, match="requires gradients, expected an output that does not"):
            call()
    assert not out.any()
    with torch.no_grad():
        et.unpermute(rows, inv_perm, weights, out=out)
    assert out.all()
    layer = et.Layer(torch.ones(2, 64, 128).bfloat16(), torch.ones(2, 128, 32).bfloat16())
    x = torch.ones(3, 128, requires_grad=True)
    for name, call in {
        "hidden_states": lambda: layer(x, ids, weights),
        "x": lambda: et.quantize_permute(x, ids, 2),
        "rows": lambda: et.unpermute(x, inv_perm, weights),
        "topk_weights": lambda: et.unpermute(x.detach(), inv_perm, weights.clone().requires_grad_()),
    }.items():
        with pytest.warns(UserWarning, match=f"^{name} requires gradients, which end here"):
            call()
        with torch.no_grad():
            call()


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_refused_by_functions_and_recorded_by_operators():
    from torch.fx.experimental.proxy_tensor import make_fx

    import expertile.torch as et

    ids, x, scale = torch.tensor([[0], [1]]), torch.ones(2, 128), torch.ones(2, 1)
    meta = torch.tensor([1, 1], dtype=torch.int32)
    inv_perm = torch.tensor([[0], [1]], dtype=torch.int32)

    def scatter(x):
        numbers = [torch.empty(n, dtype=torch.int32) for n in (2, 256)]
        deep_gemm_utils.ep_scatter(
            x,
            scale,
            ids,
            meta,
            None,
            numbers[0],
            torch.empty(256, 128),
            torch.empty(256, 1),
            numbers[1],
            torch.empty(2, 1, dtype=torch.int32),
        )
        return numbers[0]

    def gather(x):
        out = torch.empty(2, 128)
        deep_gemm_utils.ep_gather(x, ids, torch.ones(2, 1), inv_perm, None, out)
        return out

    functions = [
        scatter,
        gather,
        lambda x: deep_gemm_utils.count_expert_num_tokens(x.long()[:, :1], 2, None),
        lambda x: deep_gemm_utils.deepgemm_moe_permute(x, scale, ids, 2, None, None)[0],
    ]
    for function in functions:
        function(x)
        with pytest.raises(RuntimeError, match=TRACED):
            torch.jit.trace(function, (x,), check_trace=False)
        for mode in ("real", "fake", "symbolic"):
            with pytest.raises(RuntimeError, match=TRACED):
                make_fx(function, tracing_mode=mode)(x)

    def operators(x):
        rows, _, layout = et.quantize_permute(x, ids, 2)
        return et.unpermute(rows.float(), layout.inv_perm)

    other = torch.randn(2, 128)
    assert torch.equal(torch.jit.trace(operators, (x,), check_trace=False)(other), operators(other))
    for mode in ("real", "fake", "symbolic"):
        assert torch.equal(
            make_fx(operators, tracing_mode=mode, _allow_non_fake_inputs=True)(x)(other), operators(other)
        )


# -- nothing is half-written --------------------------------------------------------------------------------------------


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


def as_kind(kind, array):
    return torch.from_numpy(array) if kind == "torch" and isinstance(array, np.ndarray) else array


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


# -- memory that another thread changes ---------------------------------------------------------------------------------

RACES = """
import sys, threading, time
import numpy as np
from expertile import deep_gemm_utils as dg, _native
try:
    import torch, expertile.torch as et
except ImportError:
    torch = None
seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.6
rng = np.random.default_rng(1)
tokens, topk, experts = 5000, 4, 8
good = rng.integers(0, experts, (tokens, topk))
ids, expert_map = good.copy(), np.arange(experts, dtype=np.int32)
counts = np.bincount(good.ravel(), minlength=experts).astype(np.int32)
x, scale = np.ones((tokens, 128), np.uint8), np.ones((tokens, 1), np.float32)
m_sum = dg.compute_aligned_M(tokens, topk, experts, 4, None)
layout = np.zeros(_native.layout_len(tokens, topk, experts, 4, m_sum), np.int32)
out, scales = np.zeros((m_sum, 128), np.uint8), np.zeros(m_sum, np.float32)
rows, inv_perm = np.ones((m_sum, 128), np.float32), np.zeros((tokens, topk), np.int32)
weights, result = np.ones((tokens, topk), np.float32), np.zeros((tokens, 128), np.float32)
calls = [
    (lambda: dg.count_expert_num_tokens(ids, experts, expert_map), (ids, expert_map)),
    (lambda: _native.build_layout(ids, expert_map, experts, 4, m_sum, layout), (ids, expert_map, layout)),
    (
        lambda: _native.permute_quantized(
            x, scale, ids, expert_map, experts, 4, m_sum, counts, 128, "row_major", True, out, scales, layout
        ),
        (ids, expert_map, counts, layout),
    ),
    (lambda: dg.ep_gather(rows, ids, weights, inv_perm, expert_map, result), (ids, expert_map, inv_perm)),
    (lambda: dg.expert_num_tokens_round_up_and_sum(counts, 4), (counts,)),
]
if torch:
    layer = et.Layer(torch.ones(experts, 64, 128).bfloat16(), torch.ones(experts, 128, 32).bfloat16())
    hidden, workspace = torch.ones(tokens, 128), np.zeros(layer.workspace_bytes(tokens, topk), np.uint8)
    arguments = hidden, torch.from_numpy(ids), torch.from_numpy(weights)
    more = {"expert_map": torch.from_numpy(expert_map), "workspace": torch.from_numpy(workspace)}
    calls.append((lambda: layer(*arguments, **more), (ids, expert_map, workspace[: 1 << 19])))
sys.setswitchinterval(1e-5)
refused = made = 0
for call, victims in calls:
    kept = [victim.copy() for victim in victims]
    stop = False
    def spoil():
        generator = np.random.default_rng(2)
        while not stop:
            for victim, value in zip(victims, kept):
                wild = generator.integers(-(2**30), 2**30, victim.size).astype(victim.dtype).reshape(victim.shape)
                victim[...] = wild
                time.sleep(2e-4)
                victim[...] = value
                time.sleep(2e-4)
    threads = [threading.Thread(target=spoil) for _ in range(2)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            call()
            made += 1
        except (ValueError, TypeError) as error:
            assert "panic" not in type(error).__name__.lower()
            refused += 1
    stop = True
    for thread in threads:
        thread.join()
    for victim, value in zip(victims, kept):
        victim[...] = value
    call()
assert made and refused, (made, refused)
print("done")
"""


def test_memory_that_another_thread_changes_is_at_worst_an_error():
    assert run_python(RACES).strip().endswith("done")


# -- calls that would take long -----------------------------------------------------------------------------------------


INTERRUPTED = """
import signal, sys, time
import numpy as np
from expertile import deep_gemm_utils as dg, _native
if which == "gather":
    tokens, topk = 2**14, 2**16
    of = lambda array: np.broadcast_to(array, (tokens, topk))
    ids, inv_perm = of(np.zeros((1, 1), np.int64)), of(np.zeros((1, 1), np.int32))
    call = lambda: dg.ep_gather(np.ones((1, 1024), np.float32), ids, of(np.ones((1, 1), np.float32)), inv_perm, None,
                                np.empty((tokens, 1024), np.float32))
elif which == "count":
    ids = np.broadcast_to(np.zeros((1, 1), np.int64), (2**31 - 1, 1))
    call = lambda: [dg.count_expert_num_tokens(ids, 2, None) for _ in range(100)]
elif which.startswith("pack"):
    # Memory that is only promised: reading it costs nothing, and what is packed is as large.
    experts, n, k = 32, 4096, 4096
    if which == "pack bf16":
        import torch
        w13 = torch.from_numpy(np.zeros((experts, n, k), np.uint16)).view(torch.bfloat16)
        w2 = torch.zeros(1, 1, 1).bfloat16()
        scales = None, None
    else:
        import torch
        w13 = torch.from_numpy(np.zeros((experts, n, k), np.uint8)).view(torch.float8_e4m3fn)
        w2 = torch.zeros(1, 1, 1).to(torch.float8_e4m3fn)
        scales = torch.ones(experts, n // 128, k // 128), None
    call = lambda: _native.Layer(w13, w2, *scales, "bf16", 1, 1.0, 0.0, None, False)
else:
    # Every token to both experts, whose rows are 1 GiB in all.
    tokens, hidden = 2**16, 2**13
    x = np.broadcast_to(np.ones((1, hidden), np.uint8 if which == "permute_quantized" else np.float32), (tokens, hidden))
    ids = np.broadcast_to(np.array([[0, 1]]), (tokens, 2))
    m_sum = 2 * tokens
    layout = np.empty(_native.layout_len(tokens, 2, 2, 1, m_sum), np.int32)
    out = np.empty((m_sum, hidden), np.uint8)
    scales = np.empty(m_sum * hidden // 128, np.float32)
    where = ids, None, 2, 1, m_sum
    call = {
        "permute_rows": lambda: _native.permute_rows(x.view(np.uint8)[:, :hidden], *where, None, True, out, layout),
        "permute_quantized": lambda: _native.permute_quantized(
            x, np.broadcast_to(np.ones((1, 1), np.float32), (tokens, hidden // 128)), *where, None, 128, "row_major",
            True, out, scales, layout,
        ),
        "quantize_permute": lambda: _native.quantize_permute(
            x, None, *where, 128, "row_major", None, True, out, scales, layout
        ),
    }[which]
    call()  # Touches the memory.
looks = []
def look(*_):
    looks.append(time.monotonic())
    if len(looks) == 2:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, look)
started = time.monotonic()
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
try:
    call()
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("finished", time.monotonic() - started)
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - started)
except MemoryError as error:
    print("memory", error)
"""


# A handler of Python's runs between two parts of a call, not within one: a call that is all of one part calls it once,
# when it is done, and two calls of it say that the call looked.
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this platform")
@pytest.mark.parametrize(
    "which",
    [
        "count",
        "gather",
        "permute_rows",
        "permute_quantized",
        "quantize_permute",
        pytest.param("pack bf16", marks=needs_torch),
        pytest.param("pack e4m3", marks=needs_torch),
    ],
)
def test_a_long_call_can_be_interrupted(which):
    printed = run_python(f"which = {which!r}\n{INTERRUPTED}", RAYON_NUM_THREADS="1").split()
    assert printed[0] in ("interrupted", "memory"), printed
    assert printed[0] == "memory" or float(printed[1]) < 60


@needs_torch
@pytest.mark.parametrize("scale_layout", ["row_major", "mn_major", "packed_ue8m0"])
def test_a_permute_in_parts_is_the_same_as_one_by_one(scale_layout):
    """Rows enough for two parts, against the same tokens in calls of their own."""
    import expertile.torch as et

    tokens, topk, hidden, experts = 2**12, 2, 2**15 + 128, 5
    generator = torch.Generator().manual_seed(7)
    few = torch.randn(16, hidden, generator=generator).bfloat16()
    x = few[torch.arange(tokens) % 16]
    ids = torch.randint(-1, experts, (tokens, topk), generator=generator)
    assert tokens * topk * hidden > 2**28
    options = {"alignment": 8, "scale_layout": scale_layout, "zero_padding": True}
    rows, scales, layout = et.quantize_permute(x, ids, experts, distinct=False, **options)
    one = et.quantize_permute(few, torch.zeros(16, 1, dtype=torch.int64), 1, **options)
    expected_rows = one.rows.view(torch.uint8)[:16][torch.arange(tokens) % 16]
    expected_scales = one.scales[:16][torch.arange(tokens) % 16]
    inv_perm = layout.inv_perm
    for slot in range(topk):
        live = inv_perm[:, slot] >= 0
        where = inv_perm[live, slot].long()
        assert torch.equal(rows.view(torch.uint8)[where], expected_rows[live])
        assert torch.equal(scales[where], expected_scales[live])
    padding = layout.m_indices < 0
    assert padding.any() and not rows.view(torch.uint8)[padding].any() and not scales[padding].any()
    moved = et.permute_quantized(
        expected_rows.view(torch.float8_e4m3fn),
        expected_scales.contiguous() if scale_layout != "packed_ue8m0" else unpacked(expected_scales, hidden // 128),
        ids,
        experts,
        distinct=False,
        **options,
    )
    assert torch.equal(moved.rows.view(torch.uint8), rows.view(torch.uint8)) and torch.equal(moved.scales, scales)


def unpacked(words, groups):
    """UE8M0 bytes [M, groups] of packed words."""
    return words.contiguous().view(torch.uint8)[:, :groups]


@needs_torch
def test_rows_of_a_layer_do_not_depend_on_the_rows_beside_them():
    import expertile.torch as et

    generator = torch.Generator().manual_seed(3)
    w13, w2 = (torch.randn(4, *shape, generator=generator).bfloat16() / 8 for shape in ((64, 128), (128, 32)))
    layer = et.Layer(w13, w2)
    x = torch.randn(300, 128, generator=generator)
    ids = torch.randint(-1, 4, (300, 3), generator=generator)
    weights = torch.rand(300, 3, generator=generator)
    whole = layer(x, ids, weights)
    for first, last in ((0, 1), (0, 128), (1, 77), (250, 300)):
        assert torch.equal(layer(x[first:last], ids[first:last], weights[first:last]), whole[first:last])
    workspace = torch.empty(layer.workspace_bytes(300, 3), dtype=torch.uint8)
    expert_map = torch.tensor([2, -1, 0, 1, 3, -1], dtype=torch.int32)
    wide = torch.randint(-1, 6, (300, 3), generator=generator)
    for some_ids, some_map in ((ids, None), (wide, expert_map)):
        whole = layer(x, some_ids, weights, expert_map=some_map)
        for tokens_at_once in (1, 7, 299, 300):
            out = torch.full((300, 128), 77.0)
            arguments = (x, some_ids, weights, some_map, workspace, out)
            layer._native.run(*arguments, tokens_at_once=tokens_at_once)
            assert torch.equal(out, whole), tokens_at_once
    out = torch.full((300, 128), 77.0)
    for wrong, message in (
        ((x, ids, weights[:299], None, workspace, out), "topk_weights has shape"),
        ((x[:299], ids, weights, None, workspace, out), "out has shape"),
        ((x, ids, weights, None, workspace[:-1], out), "workspace holds"),
        ((x, wide.clamp(min=5), weights, None, workspace, out), "topk_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            layer._native.run(*wrong, tokens_at_once=7)
    assert (out == 77).all()


def test_a_long_sum_is_the_same_in_parts():
    tokens, topk, hidden = 1024, 2048, 256
    rows = np.arange(3 * hidden, dtype=np.float32).reshape(3, hidden)
    ids, weights = np.zeros((1, topk), np.int64), np.full((1, topk), 0.5, np.float32)
    inv_perm = (np.arange(topk, dtype=np.int32) % 3)[None]
    ids[0, ::7] = -1
    inv_perm[0, ::7] = 99
    expected = np.empty((1, hidden), np.float32)
    deep_gemm_utils.ep_gather(rows, ids, weights, inv_perm, None, expected)
    out = np.full((tokens, hidden), 77, np.float32)
    of = [np.broadcast_to(array, (tokens, topk)) for array in (ids, weights, inv_perm)]
    deep_gemm_utils.ep_gather(rows, *of, None, out)
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))
    many = np.ascontiguousarray(of[2])
    many[-1, 1] = 3
    out[:] = 77
    with pytest.raises(ValueError, match=r"input_index\[1023, 1\] is 3, expected a row below 3"):
        deep_gemm_utils.ep_gather(rows, of[0], of[1], many, None, out)
    assert (out == 77).all()


def test_more_threads_than_is_sane_are_refused():
    for threads in (1025, 65536, 2**63, 2**70):
        with pytest.raises(ValueError, match="expected (1 to 1024|at most)"):
            expertile.set_num_threads(threads)
    program = """
    import expertile
    try:
        expertile.get_num_threads()
    except ValueError as error:
        print(error)
    expertile.set_num_threads(3)
    print(expertile.get_num_threads())
    """
    printed = run_python(program, RAYON_NUM_THREADS="65536").splitlines()
    assert printed == ["RAYON_NUM_THREADS is 65536, expected 1 to 1024", "3"]


# -- processes ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forks_under_load_end_well_and_keep_the_number_of_threads():
    program = """
    import os, signal, threading, warnings
    import numpy
    import expertile
    from expertile import deep_gemm_utils
    warnings.simplefilter("ignore")
    expertile.set_num_threads(3)
    def permute():
        aq, scale = numpy.ones((64, 1024), numpy.uint8), numpy.ones((64, 8), numpy.float32)
        ids = numpy.arange(128).reshape(64, 2) % 8
        return deep_gemm_utils.deepgemm_moe_permute(aq, scale, ids, 8, None, None)[1].sum()
    expected, stop = permute(), False
    def load():
        while not stop:
            permute()
    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    failed = 0
    for _ in range(FORKS):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if permute() == expected and expertile.get_num_threads() == 3 else 1)
        failed += os.waitpid(child, 0)[1] != 0
    stop = True
    for thread in threads:
        thread.join()
    print(failed)
    """
    forks = 400 if FULL else 40
    assert run_python(program.replace("FORKS", str(forks)), timeout=1800).strip() == "0"


def test_subinterpreters_come_and_go():
    program = """
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    import expertile
    for _ in range(INTERPRETERS):
        other = interpreters.create()
        interpreters.run_string(other, "import expertile; print(expertile.Plan.tight(3, 1, 2).m_sum, flush=True)")
        interpreters.destroy(other)
    print(expertile.get_num_threads() >= 1)
    """
    count = 100 if FULL else 5
    printed = run_python(program.replace("INTERPRETERS", str(count)), timeout=1800).split()
    assert printed == ["256"] * count + ["True"]


def test_many_calls_do_not_grow():
    pytest.importorskip("resource")
    program = """
    import resource
    import numpy as np
    from expertile import deep_gemm_utils as dg
    ids, wrong = np.zeros((4, 2), np.int64), np.full((4, 2), 9)
    x, scale = np.ones((4, 128), np.uint8), np.ones((4, 1), np.float32)
    def some(count):
        for _ in range(count):
            dg.deepgemm_moe_permute(x, scale, ids, 4, None, None)
            dg.count_expert_num_tokens(ids, 4, None)
            try:
                dg.count_expert_num_tokens(wrong, 4, None)
            except ValueError:
                pass
    def held():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    some(500)
    before = held()
    some(ROUNDS)  # Of three calls each.
    print(held() - before)
    """
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("no /proc here")
    rounds = 114_280 // 3 + 1 if FULL else 4000
    assert int(run_python(program.replace("ROUNDS", str(rounds)), timeout=1800)) < 4 << 20


# -- numbers, layers ----------------------------------------------------------------------------------------------------


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
def test_a_layer_is_copied_and_outlives_what_it_was_copied_from():
    import copy
    import pickle

    import expertile.torch as et

    layer = et.Layer(torch.ones(2, 64, 128).bfloat16(), torch.ones(2, 128, 32).bfloat16())
    arguments = torch.ones(3, 128), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    expected, number = layer(*arguments), layer._number
    with pytest.raises(TypeError, match="a Layer cannot be pickled"):
        pickle.dumps(layer)
    copies = [copy.copy(layer), copy.deepcopy(layer), copy.copy(copy.copy(layer))]
    del layer
    for other in copies:
        assert torch.equal(other(*arguments), expected)
    with pytest.raises(ValueError, match=f"layer is {number}, expected the number of a Layer that is alive"):
        torch.ops.expertile.layer(number, *arguments, None, None, torch.empty(3, 128))


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
