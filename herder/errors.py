"""What the client raises. Every error carries a stable code, one line for people, and a hint where there is a cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from herder.types import JobView


class HerderError(Exception):
    """Root of everything that the client raises on purpose.

    `code` is stable and meant for programs, `message` is one line for people, `hint` says what to do ("" if nothing).
    """

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class HerderApiError(HerderError):
    """The head answered with an error.

    `status` is the HTTP status, `details` holds numbers and names for programs. Codes are listed in docs/api.md.
    """

    def __init__(
        self, code: str, message: str, *, hint: str = "", status: int = 0, details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(code, message, hint=hint)
        self.status = status
        self.details = details or {}


class HerderConnectionError(HerderError):
    """The head could not be reached, or the connection broke. Codes: `unreachable`, `tls_failed`, `cut_off`."""


class HerderTimeoutError(HerderError):
    """No answer, or no end of a wait, within the time given. The outcome is unknown. Code: `timed_out`."""


class HerderConfigError(HerderError):
    """The client's own settings are wrong: an unreadable token file, an unknown context. Code: `client_config`."""


class HerderJobError(HerderError):
    """A job that was waited for ended failed or cancelled; `job` is its last view. Code: that of the first failure."""

    def __init__(self, code: str, message: str, job: JobView, *, hint: str = "") -> None:
        super().__init__(code, message, hint=hint)
        self.job = job
