"""The OpenAPI 3.1 document, made from the routes table and the msgspec types: nothing in it is said by hand twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from common.errors import BY_CODE
from head.api.routes import OPEN, PREFIX, ListOf, Media, PageOf, Route, WaitQuery
from herder import types as api

_REF = "#/components/schemas/{name}"
TAGS = {
    "models": "What is registered: names, sources, revisions, and what the files themselves say.",
    "operations": "Moving, serving and removing: each call is a job of one step. The paths and fields of the model "
    "store that Herder replaces keep their names.",
    "copies": "Which model is on which device, and what must stay there.",
    "nodes": "Machines that run an agent, and their devices.",
    "services": "Desired state, the engines that run for it, and their logs.",
    "jobs": "Durable graphs of steps.",
    "benchmarks": "Load that load nodes put on services and URLs together, what it measured, and what it was made of.",
    "plan": "What a model needs and how fast it would be: memory, time, cost, layouts, engine settings. Nothing is "
    "changed and nothing runs; every number says what it counts and how far it may be off.",
    "events": "Every change as it becomes durable.",
    "story": "What happened to something, and why it is as it is.",
    "keys": "Tokens by role.",
    "monitoring": "For Prometheus.",
    "head": "The head itself.",
}
_PATH_PARAMETERS = {
    "name": "The name; a model's may hold one `/`, plain or as `%2F`.",
    "model": "The model's name, with `/` plain or as `%2F`.",
    "device": "`node:disk`, `node:dram` or `node:gpu0`.",
    "id": "The id.",
    "path": "The file's name as the list of files says it.",
    "run": "The run's id.",
    "artifact": "The file's name.",
    "kind": "node, model, copy, service, replica or job.",
}
_ALWAYS = ("internal",)
_WITH_TOKEN = ("unauthenticated", "forbidden", "too_many")
_WITH_QUERY = ("invalid_value",)
_WITH_BODY = ("invalid_request", "invalid_value", "body_too_large", "unsupported_media_type")
_WITH_CHANGE = ("state_read_only", "unavailable", "timed_out", "idempotency_mismatch")


def document(routes: Sequence[Route], *, version: str) -> dict[str, Any]:
    """The whole document as plain data."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.openapi_path, {})[route.method.lower()] = _operation(route)
    used = {route.tag for route in routes}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Herder",
            "version": version,
            "description": "Stores and serves models on a rack of GPU machines.\n\n"
            "Send `Authorization: Bearer TOKEN`; roles are viewer < operator < admin. Errors are "
            '`{"error": {"code", "message", "hint", "details"}}`, and a code keeps its meaning. Times end in `_ms` '
            "and are milliseconds since the epoch; sizes are bytes. Lists take `limit` and `cursor`. Changes take an "
            "`Idempotency-Key`: a repeat with the same body is answered as the first, with another body it is 409.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items() if name in used],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "hdr_<role>_<id>_<secret>"}
            },
            "schemas": _components(routes),
        },
    }


def codes_of(route: Route) -> tuple[str, ...]:
    """Every error code that the route may answer with, in a stable order."""
    codes: dict[str, None] = dict.fromkeys(route.codes)
    if route.role != OPEN:
        codes.update(dict.fromkeys(_WITH_TOKEN))
    if route.query.__struct_fields__:
        codes.update(dict.fromkeys(_WITH_QUERY))
    if route.body is not None:
        codes.update(dict.fromkeys(_WITH_BODY))
    if route.changes:
        codes.update(dict.fromkeys(_WITH_CHANGE))
    codes.update(dict.fromkeys(_ALWAYS))
    return tuple(codes)


def operation_id(route: Route) -> str:
    """A stable id: the method and the words of the path."""
    path = route.openapi_path
    inside = path.removeprefix(PREFIX) if path.startswith(PREFIX + "/") else f"root/{path}"
    return "_".join((route.method.lower(), *re.findall(r"[a-z0-9_]+", inside.lower())))


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": operation_id(route),
        "tags": [route.tag],
        "summary": route.summary,
        "x-herder-role": route.role,
        "responses": _responses(route),
    }
    if route.description:
        operation["description"] = route.description
    if route.role == OPEN:
        operation["security"] = []
    parameters = [*_path_parameters(route), *_query_parameters(route), *_header_parameters(route)]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        schema: dict[str, Any] = {"$ref": _REF.format(name=route.body.__name__)}
        kinds = ("application/json", "application/yaml") if route.takes_yaml else ("application/json",)
        operation["requestBody"] = {
            "required": not route.is_body_optional,
            "content": {kind: {"schema": schema} for kind in kinds},
        }
    elif route.streams_body:
        schema = {"type": "string", "contentEncoding": "binary", "description": route.streams_body}
        operation["requestBody"] = {"required": True, "content": {"application/octet-stream": {"schema": schema}}}
    return operation


def _path_parameters(route: Route) -> Iterable[dict[str, Any]]:
    for name in route.parameters:
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": _PATH_PARAMETERS[name],
            "schema": {"type": "string"},
        }


def _query_parameters(route: Route) -> Iterable[dict[str, Any]]:
    _, components = msgspec.json.schema_components([route.query], ref_template=_REF)
    for name, schema in components[route.query.__name__].get("properties", {}).items():
        description = schema.pop("description", "") or _description_inside(schema)
        yield {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _description_inside(schema: dict[str, Any]) -> str:
    """Of `X | None` the description stands in one of the alternatives."""
    return next((part.pop("description") for part in schema.get("anyOf", ()) if "description" in part), "")


def _header_parameters(route: Route) -> Iterable[dict[str, Any]]:
    if route.changes:
        yield {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "A fresh word per change: a repeat is answered as the first was, with no second effect.",
            "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        }
    if route.tag == "events":
        yield {
            "name": "Last-Event-ID",
            "in": "header",
            "required": False,
            "description": "The last id that was seen: the stream goes on after it.",
            "schema": {"type": "integer", "minimum": 0},
        }


def _responses(route: Route) -> dict[str, Any]:
    content = _content(route)
    statuses = {route.status}
    if issubclass(route.query, WaitQuery) or route.answer is api.Deleted:
        statuses |= {200, 202}
    responses: dict[str, Any] = {}
    for status in sorted(statuses):
        responses[str(status)] = {"description": _SUCCESS[status], "headers": _HEADERS}
        if status != 101:
            responses[str(status)]["content"] = content
    by_status: dict[int, list[str]] = {}
    for code in codes_of(route):
        by_status.setdefault(BY_CODE[code].status, []).append(code)
    for status, codes in sorted(by_status.items()):
        responses[str(status)] = {
            "description": ", ".join(f"`{code}`" for code in codes),
            "headers": _HEADERS,
            "content": {"application/json": {"schema": {"$ref": _REF.format(name="ErrorAnswer")}}},
        }
    return responses


_SUCCESS = {
    101: "The connection becomes a websocket.",
    200: "Done.",
    201: "Made.",
    202: "Taken; it goes on. The answer shows how far it is.",
}
_HEADERS = {
    "X-Request-Id": {"description": "Names this request in the log and in stories.", "schema": {"type": "string"}}
}


def _content(route: Route) -> dict[str, Any]:
    match route.answer:
        case Media(type=kind, description=text, is_binary=is_binary):
            schema: dict[str, Any] = {"type": "string", "description": text}
            if is_binary:
                schema["contentEncoding"] = "binary"
            return {kind: {"schema": schema}}
        case PageOf(item=item):
            return _json({"$ref": _REF.format(name=_page_name(item))})
        case ListOf(item=item):
            return _json({"type": "array", "items": {"$ref": _REF.format(name=item.__name__)}})
        case other:
            return _json({"$ref": _REF.format(name=other.__name__)})


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _page_name(item: type[msgspec.Struct]) -> str:
    return f"{item.__name__}Page"


def _components(routes: Iterable[Route]) -> dict[str, Any]:
    types: dict[type[msgspec.Struct], None] = {api.ErrorAnswer: None, api.Event: None}
    pages: dict[type[msgspec.Struct], None] = {}
    for route in routes:
        if route.body is not None:
            types[route.body] = None
        match route.answer:
            case Media():
                pass
            case PageOf(item=item):
                types[item] = pages[item] = None
            case ListOf(item=item):
                types[item] = None
            case other:
                types[other] = None
    _, components = msgspec.json.schema_components(list(types), ref_template=_REF)
    for item in pages:
        components[_page_name(item)] = {
            "title": _page_name(item),
            "description": "A page of a list. `next` is the cursor of the following page, null at the end.",
            "type": "object",
            "required": ["items", "next", "total"],
            "properties": {
                "items": {"type": "array", "items": {"$ref": _REF.format(name=item.__name__)}},
                "next": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "total": {"type": "integer", "minimum": 0},
            },
        }
    return dict(sorted(components.items()))
