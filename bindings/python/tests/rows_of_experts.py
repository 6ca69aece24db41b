"""What tests of rows in their places share: weights, the rows, and the product in float64."""

import torch

BLOCK = 128


def blocks(size):
    return -(-size // BLOCK)


def weights_of(form, experts, n, k, seed=0):
    """Weights and their scales, if they have any."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(experts, n, k, generator=generator)
    if form == "bf16":
        return values.bfloat16(), None
    scales = torch.rand(experts, blocks(n), blocks(k), generator=generator) + 0.5
    return values.to(torch.float8_e4m3fn), scales


LAYER_TOLERANCE = {"bf16": 1e-4, "e4m3": 3e-3}
"""Of a row of a layer: bfloat16 between the GEMMs, or e4m3."""


def layer_weights_of(form, experts, hidden, intermediate):
    """w13 and w2, and their scales, if they have any: a layer's arguments."""
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for name, (n, k) in {"w13": (2 * intermediate, hidden), "w2": (hidden, intermediate)}.items():
        values = torch.randn(experts, n, k, generator=generator) / k**0.5
        if form == "bf16":
            parts[name] = values.bfloat16()
            continue
        parts[name] = (values * 40).clamp(-448, 448).to(torch.float8_e4m3fn)
        parts[f"{name}_scale"] = torch.rand(experts, blocks(n), blocks(k), generator=generator) * 0.02 + 0.015
    return parts


class Placed:
    """Rows of experts in their places, padding and its scales NaN; `rows_of[e]` says where expert e's are."""

    def __init__(self, form, counts, k, alignment, seed=1, more=0):
        generator = torch.Generator().manual_seed(seed)
        self.alignment, self.psum, self.rows_of, end = alignment, [], [], 0
        for count in counts:
            start = -(-end // alignment) * alignment
            end = start + count
            self.psum.append(end)
            self.rows_of.append(range(start, end))
        m_sum = -(-end // alignment) * alignment + more
        self.m_indices = torch.full((m_sum,), -1, dtype=torch.int32)
        for expert, rows in enumerate(self.rows_of):
            self.m_indices[rows.start : rows.stop] = expert
        self.psum = torch.tensor(self.psum, dtype=torch.int32)
        self.live = self.m_indices >= 0
        # A row is the same whatever the alignment: drawn in the order of the live ones.
        values = torch.randn(int(self.live.sum()), k, generator=generator)
        nan = torch.full((m_sum, k), float("nan"))
        nan[self.live] = values
        self.rows = nan.bfloat16() if form == "bf16" else nan.to(torch.float8_e4m3fn)
        self.scale = None
        if form == "e4m3":
            self.scale = torch.full((m_sum, blocks(k)), float("nan"))
            self.scale[self.live] = torch.rand(len(values), blocks(k), generator=generator) + 0.5

    def listed(self, form):
        """The list as an argument of Gemm."""
        if form == "psum":
            return {"psum": self.psum, "alignment": self.alignment}
        return {"m_indices": self.m_indices}

    def to(self, device):
        for name in ("rows", "scale", "psum", "m_indices", "live"):
            value = getattr(self, name)
            setattr(self, name, value if value is None else value.to(device))
        return self


def widened(values, scales, block_rows):
    """Values times their scales, in float64."""
    values = values.double()
    if scales is None:
        return values
    scales = scales.double().repeat_interleave(block_rows, -2).repeat_interleave(BLOCK, -1)
    return values * scales[..., : values.shape[-2], : values.shape[-1]]


def product(placed, weights, weight_scale):
    """``[M_sum, N]`` in float64, zero on padding."""
    rows = widened(placed.rows, placed.scale, 1)
    matrices = widened(weights, weight_scale, BLOCK)
    out = torch.zeros(len(rows), weights.shape[1], dtype=torch.float64)
    for row in placed.live.nonzero().flatten().tolist():
        out[row] = matrices[placed.m_indices[row]] @ rows[row]
    return out


def furthest(mine, expected):
    """The contract's measure ``1 - 2 xy / (x^2 + y^2)`` of the row that is furthest off, without its cancellation."""
    mine, expected = mine.cpu().double(), expected.cpu().double()
    of_rows = (mine - expected).square().sum(1) / (mine.square() + expected.square()).sum(1).clamp_min(1e-300)
    return float(of_rows.max()) if len(of_rows) else 0.0


def poisoned(m_sum, n, device="cpu"):
    return torch.full((m_sum, n), 123.0, dtype=torch.bfloat16, device=device)
