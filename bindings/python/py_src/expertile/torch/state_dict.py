"""Experts, by the names that checkpoints give their matrices, as the weights of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import ArgumentValueError

NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Gate, up and down, by the names of most families, and of Mixtral's."""

WEIGHTS = ("weight", "weight_packed")
"""The values, by their names: as they are, and as compressed-tensors packs those of 4 bits."""

SCALES = ("weight_scale_inv", "weight_scale", "scale")
"""What multiplies a block of values, by its names."""

OTHERS = ("bias", "weight_zero_point", "weight_g_idx", "weight_scale_2", "input_scale", "qweight")
"""What would change the result, and that no layer takes of an expert alone."""

GPT_OSS = {
    "w13": "gate_up_proj_blocks",
    "w2": "down_proj_blocks",
    "w13_scale": "gate_up_proj_scales",
    "w2_scale": "down_proj_scales",
    "w13_bias": "gate_up_proj_bias",
    "w2_bias": "down_proj_bias",
}
"""gpt-oss's MXFP4 experts, all of a layer in one tensor each."""


def stacked(
    state_dict: Mapping[str, Tensor],
    prefix: str,
    experts: Iterable[int] | None,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """The arguments of ``Layer``: w13, w2 and, if there are any, their scales; of gpt-oss also biases and order."""
    if f"{prefix}{GPT_OSS['w13']}" in state_dict:
        return gpt_oss(state_dict, prefix, experts, device)
    (gate, up, down), values = names_of(state_dict, prefix)
    found = all_of(state_dict, prefix, f"{gate}.{values}") if experts is None else list(experts)
    if not found:
        expected = f"matrices named like {prefix}0.{gate}.weight"
        raise ArgumentValueError("experts", " are none", found, expected)
    for expert, part, other in itertools.product(found, (gate, up, down), OTHERS):
        name = f"{prefix}{expert}.{part}.{other}"
        if name in state_dict:
            raise ArgumentValueError(name, " is there", state_dict[name], f"none beside {values} and its scales")

    def stack(parts: tuple[str, ...], kind: str) -> Tensor:
        first = [matrix_of(state_dict, f"{prefix}{found[0]}.{part}.{kind}") for part in parts]
        rows = [matrix.shape[0] for matrix in first]
        shape = (len(found), sum(rows), first[0].shape[1])
        stack = torch.empty(shape, dtype=first[0].dtype, device=first[0].device if device is None else device)
        for index, expert in enumerate(found):
            for part, place, like in zip(parts, stack[index].split(rows), first, strict=True):
                name = f"{prefix}{expert}.{part}.{kind}"
                matrix = matrix_of(state_dict, name)
                if matrix.shape != like.shape or matrix.dtype != like.dtype:
                    found_ = f" is {matrix.dtype} {list(matrix.shape)}"
                    raise ArgumentValueError(name, found_, list(matrix.shape), f"{like.dtype} {list(like.shape)}")
                place.copy_(matrix.detach())
        return stack

    weights = {"w13": whole_bytes(stack((gate, up), values)), "w2": whole_bytes(stack((down,), values))}
    for kind in SCALES:
        if f"{prefix}{found[0]}.{gate}.{kind}" in state_dict:
            return {**weights, "w13_scale": stack((gate, up), kind), "w2_scale": stack((down,), kind)}
    return weights


def gpt_oss(
    state_dict: Mapping[str, Tensor],
    prefix: str,
    experts: Iterable[int] | None,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """The same of blocks, scales and biases ``[E, ...]``; gate's and up's rows alternate."""
    chosen = None if experts is None else list(experts)
    arguments: dict[str, Any] = {"gate_up": "interleaved"}
    for argument, suffix in GPT_OSS.items():
        name = f"{prefix}{suffix}"
        tensor = state_dict.get(name)
        if not isinstance(tensor, Tensor):
            found = " is not there" if tensor is None else " is no tensor"
            raise ArgumentValueError(name, found, tensor, "a tensor of all experts")
        tensor = tensor.detach()
        if chosen is not None:
            for expert in chosen:
                if not 0 <= expert < tensor.shape[0]:
                    found = f" has no expert {expert}"
                    raise ArgumentValueError(name, found, expert, f"an expert below {tensor.shape[0]}")
            tensor = tensor[chosen]
        arguments[argument] = tensor if device is None else tensor.to(device)
    return arguments


def whole_bytes(weights: Tensor) -> Tensor:
    """DeepSeek-V4's two 4-bit values to an int8 are what a layer takes in a uint8."""
    return weights.view(torch.uint8) if weights.dtype == torch.int8 else weights


def names_of(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[tuple[str, str, str], str]:
    """What gate, up and down are called, and their values."""
    for values in WEIGHTS:
        for names in NAMES:
            if any(key.startswith(prefix) and key.endswith(f".{names[0]}.{values}") for key in state_dict):
                return names, values
    return NAMES[0], WEIGHTS[0]


def all_of(state_dict: Mapping[str, Tensor], prefix: str, gate: str) -> list[int]:
    """The experts that have a gate of that name, in order."""
    end = f".{gate}"
    between = (key[len(prefix) : -len(end)] for key in state_dict if key.startswith(prefix) and key.endswith(end))
    return sorted(int(number) for number in between if number.isdecimal())


def matrix_of(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    """The matrix of that name."""
    matrix = state_dict.get(name)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        found = " is not there" if matrix is None else " is no matrix"
        raise ArgumentValueError(name, found, matrix, "a matrix")
    return matrix
