"""What a module of Transformers' experts is, in the words of ``Layer``; what no layer computes is an error."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import ArgumentTypeError, ArgumentValueError
from .activation import activation_of

NAME = "expertile"
"""The implementation's name."""

BLOCK = (128, 128)
"""Rows and columns of a block with one scale."""


GROUP = 32
"""MXFP4 values with one scale."""


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module whose experts' implementation can be chosen."""
    return "is_concatenated" in module.__dict__ and "has_gate" in module.__dict__


def asks_for_expertile(module: nn.Module) -> bool:
    """Whether it is a module of experts whose configuration asks for this implementation."""
    config = module.__dict__.get("config")
    return is_experts(module) and getattr(config, "_experts_implementation", None) == NAME


@dataclasses.dataclass(frozen=True)
class Experts:
    """A module of experts as it is: names of its weights, how they lie, and the options of ``Layer``."""

    up_name: str
    down_name: str
    gated: bool
    transposed: bool
    interleaved: bool
    options: dict[str, Any]
    """alpha, beta, limit, activation."""
    biases: dict[str, str]
    """Option of ``Layer`` to the module's parameter."""
    scales: dict[str, str]
    """The same, for float8_e4m3fn and MXFP4."""

    @property
    def names(self) -> tuple[str, str]:
        """The module's names of w13 and w2."""
        return self.up_name, self.down_name

    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Views ``[E, N, K]`` of the module's own weights; of MXFP4 they are bytes."""
        up, down = (_bytes_of(getattr(module, name).detach()) for name in self.names)
        return (up.mT, down.mT) if self.transposed else (up, down)

    def parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Biases and scales, by the names of ``Layer``'s options."""
        return {option: getattr(module, name).detach() for option, name in (self.biases | self.scales).items()}


def _bytes_of(weights: Tensor) -> Tensor:
    """DeepSeek-V4's two values to an int8 are what gpt-oss has in a uint8."""
    return weights.view(torch.uint8) if weights.dtype == torch.int8 else weights


def describe(module: nn.Module, *, any_dtype: bool = False) -> Experts:
    """What the module is. Its weights may be on meta, and with `any_dtype` be still of another type.

    Raises ValueError or TypeError for what no layer computes.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise ArgumentValueError("has_post_expert_norm", " is True", True, "experts without a norm after each")
    gated = getattr(module, "has_gate", True)
    transposed = getattr(module, "is_transposed", False)
    up_name = "gate_up_proj" if gated else "up_proj"
    if hasattr(module, f"{up_name}_blocks"):
        return _describe_mxfp4(module)
    up, down = _weights(module, up_name, any_dtype), _weights(module, "down_proj", any_dtype)
    is_fp4 = up.dtype == down.dtype == torch.int8
    _require_shapes((up_name, up), down, gated, transposed, values=2 if is_fp4 else 1)
    options, interleaved = activation_of(module, gated)
    biases = {"w13_bias": f"{up_name}_bias", "w2_bias": "down_proj_bias"}
    biases = {option: name for option, name in biases.items() if getattr(module, name, None) is not None}
    scales = {}
    if is_fp4 or up.dtype == torch.float8_e4m3fn:
        (_require_fp4_scales if is_fp4 else _require_scales)(module, interleaved)
        scales = {"w13_scale": f"{up_name}_scale_inv", "w2_scale": "down_proj_scale_inv"}
    if up.is_cuda:
        _require_on_a_gpu(options)
    return Experts(up_name, "down_proj", gated, transposed, interleaved, options, biases, scales)


def _describe_mxfp4(module: nn.Module) -> Experts:
    """The same for experts that are blocks ``[E, N, K / 32, 16]`` and scales ``[E, N, K / 32]``."""
    names = ("gate_up_proj", "down_proj")
    for name in names:
        for part, dimensions in (("blocks", 4), ("scales", 3)):
            found = getattr(module, f"{name}_{part}")
            if found.dtype != torch.uint8 or found.dim() != dimensions:
                raise ArgumentTypeError(
                    f"{name}_{part}", f" is {found.dtype} {list(found.shape)}", found, "uint8 bytes"
                )
    options, interleaved = activation_of(module, gated=True)
    biases = {f"{option}_bias": f"{name}_bias" for option, name in zip(("w13", "w2"), names, strict=True)}
    scales = {f"{option}_scale": f"{name}_scales" for option, name in zip(("w13", "w2"), names, strict=True)}
    return Experts("gate_up_proj_blocks", "down_proj_blocks", True, False, interleaved, options, biases, scales)


def _weights(module: nn.Module, name: str, any_dtype: bool) -> Tensor:
    weights = getattr(module, name, None)
    if not isinstance(weights, Tensor) or weights.dim() != 3:
        raise ArgumentTypeError(name, f" is {type(weights).__name__}", weights, "weights of all experts, [E, N, K]")
    if not any_dtype and weights.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        expected = "bfloat16, float8_e4m3fn, or int8 with two 4-bit values each"
        raise ArgumentTypeError(name, f" has dtype {weights.dtype}", weights.dtype, expected)
    return weights


def _require_shapes(up: tuple[str, Tensor], down: Tensor, gated: bool, transposed: bool, values: int) -> None:
    """Fails unless the two go together; `values` is how many weights an element holds."""
    name, weights = up
    (experts, rows, hidden), (_, _, intermediate) = (x.mT.shape if transposed else x.shape for x in (weights, down))
    hidden, intermediate = hidden * values, intermediate * values
    if rows != (2 * intermediate if gated else intermediate):
        expected = f"{2 if gated else 1} x the {intermediate} that down_proj has"
        raise ArgumentValueError(name, f" has {rows} output rows", rows, expected)
    found, shape = tuple(down.mT.shape if transposed else down.shape), (experts, hidden, intermediate // values)
    if found != shape:
        raise ArgumentValueError("down_proj", f" is of {found}", found, f"{shape}")


def _require_scales(module: nn.Module, interleaved: bool) -> None:
    """Fails unless float8_e4m3fn weights have the scales that a layer takes."""
    if interleaved:
        raise ArgumentValueError("is_concatenated", " is False", False, "True for float8_e4m3fn experts")
    block = getattr(module, "block_size", None)
    if block is None or tuple(block) != BLOCK:
        raise ArgumentValueError("block_size", f" is {block}", block, f"{BLOCK}")
    scheme = getattr(module, "activation_scheme", "dynamic")
    if scheme != "dynamic":
        raise ArgumentValueError("activation_scheme", f' is "{scheme}"', scheme, '"dynamic"')


def _require_fp4_scales(module: nn.Module, interleaved: bool) -> None:
    """Fails unless MXFP4 weights have the scales that a layer takes."""
    if interleaved:
        raise ArgumentValueError("is_concatenated", " is False", False, "True for 4-bit experts in int8")
    for name in ("gate_up_proj", "down_proj"):
        scale = getattr(module, f"{name}_scale_inv", None)
        found = None if scale is None else scale.dtype
        if found != torch.float8_e8m0fnu:
            expected = "float8_e8m0fnu scales of 4-bit weights"
            raise ArgumentTypeError(f"{name}_scale_inv", f" has dtype {found}", found, expected)


def _require_on_a_gpu(options: dict[str, Any]) -> None:
    """Fails for what only the CPU computes."""
    activation = options.get("activation", "swiglu")
    if activation != "swiglu":
        raise ArgumentValueError("activation", f' is "{activation}"', activation, '"swiglu" on a GPU')
