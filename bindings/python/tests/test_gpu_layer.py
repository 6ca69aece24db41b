"""The whole layer on CUDA tensors: the CPU layer's values, graphs, compiled code, errors, the cost of a call.

Skips without a Hopper GPU. ``pytest -s`` prints the figures.
"""

import warnings

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402
from four_bits import has_4_bits, weights_of_4_bits  # noqa: E402
from on_gpu import captured, host_us, no_hopper  # noqa: E402

pytestmark = pytest.mark.skipif(no_hopper() is not None, reason=str(no_hopper()))


def weights(experts, hidden, intermediate, form, seed=0):
    """w13 and w2 with their scales, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    if has_4_bits(form):
        return weights_of_4_bits(experts, hidden, intermediate, form, generator)
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


def biases(experts, hidden, intermediate, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    w13, w2 = (torch.randn(experts, width, generator=generator) for width in (2 * intermediate, hidden))
    return {"w13_bias": w13.to(dtype), "w2_bias": w2.to(dtype)}


def activations_of(form):
    """The rows that weights of a form are multiplied by."""
    return "e4m3" if form.endswith("x e4m3") else "bf16" if has_4_bits(form) else form


def layer_of(parts, form, **options):
    """A layer on the GPU, which of MXFP4 and int4 says that it holds a copy."""
    options = {"activations": activations_of(form), **on_gpu(parts), **options}
    if not has_4_bits(form):
        return et.Layer(**options)
    name = "int4" if form.startswith("int4") else "MXFP4"
    with pytest.warns(UserWarning, match=f"w13 and w2 are {name}: .* arranged for {options['activations']} rows"):
        return et.Layer(**options)


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


FORMS = ["bf16", "e4m3", "mxfp4", "mxfp4 x e4m3", "int4", "int4 x e4m3"]
TOLERANCE = {"bf16": 5e-3, "e4m3": 2e-2, "mxfp4": 5e-3, "mxfp4 x e4m3": 2e-2, "int4": 5e-3, "int4 x e4m3": 2e-2}
"""Another order of sums, and what it does to values on the edge between two of e4m3."""


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("experts", "topk", "hidden", "intermediate"), [(8, 2, 512, 384), (64, 8, 1024, 256), (3, 1, 256, 128)]
)
def test_results_are_those_of_the_cpu(experts, topk, hidden, intermediate, form, ids_dtype):
    parts = weights(experts, hidden, intermediate, form)
    expected = et.Layer(**parts, activations=activations_of(form))
    layer = layer_of(parts, form)
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


GPT_OSS = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}


@pytest.mark.parametrize("gate_up", ["halves", "interleaved"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("experts", "topk", "hidden", "intermediate"), [(6, 2, 320, 192), (4, 4, 2880, 2880)])
def test_layers_as_gpt_oss_has_them(experts, topk, hidden, intermediate, form, gate_up):
    """Biases, the clamped activation, and sizes that 128 does not divide where the weights have no blocks of 128."""
    if form == "e4m3":
        hidden, intermediate = 384, 256
    parts = {**weights(experts, hidden, intermediate, form), **biases(experts, hidden, intermediate)}
    options = {"gate_up": gate_up, **GPT_OSS}
    expected = et.Layer(**parts, activations=activations_of(form), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = et.Layer(**on_gpu(parts), activations=activations_of(form), **options)
    layer.prepare(256, topk)
    for tokens in (1, 33, 256):
        arguments = inputs(tokens, topk, experts, hidden, tokens)
        its = expected(*(x.cpu() for x in arguments))
        assert distance(layer(*arguments), its) < TOLERANCE[form]
    layer.check()
    for order in ("halves", "interleaved"):
        mine, its = layer.unpack(gate_up=order), expected.unpack(gate_up=order)
        for found, kept in zip(mine, its, strict=True):
            assert found.is_cuda and torch.equal(found.cpu().view(torch.uint8), kept.view(torch.uint8))


@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 384), (320, 192)])
def test_a_copy_in_e4m3_gives_the_same_bits(hidden, intermediate):
    parts = {**weights(6, hidden, intermediate, "mxfp4"), **biases(6, hidden, intermediate)}
    alone, copied = (layer_of(parts, "mxfp4 x e4m3", e4m3_copy=copy, **GPT_OSS) for copy in (False, True))
    values = 6 * 3 * hidden * intermediate
    assert values <= copied.weight_bytes - alone.weight_bytes < 1.02 * values
    for layer in (alone, copied):
        layer.prepare(3000, 2)
    for tokens in (1, 40, 600, 3000):
        arguments = inputs(tokens, 2, 6, hidden, tokens)
        assert torch.equal(alone(*arguments), copied(*arguments))


def test_a_copy_in_e4m3_that_cannot_be_is_refused():
    for form in ("bf16", "e4m3", "mxfp4", "int4", "int4 x e4m3"):
        with pytest.raises(ValueError, match="e4m3_copy is True for .*, expected it for mxfp4 weights and e4m3"):
            layer_of(weights(4, 256, 128, form), form, e4m3_copy=True)
    parts = weights(4, 256, 128, "mxfp4")
    parts["w13_scale"].view(torch.uint8)[3, 140] -= 12
    with pytest.raises(ValueError, match=r"expert is 3, .* at most 11 powers of two .* outputs 128 and inputs 0 on"):
        layer_of(parts, "mxfp4 x e4m3", e4m3_copy=True)


@pytest.mark.parametrize("form", FORMS)
def test_biases_of_every_type_are_added(form):
    parts = weights(4, 256, 128, form)
    arguments = inputs(40, 2, 4, 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        both = biases(4, 256, 128, dtype)
        for names in (["w13_bias"], ["w2_bias"], ["w13_bias", "w2_bias"]):
            given = {name: both[name] for name in names}
            expected = et.Layer(**parts, **given, activations=activations_of(form))
            layer = layer_of({**parts, **given}, form)
            layer.prepare(64, 2, ids_dtype=torch.int64)
            its = expected(*(x.cpu() for x in arguments))
            assert distance(layer(*arguments), its) < TOLERANCE[form]
            without = et.Layer(**parts, activations=activations_of(form))(*(x.cpu() for x in arguments))
            assert distance(without, its) > 0.1


@pytest.mark.parametrize("activations", ["bf16", "e4m3"])
@pytest.mark.parametrize("experts", [1, 8])
def test_mxfp4_takes_its_bits_in_torchs_memory_and_no_more(experts, activations):
    """4.25 bits to a weight and at most 2 % beyond, with H = I = 2880, whose last groups are partial."""
    hidden = intermediate = 2880
    parts = on_gpu(weights(experts, hidden, intermediate, "mxfp4"))
    before = torch.cuda.memory_allocated()
    with pytest.warns(UserWarning, match="w13 and w2 are MXFP4"):
        layer = et.Layer(**parts, activations=activations)
    taken = torch.cuda.memory_allocated() - before
    # torch gives large tensors memory in pieces of 2 MiB.
    assert layer.weight_bytes <= taken < layer.weight_bytes + (2 << 21)
    weights_of_it = 3 * experts * hidden * intermediate
    bits = 8 * layer.weight_bytes / weights_of_it
    print(f"{experts} experts of H = I = 2880, for {activations} rows: {bits:.4f} bits a weight")
    assert 4.25 <= bits < 1.02 * 4.25
    layer.prepare(16, 1, ids_dtype=torch.int64)
    arguments = inputs(16, 1, experts, hidden)
    first = layer(*arguments)
    # What was handed over may go, or be written.
    for x in parts.values():
        x.fill_(0x11)
    parts.clear()
    assert torch.equal(layer(*arguments), first)
    del layer, first
    torch.cuda.synchronize()


def test_mxfp4_is_arranged_after_what_the_current_stream_still_writes():
    parts = on_gpu(weights(4, 512, 256, "mxfp4"))
    arguments = inputs(16, 2, 4, 512)
    late = {name: torch.zeros_like(x) for name, x in parts.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for name, x in parts.items():
            late[name].copy_(x)
        layer = layer_of(late, "mxfp4")
        layer.prepare(16, 2)
        mine = layer(*arguments)
        w13, w2 = layer.unpack()
        torch.cuda.current_stream().synchronize()
    expected = layer_of(parts, "mxfp4")
    expected.prepare(16, 2)
    assert torch.equal(mine, expected(*arguments))
    assert torch.equal(w13, parts["w13"].flatten(2)) and torch.equal(w2, parts["w2"].flatten(2))


@pytest.mark.parametrize("gate_up", ["halves", "interleaved"])
def test_int4_gives_its_words_back_and_takes_its_bits(gate_up):
    parts = weights(4, 512, 256, "int4")
    layer = layer_of(parts, "int4", gate_up=gate_up)
    w13, w2 = layer.unpack(gate_up=gate_up)
    assert torch.equal(w13.cpu(), parts["w13"]) and torch.equal(w2.cpu(), parts["w2"])
    assert 8 * layer.weight_bytes == 4.5 * 3 * 4 * 512 * 256


def test_int4_that_does_not_fit_is_refused():
    parts = on_gpu(weights(4, 256, 128, "int4"))
    bad = parts["w2_scale"].clone()
    bad[2, 3, 1] = float("inf")
    mxfp4 = on_gpu(weights(4, 256, 128, "mxfp4"))
    for kind, message, changed in [
        (ValueError, "w13_scale is None, expected scales for the uint8 blocks of w13", {"w13_scale": None}),
        (TypeError, "w2_scale has dtype torch.float32, expected uint8", {"w2_scale": parts["w2_scale"].float()}),
        (ValueError, r"w13_scale has shape \[4, 256, 7\]", {"w13_scale": parts["w13_scale"][:, :, :7]}),
        (ValueError, "scales is 31744, expected the bits of a finite f16: one of row 3 of", {"w2_scale": bad}),
        (ValueError, "w2 is packed as mxfp4, expected int4", {name: mxfp4[name] for name in ("w2", "w2_scale")}),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(kind, match=message):
                et.Layer(**{**parts, **changed})


def test_mxfp4_that_does_not_fit_is_refused():
    parts = on_gpu({**weights(4, 256, 128, "mxfp4"), **biases(4, 256, 128)})
    nan, strange = parts["w2_scale"].clone(), parts["w13"][:, :, :, :8].contiguous()
    nan[2, 3, 1] = 255
    scales = parts["w13_scale"]
    cases = [
        (ValueError, "w13_scale is None, expected scales for the uint8 blocks of w13", {"w13_scale": None}),
        (TypeError, "w2_scale has dtype torch.float32, expected uint8", {"w2_scale": parts["w2_scale"].float()}),
        (ValueError, r"w13_scale has shape \[4, 256, 7\]", {"w13_scale": scales[:, :, :7]}),
        (ValueError, r"w13 has shape \[4, 256, 8, 8\], expected \[E, N, K / 32, 16\]", {"w13": strange}),
        (ValueError, r"w13 has shape \[4, 256, 240\]", {"w13": parts["w13"].flatten(2)[:, :, :120]}),
        (ValueError, "scales is 255, expected at most 254, as 255 is NaN: one of row 3 of expert 2", {"w2_scale": nan}),
        (ValueError, 'activations is "int8", expected one of bf16, e4m3', {"activations": "int8"}),
        (ValueError, 'gate_up is "both"', {"gate_up": "both"}),
        (ValueError, r"w13_bias has shape \[4, 255\], expected \[4, 256\]", {"w13_bias": parts["w13_bias"][:, 1:]}),
        (ValueError, r"w2_bias has shape \[4\], expected \[4, 256\]", {"w2_bias": parts["w2_bias"][:, 0]}),
        (ValueError, "w2_bias is on cpu, expected cuda:0", {"w2_bias": parts["w2_bias"].cpu()}),
        (TypeError, "w2_bias has dtype torch.float64", {"w2_bias": parts["w2_bias"].double()}),
        (ValueError, "w2_scale is on the CPU", {"w2_scale": parts["w2_scale"].cpu()}),
        (ValueError, "w2 is packed as bf16, expected mxfp4", {"w2": torch.zeros(4, 256, 128).bfloat16().cuda()}),
        (ValueError, 'activation is "geglu-tanh", expected one of swiglu, on a GPU', {"activation": "geglu_tanh"}),
    ]
    for kind, message, changed in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(kind, match=message):
                et.Layer(**{**parts, **changed})
    odd = {"w13": parts["w13"].flatten(2)[:, :, :24], "w2": parts["w2"][:, :48], "w2_bias": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="k is 48, expected a positive multiple of 32 for mxfp4 weights"):
            et.Layer(**{**parts, **odd})
    narrow = on_gpu(weights(4, 96, 64, "mxfp4"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="hidden is 96"):
            et.Layer(**narrow, activations="e4m3")
        et.Layer(**narrow)
    bad = torch.zeros(4, 256, 64, dtype=torch.int8, device="cuda")
    with pytest.raises(TypeError, match="w13 has dtype torch.int8, expected bfloat16, float8_e4m3fn or uint8"):
        et.Layer(bad, bad)


@pytest.mark.parametrize("form", ["e4m3", "mxfp4", "mxfp4 x e4m3", "int4 x e4m3"])
def test_a_tokens_bits_do_not_depend_on_the_others(form):
    parts = weights(16, 512, 256, form)
    layer = layer_of(parts, form)
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
    layer = layer_of({**weights(16, 512, 256, form), **biases(16, 512, 256)}, form)
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


def test_a_state_dict_of_gpt_oss():
    parts = {**weights(4, 256, 128, "mxfp4"), **biases(4, 256, 128, torch.bfloat16)}
    suffixes = {"w13": "blocks", "w13_scale": "scales", "w13_bias": "bias"}
    state = {f"e.gate_up_proj_{suffix}": parts[name] for name, suffix in suffixes.items()}
    state |= {f"e.down_proj_{suffix}": parts[name.replace("w13", "w2")] for name, suffix in suffixes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = et.Layer.from_state_dict(state, "e.", experts=[2, 0], device="cuda", **GPT_OSS)
        whole = et.Layer(**on_gpu(parts), gate_up="interleaved", **GPT_OSS)
    assert (some.device.type, some.local_experts) == ("cuda", 2)
    whole.prepare(8, 1)
    some.prepare(8, 1)
    x, _, router = inputs(8, 1, 4, 256)
    theirs = torch.tensor([[0], [2]] * 4, device="cuda")
    mine = torch.tensor([[1], [0]] * 4, device="cuda")
    assert torch.equal(some(x, mine, router), whole(x, theirs, router))


def test_a_layer_over_several_gpus_takes_no_other_rows_for_e4m3_weights(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match='activations is "bf16", expected "e4m3"'):
            et.ExpertParallelLayer(**on_gpu(weights(4, 256, 128, "e4m3")), capacity=4, topk=1, activations="bf16")
    finally:
        torch.distributed.destroy_process_group()


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
