"""Modules whose weights are in what computes them only: their memory is given back, and unpacked on demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..torch import Layer
from .experts import Experts

LAYER, GEMM = "_expertile_layer", "_expertile_gemm"
"""The attributes that hold what computes a module of experts, and a linear layer."""
_PACKED = "_expertile_packed"
_HOOKED = "_expertile_hooked"

Unpack = Callable[[nn.Module], dict[str, Tensor]]
"""Gives a packed module's own weights, by name."""


def is_packed(module: nn.Module) -> bool:
    """Whether the module's weights are packed only."""
    return _PACKED in module.__dict__


def give_back(module: nn.Module, names: tuple[str, ...], unpacked: Unpack) -> None:
    """Frees a module's own weights of those names, which are packed too."""
    for name in names:
        weights = getattr(module, name)
        meta = torch.empty_like(weights, device="meta")
        module._parameters[name] = nn.Parameter(meta, requires_grad=weights.requires_grad)
    module.__dict__[_PACKED] = names, unpacked
    if _HOOKED not in module.__dict__:
        module.register_state_dict_post_hook(_unpack_into)
        module.register_load_state_dict_pre_hook(_unpack_before)
        module.__dict__[_HOOKED] = True


def unpack(module: nn.Module) -> None:
    """Gives a module its own weights again, bit for bit; the next call packs them anew."""
    for name, weights in unpacked(module).items():
        flag = module._parameters[name].requires_grad  # type: ignore[union-attr]
        module._parameters[name] = nn.Parameter(weights, requires_grad=flag)
    for name in (_PACKED, LAYER, GEMM):
        module.__dict__.pop(name, None)


def unpacked(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a packed module's own weights, by name."""
    _, unpack_weights = module.__dict__[_PACKED]
    return unpack_weights(module)


def unpacked_experts(experts: Experts, module: nn.Module) -> dict[str, Tensor]:
    """Those of a module of experts."""
    layer: Layer = module.__dict__[LAYER]
    order = "interleaved" if experts.interleaved else "halves"
    weights = dict(zip(experts.names, layer.unpack(gate_up=order), strict=True))
    if experts.transposed:
        return {name: x.mT.contiguous() for name, x in weights.items()}
    # MXFP4 blocks may have their groups in a dimension of their own, or be called int8.
    own = {name: getattr(module, name) for name in weights}
    return {name: x.view(own[name].dtype).reshape(own[name].shape) for name, x in weights.items()}


def source(module: nn.Module, copied: bool) -> list[tuple[int, int]]:
    """Which tensors a module has, and, if they were copied, how often each has been written since."""
    packed, found = is_packed(module), []
    for name, tensor in module._parameters.items():
        # Weights that were given back are on meta, and a copy of the module has biases of its own.
        if tensor is not None and not tensor.is_meta and not (packed and name.endswith("bias")):
            found.append((tensor.data_ptr(), tensor._version if copied and not tensor.is_inference() else 0))
    return found


def _unpack_into(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Puts the weights of a packed module into a state dict in place of what stands for them."""
    if is_packed(module):
        state_dict.update({prefix + name: weights for name, weights in unpacked(module).items()})


def _unpack_before(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a packed module have weights again before others are loaded into them."""
    if is_packed(module):
        names, _unpack = module.__dict__[_PACKED]
        if any(prefix + name in state_dict for name in names):
            unpack(module)
