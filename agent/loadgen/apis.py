"""The APIs that can be asked: how a question is written, and what each event of an answer means.

`read_event` and `read_body` say whether output came (NOTHING, OUTPUT, REASONING) and keep in an Answer what is known of
it. Role-only, empty, usage, ping and `[DONE]` events are never output. Answers are a machine's: unknown fields are
ignored, odd ones are looked at again without a schema, and only what is not JSON at all is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from herder.decoding import UNREADABLE

Framing = Literal["sse", "lines", "body", "rows"]
NOTHING, OUTPUT, REASONING = range(3)
MAX_ERROR = 300


class Answer:
    """What is known of one answer."""

    __slots__ = ("error", "input_tokens", "is_finished", "output_tokens", "said", "texts")

    def __init__(self, texts: list[str] | None = None) -> None:
        self.said: list[str] = []
        """What is no reasoning, where texts are kept."""
        self.input_tokens = -1
        self.output_tokens = -1
        self.is_finished = False
        self.error: str | None = None
        self.texts = texts
        """The pieces of the answer, where they are to be counted by a tokenizer or answered."""

    def keep(self, said: Any, thought: Any) -> None:
        """Keeps a piece."""
        assert self.texts is not None
        if isinstance(said, str) and said:
            self.said.append(said)
            self.texts.append(said)
        else:
            self.texts.append(thought if isinstance(thought, str) else "")

    def take(self, kind: int, text: str) -> None:
        """Keeps a piece of output or of reasoning."""
        self.keep(text if kind == OUTPUT else None, text)


Reader = Callable[[bytes, Answer], int]


@dataclass(frozen=True, slots=True)
class Api:
    """One way to ask a server."""

    name: str
    path: str
    tail: str
    """What a URL that names the API itself ends with."""
    framing: Framing
    read_event: Reader
    read_body: Reader
    makes_tokens: bool
    needs_finish: bool = False
    """A stream without its last word is truncated."""

    @property
    def is_opaque(self) -> bool:
        """Whatever bytes it answers are good, as they are not read."""
        return self.read_body is read_anything


class _Usage(msgspec.Struct):
    prompt_tokens: int = -1
    completion_tokens: int = -1


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_DECODE = msgspec.json.Decoder(_Chunk).decode


def read_openai_event(payload: bytes, answer: Answer) -> int:
    """An event of chat/completions or completions."""
    if payload == b"[DONE]":
        answer.is_finished = True
        return NOTHING
    try:
        chunk = _DECODE(payload)
    except msgspec.ValidationError:
        return _read_loosely(payload, answer)
    except UNREADABLE:
        answer.error = "an event that is not JSON"
        return NOTHING
    usage = chunk.usage
    if usage is not None and (usage.completion_tokens >= 0 or usage.prompt_tokens >= 0):
        answer.input_tokens, answer.output_tokens = usage.prompt_tokens, usage.completion_tokens
    if chunk.error is not None:
        answer.error = bytes(chunk.error)[:MAX_ERROR].decode(errors="replace")
    came = NOTHING
    for choice in chunk.choices or ():
        delta = choice.delta
        if delta is not None:
            if delta.content or (delta.tool_calls is not None and bytes(delta.tool_calls) not in (b"null", b"[]")):
                came = OUTPUT
            elif came == NOTHING and (delta.reasoning_content or delta.reasoning):
                came = REASONING
            if answer.texts is not None:
                answer.keep(delta.content, delta.reasoning_content or delta.reasoning)
        elif choice.text:
            came = OUTPUT
            if answer.texts is not None:
                answer.keep(choice.text, None)
        if choice.finish_reason is not None:
            answer.is_finished = True
    return came


def _loose(payload: bytes) -> Mapping[str, Any]:
    try:
        value = msgspec.json.decode(payload)
    except UNREADABLE:
        return {"error": "an answer that is not JSON"}
    return value if isinstance(value, dict) else {}


def _count(value: Any, name: str) -> int:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, int) and 0 <= found < 1 << 40 else -1


def _keep_error(value: Mapping[str, Any], answer: Answer) -> None:
    error = value.get("error")
    if error is not None:
        text = error if isinstance(error, str) else msgspec.json.encode(error).decode(errors="replace")
        answer.error = text[:MAX_ERROR]


def _read_loosely(payload: bytes, answer: Answer) -> int:
    """The same for JSON whose fields have other types than OpenAI's."""
    value = _loose(payload)
    _keep_error(value, answer)
    usage = value.get("usage")
    if isinstance(usage, dict):
        answer.input_tokens, answer.output_tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    came = NOTHING
    choices = value.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        said = choice.get("delta") or choice.get("message")
        said = said if isinstance(said, dict) else {}
        text = choice.get("text") or said.get("content") or ""
        thought = said.get("reasoning_content") or said.get("reasoning") or ""
        if text or said.get("tool_calls"):
            came = OUTPUT
        elif thought and came == NOTHING:
            came = REASONING
        if answer.texts is not None:
            answer.keep(text, thought)
        if choice.get("finish_reason") is not None:
            answer.is_finished = True
    return came


def read_openai_body(body: bytes, answer: Answer) -> int:
    """A whole answer of chat/completions or completions."""
    came = _read_loosely(body, answer)
    answer.is_finished = True
    return came


def read_vectors(body: bytes, answer: Answer) -> int:
    """A whole answer of embeddings (OpenAI's or Ollama's) or rerank."""
    value = _loose(body)
    _keep_error(value, answer)
    answer.input_tokens = _count(value.get("usage"), "prompt_tokens")
    if answer.input_tokens < 0:
        answer.input_tokens = _count(value.get("usage"), "total_tokens")
    answer.is_finished = True
    if answer.input_tokens < 0:
        answer.input_tokens = _count(value, "prompt_eval_count")
    if answer.error is None and not (value.get("data") or value.get("results") or value.get("embeddings")):
        answer.error = "an answer without data"
    return OUTPUT


def read_points(body: bytes, answer: Answer) -> int:
    """What Qdrant found; nothing at all is an error."""
    value = _loose(body)
    _keep_error(value, answer)
    answer.is_finished = True
    result = value.get("result")
    if answer.error is None and not (isinstance(result, dict) and result.get("points")):
        answer.error = "no points"
    return OUTPUT


def read_anything(body: bytes, answer: Answer) -> int:
    """Whatever plain HTTP answers is good."""
    answer.is_finished = True
    return OUTPUT


def read_ollama_event(payload: bytes, answer: Answer) -> int:
    """A line of Ollama's chat or generate; its last has the counts."""
    value = _loose(payload)
    _keep_error(value, answer)
    if value.get("done") is True:
        answer.is_finished = True
        answer.input_tokens, answer.output_tokens = _count(value, "prompt_eval_count"), _count(value, "eval_count")
    message = value.get("message")
    said = message if isinstance(message, dict) else {}
    text, thought = said.get("content") or value.get("response"), said.get("thinking") or value.get("thinking")
    if answer.texts is not None:
        answer.keep(text, thought)
    return OUTPUT if text or said.get("tool_calls") else REASONING if thought else NOTHING


def _no_events(payload: bytes, answer: Answer) -> int:
    raise AssertionError("this API answers in one piece")


_CHAT = "/chat/completions"
APIS: dict[str, Api] = {
    api.name: api
    for api in (
        Api("chat", "/v1" + _CHAT, _CHAT, "sse", read_openai_event, read_openai_body, True, needs_finish=True),
        Api(
            "completions", "/v1/completions", "/completions", "sse", read_openai_event, read_openai_body, True,
            needs_finish=True,
        ),
        Api("embeddings", "/v1/embeddings", "/embeddings", "body", _no_events, read_vectors, False),
        Api("rerank", "/v1/rerank", "/rerank", "body", _no_events, read_vectors, False),
        Api("speech", "/v1/audio/speech", "/audio/speech", "body", _no_events, read_anything, False),
        Api("ollama", "/api/chat", "/api/chat", "lines", read_ollama_event, read_ollama_event, True, needs_finish=True),
        Api(
            "ollama-generate", "/api/generate", "/api/generate", "lines", read_ollama_event, read_ollama_event, True,
            needs_finish=True,
        ),
        Api("ollama-embed", "/api/embed", "/api/embed", "body", _no_events, read_vectors, False),
        Api("http", "/", "", "body", _no_events, read_anything, False),
        Api("qdrant", "/points/query", "/points/query", "body", _no_events, read_points, False),
        Api("pgvector", "/", "", "rows", _no_events, read_anything, False),
    )
}  # fmt: skip
