"""vLLM's functions on torch tensors and NumPy arrays, against the definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from expertile import deep_gemm_utils

try:
    import torch
except ImportError:
    torch = None

KINDS = ["numpy"] + (["torch"] if torch else [])


def as_kind(kind, array):
    """The array, as a tensor if asked; strides are kept."""
    return array if kind == "numpy" or array is None else torch.from_numpy(array)


def as_numpy(array):
    return array if isinstance(array, np.ndarray) else array.numpy()


@st.composite
def routings(draw):
    """ids, map or None, local experts: any counts, empty slots, i32 and i64, any strides."""
    tokens, topk = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    experts = draw(st.sampled_from([1, 2, 3, 8, 33]))
    expert_map = None
    limit = experts
    if draw(st.booleans()):
        limit = experts * draw(st.integers(1, 3))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        expert_map = np.full(limit, -1, dtype=np.int32)
        expert_map[rng.permutation(limit)[:experts]] = np.arange(experts)
    kind = draw(st.sampled_from(["uniform", "one expert", "all empty", "mixed"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.integers(0, limit, (tokens, topk))
    if kind == "one expert":
        ids[:] = rng.integers(0, limit)
    elif kind == "all empty":
        ids[:] = -1
    elif kind == "mixed":
        ids[rng.random(ids.shape) < 0.3] = draw(st.sampled_from([-1, -2, -1000]))
    ids = ids.astype(draw(st.sampled_from([np.int32, np.int64])))
    return strided(draw, ids), expert_map, experts


def strided(draw, array):
    """The same values, perhaps with other strides."""
    how = draw(st.sampled_from(["as it is", "transposed", "every second row", "wider rows"]))
    if how == "transposed":
        return np.ascontiguousarray(array.T).T
    if how == "every second row":
        wide = np.zeros((2 * array.shape[0], array.shape[1]), array.dtype)
        wide[::2] = array
        return wide[::2]
    if how == "wider rows":
        wide = np.zeros((array.shape[0], array.shape[1] + 3), array.dtype)
        wide[:, : array.shape[1]] = array
        return wide[:, : array.shape[1]]
    return array


@given(st.data(), routings(), st.sampled_from([1, 2, 7, 16, 128]), st.sampled_from([128, 256, 640]))
@settings(max_examples=150, deadline=None)
def test_a_permute_is_the_definition_byte_for_byte(data, routing, alignment, hidden):
    ids, expert_map, experts = routing
    kind = data.draw(st.sampled_from(KINDS))
    packed, psum, own_out = (data.draw(st.booleans()) for _ in range(3))
    group = data.draw(st.sampled_from([32, 128]))
    tokens, topk = ids.shape
    rng = np.random.default_rng(tokens)
    x = strided(data.draw, rng.integers(0, 256, (tokens, hidden), dtype=np.uint8))
    scales_in = rng.integers(0, 256, (tokens, hidden // group), dtype=np.uint8)
    scales_in = strided(data.draw, scales_in if packed else scales_in.astype(np.float32) + 0.5)
    counts = oracle.count(ids, experts, expert_map)
    meta = None
    if data.draw(st.booleans()):
        kind_of = as_kind(kind, counts)
        meta = deep_gemm_utils.ExpertTokensMetadata(kind_of, kind_of)
    with deep_gemm_utils.mk_alignment_scope(alignment):
        m_sum, used = deep_gemm_utils.compute_aligned_M_and_alignment(tokens, topk, experts, alignment, meta)
        out = as_kind(kind, np.full((m_sum, hidden), 0xA5, dtype=np.uint8)) if own_out else None
        rows, scales, layout, inv_perm, reported = deep_gemm_utils.deepgemm_moe_permute(
            *(as_kind(kind, array) for array in (x, scales_in, ids)),
            experts,
            as_kind(kind, expert_map),
            meta,
            aq_out=out,
            block_size=group,
            use_psum_layout=psum,
        )
    assert reported == used == alignment
    if own_out:
        assert rows is out
    if meta is None:
        assert m_sum == oracle.reference_bound(tokens, topk, experts, alignment)
    _, _, ends, m_indices, expected_inv = oracle.layout(ids, experts, alignment, m_sum, expert_map)
    np.testing.assert_array_equal(as_numpy(layout), ends if psum else m_indices)
    np.testing.assert_array_equal(as_numpy(inv_perm), expected_inv)
    live = m_indices >= 0
    expected = oracle.permute(x, expected_inv, m_sum, 0xA5)
    chosen = slice(None) if own_out else live
    np.testing.assert_array_equal(as_numpy(rows)[chosen], expected[chosen])
    expected_scales = oracle.permute(oracle.pack_ue8m0(scales_in) if packed else scales_in, expected_inv, m_sum, 0)
    np.testing.assert_array_equal(as_numpy(scales), expected_scales)
    if packed:
        strides = tuple(stride // 4 for stride in as_numpy(scales).strides)
        columns = expected_scales.shape[1]
        assert m_sum <= 1 or columns <= 1 or strides == (1, oracle.round_up(m_sum, 4))


@given(st.data(), routings(), st.sampled_from([1, 3, 64, 2880]))
@settings(max_examples=100, deadline=None)
def test_a_reduce_is_the_definition_bit_for_bit(data, routing, hidden):
    ids, expert_map, experts = routing
    kind = data.draw(st.sampled_from(KINDS))
    dtype = data.draw(st.sampled_from([np.float32, np.float16]))
    tokens, topk = ids.shape
    rng = np.random.default_rng(tokens)
    m_sum = oracle.reference_bound(tokens, topk, experts, 4)
    inv_perm = oracle.layout(ids, experts, 4, m_sum, expert_map)[4]
    rows = strided(data.draw, rng.standard_normal((m_sum, hidden)).astype(dtype))
    weights = strided(data.draw, rng.random((tokens, topk)).astype(np.float32))
    # What the reference leaves unwritten may hold anything; so may rows of padding.
    inv_perm[inv_perm < 0] = 2**31 - 1
    inv_perm = strided(data.draw, inv_perm)
    out = strided(data.draw, np.full((tokens, hidden), 7, dtype=dtype))
    deep_gemm_utils.deepgemm_unpermute_and_reduce(
        *(as_kind(kind, array) for array in (rows, ids, weights, inv_perm, expert_map, out))
    )
    np.testing.assert_array_equal(out, oracle.unpermute(rows, ids, weights, inv_perm, expert_map).astype(dtype))


@given(routings())
@settings(max_examples=60, deadline=None)
def test_counts_follow_the_definition(routing):
    ids, expert_map, experts = routing
    for kind in KINDS:
        counts = deep_gemm_utils.count_expert_num_tokens(as_kind(kind, ids), experts, as_kind(kind, expert_map))
        np.testing.assert_array_equal(as_numpy(counts), oracle.count(ids, experts, expert_map))


def test_strides_of_outputs_are_honoured_and_what_lies_between_is_left_alone():
    ids = np.array([[0, 1], [1, -1]])
    x = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scale = np.array([[1.5], [2.5]], dtype=np.float32)
    for kind in KINDS:
        wide = as_kind(kind, np.full((8, 200), 9, dtype=np.uint8))
        scales = as_kind(kind, np.full((8, 3), 9, dtype=np.float32))
        start, index = (as_kind(kind, np.zeros(shape, dtype=np.int32)) for shape in ((2,), (2, 2)))
        layout = as_kind(kind, np.full(8, -7, dtype=np.int32))
        deep_gemm_utils.ep_scatter(
            *(as_kind(kind, array) for array in (x, scale, ids, np.array([1, 2], dtype=np.int32), None)),
            start,
            wide[:, 10:138],
            scales[:, 1:2],
            layout,
            index,
            align_m=4,
        )
        wide, scales = as_numpy(wide), as_numpy(scales)
        np.testing.assert_array_equal(as_numpy(index), [[0, 4], [5, -1]])
        np.testing.assert_array_equal(as_numpy(start), [1, 6])
        np.testing.assert_array_equal(as_numpy(layout), [0, -7, -7, -7, 1, 1, -7, -7])
        np.testing.assert_array_equal(wide[[0, 4, 5], 10:138], x[[0, 0, 1]])
        assert (wide[[1, 2, 3, 6, 7]] == 9).all() and (wide[:, :10] == 9).all() and (wide[:, 138:] == 9).all()
        np.testing.assert_array_equal(scales[:, 1], [1.5, 0, 0, 0, 1.5, 2.5, 0, 0])
        assert (scales[:, [0, 2]] == 9).all()


def test_the_alignment_rule_is_chosen_by_name():
    try:
        theoretical = deep_gemm_utils.get_theoretical_mk_alignment_for_contiguous_layout
        assert theoretical() == 128 or (torch and torch.cuda.is_available())
        deep_gemm_utils.set_alignment_rule("deepgemm-2026-06", "sm100")
        assert theoretical(expected_m=33) == 64 and theoretical() == 224
        assert deep_gemm_utils.compute_aligned_M_and_alignment(4, 8, 16, 128, None) == (544, 32)
        deep_gemm_utils.set_alignment_rule("vllm-fork", "sm120")
        assert theoretical(513, 8) == 128 and theoretical(512, 8) == 64
        with pytest.raises(ValueError, match="num_groups is 0"):
            theoretical(1, 0)
        with pytest.raises(ValueError, match='rule is "newest"'):
            deep_gemm_utils.set_alignment_rule("newest", "sm90")
        assert theoretical(512, 8) == 64
    finally:
        deep_gemm_utils.set_alignment_rule(None)
    assert deep_gemm_utils.compute_aligned_M_and_alignment(4, 8, 16, 128, None) == (2176, 128)


def test_an_alignment_scope_ends_also_by_an_exception():
    with pytest.raises(KeyError), deep_gemm_utils.mk_alignment_scope(64):
        assert deep_gemm_utils.get_mk_alignment_for_contiguous_layout() == [64, 64]
        raise KeyError
    assert deep_gemm_utils.get_mk_alignment_for_contiguous_layout() == [128, 128]
    with pytest.raises(ValueError, match="alignment is 0"), deep_gemm_utils.mk_alignment_scope(0):
        pass


def test_metadata_from_a_list_sizes_a_buffer():
    meta = deep_gemm_utils.ExpertTokensMetadata.make_from_list([3, 0, 129], "cpu")
    assert deep_gemm_utils.compute_aligned_M_and_alignment(44, 3, 3, 128, meta) == (384, 128)
    assert (meta.psum_recv_per_rank, meta.rank_expert_offset) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("hidden", [128, 288])
def test_wide_rows_go_where_narrow_ones_go_with_or_without_scales(kind, tokens, hidden):
    rng = np.random.default_rng(tokens)
    ids = as_kind(kind, rng.integers(-1, 5, (tokens, 3)))
    narrow = as_kind(kind, rng.integers(0, 0x7F, (tokens, hidden), dtype=np.uint8))
    wide = as_kind(kind, rng.standard_normal((tokens, hidden)).astype(np.float16))
    # With uint8 scales in groups of 32, whose last word is not full at 288.
    scales = as_kind(kind, rng.integers(1, 255, (tokens, hidden // 32), dtype=np.uint8))
    expected = deep_gemm_utils.deepgemm_moe_permute(narrow, scales, ids, 5, None, None, block_size=32)
    mine = deep_gemm_utils.deepgemm_moe_permute(wide, scales, ids, 5, None, None, block_size=32)
    bare = deep_gemm_utils.deepgemm_moe_permute(wide, None, ids, 5, None, None)
    assert bare[1] is None
    inv_perm, m_indices = as_numpy(mine[3]), as_numpy(mine[2])
    live = m_indices >= 0
    words, theirs = as_numpy(mine[1]), as_numpy(expected[1])
    assert (words.dtype, words.shape) == (theirs.dtype, theirs.shape) and (words == theirs).all()
    for found in (mine, bare):
        assert all((as_numpy(a) == as_numpy(b)).all() for a, b in zip(found[2:4], expected[2:4], strict=True))
        rows = as_numpy(found[0])
        for token, slot in np.argwhere(inv_perm >= 0):
            assert (rows[inv_perm[token, slot]] == as_numpy(wide)[token]).all()
        assert (
            rows.shape == (len(m_indices), hidden) and rows.dtype == np.float16 and live.sum() == (inv_perm >= 0).sum()
        )


@pytest.mark.skipif(torch is None, reason="torch is not installed")
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_packed_scales_have_the_references_strides_also_where_there_are_no_rows(tokens):
    aq, aq_scale = torch.zeros(tokens, 384, dtype=torch.uint8), torch.ones(tokens, 12, dtype=torch.uint8)
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    with deep_gemm_utils.mk_alignment_scope(1):
        _, scales, *_ = deep_gemm_utils.deepgemm_moe_permute(aq, aq_scale, ids, 2, None, None, block_size=32)
    m_sum = deep_gemm_utils.compute_aligned_M(tokens, 1, 2, 1, None)
    expected = torch.empty_strided((m_sum, 3), (1, -(-m_sum // 4) * 4))
    assert (scales.shape, scales.stride()) == (expected.shape, expected.stride())


# -- bad input ---------------------------------------------------------------------------------------------------------


def permute_arguments(kind, **changed):
    arguments = {
        "aq": np.zeros((3, 128), dtype=np.uint8),
        "aq_scale": np.ones((3, 1), dtype=np.float32),
        "topk_ids": np.array([[0, 1], [1, 2], [-1, 0]]),
        "local_num_experts": 3,
        "expert_map": None,
        "expert_tokens_meta": None,
    }
    arguments.update(changed)
    return {name: as_kind(kind, x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def metadata(counts):
    counts = np.array(counts, dtype=np.int32)
    return deep_gemm_utils.ExpertTokensMetadata(counts, counts)


BAD_PERMUTES = {
    "aq is a list, expected a torch tensor or a NumPy array": (TypeError, {"aq": [[1]]}),
    "aq has shape [3], expected 2 dimensions": (ValueError, {"aq": np.zeros(3, np.uint8)}),
    "aq has shape [4, 128], expected [3, 128]": (ValueError, {"aq": np.zeros((4, 128), np.uint8)}),
    "aq has dtype float64, expected": (TypeError, {"aq": np.zeros((3, 128))}),
    "H is 100, expected a positive multiple of 64": (ValueError, {"aq": np.zeros((3, 100), np.uint8)}),
    "aq_scale has shape [3, 2], expected [3, 1]": (ValueError, {"aq_scale": np.ones((3, 2), np.float32)}),
    "aq_scale has dtype float64, expected": (TypeError, {"aq_scale": np.ones((3, 1))}),
    "aq_scale is a NoneType, expected": (TypeError, {"aq_scale": None}),
    "topk_ids has dtype float32, expected int32 or int64": (TypeError, {"topk_ids": np.zeros((3, 2), np.float32)}),
    "topk_ids[1, 1] is 3, expected an id below 3": (ValueError, {"topk_ids": np.array([[0, 1], [1, 3], [0, 0]])}),
    "topk_ids[1, 1] is 2, expected an id below 2": (ValueError, {"expert_map": np.array([0, 1], dtype=np.int32)}),
    "expert_map[2] is 3, expected a local expert": (ValueError, {"expert_map": np.array([0, 1, 3], np.int32)}),
    "expert_map has dtype int64, expected": (TypeError, {"expert_map": np.array([0, 1, 2])}),
    "expert_map has shape [1, 3], expected one dimension": (ValueError, {"expert_map": np.zeros((1, 3), np.int32)}),
    "local_num_experts is 0, expected": (ValueError, {"local_num_experts": 0}),
    "local_num_experts is -3, expected": (ValueError, {"local_num_experts": -3}),
    "local_num_experts is 'three' (str), expected an integer": (TypeError, {"local_num_experts": "three"}),
    "block_size is 64, expected 32 or 128": (ValueError, {"block_size": 64}),
    "aq_out has shape [3, 128], expected": (ValueError, {"aq_out": np.zeros((3, 128), np.uint8)}),
    "expert_num_tokens[1] is 1, expected 2": (ValueError, {"expert_tokens_meta": metadata([2, 1, 1])}),
    "expert_num_tokens[1] is -2, expected at least 0": (ValueError, {"expert_tokens_meta": metadata([2, -2, 1])}),
    "expert_num_tokens has shape [2], expected [3]": (ValueError, {"expert_tokens_meta": metadata([2, 2])}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", BAD_PERMUTES)
def test_a_bad_permute_names_argument_value_and_expectation(kind, message):
    error, changed = BAD_PERMUTES[message]
    with pytest.raises(error) as caught:
        deep_gemm_utils.deepgemm_moe_permute(**permute_arguments(kind, **changed))
    assert str(caught.value).replace("torch.", "").startswith(message), caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_permute_writes_nothing(kind):
    out = as_kind(kind, np.full((384, 128), 0x5A, dtype=np.uint8))
    for changed in ({"topk_ids": np.array([[0, 1], [1, 2], [7, 0]])}, {"aq_scale": np.ones((3, 2), np.float32)}):
        with pytest.raises(ValueError):
            deep_gemm_utils.deepgemm_moe_permute(**permute_arguments(kind, aq_out=out, **changed))
    assert (as_numpy(out) == 0x5A).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_reduce_names_argument_value_and_expectation(kind):
    good = {
        "a": np.ones((8, 4), np.float32),
        "topk_ids": np.array([[0, 1]]),
        "topk_weights": np.ones((1, 2), np.float32),
        "inv_perm": np.array([[0, 4]], dtype=np.int32),
        "expert_map": None,
        "output": np.zeros((1, 4), np.float32),
    }
    read_only = np.zeros((1, 4), np.float32)
    read_only.flags.writeable = False
    shared = np.ones((8, 4), np.float32)
    bad = [
        ("inv_perm[0, 1] is 8, expected a row below 8", {"inv_perm": np.array([[0, 8]], dtype=np.int32)}),
        ("inv_perm has dtype", {"inv_perm": np.array([[0, 4]])}),
        ("output has shape [1, 5], expected [1, 4]", {"output": np.zeros((1, 5), np.float32)}),
        ("output has dtype", {"output": np.zeros((1, 4))}),
        ("topk_weights has shape [2, 2], expected [1, 2]", {"topk_weights": np.ones((2, 2), np.float32)}),
        ("topk_ids has shape [2, 2], expected [1, 2]", {"topk_ids": np.zeros((2, 2), np.int64)}),
        ("a has dtype", {"a": np.ones((8, 4), np.int32)}),
        ("output shares memory with a", {"a": shared, "output": shared[2:3]}),
    ]
    if kind == "numpy":
        bad.append(("output is read-only", {"output": read_only}))
        bad.append(("a has strides [-4, 1], expected none of them negative", {"a": good["a"][::-1]}))
        bad.append(("a has dtype >f4", {"a": good["a"].astype(">f4")}))
    for message, changed in bad:
        arguments = {name: as_kind(kind, x) for name, x in {**good, **changed}.items()}
        with pytest.raises((TypeError, ValueError)) as caught:
            deep_gemm_utils.deepgemm_unpermute_and_reduce(**arguments)
        assert str(caught.value).startswith(message), caught.value
    assert (good["output"] == 0).all()


def test_bad_sizes_are_errors():
    for arguments, message in [
        ((-1, 1, 1, 1), "M is -1"),
        ((1.0, 1, 1, 1), "M is 1.0 \\(float\\)"),
        ((1, 0, 1, 1), "num_topk is 0"),
        ((1, 1, 0, 1), "local_num_experts is 0"),
        ((1, 1, 1, 0), "alignment is 0"),
        ((2**63, 2, 1, 1), "M \\* topk overflows"),
        ((2**80, 2, 1, 1), "M is 1208925819614629174706176, expected at most"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            deep_gemm_utils.compute_aligned_M(*arguments, None)
    with pytest.raises(TypeError, match="expert_num_tokens"):
        deep_gemm_utils.expert_num_tokens_round_up_and_sum("many", 128)
    with pytest.raises(ValueError, match="expert_num_tokens\\[0\\] is 4294967296"):
        deep_gemm_utils.expert_num_tokens_round_up_and_sum([2**32], 128)


@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_tensors_that_have_no_memory_here_are_errors():
    from torch._subclasses import FakeTensorMode

    arguments = permute_arguments("torch")
    for x in (torch.zeros(3, 128, device="meta"), torch.zeros(3, 128).to_sparse()):
        with pytest.raises((TypeError, ValueError), match="^aq is "):
            deep_gemm_utils.deepgemm_moe_permute(**{**arguments, "aq": x.to(torch.float32)})
    with FakeTensorMode():
        fake = torch.zeros(3, 128)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        deep_gemm_utils.deepgemm_moe_permute(**{**arguments, "aq": fake})


def test_every_combination_of_kinds_of_input_goes_together():
    if torch is None:
        pytest.skip("torch is not installed")
    for kinds in itertools.product(KINDS, repeat=3):
        arguments = permute_arguments("numpy")
        for kind, name in zip(kinds, ("aq", "aq_scale", "topk_ids"), strict=True):
            arguments[name] = as_kind(kind, arguments[name])
        rows = deep_gemm_utils.deepgemm_moe_permute(**arguments)[0]
        assert isinstance(rows, np.ndarray) == (kinds[0] == "numpy")
