"""What an installed package carries."""

import importlib.metadata
import json
import os
import re
from pathlib import Path

import pytest


@pytest.fixture
def installed():
    distribution = importlib.metadata.distribution("expertile")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("installed in place, for development")
    return distribution


def test_the_licences_are_there(installed):
    texts = {file.name: file.read_text() for file in installed.files if "licenses" in file.parts}
    assert sorted(texts) == ["LICENSE-APACHE", "LICENSE-MIT"], texts.keys()
    assert "Apache License" in texts["LICENSE-APACHE"] and "Permission is hereby granted" in texts["LICENSE-MIT"]
    assert installed.metadata["License-Expression"] == "MIT OR Apache-2.0"


def test_the_extension_names_no_folder_of_its_builder(installed):
    (extension,) = (file for file in installed.files if re.match(r"_native.*\.(so|pyd)$", file.name))
    content = Path(extension.locate()).read_bytes()
    assert b"cargo/registry/src" in content  # There are names of files, and they start at a folder of the build's own.
    folders = {
        Path.home(),
        Path(__file__).resolve().parents[3],
        *(Path(os.environ[v]) for v in ("CARGO_HOME",) if v in os.environ),
    }
    for folder in folders:
        assert f"{folder}{os.sep}".encode() not in content, folder
    assert not re.findall(rb"/[\w./+-]*/(?:registry/src|rustup/toolchains|crates/expertile)/[\w./+-]*", content)
