from ..utils import MoeRunnerBackend, get_moe_a2a_backend
from .base import DispatchMoeRunnerCore
from .triton import TritonRunnerCore, fused_experts

_factories = {}


def register_moe_runner_core(name, factory):
    if name in _factories:
        raise ValueError(f"a core of the name {name} is registered already")
    MoeRunnerBackend(name)
    _factories[name] = factory


class MoeRunner:
    def __init__(self, runner_backend, config, lora_enabled=False):
        self.runner_backend = runner_backend
        self.config = config
        self.lora_enabled = lora_enabled
        self.runner_core = _factories.get(runner_backend.value, TritonRunnerCore)(config)
        whole = not lora_enabled and get_moe_a2a_backend().is_none() and runner_backend is MoeRunnerBackend.TRITON
        self.fused_func = fused_experts if whole else None

    def run(self, dispatch_output, quant_info):
        if self.fused_func is not None:
            return self.fused_func(dispatch_output, quant_info, self.config)
        assert isinstance(self.runner_core, DispatchMoeRunnerCore)
        return self.runner_core.run_from_dispatch(dispatch_output, quant_info, self.config)
