"""What the server knows of one browser tab: its language, its theme, the run its address names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.plots.words import Words, known, words


@dataclass(frozen=True)
class Client:
    language: str = "en"
    dark: bool = False
    run: str = ""

    @classmethod
    def of(cls, data: Mapping[str, Any] | None) -> Client:
        """From what `quantlab.client()` in assets/quantlab.js says; anything else is a default."""
        given = data or {}
        return cls(
            known(str(given.get("language") or "")),
            bool(given.get("dark")),
            str(given.get("run") or ""),
        )

    @property
    def say(self) -> Words:
        return words(self.language)
