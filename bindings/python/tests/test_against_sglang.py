"""SGLang 0.5.23's own runner with our core beside its Triton runner. Opt in: EXPERTILE_SGLANG_SOURCE, or installed.

On a Hopper as it serves, also in CUDA graphs; elsewhere in Triton's interpreter on CPU tensors. What is not SGLang's
own is listed in ``benches/peers/sglang_host.py`` and printed by the first test.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
from on_gpu import captured  # noqa: E402

# SGLang and its dependencies warn of much, at import and in calls.
pytestmark = pytest.mark.filterwarnings("default")

SOURCE = os.environ.get("EXPERTILE_SGLANG_SOURCE")
PEERS = Path(__file__).parents[3] / "benches" / "peers"
MOE = "sglang.srt.layers.moe"

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
# On a GPU, rows of one group of 128 go through an operator of sgl_kernel that has no stand-in.
EXPERTS, HIDDEN, INTERMEDIATE = 6, 256, 256 if on_hopper else 128
DEVICE = "cuda" if on_hopper else "cpu"
hopper_only = pytest.mark.skipif(not on_hopper, reason="no Hopper GPU")


@pytest.fixture(scope="module")
def host():
    """SGLang with our plugin loaded by its own loader."""
    if not SOURCE and importlib.util.find_spec("sglang") is None:
        pytest.skip("EXPERTILE_SGLANG_SOURCE names no folder with SGLang 0.5.23, and it is not installed")
    if torch.cuda.is_available() and not on_hopper:
        pytest.skip("a GPU that is no Hopper")
    sys.path.insert(0, str(PEERS))
    try:
        peers = importlib.import_module("sglang_host")
    finally:
        sys.path.pop(0)
    peers.ready(SOURCE)
    peers.serve_one_process()
    names = {
        "runner": f"{MOE}.moe_runner.runner",
        "base": f"{MOE}.moe_runner.base",
        "triton": f"{MOE}.moe_runner.triton",
        "dispatch": f"{MOE}.token_dispatcher.standard",
        "topk": f"{MOE}.topk",
        "moe": f"{MOE}.utils",
        "layer": f"{MOE}.fused_moe_triton.layer",
        "fp8": "sglang.srt.layers.quantization.fp8",
        "plugins": "sglang.srt.plugins",
        "ours": "expertile.sglang",
    }
    modules = SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})
    point = importlib.metadata.EntryPoint("expertile", "expertile.sglang:plugin", "sglang.srt.plugins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTILE_SGLANG", "experts")
        patch.setattr(modules.plugins, "entry_points", lambda group: [point] if group == point.group else [])
        modules.plugins.load_plugins()
    modules.stand_ins = peers.stand_ins
    # Some of its activations go through torch.compile, which takes a while on a CPU.
    eager = contextlib.nullcontext() if on_hopper else torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager:
        yield modules


@contextlib.contextmanager
def without_us(host):
    """Runners that are built meanwhile are SGLang's."""
    factory = host.runner._CUSTOM_RUNNER_CORE_FACTORIES.pop("triton")
    try:
        yield
    finally:
        host.runner._CUSTOM_RUNNER_CORE_FACTORIES["triton"] = factory


def runners(host, global_experts=EXPERTS, inplace=False, **config):
    """A runner with our core, and one without."""
    config = {"num_experts": global_experts, "num_local_experts": EXPERTS, "inplace": inplace, **config}

    def build():
        return host.runner.MoeRunner(host.moe.MoeRunnerBackend.TRITON, host.base.MoeRunnerConfig(**config))

    mine = build()
    with without_us(host):
        theirs = build()
    assert theirs.fused_func is not None and type(theirs.runner_core) is host.triton.TritonRunnerCore
    return mine, theirs


def is_ours(runner):
    return type(runner.runner_core).__module__ == "expertile.sglang.runner_core" and runner.fused_func is None


def weights_of(host, e4m3, experts=EXPERTS, **more):
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(experts, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 16
    w2 = torch.randn(experts, HIDDEN, INTERMEDIATE, generator=generator) / 11
    if not e4m3:
        w13, w2 = (w.bfloat16().to(DEVICE) for w in (w13, w2))
        return host.triton.TritonMoeQuantInfo(w13_weight=w13, w2_weight=w2, **more)
    blocks = ((2 * INTERMEDIATE // 128, HIDDEN // 128), (HIDDEN // 128, INTERMEDIATE // 128))
    scales = (torch.rand(experts, *shape, generator=generator) + 0.5 for shape in blocks)
    w13, w2 = (w.to(torch.float8_e4m3fn).to(DEVICE) for w in (w13, w2))
    w13_scale, w2_scale = (scale.to(DEVICE) for scale in scales)
    quantized = {"use_fp8_w8a8": True, "block_shape": [128, 128], "w13_scale": w13_scale, "w2_scale": w2_scale}
    return host.triton.TritonMoeQuantInfo(w13_weight=w13, w2_weight=w2, **quantized, **more)


def call_of(host, tokens, topk=2, global_experts=EXPERTS, seed=1):
    """With more global experts than there are here, ids as SGLang's dispatcher maps them: -1 for other ranks'."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16().to(DEVICE)
    weights, ids = torch.rand(tokens, global_experts, generator=generator).softmax(1).topk(topk)
    weights, ids = weights.to(DEVICE), ids.int().to(DEVICE)
    if global_experts != EXPERTS:
        here = torch.full((global_experts,), -1, dtype=torch.int32, device=DEVICE)
        here[-EXPERTS:] = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE)
        ids = host.dispatch._map_topk_ids_to_local_experts(ids, here)
    logits = torch.empty(tokens, global_experts, device=DEVICE)
    return host.dispatch.StandardDispatchOutput(x, None, host.topk.StandardTopKOutput(weights, ids, logits))


def theirs_of(runner, call, weights):
    """What Triton's runner gives. Its interpreter cannot multiply bfloat16: there, of the same values in float32."""
    if not on_hopper and not weights.use_fp8_w8a8:
        call = call._replace(hidden_states=call.hidden_states.float())
        wide = {"w13_weight": weights.w13_weight.float(), "w2_weight": weights.w2_weight.float()}
        weights = type(weights)(**(vars(weights) | wide))
    # It may write where its input is.
    return runner.run(call._replace(hidden_states=call.hidden_states.clone()), weights).hidden_states


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def bound(e4m3):
    """Sums are rounded to bfloat16 in other places, and values of e4m3 rows may fall to either side."""
    return 4e-2 if e4m3 else 1e-2


def test_what_is_not_sglangs_own(host, capsys):
    with capsys.disabled():
        print(f"\nSGLang from {host.runner.__file__}; stand-ins: {', '.join(host.stand_ins) or 'none'}")
    assert host.ours.is_registered()
    mine, theirs = runners(host)
    assert is_ours(mine) and mine.runner_core.host is theirs.fused_func is host.triton.fused_experts_none_to_triton


def test_the_most_tokens_are_what_the_servers_arguments_say(host):
    context = importlib.import_module("sglang.srt.runtime_context")
    serving = importlib.import_module("expertile.sglang.serving")
    chunk = context.get_schedule().chunked_prefill_size
    assert context.get_parallel().num_dp_ranks == 1 and context.max_prefill_buffer_tokens() == max(chunk or 0, 0)
    assert serving.max_tokens(1) == max(
        8192, context.max_prefill_buffer_tokens() or context.get_schedule().max_prefill_tokens
    )


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 130] + [777] * on_hopper)
@pytest.mark.parametrize("global_experts", [EXPERTS, 3 * EXPERTS])
def test_a_call_gives_what_tritons_runner_gives(host, e4m3, tokens, global_experts):
    mine, theirs = runners(host, global_experts)
    weights, call = weights_of(host, e4m3), call_of(host, tokens, global_experts=global_experts, seed=tokens)
    expected, x = theirs_of(theirs, call, weights), call.hidden_states.clone()
    found = mine.run(call, weights).hidden_states
    assert is_ours(mine) and mine.runner_core._held.calls == 1
    assert distance(found, expected) < bound(e4m3) and torch.equal(call.hidden_states, x)
    empty = (call.topk_output.topk_ids < 0).all(1)
    assert not found[empty].any() and found[~empty].any(1).all()


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"routed_scaling_factor": 2.5},
        # Off a GPU, SGLang sums up what was never written if topk is 1 and nothing is scaled.
        pytest.param({"apply_router_weight_on_input": True, "top_k": 1}, marks=hopper_only),
        {"apply_router_weight_on_input": True, "top_k": 1, "routed_scaling_factor": 2.5},
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.7, "gate_up_interleaved": False},
        pytest.param({"swiglu_limit": 10}, marks=hopper_only),
        {"inplace": True},
    ],
    ids=lambda config: "-".join(config),
)
def test_what_changes_the_numbers_is_honoured(host, e4m3, config):
    mine, theirs = runners(host, **config)
    weights, call = weights_of(host, e4m3), call_of(host, 9, topk=config.get("top_k", 2))
    if "swiglu_limit" in config:
        call.hidden_states.mul_(20)  # SGLang takes no other limit than 10.
    expected = theirs_of(theirs, call, weights)
    found = mine.run(call, weights).hidden_states
    assert is_ours(mine) and distance(found, expected) < bound(e4m3)
    if "inplace" not in config:
        plain = runners(host)[0].run(call, weights).hidden_states
        assert distance(plain, expected) > 0.05


def test_what_is_not_taken_is_sglangs_to_the_bit(host, caplog):
    weights, call = weights_of(host, True), call_of(host, 5)
    mine, theirs = runners(host, no_combine=True)
    assert type(mine.runner_core) is host.triton.TritonRunnerCore and mine.fused_func is theirs.fused_func
    assert mine.run(call, weights).hidden_states.shape == (5, 2, HIDDEN)
    assert "no_combine is True, expected False" in caplog.text
    mine, theirs = runners(host)
    # A scale for the rows of every call, instead of one that follows the values.
    biased = weights_of(host, True, b2=torch.ones(EXPERTS, HIDDEN, device=DEVICE))
    found, expected = mine.run(call, biased).hidden_states, theirs_of(theirs, call, biased)
    assert torch.equal(found, expected) and "b2 is a tensor, expected None" in caplog.text
    assert distance(mine.run(call, weights).hidden_states, theirs_of(theirs, call, weights)) < bound(True)


@pytest.mark.parametrize("e4m3", [False, True])
def test_a_token_has_the_same_bits_beside_any_others(host, e4m3):
    mine, _ = runners(host)
    weights, call = weights_of(host, e4m3), call_of(host, 300)
    whole, topk = mine.run(call, weights).hidden_states, call.topk_output
    for start, end in ((0, 1), (7, 9), (0, 33), (64, 300)):
        part = host.topk.StandardTopKOutput(topk.topk_weights[start:end], topk.topk_ids[start:end], None)
        part = host.dispatch.StandardDispatchOutput(call.hidden_states[start:end], None, part)
        assert torch.equal(mine.run(part, weights).hidden_states, whole[start:end])


@pytest.mark.parametrize("factor", [None, 2.5])
def test_a_whole_layer_of_an_fp8_checkpoint(host, factor):
    """FusedMoE with Fp8MoEMethod: its weights, its loading, dispatcher, runner and combine."""
    config = host.fp8.Fp8Config(
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128]
    )
    weights, call = weights_of(host, True), call_of(host, 11)

    def build():
        with torch.device(DEVICE):
            layer = host.layer.FusedMoE(
                EXPERTS,
                HIDDEN,
                INTERMEDIATE,
                layer_id=0,
                top_k=2,
                params_dtype=torch.bfloat16,
                quant_config=config,
                routed_scaling_factor=factor,
                inplace=False,
                prefix="model.layers.0.mlp.experts",
            )
        assert isinstance(layer.quant_method, host.fp8.Fp8MoEMethod)
        layer.w13_weight.copy_(weights.w13_weight)
        layer.w2_weight.copy_(weights.w2_weight)
        layer.w13_weight_scale_inv.copy_(weights.w13_scale)
        layer.w2_weight_scale_inv.copy_(weights.w2_scale)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    mine = build()
    with without_us(host):
        theirs = build()
    assert is_ours(mine.runner) and not is_ours(theirs.runner)
    found, expected = (layer(call.hidden_states.clone(), call.topk_output) for layer in (mine, theirs))
    assert mine.runner.runner_core._held.calls == 1 and distance(found, expected) < bound(True)
    # An update writes the weights where they are.
    mine.w2_weight.copy_(weights.w2_weight.float().flip(0).to(torch.float8_e4m3fn))
    theirs.w2_weight.copy_(mine.w2_weight)
    changed, expected = (layer(call.hidden_states.clone(), call.topk_output) for layer in (mine, theirs))
    assert distance(changed, expected) < bound(True) < distance(changed, found)


@hopper_only
@pytest.mark.parametrize("factor", [None, 2.5])
def test_a_whole_layer_of_a_bf16_checkpoint(host, factor):
    weights, call = weights_of(host, False), call_of(host, 11)

    def build():
        with torch.device(DEVICE):
            layer = host.layer.FusedMoE(
                EXPERTS,
                HIDDEN,
                INTERMEDIATE,
                layer_id=0,
                top_k=2,
                params_dtype=torch.bfloat16,
                routed_scaling_factor=factor,
                inplace=False,
            )
        layer.w13_weight.copy_(weights.w13_weight)
        layer.w2_weight.copy_(weights.w2_weight)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    mine = build()
    with without_us(host):
        theirs = build()
    found, expected = (layer(call.hidden_states.clone(), call.topk_output) for layer in (mine, theirs))
    assert is_ours(mine.runner) and distance(found, expected) < bound(False)


@hopper_only
@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("tokens", [1, 64])
def test_a_graph_replays_calls(host, e4m3, tokens):
    mine, theirs = runners(host, routed_scaling_factor=2.5)
    weights, call = weights_of(host, e4m3), call_of(host, tokens)
    graph, result = captured(lambda: mine.run(call, weights).hidden_states)
    for seed in (5, 6):
        other = call_of(host, tokens, seed=seed)
        call.hidden_states.copy_(other.hidden_states)
        call.topk_output.topk_ids.copy_(other.topk_output.topk_ids)
        call.topk_output.topk_weights.copy_(other.topk_output.topk_weights)
        graph.replay()
        assert torch.equal(result, mine.run(other, weights).hidden_states)
        assert distance(result, theirs_of(theirs, other, weights)) < bound(e4m3)


@hopper_only
def test_a_first_call_inside_a_capture_is_sglangs(host, caplog):
    caplog.set_level(logging.INFO)
    mine, theirs = runners(host)
    weights, call = weights_of(host, True), call_of(host, 8)
    expected = theirs_of(theirs, call, weights)  # Compiles Triton's kernels.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = mine.run(call, weights).hidden_states
    graph.replay()
    assert torch.equal(result, expected) and "expected a warm-up before it" in caplog.text
    mine.run(call, weights)
    assert mine.runner_core._held.calls == 1


def test_what_does_not_fit_is_an_error_and_writes_nothing(host):
    mine, _ = runners(host)
    weights, call = weights_of(host, True), call_of(host, 5)
    mine.run(call, weights)
    topk = call.topk_output
    for other, kind, message in (
        (call._replace(hidden_states=call.hidden_states[:, :-8]), ValueError, "hidden_states has shape .*expected"),
        (call._replace(hidden_states=call.hidden_states.int()), TypeError, "expected bfloat16"),
        (call._replace(topk_output=topk._replace(topk_weights=topk.topk_weights[:, :1])), ValueError, "topk_weights"),
        (
            call._replace(topk_output=topk._replace(topk_ids=topk.topk_ids.float())),
            TypeError,
            "expected int32 or int64",
        ),
    ):
        before = other.hidden_states.clone()
        with pytest.raises(kind, match=message):
            mine.run(other, weights)
        assert torch.equal(other.hidden_states, before)
    if on_hopper:
        with pytest.raises(ValueError, match="hidden_states is on the CPU, expected"):
            mine.run(call._replace(hidden_states=call.hidden_states.cpu()), weights)
