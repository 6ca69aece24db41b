"""The definitions, in plain NumPy and nested loops."""

import numpy as np


def local_expert(expert_id, expert_map):
    if expert_id < 0:
        return -1
    return int(expert_id) if expert_map is None else int(expert_map[expert_id])


def count(ids, experts, expert_map=None):
    counts = np.zeros(experts, dtype=np.int32)
    for expert_id in np.asarray(ids).ravel():
        expert = local_expert(expert_id, expert_map)
        if expert >= 0:
            counts[expert] += 1
    return counts


def round_up(rows, alignment):
    return -(-int(rows) // alignment) * alignment


def reference_bound(tokens, topk, experts, alignment):
    slots = tokens * topk
    return round_up(slots + min(slots, experts) * (alignment - 1), alignment)


def layout(ids, experts, alignment, m_sum, expert_map=None):
    """expert_num_tokens, expert_start, psum, m_indices, inv_perm."""
    ids = np.asarray(ids)
    counts = count(ids, experts, expert_map)
    starts = np.zeros(experts, dtype=np.int32)
    for expert in range(1, experts):
        starts[expert] = starts[expert - 1] + round_up(counts[expert - 1], alignment)
    m_indices = np.full(m_sum, -1, dtype=np.int32)
    for expert in range(experts):
        m_indices[starts[expert] : starts[expert] + counts[expert]] = expert
    cursor = starts.copy()
    inv_perm = np.full(ids.shape, -1, dtype=np.int32)
    for token in range(ids.shape[0]):
        for slot in range(ids.shape[1]):
            expert = local_expert(ids[token, slot], expert_map)
            if expert >= 0:
                inv_perm[token, slot] = cursor[expert]
                cursor[expert] += 1
    return counts, starts, starts + counts, m_indices, inv_perm


def permute(x, inv_perm, m_sum, fill):
    out = np.full((m_sum, x.shape[1]), fill, dtype=x.dtype)
    for token, rows in enumerate(inv_perm):
        for row in rows:
            if row >= 0:
                out[row] = x[token]
    return out


def pack_ue8m0(rows):
    """uint8 [R, groups] to int32 [R, ceil(groups / 4)], byte j of word p = group 4 p + j."""
    padded = np.zeros((rows.shape[0], round_up(rows.shape[1], 4)), dtype=np.uint8)
    padded[:, : rows.shape[1]] = rows
    return padded.view("<i4").reshape(rows.shape[0], padded.shape[1] // 4)


def e4m3_values():
    values = np.empty(256, dtype=np.float32)
    for byte in range(256):
        exponent, mantissa = (byte >> 3) & 15, byte & 7
        magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        if byte & 0x7F == 0x7F:
            magnitude = np.nan
        values[byte] = -magnitude if byte & 0x80 else magnitude
    return values


def to_e4m3(x):
    """The nearest e4m3 byte, ties to even, after clamping to 448; finite float32 input."""
    values = e4m3_values()[:0x7F].astype(np.float64)
    magnitude = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    above = np.searchsorted(values, magnitude).clip(1, 0x7E)
    below = above - 1
    to_above, to_below = values[above] - magnitude, magnitude - values[below]
    even = np.where(above % 2 == 0, above, below)
    nearest = np.where(to_above < to_below, above, np.where(to_below < to_above, below, even))
    return (nearest | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def quantize(x, group, power_of_two):
    """float32 [M, H] to e4m3 bytes and float32 scales [M, ceil(H / group)]; the last group is what is left."""
    tokens, hidden = x.shape
    groups = -(-hidden // group)
    whole = np.zeros((tokens, groups * group), dtype=np.float32)
    whole[:, :hidden] = x
    grouped = whole.reshape(tokens, groups, group)
    amax = np.maximum(np.abs(grouped).max(axis=2), np.float32(1e-10))
    scales = amax * np.float32(1 / 448)
    if power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales.astype(np.float64)))).astype(np.float32)
    scaled = grouped / scales[:, :, None]
    return to_e4m3(scaled).reshape(tokens, groups * group)[:, :hidden], scales


def unpermute(rows, ids, weights, inv_perm, expert_map=None):
    """float32 sums [M, H]."""
    out = np.zeros((inv_perm.shape[0], rows.shape[1]), dtype=np.float32)
    for token in range(inv_perm.shape[0]):
        for slot in range(inv_perm.shape[1]):
            if local_expert(ids[token, slot], expert_map) >= 0:
                weight = np.float32(1) if weights is None else weights[token, slot]
                out[token] += weight * rows[inv_perm[token, slot]].astype(np.float32)
    return out
