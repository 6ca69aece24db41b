"""Expertile's own layer, through the C interface beside this folder."""

import os
import pathlib

from rivals.base import Prepared, Rival
from shapes import SHAPES, swiglu_of

# As in `ours`, which fails without it.
FOLDER = pathlib.Path(__file__).parent.parent
LIBRARY = os.environ.get("EXPERTILE_LIB", str(FOLDER / "libexpertile_vllm_gpu.so"))


class Expertile(Rival):
    key, label = "ours", "Expertile"
    formats = ("e4m3", "bf16", "mxfp4")
    batch_invariant = takes_biases = True
    compiles_together = True

    def missing(self):
        return None if os.path.isfile(LIBRARY) else f"no library {LIBRARY!r}, which EXPERTILE_LIB names"

    def version(self):
        return "this commit"

    def compile_parts(self):
        return ("layer",)

    def load(self, shape, format, weights, tokens):
        return Loaded(shape, format, weights, tokens)


class ExpertileW4A16(Expertile):
    """The same on bf16 rows."""

    key, label = "ours_w4a16", "Expertile, bf16 rows"
    formats = ("mxfp4",)
    bf16_rows = True

    def load(self, shape, format, weights, tokens):
        return Loaded(shape, format, weights, tokens, bf16_rows=True)


class ExpertileCopy(Expertile):
    """The same on e4m3 rows, with a copy of the weights in e4m3 for many tokens."""

    key, label = "ours_copy", "Expertile, with an e4m3 copy"
    formats = ("mxfp4",)

    def load(self, shape, format, weights, tokens):
        return Loaded(shape, format, weights, tokens, e4m3_copy=True)


def in_halves(rows):
    """[E, 2 I, ..] whose rows of gate and up take turns: gate's first, then up's, as a checkpoint is loaded."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2).contiguous()


class Loaded:
    def __init__(self, shape, format, weights, tokens, bf16_rows=False, e4m3_copy=False):
        # The library is loaded where it is used, so that the rest works without it.
        import ours

        _, _, _, topk, global_experts = SHAPES[shape]
        swiglu, sizes = swiglu_of(shape), (topk, global_experts, max(tokens))
        pairs, biases = [w.pair for w in weights], [w.bias for w in weights]
        if swiglu.interleaved:
            pairs[0], biases[0] = [in_halves(part) for part in pairs[0]], in_halves(biases[0])
        self.weights = [ours.Mxfp4(*pair, bf16_rows, e4m3_copy) for pair in pairs] if format == "mxfp4" else pairs
        if swiglu.biased:
            self.layer = ours.Layer(*self.weights, *sizes, biases, (swiglu.alpha, swiglu.beta, swiglu.limit))
        else:
            self.layer = ours.Layer(*self.weights, *sizes)
        # The steps of the interface permute and activate e4m3 rows, and have no biases.
        self.apart = format == "e4m3" or (format == "mxfp4" and not bf16_rows and not swiglu.biased)

    def prepare(self, calls):
        import layer_part

        mine = layer_part.Ours(self.layer, calls, self.weights)
        tiles = [layer_part.name_of_tile(tile) for tile in mine.tiles] if mine.launches > 1 else []
        facts = dict(tiles=tiles, alignment=mine.alignment, launches=mine.launches)
        facts |= dict(inside=mine.inside, copy=mine.from_copy)

        def gemms():
            stages = mine.stages()
            return stages["gemm1"], stages["gemm2"]

        apart = gemms if self.apart else None
        return Prepared(mine.bounds, mine.outs, facts, lambda index: mine.bounds[index].check(), apart)
