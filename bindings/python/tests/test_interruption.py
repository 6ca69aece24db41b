"""Calls that take long look whether they have been interrupted, and give the same in parts."""

import signal

import numpy as np
import pytest

from expertile import deep_gemm_utils
from hostile import needs_torch, run_python

try:
    import torch
except ImportError:
    torch = None


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
    dtype = np.uint8 if which == "permute_quantized" else np.float32
    x = np.broadcast_to(np.ones((1, hidden), dtype), (tokens, hidden))
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
@pytest.mark.parametrize("intermediate", [128, 160, 320])
def test_weights_packed_in_parts_are_those_packed_at_once(intermediate):
    from expertile import _native

    generator = torch.Generator().manual_seed(11)
    experts, hidden, tokens = 3, 416, 40
    w13, w2 = (
        torch.randn(experts, *shape, generator=generator)
        for shape in ((2 * intermediate, hidden), (hidden, intermediate))
    )
    blocks = [-(-extent // 128) for extent in (intermediate, hidden)]
    s13 = torch.rand(experts, 2 * blocks[0], blocks[1], generator=generator) + 0.5
    s2 = torch.rand(experts, blocks[1], blocks[0], generator=generator) + 0.5
    ids = torch.randint(-1, experts, (tokens, 2), generator=generator)
    x, weights = torch.randn(tokens, hidden, generator=generator), torch.rand(tokens, 2, generator=generator)
    for dtype, scales in ((torch.bfloat16, (None, None)), (torch.float8_e4m3fn, (s13, s2))):
        results = []
        for rows_at_once in (None, 1, 128, 255, 256, 10**6):
            layer = _native.Layer(
                w13.to(dtype), w2.to(dtype), *scales, "bf16", 1, 1.0, 0.0, None, False, rows_at_once=rows_at_once
            )
            workspace = torch.empty(layer.workspace_bytes(tokens, 2), dtype=torch.uint8)
            results.append(torch.empty(tokens, hidden))
            layer.run(x, ids, weights, None, workspace, results[-1])
        assert results[0].any() and all(torch.equal(result, results[0]) for result in results)


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
