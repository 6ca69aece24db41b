"""Forks under load, subinterpreters, many calls, layers that are copied."""

import os

import pytest

from hostile import FULL, needs_torch, run_python

try:
    import torch
except ImportError:
    torch = None


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
