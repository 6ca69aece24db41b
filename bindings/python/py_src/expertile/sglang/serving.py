"""What a server says of itself: how many tokens its calls can have, and where outputs are to be."""

from __future__ import annotations

import logging

import torch
from sglang.srt import runtime_context
from sglang.srt.distributed.device_communicators import pynccl_allocator
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from torch import Tensor

_logger = logging.getLogger("expertile.sglang")
_said: set[str] = set()

# More than a decode batch of a rank, drafts included, has by SGLang's defaults.
_DECODE_TOKENS = 8192


def max_tokens(tokens: int) -> int:
    """The most tokens that a call of this server can have, as far as its arguments say; at least `tokens`.

    A prefill has up to a chunk from each rank of data parallel attention.
    """
    try:
        chunk = runtime_context.max_prefill_buffer_tokens() or runtime_context.get_schedule().max_prefill_tokens or 0
        chunk *= runtime_context.get_parallel().num_dp_ranks
    except (ValueError, RuntimeError, AttributeError):
        chunk = 0  # No server has published its arguments in this process.
    return max(chunk, _DECODE_TOKENS, 1 << max(tokens - 1, 0).bit_length())


def output_for(hidden_states: Tensor) -> Tensor | None:
    """Memory for the output where NCCL needs it to be; None where any memory will do."""
    if not pynccl_allocator.is_symmetric_memory_enabled():
        return None
    group = runtime_context.get_parallel().tp_group
    with pynccl_allocator.use_symmetric_memory(group, disabled=not is_allocation_symmetric()):
        return torch.empty_like(hidden_states)


def say(level: int, message: str) -> None:
    """A line in the log, once a process: every layer of a model has the same to say."""
    if message not in _said:
        _said.add(message)
        _logger.log(level, message)
