"""Memory that another thread changes, and numbers of threads."""

import pytest

import expertile
from hostile import run_python

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
