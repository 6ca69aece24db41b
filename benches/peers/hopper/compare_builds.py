"""Two builds of this library in one process: the same bits, and the time of a layer's call in a graph and on the host.

    compare_builds.py BEFORE.so AFTER.so [--shapes dsv3,mixtral] [--shape H,I,E,topk,G] [--tokens 1,64,4096]
                      [--format bf16] [--json FILE]

Graphs take turns, so that both builds have the same clock. Host time is that of queueing a call, launches included.
"""

import argparse
import importlib.util
import json
import os
import sys
import time

import torch

# `compare` loads the library that is named here.
os.environ.setdefault("EXPERTILE_LIB", next((path for path in sys.argv[1:] if path.endswith(".so")), ""))
from expert_layer import calls_for, layer_weights
from shapes import SHAPES, WEIGHT_BYTES, add_shape, floor_us
from timing import race

# Seconds of replays before the clocks count.
HOT_SECONDS = 0.3


def build(path, name):
    """`ours` over one of the libraries."""
    os.environ["EXPERTILE_LIB"] = path
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(os.path.dirname(os.path.abspath(__file__)), "ours.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def host_us(call, repeats=400):
    """Median microseconds of queueing a call while the device is behind."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats // 9):
            call()
        times.append((time.perf_counter() - start) / (repeats // 9) * 1e6)
        torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--shapes", default="dsv3,dsv3_ep8,qwen235,mixtral")
    parser.add_argument("--shape", action="append", default=[], metavar="H,I,E,topk[,G]", help="beside --shapes")
    parser.add_argument("--tokens", default="1,64,1024,4096")
    parser.add_argument("--format", choices=list(WEIGHT_BYTES), default="e4m3")
    parser.add_argument("--json")
    options = parser.parse_args()
    modules = {"before": build(options.before, "before"), "after": build(options.after, "after")}
    rows, same = [], True
    print(
        f"{'shape':<26} {'tokens':>6} {'graph us: before':>17} {'after':>9} {'ratio':>6} {'floor':>7}"
        f" {'host us: before':>16} {'after':>6}"
    )
    shapes = [*filter(None, options.shapes.split(",")), *map(add_shape, options.shape)]
    for shape in shapes:
        weights = layer_weights(shape, options.format)
        _, _, _, topk, global_experts = SHAPES[shape]
        tokens_list = [int(tokens) for tokens in options.tokens.split(",")]
        layers = {
            name: module.Layer(
                *(module.Mxfp4(*w.pair) if options.format == "mxfp4" else w.pair for w in weights),
                topk,
                global_experts,
                max(tokens_list),
            )
            for name, module in modules.items()
        }
        for tokens in tokens_list:
            calls = calls_for(shape, tokens, weights[0].shape)
            bound, outs = {}, {}
            for name, layer in layers.items():
                workspace = torch.empty(layer.choice(tokens)[0] + 256, device="cuda", dtype=torch.uint8)
                outs[name] = [torch.full_like(call.x, float("nan")) for call in calls]
                ids = [call.ids.to(torch.int32) for call in calls]
                bound[name] = [
                    layer.bind(call.x, i, call.weights, out, workspace, call.expert_map)
                    for call, i, out in zip(calls, ids, outs[name], strict=True)
                ]
                for call in bound[name]:
                    call()
                    call.check()
            bits = {name: [out.view(torch.int16) for out in values] for name, values in outs.items()}
            same &= all(torch.equal(a, b) for a, b in zip(bits["before"], bits["after"], strict=True))
            us = race(bound, 50 + tokens, HOT_SECONDS)
            numbers = SHAPES[shape].numbers()
            floor = sum(floor_us(numbers, call.live, call.active, options.format) for call in calls) / len(calls)
            host = {name: host_us(calls[0]) for name, calls in bound.items()}
            times = {"graph_us": us, "floor_us": floor, "host_us": host}
            rows.append({"shape": shape, "tokens": tokens, **times, "same_bits": same})
            print(
                f"{shape:<26} {tokens:>6} {us['before']:>17.1f} {us['after']:>9.1f}"
                f" {us['after'] / us['before']:>6.3f} {floor:>7.1f} {host['before']:>16.2f} {host['after']:>6.2f}",
                flush=True,
            )
        del layers, bound, outs, weights
        torch.cuda.empty_cache()
    print("the same bits" if same else "OTHER BITS")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
