"""What torch keeps beside a tensor's memory: negative views, counts of writes, gradients, traces."""

import pytest

from expertile import deep_gemm_utils
from hostile import TRACED, needs_torch

try:
    import torch
except ImportError:
    torch = None


def negative(x):
    """Two views that are the negative of what their memory holds, and equal to `x`."""
    yield torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype == torch.float32 else torch._neg_view(-x)
    yield torch._neg_view(-x)


@needs_torch
def test_views_of_negative_values_are_read_as_what_they_are():
    generator = torch.Generator().manual_seed(1)
    x, scale = torch.randn(5, 128, generator=generator), torch.rand(5, 1, generator=generator)
    ids = torch.tensor([[0, 1], [1, 2], [-1, 0], [2, 2], [0, 0]])
    expert_map = torch.tensor([1, 0, 2], dtype=torch.int32)
    counts = deep_gemm_utils.count_expert_num_tokens(ids, 3, expert_map)
    meta = deep_gemm_utils.ExpertTokensMetadata(counts, counts)
    good = {"aq": x, "aq_scale": scale, "topk_ids": ids, "expert_map": expert_map, "expert_tokens_meta": meta}
    expected = deep_gemm_utils.deepgemm_moe_permute(local_num_experts=3, **good)
    live = expected[2] >= 0
    for name in ("aq", "aq_scale", "topk_ids", "expert_map"):
        for view in negative(good[name]):
            assert view.is_neg() and torch.equal(view, good[name])
            found = deep_gemm_utils.deepgemm_moe_permute(local_num_experts=3, **{**good, name: view})
            assert torch.equal(found[0][live], expected[0][live]), name
            assert all(torch.equal(mine, its) for mine, its in zip(found[1:4], expected[1:4], strict=True)), name
    for view in negative(counts):
        minus = deep_gemm_utils.ExpertTokensMetadata(view, view)
        found = deep_gemm_utils.deepgemm_moe_permute(local_num_experts=3, **{**good, "expert_tokens_meta": minus})
        assert torch.equal(found[0][live], expected[0][live])
        assert deep_gemm_utils.expert_num_tokens_round_up_and_sum(view, 4) == int(((counts + 3) // 4 * 4).sum())
    rows, weights, inv_perm = expected[0], torch.rand(5, 2, generator=generator), expected[3]
    rows = torch.where(live[:, None], rows, 0.0)
    good = {"a": rows, "topk_ids": ids, "topk_weights": weights, "inv_perm": inv_perm, "expert_map": expert_map}
    out = torch.empty(5, 128)
    deep_gemm_utils.deepgemm_unpermute_and_reduce(output=out, **good)
    for name, value in good.items():
        for view in negative(value):
            again = torch.empty(5, 128)
            deep_gemm_utils.deepgemm_unpermute_and_reduce(output=again, **{**good, name: view})
            assert torch.equal(again, out), name
    target = torch._neg_view(torch.zeros(5, 128))
    with pytest.raises(ValueError, match="output is a view of negative values"):
        deep_gemm_utils.deepgemm_unpermute_and_reduce(output=target, **good)
    assert not target.any()
    # A copy of it is written and comes back, as any target that is not contiguous.
    target = torch.zeros(5, 128, dtype=torch.complex64).conj().imag
    deep_gemm_utils.deepgemm_unpermute_and_reduce(output=target, **good)
    assert torch.equal(target, out)


@needs_torch
def test_complex_values_are_refused_conjugate_or_not():
    x = torch.zeros(3, 128, dtype=torch.complex64)
    ids, scale = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    for wrong in (x, x.conj()):
        with pytest.raises(TypeError, match="aq has dtype torch.complex64"):
            deep_gemm_utils.deepgemm_moe_permute(wrong, scale, ids, 2, None, None)
        with pytest.raises(TypeError, match="aq_scale has dtype"):
            deep_gemm_utils.deepgemm_moe_permute(x.real.to(torch.uint8), wrong[:, :1], ids, 2, None, None)


def calls():
    """Every function that writes into tensors of its caller: the call, what it writes."""
    import expertile.torch as et

    ids = torch.tensor([[0], [1], [-1]])
    x, scale, weights = torch.ones(3, 128), torch.ones(3, 1), torch.ones(3, 1)
    bytes_ = x.to(torch.float8_e4m3fn)
    sizes = et.sizes(3, 1, 2, 128, alignment=4)
    layout, out = torch.empty(sizes.layout_len, dtype=torch.int32), torch.empty(sizes.m_sum, 128)
    out8, scales = out.to(torch.float8_e4m3fn), torch.empty(sizes.scale_words)
    inv_perm = torch.tensor([[0], [4], [-1]], dtype=torch.int32)
    rows, result = torch.ones(8, 128), torch.empty(3, 128)
    wide = torch.empty(3, 200)[:, :128]
    layer = et.Layer(torch.ones(2, 64, 128).bfloat16(), torch.ones(2, 128, 32).bfloat16())
    workspace = torch.empty(layer.workspace_bytes(3, 1), dtype=torch.uint8)
    meta = torch.tensor([1, 1], dtype=torch.int32)
    start, index = torch.empty(2, dtype=torch.int32), torch.empty(3, 1, dtype=torch.int32)
    m_indices, row_scales = torch.empty(8, dtype=torch.int32), torch.empty(8, 1)
    aq_out = torch.empty(384, 128).to(torch.float8_e4m3fn)
    scatter = (bytes_, scale, ids, meta, None, start, out8[:8], row_scales, m_indices, index, 4)
    common = {"alignment": 4, "layout": layout}
    return [
        ("build_layout", lambda: et.build_layout(ids, 2, **common), [layout]),
        ("permute_rows", lambda: et.permute_rows(x, ids, 2, out=out, **common), [out, layout]),
        (
            "permute_quantized",
            lambda: et.permute_quantized(bytes_, scale, ids, 2, out=out8, scales=scales, **common),
            [out8, scales, layout],
        ),
        (
            "quantize_permute",
            lambda: et.quantize_permute(x, ids, 2, out=out8, scales=scales, **common),
            [out8, scales, layout],
        ),
        ("unpermute", lambda: et.unpermute(rows, inv_perm, weights, out=result), [result]),
        ("Layer", lambda: layer(x, ids, weights, workspace=workspace, out=result), [result, workspace]),
        ("ep_gather", lambda: deep_gemm_utils.ep_gather(rows, ids, weights, inv_perm, None, result), [result]),
        ("ep_gather, strided", lambda: deep_gemm_utils.ep_gather(rows, ids, weights, inv_perm, None, wide), [wide]),
        ("ep_scatter", lambda: deep_gemm_utils.ep_scatter(*scatter), [start, out8, row_scales, m_indices, index]),
        (
            "deepgemm_moe_permute",
            lambda: deep_gemm_utils.deepgemm_moe_permute(bytes_, scale, ids, 2, None, None, aq_out=aq_out),
            [aq_out],
        ),
    ]


@needs_torch
def test_a_write_is_counted_so_that_no_gradient_is_silently_wrong():
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for name, call, outputs in calls():
            before = [output._version for output in outputs]
            with mode():
                call()
            after = [output._version for output in outputs]
            assert all(new > old for old, new in zip(before, after, strict=True)), (mode, name, before, after)
    weight, buffer = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4)
    loss = (weight * buffer).sum()
    inv_perm = torch.zeros(3, 1, dtype=torch.int32)
    ids, ones = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    deep_gemm_utils.ep_gather(torch.full((1, 4), 7.0), ids, ones, inv_perm, None, buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_torch
def test_tensors_of_inference_are_written_wherever_one_is():
    with torch.inference_mode():
        made = calls()
        for _, call, _ in made:
            call()
    for _, call, _ in made:
        call()


@needs_torch
def test_an_output_that_requires_gradients_is_refused_and_an_input_warns():
    import expertile.torch as et

    inv_perm, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    rows, out = torch.ones(1, 4), torch.zeros(3, 4, requires_grad=True)
    for call in (
        lambda: deep_gemm_utils.ep_gather(rows, ids, weights, inv_perm, None, out),
        lambda: et.unpermute(rows, inv_perm, weights, out=out),
        lambda: et.unpermute(rows, inv_perm, weights, out=out * 1),
    ):
        with pytest.raises(ValueError, match="requires gradients, expected an output that does not"):
            call()
    assert not out.any()
    with torch.no_grad():
        et.unpermute(rows, inv_perm, weights, out=out)
    assert out.all()
    layer = et.Layer(torch.ones(2, 64, 128).bfloat16(), torch.ones(2, 128, 32).bfloat16())
    x = torch.ones(3, 128, requires_grad=True)
    for name, call in {
        "hidden_states": lambda: layer(x, ids, weights),
        "x": lambda: et.quantize_permute(x, ids, 2),
        "rows": lambda: et.unpermute(x, inv_perm, weights),
        "topk_weights": lambda: et.unpermute(x.detach(), inv_perm, weights.clone().requires_grad_()),
    }.items():
        with pytest.warns(UserWarning, match=f"^{name} requires gradients, which end here"):
            call()
        with torch.no_grad():
            call()


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_refused_by_functions_and_recorded_by_operators():
    from torch.fx.experimental.proxy_tensor import make_fx

    import expertile.torch as et

    ids, x, scale = torch.tensor([[0], [1]]), torch.ones(2, 128), torch.ones(2, 1)
    meta = torch.tensor([1, 1], dtype=torch.int32)
    inv_perm = torch.tensor([[0], [1]], dtype=torch.int32)

    def scatter(x):
        numbers = [torch.empty(n, dtype=torch.int32) for n in (2, 256)]
        deep_gemm_utils.ep_scatter(
            x,
            scale,
            ids,
            meta,
            None,
            numbers[0],
            torch.empty(256, 128),
            torch.empty(256, 1),
            numbers[1],
            torch.empty(2, 1, dtype=torch.int32),
        )
        return numbers[0]

    def gather(x):
        out = torch.empty(2, 128)
        deep_gemm_utils.ep_gather(x, ids, torch.ones(2, 1), inv_perm, None, out)
        return out

    functions = [
        scatter,
        gather,
        lambda x: deep_gemm_utils.count_expert_num_tokens(x.long()[:, :1], 2, None),
        lambda x: deep_gemm_utils.deepgemm_moe_permute(x, scale, ids, 2, None, None)[0],
    ]
    for function in functions:
        function(x)
        with pytest.raises(RuntimeError, match=TRACED):
            torch.jit.trace(function, (x,), check_trace=False)
        for mode in ("real", "fake", "symbolic"):
            with pytest.raises(RuntimeError, match=TRACED):
                make_fx(function, tracing_mode=mode)(x)

    def operators(x):
        rows, _, layout = et.quantize_permute(x, ids, 2)
        return et.unpermute(rows.float(), layout.inv_perm)

    other = torch.randn(2, 128)
    assert torch.equal(torch.jit.trace(operators, (x,), check_trace=False)(other), operators(other))
    for mode in ("real", "fake", "symbolic"):
        assert torch.equal(
            make_fx(operators, tracing_mode=mode, _allow_non_fake_inputs=True)(x)(other), operators(other)
        )
