"""Pages: stable order, cursors, and the kept order against a sort from scratch."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidValue
from head.api.pages import Ordered, decode_cursor, encode_cursor, matching, take


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=60))
@settings(max_examples=300)
def test_the_kept_order_equals_a_fresh_sort(changes: list[tuple[bool, int]]) -> None:
    """Whatever is added, removed, removed and added again: the order is that of a sort."""
    table: dict[str, int] = {}
    ordered = Ordered(lambda: table, rank=lambda value: value)
    for is_added, number in changes:
        key = f"k{number:02}"
        if is_added:
            table[key] = -number // 3
        else:
            table.pop(key, None)
        assert list(ordered.order()) == sorted((value, name) for name, value in table.items())


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=60))
@settings(max_examples=200)
def test_the_kept_order_bears_looking_seldom(changes: list[tuple[bool, int]]) -> None:
    """The same when many changes, also undone ones that go back to the end of the dict, lie between two looks."""
    table: dict[str, int] = {}
    ordered = Ordered(lambda: table)
    for turn, (is_added, number) in enumerate(changes):
        key = f"k{number:02}"
        if is_added:
            table[key] = 1
        else:
            table.pop(key, None)
        if turn % 7 == 0:
            assert [name for _, name in ordered.order()] == sorted(table)
    assert [name for _, name in ordered.order()] == sorted(table)


@given(st.sets(st.text(min_size=1, max_size=4), max_size=40), st.integers(1, 12), st.booleans())
def test_pages_cover_a_list_exactly_once(keys: set[str], limit: int, is_filtered: bool) -> None:
    """Walking by cursor gives every wanted key once, in order, and `next` is None exactly at the end."""
    order = sorted((0, key) for key in keys)
    wants = (lambda key: ord(key[0]) % 2 == 0) if is_filtered else None
    expected = [key for _, key in order if wants is None or wants(key)]
    seen: list[str] = []
    after = None
    while True:
        wanted = asyncio.run(matching(order, wants)) if wants else order
        part = take(wanted, after=after, limit=limit)
        assert part.total == len(expected)
        seen += [key for _, key in part.entries]
        if not part.has_more:
            break
        assert len(part.entries) == limit
        after = decode_cursor("l", encode_cursor("l", part.entries[-1]) or "")
    assert seen == expected


@given(st.integers(-(2**53), 2**53), st.text(max_size=200))
def test_cursors_come_back_whole(rank: int, key: str) -> None:
    """Any order key survives the way out and back, and the text is safe in a URL."""
    text = encode_cursor("jobs", (rank, key))
    assert text is not None
    assert text.replace("-", "").replace("_", "").isalnum()
    assert decode_cursor("jobs", text) == (rank, key)


@given(st.text(min_size=1, max_size=80), st.text(max_size=20), st.integers(0, 60))
def test_no_text_breaks_the_cursor_reader(text: str, key: str, cut: int) -> None:
    """Whatever is sent as a cursor, noise or a broken one of ours, is a place in a list or refused as a value."""
    ours = encode_cursor("jobs", (0, key)) or ""
    for sent in (text, ours[:cut] + text, ours[:cut] + ours[cut + 1 :]):
        try:
            found = decode_cursor("jobs", sent)
        except InvalidValue:
            continue
        if sent:
            assert found is not None
            assert decode_cursor("jobs", encode_cursor("jobs", found) or "") == found
        else:
            assert found is None


def test_a_cursor_of_another_list_is_refused() -> None:
    """A cursor is bound to the list that gave it."""
    text = encode_cursor("jobs", (0, "a"))
    assert text is not None
    with pytest.raises(InvalidValue, match="jobs"):
        decode_cursor("models", text)


def test_no_cursor_means_the_beginning() -> None:
    """An empty cursor is the first page; the end has none."""
    assert decode_cursor("jobs", "") is None
    assert encode_cursor("jobs", None) is None


def test_filtering_a_long_list_lets_the_loop_turn() -> None:
    """Between slices others run, and what they delete is left out."""
    table = dict.fromkeys((f"k{number:05}" for number in range(12_000)), True)
    order = [(0, key) for key in table]

    async def delete_while_filtering() -> list[tuple[int, str]]:
        searching = asyncio.ensure_future(matching(order, lambda key: table[key]))
        await asyncio.sleep(0)
        del table["k11999"], table["k00000"]
        return await searching

    found = asyncio.run(delete_while_filtering())
    assert (0, "k11999") not in found
    assert len(found) == 11_999
