"""The layer over processes of this machine, on CPUs or with a GPU each, beside one rank with all experts.

    python expert_parallel_ranks.py --ranks 2 --device cpu

Started by test_expert_parallel.py, and by hand.
"""

import argparse
import socket
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import expertile.torch as et
from four_bits import has_4_bits, weights_of_4_bits
from on_gpu import captured


def weights(experts, hidden, intermediate, form):
    """w13 and w2 with their scales, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    if has_4_bits(form):
        return weights_of_4_bits(experts, hidden, intermediate, form, generator)
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(experts, hidden, intermediate, generator=generator) / intermediate**0.5
    if form == "bf16":
        return {"w13": w13.bfloat16(), "w2": w2.bfloat16()}
    scales = [torch.rand(x.shape[0], x.shape[1] // 128, x.shape[2] // 128, generator=generator) for x in (w13, w2)]
    w13, w2 = ((x * 40).clamp(-448, 448).to(torch.float8_e4m3fn) for x in (w13, w2))
    return {"w13": w13, "w2": w2, "w13_scale": scales[0] * 0.02, "w2_scale": scales[1] * 0.02}


def compare(rank, ranks, device, form, options):
    """Bits of one rank, on GPUs eager and in a graph; and a bad id, which every rank is told of."""
    on_gpu = device == "cuda"
    experts, topk, hidden, intermediate, capacity = 4 * ranks, 2, 512, 256, 40
    parts = {name: x.to(device) for name, x in weights(experts, hidden, intermediate, form).items()}
    mine = slice(rank * 4, rank * 4 + 4)
    activations = {"activations": "e4m3" if form.endswith("e4m3") else "bf16"}
    if form == "mxfp4":
        generator = torch.Generator().manual_seed(4)
        parts |= {
            name: torch.randn(experts, width, generator=generator).to(device)
            for name, width in (("w13_bias", 2 * intermediate), ("w2_bias", hidden))
        }
    share = {name: x[mine] for name, x in parts.items()}
    layer = et.ExpertParallelLayer(**share, capacity=capacity, topk=topk, time_limit=20, **activations, **options)
    whole = et.Layer(**parts, **activations)
    whole.prepare(ranks * capacity, topk, ids_dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)
    for tokens in (1, 7, 40):
        x = torch.randn(ranks * tokens, hidden, generator=generator).bfloat16().to(device)
        ids = torch.rand(ranks * tokens, experts, generator=generator).topk(topk).indices.to(device)
        router = torch.rand(ranks * tokens, topk, generator=generator).to(device)
        own = slice(rank * tokens, (rank + 1) * tokens)
        # The last rank brings none: a call like any other.
        none = tokens == 7 and rank == ranks - 1
        if tokens == 7:
            ids[(ranks - 1) * tokens :] = -1
        brought = slice(own.start, own.start) if none else own
        call = (x[brought], ids[brought], router[brought])
        found = layer(*call, capacity=tokens)
        expected = whole(x, ids, router)[brought]
        if options["combine"] == "rows":
            assert torch.equal(found, expected), (form, options, tokens)
        assert torch.allclose(found, expected, rtol=0.02, atol=0.02), (form, options, tokens)
        # What waits on the host for all ranks' counts is no part of a graph.
        if on_gpu and (options["link"] == "mapped" or options["dispatch"] == "gather"):
            graph, result = captured(lambda call=call, tokens=tokens: layer(*call, capacity=tokens))
            graph.replay()
            assert torch.equal(result, found), (form, options, tokens)
        layer.check()
    if rank == ranks - 1:
        ids[-1, 0] = experts
    try:
        layer(x[own], ids[own], router[own])
        layer.check()
    except ValueError as error:
        assert f"on rank {ranks - 1}: topk_ids[39, 0] is {experts}" in str(error), error
    else:
        raise AssertionError("a bad id was not told")
    layer.check()


def run(rank, ranks, device, port):
    """One rank."""
    warnings.simplefilter("error", UserWarning)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    # A GPU says that it holds a copy of these.
    warnings.filterwarnings("ignore", "w13 and w2 are ", UserWarning)
    for form in ("e4m3", "bf16", "mxfp4", "mxfp4 x e4m3", "int4"):
        for combine in ("rows", "sums"):
            for dispatch in ("gather", "routed"):
                options = {"dispatch": dispatch, "combine": combine}
                for link in ("mapped", "nccl", "nccl-windows") if device == "cuda" else (None,):
                    compare(rank, ranks, device, form, options | ({"link": link} if link else {}))
    if rank == 0:
        print(f"{ranks} ranks on {device}: the bits of one rank")
    dist.barrier()
    dist.destroy_process_group()


def main():
    """Starts the ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, args=(args.ranks, args.device, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
