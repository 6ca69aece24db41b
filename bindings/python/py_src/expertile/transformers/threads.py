"""How torch's threads wait while the layers' threads work.

A thread of GNU OpenMP, which torch brings on Linux, spins for milliseconds after an operation in case another comes,
and takes a core from whoever has work; on a loaded machine torch's own operations wait for each other that way, too.
With more OpenMP threads than cores they spin for microseconds instead, and then sleep: libgomp's documented rule
(GOMP_SPINCOUNT). It counts its own threads only. A layer's pool makes them more than the cores, which is what libgomp
is told here: by a few threads of its own that sleep for as long as the process lives. Who has set OMP_WAIT_POLICY or
GOMP_SPINCOUNT has decided otherwise, and is left alone.
"""

from __future__ import annotations

import ctypes
import os
import threading

import torch

_lock = threading.Lock()
_told = False


def let_torch_sleep() -> bool:
    """Makes torch's idle threads sleep soon; once in a process. Whether there is a libgomp that has been told."""
    global _told
    with _lock:
        if not _told and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
            path = _libgomp()
            if path is not None:
                _add_idle_threads(ctypes.CDLL(path), _missing_threads())
                _told = True
        return _told


def _missing_threads() -> int:
    """Threads of a team that makes more of them than cores, beside torch's."""
    cores = len(os.sched_getaffinity(0))
    return max(cores - torch.get_num_threads(), 0) + 2


def _libgomp() -> str | None:
    """The file of the libgomp that torch has loaded."""
    try:
        with open("/proc/self/maps") as maps:
            paths = sorted({line.split(maxsplit=5)[5].strip() for line in maps if "libgomp" in line})
    except OSError:
        return None
    # Other packages may have brought one of their own.
    of_torch = [path for path in paths if os.sep + "torch" in path]
    return next(iter(of_torch or paths), None)


def _add_idle_threads(libgomp: ctypes.CDLL, count: int) -> None:
    ready = threading.Event()

    def idle() -> None:
        # A parallel region in which every thread asks for its number, and no more. Its threads belong to this one.
        region = ctypes.cast(libgomp.omp_get_thread_num, ctypes.c_void_p)
        libgomp.GOMP_parallel(region, None, ctypes.c_uint(count), ctypes.c_uint(0))
        ready.set()
        threading.Event().wait()

    threading.Thread(target=idle, name="expertile-idle", daemon=True).start()
    ready.wait()
