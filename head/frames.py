"""What an agent may say: sizes, names and addresses in its frames, checked before the core believes anything.

An agent is our own program, but whoever holds the join token can speak in its place. What no honest agent says ends
the session; texts that may honestly be long (an engine's last words) are cut. Numbers are bounded by their types in
`common/wire.py`.
"""

from __future__ import annotations

import ipaddress
import re

import msgspec

from common import limits, wire
from common.errors import ErrorInfo, InvalidRequest
from common.nesting import is_deeper

ERROR_CHARS = 2_000
DETAIL_BYTES = 65_536
ID_CHARS = 128
RUNS_REPORTED = 1_000  # far more than run at a time: what was not acknowledged is said again
INVENTORY_BYTES = 262_144
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_IDENTITY = re.compile(r"[0-9a-f]{64}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_replace = msgspec.structs.replace


def check_hello(hello: wire.Hello, peer: str) -> None:
    """Raises: InvalidRequest."""
    words = (hello.boot_id, hello.agent_id, hello.launch_id, hello.version, hello.cluster_id)
    if any(len(word) > ID_CHARS or not word.isprintable() for word in words):
        raise InvalidRequest(f"hello: an id is longer than {ID_CHARS} characters, or not printable")
    if not (0 <= hello.data_port <= 65_535 and 0 <= hello.http_port <= 65_535):
        raise InvalidRequest("hello: a port is not one")
    if len(msgspec.json.encode(hello.inventory)) > INVENTORY_BYTES:
        raise InvalidRequest(f"hello: the inventory is larger than {INVENTORY_BYTES} bytes")
    if hello.identity and not _IDENTITY.fullmatch(hello.identity):
        raise InvalidRequest("hello: the identity is not 32 bytes in hex")
    check_address(hello.advertise, peer)


def check_address(advertise: str, peer: str) -> None:
    """That the head may be sent there with requests: a host, and not what only the head's own machine can reach.

    Raises: InvalidRequest.
    """
    if not advertise:
        return
    host = advertise.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        if not _HOST.fullmatch(host):
            raise InvalidRequest("hello: the advertised address is neither a host name nor an IP address") from None
        is_loopback, is_special = host.lower().rstrip(".").endswith("localhost"), False
    else:
        address = getattr(address, "ipv4_mapped", None) or address
        is_loopback = address.is_loopback
        is_special = address.is_link_local or address.is_multicast or address.is_unspecified
    if is_special or (is_loopback and not _is_loopback(peer)):
        raise InvalidRequest(
            f"hello: {host[:64]} cannot be a node's address for others",
            hint="set the agent's `advertise` to an address at which the head reaches it",
        )


def tame(message: wire.Message) -> wire.Message:
    """The message with its texts bounded. Raises: InvalidRequest for what no agent says."""
    kind = type(message)
    if kind is wire.Result:
        return _tame_result(message)  # type: ignore[arg-type]
    if kind is wire.Report:
        return _tame_report(message)  # type: ignore[arg-type]
    if kind is wire.LogChunk:
        assert isinstance(message, wire.LogChunk)
        chars = len(message.data) + sum(len(line.text) for line in message.lines)
        if chars > 2 * limits.LOG_CHUNK_BYTES or len(message.lines) > limits.LOG_LINES_PER_CHUNK:
            raise InvalidRequest(f"a piece of a log is longer than {limits.LOG_CHUNK_BYTES} bytes")
        return message if message.error is None else _replace(message, error=tame_error(message.error))
    return message


def tame_error(error: ErrorInfo) -> ErrorInfo:
    """An error of bounded size, with a code that can be a label."""
    is_small = not error.details or (
        not is_deeper(error.details, limits.NESTING) and len(msgspec.json.encode(error.details)) <= DETAIL_BYTES
    )
    return ErrorInfo(
        code=error.code if _CODE.fullmatch(error.code) else "internal",
        message=error.message[:ERROR_CHARS],
        hint=error.hint[:ERROR_CHARS],
        details=error.details if is_small else {},
        is_retryable=error.is_retryable,
    )


def _tame_result(result: wire.Result) -> wire.Result:
    if is_deeper(result.detail, limits.NESTING) or len(msgspec.json.encode(result.detail)) > DETAIL_BYTES:
        raise InvalidRequest(f"the detail of a result is larger than {DETAIL_BYTES} bytes, or nested too deeply")
    manifest = result.manifest
    if manifest is not None and (
        is_deeper(manifest.detected, limits.NESTING)
        or len(msgspec.json.encode(manifest.detected)) > DETAIL_BYTES
        or any(file.size > wire.BYTES_MAX or file.chunk_bytes > wire.BYTES_MAX for file in manifest.files)
    ):
        raise InvalidRequest("a manifest's sizes are out of range, or what it detected is too much")
    return result if result.error is None else _replace(result, error=tame_error(result.error))


def _tame_report(report: wire.Report) -> wire.Report:
    if (
        len(report.replicas) > 2 * limits.REPLICAS_PER_NODE
        or len(report.copies) > limits.COPIES_PER_NODE
        or len(report.runs) > RUNS_REPORTED
    ):
        raise InvalidRequest("a report names more than a node can hold")
    if report.runs:
        report = _replace(report, runs=tuple(map(_tame_run, report.runs)))
    if all(copy.error is None for copy in report.copies) and all(
        replica.error is None and not replica.last_log for replica in report.replicas
    ):
        return report
    copies = tuple(
        copy if copy.error is None else _replace(copy, error=tame_error(copy.error)) for copy in report.copies
    )
    return _replace(report, copies=copies, replicas=tuple(map(_tame_replica, report.replicas)))


def _tame_run(status: wire.RunStatus) -> wire.RunStatus:
    if len(status.run) > 2 * ID_CHARS or len(status.digest) > ID_CHARS or not status.digest.isascii():
        raise InvalidRequest(f"a run's id or digest is longer than {ID_CHARS} characters")
    return status if status.error is None else _replace(status, error=tame_error(status.error))


def _tame_replica(status: wire.ReplicaStatus) -> wire.ReplicaStatus:
    lines = tuple(line[: limits.LAST_LOG_CHARS] for line in status.last_log[-limits.LAST_LOG_LINES :])
    return _replace(status, error=tame_error(status.error) if status.error else None, last_log=lines)


def _is_loopback(peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return not peer  # a test's, without a socket
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
