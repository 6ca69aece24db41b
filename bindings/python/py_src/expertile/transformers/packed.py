"""Modules of experts whose weights are in the layer only: their memory is given back, and the layer unpacks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..torch import Layer
from .experts import Experts

LAYER = "_expertile_layer"
"""The attribute that holds a module's layer."""
_PACKED = "_expertile_packed"
_HOOKED = "_expertile_hooked"


def is_packed(module: nn.Module) -> bool:
    """Whether the module's weights are in its layer only."""
    return _PACKED in module.__dict__


def give_back(module: nn.Module, experts: Experts) -> None:
    """Frees a module's own weights, which its layer holds too."""
    for name in experts.names:
        weights = getattr(module, name)
        meta = torch.empty_like(weights, device="meta")
        module._parameters[name] = nn.Parameter(meta, requires_grad=weights.requires_grad)
    module.__dict__[_PACKED] = experts
    if _HOOKED not in module.__dict__:
        module.register_state_dict_post_hook(_unpack_into)
        module.register_load_state_dict_pre_hook(_unpack_before)
        module.__dict__[_HOOKED] = True


def unpack(module: nn.Module) -> None:
    """Gives a module its own weights again, bit for bit; the next call makes another layer."""
    for name, weights in _unpacked(module).items():
        flag = module._parameters[name].requires_grad  # type: ignore[union-attr]
        module._parameters[name] = nn.Parameter(weights, requires_grad=flag)
    del module.__dict__[_PACKED], module.__dict__[LAYER]


def _unpacked(module: nn.Module) -> dict[str, Tensor]:
    """The module's own weights, by name."""
    layer: Layer = module.__dict__[LAYER]
    experts: Experts = module.__dict__[_PACKED]
    order = "interleaved" if experts.interleaved else "halves"
    weights = dict(zip(experts.names, layer.unpack(gate_up=order), strict=True))
    if experts.transposed:
        return {name: x.mT.contiguous() for name, x in weights.items()}
    # MXFP4 blocks have their groups in a dimension of their own.
    return {name: x.reshape(module._parameters[name].shape) for name, x in weights.items()}  # type: ignore[union-attr]


def _unpack_into(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Puts the weights of a packed module into a state dict in place of what stands for them."""
    if is_packed(module):
        state_dict.update({prefix + name: weights for name, weights in _unpacked(module).items()})


def _unpack_before(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a packed module have weights again before others are loaded into them."""
    if is_packed(module):
        experts: Experts = module.__dict__[_PACKED]
        if any(prefix + name in state_dict for name in experts.names):
            unpack(module)
