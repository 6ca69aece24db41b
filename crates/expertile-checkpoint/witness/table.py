"""What was compared, as lines for a terminal and as the table of the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEAD = """| family | Transformers 5 | public hub | FP8, MXFP4, int4 | bf16 router | shared expert alone | largest distance |
|---|---|---|---|---|---|---|
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
    """A line for each family, made of all comparisons with its checkpoints."""
    families: dict[str, list[Any]] = {}
    for row in rows:
        if row.decided > 0 or row.verdict == "not read":
            families.setdefault(row.family.split("/")[0], []).append(row)
    return HEAD + "".join(_line(family, of_family) for family, of_family in sorted(families.items()))


def _line(family: str, rows: list[Any]) -> str:
    names = (row.layout.removeprefix("hub, ").removeprefix("fp8").strip(", ") for row in rows if _quantized(row))
    schemes = sorted({name or "f32 scales" for name in names})
    plain = [row for row in rows if "e4m3" not in row.run]
    cells = (
        f"`{family}`",
        _verdict(row for row in rows if row.layout.startswith("Transformers")),
        _verdict(row for row in rows if row.layout in ("hub", "fused experts")),
        ", ".join(schemes) or "-",
        _verdict(row for row in rows if row.run == "bf16 router"),
        _verdict(row for row in rows if row.run.endswith("shared alone")),
        f"{max(row.whole for row in plain):.1e}",
    )
    return "| " + " | ".join(cells) + " |\n"


def _quantized(row: Any) -> bool:
    return any(name in row.layout for name in ("fp8", "fp4", "int4")) and row.verdict == "right"


def _verdict(rows: Iterable[Any]) -> str:
    """What all of these came to: one word, or all that there were."""
    return ", ".join(sorted({row.verdict for row in rows})) or "-"
