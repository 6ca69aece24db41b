"""The experts alone on CPU tensors, on rows that a dispatcher has expanded: against float64, bit for bit as the layer
gives them, and what is refused."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402
from rows_of_experts import LAYER_TOLERANCE, Placed, furthest, layer_weights_of, poisoned, widened  # noqa: E402

COUNTS = [0, 1, 17, 0, 40, 3]
HIDDEN, INTERMEDIATE = 384, 128


def weights_of(form):
    return layer_weights_of(form, len(COUNTS), HIDDEN, INTERMEDIATE)


def by_definition(placed, parts):
    """``[M_sum, H]`` in float64, zero on padding."""
    rows = widened(placed.rows, placed.scale, 1)
    w13, w2 = (widened(parts[name], parts.get(f"{name}_scale"), 128) for name in ("w13", "w2"))
    out = torch.zeros(len(rows), HIDDEN, dtype=torch.float64)
    for row in placed.live.nonzero().flatten().tolist():
        expert = placed.m_indices[row]
        gate, up = (w13[expert] @ rows[row]).chunk(2)
        out[row] = w2[expert] @ (torch.nn.functional.silu(gate) * up)
    return out


@pytest.mark.parametrize(("form", "came"), [("bf16", "bf16"), ("e4m3", "bf16"), ("e4m3", "e4m3")])
def test_rows_are_the_definition_and_padding_is_not_written(form, came):
    parts = weights_of(form)
    layer = et.Layer(**parts, activations=form)
    layer.prepare_expanded(1000)
    for alignment in (1, 8, 128):
        placed = Placed(came, COUNTS, HIDDEN, alignment)
        out = poisoned(len(placed.rows), HIDDEN)
        given = layer.run_expanded(placed.rows, placed.psum, scale=placed.scale, alignment=alignment, out=out)
        assert given is out
        assert furthest(out[placed.live], by_definition(placed, parts)[placed.live]) < LAYER_TOLERANCE[form]
        assert torch.all(out[~placed.live] == 123.0)
        made = layer.run_expanded(placed.rows, placed.psum, scale=placed.scale, alignment=alignment)
        assert torch.equal(made[placed.live], out[placed.live])
    layer.check()


@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_a_row_has_the_bits_that_the_layer_gives_it(form):
    layer = et.Layer(**weights_of(form), activations=form)
    placed = Placed("bf16", COUNTS, HIDDEN, 8)
    out = layer.run_expanded(placed.rows, placed.psum, alignment=8)[placed.live]
    # One slot to a token, whose weight is one.
    tokens, ids = placed.rows[placed.live], placed.m_indices[placed.live][:, None]
    ones = torch.ones(len(tokens), 1)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    expected = layer(tokens[order], ids[order], ones)
    assert torch.equal(out[order], expected)


def test_parts_between_which_a_call_may_be_interrupted_and_strides_of_scales_change_nothing():
    layer = et.Layer(**weights_of("e4m3"), activations="e4m3")
    for came in ("bf16", "e4m3"):
        placed = Placed(came, COUNTS, HIDDEN, 8)
        expected = poisoned(len(placed.rows), HIDDEN)
        layer.run_expanded(placed.rows, placed.psum, scale=placed.scale, alignment=8, out=expected)
        columns = None if placed.scale is None else placed.scale.T.contiguous().T
        for rows_at_once in (1, 18, 41, 1000):
            out = poisoned(len(placed.rows), HIDDEN)
            layer._native.run_expanded(placed.rows, columns, placed.psum, 8, out, rows_at_once=rows_at_once)
            assert torch.equal(out, expected), (came, rows_at_once)


def test_no_rows_at_all_and_experts_without_any():
    layer = et.Layer(**weights_of("bf16"))
    none = torch.zeros(len(COUNTS), dtype=torch.int32)
    assert layer.run_expanded(torch.empty(0, HIDDEN, dtype=torch.bfloat16), none).shape == (0, HIDDEN)
    out = poisoned(16, HIDDEN)
    nan = torch.full((16, HIDDEN), float("nan"), dtype=torch.bfloat16)
    assert torch.all(layer.run_expanded(nan, none, alignment=8, out=out) == 123.0)


def test_compiled_code_calls_it():
    layer = et.Layer(**weights_of("bf16"))
    placed = Placed("bf16", COUNTS, HIDDEN, 8)

    @torch.compile(fullgraph=True)
    def twice(rows, psum):
        return layer.run_expanded(rows, psum, alignment=8) * 2

    expected = layer.run_expanded(placed.rows, placed.psum, alignment=8)[placed.live] * 2
    assert torch.equal(twice(placed.rows, placed.psum)[placed.live], expected)


BAD = [
    ({"rows": lambda x: x[:, :-1].contiguous()}, ValueError, r"rows has shape \[.*, 383\], expected \[.*, 384\]"),
    ({"rows": lambda x: x.float()}, TypeError, "rows has dtype torch.float32, expected bfloat16 or float8_e4m3fn"),
    ({"rows": lambda x: x[:-1], "out": lambda x: x[:-1]}, ValueError, "m_sum is 79, expected a multiple of the"),
    ({"psum": lambda x: x[:-1]}, ValueError, r"psum has shape \[5\], expected \[6\]"),
    ({"psum": lambda x: x.long()}, TypeError, "psum has dtype torch.int64, expected i32"),
    ({"psum": lambda x: x - 1}, ValueError, r"psum\[0\] is -1, expected at least 0"),
    ({"psum": lambda x: x + 1000}, ValueError, "m_sum is 80, expected at least 1000"),
    ({"alignment": lambda x: 0}, ValueError, "alignment is 0"),
    ({"scale": lambda x: torch.ones(8, 3)}, ValueError, "scale is given, expected none for bfloat16 rows"),
    ({"out": lambda x: poisoned(8, HIDDEN)}, ValueError, r"out has shape \[8, 384\]"),
    ({"out": lambda x: torch.full((80, HIDDEN), 123.0)}, TypeError, "out has dtype torch.float32, expected bfloat16"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_written(change, kind, message):
    layer = et.Layer(**weights_of("bf16"))
    placed = Placed("bf16", COUNTS, HIDDEN, 8)
    arguments = {"rows": placed.rows, "psum": placed.psum, "alignment": 8, "scale": None}
    arguments["out"] = poisoned(len(placed.rows), HIDDEN)
    for name, new in change.items():
        arguments[name] = new(arguments[name])
    with pytest.raises(kind, match=message):
        layer.run_expanded(**arguments)
    assert torch.all(arguments["out"] == 123.0)


def test_e4m3_rows_are_refused_where_activations_are_bf16():
    layer = et.Layer(**weights_of("e4m3"), activations="bf16")
    placed = Placed("e4m3", COUNTS, HIDDEN, 8)
    with pytest.raises(TypeError, match="rows has dtype torch.float8_e4m3fn, expected bfloat16, for a layer of bf16"):
        layer.run_expanded(placed.rows, placed.psum, scale=placed.scale, alignment=8)


def test_the_pages_example_runs():
    page = (Path(__file__).parents[3] / "docs" / "python.md").read_text()
    section = page.split("## Rows that a dispatcher has expanded")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(example, "python.md", "exec"), {})
