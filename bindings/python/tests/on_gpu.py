"""What the tests on a GPU share: whether there is one, a call as a graph, and what a call costs the host."""

import time

import torch

from expertile import _native


def no_hopper():
    """Why the kernels of a layer cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability()[0] != 9:
        return "the GPU is no Hopper"
    return _native.cuda_unavailable()


def captured(call):
    """A graph of one call, after the warm-up that graphs ask for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def host_us(call, calls=200):
    """Microseconds of the calling thread for one call, nothing waited for."""
    call()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return best
