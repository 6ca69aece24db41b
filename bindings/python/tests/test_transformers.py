"""``expertile.transformers`` beside Transformers' own eager experts, in its own models with random weights."""

import copy
import gc
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("transformers.integrations.moe")
from safetensors.torch import load_file  # noqa: E402
from tiny_models import COMMON, FAMILIES, distance, experts_of, is_near, model_of  # noqa: E402

import expertile.transformers as mine  # noqa: E402
from expertile.transformers import threads  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

IMPLEMENTED = sorted(FAMILIES)


@pytest.fixture(autouse=True)
def defaults():
    yield
    mine.configure(keep_weights=False, max_tokens=8192, torch_may_spin=False)


@pytest.mark.parametrize("family", IMPLEMENTED)
def test_models_say_what_they_say_with_their_own_experts(family):
    expected, model = model_of(family, "eager"), model_of(family, "expertile")
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert is_near(model(tokens).logits, expected, tokens)
    assert len(experts_of(model)) == (1 if family == "DeepseekV3" else 2) and not experts_of(expected)
    options = {"max_new_tokens": 8, "do_sample": False}
    generated, theirs = model.generate(tokens, **options), expected.generate(tokens, **options)
    same = (generated == theirs).float().mean()
    # A tie between two tokens may fall the other way, and everything after it.
    assert same > 0.9, f"{same} of the tokens"


@pytest.mark.parametrize("family", IMPLEMENTED)
def test_a_wrong_expert_is_seen(family):
    """That the comparison above can fail."""
    expected, model = model_of(family, "eager"), model_of(family, "expertile")
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        down = next(p for name, p in model.named_parameters() if name.endswith("experts.down_proj"))
        down.copy_(down.roll(1, 0))
        logits = model(tokens).logits
        assert distance(logits, expected(tokens).logits) > 2e-2 and not is_near(logits, expected, tokens)


def saved(folder):
    """Everything that a saved model holds, by name."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: weights for file in files for name, weights in load_file(file).items()}


@pytest.mark.parametrize("family", IMPLEMENTED)
def test_memory_is_given_back_and_saving_writes_the_same_before_and_after(family, tmp_path):
    model = model_of(family, "expertile")
    model.save_pretrained(tmp_path / "before")
    tokens = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        first = model(tokens).logits
        assert experts_of(model)
        for module in experts_of(model):
            shape = tuple(module.down_proj.shape)
            assert module.gate_up_proj.is_meta and module.down_proj.is_meta and len(shape) == 3
        model.save_pretrained(tmp_path / "after")
        before, after = saved(tmp_path / "before"), saved(tmp_path / "after")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], weights) for name, weights in before.items())
        # Saving is for once: the layers stay as they are.
        assert all(module.gate_up_proj.is_meta for module in experts_of(model))
        again = type(model).from_pretrained(tmp_path / "after", dtype="bfloat16", experts_implementation="expertile")
        assert torch.equal(again(tokens).logits, first)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_packed_models_take_other_weights_and_other_implementations(family):
    expected, model = model_of(family, "eager"), model_of(family, "expertile")
    tokens = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        first = model(tokens).logits
        other = model_of(family, "eager", seed=1).state_dict()
        for each in (expected, model):
            each.load_state_dict(other)
        assert distance(model(tokens).logits, first) > 0.1
        assert is_near(model(tokens).logits, expected, tokens)
        assert experts_of(model)[0].gate_up_proj.is_meta
        model.set_experts_implementation("eager")
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
        model.set_experts_implementation("expertile")
        assert is_near(model(tokens).logits, expected, tokens)


def test_a_state_dict_of_other_names_leaves_packed_weights_alone():
    model = model_of("Qwen3Moe", "expertile")
    with torch.no_grad():
        model(torch.arange(3, 30).unsqueeze(0))
        norm = {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
        model.load_state_dict(norm, strict=False)
    assert all(module.gate_up_proj.is_meta for module in experts_of(model))


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_weights_that_change_after_the_first_call_are_packed_anew(family):
    mine.configure(keep_weights=True)
    expected, model = model_of(family, "eager"), model_of(family, "expertile")
    tokens = torch.arange(3, 30).unsqueeze(0)
    other = model_of(family, "eager", seed=1).state_dict()
    with torch.no_grad():
        first = model(tokens).logits
        for each in (expected, model):
            each.load_state_dict(other)
        assert distance(model(tokens).logits, first) > 0.1
        assert is_near(model(tokens).logits, expected, tokens)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_copies_of_a_model_share_what_is_packed(family):
    model = model_of(family, "expertile")
    tokens = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        first = model(tokens).logits
        other = copy.deepcopy(model)
        del model
        gc.collect()
        assert torch.equal(other(tokens).logits, first)


def test_compiled_models_give_the_same_after_a_first_call():
    model = model_of("Qwen3Moe", "expertile")
    tokens = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
        compiled = torch.compile(model)
        # Compiled, values between operations are not rounded to bf16 where they are when called one by one.
        assert distance(compiled(tokens).logits, expected) < 4e-2


def spinning_seconds(after):
    """CPU time of torch's threads while nothing happens after an operation; in a process of its own."""
    program = f"""
import os, time, torch
import expertile.transformers as mine
from expertile.transformers.threads import let_torch_sleep
torch.set_num_threads(len(os.sched_getaffinity(0)))
{after}
spent = []
for _ in range(7):
    torch.ones(1 << 20).add_(1)
    before = time.process_time()
    time.sleep(0.1)
    spent.append(time.process_time() - before)
print(sorted(spent)[3])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="one core, or no libgomp")
def test_idle_threads_of_torch_leave_the_cores_to_a_layer():
    assert spinning_seconds("assert let_torch_sleep()") < 5e-4
    # That it is so for this reason.
    assert spinning_seconds("") > 1e-3


def test_who_has_decided_how_threads_wait_is_left_alone(monkeypatch):
    monkeypatch.setattr(threads, "_told", False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not threads.let_torch_sleep()


def test_slots_of_other_ranks_add_nothing():
    model = model_of("Mixtral", "expertile")
    experts = model.model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 4], [4, 4], [2, 1]])
    weights = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.25, 0.75]])
    with torch.no_grad():
        out = experts(x, ids, weights)
        assert not out[1].any()
        alone = experts(x[:1], ids[:1, :1], weights[:1, :1])
    assert torch.equal(out[:1], alone)


class TestWhatIsNotComputed:
    def test_says_so_when_the_model_is_made(self):
        found = r"model\.layers\.0\.mlp\.experts\._apply_gate of Qwen3MoeExperts is another function"
        # The model inside is made first.
        with pytest.raises(ValueError, match=found.removeprefix(r"model\.")):
            model_of("Qwen3Moe", "expertile", hidden_act="relu")
        # For those who do not ask, nothing changes.
        model = model_of("Qwen3Moe", "eager", hidden_act="relu")
        with pytest.raises(ValueError, match=found):
            model.set_experts_implementation("expertile")
        assert model.config._experts_implementation == "eager"
        assert model(torch.arange(3, 30).unsqueeze(0)).logits.shape == (1, 27, 320)

    def test_says_so_before_anything_is_loaded(self, tmp_path):
        model = model_of("Qwen3Moe", "eager", hidden_act="relu")
        model.save_pretrained(tmp_path)
        for file in tmp_path.glob("*.safetensors"):
            file.write_bytes(b"nobody reads this")
        load = transformers.AutoModelForCausalLM.from_pretrained
        with pytest.raises(ValueError, match="_apply_gate of Qwen3MoeExperts is another function"):
            load(tmp_path, dtype="bfloat16", experts_implementation="expertile")
        model_of("Qwen3Moe", "eager").save_pretrained(tmp_path)
        for file in tmp_path.glob("*.safetensors"):
            file.write_bytes(b"nobody reads this")
        with pytest.raises(TypeError, match=r"experts\.gate_up_proj has dtype torch.float32, expected bfloat16"):
            load(tmp_path, dtype="float32", experts_implementation="expertile")

    def test_may_be_converted_until_the_first_call(self):
        config = transformers.Qwen3MoeConfig(**COMMON, **FAMILIES["Qwen3Moe"])
        create = transformers.Qwen3MoeForCausalLM._from_config
        model = create(config, dtype=torch.float32, experts_implementation="expertile").eval()
        tokens = torch.arange(3, 30).unsqueeze(0)
        with torch.no_grad():
            with pytest.raises(TypeError, match="gate_up_proj has dtype torch.float32, expected bfloat16"):
                model(tokens)
            assert model.bfloat16()(tokens).logits.shape == (1, 27, 320)

    def test_says_so_of_what_changes_after_that(self):
        model = model_of("Qwen3Moe", "expertile")
        model.model.layers[0].mlp.experts.act_fn = torch.nn.ReLU()
        with torch.no_grad(), pytest.raises(ValueError, match="_apply_gate of Qwen3MoeExperts is another function"):
            model(torch.arange(3, 30).unsqueeze(0))

    def test_gradients(self):
        model = model_of("Qwen3Moe", "expertile").train()
        tokens = torch.arange(3, 30).unsqueeze(0)
        with pytest.raises(RuntimeError, match="computes no gradients: call model.eval"):
            model(tokens)
        # In evaluation, gradients that nobody asked for are in nobody's way.
        assert model.eval()(tokens).logits.shape == (1, 27, 320)

    def test_models_without_experts(self):
        config = transformers.LlamaConfig(**{**COMMON, "intermediate_size": 64})
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match="LlamaForCausalLM has no experts that expertile could compute"):
            model.set_experts_implementation("expertile")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "DeepseekV3", "GptOss"])
    def test_models_say_what_they_say_with_their_own_experts(self, family):
        expected, model = model_of(family, "eager", "cuda"), model_of(family, "expertile", "cuda")
        tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1)).cuda()
        with torch.no_grad():
            assert is_near(model(tokens).logits, expected, tokens)
        for module in experts_of(model):
            # Used in place; gpt-oss's are transposed and interleaved.
            assert module.gate_up_proj.is_meta if family == "GptOss" else module.gate_up_proj.is_cuda
        options = {"max_new_tokens": 8, "do_sample": False}
        same = (model.generate(tokens, **options) == expected.generate(tokens, **options)).float().mean()
        assert same > 0.9
        before = {name: weights.clone() for name, weights in expected.state_dict().items()}
        assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())

    def test_what_only_the_cpu_computes_says_so(self):
        model = model_of("Qwen3Moe", "eager", "cuda")
        model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU(approximate="tanh")
        expected = r'layers\.0\.mlp\.experts\.activation is "geglu_tanh", expected "swiglu" on a GPU'
        with pytest.raises(ValueError, match=expected):
            model.set_experts_implementation("expertile")
        assert model.config._experts_implementation == "eager"

    def test_fp8_experts(self):
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        config = transformers.Qwen3MoeConfig(
            **{**COMMON, **FAMILIES["Qwen3Moe"], "hidden_size": 256, "moe_intermediate_size": 128}
        )
        config._experts_implementation = "expertile"
        experts = fp8.FP8Experts(config, block_size=(128, 128)).cuda()
        with torch.no_grad():
            for name in ("gate_up_proj", "down_proj"):
                weights = getattr(experts, name)
                weights.copy_((torch.randn(weights.shape, device="cuda") * 30).to(torch.float8_e4m3fn))
                scales = getattr(experts, f"{name}_scale_inv")
                scales.copy_(torch.rand(scales.shape, device="cuda") * 0.005 + 0.001)
            x = torch.randn(33, 256, device="cuda").bfloat16()
            ids = torch.rand(33, 8, device="cuda").topk(2).indices
            router = torch.rand(33, 2, device="cuda")
            out = mine.experts_forward(experts, x, ids, router)

            def widened(name):
                scales = getattr(experts, f"{name}_scale_inv").repeat_interleave(128, 1).repeat_interleave(128, 2)
                return getattr(experts, name).float() * scales

            up, down, expected = widened("gate_up_proj"), widened("down_proj"), torch.zeros(33, 256, device="cuda")
            for slot in range(2):
                gate_up = torch.einsum("mh,mnh->mn", x.float(), up[ids[:, slot]])
                gate, linear = gate_up.chunk(2, -1)
                hidden = torch.nn.functional.silu(gate) * linear
                expected += router[:, slot, None] * torch.einsum("mi,mhi->mh", hidden, down[ids[:, slot]])
        assert distance(out, expected) < 6e-2
