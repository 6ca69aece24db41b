"""Experts, by the names that checkpoints give their matrices, as the weights of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import ArgumentValueError

NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Gate, up and down, by the names of most families, and of Mixtral's."""

SCALES = ("weight_scale_inv", "weight_scale")
"""What multiplies a block of values, by its names."""

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
    gate, up, down = names_of(state_dict, prefix)
    found = all_of(state_dict, prefix, gate) if experts is None else list(experts)
    if not found:
        expected = f"matrices named like {prefix}0.{gate}.weight"
        raise ArgumentValueError("experts", " are none", found, expected)

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

    weights = {"w13": stack((gate, up), "weight"), "w2": stack((down,), "weight")}
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


def names_of(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[str, str, str]:
    """What gate, up and down are called."""
    for names in NAMES:
        if any(key.startswith(prefix) and key.endswith(f".{names[0]}.weight") for key in state_dict):
            return names
    return NAMES[0]


def all_of(state_dict: Mapping[str, Tensor], prefix: str, gate: str) -> list[int]:
    """The experts that have a gate, in order."""
    end = f".{gate}.weight"
    between = (key[len(prefix) : -len(end)] for key in state_dict if key.startswith(prefix) and key.endswith(end))
    return sorted(int(number) for number in between if number.isdecimal())


def matrix_of(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    """The matrix of that name."""
    matrix = state_dict.get(name)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        found = " is not there" if matrix is None else " is no matrix"
        raise ArgumentValueError(name, found, matrix, "a matrix")
    return matrix
