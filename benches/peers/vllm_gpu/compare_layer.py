"""Expertile's grouped GEMM beside DeepGEMM's, in one process, on the same rows. README.md says how to run it.

    PEER_DIR=... python3 compare_layer.py --out FOLDER [--shapes dsv3,...] [--tokens 1,8,...] [--sweep]

Results are checked first, then timed inside CUDA graphs that take turns, clocks hot. `--sweep` times every tile of ours that is
worth it. `--compile` only fills DeepGEMM's cache: compiling takes it many seconds a kernel.
"""

import argparse
import concurrent.futures
import json
import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ours  # noqa: E402
from compare import L2_BYTES, SHAPES, copy_tbs, device_facts  # noqa: E402
from expert_layer import SAME_OPERANDS, UNQUANTIZED, Call, layer_weights, require_near  # noqa: E402

OUR_ALIGNMENT, THEIR_ALIGNMENT = 8, 128
ROW_TILES = (16, 32, 64, 128, 192)
CUTS = ((1, 1), (2, 1), (1, 2), (1, 4), (1, 8))


def capture(calls, repeats):
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(repeats):
            calls[index % len(calls)]()
    return graph


def race(contenders, expected_us, hot_seconds, rounds=9, graph_us=2000):
    """Median microseconds of a call of each contender (name: one call per set of inputs), their graphs replayed in turns."""
    sets = len(next(iter(contenders.values())))
    repeats = min(max(round(graph_us / expected_us / sets), 1), max(96 // sets, 1)) * sets
    repeats = max(repeats, 2 if sets == 1 else sets)
    graphs = {name: capture(calls, repeats) for name, calls in contenders.items()}
    start = time.perf_counter()
    while time.perf_counter() - start < hot_seconds:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    events = {name: [] for name in graphs}
    for turn in range(rounds):
        for name in list(graphs)[:: 1 if turn % 2 == 0 else -1]:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            graphs[name].replay()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {name: sorted(a.elapsed_time(b) for a, b in pairs)[rounds // 2] / repeats * 1e3 for name, pairs in events.items()}


def fp8_tflops(size=8192):
    """What the matrix unit gives on random e4m3 in one large product, hot."""
    a, b = (torch.randn((size, size), device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    product = lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return 2 * size**3 / race({"product": [product]}, 800, 0.4)["product"] / 1e6


def read_tbs(size=1 << 32):
    x = torch.empty(size // 4, device="cuda").normal_().view(-1, 1 << 20)
    return size / race({"read": [lambda: x.sum(1)]}, 1000, 0.1)["read"] / 1e6


def worthwhile_tiles(weights, call):
    experts, n, k = weights.shape
    mean = call.live / call.active
    for row_tile in ROW_TILES:
        if row_tile * 4 < mean and row_tile < 128 or row_tile > 16 * max(mean, 2):
            continue
        tiles = call.active * -(-mean // row_tile) * -(-n // 128)
        for shared, splits in CUTS:
            if splits == 1 or row_tile <= 64 and tiles * splits <= 4 * 132:
                yield row_tile, shared, splits


def compile_ours(tiles):
    """Compiles all at once; a kernel that is there already costs nothing."""
    dummy = torch.empty((1, 128, 128), dtype=torch.uint8, device="cuda")
    scale = torch.empty((1, 1, 1), device="cuda")
    class layout:
        header = worklist = psum = dummy
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda tile: ours.bind_gemm(tile, (dummy, scale), dummy[0], scale, layout, dummy, 8), tiles))


class Gemm:
    """One of a layer's GEMMs for some calls: both sides' rows, layouts and results."""

    def __init__(self, which, weights, calls, row_tiles, before=None):
        self.which, self.weights, self.calls = which, weights, calls
        if before is None:
            bind = lambda alignment, row_tile: [
                permutation(call, alignment, row_tile).bind(call.x, call.ids, call.expert_map) for call in calls]
            self.layouts = {row_tile: bind(OUR_ALIGNMENT, row_tile) for row_tile in row_tiles}
            self.their_layouts = bind(THEIR_ALIGNMENT, THEIR_ALIGNMENT)
            for layout in [*sum(self.layouts.values(), []), *self.their_layouts]:
                layout()
                layout.check()
            self.inputs = [(layout.rows, layout.scales) for layout in next(iter(self.layouts.values()))]
            self.their_inputs = [(layout.rows, layout.scales) for layout in self.their_layouts]
        else:
            self.layouts, self.their_layouts = before.layouts, before.their_layouts
            self.mids = before.mids
            self.inputs = self._activate(before.mids, next(iter(self.layouts.values())), OUR_ALIGNMENT)
            self.their_inputs = self._activate(before.their_mids, self.their_layouts, THEIR_ALIGNMENT)
        n = weights.shape[1]
        result = lambda inputs: torch.empty((inputs[0][0].shape[0], n), device="cuda", dtype=torch.bfloat16)
        self.out, self.their_out = result(self.inputs), result(self.their_inputs)

    @staticmethod
    def _activate(mids, layouts, alignment):
        bounds = [ours.bind_activation(mid, layout.psum, alignment) for mid, layout in zip(mids, layouts)]
        for bound in bounds:
            bound()
        return [(bound.rows, bound.scales) for bound in bounds]

    def ours(self, tile):
        return [ours.bind_gemm(tile, self.weights.pair, rows, scales, layout, self.out, OUR_ALIGNMENT)
                for (rows, scales), layout in zip(self.inputs, self.layouts[tile[0]])]

    def theirs(self, peer):
        return [lambda inputs=inputs, layout=layout: peer.gemm(inputs, self.weights.pair, self.their_out, layout.psum)
                for inputs, layout in zip(self.their_inputs, self.their_layouts)]

    def keep_results(self, calls, their_calls):
        """Each call's result of its own, for the activation."""
        keep = lambda calls, out: [(call(), out.clone())[1] for call in calls]
        self.mids, self.their_mids = keep(calls, self.out), keep(their_calls, self.their_out) if their_calls else None

    def check(self, calls, their_calls, found):
        """All live rows against theirs, some of the first tile's against the unquantized product, and that nothing else was
        written; raises `found`, the largest distances so far."""
        first = not found
        for index, mine in enumerate(calls):
            call, layout = self.calls[index], self.layouts[next(iter(self.layouts))][index]
            slots = call.live_slots()
            places = layout.inv_perm.long()
            self.out.fill_(float("nan"))
            mine()
            padding = torch.ones(self.out.shape[0], device="cuda", dtype=torch.bool)
            padding[places[slots]] = False
            if not self.out[padding].isnan().all():
                raise AssertionError("padding was written")
            if their_calls:
                their_calls[index]()
                theirs = self.their_out[self.their_layouts[index].inv_perm.long()[slots]]
                pair = require_near("against theirs", self.out[places[slots]], theirs, SAME_OPERANDS)
                found["theirs"] = [max(old, new) for old, new in zip(found.get("theirs", pair), pair)]
            if index == 0 and first:
                found["unquantized"] = self._check_unquantized(call, places)

    def _check_unquantized(self, call, places):
        rows, references = [], []
        for expert, slots in call.sample():
            original = self.weights.original(expert).double()
            if self.which == 1:
                x = call.x[slots // call.ids.shape[1]].double()
            else:
                gate, up = self.mids[0][places[slots]].double().chunk(2, dim=1)
                x = torch.nn.functional.silu(gate) * up
            references.append(x @ original.t())
            rows.append(self.out[places[slots]])
        return require_near("against the unquantized product", torch.cat(rows), torch.cat(references), UNQUANTIZED)


_permutations = {}


def permutation(call, alignment, row_tile):
    hidden, _, experts, topk, _ = SHAPES[call.shape]
    key = call.shape, call.tokens, alignment, row_tile
    if key not in _permutations:
        _permutations[key] = ours.Permutation(
            call.tokens, topk, experts, hidden, alignment, reference_size=alignment == THEIR_ALIGNMENT, row_tile=row_tile)
    return _permutations[key]


def calls_for(shape, tokens, weights):
    """Enough calls that the weights they read are several times the L2: one where a single call's are."""
    calls, read = [], 0
    while not calls or read < 4 * L2_BYTES and len(calls) < 8:
        calls.append(Call(shape, tokens, seed=tokens + len(shape) + 100 * len(calls)))
        read += calls[-1].active * weights.shape[1] * weights.shape[2]
    return calls


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def measure_gemms(peer, shape, tokens, weights, options):
    """Rows of results: GEMM 1 and 2."""
    # By the smaller GEMM, so that both read beyond the cache.
    calls = calls_for(shape, tokens, weights[1])
    tiles = [list(worthwhile_tiles(w, calls[0])) if options.sweep else [] for w in weights]
    chosen = [ours.choose_tile(w, calls[0].live) for w in weights]
    tiles = [list(dict.fromkeys([first, *others])) for first, others in zip(chosen, tiles)]
    row_tiles = list(dict.fromkeys(tile[0] for tile in sum(tiles, [])))
    before, results = None, []
    for which in (1, 2):
        w = weights[which - 1]
        _, n, k = w.shape
        gemm = Gemm(which, w, calls, row_tiles, before)
        their_calls = gemm.theirs(peer) if peer else None
        contenders, found = {}, {}
        for tile in tiles[which - 1]:
            contenders[tile] = gemm.ours(tile)
            gemm.check(contenders[tile], their_calls, found)
        if which == 1:
            gemm.keep_results(contenders[chosen[0]], their_calls)
        if peer:
            contenders["theirs"] = their_calls
        live, active = mean(c.live for c in calls), mean(c.active for c in calls)
        flop, bytes_ = 2 * live * n * k, active * n * k + live * (k + 2 * n)
        times = race(contenders, max(flop / 1.2e9, bytes_ / 4.2e6) + 3, options.hot)
        results.append(dict(
            shape=shape, tokens=tokens, gemm=which, n=n, k=k, sets=len(calls), live_rows=live, active_experts=active, flop=flop,
            bytes=bytes_, weight_bytes=active * n * k, distance=found, chosen="/".join(map(str, chosen[which - 1])),
            ours={"/".join(map(str, tile)): us for tile, us in times.items() if tile != "theirs"}, theirs=times.get("theirs")))
        before = gemm
    return results


def print_gemm(row):
    theirs, floor = row["theirs"], row["weight_bytes"] / 4.2e6
    best = min(row["ours"], key=row["ours"].get)
    us = row["ours"][best]
    cells = " ".join(f"{'*' if tile == row['chosen'] else ''}{tile} {time:.1f}" for tile, time in row["ours"].items())
    print(f"{row['shape']:8} {row['tokens']:5} g{row['gemm']} live {row['live_rows']:.0f}/{row['active_experts']:.1f}"
          f" floor {floor:.1f} dg {theirs or 0:.1f} | {cells} | {best} {(theirs or 0) / us:.2f}x"
          f" {row['flop'] / us / 1e6:.0f}TF {row['bytes'] / us / 1e6:.2f}TB/s", flush=True)


def compile_theirs(peer, shapes, tokens, which):
    """One launch of each size over no rows."""
    for shape in shapes:
        hidden, intermediate, experts, topk, _ = SHAPES[shape]
        n, k = (2 * intermediate, hidden) if which == 1 else (hidden, intermediate)
        empty = lambda *size, dtype=torch.float8_e4m3fn: torch.empty(size, device="cuda", dtype=dtype)
        weights = empty(experts, n, k), empty(experts, n // 128, k // 128, dtype=torch.float32)
        for count in tokens:
            m_sum = ours.Permutation(count, topk, experts, hidden).m_sum
            scales = empty(k // 128, m_sum, dtype=torch.float32).t()
            psum = torch.zeros(experts, device="cuda", dtype=torch.int32)
            peer.gemm((empty(m_sum, k), scales), weights, empty(m_sum, n, dtype=torch.bfloat16), psum)
            torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=".")
    parser.add_argument("--name", default="gemm", help="of the JSON file")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,32,64,128,256,1024,4096,16384")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without DeepGEMM")
    parser.add_argument("--hot", type=float, default=0.3, help="seconds of load before each timing")
    parser.add_argument("--compile", type=int, default=0, metavar="GEMM", help="1 or 2")
    options = parser.parse_args()
    shapes, tokens = options.shapes.split(","), list(map(int, options.tokens.split(",")))
    torch.zeros(1, device="cuda")
    peer = None
    if not options.alone:
        import vllm_peer as peer
    if options.compile:
        return compile_theirs(peer, shapes, tokens, options.compile)
    results = dict(device=device_facts(), copy_tbs=copy_tbs(), read_tbs=read_tbs(), fp8_tflops=fp8_tflops(), gemms=[], wrong=[])
    print("copy {copy_tbs:.2f} TB/s, read {read_tbs:.2f} TB/s, fp8 {fp8_tflops:.0f} TFLOP/s".format(**results), flush=True)
    if options.sweep:
        compile_ours([(r, *cut) for r in ROW_TILES for cut in CUTS if cut[1] == 1 or r <= 64])
    for shape in shapes:
        start = time.perf_counter()
        weights = layer_weights(shape)
        torch.cuda.synchronize()
        print(f"# {shape}: weights in {time.perf_counter() - start:.1f} s", flush=True)
        for count in tokens:
            try:
                rows = measure_gemms(peer, shape, count, weights, options)
                results["gemms"] += rows
                for row in rows:
                    print_gemm(row)
            except Exception as error:  # noqa: BLE001
                results["wrong"].append(f"{shape} {count}: {type(error).__name__}: {error}")
                print("WRONG", results["wrong"][-1], flush=True)
            _permutations.clear()
            torch.cuda.empty_cache()
            with open(os.path.join(options.out, options.name + ".json"), "w") as file:
                json.dump(results, file, indent=1)
        del weights
    results["device_after"] = device_facts()
    with open(os.path.join(options.out, options.name + ".json"), "w") as file:
        json.dump(results, file, indent=1)
    print(results["device_after"]["smi"])
    sys.exit(bool(results["wrong"]))


if __name__ == "__main__":
    main()
