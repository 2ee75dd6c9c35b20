"""One tree of errors. Each leaf has a stable code, an HTTP status and whether a retry can help.

A code, once released, keeps its meaning: scripts match on it. The message is for people, `details` holds
numbers and names for programs, the hint says what to do. No error carries a traceback across a border.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels: on the wire, in the journal and in API answers."""

    code: str
    message: str
    hint: str = ""
    details: dict[str, Any] = {}
    is_retryable: bool = False


class HerderError(Exception):
    """Root of the tree. `details` are JSON-safe fields; the hint says what the person can do."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def info(self) -> ErrorInfo:
        """The error as data."""
        return ErrorInfo(
            code=self.code,
            message=self.message,
            hint=self.hint,
            details=self.details,
            is_retryable=self.is_retryable,
        )


# the request is wrong
class InvalidRequest(HerderError):
    code, status = "invalid_request", 400


class InvalidName(HerderError):
    code, status = "invalid_name", 422


class InvalidDevice(HerderError):
    code, status = "invalid_device", 422


class InvalidValue(HerderError):
    code, status = "invalid_value", 422


class InvalidSource(HerderError):
    code, status = "invalid_source", 422


class InvalidRecipe(HerderError):
    code, status = "invalid_recipe", 422


class InvalidJob(HerderError):
    code, status = "invalid_job", 422


class JobCycle(HerderError):
    code, status = "job_cycle", 422


class InvalidPath(HerderError):
    code, status = "invalid_path", 422


class InvalidConfig(HerderError):
    code, status = "invalid_config", 422


class BodyTooLarge(HerderError):
    code, status = "body_too_large", 413


class UnsupportedMediaType(HerderError):
    code, status = "unsupported_media_type", 415


class MethodNotAllowed(HerderError):
    code, status = "method_not_allowed", 405


# who asks
class Unauthenticated(HerderError):
    code, status = "unauthenticated", 401


class Forbidden(HerderError):
    code, status = "forbidden", 403


class WrongCluster(HerderError):
    code, status = "wrong_cluster", 403


class ProtocolUnsupported(HerderError):
    code, status = "protocol_unsupported", 426


# what is not there, or already is
class NotFound(HerderError):
    code, status = "not_found", 404


class ModelNotFound(NotFound):
    code = "model_not_found"


class NodeNotFound(NotFound):
    code = "node_not_found"


class DeviceNotFound(NotFound):
    code = "device_not_found"


class CopyNotFound(NotFound):
    code = "copy_not_found"


class ServiceNotFound(NotFound):
    code = "service_not_found"


class JobNotFound(NotFound):
    code = "job_not_found"


class KeyNotFound(NotFound):
    code = "key_not_found"


class RecipeNotFound(NotFound):
    code = "recipe_not_found"


class BenchmarkNotFound(NotFound):
    code = "benchmark_not_found"


class SourceNotFound(NotFound):
    code = "source_not_found"


class Conflict(HerderError):
    code, status = "conflict", 409


class AlreadyExists(Conflict):
    code = "already_exists"


class InUse(Conflict):
    code = "in_use"


class LastCopy(Conflict):
    code = "last_copy"


class IdempotencyMismatch(Conflict):
    code = "idempotency_mismatch"


class NothingFits(Conflict):
    code = "nothing_fits"


class NodeCordoned(Conflict):
    code = "node_cordoned"


class PortTaken(Conflict):
    code = "port_taken"


class StaleGeneration(Conflict):
    code = "stale_generation"


class StaleHead(Conflict):
    """The agent has served a head that started later than this one."""

    code = "stale_head"


# the world does not allow it now
class TooMany(HerderError):
    code, status, is_retryable = "too_many", 429, True


class Unavailable(HerderError):
    code, status, is_retryable = "unavailable", 503, True


class NodeUnreachable(Unavailable):
    code = "node_unreachable"


class NoReplicaReady(Unavailable):
    code = "no_replica_ready"


class EngineStopped(Unavailable):
    """The engine was stopped while it answered, after it had been given time to finish."""

    code = "engine_stopped"


class GatewayFull(Unavailable):
    """The requests on their way fill the gateway's memory."""

    code = "gateway_full"


class TimedOut(HerderError):
    """The outcome is unknown: it may still happen."""

    code, status, is_retryable = "timed_out", 504, True


class UpstreamFailed(HerderError):
    code, status, is_retryable = "upstream_failed", 502, True


class DiskFull(HerderError):
    code, status = "disk_full", 507


class MemoryFull(HerderError):
    code, status = "memory_full", 507


class StateReadOnly(HerderError):
    """The head cannot write its journal: reads and leases go on, changes are refused."""

    code, status, is_retryable = "state_read_only", 507, True


class StateLocked(HerderError):
    """Another daemon owns this state directory."""

    code, status = "state_locked", 409


class StateCorrupt(HerderError):
    code, status = "state_corrupt", 500


class StateTooNew(HerderError):
    code, status = "state_too_new", 500


# moving and serving
class DigestMismatch(HerderError):
    code, status = "digest_mismatch", 502


class SizeMismatch(HerderError):
    code, status = "size_mismatch", 502


class SourceFailed(HerderError):
    code, status, is_retryable = "source_failed", 502, True


class SourceRefused(HerderError):
    code, status = "source_refused", 502


class AddressRefused(SourceRefused):
    """The address is link-local or a cloud's metadata service, which nothing may be fetched from unless configured."""

    code = "address_refused"


class ExtraMissing(HerderError):
    """An optional dependency is not installed; the hint names the command that installs it."""

    code, status = "extra_missing", 501


class EngineMissing(HerderError):
    code, status = "engine_missing", 409


class EngineFailed(HerderError):
    code, status, is_retryable = "engine_failed", 502, True


class EngineNotReady(HerderError):
    code, status, is_retryable = "engine_not_ready", 503, True


class Unhealthy(HerderError):
    code, status, is_retryable = "unhealthy", 502, True


class RunFailed(HerderError):
    """A node's part of a benchmark came to nothing."""

    code, status = "run_failed", 502


class Cancelled(HerderError):
    code, status = "cancelled", 409


class DependencyFailed(HerderError):
    code, status = "dependency_failed", 409


class Internal(HerderError):
    code, status = "internal", 500


def _leaves(root: type[HerderError]) -> list[type[HerderError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _leaves(child))]


BY_CODE: dict[str, type[HerderError]] = {cls.code: cls for cls in reversed(_leaves(HerderError))}


def from_info(info: ErrorInfo) -> HerderError:
    """The exception for an error that arrived as data; an unknown code becomes its nearest known root."""
    return BY_CODE.get(info.code, Internal)(info.message, hint=info.hint, **info.details)
