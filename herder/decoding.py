"""What msgspec raises for bytes that are not what they should be."""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""No JSON or MessagePack, or not of the wanted type; text that is no UTF-8; nested deeper than the interpreter goes."""
