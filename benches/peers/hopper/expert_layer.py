"""An expert layer's inputs, and what its results are held against: weights with their originals, calls, checks."""

import copy

import torch

from device import DEVICE
from routing import local_ids, routing
from shapes import SHAPES, swiglu_of
from timing import L2_BYTES

# The contract's distances, whole and by row: of a GEMM to the product of what was quantized, rows and weights; of a
# layer to that of unquantized rows and of the weights as they are, which are its input. Between two GEMMs of the same
# quantized operands only the order of f32 additions and the rounding to bf16 differ. A layer of bf16 weights rounds its
# rows and results to bf16 only.
UNQUANTIZED_GEMM = (1e-3, 2e-3)
UNQUANTIZED_LAYER = (2e-3, 4e-3)
BF16_LAYER = (1e-4, 3e-4)
SAME_OPERANDS = (1e-7, 1e-6)


def activated(shape, rows):
    """What the layer's activation makes of rows [.., 2 I] of its first product."""
    swiglu = swiglu_of(shape)
    gate, up = (rows[..., ::2], rows[..., 1::2]) if swiglu.interleaved else rows.chunk(2, dim=-1)
    if swiglu.limit:
        gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
    return (up + swiglu.beta) * gate * torch.sigmoid(swiglu.alpha * gate)


def product(weights, expert, rows):
    """Rows times an expert's weights as they are, with its bias, in the rows' type."""
    out = rows @ weights.exact(expert, rows.dtype).t()
    return out if weights.bias is None else out + weights.bias[expert].to(rows.dtype)


class Weights:
    """e4m3 [E, N, K] with f32 scales of 128 x 128; an expert's original is drawn again when it is asked for."""

    bias = None

    def __init__(self, experts, n, k, seed):
        self.shape, self._seed = (experts, n, k), seed
        self.values = torch.empty((experts, n, k), device=DEVICE, dtype=torch.float8_e4m3fn)
        self.scales = torch.empty((experts, n // 128, k // 128), device=DEVICE, dtype=torch.float32)
        for expert in range(experts):
            blocks = self.original(expert).view(n // 128, 128, k // 128, 128)
            scale = blocks.abs().amax((1, 3)).clamp(min=1e-10) / 448
            self.scales[expert] = scale
            self.values[expert] = (blocks / scale[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn)

    def original(self, expert):
        return original(self.shape, self._seed, expert)

    def exact(self, expert, dtype=torch.float64):
        """What the values and scales of an expert say."""
        _, n, k = self.shape
        blocks = self.values[expert].float().to(dtype).view(n // 128, 128, k // 128, 128)
        return (blocks * self.scales[expert].to(dtype)[:, None, :, None]).view(n, k)

    @property
    def pair(self):
        return self.values, self.scales


class Bf16Weights:
    """bf16 [E, N, K], drawn as those are."""

    bias = None

    def __init__(self, experts, n, k, seed):
        self.shape, self._seed = (experts, n, k), seed
        self.values = torch.empty((experts, n, k), device=DEVICE, dtype=torch.bfloat16)
        for expert in range(experts):
            self.values[expert] = self.original(expert)

    def original(self, expert):
        return original(self.shape, self._seed, expert)

    def exact(self, expert, dtype=torch.float64):
        return self.values[expert].to(dtype)

    @property
    def pair(self):
        return self.values, None


# What the eight magnitudes of e2m1 are, and half way from each to the next: a tie goes to the even code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_mxfp4(values):
    """[N, K] f32 -> codes [N, K / 2], two to a byte, the first in the low half, and scales [N, K / 32].

    By the OCP rule: a group's scale is two powers of two below its largest magnitude's.
    """
    n, k = values.shape
    groups = values.view(n, k // 32, 32)
    exponents = groups.abs().amax(2).clamp(min=2.0**-120).log2().floor() - 2
    scaled = (groups / exponents.exp2()[..., None]).clamp(-6, 6)
    magnitudes = scaled.abs().contiguous()
    known = torch.tensor(E2M1, device=values.device)
    halves = (known[1:] + known[:-1]) / 2
    # A value half way between two codes is counted among the smaller ones by the one, among the larger by the other.
    below, above = torch.bucketize(magnitudes, halves), torch.bucketize(magnitudes, halves, right=True)
    codes = torch.where(below % 2 == 0, below, above) | (scaled < 0).long() << 3
    codes = codes.view(n, k // 2, 2).to(torch.uint8)
    return codes[..., 0] | codes[..., 1] << 4, (exponents + 127).to(torch.uint8)


def of_mxfp4(codes, scales):
    """What codes and scales say: [N, K] f32."""
    known = torch.tensor((*E2M1, *(-value for value in E2M1)), device=codes.device)
    n, half = codes.shape
    pairs = torch.stack([codes & 15, codes >> 4], dim=2).long()
    return (known[pairs].view(n, -1, 32) * (scales.float() - 127).exp2()[..., None]).view(n, 2 * half)


class Mxfp4Weights:
    """MXFP4: codes [E, N, K / 2] and scales [E, N, K / 32], drawn as the others are; `bias` is f32 [E, N] or None."""

    bias = None

    def __init__(self, experts, n, k, seed):
        self.shape = (experts, n, k)
        self.codes = torch.empty((experts, n, k // 2), device=DEVICE, dtype=torch.uint8)
        self.scales = torch.empty((experts, n, k // 32), device=DEVICE, dtype=torch.uint8)
        for expert in range(experts):
            self.codes[expert], self.scales[expert] = to_mxfp4(original(self.shape, seed, expert))

    def original(self, expert):
        """These weights are what they are quantized from: whoever quantizes them once more has the same."""
        return self.exact(expert, torch.float32)

    def exact(self, expert, dtype=torch.float64):
        return of_mxfp4(self.codes[expert], self.scales[expert]).to(dtype)

    @property
    def pair(self):
        return self.codes, self.scales


def original(shape, seed, expert):
    """An expert's weights in f32: the same whenever they are asked for."""
    _, n, k = shape
    generator = torch.Generator(device=DEVICE).manual_seed(seed * 1000 + expert)
    return torch.randn((n, k), device=DEVICE, generator=generator) * k**-0.5


def layer_weights(shape, format="e4m3"):
    """w13 [E, 2 I, H] and w2 [E, H, I]."""
    hidden, intermediate, experts, _, _ = SHAPES[shape]
    kind = {"e4m3": Weights, "bf16": Bf16Weights, "mxfp4": Mxfp4Weights}[format]
    weights = kind(experts, 2 * intermediate, hidden, 1), kind(experts, hidden, intermediate, 2)
    if swiglu_of(shape).biased:
        for seed, each in enumerate(weights):
            each.bias = biases(*each.shape[:2], seed)
    return weights


# Of biases: so large that some of what the first product gives is clamped.
BIAS = 2.0


def biases(experts, n, seed):
    """[E, N] f32 of values that bf16 has, as checkpoints have them: whoever rounds them so has the same."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    drawn = torch.randn((experts, n), device=DEVICE, generator=generator) * BIAS
    return drawn.to(torch.bfloat16).float()


class Call:
    """One call's tokens and routing: distinct experts per token, at least one of them local."""

    def __init__(self, shape, tokens, seed, kind="uniform"):
        hidden, _, experts, topk, global_experts = SHAPES[shape]
        self.shape, self.tokens = shape, tokens
        while True:
            self.ids, self.expert_map, self.weights = routing(tokens, topk, experts, global_experts, seed, kind)
            self._count()
            if self.live:
                break
            seed += 1000
        self.weights /= self.weights.sum(1, keepdim=True)
        # Far from the seeds of weights: a row of theirs as a token makes sums that nothing else makes.
        generator = torch.Generator(device=DEVICE).manual_seed(seed + (1 << 40))
        self.x = torch.randn((tokens, hidden), device=DEVICE, dtype=torch.bfloat16, generator=generator)

    def _count(self):
        self.local = local_ids(self.ids, self.expert_map)
        self.counts = torch.bincount(self.local[self.local >= 0].long(), minlength=SHAPES[self.shape].experts)
        self.live, self.active = int(self.counts.sum()), int((self.counts > 0).sum())

    def of_tokens(self, tokens):
        """A call with some of these tokens, in the order given, each with its row, experts and weights."""
        part = copy.copy(self)
        part.tokens = len(tokens)
        part.x, part.ids, part.weights = (t[tokens].contiguous() for t in (self.x, self.ids, self.weights))
        part._count()
        return part

    def live_slots(self):
        return torch.nonzero(self.local.flatten() >= 0).flatten()

    def sample(self, experts=8, rows=8):
        """-> (expert, its slots): the first and last active experts and some between, of each the same of its slots."""
        active = torch.nonzero(self.counts).flatten()
        for expert in _spread(active, experts).tolist():
            yield expert, _spread(torch.nonzero(self.local.flatten() == expert).flatten(), rows)

    def reference_rows(self, weights):
        """What every token should become, in f32: zero without a local expert."""
        rows, out = self.x.float(), torch.zeros(self.x.shape, device=DEVICE)
        slots = torch.sort(self.local.flatten(), stable=True).indices[self.local.numel() - self.live :]
        topk = self.ids.shape[1]
        for expert, part in enumerate(slots.split(self.counts.tolist())):
            if len(part):
                mid = activated(self.shape, product(weights[0], expert, rows[part // topk]))
                y = product(weights[1], expert, mid)
                out.index_add_(0, part // topk, y * self.weights.flatten()[part][:, None])
        return out

    def reference(self, weights, most=3):
        """Some tokens that have local experts, and what they should become, in f64."""
        tokens = _spread(torch.nonzero((self.local >= 0).any(1)).flatten(), most)
        local, out = self.local[tokens], torch.zeros((len(tokens), self.x.shape[1]), device=DEVICE, dtype=torch.float64)
        for expert in local[local >= 0].unique().tolist():
            token, slot = torch.nonzero(local == expert).unbind(1)
            mid = activated(self.shape, product(weights[0], expert, self.x[tokens[token]].double()))
            y = product(weights[1], expert, mid)
            out.index_add_(0, token, y * self.weights[tokens[token], slot].double()[:, None])
        return tokens, out


def calls_for(shape, tokens, weights_shape, kind="uniform"):
    """1 to 8 calls: so many that the weights they read are several times the L2, [E, N, K] being those of a GEMM."""
    calls, read = [], 0
    while not calls or (read < 4 * L2_BYTES and len(calls) < 8):
        calls.append(Call(shape, tokens, seed=tokens + len(shape) + 100 * len(calls), kind=kind))
        read += calls[-1].active * weights_shape[1] * weights_shape[2]
    return calls


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def _spread(values, most):
    if values.numel() <= most:
        return values
    return values[torch.linspace(0, values.numel() - 1, most, device=values.device).round().long()]


def distance(x, y, least_share=0.0, chunk=1 << 25):
    """1 - 2 sum(xy) / sum(x^2 + y^2) in f64: of all, and of the worst row.

    least_share: a row with a smaller share of the mean's squares counts as if it had that. Where a token's experts
    cancel each other, what is left is of the size of their roundings, whoever computes them.
    """
    rows = max(chunk // x.shape[1], 1)
    differences, squares = [], []
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        a, b = a.double(), b.double()
        # 1 - 2 xy / (x^2 + y^2) = (x - y)^2 / (x^2 + y^2).
        differences.append((a - b).square().sum(1))
        squares.append((a * a + b * b).sum(1))
    difference, square = torch.cat(differences), torch.cat(squares)
    by_row = difference / square.clamp(min=max(least_share * square.mean().item(), 1e-300))
    # NaN is not less than anything: it has to come through.
    worst = float("inf") if by_row.isnan().any() else by_row.max().item()
    return (difference.sum() / square.sum()).item(), worst


def require_near(what, x, y, limits, least_share=0.0):
    found = distance(x, y, least_share)
    if not (found[0] <= limits[0] and found[1] <= limits[1]):
        raise AssertionError(
            f"{what}: distance {found[0]:.2e} whole, {found[1]:.2e} in the worst row, expected {limits}"
        )
    return found
