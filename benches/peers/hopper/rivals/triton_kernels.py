"""vLLM's path through triton_kernels, its default for gpt-oss on one Hopper: rows bf16, MXFP4 weights.

Each call makes the routing data by triton_kernels' own kernels, of ids that are given: no rival's search for the
largest logits is timed. Both products and the sum over experts are then vLLM's function for it. The activation is
inside the first product, which gathers its rows; weights of the routing are applied inside the second.
"""

import types

import torch

import vllm_ops
from device import DEVICE
from rivals.base import Prepared, Rival
from shapes import SHAPES, SWIGLU, swiglu_of


class TritonKernels(Rival):
    key, label = "triton_kernels", "vLLM 0.33.0, triton_kernels, bf16 rows"
    formats = ("mxfp4",)
    bf16_rows = takes_biases = True

    def missing(self):
        return vllm_ops.missing("triton_kernels", "seed/vllm/triton_kernels_extract.py")

    def version(self):
        import triton

        return f"vLLM 0.33.0, Triton {triton.__version__}"

    def unsupported(self, shape, format, tokens):
        return super().unsupported(shape, format, tokens) or (None if shape in SWIGLU else "is run as for gpt-oss only")

    def load(self, shape, format, weights, tokens):
        return Loaded(shape, weights)

    def compile_parts(self):
        return ("layer",)


class Loaded:
    def __init__(self, shape, weights):
        self.shape, self.swiglu = SHAPES[shape], swiglu_of(shape)
        self.vllm = vllm_ops.load_seed("triton_kernels_extract")
        self.routing = vllm_ops.load_module("triton_kernels.routing").routing
        module = vllm_ops.load_module("triton_kernels.matmul_ogs")
        self.weights, precisions = [], []
        for each in weights:
            codes, flex, scales = self.vllm._swizzle_mxfp4(*each.pair)
            self.weights.append(codes)
            precisions.append(module.PrecisionConfig(weight_scale=scales, flex_ctx=module.FlexCtx(rhs_data=flex)))
        w13, w2 = weights
        self.config = types.SimpleNamespace(
            w1_bias=w13.bias, w2_bias=w2.bias, w1_precision=precisions[0], w2_precision=precisions[1]
        )

    def prepare(self, calls):
        layers = [Layer(self, call) for call in calls]
        return Prepared(layers, [layer.out for layer in layers], gemms=None)


class Layer:
    """One call; vLLM's workspace is there before it."""

    def __init__(self, loaded, call):
        _, intermediate, experts, topk, _ = loaded.shape
        self.loaded, self.call = loaded, call
        # What the softmax of the chosen ones makes the weights of, as they add up to 1.
        self.logits = torch.zeros((call.tokens, experts), device=DEVICE)
        self.logits.scatter_(1, call.ids.long(), call.weights.log())
        self.mid = torch.empty((call.tokens * topk, intermediate), device=DEVICE, dtype=torch.bfloat16)
        self.out = torch.empty_like(call.x)

    def __call__(self):
        loaded, call, topk = self.loaded, self.call, self.loaded.shape.topk
        routing_data, gather, scatter = loaded.routing(self.logits, topk, sm_first=False, expt_indx=call.ids)
        loaded.vllm.triton_kernel_fused_experts(
            self.out,
            call.x,
            *loaded.weights,
            routing_data,
            gather,
            scatter,
            topk=topk,
            quant_config=loaded.config,
            swiglu_alpha=loaded.swiglu.alpha,
            swiglu_limit=loaded.swiglu.limit,
            intermediate_cache=self.mid,
        )
