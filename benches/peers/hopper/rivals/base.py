"""What a comparison asks of a rival: somebody's expert layer, one way to run it."""

import dataclasses
from collections.abc import Callable

import torch

from expert_layer import Call
from shapes import SHAPES, SWIGLU


@dataclasses.dataclass
class Prepared:
    """A layer bound to some calls: each is queued on the current stream by one call without arguments."""

    calls: list[Callable[[], None]]
    # What each call writes, [M, H] bf16.
    outs: list[torch.Tensor]
    # What the rival chose for this size, for the results.
    facts: dict = dataclasses.field(default_factory=dict)
    # Fails if the rival itself found something wrong in the call of this index; after that call.
    check: Callable[[int], None] = lambda index: None
    # The two GEMMs alone, a list of calls each; None where they cannot be called apart.
    gemms: Callable[[], tuple[list, list]] | None = None


class Rival:
    """One way to run an expert layer. `key` names it in options and results, `label` in tables."""

    key: str
    label: str
    formats: tuple[str, ...] = ("e4m3",)
    # It promises that a token's result does not depend on the other tokens.
    batch_invariant = False
    # It does not quantize rows, whatever weights are.
    bf16_rows = False
    # It has the biases and the activation of the layers in `SWIGLU`.
    takes_biases = False

    def missing(self) -> str | None:
        """Why it cannot run on this machine, if it cannot."""
        return None

    def version(self) -> str:
        raise NotImplementedError

    def unsupported(self, shape: str, format: str, tokens: int) -> str | None:
        """Why it does not take such a layer, if it does not."""
        if format not in self.formats:
            return f"takes {' and '.join(self.formats)}, not {format}"
        return "takes no biases" if shape in SWIGLU and not self.takes_biases else None

    def supported(self, shape: str, format: str, tokens: list[int]) -> list[int]:
        """Those numbers of tokens that it takes."""
        return [count for count in tokens if self.unsupported(shape, format, count) is None]

    def load(self, shape: str, format: str, weights, tokens: list[int]):
        """The layer of these weights, for calls of these sizes: something with `prepare(calls) -> Prepared`."""
        raise NotImplementedError

    def compile_parts(self) -> tuple[str, ...]:
        """Names of what is worth compiling beforehand for a layer, each in a process of its own."""
        return ()

    # All layers' parts in one process: what it compiles is not of one layer.
    compiles_together = False

    def compile(self, shape: str, format: str, weights, tokens: list[int], part: str) -> None:
        """Fills the rival's cache; the weights have no values."""
        loaded = self.load(shape, format, weights, tokens)
        for count in tokens:
            loaded.prepare([Call(shape, count, seed=count)]).calls[0]()
        torch.cuda.synchronize()


def sizes(shape: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """N and K of both GEMMs."""
    hidden, intermediate, *_ = SHAPES[shape]
    return (2 * intermediate, hidden), (hidden, intermediate)
