"""int4 weights as compressed-tensors packs them, on the CPU: against the bfloat16 that they stand for."""

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402

E, HIDDEN, INTERMEDIATE = 5, 128, 96


def packed(rows, columns, scale_dtype, seed):
    """Words of eight values, the first in the lowest bits, scales, and what both stand for, which bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (E, rows, columns), generator=generator)
    words = ((values + 8).unflatten(-1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    scales = torch.exp2(torch.randint(-7, -4, (E, rows, columns // 32), generator=generator).float())
    meant = values * scales.repeat_interleave(32, -1)
    return words, scales.to(scale_dtype), meant.bfloat16()


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_weights_that_are_meant(scale_dtype):
    words, scales, meant = packed(72, HIDDEN, scale_dtype, 1)
    # Small integers: every sum is exact, so that the results have the same bits.
    rows = torch.randint(-4, 5, (40, HIDDEN), generator=torch.Generator().manual_seed(2)).bfloat16()
    experts = torch.arange(40, dtype=torch.int32) % E
    gemm = et.Gemm(words, scales)
    assert gemm.shape == (E, 72, HIDDEN)
    assert torch.equal(gemm(rows, m_indices=experts), et.Gemm(meant)(rows, m_indices=experts))
    assert torch.equal(gemm.unpack(), words)


@pytest.mark.parametrize("gate_up", ["halves", "interleaved"])
def test_a_layer_is_that_of_the_weights_that_are_meant(gate_up):
    (w13, s13, meant13), (w2, s2, meant2) = (
        packed(2 * INTERMEDIATE, HIDDEN, torch.bfloat16, 3),
        packed(HIDDEN, INTERMEDIATE, torch.bfloat16, 4),
    )
    layer = et.Layer(w13, w2, w13_scale=s13, w2_scale=s2, gate_up=gate_up)
    meant = et.Layer(meant13, meant2, gate_up=gate_up)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(33, HIDDEN, generator=generator).bfloat16()
    weights, ids = torch.rand(33, E, generator=generator).topk(2)
    found, expected = layer(x, ids, weights).double(), meant(x, ids, weights).double()
    assert float((found - expected).norm() / expected.norm()) < 4e-3
    unpacked = layer.unpack(gate_up=gate_up)
    assert torch.equal(unpacked[0], w13) and torch.equal(unpacked[1], w2)
    assert layer.weight_bytes < meant.weight_bytes * 0.3


def test_a_wrong_scale_is_seen():
    """That the comparisons above can fail."""
    words, scales, meant = packed(72, HIDDEN, torch.bfloat16, 1)
    scales[2, 3, 1] *= 2
    rows = torch.ones(E, HIDDEN).bfloat16()
    experts = torch.arange(E, dtype=torch.int32)
    differ = et.Gemm(words, scales)(rows, m_indices=experts) != et.Gemm(meant)(rows, m_indices=experts)
    assert differ.nonzero().tolist() == [[2, 3]]


def test_what_does_not_fit_is_named():
    words, scales, _ = packed(72, HIDDEN, torch.bfloat16, 1)
    for error, arguments, message in [
        (ValueError, (words, None), "weight_scale is None"),
        (TypeError, (words, scales.float()), r"weight_scale has dtype torch.float32, expected uint8 or float8_e8m0fnu"),
        (ValueError, (words, scales[:, :, :2].contiguous()), "weight_scale has shape"),
        (ValueError, (words[:, :, :3].contiguous(), scales), "k is 24, expected a positive multiple of 32"),
    ]:
        with pytest.raises(error, match=message):
            et.Gemm(*arguments)
    bad = scales.clone()
    bad[4, 71, 3] = float("nan")
    message = "scales is 32704, expected the bits of a finite bf16: that of row 71, group 3"
    with pytest.raises(ValueError, match=message):
        et.Gemm(words, bad)


def state_of(kind, parts):
    """The state of experts ``e.{number}.gate_proj`` and so on, with such names of values and scales."""
    values, scale = kind
    state = {}
    for names, (weights, scales) in zip((("gate_proj", "up_proj"), ("down_proj",)), parts, strict=True):
        for expert in range(E):
            pairs = zip(names, weights[expert].chunk(len(names)), scales[expert].chunk(len(names)), strict=True)
            for name, own, own_scales in pairs:
                state[f"e.{expert}.{name}.{values}"] = own
                state[f"e.{expert}.{name}.{scale}"] = own_scales
    return state


def test_layers_are_made_of_states_by_every_name():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, HIDDEN, generator=generator).bfloat16()
    weights, ids = torch.rand(9, E, generator=generator).topk(2)
    (w13, s13, _), (w2, s2, _) = (
        packed(2 * INTERMEDIATE, HIDDEN, torch.bfloat16, 3),
        packed(HIDDEN, INTERMEDIATE, torch.bfloat16, 4),
    )
    state = state_of(("weight_packed", "weight_scale"), ((w13, s13), (w2, s2)))
    expected = et.Layer(w13, w2, w13_scale=s13, w2_scale=s2)(x, ids, weights)
    assert torch.equal(et.Layer.from_state_dict(state, "e.")(x, ids, weights), expected)
    # The same words are bytes of MXFP4 to DeepSeek-V4, whose scales are exponents.
    w13, w2 = w13.view(torch.int8), w2.view(torch.int8)
    s13, s2 = (scales.to(torch.float8_e8m0fnu).view(torch.uint8) for scales in (s13, s2))
    expected = et.Layer(w13.view(torch.uint8), w2.view(torch.uint8), w13_scale=s13, w2_scale=s2)(x, ids, weights)
    state = state_of(("weight", "scale"), ((w13, s13), (w2, s2)))
    assert torch.equal(et.Layer.from_state_dict(state, "e.")(x, ids, weights), expected)


@pytest.mark.parametrize("other", ["bias", "weight_zero_point", "weight_g_idx"])
def test_what_would_change_the_result_is_refused(other):
    (w13, s13, _), (w2, s2, _) = (
        packed(2 * INTERMEDIATE, HIDDEN, torch.bfloat16, 3),
        packed(HIDDEN, INTERMEDIATE, torch.bfloat16, 4),
    )
    state = state_of(("weight_packed", "weight_scale"), ((w13, s13), (w2, s2)))
    state[f"e.3.up_proj.{other}"] = torch.zeros(INTERMEDIATE)
    with pytest.raises(ValueError, match=rf"e\.3\.up_proj\.{other} is there, expected none"):
        et.Layer.from_state_dict(state, "e.")
