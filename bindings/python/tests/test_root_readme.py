"""What the repository's README prints runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[3] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="not in the repository")
def test_the_example_runs_as_printed(capsys):
    pytest.importorskip("torch")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["Plan(tokens=64, topk=4, local_experts=16, alignment=128, m_sum=2048)", "torch.Size([64, 256])"]
