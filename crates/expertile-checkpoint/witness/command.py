"""The command under test: `expertile layer`, run as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Run:
    """What the command wrote, or the line with which it gave up."""

    status: int
    message: str
    output: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    # The parts of the block that the output holds, in the command's own words; none from a command that does not say.
    parts: tuple[str, ...] | None = None


class Command:
    """A binary, and which options it knows."""

    def __init__(self, binary: Path) -> None:
        self.binary = binary
        page = subprocess.run([binary, "layer", "--help"], capture_output=True, text=True, check=True)
        self.options = frozenset(re.findall(r"^ +(--[a-z-]+)", page.stdout, re.MULTILINE))

    def layer(self, model: Path, layer: int, tokens: Path, result: Path, options: Sequence[str] = ()) -> Run:
        """Runs one layer on the tokens in a file; whatever lies at `result` is replaced."""
        result.unlink(missing_ok=True)
        arguments: list[str | Path] = [self.binary, "layer", "--model", model, "--layer", str(layer)]
        arguments += ["--input", tokens, "--output", result, "--json", *options]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        if done.returncode != 0 or not result.exists():
            return Run(done.returncode, done.stderr.strip() or "no output file and no message")
        tensors = load_file(result)
        said = json.loads(done.stdout).get("parts")
        parts = None if said is None else tuple(said)
        return Run(0, done.stderr.strip(), tensors["output"], tensors["topk_ids"], tensors["topk_weights"], parts)
