"""The shipped synthetic corpus: common English words that most vocabularies hold as one token each, drawn by a seed.

Without the model's tokenizer a prompt's size is its number of words, and is called an estimate. With it (a
tokenizer.json, and the `tokenizers` package) text is cut to the exact number of tokens.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

CountedBy = Literal["words", "tokenizer"]
_TEXT = """
the of and to in that it was for on with as his they at be this from have or by one had not but what all were when we
there can an your which their said if do will each about how up out them then she many some so these would other into
has more her two like him see time could no make than first been its who now people my made over did down only way
find use may water long little very after words called just where most know get through back much before go good new
write our used me man too any day same right look think also around another came come work three word must because
does part even place well such here take why things help put years different away again off went old number great tell
men say small every found still between name should home big give air line set own under read last never us left end
along while might next sound below saw something thought both few those always looked show large often together asked
house world going want school important until form food keep children feet land side without boy once animals life
enough took sometimes four head above kind began almost live page got earth need far hand high year mother light parts
country father let night following picture being study second eyes soon times story boys since white days ever paper
hard near sentence better best across during today others however sure means knew try told young miles sun ways thing
whole hear example heard several change answer room sea against top turned learn point city play toward five using
himself usually money seen car morning given order green red door area early later book stop family table north south
east west front field fire river cold map rain strong dark farm cut done group true half rest rule certain travel open
watch color face wood main plain girl ready list though talk bird dog body music hold measure state product black
short class wind question happen complete ship rock force carry power town machine note wait plan figure star box noun
unit base fall king space begin
"""
WORDS = _TEXT.split()
TRIES = 8


class Words:
    """Text of a wished number of tokens."""

    counted_by: CountedBy

    def __init__(self, lines: Sequence[str] = (), tokenizer: Tokenizer | None = None) -> None:
        """lines: text to draw from instead of the synthetic corpus."""
        self._words: Sequence[str] = " ".join(lines).split() if lines else WORDS
        self._is_prose = bool(lines)
        self._tokenizer = tokenizer
        self.counted_by = "tokenizer" if tokenizer is not None else "words"

    def text(self, tokens: int, rng: random.Random) -> str:
        """Text of so many tokens."""
        if tokens <= 0:
            return ""
        if self._tokenizer is None:
            return " ".join(self._draw(tokens, rng))
        return self._tokenizer.cut(lambda count: " ".join(self._draw(count, rng)), tokens)

    def count(self, text: str) -> int:
        """Tokens of a text, as `counted_by` says."""
        return self._tokenizer.count(text) if self._tokenizer is not None else len(text.split())

    def _draw(self, count: int, rng: random.Random) -> Sequence[str]:
        if not self._is_prose:
            return rng.choices(self._words, k=count)
        begin = rng.randrange(len(self._words))
        taken = list(self._words[begin : begin + count])
        while len(taken) < count:
            taken += self._words[: count - len(taken)]
        return taken


class Tokenizer:
    """The model's own tokenizer. Raises on making: ValueError when the package or the file is not there."""

    def __init__(self, path: Path) -> None:
        try:
            native = importlib.import_module("tokenizers").Tokenizer
        except ImportError:
            raise ValueError("--tokenizer needs the package `tokenizers`: pip install tokenizers") from None
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._native: Any = native.from_file(str(file))
        except Exception as error:  # noqa: BLE001  # the package raises bare Exceptions
            raise ValueError(f"{file} is no tokenizer.json: {error}") from None

    def count(self, text: str) -> int:
        """Tokens of a text, without those that mark its start and end."""
        return len(self._native.encode(text, add_special_tokens=False).ids)

    def cut(self, draw: Any, tokens: int) -> str:
        """Text from draw(words), cut to the number of tokens; a cut that tokenises otherwise is drawn again."""
        best, best_off = "", tokens
        for _ in range(TRIES):
            text = draw(tokens + 8)
            encoded = self._native.encode(text, add_special_tokens=False)
            if len(encoded.ids) > tokens:
                text = text[: encoded.offsets[tokens - 1][1]]
            off = abs(self.count(text) - tokens)
            if off == 0:
                return str(text)
            if off < best_off or not best:
                best, best_off = str(text), off
        return best
