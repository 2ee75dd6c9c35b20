"""HTML by construction: what is not Markup is escaped wherever it is put, so that no text of others becomes a tag."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

_VOID = ("meta", "br", "col")


class Markup(str):
    """HTML that this package wrote; every other string is text."""

    __slots__ = ()


def text_of(child: Any) -> str:
    """A child as HTML: Markup as it is, a list piece by piece, None as nothing, everything else escaped."""
    if isinstance(child, Markup):
        return str(child)
    if child is None or child is False:
        return ""
    if isinstance(child, list | tuple):
        return "".join(text_of(piece) for piece in child)
    return escaped(str(child))


def escaped(text: str) -> str:
    """A text as HTML, in an element or an attribute."""
    return escape(_plain(text))


def _plain(text: str) -> str:
    """Without control characters, and with what turns the direction of text made visible."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes: `class_` for class, `_` for `-`; None and False leave one out, True has no value."""
    parts = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        parts.append(f" {key.rstrip('_').replace('_', '-')}")
        if value is not True:
            parts.append(f'="{escaped(str(value))}"')
    opened = f"<{name}{''.join(parts)}>"
    return Markup(opened if name in _VOID else f"{opened}{text_of(children)}</{name}>")


def joined(pieces: Iterable[Any]) -> Markup:
    """Pieces behind each other."""
    return Markup("".join(text_of(piece) for piece in pieces))


def table(heads: Iterable[Any], rows: Iterable[Iterable[Any]], *, numbers_from: int = 1, class_: str = "") -> Markup:
    """A table that scrolls sideways by itself; columns from `numbers_from` on are right-aligned."""

    def cell(kind: str, place: int, child: Any) -> Markup:
        return tag(kind, child, class_="n" if place >= numbers_from else None)

    head = tag("tr", [cell("th", place, child) for place, child in enumerate(heads)])
    body = [tag("tr", [cell("td", place, child) for place, child in enumerate(row)]) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body), class_=class_ or None), class_="scroll")


def cut(text: Any, most: int) -> str:
    """A text of at most so many characters."""
    whole = str(text)
    return whole if len(whole) <= most else whole[: most - 1] + "…"
