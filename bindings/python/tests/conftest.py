"""What the tests share: where the peer is, whether torch is there, random routings."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy
import pytest

PEER = os.environ.get("EXPERTILE_PEER")


def has_gpu():
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


if PEER or (os.environ.get("EXPERTILE_VLLM_SOURCE") and not has_gpu()):
    # Before anything imports triton: its kernels then run on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
SGLANG = os.environ.get("EXPERTILE_SGLANG_SOURCE") or importlib.util.find_spec("sglang")
if SGLANG and importlib.util.find_spec("torch") and not importlib.import_module("torch").cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header():
    try:
        import torch

        found = f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'not available'}"
    except ImportError:
        found = "torch not installed: NumPy only"
    return f"expertile: {found}; peer: {PEER or 'none (set EXPERTILE_PEER)'}"


@pytest.fixture
def rng(request):
    """A generator whose seed is the test's name, so that a failure repeats."""
    return numpy.random.default_rng(sum(request.node.name.encode()))


@pytest.fixture
def peer():
    """The real module of vLLM 0.33.0, in Triton's interpreter."""
    if not PEER:
        pytest.skip("EXPERTILE_PEER names no folder with vLLM 0.33.0's module")
    pytest.importorskip("triton")
    sys.path.insert(0, os.path.join(PEER, "seed"))
    try:
        from vllm.model_executor.layers.fused_moe import deep_gemm_utils
    finally:
        sys.path.pop(0)
    return deep_gemm_utils


@pytest.fixture
def stand_in_vllm(monkeypatch):
    """The stand-in is `vllm` during a test, whatever is installed, and no longer."""
    import expertile.vllm

    def of_vllm():
        ours = ("expertile.vllm.experts", "expertile.vllm.mxfp4")
        return [name for name in sys.modules if name.split(".")[0] == "vllm" or name in ours]

    hidden = {name: sys.modules.pop(name) for name in of_vllm()}
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in")
    yield
    expertile.vllm.unpatch()
    expertile.vllm.deselect_experts()
    for name in of_vllm():
        del sys.modules[name]
    sys.modules.update(hidden)
