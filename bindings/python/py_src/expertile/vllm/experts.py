"""``ExpertileExperts``, the experts of vLLM's modular kernel: one call of ``expertile.torch.Layer``. Imports vLLM.

bfloat16 hidden states come in, and the finished sum over a token's experts goes out. Weights are used where vLLM has
them, in the format of the checkpoint: what is written there (a reload, expert load balancing) counts from the next
call. On the CPU, where they are packed, they are packed anew when they have been written.

Kernels are compiled in the first call of each layer, which is vLLM's profiling run, for as many tokens as
``max_num_tokens`` says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym
from vllm.platforms import current_platform
from vllm.v1.worker import workspace as vllm_workspace

from .. import _native
from .._errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from ..torch import Layer

__all__ = ["ExpertileExperts"]

_BLOCK = 128
_MOST_TOPK = 32
_MOST_EXPERTS = 1024
# Of bf16 weights, in elements: 16 bytes of a row of hidden states, 32 of a row of weights.
_BF16_MULTIPLE = 16

_VLLM_NAMES = {
    "w13": "w1",
    "w13_scale": "w1_scale",
    "out": "output",
    "workspace": "workspace2",
}
"""What vLLM calls the arguments of a layer that it calls otherwise."""


@dataclasses.dataclass
class _Held:
    """A layer over vLLM's weights."""

    layer: Layer
    source: tuple[Any, ...]
    """Which weights they were, when it was made."""
    options: dict[str, Any]
    prepared: dict[tuple[int, int, torch.dtype], int] = dataclasses.field(default_factory=dict)
    """How many tokens at most, by topk, global experts and the type of ids."""
    workspace_bytes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    """By tokens and topk."""


_layers = WeakTensorKeyDictionary()
"""By vLLM's tensor of the first weights: a reload makes new experts, while graphs still launch the layer's kernels."""


class ExpertileExperts(mk.FusedMoEExpertsModular):
    """Experts in bfloat16, or in float8_e4m3fn with 128 x 128 block scales, on one Hopper GPU; SwiGLU.

    On CPU tensors the layer is computed on the CPU, which vLLM itself does not choose.
    """

    def __init__(
        self, moe_config: Any, quant_config: Any, max_num_tokens: int | None = None, num_dispatchers: int | None = None
    ) -> None:
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        self._require_scheme(quant_config)
        self._options = swiglu_options(moe_config.activation, self.activation_config)
        self._held: _Held | None = None

    # What it takes.

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts], moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        reason = device_refusal()
        if reason is not None:
            return False, reason
        supported, reason = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return False, reason
        reason = cls._config_refusal(moe_config, weight_key)
        return reason is None, reason

    @staticmethod
    def _config_refusal(moe_config: Any, weight_key: Any) -> str | None:
        return config_refusal(moe_config, weight_key is not None)

    @staticmethod
    def _require_scheme(quant_config: Any) -> None:
        require_scheme(quant_config)

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return device_refusal() is None

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) in ((None, None), (kFp8Static128BlockSym, kFp8Dynamic128Sym))

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in ("silu", "swigluoai_uninterleave")

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        # Other ways to other ranks carry quantized rows, or choose the rows' layout; none of them has been tried.
        if moe_parallel_config.use_passthrough_all2all:
            return False
        return not moe_parallel_config.use_all2all_kernels or moe_parallel_config.use_ag_rs_all2all_kernels

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    # What vLLM asks before a call, in this order.

    def moe_problem_size(self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
        """Sizes. The first that vLLM asks with tensors in hand, so that the layer is made and prepared here."""
        if a1.dtype != torch.bfloat16:
            raise ArgumentTypeError("hidden_states", f" has dtype {a1.dtype}", a1.dtype, "torch.bfloat16")
        if topk_ids.dim() != 2 or a1.dim() != 2 or topk_ids.shape[0] != a1.shape[0]:
            found = f" has shape {list(topk_ids.shape)}"
            expected = f"[M, topk] beside hidden_states [M, H], which is {list(a1.shape)}"
            raise ArgumentValueError("topk_ids", found, list(topk_ids.shape), expected)
        held = self._layer_of(w1, w2)
        parallel = self.moe_config.moe_parallel_config
        self._prepare(held, topk_ids, self.moe_config.num_experts if parallel.use_ep else w1.shape[0])
        return w1.shape[0], a1.shape[0], w1.shape[1], a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """All of the workspace is the second one: the first may share its memory with the output.

        It is not cut by tokens. Rounded up for each of them, it could be larger for fewer tokens, and vLLM's workspaces
        do not grow once it serves.
        """
        held = self._held
        if held is None:
            raise RuntimeError("workspace_shapes() before moe_problem_size(), which hands over the weights")
        needed = held.workspace_bytes.get((M, topk))
        if needed is None:
            needed = held.workspace_bytes[M, topk] = held.layer.workspace_bytes(M, topk)
        return (0,), (-(-needed // torch.bfloat16.itemsize),), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """The whole layer, into `output`. Raises ValueError or TypeError for what does not fit; nothing is written."""
        if activation != self.moe_config.activation:
            expected = f"{self.moe_config.activation}, which the experts were made for"
            raise ArgumentValueError("activation", f" is {activation}", activation, expected)
        for name, scale in (("a1q_scale", a1q_scale), ("a2_scale", a2_scale)):
            if scale is not None:
                raise ArgumentValueError(name, " is given", scale, "None: hidden states are not quantized")
        if hidden_states.dtype != torch.bfloat16:
            found = f" has dtype {hidden_states.dtype}"
            raise ArgumentTypeError("hidden_states", found, hidden_states.dtype, "torch.bfloat16")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError("topk_ids", f" has dtype {topk_ids.dtype}", topk_ids.dtype, "int32 or int64")
        held = self._layer_of(w1, w2)
        self._prepare(held, topk_ids, w1.shape[0] if expert_map is None else expert_map.shape[0])
        if apply_router_weight_on_input:
            # They have been multiplied into the hidden states already.
            if topk_ids.shape[1] != 1:
                found = f" has shape {list(topk_ids.shape)}"
                raise ArgumentValueError("topk_ids", found, list(topk_ids.shape), "topk 1, for weights on the input")
            topk_weights = torch.ones_like(topk_weights, dtype=torch.float32)
        elif topk_weights.dtype in (torch.bfloat16, torch.float16):
            topk_weights = topk_weights.float()
        workspace = workspace2.view(torch.uint8)
        try:
            held.layer(hidden_states, topk_ids, topk_weights, expert_map=expert_map, workspace=workspace, out=output)
        except ArgumentError as error:
            error.rename(_VLLM_NAMES)
            raise

    # The layer.

    def _layer_of(self, w1: Tensor, w2: Tensor) -> _Held:
        """The layer over these weights."""
        source = source_of(w1, w2, self.w1_scale, self.w2_scale)
        held = self._held
        if held is None or held.source != source:
            held = _layers.get(w1)
            if held is None or held.source != source or held.options != self._options:
                held = _layers[w1] = self._make(w1, w2, source)
            self._held = held
        return held

    def _make(self, w1: Tensor, w2: Tensor, source: tuple[Any, ...]) -> _Held:
        require_not_capturing()
        scales = {"w1_scale": self.w1_scale, "w2_scale": self.w2_scale}
        if w1.is_cuda:
            require_in_place({"w1": w1, "w2": w2, **scales})
        activations = "e4m3" if w1.dtype == torch.float8_e4m3fn else "bf16"
        try:
            layer = Layer(
                w1.detach(),
                w2.detach(),
                w13_scale=detached(scales["w1_scale"]),
                w2_scale=detached(scales["w2_scale"]),
                activations=activations,
                **self._options,
            )
        except ArgumentError as error:
            error.rename(_VLLM_NAMES)
            raise
        return _Held(layer, source, self._options)

    def _prepare(self, held: _Held, topk_ids: Tensor, global_experts: int) -> None:
        """Compiles what such calls launch, unless that has been done: in the first call, not while vLLM serves."""
        tokens, topk = topk_ids.shape
        kind = (topk, global_experts, topk_ids.dtype)
        most = held.prepared.get(kind)
        if held.layer.device.type != "cuda" or (most is not None and tokens <= most):
            return
        require_not_capturing()
        if most is not None and is_serving():
            found = f" has {tokens} tokens"
            raise ArgumentValueError("hidden_states", found, tokens, f"at most {most}, which vLLM warmed up with")
        most = max(tokens, self.moe_config.max_num_tokens)
        try:
            held.layer.prepare(most, topk, global_experts=global_experts, ids_dtype=topk_ids.dtype)
        except ArgumentError as error:
            error.rename(_VLLM_NAMES)
            raise
        held.prepared[kind] = most


def activation_format_of(moe_config: Any) -> Any:
    """How a configuration lays rows out for its experts."""
    batched = moe_config.moe_parallel_config.use_batched_activation_format
    formats = mk.FusedMoEActivationFormat
    return formats.BatchedExperts if batched else formats.Standard


def device_refusal() -> str | None:
    """Why this machine's device does not run the kernels; None if it does."""
    if not current_platform.is_cuda():
        return f"the platform is {current_platform.device_name}, expected CUDA"
    if not current_platform.is_device_capability(90):
        capability = current_platform.get_device_capability()
        return f"the device has compute capability {capability}, expected 9.0 (Hopper)"
    return _native.cuda_unavailable()


def config_refusal(moe_config: Any, e4m3: bool) -> str | None:
    """What of a layer's sizes and types is not computed; None if all of it is."""
    if moe_config.has_bias:
        return "the experts have biases, expected none"
    if moe_config.activation.value == "swigluoai_uninterleave" and moe_config.swiglu_limit is None:
        return "swiglu_limit is None, expected a number for swigluoai_uninterleave"
    multiple, form = (_BLOCK, "e4m3") if e4m3 else (_BF16_MULTIPLE, "bf16")
    return sizes_refusal(moe_config, multiple, form)


def sizes_refusal(moe_config: Any, multiple: int, form: str) -> str | None:
    """The same of what does not depend on the weights' format, but for what has to divide the widths."""
    if moe_config.in_dtype != torch.bfloat16:
        return f"hidden states are {moe_config.in_dtype}, expected torch.bfloat16"
    if not 1 <= moe_config.experts_per_token <= _MOST_TOPK:
        return f"topk is {moe_config.experts_per_token}, expected 1 to {_MOST_TOPK}"
    if not 1 <= moe_config.num_local_experts <= _MOST_EXPERTS:
        return f"this rank has {moe_config.num_local_experts} experts, expected 1 to {_MOST_EXPERTS}"
    sizes = {
        "hidden size": moe_config.hidden_dim,
        "intermediate size of this rank": moe_config.intermediate_size_per_partition,
    }
    for name, size in sizes.items():
        if size <= 0 or size % multiple:
            return f"the {name} is {size}, expected a multiple of {multiple} for {form} experts"
    return None


def require_scheme(quant_config: Any) -> None:
    """Fails for a quantization that the layer does not compute."""
    for name, bias in (("w1_bias", quant_config.w1_bias), ("w2_bias", quant_config.w2_bias)):
        if bias is not None:
            raise ArgumentValueError(name, " is given", bias, "None: experts without biases")
    quantized = (quant_config.quant_dtype, quant_config.weight_quant_dtype)
    if quantized == (None, None):
        return
    if quantized != (torch.float8_e4m3fn, torch.float8_e4m3fn) or quant_config.block_shape != [_BLOCK, _BLOCK]:
        activations, weights = quantized
        found = f" has activations {activations}, weights {weights}, block_shape {quant_config.block_shape}"
        expected = "float8_e4m3fn in blocks of [128, 128], or nothing quantized"
        raise ArgumentValueError("quant_config", found, quantized, expected)
    for name, scale in (("a1_scale", quant_config.a1_scale), ("a2_scale", quant_config.a2_scale)):
        if scale is not None:
            raise ArgumentValueError(name, " is given", scale, "None: activations get scales of their own")


def swiglu_options(activation: Any, config: Any) -> dict[str, Any]:
    """An activation of vLLM as options of ``Layer``."""
    if activation.value == "silu":
        return {"limit": config.clamp_limit}
    if activation.value == "swigluoai_uninterleave":
        if config.clamp_limit is None:
            raise ArgumentValueError("swiglu_limit", " is None", None, f"a number for {activation}")
        return {"alpha": config.alpha, "beta": config.beta, "limit": config.clamp_limit}
    if activation.value == "swigluoai":
        options = {"alpha": config.alpha, "beta": config.beta, "limit": config.clamp_limit}
        return {**options, "gate_up": "interleaved"}
    expected = "silu, swigluoai or swigluoai_uninterleave"
    raise ArgumentValueError("activation", f" is {activation}", activation, expected)


def source_of(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Which memory tensors are and, of those that are packed, how often it has been written."""
    return tuple(
        None if x is None else (x.data_ptr(), x.shape, x.stride(), 0 if x.is_cuda or x.is_inference() else x._version)
        for x in tensors
    )


def detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def require_in_place(tensors: dict[str, Tensor | None]) -> None:
    """Fails for what would be copied: it is to count when vLLM writes it."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ArgumentValueError(name, f" has strides {list(x.stride())}", list(x.stride()), "contiguous weights")
        if x is not None and name.endswith("scale") and x.dtype != torch.float32:
            raise ArgumentTypeError(name, f" has dtype {x.dtype}", x.dtype, "torch.float32")


def require_not_capturing() -> None:
    """Fails while a CUDA graph is captured: nothing is compiled and no memory made then."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first call of these experts is in a CUDA graph, expected one before its capture")


def is_serving() -> bool:
    """Whether vLLM has ended its warm-up."""
    ready = vllm_workspace.is_workspace_manager_initialized()
    return ready and vllm_workspace.current_workspace_manager().is_locked()
