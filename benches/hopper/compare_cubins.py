#!/usr/bin/env python3
"""Says whether two folders of cubins hold the same machine code.

    EXPERTILE_CUBINS=before cargo test -p expertile --test cuda_compile     # at the old commit
    EXPERTILE_CUBINS=after cargo test -p expertile --test cuda_compile      # at the new one
    benches/hopper/compare_cubins.py before after

Compares, for every file name in either folder: the instructions (`.text.*`), the constant banks that they read, the
size of shared memory, and the registers and barriers of each entry. Names of symbols, of files and line numbers may
differ, and so may what the compiler keeps of a source's unused constants (`.nv.global*`, and their addresses in
`.nv.constant4`). Exits with 1 where anything else does. Needs Python alone: it reads the ELF files itself.
"""

import argparse
import struct
import sys
from pathlib import Path

NO_BITS = 8
COMPARED = (".text.", ".nv.constant", ".nv.shared")
LEFT_OUT = ".nv.constant4"


def sections(cubin: bytes) -> dict[str, tuple[int, int, bytes]]:
    """Name -> (flags without the link bits, registers, content or its size) of the sections that are machine code."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    found = {}
    for name, kind, flags, _, offset, length, _, info, _, _ in headers:
        text = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if text.startswith(COMPARED) and text != LEFT_OUT:
            content = struct.pack("<Q", length) if kind == NO_BITS else cubin[offset : offset + length]
            found[text] = (flags, info >> 24, content)
    return found


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two cubins, a line each."""
    if not before.exists() or not after.exists():
        return [f"only in {before.parent if before.exists() else after.parent}"]
    old, new = sections(before.read_bytes()), sections(after.read_bytes())
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            lines.append(f"section {name} only {'after' if name in new else 'before'}")
            continue
        (old_flags, old_registers, old_bytes), (new_flags, new_registers, new_bytes) = old[name], new[name]
        if old_flags != new_flags:
            lines.append(f"{name}: flags {old_flags} before, {new_flags} after")
        if old_registers != new_registers:
            lines.append(f"{name}: {old_registers} registers before, {new_registers} after")
        if old_bytes != new_bytes:
            lines.append(f"{name}: {len(old_bytes)} bytes before, {len(new_bytes)} after, not the same")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    names = sorted({path.name for folder in (arguments.before, arguments.after) for path in folder.glob("*.cubin")})
    if not names:
        parser.error("no cubin in either folder")
    different = 0
    for name in names:
        lines = differences(arguments.before / name, arguments.after / name)
        different += bool(lines)
        for line in lines:
            print(f"{name}: {line}")
    print(f"{len(names) - different} of {len(names)} cubins are the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
