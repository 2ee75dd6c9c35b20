"""Error codes are promises: scripts match on them, so none may vanish or change its status."""

from __future__ import annotations

import json
from pathlib import Path

from common.errors import BY_CODE, ErrorInfo, HerderError, from_info

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "error_codes.json"


def test_no_code_is_removed_or_changed() -> None:
    """Every code that was written down is still there with its status."""
    promised = json.loads(GOLDEN.read_text())
    present = {code: cls.status for code, cls in BY_CODE.items()}
    changed = {code: (status, present.get(code)) for code, status in promised.items() if present.get(code) != status}
    assert not changed, f"released codes keep their meaning: {changed}"


def test_new_codes_are_written_down() -> None:
    """A new code is added to the golden file in the same change, in order."""
    promised = json.loads(GOLDEN.read_text())
    missing = {code: cls.status for code, cls in sorted(BY_CODE.items()) if code not in promised}
    assert not missing, f"add to {GOLDEN.name}: {json.dumps(missing)}"
    assert list(promised) == sorted(promised)


def test_each_code_has_one_class() -> None:
    """Two classes of one code would make the way back from data ambiguous (the root lends its code to Internal).

    Classes outside common/errors.py are a module's own finer words for a code; they never come back from data.
    """
    seen: dict[str, type[HerderError]] = {}

    def walk(cls: type[HerderError]) -> None:
        for child in cls.__subclasses__():
            if child.__module__ != HerderError.__module__:
                continue
            assert child.code not in seen, (child, seen.get(child.code))
            seen[child.code] = child
            walk(child)

    walk(HerderError)


def test_errors_survive_the_way_as_data() -> None:
    """Each leaf comes back from its data as itself, with message, hint and details."""
    for code, cls in BY_CODE.items():
        if cls is HerderError:
            continue
        error = cls("what", hint="how", size=1)
        back = from_info(error.info())
        assert (back.code, back.status) == (code, cls.status)
        assert (back.message, back.hint, back.details) == ("what", "how", {"size": 1})
    assert from_info(ErrorInfo("of_tomorrow", "x")).code == "internal"
