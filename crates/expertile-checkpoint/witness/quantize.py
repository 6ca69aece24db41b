"""FP8 (e4m3) and MXFP4 as published checkpoints hold them: quantized weights, their scales, and what both stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 128
LARGEST = 448.0


@dataclass(frozen=True)
class Scheme:
    """How weights are scaled ("block", "channel", "tensor"), the scales' format, and who wrote the checkpoint."""

    name: str
    strategy: str
    scale: torch.dtype
    # Scales are powers of two, whatever their format.
    power_of_two: bool = False
    # The naming and the quantization_config of compressed-tensors, instead of DeepSeek's.
    compressed: bool = False
    # MXFP4 instead of FP8: gpt-oss's, whose experts are tensors `_blocks` and `_scales` that Transformers reads itself.
    mxfp4: bool = False
    # DeepSeek-V4's: routed experts are MXFP4 in int8, other matrices FP8, the scales of both are called `scale`.
    fp4_experts: bool = False
    # Kimi-K2 Thinking's: routed experts are int4 in groups of 32, as compressed-tensors packs them.
    int4: bool = False

    @property
    def suffix(self) -> str:
        if self.fp4_experts:
            return "scale"
        return "weight_scale" if self.compressed else "weight_scale_inv"

    def config(self) -> dict[str, object]:
        """The `quantization_config` of such a checkpoint."""
        if self.mxfp4:
            modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
            return {"quant_method": "mxfp4", "modules_to_not_convert": modules}
        if self.int4:
            weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
            group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
            return {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
            }
        if self.compressed:
            block = self.strategy == "block"
            weights = {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "dynamic": False,
                "strategy": self.strategy,
                "block_structure": [BLOCK, BLOCK] if block else None,
                "group_size": None,
                "actorder": None,
                "observer": "minmax",
                "observer_kwargs": {},
            }
            activations = {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "dynamic": True,
                "strategy": "group" if block else "token",
                "group_size": BLOCK if block else None,
                "block_structure": None,
                "actorder": None,
                "observer": None,
                "observer_kwargs": {},
            }
            group = {
                "format": "float-quantized",
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
            return {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "quantization_status": "compressed",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head", "re:.*gate$", "re:.*self_attn.*"],
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        config: dict[str, object] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        if self.strategy == "block":
            config["weight_block_size"] = [BLOCK, BLOCK]
        if self.power_of_two:
            config["scale_fmt"] = "ue8m0"
        return config


F32_BLOCKS = Scheme("fp8", "block", torch.float32)
BF16_BLOCKS = Scheme("fp8, bf16 scales", "block", torch.bfloat16)
F16_BLOCKS = Scheme("fp8, f16 scales", "block", torch.float16)
UE8M0_IN_F32 = Scheme("fp8, ue8m0 in f32", "block", torch.float32, power_of_two=True)
E8M0_BLOCKS = Scheme("fp8, e8m0 scales", "block", torch.float8_e8m0fnu, power_of_two=True)
COMPRESSED_BLOCKS = Scheme("fp8, compressed-tensors blocks", "block", torch.bfloat16, compressed=True)
COMPRESSED_CHANNELS = Scheme("fp8, compressed-tensors channels", "channel", torch.bfloat16, compressed=True)
MXFP4 = Scheme("mxfp4", "group", torch.uint8, mxfp4=True)
FP4_EXPERTS = Scheme("fp4 experts", "block", torch.float8_e8m0fnu, power_of_two=True, fp4_experts=True)
INT4 = Scheme("int4", "group", torch.bfloat16, int4=True)
COMPRESSED_TENSORS = Scheme("fp8, compressed-tensors tensors", "tensor", torch.float32, compressed=True)


def _spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A block's scale at each of its weights; blocks at the edge are cut off."""
    wide = scales.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return wide[:rows, :columns]


def _largest(weight: torch.Tensor, strategy: str) -> torch.Tensor:
    """The largest magnitude of what shares a scale: [ceil(rows / 128), ceil(columns / 128)], [rows, 1], or [1]."""
    magnitude = weight.abs()
    if strategy == "tensor":
        return magnitude.amax().reshape(1)
    if strategy == "channel":
        return magnitude.amax(dim=1, keepdim=True)
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK, dtype=weight.dtype)
    padded[:rows, :columns] = magnitude
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK).amax(dim=(1, 3))


def quantize(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The quantized weight, its scales as stored, and their product in f32."""
    exact = weight.double()
    scales = _largest(exact, scheme.strategy) / LARGEST
    if scheme.power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    stored = scales.to(scheme.scale)
    scales = stored.to(torch.float64)
    wide = _spread(scales, *weight.shape) if scheme.strategy == "block" else scales
    quantized = (exact / wide).clamp(-LARGEST, LARGEST).to(torch.float32).to(torch.float8_e4m3fn)
    return quantized, stored, (quantized.to(torch.float64) * wide).to(torch.float32)


# The magnitudes of e2m1, by their bits.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
GROUP = 32


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., columns / 32, 16] and scales [..., columns / 32] of weights [..., columns]."""
    groups = weight.double().unflatten(-1, (-1, GROUP))
    # Rounded down: the largest magnitude of a group becomes 4 to below 8, and is held to 6.
    exponents = torch.floor(torch.log2(groups.abs().amax(dim=-1).clamp(min=2.0**-120))) - 2
    scaled = groups / torch.exp2(exponents).unsqueeze(-1)
    distances = (scaled.abs().clamp(max=6.0).unsqueeze(-1) - E2M1).abs()
    # Of two equally near ones the even one.
    nearest = (distances + torch.arange(8) % 2 * 1e-12).argmin(dim=-1)
    nibbles = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words of eight values, the first in the lowest bits, scales in bf16, and what both stand for in f32."""
    groups = weight.double().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(dim=-1) / 7).to(torch.bfloat16)
    values = (groups / scales.double().unsqueeze(-1)).round().clamp(-8, 7)
    stands_for = (values * scales.double().unsqueeze(-1)).flatten(-2).float()
    eights = (values.flatten(-2).to(torch.int64) + 8).unflatten(-1, (-1, 8))
    words = (eights << (4 * torch.arange(8))).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), scales, stands_for
