"""Memory that NCCL shares between ranks: here a list of who asked for it."""

import contextlib

enabled = False
entered = []


def is_symmetric_memory_enabled():
    return enabled


@contextlib.contextmanager
def use_symmetric_memory(group, disabled=False):
    entered.append((group, disabled))
    yield
