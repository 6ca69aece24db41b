"""CUDA tensors: the CPU's bits, CUDA graphs, bad ids, the cost of a call, and a layer in vLLM's order of calls.

Skips without a GPU. The layer needs vLLM 0.33.0's pieces: EXPERTILE_GPU_PEER names a folder with ``seed/`` (its Python
modules) and ``deep_gemm/`` (the DeepGEMM it carries). ``pytest -s`` prints the figures.
"""

import contextlib
import os
import sys

import pytest

torch = pytest.importorskip("torch")

import expertile  # noqa: E402
import expertile.torch as et  # noqa: E402
import expertile.vllm  # noqa: E402
from expertile import _native, deep_gemm_utils  # noqa: E402
from on_gpu import captured, host_us  # noqa: E402

unavailable = "torch sees no CUDA device" if not torch.cuda.is_available() else _native.cuda_unavailable()
pytestmark = [
    pytest.mark.skipif(unavailable is not None, reason=str(unavailable)),
    pytest.mark.filterwarnings("default"),
]

GPU_PEER = os.environ.get("EXPERTILE_GPU_PEER")


def routing(tokens, topk, experts, global_experts=None, seed=0, dtype=torch.int64):
    """Distinct ids with some empty slots, weights and a map, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    limit = global_experts or experts
    ids = torch.rand(tokens, limit, generator=generator).topk(topk).indices.to(dtype)
    ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
    weights = torch.rand(tokens, topk, generator=generator)
    expert_map = None
    if global_experts:
        expert_map = torch.full((global_experts,), -1, dtype=torch.int32)
        expert_map[torch.randperm(global_experts, generator=generator)[:experts]] = torch.arange(
            experts, dtype=torch.int32
        )
    return ids, weights, expert_map


def cuda(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


def same(mine, expected):
    mine = mine.cpu()
    if mine.dtype == torch.float8_e4m3fn:
        mine, expected = mine.view(torch.uint8), expected.view(torch.uint8)
    return torch.equal(mine, expected)


CASES = [
    # tokens, topk, local experts, global experts, hidden
    (0, 2, 4, None, 128),
    (1, 8, 32, 256, 7168),
    (64, 8, 32, 256, 7168),
    (256, 8, 128, None, 4096),
    (300, 3, 7, 21, 384),
    (4096, 2, 8, None, 4096),
]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("scale", ["float32", "uint8"])
@pytest.mark.parametrize("psum", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_vllms_functions_give_the_cpus_bits(case, psum, scale, ids_dtype):
    tokens, topk, experts, global_experts, hidden = case
    ids, weights, expert_map = routing(tokens, topk, experts, global_experts, dtype=ids_dtype)
    group = 32 if scale == "uint8" else 128
    aq = torch.randint(0, 0x7F, (tokens, hidden), dtype=torch.uint8).view(torch.float8_e4m3fn)
    aq_scale = torch.randint(1, 255, (tokens, hidden // group)).to(getattr(torch, scale))
    arguments = (aq, aq_scale, ids, experts, expert_map, None)
    expected = deep_gemm_utils.deepgemm_moe_permute(*arguments, block_size=group, use_psum_layout=psum)
    mine = deep_gemm_utils.deepgemm_moe_permute(*map(cuda, arguments), block_size=group, use_psum_layout=psum)
    assert mine[4] == expected[4]
    for m, e in zip(mine[1:4], expected[1:4], strict=True):
        assert (m.shape, m.stride(), m.dtype) == (e.shape, e.stride(), e.dtype) and same(m, e)
    live = expected[3][expected[3] >= 0].long()
    assert same(mine[0].view(torch.uint8)[live.cuda()], expected[0].view(torch.uint8)[live])
    counts = deep_gemm_utils.count_expert_num_tokens(ids.cuda(), experts, cuda(expert_map))
    assert same(counts, deep_gemm_utils.count_expert_num_tokens(ids, experts, expert_map))

    rows = torch.randn(expected[0].shape).to(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.full((tokens, hidden), 7, dtype=dtype)
        out_gpu = out.cuda()
        deep_gemm_utils.deepgemm_unpermute_and_reduce(rows, ids, weights, expected[3], expert_map, out)
        deep_gemm_utils.deepgemm_unpermute_and_reduce(
            rows.cuda(), ids.cuda(), weights.cuda(), mine[3], cuda(expert_map), out_gpu
        )
        assert same(out_gpu, out)
        # Whoever leaves empty slots unwritten is understood as well.
        foreign = torch.where(mine[3] < 0, 2**31 - 1, mine[3])
        out_gpu.fill_(7)
        deep_gemm_utils.ep_gather(rows.cuda(), ids.cuda(), weights.cuda(), foreign, cuda(expert_map), out_gpu)
        assert same(out_gpu, out)


@pytest.mark.parametrize("scale_layout", ["row_major", "mn_major", "packed_ue8m0"])
@pytest.mark.parametrize("case", CASES)
def test_quantize_permute_gives_the_cpus_bits(case, scale_layout):
    tokens, topk, experts, global_experts, hidden = case
    ids, _, expert_map = routing(tokens, topk, experts, global_experts)
    x = torch.randn(tokens, hidden).to(torch.bfloat16)
    options = {"alignment": 128, "scale_layout": scale_layout, "zero_padding": True}
    expected = et.quantize_permute(x, ids, experts, expert_map=expert_map, **options)
    mine = et.quantize_permute(x.cuda(), ids.cuda(), experts, expert_map=cuda(expert_map), **options)
    assert same(mine.rows, expected.rows) and same(mine.scales, expected.scales)
    assert all(same(m, e) for m, e in zip(mine.layout.lists(), expected.layout.lists(), strict=True))
    et.check()


def test_rows_of_any_dtype_are_moved():
    ids, _, _ = routing(50, 3, 9)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.float8_e4m3fn):
        x = torch.randint(0, 100, (50, 129)).to(dtype)[:, :127]
        expected = et.permute_rows(x, ids, 9, alignment=16, zero_padding=True)
        mine = et.permute_rows(x.cuda()[:, :127], ids.cuda(), 9, alignment=16, zero_padding=True)
        assert same(mine.rows.view(torch.uint8), expected.rows.view(torch.uint8))


def test_bad_ids_are_empty_slots_and_reported_by_check():
    ids = torch.tensor([[0, 1], [2, 9], [1, 0]]).cuda()
    x = torch.randn(3, 128, dtype=torch.bfloat16, device="cuda")
    layout = et.quantize_permute(x, ids, 3).layout
    with pytest.raises(ValueError, match="topk_ids\\[1, 1\\] is 9, expected an id below 3"):
        et.check()
    assert layout.inv_perm[1, 1] == -1
    et.check()


def test_arrays_of_two_places_are_an_error():
    with pytest.raises(ValueError, match="topk_ids is on the CPU, unlike x, expected cuda:0"):
        et.quantize_permute(
            torch.zeros(2, 128, dtype=torch.bfloat16, device="cuda"), torch.zeros(2, 1, dtype=torch.int64), 1
        )
    with pytest.raises(TypeError, match="x has dtype torch.float32, expected bfloat16 or float16"):
        et.quantize_permute(torch.zeros(2, 128, device="cuda"), torch.zeros(2, 1, dtype=torch.int64).cuda(), 1)


def test_what_a_call_reads_and_writes_is_checked():
    ids, weights, _ = (cuda(x) for x in routing(5, 2, 4))
    x = torch.randn(5, 128, dtype=torch.bfloat16, device="cuda")
    rows, _, layout = et.quantize_permute(x, ids, 4)
    rows = rows.to(torch.bfloat16)
    for error, message, call in [
        (TypeError, "topk_weights has dtype", lambda: et.unpermute(rows, layout.inv_perm, weights.to(torch.bfloat16))),
        (TypeError, "topk_weights has dtype", lambda: et.quantize_permute(x, ids[:, :1], 4, topk_weights=ids[:, :1])),
        (ValueError, "topk_ids is None", lambda: et.unpermute(rows, layout.inv_perm, expert_map=ids[0].int())),
        (ValueError, "out shares memory with rows", lambda: et.unpermute(rows, layout.inv_perm, weights, out=rows[:5])),
        (ValueError, "layout holds", lambda: et.quantize_permute(x, ids, 4, layout=layout.space[1:])),
        (ValueError, "scales holds", lambda: et.quantize_permute(x, ids, 4, scales=torch.zeros(9, device="cuda"))),
        (ValueError, "out has shape", lambda: et.quantize_permute(x, ids, 4, out=rows[1:])),
        (ValueError, "m_sum is 500, expected", lambda: et.quantize_permute(x, ids, 4, m_sum=500)),
        (ValueError, "inv_perm has shape", lambda: et.unpermute(rows, layout.m_indices, weights, out=x)),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("alignment", [3, 128])
@pytest.mark.parametrize("scale_layout", ["row_major", "mn_major", "packed_ue8m0"])
def test_buffers_handed_in_and_buffers_made_hold_the_same(scale_layout, alignment):
    ids, _, _ = routing(21, 3, 5)
    x = torch.randn(21, 384, dtype=torch.bfloat16, device="cuda")
    options = {"alignment": alignment, "scale_layout": scale_layout, "zero_padding": True}
    sizes = et.sizes(21, 3, 5, 384, alignment=alignment, scale_layout=scale_layout)
    words = torch.int32 if scale_layout == "packed_ue8m0" else torch.float32
    out = torch.empty(sizes.m_sum, 384, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.full((sizes.scale_words,), 7, dtype=words, device="cuda")
    space = torch.empty(sizes.layout_len, dtype=torch.int32, device="cuda")
    mine = et.quantize_permute(x, ids.cuda(), 5, out=out, scales=scales, layout=space, **options)
    made = et.quantize_permute(x, ids.cuda(), 5, **options)
    expected = et.quantize_permute(x.cpu(), ids, 5, **options)
    assert mine.rows is out and mine.layout.space is space
    assert mine.scales.data_ptr() == scales.data_ptr()
    for permuted in (mine, made):
        assert (permuted.scales.shape, permuted.scales.dtype) == (expected.scales.shape, expected.scales.dtype)
        if sizes.m_sum > 1:
            assert permuted.scales.stride() == expected.scales.stride()
        assert same(permuted.rows, expected.rows) and same(permuted.scales, expected.scales)
        assert all(same(m, e) for m, e in zip(permuted.layout.lists(), expected.layout.lists(), strict=True))


def test_new_tensors_have_the_shape_of_their_call_however_many_other_shapes_came_between():
    ids, _, _ = routing(90, 2, 4)
    aq, aq_scale = torch.zeros(90, 256, dtype=torch.uint8).cuda(), torch.rand(90, 2).cuda()
    ids = ids.cuda()
    for _ in range(2):
        for tokens in range(1, 91):
            rows, scales, layout, inv_perm, _ = deep_gemm_utils.deepgemm_moe_permute(
                aq[:tokens], aq_scale[:tokens], ids[:tokens], 4, None, None
            )
            m_sum = deep_gemm_utils.compute_aligned_M(tokens, 2, 4, 128, None)
            assert (rows.shape, rows.dtype) == ((m_sum, 256), torch.uint8)
            assert (scales.shape, scales.stride(), scales.dtype) == ((m_sum, 2), (2, 1), torch.float32)
            assert (layout.shape, layout.dtype) == ((m_sum,), torch.int32)
            assert (inv_perm.shape, inv_perm.stride(), inv_perm.dtype) == ((tokens, 2), (2, 1), torch.int32)


def test_an_output_of_any_strides_and_a_buffer_handed_in_get_the_same_bytes():
    ids, _, expert_map = routing(40, 4, 6, 24)
    aq = torch.randint(0, 0x7F, (40, 256), dtype=torch.uint8)
    arguments = (aq, torch.rand(40, 2), ids, 6, expert_map, None)
    expected = deep_gemm_utils.deepgemm_moe_permute(*arguments)
    live = expected[2] >= 0
    wide = torch.zeros(expected[0].shape[0], 300, dtype=torch.uint8, device="cuda")
    for out in (wide[:, 20:276], torch.zeros(expected[0].shape, dtype=torch.uint8, device="cuda")):
        mine = deep_gemm_utils.deepgemm_moe_permute(*map(cuda, arguments), aq_out=out)
        assert mine[0] is out and torch.equal(out.cpu()[live], expected[0][live])
        assert all(same(m, e) for m, e in zip(mine[1:4], expected[1:4], strict=True))


def test_a_rule_or_counts_choose_the_rows_as_on_the_cpu():
    ids, _, _ = routing(9, 3, 5)
    arguments = (torch.zeros(9, 256, dtype=torch.uint8), torch.rand(9, 2), ids, 5, None)
    counts = deep_gemm_utils.count_expert_num_tokens(ids, 5, None)
    meta = deep_gemm_utils.ExpertTokensMetadata.make_from_list(counts.tolist(), "cpu")
    on_gpu = deep_gemm_utils.ExpertTokensMetadata(counts.cuda(), counts)
    try:
        for rule in (("deepgemm-2026-06", "sm100"), ("vllm-fork", "sm120"), (None,)):
            deep_gemm_utils.set_alignment_rule(*rule)
            for mine_meta, its_meta in ((None, None), (on_gpu, meta)):
                mine = deep_gemm_utils.deepgemm_moe_permute(*map(cuda, arguments), mine_meta)
                expected = deep_gemm_utils.deepgemm_moe_permute(*arguments, its_meta)
                assert mine[4] == expected[4] and mine[0].shape == expected[0].shape
                assert all(same(m, e) for m, e in zip(mine[1:4], expected[1:4], strict=True))
    finally:
        deep_gemm_utils.set_alignment_rule(None)


def test_whoever_watches_sees_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            names.append(str(function))
            return function(*arguments, **(options or {}))

    ids, weights, _ = (cuda(x) for x in routing(5, 2, 4))
    x = torch.randn(5, 128, dtype=torch.bfloat16, device="cuda")
    names = []
    expected = et.quantize_permute(x, ids, 4, zero_padding=True)
    assert not names
    with Seen():
        seen = et.quantize_permute(x, ids, 4, zero_padding=True)
        et.unpermute(seen.rows.to(torch.bfloat16), seen.layout.inv_perm, weights)
    assert {"expertile.quantize_permute.default", "expertile.unpermute.default"} <= set(names)
    assert torch.equal(seen.rows.view(torch.uint8), expected.rows.view(torch.uint8))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        et.quantize_permute(x, ids, 4)
    assert "expertile::quantize_permute" in {event.name for event in profile.events()}
    rows, inv_perm = seen.rows.to(torch.bfloat16), seen.layout.inv_perm
    traced = torch.jit.trace(lambda rows: et.unpermute(rows, inv_perm, weights), (rows,), check_trace=False)
    assert "expertile::unpermute" in str(traced.graph)


def test_weights_that_are_lazily_negated_are_read_as_what_they_stand_for():
    ids, weights, _ = (cuda(x) for x in routing(5, 2, 4))
    layout = et.build_layout(ids, 4, alignment=1)
    rows = torch.randn(layout.m_sum, 64, device="cuda")
    lazily = torch.complex(weights, -weights).conj().imag
    assert lazily.is_neg() and torch.equal(lazily, weights)
    assert torch.equal(et.unpermute(rows, layout.inv_perm, lazily), et.unpermute(rows, layout.inv_perm, weights))


@pytest.mark.parametrize("tokens", [3, 64, 2000])
def test_a_captured_graph_replays_right_with_changed_inputs(tokens):
    x = torch.randn(tokens, 512, dtype=torch.bfloat16, device="cuda")
    ids, weights, _ = routing(tokens, 4, 16)
    ids, weights = ids.cuda(), weights.cuda()

    def call():
        permuted = et.quantize_permute(x, ids, 16)
        return et.unpermute(permuted.rows.to(torch.bfloat16), permuted.layout.inv_perm, weights), permuted.layout.psum

    graph, (out, psum) = captured(call)
    for seed in range(3):
        new_ids, new_weights, _ = routing(tokens, 4, 16, seed=seed)
        ids.copy_(new_ids)
        weights.copy_(new_weights)
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_psum = call()
        assert torch.equal(out, expected) and torch.equal(psum, expected_psum)


def test_compiled_code_runs_on_the_gpu():
    def path(x, ids, weights):
        rows, scales, layout = et.quantize_permute(x, ids, 16, alignment=16)
        return et.unpermute(rows.to(torch.bfloat16), layout.inv_perm, weights), scales

    compiled = torch.compile(path, fullgraph=True)
    for tokens in (12, 40):
        ids, weights, _ = routing(tokens, 4, 16)
        arguments = (torch.randn(tokens, 256, dtype=torch.bfloat16, device="cuda"), ids.cuda(), weights.cuda())
        for mine, expected in zip(compiled(*arguments), path(*arguments), strict=True):
            assert torch.equal(mine, expected)


def test_functions_know_what_torch_keeps_beside_memory():
    ids, weights, _ = (cuda(x) for x in routing(5, 2, 4))
    aq, scale = torch.randn(5, 128, device="cuda").to(torch.float8_e4m3fn), torch.rand(5, 1, device="cuda")
    call = deep_gemm_utils.deepgemm_moe_permute
    expected = call(aq, scale, ids, 4, None, None)
    lazily = torch.complex(scale, -scale).conj().imag
    found = call(aq, lazily, ids, 4, None, None)
    assert all(torch.equal(mine, its) for mine, its in zip(found[1:4], expected[1:4], strict=True))
    rows, out = torch.randn(expected[0].shape, device="cuda"), torch.zeros(5, 128, device="cuda")
    reduce = deep_gemm_utils.deepgemm_unpermute_and_reduce
    reduce(rows, ids, weights, expected[3], None, out)
    again = torch.zeros_like(out)
    reduce(torch._neg_view(-rows), ids, torch._neg_view(-weights), expected[3], None, again)
    assert torch.equal(again, out)
    with pytest.raises(ValueError, match="output is a view of negative values"):
        reduce(rows, ids, weights, expected[3], None, torch._neg_view(again))
    aq_out = torch.zeros_like(expected[0])
    for target, write in (
        (out, lambda: reduce(rows, ids, weights, expected[3], None, out)),
        (out, lambda: et.unpermute(rows, expected[3], weights, out=out)),
        (aq_out, lambda: call(aq, scale, ids, 4, None, None, aq_out=aq_out)),
    ):
        before = target._version
        write()
        assert target._version > before
        with torch.inference_mode():
            write()
    gradient = torch.zeros(5, 128, device="cuda", requires_grad=True)
    with pytest.raises(ValueError, match="output requires gradients"):
        reduce(rows, ids, weights, expected[3], None, gradient)
    with pytest.warns(UserWarning, match="rows requires gradients, which end here"):
        et.unpermute(rows.clone().requires_grad_(), expected[3], weights)
    with pytest.raises(RuntimeError, match="a trace is being recorded"):
        torch.jit.trace(lambda x: call(x, scale, ids, 4, None, None)[0], (aq,), check_trace=False)
    for shape in ((2**40, 1), (1, 2**40)):
        with pytest.raises(ValueError):
            call(aq[:1].expand(shape[0], 128), scale[:1].expand(shape[0], 1), ids[:1, :1].expand(shape), 4, None, None)
        with pytest.raises(ValueError):
            et.unpermute(rows, expected[3][:1, :1].expand(shape), out=out[:1])


def graph_us(call, calls=20):
    """Microseconds of one call on the device, inside a graph of several."""
    graph, _ = captured(lambda: [call() for _ in range(calls)])
    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return sorted(times)[4]


def test_the_cost_of_a_call_is_printed():
    tokens, topk, experts, hidden = 8, 8, 32, 7168
    ids, weights, _ = routing(tokens, topk, experts)
    ids, weights = ids.cuda(), weights.cuda()
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    sizes = et.sizes(tokens, topk, experts, hidden)
    out = torch.empty(sizes.m_sum, hidden, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty(sizes.scale_words, device="cuda")
    space = torch.empty(sizes.layout_len, dtype=torch.int32, device="cuda")
    rows = torch.randn(sizes.m_sum, hidden, device="cuda").to(torch.bfloat16)
    result = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    aq, aq_scale = x.to(torch.float8_e4m3fn), torch.ones(tokens, hidden // 128, device="cuda")
    inv_perm = et.build_layout(ids, experts).inv_perm
    permuted = deep_gemm_utils.deepgemm_moe_permute(aq, aq_scale, ids, experts, None, None)
    aq_out, mm2 = torch.empty_like(permuted[0]), torch.empty(permuted[0].shape, dtype=torch.bfloat16, device="cuda")
    one = torch.zeros(1, device="cuda")
    operator = torch.ops.expertile.quantize_permute.default
    where = (ids, None, experts, 128, sizes.m_sum)
    calls = {
        "_native.quantize_permute": lambda: _native.quantize_permute(
            x, None, *where, 128, "mn_major", False, False, out, scales, space
        ),
        "torch.ops.expertile.quantize_permute": lambda: operator(
            x, None, *where, 128, "mn_major", False, False, out, scales, space
        ),
        "expertile.torch.quantize_permute, buffers handed in": lambda: et.quantize_permute(
            x, ids, experts, out=out, scales=scales, layout=space
        ),
        "expertile.torch.quantize_permute": lambda: et.quantize_permute(x, ids, experts),
        "expertile.torch.unpermute, out handed in": lambda: et.unpermute(rows, inv_perm, weights, out=result),
        "deep_gemm_utils.deepgemm_moe_permute, aq_out handed in": lambda: deep_gemm_utils.deepgemm_moe_permute(
            aq, aq_scale, ids, experts, None, None, aq_out=aq_out
        ),
        "deep_gemm_utils.deepgemm_moe_permute": lambda: deep_gemm_utils.deepgemm_moe_permute(
            aq, aq_scale, ids, experts, None, None
        ),
        "deep_gemm_utils.deepgemm_unpermute_and_reduce": lambda: deep_gemm_utils.deepgemm_unpermute_and_reduce(
            mm2, ids, weights, permuted[3], None, result
        ),
        "torch: out.copy_(x), one launch": lambda: result.copy_(x),
        "torch: one.fill_(1), one launch": lambda: one.fill_(1),
    }
    print("\nM=8 topk=8 E=32 H=7168: host us per call (not waiting), device us inside a graph")
    for name, call in calls.items():
        print(f"  {name:55} {host_us(call):7.2f} {graph_us(call):7.2f}")


# -- vLLM's order of calls ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_pieces():
    if not GPU_PEER:
        pytest.skip("EXPERTILE_GPU_PEER names no folder with seed/ and deep_gemm/")
    sys.path[:0] = [os.path.join(GPU_PEER, "seed"), GPU_PEER]
    import deep_gemm
    from vllm import fp8_extract
    from vllm.model_executor.layers.fused_moe import deep_gemm_utils as theirs

    yield theirs, deep_gemm, fp8_extract
    expertile.vllm.unpatch()


def quantize(x):
    """e4m3 and float32 scales 1x128 of bf16 rows, in plain torch: the input of both sides."""
    grouped = x.float().view(x.shape[0], -1, 128)
    scale = grouped.abs().amax(2).clamp_min(1e-10) / 448
    return (grouped / scale[:, :, None]).view(x.shape).to(torch.float8_e4m3fn), scale


def random_weights(experts, n, k):
    weights = torch.empty(experts, n, k, dtype=torch.float8_e4m3fn, device="cuda")
    for expert in range(experts):
        weights[expert] = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(experts, n // 128, k // 128, device="cuda") * 0.02 + 0.01
    return weights, scales


@contextlib.contextmanager
def row_tile(deep_gemm, value):
    """vLLM's mk_alignment_scope, which its stand-in pieces lack."""
    before = deep_gemm.get_mk_alignment_for_contiguous_layout()
    deep_gemm.set_mk_alignment_for_contiguous_layout(value)
    try:
        yield
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(before)


def layer(utils, pieces, x, ids, weights, expert_map, w1, w2, psum, out):
    """The calls of vLLM's DeepGemmExperts.apply, in their order."""
    _, deep_gemm, fp8 = pieces
    experts, hidden = w1[0].shape[0], x.shape[1]
    aq, aq_scale = quantize(x)
    m_sum = utils.compute_aligned_M_and_alignment(ids.shape[0], ids.shape[1], experts, 128, None)[0]
    aq_out = torch.empty(m_sum, hidden, dtype=torch.float8_e4m3fn, device="cuda")
    aq_out, scales, layout, inv_perm, alignment = utils.deepgemm_moe_permute(
        aq=aq,
        aq_scale=aq_scale,
        topk_ids=ids,
        local_num_experts=experts,
        expert_map=expert_map,
        expert_tokens_meta=None,
        aq_out=aq_out,
        use_psum_layout=psum,
    )
    options = {"disable_ue8m0_cast": True, **({"use_psum_layout": True} if psum else {})}
    with row_tile(deep_gemm, alignment):
        mm1 = torch.empty(m_sum, w1[0].shape[1], dtype=torch.bfloat16, device="cuda")
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((aq_out, scales), w1, mm1, layout, **options)
        ends = {"expert_ends": layout, "expert_alignment": alignment} if psum else {}
        a2, a2_scale = fp8.silu_mul_per_token_group_quant_fp8_colmajor(mm1, None, False, **ends)
        mm2 = torch.empty(m_sum, hidden, dtype=torch.bfloat16, device="cuda")
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a2, a2_scale), w2, mm2, layout, **options)
    utils.deepgemm_unpermute_and_reduce(
        a=mm2, topk_ids=ids, topk_weights=weights, inv_perm=inv_perm, expert_map=expert_map, output=out
    )
    return out


def differences(mine, expected):
    """1 - 2 sum(xy) / sum(x^2 + y^2), of the whole and of the worst row; zeros on both sides count as equal."""
    mine, expected = mine.double(), expected.double()
    assert torch.isfinite(mine).all() and torch.isfinite(expected).all()
    square = (mine**2 + expected**2).sum(1)
    product = 2 * (mine * expected).sum(1)
    rows = torch.where(square > 0, 1 - product / square, 0.0)
    whole = 1 - product.sum() / square.sum() if square.any() else 0.0
    return float(whole), float(rows.max())


@pytest.mark.parametrize("psum", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize(
    "shape",
    # hidden, intermediate, local experts, topk, global experts
    [(7168, 2048, 32, 8, 256), (4096, 1536, 128, 8, None)],
    ids=["dsv3_ep8", "qwen235"],
)
def test_a_layer_in_vllms_order_gives_vllms_result_eager_and_in_a_graph(vllm_pieces, shape, tokens, psum):
    hidden, intermediate, experts, topk, global_experts = shape
    theirs = vllm_pieces[0]
    torch.manual_seed(0)
    w1, w2 = random_weights(experts, 2 * intermediate, hidden), random_weights(experts, hidden, intermediate)
    ids, weights, expert_map = (cuda(x) for x in routing(tokens, topk, experts, global_experts))
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    arguments = (vllm_pieces, x, ids, weights, expert_map, w1, w2, psum)

    def reference():
        return layer(theirs, *arguments, torch.full_like(x, 7))

    expected = reference()
    mine = layer(deep_gemm_utils, *arguments, torch.full_like(x, 7))
    whole, row = differences(mine, expected)
    print(f"\n  eager: whole {whole:.2e}, worst row {row:.2e}, same bits: {torch.equal(mine, expected)}")
    assert whole < 1e-3 and row < 1e-3

    expertile.vllm.patch()
    try:
        patched = layer(theirs, *arguments, torch.full_like(x, 7))
        assert theirs.deepgemm_moe_permute is deep_gemm_utils.deepgemm_moe_permute
        assert torch.equal(patched, mine)
    finally:
        expertile.vllm.unpatch()

    out = torch.full_like(x, 7)
    graph, _ = captured(lambda: layer(deep_gemm_utils, *arguments, out))
    for seed in (1, 2):
        new_ids, new_weights, _ = routing(tokens, topk, experts, global_experts, seed=seed)
        ids.copy_(new_ids)
        weights.copy_(new_weights)
        x.normal_()
        graph.replay()
        whole, row = differences(out, reference())
        print(f"  graph, routing {seed}: whole {whole:.2e}, worst row {row:.2e}")
        assert whole < 1e-3 and row < 1e-3
