"""What Triton's runner computes, one slot after the other in float32."""

from dataclasses import dataclass
from typing import Any

import torch

from ..token_dispatcher.standard import StandardCombineInput
from .base import MoeRunnerCore

calls = []


@dataclass
class TritonMoeQuantInfo:
    w13_weight: Any
    w2_weight: Any
    b13: Any = None
    b2: Any = None
    use_fp8_w8a8: bool = False
    use_int8_w8a8: bool = False
    w13_scale: Any = None
    w2_scale: Any = None
    a13_scale: Any = None
    block_shape: Any = None
    fuse_swiglu_interleaved: bool = False


class TritonRunnerCore(MoeRunnerCore):
    pass


def wide(weights, scale):
    """Weights times the scale of their 128 x 128 block."""
    if scale is None:
        return weights.float()
    blocks = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    return weights.float() * blocks[:, : weights.shape[1], : weights.shape[2]]


def narrow(rows, quantized):
    """Rows as the GEMM reads them: through e4m3 with a scale for each group of 128 of a row, or through bfloat16."""
    if not quantized:
        return rows.bfloat16().float()
    groups = rows.unflatten(-1, (-1, 128))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).flatten(-2)


def activate(sums, config):
    gate, up = sums.chunk(2, dim=-1)
    if config.gemm1_alpha is not None:
        limit = config.gemm1_clamp_limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(config.gemm1_alpha * gate) * (up + 1)
    if config.swiglu_limit is not None:
        gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
    return torch.nn.functional.silu(gate) * up


def fused_experts(dispatch_output, quant_info, config):
    calls.append(quant_info)
    x, (weights, ids, _) = dispatch_output.hidden_states, dispatch_output.topk_output
    quantized = quant_info.use_fp8_w8a8
    w13 = wide(quant_info.w13_weight, quant_info.w13_scale)
    w2 = wide(quant_info.w2_weight, quant_info.w2_scale)
    rows, out = narrow(x.float(), quantized), torch.zeros(x.shape)
    for token, slots in enumerate(ids.tolist()):
        for slot, expert in enumerate(slots):
            if expert < 0:
                continue
            weight = weights[token, slot].float()
            sums = w13[expert] @ rows[token]
            if config.apply_router_weight_on_input:
                sums, weight = sums * weight, 1.0
            mid = narrow(activate(sums, config)[None], quantized)[0]
            out[token] += weight * (w2[expert] @ mid)
    out = (out * (config.routed_scaling_factor or 1.0)).to(x.dtype)
    return StandardCombineInput(x.copy_(out) if config.inplace else out)
