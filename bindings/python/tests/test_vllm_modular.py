"""``ExpertileExperts`` in vLLM 0.33.0's real modular kernel, beside its Triton experts and a reference in float64.

Opt in: ``EXPERTILE_VLLM_SOURCE=DIR`` names a folder that holds vLLM's Python files (``real_vllm.py`` says more). On the
CPU Triton's kernels run in its interpreter, which takes NumPy older than 2.4; on an H200 everything runs there, also in
CUDA graphs.
"""

import dataclasses
import importlib
import itertools
import logging
import os

import pytest

torch = pytest.importorskip("torch")

import real_vllm  # noqa: E402
from real_vllm import Case, Modular, distance, inputs, reference, weights  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not real_vllm.SOURCE, reason="EXPERTILE_VLLM_SOURCE names no folder with vLLM's Python files"),
]

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="torch sees no CUDA device")

# To the reference: the whole of 16 rows or more, and the worst row. One value that falls to the other side of an edge,
# where it is the largest of its group of e4m3, changes the group's scale and with it the roundings of the whole row.
TOLERANCE = {"bf16": (5e-3, 8e-3), "e4m3": (2.5e-2, 8e-2)}
# To Triton, which rounds a clamped SwiGLU to bf16 before it quantizes it.
BETWEEN = {"bf16": 6e-3, "e4m3": 2e-2}

SMALL = {
    "plain": Case(4, 2, 256, 128),
    "one expert a token": Case(8, 1, 128, 256),
    "a rank of four": Case(2, 4, 256, 128, global_experts=8),
    "clamped": Case(4, 2, 256, 128, limit=0.8),
    "gpt-oss's activation": Case(4, 2, 256, 128, activation="swigluoai_uninterleave", limit=1.5, alpha=1.702, beta=1.0),
    "weights on the input": Case(4, 1, 256, 128, weight_on_input=True),
}
LARGE = {
    "many experts": Case(64, 8, 1024, 256, max_tokens=1024),
    "a rank of eight": Case(16, 8, 512, 384, global_experts=128, max_tokens=1024),
}


@pytest.fixture(scope="module")
def vllm():
    # Where it finds DeepGEMM, vLLM rounds the scales of activations to powers of two; the reference and we do not.
    os.environ["VLLM_USE_DEEP_GEMM_E8M0"] = "0"
    found = real_vllm.load()
    if not found.workspace.is_workspace_manager_initialized():
        found.workspace.init_workspace_manager(torch.device(DEVICE))
    return found


@pytest.fixture(scope="module")
def ours(vllm):
    from expertile.vllm import ExpertileExperts

    return ExpertileExperts


@pytest.fixture(autouse=True)
def vllm_config(request):
    """vLLM's functions look for a configuration of the process."""
    if not real_vllm.SOURCE:
        yield
        return
    with request.getfixturevalue("vllm").as_configured(DEVICE):
        yield


def case_of(name, form):
    return dataclasses.replace({**SMALL, **LARGE}[name], form=form)


def check(mine, expected, form):
    whole, row = distance(mine, expected)
    assert row < TOLERANCE[form][1] and (len(mine) < 16 or whole < TOLERANCE[form][0]), (whole, row)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", ["bf16", "e4m3"])
@pytest.mark.parametrize("name", [*SMALL, *(LARGE if ON_GPU else ())])
def test_the_modular_call_gives_what_tritons_gives(vllm, ours, name, form, ids_dtype):
    case = case_of(name, form)
    parts = weights(case, DEVICE)
    mine, triton = (Modular(vllm, case, parts, cls, DEVICE) for cls in (ours, vllm.TritonExperts))
    for tokens in (1, 3, 17, 65) if not ON_GPU else (1, 2, 7, 64, 300, 512):
        arguments = inputs(case, tokens, DEVICE, seed=tokens, ids_dtype=ids_dtype)
        result = mine(*arguments)
        assert (result.shape, result.dtype) == ((tokens, case.hidden), torch.bfloat16)
        check(result, reference(case, parts, *arguments, mine.map), form)
        # Triton's interpreter takes a second a tile.
        if ON_GPU or tokens in (1, 17):
            theirs = triton(*arguments)
            check(theirs, reference(case, parts, *arguments, mine.map), form)
            whole, row = distance(result, theirs)
            assert row < TOLERANCE[form][1] and (tokens < 16 or whole < BETWEEN[form]), (whole, row)


@pytest.mark.parametrize("wrong", ["w1", "w2", "router", "map"])
def test_a_wrong_call_is_seen(vllm, ours, wrong):
    """That the comparison above can fail."""
    case = case_of("a rank of four", "e4m3")
    parts = weights(case, DEVICE)
    mine = Modular(vllm, case, parts, ours, DEVICE)
    x, ids, router = inputs(case, 17, DEVICE)
    expected = reference(case, parts, x, ids, router, mine.map)
    if wrong in ("w1", "w2"):
        # Written in place, after the layer was made.
        mine(x, ids, router)
        scale = getattr(parts, f"{wrong}_scale")
        scale[:, 0, 0] *= 1.5
    elif wrong == "router":
        router = router.roll(1, 0)
    else:
        mine.map = mine.map.roll(1)
    with pytest.raises(AssertionError):
        check(mine(x, ids, router), expected, "e4m3")


@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_a_tokens_bits_do_not_depend_on_the_others(vllm, ours, form):
    assert ours._supports_batch_invariance()
    case = case_of("many experts" if ON_GPU else "plain", form)
    mine = Modular(vllm, case, weights(case, DEVICE), ours, DEVICE)
    most = 1024 if ON_GPU else 200
    x, ids, router = inputs(case, most, DEVICE)
    whole = mine(x, ids, router).clone()
    order = torch.randperm(most, generator=torch.Generator().manual_seed(1)).to(x.device)
    assert torch.equal(mine(x[order], ids[order], router[order]), whole[order])
    for first, last in ((0, 1), (5, 12), (100, most), (0, most - 1), (most - 1, most)):
        assert torch.equal(mine(x[first:last], ids[first:last], router[first:last]), whole[first:last])


@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_weights_that_are_written_count_from_the_next_call(vllm, ours, form):
    """As a reload or the balancing of experts writes them."""
    case = case_of("plain", form)
    parts, other = weights(case, DEVICE), weights(case, DEVICE, seed=1)
    mine = Modular(vllm, case, parts, ours, DEVICE)
    arguments = inputs(case, 17, DEVICE)
    first = mine(*arguments).clone()
    for name in ("w1", "w2", *(("w1_scale", "w2_scale") if form == "e4m3" else ())):
        getattr(parts, name).copy_(getattr(other, name))
    second = mine(*arguments).clone()
    assert not torch.equal(second, first)
    assert torch.equal(second, Modular(vllm, case, other, ours, DEVICE)(*arguments))
    # Bound to other memory, under the same name.
    parts.w1 = weights(case, DEVICE).w1
    third = mine(*arguments)
    assert not torch.equal(third, second) and not torch.equal(third, first)


def test_experts_made_again_over_the_same_weights_take_the_layer_over(vllm, ours):
    case = case_of("plain", "e4m3")
    parts = weights(case, DEVICE)
    first = Modular(vllm, case, parts, ours, DEVICE)
    arguments = inputs(case, 5, DEVICE)
    result = first(*arguments).clone()
    second = Modular(vllm, case, parts, ours, DEVICE)
    assert torch.equal(second(*arguments), result)
    assert second.experts._held is first.experts._held
    clamped = Modular(vllm, case_of("clamped", "e4m3"), parts, ours, DEVICE)
    assert not torch.equal(clamped(*arguments), result) and torch.equal(first(*arguments), result)


def test_what_does_not_fit_is_an_error_and_writes_nothing(vllm, ours):
    case = case_of("plain", "e4m3")
    parts = weights(case, DEVICE)
    mine = Modular(vllm, case, parts, ours, DEVICE)
    x, ids, router = inputs(case, 6, DEVICE)
    with pytest.raises(RuntimeError, match="workspace_shapes\\(\\) before moe_problem_size"):
        mine.experts.workspace_shapes(6, 256, 256, 2, 4, 4, None, mine.config.activation)
    expected = mine(x, ids, router).clone()
    output = torch.full_like(x, 7)
    space = torch.zeros(mine.experts.workspace_shapes(6, 256, 256, 2, 4, 4, None, None)[1], dtype=x.dtype).to(DEVICE)
    good = {
        "output": output,
        "hidden_states": x,
        "w1": parts.w1,
        "w2": parts.w2,
        "topk_weights": router,
        "topk_ids": ids,
        "activation": mine.config.activation,
        "global_num_experts": 4,
        "expert_map": None,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": space[:0],
        "workspace2": space,
        "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }
    cases = [
        (TypeError, "hidden_states has dtype torch.float16, expected torch.bfloat16", {"hidden_states": x.half()}),
        (ValueError, r"has shape \[6, ", {"hidden_states": x[:, :128]}),
        (ValueError, "has shape .*5", {"topk_ids": ids[:5]}),
        (TypeError, "topk_ids has dtype torch.int16, expected int32 or int64", {"topk_ids": ids.short()}),
        (ValueError, r"topk_weights has shape \[6, 1\]", {"topk_weights": router[:, :1]}),
        (TypeError, "topk_weights has dtype torch.float64", {"topk_weights": router.double()}),
        (ValueError, r"output has shape \[6, 128\]", {"output": output[:, :128].clone()}),
        (ValueError, "output shares memory with hidden_states", {"output": x}),
        (ValueError, "workspace2 holds", {"workspace2": space[:3]}),
        (ValueError, "a1q_scale is given, expected None", {"a1q_scale": router}),
        (ValueError, "activation is MoEActivation.GELU, expected", {"activation": vllm.MoEActivation.GELU}),
        (ValueError, r"topk_ids has shape \[6, 2\], expected topk 1", {"apply_router_weight_on_input": True}),
        (TypeError, "expert_map", {"expert_map": torch.arange(4, device=x.device)}),
        (ValueError, "w2(_scale)? has (shape|strides) .* expected", {"w2": parts.w2[:, :128]}),
        (ValueError, "w1 has (shape|strides) .* expected", {"w1": parts.w1[:, :128]}),
        (TypeError, "w1 (has dtype|is) torch.float16, expected", {"w1": parts.w1.half()}),
    ]
    if ON_GPU:
        cases += [
            (ValueError, "hidden_states has strides", {"hidden_states": x.mT.contiguous().mT}),
            (ValueError, "hidden_states is on the CPU", {"hidden_states": x.cpu()}),
            (ValueError, "topk_ids is on the CPU", {"topk_ids": ids.cpu()}),
            (ValueError, "output is on the CPU", {"output": output.cpu()}),
            (ValueError, "w1 has strides", {"w1": parts.w1.mT.contiguous().mT}),
        ]
    for kind, message, wrong in cases:
        with pytest.raises(kind, match=message):
            mine.experts.apply(**{**good, **wrong})
        assert (output == 7).all()
    mine.experts.apply(**good)
    assert torch.equal(output, expected)
    with pytest.raises(TypeError, match="hidden_states has dtype torch.float16"):
        mine(x.half(), ids, router)
    with pytest.raises(ValueError, match=r"topk_ids has shape \[6\]"):
        mine(x, ids[:, 0], router)


def test_schemes_that_are_not_computed_are_refused_by_the_class(vllm, ours):
    case = case_of("plain", "e4m3")
    parts = weights(case, DEVICE)
    config = real_vllm.moe_config(vllm, case, DEVICE)
    scales = {"w1_scale": parts.w1_scale, "w2_scale": parts.w2_scale}
    make = vllm.config.fp8_w8a8_moe_quant_config
    for quant, message in (
        (make(**scales, per_act_token_quant=True), "quant_config has activations .* block_shape None"),
        (make(**scales, block_shape=[64, 64]), r"block_shape \[64, 64\], expected"),
        (make(**scales, block_shape=[128, 128], w1_bias=parts.w1_scale), "w1_bias is given"),
        (make(**scales, block_shape=[128, 128], a1_scale=parts.w1_scale), "a1_scale is given"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(config, quant)
    gelu = real_vllm.moe_config(vllm, case, DEVICE, activation=vllm.MoEActivation.GELU)
    with pytest.raises(ValueError, match="activation is MoEActivation.GELU"):
        ours(gelu, vllm.config.FusedMoEQuantConfig.make())


class TestTheChoice:
    """vLLM's own functions, on a platform that says it is a Hopper."""

    @pytest.fixture(autouse=True)
    def hopper(self, vllm, monkeypatch):
        if not ON_GPU:
            platform = type(vllm.current_platform)
            answers = {
                "is_cuda": lambda self: True,
                "is_cuda_alike": lambda self: True,
                "is_device_capability": lambda self, capability, device_id=0: capability in (90, (9, 0)),
                "is_device_capability_family": lambda self, capability, device_id=0: capability == 90,
                "has_device_capability": lambda self, capability, device_id=0: capability in (75, 80, 89, 90, (7, 5)),
                "get_device_capability": lambda self, device_id=0: None,
                "supports_fp8": lambda self: True,
            }
            for name, answer in answers.items():
                monkeypatch.setattr(platform, name, answer)
            monkeypatch.setattr("expertile._native.cuda_unavailable", lambda: None)
        yield
        import expertile.vllm

        expertile.vllm.deselect_experts()

    @pytest.fixture
    def lines(self):
        """What vLLM's log gets."""
        import vllm.logger

        for once in (vllm.logger._print_info_once, vllm.logger._print_warning_once):
            once.cache_clear()
        found = []
        handler = logging.Handler()
        handler.emit = lambda record: found.append(record.getMessage())
        logger = logging.getLogger("vllm.expertile")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        yield found
        logger.removeHandler(handler)
        logger.setLevel(level)

    def keys(self, vllm, block=(128, 128)):
        block = vllm.quant_utils.GroupShape(*block)
        return vllm.quant_utils.create_fp8_quant_key(static=True, group_shape=block), vllm.quant_utils.kFp8Dynamic128Sym

    def test_is_tritons_until_asked_for_and_ours_after(self, vllm, ours, lines):
        from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
        from vllm.model_executor.layers.quantization import fp8 as fp8_method

        import expertile.vllm

        case = case_of("plain", "e4m3")
        config = real_vllm.moe_config(vllm, case, DEVICE)
        ranks = real_vllm.moe_config(vllm, case_of("a rank of four", "e4m3"), DEVICE)
        weight_key, activation_key = self.keys(vllm)

        def choose(moe):
            return fp8_method.select_fp8_moe_backend(config=moe, weight_key=weight_key, activation_key=activation_key)

        theirs = vllm.TritonExperts
        assert choose(config) == (vllm.fp8.Fp8MoeBackend.TRITON, theirs)
        assert unquantized_fused_moe_method.UnquantizedFusedMoEMethod(config).experts_cls is theirs
        expertile.vllm.select_experts()
        assert not lines
        for moe in (config, ranks, config):
            assert choose(moe) == (vllm.fp8.Fp8MoeBackend.TRITON, ours)
        assert unquantized_fused_moe_method.UnquantizedFusedMoEMethod(config).experts_cls is ours
        assert vllm.unquantized.UnquantizedMoEKernelOracle().select_backend(config)[1] is ours
        assert len(lines) == 3 and all(line.startswith("Expertile computes experts (") for line in lines)

    @pytest.mark.parametrize(("value", "ours_after"), [("", False), ("0", False), ("experts", True)])
    def test_is_ours_when_vllm_has_loaded_its_plugins_and_the_variable_asks(
        self, vllm, ours, monkeypatch, value, ours_after
    ):
        import expertile.vllm

        plugins = importlib.import_module("vllm.plugins")
        monkeypatch.setenv("EXPERTILE_VLLM", value)
        # Those of other packages may import what is not here.
        monkeypatch.setenv("VLLM_PLUGINS", "expertile")
        monkeypatch.setattr(plugins, "plugins_loaded", False)
        plugins.load_general_plugins()
        assert expertile.vllm.experts_are_selected() is ours_after
        case = case_of("plain", "e4m3")
        weight_key, activation_key = self.keys(vllm)
        config = real_vllm.moe_config(vllm, case, DEVICE)
        chosen = vllm.fp8.select_fp8_moe_backend(config=config, weight_key=weight_key, activation_key=activation_key)
        assert chosen[1] is (ours if ours_after else vllm.TritonExperts)

    @pytest.mark.parametrize("form", ["bf16", "e4m3"])
    def test_weights_come_as_they_were_loaded(self, vllm, ours, form):
        """vLLM's conversion for the backend, its kernel, and a call of it."""
        import expertile.vllm

        case = case_of("plain", form)
        parts = weights(case, DEVICE)
        config = real_vllm.moe_config(vllm, case, DEVICE)
        expertile.vllm.select_experts()
        if form == "e4m3":
            weight_key, activation_key = self.keys(vllm)
            backend, chosen = vllm.fp8.select_fp8_moe_backend(config, weight_key, activation_key)
            layer = torch.nn.Module()
            layer.weight_block_size = [128, 128]
            given = (parts.w1, parts.w2, parts.w1_scale, parts.w2_scale)
            converted = vllm.fp8.convert_to_fp8_moe_kernel_format(backend, layer, *given, None, None)
            quant = vllm.fp8.make_fp8_moe_quant_config(backend, *converted[2:], None, None, block_shape=[128, 128])
            kernel = vllm.fp8.make_fp8_moe_kernel(quant, config, chosen, backend)
        else:
            backend, chosen = vllm.unquantized.select_unquantized_moe_backend(config)
            given = (parts.w1, parts.w2)
            converted = vllm.unquantized.convert_to_unquantized_kernel_format(backend, config, *given)
            quant = vllm.config.FusedMoEQuantConfig.make()
            kernel = vllm.unquantized.make_unquantized_moe_kernel(quant, config, backend, chosen)
        assert chosen is ours and isinstance(kernel.fused_experts, ours)
        assert [x.data_ptr() for x in converted] == [x.data_ptr() for x in given]
        mine = Modular(vllm, case, parts, ours, DEVICE)
        arguments = inputs(case, 9, DEVICE)
        expected = mine(*arguments).clone()
        mine.kernel = kernel
        assert torch.equal(mine(*arguments), expected)

    @pytest.mark.parametrize("activations", ["bf16", "e4m3"])
    def test_gpt_oss_by_vllms_own_method(self, vllm, lines, monkeypatch, activations):
        """From the weights that vLLM makes room for, by its choice, conversion and kernel, to a call's result."""
        from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

        import expertile.vllm

        monkeypatch.setenv("EXPERTILE_VLLM_ACTIVATIONS", activations)
        expertile.vllm.select_experts()
        swiglu = {"activation": "swigluoai", "limit": 7.0, "alpha": 1.702, "beta": 1.0}
        case = Case(4, 2, 256, 128, form=activations, **swiglu)
        config = real_vllm.moe_config(vllm, case, DEVICE, has_bias=True)
        method = GptOssMxfp4MoEMethod(config)
        assert method.experts_cls is expertile.vllm.ExpertileMxfp4Experts
        assert method.maybe_roundup_sizes(256, 128, torch.bfloat16, config.moe_parallel_config) == (256, 128)
        layer = torch.nn.Module()
        layer._expert_routing_tables = lambda: None
        with torch.device(DEVICE):
            method.create_weights(layer, 4, 256, 128, torch.bfloat16)
        parts = real_vllm.fill_mxfp4(layer)
        method.process_weights_after_loading(layer)
        assert layer.w13_weight.untyped_storage().nbytes() == layer.w2_weight_scale.untyped_storage().nbytes() == 1
        layer.activation, layer.apply_router_weight_on_input = config.activation, False
        layer.global_num_experts, layer.expert_map = 4, None
        for tokens in (1, 17, 65):
            x, ids, router = inputs(case, tokens, DEVICE, seed=tokens)
            mine = method.apply(layer, x, router, ids, None, None)
            assert (mine.shape, mine.dtype) == ((tokens, 256), torch.bfloat16)
            check(mine, reference(case, parts, x, ids, router), activations)
        wrong = dataclasses.replace(case, beta=0.0)
        with pytest.raises(AssertionError):
            check(mine, reference(wrong, parts, x, ids, router), activations)
        assert len(lines) == 1 and lines[0].startswith("Expertile computes experts (MXFP4, H 256, I 128")

    def test_what_is_not_taken_is_what_vllm_chooses_without_us(self, vllm, lines):
        import expertile.vllm

        case = case_of("plain", "e4m3")
        block = self.keys(vllm)
        utils = vllm.quant_utils
        refused = [
            ({}, self.keys(vllm, (64, 64)), "quantization scheme"),
            ({}, (utils.kFp8StaticTensorSym, utils.kFp8DynamicTensorSym), "quantization scheme"),
            ({}, (utils.kFp8StaticChannelSym, utils.kFp8DynamicTokenSym), "quantization scheme"),
            ({"is_lora_enabled": True}, block, "LoRA"),
            ({"is_lora_enabled": True}, None, "LoRA"),
            ({"activation": vllm.MoEActivation.GELU}, block, "GELU"),
            ({"activation": vllm.MoEActivation.SWIGLUOAI}, None, "SWIGLUOAI"),
            ({"activation": vllm.MoEActivation.RELU2_NO_MUL}, None, "no act_and_mul"),
            ({"has_bias": True}, None, "biases"),
            ({"in_dtype": torch.float16}, None, "torch.float16"),
            ({"intermediate_size": 192}, block, "intermediate size of this rank is 192"),
            ({"hidden_dim": 2880}, block, "hidden size is 2880"),
            ({"moe_backend": "triton"}, block, "moe_backend is 'triton'"),
        ]

        def choose(more, keys):
            moe = real_vllm.moe_config(vllm, case, DEVICE, **more)
            try:
                if keys is None:
                    return vllm.unquantized.select_unquantized_moe_backend(moe)
                return vllm.fp8.select_fp8_moe_backend(moe, *keys)
            except (NotImplementedError, ValueError) as error:
                return repr(error)

        theirs = [choose(more, keys) for more, keys, _ in refused]
        expertile.vllm.select_experts()
        for (more, keys, reason), their in zip(refused, theirs, strict=True):
            lines.clear()
            assert choose(more, keys) == their and choose(more, keys) == their
            assert len(lines) <= 1 and all(reason in line for line in lines), (reason, lines)
        # A reason is said once, however many layers have it.
        lines.clear()
        for _ in range(3):
            choose({"hidden_dim": 5800}, block)
        assert len(lines) == 1 and "hidden size is 5800" in lines[0]

    def test_batched_rows_of_an_all_to_all_are_refused(self, vllm, ours):
        from expertile.vllm._select import refusal

        many = {"use_ep": True, "dp_size": 4, "ep_size": 4}
        for backend, taken in (
            ("allgather_reducescatter", True),
            ("deepep_low_latency", False),
            ("deepep_high_throughput", False),
            ("flashinfer_nvlink_one_sided", False),
            ("passthrough", False),
        ):
            moe = real_vllm.moe_config(vllm, case_of("plain", "e4m3"), DEVICE, **many, all2all_backend=backend)
            reason = refusal(moe, *self.keys(vllm), ours)
            assert (reason is None) == taken and (taken or "parallel config" in reason), (backend, reason)

    def test_batch_invariance_is_answered(self, vllm, ours, monkeypatch):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        moe = real_vllm.moe_config(vllm, case_of("plain", "e4m3"), DEVICE)
        standard = vllm.mk.FusedMoEActivationFormat.Standard
        assert ours.is_supported_config(ours, moe, *self.keys(vllm), standard) == (True, None)
        monkeypatch.setattr(ours, "_supports_batch_invariance", staticmethod(lambda: False))
        supported, reason = ours.is_supported_config(ours, moe, *self.keys(vllm), standard)
        assert not supported and "batch invariance" in reason

    def test_of_another_gpu_is_vllms(self, vllm, ours, monkeypatch):
        if ON_GPU:
            pytest.skip("a GPU is there: it cannot be made to look like another")
        platform = type(vllm.current_platform)
        moe = real_vllm.moe_config(vllm, case_of("plain", "e4m3"), DEVICE)
        standard = vllm.mk.FusedMoEActivationFormat.Standard
        monkeypatch.setattr(platform, "is_device_capability", lambda self, capability, device_id=0: False)
        supported, reason = ours.is_supported_config(ours, moe, *self.keys(vllm), standard)
        assert not supported and "expected 9.0 (Hopper)" in reason


@needs_gpu
class TestOnAGpu:
    @pytest.mark.parametrize("form", ["bf16", "e4m3"])
    @pytest.mark.parametrize("name", ["many experts", "a rank of eight", "weights on the input"])
    def test_graphs_replay_with_other_inputs(self, vllm, ours, name, form):
        from on_gpu import captured

        case = case_of(name, form)
        mine = Modular(vllm, case, weights(case, DEVICE), ours, DEVICE)
        for tokens in (1, 64, 512):
            static = inputs(case, tokens, DEVICE)
            mine(*static)
            graph, result = captured(lambda static=static: mine(*static))
            for seed in range(3):
                for tensor, new in zip(static, inputs(case, tokens, DEVICE, seed), strict=True):
                    tensor.copy_(new)
                graph.replay()
                assert torch.equal(result, mine(*static))

    def test_a_first_call_in_a_graph_says_so(self, vllm, ours):
        case = case_of("plain", "e4m3")
        mine = Modular(vllm, case, weights(case, DEVICE), ours, DEVICE)
        static = inputs(case, 4, DEVICE)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match="first call of these experts is in a CUDA graph"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                mine(*static)

    def test_weights_are_used_where_they_are(self, vllm, ours):
        case = case_of("many experts", "e4m3")
        mine = Modular(vllm, case, weights(case, DEVICE), ours, DEVICE)
        arguments = inputs(case, 4, DEVICE)
        before = torch.cuda.memory_allocated()
        mine.experts.moe_problem_size(arguments[0], mine.parts.w1, mine.parts.w2, arguments[1])
        assert torch.cuda.memory_allocated() - before < 1 << 20

    def test_more_tokens_than_vllm_warmed_up_with(self, vllm, ours):
        case = case_of("plain", "e4m3")
        case.max_tokens = 64
        mine = Modular(vllm, case, weights(case, DEVICE), ours, DEVICE)
        mine(*inputs(case, 64, DEVICE))
        mine(*inputs(case, 100, DEVICE))
        manager = vllm.workspace.current_workspace_manager()
        manager.lock()
        try:
            mine(*inputs(case, 100, DEVICE))
            with pytest.raises(ValueError, match="hidden_states has 101 tokens, expected at most 100"):
                mine(*inputs(case, 101, DEVICE))
        finally:
            manager.unlock()

    def test_every_size_fits_the_workspace_of_the_largest(self, vllm, ours):
        """vLLM's workspace may not grow after its first call, which is of the most tokens."""
        for name, form in itertools.product(LARGE, ("bf16", "e4m3")):
            case = case_of(name, form)
            mine = Modular(vllm, case, weights(case, DEVICE), ours, DEVICE)
            mine(*inputs(case, case.max_tokens, DEVICE))
            sizes = [
                mine.experts.workspace_shapes(tokens, 0, case.hidden, case.topk, 0, 0, None, None)[1]
                for tokens in range(1, case.max_tokens + 1)
            ]
            assert sizes == sorted(sizes)
