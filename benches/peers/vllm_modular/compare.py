#!/usr/bin/env python3
"""vLLM 0.33.0's modular kernel around Expertile's experts, around its Triton experts and around its DeepGEMM ones.

    python3 compare.py --json modular.json                          all shapes and sizes
    python3 compare.py --shapes dsv3_ep8 --tokens 64,4096           some of them
    python3 compare.py --form bf16                                  experts that are not quantized (without DeepGEMM)
    VLLM_BATCH_INVARIANT=1 python3 compare.py                       Triton's batch-invariant tile
    python3 compare.py --shapes tiny --device cpu                   the program, without a GPU (times mean nothing)

EXPERTILE_VLLM_SOURCE names vLLM's files (`collect.py` says how to get them to a machine without a network), PYTHONPATH
the Expertile to measure. DeepGEMM compiles when it is called first; DG_JIT_CACHE_DIR and EXPERTILE_CACHE keep what was
compiled.

What is timed is `FusedMoEKernel.apply`, whole: from bf16 hidden states, chosen experts and their weights to the sum,
with vLLM's own quantization, workspaces and defaults. Each result is first compared with a reference in float64. Two
times of a call, in microseconds: as a program calls it, which waits for the host where that is slower, and in a CUDA
graph. The experts take turns, on several sets of inputs of their own routing; medians.
"""

import argparse
import json
import pathlib
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2] / "bindings/python/tests"), str(HERE.parent / "hopper")]

import real_vllm  # noqa: E402
import torch  # noqa: E402
from real_vllm import Case, Modular, distance, inputs, reference, weights  # noqa: E402

from timing import median, race  # noqa: E402

SHAPES = {
    "qwen30b": Case(experts=128, topk=8, hidden=2048, intermediate=768),
    "dsv3_tp8": Case(experts=256, topk=8, hidden=7168, intermediate=256),
    "dsv3_ep8": Case(experts=32, topk=8, hidden=7168, intermediate=2048, global_experts=256),
    "tiny": Case(experts=4, topk=2, hidden=256, intermediate=128),
}
NAMES = {"expertile": "Expertile", "triton": "Triton", "deepgemm": "DeepGEMM"}
SETS = 4
# Triton and DeepGEMM round the scales of activations to powers of two, DeepGEMM those of weights too: its default here.
MOST_DISTANCE = {"bf16": 1e-2, "e4m3": 0.12}


def options_of_the_command():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen30b,dsv3_tp8,dsv3_ep8")
    parser.add_argument("--tokens", default="1,8,64,256,1024,4096")
    parser.add_argument("--experts", default=",".join(NAMES))
    parser.add_argument("--form", default="e4m3", choices=("e4m3", "bf16"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", default=None, help="of what is measured, for the file")
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def contenders(vllm, case, parts, names, device):
    """A modular kernel for each kind of experts that this machine runs."""
    found = {}
    for name in names:
        if name == "expertile":
            from expertile.vllm import ExpertileExperts

            found[name] = Modular(vllm, case, parts, ExpertileExperts, device)
        elif name == "triton":
            found[name] = Modular(vllm, case, parts, vllm.TritonExperts, device)
        elif name == "deepgemm" and case.form == "e4m3":
            from vllm.model_executor.layers.fused_moe.experts.deep_gemm_moe import DeepGemmExperts

            if DeepGemmExperts._supports_current_device():
                found[name] = Modular(vllm, case, for_deep_gemm(vllm, parts), DeepGemmExperts, device)
            else:
                print("without DeepGEMM, which vLLM does not find here", file=sys.stderr)
    return found


def for_deep_gemm(vllm, parts):
    """Copies of the weights as vLLM converts them for DeepGEMM."""
    layer = torch.nn.Module()
    layer.weight_block_size = [128, 128]
    names = ("w1", "w2", "w1_scale", "w2_scale")
    copies = [getattr(parts, name).clone() for name in names]
    backend = vllm.fp8.Fp8MoeBackend.DEEPGEMM
    converted = vllm.fp8.convert_to_fp8_moe_kernel_format(backend, layer, *copies, None, None)
    return type(parts)(**dict(zip(names, converted, strict=True)))


def checked(case, parts, kernels, arguments):
    """How far each kernel's result is from the reference; the program ends if one is too far."""
    found = {}
    for name, kernel in kernels.items():
        result = kernel(*arguments)
        expected = reference(case, parts, *arguments, kernel.map)
        live = expected.abs().amax(1) > 0
        if result[~live].any():
            sys.exit(f"{name}: tokens of other ranks' experts are not zero")
        found[name] = distance(result[live], expected[live])[0] if live.any() else 0.0
        if not found[name] < MOST_DISTANCE[case.form]:
            sys.exit(f"{name} is {found[name]} away from the reference")
    return found


def eager(kernels, sets, rounds):
    """Median microseconds of a call as a program makes it."""

    def once(kernel, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            for arguments in sets:
                kernel(*arguments)
        wait()
        return (time.perf_counter() - start) / repeats / len(sets) * 1e6

    repeats = {name: max(1, min(25, int(4e4 / once(kernel, 1) / len(sets)))) for name, kernel in kernels.items()}
    times = {name: [] for name in kernels}
    for turn in range(rounds):
        for name in list(kernels)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(once(kernels[name], repeats[name]))
    return {name: median(found) for name, found in times.items()}


def in_graphs(kernels, sets, called, rounds):
    """Median microseconds of a call in a CUDA graph; nothing without a GPU."""
    if not torch.cuda.is_available():
        return dict.fromkeys(kernels)
    calls = {
        name: [lambda kernel=kernel, arguments=arguments: kernel(*arguments) for arguments in sets]
        for name, kernel in kernels.items()
    }
    return race(calls, min(called.values()), 0.15, rounds=rounds)


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def is_tuned(case):
    """Whether vLLM has tuned Triton's tiles for the shape on this device."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs

    form, block = ("fp8_w8a8", (128, 128)) if case.form == "e4m3" else (None, (None, None))
    return get_moe_configs(case.experts, case.intermediate, form, *block) is not None


def line(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def cells_of(times, names):
    shown = [f"{times[name]:.0f}" if times.get(name) else "-" for name in names]
    others = [times[name] for name in names[1:] if times.get(name)]
    return [*shown, f"{min(others) / times[names[0]]:.2f}" if others and times.get(names[0]) else "-"]


def measure(vllm, options, shape):
    """The rows of a shape, each printed when it is done."""
    tokens = [int(tokens) for tokens in options.tokens.split(",")]
    names = options.experts.split(",")
    case = SHAPES[shape]
    case.form, case.max_tokens = options.form, max(tokens)
    parts = weights(case, options.device)
    kernels = contenders(vllm, case, parts, names, options.device)
    # As vLLM does: the largest call first, which makes the workspaces and prepares kernels.
    largest = inputs(case, max(tokens), options.device)
    for kernel in kernels.values():
        kernel(*largest)
    tuned = is_tuned(case)
    for count in tokens:
        sets = [inputs(case, count, options.device, seed) for seed in range(SETS)]
        away = checked(case, parts, kernels, sets[0])
        called = eager(kernels, sets, options.rounds)
        graph = in_graphs(kernels, sets, called, options.rounds)
        line([shape, str(count), *cells_of(called, names), *cells_of(graph, names), "tuned" if tuned else "default"])
        yield {
            "shape": shape,
            "tokens": count,
            "form": case.form,
            "triton_is_tuned": tuned,
            "eager_us": called,
            "graph_us": graph,
            "distance": away,
        }


def main():
    options = options_of_the_command()
    if not real_vllm.SOURCE:
        sys.exit("EXPERTILE_VLLM_SOURCE names no folder with vLLM's files: see collect.py")
    vllm = real_vllm.load()
    vllm.workspace.init_workspace_manager(torch.device(options.device))
    names = [NAMES[name] for name in options.experts.split(",")]
    ratio = "best other / first"
    head = ["layer", "tokens", *names, ratio, *(f"{name}, graph" for name in names), ratio, "Triton's tile"]
    line(head)
    line(["---"] * len(head))
    rows = []
    with vllm.as_configured(options.device), torch.inference_mode():
        for shape in options.shapes.split(","):
            rows += measure(vllm, options, shape)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if options.json:
        import expertile
        import triton

        versions = {"torch": torch.__version__, "triton": triton.__version__, "expertile": expertile.__version__}
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        about = {"device": device, "vllm": "0.33.0", "commit": options.commit, **versions}
        options.json.write_text(json.dumps({**about, "sets": SETS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
