"""One size of one layer: every rival is checked against the layer in f32, then all of them are timed in turns."""

import dataclasses
import traceback

import torch

from expert_layer import BF16_LAYER, UNQUANTIZED_LAYER, calls_for, layer_weights, mean, require_near
from rivals.base import sizes
from shapes import SHAPES, floor_us
from timing import race


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long: seconds of load before the clocks count, turns, microseconds of a graph."""

    hot: float
    rounds: int = 7
    graph_us: int = 2000
    # Stands in for `timing.race` in a dry run.
    race: callable = race

    def __call__(self, contenders, expected_us):
        return self.race(contenders, expected_us, self.hot, self.rounds, self.graph_us)


class Layers:
    """All rivals' layers of one shape and format, each for its numbers of tokens. `reasons` says, by rival, why one has
    none."""

    def __init__(self, rivals, shape, format, tokens):
        self.shape, self.format = shape, format
        self.weights = layer_weights(shape, format)
        self.loaded, self.rivals, self.reasons = {}, {}, {}
        for rival in rivals:
            fits = rival.supported(shape, format, tokens[rival.key])
            if not fits:
                continue
            try:
                self.loaded[rival.key] = rival.load(shape, format, self.weights, fits)
                self.rivals[rival.key] = rival
            except Exception as error:
                self.reasons[rival.key] = reason(error, f"{rival.key}: {shape} {format}")

    def limits(self, rival):
        return BF16_LAYER if self.format == "bf16" or rival.bf16_rows else UNQUANTIZED_LAYER


# Where the tracebacks of what failed go, a file; None for nowhere.
FAILURES = None


def reason(error, what=""):
    """One line of an error; all of it is added to the file of failures."""
    if FAILURES is not None:
        with open(FAILURES, "a", encoding="utf-8") as file:
            file.write("\n".join([f"== {what}", *traceback.format_exception(error)]))
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Case:
    """Some calls of one size, bound by every rival that takes them, each checked."""

    def __init__(self, layers, rivals, tokens, kind):
        self.layers, self.tokens = layers, tokens
        self.calls = calls_for(layers.shape, tokens, layers.weights[1].shape, kind)
        self.references = [call.reference_rows(layers.weights) for call in self.calls]
        self.live, self.active = mean(c.live for c in self.calls), mean(c.active for c in self.calls)
        self.prepared, self.distances, self.wrong = {}, {}, {}
        for rival in rivals:
            if rival.unsupported(layers.shape, layers.format, tokens) is not None:
                continue
            try:
                if rival.key in layers.reasons:
                    raise RuntimeError(layers.reasons[rival.key])
                prepared = layers.loaded[rival.key].prepare(self.calls)
                self.distances[rival.key] = self.check(rival, prepared)
                self.prepared[rival.key] = prepared
            except Exception as error:
                self.wrong[rival.key] = reason(error, f"{rival.key}: {layers.shape} {layers.format} {tokens} {kind}")
        del self.references

    def check(self, rival, prepared):
        """Every token of every call against the layer in f32; -> the distance of all, and of the worst row."""
        outs, references = [], []
        for index, (call, reference) in enumerate(zip(self.calls, self.references, strict=True)):
            out = prepared.outs[index].fill_(float("nan"))
            prepared.calls[index]()
            prepared.check(index)
            some = (call.local >= 0).any(1)
            if out[~some].count_nonzero():
                raise AssertionError("a token without an expert here is not zero")
            outs.append(out[some])
            references.append(reference[some])
        limits = self.layers.limits(rival)
        return require_near("against f32", torch.cat(outs), torch.cat(references), limits, least_share=0.2)

    def floor(self, numbers):
        return floor_us(numbers, self.live, self.active, self.layers.format)

    def facts(self):
        checked = dict(distance=self.distances, choice={key: p.facts for key, p in self.prepared.items()})
        return dict(tokens=self.tokens, sets=len(self.calls), live=self.live, active=self.active, **checked)

    def layer(self, timing):
        """-> a row of results: whole layers."""
        floor = self.floor(SHAPES[self.layers.shape].numbers())
        row = self.facts() | dict(floor=floor)
        if self.prepared:
            row |= timing({key: p.calls for key, p in self.prepared.items()}, 1.1 * floor + 10)
        return row | dict(wrong=self.wrong) if self.wrong else row

    def gemms(self, timing):
        """-> a row of results: both GEMMs alone, and each by number, of the rivals that have them apart."""
        row, floor = self.facts(), 0.0
        apart = {key: p.gemms() for key, p in self.prepared.items() if p.gemms is not None}
        if not apart:
            return row | dict(floor=self.floor(SHAPES[self.layers.shape].numbers()), wrong=self.wrong)
        for which, (n, k) in enumerate(sizes(self.layers.shape)):
            floor += self.floor(n * k)
            times = timing({key: gemms[which] for key, gemms in apart.items()}, 1.1 * self.floor(n * k) + 3)
            for key, us in times.items():
                row[key] = row.get(key, 0.0) + us
                row.setdefault("each", {}).setdefault(key, []).append(us)
        return row | dict(floor=floor) | (dict(wrong=self.wrong) if self.wrong else {})
