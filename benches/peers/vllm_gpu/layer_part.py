"""The whole layer: Expertile's beside vLLM's path in its best order, and the stages of both."""

import torch

import ours
from compare import SHAPES, eager_us
from expert_layer import UNQUANTIZED_LAYER, calls_for, mean, require_near
from gemm_part import name as name_of_tile
from timing import race

STAGES = ("permute", "gemm1", "activation", "gemm2", "unpermute")


class Theirs:
    """vLLM's path on some calls. As there, both GEMMs' results share one buffer."""

    def __init__(self, peer, calls, weights):
        hidden, intermediate, experts, topk, _ = SHAPES[calls[0].shape]
        self.peer, self.calls, self.pairs = peer, calls, [w.pair for w in weights]
        self.m_sum = peer.m_sum(calls[0].tokens, topk, experts)
        wide = max(2 * intermediate, hidden)
        back = torch.empty(self.m_sum * wide, device="cuda", dtype=torch.bfloat16)
        self.mid = back[: self.m_sum * 2 * intermediate].view(self.m_sum, -1)
        self.rows = back[: self.m_sum * hidden].view(self.m_sum, -1)
        self.outs = [torch.empty_like(call.x) for call in calls]
        # workspace13 and workspace2 as its workspace_shapes sizes them, and the scales that it allocates besides.
        groups = (hidden + intermediate) // 128
        self.workspace_bytes = self.m_sum * (max(intermediate, hidden) + 2 * wide + 4 * groups)

    def layers(self):
        return [lambda c=c, out=out: self.peer.layer(c.x, c.ids, c.weights, *self.pairs, self.mid, self.rows, out, c.expert_map)
                for c, out in zip(self.calls, self.outs)]

    def stages(self):
        peer, calls, experts = self.peer, self.calls, self.pairs[0][0].shape[0]
        before = lambda c: peer.permute(*peer.quantize(c.x), c.ids, experts, c.expert_map)
        permuted = [before(c) for c in calls]
        for a, s, layout, _, _ in permuted[:1]:
            peer.gemm((a, s), self.pairs[0], self.mid, layout)
        activated = [peer.activate(self.mid, p[2], p[4]) for p in permuted]
        rows = torch.empty_like(self.rows).normal_()
        each = lambda make: [make(*item) for item in zip(calls, permuted, activated, self.outs)]
        return dict(
            permute=each(lambda c, p, a, out: lambda: before(c)),
            gemm1=each(lambda c, p, a, out: lambda: peer.gemm(p[:2], self.pairs[0], self.mid, p[2])),
            activation=each(lambda c, p, a, out: lambda: peer.activate(self.mid, p[2], p[4])),
            gemm2=each(lambda c, p, a, out: lambda: peer.gemm(a, self.pairs[1], rows, p[2])),
            unpermute=each(lambda c, p, a, out: lambda: peer.unpermute(rows, c.ids, c.weights, p[3], c.expert_map, out)))


class Ours:
    """Expertile's layer on the same calls; stages are the layer's own steps and tiles, bound one by one."""

    def __init__(self, layer, calls, weights):
        self.layer, self.calls, self.weights = layer, calls, weights
        self.workspace_bytes, self.alignment, self.launches, *self.tiles = layer.choice(calls[0].tokens)
        self.outs = [torch.full_like(call.x, float("nan")) for call in calls]
        workspace = torch.full((self.workspace_bytes,), 0xFF, device="cuda", dtype=torch.uint8)
        self.bounds = [layer.bind(c.x, c.ids, c.weights, out, workspace, c.expert_map) for c, out in zip(calls, self.outs)]

    def stages(self):
        hidden, _, experts, topk, _ = SHAPES[self.calls[0].shape]
        step = ours.Permutation(self.calls[0].tokens, topk, experts, hidden, self.alignment, reference_size=False, row_tile=self.tiles[0][0])
        permutes = [step.bind(c.x, c.ids, c.expert_map) for c in self.calls]
        up, down = (w.pair for w in self.weights)
        wide = lambda pair: torch.empty((step.m_sum, pair[0].shape[1]), device="cuda", dtype=torch.bfloat16).normal_()
        mid, rows = wide(up), wide(down)
        gemm1 = [ours.bind_gemm(self.tiles[0], up, p.rows, p.scales, p, mid, self.alignment) for p in permutes]
        activation = [ours.bind_activation(mid, p.psum, self.alignment) for p in permutes]
        gemm2 = [ours.bind_gemm(self.tiles[1], down, a.rows, a.scales, p, rows, self.alignment) for a, p in zip(activation, permutes)]
        unpermute = [ours.bind_unpermute(rows, p.inv_perm, c.weights, torch.empty_like(c.x)) for p, c in zip(permutes, self.calls)]
        for step in [*permutes, *gemm1, *activation, *gemm2]:
            step()
        return dict(zip(STAGES, (permutes, gemm1, activation, gemm2, unpermute)))


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
        found["theirs"] = [max(old, new) for old, new in zip(found.get("theirs", pair), pair)]
    tokens, reference = calls[0].reference(weights)
    for name, side in (("ours", mine), ("vllm", theirs)):
        found[name] = require_near(f"{name} against f64", side.outs[0][tokens], reference, UNQUANTIZED_LAYER)
    return found


def measure(peer, shape, tokens, weights, layer, options):
    calls = calls_for(shape, tokens, weights[1].shape)
    mine, theirs = Ours(layer, calls, weights), Theirs(peer, calls, weights)
    found = check(mine, theirs, calls, weights)
    weight_bytes = mean(c.active for c in calls) * sum(w.shape[1] * w.shape[2] for w in weights)
    flop = 2 * mean(c.live for c in calls) * sum(w.shape[1] * w.shape[2] for w in weights)
    expected = max(flop / 1.2e9, weight_bytes / 4.2e6) + 10
    row = dict(
        shape=shape, tokens=tokens, sets=len(calls), live_rows=mean(c.live for c in calls), active_experts=mean(c.active for c in calls),
        weight_bytes=weight_bytes, flop=flop, distance=found, tiles=[name_of_tile(tile) for tile in mine.tiles],
        alignment=mine.alignment, launches=mine.launches,
        workspace=dict(ours=mine.workspace_bytes, theirs=theirs.workspace_bytes),
        graph=race(dict(ours=mine.bounds, theirs=theirs.layers()), expected, options.hot, graph_us=4000),
        eager=eager(mine.bounds[0], theirs.layers()[0]))
    if options.stages:
        sides = dict(ours=mine.stages(), theirs=theirs.stages())
        contenders = {(side, stage): calls for side, stages in sides.items() for stage, calls in stages.items()}
        times = race(contenders, expected / 3, options.hot / 2, rounds=7)
        row["stages"] = {side: {stage: times[side, stage] for stage in STAGES} for side in sides}
    return row


def eager(mine, theirs):
    """Medians, in turns; the smaller of two of each."""
    times = [(eager_us(mine), eager_us(theirs)) for _ in range(2)]
    return dict(ours=min(a for a, _ in times), theirs=min(b for _, b in times))


def show(row):
    graph, eager_, work = row["graph"], row["eager"], row["workspace"]
    floor = row["weight_bytes"] / 4.2e6
    print(f"{row['shape']:8} {row['tokens']:5} layer {' '.join(row['tiles'])} floor {floor:.1f} graph {graph['ours']:.1f}/{graph['theirs']:.1f}"
          f" {graph['theirs'] / graph['ours']:.2f}x eager {eager_['ours']:.1f}/{eager_['theirs']:.1f} {eager_['theirs'] / eager_['ours']:.2f}x"
          f" ws {work['ours'] / 2**20:.1f}/{work['theirs'] / 2**20:.1f} MiB d {row['distance']['theirs'][0]:.0e} {row['distance']['ours'][0]:.1e}", flush=True)
    if "stages" in row:
        stages = row["stages"]
        print("   " + " ".join(f"{stage} {stages['ours'][stage]:.1f}/{stages['theirs'][stage]:.1f}" for stage in STAGES), flush=True)
