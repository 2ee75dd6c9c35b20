"""Exact prompt sizes by a tokenizer: a small one stands in for the `tokenizers` package."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.loadgen.words import Tokenizer, Words


class PairTokenizer:
    """Tokens of at most four letters; a space belongs to the token behind it."""

    @staticmethod
    def from_file(name: str) -> PairTokenizer:
        """As the package: an Exception for a file that is none."""
        if not Path(name).exists():
            raise Exception("no such file")
        return PairTokenizer()

    def encode(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        """Ids and the places in the text."""
        assert not add_special_tokens
        found = [match.span() for match in re.finditer(r" ?\w{1,4}", text)]
        return SimpleNamespace(ids=list(range(len(found))), offsets=found)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tokenizer:
    """One that counts more tokens than words."""
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=PairTokenizer))
    (tmp_path / "tokenizer.json").write_text("{}")
    return Tokenizer(tmp_path)


@pytest.mark.parametrize("tokens", [1, 2, 7, 100, 999])
def test_texts_have_exactly_as_many_tokens(tokenizer: Tokenizer, tokens: int) -> None:
    """Cut at a token's end and counted again."""
    words = Words((), tokenizer)
    text = words.text(tokens, random.Random(tokens))
    assert words.count(text) == tokens
    assert words.counted_by == "tokenizer"


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a file that is none is named."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install"):
        Tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=PairTokenizer))
    with pytest.raises(ValueError, match=r"none\.json is no tokenizer"):
        Tokenizer(tmp_path / "none.json")
