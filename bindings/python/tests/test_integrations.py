"""What ``docs/integrations.md`` prints runs as printed; on the CPU where there is no Hopper."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

DOCS = Path(__file__).parents[3] / "docs" / "integrations.md"
pytestmark = [
    pytest.mark.skipif(not DOCS.is_file(), reason="not in the repository"),
    pytest.mark.filterwarnings("default"),
]


def example(section):
    text = DOCS.read_text().split(f"\n## {section}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


def test_the_layer():
    code, names = example("PyTorch"), {}
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    exec(code if hopper else code.replace('"cuda"', '"cpu"'), names)
    assert names["out"].shape == (64, 1024) and names["out"].isfinite().all()


def test_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.17")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    names = {"name": tmp_path}
    exec(example("Transformers"), names)
    model = names["model"]
    assert model.config._experts_implementation == "expertile"
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        logits = model(tokens).logits
    assert any("_expertile_layer" in module.__dict__ for module in model.modules())
    eager = type(model).from_pretrained(tmp_path, dtype="bfloat16", experts_implementation="eager")
    with torch.no_grad():
        expected = eager(tokens).logits
    assert (logits - expected).double().norm() < 1e-2 * expected.double().norm()
