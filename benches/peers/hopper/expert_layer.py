"""An expert layer's inputs on the GPU, and what its results are held against: weights with their originals, routings, checks."""

import torch

from compare import L2_BYTES, SHAPES, local_ids, routing

# The contract's distances, whole and by row: of a GEMM to the product of what was quantized, rows and weights; of a layer to
# that of unquantized rows and of the weights as they are, which are its input. Between two GEMMs of the same quantized operands only
# the order of f32 additions and the rounding to bf16 differ.
UNQUANTIZED_GEMM = (1e-3, 2e-3)
UNQUANTIZED_LAYER = (2e-3, 4e-3)
SAME_OPERANDS = (1e-7, 1e-6)


class Weights:
    """e4m3 [E, N, K] with f32 scales of 128 x 128; an expert's original is drawn again from its seed when it is asked for."""

    def __init__(self, experts, n, k, seed):
        self.shape, self._seed = (experts, n, k), seed
        self.values = torch.empty((experts, n, k), device="cuda", dtype=torch.float8_e4m3fn)
        self.scales = torch.empty((experts, n // 128, k // 128), device="cuda", dtype=torch.float32)
        for expert in range(experts):
            blocks = self.original(expert).view(n // 128, 128, k // 128, 128)
            scale = blocks.abs().amax((1, 3)).clamp(min=1e-10) / 448
            self.scales[expert] = scale
            self.values[expert] = (blocks / scale[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)

    def original(self, expert):
        _, n, k = self.shape
        generator = torch.Generator(device="cuda").manual_seed(self._seed * 1000 + expert)
        return torch.randn((n, k), device="cuda", generator=generator) * k**-0.5

    def exact(self, expert):
        """What the values and scales of an expert say, in f64."""
        _, n, k = self.shape
        blocks = self.values[expert].float().double().view(n // 128, 128, k // 128, 128)
        return (blocks * self.scales[expert].double()[:, None, :, None]).view(n, k)

    @property
    def pair(self):
        return self.values, self.scales


def layer_weights(shape):
    """w13 [E, 2 I, H] and w2 [E, H, I]."""
    hidden, intermediate, experts, _, _ = SHAPES[shape]
    return Weights(experts, 2 * intermediate, hidden, 1), Weights(experts, hidden, intermediate, 2)


class Call:
    """One call's tokens and routing: uniform, distinct experts per token, at least one of them local."""

    def __init__(self, shape, tokens, seed):
        hidden, _, experts, topk, global_experts = SHAPES[shape]
        self.shape, self.tokens = shape, tokens
        while True:
            self.ids, self.expert_map, self.weights = routing(tokens, topk, experts, global_experts, seed)
            self.local = local_ids(self.ids, self.expert_map)
            self.counts = torch.bincount(self.local[self.local >= 0].long(), minlength=experts)
            if self.counts.any():
                break
            seed += 1000
        self.weights /= self.weights.sum(1, keepdim=True)
        self.live, self.active = int(self.counts.sum()), int((self.counts > 0).sum())
        generator = torch.Generator(device="cuda").manual_seed(seed + 1)
        self.x = torch.randn((tokens, hidden), device="cuda", dtype=torch.bfloat16, generator=generator)

    def live_slots(self):
        return torch.nonzero(self.local.flatten() >= 0).flatten()

    def sample(self, experts=8, rows=8):
        """-> (expert, its slots): the first and last active experts and some between, the first and last slots of each."""
        active = torch.nonzero(self.counts).flatten()
        for expert in _spread(active, experts).tolist():
            yield expert, _spread(torch.nonzero(self.local.flatten() == expert).flatten(), rows)

    def reference(self, weights, most=3):
        """Some tokens that have local experts, and what they should become, in f64."""
        tokens = _spread(torch.nonzero((self.local >= 0).any(1)).flatten(), most)
        local, out = self.local[tokens], torch.zeros((len(tokens), self.x.shape[1]), device="cuda", dtype=torch.float64)
        for expert in local[local >= 0].unique().tolist():
            token, slot = torch.nonzero(local == expert).unbind(1)
            w13, w2 = (w.exact(expert) for w in weights)
            gate, up = (self.x[tokens[token]].double() @ w13.t()).chunk(2, dim=1)
            y = (torch.nn.functional.silu(gate) * up) @ w2.t()
            out.index_add_(0, token, y * self.weights[tokens[token], slot].double()[:, None])
        return tokens, out


def calls_for(shape, tokens, weights_shape):
    """Calls enough that the weights they read are several times the L2, where [E, N, K] is those of one GEMM: 1 to 8."""
    calls, read = [], 0
    while not calls or read < 4 * L2_BYTES and len(calls) < 8:
        calls.append(Call(shape, tokens, seed=tokens + len(shape) + 100 * len(calls)))
        read += calls[-1].active * weights_shape[1] * weights_shape[2]
    return calls


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def _spread(values, most):
    if values.numel() <= most:
        return values
    return values[torch.linspace(0, values.numel() - 1, most, device=values.device).round().long()]


def distance(x, y, chunk=1 << 25):
    """1 - 2 sum(xy) / sum(x^2 + y^2) in f64: of all, and of the worst row."""
    products, squares, worst = 0.0, 0.0, 0.0
    for a, b in zip(x.split(max(chunk // x.shape[1], 1)), y.split(max(chunk // x.shape[1], 1))):
        a, b = a.double(), b.double()
        product, square = (a * b).sum(1), (a * a + b * b).sum(1)
        by_row = 1 - 2 * product / square.clamp(min=1e-300)
        # NaN is not less than anything: it has to come through.
        worst = max(worst, float("inf") if by_row.isnan().any() else by_row.max().item())
        products, squares = products + product.sum().item(), squares + square.sum().item()
    return 1 - 2 * products / squares, worst


def require_near(what, x, y, limits):
    found = distance(x, y)
    if not (found[0] <= limits[0] and found[1] <= limits[1]):
        raise AssertionError(f"{what}: distance {found[0]:.2e} whole, {found[1]:.2e} in the worst row, expected {limits}")
    return found
