"""FP8 checkpoints of Transformers on a CPU: what is float8_e4m3fn stays so, what is not is as ever."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import distance, experts_of, model_of, share_near  # noqa: E402
from transformers.integrations.finegrained_fp8 import FP8Experts, Fp8Quantize  # noqa: E402
from transformers.quantizers import auto  # noqa: E402
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer  # noqa: E402

import expertile.transformers  # noqa: E402, F401

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: Transformers widens nothing"),
]

WIDE = {"hidden_size": 256, "moe_intermediate_size": 128}
TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
E4M3 = torch.float8_e4m3fn


def checkpoint(folder, family, block=(128, 128), sizes=WIDE, **config_keys):
    """A model's weights as Transformers' own operation quantizes them, and the configuration that says so.

    It leaves matrices alone that are no whole blocks: with these sizes those of attention.
    """
    model_of(family, "eager", **sizes).save_pretrained(folder)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block), **config_keys}
    quantizer = FineGrainedFP8HfQuantizer(transformers.FineGrainedFP8Config(**settings))
    quantize, weights = Fp8Quantize(quantizer), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        matrix = "proj" in name and name.endswith(".weight") and tensor.dim() == 2
        weights |= quantize.convert({name: tensor}) if matrix else {name: tensor}
    assert sum(tensor.dtype == E4M3 for tensor in weights.values()) > 20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def load(folder, implementation, **more):
    options = {"dtype": "bfloat16", "experts_implementation": implementation, **more}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def fp8_experts(model):
    return [module for module in model.modules() if isinstance(module, FP8Experts)]


def bytes_of(model):
    """Of all weights of experts, scales included."""
    parameters = [weights for name, weights in model.named_parameters() if ".experts." in name]
    return sum(weights.numel() * weights.element_size() for weights in parameters)


def outputs(model):
    """What every module of experts of a model gives for the same tokens on the same experts."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 256, generator=generator).bfloat16()
    chosen = torch.rand(40, 8, generator=generator).topk(2)
    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    return torch.cat([module(x, chosen.indices, chosen.values.bfloat16()) for module in modules])


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3"])
def test_experts_stay_e4m3_and_say_what_the_widened_ones_say(family, tmp_path):
    folder = checkpoint(tmp_path, family)
    expected, model = load(folder, "eager"), load(folder, "expertile")
    experts = fp8_experts(model)
    assert len(experts) == (1 if family == "DeepseekV3" else 2) and not fp8_experts(expected)
    stored = load_file(folder / "model.safetensors")
    for module in experts:
        assert module.gate_up_proj.dtype == module.down_proj.dtype == E4M3
        assert module.gate_up_proj_scale_inv.dtype == torch.float32
    last = f"model.layers.{model.config.num_hidden_layers - 1}.mlp.experts."
    assert torch.equal(experts[-1].down_proj[3].float(), stored[last + "3.down_proj.weight"].float())
    # What is not float8_e4m3fn in the checkpoint is as in the widened model, bit for bit.
    others = {name: weights for name, weights in expected.state_dict().items() if ".experts." not in name}
    mine = model.state_dict()
    assert all(torch.equal(mine[name], weights) for name, weights in others.items() if stored[name].dtype != E4M3)
    assert bytes_of(model) < 0.51 * bytes_of(expected)
    with torch.no_grad():
        # What differs is that widening rounds the product with a scale to 8 bits.
        assert distance(outputs(model), outputs(expected)) < 8e-3
        assert share_near(model(TOKENS).logits, expected(TOKENS).logits) > 0.8
    assert len(experts_of(model)) == len(experts) and experts[0].gate_up_proj.is_meta


def test_a_wrong_scale_is_seen(tmp_path):
    """That the comparison above can fail."""
    folder = checkpoint(tmp_path, "Qwen3Moe")
    expected, model = load(folder, "eager"), load(folder, "expertile")
    with torch.no_grad():
        fp8_experts(model)[0].down_proj_scale_inv.mul_(1.5)
        assert distance(outputs(model), outputs(expected)) > 0.1
        assert share_near(model(TOKENS).logits, expected(TOKENS).logits) < 0.5


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3"])
def test_a_saved_copy_is_the_same_model(family, tmp_path):
    folder = checkpoint(tmp_path / "fp8", family)
    model = load(folder, "expertile")
    with torch.no_grad():
        first = model(TOKENS).logits
        model.save_pretrained(tmp_path / "copy")
        kept, stored = load_file(tmp_path / "copy" / "model.safetensors"), load_file(folder / "model.safetensors")
        experts = [name for name in stored if ".experts." in name]
        assert len(experts) > 40 and kept.keys() <= stored.keys()
        assert all(torch.equal(kept[name].float(), stored[name].float()) for name in experts)
        assert all(kept[name].dtype == stored[name].dtype for name in experts)
        assert kept["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
        assert torch.equal(load(tmp_path / "copy", "expertile")(TOKENS).logits, first)
        assert share_near(load(tmp_path / "copy", "eager")(TOKENS).logits, first) > 0.8


def test_who_does_not_ask_gets_what_transformers_does(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, "Qwen3Moe")
    with torch.no_grad():
        for implementation in ("eager", "grouped_mm"):
            model = load(folder, implementation)
            with monkeypatch.context() as patch:
                patch.setitem(auto.AUTO_QUANTIZER_MAPPING, "fp8", FineGrainedFP8HfQuantizer)
                theirs = load(folder, implementation)
            assert [type(module) for module in model.modules()] == [type(module) for module in theirs.modules()]
            assert torch.equal(model(TOKENS).logits, theirs(TOKENS).logits)
            assert not hasattr(model.config, "quantization_config")


def widened(model):
    assert not fp8_experts(model)
    assert all(weights.dtype == torch.bfloat16 for name, weights in model.named_parameters() if "experts." in name)
    return model


def test_what_no_layer_computes_is_widened_as_before(tmp_path):
    folder = checkpoint(tmp_path / "blocks", "Qwen3Moe", block=(64, 64))
    expected, model = load(folder, "eager"), widened(load(folder, "expertile"))
    with torch.no_grad():
        assert distance(outputs(model), outputs(expected)) < 8e-3
    folder = checkpoint(tmp_path / "asked", "Qwen3Moe")
    asked = transformers.FineGrainedFP8Config(dequantize=True)
    model = widened(load(folder, "expertile", quantization_config=asked))
    with torch.no_grad():
        assert distance(outputs(model), outputs(load(folder, "eager"))) < 8e-3


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3"])
def test_with_scales_that_are_powers_of_two_tokens_are_those_of_the_widened_model(family, tmp_path):
    folder = checkpoint(tmp_path, family, scale_fmt="ue8m0")
    expected, model = load(folder, "eager"), load(folder, "expertile")
    assert fp8_experts(model)[0].down_proj_scale_inv.dtype == torch.float8_e8m0fnu
    with torch.no_grad():
        # Widening rounds nothing here.
        assert distance(outputs(model), outputs(expected)) < 6e-3
        options = {"max_new_tokens": 8, "do_sample": False}
        generated, theirs = model.generate(TOKENS, **options), expected.generate(TOKENS, **options)
    # A tie between two tokens, or two experts, may fall the other way, and everything after it.
    assert (generated == theirs).float().mean() > 0.8


def test_errors_come_before_anything_is_read(tmp_path):
    folder = checkpoint(tmp_path, "Qwen3Moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    (folder / "model.safetensors").write_bytes(b"nobody reads this")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\._apply_gate of Qwen3MoeExperts is another"):
        load(folder, "expertile")
