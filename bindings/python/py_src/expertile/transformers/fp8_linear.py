"""FP8 linear layers on a CPU: float8_e4m3fn weights are multiplied as they are, by bfloat16 rows.

Transformers' own ``FP8Linear`` has no product for a CPU. This one packs its weights in its first call, as experts are
packed, and gives the memory of the original ones back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.finegrained_fp8 import FP8Linear

from ..torch import Gemm
from .experts import BLOCK
from .forward import options
from .packed import GEMM, give_back, is_packed, source, unpack, unpacked
from .threads import let_torch_sleep

_SOURCE = "_expertile_source"


class PackedFP8Linear(FP8Linear):
    """Transformers' ``FP8Linear`` with 128 x 128 blocks and dynamic activations, computed on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """input ``[..., in_features]`` to ``[..., out_features]``, of the same type."""
        if torch.is_grad_enabled() and input.requires_grad:
            return _WithGradient.apply(input, self)
        return _product(self, input)


def stored_in_e4m3(linears: dict[str, nn.Module], files: Iterable[str] | None) -> set[str] | None:
    """The names of those linear layers whose weights a checkpoint's files hold in e4m3 with block scales.

    None where that cannot be said: files of another format, other names, layers of a class of their own.
    """
    if any(type(module) is not nn.Linear for module in linears.values()):
        return None
    wanted = {f"{name}.{part}" for name in linears for part in ("weight", "weight_scale_inv")}
    stored: dict[str, str] = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            return None
        with safe_open(file, framework="pt") as tensors:
            stored |= {key: tensors.get_slice(key).get_dtype() for key in wanted.intersection(tensors.keys())}
    if any(f"{name}.weight" not in stored for name in linears):
        return None
    found = {name for name in linears if stored[f"{name}.weight"] == "F8_E4M3"}
    return found if all(f"{name}.weight_scale_inv" in stored for name in found) else None


def pack_later(model: nn.Module) -> None:
    """Makes ``PackedFP8Linear`` of the layers that Transformers has made for FP8 weights."""
    for module in model.modules():
        if type(module) is FP8Linear:
            module.__class__ = PackedFP8Linear


def _product(module: FP8Linear, input: Tensor) -> Tensor:
    if input.dtype != torch.bfloat16:
        return functional.linear(input, _widened(module, input.dtype), module.bias)
    gemm = module.__dict__.get(GEMM)
    if gemm is None or (not torch.compiler.is_compiling() and source(module, copied=True) != module.__dict__[_SOURCE]):
        gemm = _make(module)
    rows = input.reshape(-1, module.in_features).contiguous()
    end = torch.full((1,), rows.shape[0], dtype=torch.int32)
    out = gemm(rows, psum=end, alignment=1).view(*input.shape[:-1], module.out_features)
    return out if module.bias is None else out + module.bias


class _WithGradient(torch.autograd.Function):
    """The product with a gradient for its input, that of the widened weights, for adapters around a frozen layer."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, module: FP8Linear) -> Tensor:
        ctx.module = module
        return _product(module, input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _widened(ctx.module, gradient.dtype), None


def _weights(module: FP8Linear) -> Tensor:
    return unpacked(module)["weight"] if is_packed(module) else module.weight.detach()


def _widened(module: FP8Linear, dtype: torch.dtype) -> Tensor:
    """The weights times their scales ``[out_features, in_features]``, rounded once."""
    weights = _weights(module).float()
    scales = module.weight_scale_inv.detach().float()
    for dim, block in enumerate(BLOCK):
        scales = scales.repeat_interleave(block, dim).narrow(dim, 0, weights.shape[dim])
    return (weights * scales).to(dtype)


@torch.compiler.disable
def _make(module: FP8Linear) -> Gemm:
    """The product of a layer, which holds it from then on."""
    if is_packed(module):
        # The scales are others now, in a copy of the module for one.
        unpack(module)
    gemm = Gemm(module.weight.detach().unsqueeze(0), module.weight_scale_inv.detach().unsqueeze(0))
    if not options.torch_may_spin:
        let_torch_sleep()
    module.__dict__[GEMM] = gemm
    if not options.keep_weights:
        give_back(module, ("weight",), _unpacked)
    module.__dict__[_SOURCE] = source(module, copied=True)
    return gemm


def _unpacked(module: nn.Module) -> dict[str, Tensor]:
    gemm: Gemm = module.__dict__[GEMM]
    return {"weight": gemm.unpack().squeeze(0)}
