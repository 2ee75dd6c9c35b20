"""Events that differ in their text alone: the short way finds what the long way finds, whatever comes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loadgen import connection as connection_module
from agent.loadgen import http1
from agent.loadgen.apis import APIS, OUTPUT, REASONING
from agent.loadgen.connection import Call, Connection
from agent.loadgen.http1 import AnswerReader
from agent.loadgen.likeness import MAX_SIZES, Likeness, learn

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
READ = APIS["chat"].read_event


def chunk_of(event: bytes) -> bytes:
    """An event as the chunk of a read."""
    return b"%x\r\n%b\r\n" % (len(event), event)


def chat(delta: dict[str, Any], **more: Any) -> bytes:
    """An event of chat/completions."""
    finish = more.pop("finish", None)
    choices = more.pop("choices", [{"index": 0, "delta": delta, "finish_reason": finish}])
    value = {"id": "chat-1", "model": "word", "choices": choices, **more}
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


class Link(Connection):
    """A connection without a socket."""

    def __init__(self, owner: object, call: Call) -> None:
        self.owner, self.call, self.reader = owner, call, AnswerReader()  # type: ignore[assignment]
        self._out = None

    def close(self) -> None:
        """Closes nothing."""
        self.call = None


def told(reads: list[bytes], *, keeps_text: bool) -> tuple[object, ...]:
    """All that is known of an answer after these reads: the first at 0, each 1 later."""
    ended: list[object] = []
    owner = SimpleNamespace(
        api=APIS["chat"],
        coalesced=0,
        answered=lambda connection, call, at: ended.append(("answered", at)),
        failed=lambda connection, call, outcome, said, at: ended.append((outcome, said)),
    )
    call = Call(0, SimpleNamespace(), 0, 0, -1, keeps_text)  # type: ignore[arg-type]
    link = Link(owner, call)
    for at, read in enumerate(reads):
        if link.call is not None:
            link.on_data(read, at)
    answer = call.answer
    said = (answer.texts, answer.said, answer.error, answer.is_finished, answer.input_tokens, answer.output_tokens)
    return call.stamps, call.marks, call.first_output, call.bytes, call.heard, owner.coalesced, ended, *said


TEXTS = st.one_of(
    st.sampled_from(
        ["a", " word", "word", "", "\n", '"', "\\", "\x7f", "é", "日本", "}]", "data: ", "\\u00e9", "x" * 300]
    ),
    st.text(max_size=12),
)
EVENTS = st.one_of(
    TEXTS.map(lambda text: chat({"content": text})),
    TEXTS.map(lambda text: chat({"reasoning_content": text})),
    TEXTS.map(lambda text: chat({"reasoning": text, "reasoning_content": text})),
    TEXTS.map(lambda text: chat({"role": "assistant", "content": text})),
    TEXTS.map(lambda text: chat({"content": text}, id="chat-2")),
    TEXTS.map(lambda text: chat({"content": text}, usage={"prompt_tokens": 3, "completion_tokens": 5})),
    TEXTS.map(lambda text: chat({"content": text}, choices=[{"text": text}])),
    TEXTS.map(lambda text: chat({}, choices=[{"text": text}, {"text": "b"}])),
    TEXTS.map(lambda text: chat({"content": text}, error="bad")),
    st.sampled_from(
        [
            chat({"content": "end"}, finish="stop"),
            chat({"tool_calls": [{"function": {"name": "f"}}]}),
            b"data: [DONE]\n\n",
            b": ping\n\n",
            b'data: {"choices":[{"delta":{"content":"bad\xff"}}]}\n\n',
            b'data: {"choices":[{"delta":{"content":5}}]}\n\n',
            b"data: no\n\n",
        ]
    ),
)
RUNS = st.lists(st.tuples(EVENTS, st.lists(TEXTS, max_size=12)), min_size=1, max_size=6)


@given(RUNS, st.lists(st.integers(0, 120), max_size=6), st.booleans())
def test_the_short_way_tells_the_same(runs: list[tuple[bytes, list[str]]], glued: list[int], keeps_text: bool) -> None:
    """Any events, many of them alike, some reads of two chunks or of half a one: all that is known is the same."""
    events = [event for odd, texts in runs for event in (*(chat({"content": text}) for text in texts), odd)]
    reads = [HEAD, *map(chunk_of, events), b"0\r\n\r\n"]
    for at in glued:
        if at < len(reads) - 1:
            both = reads[at] + reads[at + 1]
            cut = len(both) if at % 2 else len(both) // 2 + at % 5
            reads[at : at + 2] = [part for part in (both[:cut], both[cut:]) if part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_module, "LIKEN_AFTER", 1 << 40)
        wanted = told(reads, keeps_text=keeps_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_module, "LIKEN_AFTER", 1)
        patch.setattr(connection_module, "LIKEN_EVERY", 2)
        assert told(reads, keeps_text=keeps_text) == wanted


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a usual stream only the first events, odd ones and the end are read as JSON, whatever the texts' lengths."""
    looked: list[bytes] = []
    inner = AnswerReader.whole_event

    def looking(reader: AnswerReader, data: bytes) -> bytes | None:
        looked.append(data)
        return inner(reader, data)

    monkeypatch.setattr(AnswerReader, "whole_event", looking)
    monkeypatch.setattr(http1, "_SIZES", {})  # as in a process that has read nothing yet
    events = [chat({"content": " x" * (number % 20 + 1)}, created=number // 50) for number in range(200)]
    events[120] = chat({"content": "two\nlines"}, created=2)
    reads = [HEAD, *map(chunk_of, events), chunk_of(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
    stamps, *_ = told(reads, keeps_text=True)
    assert stamps == list(range(1, 201))
    assert len(looked) < 15


@pytest.mark.parametrize(
    ("event", "kind", "text"),
    [
        (chat({"content": "word"}), OUTPUT, b"other"),  # the model's name is the same word
        (chat({"content": "word"}, model2="word"), OUTPUT, None),  # the place is not the last: the long way
        (chat({"content": "word"}, system="x" * 1_024), OUTPUT, None),
        (chat({"reasoning": "hm"}), REASONING, b"well"),
    ],
)
def test_what_is_learnt(event: bytes, kind: int, text: bytes | None) -> None:
    """The place of the text, where reading the event with another text there proves it."""
    found = learn(event[6:-2], READ)
    if text is None:
        assert found is None
        return
    assert isinstance(found, Likeness)
    assert found.kind == kind
    was = b"word" if kind == OUTPUT else b"hm"
    other = text.join(event.rsplit(was, 1))
    assert found.text_of(chunk_of(other)) == text
    for wrong in (
        chunk_of(other)[:-1],
        b"0" + chunk_of(other),
        chunk_of(other) + b"0\r\n\r\n",
        b"",
        chunk_of(other)[3:],
    ):
        assert found.text_of(wrong) is None
    assert found.text_of(chunk_of(event.replace(b'"' + was + b'"', b'""'))) is None


def test_sizes_are_bounded() -> None:
    """Of a stream with texts of very many lengths only so many are remembered, and all are still told."""
    found = learn(chat({"content": "a"})[6:-2], READ)
    assert found is not None
    for number in range(1, 3 * MAX_SIZES):
        assert found.text_of(chunk_of(chat({"content": "y" * number}))) == b"y" * number
    assert len(found._heads) == MAX_SIZES


def test_usage_in_every_event_is_read_in_every_event() -> None:
    """A server that counts as it goes: every count is a mark."""
    events = [
        chat({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": number}) for number in range(1, 40)
    ]
    stamps, marks, *_ = told([HEAD, *map(chunk_of, events)], keeps_text=False)
    assert stamps == list(range(1, 40))
    assert marks == list(range(1, 40))
