"""Decoding of queries and YAML, without a socket: nothing that people send may break the decoder or cost much."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import limits
from common.errors import InvalidRequest, InvalidValue
from head.api.bodies import decode_body, decode_query, parse_yaml
from head.api.call import near
from head.api.middleware import Throttle
from head.api.models import ModelsQuery
from head.api.routes import WaitQuery
from herder import types as api

LEAVES = st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8", exclude_categories=["C"]))
PLAIN = st.recursive(LEAVES, lambda part: st.lists(part) | st.dictionaries(st.text("abc"), part), max_leaves=10).filter(
    lambda value: value is not None
)


def is_plain(value: object) -> bool:
    """Whether it is what JSON can say."""
    if isinstance(value, dict):
        return all(isinstance(name, str | int | float | bool | None) and is_plain(part) for name, part in value.items())
    return all(map(is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | bool | None)


def as_others_read(body: bytes) -> bool:
    """Whether PyYAML finds one document there, however it would be converted."""
    try:
        return yaml.compose(body.decode(), yaml.SafeLoader) is not None
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def check_yaml(body: bytes) -> None:
    """Plain data from what is a document, and a refusal in one line from what is none."""
    try:
        value = parse_yaml(body)
    except InvalidRequest as error:
        said = error.message
    else:
        assert is_plain(value)
        assert as_others_read(body)
        return
    assert "\n" not in said
    assert len(said) < 500


@given(st.binary(max_size=300))
@example(b"a: [1, 0x1f, yes, ~, 2020-01-01, 1.5]")
@example(b"\xff")
@settings(max_examples=300)
def test_any_bytes_are_yaml_or_refused(body: bytes) -> None:
    """Whatever comes is plain data or InvalidRequest."""
    check_yaml(body)


@given(st.text(alphabet="&*a: []{}-<!|>\n\"'#,?", max_size=60))
@example("&a [*a]")
@example("{? a : [b, *c]}")
@example("? [a]\n: b")
@example("!!set {a, b}")
@example("!!binary aGk=")
@settings(max_examples=500)
def test_any_yaml_punctuation_is_data_or_refused(text: str) -> None:
    """Structure without sense breaks nothing either."""
    check_yaml(text.encode())


@given(PLAIN)
@settings(max_examples=200)
def test_plain_data_comes_through_unchanged(value: object) -> None:
    """Of what JSON can say nothing is refused, and nothing is changed."""
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True).encode()) == value


def test_aliases_are_counted_as_if_written_out() -> None:
    """As many parts as the limit allows pass, and not one doubling more, however short the text."""
    small = b"- &a [1, 2]\n- [*a, *a]"
    assert parse_yaml(small) == [[1, 2], [[1, 2], [1, 2]]]
    levels = limits.YAML_NODES.bit_length() + 1
    bomb = b"- &a0 [x]\n" + b"".join(
        b"- &a%d [*a%d, *a%d]\n" % (level, level - 1, level - 1) for level in range(1, levels)
    )
    with pytest.raises(InvalidRequest, match="aliases"):
        parse_yaml(bomb)


def test_dates_stay_text() -> None:
    """As in JSON."""
    assert parse_yaml(b"when: 2020-01-01") == {"when": "2020-01-01"}


@given(st.lists(st.tuples(st.sampled_from(["limit", "cursor", "type", "x"]), st.text(max_size=12)), max_size=4))
def test_any_query_is_taken_or_refused_as_a_value(pairs: list[tuple[str, str]]) -> None:
    """422 or a query; never another exception."""
    with suppress(InvalidValue):
        query = decode_query(pairs, ModelsQuery)
        assert isinstance(query, ModelsQuery)
        assert 1 <= query.limit <= limits.PAGE_ITEMS


@pytest.mark.parametrize("value", ["nan", "NaN", "-inf", "Infinity", "1e999", "-0.001", "", " ", "1,5"])
def test_waits_are_numbers(value: str) -> None:
    """What is no number of seconds is refused."""
    with pytest.raises(InvalidValue):
        decode_query([("wait", value)], WaitQuery)


def test_near_names_are_bounded() -> None:
    """Among very many names the search still looks at a bounded number, and finds a name by its last part."""

    class Counted(dict[str, Any]):
        seen = 0

        def __iter__(self) -> Any:
            for key in super().__iter__():
                self.seen += 1
                yield key

    names = Counted({f"model-{number:05}": None for number in range(100_000)})
    near("model-0000x", names, "list")
    assert names.seen <= 1_000
    assert near("m", {"org/m": 1, "x": 1}, "list") == "did you mean 'org/m'?"
    assert near("something", {"other": 1}, "list") == "list"


def test_the_throttle_forgives_after_a_minute_and_forgets_the_oldest() -> None:
    """Windows of a minute; IPv6 neighbours count together; memory is bounded."""
    now = [0.0]
    throttle = Throttle(clock=lambda: now[0])
    waits = [throttle.failed("10.0.0.1") for _ in range(limits.AUTH_FAILURES_PER_MINUTE + 1)]
    assert waits[-2:] == [0, 60]
    assert throttle.failed("10.0.0.2") == 0
    now[0] = 61.0
    assert throttle.failed("10.0.0.1") == 0
    for number in range(limits.AUTH_FAILURES_PER_MINUTE):
        throttle.failed(f"2001:db8::{number:x}")
    assert throttle.failed("2001:db8::ffff") > 0
    assert throttle.failed("2001:db8:1::1") == 0
    assert throttle.failed("::ffff:10.0.0.2") == 0
    for number in range(limits.AUTH_ADDRESSES + 5):
        throttle.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(throttle._seen) == limits.AUTH_ADDRESSES
    assert throttle.failed(None) == 0
    assert throttle.failed("unix") == 0


@pytest.mark.parametrize("depth", [200, 100_000])  # the latter is more than the reader itself goes
async def test_endless_nesting_is_told_as_such(depth: int) -> None:
    """Not as something that is no JSON."""
    with pytest.raises(InvalidRequest, match="too deeply"):
        await decode_body(
            b'{"name":"a","metadata":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
            api.RegisterModel,
            content_type="application/json",
        )


@pytest.mark.parametrize("content_type", ["application/json", "application/yaml"])
async def test_what_is_nested_too_deeply_is_not_kept(content_type: str) -> None:
    """Data one stack can just decode, another may not be able to encode: one model broke the list for everybody."""
    deep = b'{"name":"a","type":"llm","sources":["http://h/x"],"metadata":' + b'{"a":' * 200 + b"1" + b"}" * 201
    with pytest.raises(InvalidRequest, match="too deeply"):
        await decode_body(deep, api.RegisterModel, content_type=content_type)
