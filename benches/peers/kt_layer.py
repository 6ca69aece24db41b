"""Times an expert layer on the CPU with kt-kernel (KTransformers' kernels) in FP8, BF16 and MXFP4, and prints JSON.

    pip download --no-deps kt-kernel==0.7.2 -d DIR && unzip -q DIR/*.whl -d DIR/kt
    PYTHONPATH=DIR/kt kt_layer.py --tokens 64,512 --threads 1    # a Python with torch and gguf

The wheel's classes are called as its own wrapper calls them, without the copies to and from a GPU. A call is submitted
to its thread, which looks for work every four milliseconds once it has been idle: what a few tokens take it does not
show. Results are compared with torch's before anything is timed. Weights, tokens and routing are random; the routing of
a size stays the same over its repeats.
"""

import argparse
import functools
import json
import os
import sys

import torch
from torch_layer import by_loop, milliseconds

E4M3 = torch.float8_e4m3fn
# The values of e2m1, by their bits.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
CLASSES = {"fp8": "AMXFP8_MOE", "bf16": "AMXBF16_MOE", "mxfp4": "AMXFP4_KGroup_MOE"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="64,512", help="numbers of tokens, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=9, help="timed runs of each size")
    parser.add_argument("--formats", default="fp8,bf16,mxfp4")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    return parser.parse_args()


def fp8(rows, cols):
    """Weights, their scales as the kernel takes them, and what they stand for."""
    weights = (torch.randn(rows, cols) * 100).clamp(-448, 448).to(E4M3)
    scales = (torch.rand(rows // 128, cols // 128) + 0.5) / (100 * cols**0.5)
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weights, scales, (weights.float() * wide).bfloat16()


def bf16(rows, cols):
    weights = (torch.randn(rows, cols) / cols**0.5).bfloat16()
    return weights, None, weights


def mxfp4(rows, cols):
    nibbles = torch.randint(0, 16, (rows, cols))
    exponents = torch.randint(-7, -4, (rows, cols // 32)).float()
    scales = torch.exp2(exponents).bfloat16()
    weights = E2M1[nibbles] * scales.float().repeat_interleave(32, 1)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8), scales, weights.bfloat16()


class Layer:
    """One layer of the wheel's, of random weights: the same expert over and over, in memory of its own."""

    def __init__(self, name, options):
        import kt_kernel

        native = kt_kernel.kt_kernel_ext
        pool = native.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [options.threads]
        self.threads = native.CPUInfer(pool)
        sizes = {"gate": (options.intermediate, options.hidden), "up": (options.intermediate, options.hidden)}
        sizes["down"] = (options.hidden, options.intermediate)
        made = {part: globals()[name](*size) for part, size in sizes.items()}
        self.plain = {part: plain for part, (_, _, plain) in made.items()}
        mask = torch.zeros(options.experts, dtype=torch.bool)
        config = native.moe.MOEConfig(
            options.experts, options.topk, options.hidden, options.intermediate, mask.data_ptr()
        )
        config.layer_idx, config.pool = 0, self.threads.backend_
        config.max_len = max(map(int, options.tokens.split(",")))
        config.swiglu_limit = 0.0
        if name != "bf16":
            config.quant_config.bits = 8 if name == "fp8" else 4
            config.quant_config.group_size = 128 if name == "fp8" else 32
            config.quant_config.zero_point = False
        for part, (weights, scales, _) in made.items():
            setattr(config, f"{part}_projs", [[weights.data_ptr()] * options.experts])
            setattr(config, f"{part}_scales", [[0 if scales is None else scales.data_ptr()] * options.experts])
        self.layer = getattr(native.moe, CLASSES[name])(config)
        order = torch.arange(options.experts)
        self.threads.submit(self.layer.load_weights_task(order.data_ptr()))
        self.threads.sync()
        self.kept = made, mask, order

    def run(self, x, ids, topk_weights, out):
        count = torch.tensor([x.shape[0]], dtype=torch.int32)
        pointers = [tensor.data_ptr() for tensor in (ids, topk_weights, x, out)]
        self.threads.submit(self.layer.forward_task(count.data_ptr(), ids.shape[1], *pointers, False))
        self.threads.sync()

    def expected(self, x, ids, topk_weights, experts):
        w13 = torch.cat([self.plain["gate"], self.plain["up"]]).expand(experts, -1, -1)
        return by_loop(x, ids, topk_weights, w13, self.plain["down"].expand(experts, -1, -1))


def main():
    options = parse_arguments()
    # The wheel talks on standard output, which is the result's.
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    sizes = {int(tokens): {"tokens": int(tokens)} for tokens in options.tokens.split(",")}
    for name in options.formats.split(","):
        layer = Layer(name, options)
        for tokens, row in sizes.items():
            x = torch.randn(tokens, options.hidden).bfloat16()
            topk_weights, ids = torch.rand(tokens, options.experts).topk(options.topk)
            topk_weights = topk_weights / topk_weights.sum(dim=1, keepdim=True)
            out = torch.full_like(x, float("nan"))
            with torch.inference_mode():
                layer.run(x, ids, topk_weights, out)
                expected = layer.expected(x, ids, topk_weights, options.experts).float()
                difference = float((out.float() - expected).norm() / expected.norm())
                if not difference < 0.05:
                    sys.exit(f"{name}: {tokens} tokens are {difference} away from torch's")
                run = functools.partial(layer.run, x, ids, topk_weights, out)
                row[f"{name}_ms"] = milliseconds(run, options.repeat)
                row[f"{name}_distance"] = difference
    print(json.dumps({"threads": options.threads, "sizes": list(sizes.values())}, indent=2), file=result, flush=True)


if __name__ == "__main__":
    main()
