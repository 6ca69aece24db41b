"""PyTorch's all_gather and reduce_scatter (NCCL) of what an expert-parallel layer exchanges, a process a GPU.

    python torch_exchange.py --ranks 2 --out torch-exchange.json

Each rank gathers its tokens' rows (e4m3 values, scales and ids, packed as one tensor) from all ranks and
reduce-scatters bf16 sums of all ranks' tokens: what vLLM does by default. Times are the slowest rank's, in a graph of
20 calls and eager, after the same calls without a clock.
"""

import argparse
import json
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SHAPES = {"deepseek-v3": (7168, 8), "qwen3-235b-a22b": (4096, 8)}
CALLS, REPEATS = 20, 7


def slowest(seconds: float) -> float:
    """The largest of the ranks' numbers."""
    value = torch.tensor([seconds], device="cuda")
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value.item())


def timed(work: Callable[[], None]) -> float:
    """Median seconds of `CALLS` calls of `work`, after as many that do not count."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        work()
        events[0].record()
        work()
        events[1].record()
        events[1].synchronize()
        seconds.append(events[0].elapsed_time(events[1]) / 1e3 / CALLS)
    return slowest(statistics.median(seconds))


def measure(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, in a graph and eager."""

    def several() -> None:
        for _ in range(CALLS):
            call()

    several()
    torch.cuda.synchronize()
    eager = timed(several)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several()
    return {"graph_seconds": timed(graph.replay), "eager_seconds": eager}


def run(rank: int, ranks: int, port: int, sizes: list[int], out: str) -> None:
    """One rank."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        device_id=torch.device("cuda", rank),
    )
    results = []
    for name, (hidden, topk) in SHAPES.items():
        row = -(-(hidden + hidden // 32 + 4 * topk) // 16) * 16
        for tokens in sizes:
            rows = torch.randint(0, 255, (tokens, row), dtype=torch.uint8, device="cuda")
            every = torch.empty((ranks * tokens, row), dtype=torch.uint8, device="cuda")
            parts = torch.randn((ranks * tokens, hidden), device="cuda").bfloat16()
            own = torch.empty((tokens, hidden), dtype=torch.bfloat16, device="cuda")

            def gather(every: Any = every, rows: Any = rows) -> None:
                dist.all_gather_into_tensor(every, rows)

            def scatter(own: Any = own, parts: Any = parts) -> None:
                dist.reduce_scatter_tensor(own, parts)

            def both(gather: Any = gather, scatter: Any = scatter) -> None:
                gather()
                scatter()

            times = {what.__name__: measure(what) for what in (gather, scatter, both)}
            results.append({"shape": name, "tokens_per_rank": tokens, **times})
    if rank == 0:
        report = {
            "device": torch.cuda.get_device_name(),
            "ranks": ranks,
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "sizes": results,
        }
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
        for size in results:
            times = [seconds * 1e6 for what in ("gather", "scatter", "both") for seconds in size[what].values()]
            print(size["shape"], size["tokens_per_rank"], *(f"{time:.1f}" for time in times))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", default="1,8,64,128,256,1024,4096")
    parser.add_argument("--out", default="torch-exchange.json")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = [int(tokens) for tokens in args.tokens.split(",")]
    mp.spawn(run, args=(args.ranks, port, sizes, args.out), nprocs=args.ranks)


if __name__ == "__main__":
    main()
