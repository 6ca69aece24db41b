"""DeepSeek-V4 as published, on a CPU: MXFP4 experts stay in 4 bits, and say what the widened ones say."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import distance, experts_of, model_of, share_near  # noqa: E402
from transformers.integrations.finegrained_fp8 import FP8Experts  # noqa: E402

import expertile.transformers  # noqa: E402, F401

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: Transformers widens nothing"),
]

TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))


def checkpoint(folder, **settings):
    """A tiny model whose routed experts are random nibbles with scales that keep sums of their products near 1."""
    model_of("DeepseekV4", "eager").save_pretrained(folder)
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".experts." not in name:
            weights[name] = tensor
            continue
        rows, columns = tensor.shape
        weights[name] = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
        scales = torch.randint(122, 124, (rows, columns // 32), generator=generator, dtype=torch.uint8)
        weights[name.replace(".weight", ".scale")] = scales.view(torch.float8_e8m0fnu)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
        "expert_dtype": "fp4", **settings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, implementation):
    options = {"dtype": "bfloat16", "experts_implementation": implementation}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def fp4_experts(model):
    return [module for module in model.modules() if isinstance(module, FP8Experts)]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def outputs(model):
    """What every module of experts gives for the same tokens on the same experts."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 64, generator=generator).bfloat16()
    chosen = torch.rand(40, 8, generator=generator).topk(2)
    modules = [module for name, module in model.named_modules() if name.endswith(".experts")]
    with torch.no_grad():
        return torch.cat([module(x, chosen.indices, chosen.values.bfloat16()) for module in modules])


def test_experts_in_bf16_say_what_their_own_say():
    expected, model = model_of("DeepseekV4", "eager"), model_of("DeepseekV4", "expertile")
    assert share_near(logits(model), logits(expected)) > 0.8
    assert len(experts_of(model)) == 2


def test_fp4_experts_stay_so_and_say_what_the_widened_ones_say(tmp_path):
    folder = checkpoint(tmp_path)
    expected, model = load(folder, "eager"), load(folder, "expertile")
    assert not fp4_experts(expected) and len(fp4_experts(model)) == 2
    assert all(module.gate_up_proj.dtype == module.down_proj.dtype == torch.int8 for module in fp4_experts(model))
    # Widening rounds nothing here.
    assert distance(outputs(model), outputs(expected)) < 6e-3
    assert share_near(logits(model), logits(expected), within=3e-2) > 0.8
    assert len(experts_of(model)) == 2 and fp4_experts(model)[0].gate_up_proj.is_meta


def test_a_wrong_scale_is_seen(tmp_path):
    """That the comparison above can fail."""
    folder = checkpoint(tmp_path)
    expected, model = load(folder, "eager"), load(folder, "expertile")
    scales = fp4_experts(model)[0].down_proj_scale_inv.data.view(torch.uint8)
    scales += 1
    assert distance(outputs(model), outputs(expected)) > 0.1


def test_a_saved_copy_is_the_same_model(tmp_path):
    folder = checkpoint(tmp_path / "fp4")
    model, stored = load(folder, "expertile"), load_file(folder / "model.safetensors")
    first = logits(model)
    model.save_pretrained(tmp_path / "copy")
    kept = load_file(tmp_path / "copy" / "model.safetensors")
    experts = [name for name in stored if ".experts." in name and name.endswith("weight")]
    assert len(experts) == 48 and all(torch.equal(kept[name], stored[name]) for name in experts)
    assert torch.equal(logits(load(tmp_path / "copy", "expertile")), first)


def test_scales_that_are_no_exponents_are_widened_as_before(tmp_path):
    model = load(checkpoint(tmp_path, scale_fmt="float"), "expertile")
    assert not fp4_experts(model)
    weights = [weights for name, weights in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    assert weights and all(tensor.dtype == torch.bfloat16 for tensor in weights)
