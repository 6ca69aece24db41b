"""`expertile.deep_gemm` on CPU tensors: DeepGEMM's arguments, what is refused, and whose packed weights are used."""

import gc
import inspect

import pytest

torch = pytest.importorskip("torch")

import expertile  # noqa: E402
import expertile.torch as et  # noqa: E402
from expertile import deep_gemm  # noqa: E402
from rows_of_experts import Placed, furthest, poisoned, product, weights_of  # noqa: E402

COUNTS = [2, 0, 130, 7]
N, K = 40, 256


@pytest.fixture(autouse=True)
def nothing_packed():
    deep_gemm.forget()
    yield
    deep_gemm.forget()


def operands(form, alignment=128, seed=0):
    weights, weight_scale = weights_of(form, len(COUNTS), N, K, seed)
    placed = Placed(form, COUNTS, K, alignment)
    return placed, weights, weight_scale


def call(form, placed, weights, weight_scale, d, layout, **options):
    if form == "bf16":
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(placed.rows, weights, d, layout, **options)
    else:
        a, b = (placed.rows, placed.scale), (weights, weight_scale)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, layout, **options)


def test_names_order_and_defaults_are_those_of_deep_gemm_2_8():
    parameters = inspect.signature(deep_gemm.m_grouped_fp8_gemm_nt_contiguous).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "recipe": None,
        "recipe_a": None,
        "recipe_b": None,
        "compiled_dims": "nk",
        "disable_ue8m0_cast": False,
        "use_psum_layout": False,
        "ensure_zero_padding": True,
        "expected_m_for_psum_layout": None,
        "epilogue": None,
    }
    assert list(parameters)[:5] == ["a", "b", "d", "grouped_layout", "recipe"]
    parameters = inspect.signature(deep_gemm.m_grouped_bf16_gemm_nt_contiguous).parameters
    assert list(parameters) == [
        *("a", "b", "d", "grouped_layout", "compiled_dims", "use_psum_layout"),
        *("ensure_zero_padding", "expected_m_for_psum_layout", "epilogue"),
    ]


@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_both_layouts_give_the_product_and_the_same_bits(form):
    placed, weights, weight_scale = operands(form)
    expected = product(placed, weights, weight_scale)
    d, again = poisoned(*expected.shape), poisoned(*expected.shape)
    call(form, placed, weights, weight_scale, d, placed.m_indices)
    assert furthest(d[placed.live], expected[placed.live]) < 1e-5
    assert torch.all(d[~placed.live] == 123.0)
    call(form, placed, weights, weight_scale, again, placed.psum, use_psum_layout=True, expected_m_for_psum_layout=9)
    assert torch.equal(d, again)
    # As vLLM calls it, and with what chooses a kernel only.
    options = {"compiled_dims": "mnk", "ensure_zero_padding": False}
    if form == "e4m3":
        options |= {"disable_ue8m0_cast": True, "recipe_a": (1, 128), "recipe_b": [128, 128]}
        call(form, placed, weights, weight_scale, again, placed.m_indices, recipe=(1, 128, 128))
    call(form, placed, weights, weight_scale, again, placed.m_indices, **options)
    assert torch.equal(d, again)


def test_segments_of_a_psum_start_on_multiples_of_the_alignment_in_force():
    placed, weights, _ = operands("bf16", alignment=16)
    expected = product(placed, weights, None)
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    deep_gemm.set_mk_alignment_for_contiguous_layout(16)
    try:
        d = poisoned(*expected.shape)
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(placed.rows, weights, d, placed.psum, use_psum_layout=True)
        assert furthest(d[placed.live], expected[placed.live]) < 1e-5
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)


def test_strides_that_deep_gemm_takes_change_nothing():
    placed, weights, weight_scale = operands("e4m3")
    m_sum = len(placed.rows)
    expected = poisoned(m_sum, N)
    call("e4m3", placed, weights, weight_scale, expected, placed.m_indices)
    # Rows and results in wider matrices, scales column by column.
    placed.rows = torch.cat([placed.rows.view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)[:, :K]
    placed.scale = torch.empty_strided(placed.scale.shape, (1, m_sum)).copy_(placed.scale)
    weight_scale = weight_scale.mT.contiguous().mT
    wide = poisoned(m_sum, 2 * N)
    call("e4m3", placed, weights, weight_scale, wide[:, N:], placed.m_indices)
    assert torch.equal(wide[:, N:], expected) and torch.all(wide[:, :N] == 123.0)


def multiplied(weights, placed):
    d = poisoned(len(placed.rows), weights.shape[1])
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(placed.rows, weights, d, placed.m_indices)
    return d


def of_gemm(weights, placed):
    return et.Gemm(weights)(placed.rows, m_indices=placed.m_indices, out=poisoned(len(placed.rows), weights.shape[1]))


def packed():
    return len(deep_gemm._packed)


def test_weights_are_packed_once_and_not_kept_alive(monkeypatch):
    placed, weights, _ = operands("bf16")
    made = []
    pack = deep_gemm._pack
    monkeypatch.setattr(deep_gemm, "_pack", lambda *arguments: made.append(1) or pack(*arguments))
    multiplied(weights, placed)
    # The same memory by other tensors of the same shape.
    for same in (weights, weights.view(weights.shape), weights.detach(), torch.nn.Parameter(weights, False)):
        multiplied(same, placed)
    assert len(made) == 1 and packed() == 1
    storage = torch.multiprocessing.reductions.StorageWeakRef(weights.untyped_storage())
    del weights, same
    gc.collect()
    assert storage.expired() and packed() == 0


def test_memory_that_is_used_again_is_not_taken_for_the_weights_that_were_there():
    """New weights at the address of old ones: of the same shape, written by nobody that torch counts."""
    placed, weights, _ = operands("bf16")
    memory = bytearray(weights.numel() * 2)
    results = []
    for seed in range(4):
        fresh, _ = weights_of("bf16", len(COUNTS), N, K, seed)
        memory[:] = fresh.view(torch.uint8).numpy().tobytes()
        # Tensors over one piece of memory, one after the other: each has a storage of its own at the same address.
        reused = torch.frombuffer(memory, dtype=torch.bfloat16).view(fresh.shape)
        results.append((reused.data_ptr(), multiplied(reused, placed), of_gemm(fresh, placed)))
        del reused
    assert len({address for address, _, _ in results}) == 1
    assert all(torch.equal(mine, expected) for _, mine, expected in results)
    assert packed() <= 1


def test_the_allocators_memory_may_come_back_with_other_weights():
    placed, _, _ = operands("bf16")
    addresses = set()
    for seed in range(20):
        weights, _ = weights_of("bf16", len(COUNTS), N, K, seed)
        addresses.add(weights.data_ptr())
        assert torch.equal(multiplied(weights, placed), of_gemm(weights, placed))
    print(f"{len(addresses)} addresses of 20 tensors")
    assert packed() <= 2


def test_weights_that_were_written_are_packed_anew_and_the_old_ones_dropped():
    placed, weights, _ = operands("bf16")
    multiplied(weights, placed)
    weights.mul_(2)
    assert torch.equal(multiplied(weights, placed), of_gemm(weights, placed))
    weights[2, 5].zero_()
    assert torch.equal(multiplied(weights, placed), of_gemm(weights, placed))
    assert packed() == 1


def test_a_parameter_whose_data_was_replaced_is_packed_anew():
    placed, weights, _ = operands("bf16")
    parameter = torch.nn.Parameter(weights, requires_grad=False)
    before = multiplied(parameter, placed)
    parameter.data = (weights * 3).bfloat16()
    after = multiplied(parameter, placed)
    assert torch.equal(after, of_gemm(parameter.data, placed)) and not torch.equal(before, after)


def test_writes_that_torch_does_not_count_need_forget():
    placed, weights, _ = operands("bf16")
    multiplied(weights, placed)
    weights.data.mul_(2)
    deep_gemm.forget()
    assert torch.equal(multiplied(weights, placed), of_gemm(weights, placed))


def test_inference_tensors_are_packed_by_each_call():
    placed, weights, _ = operands("bf16")
    with torch.inference_mode():
        weights = weights.clone()
        for _ in range(2):
            assert torch.equal(multiplied(weights, placed), of_gemm(weights, placed))
            weights.mul_(2)
    assert packed() == 0


def test_scales_are_part_of_what_weights_are():
    placed, weights, weight_scale = operands("e4m3")
    first, second = poisoned(len(placed.rows), N), poisoned(len(placed.rows), N)
    call("e4m3", placed, weights, weight_scale, first, placed.m_indices)
    weight_scale.mul_(2)
    call("e4m3", placed, weights, weight_scale, second, placed.m_indices)
    assert torch.equal(second[placed.live], first[placed.live] * 2) and packed() == 1


def test_prepare_packs_and_check_has_nothing_to_say():
    placed, weights, weight_scale = operands("e4m3")
    deep_gemm.prepare((weights, weight_scale), 1024)
    assert packed() == 1
    call("e4m3", placed, weights, weight_scale, poisoned(len(placed.rows), N), placed.m_indices)
    assert packed() == 1
    deep_gemm.check()


def test_weights_of_other_strides_are_packed_to_the_same():
    placed, weights, weight_scale = operands("e4m3")
    expected, found = poisoned(len(placed.rows), N), poisoned(len(placed.rows), N)
    call("e4m3", placed, weights, weight_scale, expected, placed.m_indices)
    call("e4m3", placed, weights.mT.contiguous().mT, weight_scale, found, placed.m_indices)
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused_by_deep_gemms_names():
    placed, weights, weight_scale = operands("e4m3")
    a, b, layout = (placed.rows, placed.scale), (weights, weight_scale), placed.m_indices
    m_sum = len(placed.rows)
    d = poisoned(m_sum, N)
    packed_scale = placed.scale.int()
    cases = [
        (TypeError, {"a": placed.rows}, "a is a Tensor, expected a pair of values and scales"),
        (TypeError, {"b": (weights,)}, "b is a tuple, expected a pair of values and scales"),
        (TypeError, {"b": (weights, None)}, "b[1] is a NoneType, expected a torch tensor"),
        (
            TypeError,
            {"a": (placed.rows.bfloat16(), placed.scale)},
            "a[0] has dtype torch.bfloat16, expected float8_e4m3fn",
        ),
        (TypeError, {"b": (weights.view(torch.uint8), weight_scale)}, "b[0] has dtype torch.uint8, expected float8"),
        (TypeError, {"a": (placed.rows, packed_scale)}, "a[1] has dtype torch.int32, expected f32"),
        (ValueError, {"a": (placed.rows, placed.scale[:, :1])}, f"a[1] has shape [{m_sum}, 1], expected [{m_sum}, 2]"),
        (ValueError, {"b": (weights, weight_scale[:, :, :1])}, "b[1] has shape [4, 1, 1], expected [4, 1, 2]"),
        (ValueError, {"b": (weights[0], weight_scale[0])}, "b[0] has shape [40, 256], expected [E, N, K]"),
        (ValueError, {"a": (placed.rows[0], placed.scale)}, "a[0] has shape [256], expected two dimensions"),
        (ValueError, {"d": d[:, 1:]}, f"d has shape [{m_sum}, {N - 1}], expected [{m_sum}, {N}]"),
        (TypeError, {"d": d.float()}, "d has dtype torch.float32, expected bfloat16"),
        (TypeError, {"grouped_layout": layout.long()}, "grouped_layout has dtype torch.int64, expected i32"),
        (ValueError, {"grouped_layout": layout[1:]}, f"grouped_layout has shape [{m_sum - 1}], expected [{m_sum}]"),
        (ValueError, {"grouped_layout": layout + 1}, "grouped_layout[384] is 4"),
        (ValueError, {"use_psum_layout": True}, f"grouped_layout has shape [{m_sum}], expected [4]"),
        (ValueError, {"recipe": (1, 1, 128)}, "recipe is (1, 1, 128), expected (1, 128, 128)"),
        (ValueError, {"recipe": 3}, "recipe is 3, expected (1, 128, 128)"),
        (ValueError, {"recipe_a": (1, 128)}, "recipe_b is None beside recipe_a, expected both or neither"),
        (ValueError, {"recipe_a": (1, 32), "recipe_b": (128, 128)}, "recipe_a is (1, 32), expected (1, 128)"),
        (ValueError, {"recipe_a": (1, 128), "recipe_b": (1, 32)}, "recipe_b is (1, 32), expected (128, 128)"),
        (
            ValueError,
            {"recipe": (1, 128, 128), "recipe_a": (1, 128), "recipe_b": (128, 128)},
            "recipe is (1, 128, 128) beside recipe_a, expected None",
        ),
        (ValueError, {"expected_m_for_psum_layout": 4}, "expected_m_for_psum_layout is 4, expected None without"),
        (ValueError, {"epilogue": "silu"}, "epilogue is silu, expected None"),
    ]
    for error, changed, start in cases:
        with pytest.raises(error) as found:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(**({"a": a, "b": b, "d": d, "grouped_layout": layout} | changed))
        assert isinstance(found.value, expertile.ArgumentError)
        assert str(found.value).startswith(start), (str(found.value), start)
        assert torch.all(d == 123.0), changed
    with pytest.raises(TypeError, match="b has dtype torch.float32, expected bfloat16"):
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(placed.rows.bfloat16(), weights.float(), d, layout)
