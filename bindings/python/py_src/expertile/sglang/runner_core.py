"""The runner core that SGLang builds in the place of Triton's, and how it gets hold of a runner."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeRunnerConfig, MoeRunnerCore
from sglang.srt.layers.moe.moe_runner.triton import TritonRunnerCore
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_a2a_backend

from .._errors import ArgumentValueError
from . import refusal, serving
from .held_layer import HeldLayer, place_of

_KEPT = "expertile leaves experts to SGLang's Triton runner: %s"

# Weights that are elsewhere in so many calls one after the other are streamed through memory.
_MOVES = 4


class ExpertileRunnerCore(DispatchMoeRunnerCore):
    """Runs whole calls on ``expertile.torch.Layer``; those that it does not take, on what SGLang would have called.

    The result is a tensor of its own, also with ``inplace``, which SGLang calls a suggestion.
    """

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        self.host: Callable[[Any, Any, Any], Any] | None = None
        self._held: HeldLayer | None = None
        self._moves = 0
        self._captured: list[HeldLayer] = []

    @property
    def runner_backend(self) -> MoeRunnerBackend:
        return MoeRunnerBackend.TRITON

    def run_from_dispatch(
        self, dispatch_output: Any, quant_info: Any, runner_config: MoeRunnerConfig, hooks: Any = None
    ) -> Any:
        """What SGLang calls. Raises ValueError or TypeError for tensors of a call that do not fit the weights."""
        if torch.compiler.is_compiling():
            return _run_untraced(self, dispatch_output, quant_info, runner_config, hooks)
        return self._run(dispatch_output, quant_info, runner_config, hooks)

    def _run(self, dispatch_output: Any, quant_info: Any, runner_config: MoeRunnerConfig, hooks: Any) -> Any:
        if hooks is not None:
            raise ArgumentValueError(
                "hooks", f" are {type(hooks).__name__}", hooks, "none: only Triton's core has them"
            )
        reason = refusal.of_call(dispatch_output)
        if reason is not None:
            return self._leave(reason, dispatch_output, quant_info, runner_config)
        hidden_states = dispatch_output.hidden_states
        topk_weights, topk_ids = dispatch_output.topk_output[:2]
        held = self._held_for(quant_info, runner_config, hidden_states)
        reason = _CAPTURING if held is None else held.refused or held.prepare(hidden_states, topk_ids)
        if held is None or held.layer is None or reason is not None:
            return self._leave(reason or "", dispatch_output, quant_info, runner_config)
        held.calls += 1
        if hidden_states.is_cuda and not held.captured:
            held.captured = torch.cuda.is_current_stream_capturing()

        factor = runner_config.routed_scaling_factor
        scaled = factor is not None and factor != 1.0
        if topk_weights.dtype != torch.float32:
            topk_weights = topk_weights.float()
        if scaled and not runner_config.apply_router_weight_on_input:
            topk_weights = topk_weights * factor
        output = serving.output_for(hidden_states)
        output = held.layer(hidden_states, topk_ids, topk_weights, expert_map=held.expert_map, out=output)
        if scaled and runner_config.apply_router_weight_on_input:
            output.mul_(factor)
        return StandardCombineInput(hidden_states=output)

    def _held_for(self, quant_info: Any, config: MoeRunnerConfig, hidden_states: torch.Tensor) -> HeldLayer | None:
        """What is known of these weights; None if a graph is being captured, in which nothing can be made."""
        held, place = self._held, place_of(quant_info)
        if held is not None and held.place == place:
            return held
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        if held is not None:
            self._moves = self._moves + 1 if held.calls <= 1 else 0
            if held.captured:
                # Its graphs launch its kernels and write its memory as long as they are replayed.
                self._captured.append(held)
        if self._moves >= _MOVES:
            held = HeldLayer(place, "the weights are elsewhere in every call, expected them to stay")
        else:
            held = HeldLayer.of(place, config, quant_info)
        if held.layer is not None:
            layer, weights = held.layer, "e4m3" if quant_info.use_fp8_w8a8 else "bf16"
            shape = f"{layer.local_experts} experts, H {layer.hidden}, I {layer.intermediate}"
            serving.say(logging.INFO, f"expertile computes {shape}, {weights}, on {layer.device}")
        self._held = held
        return held

    def _leave(self, reason: str, dispatch_output: Any, quant_info: Any, runner_config: MoeRunnerConfig) -> Any:
        serving.say(logging.WARNING, _KEPT % reason)
        if self.host is None:
            raise RuntimeError(f"no function of SGLang's to fall back on, which is needed: {reason}")
        return self.host(dispatch_output, quant_info, runner_config)


_CAPTURING = "a CUDA graph captures the first call with these weights, expected a warm-up before it"

_run_untraced = torch.compiler.disable(ExpertileRunnerCore._run)


def core_for(config: MoeRunnerConfig) -> DispatchMoeRunnerCore | MoeRunnerCore:
    """The core of a new runner: SGLang's own for what is known now not to be taken."""
    reason = refusal.of_config(config)
    if reason is None and not get_moe_a2a_backend().is_none():
        reason = f"the all-to-all backend is {get_moe_a2a_backend().value}, expected none"
    if reason is None:
        return ExpertileRunnerCore(config)
    serving.say(logging.WARNING, _KEPT % reason)
    return TritonRunnerCore(config)


def hand_over(_: None, runner: Any, *arguments: Any, **named: Any) -> None:
    """After a runner is built: its core is what it calls, and the function that came before it is the core's."""
    core = runner.runner_core
    if not isinstance(core, ExpertileRunnerCore):
        return
    if runner.fused_func is None:
        reason = "LoRA is enabled" if runner.lora_enabled else "it has no function for whole calls"
        serving.say(logging.WARNING, _KEPT % reason)
        runner.runner_core = TritonRunnerCore(runner.config)
        return
    core.host, runner.fused_func = runner.fused_func, None
