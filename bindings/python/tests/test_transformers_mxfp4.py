"""MXFP4 checkpoints of gpt-oss, on a CPU and on a GPU: experts stay in 4 bits, and say what the widened ones say."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import distance  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

import expertile.transformers  # noqa: E402
from expertile.transformers.mxfp4 import experts_class  # noqa: E402
from on_gpu import no_hopper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
no_gpu = pytest.mark.skipif(no_hopper() is not None, reason=str(no_hopper()))
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])

HIDDEN, INTERMEDIATE, EXPERTS = 64, 96, 8
TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))


def blocks_of(rows, columns, generator):
    """Random nibbles, and scales that keep sums of their products near 1."""
    blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 124, (EXPERTS, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def checkpoint(folder, intermediate=INTERMEDIATE):
    """A tiny gpt-oss as published."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=intermediate, num_local_experts=EXPERTS, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=320,
        pad_token_id=0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    generator, weights = torch.Generator().manual_seed(3), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            _, columns, rows = tensor.shape
            weights[f"{name}_blocks"], weights[f"{name}_scales"] = blocks_of(rows, columns, generator)
        else:
            random = torch.randn(tensor.shape, generator=generator) * 0.2
            weights[name] = random.to(tensor.dtype) if "bias" in name else tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, implementation, device, **more):
    options = {"dtype": "bfloat16", "experts_implementation": implementation, "device_map": device, **more}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def load_widened(folder, implementation, device):
    return load(folder, implementation, device, quantization_config=transformers.Mxfp4Config(dequantize=True))


def packed_experts(model):
    return [module for module in model.modules() if isinstance(module, experts_class())]


def logits(model):
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits.double()


@on_every_device
def test_experts_stay_in_four_bits_and_say_what_the_widened_ones_say(tmp_path, device):
    folder = checkpoint(tmp_path)
    widened, model = load_widened(folder, "eager", device), load(folder, "expertile", device)
    assert len(packed_experts(model)) == 2 and not packed_experts(widened)
    assert model.device.type == device
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith(("_blocks", "_scales")):
            assert torch.equal(parameter.cpu(), stored[name]), name
    assert widened.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    chosen = torch.rand(40, EXPERTS, generator=torch.Generator().manual_seed(5)).topk(2)
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    ids, router = chosen.indices.to(device), chosen.values.bfloat16().to(device)
    for module, wide in zip(packed_experts(model), (layer.mlp.experts for layer in widened.model.layers), strict=True):
        ours = module(x, ids, router)
        with torch.no_grad():
            theirs = wide.float()(x.float(), ids, router.float())
        assert distance(ours.double(), theirs.double()) < 8e-3
    widened = load_widened(folder, "eager", device)
    assert distance(logits(model), logits(widened)) < 2e-2
    # As on bfloat16 experts, which are widened to the same values.
    on_wide = load_widened(folder, "expertile", device)
    assert not packed_experts(on_wide)
    assert distance(logits(model), logits(on_wide)) < 2e-2


@on_every_device
def test_the_same_model_saved_as_bfloat16_says_the_same(tmp_path, device):
    folder = checkpoint(tmp_path / "mxfp4")
    widened = load_widened(folder, "eager", device)
    config = transformers.GptOssConfig.from_pretrained(folder)
    del config.quantization_config
    copy = transformers.GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
    copy.load_state_dict(widened.state_dict())
    copy.save_pretrained(tmp_path / "bf16")
    model = load(tmp_path / "bf16", "expertile", device)
    assert not packed_experts(model)
    expected = logits(widened)
    for ours in (model, load(folder, "expertile", device)):
        assert distance(logits(ours), expected) < 2e-2
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta


@on_every_device
def test_memory_is_given_back_and_a_saved_model_is_the_checkpoint(tmp_path, device):
    folder = checkpoint(tmp_path / "first")
    model = load(folder, "expertile", device)
    expected = logits(model)
    for module in packed_experts(model):
        assert module.gate_up_proj_blocks.is_meta and module.down_proj_blocks.is_meta
    model.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(load(tmp_path / "second", "expertile", device)), expected)


@on_every_device
@pytest.mark.parametrize("copy", [False, True])
def test_activations_in_e4m3_where_they_are_asked_for(tmp_path, device, copy):
    folder = checkpoint(tmp_path, intermediate=128)
    expected = logits(load(folder, "expertile", device))
    with pytest.raises(ValueError, match="mxfp4_activations is 'fp8', expected 'bf16' or 'e4m3'"):
        expertile.transformers.configure(mxfp4_activations="fp8")
    expertile.transformers.configure(mxfp4_activations="e4m3", e4m3_copy=copy)
    try:
        model = load(folder, "expertile", device)
        found = logits(model)
    finally:
        expertile.transformers.configure(mxfp4_activations="bf16", e4m3_copy=False)
    assert 0 < distance(found, expected) < 5e-2
    stored = load_file(folder / "model.safetensors")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], stored[name]) for name in stored if name.endswith(("_blocks", "_scales")))


@on_every_device
def test_other_implementations_are_refused_and_other_models_are_widened_as_ever(tmp_path, device):
    folder = checkpoint(tmp_path)
    model = load(folder, "expertile", device)
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="MXFP4 experts that were loaded for expertile"):
        logits(model)
    model.set_experts_implementation("expertile")
    logits(model)
    assert not packed_experts(load_widened(folder, "eager", device))
    assert auto.AUTO_QUANTIZER_MAPPING["mxfp4"].__name__ == "ExpertileMxfp4HfQuantizer"


@on_every_device
def test_a_scale_that_is_nan_is_an_error(tmp_path, device):
    folder = checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.experts.down_proj_scales"][3, 5, 2] = 255
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="scales is 255, expected at most 254"):
        logits(load(folder, "expertile", device))
