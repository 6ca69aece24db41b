"""Expertile's grouped GEMM and whole layer beside DeepGEMM's and vLLM 0.33.0's, in one process. README.md says how to run it.

    PEER_DIR=... python3 compare_layer.py --out FOLDER [--parts gemm,layer] [--shapes dsv3,...] [--tokens 1,8,...] [--sweep]

Results are checked first, then timed inside CUDA graphs that take turns, clocks hot; the layer also eagerly, the L2 flushed.
`--sweep` times every tile of our GEMM that is worth it. `--compile` only fills DeepGEMM's cache (DG_JIT_CACHE_DIR) for the
shapes and tokens: it compiles one kernel at a time, for many seconds, so a process for each GEMM does it.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import gemm_part  # noqa: E402
import layer_part  # noqa: E402
import ours  # noqa: E402
from compare import SHAPES, copy_tbs, device_facts  # noqa: E402
from expert_layer import layer_weights  # noqa: E402
from timing import fp8_tflops, read_tbs  # noqa: E402


def options_of(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=".")
    parser.add_argument("--name", default="compare_layer", help="of the JSON file")
    parser.add_argument("--parts", default="gemm,layer")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,32,64,128,256,1024,4096,16384")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--no-stages", dest="stages", action="store_false", help="of the layer")
    parser.add_argument("--hot", type=float, default=0.3, help="seconds of load before each timing")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile-gemm", type=int, default=0, metavar="1 or 2", help="only this one, in this process")
    parser.add_argument("--quick", action="store_true", help="what tuning needs: a sweep of two shapes")
    parser.add_argument("--commit", default="")
    options = parser.parse_args(arguments)
    if options.quick:
        options.parts, options.sweep, options.hot = "gemm", True, 0.12
        options.shapes, options.tokens = "dsv3_ep8,qwen235", "1,8,64,256,1024,4096"
    return options


def measurements(peer, shapes, tokens, parts, options):
    """Yields (part, row); a row that went wrong says so."""
    for shape in shapes:
        start = time.perf_counter()
        hidden, _, _, topk, global_experts = SHAPES[shape]
        weights = layer_weights(shape)
        layer = None
        if "layer" in parts:
            layer = ours.Layer(*(w.pair for w in weights), topk, global_experts, max_tokens=max(tokens))
        torch.cuda.synchronize()
        print(f"# {shape}: ready after {time.perf_counter() - start:.1f} s", flush=True)
        for count in tokens:
            for part in parts:
                try:
                    if part == "gemm":
                        rows = gemm_part.measure(peer, shape, count, weights, options)
                    else:
                        rows = [layer_part.measure(peer, shape, count, weights, layer, options)]
                except Exception as error:  # noqa: BLE001
                    rows = [dict(shape=shape, tokens=count, wrong=f"{type(error).__name__}: {error}")]
                for row in rows:
                    yield part, row
                torch.cuda.empty_cache()
        del weights, layer


def compile_theirs(options, seconds=150):
    """All at once; what fails to compile here says so where it is used."""
    command = [sys.executable, os.path.abspath(__file__), "--tokens", options.tokens]
    gemms = [(shape, which) for shape in options.shapes.split(",") for which in ("1", "2")]
    running = [subprocess.Popen([*command, "--shapes", shape, "--compile-gemm", which], stderr=subprocess.DEVNULL) for shape, which in gemms]
    start = time.perf_counter()
    for gemm, process in zip(gemms, running):
        try:
            code = process.wait(max(seconds - (time.perf_counter() - start), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"no end after {seconds} s"
        if code != 0:
            print(f"compiling {gemm}: {code}")
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)


def main():
    options = options_of()
    if options.compile:
        return compile_theirs(options)
    shapes, tokens, parts = options.shapes.split(","), list(map(int, options.tokens.split(","))), options.parts.split(",")
    torch.zeros(1, device="cuda")
    import vllm_peer as peer

    if options.compile_gemm:
        return gemm_part.compile_theirs(peer, shapes, tokens, options.compile_gemm)
    results = dict(date=time.strftime("%F"), commit=options.commit, device=device_facts(), quantizer=peer.quantizer, copy_tbs=copy_tbs(),
                   read_tbs=read_tbs(), fp8_tflops=fp8_tflops(), gemm=[], layer=[])
    print("copy {copy_tbs:.2f} TB/s, read {read_tbs:.2f} TB/s, fp8 {fp8_tflops:.0f} TFLOP/s, quantizer {quantizer}".format(**results), flush=True)
    if options.sweep:
        gemm_part.compile_ours(gemm_part.all_tiles())
    wrong = 0
    for part, row in measurements(peer, shapes, tokens, parts, options):
        results[part].append(row)
        if "wrong" in row:
            wrong += 1
            print(f"{row['shape']:8} {row['tokens']:5} {part} WRONG: {row['wrong']}", flush=True)
        else:
            (gemm_part if part == "gemm" else layer_part).show(row)
        save(results, options)
    results["device_after"] = device_facts()
    save(results, options)
    print(results["device_after"]["smi"])
    sys.exit(min(wrong, 1))


def save(results, options):
    with open(os.path.join(options.out, options.name + ".json"), "w") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
