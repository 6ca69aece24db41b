"""Transformers' experts: ours beside its own implementations, one module of a model's real size.

    transformers_experts.py [--models qwen3-30b-a3b,mixtral-8x7b] [--tokens 1,8,64,256,1024,4096] [--json FILE]
    transformers_experts.py --device cpu --models qwen3-30b-a3b --tokens 1,8,256

The module is Transformers' own (`Qwen3MoeExperts` with the model's sizes, bf16, random weights, random routing); only
its `experts_implementation` changes. Each result is compared with `grouped_mm`'s before it is timed. Two times: as a
program calls it, which waits for the host where that is slower, and replayed in a CUDA graph. Several sets of inputs
take turns, each with experts of its own draw.
"""

import argparse
import json
import sys
import time

import expertile.transformers as ours
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe

# Experts, chosen of them, H, I.
MODELS = {
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "deepseek-v3-ep8": (32, 8, 7168, 2048),
}
SETS = 4
# `batched_mm` copies the weights of every slot.
MOST_TOKENS = {"batched_mm": 64}


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call, repeats, rounds):
    """Median of several rounds, after one that warms up."""
    call()
    wait()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        times.append((time.perf_counter() - start) / repeats)
    return sorted(times)[rounds // 2]


def graph_of(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measure(experts, implementation, inputs):
    """Microseconds a call: as called, and in a graph (None on a CPU, and if it cannot be captured)."""
    experts.config._experts_implementation = implementation
    on_gpu = inputs[0][0].is_cuda

    def call():
        for x, ids, weights in inputs:
            experts(x, ids, weights)

    called = seconds_of(call, *((5, 9) if on_gpu else (1, 5))) / len(inputs)
    if not on_gpu:
        return called * 1e6, None
    try:
        graph = graph_of(call)
        replayed = seconds_of(graph.replay, 5, 9) / len(inputs) * 1e6
    except RuntimeError:
        torch.cuda.synchronize()
        replayed = None
    return called * 1e6, replayed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default="1,8,64,256,1024,4096")
    parser.add_argument("--implementations", default="expertile,grouped_mm,batched_mm")
    parser.add_argument("--json")
    options = parser.parse_args()
    implementations, device = options.implementations.split(","), options.device
    # Ours packs the weights of a CPU's module; the others still need them.
    ours.configure(keep_weights=True)
    ours.configure(max_tokens=max(int(tokens) for tokens in options.tokens.split(",")))
    rows = []
    print(
        f"{'model':<16} {'tokens':>6} " + " ".join(f"{name + ', called':>19} {'graph':>8}" for name in implementations)
    )
    for model in options.models.split(","):
        count, topk, hidden, intermediate = MODELS[model]
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=count)
        config._experts_implementation = "grouped_mm"
        with torch.device(device):
            experts = modeling_qwen3_moe.Qwen3MoeExperts(config).bfloat16().eval()
        for weights in experts.parameters():
            weights.requires_grad_(False).normal_(std=weights.shape[-1] ** -0.5)
        for tokens in map(int, options.tokens.split(",")):
            inputs = []
            for _ in range(SETS):
                scores = torch.rand(tokens, count, device=device)
                chosen = scores.topk(topk)
                weights = torch.softmax(chosen.values, -1).bfloat16()
                inputs.append((torch.randn(tokens, hidden, device=device).bfloat16(), chosen.indices, weights))
            row = {"model": model, "tokens": tokens, "us": {}}
            cells = []
            experts.config._experts_implementation = "grouped_mm"
            expected = experts(*inputs[0]).float()
            for name in implementations:
                if tokens > MOST_TOKENS.get(name, tokens):
                    cells.append(f"{'-':>19} {'-':>8}")
                    continue
                experts.config._experts_implementation = name
                found = experts(*inputs[0]).float()
                distance = float((found - expected).norm() / expected.norm())
                if not distance < 1e-2:
                    sys.exit(f"{name} is {distance} away from grouped_mm")
                called, replayed = measure(experts, name, inputs)
                row["us"][name] = {"called": called, "graph": replayed}
                cells.append(f"{called:>19.1f} " + (f"{replayed:>8.1f}" if replayed else f"{'-':>8}"))
            rows.append(row)
            print(f"{model:<16} {tokens:>6} " + " ".join(cells), flush=True)
        del experts
        torch.cuda.empty_cache()
    if options.json:
        with open(options.json, "w") as file:
            name = torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()} threads"
            json.dump({"device": name, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    with torch.no_grad():
        main()
