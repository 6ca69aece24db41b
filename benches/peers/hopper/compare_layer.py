"""Expertile's grouped GEMM and layer beside DeepGEMM's and vLLM 0.33.0's, in one process. README.md says how to run it.

    PEER_DIR=... python3 compare_layer.py --out FOLDER [--parts layer,gemm] [--shapes dsv3,...] [--tokens 1,8,...]

Parts, in the order given, each over all shapes and tokens: `layer` (graph) and `gemm`, both checked first; `eager` and
`stages` of the layer; `sweep` of every tile of our GEMM that is worth it. Graphs take turns, clocks hot; eager with the
L2 flushed.

`--compile` only fills the caches for the shapes and tokens, a process for each part of the work: DeepGEMM's
(DG_JIT_CACHE_DIR) takes many seconds a kernel.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import torch

import deepgemm_layer
import gemm_part
import layer_part
import ours
from compare import copy_tbs
from device import device_facts
from expert_layer import layer_weights
from shapes import SHAPES, STEP_SHAPES
from timing import fp8_tflops, read_tbs

BEGIN = time.perf_counter()


def options_of(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=".")
    parser.add_argument("--name", default="compare_layer", help="of the JSON file")
    parser.add_argument("--parts", default="layer,gemm,eager,stages")
    parser.add_argument("--shapes", default=",".join(STEP_SHAPES))
    parser.add_argument("--tokens", default="1,8,32,64,128,256,1024,4096,16384")
    parser.add_argument("--sweep-tokens", default="1024,4096,16384")
    parser.add_argument(
        "--tiles",
        type=lambda names: [gemm_part.tile_of(name) for name in names.split(",")],
        default=[],
        help="for the sweep, beside the chosen one, as it names them",
    )
    parser.add_argument("--hot", type=float, default=0.3, help="seconds of load before each timing")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which nothing more is begun")
    parser.add_argument("--quick", action="store_true", help="what tuning needs: a sweep of two shapes")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--compile-part", choices=("1", "2", "steps"), help="only this GEMM of theirs, or all else, in this process"
    )
    parser.add_argument("--commit", default="")
    options = parser.parse_args(arguments)
    if options.quick:
        options.parts, options.hot, options.shapes, options.sweep_tokens = (
            "sweep",
            0.12,
            "dsv3_ep8,qwen235",
            "1,8,64,256,1024,4096",
        )
    return options


class Setup:
    """All shapes' weights and layers, and what each part does with them."""

    def __init__(self, peer, shapes, tokens, options):
        self.peer, self.options = peer, options
        self.weights = {shape: layer_weights(shape) for shape in shapes}
        self.layers = {
            shape: ours.Layer(*(w.pair for w in weights), *SHAPES[shape][3:], max_tokens=max(tokens))
            for shape, weights in self.weights.items()
        }
        torch.cuda.synchronize()

    def rows(self, part, shape, tokens):
        weights = self.weights[shape]
        if part in ("gemm", "sweep"):
            *_, up, down, _ = self.layers[shape].choice(tokens)
            return gemm_part.measure(self.peer, shape, tokens, weights, [up, down], self.options, sweep=part == "sweep")
        case = layer_part.Case(self.peer, shape, tokens, weights, self.layers[shape])
        return [getattr(case, "graph" if part == "layer" else part)(self.options)]


SHOW = dict(
    gemm=gemm_part.show,
    sweep=gemm_part.show,
    layer=layer_part.show_layer,
    eager=layer_part.show_eager,
    stages=layer_part.show_stages,
)


def measurements(setup, shapes, tokens, options):
    """Yields (part, row); a row that went wrong says so."""
    sweep_tokens = list(map(int, options.sweep_tokens.split(",")))
    for part in options.parts.split(","):
        start = time.perf_counter()
        for shape in shapes:
            for count in sweep_tokens if part == "sweep" else tokens:
                if time.perf_counter() - BEGIN > options.seconds:
                    yield part, dict(shape=shape, tokens=count, wrong="no time left")
                    continue
                try:
                    rows = setup.rows(part, shape, count)
                except Exception as error:
                    rows = [dict(shape=shape, tokens=count, wrong=f"{type(error).__name__}: {error}")]
                for row in rows:
                    yield part, row
                torch.cuda.empty_cache()
        print(f"# {part} took {time.perf_counter() - start:.1f} s", flush=True)


def compile_all(options):
    """All at once, each with a log; what fails to compile here says so where it is used."""
    start, most = time.perf_counter(), min(options.seconds, 150)
    jobs = {}
    for shape in options.shapes.split(","):
        for part in ("1", "2", "steps"):
            command = [
                sys.executable,
                os.path.abspath(__file__),
                "--tokens",
                options.tokens,
                "--shapes",
                shape,
                "--compile-part",
                part,
            ]
            with open(os.path.join(options.out, f"compile-{shape}-{part}.log"), "w") as log:
                jobs[shape, part] = subprocess.Popen(command, stdout=log, stderr=log)
    for job, process in jobs.items():
        try:
            code = process.wait(max(start + most - time.perf_counter(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"no end after {most:.0f} s"
        if code != 0:
            print(f"compiling {job}: {code}")
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)


def main():
    options = options_of()
    if options.compile:
        return compile_all(options)
    shapes, tokens = options.shapes.split(","), list(map(int, options.tokens.split(",")))
    torch.zeros(1, device="cuda")
    import vllm_peer as peer

    if options.compile_part == "steps":
        return [layer_part.compile_steps(peer, shape, tokens) for shape in shapes]
    if options.compile_part:
        return deepgemm_layer.compile_theirs(peer, shapes, tokens, int(options.compile_part))
    results = dict(
        date=time.strftime("%F"),
        commit=options.commit,
        device=device_facts(),
        quantizer=peer.quantizer,
        copy_tbs=copy_tbs(),
        read_tbs=read_tbs(),
        fp8_tflops=fp8_tflops(),
        layer=[],
        gemm=[],
        eager=[],
        stages=[],
        sweep=[],
    )
    print(
        f"copy {results['copy_tbs']:.2f} TB/s, read {results['read_tbs']:.2f} TB/s,"
        f" fp8 {results['fp8_tflops']:.0f} TFLOP/s, quantizer {results['quantizer']}",
        flush=True,
    )
    setup = Setup(peer, shapes, tokens + list(map(int, options.sweep_tokens.split(","))), options)
    if "sweep" in options.parts:
        gemm_part.compile_ours(options.tiles or gemm_part.all_tiles())
    print(f"# ready after {time.perf_counter() - BEGIN:.1f} s", flush=True)
    wrong = 0
    for part, row in measurements(setup, shapes, tokens, options):
        results[part].append(row)
        if "wrong" in row:
            wrong += 1
            print(f"{row['shape']:8} {row['tokens']:5} {part} WRONG: {row['wrong']}", flush=True)
        else:
            SHOW[part](row)
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
