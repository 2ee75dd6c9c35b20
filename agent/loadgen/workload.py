"""What is sent: whole requests, written before the run, drawn from scenarios, datasets and traces by one seed.

Nothing is drawn, counted or encoded while requests are being sent. When a run needs more requests than were prepared
(closed loops, or more bytes than `MAX_PREPARED_BYTES`), they are sent again in their order, and the report says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from agent.loadgen import bodies
from agent.loadgen.apis import APIS, Answer, Api
from agent.loadgen.datasets import Dataset, Row
from agent.loadgen.style import Style
from agent.loadgen.target import Target
from agent.loadgen.traces import BLOCK_TOKENS, Arrival
from agent.loadgen.words import Words
from common.bench.scenario import Scenario, Shape

MAX_PREPARED_BYTES = 256 << 20
_TASKS = {
    "text": ("chat", "completions", "ollama", "ollama-generate"),
    "image": ("chat", "ollama", "ollama-generate"),
    "embeddings": ("embeddings", "ollama-embed"),
    "rerank": ("rerank",),
    "speech": ("speech",),
    "dataset": ("chat", "completions", "ollama", "ollama-generate", "embeddings", "ollama-embed"),
}
_API_OF_TASK = {"embeddings": "embeddings", "rerank": "rerank", "speech": "speech"}


@dataclass(frozen=True, slots=True)
class Item:
    """One request, ready to be sent."""

    wire: bytes
    class_id: int
    input_tokens: int
    """As counted here, without the server's template; 0 where nothing is counted."""
    asked_tokens: int
    follow: Item | None = None
    """The next turn of the conversation, sent when this one was answered."""
    talk: Talk | None = None
    """What the next turn is made of where it holds the answer to this one."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation whose turns are written during the run, each when the turn before was answered."""

    maker: _Maker
    class_id: int
    asked: tuple[tuple[str, int], ...]
    """What the user says in each turn, with its tokens."""
    output_tokens: int
    messages: tuple[dict[str, Any], ...] = ()
    tokens: int = 0
    """Of the messages, as counted here."""

    def item(self) -> Item:
        """The turn that the user begins now."""
        number = len(self.messages) // 2
        text, count = self.asked[number]
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.tokens + count
        is_last = number == len(self.asked) - 1
        return Item(
            self.maker.write(self.class_id, messages, self.output_tokens),
            self.class_id,
            tokens,
            self.output_tokens,
            talk=None if is_last else replace(self, messages=tuple(messages), tokens=tokens),
        )

    def answered(self, answer: Answer, pieces: int) -> Item:
        """The next turn, with the answer to the last in it."""
        said = "".join(answer.said)
        if self.maker.words.counted_by == "words":
            tokens = len(said.split())
        else:
            tokens = answer.output_tokens if answer.output_tokens >= 0 else pieces
        reply = {"role": "assistant", "content": said}
        return replace(self, messages=(*self.messages, reply), tokens=self.tokens + tokens).item()


@dataclass(frozen=True, slots=True)
class Workload:
    """All prepared requests; arrival i sends items[i % len(items)]."""

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    counted_by: str
    is_cut_short: bool
    """Fewer were prepared than wanted, for their size."""


def api_for(scenarios: Sequence[Scenario], name: str | None) -> Api:
    """The API that the scenarios need, or the named one if it fits. Raises: ValueError."""
    needed = {_API_OF_TASK.get(scenario.task, "chat") for scenario in scenarios}
    if name is None:
        if len(needed) > 1:
            raise ValueError(f"these scenarios need several APIs ({', '.join(sorted(needed))}); run them one by one")
        return APIS[needed.pop() if needed else "chat"]
    if name != "http":
        for scenario in scenarios:
            if name not in _TASKS[scenario.task]:
                raise ValueError(f"{scenario.text} is for the API {' or '.join(_TASKS[scenario.task])}, not {name}")
    return APIS[name]


def prepare(
    scenarios: Sequence[Scenario],
    style: Style,
    target: Target,
    words: Words,
    *,
    count: int,
    seed: int,
    dataset: Dataset | None = None,
    trace: Sequence[Arrival] | None = None,
) -> Workload:
    """The requests of a run. count: how many the run may need. Raises: ValueError."""
    if any(scenario.task == "dataset" for scenario in scenarios) and dataset is None:
        raise ValueError("the scenario `dataset` needs --dataset FILE")
    maker = _Maker(style, target, words, random.Random(f"herder requests {seed}"), seed, dataset)
    items: list[Item] = []
    held = 0
    source = _from_trace(maker, trace) if trace is not None else _from_scenarios(maker, scenarios)
    if style.api.name == "http":
        items, count = [Item(target.request(style.method, style.body, style.content_type), 0, 0, 0)], 1
    while len(items) < count:
        item = next(source, None)
        if item is None:
            break
        items.append(item)
        held += _size(item)
        if held > MAX_PREPARED_BYTES:
            break
    classes = tuple(scenario.text for scenario in scenarios) if trace is None else ("trace",)
    return Workload(tuple(items), classes or ("http",), words.counted_by, len(items) < count)


def _size(item: Item | None) -> int:
    held = 0
    while item is not None:
        held += len(item.wire) + 150 + (sum(len(text) for text, _ in item.talk.asked) if item.talk is not None else 0)
        item = item.follow
    return held


def _from_scenarios(maker: _Maker, scenarios: Sequence[Scenario]) -> Iterator[Item]:
    weights = [scenario.weight for scenario in scenarios]
    while True:
        class_id = 0 if len(weights) == 1 else maker.rng.choices(range(len(weights)), weights)[0]
        yield maker.item(class_id, scenarios[class_id])


def _from_trace(maker: _Maker, trace: Sequence[Arrival]) -> Iterator[Item]:
    for arrival in trace:
        text = maker.traced_text(arrival)
        yield maker.conversation(0, [(text, "")], arrival.output_tokens)


class _Maker:
    """Writes requests."""

    def __init__(
        self, style: Style, target: Target, words: Words, rng: random.Random, seed: int, dataset: Dataset | None
    ) -> None:
        self.style, self.target, self.words, self.rng, self.seed = style, target, words, rng, seed
        self._rows = dataset.rows if dataset is not None else ()
        self._row_at = 0
        self._texts: dict[str, str] = {}

    def item(self, class_id: int, scenario: Scenario) -> Item:
        """The next request of a class."""
        shape, given = scenario.sample(self.rng), bodies.given_to(self.style, class_id)
        match scenario.task:
            case "dataset":
                row = self._row()
                if self.style.api.name in ("embeddings", "ollama-embed"):
                    texts = [row.turns[0][0]]
                    return self._post(class_id, bodies.embeddings(self.style, class_id, texts), texts, 0)
                said = row.turns[: self.style.turns]
                return self.conversation(class_id, said, row.output_tokens or self.style.default_output_tokens)
            case "embeddings":
                texts = [self._text(shape.input_tokens) for _ in range(self.style.batch)]
                return self._post(class_id, bodies.embeddings(self.style, class_id, texts), texts, 0)
            case "rerank":
                query = self.words.text(shape.query_tokens, self.rng)
                texts = [self._text(shape.input_tokens) for _ in range(self.style.batch)]
                body = {"model": self.style.model, "query": query, "documents": texts, **given}
                return self._post(class_id, body, [query, *texts], 0)
            case "speech":
                text = self.words.text(shape.characters, self.rng)[: shape.characters]
                body = {"model": self.style.model, "input": text, "voice": "alloy", **given}
                return self._post(class_id, body, (), 0)
            case "image":
                return self._image(class_id, shape)
            case _:
                turns = [
                    (self._text(shape.input_tokens), self.words.text(shape.output_tokens, self.rng))
                    for _ in range(self.style.turns)
                ]
                return self.conversation(class_id, turns, shape.output_tokens)

    def conversation(self, class_id: int, turns: Sequence[tuple[str, str]], output_tokens: int) -> Item:
        """The first turn, linked with those after it. Earlier answers are the prepared ones, so that no body is written
        during the run, unless live ones were asked for."""
        if self.style.has_live_replies and len(turns) > 1:
            counted = tuple((asked, self.words.count(asked)) for asked, _ in turns)
            return Talk(self, class_id, counted, output_tokens).item()
        made: Item | None = None
        for last in range(len(turns), 0, -1):
            messages: list[dict[str, Any]] = []
            for number, (asked, answered) in enumerate(turns[:last]):
                messages.append({"role": "user", "content": asked})
                if number < last - 1:
                    messages.append({"role": "assistant", "content": answered})
            said = [message["content"] for message in messages]
            body = bodies.question(self.style, class_id, messages, "\n\n".join(said), output_tokens)
            made = self._post(class_id, body, said, output_tokens, made)
        assert made is not None
        return made

    def write(self, class_id: int, messages: list[dict[str, Any]], output_tokens: int) -> bytes:
        """The request of a conversation so far."""
        is_one_prompt = self.style.api.name in ("completions", "ollama-generate")
        text = "\n\n".join(message["content"] for message in messages) if is_one_prompt else ""
        body = bodies.question(self.style, class_id, messages, text, output_tokens)
        return self.target.request("POST", msgspec.json.encode(body))

    def traced_text(self, arrival: Arrival) -> str:
        """Text of the recorded length, whose leading blocks are the same where the trace says that they are."""
        if not arrival.hash_ids:
            return self._text(arrival.input_tokens)
        blocks, missing = [], arrival.input_tokens
        for number in arrival.hash_ids:
            if missing <= 0:
                break
            blocks.append(self._shared(f"block {self.seed} {number}", BLOCK_TOKENS, min(missing, BLOCK_TOKENS)))
            missing -= BLOCK_TOKENS
        if missing > 0:
            blocks.append(self.words.text(missing, self.rng))
        return " ".join(blocks)

    def _shared(self, name: str, tokens: int, wanted: int) -> str:
        """Text that is the same for the same name; the beginning of it where less is wanted."""
        if wanted < tokens:
            return self.words.text(wanted, random.Random(name))
        if name not in self._texts:
            self._texts[name] = self.words.text(tokens, random.Random(name))
        return self._texts[name]

    def _row(self) -> Row:
        row = self._rows[self._row_at % len(self._rows)]
        self._row_at += 1
        return row

    def _text(self, tokens: int) -> str:
        """Text with the shared prefix in front; the prefix counts into the tokens."""
        shared = min(self.style.prefix_tokens, max(tokens - 1, 0))
        if not shared:
            return self.words.text(tokens, self.rng)
        group = self.rng.randrange(self.style.prefix_groups)
        prefix = self._shared(f"prefix {self.seed} {group}", self.style.prefix_tokens, shared)
        return f"{prefix} {self.words.text(tokens - shared, self.rng)}"

    def _image(self, class_id: int, shape: Shape) -> Item:
        text, tokens = self._text(shape.input_tokens), self.style.default_output_tokens
        images = [bodies.png(shape.width, shape.height, self.rng) for _ in range(shape.images)]
        said = bodies.picture_message(self.style, text, images)
        return self._post(class_id, bodies.question(self.style, class_id, [said], text, tokens), [text], tokens)

    def _post(
        self, class_id: int, body: dict[str, Any], said: Sequence[str], asked_tokens: int, follow: Item | None = None
    ) -> Item:
        wire = self.target.request("POST", msgspec.json.encode(body))
        return Item(wire, class_id, sum(map(self.words.count, said)), asked_tokens, follow)
