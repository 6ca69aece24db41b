"""The Markdown tables of one or more files of compare_layer.py, later ones count: table_layer.py FILE..."""

import argparse
import json

from shapes import SHAPES

PARTS = ("layer", "gemm", "eager", "stages", "sweep")
STAGES = ("permute", "gemm1", "activation", "gemm1 + activation", "gemm2", "unpermute")
FEW = 256  # tokens up to which reading the weights decides
READ = 4.2e6  # bytes in a microsecond: the floor's


def merged(files):
    """-> the runs, and each part's rows: of what was measured twice, the later."""
    runs = [json.load(open(file)) for file in files]
    parts = {part: {} for part in PARTS}
    for run in runs:
        for part, rows in parts.items():
            for row in run.get(part, []):
                key = row["shape"], row["tokens"], row.get("gemm")
                if "wrong" not in row or key not in rows:
                    rows[key] = row
    order = lambda key: (list(SHAPES).index(key[0]), key[1], key[2] or 0)
    return runs, {part: {key: rows[key] for key in sorted(rows, key=order)} for part, rows in parts.items()}


def pair(mine, theirs):
    digits = 1 if min(mine, theirs) < 1000 else 0
    return f"{mine:.{digits}f} / {theirs:.{digits}f} ({theirs / mine:.2f}x)"


def span(values, digits=2):
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def each(values):
    return ", ".join(dict.fromkeys(values))


def head(runs):
    smi = [run["device"]["smi"].split(", ") for run in runs]
    clocks = [float(run.get("device_after", run["device"])["smi"].split(", ")[2].split()[0]) for run in runs]
    dates, commits = each(run["date"] for run in runs), each(run["commit"] for run in runs)
    measured = lambda key, digits=2: span([run[key] for run in runs], digits)
    print(
        f"""# Expertile's grouped GEMM and layer beside DeepGEMM's and vLLM 0.33.0's, {dates}, commit {commits}

{smi[0][0]}, driver {smi[0][1]}, torch {runs[0]["device"]["torch"]}; SM clock at the end {span(clocks, 0)} MHz. Measured
there: copy {measured("copy_tbs")} TB/s (read and written), read {measured("read_tbs")} TB/s, one large e4m3 product on
random data {measured("fp8_tflops", 0)} TFLOP/s. vLLM's quantizer: its {each(run["quantizer"] for run in runs)} kernel.

Microseconds, ours / theirs (how many times faster ours is), both sides' graphs replayed in turns after some hundred
milliseconds of load. Uniform routing, distinct experts, random rows and weights; where a call's weights could stay in
the cache, up to eight routings take turns. Results were held against f64 and against the other side's first.
"""
    )


def gemm_table(rows, rate, bandwidth):
    print(
        """## Grouped GEMM: ours at alignment 8, DeepGEMM at 128, the same live rows

*Share*: of the large product's rate (M above 256) or of the bandwidth (active weights and rows, M up to 256).
*Tile*: rows / blocks that share them / parts of K, and a w where tokens stand on the matrix unit's M side.

| shape | M | live rows | N x K | us | TFLOP/s | TB/s | share | tile |
|---|---|---|---|---|---|---|---|---|"""
    )
    for r in rows:
        start = f"| {r['shape']} | {r['tokens']} |"
        if "wrong" in r:
            print(f"{start} wrong: {r['wrong']} | | | | | | |")
            continue
        us = r["ours"][r["chosen"]]
        tflops, tbs = r["flop"] / us / 1e6, r["bytes"] / us / 1e6
        share = tbs / bandwidth if r["tokens"] <= FEW else tflops / rate
        cells = f"{r['live_rows']:.0f} | {r['n']} x {r['k']} | {pair(us, r['theirs'])} | {tflops:.0f} | {tbs:.2f}"
        print(f"{start} {cells} | {100 * share:.0f} % | {r['chosen']} |")


def layer_table(rows, eager):
    print(
        """
## Whole layer

*Eager*: launches included, the L2 flushed. *Floor*: the active experts' weights over 4.2 TB/s. *Workspace*: for vLLM
the two that it asks for and its scales. *Distance*: to the layer in f64, ours / theirs.

| shape | M | graph | eager | floor | ours / floor | workspace, MiB | distance |
|---|---|---|---|---|---|---|---|"""
    )
    for key, r in rows.items():
        start = f"| {r['shape']} | {r['tokens']} |"
        if "wrong" in r:
            print(f"{start} wrong: {r['wrong']} | | | | | |")
            continue
        floor = r["weight_bytes"] / READ
        floors = f"{floor:.1f} | {r['graph']['ours'] / floor:.2f}" if r["tokens"] <= FEW else "- | -"
        launched = eager.get(key, {})
        launched = pair(launched["ours"], launched["theirs"]) if "ours" in launched else "-"
        mine, theirs = (r["workspace"][side] / 2**20 for side in ("ours", "theirs"))
        distance = " / ".join(f"{r['distance'][side][0]:.1e}" for side in ("ours", "vllm"))
        print(
            f"{start} {pair(r['graph']['ours'], r['graph']['theirs'])} | {launched} | {floors}"
            f" | {mine:.1f} / {theirs:.1f} ({theirs / mine:.1f}x) | {distance} |"
        )


def stage_table(rows):
    print(
        """
## The layer's stages, each in a graph of its own

*Permute*: quantize, routing and layout included. *gemm1 + activation*: ours in one launch where a star says so, else
the sum of two.
"""
    )
    print(f"| shape | M | {' | '.join(STAGES)} |\n|---|---|{'---|' * len(STAGES)}")
    for r in rows:
        cells = " | ".join(
            pair(r["ours"][stage], r["theirs"][stage]) + "*" * ("+" in stage and r["inside"]) for stage in STAGES
        )
        print(f"| {r['shape']} | {r['tokens']} | {cells} |")


def sweep_table(rows):
    print("\n## Tiles of our GEMM, microseconds; the chosen one with a star\n")
    print("| shape | M | N x K | DeepGEMM | ours |\n|---|---|---|---|---|")
    for r in rows:
        cells = ", ".join(
            f"{tile}{'*' if tile == r['chosen'] else ''} {us:.1f}"
            for tile, us in sorted(r["ours"].items(), key=lambda item: item[1])
        )
        print(f"| {r['shape']} | {r['tokens']} | {r['n']} x {r['k']} | {r['theirs']:.1f} | {cells} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--json")
    options = parser.parse_args()
    runs, parts = merged(options.files)
    right = {part: [row for row in rows.values() if "wrong" not in row] for part, rows in parts.items()}
    head(runs)
    if parts["gemm"]:
        gemm_table(
            parts["gemm"].values(),
            max(run["fp8_tflops"] for run in runs),
            max(max(run["read_tbs"], run["copy_tbs"]) for run in runs),
        )
    if parts["layer"]:
        layer_table(parts["layer"], parts["eager"])
    if right["stages"]:
        stage_table(right["stages"])
    if right["sweep"]:
        sweep_table(right["sweep"])
    if options.json:
        facts = [{key: value for key, value in run.items() if key not in PARTS} for run in runs]
        with open(options.json, "w") as file:
            json.dump(dict(runs=facts, **{part: list(rows.values()) for part, rows in parts.items()}), file, indent=1)


if __name__ == "__main__":
    main()
