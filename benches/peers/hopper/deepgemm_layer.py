"""vLLM's path through DeepGEMM on some calls, whole and stage by stage; `peer` is the module vllm_peer."""

import torch

from shapes import SHAPES


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
        return [
            lambda c=c, out=out: self.peer.layer(
                c.x, c.ids, c.weights, *self.pairs, self.mid, self.rows, out, c.expert_map
            )
            for c, out in zip(self.calls, self.outs, strict=True)
        ]

    def stages(self):
        peer, calls, experts = self.peer, self.calls, self.pairs[0][0].shape[0]
        before = lambda c: peer.permute(*peer.quantize(c.x), c.ids, experts, c.expert_map)
        permuted = [before(c) for c in calls]
        for a, s, layout, _, _ in permuted[:1]:
            peer.gemm((a, s), self.pairs[0], self.mid, layout)
        activated = [peer.activate(self.mid, p[2], p[4]) for p in permuted]
        rows = torch.empty_like(self.rows).normal_()
        each = lambda make: [make(*item) for item in zip(calls, permuted, activated, self.outs, strict=True)]
        return dict(
            permute=each(lambda c, p, a, out: lambda: before(c)),
            gemm1=each(lambda c, p, a, out: lambda: peer.gemm(p[:2], self.pairs[0], self.mid, p[2])),
            activation=each(lambda c, p, a, out: lambda: peer.activate(self.mid, p[2], p[4])),
            gemm2=each(lambda c, p, a, out: lambda: peer.gemm(a, self.pairs[1], rows, p[2])),
            unpermute=each(
                lambda c, p, a, out: lambda: peer.unpermute(rows, c.ids, c.weights, p[3], c.expert_map, out)
            ),
        )


def compile_theirs(peer, shapes, tokens, which):
    """One launch of each size over no rows."""
    for shape in shapes:
        hidden, intermediate, experts, topk, _ = SHAPES[shape]
        n, k = (2 * intermediate, hidden) if which == 1 else (hidden, intermediate)
        empty = lambda *size, dtype=torch.float8_e4m3fn: torch.empty(size, device="cuda", dtype=dtype)
        weights = empty(experts, n, k), empty(experts, n // 128, k // 128, dtype=torch.float32)
        for count in tokens:
            m_sum = peer.m_sum(count, topk, experts)
            scales = empty(k // 128, m_sum, dtype=torch.float32).t()
            psum = torch.zeros(experts, device="cuda", dtype=torch.int32)
            peer.gemm((empty(m_sum, k), scales), weights, empty(m_sum, n, dtype=torch.bfloat16), psum)
            torch.cuda.synchronize()
