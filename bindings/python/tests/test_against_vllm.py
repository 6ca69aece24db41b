"""Every function beside vLLM 0.33.0's own, in Triton's interpreter. Opt in: EXPERTILE_PEER names the folder."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from expertile import deep_gemm_utils as ours  # noqa: E402

# Triton's interpreter, not this package, leans on what NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CASES = [
    # tokens, topk, local experts, global experts (None: no map), hidden
    (1, 1, 1, None, 128),
    (1, 8, 4, None, 256),
    (3, 2, 5, None, 512),
    (17, 4, 8, 16, 384),
    (40, 2, 3, 12, 128),
    (130, 1, 2, None, 128),
    (33, 6, 8, 8, 1024),
]


def routing(rng, tokens, topk, experts, global_experts, dtype):
    """Ids with some -1 among them, and a map that keeps `experts` of the global ones."""
    limit = experts if global_experts is None else global_experts
    ids = rng.integers(0, limit, (tokens, topk))
    ids[rng.random((tokens, topk)) < 0.15] = -1
    expert_map = None
    if global_experts is not None:
        expert_map = np.full(global_experts, -1, dtype=np.int32)
        expert_map[rng.permutation(global_experts)[:experts]] = np.arange(experts)
        expert_map = torch.from_numpy(expert_map)
    return torch.from_numpy(ids).to(dtype), expert_map


def test_sizes_are_theirs_number_for_number(peer, rng):
    for tokens, topk, experts, alignment in itertools.product(
        (0, 1, 3, 64, 1000, 16384), (1, 2, 8), (1, 7, 256), (1, 8, 96, 128, 256)
    ):
        arguments = (tokens, topk, experts, alignment)
        theirs = peer.compute_aligned_M_and_alignment(*arguments, None)
        assert ours.compute_aligned_M_and_alignment(*arguments, None) == theirs, arguments
        assert ours.compute_aligned_M(*arguments, expert_tokens_meta=None) == theirs[0]
        for dtype in (torch.int32, torch.int64):
            counts = torch.from_numpy(rng.integers(0, 300, experts)).to(dtype)
            meta = SimpleNamespace(expert_num_tokens=None, expert_num_tokens_cpu=counts)
            assert ours.compute_aligned_M_and_alignment(*arguments, meta) == peer.compute_aligned_M_and_alignment(
                *arguments, meta
            )
            assert ours.expert_num_tokens_round_up_and_sum(
                counts, alignment
            ) == peer.expert_num_tokens_round_up_and_sum(counts, alignment)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", CASES)
def test_counts_are_theirs(peer, rng, case, dtype):
    ids, expert_map = routing(rng, *case[:4], dtype)
    theirs = peer.count_expert_num_tokens(ids, case[2], expert_map)
    assert torch.equal(ours.count_expert_num_tokens(ids, case[2], expert_map), theirs)


def rows_by_expert(rows, scales, m_indices):
    """Per expert, its rows and scales as one sorted list of bytes: the order within an expert is theirs to choose."""
    experts = {}
    for row, expert in enumerate(m_indices.tolist()):
        if expert >= 0:
            line = rows[row].view(torch.uint8).numpy().tobytes() + scales[row].contiguous().numpy().tobytes()
            experts.setdefault(expert, []).append(line)
    return {expert: sorted(lines) for expert, lines in experts.items()}


@pytest.mark.parametrize("rows_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["float32", "uint8"])
@pytest.mark.parametrize("case", CASES)
def test_a_permute_of_wide_rows_is_theirs(peer, rng, case, scale, rows_dtype):
    tokens, topk, experts, global_experts, hidden = case
    group = 32 if scale == "uint8" else 128
    ids, expert_map = routing(rng, tokens, topk, experts, global_experts, torch.int32)
    aq = torch.from_numpy(rng.standard_normal((tokens, hidden))).to(rows_dtype)
    aq_scale = torch.from_numpy(rng.integers(1, 255, (tokens, hidden // group))).to(getattr(torch, scale))
    arguments = (aq, aq_scale, ids, experts, expert_map, None)
    theirs = peer.deepgemm_moe_permute(*arguments, block_size=group)
    mine = ours.deepgemm_moe_permute(*arguments, block_size=group)
    for ours_, its in zip(mine[:4], theirs[:4], strict=True):
        assert (ours_.shape, ours_.stride(), ours_.dtype) == (its.shape, its.stride(), its.dtype)
    assert torch.equal(mine[2], theirs[2]) and mine[4] == theirs[4]
    assert rows_by_expert(*mine[:3]) == rows_by_expert(*theirs[:3])


@pytest.mark.parametrize("psum", [False, True])
@pytest.mark.parametrize("scale", ["float32", "uint8"])
@pytest.mark.parametrize("meta", ["none", "counts", "empty"])
@pytest.mark.parametrize("case", CASES)
def test_permute_and_unpermute_are_theirs(peer, rng, case, meta, scale, psum):
    tokens, topk, experts, global_experts, hidden = case
    group = 32 if scale == "uint8" else 128
    ids, expert_map = routing(rng, tokens, topk, experts, global_experts, torch.int64)
    aq = torch.from_numpy(rng.integers(0, 0x7F, (tokens, hidden), dtype=np.uint8)).view(torch.float8_e4m3fn)
    groups = hidden // group
    if scale == "uint8":
        aq_scale = torch.from_numpy(rng.integers(1, 255, (tokens, groups), dtype=np.uint8))
    else:
        aq_scale = torch.from_numpy(rng.random((tokens, groups), dtype=np.float32))
    metadata = None
    if meta == "counts":
        counts = ours.count_expert_num_tokens(ids, experts, expert_map)
        metadata = SimpleNamespace(expert_num_tokens=counts, expert_num_tokens_cpu=counts)
    elif meta == "empty":
        metadata = SimpleNamespace(expert_num_tokens=None, expert_num_tokens_cpu=None)
    arguments = (aq, aq_scale, ids, experts, expert_map, metadata)
    options = {"block_size": group, "use_psum_layout": psum}
    their_rows, their_scales, their_layout, their_inv, their_alignment = peer.deepgemm_moe_permute(
        *arguments, **options
    )
    rows, scales, layout, inv_perm, alignment = ours.deepgemm_moe_permute(*arguments, **options)

    assert alignment == their_alignment
    for mine, their in ((rows, their_rows), (scales, their_scales), (layout, their_layout), (inv_perm, their_inv)):
        assert (mine.shape, mine.stride(), mine.dtype) == (their.shape, their.stride(), their.dtype)
    assert torch.equal(layout, their_layout)
    m_indices = ours.deepgemm_moe_permute(*arguments, block_size=group)[2]
    assert rows_by_expert(rows, scales, m_indices) == rows_by_expert(their_rows, their_scales, m_indices)
    live = inv_perm >= 0
    assert torch.equal(m_indices[inv_perm[live].long()], m_indices[their_inv[live].long()])
    padding = m_indices < 0
    assert not scales[padding].any()

    gemm_out = torch.randn(int(rows.shape[0]), hidden).to(torch.bfloat16)
    their_out = torch.empty_like(gemm_out)
    their_out[their_inv[live].long()] = gemm_out[inv_perm[live].long()]
    weights = torch.rand(tokens, topk)
    mine, theirs = (torch.full((tokens, hidden), 7.0) for _ in range(2))
    ours.deepgemm_unpermute_and_reduce(gemm_out, ids, weights, inv_perm, expert_map, mine)
    peer.deepgemm_unpermute_and_reduce(their_out, ids, weights, their_inv, expert_map, theirs)
    assert torch.equal(mine, theirs)
    # A layout of theirs, slots they left unwritten included, goes through our reduce, and ours through theirs.
    ours.deepgemm_unpermute_and_reduce(their_out, ids, weights, their_inv, expert_map, mine)
    assert torch.equal(mine, theirs)
    peer.deepgemm_unpermute_and_reduce(gemm_out, ids, weights, inv_perm, expert_map, theirs)
    assert torch.equal(mine, theirs)
    # The interpreter cuts float32 off to bfloat16 where a GPU rounds, so the cast is compared with torch's.
    rounded = torch.full((tokens, hidden), 7.0, dtype=torch.bfloat16)
    ours.deepgemm_unpermute_and_reduce(gemm_out, ids, weights, inv_perm, expert_map, rounded)
    assert torch.equal(rounded, theirs.to(torch.bfloat16))


@pytest.mark.parametrize("psum", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_ep_scatter_writes_the_callers_buffers_as_theirs_does(peer, rng, packed, psum):
    tokens, topk, experts, hidden, alignment = 21, 3, 6, 256, 16
    group = 32 if packed else 128
    ids, _ = routing(rng, tokens, topk, experts, None, torch.int32)
    counts = ours.count_expert_num_tokens(ids, experts, None)
    m_sum = ours.compute_aligned_M(tokens, topk, experts, alignment, None)
    x = torch.from_numpy(rng.integers(0, 0x7F, (tokens, hidden), dtype=np.uint8)).view(torch.float8_e4m3fn)
    results = []
    for module in (peer, ours):
        out = torch.zeros(m_sum, hidden, dtype=torch.uint8).view(torch.float8_e4m3fn)
        if packed:
            x_scale = torch.arange(tokens * 8, dtype=torch.int32).to(torch.uint8).view(tokens, 8)
            scales = torch.zeros(2, m_sum, dtype=torch.int32).t()
        else:
            x_scale = torch.arange(tokens * 2, dtype=torch.float32).view(tokens, 2)
            scales = torch.zeros(m_sum, 2)
        start = torch.full((experts,), 9, dtype=torch.int32)
        layout = torch.full((experts if psum else m_sum,), -5, dtype=torch.int32)
        index = torch.full((tokens, topk), -1, dtype=torch.int32)
        module.ep_scatter(
            recv_x=x,
            recv_x_scale=x_scale,
            recv_topk=ids,
            num_recv_tokens_per_expert=counts,
            expert_map=None,
            expert_start_loc=start,
            output_tensor=out,
            output_tensor_scale=scales,
            m_indices=layout,
            output_index=index,
            align_m=alignment,
            block_size=group,
            pack_ue8m0=packed,
            use_psum_layout=psum,
        )
        results.append((start, layout, index, out, scales))
    (start, layout, index, out, scales), (start_, layout_, index_, out_, scales_) = results
    assert torch.equal(start, start_)
    assert torch.equal(layout, layout_)
    assert torch.equal(index < 0, index_ < 0)
    live = index >= 0
    assert torch.equal(
        out.view(torch.uint8)[index[live].long()], out_.view(torch.uint8)[index_[live].long()]
    ) and torch.equal(scales[index[live].long()], scales_[index_[live].long()])
