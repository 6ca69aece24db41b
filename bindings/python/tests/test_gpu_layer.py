"""The whole layer on CUDA tensors: the CPU layer's values, graphs, compiled code, errors, the cost of a call.

Skips without a Hopper GPU. ``pytest -s`` prints the figures.
"""

import warnings

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402
from on_gpu import captured, host_us, no_hopper  # noqa: E402

pytestmark = pytest.mark.skipif(no_hopper() is not None, reason=str(no_hopper()))


def weights(experts, hidden, intermediate, form, seed=0):
    """w13 and w2 with their scales, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(experts, hidden, intermediate, generator=generator) / intermediate**0.5
    if form == "bf16":
        return {"w13": w13.bfloat16(), "w2": w2.bfloat16()}
    scales = [
        torch.rand(x.shape[0], x.shape[1] // 128, x.shape[2] // 128, generator=generator) * 0.02 + 0.005
        for x in (w13, w2)
    ]
    w13, w2 = ((x * 40).clamp(-448, 448).to(torch.float8_e4m3fn) for x in (w13, w2))
    return {"w13": w13, "w2": w2, "w13_scale": scales[0], "w2_scale": scales[1]}


def inputs(tokens, topk, experts, hidden, seed=0, ids_dtype=torch.int64, dtype=torch.bfloat16):
    """Hidden states, distinct ids with some empty slots, router weights, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, experts, generator=generator).topk(topk).indices.to(ids_dtype)
    ids[torch.rand(ids.shape, generator=generator) < 0.05] = -1
    router = torch.rand(tokens, topk, generator=generator)
    return x.cuda(), ids.cuda(), router.cuda()


def on_gpu(parts):
    return {name: x.cuda() for name, x in parts.items()}


def distance(mine, expected):
    mine, expected = mine.cpu().double(), expected.double()
    return float((mine - expected).norm() / expected.norm().clamp_min(1e-30))


FORMS = ["bf16", "e4m3"]
TOLERANCE = {"bf16": 5e-3, "e4m3": 2e-2}
"""Another order of sums, and what it does to values on the edge between two of e4m3."""


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("experts", "topk", "hidden", "intermediate"), [(8, 2, 512, 384), (64, 8, 1024, 256), (3, 1, 256, 128)]
)
def test_results_are_those_of_the_cpu(experts, topk, hidden, intermediate, form, ids_dtype):
    parts = weights(experts, hidden, intermediate, form)
    expected = et.Layer(**parts, activations=form)
    layer = et.Layer(**on_gpu(parts))
    assert (layer.local_experts, layer.hidden, layer.intermediate) == (experts, hidden, intermediate)
    layer.prepare(1024, topk, ids_dtype=ids_dtype)
    for tokens in (0, 1, 7, 64, 300, 1024):
        arguments = inputs(tokens, topk, experts, hidden, tokens, ids_dtype)
        mine = layer(*arguments)
        assert (mine.shape, mine.dtype, mine.device.type) == ((tokens, hidden), torch.bfloat16, "cuda")
        assert tokens == 0 or distance(mine, expected(*(x.cpu() for x in arguments))) < TOLERANCE[form]
        # Poisoned memory to write to, and to work in.
        out = torch.full_like(mine, float("nan"))
        space = torch.full((layer.workspace_bytes(tokens, topk) + 256,), 0xFF, dtype=torch.uint8, device="cuda")
        assert layer(*arguments, out=out, workspace=space) is out and torch.equal(out, mine)
    layer.check()


def test_a_tokens_bits_do_not_depend_on_the_others():
    parts = weights(16, 512, 256, "e4m3")
    layer = et.Layer(**on_gpu(parts))
    layer.prepare(2048, 4)
    x, ids, router = inputs(2048, 4, 16, 512)
    whole = layer(x, ids, router)
    for first, last in ((0, 1), (5, 12), (100, 400), (0, 2047)):
        assert torch.equal(layer(x[first:last], ids[first:last], router[first:last]), whole[first:last])


def test_an_expert_map_other_types_and_weights_on_the_input():
    parts = weights(4, 512, 256, "e4m3")
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[[3, 5, 8, 15]] = torch.arange(4, dtype=torch.int32)
    for topk, weight_on_input in ((4, False), (1, True)):
        options = {"weight_on_input": weight_on_input, "alpha": 1.702, "beta": 1.0, "limit": 7.0}
        expected = et.Layer(**parts, activations="e4m3", **options)
        layer = et.Layer(**on_gpu(parts), **options)
        for dtype, out_dtype in ((torch.float16, None), (torch.bfloat16, torch.float32)):
            layer.prepare(64, topk, global_experts=16, dtype=dtype, out_dtype=out_dtype)
            x, ids, router = inputs(64, topk, 16, 512, dtype=dtype)
            mine = layer(x, ids, router, expert_map=expert_map.cuda(), dtype=out_dtype)
            its = expected(x.cpu(), ids.cpu(), router.cpu(), expert_map=expert_map, dtype=out_dtype)
            assert mine.dtype == its.dtype and distance(mine, its) < TOLERANCE["e4m3"]


def test_inputs_may_be_views_of_wider_tensors():
    layer = et.Layer(**on_gpu(weights(8, 512, 256, "e4m3")))
    layer.prepare(64, 2)
    x, ids, router = inputs(64, 2, 8, 512)
    expected = layer(x, ids, router)
    wide = torch.full((64, 1024), float("nan"), dtype=torch.bfloat16, device="cuda")
    wide[:, 256:768] = x
    many = torch.full((64, 9), float("nan"), device="cuda")
    many[:, 3:5] = router
    strided_ids = ids.mT.contiguous().mT
    assert torch.equal(layer(wide[:, 256:768], strided_ids, many[:, 3:5]), expected)
    one = layer(x[:1].expand(64, 512), ids[:1].expand(64, 2), router[:1].expand(64, 2))
    assert torch.equal(one, expected[:1].expand(64, 512))
    layer.check()


def test_weights_are_used_where_they_are_and_kept_alive():
    parts = on_gpu(weights(8, 1024, 512, "e4m3"))
    before = torch.cuda.memory_allocated()
    layer = et.Layer(**parts)
    assert torch.cuda.memory_allocated() == before
    layer.prepare(16, 2)
    arguments = inputs(16, 2, 8, 1024)
    first = layer(*arguments)
    parts["w2_scale"].mul_(2)
    assert torch.equal(layer(*arguments), first * 2)
    parts.clear()
    torch.cuda.empty_cache()
    assert torch.equal(layer(*arguments), first * 2)
    assert torch.cuda.memory_allocated() >= before
    del layer
    torch.cuda.synchronize()


def test_what_cannot_be_used_in_place_is_copied_with_a_warning():
    parts = on_gpu(weights(4, 256, 128, "e4m3"))
    exact = {**parts, "w13_scale": parts["w13_scale"].bfloat16().float()}
    turned = {**exact, "w13_scale": exact["w13_scale"].bfloat16(), "w2": parts["w2"].mT.contiguous().mT}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = et.Layer(**exact)
    with pytest.warns(UserWarning) as seen:
        layer = et.Layer(**turned)
    assert [str(warning.message).split(":")[0] for warning in seen] == [
        "w2 is not contiguous",
        "w13_scale is torch.bfloat16",
    ]
    arguments = inputs(8, 2, 4, 256)
    for each in (layer, expected):
        each.prepare(8, 2)
    assert torch.equal(layer(*arguments), expected(*arguments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_captured_calls_replay_with_changed_inputs(tokens, form):
    layer = et.Layer(**on_gpu(weights(16, 512, 256, form)))
    layer.prepare(1000, 4)
    static = inputs(tokens, 4, 16, 512)
    graph, (first, second) = captured(lambda: (layer(*static), layer(*static)))
    for seed in range(3):
        for mine, new in zip(static, inputs(tokens, 4, 16, 512, seed), strict=True):
            mine.copy_(new)
        graph.replay()
        expected = layer(*static)
        assert torch.equal(first, expected) and torch.equal(second, expected)
    static[1][0, 0] = 16
    graph.replay()
    with pytest.raises(ValueError, match=r"topk_ids\[0, 0\] is 16, expected an id below 16"):
        layer.check()
    layer.check()


def test_more_captured_calls_than_there_are_states():
    layer = et.Layer(**on_gpu(weights(4, 256, 128, "bf16")))
    layer.prepare(4, 2)
    static = inputs(4, 2, 4, 256)
    expected = layer(*static)
    graph, results = captured(lambda: [layer(*static) for _ in range(520)])
    graph.replay()
    assert all(torch.equal(result, expected) for result in results)


def test_streams_do_not_wait_for_each_other_and_do_not_disturb_each_other():
    layer = et.Layer(**on_gpu(weights(16, 512, 256, "e4m3")))
    layer.prepare(512, 4)
    cases = [inputs(tokens, 4, 16, 512, tokens) for tokens in (512, 64, 300, 1)]
    expected = [layer(*case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found = [[] for _ in cases]
    for _ in range(20):
        for stream, case, results in zip(streams, cases, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(layer(*case))
    torch.cuda.synchronize()
    for results, its in zip(found, expected, strict=True):
        assert all(torch.equal(result, its) for result in results)


def test_compiled_code_calls_it():
    layer = et.Layer(**on_gpu(weights(16, 512, 256, "e4m3")))
    layer.prepare(64, 4)

    def half(x, ids, router):
        return layer(x * 2, ids, router) + 1

    compiled = torch.compile(half, fullgraph=True)
    for tokens in (12, 40):
        arguments = inputs(tokens, 4, 16, 512)
        assert torch.equal(compiled(*arguments), half(*arguments))


def test_bad_calls_say_what_is_wrong_and_write_nothing():
    parts = on_gpu(weights(8, 512, 256, "e4m3"))
    layer = et.Layer(**parts)
    x, ids, router = inputs(8, 2, 8, 512)
    with pytest.raises(ValueError, match=r"topk is 2, expected prepare\(max_tokens, topk\) to have been called for it"):
        layer(x, ids, router)
    layer.prepare(8, 2, ids_dtype=torch.int64)
    out = torch.full_like(x, 7)
    space = torch.zeros(layer.workspace_bytes(8, 2), dtype=torch.uint8, device="cuda")
    map_ = torch.zeros(16, dtype=torch.int32, device="cuda")
    as_prepared = "as prepare\\(\\) was told"
    cases = [
        (ValueError, "topk is 1, expected what prepare", (x, ids[:, :1], router[:, :1]), {}),
        (TypeError, f"topk_ids has dtype i32, expected i64, {as_prepared}", (x, ids.int(), router), {}),
        (TypeError, f"hidden_states has dtype f16, expected bf16, {as_prepared}", (x.half(), ids, router), {}),
        (TypeError, "hidden_states is torch.float64", (x.double(), ids, router), {}),
        (ValueError, "hidden_states has 9 tokens, expected at most 8", inputs(9, 2, 8, 512), {"out": None}),
        (ValueError, "global_experts is 16", (x, ids, router), {"expert_map": map_}),
        (ValueError, r"hidden_states has shape \[8, 256\]", (x[:, :256], ids, router), {}),
        (ValueError, r"hidden_states has strides", (x.mT.contiguous().mT, ids, router), {}),
        (ValueError, r"topk_weights has shape \[7, 2\]", (x, ids, router[:7]), {}),
        (TypeError, "topk_weights has dtype torch.float64", (x, ids, router.double()), {}),
        (ValueError, "topk_weights is on the CPU", (x, ids, router.cpu()), {}),
        (ValueError, "hidden_states is on the CPU, expected cuda:0", (x.cpu(), ids, router), {}),
        (ValueError, "workspace holds", (x, ids, router), {"workspace": space[:-256]}),
        (ValueError, "workspace starts at address", (x, ids, router), {"workspace": torch.cat([space, space])[1:]}),
        (ValueError, "workspace is on the CPU", (x, ids, router), {"workspace": space.cpu()}),
        (ValueError, r"out has shape \[8, 256\]", (x, ids, router), {"out": x[:, :256].clone()}),
        (ValueError, "out shares memory with hidden_states", (x, ids, router), {"out": x}),
        (
            ValueError,
            "workspace shares memory with the weights",
            (x, ids, router),
            {"workspace": parts["w13"].view(torch.uint8).flatten()},
        ),
    ]
    for kind, message, arguments, options in cases:
        with pytest.raises(kind, match=message):
            layer(*arguments, **{"out": out, **options})
    assert (out == 7).all()
    with pytest.raises(ValueError, match='activations is "bf16", expected "e4m3"'):
        et.Layer(**parts, activations="bf16")
    with pytest.raises(ValueError, match="w13_scale is None"):
        et.Layer(parts["w13"], parts["w2"])
    with pytest.raises(ValueError, match="w2 is on the CPU"):
        et.Layer(**{**parts, "w2": parts["w2"].cpu()})
    with pytest.raises(ValueError, match="intermediate is 192"):
        bad = torch.zeros(8, 384, 512, device="cuda").to(torch.float8_e4m3fn)
        et.Layer(
            bad, bad[:, :192].mT.contiguous(), w13_scale=torch.ones(8, 3, 4).cuda(), w2_scale=torch.ones(8, 4, 2).cuda()
        )
    with pytest.raises(ValueError, match="topk is 40"):
        layer.prepare(8, 40)


def test_a_state_dict_of_experts():
    parts = weights(4, 256, 128, "e4m3")
    state = {}
    for expert in range(4):
        for name, stack, rows in (("gate", "w13", 0), ("up", "w13", 1), ("down", "w2", 0)):
            rows = slice(rows * 128, rows * 128 + (256 if stack == "w2" else 128))
            blocks = slice(rows.start // 128, rows.stop // 128)
            state[f"e.{expert}.{name}_proj.weight"] = parts[stack][expert, rows]
            state[f"e.{expert}.{name}_proj.weight_scale_inv"] = parts[f"{stack}_scale"][expert, blocks]
    whole, some = et.Layer(**on_gpu(parts)), et.Layer.from_state_dict(state, "e.", experts=[2, 0], device="cuda")
    assert (some.device.type, some.local_experts) == ("cuda", 2)
    whole.prepare(8, 1)
    some.prepare(8, 1)
    x, _, router = inputs(8, 1, 4, 256)
    theirs = torch.tensor([[0], [2]] * 4, device="cuda")
    mine = torch.tensor([[1], [0]] * 4, device="cuda")
    assert torch.equal(some(x, mine, router), whole(x, theirs, router))


def test_the_cost_of_a_call_is_printed():
    layer = et.Layer(**on_gpu(weights(8, 512, 256, "e4m3")))
    layer.prepare(8, 2)
    for tokens in (0, 8):
        arguments = inputs(tokens, 2, 8, 512)
        out = torch.empty(tokens, 512, dtype=torch.bfloat16, device="cuda")
        space = torch.empty(layer.workspace_bytes(8, 2), dtype=torch.uint8, device="cuda")
        made = host_us(lambda args=arguments: layer(*args))
        given = host_us(lambda args=arguments, out=out, space=space: layer(*args, out=out, workspace=space))
        launches = "no launches" if tokens == 0 else "with its launches"
        print(f"host time of a call of {tokens} tokens, {launches}: {made:.1f} us, {given:.1f} us in memory handed in")
