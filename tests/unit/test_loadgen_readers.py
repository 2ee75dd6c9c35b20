"""HTTP answers, events and JSON lines, in any pieces; the APIs' events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.loadgen.apis import APIS, NOTHING, OUTPUT, REASONING, Answer
from agent.loadgen.http1 import MAX_HEADERS, MAX_LINE, AnswerReader, ProtocolError
from agent.loadgen.sse import MAX_EVENT, EventReader, LineReader, TooLong

EVENTS = (
    b": ping\r\n\r\ndata: {\"a\":1}\n\nevent: x\ndata: one\rdata:two\r\r"
    b"id: 7\r\n\r\ndata\n\ndata: \xc3\xa9\r\n\r\ndata: [DONE]\n\n"
)  # fmt: skip
WANTED = [b'{"a":1}', b"one\ntwo", b"", b"\xc3\xa9", b"[DONE]"]


def chunked(body: bytes, sizes: list[int]) -> bytes:
    """A body in chunks of the given sizes, the rest in one."""
    out, at = b"", 0
    for size in [*sizes, len(body)]:
        piece = body[at : at + size]
        at += size
        if piece:
            out += b"%x;x=y\r\n%b\r\n" % (len(piece), piece)
    return out + b"0\r\nA: b\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def read_all(parts: list[bytes]) -> tuple[AnswerReader, list[bytes]]:
    """What the readers make of an answer that comes in parts."""
    reader, events, found = AnswerReader(), EventReader(), []
    for part in parts:
        for piece in reader.feed(part):
            found += events.feed(piece)
    return reader, found


def test_every_split_point_of_an_answer() -> None:
    """Cut anywhere in two, an answer with chunks, trailers and every kind of line end reads the same."""
    whole = HEAD + chunked(EVENTS, [1, 5, 30, 2])
    for at in range(len(whole) + 1):
        reader, found = read_all([whole[:at], whole[at:]])
        assert found == WANTED, at
        assert reader.is_done
        assert reader.status == 200


@given(st.lists(st.integers(1, 40), max_size=40), st.lists(st.integers(1, 25), max_size=12))
def test_any_pieces(cuts: list[int], chunks: list[int]) -> None:
    """Cut into any pieces, chunked in any way."""
    whole, parts = HEAD + chunked(EVENTS, chunks), []
    for cut in cuts:
        parts.append(whole[:cut])
        whole = whole[cut:]
    reader, found = read_all([*parts, whole])
    assert found == WANTED
    assert reader.is_done
    assert reader.is_kept


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=8), st.integers(0, 3))
def test_whole_chunks_one_by_one(chunks: list[bytes], cut: int) -> None:
    """A read for each chunk, sizes repeating, bodies that look like line ends; now and then a read too short."""
    reader, got = AnswerReader(), b""
    reader.feed(HEAD)
    for body in [*chunks, *chunks, b"\r\n\r\n"]:
        framed = b"%x\r\n%b\r\n" % (len(body), body)
        for part in (framed[: len(framed) - cut], framed[len(framed) - cut :]):
            got += b"".join(reader.feed(part))
    assert got == b"".join([*chunks, *chunks]) + b"\r\n\r\n"
    assert reader.feed(b"0\r\n\r\n") == []
    assert reader.is_done


SHAPES = (
    *(b"data: {}\n\n", b"data: [DONE]\n\n", b"data: a\n\ndata: b\n\n", b"data: a\ndata: b\n\n", b"data: a\n", b"\n"),
    *(b"data:a\n\n", b"data: a\r\n\r\n", b"data: \rx\n\n", b": x\n\n", b"id: 1\n\n"),
)
BODIES = st.lists(st.sampled_from(SHAPES), max_size=8)


@given(BODIES, st.integers(-1, 4))
def test_the_short_way_reads_the_same(bodies: list[bytes], glued: int) -> None:
    """Whole chunks of whole events are read by a shorter way: it finds what the long one finds, and changes nothing."""
    pieces = [HEAD, *(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies), b"0\r\n\r\n"]
    if 0 <= glued < len(pieces) - 1:
        pieces[glued : glued + 2] = [pieces[glued] + pieces[glued + 1]]
    reader, events, found = AnswerReader(), EventReader(), []
    for piece in pieces:
        payload = reader.whole_event(piece) if events.is_fresh else None
        if payload is not None:
            found.append(payload)
        else:
            for part in reader.feed(piece):
                found += events.feed(part)
    plain, wanted = read_all(pieces)
    assert found == wanted
    assert (reader.is_done, plain.is_done) == (True, True)


def test_the_short_way_is_taken() -> None:
    """A whole chunk of any size, with one event of one line; nothing else."""
    reader, chunk = AnswerReader(), b"a\r\ndata: {}\n\n\r\n"
    assert reader.whole_event(chunk) is None  # the head has not come
    reader.feed(HEAD + chunk)
    assert reader.whole_event(chunk) == b"{}"
    body = b"data: " + b"x" * 7_993 + b"\n\n"
    assert reader.whole_event(b"%x;new=1\r\n%b\r\n" % (len(body), body)) == body[6:-2]
    assert reader.whole_event(b"%x\r\n%b\r\n" % (len(body) + 1, body)) is None
    assert reader.whole_event(b"\r\n%b\r\n" % body) is None
    assert reader.whole_event(b"g\r\n%b\r\n" % body) is None
    assert reader.whole_event(b"8" * 40) is None
    assert reader.whole_event(b"a\r\ndata: {}\n\r\r\n") is None
    assert reader.whole_event(chunk[:-1]) is None
    assert reader.whole_event(chunk + b"0\r\n\r\n") is None


def test_an_event_does_not_wait_for_its_chunk() -> None:
    """The pieces of a chunk that has not wholly come are given on."""
    _, found = read_all([HEAD + b"ffff\r\ndata: early\n\nda"])
    assert found == [b"early"]


@pytest.mark.parametrize(
    ("head", "body", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"hello", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", b"hello", False),
        (b"HTTP/1.1 200\r\ncontent-length:5\r\nConnection: Close\r\n\r\n", b"hello", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"hello", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    ],
)
def test_bodies_of_a_length(head: bytes, body: bytes, kept: bool) -> None:
    """Read to their end, and the connection is kept where both sides may."""
    for at in range(len(head + body) + 1):
        reader = AnswerReader()
        got = reader.feed((head + body)[:at]) + reader.feed((head + body)[at:])
        assert (b"".join(got), reader.is_done, reader.is_kept) == (body, True, kept)


def test_a_body_until_the_end() -> None:
    """Without a length the end of the connection ends the body; a length that is not reached is an error."""
    reader = AnswerReader()
    assert reader.feed(b"HTTP/1.1 200 OK\r\n\r\nab") == [b"ab"]
    reader.feed_end()
    assert reader.is_done
    assert not reader.is_kept
    short = AnswerReader()
    short.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab")
    with pytest.raises(ProtocolError):
        short.feed_end()


def feed_bytes(reader: AnswerReader, data: bytes) -> None:
    """Byte by byte."""
    for at in range(len(data)):
        reader.feed(data[at : at + 1])


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        HEAD + b"0x5\r\n",
        HEAD + b"+5\r\n",
        HEAD + b"2\r\nabc",
        HEAD + b"1" * (MAX_LINE + 1),
        HEAD + b"fffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * MAX_HEADERS,
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    """A protocol error, whole or byte by byte, and never another exception."""
    with pytest.raises(ProtocolError):
        AnswerReader().feed(data)
    if len(data) < 1_000:
        with pytest.raises(ProtocolError):
            feed_bytes(AnswerReader(), data)


@given(st.binary(max_size=300))
def test_noise_never_breaks_the_readers(noise: bytes) -> None:
    """Any bytes: read or refused."""
    for start in (b"", HEAD):
        try:
            AnswerReader().feed(start + noise)
        except ProtocolError:
            pass
    EventReader().feed(noise)
    LineReader().feed(noise)
    for api in APIS.values():
        if api.framing in ("sse", "lines"):
            assert api.read_event(noise, Answer([])) in (NOTHING, OUTPUT, REASONING)
        assert api.read_body(noise, Answer([])) in (NOTHING, OUTPUT, REASONING)


def test_events_without_an_end_are_refused() -> None:
    """A line longer than the limit, also in small pieces."""
    reader, size = EventReader(), 1 << 19
    for _ in range(MAX_EVENT // size):
        reader.feed(b"x" * size)
    with pytest.raises(TooLong):
        reader.feed(b"x")


@given(st.lists(st.integers(1, 9), max_size=30))
def test_lines_in_any_pieces(cuts: list[int]) -> None:
    """Lines of JSON, the empty ones left out."""
    text, reader, found = b'{"a":1}\r\n\n{"b":2}\n{"c"', LineReader(), []
    for cut in cuts:
        found += reader.feed(text[:cut])
        text = text[cut:]
    assert found + reader.feed(text) == [b'{"a":1}', b'{"b":2}']


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', NOTHING),
        (b'{"choices":[{"delta":{"content":"a"}}]}', OUTPUT),
        (b'{"choices":[{"delta":{"reasoning_content":"a"}}]}', REASONING),
        (b'{"choices":[{"delta":{"reasoning":"a","content":null}}]}', REASONING),
        (b'{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}', OUTPUT),
        (b'{"choices":[{"delta":{"tool_calls":[]}}]}', NOTHING),
        (b'{"choices":[{"text":"a"}]}', OUTPUT),
        (b'{"choices":[{"text":""}]}', NOTHING),
        (b'{"choices":[{"delta":{"content":["odd"]}}]}', OUTPUT),
        (b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}', NOTHING),
        (b"[DONE]", NOTHING),
    ],
)
def test_what_counts_as_output(payload: bytes, kind: int) -> None:
    """Content, reasoning, tool calls and text; never roles, empty pieces, usage or the end."""
    assert APIS["chat"].read_event(payload, Answer()) == kind


def test_what_an_answer_keeps() -> None:
    """Usage, the end and errors inside a stream."""
    answer, read = Answer(), APIS["chat"].read_event
    read(b'{"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}', answer)
    assert answer.is_finished
    read(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"more":{}}}', answer)
    assert (answer.input_tokens, answer.output_tokens, answer.error) == (3, 4, None)
    read(b'{"error":{"message":"out of memory"}}', answer)
    assert "out of memory" in str(answer.error)
    read(b"{", answer)
    assert answer.error == "an event that is not JSON"


@pytest.mark.parametrize("bad", [b'{"choices":[{"delta":{"content":"\xff"}}]}', b'{"x":' + b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("api", ["chat", "completions", "ollama", "embeddings", "qdrant"])
def test_answers_of_bytes_that_are_no_json(api: str, bad: bytes) -> None:
    """Text that is no UTF-8 and nesting without end are an error of the answer, not of the generator."""
    answer, by = Answer(), APIS[api]
    (by.read_event if by.framing in ("sse", "lines") else by.read_body)(bad, answer)
    assert "not JSON" in str(answer.error)


def test_ollama_lines() -> None:
    """Its own words for output, end and counts."""
    answer, read = Answer(), APIS["ollama"].read_event
    assert read(b'{"message":{"content":"a"},"done":false}', answer) == OUTPUT
    assert read(b'{"message":{"content":"","thinking":"a"},"done":false}', answer) == REASONING
    assert read(b'{"message":{"content":""},"done":true,"prompt_eval_count":5,"eval_count":6}', answer) == NOTHING
    assert (answer.is_finished, answer.input_tokens, answer.output_tokens) == (True, 5, 6)
