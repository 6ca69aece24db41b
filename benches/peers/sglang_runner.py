#!/usr/bin/env python3
"""SGLang's runner of an expert layer: with our core beside its Triton runner, whole calls.

    sglang_host.py WHEELS/sglang-0.5.23-*.whl SGLANG.tar.xz; mkdir SGLANG; tar xf SGLANG.tar.xz -C SGLANG
    sglang_runner.py --source SGLANG [--layers qwen30b,dsv3_ep8] [--tokens 1,8,64,256,1024,4096] [--json FILE]

Needs a Hopper, torch, Triton, Transformers, expertile, msgspec and dill, and nvcc, ninja and apache-tvm-ffi for the
kernels that SGLang compiles when it runs. `MoeRunner.run` is SGLang's own, from the dispatcher's output to the input of
its combine, with the scaling factor of the model; weights, inputs and routing are random. Each result is compared with
the other's before it is timed. Two times in microseconds: as a program calls it, which waits for the host where that is
slower, and in CUDA graphs that take turns. Several sets of inputs, each with its own routing, take turns as well.
`*`: SGLang has no tuned tiles for this layer on this GPU and Triton, and says so.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "hopper")]
import sglang_host  # noqa: E402

import timing  # noqa: E402

# H, I, local experts, global experts, topk, routed_scaling_factor, e4m3.
LAYERS = {
    "dsv3_tp8": (7168, 256, 256, 256, 8, 2.5, True),
    "dsv3_ep8": (7168, 2048, 32, 256, 8, 2.5, True),
    "qwen235_tp4": (4096, 384, 128, 128, 8, None, True),
    "qwen30b": (2048, 768, 128, 128, 8, None, True),
    "qwen30b_bf16": (2048, 768, 128, 128, 8, None, False),
    "mixtral_bf16": (4096, 14336, 8, 8, 2, None, False),
    # To try the script, on a CPU too.
    "tiny": (256, 256, 8, 16, 2, 2.5, True),
}
SETS = 4


class Tuned(logging.Handler):
    """Whether SGLang has said that it has no tuned tiles; it says so once for a layer's sizes."""

    def __init__(self):
        super().__init__()
        self.missing = False
        logging.getLogger("sglang").addHandler(self)

    def emit(self, record):
        message = record.getMessage()
        self.missing |= "Using default MoE kernel config" in message and "_down" not in message


def weights_of(shape, device):
    from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo

    hidden, intermediate, experts, _, _, _, e4m3 = shape

    def random(*sizes):
        weights = torch.empty(sizes, dtype=torch.float8_e4m3fn if e4m3 else torch.bfloat16, device=device)
        for matrix in weights:
            matrix.copy_(torch.randn(sizes[1:], device=device) / (1 if e4m3 else sizes[2] ** 0.5))
        return weights

    def scales(*sizes):
        blocks = [-(-size // 128) for size in sizes[1:]]
        return (torch.rand(sizes[0], *blocks, device=device) + 0.5) / sizes[2] ** 0.5

    sizes = {"w13": (experts, 2 * intermediate, hidden), "w2": (experts, hidden, intermediate)}
    fields = {f"{name}_weight": random(*size) for name, size in sizes.items()}
    if e4m3:
        fields |= {f"{name}_scale": scales(*size) for name, size in sizes.items()}
        fields |= {"use_fp8_w8a8": True, "block_shape": [128, 128]}
    return TritonMoeQuantInfo(**fields)


def calls_of(shape, tokens, device):
    from sglang.srt.layers.moe.token_dispatcher.standard import (
        StandardDispatchOutput,
        _map_topk_ids_to_local_experts,
    )
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    hidden, _, experts, global_experts, topk, _, _ = shape
    here = torch.full((global_experts,), -1, dtype=torch.int32, device=device)
    here[:experts] = torch.arange(experts, dtype=torch.int32, device=device)
    for _ in range(SETS):
        logits = torch.randn(tokens, global_experts, device=device)
        weights, ids = logits.softmax(1).topk(topk)
        ids = ids.int() if experts == global_experts else _map_topk_ids_to_local_experts(ids.int(), here)
        x = torch.randn(tokens, hidden, device=device).bfloat16()
        yield StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, logits))


def runners_of(shape):
    """SGLang's runner before our plugin is loaded, or with its core taken out, and with our core."""
    from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig, runner
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    _, _, experts, global_experts, topk, factor, _ = shape
    config = {"num_experts": global_experts, "num_local_experts": experts, "top_k": topk}
    # Triton's may write where its input is, which would change the input from call to call.
    config = MoeRunnerConfig(**config, inplace=False, routed_scaling_factor=factor)
    ours = MoeRunner(MoeRunnerBackend.TRITON, config)
    factory = runner._CUSTOM_RUNNER_CORE_FACTORIES.pop("triton")
    theirs = MoeRunner(MoeRunnerBackend.TRITON, config)
    runner._CUSTOM_RUNNER_CORE_FACTORIES["triton"] = factory
    return {"expertile": ours, "triton": theirs}


def called_us(calls, rounds=9, repeats=5):
    """Median of several rounds of calls as a program makes them."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            for call in calls:
                call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / repeats / len(calls) * 1e6)
    return timing.median(times)


def measure(shape, weights, tokens, device):
    """Microseconds of both, as called and in graphs, and the distance of the results."""
    inputs, runners = list(calls_of(shape, tokens, device)), runners_of(shape)
    found = {name: runner.run(inputs[0], weights).hidden_states.double() for name, runner in runners.items()}
    if runners["expertile"].runner_core._held.calls != 1:
        sys.exit("our core has left the call to Triton's runner: the log says why")
    # A rank may have none of the experts of the only token.
    size = float(found["triton"].norm()) or 1.0
    distance = float((found["expertile"] - found["triton"]).norm()) / size
    if not distance < (4e-2 if shape[-1] else 1e-2):
        sys.exit(f"the results are {distance} apart")
    calls = {
        name: [lambda runner=runner, call=call: runner.run(call, weights) for call in inputs]
        for name, runner in runners.items()
    }
    called = {name: called_us(several, *((9, 5) if device == "cuda" else (1, 1))) for name, several in calls.items()}
    graph = timing.race(calls, min(called.values()), hot_seconds=0.4) if device == "cuda" else {}
    return {"called": called, "graph": graph, "distance": distance}


def register():
    """As SGLang's loader does it for EXPERTILE_SGLANG=experts."""
    import expertile.sglang
    from sglang.srt.plugins.hook_registry import HookRegistry

    expertile.sglang.register()
    HookRegistry.apply_hooks()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="folder with sglang/; an installed one, if not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", default=",".join(name for name in LAYERS if name != "tiny"))
    parser.add_argument("--tokens", default="1,2,4,8,16,64,256,1024,4096")
    parser.add_argument("--json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    sglang_host.ready(options.source)
    sglang_host.serve_one_process()
    register()
    print("stand-ins:", ", ".join(sglang_host.stand_ins) or "none", flush=True)
    print(f"{'':<20}   {'as called':^28}   {'in a graph':^28}")
    print(f"{'layer':<13} {'tokens':>6}" + f"   {'expertile':>10} {'triton':>10} {'times':>6}" * 2)
    rows = []
    for name in options.layers.split(","):
        shape = LAYERS[name]
        weights, tuned = weights_of(shape, options.device), Tuned()
        for tokens in map(int, options.tokens.split(",")):
            row = {"layer": name, "tokens": tokens, **measure(shape, weights, tokens, options.device)}
            rows.append(row | {"tuned": not tuned.missing})
            cells = [f"{name:<13} {tokens:>6}"]
            for times in (row["called"], row["graph"]):
                if times:
                    ratio = times["triton"] / times["expertile"]
                    mark = "*" if tuned.missing else " "
                    cells.append(f"{times['expertile']:>10.1f} {times['triton']:>9.1f}{mark} {ratio:>6.2f}")
            print("   ".join(cells), flush=True)
        logging.getLogger("sglang").removeHandler(tuned)
        del weights
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        import triton

        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        with open(options.json, "w") as file:
            json.dump({"device": device, **versions, "stand_ins": sglang_host.stand_ins, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    with torch.no_grad():
        main()
