"""The layer over the ranks of a ``torch.distributed`` group, on CPUs or with a GPU each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _native
from .._errors import ArgumentValueError
from .layer import Layer, bias_on_cpu, gate_up_order, on_a_gpu, weights_on_a_gpu
from .layout import empty, require_tensor


class ExpertParallelLayer:
    """One rank's experts of a layer, and the way to the others'. Every rank makes the same calls, with 0 tokens too.

    w13, w2, their scales and biases, gate_up, activations, alpha, beta, limit, weight_on_input: as for ``Layer``, of
    the experts that are on this rank: on the CPU, or on its own Hopper GPU, where weights of 4 bits are arranged in
    memory of the layer's own, not torch's. placement: the global ids of each rank's experts, in the order of their
    weights; an expert may stand on several ranks. Without it, ranks hold as many as each other, neighbouring ids
    together. capacity: the most tokens that a rank brings to a call, the same on all ranks; topk: experts of a token.
    dtype, out_dtype: of hidden_states and the result; ids_dtype: of topk_ids, on a GPU.

    group: the ranks, by default all of them. On the CPU every call goes over it, pickled: it is for tests and for what
    is not urgent. On GPUs it is used here, and not in calls. link, between GPUs: ``"mapped"``, GPUs of one host store
    into each other's memory; ``"nccl"``; or ``"nccl-windows"``, in memory of NCCL's. dispatch: ``"gather"`` or
    ``"routed"``; by default what the number of ranks asks for, and over NCCL ``"gather"``: ``"routed"`` waits on the
    host there, and cannot be captured. combine: ``"rows"``, with the bits of one rank on any number of them, or
    ``"sums"``. time_limit, on GPUs: seconds after which a rank that does not come is given up (not over NCCL's
    windows); on the CPU that is the group's.

    Raises ValueError, TypeError or RuntimeError on every rank for what is wrong on one of them.
    """

    def __init__(
        self,
        w13: Tensor,
        w2: Tensor,
        *,
        capacity: int,
        topk: int,
        w13_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        placement: Sequence[Sequence[int]] | None = None,
        group: dist.ProcessGroup | None = None,
        link: str = "mapped",
        dispatch: str | None = None,
        combine: str = "rows",
        dtype: torch.dtype = torch.bfloat16,
        ids_dtype: torch.dtype = torch.int64,
        out_dtype: torch.dtype | None = None,
        activations: str | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        limit: float | None = None,
        weight_on_input: bool = False,
        gate_up: str = "halves",
        time_limit: float = 60.0,
    ) -> None:
        gate_up_order(gate_up)
        require_tensor("w13", w13)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if placement is None:
            each = w13.shape[0]
            placement = [range(other * each, (other + 1) * each) for other in range(ranks)]
        lists = [list(experts) for experts in placement]
        if len(lists) != ranks:
            raise ArgumentValueError("placement", f" has {len(lists)} lists", len(lists), f"{ranks}, one for each rank")

        def exchange(send: list[bytes]) -> list[bytes]:
            came: list[Any] = [None] * ranks
            dist.all_gather_object(came, send, group)
            return [to_each[rank] for to_each in came]

        self._capacity = capacity
        self._out_dtype = out_dtype or dtype
        self._on_gpu: _native.CudaExpertParallelLayer | None = None
        self._on_cpu: _native.ExpertParallelLayer | None = None
        parameters = {"alpha": alpha, "beta": beta, "limit": limit, "weight_on_input": weight_on_input}
        if not w13.is_cuda:
            layer = Layer(
                w13,
                w2,
                w13_scale=w13_scale,
                w2_scale=w2_scale,
                w13_bias=w13_bias,
                w2_bias=w2_bias,
                activations=activations,
                gate_up=gate_up,
                **parameters,  # type: ignore[arg-type]
            )
            self._on_cpu = _native.ExpertParallelLayer(
                layer._native,  # type: ignore[arg-type]
                lists,
                capacity,
                topk,
                dtype,
                self._out_dtype,
                exchange,
                rank,
                dispatch=dispatch,
                combine=combine,
            )
            return
        require_tensor("w2", w2)
        activations = on_a_gpu(w13, activations)
        self._on_gpu = _native.CudaExpertParallelLayer(
            *weights_on_a_gpu((w13, w13_scale), (w2, w2_scale), gate_up, activations),
            activations,
            lists,
            capacity,
            topk,
            ids_dtype,
            dtype,
            self._out_dtype,
            exchange,
            rank,
            link=link,
            dispatch=dispatch,
            combine=combine,
            time_limit=time_limit,
            w13_bias=bias_on_cpu("w13_bias", w13_bias, w13.device),
            w2_bias=bias_on_cpu("w2_bias", w2_bias, w13.device),
            gate_up=gate_up,
            **parameters,  # type: ignore[arg-type]
        )

    @property
    def _native(self) -> _native.CudaExpertParallelLayer | _native.ExpertParallelLayer:
        found = self._on_cpu if self._on_gpu is None else self._on_gpu
        assert found is not None
        return found

    @property
    def capacity(self) -> int:
        """The most tokens that a rank brings to a call."""
        return self._capacity

    @property
    def choice(self) -> str:
        """What a call does, in words."""
        return self._native.choice

    def workspace_bytes(self, capacity: int | None = None) -> int:
        """Bytes of uint8 workspace that a call of that capacity needs; on the CPU, of so many tokens of this rank."""
        return self._native.workspace_bytes(self._capacity if capacity is None else capacity)

    def check(self) -> None:
        """Waits for the current stream, and raises what calls found wrong since the last time, the same on every rank.

        ValueError for ids that are no expert's (their slots counted as empty) and for capacities that differ;
        RuntimeError for a rank that did not come, after which the layer is of no use any more. On the CPU a call raises
        these itself, on every rank.
        """
        if self._on_gpu is not None:
            self._on_gpu.check()

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        capacity: int | None = None,
        workspace: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """This rank's hidden_states ``[M, H]`` with global topk_ids ``[M, topk]`` to ``[M, H]``.

        capacity, on GPUs: the most tokens that any rank brings to this call, the same number on all of them; that of
        the layer, if not given. A call costs what this asks for; it is queued on the current stream, and can be
        captured in a CUDA graph, which every rank replays.

        Raises ValueError or TypeError for what does not fit: on a GPU on this rank alone, the others then find it
        absent; on the CPU on every rank.
        """
        if self._on_gpu is not None:
            capacity = self._capacity if capacity is None else capacity
            return self._on_gpu.run(hidden_states, topk_ids, topk_weights, capacity, workspace, out)
        assert self._on_cpu is not None
        require_tensor("hidden_states", hidden_states)
        if out is None:
            out = empty("out", tuple(hidden_states.shape), self._out_dtype, hidden_states)
        if workspace is None:
            tokens = min(hidden_states.shape[0], self._capacity)
            workspace = torch.empty(self._on_cpu.workspace_bytes(tokens), dtype=torch.uint8)
        self._on_cpu.run(hidden_states, topk_ids, topk_weights, workspace, out)
        return out
