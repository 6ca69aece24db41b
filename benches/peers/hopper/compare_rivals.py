#!/usr/bin/env python3
"""Expertile's layer beside those that others run, on one Hopper GPU, in one process. README.md says how to run it.

    compare_rivals.py --out FOLDER                       the whole comparison
    compare_rivals.py --out FOLDER --batch-invariant     beside what vLLM offers in its batch-invariant mode
    compare_rivals.py --out FOLDER --shapes dsv3_tp8,qwen30b --tokens 1,64,4096 --rivals triton,humming
    compare_rivals.py --dry-run                          no GPU: the same code in torch on tiny layers, invented times

Every rival is checked first, every token against the layer in f32; then their CUDA graphs are replayed in turns, hot,
over so many inputs that the weights read are several times the L2. FOLDER/NAME.json has the results; rivals_table.py
makes Markdown of one or more such files. A rival whose pieces are not on this machine is left out, with the reason; of
one that fails, FOLDER/NAME.failures.log has the traceback.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time

import torch

import cases
import rivals_table
import routing
import warm_up
from cases import Case, Layers, Timing, reason
from device import DEVICE, device_facts
from invariance import TOKENS as INVARIANCE_TOKENS
from invariance import differing_values
from rivals import OURS, RIVALS
from rivals.stand_in import StandIn
from shapes import READ_TBS, SHAPES, SWIGLU, TFLOPS, WEIGHT_BYTES, Shape, add_shape
from timing import fp8_tflops, read_tbs

BEGIN = time.perf_counter()
PARTS = ("layer", "gemms")


@dataclasses.dataclass(frozen=True)
class Group:
    """What is measured alike."""

    part: str
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    rivals: tuple[str, ...]
    routing: str = "uniform"
    format: str = "e4m3"


EACH = tuple(shape for shape in SHAPES if shape not in SWIGLU)
# At 4 bits, as gpt-oss's checkpoints are, with biases and its activation.
GPT_OSS = Group(
    "layer",
    tuple(SWIGLU),
    (1, 8, 64, 1024, 4096),
    ("ours", "ours_w4a16", "triton_kernels", "marlin"),
    format="mxfp4",
)
# At 4 bits, with our own e4m3 GEMMs at the same sizes.
MXFP4_TOKENS, MXFP4_RIVALS = (8, 64, 256, 1024, 4096), ("ours", "ours_w4a16", "ours_copy", "humming_mxfp4")
# Without options: sizes at which the bytes of weights decide, sizes at which DeepGEMM is of use, and special cases.
WHOLE = (
    Group("layer", EACH, (1, 2, 4, 8, 16, 64, 256), ("ours", "triton", "humming")),
    Group("layer", EACH, (777, 4096), ("ours", "triton", "humming", "deepgemm")),
    Group("layer", ("dsv3_tp8",), (5000,), ("ours", "triton", "humming", "deepgemm")),
    Group("layer", ("dsv3_tp8", "qwen30b"), (64, 777, 5000), ("ours", "triton", "humming", "deepgemm"), "zipf"),
    Group("layer", ("qwen30b", "mixtral"), (1, 2, 4, 8, 64, 256, 1024, 4096), ("ours", "triton"), format="bf16"),
    Group("layer", ("qwen30b", "qwen235", "dsv3_tp8"), MXFP4_TOKENS, MXFP4_RIVALS, format="mxfp4"),
    Group("gemms", ("qwen30b", "qwen235", "dsv3_tp8"), MXFP4_TOKENS, MXFP4_RIVALS, format="mxfp4"),
    Group("gemms", ("qwen30b", "qwen235", "dsv3_tp8"), MXFP4_TOKENS, ("ours",)),
    Group("gemms", ("dsv3_ep8", "dsv3_tp8", "qwen235"), (4096, 16384), ("ours", "humming", "deepgemm")),
    GPT_OSS,
)
INVARIANT = Group(
    "layer",
    ("qwen30b", "qwen235_tp4", "dsv3_ep8", "dsv3_tp8"),
    (1, 8, 64, 1024, 4096),
    ("ours", "triton_bi", "humming_bi"),
)


def options_of(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, counts = (lambda text: text.replace("-", "_").split(",")), (lambda text: [*map(int, text.split(","))])
    parser.add_argument("--out", help="the folder of the results")
    parser.add_argument("--name", help="of the JSON file; rivals or invariant unless given")
    parser.add_argument("--shapes", type=names, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--shape", action="append", default=[], metavar="H,I,E,topk[,G]", help="may be repeated")
    parser.add_argument("--tokens", type=counts, help="numbers of tokens")
    parser.add_argument("--routing", choices=routing.KINDS)
    parser.add_argument("--format", choices=list(WEIGHT_BYTES))
    parser.add_argument("--rivals", type=names, help=f"of {', '.join(RIVALS)}; Expertile runs always")
    parser.add_argument("--parts", type=names, help="layer, gemms (both GEMMs alone), or both")
    parser.add_argument("--batch-invariant", action="store_true", help="beside others in that mode; compares bits, too")
    parser.add_argument("--hot", type=float, default=0.15, help="seconds of load before each timing")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which nothing more is begun")
    parser.add_argument("--no-compile", action="store_true", help="do not fill the caches first")
    parser.add_argument("--compile-seconds", type=float, default=100)
    parser.add_argument("--commit", default=os.environ.get("COMMIT", ""), help="of Expertile, where there is no git")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--compile-job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        options.shape = [add_shape(text) for text in options.shape]
    except ValueError as error:
        parser.error(str(error))
    for name, given, known in (
        ("--shapes", options.shapes, SHAPES),
        ("--rivals", options.rivals, RIVALS),
        ("--parts", options.parts, PARTS),
    ):
        for value in given or ():
            if value not in known:
                parser.error(f"{name} {value}, expected of {', '.join(known)}")
    chosen = [*(options.shapes or ()), *options.shape]
    if any(shape in SWIGLU for shape in chosen):
        if any(shape not in SWIGLU for shape in chosen):
            parser.error(f"--shapes {','.join(chosen)}, expected {' and '.join(SWIGLU)} in a run without others")
        if options.format not in (None, GPT_OSS.format):
            parser.error(f"--format {options.format}, expected {GPT_OSS.format} for {' and '.join(SWIGLU)}")
    if options.tokens and min(options.tokens) < 1:
        parser.error(f"--tokens {min(options.tokens)}, expected at least 1")
    if not options.out and not options.dry_run and not options.compile_job:
        parser.error("--out is needed")
    options.name = options.name or ("invariant" if options.batch_invariant else "rivals")
    return options


def groups_of(options):
    """The default's, or what the options say; an option that is not given is the first of the default's."""
    chosen = (*(options.shapes or ()), *options.shape)
    first = INVARIANT if options.batch_invariant else GPT_OSS if set(chosen) & set(SWIGLU) else WHOLE[0]
    given = [options.tokens, options.routing, options.format, options.parts]
    if not chosen and not any(given):
        groups = [INVARIANT] if options.batch_invariant else list(WHOLE)
        if options.rivals:
            groups = [dataclasses.replace(group, rivals=tuple(options.rivals)) for group in groups]
    else:
        usual = ["triton", "humming", "deepgemm"] if first is WHOLE[0] else [*first.rivals]
        rivals = options.rivals or usual
        group = dataclasses.replace(
            first,
            shapes=chosen or first.shapes,
            tokens=tuple(options.tokens or first.tokens),
            rivals=tuple(rivals),
            routing=options.routing or "uniform",
            format=options.format or (GPT_OSS.format if set(chosen) & set(SWIGLU) else "e4m3"),
        )
        groups = [dataclasses.replace(group, part=part) for part in options.parts or ["layer"]]
    return [dataclasses.replace(group, rivals=tuple(dict.fromkeys((OURS, *group.rivals)))) for group in groups]


def rivals_of(groups, dry_run):
    """-> those that can run here, by key; says of each other one why it cannot."""
    found = {}
    for key in dict.fromkeys(key for group in groups for key in group.rivals):
        why = RIVALS[key].missing()
        if why is None or dry_run:
            found[key] = StandIn(RIVALS[key]) if dry_run else RIVALS[key]
        if why is not None:
            print(f"# {key} {'would be' if dry_run else 'is'} left out: {why}", flush=True)
    return found


def layers_of(groups, verify):
    """-> by (shape, format) and by rival: the numbers of tokens of all groups, and of the check by bits."""
    found = {}
    for group in groups:
        for shape in group.shapes:
            for key in group.rivals:
                tokens = found.setdefault((shape, group.format), {}).setdefault(key, set())
                tokens.update(group.tokens, INVARIANCE_TOKENS if verify else ())
    return {layer: {key: sorted(tokens) for key, tokens in by.items()} for layer, by in found.items()}


class Results:
    """What the JSON file says; written after each row, so that a run which is cut off leaves what it has."""

    def __init__(self, options, rivals):
        self.options, facts = options, device_facts()
        name, driver = [*facts["smi"].split(", "), "", ""][:2]
        self.data = dict(
            date=time.strftime("%F"),
            device=name or DEVICE,
            driver=driver,
            commit=options.commit or described_commit(),
            torch=facts["torch"],
            versions={key: rival.version() for key, rival in rivals.items()},
            read_terabytes_per_second=READ_TBS,
            **{f"{format}_teraflops": int(rate) for format, rate in TFLOPS.items()},
            unit="microseconds",
            paths={key: rival.label for key, rival in rivals.items()},
            before=facts["smi"],
            layers=[],
            gemms=[],
            invariance=[],
        )
        if options.dry_run:
            self.data["dry_run"] = True

    def add(self, group, shape, row):
        part = self.data["layers" if group.part == "layer" else "gemms"]
        entry = layer_entry(group, shape)
        found = [other for other in part if entry.items() <= other.items()]
        if not found:
            found = [entry | dict(rows=[])]
            part.append(found[0])
        found[0]["rows"].append({key: rounded(value) for key, value in row.items()})
        self.save()

    def save(self):
        """A dry run leaves no file."""
        text = json.dumps(self.data, indent=1) + "\n"
        if self.options.dry_run:
            return
        path = os.path.join(self.options.out, self.options.name + ".json")
        with open(path + ".part", "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(path + ".part", path)


def layer_entry(group, shape):
    numbers = SHAPES[shape]
    sizes = dict(hidden=numbers.hidden, intermediate=numbers.intermediate, experts=numbers.global_experts)
    return dict(name=shape, **sizes, local_experts=numbers.experts, topk=numbers.topk) | dict(
        format=group.format, routing=group.routing
    )


def rounded(value):
    return round(value, 2) if isinstance(value, float) else value


def described_commit():
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__)).stdout.strip()
    except OSError:
        return ""


def invented(contenders, expected_us, *_):
    """The times of a dry run: in the order of the names, so that they are plainly no measurement."""
    return {name: expected_us * (1 + index / 10) for index, name in enumerate(contenders)}


DRY_TOKENS = 64


def shrunk(groups):
    """For a dry run: layers and sizes that a CPU computes in no time, some experts elsewhere where they were before."""
    for name, shape in SHAPES.items():
        experts = 8 if shape.experts == shape.global_experts else 4
        # Widths of no whole number of 128 stay so.
        hidden, intermediate = (256, 128) if shape.hidden % 128 == 0 else (192, 192)
        SHAPES[name] = Shape(hidden, intermediate, experts, min(shape.topk, 4), 8)
    cut = lambda tokens: tuple(dict.fromkeys(min(count, DRY_TOKENS) for count in tokens))
    return [dataclasses.replace(group, tokens=cut(group.tokens)) for group in groups]


def measure(options, groups, rivals, results):
    wrong = 0
    timing = Timing(options.hot, race=invented) if options.dry_run else Timing(options.hot)
    for (shape, format), tokens in layers_of(groups, options.batch_invariant).items():
        mine = [group for group in groups if shape in group.shapes and group.format == format]
        keys = dict.fromkeys(key for group in mine for key in group.rivals if key in rivals)
        if out_of_time(options):
            print(f"# {shape} {format}: no time left", flush=True)
            continue
        layers = Layers([rivals[key] for key in keys], shape, format, tokens)
        for group in mine:
            for count in group.tokens:
                if out_of_time(options):
                    print(f"# {shape} {format} {count}: no time left", flush=True)
                    continue
                case = Case(layers, [rivals[key] for key in group.rivals if key in rivals], count, group.routing)
                row = getattr(case, group.part)(timing)
                results.add(group, shape, row)
                wrong += len(row.get("wrong", ()))
                rivals_table.show(results.data, layer_entry(group, shape), group.part, row)
                del case
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()
        if options.batch_invariant:
            wrong += verify(options, layers, mine[0], results)
        del layers
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return wrong


def verify(options, layers, group, results):
    """-> how many rivals break their promise, or could not be looked at."""
    counts, wrong = {}, 0
    for key, loaded in layers.loaded.items():
        if out_of_time(options):
            print(f"# {layers.shape} {key}: no time left to compare bits", flush=True)
            continue
        try:
            most = DRY_TOKENS if options.dry_run else max(INVARIANCE_TOKENS)
            tokens = [count for count in INVARIANCE_TOKENS if count <= most]
            found = differing_values(loaded, layers.shape, tokens)
        except Exception as error:
            wrong += 1
            print(f"# {layers.shape} {key}: {reason(error)}", flush=True)
            continue
        counts[key] = {str(name): list(pair) for name, pair in found.items()}
        differing, values = (sum(pair[part] for pair in found.values()) for part in (0, 1))
        broken = differing > 0 and layers.rivals[key].batch_invariant
        wrong += broken
        said = ", though it promises none" if broken else ""
        print(f"{layers.shape:12} {key:10} {differing} of {values} values depend on other tokens{said}", flush=True)
    results.data["invariance"].append(layer_entry(group, layers.shape) | dict(values=counts))
    results.save()
    return wrong


def out_of_time(options):
    return time.perf_counter() - BEGIN > options.seconds


def main():
    options = options_of()
    if options.compile_job:
        return warm_up.run_job(options.compile_job)
    if DEVICE == "cpu" and not options.dry_run:
        raise SystemExit("no CUDA device is here: --dry-run needs none")
    groups = groups_of(options)
    if options.dry_run:
        print("# DRY RUN: torch computes in place of every rival, layers are tiny, the times below are not measured")
        groups = shrunk(groups)
    torch.set_float32_matmul_precision("highest")
    rivals = rivals_of(groups, options.dry_run)
    if OURS not in rivals:
        raise SystemExit("Expertile itself cannot run here")
    results = Results(options, rivals)
    if not options.dry_run:
        os.makedirs(options.out, exist_ok=True)
        cases.FAILURES = os.path.join(options.out, options.name + ".failures.log")
        results.data |= dict(measured=dict(read_tbs=round(read_tbs(), 2), fp8_tflops=round(fp8_tflops())))
        print(f"# {results.data['before']}; measured {results.data['measured']}", flush=True)
        if not options.no_compile:
            layers = layers_of(groups, options.batch_invariant)
            warm_up.compile_all(rivals.values(), layers, options.compile_seconds)
    wrong = measure(options, groups, rivals, results)
    results.data |= dict(after=device_facts()["smi"], seconds=round(time.perf_counter() - BEGIN, 1))
    results.save()
    print("\n".join(rivals_table.markdown([results.data])))
    print(f"# {results.data['seconds']} s, {wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
