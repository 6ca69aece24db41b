"""``expertile.transformers`` beside Transformers' own eager experts, in its own models with random weights."""

import copy
import gc

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("transformers.integrations.moe")

import expertile.transformers as mine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Qwen3Moe": {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "GptOss": {
        "intermediate_size": 48,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
}
IMPLEMENTED = sorted(FAMILIES)


@pytest.fixture(autouse=True)
def defaults():
    yield
    mine.configure(keep_weights=False, max_tokens=8192)


def model_of(family, implementation, device="cpu", seed=0, **more):
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES[family], **more})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        config, dtype=torch.bfloat16, experts_implementation=implementation
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name and "expert" in name:
                parameter.normal_(std=0.1)
            elif parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(device).eval()


def experts_of(model):
    return [module for module in model.modules() if "_expertile_layer" in module.__dict__]


def distance(mine, expected):
    return float((mine.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", IMPLEMENTED)
def test_models_say_what_they_say_with_their_own_experts(family):
    expected, model = model_of(family, "eager"), model_of(family, "expertile")
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, its = model(tokens).logits, expected(tokens).logits
    assert len(experts_of(model)) == (1 if family == "DeepseekV3" else 2) and not experts_of(expected)
    assert distance(logits, its) < 1e-2
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
        assert distance(model(tokens).logits, expected(tokens).logits) > 2e-2


def test_memory_is_given_back_and_saving_says_why_it_cannot(tmp_path):
    model = model_of("Qwen3Moe", "expertile")
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    tokens = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        first = model(tokens).logits
    for module in experts_of(model):
        assert module.gate_up_proj.is_meta and module.down_proj.is_meta
        assert module.gate_up_proj.shape == (8, 96, 64)
    with pytest.raises(RuntimeError, match=r"packed by expertile .*keep_weights=True"):
        model.save_pretrained(tmp_path / "after")
    with pytest.raises(RuntimeError, match="packed by expertile"):
        model.load_state_dict(before)
    load = transformers.Qwen3MoeForCausalLM.from_pretrained
    again = load(tmp_path / "before", dtype=torch.bfloat16, experts_implementation="expertile").eval()
    mine.configure(keep_weights=True)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, first)
    again.save_pretrained(tmp_path / "kept")
    kept = load(tmp_path / "kept", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(kept[name], weights) for name, weights in before.items())


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
        assert distance(model(tokens).logits, expected(tokens).logits) < 1e-2


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
        assert distance(compiled(tokens).logits, expected) < 1e-2


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


def test_what_is_not_computed_says_so():
    tokens = torch.arange(3, 30).unsqueeze(0)
    model = model_of("Qwen3Moe", "expertile", hidden_act="relu")
    with torch.no_grad(), pytest.raises(ValueError, match="_apply_gate of Qwen3MoeExperts is another function"):
        model(tokens)
    model = model_of("Qwen3Moe", "expertile").float()
    with torch.no_grad(), pytest.raises(TypeError, match="gate_up_proj has dtype torch.float32, expected bfloat16"):
        model(tokens)
    model = model_of("Qwen3Moe", "expertile").train()
    with pytest.raises(RuntimeError, match="computes no gradients: call model.eval"):
        model(tokens)
    # In evaluation, gradients that nobody asked for are in nobody's way.
    assert model.eval()(tokens).logits.shape == (1, 27, 320)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "DeepseekV3"])
    def test_models_say_what_they_say_with_their_own_experts(self, family):
        expected, model = model_of(family, "eager", "cuda"), model_of(family, "expertile", "cuda")
        tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1)).cuda()
        with torch.no_grad():
            assert distance(model(tokens).logits, expected(tokens).logits) < 1e-2
        for module in experts_of(model):
            assert module.gate_up_proj.is_cuda  # used in place
        options = {"max_new_tokens": 8, "do_sample": False}
        same = (model.generate(tokens, **options) == expected.generate(tokens, **options)).float().mean()
        assert same > 0.9

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
