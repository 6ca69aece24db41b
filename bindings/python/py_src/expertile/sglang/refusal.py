"""What the layer does not compute as Triton's runner would: the reason in words, or none.

SGLang may get fields that this file does not know: one that has not its default may change the numbers, and is a
reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.topk import TopKOutputChecker

# Fields that change no number of what a rank computes, and those that the layer's options, or its calls, come from.
_CONFIG_FREE = {
    "num_experts",
    "num_local_experts",
    "hidden_size",
    "intermediate_size_per_partition",
    "layer_id",
    "top_k",
    "num_fused_shared_experts",
    "params_dtype",
    "routing_method_type",
    "runner_backend",
    "inplace",
    "layer",
    "apply_router_weight_on_input",
    "routed_scaling_factor",
    "gemm1_alpha",
    "gemm1_clamp_limit",
    "swiglu_limit",
    "gate_up_interleaved",
}
_CONFIG_TAKEN: Mapping[str, tuple[Any, ...]] = {
    "activation": ("silu",),
    # Triton's runner adds 1 to `up` where there is an alpha, whatever this says.
    "gemm1_beta": (None, 1.0),
}
_WEIGHTS_FREE = {"w13_weight", "w2_weight", "w13_scale", "w2_scale", "use_fp8_w8a8", "block_shape"}

_BLOCK = [128, 128]


def of_config(config: MoeRunnerConfig) -> str | None:
    """Why experts of this configuration are not taken."""
    reason = _of_fields(config, _CONFIG_FREE, _CONFIG_TAKEN)
    if reason is not None:
        return reason
    if config.gemm1_alpha is not None:
        if config.gate_up_interleaved:
            return "gate_up_interleaved is True with a gemm1_alpha, expected gate's rows before up's"
        if config.gemm1_clamp_limit is None or config.swiglu_limit is not None:
            limits = f"gemm1_clamp_limit is {config.gemm1_clamp_limit}, swiglu_limit is {config.swiglu_limit}"
            return f"{limits}, expected only the first with a gemm1_alpha"
    elif config.gemm1_clamp_limit is not None:
        return f"gemm1_clamp_limit is {config.gemm1_clamp_limit} without a gemm1_alpha, expected none: it clamps SiLU"
    return None


def layer_options(config: MoeRunnerConfig) -> dict[str, Any]:
    """Options of ``expertile.torch.Layer`` for a configuration that is taken."""
    options: dict[str, Any] = {"weight_on_input": config.apply_router_weight_on_input}
    if config.gemm1_alpha is not None:
        return options | {"alpha": float(config.gemm1_alpha), "beta": 1.0, "limit": float(config.gemm1_clamp_limit)}
    return options | {"limit": None if config.swiglu_limit is None else float(config.swiglu_limit)}


def of_weights(weights: Any) -> str | None:
    """Why weights are not taken: formats other than bf16 and e4m3 with blocks, and what cannot be used in place."""
    if not isinstance(weights, TritonMoeQuantInfo):
        return f"quant_info is {type(weights).__name__}, expected TritonMoeQuantInfo"
    reason = _of_fields(weights, _WEIGHTS_FREE, {})
    if reason is not None:
        return reason
    tensors = {"w13_weight": weights.w13_weight, "w2_weight": weights.w2_weight}
    scales = {"w13_scale": weights.w13_scale, "w2_scale": weights.w2_scale}
    dtype = torch.float8_e4m3fn if weights.use_fp8_w8a8 else torch.bfloat16
    expected = dict.fromkeys(tensors, dtype)
    if weights.use_fp8_w8a8:
        if weights.block_shape is None or list(weights.block_shape) != _BLOCK:
            return f"block_shape is {weights.block_shape}, expected {_BLOCK}"
        tensors |= scales
        expected |= dict.fromkeys(scales, torch.float32)
    elif any(scale is not None for scale in scales.values()):
        return "scales are given for weights that are not float8_e4m3fn, expected none"
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype != expected[name]:
            return f"{name} is {None if tensor is None else tensor.dtype}, expected {expected[name]}"
        if not tensor.is_contiguous():
            return f"{name} has strides {tuple(tensor.stride())}, expected contiguous weights"
    return None


def of_call(dispatch_output: Any) -> str | None:
    """Why a call is not taken, whatever its weights."""
    if not dispatch_output.format.is_standard():
        return f"the dispatch format is {dispatch_output.format.value}, expected standard"
    if dispatch_output.hidden_states_scale is not None or dispatch_output.hidden_states_pre_quant is not None:
        return "hidden_states come quantized, expected them as they are"
    if not TopKOutputChecker.format_is_standard(dispatch_output.topk_output):
        return f"topk_output is {type(dispatch_output.topk_output).__name__}, expected StandardTopKOutput"
    return None


def _of_fields(found: Any, free: set[str], taken: Mapping[str, tuple[Any, ...]]) -> str | None:
    """The first field of a dataclass that has another value than those that are taken, or than its default."""
    for field in dataclasses.fields(found):
        if field.name in free:
            continue
        values = taken.get(field.name, (field.default,))
        value = getattr(found, field.name)
        if not any(value is known or (not isinstance(value, torch.Tensor) and value == known) for known in values):
            said = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            return f"{field.name} is {said}, expected {' or '.join(map(repr, values))}"
    return None
