"""The linear layers of FP8 checkpoints on a CPU: multiplied as float8_e4m3fn, and given back as they were."""

import copy
import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")
from safetensors.torch import load_file, save_file  # noqa: E402
from test_transformers_fp8 import E4M3, TOKENS, WIDE, checkpoint, load  # noqa: E402
from tiny_models import distance, share_near  # noqa: E402
from transformers.integrations.finegrained_fp8 import FP8Linear  # noqa: E402

import expertile.transformers as mine  # noqa: E402
from expertile.transformers.fp8_linear import PackedFP8Linear  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: Transformers widens nothing"),
]

# Attention is of whole blocks, too.
WHOLE = {**WIDE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SIZES = {"Qwen3Moe": WHOLE, "Qwen2Moe": WHOLE | {"shared_expert_intermediate_size": 128}}


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}


def layer_of(rows, cols, bias=False):
    """A layer with random weights, and those weights in float64."""
    layer = FP8Linear(cols, rows, block_size=(128, 128), has_bias=bias)
    layer.__class__ = PackedFP8Linear
    generator = torch.Generator().manual_seed(rows * cols)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, cols, generator=generator))
        layer.weight_scale_inv.copy_(torch.rand(layer.weight_scale_inv.shape, generator=generator) + 0.5)
        if bias:
            layer.bias.copy_(torch.randn(rows, generator=generator))
            layer.bias = torch.nn.Parameter(layer.bias.bfloat16())
    scales = layer.weight_scale_inv.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return layer, layer.weight.double() * scales


# Of whole blocks and of partial ones, as DeepSeek-V3's 576 rows are.
@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (576, 256), (8, 64), (136, 320)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_the_stored_weights(rows, cols, bias):
    layer, weights = layer_of(rows, cols, bias)
    x = torch.randn(2, 5, cols, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.double() @ weights.T + (layer.bias.double() if bias else 0)
    with torch.no_grad():
        for count in (5, 1, 0):
            found = layer(x[:, :count])
            assert found.shape == (2, count, rows) and found.dtype == torch.bfloat16
            if count:
                # Rounded to eight bits once, and with a bias twice.
                assert distance(found, expected[:, :count]) < 4e-3
    assert layer.weight.is_meta


def test_other_scales_and_other_weights_are_seen():
    layer, weights = layer_of(128, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        first = layer(x)
        layer.weight_scale_inv.mul_(2)
        assert torch.equal(layer(x), 2 * first)
        layer.load_state_dict({**layer.state_dict(), "weight": -layer.state_dict()["weight"].float()})
        assert torch.equal(layer(x), -2 * first)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        assert torch.equal(other(x), -2 * first) and torch.equal(layer(x), -2 * first)


def test_float32_rows_are_multiplied_in_float32():
    layer, weights = layer_of(128, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer(x.bfloat16())
        assert layer(x).dtype == torch.float32
        assert distance(layer(x), x.double() @ weights.T) < 1e-6


def test_the_gradient_of_the_input_is_that_of_the_widened_weights():
    layer, weights = layer_of(128, 256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    out = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    layer(x).backward(out)
    assert distance(x.grad, (out.double() @ weights).detach()) < 8e-3


@pytest.mark.parametrize("family", ["Qwen3Moe", "Qwen2Moe"])
def test_a_model_says_what_the_widened_one_says_in_half_of_the_memory(family, tmp_path):
    folder = checkpoint(tmp_path, family, sizes=SIZES[family])
    expected, model, stored = load(folder, "eager"), load(folder, "expertile"), load_file(folder / "model.safetensors")
    found = linears(model)
    # q, k, v and o of two layers; Qwen2-MoE also has three of a shared expert in each.
    assert len(found) == (8 if family == "Qwen3Moe" else 14) and not linears(expected)
    assert all(type(module) is PackedFP8Linear for module in found.values())
    with torch.no_grad():
        # Widening rounds a weight's product with its scale to eight bits.
        assert share_near(model(TOKENS).logits, expected(TOKENS).logits, within=2e-2) > 0.8
    for name, module in found.items():
        assert module.weight.is_meta
        assert torch.equal(model.state_dict()[f"{name}.weight"].float(), stored[f"{name}.weight"].float())


def test_a_wrong_scale_of_attention_is_seen(tmp_path):
    """That the comparison above can fail."""
    folder = checkpoint(tmp_path, "Qwen3Moe", sizes=WHOLE)
    expected, model = load(folder, "eager"), load(folder, "expertile")
    with torch.no_grad():
        linears(model)["model.layers.0.self_attn.v_proj"].weight_scale_inv.mul_(1.5)
        assert share_near(model(TOKENS).logits, expected(TOKENS).logits, within=2e-2) < 0.5


def test_a_saved_copy_and_a_deep_one_are_the_same_model(tmp_path):
    folder = checkpoint(tmp_path / "fp8", "Qwen3Moe", sizes=WHOLE)
    model, stored = load(folder, "expertile"), load_file(folder / "model.safetensors")
    with torch.no_grad():
        first = model(TOKENS).logits
        assert torch.equal(copy.deepcopy(model)(TOKENS).logits, first)
        model.save_pretrained(tmp_path / "copy")
        kept = load_file(tmp_path / "copy" / "model.safetensors")
        assert {name: x.dtype for name, x in kept.items()} == {name: x.dtype for name, x in stored.items()}
        assert all(torch.equal(kept[name].float(), x.float()) for name, x in stored.items())
        assert torch.equal(load(tmp_path / "copy", "expertile")(TOKENS).logits, first)
        assert share_near(load(tmp_path / "copy", "eager")(TOKENS).logits, first, within=2e-2) > 0.8


def test_compiled_models_give_the_same_after_a_first_call(tmp_path):
    model = load(checkpoint(tmp_path, "Qwen3Moe", sizes=WHOLE), "expertile")
    with torch.no_grad():
        expected = model(TOKENS).logits
        compiled = torch.compile(model)
        assert distance(compiled(TOKENS).logits, expected) < 1e-2


def test_what_is_stored_unquantized_stays_so(tmp_path):
    folder = checkpoint(tmp_path, "Qwen3Moe", sizes=WHOLE)
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.o_proj.weight"
    scale = weights.pop(f"{name}_scale_inv")
    weights[name] = (weights[name].float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)).bfloat16()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    expected, model = load(folder, "eager"), load(folder, "expertile")
    assert len(linears(model)) == 7
    assert torch.equal(model.state_dict()[name], weights[name])
    with torch.no_grad():
        assert share_near(model(TOKENS).logits, expected(TOKENS).logits, within=2e-2) > 0.8


def test_weights_and_scales_may_be_in_two_files(tmp_path):
    folder = checkpoint(tmp_path, "Qwen3Moe", sizes=WHOLE)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [name.endswith("scale_inv") for name in weights]
    files = {name: f"model-{part:d}.safetensors" for name, part in zip(weights, parts, strict=True)}
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert len(linears(load(folder, "expertile"))) == 8


def test_where_names_are_others_linear_layers_are_widened(tmp_path):
    folder = checkpoint(tmp_path, "Qwen3Moe", sizes=WHOLE)
    options = {"dtype": "bfloat16", "experts_implementation": "expertile"}
    model = transformers.AutoModel.from_pretrained(folder, **options).eval()
    assert not linears(model)
    expected = transformers.AutoModel.from_pretrained(folder, dtype="bfloat16", experts_implementation="eager").eval()
    name = "layers.0.self_attn.q_proj.weight"
    assert model.state_dict()[name].dtype == torch.bfloat16
    assert torch.equal(model.state_dict()[name], expected.state_dict()[name])


def test_weights_are_kept_if_asked(tmp_path):
    mine.configure(keep_weights=True)
    try:
        layer, _ = layer_of(128, 128)
        with torch.no_grad():
            layer(torch.zeros(1, 128).bfloat16())
        assert layer.weight.dtype == E4M3 and not layer.weight.is_meta
    finally:
        mine.configure(keep_weights=False)
