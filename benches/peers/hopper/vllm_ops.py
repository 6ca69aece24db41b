"""vLLM's own CUDA operators, out of the pieces that PEER_DIR names."""

import importlib
import os
import sys

import torch

PEER_DIR = os.environ.get("PEER_DIR", "")


def piece(name):
    """Where a piece of a peer lies, or would."""
    return os.path.join(PEER_DIR, name)


def missing(*names):
    """Why a rival that needs these pieces cannot run here; None if they are all there."""
    if not PEER_DIR:
        return "PEER_DIR is not set"
    absent = [name for name in names if not os.path.exists(piece(name))]
    return f"{PEER_DIR} has no {', '.join(absent)}" if absent else None


def load():
    """Those that are there; a second time does nothing."""
    for name in ("ops.so", "moe_ops.so"):
        if os.path.exists(piece(name)):
            torch.ops.load_library(piece(name))


def load_seed(name):
    """A module of vLLM, of those that unpack.py laid out as such."""
    return _imported("vllm." + name, piece("seed"), PEER_DIR)


def load_module(name):
    """A piece that is a Python module."""
    return _imported(name, PEER_DIR)


def _imported(name, *folders):
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    return importlib.import_module(name)
