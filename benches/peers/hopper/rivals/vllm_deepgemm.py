"""vLLM's path through DeepGEMM, which its users have to ask for."""

import vllm_ops
from rivals.base import Prepared, Rival


class VllmDeepGemm(Rival):
    key, label = "deepgemm", "vLLM 0.33.0, DeepGEMM path"

    def missing(self):
        return vllm_ops.missing("seed", "deep_gemm")

    def version(self):
        return "vLLM 0.33.0"

    def load(self, shape, format, weights, tokens):
        return Loaded(weights)

    def compile_parts(self):
        return ("gemm1", "gemm2")

    def compile(self, shape, format, weights, tokens, part):
        import vllm_peer
        from deepgemm_layer import compile_theirs

        compile_theirs(vllm_peer, [shape], tokens, 1 + self.compile_parts().index(part))


class Loaded:
    def __init__(self, weights):
        self.weights = weights

    def prepare(self, calls):
        # vLLM's pieces are loaded where they are used, so that the rest works without them.
        import vllm_peer
        from deepgemm_layer import Theirs

        theirs = Theirs(vllm_peer, calls, self.weights)

        def gemms():
            stages = theirs.stages()
            return stages["gemm1"], stages["gemm2"]

        return Prepared(theirs.layers(), theirs.outs, dict(quantizer=vllm_peer.quantizer), gemms=gemms)
