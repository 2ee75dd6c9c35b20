"""/docs and /openapi.json: the API described from its own table, on one page that needs no internet."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

import msgspec
from aiohttp import web

from head.api.call import Call
from head.api.routes import OPEN, PREFIX, Media, Route

TAG = "head"


class Documents:
    """The OpenAPI document and the page that shows it, encoded once."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.openapi = msgspec.json.encode(document)
        text = resources.files("head.api").joinpath("docs.html").read_text(encoding="utf-8")
        self.page = text.encode()
        self.policy = content_security_policy(text)


def content_security_policy(page: str) -> str:
    """Allows exactly the page's own script and style, by their hashes, and requests to this head; nothing else."""
    script, style = (
        " ".join(f"'sha256-{_sha256(part)}'" for part in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
        for tag in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


async def page(call: Call) -> web.StreamResponse:
    documents = call.shared.documents
    assert documents is not None
    return web.Response(
        body=documents.page,
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": documents.policy, "Cache-Control": "no-cache"},
    )


async def openapi(call: Call) -> web.StreamResponse:
    documents = call.shared.documents
    assert documents is not None
    return web.Response(body=documents.openapi, content_type="application/json", headers={"Cache-Control": "no-cache"})


_PAGE = Media("text/html", "The page.")
ROUTES = (
    Route("GET", "/docs", page, OPEN, TAG, "This documentation", _PAGE),
    Route("GET", f"{PREFIX}/docs", page, OPEN, TAG, "This documentation", _PAGE),
    Route(
        "GET",
        f"{PREFIX}/openapi.json",
        openapi,
        OPEN,
        TAG,
        "The OpenAPI document",
        Media("application/json", "OpenAPI 3.1."),
        description="Open: it describes the API, not this cluster.",
    ),
)
