"""Exact token counts by the server's own tokenizer: `POST /tokenize`, as llama.cpp, vLLM and SGLang have it.

A run needs far more texts than may be asked for. Byte-pair and unigram tokenizers take text apart at spaces first, so
that a text has as many tokens as its words have, each with the space before it. What is asked is therefore how many
tokens each word of the corpus has: many in one request where all of them are one token, which common words are. Texts
are then put together to the exact number, and some of them are counted whole by the server to prove it.

The number of questions is bounded. What is not known when they are used up has 0 tokens, which is: not counted.
"""

from __future__ import annotations

import http.client
import random
import ssl
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agent.loadgen.target import Target
from agent.loadgen.words import WORDS, Words
from herder.decoding import UNREADABLE

MAX_CALLS = 10_000
MAX_DISTINCT = 2_000  # words of a dataset whose tokens are asked for; the corpus ends where there would be more
MAX_ANSWER = 64 << 20
TIMEOUT_S = 30.0
STARTERS = 32  # words that may begin a text: they are one token without a space before them, too
CHECKED = 16
_ANCHOR = "the"


@dataclass(slots=True)
class TokenServer:
    """A /tokenize; its connection is kept. Not to be used by two processes: `close` it before a fork."""

    url: str
    model: str
    headers: tuple[tuple[str, str], ...] = ()
    tls: ssl.SSLContext | None = None
    calls_left: int = MAX_CALLS
    _link: http.client.HTTPConnection | None = field(default=None, repr=False)

    def count(self, text: str) -> int:
        """Tokens of a text, without those that mark its start and end. Raises: ValueError where it does not say."""
        if self.calls_left <= 0:
            raise ValueError(f"more than {MAX_CALLS:,} texts to count")
        self.calls_left -= 1
        # llama.cpp reads content, vLLM and SGLang read model and prompt; each ignores what it does not know.
        body = {"content": text, "add_special": False, "prompt": text, "add_special_tokens": False}
        if self.model:
            body["model"] = self.model
        answer = self._ask(msgspec.json.encode(body))
        tokens = answer.get("tokens")
        if isinstance(tokens, list):
            return len(tokens)
        count = answer.get("count")
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            return count
        self.close()
        raise ValueError(f"{self.url} does not tell tokens")

    def _ask(self, body: bytes) -> dict[str, Any]:
        parts = urllib.parse.urlsplit(self.url)
        for is_last in (False, True):
            is_fresh = self._link is None
            try:
                link = self._link = self._link or self._connect(parts)
                link.request("POST", parts.path, body, {"Content-Type": "application/json", **dict(self.headers)})
                answer = link.getresponse()
                data = answer.read(MAX_ANSWER)
                if answer.status != 200:
                    self.close()
                    raise ValueError(f"{self.url} answered {answer.status} {data[:200].decode(errors='replace')}")
                found = msgspec.json.decode(data)
                return found if isinstance(found, dict) else {}
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A kept connection may have been closed by the server since.
                if is_fresh or is_last:
                    raise ValueError(f"{self.url} cannot be asked for tokens: {error}") from None
            except UNREADABLE:
                self.close()
                raise ValueError(f"{self.url} does not answer in JSON") from None
        raise AssertionError("unreachable")

    def _connect(self, parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
        host = parts.hostname or ""
        if parts.scheme == "https":
            context = self.tls or ssl.create_default_context()
            return http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_S, context=context)
        return http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_S)

    def close(self) -> None:
        """Closes the connection; the next question opens another."""
        if self._link is not None:
            self._link.close()
            self._link = None


def is_server(tokenizer: str | None) -> bool:
    """Whether the tokenizer of a spec is a server's and no file."""
    return tokenizer is not None and (tokenizer == "server" or tokenizer.startswith("server:"))


def server_of(spec: str, target: Target, tails: Sequence[str], model: str) -> TokenServer:
    """The server of `server` (the one that is measured) or `server:URL` (which gets none of its headers).

    tails: what the paths of its API may end with; /tokenize stands in their place. Raises: ValueError.
    """
    _, _, url = spec.partition(":")
    if not url:
        base = next((target.path.removesuffix(tail) for tail in tails if target.path.endswith(tail)), "")
        return TokenServer(f"{target.root}{base}/tokenize", model, target.headers, target.tls())
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ValueError(f"tokenizer {spec!r}: write server or server:http://HOST:PORT")
    path = parts.path.rstrip("/")
    path = path if path.endswith("/tokenize") else f"{path}/tokenize"
    return TokenServer(f"{parts.scheme}://{parts.netloc}{path}", model)


class ServerWords(Words):
    """Text of an exact number of the server's tokens. Raises on making: ValueError."""

    def __init__(self, server: TokenServer, lines: Sequence[str] = ()) -> None:
        super().__init__(lines)
        self.counted_by = "tokenizer"
        self.server = server
        anchor, two = server.count(_ANCHOR), server.count(f"{_ANCHOR} {_ANCHOR}")
        self._marks = 2 * anchor - two  # of the start and the end, where the server adds them all the same
        self._anchor = anchor - self._marks
        self._known: dict[str, int] = {}
        self._single(list(WORDS))
        ones = [word for word in WORDS if self._known.get(word) == 1]
        self._starters = dict.fromkeys(word for word in ones[:STARTERS] if self._raw(word) == 1)
        self._begin = list(self._starters)
        if not self._starters:
            raise ValueError(f"{server.url}: hardly a word of the corpus is one token; this tokenizer cannot be used")
        self._ones = ones
        if self._is_prose:
            self._words = self._measured(self._words)
        else:
            self._words = ones
        self._made: list[tuple[str, int]] = []

    def text(self, tokens: int, rng: random.Random) -> str:
        """Text of so many tokens."""
        if tokens <= 0:
            return ""
        said = [rng.choice(self._begin)]
        left = tokens - 1
        if self._is_prose:
            at = rng.randrange(len(self._words))
            while left:
                word = self._words[at % len(self._words)]
                if self._known[word] > left:
                    break
                said.append(word)
                left -= self._known[word]
                at += 1
        said += rng.choices(self._ones, k=left)
        text = " ".join(said)
        if len(self._made) < CHECKED:
            self._made.append((text, tokens))
        return text

    def count(self, text: str) -> int:
        """Tokens of a text; 0 where it is not known and may not be asked for any more."""
        words, known = text.split(" "), self._known
        if words[0] in self._starters and all(word in known for word in words):
            return sum(known[word] for word in words)
        return self.count_answer(text) if self.server.calls_left > 0 else 0

    def count_answer(self, text: str) -> int:
        """Tokens of any text, asked of the server. Raises: ValueError."""
        return self._raw(text)

    def check(self) -> dict[str, Any]:
        """What was asked, and how many of some texts the server counts as they were meant; for the report."""
        made = [(self._raw(text), tokens) for text, tokens in self._made if self.server.calls_left > 0]
        self.server.close()
        return {
            "asked": self.server.url,
            "calls": MAX_CALLS - self.server.calls_left,
            "checked": len(made),
            "exact": sum(there == here for there, here in made),
            "words": len(set(self._words)),
        }

    def _raw(self, text: str) -> int:
        return self.server.count(text) - self._marks

    def _behind(self, words: Sequence[str]) -> int:
        """Tokens of words that stand behind another."""
        return self._raw(" ".join([_ANCHOR, *words])) - self._anchor

    def _single(self, words: list[str]) -> None:
        """Learns which of these are one token, many at a time; others stay unknown."""
        if self._behind(words) == len(words):
            self._known |= dict.fromkeys(words, 1)
        elif len(words) > 1:
            self._single(words[: len(words) // 2])
            self._single(words[len(words) // 2 :])

    def _measured(self, words: Sequence[str]) -> list[str]:
        """The beginning of a corpus that has at most MAX_DISTINCT different words, whose tokens are then known."""
        fresh: dict[str, None] = {}
        kept = []
        for word in words:
            if word not in self._known and word not in fresh:
                if len(fresh) >= MAX_DISTINCT:
                    break
                fresh[word] = None
            kept.append(word)
        for word in fresh:
            self._known[word] = self._behind([word])
        return kept
