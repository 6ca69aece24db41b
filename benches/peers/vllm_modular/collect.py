#!/usr/bin/env python3
"""Collects what `compare.py` and the tests on a GPU need of vLLM 0.33.0, for a machine without a network.

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 -d WHEELS vllm==0.33.0
    python3 collect.py WHEELS/vllm-0.33.0-*.whl DEST --python 3.12

`--python` is the version of the machine with the GPU. DEST then holds two archives, some 20 and 25 MB:

    vllm.tar.xz      vllm's Python files, its tuned files for the H200, DeepGEMM, and its two extensions with the code
                     for other GPUs than a Hopper blanked out
    packages.tar.xz  in packages/: what those files import beside torch, Triton and Transformers (`--no-packages`
                     leaves it out, where vLLM's dependencies are installed)

There, both are unpacked into one folder, which EXPERTILE_VLLM_SOURCE then names:

    mkdir /tmp/vllm && for f in vllm packages; do tar xJf DEST/$f.tar.xz -C /tmp/vllm; done
    export EXPERTILE_VLLM_SOURCE=/tmp/vllm

Nothing of DEST belongs in a commit.
"""

import argparse
import io
import lzma
import pathlib
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile

EXTENSIONS = ("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so")
DEEP_GEMM = "vllm/third_party/deep_gemm/"
TUNED = "vllm/model_executor/layers/fused_moe/configs/"
# What vLLM's Python files import, with what these import; without torch, Triton, Transformers and theirs.
PACKAGES = """
    aiohappyeyeballs aiohttp aiosignal annotated-doc annotated-types anyio apache-tvm-ffi attrs cachetools cbor2 certifi
    charset_normalizer cloudpickle distro einops fastapi frozenlist h11 httpcore2 httpx2 idna jiter llguidance msgspec
    multidict openai openai-harmony opentelemetry-api partial_json_parser pillow prometheus_client propcache psutil
    py-cpuinfo pybase64 pydantic pydantic-core pyzmq requests sniffio starlette truststore typing_extensions
    typing_inspection urllib3 uvloop xgrammar yarl
""".split()

FATBIN = 0xBA55ED50
CUBIN = 2
HOPPER = 90


def sections(elf):
    """Name, offset and size of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        yield bytes(elf[start : elf.index(b"\0", start)]).decode(), header[4], header[5]


def only_for_hopper(elf):
    """The extension with everything blanked out that a Hopper does not run: cubins of others, PTX, symbol tables."""
    elf = bytearray(elf)
    found = {name: (offset, size) for name, offset, size in sections(elf)}
    for name in (".symtab", ".strtab"):
        offset, size = found.get(name, (0, 0))
        elf[offset : offset + size] = bytes(size)
    at, size = found[".nv_fatbin"]
    end = at + size
    while at < end:
        magic, _, head, length = struct.unpack_from("<IHHQ", elf, at)
        if magic != FATBIN:
            at += 8
            continue
        entry, stop = at + head, at + head + length
        while entry < stop:
            kind, _, entry_head, payload = struct.unpack_from("<HHIQ", elf, entry)
            (arch,) = struct.unpack_from("<I", elf, entry + 28)
            if (kind, arch) != (CUBIN, HOPPER):
                elf[entry + entry_head : entry + entry_head + payload] = bytes(payload)
            entry += entry_head + payload
        at = -(-stop // 8) * 8
    return bytes(elf)


def wanted(name):
    if name.endswith("/"):
        return False
    if name in EXTENSIONS or name.startswith(DEEP_GEMM) or ".dist-info/METADATA" in name:
        return True
    return name.endswith(".py") or (name.startswith(TUNED) and "NVIDIA_H200" in name)


def archive(path, files):
    """An archive of names and contents."""
    with lzma.open(path, "wb", preset=4) as compressed, tarfile.open(fileobj=compressed, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def of_vllm(wheel):
    with zipfile.ZipFile(wheel) as zipped:
        for name in filter(wanted, zipped.namelist()):
            data = zipped.read(name)
            yield name, only_for_hopper(data) if name in EXTENSIONS else data


def of_packages(python):
    with tempfile.TemporaryDirectory() as folder:
        platforms = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
        options = [option for platform in platforms for option in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--python-version", python, *options, "-d", folder, *PACKAGES], check=True)
        for wheel in sorted(pathlib.Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as zipped:
                for name in zipped.namelist():
                    if not name.endswith("/"):
                        yield f"packages/{name}", zipped.read(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("dest", type=pathlib.Path)
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info[:2]))
    parser.add_argument("--no-packages", action="store_true")
    options = parser.parse_args()
    options.dest.mkdir(parents=True, exist_ok=True)
    archive(options.dest / "vllm.tar.xz", of_vllm(options.wheel))
    if not options.no_packages:
        archive(options.dest / "packages.tar.xz", of_packages(options.python))


if __name__ == "__main__":
    main()
