"""Expertile's GPU steps beside vLLM 0.33.0's, in one process, on the same inputs. README.md says how to run it.

    PEER_DIR=... python3 compare.py --out FOLDER [--shapes dsv3,...] [--tokens 1,8,...] [--alone]

Both sides are checked first, then timed by the same functions: inside a CUDA graph over one set of buffers (caches
warm), inside a graph over rotating sets that together are several times the L2, and eagerly with the L2 flushed.
`--alone` times Expertile only, for a machine without vLLM's pieces.
"""

import argparse
import json
import os

import torch

import ours
from device import device_facts
from routing import local_ids, routing
from shapes import SHAPES, STEP_SHAPES
from timing import L2_BYTES

ALIGNMENT = 128
DECODE_ALIGNMENT = 8  # what our layer lays few tokens out with: its GEMM needs no more
DECODE_TOKENS = 256


def graph_us(calls, repeats=None, replays=9):
    """Median microseconds of one call in a CUDA graph that goes round `calls` until it holds `repeats` of them: of
    short ones so many that the graph's own start, some microseconds, does not show."""
    repeats = repeats or (100 if graph_us(calls, 20, 3) < 20 else 20)
    for call in calls:
        call()
    torch.cuda.synchronize()
    repeats = max(repeats // len(calls), 1) * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(repeats):
            calls[index % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / repeats * 1e3)
    return sorted(times)[len(times) // 2]


def eager_us(call):
    """Median microseconds, launches included, L2 flushed between calls."""
    from triton.testing import do_bench

    return do_bench(call, warmup=10, rep=60, return_mode="median") * 1e3


def copy_tbs(bytes_each=1 << 30):
    """Device-to-device copy as torch does it, read and written, in TB/s. (In a graph a copy engine does it, slower.)"""
    make = lambda: torch.empty(bytes_each, device="cuda", dtype=torch.uint8).random_()
    sets = [(make(), make()) for _ in range(2)]
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for index in range(8):
            sets[index % 2][1].copy_(sets[index % 2][0])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 8 * 1e3)
    return 2 * bytes_each / sorted(times)[3] / 1e6


def stable_layout(ids, expert_map, experts, alignment=ALIGNMENT):
    """inv_perm [M, topk] and counts, from torch's stable sort."""
    local = local_ids(ids, expert_map).flatten().long()
    counts = torch.bincount(local[local >= 0], minlength=experts)
    aligned = (counts + alignment - 1) // alignment * alignment
    starts = torch.cumsum(aligned, 0) - aligned
    order = torch.sort(torch.where(local < 0, experts, local), stable=True).indices
    live = int(counts.sum())
    slots = order[:live]
    experts_of = local[slots]
    rank = torch.arange(live, device="cuda") - (torch.cumsum(counts, 0) - counts)[experts_of]
    inv = torch.full_like(local, -1)
    inv[slots] = starts[experts_of] + rank
    return inv, counts, starts + counts


def check_permutation(bound, x, ids, expert_map, experts, alignment=ALIGNMENT):
    """Bitwise, against torch on the device: layout, e4m3 bytes, scales, zeros in the padding's scales."""
    topk = ids.shape[1]
    inv, counts, psum = stable_layout(ids, expert_map, experts, alignment)
    assert torch.equal(bound.inv_perm.long(), inv), "inv_perm"
    assert torch.equal(bound.expert_num_tokens.long(), counts), "counts"
    assert torch.equal(bound.psum.long(), psum), "psum"
    groups = x.float().view(x.shape[0], -1, 128)
    scale = groups.abs().amax(2).clamp(min=1e-10) * torch.tensor(1 / 448, device="cuda", dtype=torch.float32)
    rows = (groups / scale[:, :, None]).clamp(-448, 448).view(x.shape).to(torch.float8_e4m3fn).view(torch.uint8)
    slots = torch.nonzero(inv >= 0).flatten()
    for part in slots.split(1 << 15):
        at, token = inv[part], part // topk
        assert torch.equal(bound.rows.view(torch.uint8)[at], rows[token]), "rows"
        assert torch.equal(bound.scales[at], scale[token]), "scales"
    padding = torch.ones(bound.scales.shape[0], device="cuda", dtype=torch.bool)
    padding[inv[slots]] = False
    assert not bound.scales[padding].any(), "padding scales"
    assert bool((bound.rows.view(torch.uint8)[padding] == 0xA5).all()), "padding rows were written"


def check_unpermute(out, rows, inv_perm, weights):
    """Bitwise: f32, slot order, one rounding per product and sum."""
    total = torch.zeros_like(out, dtype=torch.float32)
    for k in range(weights.shape[1]):
        at = inv_perm[:, k].long()
        term = rows[at.clamp(min=0)].float() * weights[:, k : k + 1]
        total = torch.where((at >= 0)[:, None], total + term, total)
    assert torch.equal(out, total.to(torch.bfloat16)), "unpermute"


def sets_for(bytes_of_set, most=8):
    """Sets of buffers that together are at least four times the L2."""
    return int(min(max(-(-4 * L2_BYTES // max(bytes_of_set, 1)), 2), most))


def measure(peer, shape, tokens, seed):
    hidden, intermediate, experts, topk, global_experts = SHAPES[shape]
    permutation = ours.Permutation(tokens, topk, experts, hidden)
    ids, expert_map, weights = routing(tokens, topk, experts, global_experts, seed)
    inv, counts, psum = stable_layout(ids, expert_map, experts)
    live = int(counts.sum())
    read = int((local_ids(ids, expert_map) >= 0).any(1).sum())
    groups = hidden // 128
    qp_bytes = read * hidden * 2 + live * (hidden + groups * 4) + ids.numel() * 8
    padding_bytes = (permutation.m_sum - live) * groups * 4
    up_bytes = live * hidden * 2 + tokens * hidden * 2 + ids.numel() * 8
    act_bytes = live * (intermediate * 5 + intermediate // 128 * 4)
    count = sets_for(qp_bytes)
    row = dict(
        shape=shape,
        tokens=tokens,
        live_rows=live,
        m_sum=permutation.m_sum,
        sets=count,
        quantize_permute_bytes=qp_bytes,
        padding_scale_bytes=padding_bytes,
        unpermute_bytes=up_bytes,
        activation_bytes=act_bytes,
    )

    generator = torch.Generator(device="cuda").manual_seed(seed + 1)
    xs = [torch.randn((tokens, hidden), device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(count)]
    all_ids = [ids] + [routing(tokens, topk, experts, global_experts, seed + 2 + i)[0] for i in range(count - 1)]
    bounds = [permutation.bind(x, i, expert_map) for x, i in zip(xs, all_ids, strict=True)]
    for bound, x, i in zip(bounds, xs, all_ids, strict=True):
        bound()
        bound.check()
        check_permutation(bound, x, i, expert_map, experts)
    row["ours_qp_graph"] = graph_us(bounds[:1])
    row["ours_qp_rotated"] = graph_us(bounds)
    row["ours_qp_eager"] = eager_us(bounds[0])
    if tokens <= DECODE_TOKENS:
        few = ours.Permutation(tokens, topk, experts, hidden, alignment=DECODE_ALIGNMENT, reference_size=False)
        bound = few.bind(xs[0], ids, expert_map)
        bound()
        bound.check()
        check_permutation(bound, xs[0], ids, expert_map, experts, DECODE_ALIGNMENT)
        row["ours_qp_decode"] = graph_us([bound])
        del bound, few
    if peer:

        def theirs(x, i):
            def call():
                q, s = peer.quantize(x)
                return peer.permute(q, s, i, experts, expert_map)

            return call

        calls = [theirs(x, i) for x, i in zip(xs, all_ids, strict=True)]
        rows, scales, layout, inv_theirs, alignment = calls[0]()
        assert alignment == ALIGNMENT and torch.equal(layout.long(), psum), "the sides lay out differently"
        row["theirs_qp_graph"] = graph_us(calls[:1])
        row["theirs_qp_rotated"] = graph_us(calls)
        row["theirs_qp_eager"] = eager_us(calls[0])
        del calls, rows, scales
    perms = [bound.inv_perm.view(tokens, topk).clone() for bound in bounds]
    psums = [bound.psum.clone() for bound in bounds]
    m_sum = permutation.m_sum
    del bounds, xs
    torch.cuda.empty_cache()

    count = sets_for(up_bytes)
    data = [
        torch.randn((m_sum, hidden), device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(min(count, len(perms)))
    ]
    outs = [torch.full((tokens, hidden), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in data]
    bounds = [ours.bind_unpermute(d, p, weights, o) for d, p, o in zip(data, perms, outs, strict=False)]
    for bound, d, p, o in zip(bounds, data, perms, outs, strict=False):
        bound()
        check_unpermute(o, d, p, weights)
    row["ours_up_graph"] = graph_us(bounds[:1])
    row["ours_up_rotated"] = graph_us(bounds)
    row["ours_up_eager"] = eager_us(bounds[0])
    if peer:
        calls = [
            lambda d=d, p=p, o=o, i=i: peer.unpermute(d, i, weights, p, expert_map, o)
            for d, p, o, i in zip(data, perms, outs, all_ids, strict=False)
        ]
        row["theirs_up_graph"] = graph_us(calls[:1])
        row["theirs_up_rotated"] = graph_us(calls)
        row["theirs_up_eager"] = eager_us(calls[0])
        moe = getattr(torch.ops, "_moe_C", None)
        # It reads whatever row a slot names, -1 too: only where every slot has one.
        row["theirs_up_cuda"] = (
            None
            if moe is None or expert_map is not None
            else moe_unpermute_us(moe, data[0], perms[0], weights, outs[0])
        )
    del bounds, data, outs
    torch.cuda.empty_cache()

    if m_sum * intermediate * 4 < 40 << 30:
        mids = [
            torch.randn((m_sum, 2 * intermediate), device="cuda", dtype=torch.bfloat16, generator=generator)
            for _ in range(2)
        ]
        bounds = [ours.bind_activation(m, p, ALIGNMENT) for m, p in zip(mids, psums, strict=False)]
        row["ours_act_graph"] = graph_us(bounds[:1])
        row["ours_act_rotated"] = graph_us(bounds)
        if peer:
            calls = [lambda m=m, p=p: peer.activate(m, p, ALIGNMENT) for m, p in zip(mids, psums, strict=False)]
            row["theirs_act_graph"] = graph_us(calls[:1])
            row["theirs_act_rotated"] = graph_us(calls)
        del bounds, mids
        torch.cuda.empty_cache()
    return row


def moe_unpermute_us(moe, rows, inv_perm, weights, out):
    """vLLM's CUDA kernel for the same reduce; None where it does not take this input."""
    try:
        places = inv_perm.flatten().contiguous()
        return graph_us([lambda: moe.moe_unpermute(rows, weights, places, None, weights.shape[1], out)])
    except Exception as error:
        print(f"moe_unpermute: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--shapes", default=",".join(STEP_SHAPES))
    parser.add_argument("--tokens", default="1,8,64,256,1024,4096,16384")
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    peer = None
    if not options.alone:
        import vllm_peer as peer
    results = dict(device=device_facts(), copy_tbs=[copy_tbs()], rows=[])
    for shape in options.shapes.split(","):
        for tokens in map(int, options.tokens.split(",")):
            try:
                row = measure(peer, shape, tokens, seed=tokens + len(shape))
            except Exception as error:
                row = dict(shape=shape, tokens=tokens, wrong=f"{type(error).__name__}: {error}")
            results["rows"].append(row)
            with open(os.path.join(options.out, "compare.json"), "w") as file:
                json.dump(results, file, indent=1)
            print_row(row, results["copy_tbs"][0])
    results["copy_tbs"].append(copy_tbs())
    results["device_after"] = device_facts()
    with open(os.path.join(options.out, "compare.json"), "w") as file:
        json.dump(results, file, indent=1)
    print("copy TB/s", results["copy_tbs"], results["device_after"])


def print_row(row, copy):
    if "wrong" in row:
        return print(f"{row['shape']:9} {row['tokens']:6} WRONG: {row['wrong']}", flush=True)

    def cell(step, size):
        text = ""
        for how in ("graph", "rotated", "eager"):
            mine, other = row.get(f"ours_{step}_{how}"), row.get(f"theirs_{step}_{how}")
            if mine is not None:
                text += f" {how[0]} {mine:.1f}" + (f"/{other:.1f}" if other else "")
        mine = row.get(f"ours_{step}_rotated")
        return text + (f" {100 * size / mine / 1e6 / copy:.0f}%" if mine else "")

    decode = f" by 8 {row['ours_qp_decode']:.1f}" if "ours_qp_decode" in row else ""
    unpermute = f"up{cell('up', row['unpermute_bytes'])} (cuda {row.get('theirs_up_cuda') or 0:.1f})"
    print(
        f"{row['shape']:9} {row['tokens']:6} | qp{cell('qp', row['quantize_permute_bytes'])}{decode} | {unpermute}"
        f" | act{cell('act', row['activation_bytes'])}",
        flush=True,
    )


if __name__ == "__main__":
    main()
