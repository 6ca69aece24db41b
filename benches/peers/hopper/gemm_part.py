"""The grouped GEMMs of a layer: Expertile's at its alignment beside DeepGEMM's at 128, the same live rows."""

import concurrent.futures
import itertools

import torch

import ours
from expert_layer import SAME_OPERANDS, UNQUANTIZED_GEMM, calls_for, mean, require_near
from shapes import SHAPES
from timing import race

OUR_ALIGNMENT, THEIR_ALIGNMENT = 8, 128
ROW_TILES = (16, 32, 64, 128, 192)
CUTS = ((1, 1), (2, 1), (1, 2), (1, 4), (1, 8))


def all_tiles():
    """Each as row tile, blocks that share rows, parts of K, 1 for a wide kernel, outputs."""
    few = [(row_tile, *cut, 0, 128) for row_tile in ROW_TILES for cut in CUTS if cut[1] == 1 or row_tile <= 64]
    narrow = [(row_tile, 1, 1, 0, 64) for row_tile in ROW_TILES if row_tile <= 64]
    return narrow + few + [(192, shared, 1, 1, 128) for shared in (1, 2)] + [(128, 1, 1, 1, 256)]


def worthwhile_tiles(weights, call):
    """Those that do not read weights many times over, are not nearly empty, and split K only where tiles are few."""
    experts, n, k = weights.shape
    rows = call.live / call.active
    for row_tile, shared, splits, wide, outputs in all_tiles():
        if (row_tile * 4 < rows and row_tile < 128) or row_tile > 16 * max(rows, 2):
            continue
        tiles = call.active * -(-rows // row_tile) * -(-n // 128)
        if splits == 1 or tiles * splits <= 4 * 132:
            yield row_tile, shared, splits, wide, outputs


def compile_ours(tiles):
    """Compiles several at a time; a kernel that is there already costs nothing."""
    dummy = torch.empty((1, 128, 128), dtype=torch.uint8, device="cuda")
    scale = torch.empty((1, 1, 1), device="cuda")

    class layout:
        header = worklist = psum = dummy

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda tile: ours.bind_gemm(tile, (dummy, scale), dummy[0], scale, layout, dummy), tiles))


def permutation(call, alignment, row_tile):
    hidden, _, experts, topk, _ = SHAPES[call.shape]
    theirs = alignment == THEIR_ALIGNMENT
    return ours.Permutation(call.tokens, topk, experts, hidden, alignment, reference_size=theirs, row_tile=row_tile)


class Gemm:
    """One of the two for some calls: both sides' rows, layouts and results. The second takes what the first leaves."""

    def __init__(self, which, weights, calls, row_tiles, before=None):
        self.which, self.weights, self.calls = which, weights, calls
        if before is None:
            bind = lambda alignment, row_tile: [
                step.bind(call.x, call.ids, call.expert_map)
                for step in [permutation(calls[0], alignment, row_tile)]
                for call in calls
            ]
            self.layouts = {row_tile: bind(OUR_ALIGNMENT, row_tile) for row_tile in row_tiles}
            self.their_layouts = bind(THEIR_ALIGNMENT, THEIR_ALIGNMENT)
            for layout in [*itertools.chain(*self.layouts.values()), *self.their_layouts]:
                layout()
                layout.check()
            self.inputs = [(layout.rows, layout.scales) for layout in self.any_layouts()]
            self.their_inputs = [(layout.rows, layout.scales) for layout in self.their_layouts]
        else:
            self.layouts, self.their_layouts, self.mids = before.layouts, before.their_layouts, before.mids
            self.inputs = self._activate(before.mids, self.any_layouts(), OUR_ALIGNMENT)
            self.their_inputs = self._activate(before.their_mids, self.their_layouts, THEIR_ALIGNMENT)
        result = lambda inputs: torch.empty(
            (inputs[0][0].shape[0], weights.shape[1]), device="cuda", dtype=torch.bfloat16
        )
        self.out, self.their_out = result(self.inputs), result(self.their_inputs)

    def any_layouts(self):
        """Layouts differ in the worklist only."""
        return next(iter(self.layouts.values()))

    @staticmethod
    def _activate(mids, layouts, alignment):
        bounds = [ours.bind_activation(mid, layout.psum, alignment) for mid, layout in zip(mids, layouts, strict=True)]
        for bound in bounds:
            bound()
        return [(bound.rows, bound.scales) for bound in bounds]

    def ours(self, tile):
        return [
            ours.bind_gemm(tile, self.weights.pair, rows, scales, layout, self.out)
            for (rows, scales), layout in zip(self.inputs, self.layouts[tile[0]], strict=True)
        ]

    def theirs(self, peer):
        return [
            lambda inputs=inputs, layout=layout: peer.gemm(inputs, self.weights.pair, self.their_out, layout.psum)
            for inputs, layout in zip(self.their_inputs, self.their_layouts, strict=True)
        ]

    def keep_results(self, calls, their_calls):
        """Each call's result of its own, for the activation."""
        keep = lambda calls, out: [(call(), out.clone())[1] for call in calls]
        self.mids, self.their_mids = keep(calls, self.out), keep(their_calls, self.their_out)

    def check(self, calls, their_calls, found):
        """All live rows against theirs, some of the first tile's against the unquantized product, and that nothing else
        was written; raises `found`, the largest distances so far."""
        first = not found
        for index, (mine, their) in enumerate(zip(calls, their_calls, strict=True)):
            slots = self.calls[index].live_slots()
            places = self.any_layouts()[index].inv_perm.long()
            self.out.fill_(float("nan"))
            mine()
            padding = torch.ones(self.out.shape[0], device="cuda", dtype=torch.bool)
            padding[places[slots]] = False
            if not self.out[padding].isnan().all():
                raise AssertionError("padding was written")
            their()
            theirs = self.their_out[self.their_layouts[index].inv_perm.long()[slots]]
            pair = require_near("against theirs", self.out[places[slots]], theirs, SAME_OPERANDS)
            found["theirs"] = [max(old, new) for old, new in zip(found.get("theirs", pair), pair, strict=True)]
            if index == 0 and first:
                found["unquantized"] = self._check_unquantized(self.calls[0], places)

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
        return require_near("against the unquantized product", torch.cat(rows), torch.cat(references), UNQUANTIZED_GEMM)


def measure(peer, shape, tokens, weights, chosen, options, sweep=False):
    """Rows of results, GEMM 1 and 2: for the layer's tile or, in a sweep, for every one that is worth it."""
    # By the smaller GEMM, so that both read beyond the cache.
    calls = calls_for(shape, tokens, weights[1].shape)
    more = [(options.tiles or list(worthwhile_tiles(w, calls[0]))) if sweep else [] for w in weights]
    tiles = [list(dict.fromkeys([first, *others])) for first, others in zip(chosen, more, strict=True)]
    row_tiles = list(dict.fromkeys(tile[0] for tile in itertools.chain(*tiles)))
    before, results = None, []
    for which in (1, 2):
        w = weights[which - 1]
        _, n, k = w.shape
        gemm = Gemm(which, w, calls, row_tiles, before)
        their_calls = gemm.theirs(peer)
        contenders, found = {"theirs": their_calls}, {}
        for tile in tiles[which - 1]:
            contenders[tile] = gemm.ours(tile)
            gemm.check(contenders[tile], their_calls, found)
        if which == 1:
            gemm.keep_results(contenders[chosen[0]], their_calls)
        live, active = mean(c.live for c in calls), mean(c.active for c in calls)
        flop, bytes_ = 2 * live * n * k, active * n * k + live * (k + 2 * n)
        times = race(contenders, max(flop / 1.2e9, bytes_ / 4.2e6) + 3, options.hot)
        results.append(
            dict(
                shape=shape,
                tokens=tokens,
                gemm=which,
                n=n,
                k=k,
                sets=len(calls),
                live_rows=live,
                active_experts=active,
                flop=flop,
                bytes=bytes_,
                weight_bytes=active * n * k,
                distance=found,
                chosen=name(chosen[which - 1]),
                theirs=times.pop("theirs"),
                ours={name(tile): us for tile, us in times.items()},
            )
        )
        before = gemm
    return results


def name(tile):
    """Row tile / blocks that share rows / parts of K, and a w for a wide kernel or an n for a tile of 64 outputs."""
    return "/".join(map(str, tile[:3])) + "w" * tile[3] + "n" * (tile[4] == 64)


def tile_of(name):
    """The tile of such a name."""
    row_tile, shared, splits = map(int, name.rstrip("wn").split("/"))
    outputs = 64 if name.endswith("n") else 256 if name.endswith("w") and row_tile == 128 else 128
    return row_tile, shared, splits, int(name.endswith("w")), outputs


def show(row):
    best = min(row["ours"], key=row["ours"].get)
    us = row["ours"][best]
    cells = " ".join(f"{'*' if tile == row['chosen'] else ''}{tile} {time:.1f}" for tile, time in row["ours"].items())
    print(
        f"{row['shape']:8} {row['tokens']:5} g{row['gemm']} live {row['live_rows']:.0f}/{row['active_experts']:.1f}"
        f" floor {row['weight_bytes'] / 4.2e6:.1f} dg {row['theirs']:.1f} | {cells} | {best} {row['theirs'] / us:.2f}x"
        f" {row['flop'] / us / 1e6:.0f}TF {row['bytes'] / us / 1e6:.2f}TB/s",
        flush=True,
    )
