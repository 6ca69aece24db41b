#!/usr/bin/env python3
"""Lists arrivals at barriers that machine code issues while the thread's loads from shared memory may be on their way.

    EXPERTILE_CUBINS=cubins cargo test -p expertile --test cuda_compile every_tile
    benches/hopper/loads_at_arrival.py cubins/*.cubin --nvdisasm PATH       # pip install nvidia-cuda-nvdisasm

An arrival that gives a stage of a ring back must come after the loads from it (docs/kernels/gemm.md), and nothing but
the machine code shows whether it does: a load has come once an instruction reads one of its registers. Of each listed
arrival the loads are named that no instruction has read by then; whether they are from the stage that is given back has
to be seen there. int4's kernels are listed: they load the next unit's scales meanwhile. Follows the code as it stands,
and forgets what it knows at a jump that is always taken. Exits with 1 where anything is listed.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
REGISTERS_OF_LOAD = {"LDS.64": 2, "LDS.128": 4}
ENDS = ("EXIT", "BRA", "RET")
STORES = ("ST", "RED", "ATOM")


@dataclass(frozen=True)
class Load:
    """A load from shared memory, by its place in the code."""

    place: str
    text: str


def early_arrivals(code: str) -> list[tuple[str, list[Load]]]:
    """Each arrival, with the loads that may be on their way at it."""
    pending: dict[int, Load] = {}
    found = []
    for line in code.splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        place, predicate, name, arguments = match.groups()
        registers = [int(number) for number in re.findall(r"\bR(\d+)\b", arguments)]
        writes_first = re.match(r"R\d", arguments) is not None and not name.startswith(STORES)
        for number in registers[1:] if writes_first else registers:
            come = pending.get(number)
            pending = {register: load for register, load in pending.items() if load != come}
        if name.startswith("SYNCS.ARRIVE") and pending:
            found.append((f"{place} {name} {arguments}", sorted(set(pending.values()), key=lambda load: load.place)))
        if writes_first and name.startswith("LDS"):
            load = Load(place, f"{place} {name} {arguments}")
            count = next((count for part, count in REGISTERS_OF_LOAD.items() if name.startswith(part)), 1)
            pending |= {registers[0] + i: load for i in range(count)}
        elif writes_first:
            pending.pop(registers[0], None)
        if name.startswith(ENDS) and predicate is None:
            pending = {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cubins", nargs="+", type=Path)
    parser.add_argument("--nvdisasm", default="nvdisasm", help="the disassembler [default: the one on the path]")
    options = parser.parse_args()
    listed = 0
    for cubin in options.cubins:
        command = [options.nvdisasm, "-c", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        arrivals = early_arrivals(code)
        listed += bool(arrivals)
        for arrival, loads in arrivals:
            print(f"{cubin.name}: {arrival}")
            print("".join(f"    {load.text}\n" for load in loads), end="")
    print(f"{listed} of {len(options.cubins)} cubins with an arrival before a load has come")
    return 1 if listed else 0


if __name__ == "__main__":
    sys.exit(main())
