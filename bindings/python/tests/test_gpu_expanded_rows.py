"""The experts alone on CUDA tensors, on rows that a dispatcher has expanded: the CPU's values, the layer's bits,
graphs, and what is refused. Skips without a Hopper GPU."""

import pytest

torch = pytest.importorskip("torch")

import expertile.torch as et  # noqa: E402
from on_gpu import captured, no_hopper  # noqa: E402
from rows_of_experts import LAYER_TOLERANCE, Placed, furthest, layer_weights_of, poisoned  # noqa: E402

pytestmark = pytest.mark.skipif(no_hopper() is not None, reason=str(no_hopper()))

COUNTS = [0, 1, 17, 0, 40, 3]
HIDDEN, INTERMEDIATE = 384, 128


def weights_of(form):
    return layer_weights_of(form, len(COUNTS), HIDDEN, INTERMEDIATE)


def layer_of(form):
    layer = et.Layer(**{name: x.cuda() for name, x in weights_of(form).items()})
    layer.prepare_expanded(2000)
    return layer


@pytest.mark.parametrize(("form", "came"), [("bf16", "bf16"), ("e4m3", "bf16"), ("e4m3", "e4m3")])
def test_rows_are_those_of_the_cpu_and_padding_is_not_written(form, came):
    on_cpu, layer = et.Layer(**weights_of(form), activations=form), layer_of(form)
    for alignment in (1, 8, 128):
        placed = Placed(came, COUNTS, HIDDEN, alignment)
        expected = on_cpu.run_expanded(placed.rows, placed.psum, scale=placed.scale, alignment=alignment)
        placed = placed.to("cuda")
        live = placed.live
        for expected_rows in (None, 1, 2000):
            out = poisoned(len(placed.rows), HIDDEN, "cuda")
            options = {"scale": placed.scale, "alignment": alignment, "expected_rows": expected_rows}
            assert layer.run_expanded(placed.rows, placed.psum, out=out, **options) is out
            layer.check()
            assert furthest(out[live], expected[live.cpu()]) < LAYER_TOLERANCE[form]
            assert torch.all(out[~live] == 123.0)


@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_a_row_has_the_bits_that_the_layer_gives_it_and_a_graph_replays_it(form):
    layer = layer_of(form)
    layer.prepare(100, 1)
    placed = Placed("bf16", COUNTS, HIDDEN, 8).to("cuda")
    tokens, ids = placed.rows[placed.live], placed.m_indices[placed.live][:, None]
    expected = layer(tokens, ids, torch.ones(len(tokens), 1, device="cuda"))
    out = poisoned(len(placed.rows), HIDDEN, "cuda")
    graph, _ = captured(lambda: layer.run_expanded(placed.rows, placed.psum, alignment=8, out=out))
    for _ in range(3):
        out.fill_(123.0)
        graph.replay()
        assert torch.equal(out[placed.live], expected)
        assert torch.all(out[~placed.live] == 123.0)
    layer.check()


def test_what_does_not_fit_is_refused():
    layer = et.Layer(**{name: x.cuda() for name, x in weights_of("bf16").items()})
    placed = Placed("bf16", COUNTS, HIDDEN, 8).to("cuda")
    with pytest.raises(ValueError, match=r"prepare_expanded\(max_rows\) to have been called"):
        layer.run_expanded(placed.rows, placed.psum, alignment=8)
    layer.prepare_expanded(8)
    with pytest.raises(ValueError, match=r"at most 8, as prepare_expanded\(\) was told"):
        layer.run_expanded(placed.rows, placed.psum, alignment=8)
    layer.prepare_expanded(2000)
    with pytest.raises(ValueError, match="expected a multiple of the alignment 8"):
        layer.run_expanded(placed.rows[:-1], placed.psum, alignment=8)
    with pytest.raises(ValueError, match="cpu|CPU"):
        layer.run_expanded(placed.rows, placed.psum.cpu(), alignment=8)
    layer.run_expanded(placed.rows, placed.psum + 1000, alignment=8)
    with pytest.raises(ValueError, match="psum"):
        layer.check()
    layer.check()
