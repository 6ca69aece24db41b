"""Per-expert matrices, by the names that checkpoints give them, as the weights of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .._errors import ArgumentValueError

NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Gate, up and down, by the names of most families, and of Mixtral's."""

SCALES = ("weight_scale_inv", "weight_scale")
"""What multiplies a block of values, by its names."""


def stacked(
    state_dict: Mapping[str, Tensor],
    prefix: str,
    experts: Iterable[int] | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """The arguments of ``Layer``: w13, w2 and, if there are any, their scales."""
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
