"""vLLM 0.33.0's own Python as a witness: its modular kernel around its experts and ours.

``EXPERTILE_VLLM_SOURCE`` names a folder that holds ``vllm/``: the files of the wheel, of which a CPU needs the Python
ones only (``benches/peers/vllm_modular/collect.py`` collects what a GPU needs). What they import is installed, or in
``packages/`` beside them.

Everything that is called is vLLM's. On a GPU the package of attention, which nothing calls, may lack its extension
(:func:`stand_in_attention`). On a machine without one, the operators of vLLM's extension are in plain torch
(:func:`stand_in_operators`), the device has another name, and Triton's kernels run in Triton's interpreter, with its
arithmetic mended (:func:`mend_interpreter`).
"""

import dataclasses
import glob
import importlib
import os
import sys
from types import ModuleType, SimpleNamespace

import torch

SOURCE = os.environ.get("EXPERTILE_VLLM_SOURCE")
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_SCHEMAS = {
    "_C": {
        "silu_and_mul": "(Tensor! result, Tensor input) -> ()",
        "silu_and_mul_with_clamp": "(Tensor! result, Tensor input, float limit, float alpha, float beta) -> ()",
        "silu_and_mul_per_block_quant": (
            "(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub, bool is_scale_transposed)"
            " -> ()"
        ),
    },
    "_moe_C": {
        "moe_sum": "(Tensor input, Tensor! output, Tensor? topk_ids, Tensor? expert_map) -> ()",
        "moe_align_block_size": (
            "(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids, "
            "Tensor! num_tokens_post_pad, Tensor? expert_map, Tensor? scatter_idx) -> ()"
        ),
    },
}


def load():
    """The pieces of vLLM that a test calls."""
    if SOURCE not in sys.path:
        sys.path.insert(0, SOURCE)
        sys.path.append(os.path.join(SOURCE, "packages"))
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # vLLM takes Triton without a driver only where it believes that one will come.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not glob.glob(os.path.join(SOURCE, "vllm", "vllm_flash_attn", "*.so")):
        stand_in_attention()
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts import triton_moe
    from vllm.model_executor.layers.fused_moe.oracle import fp8, unquantized
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
    from vllm.model_executor.layers.quantization.utils import quant_utils
    from vllm.platforms import current_platform
    from vllm.v1.worker import workspace

    if not on_gpu:
        stand_in_operators()
        mend_interpreter()
        type(current_platform).get_device_name = classmethod(lambda cls, device_id=0: "none")
    return SimpleNamespace(
        mk=mk,
        config=config,
        fp8=fp8,
        unquantized=unquantized,
        MoEActivation=MoEActivation,
        TritonExperts=triton_moe.TritonExperts,
        triton_moe=triton_moe,
        PrepareAndFinalize=MoEPrepareAndFinalizeNoDPEPModular,
        quant_utils=quant_utils,
        current_platform=current_platform,
        workspace=workspace,
        as_configured=lambda device: set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device=device))),
    )


def stand_in_attention():
    """The package of attention, without its extension: importing it fails without, and nothing here attends."""
    name = "vllm.vllm_flash_attn"
    package = sys.modules[name] = ModuleType(name)
    package.__path__ = [os.path.join(SOURCE, "vllm", "vllm_flash_attn")]
    interface = importlib.import_module(f"{name}.flash_attn_interface")
    package.__dict__.update({key: value for key, value in vars(interface).items() if not key.startswith("__")})


@dataclasses.dataclass
class Case:
    """A layer of experts and its calls."""

    experts: int
    topk: int
    hidden: int
    intermediate: int
    form: str = "e4m3"
    global_experts: int | None = None
    activation: str = "silu"
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    weight_on_input: bool = False
    max_tokens: int = 512

    @property
    def ids(self):
        """Ids that a router may give."""
        return self.experts if self.global_experts is None else self.global_experts


def moe_config(vllm, case, device, **more):
    """vLLM's configuration of the layer; `more` replaces fields of it, or of its parallel configuration."""
    parallel = vllm.config.FusedMoEParallelConfig.make_no_parallel()
    if case.global_experts is not None:
        parallel.use_ep, parallel.ep_size = True, case.global_experts // case.experts
    for name in [name for name in more if hasattr(parallel, name)]:
        setattr(parallel, name, more.pop(name))
    fields = {
        "num_experts": case.ids,
        "experts_per_token": case.topk,
        "hidden_dim": case.hidden,
        "intermediate_size": case.intermediate,
        "num_local_experts": case.experts,
        "num_logical_experts": case.ids,
        "activation": vllm.MoEActivation(case.activation),
        "device": device,
        "routing_method": vllm.config.RoutingMethodType.Renormalize,
        "moe_parallel_config": parallel,
        "in_dtype": torch.bfloat16,
        "max_num_tokens": case.max_tokens,
        "swiglu_limit": case.limit,
        "swiglu_alpha": case.alpha,
        "swiglu_beta": case.beta,
    }
    return vllm.config.FusedMoEConfig(**{**fields, **more})


def weights(case, device, seed=0):
    """w1 and w2 and, if they are e4m3, their scales, as vLLM holds them."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrices(rows, columns):
        shape = (case.experts, rows, columns)
        if case.form == "bf16":
            values, scale = torch.empty(shape, dtype=torch.bfloat16, device=device), None
        else:
            values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.rand(case.experts, rows // 128, columns // 128, generator=generator, device=device)
            scale = scale * 0.01 + 0.002
        for expert in range(case.experts):
            wide = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
            if scale is not None:
                wide = (wide / scale[expert].repeat_interleave(128, 0).repeat_interleave(128, 1)).clamp(-448, 448)
            values[expert] = wide.to(values.dtype)
        return values, scale

    w1, w1_scale = matrices(2 * case.intermediate, case.hidden)
    w2, w2_scale = matrices(case.hidden, case.intermediate)
    return SimpleNamespace(w1=w1, w2=w2, w1_scale=w1_scale, w2_scale=w2_scale, b1=None, b2=None)


def fill_mxfp4(layer, seed=0):
    """Puts numbers into the parameters that vLLM has made for gpt-oss's experts; -> the same in float64 as `reference`
    takes them: gate's rows, then up's, in the place of rows that take turns."""
    generator = torch.Generator().manual_seed(seed)
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).double()
    found = {}
    for name, short in (("w13", "1"), ("w2", "2")):
        weight, scale, bias = (getattr(layer, f"{name}_{kind}") for kind in ("weight", "weight_scale", "bias"))
        blocks = torch.randint(0, 256, weight.shape, generator=generator, dtype=torch.uint8)
        powers = torch.randint(118, 123, scale.shape, generator=generator, dtype=torch.uint8)
        biases = torch.randn(bias.shape, generator=generator).bfloat16()
        for parameter, values in ((weight, blocks), (scale, powers), (bias, biases)):
            parameter.data.copy_(values)
        nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
        values = e2m1[nibbles & 7] * torch.where(nibbles < 8, 1.0, -1.0).double()
        values = values * torch.exp2(powers.double() - 127).repeat_interleave(32, -1)
        biases = biases.double()
        if name == "w13":
            values, biases = (torch.cat((x[:, ::2], x[:, 1::2]), 1) for x in (values, biases))
        found |= {f"w{short}": values.to(weight.device), f"b{short}": biases.to(weight.device), f"w{short}_scale": None}
    return SimpleNamespace(**found)


def expert_map(case, device):
    """The first of the global experts on this rank are spread over it; None without expert parallelism."""
    if case.global_experts is None:
        return None
    found = torch.full((case.global_experts,), -1, dtype=torch.int32)
    found[torch.arange(case.experts) * (case.global_experts // case.experts)] = torch.arange(case.experts).int()
    return found.to(device)


def inputs(case, tokens, device, seed=0, ids_dtype=torch.int32):
    """Hidden states, distinct ids, router weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, case.hidden, generator=generator).bfloat16()
    ids = torch.rand(tokens, case.ids, generator=generator).topk(case.topk).indices.to(ids_dtype)
    router = torch.rand(tokens, case.topk, generator=generator) + 0.1
    return x.to(device), ids.to(device), router.to(device)


class Modular:
    """vLLM's modular kernel around a class of experts, over weights."""

    def __init__(self, vllm, case, parts, experts_class, device, **more):
        self.vllm, self.case, self.parts = vllm, case, parts
        self.config = moe_config(vllm, case, device, **more)
        if case.form == "bf16":
            quant = vllm.config.FusedMoEQuantConfig.make()
        else:
            scales = {"w1_scale": parts.w1_scale, "w2_scale": parts.w2_scale}
            quant = vllm.config.fp8_w8a8_moe_quant_config(**scales, block_shape=[128, 128])
        self.experts = experts_class(self.config, quant)
        self.kernel = vllm.mk.FusedMoEKernel(vllm.PrepareAndFinalize(), self.experts)
        self.map = expert_map(case, device)

    def __call__(self, x, ids, router):
        return self.kernel.apply(
            hidden_states=x,
            w1=self.parts.w1,
            w2=self.parts.w2,
            topk_weights=router,
            topk_ids=ids,
            activation=self.config.activation,
            global_num_experts=self.case.ids,
            expert_map=self.map,
            apply_router_weight_on_input=self.case.weight_on_input,
        )


def quantized(rows):
    """Rows as they are after e4m3 with a scale for each 128 values."""
    groups = rows.float().unflatten(-1, (-1, 128))
    scale = (groups.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-10)
    return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale).flatten(-2)


def reference(case, parts, x, ids, router, experts=None):
    """The layer in float64 on the stored weights, one expert at a time; rounded where the format says so."""

    def widened(values, scale):
        if scale is None:
            return values.double()
        return values.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)

    rounded = quantized if case.form == "e4m3" else torch.Tensor.double
    local = ids.long() if experts is None else experts.long()[ids.long()]
    if case.weight_on_input:
        x, router = x * router.bfloat16(), torch.ones_like(router)
    x = rounded(x)
    out = torch.zeros_like(x)
    for expert in range(case.experts):
        w1 = widened(parts.w1[expert], None if parts.w1_scale is None else parts.w1_scale[expert])
        w2 = widened(parts.w2[expert], None if parts.w2_scale is None else parts.w2_scale[expert])
        tokens, slots = (local == expert).nonzero(as_tuple=True)
        sums = x[tokens] @ w1.T + (0 if parts.b1 is None else parts.b1[expert])
        gate, up = sums.bfloat16().double().chunk(2, -1)
        if case.limit is not None:
            gate, up = gate.clamp(max=case.limit), up.clamp(-case.limit, case.limit)
        rows = rounded((up + (case.beta or 0.0)) * gate * torch.sigmoid((case.alpha or 1.0) * gate))
        rows = rows @ w2.T + (0 if parts.b2 is None else parts.b2[expert])
        out.index_add_(0, tokens, rows * router[tokens, slots, None].double())
    return out


def distance(mine, expected):
    """Of all values, and of the row that is farthest away."""
    mine, expected = mine.double(), expected.double()
    rows = (mine - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    return float((mine - expected).norm() / expected.norm().clamp_min(1e-30)), float(rows.max())


def mend_interpreter():
    """Triton's interpreter multiplies the bits of bfloat16 as if they were numbers, and cuts off where a GPU rounds."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    their_dot, their_convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    rounded = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    }

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self, a, b, *more):
        return their_dot(self, wide(a), wide(b), *more)

    def convert(values, source, target, mode):
        if source != tl.float32 or target not in rounded:
            return their_convert(values, source, target, mode)
        dtype, bits = rounded[target]
        return torch.from_numpy(numpy.array(values)).to(dtype).view(bits).numpy()

    interpreter.InterpreterBuilder.create_dot, interpreter._convert_float = create_dot, convert


def stand_in_operators():
    """Operators of vLLM's extension that its Triton experts call, on CPU tensors."""
    for namespace, schemas in _SCHEMAS.items():
        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        for name, schema in schemas.items():
            if not hasattr(getattr(torch.ops, namespace), name):
                library.define(name + schema)
                library.impl(name, globals()[f"_{name}"], "CPU")


_libraries: list = []


def _silu_and_mul(result, input):
    gate, up = input.float().chunk(2, -1)
    result.copy_(torch.nn.functional.silu(gate) * up)


def _silu_and_mul_with_clamp(result, input, limit, alpha, beta):
    gate, up = input.float().chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    result.copy_((up + beta) * gate * torch.sigmoid(alpha * gate))


def _silu_and_mul_per_block_quant(out, input, scales, group_size, scale_ub, is_scale_transposed):
    gate, up = input.float().chunk(2, -1)
    groups = (torch.nn.functional.silu(gate) * up).unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / 448).clamp_min(1e-10)
    scales.copy_(scale)
    out.copy_((groups / scale.unsqueeze(-1)).clamp(-448, 448).flatten(-2).to(out.dtype))


def _moe_sum(input, output, topk_ids, expert_map):
    rows = input.float()
    if expert_map is not None:
        rows = torch.where((expert_map[topk_ids.long()] >= 0).unsqueeze(-1), rows, 0.0)
    output.copy_(rows.sum(1))


def _moe_align_block_size(
    topk_ids, num_experts, block_size, sorted_token_ids, experts_ids, num_tokens_post_pad, expert_map, scatter_idx
):
    ids = topk_ids.flatten().long()
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map[ids.clamp_min(0)].long(), -1)
    sorted_token_ids.fill_(ids.numel())
    experts_ids.fill_(-1)
    start = 0
    for expert in range(num_experts):
        slots = (ids == expert).nonzero().flatten().int()
        blocks = -(-slots.numel() // block_size)
        sorted_token_ids[start : start + slots.numel()] = slots
        experts_ids[start // block_size : start // block_size + blocks] = expert
        start += blocks * block_size
    num_tokens_post_pad.fill_(start)
