"""What the tests of hostile calls share. What could take the process with it runs in one of its own."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

try:
    import torch
except ImportError:
    torch = None

FULL = os.environ.get("EXPERTILE_HOSTILE_SCALE") == "full"
"""Counts of a release's proof instead of the suite's: minutes instead of seconds."""

KINDS = ["numpy"] + (["torch"] if torch else [])
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
TRACED = "a trace is being recorded"


def run_python(program, timeout=120, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def as_kind(kind, array):
    return torch.from_numpy(array) if kind == "torch" and isinstance(array, np.ndarray) else array
