"""What a suite's run can fail with: the codes E001 to E008, each with a sentence and what can be done."""

from __future__ import annotations

CODES = {
    "E001": "Server health check failed",
    "E002": "Client health check failed",
    "E003": "Service preparation failed",
    "E004": "Workload start failed",
    "E005": "Metrics collection failed",
    "E006": "Configuration validation failed",
    "E007": "Timeout exceeded",
    "E008": "Network connection failed",
}


class SuiteError(Exception):
    """A failure with its code."""

    def __init__(self, code: str, said: str = "", *, hint: str = "") -> None:
        assert code in CODES
        self.code, self.said, self.hint = code, said, hint
        super().__init__(f"{code}: {CODES[code]}" + (f": {said}" if said else ""))
