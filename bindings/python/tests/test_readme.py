"""What the README prints runs as printed."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent
README = (FOLDER / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def printed_by(example, capsys):
    exec(compile(example, "README.md", "exec"), {})
    return capsys.readouterr().out.splitlines()


def test_the_example_runs_as_printed(capsys):
    pytest.importorskip("torch")
    printed = printed_by(blocks("python")[0], capsys)
    assert printed[0] == "Plan(tokens=64, topk=4, local_experts=16, alignment=128, m_sum=2048)"
    assert printed[1].startswith("torch.Size([2048, 256]) (1, 2048) tensor([")
    assert printed[-1] == "torch.Size([64, 256])"


def test_the_error_carries_what_is_printed(capsys):
    _, example = blocks("python")
    assert printed_by(example, capsys) == ["alignment 0 at least 1"]


def test_the_installation_is_the_one_that_is_tested():
    (commands,) = blocks("console")
    assert commands == "$ pip install ./bindings/python\n"
    origin = json.loads(metadata.distribution("expertile").read_text("direct_url.json") or "{}")
    if "dir_info" not in origin:
        pytest.skip("not installed from a folder")
    assert origin["url"].endswith("bindings/python")


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        assert (FOLDER / path).exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", (FOLDER / path).read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_the_stubs_are_the_modules():
    pytest.importorskip("mypy")
    import subprocess
    import sys

    checked = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "expertile._native"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
