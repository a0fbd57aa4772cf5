"""The words of a report, one literal table for each language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from npu_runtime.report.messages.en import MESSAGES as ENGLISH
from npu_runtime.report.messages.zh import MESSAGES as CHINESE

LANGUAGES: Mapping[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}
TAGS = {"en": "en", "zh": "zh-Hans"}
"""Language -> what `lang` of HTML calls it."""


@dataclass(frozen=True, slots=True)
class Say:
    """The messages of one language: `say("speedup", speedup="2.27")` is the text with its places filled."""

    language: str

    def __call__(self, key: str, **values: object) -> str:
        return LANGUAGES[self.language][key].format(**values)

    def join(self, texts: Iterable[object]) -> str:
        """Texts of a list, as the language separates them."""
        return self("list separator").join(str(text) for text in texts)
