#!/usr/bin/env python3
"""SGLang 0.5.23's own Python files as a host for one layer, without its installation.

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
        --platform manylinux_2_34_x86_64 -d WHEELS sglang==0.5.23
    sglang_host.py WHEELS/sglang-0.5.23-*.whl SGLANG.tar.xz

The archive (8 MB) has its Python files, the sources of its kernels and the H200's tuned tiles.

`ready(folder)` takes the unpacked archive, or any folder that holds `sglang/`. All of SGLang that runs is its own, but
for three things:

- packages that its modules import and one layer does not use are empty where they are not installed (`ABSENT`);
- its compiled operators (`sgl_kernel`, 370 MB, built for torch 2.14) are its own other kernels where it is not
  installed: `moe_align_block_size` the one that it compiles when it runs, with nvcc and tvm_ffi, as it does its
  activation and its quantizer; `moe_sum_reduce`, of more than 32 tokens, the one in Triton that it has for fewer;
- on a CPU, in Triton's interpreter, `moe_align_block_size`, which SGLang has for GPUs only, and the quantizer, which
  the interpreter does not round in, are a few lines of torch.

`stand_ins` lists what of this was needed.
"""

import abc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import sys
import tarfile
import types
import zipfile

# What SGLang's modules import at their top, and nothing of a layer's call runs.
ABSENT = """
tvm_ffi IPython PIL aiohttp anthropic blobfile build compressed_tensors datasets distro fastapi gguf interegular jiter
jsonschema llguidance loguru mistral_common modelscope msgpack multipart multiprocess openai openai_harmony orjson
outlines pandas partial_json_parser prometheus_client psutil py_cpuinfo pyarrow pybase64 pydantic pydantic_core pynvml
referencing requests scipy sentencepiece setproctitle sniffio soundfile starlette tiktoken timm torchao torchaudio
torchvision traitlets uvicorn uvloop watchfiles xgrammar xxhash zmq zstandard
""".split()

stand_ins = []


class _Anything(abc.ABCMeta):
    """A class that has every attribute, can be called, subscripted, a base class, a decorator."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing

    def __getitem__(cls, _):
        return cls

    def __or__(cls, _):
        return cls

    __ror__ = __or__

    def __new__(mcs, name, bases, namespace, **_):
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name, bases, namespace, **_):
        super().__init__(name, bases, namespace)


class _Nothing(metaclass=_Anything):
    def __init__(self, *_, **__):
        pass

    def __init_subclass__(cls, **_):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing

    def __call__(self, *arguments, **_):
        return arguments[0] if arguments else self

    @classmethod
    def __get_pydantic_core_schema__(cls, *_):
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder that is asked: of packages of `ABSENT` every module exists, and is empty."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._attribute
        return module

    def exec_module(self, module):
        module.__version__ = "0"
        if "." not in module.__name__:
            stand_ins.append(module.__name__)

    @staticmethod
    def _attribute(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def align(topk_ids, buckets, block, sorted_ids, expert_ids, padded, _cumsum, _pad=True, _ignore=False):
    """Slots by expert, each expert's filled up to whole blocks; id -1 is a bucket before the first expert's."""
    ids = topk_ids.flatten().long()
    sorted_ids.fill_(ids.numel())
    expert_ids.fill_(-1)
    at = 0
    for expert in range(-1, buckets - 1):
        slots = (ids == expert).nonzero().flatten().int()
        blocks = -(-len(slots) // block)
        sorted_ids[at * block : at * block + len(slots)] = slots
        expert_ids[at : at + blocks] = expert
        at += blocks
    padded.fill_(at * block)


def quantize(x, group):
    """Rows to e4m3 with a float32 scale for each group, rounded; Triton's interpreter cuts off."""
    import torch

    groups = x.float().unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    rows = (groups / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return rows.flatten(-2), scales.squeeze(-1)


def ready(folder=None):
    """Makes `import sglang` find SGLang's files, in `folder` if it is given, and run one layer of them."""
    if folder:
        sys.path.insert(0, str(folder))
    import torch

    if not any(isinstance(finder, _Absent) for finder in sys.meta_path):
        sys.meta_path.append(_Absent())
    on_gpu = torch.cuda.is_available()
    if on_gpu and importlib.util.find_spec("sgl_kernel") is None:
        _own_kernels()
    import sglang.srt.layers.moe.moe_runner.runner
    import sglang.srt.layers.moe.token_dispatcher  # noqa: F401
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config

    if not on_gpu:
        # Its operators are registered for GPUs: the same functions, without torch's dispatcher.
        for name in ("inplace_fused_experts", "outplace_fused_experts"):
            function = getattr(fused_moe, name)
            setattr(fused_moe, name, getattr(function, "__wrapped__", function))
        fused_moe_triton_config.get_device_name = lambda: "cpu"
        # The package has a function of that name in the place of the module.
        sys.modules[f"{fused_moe.__package__}.moe_align_block_size"].sgl_moe_align_block_size = align
        sys.modules["sglang.kernels.ops.moe.fused_moe_triton_kernels"].per_token_group_quant_fp8 = quantize
        stand_ins.extend(("moe_align_block_size (torch)", "per_token_group_quant_fp8 (torch)"))


def _own_kernels():
    """`sgl_kernel` of kernels that SGLang has besides: what it compiles when it runs, and Triton's."""
    kernels = types.ModuleType("sgl_kernel")
    kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    kernels.__path__ = []

    def moe_align_block_size(
        topk_ids, experts, block, sorted_ids, expert_ids, padded, cumsum, pad=False, ignore_invalid_expert=False
    ):
        from sglang.kernels.ops.moe.moe_align import moe_align_block_size as compiled

        assert not ignore_invalid_expert
        compiled(topk_ids, experts, block, sorted_ids, expert_ids, padded, cumsum, pad)

    def moe_sum_reduce(x, out, factor):
        from sglang.kernels.ops.moe.fused_moe_triton_kernels import moe_sum_reduce_triton

        moe_sum_reduce_triton(x, out, factor)

    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*_, **__):
            raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

        return operator

    kernels.moe_align_block_size, kernels.moe_sum_reduce = moe_align_block_size, moe_sum_reduce
    kernels.__getattr__ = missing
    sys.modules["sgl_kernel"] = kernels
    ABSENT.append("sgl_kernel")  # Its modules are.
    stand_ins.append("sgl_kernel (SGLang's moe_align_block_size of nvcc, moe_sum_reduce of Triton)")


def serve_one_process():
    """What SGLang's layers need of a server: its arguments published, groups of one process."""
    import os
    import socket

    from sglang.srt import runtime_context
    from sglang.srt.distributed import parallel_state
    from sglang.srt.server_args import ServerArgs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    arguments = ServerArgs(model_path="dummy", tp_size=1, ep_size=1, pp_size=1)
    runtime_context.publish(arguments, role="test", ranks=runtime_context.SpawnRanks(world_rank=0))
    parallel_state.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo")


def pack(wheel, archive):
    """Of the wheel what `ready` needs: Python, sources of kernels, the H200's tuned tiles."""
    with zipfile.ZipFile(wheel) as files, tarfile.open(archive, "w:xz", preset=6) as tar:
        for name in files.namelist():
            tiles = name.endswith(".json") and "/configs/" in name and ("device_name=NVIDIA_H200" not in name)
            kept = name.startswith("sglang/") and name.endswith((".py", ".cu", ".cuh", ".h", ".hpp", ".json"))
            if not kept or tiles or name.startswith(("sglang/multimodal_gen/", "sglang/benchmark/")):
                continue
            info = tarfile.TarInfo(name)
            data = files.read(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    pack(*sys.argv[1:])
