"""Compares `expertile layer` with Transformers' own MoE blocks, on tiny checkpoints of every family and format.

Nothing here shares code with the command: Transformers builds the models, writes them, reads what was written and runs
the block. Compared are the experts chosen for each token, their weights, and the output, whole and part by part. The exit
code is 1 if anything differs, or if a checkpoint that must be refused is not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from command import Command, Run
from families import EXPERTS, HIDDEN, Family, select
from layouts import Folders, Layout, write
from models import build, load
from quantize import (
    BF16_BLOCKS,
    BLOCK,
    COMPRESSED_BLOCKS,
    COMPRESSED_CHANNELS,
    COMPRESSED_TENSORS,
    E8M0_BLOCKS,
    F16_BLOCKS,
    F32_BLOCKS,
    FP4_EXPERTS,
    INT4,
    MXFP4,
    UE8M0_IN_F32,
    Scheme,
)
from reference import Leeway, Result, by_expert, leeway, run, token_ids
from refusals import REFUSALS, Refusal, spoil
from table import markdown, text

TOKENS = 33
SEED = 20

# Distances are 1 - 2 sum(xy) / sum(x^2 + y^2), about half the square of the relative difference. The command rounds to
# bf16 after each of the two products and at the end; each rounding is off by 2^-9 at most, which makes 1e-6 to 1e-5
# together, and some times as much in a row whose experts cancel out. A wrong expert or part is worth 1e-2 and more.
WHOLE = 5e-5
WORST_ROW = 2e-4
# With e4m3 activations every input of a product is off by 2^-4 at most, and by 2^-5.8 on average: 3e-4 a product.
E4M3_WHOLE = 4e-3
E4M3_WORST_ROW = 8e-3
# The router's weights in f32: a few units in the last place, sums in another order.
WEIGHTS = 2e-5
# A bf16 router's weights, as Transformers rounds some of them to bf16 at the end.
BF16_WEIGHTS = 2.0**-7

TRANSFORMERS = Layout("Transformers 5")
HUB = Layout("hub", hub=True)
# The same tensors and keys written down in other ways; what reads one family so reads them all.
EVERY_WAY = (
    Layout("Transformers 5, shards", shards=True),
    Layout("Transformers 5, stale index", stale_index=True),
    Layout("Transformers 5, byte order mark", byte_order_mark=True),
    Layout("Transformers 5, headless", headless=True),
    Layout("Transformers 5, f16", dtype=torch.float16),
    Layout("Transformers 5, f32", dtype=torch.float32),
    Layout("fused experts", fused=True),
)
FP8: dict[str, tuple[Scheme, ...]] = {
    "qwen3_moe": (BF16_BLOCKS, F32_BLOCKS, E8M0_BLOCKS, COMPRESSED_BLOCKS, COMPRESSED_CHANNELS, COMPRESSED_TENSORS),
    "qwen3_next": (BF16_BLOCKS,),
    "qwen3_5_moe": (BF16_BLOCKS,),
    "qwen3_vl_moe": (BF16_BLOCKS,),
    "deepseek_v3": (F32_BLOCKS, UE8M0_IN_F32, E8M0_BLOCKS),
    "deepseek_v32": (UE8M0_IN_F32,),
    "glm4_moe": (F32_BLOCKS, F16_BLOCKS, COMPRESSED_BLOCKS, COMPRESSED_CHANNELS),
}


@dataclass
class Row:
    """One comparison."""

    family: str
    layout: str
    run: str
    # "right", "differs", "refused" (and may be), "not read" (and ought to be) or "not refused".
    verdict: str
    message: str = ""
    # Tokens whose experts are the same, of those that rounding does not decide.
    same: int = 0
    decided: int = 0
    weights: float = 0.0
    whole: float = 0.0
    worst_row: float = 0.0

    @property
    def failed(self) -> bool:
        return self.verdict not in ("right", "refused")


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    command = Command(arguments.binary)
    folder = Path(tempfile.mkdtemp()) if arguments.keep is None else arguments.keep
    rows: list[Row] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokens = folder / "tokens.safetensors"
        hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(SEED)).to(torch.bfloat16)
        save_file({"hidden_states": hidden, "input_ids": token_ids(TOKENS)}, tokens)
        for row in compare_all(select(arguments.only), command, hidden, tokens, folder):
            row.message = row.message.removeprefix("error: ").replace(f"{folder}/", "")
            rows.append(row)
            if not arguments.json:
                print(text(row), flush=True)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)
    seconds = time.monotonic() - started
    failed = [row for row in rows if row.failed]
    if arguments.json:
        print(json.dumps({"seconds": seconds, "failed": len(failed), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"{len(rows)} comparisons, {len(failed)} failed, {seconds:.0f} s")
        for row in failed:
            print(text(row))
    if arguments.markdown is not None:
        replace_table(arguments.markdown, markdown(rows))
    return 1 if failed or not rows else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[3]
    parser.add_argument("--only", metavar="FAMILY", help="a family, or one of its rows: deepseek_v2/grouped")
    parser.add_argument("--binary", type=Path, default=root / "target/release/expertile", help="the command")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to leave the checkpoints and the outputs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page whose table between the marks to replace")
    return parser.parse_args()


def replace_table(page: Path, table: str) -> None:
    """Puts the table between the page's two marks."""
    begin, end = "<!-- witness: begin -->", "<!-- witness: end -->"
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n{table}{end}{after}")


def compare_all(
    families: list[Family], command: Command, hidden: torch.Tensor, tokens: Path, folder: Path
) -> Iterator[Row]:
    for family in families:
        model = build(family)
        where = folder / family.name.replace("/", "-")
        for layout in layouts(family):
            place = where / layout.name.replace(",", "").replace(" ", "-")
            folders = write(model, family, layout, place)
            yield from compare_one(family, layout, folders, command, hidden, tokens, place)
            for refusal in REFUSALS:
                if refusal.row == family.name and layout == refused_layout(family, refusal):
                    yield refuse(refusal, layout, folders, command, tokens, place)


def layouts(family: Family) -> Iterable[Layout]:
    """The ways in which a row's model is written down."""
    if family.misnamed is None:
        yield TRANSFORMERS
    if family.publishes_otherwise:
        yield HUB
    if family.name == "qwen3_moe":
        yield from EVERY_WAY
    if family.fp8:
        variant = "/" in family.name
        schemes = FP8.get(family.family, (F32_BLOCKS,))
        for scheme in schemes[:2] if variant else schemes:
            yield Layout(f"hub, {scheme.name}", hub=True, scheme=scheme)
    if family.family == "gpt_oss":
        yield Layout(f"hub, {MXFP4.name}", hub=True, scheme=MXFP4)
    if family.family in ("kimi_k2", "kimi_k25"):
        yield Layout(f"hub, {INT4.name}", hub=True, scheme=INT4)
    if family.family == "deepseek_v4":
        yield Layout(f"hub, {FP4_EXPERTS.name}", hub=True, scheme=FP4_EXPERTS)


def refused_layout(family: Family, refusal: Refusal) -> Layout:
    """The layout that a refusal's change is made to: the hub's where there is one."""
    if refusal.fp8:
        scheme = FP8.get(family.family, (F32_BLOCKS,))[0]
        return Layout(f"hub, {scheme.name}", hub=True, scheme=scheme)
    return HUB if family.publishes_otherwise else TRANSFORMERS


def compare_one(
    family: Family, layout: Layout, folders: Folders, command: Command, hidden: torch.Tensor, tokens: Path, place: Path
) -> Iterator[Row]:
    """All runs over one checkpoint."""
    result = place / "output.safetensors"
    fixed = ["--threads", "1"]
    if family.whole_layer:
        done = command.layer(folders.checkpoint, family.layer, tokens, result, fixed)
        named = done.status == 2 and family.family in done.message
        yield Row(family.name, layout.name, "all of it", "refused" if named else "not refused", done.message)
        return
    router = ["--router", "f32"] if "--router" in command.options else []
    exact = run(load(folders.reference, family, torch.float32), family, hidden.float())

    def layer(*options: str) -> Run:
        return command.layer(folders.checkpoint, family.layer, tokens, result, [*fixed, *options])

    # The command's own check sees neither a part that was left out nor a key that was not: it must pass all the same.
    activations = ["--activations", "bf16"] if layout.scheme is not None else []
    done = layer(*router, *activations, "--check")
    yield judge(family, layout, "f32 router", done, exact, exact.whole)
    if done.status != 0:
        return
    if layout.scheme is not None:
        done = layer(*router, "--activations", "e4m3")
        yield judge(family, layout, "f32 router, e4m3 activations", done, exact, exact.whole, e4m3=True)
    if layout == TRANSFORMERS and exact.shared is not None and "--parts" in command.options:
        done = layer(*router, "--parts", "routed")
        yield judge(family, layout, "f32 router, routed alone", done, exact, exact.routed)
        # Without routed experts there is nothing to choose, though a choice may be told.
        done = layer(*router, "--parts", "shared")
        yield judge(family, layout, "f32 router, shared alone", done, exact, exact.shared, routed=False)
    if layout == TRANSFORMERS and family.logits == "bf16" and "--router" in command.options:
        model = load(folders.reference, family, torch.bfloat16)
        rounded = run(model, family, hidden)
        range_ = leeway(model, family, hidden, EXPERTS)
        yield judge(family, layout, "bf16 router", layer("--router", "bf16"), rounded, rounded.whole, range_)


def judge(
    family: Family,
    layout: Layout,
    name: str,
    done: Run,
    expected: Result,
    output: torch.Tensor,
    range_: Leeway | None = None,
    e4m3: bool = False,
    routed: bool = True,
) -> Row:
    """Compares one run with what Transformers' block made of the same tokens."""
    row = Row(family.name, layout.name, name, "right")
    if done.status != 0 or done.output is None or done.ids is None or done.weights is None:
        row.message = done.message
        row.verdict = "refused" if done.status == 2 and may_be_refused(family, layout, done.message) else "not read"
        return row
    parts: tuple[str, ...] = ("routed", "shared") if expected.shared is not None else ("routed",)
    if "alone" in name:
        parts = tuple(part for part in parts if part in name)
    if done.parts is not None and done.parts != parts:
        row.message = f"says that the output holds {done.parts}, expected {parts}"
        row.verdict = "differs"
        return row
    ours = by_expert(done.ids, done.weights, EXPERTS)
    theirs = by_expert(expected.ids, expected.weights, EXPERTS)
    if not routed and not ours.any():
        theirs = ours
    decided = torch.ones(TOKENS, dtype=torch.bool) if range_ is None else range_.decided
    same = ((ours > 0) == (theirs > 0)).all(dim=1) & decided
    row.same, row.decided = int(same.sum()), int(decided.sum())
    if range_ is None:
        row.weights = float(((ours - theirs).abs() / theirs.clamp(min=1e-3)).amax())
        close = row.weights < WEIGHTS
    else:
        beyond = torch.maximum(ours / range_.highest, range_.lowest / ours)[same.unsqueeze(1) & (theirs > 0)]
        row.weights = float((beyond - 1).clamp(min=0).amax())
        close = row.weights < BF16_WEIGHTS * family.roundings
    x, y = done.output.double()[same], output[same]
    products, squares = (x * y).sum(dim=1), (x * x + y * y).sum(dim=1)
    row.whole = float(1 - 2 * products.sum() / squares.sum())
    row.worst_row = float((1 - 2 * products / squares).amax()) if len(products) else float("nan")
    whole, worst_row = (E4M3_WHOLE, E4M3_WORST_ROW) if e4m3 else (WHOLE, WORST_ROW)
    # Comparisons with NaN are false, so that NaN fails.
    right = row.same == row.decided > TOKENS // 2 and close and row.whole < whole and row.worst_row < worst_row
    row.verdict = "right" if right else "differs"
    return row


def may_be_refused(family: Family, layout: Layout, message: str) -> bool:
    """Whether the checkpoint is one that need not be read yet, and the complaint says which kind it is."""
    if family.optional and family.family in message:
        return True
    if layout.scheme is None:
        return False
    # Groups of 128 activations share a scale, so that e4m3 ones need widths that are multiples of it; and a scale that
    # belongs to a row of weights need not have a product of its own.
    if family.intermediate % BLOCK != 0 or layout.scheme.strategy == "channel":
        return "--activations" in message and "bf16" in message
    return layout.scheme.strategy != "block" and layout.scheme.strategy in message


def refuse(refusal: Refusal, layout: Layout, folders: Folders, command: Command, tokens: Path, place: Path) -> Row:
    """Runs a spoilt checkpoint, which must be refused with exit code 2 and a message that names the change."""
    spoilt = place / "spoilt"
    spoil(folders.checkpoint, refusal, spoilt)
    done = command.layer(spoilt, refusal.layer, tokens, place / "output.safetensors", ["--threads", "1"])
    row = Row(refusal.row, layout.name, refusal.name, "refused", done.message)
    if done.status != 2 or not any(name in done.message for name in refusal.named):
        row.verdict = "not refused"
    return row


if __name__ == "__main__":
    sys.exit(main())
