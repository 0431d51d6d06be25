"""How much of a completion is in one language, from its letters and its most common words; no model, no dictionary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from fastrl.rewards.protocol import promises
from fastrl.rewards.text import completion_text

# Language -> how the Unicode names of its letters begin.
_CHINESE = ("CJK",)
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl"), ("LATIN",)),
    "ru": ("CYRILLIC",),
    "zh": _CHINESE,
    "ja": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", *_CHINESE),
    "ko": ("HANGUL",),
    "ar": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "el": ("GREEK",),
    "th": ("THAI",),
}

# The commonest words that tell the languages of one script apart; a word may stand for several.
STOP_WORDS: Mapping[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to is that it was for are with as his they be at this have from or had by but what were we "
        "when your can there use how each she which do their if so then",
        "de": "der die und den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er "
        "hat dass sie nach wird bei wir also dann",
        "fr": "le les et des en un une du dans est pour que qui sur pas plus par avec il elle sont au ce cette nous "
        "vous mais ou donc alors",
        "es": "el los las y en un una del por con para es que se no su al lo como más pero sus ya o este sí porque "
        "entonces",
        "it": "il lo gli e di un una del per con è che non si al come più ma suo anche sono dei della nel questo "
        "quindi allora",
        "pt": "os as e do da em um uma para com não é que se no na por mais dos como mas foi ao ele das tem seu sua ou "
        "então",
        "nl": "het een en van te dat is op met zijn voor niet aan er om maar ook als bij dan wordt door naar uit nog "
        "deze dus",
    }.items()
}
_WORD = re.compile(r"[^\W\d_]+")


@promises(in_process=True, pure=True)
@dataclass(frozen=True)
class Language:
    """A reward function in [0, 1]: the share of letters in the language's script, times that of its own stop words.

        reward[s] = letters in the script / letters  *  stop words of the language / stop words of any language

    The second factor is there for languages with stop words (those in Latin script), and 1 where the text has none.
    A text without letters gets 1: numbers and formulas are in every language. Words that two languages share count
    for the wanted one. It sees mixed languages in a chain of thought; it is no language identifier.

    Attributes:
        language: ISO 639-1 code, a key of `SCRIPTS`.

    Source: DeepSeek-AI 2025, arXiv:2501.12948, sec. 2.3.2: the share of words of the target language.
    """

    language: str = "en"

    __name__ = "language"

    def __post_init__(self) -> None:
        if self.language not in SCRIPTS:
            raise ValueError(f"language must be one of {', '.join(SCRIPTS)}, got {self.language!r}")

    def __call__(self, completions: Sequence[object], **_: object) -> list[float]:
        """[S] completions -> [S] in [0, 1]."""
        texts = [completion_text(completion) for completion in completions]
        return [self._letters(text) * self._words(text) for text in texts]

    def _letters(self, text: str) -> float:
        letters = [character for character in text if character.isalpha()]
        wanted = SCRIPTS[self.language]
        return sum(_script(letter) in wanted for letter in letters) / len(letters) if letters else 1.0

    def _words(self, text: str) -> float:
        own = STOP_WORDS.get(self.language)
        if own is None:
            return 1.0
        words = [word for word in _WORD.findall(text.lower()) if word in _any_stop_word()]
        return sum(word in own for word in words) / len(words) if words else 1.0


@cache
def _any_stop_word() -> frozenset[str]:
    return frozenset().union(*STOP_WORDS.values())


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
