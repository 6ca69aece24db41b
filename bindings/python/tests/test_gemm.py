"""The grouped GEMM alone on CPU tensors: against float64, bit for bit between its lists, and what it refuses."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import expertile  # noqa: E402
import expertile.torch as et  # noqa: E402
from rows_of_experts import Placed, blocks, furthest, poisoned, product, weights_of  # noqa: E402

FORMS = ["bf16", "e4m3"]
COUNTS = [0, 1, 17, 0, 130, 3]
TOLERANCE = 1e-5
"""Of the same operands, all that is left is the order of the sums and one rounding to bfloat16."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), [(8, 128), (200, 256), (136, 640)])
def test_results_are_the_product_and_padding_is_not_written(form, n, k):
    weights, weight_scale = weights_of(form, len(COUNTS), n, k)
    gemm = et.Gemm(weights, weight_scale)
    assert gemm.shape == (len(COUNTS), n, k) and gemm.device.type == "cpu"
    assert gemm.unpack().dtype == weights.dtype and torch.equal(gemm.unpack().float(), weights.float())
    gemm.prepare(4096)
    for alignment in (1, 4, 128):
        placed = Placed(form, COUNTS, k, alignment, more=5)
        expected = product(placed, weights, weight_scale)
        for listed in ("psum", "m_indices"):
            out = poisoned(*expected.shape)
            assert gemm(placed.rows, placed.scale, **placed.listed(listed), out=out) is out
            assert furthest(out[placed.live], expected[placed.live]) < TOLERANCE
            assert torch.all(out[~placed.live] == 123.0)
    gemm.check()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_in_every_place(form):
    n, k = 72, 384
    weights, weight_scale = weights_of(form, len(COUNTS), n, k)
    gemm = et.Gemm(weights, weight_scale)
    placed = Placed(form, COUNTS, k, 8)
    expected = gemm(placed.rows, placed.scale, psum=placed.psum, alignment=8)[placed.live]
    for alignment in (1, 3, 128):
        moved = Placed(form, COUNTS, k, alignment)
        for listed in ("psum", "m_indices"):
            assert torch.equal(gemm(moved.rows, moved.scale, **moved.listed(listed))[moved.live], expected)
    # In any order: an expert has many segments then.
    order = torch.randperm(len(placed.rows), generator=torch.Generator().manual_seed(2))
    rows, scale = placed.rows[order], None if placed.scale is None else placed.scale[order]
    out = torch.empty(len(order), n, dtype=torch.bfloat16)
    out[order] = gemm(rows, scale, m_indices=placed.m_indices[order])
    assert torch.equal(out[placed.live], expected)
    # By itself.
    alone = torch.full_like(placed.m_indices, -1)
    row = placed.rows_of[4][100]
    alone[row] = 4
    assert torch.equal(gemm(placed.rows, placed.scale, m_indices=alone)[row], expected[int(placed.live[:row].sum())])


@pytest.mark.parametrize("form", FORMS)
def test_parts_between_which_a_call_may_be_interrupted_change_nothing(form):
    weights, weight_scale = weights_of(form, len(COUNTS), 40, 256)
    gemm = et.Gemm(weights, weight_scale)
    placed = Placed(form, COUNTS, 256, 8)
    expected = gemm(placed.rows, placed.scale, psum=placed.psum, alignment=8, out=poisoned(len(placed.rows), 40))
    for rows_at_once in (1, 7, 50, 1000):
        for psum, m_indices in ((placed.psum, None), (None, placed.m_indices)):
            out = poisoned(len(placed.rows), 40)
            arguments = placed.rows, placed.scale, psum, m_indices, 8, out
            gemm._native.run(*arguments, rows_at_once=rows_at_once)
            assert torch.equal(out, expected), rows_at_once


def test_strides_of_scales_change_nothing():
    weights, weight_scale = weights_of("e4m3", 3, 64, 256)
    gemm = et.Gemm(weights, weight_scale)
    placed = Placed("e4m3", [3, 9, 5], 256, 4)
    expected = gemm(placed.rows, placed.scale, psum=placed.psum, alignment=4)
    m_sum, groups = placed.scale.shape
    mn_major = torch.empty_strided((m_sum, groups), (1, -(-m_sum // 4) * 4)).copy_(placed.scale)
    apart = torch.full((m_sum, 3 * groups), float("nan"))[:, ::3].copy_(placed.scale)
    for scale in (mn_major, apart):
        assert scale.stride() != placed.scale.stride()
        again = gemm(placed.rows, scale, psum=placed.psum, alignment=4)
        assert torch.equal(again[placed.live], expected[placed.live])


def test_bfloat16_rows_go_with_either_kind_of_weights_on_the_cpu():
    weights, weight_scale = weights_of("e4m3", 3, 64, 256)
    placed = Placed("bf16", [3, 9, 5], 256, 4)
    out = et.Gemm(weights, weight_scale)(placed.rows, psum=placed.psum, alignment=4)
    assert furthest(out[placed.live], product(placed, weights, weight_scale)[placed.live]) < TOLERANCE


def test_the_operator_can_be_compiled_and_counts_its_writes():
    weights, _ = weights_of("bf16", 3, 64, 128)
    gemm = et.Gemm(weights)
    placed = Placed("bf16", [3, 9, 5], 128, 4)

    @torch.compile(fullgraph=True, backend="eager")
    def twice(rows, psum):
        return gemm(rows, psum=psum, alignment=4) * 2

    expected = gemm(placed.rows, psum=placed.psum, alignment=4)
    assert torch.equal(twice(placed.rows, placed.psum)[placed.live], 2 * expected[placed.live])
    out = torch.empty_like(expected)
    version = out._version
    gemm(placed.rows, psum=placed.psum, alignment=4, out=out)
    assert out._version > version


def test_no_rows_and_no_live_rows_are_calls_too():
    weights, _ = weights_of("bf16", 2, 16, 32)
    gemm = et.Gemm(weights)
    empty = torch.empty(0, 32, dtype=torch.bfloat16)
    assert gemm(empty, m_indices=torch.empty(0, dtype=torch.int32)).shape == (0, 16)
    assert gemm(empty, psum=torch.zeros(2, dtype=torch.int32)).shape == (0, 16)
    out = poisoned(7, 16)
    gemm(empty.new_zeros(7, 32), m_indices=torch.full((7,), -3, dtype=torch.int32), out=out)
    assert torch.all(out == 123.0)


def test_the_pages_examples_run():
    page = (Path(__file__).parents[3] / "docs" / "python.md").read_text()
    section = page.split("## The grouped GEMM alone")[1].split("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "python.md", "exec"), {})


def refused(error, call, **changed):
    """The message of the error that a call raises, which has written nothing."""
    with pytest.raises(error) as found:
        call(**changed)
    assert isinstance(found.value, expertile.ArgumentError)
    return str(found.value)


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(form):
    experts, n, k = 3, 40, 256
    weights, weight_scale = weights_of(form, experts, n, k)
    gemm = et.Gemm(weights, weight_scale)
    placed = Placed(form, [3, 9, 5], k, 4)
    m_sum = len(placed.rows)
    out = poisoned(m_sum, n)
    int32 = {"dtype": torch.int32}

    def call(**changed):
        return gemm(
            **({"rows": placed.rows, "scale": placed.scale, "psum": placed.psum, "alignment": 4, "out": out} | changed)
        )

    def listed(m_indices):
        return {"psum": None, "m_indices": m_indices}

    bad_end, late, bad_id = placed.psum.clone(), placed.psum.clone(), placed.m_indices.clone()
    bad_end[1], late[2], bad_id[5] = 2, m_sum + 1, experts
    cases = [
        (ValueError, {"rows": placed.rows[:, :128]}, f"rows has shape [{m_sum}, 128], expected [{m_sum}, {k}]"),
        (ValueError, {"rows": placed.rows[0]}, "rows has shape [256], expected two dimensions"),
        (TypeError, {"rows": placed.rows.float()}, "rows has dtype torch.float32, expected bfloat16 or float8_e4m3fn"),
        (ValueError, {"rows": placed.rows.t().contiguous().t()}, "rows has strides"),
        (ValueError, {"psum": None}, "psum is None, expected one of psum and m_indices"),
        (ValueError, {"m_indices": placed.m_indices}, "psum is given beside m_indices, expected none"),
        (TypeError, {"psum": placed.psum.long()}, "psum has dtype torch.int64, expected i32"),
        (ValueError, {"psum": placed.psum[:2]}, "psum has shape [2], expected [3]"),
        (ValueError, {"psum": bad_end}, "psum[1] is 2, expected at least 4, the start"),
        (ValueError, {"psum": late}, f"psum[2] is {m_sum + 1}, expected at most {m_sum}"),
        (ValueError, {"psum": -placed.psum}, "psum[0] is -3, expected at least 0"),
        (ValueError, {"alignment": 0}, "alignment is 0"),
        (ValueError, {"alignment": -4}, "alignment is -4"),
        (TypeError, listed(placed.m_indices.float()), "m_indices has dtype torch.float32, expected i32"),
        (ValueError, listed(placed.m_indices[1:]), f"m_indices has shape [{m_sum - 1}], expected [{m_sum}]"),
        (ValueError, listed(bad_id), f"m_indices[5] is {experts}, expected a local expert below {experts}"),
        (ValueError, listed(torch.zeros(m_sum, 1, **int32)), f"m_indices has shape [{m_sum}, 1]"),
        (ValueError, {"out": poisoned(m_sum, n + 1)}, f"out has shape [{m_sum}, {n + 1}], expected [{m_sum}, {n}]"),
        (TypeError, {"out": out.float()}, "out has dtype torch.float32, expected bfloat16"),
        (ValueError, {"out": poisoned(n, m_sum).t()}, "out has strides"),
        (TypeError, {"rows": None}, "rows is a NoneType, expected a torch tensor"),
    ]
    if form == "bf16":
        cases += [(ValueError, {"scale": torch.ones(m_sum, 2)}, "scale is given, expected none for bfloat16 rows")]
        memory = placed.rows[:, :n]
        cases += [(ValueError, {"out": memory.as_strided((m_sum, n), (n, 1))}, "out shares memory with rows")]
    else:
        cases += [
            (ValueError, {"scale": None}, "scale is None, expected scales for float8_e4m3fn rows"),
            (ValueError, {"scale": placed.scale[:, :1]}, f"scale has shape [{m_sum}, 1], expected [{m_sum}, 2]"),
            (TypeError, {"scale": placed.scale.int()}, "scale has dtype torch.int32, expected f32"),
        ]
    for error, changed, start in cases:
        message = refused(error, call, **changed)
        assert message.startswith(start), (message, start)
        assert torch.all(out == 123.0), changed
    call()


def test_weights_that_do_not_fit_are_refused():
    bf16, _ = weights_of("bf16", 2, 16, 32)
    e4m3, scale = weights_of("e4m3", 2, 16, 256)
    cases = [
        (ValueError, (bf16, torch.ones(2, 1, 1)), "weight_scale is given, expected none for bfloat16 weights"),
        (ValueError, (e4m3, None), "weight_scale is None, expected block scales for float8_e4m3fn weights"),
        (ValueError, (e4m3, scale[:1]), "weight_scale has shape [1, 1, 2], expected [2, 1, 2]"),
        (ValueError, (bf16[0], None), "weights has shape [16, 32], expected [E, N, K]"),
        (TypeError, (bf16.float(), None), "weights has dtype torch.float32, expected bfloat16, float8_e4m3fn or uint8"),
        (ValueError, (bf16[:0], None), "experts is 0"),
        (TypeError, (None, None), "weights is a"),
    ]
    for error, arguments, start in cases:
        message = refused(error, lambda arguments=arguments: et.Gemm(*arguments))
        assert message.startswith(start), (message, start)
    message = refused(ValueError, lambda: et.Gemm(bf16, activations="int8"))
    assert message == 'activations is "int8", expected one of bf16, e4m3'
    assert blocks(256) == 2
    bf16_only = Placed("e4m3", [1, 2], 32, 1)
    message = refused(
        ValueError, lambda: et.Gemm(bf16)(bf16_only.rows, bf16_only.scale, psum=bf16_only.psum, alignment=1)
    )
    assert message.startswith("weights is packed as bf16, expected e4m3"), message
