"""Times an expert layer in bf16 on the CPU with torch, two ways, and prints JSON.

`grouped_mm` sorts the routed tokens by expert and calls torch.nn.functional.grouped_mm twice; `loop` multiplies the
same sorted rows expert by expert. Both gather the tokens before, and weigh and add up the slots after, with index
operations.
Weights, tokens and routing are random; the routing of a size stays the same over its repeats.
"""

import argparse
import functools
import json
import statistics
import time

import torch
import torch.nn.functional as F


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,64,512", help="numbers of tokens, separated by commas")
    parser.add_argument("--threads", type=int, default=0, help="threads (torch's own choice, unless given)")
    parser.add_argument("--repeat", type=int, default=9, help="timed runs of each size")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--topk", type=int, default=8)
    return parser.parse_args()


def random_weights(experts, rows, cols):
    """One random expert for all of them: values do not matter here, memory does."""
    one = (torch.randn(rows, cols) / cols**0.5).to(torch.bfloat16)
    return one.expand(experts, rows, cols).clone()


def sort_by_expert(ids):
    """Order of the slots by expert, its inverse, and how many rows each expert has."""
    slots = ids.flatten()
    order = torch.argsort(slots, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return order, inverse, slots


def activate(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def weigh(rows, inverse, topk_weights):
    """Rows in slot order, times their weights, added up per token."""
    tokens, topk = topk_weights.shape
    slots = rows[inverse].view(tokens, topk, -1)
    return (slots.float() * topk_weights.unsqueeze(-1)).sum(dim=1).to(rows.dtype)


def by_grouped_mm(x, ids, topk_weights, w13, w2):
    order, inverse, slots = sort_by_expert(ids)
    ends = torch.bincount(slots, minlength=w13.shape[0]).cumsum(0).to(torch.int32)
    rows = x[order // ids.shape[1]]
    gate_up = F.grouped_mm(rows, w13.transpose(1, 2), offs=ends)
    rows = F.grouped_mm(activate(gate_up), w2.transpose(1, 2), offs=ends)
    return weigh(rows, inverse, topk_weights)


def by_loop(x, ids, topk_weights, w13, w2):
    order, inverse, slots = sort_by_expert(ids)
    counts = torch.bincount(slots, minlength=w13.shape[0]).tolist()
    rows = x[order // ids.shape[1]]
    out = torch.empty(rows.shape[0], w2.shape[1], dtype=rows.dtype)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            out[part] = F.linear(activate(F.linear(rows[part], w13[expert])), w2[expert])
            start += count
    return weigh(out, inverse, topk_weights)


def milliseconds(run, repeat):
    run()
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main():
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    experts, hidden, intermediate = arguments.experts, arguments.hidden, arguments.intermediate
    w13 = random_weights(experts, 2 * intermediate, hidden)
    w2 = random_weights(experts, hidden, intermediate)
    sizes = []
    for tokens in map(int, arguments.tokens.split(",")):
        x = torch.randn(tokens, hidden).to(torch.bfloat16)
        topk_weights, ids = torch.rand(tokens, experts).topk(arguments.topk)
        topk_weights = topk_weights / topk_weights.sum(dim=1, keepdim=True)
        call = (x, ids, topk_weights, w13, w2)
        with torch.inference_mode():
            difference = (by_grouped_mm(*call) - by_loop(*call)).abs().max() / by_loop(*call).abs().max()
            assert difference < 0.02, f"the two ways differ by {difference}"
            sizes.append(
                {
                    "tokens": tokens,
                    "active_experts": ids.unique().numel(),
                    "grouped_mm_ms": milliseconds(functools.partial(by_grouped_mm, *call), arguments.repeat),
                    "loop_ms": milliseconds(functools.partial(by_loop, *call), arguments.repeat),
                }
            )
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "sizes": sizes}, indent=2))


if __name__ == "__main__":
    main()
