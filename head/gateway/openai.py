"""OpenAI's form: what is looked at in a request body, and how errors look.

Of a request only `model` and `stream` are read; the engine gets the bytes that the client sent. Where the engine
knows its model under another name than the client used, that one value is exchanged and all others stay as they are.
"""

from __future__ import annotations

import re

import msgspec
from aiohttp import web

from common.errors import HerderError, InvalidRequest, TooMany, Unauthenticated, Unavailable
from herder.decoding import UNREADABLE

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
REFUSAL_CHARS = 500
_PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*([0-9]{1,12})')
_COMPLETION = re.compile(rb'"completion_tokens"\s*:\s*([0-9]{1,12})')


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """What the gateway reads of a request."""

    model: str
    stream: bool | None = None


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Where engines put what they say when they refuse."""

    error: object = None
    message: object = None
    detail: object = None


_wanted = msgspec.json.Decoder(Wanted)
_refusal = msgspec.json.Decoder(Refusal)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode


def read_wanted(body: bytes) -> Wanted:
    """The model that is asked for. Raises: InvalidRequest."""
    try:
        return _wanted.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request is not usable: {error}", param="model") from None
    except UNREADABLE as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def with_model(body: bytes, name: str) -> bytes:
    """The body with another model name; every other value keeps its bytes."""
    members = _members.decode(body)
    members["model"] = msgspec.Raw(_encode(name))
    return b"{" + b",".join(b"%b:%b" % (_encode(key), bytes(value)) for key, value in members.items()) + b"}"


def read_usage(tail: bytes) -> tuple[int, int]:
    """(prompt, completion) tokens as the end of an answer says, 0 where it does not.

    Inside a JSON string a quote is escaped, so what a model wrote cannot be taken for its engine's account.
    """
    prompt, completion = _PROMPT.findall(tail), _COMPLETION.findall(tail)
    return int(prompt[-1]) if prompt else 0, int(completion[-1]) if completion else 0


def error_body(error: HerderError) -> bytes:
    """The error in OpenAI's form; the hint is part of the message, as the form has no other place."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    kind = ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    param = error.details.get("param")
    return _encode({"error": {"message": message, "type": kind, "code": error.code, "param": param}})


def error_event(error: HerderError) -> bytes:
    """The error as the last event of a stream."""
    return b"data: " + error_body(error) + b"\n\n"


def engine_error(status: int, body: bytes, *, secret: str) -> bytes:
    """An engine's refusal in OpenAI's form: as it came when it has that form, else what it says in ours."""
    if secret:
        body = body.replace(secret.encode(), b"***")
    try:
        answer = _refusal.decode(body)
    except UNREADABLE:
        answer = Refusal()
    if isinstance(answer.error, dict) and isinstance(answer.error.get("message"), str):
        return body
    said = next((text for text in (answer.error, answer.message, answer.detail) if isinstance(text, str) and text), "")
    message = f"the engine answered {status}" + (f": {said[:REFUSAL_CHARS]}" if said else "")
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return _encode({"error": {"message": message, "type": kind, "code": "engine_refused", "param": None}})


def error_response(error: HerderError) -> web.Response:
    """The answer for an error."""
    response = web.Response(status=error.status, body=error_body(error), content_type="application/json")
    if isinstance(error, Unauthenticated):
        response.headers["WWW-Authenticate"] = 'Bearer realm="herder"'
    elif isinstance(error, TooMany | Unavailable):
        response.headers["Retry-After"] = str(error.details.get("retry_after_s", 1))
    return response
