"""What engines, models and agents write, on a person's terminal."""

from __future__ import annotations

import json

from herder.cli import output, table


def test_text_of_others_drives_no_terminal() -> None:
    """Escape sequences, C1 controls and direction overrides lose their power; lines, colours' text and emoji stay."""
    hostile = "ok\n\tn\x1b]0;title\x07 \x9b2J \u202eabc \x1b[31mred\x1b[0m \r\nend \U0001f469\u200d\U0001f680"
    shown = table.safe(hostile)
    assert not any(char in shown for char in "\x1b\x07\x9b\u202e\r")
    assert "ok\n\tn" in shown
    assert " red " in shown
    assert shown.endswith("\U0001f469\u200d\U0001f680")


def test_json_on_a_terminal_is_the_same_document() -> None:
    """Characters that a terminal obeys are escaped, and read back as they were."""
    value = {"a": "x\x9b2J\u202e\U000e0001 y"}
    text = output._escaped(json.dumps(value, ensure_ascii=False, indent=2))
    assert text.replace("\n", "").isprintable()
    assert json.loads(text) == value
