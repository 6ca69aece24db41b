"""Fills the rivals' caches of compiled kernels beforehand, in many processes: in one, it would take minutes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

from device import DEVICE
from expert_layer import original
from rivals import RIVALS
from rivals.base import sizes
from shapes import SHAPES, Shape, swiglu_of

# Humming compiles several kernels at a time in each of its processes.
ENVIRONMENT = {"HUMMING_MAX_PARALLEL_BUILD_WORKERS": "4"}
COMMAND = [
    sys.executable,
    str(pathlib.Path(__file__).with_name("compare_rivals.py")),
    "--compile-job",
]


@dataclasses.dataclass
class HollowWeights:
    """Weights without values: nothing looks at a result."""

    shape: tuple[int, int, int]
    format: str
    bias: torch.Tensor | None = None

    @property
    def pair(self):
        experts, n, k = self.shape
        if self.format == "bf16":
            return torch.empty(self.shape, device=DEVICE, dtype=torch.bfloat16), None
        if self.format == "mxfp4":
            empty = lambda k: torch.zeros((experts, n, k), device=DEVICE, dtype=torch.uint8)
            return empty(k // 2), empty(k // 32)
        values = torch.empty(self.shape, device=DEVICE, dtype=torch.float8_e4m3fn)
        return values, torch.ones((experts, n // 128, k // 128), device=DEVICE)

    def original(self, expert):
        return original(self.shape, 1, expert)


def jobs_of(rivals, layers):
    """-> each job as JSON; `layers` by (shape, format) and by rival: the numbers of tokens."""
    for rival in rivals:
        wanted = []
        for (shape, format), tokens_of in layers.items():
            tokens = rival.supported(shape, format, tokens_of.get(rival.key, []))
            if tokens:
                wanted.append(dict(shape=shape, numbers=SHAPES[shape], format=format, tokens=tokens))
        groups = [wanted] if rival.compiles_together else [[layer] for layer in wanted]
        for part in rival.compile_parts():
            yield from (json.dumps(dict(rival=rival.key, part=part, layers=group)) for group in groups if group)


def compile_all(rivals, layers, limit):
    """What fails to compile here says so where it is used. Ends after `limit` seconds, whatever is not done."""
    start, running = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs_of(rivals, layers)):
            with open(os.path.join(folder, str(number)), "w+") as log:
                process = subprocess.Popen([*COMMAND, job], stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
                running.append((job, log.name, process))
        for job, log, process in running:
            try:
                code = process.wait(max(start + limit - time.perf_counter(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = f"no end after {limit:.0f} s"
            if code != 0:
                with open(log) as file:
                    print(f"# compiling {job}: {code}: {(file.read().strip().splitlines() or ['no output'])[-1][:300]}")
    print(f"# {len(running)} processes compiled for {time.perf_counter() - start:.1f} s", flush=True)


def run_job(text):
    """In a process of its own."""
    job = json.loads(text)
    rival = RIVALS[job["rival"]]
    for layer in job["layers"]:
        shape, format = layer["shape"], layer["format"]
        SHAPES.setdefault(shape, Shape(*layer["numbers"]))
        weights = [HollowWeights((SHAPES[shape].experts, n, k), format) for n, k in sizes(shape)]
        if swiglu_of(shape).biased:
            for each in weights:
                each.bias = torch.zeros(each.shape[:2], device=DEVICE)
        rival.compile(shape, format, weights, layer["tokens"], job["part"])
        torch.cuda.empty_cache()
