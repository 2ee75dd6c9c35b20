"""Who asks a database, and what every connection to it prepares."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Login:
    """Who asks, and what every connection prepares."""

    user: str
    database: str
    password: str | None = field(default=None, repr=False)
    settings: tuple[tuple[str, str], ...] = ()
    statement: str = ""
