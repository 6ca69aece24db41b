"""What takes a rival's place in a dry run: the layer in torch, a token at a time, on any device."""

import torch

from device import DEVICE
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
        return Loaded(weights)


class Loaded:
    def __init__(self, weights):
        # Small in a dry run.
        self.weights = [torch.stack([w.exact(e, torch.float32) for e in range(w.shape[0])]) for w in weights]

    def prepare(self, calls):
        layers = [Layer(call, *self.weights) for call in calls]
        gemms = lambda: (layers, layers)
        return Prepared(layers, [layer.out for layer in layers], dict(stand_in=True), gemms=gemms)


class Layer:
    def __init__(self, call, w13, w2):
        self.call, self.w13, self.w2 = call, w13, w2
        self.out = torch.empty(call.x.shape, device=DEVICE, dtype=torch.bfloat16)

    def __call__(self):
        call = self.call
        local, weights = call.local.tolist(), call.weights.tolist()
        for token, x in enumerate(call.x.float()):
            out = torch.zeros(call.x.shape[1], device=DEVICE)
            for expert, weight in zip(local[token], weights[token], strict=True):
                if expert >= 0:
                    gate, up = (self.w13[expert] @ x).chunk(2)
                    out += weight * (self.w2[expert] @ (torch.nn.functional.silu(gate) * up))
            self.out[token] = out
