"""What the server knows of one browser tab: its language, its theme, and the run and
the lesson its address names."""

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
    lesson: str = ""
    step: int = 1

    @classmethod
    def of(cls, data: Mapping[str, Any] | None) -> Client:
        """From what `quantlab.client()` in assets/quantlab.js says; anything else is a default."""
        given = data or {}
        return cls(
            known(str(given.get("language") or "")),
            bool(given.get("dark")),
            str(given.get("run") or ""),
            str(given.get("lesson") or ""),
            _whole(given.get("step")),
        )

    @property
    def say(self) -> Words:
        return words(self.language)


def _whole(value: object) -> int:
    """A step's number as an address names it; 1 for anything else."""
    return int(value) if isinstance(value, (int, float)) and 1 <= value <= 99 else 1
