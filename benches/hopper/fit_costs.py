"""Fits what a choice of tiles goes by to sweeps of `expertile bench tiles --device cuda:0 --json FILE`, and judges it by others.

    fit_costs.py --fit tiles-1.json tiles-3.json --judge tiles-2.json --write crates/expertile/src/cuda/cost/table.rs

The model is that of crates/expertile/src/cuda/cost.rs, in the same words. Constants of each kernel are first fitted to its times
by least squares, then moved a little, one at a time, wherever that makes the choices of the fitted layers better. Needs numpy and
scipy.
"""

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

Array = NDArray[np.float64]
MULTIPROCESSORS = 132
# Constants of a kernel before the times of its tiles and blocks.
HEAD = 7
ACTIVATION_START, ACTIVATION_BYTES = 2.2, 3.0e6
# Formats of weights and rows, as `GemmShape` has them.
Formats = tuple[str, str]
WEIGHT_BYTES = {"e4m3": 1.0, "bf16": 2.0, "mxfp4": 4.25 / 8, "int4": 4.5 / 8}
ROW_BYTES = {"e4m3": 1, "bf16": 2}
# Kernels that are never much better than another one: left out, so that a layer compiles fewer.
LEFT_OUT: dict[Formats, set[tuple[int, int, int, bool]]] = {
    ("e4m3", "e4m3"): {(16, 128, 2, False), (32, 128, 2, False), (64, 128, 2, False), (128, 128, 1, False), (128, 128, 2, False),
             (192, 128, 1, False), (192, 128, 2, False), (192, 128, 2, True)},
    ("bf16", "bf16"): {(16, 128, 2, False), (32, 128, 2, False), (64, 128, 2, False), (192, 128, 1, False), (192, 128, 2, False)},
    ("int4", "e4m3"): {(16, 384, 1, False)},
    ("int4", "bf16"): {(16, 384, 1, False)},
}


# Whole layers that took less with the wide tile than with the large one, on the same GPU: by 7 % (on 32 of the 256 experts)
# and by 1 %. Draws seldom have experts with just more rows than the large tile has.
BETTER_WIDE: dict[Formats, list[dict[str, Any]]] = {
    ("e4m3", "e4m3"): [
        {"hidden": 7168, "intermediate": 2048, "experts": 256, "topk": 8, "tokens": 4096, "format": "e4m3", "activations": "e4m3"}
    ],
}


def formats_of(layer: dict[str, Any]) -> Formats:
    """Sweeps of before mxfp4 do not say what rows are made of."""
    return layer["format"], layer.get("activations", layer["format"])


@dataclass(frozen=True, order=True)
class Kernel:
    row_tile: int
    outputs: int
    shared: int
    wide: bool
    activated: bool

    @property
    def step(self) -> int:
        return 64 if self.wide else 16 if self.row_tile <= 64 else 32

    @property
    def activates_meanwhile(self) -> bool:
        return self.activated and self.row_tile == 192

    @property
    def steps(self) -> int:
        return self.row_tile // self.step

    @property
    def rust(self) -> str:
        """The library's `GemmKernel`."""
        if self.wide:
            return "GemmKernel::Large" if self.row_tile == 128 else f"GemmKernel::Wide {{ shares_rows: {str(self.shared == 2).lower()} }}"
        cut = {64: "Narrow", 128: "SharedRows" if self.shared == 2 else "Plain"}.get(self.outputs, "Broad")
        return f"GemmKernel::FewRows {{ row_tile: {self.row_tile}, cut: FewRowsCut::{cut} }}"


def spread(mean: float, experts: float, into: dict[int, float]) -> None:
    """Experts by their rows, of so many with that mean."""
    if mean < 24:
        share = math.exp(-mean)
        for rows in range(1, int(mean + 6 * math.sqrt(mean) + 6) + 1):
            share *= mean / rows
            if share > 1e-6:
                into[rows] += share * experts
        return
    for deviations, share in ((-1.6, 0.1), (-0.9, 0.18), (-0.3, 0.22), (0.3, 0.22), (0.9, 0.18), (1.6, 0.1)):
        into[max(round(mean + deviations * math.sqrt(mean)), 1)] += share * experts


def population(experts: int, rows: int, most: int, skewed: bool) -> tuple[Array, Array]:
    """Numbers of rows, and how many experts have them."""
    found: dict[int, float] = defaultdict(float)
    if not skewed:
        spread(rows / experts, experts, found)
    else:
        groups, first = [], 1
        while first <= experts:
            after = min(max(int(first * 1.35), first + 1), experts + 1)
            groups.append((sum(1 / place for place in range(first, after)) / (after - first), after - first))
            first = after

        def mean(strength: float, weight: float) -> float:
            return most * (1 - math.exp(-strength * weight))

        low, high = 1e-9, 1e9
        for _ in range(60):
            middle = math.sqrt(low * high)
            if sum(count * mean(middle, weight) for weight, count in groups) < rows:
                low = middle
            else:
                high = middle
        for weight, count in groups:
            spread(mean(low, weight), count, found)
    pairs = sorted(found.items())
    return np.array([n for n, _ in pairs], float), np.array([count for _, count in pairs], float)


@dataclass
class Samples:
    """Of one kernel: a line for each GEMM that it was timed for, and for each guess of the routing."""

    blocks: Array
    columns: Array
    counts: Array  # tiles of each number of steps
    weights: Array  # bytes
    moved: Array  # bytes of rows and results
    longest: NDArray[np.int64]  # steps of the largest tile that is likely to be there, less one
    rows: Array  # of a tile, in the mean
    longest_rows: Array  # of the largest tile that is likely to be there

    def expected(self, p: Array, kernel: Kernel) -> Array:
        """Microseconds; `p` is start, tail, weight bytes, row bytes, hardness, whole, row time, then the times of a tile and of a
        block."""
        start, tail, weight_bytes, row_bytes, hardness, whole, row_time = p[:HEAD]
        of_tile, of_blocks = p[HEAD : HEAD + kernel.steps], self.blocks[:, None] * p[HEAD + kernel.steps :]

        def times(rows: Array) -> Array:
            of_rows = of_tile + rows[:, None] * row_time
            # Where other warps activate a tile while the next one is multiplied, the slower decides.
            return (of_rows**4 + of_blocks**4) ** 0.25 if kernel.activates_meanwhile else of_rows + of_blocks

        tiles = np.maximum(self.columns * self.counts.sum(1), 1e-9)
        mean = self.columns * (self.counts * times(self.rows)).sum(1) / tiles
        rounds = tiles / MULTIPROCESSORS
        work = mean * ((1 - whole) * (rounds + tail * np.minimum(rounds, 1)) + whole * np.ceil(rounds))
        work = np.maximum(work, times(self.longest_rows)[np.arange(len(work)), self.longest])
        if kernel.activates_meanwhile:
            start = start + of_tile[self.longest] + self.longest_rows * row_time
        memory = self.weights / weight_bytes + self.moved / row_bytes
        return np.asarray(start + (work**hardness + memory**hardness) ** (1 / hardness))


def samples(kernel: Kernel, gemms: list[tuple[dict[str, Any], str]], skewed: list[bool]) -> Samples:
    lines = []
    for (layer, gemm), is_skewed in zip(gemms, skewed, strict=True):
        rows, experts = population(layer["experts"], layer["tokens"] * layer["topk"], layer["tokens"], is_skewed)
        n, k = 2 * layer["intermediate"], layer["hidden"]
        if gemm == "gemm2":
            n, k = layer["hidden"], layer["intermediate"]
        weight_format, row_format = formats_of(layer)
        row_bytes = ROW_BYTES[row_format]
        full, rest = np.floor(rows / kernel.row_tile), rows % kernel.row_tile
        counts = np.zeros(kernel.steps + 1)
        counts[kernel.steps] += (full * experts).sum()
        np.add.at(counts, np.ceil(rest / kernel.step).astype(int), experts * (rest > 0))
        active, live = min(experts.sum(), layer["experts"]), (rows * experts).sum()
        columns = kernel.shared * math.ceil(n / (kernel.outputs * kernel.shared))
        moved = live * (k * row_bytes + n * (0.5 if kernel.activated else 2.0))
        likely = np.flatnonzero(counts[1:] * columns >= 0.5)
        longest = int(likely.max()) if len(likely) else 0
        with_as_many = experts[::-1].cumsum()[::-1]
        longest_rows = min(rows[with_as_many >= 0.5 / columns].max(initial=1), kernel.row_tile)
        of_tile = live / max(counts.sum(), 1e-9)
        # A large tile and the small one that holds the rest of an expert's rows read its weights twice.
        twice = (rows > 128) & (rows <= 192) if kernel.wide and kernel.row_tile == 128 else np.zeros(len(rows), bool)
        weights = (active + experts[twice].sum()) * n * k * WEIGHT_BYTES[weight_format]
        lines.append((math.ceil(k * row_bytes / 128), columns, counts[1:], weights, moved, longest, of_tile, longest_rows))
    blocks, columns_, counts_, weights_, moved_, longests, *of_rows = zip(*lines, strict=True)
    parts = [np.array(part, float) for part in (blocks, columns_, counts_, weights_, moved_)]
    return Samples(parts[0], parts[1], parts[2], parts[3], parts[4], np.array(longests), *(np.array(part) for part in of_rows))


def fit(kernel: Kernel, timed: Samples, times: Array) -> Array:
    """By least squares of the logarithm; few rows cost in proportion to their steps."""
    steps = np.arange(1, kernel.steps + 1)

    def unfold(x: Array) -> Array:
        if kernel.wide:
            return x
        return np.concatenate([x[:HEAD], x[HEAD] + x[HEAD + 1] * steps, x[HEAD + 2] + x[HEAD + 3] * steps])

    x, low, high = [2.0, 0.5, 4.2e6, 4.5e6, 3.0, 0.3, 0.003], [0.5, 0, 2.5e6, 1e6, 1.2, 0, 0], [5.0, 1.5, 4.7e6, 4e7, 12, 1, 0.2]
    if kernel.wide:
        x, low, high = x + [0.5, 0.4] * kernel.steps, low + [0.0, 0.05] * kernel.steps, high + [10.0, 3.0] * kernel.steps
        x[HEAD:], low[HEAD:], high[HEAD:] = ([*part[HEAD::2], *part[HEAD + 1 :: 2]] for part in (x, low, high))
    else:
        x, low, high = [*x, 0.5, 0.05, 0.15, 0.02], [*low, 0, 0, 0.01, 0], [*high, 10, 1, 1, 0.5]

    def off(x: Array) -> Array:
        return np.asarray(np.log(timed.expected(unfold(x), kernel) / times))

    found = least_squares(off, x, bounds=(low, high), loss="soft_l1", f_scale=0.05, x_scale=np.maximum(x, 0.01))
    return unfold(found.x)


class Fitted:
    """Layers of one format: what every kernel took for both GEMMs, and what the model chooses."""

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        self.layers, self.gemms = layers, [(layer, gemm) for layer in layers for gemm in ("gemm1", "gemm2")]
        self.took: dict[Kernel, Array] = {}
        for index, (layer, gemm) in enumerate(self.gemms):
            for tile in layer["tiles"]:
                if tile["gemm"] != gemm or tile["splits"] > 1:
                    continue
                kernel = Kernel(*(tile[field] for field in ("row_tile", "outputs", "shared", "wide", "activated")))
                times = self.took.setdefault(kernel, np.full(len(self.gemms), np.inf))
                times[index] = 1e6 * (tile["seconds"] + self.activation(index, kernel, layer["activation_seconds"]))
        self.best = np.min(list(self.took.values()), axis=0)
        self.formats = formats_of(layers[0])
        left_out = LEFT_OUT.get(self.formats, set())
        self.kernels = sorted(k for k in self.took if (k.row_tile, k.outputs, k.shared, k.wide) not in left_out)
        guesses = [samples(k, self.gemms * 2, [False] * len(self.gemms) + [True] * len(self.gemms)) for k in self.kernels]
        self.guesses = dict(zip(self.kernels, guesses, strict=True))

    def activation(self, index: int, kernel: Kernel, seconds: float) -> float:
        return seconds if self.gemms[index][1] == "gemm1" and not kernel.activated else 0.0

    def fit(self, kernel: Kernel) -> Array:
        there = np.isfinite(self.took[kernel])
        gemms = [gemm for gemm, is_there in zip(self.gemms, there, strict=True) if is_there]
        indices = [int(index) for index in np.flatnonzero(there)]
        apart = [1e6 * self.activation(index, kernel, self.gemms[index][0]["activation_seconds"]) for index in indices]
        timed = samples(kernel, gemms, [layer["zipf"] for layer, _ in gemms])
        return fit(kernel, timed, self.took[kernel][there] - np.array(apart))

    def cost(self, kernel: Kernel, p: Array) -> Array:
        """The logarithm of what is expected of a kernel, both guesses together."""
        guess = self.guesses[kernel]
        expected = guess.expected(p, kernel)
        if not kernel.activated:
            width = np.array([layer["intermediate"] * (4 + ROW_BYTES[self.formats[1]]) for layer, _ in self.gemms], float)
            is_first = np.array([gemm == "gemm1" for _, gemm in self.gemms])
            rows = np.array([layer["tokens"] * layer["topk"] for layer, _ in self.gemms], float)
            expected = expected + np.tile(is_first * (ACTIVATION_START + rows * width / ACTIVATION_BYTES), 2)
        sums = np.log(expected).reshape(2, -1).sum(0)
        return np.where(np.isfinite(self.took[kernel]), sums, np.inf)

    def misses(self, costs: Array, softness: float = 0.0) -> Array:
        """Of each layer, by how much what is chosen takes longer than the best, as a share of the best."""
        took = np.array([self.took[kernel] for kernel in self.kernels])
        if softness > 0:
            shares = np.exp(-(costs - costs.min(0)) / softness)
            chosen = np.where(shares > 0, shares * np.where(np.isfinite(took), took, 0), 0).sum(0) / shares.sum(0)
        else:
            chosen = took[costs.argmin(0), np.arange(len(self.gemms))]
        return np.asarray(chosen.reshape(-1, 2).sum(1) / self.best.reshape(-1, 2).sum(1) - 1)

    def tune(self, constants: dict[Kernel, Array], rounds: int, seed: int = 1) -> dict[Kernel, Array]:
        """Moves one constant at a time, where choices get better by it and times do not get much worse."""
        random = np.random.default_rng(seed)
        fitted, now = dict(constants), {kernel: p.copy() for kernel, p in constants.items()}
        costs = np.array([self.cost(kernel, now[kernel]) for kernel in self.kernels])

        better_wide = [(layer, gemm) for layer in BETTER_WIDE.get(self.formats, []) for gemm in ("gemm1", "gemm2")]
        guesses = [False] * len(better_wide) + [True] * len(better_wide)
        many_rows = {k: samples(k, better_wide * 2, guesses) for k in self.kernels if k.wide and better_wide}

        def wrong() -> float:
            """By how much the large tile looks better than the wide one where it is not."""
            least = {128: np.inf, 192: np.inf}
            for kernel, layers in many_rows.items():
                expected = np.log(layers.expected(now[kernel], kernel)).reshape(2, -1, 2).sum(0)
                # An activation of its own takes 5 % of GEMM 1 there; both guesses are added. GEMM 2 has none.
                expected = expected + ([0, np.inf] if kernel.activated else [0.1, 0])
                least[kernel.row_tile] = np.minimum(least[kernel.row_tile], expected)
            return float(np.maximum(least[192] - least[128] + 0.02, 0).sum()) if many_rows else 0.0

        def badness(costs: Array) -> float:
            moved = sum(np.square(np.log((now[k] + 1e-3) / (fitted[k] + 1e-3))).sum() for k in self.kernels)
            misses = self.misses(costs, 0.05)
            return float(misses.mean() + 3 * np.maximum(misses - 0.05, 0).mean() + 1e-3 * moved + 0.1 * wrong())

        least = badness(costs)
        for _ in range(rounds):
            index = int(random.integers(len(self.kernels)))
            kernel = self.kernels[index]
            before, at = now[kernel].copy(), int(random.integers(len(now[kernel])))
            now[kernel][at] *= math.exp(random.normal(0, 0.08))
            if at in (1, 5):
                now[kernel][at] = min(now[kernel][at], 1.5 if at == 1 else 1.0)
            tried = costs.copy()
            tried[index] = self.cost(kernel, now[kernel])
            if (found := badness(tried)) < least:
                least, costs = found, tried
            else:
                now[kernel] = before
        return now


def rust(constants: dict[Formats, dict[Kernel, Array]], others: list[str]) -> str:
    lines = ["//! Written by `benches/hopper/fit_costs.py` from sweeps on an H200; [`super`] says what the numbers are.", "",
             "use super::Cost;", "use crate::cuda::gemm::{FewRowsCut, GemmKernel};", "use crate::gemm::{ActivationFormat, WeightFormat};", "",
             "pub(super) const COSTS: &[Cost] = &[", *others]

    def number(x: float) -> str:
        return repr(float(f"{x:.4g}"))

    for (weights_, rows), kernels in constants.items():
        for kernel, p in kernels.items():
            tiles = ", ".join(map(number, p[HEAD : HEAD + kernel.steps]))
            blocks = ", ".join(map(number, p[HEAD + kernel.steps :]))
            lines += ["    Cost {", f"        format: WeightFormat::{weights_.capitalize()},",
                      f"        activation_format: ActivationFormat::{rows.capitalize()},", f"        kernel: {kernel.rust},",
                      f"        activated: {str(kernel.activated).lower()},", f"        start: {number(p[0])},",
                      f"        tile_times: &[{tiles}],", f"        block_times: &[{blocks}],",
                      f"        row_time: {number(p[6])},", f"        tail: {number(p[1])},",
                      f"        whole: {number(p[5])},",
                      f"        weight_bytes: {number(p[2])},", f"        row_bytes: {number(p[3])},", f"        hardness: {number(p[4])},", "    },"]
    return "\n".join([*lines, "];", ""])


def read(files: list[Path]) -> dict[Formats, list[dict[str, Any]]]:
    layers: dict[Formats, list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        for layer in json.loads(file.read_text())["layers"]:
            layers[formats_of(layer)].append(layer)
    return layers


def kept(table: Path, fitted: set[Formats]) -> list[str]:
    """The entries that a table has of other formats."""
    entries = [f"    Cost {{\n{text}" for text in table.read_text().rpartition("];")[0].split("    Cost {\n")[1:]]
    named = {formats: f"WeightFormat::{formats[0].capitalize()},\n        activation_format: ActivationFormat::{formats[1].capitalize()}," for formats in fitted}
    return [entry.rstrip("\n") for entry in entries if not any(name in entry for name in named.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=Path, nargs="+", required=True)
    parser.add_argument("--judge", type=Path, nargs="*", default=[])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--rounds", type=int, default=6000)
    options = parser.parse_args()
    constants: dict[Formats, dict[Kernel, Array]] = {}
    judged = read(options.judge)
    for name, layers in read(options.fit).items():
        fitted = Fitted(layers)
        of_format = {kernel: fitted.fit(kernel) for kernel in fitted.kernels}
        print(*name, "fitted:", summary(fitted, of_format), flush=True)
        of_format = fitted.tune(of_format, options.rounds)
        print(*name, "tuned:", summary(fitted, of_format), flush=True)
        if name in judged:
            print(*name, "judged:", summary(Fitted(judged[name]), of_format), flush=True)
        constants[name] = of_format
    if options.write:
        options.write.write_text(rust(constants, kept(options.write, set(constants))))


def summary(of: Fitted, constants: dict[Kernel, Array]) -> str:
    misses = of.misses(np.array([of.cost(kernel, constants[kernel]) for kernel in of.kernels]))
    return f"{len(misses)} layers, missed by {misses.mean():.1%} in the mean and {misses.max():.1%} at most, {(misses > 0.08).sum()} by over 8 %"


if __name__ == "__main__":
    main()
