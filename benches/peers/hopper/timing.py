"""Times contenders inside CUDA graphs that take turns: clocks, power and heat are the same for all. Ceilings, too."""

import time

import torch

L2_BYTES = 60 << 20


def capture(calls, repeats):
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(repeats):
            calls[index % len(calls)]()
    return graph


def race(contenders, expected_us, hot_seconds, rounds=9, graph_us=2000):
    """Median microseconds of a call of each contender (name: one call per set of inputs); their graphs take turns."""
    sets = len(next(iter(contenders.values())))
    # A graph long enough that its own start does not count, and at least two calls, so that one can overlap the next.
    repeats = max(min(round(graph_us / expected_us), 96) // sets, 2 if sets == 1 else 1) * sets
    graphs = {name: capture(calls, repeats) for name, calls in contenders.items()}
    start = time.perf_counter()
    while time.perf_counter() - start < hot_seconds:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    events = {name: [] for name in graphs}
    for turn in range(rounds):
        for name in list(graphs)[:: 1 if turn % 2 == 0 else -1]:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            graphs[name].replay()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {name: median(a.elapsed_time(b) for a, b in pairs) / repeats * 1e3 for name, pairs in events.items()}


def median(values):
    values = sorted(values)
    return values[len(values) // 2]


def fp8_tflops(size=8192):
    """What the matrix unit gives on random e4m3 in one large product, hot."""
    a, b = (torch.randn((size, size), device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    product = lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return 2 * size**3 / race({"product": [product]}, 800, 0.4)["product"] / 1e6


def read_tbs(size=1 << 32):
    """Bytes per second of a sum over memory, in TB/s."""
    x = torch.empty(size // 4, device="cuda").normal_().view(-1, 1 << 20)
    return size / race({"read": [lambda: x.sum(1)]}, 1000, 0.1)["read"] / 1e6
