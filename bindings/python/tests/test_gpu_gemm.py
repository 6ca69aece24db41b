"""The grouped GEMM alone on CUDA tensors: against float64, a layer's rows, graphs, streams, errors, calls that wait.

Skips without a Hopper GPU. ``pytest -s`` prints the figures.
"""

import warnings

import pytest

torch = pytest.importorskip("torch")

import expertile  # noqa: E402
import expertile.torch as et  # noqa: E402
from expertile import deep_gemm  # noqa: E402
from on_gpu import captured, host_us, no_hopper  # noqa: E402
from rows_of_experts import Placed, furthest, poisoned, product, weights_of  # noqa: E402

pytestmark = pytest.mark.skipif(no_hopper() is not None, reason=str(no_hopper()))

FORMS = ["bf16", "e4m3"]
COUNTS = [0, 1, 17, 0, 300, 3, 64, 129]
TOLERANCE = 1e-5
"""The contract's for bfloat16; of e4m3 the operands are the same, so that only the order of the sums is another."""


def cuda(*tensors):
    return [x if x is None else x.cuda() for x in tensors]


def mn_major(scale):
    """Scales where the kernels read them: strides (1, round_up(M_sum, 4))."""
    m_sum, groups = scale.shape
    return torch.empty_strided((m_sum, groups), (1, -(-m_sum // 4) * 4), device=scale.device).copy_(scale)


def gemm_of(weights, weight_scale, max_rows=4096):
    gemm = et.Gemm(*cuda(weights, weight_scale))
    gemm.prepare(max_rows)
    return gemm


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), [(8, 128), (200, 256), (520, 2880), (1024, 1040)])
def test_results_are_the_product_and_padding_is_not_written(form, n, k):
    weights, weight_scale = weights_of(form, len(COUNTS), n, k)
    gemm = gemm_of(weights, weight_scale)
    for alignment in (1, 2, 4, 128):
        placed = Placed(form, COUNTS, k, alignment, more=5)
        expected = product(placed, weights, weight_scale)
        placed.to("cuda")
        for listed in ("psum", "m_indices"):
            out = poisoned(*expected.shape, device="cuda")
            assert gemm(placed.rows, placed.scale, **placed.listed(listed), out=out) is out
            assert furthest(out[placed.live], expected[placed.live.cpu()]) < TOLERANCE
            assert torch.all(out[~placed.live] == 123.0)
    gemm.check()


def mxfp4_weights(n, k):
    """Blocks, and scales that keep sums of their products near 1."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (len(COUNTS), n, k // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(120, 123, (len(COUNTS), n, k // 32), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), [(8, 128), (200, 320)])
def test_mxfp4_weights_give_the_products_of_the_cpu(form, n, k):
    blocks, scales = mxfp4_weights(n, k)
    on_cpu = et.Gemm(blocks, scales)
    with pytest.warns(
        UserWarning, match=f"weights are MXFP4: the object holds a copy of them, arranged for {form} rows"
    ):
        gemm = et.Gemm(*cuda(blocks, scales), activations=form)
    assert gemm.shape == (len(COUNTS), n, k)
    gemm.prepare(4096)
    for alignment in (1, 8):
        placed = Placed(form, COUNTS, k, alignment, more=5)
        expected = on_cpu(placed.rows, placed.scale, **placed.listed("m_indices"))
        placed.to("cuda")
        for listed in ("psum", "m_indices"):
            out = poisoned(len(placed.rows), n, device="cuda")
            assert gemm(placed.rows, placed.scale, **placed.listed(listed), out=out) is out
            assert furthest(out[placed.live], expected[placed.live.cpu()].double()) < 1e-4
            assert torch.all(out[~placed.live] == 123.0)
    gemm.check()


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), [(8, 128), (200, 320)])
def test_int4_weights_give_the_products_of_the_cpu(form, n, k, scale_dtype):
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31, (len(COUNTS), n, k // 8), generator=generator).to(torch.int32)
    scales = (torch.rand(len(COUNTS), n, k // 32, generator=generator) / 64).to(scale_dtype)
    on_cpu = et.Gemm(words, scales)
    with pytest.warns(UserWarning, match=f"weights are int4: the object holds a copy of them, .* for {form} rows"):
        gemm = et.Gemm(*cuda(words, scales), activations=form)
    gemm.prepare(4096)
    placed = Placed(form, COUNTS, k, 8, more=5)
    expected = on_cpu(placed.rows, placed.scale, **placed.listed("m_indices"))
    placed.to("cuda")
    out = poisoned(len(placed.rows), n, device="cuda")
    gemm(placed.rows, placed.scale, **placed.listed("psum"), out=out)
    assert furthest(out[placed.live], expected[placed.live.cpu()].double()) < 1e-4
    assert torch.all(out[~placed.live] == 123.0)
    gemm.check()


def test_mxfp4_weights_that_do_not_fit_are_refused():
    blocks, scales = cuda(*mxfp4_weights(64, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, message, arguments, options in (
            (ValueError, "weight_scale is None, expected scales for the uint8 blocks of weights", (blocks,), {}),
            (ValueError, r"weight_scale has shape \[8, 64, 3\]", (blocks, scales[:, :, :3]), {}),
            (ValueError, 'activations is "int8", expected one of', (blocks, scales), {"activations": "int8"}),
            (ValueError, "weight_scale is on the CPU", (blocks, scales.cpu()), {}),
        ):
            with pytest.raises(kind, match=message):
                et.Gemm(*arguments, **options)
        gemm = et.Gemm(blocks, scales)
    gemm.prepare(4096)
    placed = Placed("e4m3", COUNTS, 128, 8).to("cuda")
    expected = "rows has dtype torch.float8_e4m3fn, expected bf16, for which the weights are arranged"
    with pytest.raises(TypeError, match=expected):
        gemm(placed.rows, placed.scale, **placed.listed("psum"))
    bf16, _ = weights_of("bf16", 2, 8, 128)
    with pytest.raises(ValueError, match='activations is "e4m3", expected "bf16"'):
        et.Gemm(bf16.cuda(), activations="e4m3")


@pytest.mark.parametrize("form", FORMS)
def test_a_rows_bits_are_the_same_in_every_place_and_by_every_kernel(form):
    n, k = 384, 1024
    weights, weight_scale = weights_of(form, len(COUNTS), n, k)
    gemm = gemm_of(weights, weight_scale, 1 << 17)
    placed = Placed(form, COUNTS, k, 8).to("cuda")
    expected = gemm(placed.rows, placed.scale, psum=placed.psum, alignment=8)[placed.live]
    for alignment in (1, 3, 4, 64, 128):
        moved = Placed(form, COUNTS, k, alignment).to("cuda")
        scales = [None] if form == "bf16" else [moved.scale, mn_major(moved.scale)]
        for scale in scales:
            for listed in ("psum", "m_indices"):
                for expected_rows in (None, 1, 64, 1000, 10_000, 100_000):
                    out = gemm(moved.rows, scale, **moved.listed(listed), expected_rows=expected_rows)
                    assert torch.equal(out[moved.live], expected), (alignment, listed, expected_rows)
    order = torch.randperm(len(placed.rows), device="cuda")
    rows, scale = placed.rows[order], None if placed.scale is None else placed.scale[order]
    out = torch.empty(len(order), n, dtype=torch.bfloat16, device="cuda")
    out[order] = gemm(rows, scale, m_indices=placed.m_indices[order])
    assert torch.equal(out[placed.live], expected)
    gemm.check()


@pytest.mark.parametrize("form", FORMS)
def test_a_layers_steps_around_two_gemms_give_its_results(form):
    """Of one slot a token; e4m3 up to the activation, which these tests have no step for."""
    experts, hidden, intermediate, tokens = 6, 512, 256, 333
    w13, w13_scale = weights_of(form, experts, 2 * intermediate, hidden, 1)
    w2, w2_scale = weights_of(form, experts, hidden, intermediate, 2)
    w13, w13_scale, w2, w2_scale = cuda(w13, w13_scale, w2, w2_scale)
    layer = et.Layer(w13, w2, w13_scale=w13_scale, w2_scale=w2_scale)
    layer.prepare(1024, 1, ids_dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().cuda()
    ids = torch.randint(experts, (tokens, 1), generator=generator).cuda()
    expected = layer(x, ids, torch.ones(tokens, 1, device="cuda"))
    up, down = (et.Gemm(*pair) for pair in ((w13, w13_scale), (w2, w2_scale)))
    up.prepare(4096)
    down.prepare(4096)
    if form == "bf16":
        rows, _, layout = et.permute_rows(x, ids, experts, alignment=64)
        gate, high = up(rows, psum=layout.psum, alignment=64).chunk(2, 1)
        activated = (high.float() * (gate.float() / (1 + torch.exp(-gate.float())))).bfloat16()
        out = down(activated, psum=layout.psum, alignment=64)
        mine = et.unpermute(out, layout.inv_perm)
        assert furthest(mine, expected) < 1e-4
        return
    rows, scales, layout = et.quantize_permute(x, ids, experts, alignment=64)
    gate_up = up(rows, scales, psum=layout.psum, alignment=64)
    again = up(rows, scales, m_indices=layout.m_indices)
    live = layout.m_indices >= 0
    assert torch.equal(gate_up[live], again[live])


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_replays_a_call_on_new_rows_and_new_lists(form):
    n, k = 256, 512
    weights, weight_scale = weights_of(form, len(COUNTS), n, k)
    gemm = gemm_of(weights, weight_scale)
    first = Placed(form, COUNTS, k, 128).to("cuda")
    for listed in ("psum", "m_indices"):
        rows, scale, given = first.rows.clone(), first.scale, first.listed(listed)
        scale = None if scale is None else scale.clone()
        given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        graph, out = captured(lambda: gemm(rows, scale, **given))  # noqa: B023
        for counts in (COUNTS, COUNTS[::-1], [0] * len(COUNTS), [1] * len(COUNTS)):
            placed = Placed(form, counts, k, 128, seed=sum(counts)).to("cuda")
            m_sum = len(placed.rows)
            rows.view(torch.uint8).zero_()
            rows.view(torch.uint8)[:m_sum] = placed.rows.view(torch.uint8)
            if scale is not None:
                scale[:m_sum] = placed.scale
            if listed == "psum":
                given["psum"].copy_(placed.psum)
            else:
                given["m_indices"].fill_(-1)[:m_sum] = placed.m_indices
            out.fill_(123.0)
            graph.replay()
            expected = gemm(placed.rows, placed.scale, **placed.listed(listed))
            assert torch.equal(out[:m_sum][placed.live], expected[placed.live])
            assert torch.all(out[:m_sum][~placed.live] == 123.0) and torch.all(out[m_sum:] == 123.0)
    gemm.check()


def test_calls_of_many_streams_do_not_meet():
    n, k = 512, 1024
    weights, weight_scale = weights_of("e4m3", len(COUNTS), n, k)
    gemm = gemm_of(weights, weight_scale)
    cases = [Placed("e4m3", COUNTS, k, 8, seed=seed).to("cuda") for seed in range(6)]
    expected = [gemm(x.rows, x.scale, psum=x.psum, alignment=8) for x in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        found = []
        for stream, x in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                found.append(gemm(x.rows, x.scale, psum=x.psum, alignment=8))
        torch.cuda.synchronize()
        for x, mine, other in zip(cases, found, expected, strict=True):
            assert torch.equal(mine[x.live], other[x.live])


def test_what_a_list_says_wrong_is_raised_by_check_and_nothing_else_is_written():
    n, k = 128, 256
    weights, weight_scale = weights_of("e4m3", 4, n, k)
    gemm = gemm_of(weights, weight_scale)
    placed = Placed("e4m3", [5, 9, 0, 40], k, 8).to("cuda")
    expected = gemm(placed.rows, placed.scale, psum=placed.psum, alignment=8)
    for ids, row in (([4, 9, 2**31 - 1], 6), ([7], 0)):
        m_indices = placed.m_indices.clone()
        m_indices[row : row + len(ids)] = torch.tensor(ids, dtype=torch.int32)
        out = poisoned(len(placed.rows), n, "cuda")
        gemm(placed.rows, placed.scale, m_indices=m_indices, out=out)
        with pytest.raises(ValueError, match=rf"m_indices\[{row}\] is {ids[0]}, expected a local expert below 4"):
            gemm.check()
        gemm.check()
        live = (m_indices >= 0) & (m_indices < 4)
        assert torch.equal(out[live], expected[live]) and torch.all(out[~live] == 123.0)
    for psum, start in (
        ([5, 17, 3, 64], r"psum\[2\] is 3, expected at least the start"),
        ([5, 17, 24, 1000], r"psum\[3\] is 1000, expected no more than there are rows"),
        ([-(2**31), 2**31 - 1, 0, -1], r"psum\[0\] is -2147483648"),
    ):
        out = poisoned(len(placed.rows), n, "cuda")
        list_ = torch.tensor(psum, dtype=torch.int32, device="cuda")
        gemm(placed.rows, placed.scale, psum=list_, alignment=8, out=out)
        with pytest.raises(ValueError, match=start):
            gemm.check()


def test_what_the_host_sees_is_refused_at_once():
    n, k = 128, 256
    weights, weight_scale = cuda(*weights_of("e4m3", 4, n, k))
    gemm = et.Gemm(weights, weight_scale)
    placed = Placed("e4m3", [5, 9, 0, 40], k, 8).to("cuda")
    m_sum = len(placed.rows)
    given = {"rows": placed.rows, "scale": placed.scale, "psum": placed.psum, "alignment": 8}
    with pytest.raises(ValueError, match=rf"rows has {m_sum} rows, expected prepare\(max_rows\) to have been called"):
        gemm(**given)
    gemm.prepare(m_sum)
    gemm(**given)
    more = torch.cat([placed.rows.view(torch.uint8)] * 2).view(torch.float8_e4m3fn)
    cases = [
        (ValueError, {"rows": more, "scale": torch.cat([placed.scale] * 2)}, "rows has .* expected at most"),
        (TypeError, {"rows": placed.rows.bfloat16(), "scale": None}, "rows has dtype torch.bfloat16, expected that of"),
        (ValueError, {"rows": placed.rows.cpu()}, "rows is on the CPU"),
        (ValueError, {"psum": placed.psum.cpu()}, "psum is on the CPU"),
        (ValueError, {"psum": torch.cat([placed.psum] * 2)[::2]}, "psum has strides"),
        (ValueError, {"alignment": 0}, "alignment is 0"),
        (
            ValueError,
            {"out": gemm._weights.view(torch.bfloat16).view(-1)[: m_sum * n].view(m_sum, n)},
            "out shares memory",
        ),
        (ValueError, {"out": poisoned(m_sum, 2 * n, "cuda")[:, :n]}, "out has strides"),
        (ValueError, {"expected_rows": -1}, "expected_rows is -1"),
    ]
    for error, changed, match in cases:
        with pytest.raises(error, match=match) as found:
            gemm(**(given | changed))
        assert isinstance(found.value, expertile.ArgumentError)
    for shape, match in (((4, 12, 256), "n is 12"), ((4, 16, 24), "k is 24")):
        small = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(ValueError, match=match):
            et.Gemm(small).prepare(64)
    gemm.check()


@pytest.mark.parametrize("form", FORMS)
def test_deep_gemms_functions_give_the_same_bits(form):
    n, k = 256, 512
    weights, weight_scale = weights_of(form, len(COUNTS), n, k)
    gemm = gemm_of(weights, weight_scale)
    weights, weight_scale = cuda(weights, weight_scale)
    placed = Placed(form, COUNTS, k, 128).to("cuda")
    expected = poisoned(len(placed.rows), n, "cuda")
    gemm(placed.rows, placed.scale, psum=placed.psum, out=expected)

    def call(d, layout, **options):
        if form == "bf16":
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(placed.rows, weights, d, layout, **options)
        else:
            a, b = (placed.rows, placed.scale), (weights, weight_scale)
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, **options)

    for layout, options in (
        (placed.m_indices, {}),
        (placed.psum, {"use_psum_layout": True}),
        (placed.psum, {"use_psum_layout": True, "expected_m_for_psum_layout": 3}),
    ):
        d = poisoned(len(placed.rows), n, "cuda")
        call(d, layout, **options)
        assert torch.equal(d, expected)
        wide = poisoned(len(placed.rows), 2 * n, "cuda")
        call(wide[:, n:], layout, **options)
        assert torch.equal(wide[:, n:], expected) and torch.all(wide[:, :n] == 123.0)
        d = poisoned(len(placed.rows), n, "cuda")
        graph, _ = captured(lambda: call(d, layout, **options))  # noqa: B023
        d.fill_(123.0)
        graph.replay()
        assert torch.equal(d, expected)
    deep_gemm.check()


def test_no_tensor_is_held_and_memory_that_is_used_again_is_read_again():
    n, k = 256, 512
    placed = Placed("bf16", COUNTS, k, 128).to("cuda")
    addresses = set()
    for seed in range(6):
        weights = weights_of("bf16", len(COUNTS), n, k, seed)[0].cuda()
        addresses.add(weights.data_ptr())
        d = poisoned(len(placed.rows), n, "cuda")
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(placed.rows, weights, d, placed.m_indices)
        gemm = et.Gemm(weights)
        gemm.prepare(2048)
        assert torch.equal(d[placed.live], gemm(placed.rows, m_indices=placed.m_indices)[placed.live])
        before = torch.cuda.memory_allocated()
        size = weights.untyped_storage().nbytes()
        del gemm, weights
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before - size
    assert len(addresses) < 6


def test_a_call_waits_for_nothing():
    n, k, experts = 256, 1024, 16
    weights, weight_scale = weights_of("e4m3", experts, n, k)
    gemm = gemm_of(weights, weight_scale, 8192)
    # What torch's allocator has, it need not ask the driver for, which may wait.
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for rows in (1, 2, 16, 100, 1000, 4096, 8192):
        counts = [rows // experts + (expert < rows % experts) for expert in range(experts)]
        placed = Placed("e4m3", counts, k, 1).to("cuda")
        # Behind a kernel that takes long: a call that waited would take as long.
        torch.cuda.synchronize()
        done = torch.cuda.Event()
        torch.cuda._sleep(200_000_000)
        done.record()
        gemm(placed.rows, placed.scale, psum=placed.psum, alignment=1)
        gemm(placed.rows, placed.scale, m_indices=placed.m_indices)
        assert not done.query(), f"a call of {rows} rows waited"
        torch.cuda.synchronize()
    placed = Placed("e4m3", [8] * experts, k, 8).to("cuda")
    scale = mn_major(placed.scale)
    for listed in ("psum", "m_indices"):
        given = placed.listed(listed)
        took = host_us(lambda: gemm(placed.rows, scale, **given))  # noqa: B023
        print(f"a call by {listed} costs the host {took:.1f} us")


def test_many_rows_go_past_two_to_the_31_bytes():
    """Results of more than 4 GiB, if the device has room."""
    experts, n, k, m_sum = 4, 8192, 256, 300_000
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of memory are free")
    weights, weight_scale = weights_of("e4m3", experts, n, k)
    gemm = gemm_of(weights, weight_scale, m_sum)
    rows = torch.randn(m_sum, k, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(m_sum, k // 128, device="cuda") + 0.5
    m_indices = torch.arange(m_sum, device="cuda", dtype=torch.int32).div(m_sum // experts + 1, rounding_mode="floor")
    out = gemm(rows, scale, m_indices=m_indices.int())
    last = slice(m_sum - 64, m_sum)
    alone = gemm(rows[last].clone(), scale[last].clone(), m_indices=m_indices[last].int())
    assert torch.equal(out[last], alone)
