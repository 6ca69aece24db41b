"""Stands in for the choice of FP8 experts: it is always Triton."""

import enum


class Fp8MoeBackend(enum.Enum):
    TRITON = "TRITON"


def select_fp8_moe_backend(config, weight_key, activation_key, allow_vllm_cutlass=False):
    return "vllm", (config, weight_key, activation_key, allow_vllm_cutlass)
