"""Folders of checkpoints: a model as Transformers 5 saves it, and in the layout in which its family is published."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from families import Family
from quantize import Scheme, quantize, quantize_int4, quantize_mxfp4

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

# A weight of an expert, routed or shared: what a quantized checkpoint holds in FP8.
EXPERT_WEIGHT = re.compile(
    r"\.(experts\.\d+|shared_experts?|shared_mlp)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
# A tensor of a routed one.
ROUTED = re.compile(r"\.experts\.\d+\.")
PER_EXPERT = re.compile(r"^(?P<block>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight$")
FUSED = re.compile(r"^(?P<block>.*\.experts)\.(?P<projection>gate_up|down)_proj$")
ROUTER = re.compile(r"\.(gate\.weight|router\.weight|router\.layer\.weight|gate\.wg\.weight)$")
CORRECTION_BIAS = re.compile(r"\.block_sparse_moe\.e_score_correction_bias$")
SHARD_BYTES = 600_000


@dataclass(frozen=True)
class Layout:
    """One way to write a checkpoint down."""

    name: str
    # The public hub's names of tensors and keys of config.json, instead of those of Transformers 5.
    hub: bool = False
    dtype: torch.dtype = torch.bfloat16
    scheme: Scheme | None = None
    # Several files and an index.
    shards: bool = False
    # The experts of a layer as one tensor, as Transformers 5 holds them in memory.
    fused: bool = False
    # Tensors of the model without its head: "layers.1.mlp", not "model.layers.1.mlp".
    headless: bool = False
    # An index of shards that are gone, beside the file that holds everything.
    stale_index: bool = False
    # A byte order mark before config.json's text.
    byte_order_mark: bool = False


@dataclass(frozen=True)
class Folders:
    """The checkpoint to be read, and what it stands for in a form that Transformers reads without rounding."""

    checkpoint: Path
    reference: Path


def write(model: Any, family: Family, layout: Layout, folder: Path) -> Folders:
    """Writes the model down in `layout` under `folder`."""
    saved, checkpoint, reference = folder / "saved", folder / "checkpoint", folder / "reference"
    model.save_pretrained(saved, max_shard_size=SHARD_BYTES if layout.shards else "5GB")
    if layout.headless:
        model.model.save_pretrained(checkpoint)
        return Folders(checkpoint, saved)
    if layout.stale_index:
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    if not (layout.hub or layout.fused or layout.byte_order_mark or layout.dtype != torch.bfloat16):
        return Folders(saved, saved)

    config: Config = json.loads((saved / "config.json").read_text())
    tensors = load_file(saved / "model.safetensors")
    if family.misnamed is not None:
        tensors = {name.replace(*family.misnamed): tensor for name, tensor in tensors.items()}
    if layout.byte_order_mark:
        save(checkpoint, config, tensors)
        (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
        return Folders(checkpoint, saved)
    if layout.dtype != torch.bfloat16:
        tensors = {name: refine(tensor, layout.dtype) for name, tensor in tensors.items()}
        config["dtype"] = str(layout.dtype).removeprefix("torch.")
    if layout.hub:
        config = hub_config(config, family)
    plain = hub_routers(tensors, family) if layout.hub else tensors
    if layout.scheme is None:
        fused = layout.fused or (layout.hub and family.hub_experts == "fused")
        transposed = layout.hub and family.hub_experts == "transposed"
        save(checkpoint, config, transpose(plain) if transposed else fuse(plain) if fused else plain)
        # Transformers takes experts as square as gate_up_proj [E, 256, 256] for what it saves itself.
        if transposed and family.intermediate * 2 == family.config["hidden_size"]:
            save(reference, config, plain)
            return Folders(checkpoint, reference)
        return Folders(checkpoint, checkpoint)
    if layout.scheme.mxfp4:
        save(checkpoint, {**config, "quantization_config": layout.scheme.config()}, mxfp4_experts(plain, family))
        return Folders(checkpoint, checkpoint)
    if layout.scheme.fp4_experts:
        config |= {"expert_dtype": "fp4", "quantization_config": layout.scheme.config()}
        save(checkpoint, config, fp4_experts(plain, layout.scheme))
        return Folders(checkpoint, checkpoint)
    if layout.scheme.int4:
        quantized, stands_for = int4_experts(plain)
        save(checkpoint, {**config, "quantization_config": layout.scheme.config()}, quantized)
        save(reference, config, stands_for)
        return Folders(checkpoint, reference)
    quantized, stands_for = quantize_experts(split(plain), layout.scheme)
    quantization = (
        layout.scheme.config() if layout.scheme.compressed else {**layout.scheme.config(), **family.quantization}
    )
    save(checkpoint, {**config, "quantization_config": quantization}, quantized)
    save(reference, config, fuse(stands_for) if family.hub_experts == "transposed" else stands_for)
    return Folders(checkpoint, reference)


def save(folder: Path, config: Config, tensors: Tensors) -> None:
    """Writes config.json and one file with all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def hub_config(saved: Config, family: Family) -> Config:
    """The saved config.json as the hub has it: rows of `families.py` say how the text model's keys differ."""
    config: Config = json.loads(json.dumps(saved))
    text = config.get("text_config", config)
    for key in family.hub.drop:
        text.pop(key, None)
    text.update(family.hub.set)
    for part in (config, text):
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    config["transformers_version"] = "4.51.0"
    if family.hub.model_type is not None:
        config["model_type"] = family.hub.model_type
    return config


def hub_routers(tensors: Tensors, family: Family) -> Tensors:
    """The saved tensors with the router's in the hub's format."""
    if family.hub_router == "bf16":
        return {name: tensor.to(torch.bfloat16) if ROUTER.search(name) else tensor for name, tensor in tensors.items()}
    if family.hub_router == "f32":
        return {
            name: refine(tensor, torch.float32) if ROUTER.search(name) or CORRECTION_BIAS.search(name) else tensor
            for name, tensor in tensors.items()
        }
    return tensors


def transpose(tensors: Tensors) -> Tensors:
    """Experts that are one tensor with the last two axes swapped."""
    return {name: tensor.transpose(1, 2) if FUSED.search(name) else tensor for name, tensor in tensors.items()}


def refine(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same values with digits that bf16 does not hold."""
    if tensor.dtype == torch.float32:
        return tensor
    digits = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64)).reshape(tensor.shape) * 2.0**-10
    return (tensor.double() * (1 + digits)).to(dtype)


def fuse(tensors: Tensors) -> Tensors:
    """One tensor for all experts: gate_up_proj [E, 2I, H], gate's rows before up's, and down_proj [E, H, I]."""
    fused: Tensors = {}
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        match = PER_EXPERT.match(name)
        if match is None:
            fused[name] = tensor
            continue
        projections = experts.setdefault(match["block"], {"gate": {}, "up": {}, "down": {}})
        projections[match["projection"]][int(match["expert"])] = tensor
    for block, projections in experts.items():
        gate, up, down = (
            torch.stack([tensor for _, tensor in sorted(projections[projection].items())])
            for projection in ("gate", "up", "down")
        )
        fused[f"{block}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        fused[f"{block}.down_proj"] = down
    return fused


def split(tensors: Tensors) -> Tensors:
    """The opposite of `fuse`."""
    apart: Tensors = {}
    for name, tensor in tensors.items():
        match = FUSED.match(name)
        if match is None:
            apart[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            names = ("gate", "up") if match["projection"] == "gate_up" else ("down",)
            for projection, part in zip(names, weight.chunk(len(names)), strict=True):
                apart[f"{match['block']}.{expert}.{projection}_proj.weight"] = part
    return apart


def mxfp4_experts(tensors: Tensors, family: Family) -> Tensors:
    """The tensors with experts as gpt-oss publishes them: blocks and scales along the inputs, which come last."""
    quantized: Tensors = {}
    for name, tensor in tensors.items():
        if FUSED.match(name) is None:
            quantized[name] = tensor
            continue
        weight = tensor.transpose(1, 2) if family.transposed else tensor
        quantized[f"{name}_blocks"], quantized[f"{name}_scales"] = quantize_mxfp4(weight)
    return quantized


def fp4_experts(tensors: Tensors, scheme: Scheme) -> Tensors:
    """The tensors as DeepSeek-V4 publishes them: routed experts in MXFP4, the shared one in FP8."""
    quantized: Tensors = {}
    for name, tensor in quantize_experts(tensors, scheme)[0].items():
        stem = name.removesuffix("weight")
        if ROUTED.search(name) is None:
            quantized[name] = tensor
        elif name.endswith("weight"):
            blocks, scales = quantize_mxfp4(tensors[name])
            quantized[name] = blocks.flatten(-2).view(torch.int8)
            quantized[stem + "scale"] = scales.view(torch.float8_e8m0fnu)
    return quantized


def int4_experts(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The tensors with routed experts as compressed-tensors packs int4, and with what those stand for."""
    quantized: Tensors = {}
    stands_for: Tensors = {}
    for name, tensor in split(tensors).items():
        if ROUTED.search(name) is None:
            quantized[name] = stands_for[name] = tensor
            continue
        quantized[f"{name}_packed"], quantized[f"{name}_scale"], stands_for[name] = quantize_int4(tensor)
        quantized[f"{name}_shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
    return quantized, stands_for


def quantize_experts(tensors: Tensors, scheme: Scheme) -> tuple[Tensors, Tensors]:
    """The tensors with experts in FP8, and with the f32 values that those stand for."""
    quantized: Tensors = {}
    stands_for: Tensors = {}
    for name, tensor in tensors.items():
        if EXPERT_WEIGHT.search(name) is None:
            quantized[name] = stands_for[name] = tensor
            continue
        stem = name.removesuffix("weight")
        quantized[name], quantized[stem + scheme.suffix], stands_for[name] = quantize(tensor, scheme)
    return quantized, stands_for
