"""Request bodies: bounded before they are read, then decoded strictly.

Too large is 413 before a byte is read where the length is announced, and after BODY_BYTES where it is not; a wrong
media type is 415; malformed JSON or YAML is 400 `invalid_request`; a misspelt field, a wrong type or a value out
of range is 422 `invalid_value` and names the place.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import yaml
from aiohttp import web

from common import limits
from common.errors import BodyTooLarge, InvalidRequest, InvalidValue, TimedOut, UnsupportedMediaType
from common.nesting import is_deeper
from herder.decoding import UNREADABLE

YAML_TYPES = frozenset({"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"})
_AT = re.compile(r" - at `([^`]+)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_yaml_threads = ThreadPoolExecutor(2, thread_name_prefix="yaml")  # few: they share the interpreter with the loop


async def read_body(request: web.Request, *, takes_yaml: bool, is_optional: bool) -> bytes:
    """The body's bytes. Raises: BodyTooLarge, UnsupportedMediaType, TimedOut, InvalidRequest."""
    if not request.body_exists:
        if is_optional:
            return b""
        raise InvalidRequest("this call needs a JSON body")
    _check_type(request, takes_yaml)
    limit = limits.YAML_BYTES if request.content_type in YAML_TYPES else limits.BODY_BYTES
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    return await _read_in_time(request, limit)


async def read_nothing(request: web.Request) -> None:
    """For routes without a body: an empty one or `{}` is fine. Raises: BodyTooLarge, InvalidRequest, TimedOut."""
    if not request.body_exists:
        return
    if (request.content_length or 0) > limits.BODY_BYTES:
        raise _too_large(limits.BODY_BYTES)
    body = await _read_in_time(request, limits.BODY_BYTES)
    if body.strip() not in (b"", b"{}"):
        raise InvalidRequest("this call takes no body")


async def _read_in_time(request: web.Request, limit: int) -> bytes:
    await _continue(request)
    try:
        async with asyncio.timeout(limits.BODY_READ_S):
            return await _read(request, limit)
    except TimeoutError:
        raise TimedOut(f"the body did not arrive within {limits.BODY_READ_S:g} s") from None
    except web.RequestPayloadError:
        raise InvalidRequest("the body's framing is broken") from None


async def pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes, for a handler that bounds it and its time. Raises: InvalidRequest."""
    await _continue(request)
    try:
        while piece := await request.content.readany():
            yield piece
    except web.RequestPayloadError:
        raise InvalidRequest("the body's framing is broken") from None


async def _continue(request: web.Request) -> None:
    """Tells a client that waits for it (`Expect: 100-continue`) to send the body."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # so that the answer itself still counts as not begun
        await request.writer.drain()


async def _read(request: web.Request, limit: int) -> bytes:
    body = bytearray()
    while chunk := await request.content.readany():
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        body += chunk
    return bytes(body)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes", limit_bytes=limit)


def _check_type(request: web.Request, takes_yaml: bool) -> None:
    kind = request.content_type
    wanted = "application/json or application/yaml" if takes_yaml else "application/json"
    if kind != "application/json" and not (takes_yaml and kind in YAML_TYPES):
        raise UnsupportedMediaType(f"cannot read {kind[:80]}", hint=f"send {wanted}")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"cannot read the charset {str(request.charset)[:40]}", hint="send UTF-8")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not taken", hint="send it without Content-Encoding")


async def decode_body(body: bytes, cls: type[msgspec.Struct], *, content_type: str) -> msgspec.Struct:
    """The request's object. Raises: InvalidRequest (malformed), InvalidValue (not what the type says)."""
    try:
        if content_type in YAML_TYPES:
            document = await asyncio.get_running_loop().run_in_executor(_yaml_threads, parse_yaml, body)
            return _checked(msgspec.convert(document, cls))
        made = msgspec.json.decode(body, type=cls)
        # depth needs brackets: most bodies are known to be shallow without a look inside
        return _checked(made) if body.count(b"{") + body.count(b"[") > limits.NESTING else made
    except msgspec.ValidationError as error:
        raise invalid_value(error, cls) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except UNREADABLE as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def _checked(made: msgspec.Struct) -> msgspec.Struct:
    if is_deeper(made, limits.NESTING):
        raise InvalidRequest(f"the body is nested too deeply; at most {limits.NESTING} levels")
    return made


def decode_query(pairs: list[tuple[str, str]], cls: type[msgspec.Struct]) -> msgspec.Struct:
    """The query's object. Raises: InvalidValue."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise InvalidValue("query: a parameter is given twice")
    if any(value.lower().lstrip("+-") in ("nan", "inf", "infinity") for value in values.values()):
        raise InvalidValue("query: not a number that can be used")
    try:
        return msgspec.convert(values, cls, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_value(error, cls, root="query") from None


def invalid_value(error: msgspec.ValidationError, cls: type[msgspec.Struct], *, root: str = "$") -> InvalidValue:
    """The 422 for a value that its type refuses, with the place and the nearest field name."""
    text = str(error)
    place = _AT.search(text)
    path = (place[1] if place else "$").replace("$", root, 1)
    message = _AT.sub("", text)
    unknown = _UNKNOWN.search(message)
    hint = ""
    if unknown:
        path = f"{path}.{unknown[1][:80]}"
        near = difflib.get_close_matches(unknown[1], sorted(_field_names(cls)), n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
    return InvalidValue(f"{path}: {message}", hint=hint, path=path)


def _field_names(cls: type[msgspec.Struct]) -> set[str]:
    """Every field name of a request type and of the Structs inside it."""
    _, components = msgspec.json.schema_components([cls])
    return {name for schema in components.values() for name in schema.get("properties", ())}


class _JobLoader(yaml.SafeLoader):
    """SafeLoader of what JSON can say: what looks like a date stays text, and sets, bytes and the like are refused."""


_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_JobLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in _PLAIN_TAGS  # None: says that it does not know the tag
}
_JobLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(body: bytes) -> Any:
    """One YAML document as plain data. Aliases are allowed, bombs and loops made of them are not.

    Raises: InvalidRequest.
    """
    loader = None
    try:
        loader = _JobLoader(body.decode())
        node = loader.get_single_node()
        if node is None:
            raise InvalidRequest("the YAML document is empty")
        _check_expanded(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"the body is not YAML: {' '.join(str(error).split())[:300]}") from None
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError) as error:
        raise InvalidRequest(f"the YAML document cannot be read: {str(error)[:200]}") from None
    except RecursionError:
        raise InvalidRequest("the YAML document is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_expanded(root: yaml.Node) -> None:
    """Counts nodes as if every alias were written out, in time proportional to the text."""
    sizes: dict[int, int] = {}

    def measure(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is not None:
            if known < 0:
                raise InvalidRequest("the YAML document contains itself")
            return known
        sizes[id(node)] = -1
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(measure(item) for item in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(measure(name) + measure(value) for name, value in node.value)
        sizes[id(node)] = total
        return total

    if measure(root) > limits.YAML_NODES:
        raise InvalidRequest(
            f"the YAML document has more than {limits.YAML_NODES} parts once its aliases are written out"
        )
