"""What was compared, as lines for a terminal and as the table of the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEAD = """| family | Transformers 5 | public hub | FP8 | parts | largest distance |
|---|---|---|---|---|---|
"""


def text(row: Any) -> str:
    """One comparison on one line."""
    line = f"{row.verdict:12} {row.family:24} {row.layout:34} {row.run:44}"
    if row.message or row.verdict in ("not refused", "not read"):
        return f"{line} {row.message or 'ran without complaint'}"
    return (
        f"{line} experts {row.same}/{row.decided}, weights {row.weights:.0e}, "
        f"whole {row.whole:.1e}, worst row {row.worst_row:.1e}"
    )


def markdown(rows: Iterable[Any]) -> str:
    """A line for each family, made of every comparison with its checkpoints."""
    families: dict[str, list[Any]] = {}
    for row in rows:
        if row.verdict in ("right", "differs", "not read") or not row.run.startswith(row.family.split("/")[0]):
            families.setdefault(row.family.split("/")[0], []).append(row)
    return HEAD + "".join(_line(family, of_family) for family, of_family in sorted(families.items()))


def _line(family: str, rows: list[Any]) -> str:
    fp8 = sorted({row.layout.removeprefix("hub, ") for row in rows if "fp8" in row.layout and row.verdict == "right"})
    parts = "routed, shared" if any("shared alone" in row.run for row in rows) else "routed"
    plain = [row for row in rows if "e4m3" not in row.run]
    largest = max((row.whole for row in plain), default=0.0)
    cells = (
        f"`{family}`",
        _verdict(row for row in rows if row.layout.startswith("Transformers")),
        _verdict(row for row in rows if row.layout in ("hub", "fused experts")) or "the same",
        "; ".join(fp8) or "-",
        parts,
        f"{largest:.0e}",
    )
    return "| " + " | ".join(cells) + " |\n"


def _verdict(rows: Iterable[Any]) -> str:
    verdicts = sorted({row.verdict for row in rows})
    return ", ".join(verdicts)
