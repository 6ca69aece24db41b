#!/usr/bin/env python3
"""The Markdown tables of one or more files of compare_rivals.py, later ones count: rivals_table.py FILE..."""

import argparse
import json
import sys

OURS = "ours"
TITLES = {
    "e4m3": "e4m3 experts with 128 x 128 block scales:",
    "bf16": "bf16 experts:",
    "mxfp4": "MXFP4 experts:",
}


def peers(data, row):
    """Times of the others that do the same work on the same bits; another way of ours is no peer."""
    others = (key for key in data["paths"] if key in row and key.split("_")[0] != OURS)
    return {key: row[key] for key in others}


def ratio(data, row):
    """How many times as long as ours the best peer takes; None where one of the two is not there."""
    others = peers(data, row)
    return min(others.values()) / row[OURS] if others and OURS in row else None


def number(us):
    """What was read as a whole number stays one."""
    return "-" if us is None else str(us) if isinstance(us, int) else f"{us:.{1 if us < 100 else 0}f}"


def show(data, layer, part, row):
    """One row, while it runs."""
    cells = [f"{key} {number(row.get(key))}" for key in data["paths"] if key in row]
    times, name = ratio(data, row), layer["name"] + ("" if layer["routing"] == "uniform" else f" {layer['routing']}")
    share = f" x{times:.2f}" if times else ""
    mine = [key for key in data["paths"] if key in row and key.split("_")[0] == OURS]
    shares = ", ".join(f"{key} {100 * row['floor'] / row[key]:.0f} %" for key in mine)
    share += f" {shares} of the floor" if mine else ""
    mark = "DRY RUN " if data.get("dry_run") else ""
    head = f"{mark}{name:16} {layer['format']} {part} {row['tokens']:6} floor {number(row['floor'])}"
    print(f"{head} {' '.join(cells)}{share}", flush=True)
    for key, why in row.get("wrong", {}).items():
        print(f"  {key} WRONG: {why}", flush=True)


def cell(row, key):
    untuned = row.get("choice", {}).get(key, {}).get("tuned") is False and key == "triton"
    return "wrong" if key in row.get("wrong", {}) else number(row.get(key)) + "*" * (untuned and key in row)


def table(data, layers):
    """All layers of one format."""
    keys = [key for key in data["paths"] if any(key in row for layer in layers for row in layer["rows"])]
    head = [
        "layer",
        "tokens",
        "floor",
        *(data["paths"][key] for key in keys),
        "best peer / Expertile",
        "floor / Expertile",
    ]
    yield f"| {' | '.join(head)} |"
    yield f"|---|{' --: |' * (len(head) - 1)}"
    for layer in layers:
        routed = "" if layer["routing"] == "uniform" else f", {layer['routing'].capitalize()} routing"
        for row in sorted(layer["rows"], key=lambda row: row["tokens"]):
            times = ratio(data, row)
            share = f"{100 * row['floor'] / row[OURS]:.0f} %" if OURS in row else "-"
            cells = [
                layer["name"] + routed,
                str(row["tokens"]),
                number(row["floor"]),
                *(cell(row, key) for key in keys),
            ]
            yield f"| {' | '.join([*cells, f'{times:.2f}' if times else '-', share])} |"


def invariance_table(data):
    keys = [key for key in data["paths"] if any(key in layer["values"] for layer in data["invariance"])]
    yield f"| layer | {' | '.join(data['paths'][key] for key in keys)} |"
    yield f"|---|{' --: |' * len(keys)}"
    for layer in data["invariance"]:
        sums = [
            [sum(part) for part in zip(*layer["values"][key].values(), strict=True)]
            for key in keys
            if key in layer["values"]
        ]
        yield f"| {layer['name']} | {' | '.join(f'{differing} of {of}' for differing, of in sums)} |"


def merged(files):
    """One of several runs: of a layer and size that was measured twice, the later."""
    data = dict(files[-1], paths={}, layers=[], gemms=[], invariance=[])
    for file in files:
        data["paths"] |= file["paths"]
        data["dry_run"] = data.get("dry_run") or file.get("dry_run", False)
        for part, inside in (("layers", "rows"), ("gemms", "rows"), ("invariance", "values")):
            for layer in file[part]:
                add(data[part], layer, inside)
    return data


def add(layers, layer, inside):
    same = lambda other: all(other[key] == value for key, value in layer.items() if key != inside)
    found = next((other for other in layers if same(other)), None)
    if found is None:
        layers.append(dict(layer))
    elif inside == "values":
        found[inside] = found[inside] | layer[inside]
    else:
        rows = {row["tokens"]: row for row in found[inside]}
        found[inside] = list((rows | {row["tokens"]: row for row in layer[inside]}).values())


def markdown(files):
    """-> the lines."""
    data = merged(files)
    if data["dry_run"]:
        yield "DRY RUN: no time was measured"
    yield ""
    yield f"{data['date']}, {data['device']}, driver {data['driver']}, commit {data['commit']}; microseconds."
    for format, title in TITLES.items():
        layers = [layer for layer in data["layers"] if layer["format"] == format]
        if layers:
            yield from ("", title, "", *table(data, layers))
    for format, title in TITLES.items():
        layers = [layer for layer in data["gemms"] if layer["format"] == format]
        if layers:
            yield from ("", f"GEMM 1 + GEMM 2 alone, {title}", "", *table(data, layers))
    if any(
        row.get("choice", {}).get("triton", {}).get("tuned") is False
        for layer in data["layers"]
        for row in layer["rows"]
    ):
        yield from ("", "(`*`: Triton ran its default tile, it has no tuned file for the shape.)")
    if data["invariance"]:
        yield from ("", "Values of a token's result that depend on the tokens beside it:", "", *invariance_table(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    files = []
    for path in parser.parse_args().files:
        with open(path, encoding="utf-8") as file:
            files.append(json.load(file))
    if any(file.get("dry_run") for file in files):
        raise SystemExit("a dry run's file has no results")
    print("\n".join(markdown(files)))


if __name__ == "__main__":
    sys.exit(main())
