"""What takes a rival's place in a dry run: the layer in torch, a token at a time, on any device."""

import torch

from device import DEVICE
from expert_layer import activated, product
from rivals.base import Prepared, Rival


class StandIn(Rival):
    formats = ("e4m3", "bf16", "mxfp4")

    def __init__(self, rival):
        self.key, self.label, self.batch_invariant = rival.key, rival.label, rival.batch_invariant
        self.bf16_rows = rival.bf16_rows
        self.unsupported = rival.unsupported

    def version(self):
        return "dry run"

    def load(self, shape, format, weights, tokens):
        return Loaded(shape, weights)


class Loaded:
    def __init__(self, shape, weights):
        # Small in a dry run.
        self.shape, self.weights = shape, [Decoded(w) for w in weights]

    def prepare(self, calls):
        layers = [Layer(self.shape, call, *self.weights) for call in calls]
        gemms = lambda: (layers, layers)
        return Prepared(layers, [layer.out for layer in layers], dict(stand_in=True), gemms=gemms)


class Decoded:
    def __init__(self, weights):
        self.bias = weights.bias
        self.experts = [weights.exact(expert, torch.float32) for expert in range(weights.shape[0])]

    def exact(self, expert, dtype):
        return self.experts[expert].to(dtype)


class Layer:
    def __init__(self, shape, call, w13, w2):
        self.shape, self.call, self.w13, self.w2 = shape, call, w13, w2
        self.out = torch.empty(call.x.shape, device=DEVICE, dtype=torch.bfloat16)

    def __call__(self):
        call = self.call
        local, weights = call.local.tolist(), call.weights.tolist()
        for token, x in enumerate(call.x.float()):
            out = torch.zeros(call.x.shape[1], device=DEVICE)
            for expert, weight in zip(local[token], weights[token], strict=True):
                if expert >= 0:
                    mid = activated(self.shape, product(self.w13, expert, x))
                    out += weight * product(self.w2, expert, mid)
            self.out[token] = out
