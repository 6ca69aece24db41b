"""The grouped GEMM alone on a Hopper, beside DeepGEMM's where it is installed: microseconds of a call in a graph.

    python benches/grouped_gemm.py [--rows 64,1024,8192] [--shapes E,N,K ...]

Rows are spread evenly over the experts, segments aligned to 128 as DeepGEMM wants them; `tight` is the same with
segments aligned to 8. Each figure is the best of several rounds of graphs of 20 calls, in turns.
"""

import argparse

import torch

import expertile.torch as et

CALLS, ROUNDS = 20, 7
SHAPES = ("128,1536,2048", "128,2048,768", "256,512,7168", "32,4096,7168", "32,7168,2048")


def operands(experts, k, rows, alignment):
    """e4m3 rows, MN-major scales, psum and m_indices of `rows` rows spread over the experts."""
    psum, end = [], 0
    for expert in range(experts):
        start = -(-end // alignment) * alignment
        end = start + rows // experts + (expert < rows % experts)
        psum.append((start, end))
    m_sum = -(-end // alignment) * alignment
    m_indices = torch.full((m_sum,), -1, dtype=torch.int32)
    for expert, (start, stop) in enumerate(psum):
        m_indices[start:stop] = expert
    values = torch.randn(m_sum, k, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.empty_strided((m_sum, k // 128), (1, -(-m_sum // 4) * 4), device="cuda").uniform_(0.5, 1.5)
    ends = torch.tensor([stop for _, stop in psum], dtype=torch.int32)
    return values, scale, ends.cuda(), m_indices.cuda()


def graph_of(call):
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def microseconds(calls):
    """Of each call, the best round."""
    graphs = {name: graph_of(call) for name, call in calls.items()}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            best[name] = min(best[name], start.elapsed_time(stop) * 1000 / CALLS)
    return best


def peer():
    """DeepGEMM's function: its own package's, or that of the one that vLLM carries."""
    for name in ("deep_gemm", "vllm.third_party.deep_gemm"):
        try:
            return __import__(name, fromlist=["m_grouped_fp8_gemm_nt_contiguous"]).m_grouped_fp8_gemm_nt_contiguous
        except ImportError:
            continue
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="64,512,4096,32768")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    options = parser.parse_args()
    theirs = peer()
    print("DeepGEMM:", "not installed" if theirs is None else theirs.__module__)
    for shape in options.shapes:
        experts, n, k = map(int, shape.split(","))
        weights = torch.randn(experts, n, k, device="cuda").to(torch.float8_e4m3fn)
        weight_scale = torch.rand(experts, -(-n // 128), -(-k // 128), device="cuda") + 0.5
        gemm = et.Gemm(weights, weight_scale)
        gemm.prepare(1 << 17)
        for rows in map(int, options.rows.split(",")):
            wide, tight = (operands(experts, k, rows, alignment) for alignment in (128, 8))
            out = torch.empty(len(wide[0]), n, dtype=torch.bfloat16, device="cuda")
            small = torch.empty(len(tight[0]), n, dtype=torch.bfloat16, device="cuda")
            by_row = {"m_indices": wide[3], "expected_rows": rows}
            calls = {
                "psum": lambda: gemm(wide[0], wide[1], psum=wide[2], out=out),  # noqa: B023
                "m_indices": lambda: gemm(wide[0], wide[1], **by_row, out=out),  # noqa: B023
                "tight": lambda: gemm(tight[0], tight[1], psum=tight[2], alignment=8, out=small),  # noqa: B023
            }
            if theirs is not None:
                a, b = wide[:2], (weights, weight_scale)
                calls["DeepGEMM"] = lambda: theirs(a, b, out, wide[3])  # noqa: B023
                calls["DeepGEMM psum"] = lambda: theirs(a, b, out, wide[2], use_psum_layout=True)  # noqa: B023
            found = ", ".join(f"{name} {took:.1f}" for name, took in microseconds(calls).items())
            print(f"E {experts}, N {n}, K {k}, {rows} rows: {found}")


if __name__ == "__main__":
    main()
