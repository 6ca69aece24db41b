"""Transformers' experts computed by ``expertile.torch.Layer``.

>>> import expertile.transformers
>>> model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16", experts_implementation="expertile")

Importing the module registers the implementation, for bfloat16 experts and for float8_e4m3fn ones with 128 x 128 block
scales, on the CPU and on a Hopper GPU. A layer is made by the first call of its experts. On the CPU that packs the
weights and gives the memory of the original ones back, after which the module cannot be saved any more, and says so; on
a GPU weights in the usual order are used where they are. ``configure`` changes that.

What the layer does not compute raises ValueError or TypeError in the first call, with the module's name for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ._errors import ArgumentTypeError, ArgumentValueError
from .torch import Layer

__all__ = ["configure", "experts_forward"]

NAME = "expertile"


@dataclasses.dataclass
class _Options:
    keep_weights: bool = False
    max_tokens: int = 8192


_options = _Options()


def configure(*, keep_weights: bool | None = None, max_tokens: int | None = None) -> None:
    """Settings for layers that are made from now on.

    keep_weights: whether weights that were copied (packed on the CPU, or put in another order) stay in the module too:
    twice the memory, and the module can be saved. False at first. max_tokens: on a GPU, what is compiled at a layer's
    first call is for that many tokens (8192 at first); a call of more compiles for more.
    """
    if keep_weights is not None:
        _options.keep_weights = keep_weights
    if max_tokens is not None:
        _options.max_tokens = max_tokens


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What Transformers calls: hidden_states ``[M, H]``, top_k_index and top_k_weights ``[M, topk]`` to ``[M, H]``."""
    layer = self.__dict__.get("_expertile_layer")
    if layer is None or (not torch.compiler.is_compiling() and _source(self) != self.__dict__["_expertile_source"]):
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


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


@torch.compiler.disable
def _prepare(module: nn.Module, layer: Layer, hidden_states: Tensor, top_k_index: Tensor) -> None:
    """Compiles what such calls need, of as many tokens and of more."""
    tokens, topk = top_k_index.shape
    most = max(_options.max_tokens, 1 << (tokens - 1).bit_length())
    layer.prepare(most, topk, ids_dtype=top_k_index.dtype, dtype=hidden_states.dtype)
    module.__dict__["_expertile_prepared"][topk, top_k_index.dtype, hidden_states.dtype] = most


@torch.compiler.disable
def _make(module: nn.Module) -> Layer:
    """The layer of a module of experts, which holds it from then on."""
    if getattr(module, "has_post_expert_norm", False):
        raise ArgumentValueError("has_post_expert_norm", " is True", True, "experts without a norm after each")
    gated = getattr(module, "has_gate", True)
    up_name = "gate_up_proj" if gated else "up_proj"
    up, down = _weights(module, up_name), _weights(module, "down_proj")
    if getattr(module, "is_transposed", False):
        up, down = up.mT, down.mT
    options, interleaved = activation_of(module, gated)
    biases = {"w13_bias": f"{up_name}_bias", "w2_bias": "down_proj_bias"}
    found = {name: getattr(module, theirs, None) for name, theirs in biases.items()}
    options |= {name: bias.detach() for name, bias in found.items() if bias is not None}
    if up.dtype == torch.float8_e4m3fn:
        if interleaved:
            raise ArgumentValueError("is_concatenated", " is False", False, "True for float8_e4m3fn experts")
        options |= _scales(module, up_name) | {"activations": "e4m3"}
    if interleaved:
        up = torch.cat([up[:, ::2], up[:, 1::2]], dim=1)
        if "w13_bias" in options:
            options["w13_bias"] = torch.cat([options["w13_bias"][:, ::2], options["w13_bias"][:, 1::2]], dim=1)
    on_gpu = up.is_cuda
    in_place = on_gpu and up.is_contiguous() and down.is_contiguous() and not interleaved
    with warnings.catch_warnings():
        # That weights in another order are copied is what this module's documentation says.
        warnings.simplefilter("ignore")
        layer = Layer(up if on_gpu else up.contiguous(), down if on_gpu else down.contiguous(), **options)
    module.__dict__["_expertile_layer"] = layer
    module.__dict__["_expertile_prepared"] = {}
    given_back = not in_place and not _options.keep_weights
    if given_back:
        _give_back(module, (up_name, "down_proj"))
    scales = [options[name] for name in ("w13_scale", "w2_scale") if name in options]
    module.__dict__["_expertile_copied"] = not in_place or any(scale.dtype != torch.float32 for scale in scales)
    module.__dict__["_expertile_given_back"] = given_back
    module.__dict__["_expertile_source"] = _source(module)
    return layer


def _source(module: nn.Module) -> list[tuple[int, int]]:
    """Which tensors a module has, and how often those that were copied have been written since."""
    copied, given_back = module.__dict__["_expertile_copied"], module.__dict__["_expertile_given_back"]
    source = []
    for name, tensor in module._parameters.items():
        # Weights that were given back are on meta, and a copy of the module has biases of its own.
        if tensor is not None and not tensor.is_meta and not (given_back and name.endswith("bias")):
            source.append((tensor.data_ptr(), tensor._version if copied and not tensor.is_inference() else 0))
    return source


def _weights(module: nn.Module, name: str) -> Tensor:
    weights = getattr(module, name, None)
    if not isinstance(weights, Tensor) or weights.dim() != 3:
        raise ArgumentTypeError(name, f" is {type(weights).__name__}", weights, "weights of all experts, [E, N, K]")
    if weights.is_meta:
        raise ArgumentValueError(name, " is on meta", weights, "weights that have not been given back")
    if weights.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        raise ArgumentTypeError(name, f" has dtype {weights.dtype}", weights.dtype, "bfloat16 or float8_e4m3fn")
    return weights.detach()


def _scales(module: nn.Module, up_name: str) -> dict[str, Tensor]:
    """Block scales of float8_e4m3fn weights."""
    block = getattr(module, "block_size", None)
    if block is None or tuple(block) != (128, 128):
        raise ArgumentValueError("block_size", f" is {block}", block, "(128, 128)")
    scheme = getattr(module, "activation_scheme", "dynamic")
    if scheme != "dynamic":
        raise ArgumentValueError("activation_scheme", f' is "{scheme}"', scheme, '"dynamic"')
    names = {"w13_scale": f"{up_name}_scale_inv", "w2_scale": "down_proj_scale_inv"}
    return {name: getattr(module, theirs).detach() for name, theirs in names.items()}


def _candidates(module: nn.Module) -> Iterator[tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]]:
    """Activations of a layer with the parameters that a module may have."""

    def values(*names: str) -> list[float]:
        found = (getattr(module, name, None) for name in names)
        return sorted({float(value) for value in found if isinstance(value, (int, float)) and value > 0})

    def swiglu(alpha: float, beta: float, limit: float | None) -> Callable[[Tensor, Tensor], Tensor]:
        def function(gate: Tensor, up: Tensor) -> Tensor:
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + beta) * gate * torch.sigmoid(alpha * gate)

        return function

    limits: list[float | None] = [None, *values("limit", "swiglu_limit")]
    for limit, beta, alpha in itertools.product(limits, (0.0, 1.0), {1.0, *values("alpha", "swiglu_alpha")}):
        yield {"alpha": alpha, "beta": beta, "limit": limit}, swiglu(alpha, beta, limit)
    yield {"activation": "geglu_tanh"}, lambda gate, up: nn.functional.gelu(gate, approximate="tanh") * up


def activation_of(module: nn.Module, gated: bool) -> tuple[dict[str, Any], bool]:
    """The options of ``Layer`` for a module's activation, and whether gate and up alternate.

    Modules say it in code of their own: it is found by what that computes of some values, small and large.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=generator) * torch.logspace(-2, 1.5, 64).unsqueeze(1)
    with torch.no_grad():
        if not gated:
            theirs = module.act_fn(rows)  # type: ignore[operator]
            if torch.allclose(theirs, rows.relu().square(), rtol=1e-5, atol=1e-6):
                return {"activation": "relu2"}, False
            raise ArgumentValueError("act_fn", f" is {module.act_fn}", module.act_fn, "relu squared without a gate")
        theirs = module._apply_gate(rows.clone())  # type: ignore[operator]
        for interleaved in (False, True):
            gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=-1)
            for options, function in _candidates(module):
                if torch.allclose(theirs, function(gate, up), rtol=1e-5, atol=1e-6):
                    return options, interleaved
    name = type(module).__name__
    expected = "SwiGLU (with alpha, beta and a limit) or the tanh form of GEGLU"
    raise ArgumentValueError("_apply_gate", f" of {name} is another function", module, expected)


def _give_back(module: nn.Module, names: tuple[str, ...]) -> None:
    """Frees a module's own weights; from then on it says that it has none to be saved or loaded."""
    for name in names:
        weights = getattr(module, name)
        module._parameters[name] = nn.Parameter(torch.empty_like(weights, device="meta"), requires_grad=False)
    module.register_state_dict_pre_hook(_no_weights)
    module.register_load_state_dict_pre_hook(_no_weights)


def _no_weights(module: nn.Module, *_: Any) -> None:
    raise RuntimeError(
        f"the weights of {type(module).__name__} have been packed by expertile and are not in the module any more: "
        "save or load before the first call, or call expertile.transformers.configure(keep_weights=True) before it"
    )
