"""What Transformers calls, and the layer that the first call makes."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ArgumentValueError
from ..torch import Layer
from .experts import describe
from .packed import LAYER, give_back, is_packed, source, unpack, unpacked_experts
from .threads import let_torch_sleep


@dataclasses.dataclass
class Options:
    """What ``configure`` has set."""

    keep_weights: bool = False
    max_tokens: int = 8192
    torch_may_spin: bool = False
    mxfp4_activations: str = "bf16"
    e4m3_copy: bool = False


options = Options()


def configure(
    *,
    keep_weights: bool | None = None,
    max_tokens: int | None = None,
    torch_may_spin: bool | None = None,
    mxfp4_activations: str | None = None,
    e4m3_copy: bool | None = None,
) -> None:
    """Settings for layers that are made from now on.

    keep_weights: whether weights that were copied (packed on the CPU, or put in another order) stay in the module too:
    twice the memory, and other implementations can compute with them. False at first. max_tokens: on a GPU, what is
    compiled at a layer's first call is for that many tokens (8192 at first); a call of more compiles for more.
    torch_may_spin: on the CPU, whether torch's idle threads may go on spinning for milliseconds, on the cores that a
    layer's threads work on. False at first: from the first layer on they sleep soon, in the whole process.
    mxfp4_activations: what MXFP4 experts are multiplied by, ``"bf16"`` at first; ``"e4m3"`` quantizes hidden states in
    groups of 128, for widths that 64 divides. e4m3_copy: on a GPU, with these, whether MXFP4 weights are kept in e4m3
    too, 8 bits a weight more, for calls of many tokens. False at first.

    Raises ValueError for activations of another name; nothing is set then.
    """
    if mxfp4_activations not in (None, "bf16", "e4m3"):
        found = f" is {mxfp4_activations!r}"
        raise ArgumentValueError("mxfp4_activations", found, mxfp4_activations, "'bf16' or 'e4m3'")
    if keep_weights is not None:
        options.keep_weights = keep_weights
    if max_tokens is not None:
        options.max_tokens = max_tokens
    if torch_may_spin is not None:
        options.torch_may_spin = torch_may_spin
    if mxfp4_activations is not None:
        options.mxfp4_activations = mxfp4_activations
    if e4m3_copy is not None:
        options.e4m3_copy = e4m3_copy


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What Transformers calls: hidden_states ``[M, H]``, top_k_index and top_k_weights ``[M, topk]`` to ``[M, H]``."""
    layer = self.__dict__.get(LAYER)
    if layer is None or (not torch.compiler.is_compiling() and _has_changed(self)):
        layer = _make(self)
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        if self.training:
            raise RuntimeError("expertile computes no gradients: call model.eval(), or use torch.no_grad()")
        hidden_states, top_k_weights = hidden_states.detach(), top_k_weights.detach()
    if getattr(self, "_is_expert_parallel", False):
        # Slots of other ranks' experts.
        top_k_index = top_k_index.masked_fill(top_k_index >= layer.local_experts, -1)
    if layer.device.type == "cuda" and not torch.compiler.is_compiling():
        kind = (top_k_index.shape[1], top_k_index.dtype, hidden_states.dtype)
        if self.__dict__["_expertile_prepared"].get(kind, -1) < top_k_index.shape[0]:
            _prepare(self, layer, hidden_states, top_k_index)
    return layer(hidden_states, top_k_index, top_k_weights.float())


@torch.compiler.disable
def _prepare(module: nn.Module, layer: Layer, hidden_states: Tensor, top_k_index: Tensor) -> None:
    """Compiles what such calls need, of as many tokens and of more."""
    tokens, topk = top_k_index.shape
    most = max(options.max_tokens, 1 << (tokens - 1).bit_length())
    layer.prepare(most, topk, ids_dtype=top_k_index.dtype, dtype=hidden_states.dtype)
    module.__dict__["_expertile_prepared"][topk, top_k_index.dtype, hidden_states.dtype] = most


@torch.compiler.disable
def _make(module: nn.Module) -> Layer:
    """The layer of a module of experts, which holds it from then on."""
    if is_packed(module):
        # Something beside the weights is another now, in a copy of the module for one.
        unpack(module)
    experts = describe(module)
    for name in experts.names:
        if getattr(module, name).is_meta:
            raise ArgumentValueError(name, " is on meta", "meta", "weights on the CPU or on a GPU")
    up, down = experts.weights(module)
    usual = up.dtype != torch.uint8 and not experts.interleaved
    in_place = up.is_cuda and up.is_contiguous() and down.is_contiguous() and usual
    parameters = experts.parameters(module)
    scales = [parameters[name] for name in experts.scales]
    order = "interleaved" if experts.interleaved else "halves"
    with warnings.catch_warnings():
        # That weights in another order, and MXFP4, are copied is what this module's documentation says.
        warnings.simplefilter("ignore")
        # On the CPU activations come as they are, with float8_e4m3fn weights too: as of the widened ones there. With
        # MXFP4 weights they do so everywhere, unless they are to be quantized.
        layer = Layer(up, down, gate_up=order, **experts.options, **parameters, **_quantized(up))
    if not up.is_cuda and not options.torch_may_spin:
        let_torch_sleep()
    del up, down
    module.__dict__[LAYER] = layer
    module.__dict__["_expertile_prepared"] = {}
    if not in_place and not options.keep_weights:
        give_back(module, experts.names, functools.partial(unpacked_experts, experts))
    copied = not in_place or any(scale.dtype != torch.float32 for scale in scales)
    module.__dict__["_expertile_copied"] = copied
    module.__dict__["_expertile_source"] = source(module, copied)
    return layer


def _quantized(up: Tensor) -> dict[str, Any]:
    """What is set for weights of that type, as options of a layer."""
    if up.dtype != torch.uint8 or options.mxfp4_activations == "bf16":
        return {}
    return {"activations": options.mxfp4_activations, "e4m3_copy": options.e4m3_copy and up.is_cuda}


def _has_changed(module: nn.Module) -> bool:
    """Whether the layer of a module is no longer that of its tensors."""
    return source(module, module.__dict__["_expertile_copied"]) != module.__dict__["_expertile_source"]
