"""The OpenAPI document and the docs page: valid, complete, of one source with the routes, and without the internet."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from common.errors import BY_CODE
from head.api import docs, openapi
from head.api.app import ROUTES
from head.api.routes import OPEN, PREFIX, Media, Query, Route
from head.auth import RANK

DOCUMENT: dict[str, Any] = openapi.document(ROUTES, version="1.2.3")
PAGE = resources.files("head.api").joinpath("docs.html").read_text(encoding="utf-8")
OPEN_PATHS = {"/", "/healthz", "/docs", f"{PREFIX}/docs", f"{PREFIX}/openapi.json"}


EACH_ROUTE = pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.openapi_path}")


def test_the_document_is_valid() -> None:
    """A validator of OpenAPI 3.1 accepts it as it goes over the wire."""
    sent = msgspec.json.decode(msgspec.json.encode(DOCUMENT))
    assert list(OpenAPIV31SpecValidator(sent).iter_errors()) == []
    assert sent["openapi"].startswith("3.1.")
    del sent["info"]["title"]
    assert next(OpenAPIV31SpecValidator(sent).iter_errors(), None) is not None  # it does look


def test_every_reference_leads_somewhere() -> None:
    """No $ref dangles, and no schema is there for nothing."""
    text = msgspec.json.encode(DOCUMENT).decode()
    used = set(re.findall(r"#/components/schemas/(\w+)", text))
    known = set(DOCUMENT["components"]["schemas"])
    assert used <= known
    assert known - used <= {"Event"}  # told of in the text of the streams


@EACH_ROUTE
def test_every_route_is_documented_and_protected(route: Route) -> None:
    """Role, tag, summary, request and answer schema: nothing is left out."""
    operation = DOCUMENT["paths"][route.openapi_path][route.method.lower()]
    assert route.role in {*RANK, "agent", OPEN}
    assert route.tag in openapi.TAGS
    assert operation["summary"][0].isupper()
    assert not operation["summary"].endswith(".")
    assert operation["x-herder-role"] == route.role
    assert ("security" in operation) == (route.role == OPEN)
    assert ("requestBody" in operation) == (route.body is not None or bool(route.streams_body))
    success = operation["responses"][str(route.status)]
    assert route.status == 101 or success["content"]
    assert {item["name"] for item in operation.get("parameters", []) if item["in"] == "path"} == set(route.parameters)
    for name in route.query.__struct_fields__:
        described = next(item for item in operation["parameters"] if item["name"] == name)
        assert described["description"], name
    for status in operation["responses"]:
        assert status in {"101", "200", "201", "202"} or operation["responses"][status]["content"]


@EACH_ROUTE
def test_only_what_must_be_open_is_open(route: Route) -> None:
    """A path without a token is on a short list; what changes something needs an operator at least."""
    assert (route.role == OPEN) == (route.openapi_path in OPEN_PATHS)
    if route.changes and route.role != "agent":
        assert RANK[route.role] >= RANK["operator"]


@EACH_ROUTE
def test_codes_of_routes_exist(route: Route) -> None:
    """Every code that a route promises is in the tree of errors, and shows in the document."""
    operation = DOCUMENT["paths"][route.openapi_path][route.method.lower()]
    for code in openapi.codes_of(route):
        assert code in operation["responses"][str(BY_CODE[code].status)]["description"]


@EACH_ROUTE
def test_requests_forbid_what_they_do_not_know(route: Route) -> None:
    """A misspelt field or parameter is an error in every request, also in the structs inside."""
    assert issubclass(route.query, Query)
    for cls in (route.query, route.body):
        if cls is None:
            continue
        _, components = msgspec.json.schema_components([cls])
        for name, schema in components.items():
            assert schema.get("additionalProperties") is False, name


def test_ids_and_routes_are_unique() -> None:
    """No two routes share a method and path, or an operation id."""
    assert len({(route.method, route.openapi_path) for route in ROUTES}) == len(ROUTES)
    ids = [openapi.operation_id(route) for route in ROUTES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in ids)


def test_the_paths_of_the_model_store_are_kept() -> None:
    """Its paths, below /api/v1, with its field names."""
    paths = DOCUMENT["paths"]
    for method, path in (
        ("get", "/health"),
        ("get", "/models"),
        ("post", "/models"),
        ("get", "/models/{name}"),
        ("delete", "/models/{name}"),
        ("post", "/download"),
        ("post", "/move"),
        ("post", "/serve"),
        ("post", "/stop/{model}/{device}"),
        ("get", "/nodes"),
        ("post", "/jobs"),
        ("get", "/jobs/{id}"),
    ):
        assert method in paths[PREFIX + path], path
    schemas = DOCUMENT["components"]["schemas"]
    assert {"name", "type", "source_url", "metadata"} <= set(schemas["RegisterModel"]["properties"])
    assert set(schemas["Download"]["properties"]) == {"model_name", "source_url", "target_device"}
    assert set(schemas["Move"]["properties"]) == {"model_name", "source_device", "target_device", "keep_source"}
    assert set(schemas["Serve"]["properties"]) == {"model_name", "device", "port", "config"}


def test_streams_say_what_they_send() -> None:
    """A route that does not answer with JSON objects says what it answers with."""
    for route in ROUTES:
        if isinstance(route.answer, Media):
            assert route.answer.description
            assert "/" in route.answer.type


def test_the_docs_page_needs_no_internet() -> None:
    """No address outside this head stands in the page, and nothing in it loads anything but the document."""
    assert not re.findall(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(", PAGE)
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"([^\"]*)\"", PAGE) == ["data:,"]
    assert re.findall(r"fetch\((\w+)", PAGE) == ["address", "SOURCE"]
    assert f'const SOURCE = "{PREFIX}/openapi.json"' in PAGE


def test_the_docs_page_runs_under_its_policy() -> None:
    """No inline handlers, style attributes or markup made from data: the policy would stop them, or nothing would."""
    assert not re.findall(r"\son\w+=|\sstyle=|innerHTML|outerHTML|document\.write|insertAdjacentHTML|eval\(", PAGE)
    policy = docs.content_security_policy(PAGE)
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2
    assert "unsafe" not in policy
    assert docs.content_security_policy(PAGE.replace("<style>", "<style> ")) != policy
