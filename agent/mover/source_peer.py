"""peer://HOST:PORT sources: another node's mover, by ticket.

The ticket names the manifest digest; a manifest that comes from the peer must have it. Chunk lists are checked
against the blob id and chunks against the list, so a peer can waste time but not put one wrong byte into the store.
"""

from __future__ import annotations

import base64
import http.client

import msgspec

from agent.mover.config import MoverConfig
from agent.mover.http_client import HttpConnection
from agent.mover.sources import Listing, RemoteFile, split
from agent.store.digests import DIGEST_BYTES, check_leaves, check_manifest, chunk_count, hex_of
from common.errors import DigestMismatch, InvalidSource, SourceFailed
from common.manifest import Manifest
from common.tickets import Ticket
from herder.decoding import UNREADABLE

MANIFEST_BYTES = 8 << 20
TICKET_HEADER = "X-Herder-Ticket"


class PeerOrigin:
    """One node that has the model."""

    is_peer = True

    def __init__(self, url: str, ticket: str, config: MoverConfig) -> None:
        host, port, _ = split(url)
        if not host or port is None:
            raise InvalidSource(f"{url[:80]!r}: not peer://HOST:PORT")
        if not ticket or len(ticket) > 4_096 or not ticket.isascii() or not ticket.isprintable():
            raise InvalidSource("a peer source needs a ticket")
        self.name = url
        self.connections = config.connections_per_source
        self._base = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._ticket, self._config = ticket, config

    def connect(self) -> HttpConnection:
        """A keep-alive connection that shows the ticket."""
        return HttpConnection(
            connect_timeout_s=self._config.connect_timeout_s,
            read_timeout_s=self._config.read_timeout_s,
            allow_link_local=self._config.allow_link_local,
            headers={TICKET_HEADER: self._ticket},
            follows=False,
        )

    def listing(self) -> Listing:
        """The ticketed manifest and its files. Raises: DigestMismatch when it is not the ticketed one."""
        body = self._get("/manifest", MANIFEST_BYTES)
        try:
            manifest = msgspec.json.decode(body, type=Manifest)
        except UNREADABLE:
            raise SourceFailed(f"{self.name}: its manifest cannot be read") from None
        check_manifest(manifest)
        if manifest.digest != self._ticketed_digest():
            raise DigestMismatch(f"{self.name}: not the manifest that the ticket names")
        return Listing(self.files_of(manifest), manifest)

    def files_of(self, manifest: Manifest) -> tuple[RemoteFile, ...]:
        """Where this peer serves the blobs of a manifest."""
        return tuple(
            RemoteFile(file.path, file.size, f"{self._base}/blobs/{hex_of(file.blob)}") for file in manifest.files
        )

    def refresh(self, file: RemoteFile) -> RemoteFile:
        """A blob never changes; a peer that says so is wrong."""
        raise SourceFailed(f"{self.name}: gave another answer for the same blob")

    def leaves(self, blob: str, size: int, chunk_bytes: int) -> bytes:
        """The blob's chunk digests. Raises: DigestMismatch when they are not."""
        body = self._get(f"/chunks/{hex_of(blob)}", DIGEST_BYTES * chunk_count(size, chunk_bytes))
        check_leaves(blob, size, chunk_bytes, body)
        return body

    def _get(self, path: str, limit: int) -> bytes:
        connection = self.connect()
        try:
            response = connection.request(self._base + path, {})
            body = response.read(limit + 1)
        except (OSError, http.client.HTTPException) as error:
            raise connection.failed(error) from None
        finally:
            connection.close()
        if len(body) > limit:
            raise SourceFailed(f"{self.name}{path}: longer than it can be")
        return body

    def _ticketed_digest(self) -> str:
        try:
            payload = base64.urlsafe_b64decode(self._ticket.partition(".")[0])
            return msgspec.json.decode(payload, type=Ticket).digest
        except (ValueError, *UNREADABLE):
            raise InvalidSource("the ticket of a peer source cannot be read") from None
