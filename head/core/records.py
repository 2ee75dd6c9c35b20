"""Records: what the journal appends. A record puts one durable object, or deletes one, and says why.

Because a record carries the whole object, `apply` is a dictionary assignment, its undo is the object that stood
there before, start-up reads only the latest object of each key, and the history stays readable as a story.
"""

from __future__ import annotations

from typing import Any

import msgspec

from head.core.objects import Object


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change. `body` None deletes. `what` is in the past tense ("copy_ready"); `cause` names the op."""

    revision: int
    at_ms: int
    what: str
    cause: str
    kind: str
    key: str
    body: Object | None
    detail: dict[str, Any] = {}
