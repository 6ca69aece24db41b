"""Humming's grouped GEMMs, which vLLM takes for 4-bit weights on Hopper, among Expertile's other steps.

A whole layer is Expertile's permute, Humming's GEMM 1, Expertile's activation, Humming's GEMM 2 and Expertile's
unpermute, in one graph. The rows lie as Expertile's GEMMs would read them, at an alignment of 8, which changes no
number of tiles, as Humming's tiles are multiples of 8 rows. The offsets of the experts and the rows' scales in
Humming's order are copied beforehand, which costs Humming nothing here and costs vLLM a little.
"""

import os

import torch

import vllm_ops
from rivals.base import Prepared, Rival, sizes
from rivals.expertile import Expertile
from shapes import SHAPES

ALIGNMENT = 8
# As vLLM's create_humming_locks, more than any launch needs.
LOCKS = 2048


class Humming(Rival):
    key, label = "humming", "humming-kernels 0.1.20, e4m3 weights"

    def missing(self):
        return vllm_ops.missing("humming") or Expertile().missing()

    def version(self):
        return f"humming-kernels {humming_module('').__version__}"

    def load(self, shape, format, weights, tokens):
        gemms = [
            Gemm(shape, self.layer_config(n, k, shape), self.tensors(w), tokens, self.batch_invariant)
            for (n, k), w in zip(sizes(shape), weights, strict=True)
        ]
        return Loaded(shape, gemms)

    def layer_config(self, n, k, shape):
        blocks = dict(weight_scale_group_size=128, weight_scale_group_size_n=128)
        return common_config(n, k, shape) | dict(b_dtype="float8e4m3", bs_dtype="float32") | blocks

    def tensors(self, weights):
        values, scales = weights.pair
        return dict(weight=values.view(torch.int32), weight_scale=scales)

    def compile_parts(self):
        return ("gemms",)

    def compile(self, shape, format, weights, tokens, part):
        # All sizes' kernels at once, in parallel.
        self.load(shape, format, weights, tokens)


class HummingBatchInvariant(Humming):
    """In its batch-invariant mode: K is not cut."""

    key, label = "humming_bi", "humming-kernels 0.1.20, e4m3 weights, batch-invariant"
    batch_invariant = True


class HummingMxfp4(Humming):
    """Weights of 4 bits with a power of two for 32 of them, rows as before."""

    key, label = "humming_mxfp4", "humming-kernels 0.1.20, MXFP4 weights"
    formats = ("mxfp4",)

    def layer_config(self, n, k, shape):
        kind = dict(b_dtype="float4e2m1", bs_dtype="float8e8m0", weight_scale_group_size=32)
        return common_config(n, k, shape) | kind

    def tensors(self, weights):
        """Quantized once more, which changes nothing, one expert at a time: all of them in f32 do not fit."""
        schema_of = humming_module("schema").HummingWeightSchema
        dtypes = humming_module("dtypes")
        schema = schema_of(b_dtype=dtypes.float4e2m1, bs_dtype=dtypes.float8e8m0, weight_scale_group_size=32)
        values, scales = [], []
        for expert in range(weights.shape[0]):
            original = weights.original(expert).to(torch.bfloat16)
            parts = schema.quant_tensor(original, schema, torch.bfloat16, allow_negative_scale=True)
            values.append(parts["weight"])
            scales.append(parts["weight_scale"].view(torch.uint8))
        return dict(weight=torch.stack(values), weight_scale=torch.stack(scales).view(torch.float8_e8m0fnu))


def humming_module(name):
    """A module of the package, which compiles with NVRTC unless told otherwise."""
    os.environ.setdefault("HUMMING_COMPILER", "nvrtc")
    return vllm_ops.load_module("humming" + "." * bool(name) + name)


def common_config(n, k, shape):
    """Rows e4m3 with an f32 scale for 128 values, results bf16."""
    rows = dict(a_dtype="float8e4m3", as_dtype="float32", input_scale_group_size=128)
    return dict(shape_n=n, shape_k=k, num_experts=SHAPES[shape].experts, c_dtype="bfloat16", **rows)


class Gemm:
    """One of a layer's two, with a kernel for every number of tokens."""

    def __init__(self, shape, layer_config, tensors, tokens, batch_invariant):
        config = humming_module("config")
        layer = config.LayerConfig(**layer_config)
        # vLLM hands the rows' scales over row by row; HUMMING_SCALES=m-major tries the other order.
        self.m_major = os.environ.get("HUMMING_SCALES") == "m-major"
        compute = config.ComputeConfig(
            gemm_type=config.GemmType.GROUPED_CONTIGUOUS,
            use_batch_invariant=batch_invariant,
            use_m_major_input_scale=self.m_major,
        )
        self.n, self.tensors = layer.shape_n, humming_module("transform").transform_humming_tensors(layer, tensors)
        heuristics = humming_module("tune").get_heuristics_config
        options = dict(use_batch_invariant=batch_invariant, use_m_major_input_scale=self.m_major)
        self.tiles = {
            count: heuristics(layer, shape_m=expected_rows(shape, count), gemm_type=compute.gemm_type, **options)
            for count in tokens
        }
        kernels = humming_module("kernel.humming").HummingKernel.prepare_kernels(
            layer.to_str(), compute.to_str(), [(0, 1 << 30, tile) for tile in self.tiles.values()]
        )
        self.kernels = dict(zip(self.tiles, kernels.view(-1, 4), strict=True))

    def bind(self, tokens, rows, scales, offsets, out):
        launch = humming_module("ops").launch_kernel
        locks = torch.zeros((LOCKS,), device="cuda", dtype=torch.int32)
        scales = scales.t().contiguous() if self.m_major else scales.contiguous()
        arguments = dict(configs=self.kernels[tokens].contiguous(), inputs=rows, input_scale=scales)
        return lambda: launch(outputs=out, expert_layout=offsets, locks=locks, **arguments, **self.tensors)


def expected_rows(shape, tokens):
    """Rows that a rank expects, as vLLM estimates them for the choice of a kernel."""
    shape = SHAPES[shape]
    return -(-tokens * shape.topk * shape.experts // shape.global_experts)


class Loaded:
    def __init__(self, shape, gemms):
        self.shape, self.gemms = shape, gemms

    def prepare(self, calls):
        layers = [Layer(self, call) for call in calls]
        tiles = [gemm.tiles[calls[0].tokens]["block_shape"] for gemm in self.gemms]
        return Prepared(
            layers,
            [layer.out for layer in layers],
            dict(tiles=tiles, scales="m-major" if self.gemms[0].m_major else "row by row"),
            lambda index: layers[index].permute.check(),
            lambda: tuple([layer.gemms[which] for layer in layers] for which in range(2)),
        )


class Layer:
    """One call."""

    def __init__(self, loaded, call):
        import ours

        hidden, _, experts, topk, _ = SHAPES[loaded.shape]
        step = ours.Permutation(call.tokens, topk, experts, hidden, ALIGNMENT, reference_size=False, row_tile=64)
        self.permute = step.bind(call.x, call.ids, call.expert_map)
        self.permute()
        self.permute.check()
        mid, rows = (
            torch.empty((step.m_sum, gemm.n), device="cuda", dtype=torch.bfloat16).fill_(float("nan"))
            for gemm in loaded.gemms
        )
        offsets = expert_offsets(self.permute)
        self.out = torch.empty_like(call.x)
        self.activation = ours.bind_activation(mid, self.permute.psum, ALIGNMENT)
        bind = lambda gemm, source, out: gemm.bind(call.tokens, source.rows, source.scales, offsets, out)
        first = bind(loaded.gemms[0], self.permute, mid)
        first()
        # Its scales are copied by the binding of the second GEMM, so they have to be there.
        self.activation()
        self.gemms = first, bind(loaded.gemms[1], self.activation, rows)
        self.unpermute = ours.bind_unpermute(rows, self.permute.inv_perm, call.weights, self.out)

    def __call__(self):
        self.permute()
        self.gemms[0]()
        self.activation()
        self.gemms[1]()
        self.unpermute()


def expert_offsets(layout):
    """Where the experts' rows begin, and where the last one's end, with their padding: i64 [E + 1]."""
    counts, starts = layout.expert_num_tokens.long(), layout.expert_start.long()
    aligned = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return torch.cat([starts, starts[-1:] + aligned[-1:]])
