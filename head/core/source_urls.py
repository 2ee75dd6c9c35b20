"""Registered sources of models: which URLs are taken, and their canonical form."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from common import ids, limits
from common.errors import HerderError, InvalidSource

SCHEMES = ("file", "http", "https", "hf", "ssh")
_HINT = "file:///path, http(s)://host/path, hf://org/name[@revision] or ssh://[user@]host/path"
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?huggingface\.co/(?P<name>[^/?#]+/[^/?#]+)/?(?:tree/(?P<revision>[^/?#]+)/?)?"
)
_HUB_SECTIONS = ("datasets", "spaces", "docs", "api", "models", "blog")


def check_source(url: str) -> str:
    """A source URL in canonical form; the page of a Hugging Face repository becomes its hf:// URL.

    Raises: InvalidSource.
    """
    if not url or len(url) > limits.SOURCE_CHARS:
        raise InvalidSource(f"a source has 1 to {limits.SOURCE_CHARS} characters, not {len(url)}", hint=_HINT)
    if not url.isprintable() or any(char.isspace() or char == "\\" for char in url):
        raise _wrong(url, "it has white space, a backslash or control characters")
    page = _HUB_PAGE.fullmatch(url)
    if page and page["name"].partition("/")[0] not in _HUB_SECTIONS:
        url = f"hf://{page['name']}" + (f"@{page['revision']}" if page["revision"] else "")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _wrong(url, "it cannot be parsed") from None
    if parts.scheme not in SCHEMES or not url[len(parts.scheme) :].startswith("://"):
        raise _wrong(url, f"its scheme is not one of {', '.join(SCHEMES)}")
    if parts.password is not None:
        raise InvalidSource("a source must not hold a password", hint="give it to the agent's settings instead")
    if ".." in parts.path.split("/"):
        raise _wrong(url, "its path has '..'")
    if parts.scheme == "file":
        _check_file(url, parts.netloc, parts.path)
    elif parts.scheme == "hf":
        _check_hub(url)
    elif not parts.hostname or port == 0:
        raise _wrong(url, "it names no host")
    elif parts.scheme == "ssh" and parts.path in ("", "/"):
        raise _wrong(url, "it names no path")
    return url


def _check_file(url: str, host: str, path: str) -> None:
    if host not in ("", "localhost") or not path.startswith("/") or path == "/":
        raise _wrong(url, "a file source is file:// and an absolute path on the node that fetches")


def _check_hub(url: str) -> None:
    name, at, revision = url.removeprefix("hf://").partition("@")
    try:
        ids.check_model_name(name)
        if at:
            ids.check_revision(revision)
    except HerderError:
        raise _wrong(url, "an hf source is hf://org/name or hf://org/name@revision") from None


def _wrong(url: str, why: str) -> InvalidSource:
    return InvalidSource(f"{url[:200]!r} is not a usable source: {why}", hint=_HINT)
