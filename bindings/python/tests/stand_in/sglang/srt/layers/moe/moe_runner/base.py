from abc import ABC
from dataclasses import dataclass
from typing import Any


@dataclass
class MoeRunnerConfig:
    num_experts: int | None = None
    num_local_experts: int | None = None
    layer_id: int | None = None
    top_k: int | None = None
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    inplace: bool = True
    no_combine: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None
    gate_up_interleaved: bool = True
    layer: Any = None
    # A field that a later SGLang may have.
    gate_bias: Any = None


class MoeRunnerCore(ABC):  # noqa: B024
    def __init__(self, config):
        self.config = config


class DispatchMoeRunnerCore(ABC):  # noqa: B024
    def __init__(self, config):
        self.config = config
