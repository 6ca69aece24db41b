"""``expertile.sglang`` on a stand-in with SGLang's import structure, whose Triton runner is plain torch on the CPU.

Where there is a Hopper, ``test_against_sglang.py`` runs the same on it, with SGLang's own code.
"""

import importlib
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

MOE = "sglang.srt.layers.moe"
HIDDEN, INTERMEDIATE, EXPERTS = 256, 128, 6


def of(name):
    return name.split(".")[0] == "sglang" or name.startswith("expertile.sglang")


@pytest.fixture
def host(monkeypatch):
    """The stand-in is `sglang` during a test, whatever is installed, and no longer."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if of(name)}
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in")
    names = {
        "ours": "expertile.sglang",
        "runner": f"{MOE}.moe_runner.runner",
        "base": f"{MOE}.moe_runner.base",
        "triton": f"{MOE}.moe_runner.triton",
        "dispatch": f"{MOE}.token_dispatcher.standard",
        "topk": f"{MOE}.topk",
        "moe": f"{MOE}.utils",
        "hooks": "sglang.srt.plugins.hook_registry",
        "context": "sglang.srt.runtime_context",
        "memory": "sglang.srt.distributed.device_communicators.pynccl_allocator",
    }
    yield SimpleNamespace(**{name: importlib.import_module(module) for name, module in names.items()})
    for name in [name for name in sys.modules if of(name)]:
        del sys.modules[name]
    sys.modules.update(hidden)


def load_plugins(host, monkeypatch, value="experts"):
    """As SGLang does it: every plugin is called, then all hooks take effect."""
    monkeypatch.setenv("EXPERTILE_SGLANG", value)
    host.ours.plugin()
    host.hooks.HookRegistry.apply_hooks()


def runner_of(host, lora=False, backend="triton", num_experts=EXPERTS, **config):
    config = host.base.MoeRunnerConfig(num_experts=num_experts, num_local_experts=EXPERTS, **config)
    return host.runner.MoeRunner(host.moe.MoeRunnerBackend(backend), config, lora_enabled=lora)


def weights_of(host, e4m3, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 16
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / 11
    if not e4m3:
        return host.triton.TritonMoeQuantInfo(w13_weight=w13.bfloat16(), w2_weight=w2.bfloat16(), **more)
    scales = {
        "w13_scale": torch.rand(EXPERTS, 2 * INTERMEDIATE // 128, HIDDEN // 128, generator=generator) + 0.5,
        "w2_scale": torch.rand(EXPERTS, HIDDEN // 128, INTERMEDIATE // 128, generator=generator) + 0.5,
    }
    e4m3 = {"w13_weight": w13.to(torch.float8_e4m3fn), "w2_weight": w2.to(torch.float8_e4m3fn)}
    info = {"use_fp8_w8a8": True, "block_shape": [128, 128], **e4m3, **scales}
    return host.triton.TritonMoeQuantInfo(**(info | more))


def call_of(host, tokens=5, topk=2, empty=False, seed=1, dtype=torch.bfloat16, ids_dtype=torch.int32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).softmax(1).topk(topk)
    ids = ids.to(ids_dtype)
    if empty:
        # What the dispatcher of an expert parallel rank makes of other ranks' experts; a token has none here.
        ids[torch.rand(ids.shape, generator=generator) < 0.5] = -1
        ids[0] = -1
    return host.dispatch.StandardDispatchOutput(x, None, host.topk.StandardTopKOutput(weights, ids, None))


def theirs(host, call, weights, **config):
    config = host.base.MoeRunnerConfig(**config, inplace=False)
    return host.triton.fused_experts(call, weights, config).hidden_states


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "expertile.sglang"]


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_registered_unless_asked(host, monkeypatch, caplog, value):
    load_plugins(host, monkeypatch, value)
    monkeypatch.delenv("EXPERTILE_SGLANG")
    host.ours.plugin()
    assert not host.ours.is_registered() and not host.runner._factories and not said(caplog)
    assert runner_of(host).fused_func is host.triton.fused_experts


def test_an_unknown_value_is_said_and_registers_nothing(host, monkeypatch, caplog):
    load_plugins(host, monkeypatch, "1")
    assert not host.ours.is_registered()
    assert said(caplog) == ['EXPERTILE_SGLANG is "1", expected "experts": SGLang keeps its own runners']


def test_the_plugin_keeps_no_host_from_starting(host, monkeypatch, caplog):
    host.runner.register_moe_runner_core("triton", host.triton.TritonRunnerCore)
    load_plugins(host, monkeypatch)
    (line,) = said(caplog)
    assert line.startswith("expertile does not compute SGLang's experts: ValueError: a core of the name triton")
    assert runner_of(host).fused_func is host.triton.fused_experts
    del host.hooks.HookRegistry
    host.runner._factories.clear()
    host.ours.plugin()
    assert said(caplog)[-1].endswith("has no HookRegistry, expected SGLang 0.5.23's module")
    assert not host.runner._factories


def test_the_package_names_the_plugin():
    (plugin,) = (point for point in entry_points(group="sglang.srt.plugins") if point.name == "expertile")
    assert plugin.value == "expertile.sglang:plugin"


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("empty", [False, True])
def test_a_call_gives_what_tritons_runner_gives(host, monkeypatch, caplog, e4m3, tokens, ids_dtype, empty):
    caplog.set_level(logging.INFO)
    load_plugins(host, monkeypatch)
    runner, weights = runner_of(host, num_experts=2 * EXPERTS if empty else EXPERTS), weights_of(host, e4m3)
    call = call_of(host, tokens, empty=empty, ids_dtype=ids_dtype)
    expected = theirs(host, call, weights)
    calls, x = len(host.triton.calls), call.hidden_states.clone()
    found = runner.run(call, weights).hidden_states
    # Both round sums to bfloat16, and e4m3 rows may fall to either side.
    assert distance(found, expected) < (3e-2 if e4m3 else 6e-3) if expected.any() else not found.any()
    assert found.dtype == x.dtype and torch.equal(call.hidden_states, x)
    assert len(host.triton.calls) == calls
    expert_map = runner.runner_core._held.expert_map
    assert expert_map.tolist() == [*range(EXPERTS), *[-1] * EXPERTS] if empty else expert_map is None
    line = f"expertile computes {EXPERTS} experts, H {HIDDEN}, I {INTERMEDIATE}, {'e4m3' if e4m3 else 'bf16'}, on cpu"
    assert line in said(caplog)


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {"routed_scaling_factor": 2.5},
        {"swiglu_limit": 0.5},
        {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 0.7, "gate_up_interleaved": False},
        {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 0.7, "gate_up_interleaved": False},
        {"apply_router_weight_on_input": True, "top_k": 1},
        {"apply_router_weight_on_input": True, "top_k": 1, "routed_scaling_factor": 2.5},
    ],
    ids=lambda config: "-".join(config),
)
def test_what_changes_the_numbers_is_honoured(host, monkeypatch, e4m3, config):
    load_plugins(host, monkeypatch)
    runner, weights = runner_of(host, **config), weights_of(host, e4m3)
    call = call_of(host, 9, topk=config.get("top_k", 2))
    expected, plain = theirs(host, call, weights, **config), theirs(host, call, weights)
    calls = len(host.triton.calls)
    found = runner.run(call, weights).hidden_states
    assert len(host.triton.calls) == calls
    assert distance(found, expected) < (4e-2 if e4m3 else 8e-3)
    assert distance(plain, expected) > 0.05


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"activation": "gelu"}, "activation is 'gelu', expected 'silu'"),
        ({"is_gated": False}, "is_gated is False, expected True"),
        ({"no_combine": True, "inplace": False}, "no_combine is True, expected False"),
        ({"gemm1_beta": 2.0}, "gemm1_beta is 2.0, expected None or 1.0"),
        ({"gemm1_clamp_limit": 7.0}, "gemm1_clamp_limit is 7.0 without a gemm1_alpha, expected none"),
        ({"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0}, "gate_up_interleaved is True with a gemm1_alpha"),
        (
            {"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0, "swiglu_limit": 10, "gate_up_interleaved": False},
            "gemm1_clamp_limit is 7.0, swiglu_limit is 10, expected only the first",
        ),
        ({"gate_bias": 0.5}, "gate_bias is 0.5, expected None"),
        ({"gate_bias": torch.ones(1)}, "gate_bias is a tensor, expected None"),
    ],
)
def test_a_configuration_that_is_not_taken_leaves_the_runner_as_it_was(host, monkeypatch, caplog, config, reason):
    load_plugins(host, monkeypatch)
    for _ in range(2):
        runner = runner_of(host, **config)
        assert type(runner.runner_core) is host.triton.TritonRunnerCore
        assert runner.fused_func is host.triton.fused_experts
    lines = said(caplog)
    assert len([line for line in lines if f"to SGLang's Triton runner: {reason}" in line]) == 1, lines


def test_lora_an_all_to_all_and_other_runners_are_left_alone(host, monkeypatch, caplog):
    load_plugins(host, monkeypatch)
    assert type(runner_of(host, lora=True).runner_core) is host.triton.TritonRunnerCore
    assert said(caplog)[-1].endswith("LoRA is enabled")
    monkeypatch.setattr(host.moe, "all_to_all", host.moe.MoeA2ABackend.DEEPEP)
    assert type(runner_of(host).runner_core) is host.triton.TritonRunnerCore
    assert said(caplog)[-1].endswith("the all-to-all backend is deepep, expected none")
    lines = len(said(caplog))
    assert type(runner_of(host, backend="deep_gemm").runner_core) is host.triton.TritonRunnerCore
    assert len(said(caplog)) == lines


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"b13": torch.zeros(EXPERTS, 2 * INTERMEDIATE)}, "b13 is a tensor, expected None"),
        ({"a13_scale": torch.ones(1)}, "a13_scale is a tensor, expected None"),
        ({"use_int8_w8a8": True}, "use_int8_w8a8 is True, expected False"),
        ({"fuse_swiglu_interleaved": True}, "fuse_swiglu_interleaved is True, expected False"),
        ({"block_shape": [64, 128]}, "block_shape is [64, 128], expected [128, 128]"),
        ({"block_shape": None}, "block_shape is None, expected [128, 128]"),
        ({"w2_scale": None}, "w2_scale is None, expected torch.float32"),
        (
            {"w2_scale": torch.ones(EXPERTS, 2, 1, dtype=torch.bfloat16)},
            "w2_scale is torch.bfloat16, expected torch.float32",
        ),
        ({"w2_weight": torch.ones(EXPERTS, HIDDEN, INTERMEDIATE)}, "w2_weight is torch.float32, expected torch.float8"),
        (
            {"w2_weight": torch.ones(EXPERTS, INTERMEDIATE, HIDDEN).mT.to(torch.float8_e4m3fn).mT.mT},
            "w2_weight has strides",
        ),
        ({"w2_scale": torch.ones(EXPERTS, 3, 1)}, "w2_scale has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_are_not_taken_stay_with_sglang(host, monkeypatch, caplog, weights, reason):
    load_plugins(host, monkeypatch)
    runner, call = runner_of(host), call_of(host)
    weights, answer = weights_of(host, True, **weights), object()
    runner.runner_core.host = lambda *arguments: (answer, *arguments)
    for _ in range(2):
        assert runner.run(call, weights) == (answer, call, weights, runner.config)
    (line,) = said(caplog)[-1:]
    assert f"to SGLang's Triton runner: {reason}" in line or reason in line


def test_calls_of_other_formats_stay_with_sglang(host, monkeypatch, caplog):
    load_plugins(host, monkeypatch)
    runner, call, weights = runner_of(host), call_of(host), weights_of(host, False)
    runner.runner_core.host = lambda dispatch_output, *_: dispatch_output
    bypassed = host.topk.BypassedTopKOutput(call.hidden_states, None)
    for other, reason in {
        host.dispatch.DeepEPNormalDispatchOutput(call.hidden_states): "the dispatch format is deepep_normal",
        call._replace(topk_output=bypassed): "topk_output is BypassedTopKOutput",
        call._replace(hidden_states_scale=1.0): "hidden_states come quantized",
        call._replace(hidden_states_pre_quant=(1, 2)): "hidden_states come quantized",
    }.items():
        assert runner.run(other, weights) is other
        assert reason in said(caplog)[-1]
    with pytest.raises(ValueError, match="hooks are object, expected none"):
        runner.runner_core.run_from_dispatch(call, weights, runner.config, hooks=object())
    # The next call is taken all the same.
    assert runner.run(call, weights).hidden_states.shape == call.hidden_states.shape


@pytest.mark.parametrize("e4m3", [False, True])
def test_weights_that_change_are_seen(host, monkeypatch, e4m3):
    load_plugins(host, monkeypatch)
    runner, call, weights = runner_of(host), call_of(host), weights_of(host, e4m3)
    first = runner.run(call, weights).hidden_states
    assert torch.equal(runner.run(call, weights).hidden_states, first)
    other = weights_of(host, e4m3, seed=7)
    # Written where they are, and others in their place.
    weights.w13_weight.copy_(other.w13_weight)
    found = runner.run(call, weights).hidden_states
    assert distance(found, theirs(host, call, weights)) < 2e-2 < distance(found, first)
    assert distance(runner.run(call, other).hidden_states, theirs(host, call, other)) < 2e-2
    if e4m3:
        other.w2_scale.mul_(3)
        assert distance(runner.run(call, other).hidden_states, theirs(host, call, other)) < 2e-2
    # As an update does that gives a parameter other memory.
    weights.w2_weight = torch.nn.Parameter(weights.w2_weight, requires_grad=False)
    weights.w2_weight.data = other.w2_weight.clone()
    assert distance(runner.run(call, weights).hidden_states, theirs(host, call, weights)) < 2e-2


def test_weights_that_move_in_every_call_stay_with_sglang(host, monkeypatch, caplog):
    load_plugins(host, monkeypatch)
    runner, call = runner_of(host), call_of(host)
    expected = None
    for _ in range(8):
        weights = weights_of(host, False)
        expected = theirs(host, call, weights) if expected is None else expected
        assert (
            distance(runner.run(call._replace(hidden_states=call[0].clone()), weights).hidden_states, expected) < 6e-3
        )
    assert said(caplog)[-1].endswith("the weights are elsewhere in every call, expected them to stay")


@pytest.mark.parametrize("e4m3", [False, True])
def test_a_token_has_the_same_bits_beside_any_others(host, monkeypatch, e4m3):
    load_plugins(host, monkeypatch)
    runner, weights, call = runner_of(host), weights_of(host, e4m3), call_of(host, 130)
    whole = runner.run(call, weights).hidden_states
    topk = call.topk_output
    for start, end in ((0, 1), (7, 8), (5, 22), (64, 130)):
        part = host.topk.StandardTopKOutput(topk.topk_weights[start:end], topk.topk_ids[start:end], None)
        part = host.dispatch.StandardDispatchOutput(call.hidden_states[start:end], None, part)
        assert torch.equal(runner.run(part, weights).hidden_states, whole[start:end])


def test_no_tokens(host, monkeypatch):
    load_plugins(host, monkeypatch)
    assert runner_of(host).run(call_of(host, 0), weights_of(host, True)).hidden_states.shape == (0, HIDDEN)


def test_what_does_not_fit_is_an_error_and_writes_nothing(host, monkeypatch):
    load_plugins(host, monkeypatch)
    runner, call, weights = runner_of(host), call_of(host), weights_of(host, False)
    topk = call.topk_output
    for other, kind, message in (
        (call._replace(hidden_states=call.hidden_states[:, :-8]), ValueError, "hidden_states has shape .*expected"),
        (call._replace(hidden_states=call.hidden_states[1:]), ValueError, "hidden_states has shape .*expected"),
        (call._replace(hidden_states=call.hidden_states.int()), TypeError, "hidden_states .*expected"),
        (call._replace(topk_output=topk._replace(topk_ids=topk.topk_ids.float())), TypeError, "topk_ids .*expected"),
        (call._replace(topk_output=topk._replace(topk_weights=topk.topk_weights[:, :1])), ValueError, "topk_weights"),
        (call._replace(topk_output=topk._replace(topk_ids=topk.topk_ids + EXPERTS)), ValueError, "topk_ids.*expected"),
    ):
        before = other.hidden_states.clone()
        with pytest.raises(kind, match=message):
            runner.run(other, weights)
        assert torch.equal(other.hidden_states, before)
    # Weights of the router in another type are widened, as Triton's kernels do.
    half = call._replace(topk_output=topk._replace(topk_weights=topk.topk_weights.bfloat16()))
    assert distance(runner.run(half, weights).hidden_states, theirs(host, half, weights)) < 6e-3


def test_most_tokens_are_what_the_server_says(host):
    serving = importlib.import_module("expertile.sglang.serving")
    assert serving.max_tokens(3) == 8192 and serving.max_tokens(9000) == 16384
    host.context.published = SimpleNamespace(chunked_prefill_size=16384, max_prefill_tokens=65536, num_dp_ranks=2)
    assert serving.max_tokens(3) == 32768
    host.context.published.chunked_prefill_size = -1
    assert serving.max_tokens(3) == 131072


def test_the_output_is_where_nccl_needs_it(host, monkeypatch):
    load_plugins(host, monkeypatch)
    runner, call, weights = runner_of(host), call_of(host), weights_of(host, False)
    plain = runner.run(call, weights).hidden_states
    monkeypatch.setattr(host.memory, "enabled", True)
    host.context.published = SimpleNamespace(chunked_prefill_size=1, max_prefill_tokens=1, num_dp_ranks=1)
    assert torch.equal(runner.run(call, weights).hidden_states, plain) and host.memory.entered == [(None, False)]


def test_a_compiled_model_calls_it_too(host, monkeypatch):
    load_plugins(host, monkeypatch)
    runner, call, weights = runner_of(host), call_of(host), weights_of(host, False)
    topk = call.topk_output

    def model(x):
        dispatch = host.dispatch.StandardDispatchOutput(x * 1, None, topk)
        return runner.run(dispatch, weights).hidden_states + 1

    expected = model(call.hidden_states)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(call.hidden_states), expected)
