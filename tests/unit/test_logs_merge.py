"""Several logs as one: order, and that nothing is lost, whatever comes when."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from head.log_merge import OLD_MS, Merge

NOW_MS = 1_000_000_000
SOURCES = ("a", "b", "c")
TIMES = st.lists(st.integers(0, 3_000), max_size=25)


def drain(merge: Merge[tuple[str, int, int]], now_ms: int) -> list[tuple[str, int, int]]:
    """What may go now."""
    found = []
    while (popped := merge.pop(now_ms)) is not None:
        assert popped[0] == popped[1][0]
        found.append(popped[1])
    return found


@given(times=st.tuples(TIMES, TIMES, TIMES), order=st.randoms())
@settings(max_examples=200)
def test_what_was_there_comes_sorted(times: tuple[list[int], ...], order: object) -> None:
    """Of logs that only tell what was there, whichever comes first, every line comes once, all by time."""
    merge: Merge[tuple[str, int, int]] = Merge()
    lines = {
        name: [(name, at, number) for number, at in enumerate(sorted(ats))]
        for name, ats in zip(SOURCES, times, strict=True)
    }
    for name in SOURCES:
        merge.add(name)
    waiting = [name for name in SOURCES for _ in range(len(lines[name]) + 1)]
    order.shuffle(waiting)  # type: ignore[attr-defined]
    given_so_far = dict.fromkeys(SOURCES, 0)
    out: list[tuple[str, int, int]] = []
    for name in waiting:
        number = given_so_far[name]
        given_so_far[name] += 1
        if number < len(lines[name]):
            merge.push(name, lines[name][number][1], lines[name][number], NOW_MS)
        else:
            merge.end(name)
        out += drain(merge, NOW_MS)
    assert merge.is_empty
    assert sorted(out) == sorted(line for name in SOURCES for line in lines[name])
    assert [at for _, at, _ in out] == sorted(at for _, at, _ in out)
    for name in SOURCES:
        assert [line for line in out if line[0] == name] == lines[name]


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(SOURCES), st.sampled_from(["push", "catch up", "end", "pop"]), st.integers(-900, 900)
        ),
        max_size=80,
    )
)
@settings(max_examples=200)
def test_each_log_keeps_its_order_and_its_lines(steps: list[tuple[str, str, int]]) -> None:
    """Clocks that jump, lines without a time, logs that end at any moment: no line is lost or moved."""
    merge: Merge[tuple[str, int, int]] = Merge(reorder_ms=100)
    pushed: dict[str, list[tuple[str, int, int]]] = {name: [] for name in SOURCES}
    ended: set[str] = set()
    for name in SOURCES:
        merge.add(name)
    out: list[tuple[str, int, int]] = []
    for moment, (name, step, jitter) in enumerate(steps):
        now_ms = NOW_MS + 10 * moment
        if step == "pop":
            out += drain(merge, now_ms)
        elif name in ended:
            continue
        elif step == "push":
            at_ms = 0 if jitter % 7 == 0 else now_ms + jitter
            pushed[name].append((name, at_ms, moment))
            merge.push(name, at_ms, pushed[name][-1], now_ms)
        elif step == "catch up":
            merge.caught_up(name)
        else:
            merge.end(name)
            ended.add(name)
    for name in SOURCES:
        if name not in ended:
            merge.end(name)
    out += drain(merge, NOW_MS)
    for name in SOURCES:
        assert [line for line in out if line[0] == name] == pushed[name]
    assert merge.is_empty


def test_a_line_waits_for_earlier_ones_of_others_but_not_for_long() -> None:
    """A fresh line is held for logs that are quiet, until the window is over; an old one has nothing to wait for."""
    merge: Merge[str] = Merge(reorder_ms=500)
    for name in ("a", "b"):
        merge.add(name)
    merge.push("a", NOW_MS, "second", NOW_MS)
    assert merge.pop(NOW_MS + 10_000) is None, "b still tells what was there"
    merge.caught_up("a")
    merge.caught_up("b")
    assert merge.pop(NOW_MS + 499) is None
    assert merge.wait_ms(NOW_MS + 100) == 400
    merge.push("b", NOW_MS - 5, "first", NOW_MS + 400)
    assert merge.pop(NOW_MS + 499) == ("b", "first"), "both have said what comes next"
    assert merge.pop(NOW_MS + 499) is None
    assert merge.pop(NOW_MS + 500) == ("a", "second")
    merge.push("b", NOW_MS + 900 - OLD_MS, "old", NOW_MS + 900)
    assert merge.pop(NOW_MS + 900) is None, "within its log it is no older than what was before it"
    merge = Merge(reorder_ms=500)
    for name in ("a", "b"):
        merge.add(name)
        merge.caught_up(name)
    merge.push("a", NOW_MS - OLD_MS, "old", NOW_MS)
    assert merge.pop(NOW_MS) == ("a", "old")


def test_room() -> None:
    """What may be held is shared by the logs of a view."""
    merge: Merge[int] = Merge(held_max=200)
    for name in ("a", "b"):
        merge.add(name)
    for number in range(100):
        assert merge.has_room("a")
        merge.push("a", 1, number, NOW_MS)
    assert not merge.has_room("a")
    assert merge.has_room("b")
    merge.end("b")
    merge.pop(NOW_MS)
    assert merge.has_room("a")
