"""The planner's endpoints: strict answers to every question, sound errors, and laws that hold between answers."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import HerderError, InvalidRequest, InvalidValue, ModelNotFound, NotFound
from head.planner.endpoints.base import Endpoint, ask
from head.planner.endpoints.questions import Desk, PlacedQuestion
from head.planner.endpoints.table import BY_PATH, ENDPOINTS
from tests.doubles.planner import answer, raw

EACH = pytest.mark.parametrize("endpoint", ENDPOINTS, ids=[endpoint.path or "index" for endpoint in ENDPOINTS])
PLACED = [endpoint for endpoint in ENDPOINTS if issubclass(endpoint.question, PlacedQuestion)]
ANSWER_BYTES = 8 << 20


def outcome(endpoint: Endpoint, question: dict[str, Any]) -> Any:
    """An answer, or the error that was raised instead."""
    try:
        return ask(endpoint, msgspec.json.encode(question), Desk())
    except HerderError as error:
        return error


def numbers(value: Any) -> Iterator[float]:
    """Every float inside an answer."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)


def quantities(value: Any) -> Iterator[dict[str, Any]]:
    """Every quantity inside an answer."""
    if isinstance(value, dict):
        if value.keys() >= {"value", "unit", "low", "high"}:
            yield value
        for item in value.values():
            yield from quantities(item)
    elif isinstance(value, list):
        for item in value:
            yield from quantities(item)


# every endpoint


@EACH
def test_an_example_is_answered_in_strict_json(endpoint: Endpoint) -> None:
    """No infinity, no NaN, the type that the documents name, the same bytes twice, every interval around its value."""
    example_ = dict(endpoint.example)
    made = ask(endpoint, example_, Desk())
    assert isinstance(made, endpoint.answer_type)
    assert all(math.isfinite(number) for number in numbers(msgspec.to_builtins(made)))
    sent = msgspec.json.encode(made)
    msgspec.json.decode(sent, type=endpoint.answer_type)
    assert msgspec.json.encode(ask(endpoint, example_, Desk())) == sent
    assert len(sent) < ANSWER_BYTES
    for quantity in quantities(msgspec.json.decode(sent)):
        assert quantity["low"] <= quantity["value"] <= quantity["high"], quantity


@EACH
def test_a_misspelt_field_is_refused(endpoint: Endpoint) -> None:
    """A field that does not exist is an error, not a default."""
    with pytest.raises(InvalidValue, match="sequence_lenght"):
        ask(endpoint, {**dict(endpoint.example), "sequence_lenght": 1}, Desk())


@EACH
def test_a_body_that_is_no_object_is_refused(endpoint: Endpoint) -> None:
    """Lists, texts, numbers, half a document and thousands of brackets."""
    for body in (b"[]", b'"x"', b"1", b"null"):
        with pytest.raises(InvalidValue):
            ask(endpoint, body, Desk())
    for body in (b"{", b"\xff", b'{"model":' + b"[" * 100_000):
        with pytest.raises((InvalidRequest, InvalidValue)):
            ask(endpoint, body, Desk())


@pytest.mark.parametrize("endpoint", PLACED, ids=[endpoint.path for endpoint in PLACED])
def test_without_hardware_an_answer_says_what_it_assumes(endpoint: Endpoint) -> None:
    """No silent mock: the source is a preset, and a note says that nobody named it."""
    question = {name: value for name, value in endpoint.example if name != "gpu"}
    if endpoint.path == "largescale":
        question["cluster_type"] = "custom"
    text = raw(endpoint.path, question).decode()
    assert any(f'source":"{word}"' in text for word in ("preset", "given"))
    assert "no accelerator was named and none is in the inventory" in text


@pytest.mark.parametrize("endpoint", PLACED, ids=[endpoint.path for endpoint in PLACED])
def test_unknown_names_are_not_found(endpoint: Endpoint) -> None:
    """A model and an accelerator that nobody knows are 404, with near names."""
    with pytest.raises(NotFound):
        ask(endpoint, {**dict(endpoint.example), "gpu": "H1000-XXL"}, Desk())
    if endpoint.path != "compare":  # there a wrong name is a row
        with pytest.raises(ModelNotFound) as caught:
            ask(endpoint, {**dict(endpoint.example), "model": "llama-3.1-8c"}, Desk())
        assert "lama-3.1-8" in f"{caught.value.hint} {caught.value.details}"


def test_a_comparison_outlives_a_wrong_name() -> None:
    """The others are ranked; the one that is not known says so."""
    found = answer("compare", models=["llama-3.1-8b", "nobody/knows-this"], training=True, gpu="H100", gpus=8)
    assert found["winner"] == "llama-3.1-8b"
    assert found["ranking"] == ["llama-3.1-8b"]
    assert found["comparison"]["nobody/knows-this"]["error"].startswith("model_not_found")


# hostile values

INTEGERS = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 8, 100, 1_024, 65_536, 1 << 20, 1 << 24, 1 << 26, 1 << 31, 1 << 63, 10**30]
)
FLOATS = st.sampled_from([0.0, -1.0, 0.5, 1e-300, 1e-9, 1.5, 80.0, 1e6, 1e18, 1e300])
WORDS = st.sampled_from(
    (
        "|"
        + "x" * 300
        + "|\0|fp8|bf16|fp32|none|full|fsdp|deepspeed|B200|tpu-v5e|gaudi3|qlora|adafactor|zero_bubble|latency"
        "|efficiency|sglang|efa|grpo|gpt2|deepseek-v3"
    ).split("|")
)
WRONG: st.SearchStrategy[Any] = st.sampled_from([None, [], {}, True, "1", 1.5, "NaN"])


def choices_of(type_: Any) -> list[Any]:
    """The words that a field may be."""
    if typing.get_origin(type_) is typing.Literal:
        return list(typing.get_args(type_))
    inner = [argument for argument in typing.get_args(type_) if not isinstance(argument, msgspec.Meta)]
    return [choice for argument in inner for choice in choices_of(argument)]


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    """Values for a field: edges of its kind, its words, and what it cannot be."""
    text = str(type_)
    kinds = [WRONG]
    if choices := choices_of(type_):
        kinds.append(st.sampled_from(choices))
    kinds += [INTEGERS] * ("int" in text) + [FLOATS, INTEGERS] * ("float" in text) + [WORDS] * ("str" in text)
    return st.one_of(kinds)


def questions_of(endpoint: Endpoint) -> st.SearchStrategy[dict[str, Any]]:
    """The example with up to four fields changed."""
    fields = {field.name: values_of(field.type) for field in msgspec.structs.fields(endpoint.question)}
    if not fields:
        return st.just({})
    changes = st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4, unique=True)
    return changes.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))


@EACH
def test_no_value_breaks_an_endpoint(endpoint: Endpoint) -> None:
    """Any value of any field is answered soundly or refused with a code below 500, quickly enough and in bounds."""

    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(questions_of(endpoint))
    def check(changes: dict[str, Any]) -> None:
        made = outcome(endpoint, {**dict(endpoint.example), **changes})
        if isinstance(made, HerderError):
            assert made.status in (404, 409, 413, 422), (made.code, made.message)
            assert made.message
            msgspec.json.encode(made.info())
            return
        assert all(math.isfinite(number) for number in numbers(msgspec.to_builtins(made)))
        assert len(msgspec.json.encode(made)) < ANSWER_BYTES

    check()


WIDE = {"hidden": 16_384, "layers": 10_000, "heads": 128, "ffn": 65_536, "vocab": 131_072}
PATHOLOGICAL: list[tuple[str, dict[str, Any]]] = [
    ("recommend", {"model": "llama-3.1-70b", "gpu": "H100", "gpus": 1_048_576, "training": True}),
    ("recommend", {"model": "llama-3.1-70b", "gpu": "H100", "gpus": 1_048_576}),
    ("recommend", {"model": "deepseek-v3", "gpu": "H100", "gpus": 720_720, "training": True}),
    ("recommend", {"dimensions": WIDE, "gpu": "H100", "gpus": 1_048_576, "training": True}),
    ("memory", {"dimensions": WIDE, "pp": 10_000, "virtual_stages": 1_048_576, "dp": 1}),
    ("bottleneck", {"dimensions": WIDE, "pp": 10_000, "dp": 1, "global_batch": 1 << 24}),
    ("largescale", {"model": "deepseek-v3", "num_nodes": 131_072}),
    ("scaling", {"model": "deepseek-v3", "gpu": "H100", "base_gpus": 8, "target_gpus": 1_048_576}),
    ("inference", {"model": "llama-3.1-8b", "gpu": "H100", "gpus": 1_048_576, "batch_size": 1_000_000}),
    ("inference", {"model": "llama-3.1-8b", "gpu": "H100", "gpus": 8, "request_rate": 1e6}),
    ("export", {"model": "llama-3.1-8b", "dp": 1_048_576}),
    ("launch", {"nodes": 131_072, "gpus": 8}),
    ("launch", {"nodes": 1_048_576, "gpus": 1_024}),
    ("topology", {"gpu": "H100", "gpus": 1_048_576}),
    ("sharding", {"model": "llama-3.1-8b", "dp": 1_048_576, "nodes": 131_072}),
    ("pareto", {"model": "llama-3.1-8b", "gpu": "H100", "gpus": 1_048_576, "training": True}),
    ("pareto", {"model": "llama-3.1-8b", "gpu": "H100", "gpus": 8, "gpu_cost": 0, "training": True}),
    ("vllm", {"model": "llama-3.1-8b", "gpu": "H100", "memory": 1e-300}),
    ("estimate", {"model": "llama-3.1-8b", "tokens": 1e18, "throughput": 1e-6, "checkpoint_interval": 1}),
]


@pytest.mark.parametrize(("path", "question"), PATHOLOGICAL)
def test_pathological_questions_are_bounded(path: str, question: dict[str, Any]) -> None:
    """A million GPUs, ten thousand layers: an answer of bounded size, or a refusal that says why."""
    made = outcome(BY_PATH[path], question)
    if isinstance(made, HerderError):
        assert made.status in (409, 422), (made.code, made.message)
        return
    assert len(msgspec.json.encode(made)) < ANSWER_BYTES


def test_the_number_of_layouts_is_bounded() -> None:
    """A search stops at its limit and says so."""
    found = answer("recommend", model="deepseek-v3", gpu="H100", gpus=720_720, training=True)["searched"]
    assert found["examined"] <= 50_000
    assert found["examined"] == found["feasible"] + sum(drop["count"] for drop in found["dropped"])


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("memory", "optimizer", "adamwat"),
        ("memory", "precision", "int3"),
        ("memory", "sharding", "zero4"),
        ("recommend", "optimizer", "sgdd"),
        ("recommend", "precision", "float8"),
        ("optimize", "checkpointing", "some"),
        ("rl", "algorithm", "pp0"),
        ("rl", "tuning", "half"),
        ("largescale", "cluster_type", "aws_p9"),
        ("export", "framework", "torch"),
        ("nccl", "network_type", "carrier-pigeon"),
        ("inference", "engine", "vlm"),
        ("inference", "weights", "int3"),
    ],
)
def test_unknown_words_are_refused(path: str, field: str, value: str) -> None:
    """A typing error is 422, never taken for the default."""
    with pytest.raises(InvalidValue, match=value[:4]):
        ask(BY_PATH[path], {**dict(BY_PATH[path].example), field: value}, Desk())


def test_errors_of_the_arithmetic_stay_inside() -> None:
    """An error that nobody foresaw is `internal` with its kind, without a trace of the program."""

    def broken(question: Any, desk: Desk) -> Any:
        return 1 / 0

    endpoint = BY_PATH["health"]
    with pytest.raises(HerderError) as caught:
        ask(Endpoint("x", "x", endpoint.question, endpoint.answer_type, broken, "Broken"), {}, Desk())
    assert caught.value.code == "internal"
    assert "Traceback" not in caught.value.message
