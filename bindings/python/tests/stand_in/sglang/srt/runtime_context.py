"""A server's arguments, once they are published."""

from types import SimpleNamespace

published = None


def get_schedule():
    if published is None:
        raise ValueError("config namespace 'schedule' not published")
    return published


def get_parallel():
    return SimpleNamespace(num_dp_ranks=get_schedule().num_dp_ranks, tp_group=None)


def max_prefill_buffer_tokens():
    return max(get_schedule().chunked_prefill_size, 0)
