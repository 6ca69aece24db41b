"""Arrays that say they are huge, and memory that is not there: an error at once, nothing allocated."""

import sys

import pytest

from hostile import run_python

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
            of((1, many), np.float32), new((1, 1), np.int64) - 1, None, 4, 1, 0, None, False,
            new((0, many), np.float32), new((100,), np.int32),
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
        given = of["rows"], of["ids"], of["weights"], out
        rows, ids, weights, result = (None if x is None else new(x) for x in given)
        inv_perm, many_ids = huge(shape, np.int32, kind), huge(shape, np.int64, kind)
        unpermute = expertile._native.unpermute
        refused(lambda: unpermute(rows, inv_perm, ids, None, weights, result), ValueError)
        refused(lambda: unpermute(rows, inv_perm, many_ids, None, weights, result[:-1]), ValueError)
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
