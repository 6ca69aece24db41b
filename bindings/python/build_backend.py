"""maturin, told to keep the builder's folders out of the extension.

Messages of a panic name the source file, by default where the builder had it. Cargo's own setting against that is not
stable yet, and a configuration file cannot name folders that only the machine knows.
"""

from __future__ import annotations

import os
from pathlib import Path

from maturin import *  # noqa: F403  What a build front end calls.


def _keep_folders_out() -> None:
    home, here = Path.home(), Path(__file__).resolve()
    folders = {
        Path(os.environ.get("CARGO_HOME", home / ".cargo")): "cargo",
        Path(os.environ.get("RUSTUP_HOME", home / ".rustup")): "rustup",
        next((folder for folder in here.parents if (folder / "crates").is_dir()), here.parent): "expertile",
    }
    flags = [f"--remap-path-prefix={folder}={name}" for folder, name in folders.items()]
    if "CARGO_ENCODED_RUSTFLAGS" in os.environ:
        os.environ["CARGO_ENCODED_RUSTFLAGS"] = "\x1f".join([os.environ["CARGO_ENCODED_RUSTFLAGS"], *flags])
        return
    # The builder's own flags stay: those of the environment here, those of cargo's configuration are merged by cargo.
    variable = "RUSTFLAGS" if "RUSTFLAGS" in os.environ else "CARGO_BUILD_RUSTFLAGS"
    separate = [flag for flag in flags if " " not in flag]
    os.environ[variable] = " ".join([os.environ.get(variable, ""), *separate]).strip()


_keep_folders_out()
