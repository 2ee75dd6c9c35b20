"""Token counts asked of a server: few questions, exact texts, and answers counted after the run."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agent.loadgen import order, server_tokens
from agent.loadgen.apis import APIS
from agent.loadgen.server_tokens import ServerWords, TokenServer
from agent.loadgen.target import parse_url
from common.bench.spec import LoadSpec
from tests.doubles.scripted_server import END, EVENT, STREAM, Step, chunk, serving, whole


def tokens_of(text: str) -> list[int]:
    """A tokenizer: a mark, then pieces of at most five letters of every word; line ends are tokens, too."""
    return [1] + [0 for word in text.replace("\n", " \n ").split(" ") if word for _ in range(-(-len(word) // 5))]


class Tokens(ThreadingHTTPServer):
    """A /tokenize."""

    daemon_threads = True
    asked = 0
    answer: Callable[[str], object] = staticmethod(lambda text: {"tokens": tokens_of(text)})


class Handler(BaseHTTPRequestHandler):
    """Answers POST /tokenize."""

    protocol_version = "HTTP/1.1"
    server: Tokens

    def do_POST(self) -> None:
        """One text."""
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["content"]
        self.server.asked += 1
        body = json.dumps(self.server.answer(text)).encode()
        self.send_response(200 if self.path == "/tokenize" else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def tokenizing() -> Iterator[tuple[str, Tokens]]:
    """(URL, server)."""
    with Tokens(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server
        finally:
            server.shutdown()
            thread.join(10)


def count(text: str) -> int:
    """Tokens without the mark."""
    return len(tokens_of(text)) - 1


def test_texts_are_exact() -> None:
    """Words that are several tokens are found in few questions and left out; each text has what was asked for."""
    with tokenizing() as (url, server):
        words = ServerWords(TokenServer(f"{url}/tokenize", "m"))
        before = server.asked
        texts = [words.text(tokens, random.Random(tokens)) for tokens in (1, 2, 40, 333)]
        assert [count(text) for text in texts] == [1, 2, 40, 333]
        assert [words.count(text) for text in texts] == [1, 2, 40, 333]
        assert server.asked == before <= 700
        assert words.count("three unfamiliar\nlines") == count("three unfamiliar\nlines")
        checked = words.check()
    assert (checked["checked"], checked["exact"]) == (4, 4)


def test_prose_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a dataset's words are as long as asked; where too many words differ, the corpus ends."""
    monkeypatch.setattr(server_tokens, "MAX_DISTINCT", 8)
    lines = [
        "Extraordinary circumstances surround the",
        "unremarkable development of",
        "zebra yaks x-rays wombats vultures",
    ]
    with tokenizing() as (url, server):
        words = ServerWords(TokenServer(f"{url}/tokenize", "m"), lines)
        texts = [words.text(tokens, random.Random(tokens)) for tokens in range(1, 60)]
        calls = server.asked
        words.check()
    assert [count(text) for text in texts] == list(range(1, 60))
    assert any("unremarkable" in text for text in texts)
    assert not any("vultures" in text for text in texts)
    assert calls < 800


def test_a_count_alone_is_enough() -> None:
    """vLLM's answer has a count beside the tokens; one with the count alone is read, too."""
    with tokenizing() as (url, server):
        server.answer = lambda text: {"count": len(tokens_of(text)), "max_model_len": 4096}
        with closing(TokenServer(f"{url}/tokenize", "m")) as made:
            assert made.count("a b") == 3


@pytest.mark.parametrize("answer", [{}, [], {"tokens": 5}, {"count": "3"}])
def test_answers_that_are_none(answer: object) -> None:
    """Refused with the address."""
    with tokenizing() as (url, server):
        server.answer = lambda text: answer
        with pytest.raises(ValueError, match="127"):
            ServerWords(TokenServer(f"{url}/tokenize", "m"))


def test_a_server_that_cannot_be_asked() -> None:
    """Said before the run begins, with the address; the headers of the measured server stay there."""
    with tokenizing() as (url, _):
        target = parse_url("http://127.0.0.1:1", CHAT, headers=[("Authorization", "Bearer secret")])
        made = server_tokens.server_of("server:" + url, target, ("/v1",), "m")
        assert made.headers == ()
    with pytest.raises(ValueError, match="cannot be asked"):
        made.count("x")
    with serving(lambda number: whole(b"", "404 Not Found")) as server:
        aim = order.Aim((f"http://127.0.0.1:{server.port}",))
        with pytest.raises(ValueError, match="answered 404"):
            order.order_of(LoadSpec(model="m", concurrency=1, requests=1, tokenizer="server"), aim)
        assert server.requests[0].startswith(b"POST /tokenize ")


CHAT = APIS["chat"]


def test_answers_are_counted_after_the_run() -> None:
    """A server that tells no usage: each answer has its tokens, and so have the rates."""
    answer: list[Step] = [STREAM, chunk(EVENT.format("one ")), chunk(EVENT.format("wonderful")),
                          chunk("data: [DONE]\n\n"), END]  # fmt: skip
    with tokenizing() as (url, _), serving(lambda number: answer) as server:
        aim = order.Aim((f"http://127.0.0.1:{server.port}",))
        asked_for = LoadSpec(model="m", concurrency=2, requests=6, tokenizer=f"server:{url}", exact=False)
        report, outcome = order.perform(order.order_of(asked_for, aim))
    assert list(outcome.records.column("output")) == [3] * 6
    assert (report.token_source, report.output_tokens) == ("tokenizer", 18)
    assert report.plan["tokenizer"]["exact"] == report.plan["tokenizer"]["checked"] == 12
