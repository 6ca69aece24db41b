"""What the README prints runs as printed."""

import re
from pathlib import Path

import pytest


def test_the_example_runs_as_printed(capsys):
    pytest.importorskip("torch")
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Plan(tokens=64, topk=4, local_experts=16, alignment=128, m_sum=2048)"
    assert printed[-1] == "torch.Size([64, 256])"


def test_the_stubs_are_the_modules():
    pytest.importorskip("mypy")
    import subprocess
    import sys

    checked = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "expertile._native"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
