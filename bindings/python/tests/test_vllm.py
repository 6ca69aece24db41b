"""Patching vLLM, on a stand-in package with its import structure."""

import importlib
from importlib.metadata import entry_points

import pytest

import expertile.vllm
from expertile import deep_gemm_utils

EXPERTS = "vllm.model_executor.layers.fused_moe.experts.deep_gemm_moe"
UTILS = "vllm.model_executor.layers.fused_moe.deep_gemm_utils"


pytestmark = pytest.mark.usefixtures("stand_in_vllm")


def test_patch_reaches_every_module_that_imported_a_function_and_unpatch_all_of_them():
    experts = importlib.import_module(EXPERTS)
    utils = importlib.import_module(UTILS)
    original = utils.compute_aligned_M
    assert experts.workspace_rows(1, 8, 4) == "vllm"
    expertile.vllm.patch()
    expertile.vllm.patch()
    assert experts.workspace_rows(1, 8, 4) == 640
    assert utils.count_expert_num_tokens is deep_gemm_utils.count_expert_num_tokens
    late = importlib.import_module("vllm.model_executor.warmup.deep_gemm_warmup")
    assert late.compute_aligned_M_and_alignment is deep_gemm_utils.compute_aligned_M_and_alignment
    expertile.vllm.unpatch()
    assert experts.compute_aligned_M is original and utils.compute_aligned_M is original
    assert late.compute_aligned_M_and_alignment is utils.compute_aligned_M_and_alignment
    assert utils.count_expert_num_tokens(None, 1, None) == "vllm"
    assert deep_gemm_utils.compute_aligned_M(1, 8, 4, 128, None) == 640


def test_the_alignment_is_vllms_while_patched():
    gemm = importlib.import_module("vllm.utils.deep_gemm")
    expertile.vllm.patch()
    gemm.state["alignment"] = 64
    assert deep_gemm_utils.get_mk_alignment_for_contiguous_layout() == [64, 64]
    with deep_gemm_utils.mk_alignment_scope(32):
        assert gemm.state["alignment"] == 32
    assert gemm.state["alignment"] == 64
    # Like the DeepGEMM that vLLM 0.33 carries, this one cannot be asked for a tile per call.
    assert deep_gemm_utils.compute_aligned_M_and_alignment(1, 8, 4, 128, None) == (640, 128)
    expertile.vllm.unpatch()
    assert deep_gemm_utils.get_mk_alignment_for_contiguous_layout() == [128, 128]


def test_a_gemm_that_picks_a_tile_per_call_shrinks_the_alignment():
    gemm = importlib.import_module("vllm.utils.deep_gemm")
    gemm.state["theoretical"] = 32
    expertile.vllm.patch()
    assert deep_gemm_utils.compute_aligned_M_and_alignment(4, 8, 16, 128, None) == (544, 32)
    gemm.state["theoretical"] = 256
    assert deep_gemm_utils.compute_aligned_M_and_alignment(4, 8, 16, 128, None) == (2176, 128)


def test_a_module_without_the_main_functions_is_an_error_and_replaces_nothing():
    utils = importlib.import_module(UTILS)
    original = utils.compute_aligned_M
    del utils.deepgemm_moe_permute, utils.deepgemm_unpermute_and_reduce
    with pytest.raises(ImportError, match="has neither deepgemm_moe_permute nor deepgemm_unpermute_and_reduce"):
        expertile.vllm.patch()
    assert utils.compute_aligned_M is original and not expertile.vllm.is_patched()


def test_what_another_release_lacks_is_left_out_and_what_it_adds_stays(caplog):
    """As a series of pull requests has it: other private kernels, classes and singletons that the warm-up imports."""
    utils = importlib.import_module(UTILS)
    del utils.ep_gather, utils.ep_scatter

    class DeepGemmEPScatterStartKernel:
        pass

    utils.DeepGemmEPScatterStartKernel = DeepGemmEPScatterStartKernel
    utils.scatter_start_kernel = singleton = DeepGemmEPScatterStartKernel()
    with caplog.at_level("INFO", logger="expertile.vllm"):
        expertile.vllm.patch()
    assert "deep_gemm_utils has no ep_gather, ep_scatter, which is left out" in caplog.text
    assert utils.deepgemm_moe_permute is deep_gemm_utils.deepgemm_moe_permute
    assert not hasattr(utils, "ep_gather")
    assert utils.DeepGemmEPScatterStartKernel is DeepGemmEPScatterStartKernel
    assert utils.scatter_start_kernel is singleton
    expertile.vllm.unpatch()
    assert utils.deepgemm_moe_permute() == "vllm" and not hasattr(utils, "ep_gather")


@pytest.mark.parametrize("main", ["deepgemm_moe_permute", "deepgemm_unpermute_and_reduce"])
def test_one_of_the_main_functions_is_enough(main):
    utils = importlib.import_module(UTILS)
    delattr(utils, main)
    expertile.vllm.patch()
    assert expertile.vllm.is_patched() and not hasattr(utils, main)


def test_the_plugin_patches_only_when_asked(monkeypatch):
    (plugin,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "expertile")
    monkeypatch.delenv("EXPERTILE_VLLM", raising=False)
    plugin.load()()
    assert not expertile.vllm.is_patched()
    monkeypatch.setenv("EXPERTILE_VLLM", "1")
    plugin.load()()
    assert expertile.vllm.is_patched()


def test_a_layer_runs_through_the_patched_functions():
    torch = pytest.importorskip("torch")
    experts = importlib.import_module(EXPERTS)
    expertile.vllm.patch()
    aq = torch.arange(6 * 128).remainder(100).to(torch.uint8).view(6, 128)
    scale = torch.ones(6, 1)
    ids = torch.tensor([[0, 1], [2, 0], [1, -1], [2, 1], [0, 2], [1, 0]])
    weights = torch.full((6, 2), 0.5)
    out = experts.apply(aq, scale, ids, weights, 3, lambda rows, scales, layout: rows.float())
    expected = aq.float() * torch.tensor([1, 1, 0.5, 1, 1, 1])[:, None]
    assert torch.equal(out, expected)
