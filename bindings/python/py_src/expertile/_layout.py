"""Where the lists of a layout and the scales of its rows stand, by the library's own tables.

Sizes are arithmetic over those tables and not calls, so that they can also be computed from numbers that are not known
yet (``torch.compile``).
"""

from __future__ import annotations

from typing import Any

from . import _native

Pair = tuple[Any, Any]


def _words(lists: tuple[tuple[str, str, int], ...], unit: str) -> int:
    """Words of these lists for each expert, row, slot, ..."""
    return sum(words for _, counted, words in lists if counted == unit)


def _lists() -> dict[str, tuple[int, int, int, int, int, int]]:
    """Words before each list, then up to its end, for each expert, row and slot."""
    lists, places = _native.LAYOUT_LISTS, {}
    for index, (name, _, _) in enumerate(lists):
        before, until = (
            [_words(part, unit) for unit in ("expert", "row", "slot")] for part in (lists[:index], lists[: index + 1])
        )
        places[name] = (before[0], before[1], before[2], until[0], until[1], until[2])
    return places


_LISTS = _lists()
_ALL = (*_native.LAYOUT_LISTS, *_native.DEVICE_LISTS)
_OF_LAYOUT, _OF_EXPERT, _OF_ROW, _OF_SLOT, _OF_TILE = (
    _words(_ALL, unit) for unit in ("layout", "expert", "row", "slot", "tile")
)


def list_of(space: Any, name: str, experts: Any, rows: Any, slots: Any) -> Any:
    """A list of a layout, as a view of its memory."""
    a, b, c, d, e, f = _LISTS[name]
    return space[a * experts + b * rows + c * slots : d * experts + e * rows + f * slots]


def total_len(experts: Any, rows: Any, slots: Any, alignment: Any) -> Any:
    """int32 elements of a layout's memory: its lists, then what a GPU adds."""
    tiles = rows // alignment
    return _OF_LAYOUT + _OF_EXPERT * experts + _OF_ROW * rows + _OF_SLOT * slots + _OF_TILE * tiles


def scale_shape(m_sum: Any, hidden: Any, scale_layout: str, group: int) -> tuple[Any, str, Pair, Pair]:
    """Words, dtype, shape and strides of scales; ``_native.scale_matrix`` for numbers that may not be known yet."""
    dtype, groups_per_word, multiple = _native.SCALE_LAYOUTS[scale_layout]
    groups = (hidden + group - 1) // group
    columns = (groups + groups_per_word - 1) // groups_per_word
    if multiple is None:
        return columns * m_sum, dtype, (m_sum, columns), (columns, 1)
    stride = (m_sum + multiple - 1) // multiple * multiple
    return columns * stride, dtype, (m_sum, columns), (1, stride)
