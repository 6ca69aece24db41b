"""The operators: values against the definitions, and that torch's own checks accept them."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle

torch = pytest.importorskip("torch")

import expertile  # noqa: E402
import expertile.torch as et  # noqa: E402
from expertile import _layout  # noqa: E402
from expertile.torch.layout import symbolic_tight_m_sum  # noqa: E402


def routing(seed, tokens, topk, experts):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).topk(topk).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    return ids, torch.rand(tokens, topk, generator=generator), generator


@given(
    st.integers(0, 50),
    st.integers(1, 4),
    st.sampled_from([4, 9]),
    st.sampled_from([1, 4, 128]),
    st.sampled_from([128, 384, 2880, 160]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from(["row_major", "mn_major", "packed_ue8m0"]),
    st.sampled_from([32, 128]),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_quantize_permute_is_the_definition_byte_for_byte(
    tokens, topk, experts, alignment, hidden, dtype, scale_layout, group, zero_padding
):
    ids, _, generator = routing(tokens, tokens, topk, experts)
    x = (torch.randn(hidden, tokens, generator=generator) * 3).to(dtype).t()
    options = {"alignment": alignment, "group": group, "scale_layout": scale_layout, "zero_padding": zero_padding}
    # Groups of 128, of which the last may be half of one.
    if hidden % {32: 32, 128: 64}[group]:
        with pytest.raises(ValueError, match=f"hidden is {hidden}"):
            et.quantize_permute(x, ids, experts, **options)
        return
    m_sum = expertile.tight_m_sum(tokens, topk, experts, alignment)
    out = torch.full((m_sum, hidden), 0x55, dtype=torch.uint8)
    rows, scales, layout = et.quantize_permute(x, ids, experts, out=out.view(torch.float8_e4m3fn), **options)
    counts, starts, ends, m_indices, inv_perm = oracle.layout(ids.numpy(), experts, alignment, m_sum)
    for mine, expected in zip(layout.lists(), (counts, starts, ends, m_indices, inv_perm), strict=True):
        np.testing.assert_array_equal(mine.numpy(), expected)
    assert layout.alignment == alignment
    packed = scale_layout == "packed_ue8m0"
    quantized, expected_scales = oracle.quantize(x.float().numpy(), group, power_of_two=packed)
    np.testing.assert_array_equal(
        rows.view(torch.uint8).numpy(), oracle.permute(quantized, inv_perm, m_sum, 0 if zero_padding else 0x55)
    )
    if packed:
        expected_scales = oracle.pack_ue8m0((expected_scales.view(np.uint32) >> 23).astype(np.uint8))
    np.testing.assert_array_equal(scales.numpy(), oracle.permute(expected_scales, inv_perm, m_sum, 0))
    if m_sum > 1 and scales.shape[1] > 1:
        expected_strides = (scales.shape[1], 1) if scale_layout == "row_major" else (1, (m_sum + 3) // 4 * 4)
        assert scales.stride() == expected_strides


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_rows_of_any_dtype_are_moved_and_summed_back(dtype):
    ids, weights, generator = routing(3, 37, 3, 8)
    x = torch.randint(0, 100, (37, 96), generator=generator).to(dtype)
    rows, scales, layout = et.permute_rows(x, ids, 8, alignment=8, zero_padding=True)
    assert scales is None
    live = layout.m_indices >= 0
    assert not rows.view(torch.uint8)[~live].any()
    back = et.unpermute(rows.float(), layout.inv_perm, weights)
    kept = torch.where(ids >= 0, weights, 0.0)
    torch.testing.assert_close(back, x.float() * kept.sum(1, keepdim=True))


def test_router_weights_may_multiply_the_input():
    ids, weights, generator = routing(4, 20, 1, 4)
    x = torch.randn(20, 128, generator=generator).to(torch.bfloat16)
    weighted = et.quantize_permute(x, ids, 4, topk_weights=weights)
    before = et.quantize_permute((x.float() * weights).to(torch.bfloat16), ids, 4)
    for mine, expected in zip(weighted[:2], before[:2], strict=True):
        live = weighted.layout.m_indices >= 0
        assert torch.equal(mine[live].view(torch.uint8), expected[live].view(torch.uint8))
    with pytest.raises(ValueError, match="topk is 2"):
        et.quantize_permute(x[:10], ids.view(10, 2), 4, topk_weights=weights.view(10, 2))


def test_callers_buffers_are_written_and_nothing_else_is_allocated():
    ids, weights, generator = routing(5, 24, 2, 6)
    x = torch.randn(24, 256, generator=generator)
    sizes = et.sizes(24, 2, 6, 256, alignment=16)
    out = torch.empty(sizes.m_sum, 256, dtype=torch.float8_e4m3fn)
    scales = torch.empty(sizes.scale_words)
    space = torch.empty(sizes.layout_len, dtype=torch.int32)
    permuted = et.quantize_permute(x, ids, 6, alignment=16, out=out, scales=scales, layout=space)
    assert permuted.rows is out and permuted.scales.data_ptr() == scales.data_ptr() and permuted.layout.space is space
    result = torch.empty(24, 256, dtype=torch.bfloat16)
    assert et.unpermute(out.float(), permuted.layout.inv_perm, weights, out=result) is result
    with pytest.raises(ValueError, match="scales holds .* expected at least"):
        et.quantize_permute(x, ids, 6, alignment=16, out=out, scales=scales[1:], layout=space)
    with pytest.raises(ValueError, match="layout holds .* expected at least"):
        et.quantize_permute(x, ids, 6, alignment=16, out=out, scales=scales, layout=space[1:])
    with pytest.raises(ValueError, match="out shares memory with layout"):
        shared = torch.empty(sizes.m_sum * 256)
        et.permute_rows(
            x,
            ids,
            6,
            alignment=16,
            out=shared.view(sizes.m_sum, 256),
            layout=shared[: sizes.layout_len].view(torch.int32),
        )


def test_a_buffer_too_small_for_repeated_experts_is_an_error_and_distinct_false_is_enough():
    ids = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="m_sum is 4, expected at least 8"):
        et.build_layout(ids, 2, alignment=4, m_sum=4)
    assert et.build_layout(ids, 2, alignment=4, distinct=False).psum.tolist() == [8, 8]


class Named(torch.Tensor):
    """A subclass, which is not asked through torch's table."""


def test_a_tensor_is_the_same_however_it_is_read():
    ids, weights, generator = routing(11, 19, 2, 4)
    x = torch.randn(256, 40, generator=generator).t()[::2][:19]
    strange = torch.zeros(19, 2, 2, 1, 1, dtype=torch.int64)
    strange[:, :, 1, 0, 0] = ids
    expected = et.quantize_permute(x, ids, 4, zero_padding=True)
    kinds = [
        (x.clone().as_subclass(Named), ids.as_subclass(Named)),
        (x.as_subclass(Named), strange[:, :, 1, 0, 0]),
        (torch.nn.Parameter(x), ids.clone()),
        (torch.nn.Parameter(x, requires_grad=False), ids.expand(19, 2)),
    ]
    for x_read, ids_read in kinds:
        with torch.no_grad():  # A parameter whose gradient ends here is warned of.
            rows, scales, layout = et.quantize_permute(x_read, ids_read, 4, zero_padding=True)
        assert torch.equal(rows.view(torch.uint8), expected.rows.view(torch.uint8)), (type(x_read), type(ids_read))
        assert torch.equal(scales, expected.scales) and torch.equal(layout.inv_perm, expected.layout.inv_perm)
    for wrong in (x.double(), x.as_subclass(Named).double()):
        with pytest.raises(TypeError, match="x has dtype torch.float64"):
            et.quantize_permute(wrong, ids, 4)
    with pytest.raises(ValueError, match=r"topk_ids has shape \[19, 2, 2, 1, 1\]"):
        expertile._native.build_layout(strange, None, 4, 1, 38, layout.space)


def test_tensors_without_memory_are_errors_and_no_crash():
    ids, _, _ = routing(11, 6, 2, 4)
    space = torch.empty(200, dtype=torch.int32)

    def direct(x):
        with pytest.raises(TypeError, match="topk_ids is a tensor without memory of its own"):
            expertile._native.build_layout(x, None, 4, 1, 12, space)
        return x

    torch.func.functionalize(direct)(ids)
    torch.vmap(direct)(ids[None])
    with pytest.raises((TypeError, ValueError), match="topk_ids is "):
        expertile._native.build_layout(ids.to_sparse(), None, 4, 1, 12, space)


# -- torch's own checks ------------------------------------------------------------------------------------------------


def cases():
    """Arguments for every operator. fp8 outputs are given as bytes: opcheck cannot compare fp8 on the CPU."""
    ids, weights, generator = routing(6, 12, 2, 4)
    x = torch.randn(12, 256, generator=generator)
    sizes = et.sizes(12, 2, 4, 256, alignment=8)
    space = torch.zeros(sizes.layout_len, dtype=torch.int32)
    where = (ids, None, 4, 8, sizes.m_sum)
    out, scales = torch.zeros(sizes.m_sum, 256, dtype=torch.uint8), torch.zeros(sizes.scale_words)
    inv_perm = et.build_layout(ids, 4, alignment=8).inv_perm.clone()
    layer = small_layer()
    LAYERS.append(layer)
    ops = torch.ops.expertile
    return [
        (ops.build_layout, (*where, space)),
        (ops.permute_rows, (x, *where, False, torch.zeros(sizes.m_sum, 256), space)),
        (
            ops.permute_quantized,
            (x.to(torch.uint8), x[:, :2].contiguous(), *where, 128, "mn_major", True, out, scales, space),
        ),
        (ops.quantize_permute, (x, None, *where, 128, "mn_major", False, True, out, scales, space)),
        (ops.unpermute, (torch.randn(sizes.m_sum, 256), inv_perm, ids, None, weights, torch.zeros(12, 256))),
        (
            ops.layer,
            (
                layer._number,
                x[:, :128].contiguous(),
                ids,
                weights,
                None,
                torch.zeros(layer.workspace_bytes(12, 2), dtype=torch.uint8),
                torch.zeros(12, 128),
            ),
        ),
        (
            ops.layer_expanded,
            (
                layer._number,
                x[:, :128].to(torch.bfloat16),
                None,
                torch.tensor([4, 4, 12, 12], dtype=torch.int32),
                4,
                None,
                torch.zeros(12, 128, dtype=torch.bfloat16),
            ),
        ),
    ]


LAYERS = []


def small_layer(**options):
    generator = torch.Generator().manual_seed(1)
    w13 = (torch.randn(4, 64, 128, generator=generator) / 8).to(torch.bfloat16)
    w2 = (torch.randn(4, 128, 32, generator=generator) / 8).to(torch.bfloat16)
    return et.Layer(w13, w2, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(7))
def test_opcheck_accepts_every_operator(index):
    operator, arguments = cases()[index]
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_whole_path_compiles_without_a_break_for_any_number_of_tokens(dynamic):
    layer = small_layer()

    def path(x, ids, weights):
        rows, scales, layout = et.quantize_permute(x, ids, 4, alignment=16)
        back = et.unpermute(rows.to(torch.float32), layout.inv_perm, weights)
        moved = et.permute_rows(x, ids, 4, alignment=16, distinct=False, zero_padding=True)
        return back, scales, layout.m_indices, moved.rows, layer(x, ids, weights)

    compiled = torch.compile(path, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (12, 13, 29):
        ids, weights, generator = routing(tokens, tokens, 2, 4)
        x = torch.randn(tokens, 128, generator=generator)
        for mine, expected in zip(compiled(x, ids, weights), path(x, ids, weights), strict=True):
            assert torch.equal(mine, expected)


def test_the_bound_for_compiled_code_is_the_librarys():
    for tokens in (0, 1, 2, 5, 127, 128, 129, 4096):
        for topk in (1, 2, 8):
            for experts in (1, 4, 256):
                for alignment in (1, 3, 16, 128):
                    for distinct in (True, False):
                        arguments = (tokens, topk, experts, alignment, distinct)
                        assert symbolic_tight_m_sum(*arguments) == expertile.tight_m_sum(*arguments), arguments


def test_sizes_for_compiled_code_are_the_librarys():
    native = expertile._native
    for m_sum in (0, 1, 3, 4, 130):
        for group in native.SCALE_GROUPS:
            for name in native.SCALE_LAYOUTS:
                words, dtype, shape, strides, _ = native.scale_matrix(m_sum, 640, name, group)
                assert _layout.scale_shape(m_sum, 640, name, group) == (words, dtype, shape, strides), (m_sum, name)
    for tokens, topk, experts, alignment in ((0, 1, 1, 1), (5, 3, 7, 4), (64, 8, 256, 128)):
        plan = expertile.Plan.tight(tokens, topk, experts, alignment)
        assert _layout.total_len(experts, plan.m_sum, tokens * topk, alignment) == plan.layout_len
    assert [name for name, _, _ in native.LAYOUT_LISTS] == [
        *("expert_num_tokens", "expert_start", "psum", "m_indices", "inv_perm")
    ]


# -- layer -------------------------------------------------------------------------------------------------------------


def layer_by_definition(x, ids, weights, w13, w2):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(ids.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if expert >= 0:
                gate, up = (w13[expert].double() @ x[token].double()).chunk(2)
                out[token] += weights[token, slot] * (w2[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_is_the_definition_by_row(dtype):
    ids, weights, generator = routing(8, 21, 2, 4)
    x = torch.randn(21, 128, generator=generator).to(torch.bfloat16)
    layer = small_layer()
    assert (layer.local_experts, layer.hidden, layer.intermediate) == (4, 128, 32)
    generator = torch.Generator().manual_seed(1)
    w13 = (torch.randn(4, 64, 128, generator=generator) / 8).to(torch.bfloat16)
    w2 = (torch.randn(4, 128, 32, generator=generator) / 8).to(torch.bfloat16)
    expected = layer_by_definition(x, ids, weights, w13, w2)
    workspace = torch.empty(layer.workspace_bytes(21, 2), dtype=torch.uint8)
    out = layer(x.to(dtype), ids, weights, workspace=workspace, dtype=torch.float32)
    assert torch.equal(out, layer(x.to(dtype), ids, weights, dtype=torch.float32))
    live = (ids >= 0).any(1)
    assert not out[~live].any()
    mine, expected = out[live].double(), expected[live]
    difference = 1 - 2 * (mine * expected).sum(1) / (mine**2 + expected**2).sum(1)
    assert difference.max() < 1e-4


def test_an_e4m3_layer_takes_block_scales_and_a_bf16_layer_none():
    generator = torch.Generator().manual_seed(2)
    w13 = (torch.randn(2, 256, 128, generator=generator)).to(torch.float8_e4m3fn)
    w2 = (torch.randn(2, 128, 128, generator=generator)).to(torch.float8_e4m3fn)
    s13, s2 = torch.full((2, 2, 1), 0.25), torch.full((2, 1, 1), 0.25)
    ids, weights, generator = routing(9, 8, 1, 2)
    x = torch.randn(8, 128, generator=generator).to(torch.bfloat16)
    expected = layer_by_definition(x, ids, weights, w13.float() / 4, w2.float() / 4)
    for activations in ("bf16", "e4m3"):
        layer = et.Layer(w13, w2, w13_scale=s13, w2_scale=s2, activations=activations)
        out = layer(x, ids, weights, dtype=torch.float32).double()
        assert 1 - 2 * (out * expected).sum() / (out**2 + expected**2).sum() < 2e-3
    with pytest.raises(ValueError, match="w13_scale is None"):
        et.Layer(w13, w2)
    with pytest.raises(ValueError, match="w13_scale is given"):
        et.Layer(w13.bfloat16(), w2.bfloat16(), w13_scale=s13)
    with pytest.raises(ValueError, match="w13 is packed as bf16"):
        et.Layer(w13.bfloat16(), w2.bfloat16(), activations="e4m3")
    with pytest.raises(ValueError, match='activations is "fp4"'):
        et.Layer(w13.bfloat16(), w2.bfloat16(), activations="fp4")
    with pytest.raises(ValueError, match="w13 has shape"):
        et.Layer(w13.bfloat16()[0], w2.bfloat16())


@pytest.mark.parametrize("intermediate", [1, 31, 96, 128, 192])
def test_gate_and_up_have_row_blocks_of_their_own_whatever_the_width(intermediate):
    generator = torch.Generator().manual_seed(3)
    blocks, hidden = -(-intermediate // 128), 160

    def weights_and_scales(rows, cols):
        weights = torch.randn(2, rows, cols, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(2, -(-rows // 128), -(-cols // 128), generator=generator) + 0.25
        widened = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :rows, :cols]
        return weights, scales, weights.float() * widened

    gate, gate_scale, gate_wide = weights_and_scales(intermediate, hidden)
    up, up_scale, up_wide = weights_and_scales(intermediate, hidden)
    w2, s2, w2_wide = weights_and_scales(hidden, intermediate)
    w13, s13 = torch.cat([gate.view(torch.uint8), up.view(torch.uint8)], 1), torch.cat([gate_scale, up_scale], 1)
    w13 = w13.view(torch.float8_e4m3fn)
    layer = et.Layer(w13, w2, w13_scale=s13, w2_scale=s2)
    assert (layer.hidden, layer.intermediate) == (hidden, intermediate)
    ids, weights, generator = routing(9, 40, 1, 2)
    x = torch.randn(40, hidden, generator=generator).to(torch.bfloat16)
    expected = layer_by_definition(x, ids, weights, torch.cat([gate_wide, up_wide], 1), w2_wide)
    out = layer(x, ids, weights, dtype=torch.float32).double()
    assert 1 - 2 * (out * expected).sum() / (out**2 + expected**2).sum() < 2e-5
    for shape in [(2, 2 * blocks + 1, 2), (2, 2 * blocks, 1), (1, 2 * blocks, 2)]:
        with pytest.raises(ValueError, match=rf"w13_scale has shape .*, expected \[2, {2 * blocks}, 2\]"):
            et.Layer(w13, w2, w13_scale=torch.ones(shape), w2_scale=s2)
    with pytest.raises(ValueError, match=r"w2_scale has shape \[2, 3, .*, expected \[2, 2, "):
        et.Layer(w13, w2, w13_scale=s13, w2_scale=torch.ones(2, 3, blocks))
    with pytest.raises(ValueError, match=r"w13 has shape .*, expected \[E, 2 I, H\]"):
        et.Layer(w13[:, 1:].contiguous(), w2, w13_scale=s13, w2_scale=s2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_may_lie_in_any_order_and_are_unpacked_as_they_were(dtype):
    generator = torch.Generator().manual_seed(5)
    w13, w2 = (torch.randn(shape, generator=generator) for shape in ((3, 2 * 40, 72), (3, 72, 40)))
    x, bias = torch.randn(9, 72, generator=generator), torch.randn(3, 80, generator=generator)
    chosen = torch.rand(9, 3, generator=generator).topk(2)
    options = {}
    if dtype == torch.float8_e4m3fn:
        scales = (torch.rand(shape, generator=generator) + 0.5 for shape in ((3, 2, 1), (3, 1, 1)))
        options = dict(zip(("w13_scale", "w2_scale"), scales, strict=True))
    w13, w2 = w13.to(dtype), w2.to(dtype)
    # torch neither stacks nor compares float8.
    bits = torch.uint8 if dtype == torch.float8_e4m3fn else torch.int16

    def alternating(x):
        return torch.stack(x.chunk(2, dim=1), dim=2).flatten(1, 2)

    mixed = alternating(w13.view(bits)).view(dtype)
    layer = et.Layer(w13, w2, w13_bias=bias, **options)
    expected = layer(x, chosen.indices, chosen.values)
    for first, second in [(mixed, w2), (mixed.mT.contiguous().mT, w2.mT.contiguous().mT)]:
        other = et.Layer(first, second, w13_bias=alternating(bias), gate_up="interleaved", **options)
        assert torch.equal(other(x, chosen.indices, chosen.values), expected)
        for order, weights in [("halves", w13), ("interleaved", mixed)]:
            found, down = other.unpack(gate_up=order)
            assert found.dtype == down.dtype == dtype
            assert torch.equal(found.view(bits), weights.view(bits)) and torch.equal(down.view(bits), w2.view(bits))
    wrong = et.Layer(mixed, w2, w13_bias=bias, **options)
    assert not torch.equal(wrong(x, chosen.indices, chosen.values), expected)


def test_an_order_that_is_none_is_an_error():
    w13, w2 = torch.zeros(3, 80, 72).bfloat16(), torch.zeros(3, 72, 40).bfloat16()
    with pytest.raises(ValueError, match='gate_up is "rows", expected one of halves, interleaved'):
        et.Layer(w13, w2, gate_up="rows")
    with pytest.raises(ValueError, match="e4m3_copy is True, expected False on the CPU"):
        et.Layer(w13, w2, e4m3_copy=True)
    with pytest.raises(ValueError, match='gate_up is "rows", expected one of halves, interleaved'):
        et.Layer(w13, w2).unpack(gate_up="rows")
    with pytest.raises(ValueError, match='gate_up is "interleaved", expected halves for an activation without a gate'):
        et.Layer(w13[:, :40], w2, gate_up="interleaved", activation="relu2")
    # Without a gate there is one order, and unpacking asks for none.
    first, _ = et.Layer(w13[:, :40], w2, activation="relu2").unpack()
    assert first.shape == (3, 40, 72)


def test_scales_of_other_types_are_widened_exactly():
    generator = torch.Generator().manual_seed(4)
    w13 = torch.randn(2, 256, 128, generator=generator).to(torch.float8_e4m3fn)
    w2 = torch.randn(2, 128, 128, generator=generator).to(torch.float8_e4m3fn)
    ids, weights, generator = routing(9, 16, 1, 2)
    x = torch.randn(16, 128, generator=generator).to(torch.bfloat16)
    # Powers of two, so that all types have them; the smallest of e8m0 is subnormal in float32.
    s13 = torch.tensor([0.25, 2.0**-3, 2.0, 1.0]).view(2, 2, 1)
    s2 = torch.tensor([0.5, 2.0**-7]).view(2, 1, 1)

    def out(w13_scale, w2_scale):
        return et.Layer(w13, w2, w13_scale=w13_scale, w2_scale=w2_scale)(x, ids, weights, dtype=torch.float32)

    expected = out(s13, s2)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e8m0fnu):
        assert torch.equal(out(s13.to(dtype), s2.to(dtype)), expected)
    # Not powers of two: as the same numbers in float32.
    odd = [torch.rand(2, 2, 1, generator=generator), torch.rand(2, 1, 1, generator=generator)]
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [scale.to(dtype) for scale in odd]
        assert torch.equal(out(*narrow), out(*[scale.float() for scale in narrow]))
    for byte, value in [(0, 2.0**-127), (254, 2.0**127), (255, float("nan"))]:
        extreme = torch.full((2, 1, 1), byte, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        same = torch.full((2, 1, 1), value)
        assert torch.equal(out(s13, extreme).nan_to_num(7.0), out(s13, same).nan_to_num(7.0))
    for dtype in (torch.float64, torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(
            TypeError, match="w13_scale has dtype .*, expected float32, bfloat16, float16 or float8_e8m0"
        ):
            out(s13.to(dtype), s2)


# -- threads and processes ---------------------------------------------------------------------------------------------


def test_threads_at_once_get_the_same_bits():
    ids, weights, generator = routing(7, 300, 4, 16)
    x = torch.randn(300, 512, generator=generator).to(torch.bfloat16)
    first = et.quantize_permute(x, ids, 16)
    results = [None] * 8

    def run(index):
        for _ in range(5):
            results[index] = et.quantize_permute(x, ids, 16)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live = first.layout.m_indices >= 0
    for result in results:
        assert torch.equal(result.rows[live].view(torch.uint8), first.rows[live].view(torch.uint8))
        assert torch.equal(result.scales, first.scales)
        assert all(
            torch.equal(mine, its) for mine, its in zip(result.layout.lists(), first.layout.lists(), strict=True)
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    ids, weights, generator = routing(7, 100, 4, 16)
    x = torch.randn(100, 256, generator=generator)
    before = expertile.get_num_threads()
    first = et.quantize_permute(x, ids, 16, zero_padding=True)
    try:
        expertile.set_num_threads(threads)
        assert expertile.get_num_threads() == threads
        again = et.quantize_permute(x, ids, 16, zero_padding=True)
    finally:
        expertile.set_num_threads(before)
    assert torch.equal(again.rows.view(torch.uint8), first.rows.view(torch.uint8))
    assert torch.equal(again.scales, first.scales)


def test_a_layer_of_a_state_dict_is_the_layer_of_its_stacks():
    w13, w2 = torch.randn(3, 256, 128).bfloat16(), torch.randn(3, 128, 128).bfloat16()
    x, ids = torch.randn(5, 128).bfloat16(), torch.tensor([[0, 2], [1, 0], [2, 1], [1, 2], [0, 1]])
    router = torch.rand(5, 2)
    expected = et.Layer(w13, w2)(x, ids, router)
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        state = {f"p.{e}.{gate}.weight": w13[e, :128] for e in range(3)}
        state |= {f"p.{e}.{up}.weight": w13[e, 128:] for e in range(3)}
        state |= {f"p.{e}.{down}.weight": w2[e] for e in range(3)}
        layer = et.Layer.from_state_dict(state, "p.")
        layer.prepare(5, 2)
        layer.check()
        assert layer.device.type == "cpu" and torch.equal(layer(x, ids, router), expected)
        some = et.Layer.from_state_dict(state, "p.", experts=(2, 1))
        assert torch.equal(some(x, ids.remainder(2), router), et.Layer(w13[[2, 1]], w2[[2, 1]])(x, ids % 2, router))
        with pytest.raises(ValueError, match=rf"p\.3\.{gate}\.weight is not there, expected a matrix"):
            et.Layer.from_state_dict(state, "p.", experts=(0, 3))
        del state[f"p.1.{down}.weight"]
        with pytest.raises(ValueError, match=rf"p\.1\.{down}\.weight is not there"):
            et.Layer.from_state_dict(state, "p.")
    with pytest.raises(ValueError, match=r"experts are none, expected matrices named like q\.0\.gate_proj\.weight"):
        et.Layer.from_state_dict(state, "q.")


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4_weights(generator, rows, cols):
    """Blocks, scales, and what they stand for."""
    blocks = torch.randint(0, 256, (3, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (3, rows, cols // 32), generator=generator, dtype=torch.uint8)
    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return blocks, scales, (E2M1[nibbles.long()] * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(2)


@pytest.mark.parametrize("activations", ["bf16", "e4m3"])
def test_mxfp4_weights_say_what_they_stand_for(activations):
    generator = torch.Generator().manual_seed(7)
    (w13, s13, wide13), (w2, s2, wide2) = mxfp4_weights(generator, 128, 192), mxfp4_weights(generator, 192, 64)
    ids, weights, generator = routing(9, 40, 2, 3)
    x = torch.randn(40, 192, generator=generator).to(torch.bfloat16)
    layer = et.Layer(w13, w2, w13_scale=s13, w2_scale=s2, activations=activations)
    assert (layer.hidden, layer.intermediate) == (192, 64)
    out = layer(x, ids, weights, dtype=torch.float32).double()
    expected = layer_by_definition(x, ids, weights, wide13, wide2)
    assert 1 - 2 * (out * expected).sum() / (out**2 + expected**2).sum() < (2e-5 if activations == "bf16" else 2e-3)

    def alternating(x):
        return torch.stack(x.chunk(2, dim=1), dim=2).flatten(1, 2)

    flat, scales = w13.flatten(2), s13.view(torch.float8_e8m0fnu)
    for options in (
        {"w13": flat, "w13_scale": scales},
        {"w13": alternating(w13), "w13_scale": alternating(s13), "gate_up": "interleaved"},
        {"w13": flat.mT.contiguous().mT, "w13_scale": s13.mT.contiguous().mT},
    ):
        other = et.Layer(**options, w2=w2.flatten(2), w2_scale=s2, activations=activations)
        assert torch.equal(other(x, ids, weights, dtype=torch.float32).double(), out)
        order = options.get("gate_up", "halves")
        found, down = other.unpack(gate_up=order)
        assert torch.equal(found, options["w13"].flatten(2)) and torch.equal(down, w2.flatten(2))


def test_a_state_dict_of_gpt_oss_is_its_mxfp4_experts():
    generator = torch.Generator().manual_seed(7)
    (w13, s13, _), (w2, s2, _) = mxfp4_weights(generator, 128, 192), mxfp4_weights(generator, 192, 64)
    b13, b2 = torch.randn(3, 128, generator=generator), torch.randn(3, 192, generator=generator).bfloat16()
    names = ["blocks", "scales", "bias"]
    state = {f"m.gate_up_proj_{name}": x for name, x in zip(names, (w13, s13, b13), strict=True)}
    state |= {f"m.down_proj_{name}": x for name, x in zip(names, (w2, s2, b2), strict=True)}
    ids, weights, generator = routing(9, 40, 2, 3)
    x = torch.randn(40, 192, generator=generator).to(torch.bfloat16)
    options = {"alpha": 1.702, "beta": 1.0, "limit": 7.0, "activations": "e4m3"}
    parts = {"w13": w13, "w2": w2, "w13_scale": s13, "w2_scale": s2, "w13_bias": b13, "w2_bias": b2}
    expected = et.Layer(**parts, gate_up="interleaved", **options)
    layer = et.Layer.from_state_dict(state, "m.", **options)
    assert torch.equal(layer(x, ids, weights), expected(x, ids, weights))
    # 4.25 bits to a weight, whole panels and cache lines.
    assert 3 * 3 * 192 * 64 * 17 // 32 <= layer.weight_bytes == expected.weight_bytes
    some = et.Layer.from_state_dict(state, "m.", experts=[2, 1], **options)
    chosen = {name: part[[2, 1]] for name, part in parts.items()}
    picked = et.Layer(**chosen, gate_up="interleaved", **options)
    assert torch.equal(some(x, ids % 2, weights), picked(x, ids % 2, weights))
    with pytest.raises(ValueError, match=r"m\.gate_up_proj_blocks has no expert 3, expected an expert below 3"):
        et.Layer.from_state_dict(state, "m.", experts=[0, 3])
    del state["m.down_proj_bias"]
    with pytest.raises(ValueError, match=r"m\.down_proj_bias is not there, expected a tensor of all experts"):
        et.Layer.from_state_dict(state, "m.")


def test_mxfp4_weights_that_do_not_fit_are_refused():
    generator = torch.Generator().manual_seed(7)
    (w13, s13, _), (w2, s2, _) = mxfp4_weights(generator, 128, 192), mxfp4_weights(generator, 192, 64)
    nan = s2.clone()
    nan[2, 191, 1] = 255
    cases = [
        ({"w13": w13[..., :8]}, r"w13 has shape \[3, 128, 6, 8\], expected \[E, N, K / 32, 16\]"),
        ({"w13_scale": None}, "w13_scale is None, expected scales for the uint8 blocks of w13"),
        ({"w13_scale": s13[:, :, :5]}, r"w13_scale has shape \[3, 128, 5\], expected \[3, 128, 6\]"),
        ({"w2_scale": s2.float()}, "w2_scale has dtype torch.float32, expected uint8 or float8_e8m0fnu"),
        ({"w2": w2.flatten(2)[..., :24]}, "k is 48, expected a positive multiple of 32"),
        ({"w2_scale": nan}, "scales is 255, expected at most 254, as 255 is NaN: that of row 191, group 1"),
    ]
    for changed, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            et.Layer(**{"w13": w13, "w2": w2, "w13_scale": s13, "w2_scale": s2, **changed})
