"""Stands in for the choice of MXFP4 experts."""

import enum


class Mxfp4MoeBackend(enum.Enum):
    EMULATION = "EMULATION"


def select_mxfp4_moe_backend(config, activation_key=None):
    return "vllm", (config, activation_key)
