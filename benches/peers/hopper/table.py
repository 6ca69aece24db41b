"""The Markdown table of a `compare.json`: python3 table.py compare.json DATE COMMIT"""

import json
import sys

results = json.load(open(sys.argv[1]))
copy = sum(results["copy_tbs"]) / len(results["copy_tbs"])


def pair(mine, theirs):
    return "-" if mine is None or theirs is None else f"{mine:.1f} / {theirs:.1f} ({theirs / mine:.1f}x)"


def share(size, us):
    return f"{100 * size / us / 1e6 / copy:.0f} %"


DEVICE, DRIVER = results["device"]["smi"].split(", ")[:2]
COPIES = ", ".join(f"{x:.2f}" for x in results["copy_tbs"])
print(
    f"""# Expertile's GPU steps beside vLLM 0.33.0's, {sys.argv[2]}, commit {sys.argv[3]}

{DEVICE}, driver {DRIVER}, torch {results["device"]["torch"]}.
Copy bandwidth (device to device, bytes read + written), before and after: {COPIES} TB/s.

Microseconds, ours / theirs (how many times faster ours is). *Warm*: one set of buffers inside a CUDA graph.
*Rotated*: sets that together are several times the L2. *Eager*: launches included, L2 flushed. *Share*: bytes that must
move (rows, their scales, ids; not the padding's zeros) over rotated time, of the copy bandwidth; *written*: with these
zeros, which the layout promises. Alignment 128, the reference's M_sum; *warm, by 8*: ours in the layout that its own
layer uses for few tokens. Theirs for unpermute is, warm, the faster of its two kernels (the CUDA one only without an
expert map) and, rotated, the Triton one. Layout, rows, scales and sums of ours were checked bit for bit before they
were timed; the activation is in the tests.
"""
)
print("## Routing + plan + quantize + permute\n")
print("| shape | M | warm | warm, by 8 | rotated | eager | share | written |\n|---|---|---|---|---|---|---|---|")
for r in results["rows"]:
    decode = r.get("ours_qp_decode")
    size, us = r["quantize_permute_bytes"], r["ours_qp_rotated"]
    cells = (
        pair(r["ours_qp_graph"], r["theirs_qp_graph"]),
        f"{decode:.1f}" if decode else "-",
        pair(us, r["theirs_qp_rotated"]),
        pair(r["ours_qp_eager"], r["theirs_qp_eager"]),
        share(size, us),
        share(size + r["padding_scale_bytes"], us),
    )
    print(f"| {r['shape']} | {r['tokens']} | {' | '.join(cells)} |")
print("\n## Unpermute + reduce, and activation + quantize\n")
print("| shape | M | unpermute warm | unpermute rotated | share | activation rotated | share |")
print("|---|---|---|---|---|---|---|")
for r in results["rows"]:
    faster = min(x for x in (r["theirs_up_graph"], r["theirs_up_cuda"]) if x)
    act = r.get("ours_act_rotated")
    cells = (
        pair(r["ours_up_graph"], faster),
        pair(r["ours_up_rotated"], r["theirs_up_rotated"]),
        share(r["unpermute_bytes"], r["ours_up_rotated"]),
        pair(act, r.get("theirs_act_rotated")),
        share(r["activation_bytes"], act) if act else "-",
    )
    print(f"| {r['shape']} | {r['tokens']} | {' | '.join(cells)} |")
