"""How torch's threads and a layer's share the cores: a product of torch and a layer that take turns.

    thread_pools.py [--seconds 1.5] [--rounds 2] [--json FILE]    # two minutes, most of which go into importing torch

Variants, each in a process of its own, in turn: `torch alone` does something else on one thread in the layer's place;
`spinning` leaves torch's threads as they are; `sleeping` is what `expertile.transformers` does from its first layer on;
`passive` and `active` set OMP_WAIT_POLICY. Each with as many threads as there are cores on both sides, and with half of
them. `--load N` runs N processes beside them that only compute: a machine that others work on, too. Printed: turns per
second, which is what a program gets, and milliseconds of a product and of a layer's call, the least and the median of
all turns; the best of the rounds. On a loaded machine the median hides the turns that wait for a core.
"""

import argparse
import json
import os
import subprocess
import sys
import time

VARIANTS = ("torch alone", "spinning", "sleeping", "passive", "active")
TURN_SECONDS = 5e-4


def turns(variant, threads, seconds):
    """Seconds of each product and of each layer's call."""
    import expertile
    import expertile.torch as et
    import torch
    from expertile.transformers.threads import let_torch_sleep

    torch.set_num_threads(threads)
    expertile.set_num_threads(threads)
    if variant == "sleeping" and not let_torch_sleep():
        sys.exit("torch has no libgomp here")
    experts, topk, hidden, intermediate = 8, 8, 512, 768
    w13 = torch.randn(experts, 2 * intermediate, hidden).bfloat16() / 22
    layer = et.Layer(w13, torch.randn(experts, hidden, intermediate).bfloat16() / 28)
    x, ids, weights = torch.randn(1, hidden).bfloat16(), torch.arange(topk).unsqueeze(0), torch.rand(1, topk)
    square = torch.randn(256, 256)
    products, layers = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(square, square)
        between = time.perf_counter()
        if variant == "torch alone":
            while time.perf_counter() < between + TURN_SECONDS:
                pass
        else:
            layer(x, ids, weights)
        products.append(between - started)
        layers.append(time.perf_counter() - between)
    return products, layers


def summary(seconds):
    ordered = sorted(seconds)
    return {"least_ms": ordered[0] * 1e3, "median_ms": ordered[len(ordered) // 2] * 1e3}


def child(options):
    products, layers = turns(options.child, options.threads, options.seconds)
    turns_each_second = len(products) / (sum(products) + sum(layers))
    print(json.dumps({"product": summary(products), "layer": summary(layers), "turns_per_second": turns_each_second}))


def run(variant, threads, seconds):
    environment = dict(os.environ)
    if variant in ("passive", "active"):
        environment["OMP_WAIT_POLICY"] = variant
    command = [sys.executable, __file__, "--child", variant, "--threads", str(threads), "--seconds", str(seconds)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load)]
    rows = []
    try:
        for threads in sorted({cores, max(cores // 2, 1)}, reverse=True):
            for round_index in range(options.rounds):
                for variant in VARIANTS:
                    found = run(variant, threads, options.seconds)
                    rows.append({"variant": variant, "threads": threads, "round": round_index, **found})
    finally:
        for process in busy:
            process.kill()
    columns = ("turns/s", "product", "median", "layer", "median")
    print(f"{'variant':<12} {'threads':>7} " + " ".join(f"{name:>9}" for name in columns) + f"   ms, {cores} cores")
    for threads, variant in dict.fromkeys((row["threads"], row["variant"]) for row in rows):
        same = [row for row in rows if (row["threads"], row["variant"]) == (threads, variant)]
        cells = [
            min(row[what][key] for row in same) for what in ("product", "layer") for key in ("least_ms", "median_ms")
        ]
        most = max(row["turns_per_second"] for row in same)
        print(f"{variant:<12} {threads:>7} {most:>9.0f} " + " ".join(f"{cell:>9.3f}" for cell in cells))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"cores": cores, "load": options.load, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
