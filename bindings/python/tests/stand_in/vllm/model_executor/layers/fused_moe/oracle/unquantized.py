"""Stands in for the choice of experts that are not quantized."""

import enum


class UnquantizedMoeBackend(enum.Enum):
    TRITON = "TRITON"


def select_unquantized_moe_backend(moe_config):
    return "vllm", moe_config
