"""The whole layer."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _arrays, _native
from .._errors import ArgumentValueError
from ._dispatch import call, layers, unwatched
from .layout import empty, matrix, require_tensor
from .state_dict import stacked

BLOCK_BYTES = 16
"""Bytes of 32 MXFP4 values."""

FOUR_BITS = (torch.uint8, torch.int32)
"""Types of weights that a GPU arranges: blocks of MXFP4, words of int4."""


class Layer:
    """The expert half of a layer: permute, GEMM 1, activation, GEMM 2, unpermute. On the CPU, or on a Hopper GPU.

    w13: ``[E, 2 I, H]``, gate rows first; w2: ``[E, H, I]``. Both bfloat16; or both float8_e4m3fn with block scales:
    w13_scale ``[E, 2 ceil(I / 128), ceil(H / 128)]``, gate's row blocks, then up's; w2_scale ``[E, ceil(H / 128),
    ceil(I / 128)]``. Scales are float32, or bfloat16, float16 or float8_e8m0fnu, which are widened exactly. Or both
    MXFP4 as checkpoints hold it: uint8 blocks ``[E, 2 I, H / 32, 16]`` or ``[E, 2 I, H / 2]``, the even value in the
    low nibble, with uint8 or float8_e8m0fnu scales w13_scale ``[E, 2 I, H / 32]``, in the order of the rows; w2 and
    w2_scale likewise. Or int4 as compressed-tensors packs it (symmetric, in groups of 32): int32 ``[E, 2 I, H / 8]``,
    eight values to a word and the first in the lowest bits, with bfloat16 or float16 scales ``[E, 2 I, H / 32]``.

    On the CPU, weights are packed, once, from any strides into memory of the layer's own; ``unpack`` gives them back.
    On a GPU they are used where they are, and the layer keeps them alive; what cannot be used so is copied once, with a
    warning: scales that are not float32, tensors that are interleaved or not contiguous, and MXFP4 and int4, which the
    GEMM reads in an order of its own (4.25 and 4.5 bits a weight, in torch's memory; what was handed over is not kept).
    A layer has to live as long as the CUDA graphs that captured a call of it.

    gate_up: ``"halves"``, gate's rows and then up's, or ``"interleaved"``, gate's first, up's first, gate's second and
    so on. w13_bias is in the same order; the row blocks of w13_scale are gate's, then up's, in either.

    activations: ``"bf16"``, or ``"e4m3"`` to quantize them (needs weights that are not bfloat16, and 64 to divide H and
    I; on a GPU 128 to divide I where the weights are e4m3). Without it ``"bf16"`` on the CPU and for MXFP4 and int4
    weights; on a GPU, for others, the weights' own format, as there is no other.
    activation: ``"swiglu"``; on the CPU also ``"geglu_tanh"`` (the tanh form of GELU), or ``"relu2"`` (``max(x, 0)^2``,
    without a gate: w13 is ``[E, I, H]``). w13_bias ``[E, 2 I]``, w2_bias ``[E, H]``: float32, bfloat16 or float16,
    added to the GEMMs' sums.
    alpha, beta, limit, of SwiGLU: ``glu = gate * sigmoid(alpha * gate)``, ``(up + beta) * glu``, gate clamped to at
    most `limit`, up to within it. weight_on_input: router weights multiply the input (``topk = 1`` only). alignment: of
    each expert's rows, by default the device's own; it changes no result.

    e4m3_copy: on a GPU, keep a copy of MXFP4 weights in e4m3 for calls of many tokens with e4m3 activations: 8 bits a
    weight beside 4.25, the same bits, and from some 1000 to 2000 tokens on up to a third less time. Raises ValueError
    where scales of a block of 128 x 128 are more than 11 powers of two apart.

    Raises ValueError or TypeError for what does not fit.
    """

    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        w13: Tensor,
        w2: Tensor,
        *,
        w13_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        activations: str | None = None,
        alignment: int | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        limit: float | None = None,
        weight_on_input: bool = False,
        activation: str = "swiglu",
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        gate_up: str = "halves",
        e4m3_copy: bool = False,
    ) -> None:
        self._native: _native.Layer | _native.CudaLayer
        self._on_gpu = isinstance(w13, Tensor) and w13.is_cuda
        if self._on_gpu:
            self._dtype = w13.dtype
            activations = on_a_gpu(w13, activations)
            w13, w2, w13_scale, w2_scale = weights_on_a_gpu((w13, w13_scale), (w2, w2_scale), gate_up, activations)
            w13_bias = bias_on_cpu("w13_bias", w13_bias, w13.device)
            w2_bias = bias_on_cpu("w2_bias", w2_bias, w13.device)
        else:
            self._dtype = w13.dtype if isinstance(w13, Tensor) else torch.bfloat16
            w13, w2 = flat_blocks("w13", w13), flat_blocks("w2", w2)
            activations = "bf16" if activations is None else activations
            alignment = 1 if alignment is None else alignment
        weights = (w13, w2, w13_scale, w2_scale)
        options: dict[str, Any] = dict(activation=activation, w13_bias=w13_bias, w2_bias=w2_bias, gate_up=gate_up)
        rest = (alignment, alpha, beta, limit, weight_on_input)
        native: Any = _native.CudaLayer if self._on_gpu else _native.Layer
        if self._on_gpu:
            options["e4m3_copy"] = e4m3_copy
        elif e4m3_copy:
            raise ArgumentValueError("e4m3_copy", " is True", True, "False on the CPU")
        self._native = native(*weights, activations, *rest, **options)
        self._device = w13.device if isinstance(w13, Tensor) else torch.device("cpu")
        self._in_place = (w13, w2) if self._on_gpu and w13.dtype != torch.uint8 else None
        self._gated = activation != "relu2"
        # Operators take numbers and tensors: a layer is passed to its operator by number.
        self._number = next(Layer._numbers)
        layers[self._number] = self

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        prefix: str = "",
        *,
        experts: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Layer:
        """A layer of per-expert matrices: ``{prefix}{expert}.gate_proj.weight`` and so on (or w1, w3, w2).

        Or of gpt-oss's MXFP4 experts, ``{prefix}gate_up_proj_blocks`` and so on, with their biases: ``alpha=1.702,
        beta=1.0, limit=7.0`` makes the activation that of the published models, whose weights do not say it.

        prefix: such as ``"model.layers.3.mlp.experts."``. experts: which of them, in which order; all, if not given.
        device: where the layer is to be; that of the matrices, if not given. Scales are found by the names
        ``weight_scale_inv``, ``weight_scale`` and ``scale``, 4-bit values as compressed-tensors packs them (MXFP4 and
        int4) or as DeepSeek-V4 has them. options: as for ``Layer``.

        Raises ValueError or TypeError for what does not fit, and ValueError for a matrix that is missing.
        """
        return cls(**{**stacked(state_dict, prefix, experts, device), **options})

    def __copy__(self) -> Layer:
        """Another layer with the same packed weights, which nothing can change."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._number = next(Layer._numbers)
        layers[other._number] = other
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return self.__copy__()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Layer cannot be pickled: its weights are packed for this machine, expected to be packed anew"
        )

    @property
    def device(self) -> torch.device:
        """Where the layer is computed."""
        return self._device

    @property
    def local_experts(self) -> int:
        """``E``."""
        return self._native.local_experts

    @property
    def hidden(self) -> int:
        """``H``."""
        return self._native.hidden

    @property
    def intermediate(self) -> int:
        """``I``."""
        return self._native.intermediate

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the layer's weights take, scales included."""
        return self._native.weight_bytes

    def unpack(self, *, gate_up: str = "halves") -> tuple[Tensor, Tensor]:
        """Copies of w13 ``[E, 2 I, H]``, in that order, and w2 ``[E, H, I]``: the bits that the layer was made of.

        Scales are not among them. MXFP4 blocks are ``[E, 2 I, H / 2]`` and ``[E, H, I / 2]``, int4 words as they came.
        """
        order = gate_up_order(gate_up)
        if self._in_place is not None:
            w13, w2 = (weights.clone() for weights in self._in_place)
            return in_order(w13, order), w2
        experts, hidden, intermediate = self.local_experts, self.hidden, self.intermediate
        rows = 2 * intermediate if self._gated else intermediate
        # Two values to a byte, of int4 too.
        dtype = torch.uint8 if self._dtype == torch.int32 else self._dtype
        each = 2 if dtype == torch.uint8 else 1
        w13 = _arrays.empty_tensor("w13", (experts, rows, hidden // each), dtype, self._device)
        w2 = _arrays.empty_tensor("w2", (experts, hidden, intermediate // each), dtype, self._device)
        if isinstance(self._native, _native.CudaLayer):
            self._native.unpack(w13, w2)
            return in_order(w13, order).view(self._dtype), w2.view(self._dtype)
        self._native.unpack(w13, w2, gate_up=gate_up)
        return w13.view(self._dtype), w2.view(self._dtype)

    def prepare(
        self,
        max_tokens: int,
        topk: int,
        *,
        global_experts: int | None = None,
        ids_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.bfloat16,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """Compiles (or loads) whatever calls of up to `max_tokens` tokens can launch; a call compiles nothing.

        Needed on a GPU, before the first call; on the CPU there is nothing to do. global_experts: the length of the
        calls' expert map; ``E``, if they have none. ids_dtype: of topk_ids; both int32 and int64 if not given. dtype:
        of hidden_states. out_dtype: of the result, if another. More calls prepare for more kinds of calls.

        Raises ValueError or TypeError for what the kernels do not take, RuntimeError where nothing can be compiled.
        """
        if isinstance(self._native, _native.Layer):
            self._native.workspace_bytes(max_tokens, topk)
            return
        for ids in (torch.int32, torch.int64) if ids_dtype is None else (ids_dtype,):
            self._native.prepare(max_tokens, topk, global_experts, ids, dtype, out_dtype or dtype)

    def check(self) -> None:
        """Waits for the current stream, and raises ValueError for ids that calls found wrong since the last time.

        On the CPU a call checks its ids itself. On a GPU a slot whose id is no expert's counts as empty until then.
        """
        if isinstance(self._native, _native.CudaLayer):
            self._native.check()

    def workspace_bytes(self, tokens: int, topk: int) -> int:
        """Bytes of uint8 workspace that a call with ``topk_ids [tokens, topk]`` needs at most."""
        return self._native.workspace_bytes(tokens, topk)

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        expert_map: Tensor | None = None,
        workspace: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """hidden_states ``[M, H]`` (bfloat16, float16 or float32), topk_weights float32 ``[M, topk]`` to ``[M, H]``.

        `dtype` of the result is that of `hidden_states` unless given. workspace: uint8, contiguous; from torch's
        allocator if not given. On a GPU the call is queued on torch's current stream.

        Raises ValueError or TypeError for what does not fit.
        """
        if self._on_gpu and unwatched(hidden_states, topk_weights):
            if out is None and dtype is not None and dtype is not hidden_states.dtype:
                out = empty("out", hidden_states.shape, dtype, hidden_states)
            return self._native.run(hidden_states, topk_ids, topk_weights, expert_map, workspace, out)
        shape = matrix("hidden_states", hidden_states)
        if out is None:
            out = empty("out", shape, hidden_states.dtype if dtype is None else dtype, hidden_states)
        call("layer", self._number, hidden_states, topk_ids, topk_weights, expert_map, workspace, out)
        return out

    def prepare_expanded(self, max_rows: int) -> None:
        """Compiles (or loads) whatever ``run_expanded`` of up to `max_rows` rows can launch; a call compiles nothing.

        Needed on a GPU, before the first call; on the CPU there is nothing to do.
        """
        if isinstance(self._native, _native.CudaLayer):
            self._native.prepare_expanded(max_rows)

    def run_expanded(
        self,
        rows: Tensor,
        psum: Tensor,
        *,
        scale: Tensor | None = None,
        alignment: int = 128,
        expected_rows: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The experts alone, on rows that a dispatcher (DeepEP, vLLM's all-to-all) has expanded and sorted by expert.

        rows: ``[M_sum, H]``, contiguous: bfloat16, which e4m3 activations quantize first; or, for e4m3 activations,
        float8_e4m3fn with scale float32 ``[M_sum, ceil(H / 128)]`` of any strides. psum: int32 ``[E]``, the end of each
        expert's rows; they start where the end before, rounded up to `alignment`, is, and an expert without rows
        stores its start. `alignment` divides ``M_sum``. expected_rows: how many rows all experts together are
        likely to have, if that is known better than from the size of `rows`: on a GPU kernels are chosen for it.

        Returns bfloat16 ``[M_sum, H]``, of which only rows of experts are written: with the bits that a call gives them
        before it weighs and adds them. Router weights belong to tokens and have no part in it.

        On a GPU the call is queued on torch's current stream, and what is wrong with `psum` comes back from ``check``.
        Raises ValueError or TypeError for what does not fit.
        """
        if isinstance(self._native, _native.CudaLayer) and unwatched(rows):
            return self._native.run_expanded(rows, scale, psum, alignment, expected_rows, out)
        shape = matrix("rows", rows)
        if out is None:
            out = empty("out", shape, torch.bfloat16, rows)
        call("layer_expanded", self._number, rows, scale, psum, alignment, expected_rows, out)
        return out


def on_a_gpu(w13: Tensor, activations: str | None) -> str:
    """What rows are made of: what was asked for, or what goes with the weights; fails for what a GPU does not compute.

    MXFP4 and int4 weights go with both.
    """
    if w13.dtype in FOUR_BITS:
        return "bf16" if activations is None else activations
    own = "e4m3" if w13.dtype == torch.float8_e4m3fn else "bf16"
    if activations not in (None, own):
        found = f' is "{activations}"'
        raise ArgumentValueError("activations", found, activations, f'"{own}", which the weights are, on a GPU')
    return own


def weights_on_a_gpu(
    w13: tuple[Tensor, Tensor | None], w2: tuple[Tensor, Tensor | None], gate_up: str, activations: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """w13, w2 and their scales as the native layer takes them: where they are, or for as long as they are arranged."""
    (values13, scale13), (values2, scale2) = w13, w2
    if values13.dtype in FOUR_BITS:
        what = f"w13 and w2 are {name_of_blocks(scale13)}"
        message = f"{what}: the layer holds a copy of them, arranged for {activations} rows"
        warnings.warn(message, stacklevel=3)
        values13, scale13 = blocks_in_halves(("w13", values13), ("w13_scale", scale13), gate_up)
        values2, scale2 = blocks_in_halves(("w2", values2), ("w2_scale", scale2), "halves")
        return values13, values2, scale13, scale2
    values13, values2 = in_place("w13", in_halves("w13", values13, gate_up)), in_place("w2", values2)
    return values13, values2, scales_in_place("w13_scale", scale13), scales_in_place("w2_scale", scale2)


def flat_blocks(name: str, x: Tensor) -> Tensor:
    """MXFP4 blocks ``[E, N, K / 32, 16]`` and int4 words ``[E, N, K / 8]`` as bytes ``[E, N, K / 2]``; any other tensor
    as it is."""
    if isinstance(x, Tensor) and x.dtype == torch.int32:
        return x.contiguous().view(torch.uint8)
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.dim() != 4:
        return x
    if x.shape[3] != BLOCK_BYTES:
        raise ArgumentValueError(name, f" has shape {list(x.shape)}", list(x.shape), "[E, N, K / 32, 16]")
    return x.flatten(2)


def name_of_blocks(scale: Tensor | None) -> str:
    """What weights of 4 bits are, as their scales say it."""
    return "int4" if isinstance(scale, Tensor) and scale.dtype in (torch.bfloat16, torch.float16) else "MXFP4"


def gate_up_order(gate_up: str) -> str:
    """The order of gate's and up's rows; fails for a word that names none."""
    if gate_up not in ("halves", "interleaved"):
        raise ArgumentValueError("gate_up", f' is "{gate_up}"', gate_up, "one of halves, interleaved")
    return gate_up


def in_halves(name: str, x: Tensor, gate_up: str) -> Tensor:
    """Gate's rows, then up's; a copy, if they alternate."""
    if gate_up_order(gate_up) == "halves":
        return x
    require_tensor(name, x)
    warnings.warn(f"{name} is interleaved: the layer holds a copy of it", stacklevel=3)
    return halves(x, gate_up)


def halves(x: Tensor, gate_up: str) -> Tensor:
    """Gate's rows, then up's, of rows in that order."""
    if gate_up_order(gate_up) == "halves" or x.dim() < 2:
        return x
    return torch.cat([x[:, ::2], x[:, 1::2]], dim=1)


def in_order(w13: Tensor, gate_up: str) -> Tensor:
    """Gate's rows, then up's, in that order."""
    return w13 if gate_up == "halves" else torch.stack(w13.chunk(2, dim=1), dim=2).flatten(1, 2)


def blocks_in_halves(
    blocks: tuple[str, Tensor], scales: tuple[str, Tensor | None], gate_up: str
) -> tuple[Tensor, Tensor | None]:
    """Blocks of MXFP4 or int4, and scales, gate's rows first and contiguous, for as long as the layer is being made."""
    name, x = blocks
    require_tensor(name, x)
    name_of_scales, of_x = scales
    if of_x is not None:
        require_tensor(name_of_scales, of_x)
        of_x = halves(of_x.detach(), gate_up).contiguous()
    return halves(flat_blocks(name, x).detach(), gate_up).contiguous(), of_x


def bias_on_cpu(name: str, bias: Tensor | None, device: torch.device) -> Tensor | None:
    """A bias on that device, for who takes it from the CPU."""
    if bias is None:
        return None
    require_tensor(name, bias)
    if bias.device != device:
        raise ArgumentValueError(name, f" is on {bias.device}", bias, f"{device}, where the weights are")
    return bias.detach().cpu().contiguous()


def in_place(name: str, x: Tensor) -> Tensor:
    """The tensor's memory, whatever happens to the tensor; a contiguous copy, if it must be."""
    require_tensor(name, x)
    x = x.detach()
    if x.is_contiguous():
        return x
    warnings.warn(f"{name} is not contiguous: the layer holds a copy of it", stacklevel=3)
    return x.contiguous()


def scales_in_place(name: str, x: Tensor | None) -> Tensor | None:
    """The same for scales, as float32."""
    if x is None:
        return None
    require_tensor(name, x)
    if x.dtype in (torch.bfloat16, torch.float16, torch.float8_e8m0fnu):
        warnings.warn(f"{name} is {x.dtype}: the layer holds a copy of it as float32", stacklevel=3)
        return x.detach().float().contiguous()
    return in_place(name, x)
