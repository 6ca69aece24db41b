"""Expertile's experts in vLLM, on a stand-in package: who is chosen and why, the plugin, and one call."""

import importlib
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402
import expertile.vllm  # noqa: E402

pytestmark = pytest.mark.usefixtures("stand_in_vllm")

ORACLE = "vllm.model_executor.layers.fused_moe.oracle"
E4M3 = ("e4m3, a scale for each block of 128 x 128", "e4m3, a scale for each 128 values")
BF16 = (None, None)


def oracle(name):
    return importlib.import_module(f"{ORACLE}.{name}")


def log():
    return importlib.import_module("vllm.logger").lines


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """As if the machine had a Hopper."""
    monkeypatch.setattr("expertile._native.cuda_unavailable", lambda: None)


def config(parallel=(), **more):
    fields = {
        "moe_backend": "auto",
        "hidden_dim": 512,
        "intermediate_size_per_partition": 256,
        "num_experts": 8,
        "num_local_experts": 8,
        "experts_per_token": 2,
        "max_num_tokens": 64,
        "in_dtype": torch.bfloat16,
        "has_bias": False,
        "is_act_and_mul": True,
        "is_lora_enabled": False,
        "swiglu_limit": None,
        "activation": SimpleNamespace(value="silu"),
        "activation_config": SimpleNamespace(clamp_limit=None, alpha=1.0, beta=0.0),
        "moe_parallel_config": SimpleNamespace(
            **{
                "use_ep": False,
                "use_all2all_kernels": False,
                "use_ag_rs_all2all_kernels": False,
                "use_batched_activation_format": False,
                "use_passthrough_all2all": False,
                **dict(parallel),
            }
        ),
    }
    return SimpleNamespace(**{**fields, **more})


def fp8(moe, keys=E4M3):
    return oracle("fp8").select_fp8_moe_backend(config=moe, weight_key=keys[0], activation_key=keys[1])


def unquantized(moe):
    return oracle("unquantized").select_unquantized_moe_backend(moe_config=moe)


GPT_OSS = {
    "activation": SimpleNamespace(value="swigluoai"),
    "has_bias": True,
    "hidden_dim": 2880,
    "intermediate_size_per_partition": 2880,
}


def mxfp4(moe, activation_key=None):
    return oracle("mxfp4").select_mxfp4_moe_backend(moe, activation_key)


def test_importing_the_package_imports_no_vllm():
    assert not any(name.split(".")[0] == "vllm" for name in sys.modules)
    with pytest.raises(AttributeError, match="has no attribute 'Experts'"):
        expertile.vllm.Experts  # noqa: B018


def test_experts_are_vllms_until_asked_for_and_again_after():
    early = importlib.import_module("vllm.model_executor.layers.quantization.fp8")
    theirs = oracle("fp8").select_fp8_moe_backend, oracle("unquantized").select_unquantized_moe_backend
    assert fp8(config())[0] == "vllm" and unquantized(config())[0] == "vllm" and not log()
    expertile.vllm.select_experts()
    expertile.vllm.select_experts()
    mine = expertile.vllm.ExpertileExperts
    assert fp8(config()) == (oracle("fp8").Fp8MoeBackend.TRITON, mine)
    assert unquantized(config()) == (oracle("unquantized").UnquantizedMoeBackend.TRITON, mine)
    assert early.select_fp8_moe_backend is oracle("fp8").select_fp8_moe_backend
    assert early.select_fp8_moe_backend(config(), *E4M3, allow_vllm_cutlass=True)[1] is mine
    assert log() == [
        ("info", "Expertile computes experts (e4m3 in 128 x 128 blocks, H 512, I 256, 8 of 8 experts)"),
        ("info", "Expertile computes experts (bf16, H 512, I 256, 8 of 8 experts)"),
    ]
    late = ModuleType("vllm.late")
    late.choose = oracle("fp8").select_fp8_moe_backend
    sys.modules["vllm.late"] = late
    expertile.vllm.deselect_experts()
    assert (oracle("fp8").select_fp8_moe_backend, oracle("unquantized").select_unquantized_moe_backend) == theirs
    assert early.select_fp8_moe_backend is theirs[0] and late.choose is theirs[0]


BATCHED = {"use_all2all_kernels": True, "use_batched_activation_format": True}
REFUSED = {
    "another block size": ({}, ("e4m3 in blocks of 64", E4M3[1]), "quantization scheme"),
    "a scale for a tensor": ({}, ("e4m3 a tensor", "e4m3 a tensor"), "quantization scheme"),
    "int8": ({}, ("int8", "int8"), "quantization scheme"),
    "LoRA": ({"is_lora_enabled": True}, E4M3, "LoRA"),
    "LoRA, bf16": ({"is_lora_enabled": True}, BF16, "LoRA"),
    "expert parallelism with rows in batches": ({"parallel": BATCHED}, E4M3, "parallel config"),
    "an all-to-all of another kind": ({"parallel": {"use_all2all_kernels": True}}, E4M3, "parallel config"),
    "experts that exchange rows": ({"parallel": {"use_passthrough_all2all": True}}, E4M3, "parallel config"),
    "GELU": ({"activation": SimpleNamespace(value="gelu")}, E4M3, "activation"),
    "interleaved": ({"activation": SimpleNamespace(value="swigluoai")}, BF16, "activation"),
    "no gate": ({"is_act_and_mul": False}, BF16, "no act_and_mul"),
    "no limit": (
        {"activation": SimpleNamespace(value="swigluoai_uninterleave")},
        BF16,
        "swiglu_limit is None, expected a number",
    ),
    "H": ({"hidden_dim": 2880}, E4M3, "the hidden size is 2880, expected a multiple of 128 for e4m3 experts"),
    "I": (
        {"intermediate_size_per_partition": 192},
        E4M3,
        "the intermediate size of this rank is 192, expected a multiple of 128",
    ),
    "H, bf16": ({"hidden_dim": 2888}, BF16, "the hidden size is 2888, expected a multiple of 16 for bf16 experts"),
    "biases": ({"has_bias": True}, BF16, "the experts have biases, expected none"),
    "f16": ({"in_dtype": torch.float16}, E4M3, "hidden states are torch.float16, expected torch.bfloat16"),
    "topk": ({"experts_per_token": 33}, E4M3, "topk is 33, expected 1 to 32"),
    "experts": ({"num_local_experts": 2048}, E4M3, "this rank has 2048 experts, expected 1 to 1024"),
    "another backend by name": ({"moe_backend": "marlin"}, E4M3, "moe_backend is 'marlin', expected 'auto'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken_is_vllms_with_one_line_that_says_why(name):
    more, keys, reason = REFUSED[name]
    expertile.vllm.select_experts()
    moe = config(**more)
    for _ in range(3):
        theirs = unquantized(moe) if keys == BF16 else fp8(moe, keys)
        assert theirs == ("vllm", moe if keys == BF16 else (moe, *keys, False))
    ((level, line),) = log()
    assert level == "warning" and line.startswith("Expertile does not compute these experts") and reason in line


def test_gpt_oss_is_taken_with_its_weights_as_they_are(monkeypatch):
    expertile.vllm.select_experts()
    chosen = oracle("mxfp4").Mxfp4MoeBackend.EMULATION, expertile.vllm.ExpertileMxfp4Experts
    assert mxfp4(config(**GPT_OSS)) == chosen
    assert log() == [("info", "Expertile computes experts (MXFP4, H 2880, I 2880, 8 of 8 experts)")]
    assert mxfp4(config(**{**GPT_OSS, "intermediate_size_per_partition": 1440})) == chosen
    monkeypatch.setenv("EXPERTILE_VLLM_ACTIVATIONS", "e4m3")
    assert mxfp4(config(**GPT_OSS)) == chosen
    expertile.vllm.deselect_experts()
    assert mxfp4(config(**GPT_OSS))[0] == "vllm"


@pytest.mark.parametrize(
    ("more", "key", "activations", "reason"),
    [
        ({"activation": SimpleNamespace(value="silu")}, None, None, "activation"),
        ({}, "mxfp8", None, "quantization scheme"),
        ({"hidden_dim": 2896}, None, None, "the hidden size is 2896, expected a multiple of 32 for MXFP4 x bf16"),
        (
            {"intermediate_size_per_partition": 1440},
            None,
            "e4m3",
            "the intermediate size of this rank is 1440, expected a multiple of 64 for MXFP4 x e4m3 experts",
        ),
        ({"parallel": {"enable_eplb": True}}, None, None, "experts move between ranks"),
        ({}, None, "fp8", 'EXPERTILE_VLLM_ACTIVATIONS is "fp8", expected "bf16" or "e4m3"'),
        ({"moe_backend": "marlin"}, None, None, "moe_backend is 'marlin', expected 'auto'"),
    ],
)
def test_mxfp4_that_is_not_taken_is_vllms(monkeypatch, more, key, activations, reason):
    if activations is not None:
        monkeypatch.setenv("EXPERTILE_VLLM_ACTIVATIONS", activations)
    expertile.vllm.select_experts()
    moe = config(**{**GPT_OSS, **more})
    assert mxfp4(moe, key) == ("vllm", (moe, key))
    ((level, line),) = log()
    assert level == "warning" and reason in line


def test_what_is_next_to_what_is_refused_is_taken():
    expertile.vllm.select_experts()
    taken = [
        ({"hidden_dim": 2896}, BF16),
        ({"intermediate_size_per_partition": 192}, BF16),
        ({"experts_per_token": 32}, E4M3),
        ({"parallel": {"use_ep": True}, "num_experts": 64}, E4M3),
        ({"parallel": {"use_ep": True, "use_all2all_kernels": True, "use_ag_rs_all2all_kernels": True}}, BF16),
        ({"activation": SimpleNamespace(value="swigluoai_uninterleave"), "swiglu_limit": 7.0}, E4M3),
    ]
    for more, keys in taken:
        chosen = unquantized(config(**more)) if keys == BF16 else fp8(config(**more), keys)
        assert chosen[1] is expertile.vllm.ExpertileExperts, (more, log())


def test_other_devices_are_left_to_vllm(monkeypatch):
    platform = importlib.import_module("vllm.platforms").current_platform
    expertile.vllm.select_experts()
    monkeypatch.setattr(platform, "capability", 100, raising=False)
    assert fp8(config())[0] == "vllm" and "compute capability 100, expected 9.0 (Hopper)" in log()[-1][1]
    monkeypatch.setattr(platform, "cuda", False, raising=False)
    assert fp8(config())[0] == "vllm" and "the platform is stand-in, expected CUDA" in log()[-1][1]
    monkeypatch.undo()
    monkeypatch.setattr("expertile._native.cuda_unavailable", lambda: "there is no NVRTC")
    assert fp8(config())[0] == "vllm" and log()[-1][1].endswith("there is no NVRTC")


def test_a_choice_that_fails_is_vllms():
    expertile.vllm.select_experts()
    for name in ("hidden_dim", "moe_backend", "num_experts"):
        incomplete = config()
        delattr(incomplete, name)
        assert fp8(incomplete)[0] == "vllm"
        assert log()[-1][0] == "warning" and "AttributeError" in log()[-1][1] and name in log()[-1][1]


def test_a_vllm_with_a_registry_is_told_the_name():
    registry = ModuleType(f"{ORACLE}.fp8_registry")
    known = {}
    registry.register_fp8_moe_backend = lambda name, path: known.__setitem__(name, path)
    registry.get_registered_fp8_moe_backend = lambda name: ("registered", name)
    sys.modules[registry.__name__] = registry
    expertile.vllm.select_experts()
    (path,) = known.values()
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is expertile.vllm.ExpertileExperts
    assert fp8(config()) == (("registered", "expertile"), expertile.vllm.ExpertileExperts)
    assert fp8(config(moe_backend="expertile"))[1] is expertile.vllm.ExpertileExperts
    assert unquantized(config())[0] is oracle("unquantized").UnquantizedMoeBackend.TRITON


class TestThePlugin:
    @pytest.fixture
    def plugin(self):
        (point,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "expertile")
        return point.load()

    @pytest.mark.parametrize("value", [None, "", "0"])
    def test_is_off_by_default(self, plugin, monkeypatch, value):
        monkeypatch.delenv("EXPERTILE_VLLM", raising=False)
        if value is not None:
            monkeypatch.setenv("EXPERTILE_VLLM", value)
        plugin()
        assert not expertile.vllm.experts_are_selected() and not expertile.vllm.is_patched()
        assert not any(name.split(".")[0] == "vllm" for name in sys.modules)

    def test_selects_the_experts_when_asked(self, plugin, monkeypatch):
        monkeypatch.setenv("EXPERTILE_VLLM", "experts")
        plugin()
        plugin()
        assert expertile.vllm.experts_are_selected() and not expertile.vllm.is_patched()
        assert fp8(config())[1] is expertile.vllm.ExpertileExperts

    def test_says_what_it_does_not_know(self, plugin, monkeypatch):
        monkeypatch.setenv("EXPERTILE_VLLM", "expert")
        plugin()
        assert log() == [
            ("warning", 'EXPERTILE_VLLM is "expert", expected "1" or "experts": vLLM stays as it is'),
        ]

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            (f"{ORACLE}.fp8", "select_fp8_moe_backend"),
            (f"{ORACLE}.unquantized", "select_unquantized_moe_backend"),
            (f"{ORACLE}.mxfp4", "select_mxfp4_moe_backend"),
            ("vllm.model_executor.layers.fused_moe.modular_kernel", "FusedMoEExpertsModular"),
        ],
    )
    def test_keeps_no_vllm_from_starting(self, plugin, monkeypatch, module, name):
        """One of another version, which lacks what is needed."""
        monkeypatch.delattr(importlib.import_module(module), name)
        functions = dict(vars(oracle("fp8"))), dict(vars(oracle("unquantized")))
        monkeypatch.setenv("EXPERTILE_VLLM", "experts")
        plugin()
        assert not expertile.vllm.experts_are_selected()
        ((level, line),) = log()
        assert level == "warning" and line.startswith("EXPERTILE_VLLM=experts: vLLM stays as it is: ") and name in line
        assert (vars(oracle("fp8")), vars(oracle("unquantized"))) == functions

    def test_keeps_no_vllm_from_starting_that_cannot_be_patched(self, plugin, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.fused_moe.deep_gemm_utils", None)
        monkeypatch.setenv("EXPERTILE_VLLM", "1")
        plugin()
        assert not expertile.vllm.is_patched()
        ((level, line),) = log()
        assert level == "warning" and line.startswith("EXPERTILE_VLLM=1: vLLM stays as it is: ModuleNotFoundError: ")

    def test_keeps_nothing_from_starting_without_vllm(self, plugin, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        for value in ("1", "experts", "neither"):
            monkeypatch.setenv("EXPERTILE_VLLM", value)
            plugin()
        assert not expertile.vllm.experts_are_selected() and not expertile.vllm.is_patched()


@pytest.mark.parametrize("form", ["bf16", "e4m3"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_call_is_that_of_the_layer(form, ranks):
    """On the CPU. What vLLM's own kernel makes of it is in test_vllm_modular.py."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(*shape, generator=generator) / 16 for shape in ((4, 512, 256), (4, 256, 256)))
    scales = {}
    if form == "e4m3":
        w1, w2 = ((x * 100).to(torch.float8_e4m3fn) for x in (w1, w2))
        scales = {"w1_scale": torch.rand(4, 4, 2) * 0.01, "w2_scale": torch.rand(4, 2, 2) * 0.01}
    else:
        w1, w2 = w1.bfloat16(), w2.bfloat16()
    dtype = torch.float8_e4m3fn if form == "e4m3" else None
    quant = SimpleNamespace(
        **{"w1_scale": None, "w2_scale": None, **scales},
        **dict.fromkeys(("w1_bias", "w2_bias", "a1_scale", "a2_scale")),
        quant_dtype=dtype,
        weight_quant_dtype=dtype,
        block_shape=[128, 128] if form == "e4m3" else None,
    )
    moe = config({"use_ep": ranks > 1}, hidden_dim=256, num_experts=4 * ranks, num_local_experts=4)
    experts = expertile.vllm.ExpertileExperts(moe, quant)
    assert experts.expects_unquantized_inputs and experts._supports_batch_invariance()
    x = torch.randn(9, 256, generator=generator).bfloat16()
    ids = torch.rand(9, 4 * ranks, generator=generator).topk(2).indices
    router = torch.rand(9, 2, generator=generator)
    expert_map = None
    if ranks > 1:
        expert_map = torch.full((4 * ranks,), -1, dtype=torch.int32)
        expert_map[::ranks] = torch.arange(4, dtype=torch.int32)
    assert experts.moe_problem_size(x, w1, w2, ids) == (4, 9, 512, 256, 2)
    none, space, shape = experts.workspace_shapes(9, 512, 256, 2, 4 * ranks, 4, None, moe.activation)
    assert none == (0,) and shape == (9, 256)
    output = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    arguments = {
        "output": output,
        "hidden_states": x,
        "w1": w1,
        "w2": w2,
        "topk_weights": router,
        "topk_ids": ids,
        "activation": moe.activation,
        "global_num_experts": 4 * ranks,
        "expert_map": expert_map,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": output.new_empty(none),
        "workspace2": output.new_empty(space),
        "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }
    assert experts.apply(**arguments) is None
    layer = et.Layer(
        w1, w2, w13_scale=scales.get("w1_scale"), w2_scale=scales.get("w2_scale"), activations=form, limit=None
    )
    assert torch.equal(output, layer(x, ids, router, expert_map=expert_map))
    with pytest.raises(ValueError, match=r"workspace2 holds \d+ elements, expected at least"):
        experts.apply(**{**arguments, "workspace2": output.new_empty(2)})
    with pytest.raises(TypeError, match="hidden_states has dtype torch.float16, expected torch.bfloat16"):
        experts.moe_problem_size(x.half(), w1, w2, ids)
    with pytest.raises(ValueError, match=r"topk_ids has shape \[8, 2\], expected \[M, topk\] beside hidden_states"):
        experts.moe_problem_size(x, w1, w2, ids[1:])


class Loaded(torch.nn.Module):
    """gpt-oss's experts as vLLM has loaded them, interleaved gate and up."""

    def __init__(self, experts=4, hidden=128, intermediate=96):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, rows, columns in (("w13", 2 * intermediate, hidden), ("w2", hidden, intermediate)):
            values = torch.randint(0, 256, (experts, rows, columns // 2), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
            bias = torch.randn(experts, rows, generator=generator).bfloat16()
            for kind, value in (("weight", values), ("weight_scale", scales), ("bias", bias)):
                self.register_parameter(f"{name}_{kind}", torch.nn.Parameter(value, requires_grad=False))

    def quant_config(self, weights="mxfp4"):
        return SimpleNamespace(
            w1_scale=self.w13_weight_scale,
            w2_scale=self.w2_weight_scale,
            w1_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            quant_dtype="mxfp4",
            weight_quant_dtype=weights,
        )


@pytest.mark.parametrize("activations", ["bf16", "e4m3"])
@pytest.mark.parametrize("freed", [False, True])
def test_a_call_of_gpt_oss_is_that_of_the_layer(monkeypatch, activations, freed):
    """On the CPU, with the memory that vLLM loaded freed and without."""
    monkeypatch.setenv("EXPERTILE_VLLM_ACTIVATIONS", activations)
    size = 128 if activations == "e4m3" else 96
    loaded = Loaded(intermediate=size)
    swiglu = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}
    layer = et.Layer(
        loaded.w13_weight.detach().clone(),
        loaded.w2_weight.detach().clone(),
        w13_scale=loaded.w13_weight_scale.detach().clone(),
        w2_scale=loaded.w2_weight_scale.detach().clone(),
        w13_bias=loaded.w13_bias.detach(),
        w2_bias=loaded.w2_bias.detach(),
        gate_up="interleaved",
        activations=activations,
        **swiglu,
    )
    of_vllm = SimpleNamespace(clamp_limit=7.0, alpha=1.702, beta=1.0)
    sizes = {"hidden_dim": 128, "intermediate_size_per_partition": size, "num_experts": 4, "num_local_experts": 4}
    moe = config(**{**GPT_OSS, **sizes}, activation_config=of_vllm)
    experts = expertile.vllm.ExpertileMxfp4Experts(moe, loaded.quant_config())
    if freed:
        before = loaded.w13_weight.shape
        experts.process_weights_after_loading(loaded)
        assert loaded.w13_weight.shape == before
        assert all(
            getattr(loaded, name).untyped_storage().nbytes() == 1
            for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")
        )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 128, generator=generator).bfloat16()
    ids = torch.rand(9, 4, generator=generator).topk(2).indices
    router = torch.rand(9, 2, generator=generator)
    w1, w2 = loaded.w13_weight, loaded.w2_weight
    assert experts.moe_problem_size(x, w1, w2, ids) == (4, 9, 2 * size, 128, 2)
    none, space, shape = experts.workspace_shapes(9, 2 * size, 128, 2, 4, 4, None, moe.activation)
    output = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    empty = (output.new_empty(none), output.new_empty(space))
    experts.apply(output, x, w1, w2, router, ids, moe.activation, 4, None, None, None, *empty, None, False)
    assert torch.equal(output, layer(x, ids, router))
    # One of two ranks.
    half = torch.full((8,), -1, dtype=torch.int32)
    half[1::2] = torch.arange(4, dtype=torch.int32)
    of_all = torch.rand(9, 8, generator=generator).topk(2).indices
    experts.apply(output, x, w1, w2, router, of_all, moe.activation, 8, half, None, None, *empty, None, False)
    assert torch.equal(output, layer(x, of_all, router, expert_map=half))
    # Weights that are loaded anew are other weights.
    again = Loaded(intermediate=size)
    for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"):
        getattr(loaded, name).data = getattr(again, name).data.flip(0)
    experts.apply(output, x, w1, w2, router, ids, moe.activation, 4, None, None, None, *empty, None, False)
    assert not torch.equal(output, layer(x, ids, router))


def test_experts_of_another_scheme_are_refused_by_the_class():
    moe = config(**GPT_OSS)
    with pytest.raises(ValueError, match="quant_config has weights mxfp6, expected mxfp4"):
        expertile.vllm.ExpertileMxfp4Experts(moe, Loaded().quant_config("mxfp6"))
