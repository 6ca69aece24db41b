"""Stands in for the warm-up, which is imported late."""

from vllm.model_executor.layers.fused_moe.deep_gemm_utils import compute_aligned_M_and_alignment

__all__ = ["compute_aligned_M_and_alignment"]
