"""Where torch's own packages keep NVRTC, the CUDA compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def beside_torch() -> list[Path]:
    """Libraries of NVRTC in the packages that torch's wheels depend on, newest first."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return []
    packages = Path(torch.origin).parent.parent / "nvidia"
    found = [*packages.glob("*/lib/libnvrtc.so.*"), *packages.glob("*/bin/**/nvrtc64_*_0.dll")]
    return sorted((path for path in found if "builtins" not in path.name and ".alt." not in path.name), reverse=True)
