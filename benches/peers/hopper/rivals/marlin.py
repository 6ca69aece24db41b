"""vLLM's path through Marlin: rows bf16, MXFP4 weights; in its order for gpt-oss it comes behind triton_kernels.

Widths are padded as vLLM pads them: I to a multiple of 128, H of 256. MARLIN_HIDDEN=64 pads H no further than the
kernels need. Rows are padded before the call, and the result is not cut to its width, which costs vLLM two copies.
"""

import os

import torch

import vllm_ops
from device import DEVICE
from rivals.base import Prepared, Rival
from shapes import SHAPES, SWIGLU, swiglu_of

# As vLLM's get_marlin_workspace: blocks of a multiprocessor, each with a lock.
LOCKS_OF_MULTIPROCESSOR = 4


class Marlin(Rival):
    key, label = "marlin", "vLLM 0.33.0, Marlin, bf16 rows"
    formats = ("mxfp4",)
    bf16_rows = takes_biases = True

    def missing(self):
        return vllm_ops.missing("ops.so", "moe_ops.so", "seed/vllm/marlin_extract.py")

    def version(self):
        return "vLLM 0.33.0"

    def unsupported(self, shape, format, tokens):
        return super().unsupported(shape, format, tokens) or (None if shape in SWIGLU else "is run as for gpt-oss only")

    def load(self, shape, format, weights, tokens):
        return Loaded(shape, weights)


def padded(values, rows, columns):
    """[E, N, K] with zeros behind: [E, rows, columns]."""
    _, n, k = values.shape
    return torch.nn.functional.pad(values, (0, columns - k, 0, rows - n))


class Loaded:
    def __init__(self, shape, weights):
        vllm_ops.load()
        self.vllm = vllm_ops.load_seed("marlin_extract")
        self.shape, self.swiglu = SHAPES[shape], swiglu_of(shape)
        multiple = int(os.environ.get("MARLIN_HIDDEN", "256"))
        self.hidden = -(-self.shape.hidden // multiple) * multiple
        self.intermediate = -(-self.shape.intermediate // 128) * 128
        codes, scales, biases = [], [], []
        sizes = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        for each, (n, k) in zip(weights, sizes, strict=True):
            # Gate and up take turns, so that what is added to both is behind both.
            codes.append(padded(each.pair[0], n, k // 2))
            scales.append(padded(each.pair[1], n, k // 32))
            biases.append(torch.nn.functional.pad(each.bias, (0, n - each.bias.shape[1])))
        w13, w2, s13, s2, b13, b2 = self.vllm.prepare_moe_mxfp4_layer_for_marlin(
            self.vllm.RoutedExperts(), *codes, *scales, *biases
        )
        self.tensors = dict(w1=w13, w2=w2, bias1=b13, bias2=b2, w1_scale=s13, w2_scale=s2)

    def prepare(self, calls):
        layers = [Layer(self, call) for call in calls]
        facts = dict(hidden=self.hidden, intermediate=self.intermediate)
        return Prepared(layers, [layer.out for layer in layers], facts, gemms=None)


class Layer:
    """One call; vLLM's workspaces are there before it."""

    def __init__(self, loaded, call):
        self.loaded, self.call = loaded, call
        slots, hidden, intermediate = call.ids.numel(), loaded.hidden, loaded.intermediate
        self.x = torch.nn.functional.pad(call.x, (0, hidden - call.x.shape[1]))
        self.wide = torch.empty_like(self.x)
        self.out = self.wide[:, : call.x.shape[1]]
        empty = lambda n: torch.empty((n,), device=DEVICE, dtype=torch.bfloat16)
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.workspaces = dict(
            workspace=torch.zeros(multiprocessors * LOCKS_OF_MULTIPROCESSOR, device=DEVICE, dtype=torch.int32),
            intermediate_cache13=empty(slots * max(2 * intermediate, hidden)),
            intermediate_cache2=empty(slots * intermediate),
        )

    def __call__(self):
        vllm, call = self.loaded.vllm, self.call
        vllm.fused_marlin_moe(
            self.x,
            topk_weights=call.weights,
            topk_ids=call.ids,
            quant_type_id=vllm.scalar_types.float4_e2m1f.id,
            global_num_experts=self.loaded.shape.global_experts,
            activation=vllm.MoEActivation.SWIGLUOAI,
            activation_func=self.activate,
            moe_sum=lambda rows, out, *_: torch.ops._moe_C.moe_sum(rows, out, None, None),
            output=self.wide,
            **self.loaded.tensors,
            **self.workspaces,
        )

    def activate(self, _, out, rows, **__):
        torch.ops._C.swigluoai_and_mul(out, rows, self.loaded.swiglu.alpha, self.loaded.swiglu.limit)
