"""vLLM's Triton experts, its default on one Hopper, in the order of launches of its class TritonExperts."""

import json
import os

import torch

import vllm_ops
from device import DEVICE
from rivals.base import Prepared, Rival
from shapes import SHAPES

PIECES = ("triton_moe.py", "configs", "ops.so", "moe_ops.so")


class VllmTriton(Rival):
    key, label = "triton", "vLLM 0.33.0, Triton experts"
    formats = ("e4m3", "bf16")

    def missing(self):
        return vllm_ops.missing(*PIECES)

    def version(self):
        import triton

        return f"vLLM 0.33.0, Triton {triton.__version__}"

    def load(self, shape, format, weights, tokens):
        return Loaded(shape, format, weights, self.batch_invariant)


class VllmTritonBatchInvariant(VllmTriton):
    """With VLLM_BATCH_INVARIANT=1: one tile for every size."""

    key, label = "triton_bi", "vLLM 0.33.0, Triton experts, batch-invariant"
    batch_invariant = True


class Loaded:
    def __init__(self, shape, format, weights, batch_invariant):
        vllm_ops.load()
        self.kernel = vllm_ops.load_module("triton_moe")
        self.shape, self.fp8, self.batch_invariant = SHAPES[shape], format == "e4m3", batch_invariant
        self.pairs = [w.pair for w in weights]

    def tile(self, tokens):
        """-> the tile that vLLM takes for a number of tokens, and whether it was tuned."""
        shape = self.shape
        dtype, blocks = ("fp8_w8a8", [128, 128]) if self.fp8 else (None, None)
        if not self.batch_invariant:
            kind = f",dtype={dtype},block_shape=[128,128]" if self.fp8 else ""
            name = f"E={shape.experts},N={shape.intermediate},device_name=NVIDIA_H200{kind}.json"
            path = vllm_ops.piece(os.path.join("configs", name))
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    tiles = {int(size): tile for size, tile in json.load(file).items() if size.isdigit()}
                return tiles[min(tiles, key=lambda size: abs(size - tokens))], True
        # What it reads of vLLM's environment.
        self.kernel.envs.VLLM_BATCH_INVARIANT = self.batch_invariant
        sizes = tokens, shape.experts, shape.intermediate, shape.hidden, shape.topk
        return self.kernel.get_default_config(*sizes, dtype, blocks), False

    def prepare(self, calls):
        tile, tuned = self.tile(calls[0].tokens)
        layers = [Layer(self, call, tile) for call in calls]
        return Prepared(layers, [layer.out for layer in layers], dict(tile=tile, tuned=tuned), gemms=None)


class Layer:
    """One call; vLLM's workspaces are there before it."""

    def __init__(self, loaded, call, tile):
        self.loaded, self.call, self.tile = loaded, call, tile
        hidden, intermediate, _, topk, _ = loaded.shape
        slots = call.tokens * topk
        wide = torch.empty(slots * max(2 * intermediate, hidden), device=DEVICE, dtype=torch.bfloat16)
        # As there, both GEMMs' results share one buffer.
        self.mid = wide[: slots * 2 * intermediate].view(call.tokens, topk, 2 * intermediate)
        self.rows = wide[: slots * hidden].view(call.tokens, topk, hidden)
        self.out = torch.empty_like(call.x)

    def __call__(self):
        """As there, what is between the steps is allocated where it is needed, by the graph's own pool."""
        (w13, w13_scales), (w2, w2_scales) = self.loaded.pairs
        call, (x, scales) = self.call, self.quantized(self.call.x)
        assigned = self.assign()
        self.gemm(x, w13, self.mid, scales, w13_scales, None, assigned, False, self.loaded.shape.topk)
        y, y_scales = self.activated(self.mid.view(-1, self.mid.shape[-1]))
        self.gemm(y, w2, self.rows, y_scales, w2_scales, call.weights, assigned, True, 1)
        if call.expert_map is None:
            torch.ops._moe_C.moe_sum(self.rows, self.out, None, None)
        else:
            torch.ops._moe_C.moe_sum(self.rows, self.out, call.ids, call.expert_map)

    def quantized(self, x):
        if not self.loaded.fp8:
            return x, None
        q = torch.empty(x.shape, device=DEVICE, dtype=torch.float8_e4m3fn)
        scales = torch.empty((x.shape[0], x.shape[1] // 128), device=DEVICE)
        torch.ops._C.per_token_group_fp8_quant(x, q, scales, 128, 1e-10, -448.0, 448.0, False, False, False)
        return q, scales

    def activated(self, mid):
        intermediate = mid.shape[1] // 2
        if not self.loaded.fp8:
            y = torch.empty((mid.shape[0], intermediate), device=DEVICE, dtype=torch.bfloat16)
            torch.ops._C.silu_and_mul(y, mid)
            return y, None
        y = torch.empty((mid.shape[0], intermediate), device=DEVICE, dtype=torch.float8_e4m3fn)
        scales = torch.empty((mid.shape[0], intermediate // 128), device=DEVICE)
        torch.ops._C.silu_and_mul_per_block_quant(y, mid, scales, 128, None, False)
        return y, scales

    def assign(self):
        """-> sorted slots, the expert of each tile of them, and how many there are with padding."""
        call, block, shape = self.call, self.tile["BLOCK_SIZE_M"], self.loaded.shape
        ids, slots = call.ids, call.ids.numel()
        ints = lambda n: torch.empty((n,), device=DEVICE, dtype=torch.int32)
        if call.expert_map is None and slots * 4 <= shape.global_experts:
            # So few that every slot gets a tile of its own.
            return None, ids.view(-1), torch.full((1,), slots * block, device=DEVICE, dtype=torch.int32)
        padded = slots + shape.global_experts * (block - 1)
        if slots < shape.global_experts:
            padded = min(slots * block, padded)
        sorted_slots, experts, count = ints(padded), ints(-(-padded // block)), ints(1)
        torch.ops._moe_C.moe_align_block_size(
            ids, shape.global_experts, block, sorted_slots, experts, count, call.expert_map, None
        )
        return sorted_slots, experts, count

    def gemm(self, rows, weights, out, scales, weight_scales, router_weights, assigned, weighted, topk):
        kernel, fp8 = self.loaded.kernel, self.loaded.fp8
        kernel.invoke_fused_moe_triton_kernel(
            rows,
            weights,
            out,
            scales,
            weight_scales,
            router_weights,
            *assigned,
            weighted,
            topk,
            self.tile,
            compute_type=kernel.tl.bfloat16,
            use_fp8_w8a8=fp8,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            use_int4_w4a16=False,
            per_channel_quant=False,
            block_shape=[128, 128] if fp8 else None,
        )
