"""Stands in for a module that has imported the choice by name."""

from vllm.model_executor.layers.fused_moe.oracle.fp8 import select_fp8_moe_backend

__all__ = ["select_fp8_moe_backend"]
