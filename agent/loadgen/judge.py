"""From a finished request to its row: whether it was good, who counted its tokens, its gaps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.bench.records import AT, GRID_NS, OUTCOME, SOURCES, WIDTH, Records

if TYPE_CHECKING:
    from agent.loadgen.connection import Call
    from agent.loadgen.engine import Engine

MAX_UNTOLD = 2_000  # answers of each process that are counted after the run
MAX_UNTOLD_PIECES = 500_000
SETTLE_S = 60.0
_SERVER, _TOKENIZER, _CHUNKS, _NONE = range(len(SOURCES))


class Untold:
    """Answers whose tokens the server did not tell, kept to be counted when the run is over."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, str, list[int]]] = []
        """(row, text, stamps of its pieces, or of its end)"""
        self._left = MAX_UNTOLD_PIECES

    def keep(self, row: int, call: Call, at_ns: int) -> None:
        """Keeps an answer, as long as there is room."""
        pieces = max(len(call.stamps), 1)
        if call.answer.texts and len(self.kept) < MAX_UNTOLD and pieces <= self._left:
            self._left -= pieces
            self.kept.append((row, "".join(call.answer.texts), call.stamps or [at_ns]))

    def settle(self, records: Records, start_ns: int, counter: Callable[[str], int]) -> None:
        """Counts them: rows and the grid hold tokens then. Ends early when the counter fails or takes too long."""
        deadline = time.monotonic() + SETTLE_S
        for row, text, stamps in self.kept:
            if time.monotonic() > deadline:
                return
            try:
                tokens = counter(text)
            except ValueError as error:
                records.note_error("ok", f"tokens of answers: {error}")
                return
            at = row * WIDTH
            before = max(records.rows[at + AT["output"]], 0)
            records.rows[at + AT["output"]] = tokens
            records.rows[at + AT["source"]] = _TOKENIZER
            for number, stamp in enumerate(stamps):
                place = (stamp - start_ns) // GRID_NS
                more = tokens * (number + 1) // len(stamps) - tokens * number // len(stamps)
                records.grid[place] = records.grid.get(place, 0) + more - (1 if before else 0)


def row_of(engine: Engine, call: Call, outcome: str | None, status: int, said: str, at_ns: int) -> bool:
    """Keeps a request's row and gaps. outcome: None where the answer came whole. Returns whether it was good."""
    came = bool(call.stamps)
    if outcome is None:
        if call.body is not None:
            came = _read_body(engine, call, status) or came
        outcome, said = _verdict(engine, call, status, came)
    is_good = outcome == "ok"
    if not is_good:
        engine.records.note_error(outcome, said)
    marks = _marks(engine, call)
    source, output = _output_tokens(engine, call, marks)
    start = engine.start_ns
    stamps = call.stamps
    gaps = [later - earlier for earlier, later in itertools.pairwise(stamps)]  # one shorter by design
    first_tokens = marks[0] if marks and 0 < marks[0] <= max(output, 1) else 1
    begin, end = engine.share.window_ns
    scheduled = call.scheduled - start
    if is_good and scheduled >= begin and (end is None or scheduled < end):
        _keep_gaps(engine, gaps, marks, output, first_tokens)
    _keep_grid(engine, call, marks, output, at_ns)
    last = stamps[-1] if stamps else at_ns if is_good else -1
    if is_good and engine.share.counter is not None and source in (_CHUNKS, _NONE) and engine.api.makes_tokens:
        engine.untold.keep(len(engine.records), call, at_ns)
    engine.records.add(
        (
            call.index,
            call.item.class_id,
            call.turn,
            scheduled,
            _since(call.acted, start),
            _since(call.sent, start),
            _since(stamps[0], start) if stamps else -1,
            _since(call.first_output, start),
            _since(last, start),
            at_ns - start,
            call.connect,
            len(stamps),
            max(gaps, default=-1),
            call.answer.input_tokens,
            call.item.input_tokens,
            output,
            first_tokens,
            call.item.asked_tokens,
            OUTCOME[outcome],
            status,
            call.bytes,
            source,
            call.endpoint,
        )
    )
    return is_good


def _since(at_ns: int, start: int) -> int:
    return at_ns - start if at_ns >= 0 else -1


def _read_body(engine: Engine, call: Call, status: int) -> bool:
    """Takes an answer in one piece apart; whether output came."""
    assert call.body is not None
    body = b"".join(call.body)
    if 200 <= status < 300:
        return engine.api.read_body(body, call.answer) != 0
    call.answer.error = body[:300].decode(errors="replace")
    return False


def _verdict(engine: Engine, call: Call, status: int, came: bool) -> tuple[str, str]:
    """(outcome, what was said) of an answer that came whole."""
    said = call.answer.error or ""
    if status == 429:
        return "http_429", said
    if 300 <= status < 400:
        return "http_other", f"{status} {said}".strip() + ": redirects are not followed, ask where it leads"
    if not 200 <= status < 300:
        return {4: "http_4xx", 5: "http_5xx"}.get(status // 100, "http_other"), f"{status} {said}".strip()
    if call.answer.error is not None:
        return "query_error" if engine.api.framing == "rows" else "stream_error", said
    if call.events is not None and engine.api.needs_finish and not call.answer.is_finished:
        return "truncated", "the stream ended without its last event"
    if engine.api.makes_tokens and not came:
        return "empty", "no output"
    return "ok", ""


def _marks(engine: Engine, call: Call) -> list[int]:
    """Tokens up to each piece, where the server told them with every piece or a tokenizer counts them; else empty."""
    marks = call.marks
    # A server that says 0 with the role, or each piece's own count, has not told the tokens up to a piece.
    if (
        marks
        and len(marks) == len(call.stamps)
        and 0 < marks[0] <= marks[-1]
        and (marks[-1] > marks[0] or len(marks) == 1)
        and 2 * marks[-1] >= call.answer.output_tokens
    ):
        return marks
    texts = call.answer.texts
    if texts is None or call.answer.output_tokens > 0:
        return []
    counts = engine.tokens_of([text for text in texts if text])
    if counts is None:
        return []
    total, made = 0, []
    for count in counts:
        total += count
        made.append(total)
    return made


def _output_tokens(engine: Engine, call: Call, marks: Sequence[int]) -> tuple[int, int]:
    """(who counted, tokens): the server before the tokenizer before the number of pieces."""
    if not engine.api.makes_tokens:
        return _NONE, -1
    # None at all is what a server says at the start that never counts; the pieces prove otherwise.
    if call.answer.output_tokens > 0 or (call.answer.output_tokens == 0 and not call.stamps):
        return _SERVER, call.answer.output_tokens
    if marks:
        return _TOKENIZER, marks[-1]
    return (_CHUNKS, len(call.stamps)) if call.stamps else (_NONE, -1)


def _keep_gaps(engine: Engine, gaps: list[int], marks: Sequence[int], output: int, first_tokens: int) -> None:
    """Gaps between pieces, and the same spread over the tokens that the pieces hold."""
    if not gaps:
        return
    records = engine.records
    if len(marks) != len(gaps) + 1 and output <= len(gaps) + 1:
        records.count("itl_one_each" if output == len(gaps) + 1 else "itl_assumed", len(gaps))
        engine.gaps.add_all(gaps)
        return
    records.icl.add_all(gaps)
    if len(marks) == len(gaps) + 1:
        records.count("itl_exact", len(gaps))
        for number, gap in enumerate(gaps, 1):
            tokens = marks[number] - marks[number - 1]
            if tokens > 0:
                records.itl.add(gap // tokens, tokens)
    else:
        # Only the total is known: every gap is spread over the mean number of tokens of a piece.
        each = max(1, round((output - first_tokens) / len(gaps)))
        records.count("itl_mean", len(gaps))
        for gap in gaps:
            records.itl.add(gap // each, each)


def _keep_grid(engine: Engine, call: Call, marks: Sequence[int], output: int, at_ns: int) -> None:
    """Counts tokens where they came; those of pieces of unknown size are spread evenly over the pieces."""
    grid, start, stamps = engine.records.grid, engine.start_ns, call.stamps
    if not stamps:
        if output > 0:
            at = (at_ns - start) // GRID_NS
            grid[at] = grid.get(at, 0) + output
        return
    if len(marks) == len(stamps) or (output >= 0 and output != len(stamps)):
        before = 0
        for number, stamp in enumerate(stamps):
            upto = marks[number] if len(marks) == len(stamps) else output * (number + 1) // len(stamps)
            at = (stamp - start) // GRID_NS
            grid[at] = grid.get(at, 0) + upto - before
            before = upto
        return
    for stamp in stamps:
        at = (stamp - start) // GRID_NS
        grid[at] = grid.get(at, 0) + 1
