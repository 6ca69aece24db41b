"""The whole layer: Expertile's beside vLLM's path in its best order, and the stages of both."""

import torch

import ours
from compare import eager_us
from deepgemm_layer import Theirs
from expert_layer import UNQUANTIZED_LAYER, Call, calls_for, mean, require_near
from gemm_part import compile_ours
from gemm_part import name as name_of_tile
from shapes import SHAPES
from timing import race

STAGES = ("permute", "gemm1", "activation", "gemm1 + activation", "gemm2", "unpermute")


class Ours:
    """Expertile's layer on the same calls; stages are the layer's own steps and tiles, bound one by one, and GEMM 1 and
    the activation also apart where the layer has them in one."""

    def __init__(self, layer, calls, weights):
        self.layer, self.calls, self.weights = layer, calls, weights
        choice = layer.choice(calls[0].tokens)
        self.workspace_bytes, self.alignment, self.launches, self.inside, *self.tiles, self.from_copy = choice
        self.outs = [torch.full_like(call.x, float("nan")) for call in calls]
        workspace = torch.full((self.workspace_bytes,), 0xFF, device="cuda", dtype=torch.uint8)
        self.bounds = [
            layer.bind(c.x, c.ids, c.weights, out, workspace, c.expert_map)
            for c, out in zip(calls, self.outs, strict=True)
        ]

    def stages(self):
        hidden, _, experts, topk, _ = SHAPES[self.calls[0].shape]
        # Each GEMM's worklist has its own row tile; the rows are in the same places.
        steps = [
            ours.Permutation(
                self.calls[0].tokens, topk, experts, hidden, self.alignment, reference_size=False, row_tile=tile[0]
            )
            for tile in self.tiles
        ]
        step = steps[0]
        permutes, seconds = ([step.bind(c.x, c.ids, c.expert_map) for c in self.calls] for step in steps)
        up, down = self.weights
        _, intermediate, *_ = SHAPES[self.calls[0].shape]
        first, second = ({"from_copy": from_copy} for from_copy in self.from_copy)
        wide = lambda n: torch.empty((step.m_sum, n), device="cuda", dtype=torch.bfloat16).normal_()
        mid, rows = wide(2 * intermediate), wide(hidden)
        gemm1 = [ours.bind_gemm(self.tiles[0], up, p.rows, p.scales, p, mid, **first) for p in permutes]
        activation = [ours.bind_activation(mid, p.psum, self.alignment) for p in permutes]
        gemm2 = [
            ours.bind_gemm(self.tiles[1], down, a.rows, a.scales, p, rows, **second)
            for a, p in zip(activation, seconds, strict=True)
        ]
        unpermute = [
            ours.bind_unpermute(rows, p.inv_perm, c.weights, torch.empty_like(c.x))
            for p, c in zip(permutes, self.calls, strict=True)
        ]
        found = dict(permute=permutes, gemm1=gemm1, activation=activation, gemm2=gemm2, unpermute=unpermute)
        if self.inside:
            found["gemm1 + activation"] = [
                ours.bind_gemm(self.tiles[0], up, p.rows, p.scales, p, a.rows, a.scales, **first)
                for p, a in zip(permutes, activation, strict=True)
            ]
        for step in [*permutes, *seconds, *gemm1, *activation]:
            step()
        return found


def check(mine, theirs, calls, weights):
    """Every call's result against theirs; some tokens of the first against the layer in f64."""
    found = {}
    for index, call in enumerate(calls):
        mine.bounds[index]()
        mine.bounds[index].check()
        theirs.layers()[index]()
        some = (call.local >= 0).any(1)
        if mine.outs[index][~some].any():
            raise AssertionError("a token without a local expert is not zero")
        pair = require_near("against theirs", mine.outs[index][some], theirs.outs[index][some], UNQUANTIZED_LAYER)
        found["theirs"] = [max(old, new) for old, new in zip(found.get("theirs", pair), pair, strict=True)]
    tokens, reference = calls[0].reference(weights)
    for name, side in (("ours", mine), ("vllm", theirs)):
        found[name] = require_near(f"{name} against f64", side.outs[0][tokens], reference, UNQUANTIZED_LAYER)
    return found


class Case:
    """One shape and number of tokens: calls, and both sides of them."""

    def __init__(self, peer, shape, tokens, weights, layer):
        self.calls, self.weights = calls_for(shape, tokens, weights[1].shape), weights
        self.mine = Ours(layer, self.calls, [w.pair for w in weights])
        self.theirs = Theirs(peer, self.calls, weights)
        self.row = dict(shape=shape, tokens=tokens)
        self.numbers = sum(w.shape[1] * w.shape[2] for w in weights)
        self.active, self.live = mean(c.active for c in self.calls), mean(c.live for c in self.calls)
        self.expected_us = max(2 * self.live * self.numbers / 1.2e9, self.active * self.numbers / 4.2e6) + 10

    def graph(self, options):
        mine, theirs = self.mine, self.theirs
        found = check(mine, theirs, self.calls, self.weights)
        times = race(dict(ours=mine.bounds, theirs=theirs.layers()), self.expected_us, options.hot, graph_us=4000)
        return dict(
            self.row,
            sets=len(self.calls),
            live_rows=self.live,
            active_experts=self.active,
            weight_bytes=self.active * self.numbers,
            flop=2 * self.live * self.numbers,
            distance=found,
            tiles=[name_of_tile(tile) for tile in mine.tiles],
            alignment=mine.alignment,
            launches=mine.launches,
            inside=mine.inside,
            graph=times,
            workspace=dict(ours=mine.workspace_bytes, theirs=theirs.workspace_bytes),
        )

    def eager(self, _):
        """Medians, in turns; the smaller of two of each."""
        times = [(eager_us(self.mine.bounds[0]), eager_us(self.theirs.layers()[0])) for _ in range(2)]
        return dict(self.row, ours=min(a for a, _ in times), theirs=min(b for _, b in times))

    def stages(self, options):
        sides = dict(ours=self.mine.stages(), theirs=self.theirs.stages())
        contenders = {(side, stage): calls for side, stages in sides.items() for stage, calls in stages.items()}
        times = race(contenders, self.expected_us / 3, options.hot / 2, rounds=5, graph_us=1000)
        for side in sides:
            times.setdefault((side, "gemm1 + activation"), times[side, "gemm1"] + times[side, "activation"])
        return dict(
            self.row,
            inside=self.mine.inside,
            **{side: {stage: times[side, stage] for stage in STAGES} for side in sides},
        )


def show_layer(row):
    graph, work, floor = row["graph"], row["workspace"], row["weight_bytes"] / 4.2e6
    tiles = "+".join(row["tiles"]) + " inside" * row["inside"]
    print(
        f"{row['shape']:8} {row['tokens']:5} layer {tiles} floor {floor:.1f}"
        f" graph {graph['ours']:.1f}/{graph['theirs']:.1f}"
        f" {graph['theirs'] / graph['ours']:.2f}x workspace {work['ours'] / 2**20:.1f}/{work['theirs'] / 2**20:.1f} MiB"
        f" distance {row['distance']['ours'][0]:.1e}, to theirs {row['distance']['theirs'][0]:.0e}",
        flush=True,
    )


def show_eager(row):
    print(
        f"{row['shape']:8} {row['tokens']:5} eager {row['ours']:.1f}/{row['theirs']:.1f}"
        f" {row['theirs'] / row['ours']:.2f}x",
        flush=True,
    )


def show_stages(row):
    cells = (f"{stage} {row['ours'][stage]:.1f}/{row['theirs'][stage]:.1f}" for stage in STAGES)
    print(f"{row['shape']:8} {row['tokens']:5} stages {' '.join(cells)}", flush=True)


def compile_steps(peer, shape, tokens):
    """Compiles our layer's kernels, and of theirs all but the GEMMs."""
    hidden, intermediate, experts, topk, global_experts = SHAPES[shape]
    empty = lambda *size, dtype=torch.float8_e4m3fn: torch.empty(size, device="cuda", dtype=dtype)
    pair = lambda n, k: (empty(experts, n, k), empty(experts, n // 128, k // 128, dtype=torch.float32))
    layer = ours.Layer(pair(2 * intermediate, hidden), pair(hidden, intermediate), topk, global_experts, max(tokens))
    compile_ours({tile for count in tokens for tile in layer.choice(count)[4:6]})
    for count in tokens:
        call = Call(shape, count, seed=count)
        a, s, layout, inverse, alignment = peer.permute(*peer.quantize(call.x), call.ids, experts, call.expert_map)
        peer.activate(empty(a.shape[0], 2 * intermediate, dtype=torch.bfloat16), layout, alignment)
        peer.unpermute(
            empty(a.shape[0], hidden, dtype=torch.bfloat16),
            call.ids,
            call.weights,
            inverse,
            call.expert_map,
            torch.empty_like(call.x),
        )
    torch.cuda.synchronize()
