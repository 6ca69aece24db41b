"""The experts alone, on rows that a dispatcher has expanded, beside the whole layer on the same tokens; one Hopper GPU.

    python expanded_rows.py --tokens 1,64,1024,4096 --json expanded.json

Needs the package expertile and torch. Microseconds inside a graph, of `Layer.run_expanded` on bf16 rows and on e4m3
rows with scales, at DeepEP's alignment of 128, and of the layer from tokens to tokens; weights are e4m3 with block
scales.
"""

import argparse
import json
from pathlib import Path

import expertile.torch as et
import torch

SHAPES = {
    "dsv3_ep8": (7168, 2048, 32),
    "qwen235": (4096, 1536, 128),
    "qwen30b": (2048, 768, 128),
}
TOPK, ALIGNMENT, CALLS, REPEATS = 8, 128, 20, 7


def graph_us(call):
    """Of one of many calls captured together: the median of several replays."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return sorted(times[1:])[REPEATS // 2]


def e4m3_weights(experts, rows, cols):
    values = torch.randn(experts, rows, cols, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    scales = torch.rand(experts, -(-rows // 128), -(-cols // 128), device="cuda") * 0.01 + 0.01
    return values, scales


def rows_of(tokens, ids, experts):
    """Token rows, sorted by expert and aligned, with the end of each expert's: what a dispatcher hands over."""
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=experts)
    aligned = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    starts = aligned.cumsum(0) - aligned
    order = flat.argsort(stable=True)
    within = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
    rows = torch.zeros(int(aligned.sum()), tokens.shape[1], device=flat.device, dtype=tokens.dtype)
    rows[starts[flat[order]] + within] = tokens[order // ids.shape[1]]
    return rows, (starts + counts).to(torch.int32)


def quantized(rows):
    """e4m3 by groups of 128, with f32 scales."""
    groups = rows.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(2).clamp_min(1e-10) / 448
    return (groups / scale[:, :, None]).flatten(1).to(torch.float8_e4m3fn), scale


def layer_of(hidden, intermediate, experts):
    w13, s13 = e4m3_weights(experts, 2 * intermediate, hidden)
    w2, s2 = e4m3_weights(experts, hidden, intermediate)
    return et.Layer(w13, w2, w13_scale=s13, w2_scale=s2)


def measure(layer, tokens):
    """-> microseconds by what was called."""
    x = torch.randn(tokens, layer.hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(tokens, layer.local_experts, device="cuda").topk(TOPK).indices
    weights = torch.full((tokens, TOPK), 1 / TOPK, device="cuda")
    rows, psum = rows_of(x, ids, layer.local_experts)
    values, scale = quantized(rows)
    layer.prepare(tokens, TOPK)
    layer.prepare_expanded(len(rows))
    options = {"alignment": ALIGNMENT, "expected_rows": tokens * TOPK, "out": torch.empty_like(rows)}
    found = {
        "layer_us": graph_us(lambda: layer(x, ids, weights)),
        "bf16_rows_us": graph_us(lambda: layer.run_expanded(rows, psum, **options)),
        "e4m3_rows_us": graph_us(lambda: layer.run_expanded(values, psum, scale=scale, **options)),
    }
    layer.check()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,64,1024,4096")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    print(f"{'layer':<10} {'tokens':>6} {'layer us':>9} {'rows, bf16':>11} {'rows, e4m3':>11}")
    for name, sizes in SHAPES.items():
        layer = layer_of(*sizes)
        for tokens in map(int, options.tokens.split(",")):
            row = {"layer": name, "tokens": tokens} | measure(layer, tokens)
            found.append(row)
            times = f"{row['layer_us']:>9.1f} {row['bf16_rows_us']:>11.1f} {row['e4m3_rows_us']:>11.1f}"
            print(f"{name:<10} {tokens:>6} {times}", flush=True)
        del layer
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
