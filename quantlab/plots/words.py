"""The texts of the page, the figures and the report, in every language there is.

One JSON file a language under `assets/i18n`, all with the same keys (a test compares them). A text
may hold `{name}` places; `Words` fills them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "i18n"
PARTS = ("learn", "judging", "inspect", "terms")
"""Folders with files of their own, one a language as above."""
DEFAULT = "en"
NAMES = {"en": "English", "ja": "日本語"}


@cache
def translations() -> dict[str, dict[str, str]]:
    """Language code -> key -> text, as the files have it: a language's own file, and those of the
    same name that hold its walkthroughs, what helps to judge, its Inspect tab, and explanations."""
    return {
        path.stem: {
            key: text
            for file in (path, *(FOLDER / part / path.name for part in PARTS))
            for key, text in json.loads(file.read_text(encoding="utf-8")).items()
        }
        for path in sorted(FOLDER.glob("*.json"))
    }


def known(language: str | None) -> str:
    """The language to use for a wish such as `ja-JP`: itself if there is one, else English."""
    base = (language or DEFAULT).replace("_", "-").split("-")[0].lower()
    return base if base in translations() else DEFAULT


@dataclass(frozen=True)
class Words:
    """The texts of one language: `words("run_queued", position=2)`."""

    language: str = DEFAULT

    def __call__(self, key: str, /, **values: object) -> str:
        """The text of `key`, its places filled. Raises: KeyError for an unknown key."""
        text = translations()[self.language][key]
        return text.format(**values) if values else text

    def has(self, key: str) -> bool:
        return key in translations()[self.language]


def words(language: str | None = None) -> Words:
    return Words(known(language))
