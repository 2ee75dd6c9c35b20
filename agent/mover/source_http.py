"""http:// and https:// sources: one file, or a directory that says what is in it.

A URL that ends in '/' is a directory. It has a `herder-manifest.json`, or answers itself with JSON: a list of
`{"path", "size", "sha256"}` (sha256 may be left out), or an object with such a list under "files". The entries
`{"name", "type": "file", "size"}` of nginx (`autoindex_format json`) are understood too; its sub-directories are not
entered. Any other URL is one file, whose name is the last part of the path.
"""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import msgspec

from agent.mover.config import MoverConfig
from agent.mover.http_client import HttpConnection, content_range, validator_of
from agent.mover.sources import Listing, RemoteFile, checked, split
from agent.store.digests import is_hex
from common import ids
from common.config import read_secret
from common.errors import HerderError, InvalidSource, SourceFailed, SourceNotFound
from herder.decoding import UNREADABLE

LISTING_BYTES = 4 << 20
LISTING_NAME = "herder-manifest.json"


class HttpOrigin:
    """One URL."""

    is_peer = False

    def __init__(self, url: str, config: MoverConfig) -> None:
        host, _, _ = split(url)
        if not host or "@" in urlsplit(url).netloc:
            raise InvalidSource(f"{url[:80]!r}: a host is missing, or a user name is in it")
        self.url, self._config = url, config
        self.name = url.partition("?")[0]
        self.connections = config.connections_per_source
        self._place = urlsplit(url).netloc
        token_file = config.http_token_files.get(self._place) or config.http_token_files.get(host, "")
        self._token = read_secret(Path(token_file)) if token_file else ""

    def connect(self) -> HttpConnection:
        """A keep-alive connection."""
        return HttpConnection(
            connect_timeout_s=self._config.connect_timeout_s,
            read_timeout_s=self._config.read_timeout_s,
            allow_link_local=self._config.allow_link_local,
            token=self._token,
            token_host=self._place,
        )

    def leaves(self, blob: str, size: int, chunk_bytes: int) -> bytes:
        """Plain servers have none."""
        raise SourceNotFound(f"{self.name} knows no chunk lists")

    def listing(self) -> Listing:
        """The files behind the URL."""
        connection = self.connect()
        try:
            if urlsplit(self.url).path.endswith("/"):
                return Listing(checked(self._directory(connection)))
            name = unquote(urlsplit(self.url).path.rpartition("/")[2])
            file = RemoteFile(ids.check_relative_path(name), -1, self.url)
            return Listing(checked([probe(connection, file)]))
        finally:
            connection.close()

    def refresh(self, file: RemoteFile) -> RemoteFile:
        """Size and ETag as they are now."""
        connection = self.connect()
        try:
            return probe(connection, msgspec.structs.replace(file, size=-1, validator=""))
        finally:
            connection.close()

    def _directory(self, connection: HttpConnection) -> list[RemoteFile]:
        base, _, query = self.url.partition("?")
        try:
            rows = _json(connection, f"{base}{LISTING_NAME}" + (f"?{query}" if query else ""))
        except SourceNotFound:
            rows = _json(connection, self.url)
        if isinstance(rows, dict):
            rows = rows.get("files")
        if not isinstance(rows, list):
            raise InvalidSource(f"{self.name} does not list its files as JSON", hint=f"put a {LISTING_NAME} there")
        files = [_row(row, base, query) for row in rows if not _is_skipped(row)]
        return [file if file.size >= 0 else probe(connection, file) for file in files]


def _is_skipped(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    name = row.get("path", row.get("name"))
    return row.get("type", "file") != "file" or name == LISTING_NAME


def _row(row: Any, base: str, query: str) -> RemoteFile:
    if not isinstance(row, dict):
        raise InvalidSource("an entry of the file list is not an object")
    path, size, sha256 = row.get("path", row.get("name")), row.get("size", -1), row.get("sha256") or ""
    if not isinstance(path, str) or not isinstance(sha256, str) or isinstance(size, bool) or not isinstance(size, int):
        raise InvalidSource("an entry of the file list has no path, or its size or sha256 is of the wrong type")
    ids.check_relative_path(path)
    if size < -1 or size > 1 << 50:
        raise InvalidSource(f"{path}: {size} is not a file size")
    sha256 = sha256.lower()
    if sha256 and not is_hex(sha256):
        raise InvalidSource(f"{path}: not a sha256")
    return RemoteFile(path, size, f"{base}{quote(path)}" + (f"?{query}" if query else ""), sha256)


def _json(connection: HttpConnection, url: str) -> Any:
    response = connection.request(url, {"Accept": "application/json"})
    try:
        body = response.read(LISTING_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise connection.failed(error) from None
    if len(body) > LISTING_BYTES:
        connection.close()
        raise InvalidSource(f"the file list is larger than {LISTING_BYTES} bytes")
    if not response.isclosed():
        connection.close()
    try:
        return msgspec.json.decode(body)
    except UNREADABLE:
        raise InvalidSource(f"{url.partition('?')[0]}: not JSON", hint=f"put a {LISTING_NAME} there") from None


def probe(connection: HttpConnection, file: RemoteFile) -> RemoteFile:
    """Size and validator of a file by asking for its first byte (HEAD is refused or wrong too often)."""
    response = connection.request(file.url, {"Range": "bytes=0-0"})
    try:
        if response.status == 206:
            _, _, size = content_range(response)
        elif response.status == 416:
            size = 0 if response.headers.get("Content-Range", "").endswith("*/0") else -1
        else:
            size = -1 if response.length is None else response.length
        if response.status == 416 and size < 0:
            raise SourceFailed(f"{file.path}: the source refuses to say its size")
        validator = validator_of(response)
    except HerderError:
        connection.close()
        raise
    if response.length is not None and response.length <= 1:
        response.read()
    else:
        connection.close()
    return msgspec.structs.replace(file, size=size if file.size < 0 else file.size, validator=validator)
