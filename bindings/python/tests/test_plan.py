"""Planning, which needs neither torch nor NumPy."""

import copy
import os
import pickle
import subprocess
import sys

import pytest

import expertile


def test_the_contracts_example_holds():
    assert expertile.Plan.reference(128, 8, 128).m_sum == 17280
    assert expertile.Plan.tight(128, 8, 128).m_sum == 16384 == expertile.tight_m_sum(128, 8, 128, 128)
    assert expertile.Plan.exact(9, 8, [0, 1, 64, 65], 64).m_sum == 256
    assert expertile.compute_aligned_m_and_alignment(4, 8, 16, 128, "deepgemm-2026-06", "sm100") == (544, 32)
    assert expertile.theoretical_alignment("vllm-fork", "sm120", 512, 8) == 64
    assert expertile.round_up(129, 128) == 256


def test_plans_are_values():
    plan = expertile.Plan.tight(tokens=3, topk=2, local_experts=4, alignment=16)
    assert plan == expertile.Plan(3, 2, 4, 16, plan.m_sum) and hash(plan) == hash(copy.deepcopy(plan))
    assert plan != expertile.Plan(3, 2, 4, 16, plan.m_sum + 16)
    assert repr(plan) == "Plan(tokens=3, topk=2, local_experts=4, alignment=16, m_sum=64)"
    assert eval(repr(plan), {"Plan": expertile.Plan}) == plan
    assert plan.layout_len == 3 * 4 + 64 + 6 + 5 + 2 * 64 // 16 + 64
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(plan, protocol)) == plan
    with pytest.raises(AttributeError):
        plan.m_sum = 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expertile.Plan(1, 1, 1, 8, 12), "m_sum is 12, expected a multiple of the alignment 8"),
        (lambda: expertile.Plan(1, 0, 1, 8, 8), "topk is 0, expected at least 1"),
        (lambda: expertile.Plan.tight(1, 1, 1, -8), "alignment is -8, expected an integer of at least 0"),
        (lambda: expertile.Plan.reference(1, 1, 1, rule="vllm-fork"), "arch is None"),
        (lambda: expertile.theoretical_alignment("old", "sm90"), 'rule is "old", expected one of'),
        (lambda: expertile.theoretical_alignment("vllm-fork", "sm80"), 'arch is "sm80", expected one of'),
        (lambda: expertile.expert_num_tokens_round_up_and_sum([3, -1], 8), "expert_num_tokens\\[1\\] is -1"),
        (lambda: expertile.set_num_threads(0), "threads is 0, expected 1 to 1024"),
    ],
)
def test_impossible_requests_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def run_python(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError("No module named " + name)
sys.meta_path.insert(0, Missing())
"""


def test_planning_works_without_torch_and_numpy():
    program = WITHOUT.format(names=("torch", "numpy")) + (
        "import expertile\n"
        "from expertile import deep_gemm_utils\n"
        "assert expertile.Plan.tight(128, 8, 128).m_sum == 16384\n"
        "assert deep_gemm_utils.compute_aligned_M(128, 8, 128, 128, None) == 17280\n"
        "assert deep_gemm_utils.get_theoretical_mk_alignment_for_contiguous_layout() == 128\n"
    )
    run_python(program)


def test_numpy_alone_is_enough_for_deep_gemm_utils_and_expertile_torch_says_what_is_missing():
    pytest.importorskip("numpy")
    program = WITHOUT.format(names=("torch",)) + (
        "import numpy\n"
        "from expertile import deep_gemm_utils\n"
        "aq, scale = numpy.zeros((2, 128), numpy.uint8), numpy.ones((2, 1), numpy.float32)\n"
        "meta = deep_gemm_utils.ExpertTokensMetadata.make_from_list([1, 1], 'cpu')\n"
        "out = deep_gemm_utils.deepgemm_moe_permute(aq, scale, numpy.array([[0], [1]]), 2, None, meta)\n"
        "assert isinstance(out[0], numpy.ndarray) and out[0].shape == (256, 128)\n"
        "try:\n"
        "    deep_gemm_utils.ExpertTokensMetadata.make_from_list([1, 1], 'cuda')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "try:\n"
        "    import expertile.torch\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    printed = run_python(program)
    assert 'device is "cuda", expected "cpu" where torch is not installed' in printed
    assert "expertile.torch needs torch, which is not installed" in printed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_has_threads_of_its_own():
    pytest.importorskip("numpy")
    program = """
import os, signal, warnings
import numpy
from expertile import deep_gemm_utils
warnings.simplefilter("ignore")
def permute():
    aq, scale = numpy.ones((64, 4096), numpy.uint8), numpy.ones((64, 32), numpy.float32)
    return deep_gemm_utils.deepgemm_moe_permute(aq, scale, numpy.arange(128).reshape(64, 2) % 8, 8, None, None)[0].sum()
first = permute()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if permute() >= 64 * 2 * 4096 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(program).strip() == "0"
