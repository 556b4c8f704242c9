"""Prose with terms that explain themselves: `[[scale|step]]` shows "step", and on hover the text
`learn_term_scale`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantlab.plots.words import Words

TERM = re.compile(r"\[\[(\w+)\|([^\]]+)\]\]")


@dataclass(frozen=True)
class Piece:
    """A run of plain text, or a term with its explanation."""

    text: str
    tip: str = ""


def paragraphs(text: str, say: Words) -> list[list[Piece]]:
    """The text cut at line ends and around its terms; nothing of it is markup."""
    return [_pieces(line, say) for line in text.split("\n") if line.strip()]


def _pieces(line: str, say: Words) -> list[Piece]:
    found, start = [], 0
    for hit in TERM.finditer(line):
        if hit.start() > start:
            found.append(Piece(line[start : hit.start()]))
        found.append(Piece(hit[2], say(f"learn_term_{hit[1]}")))
        start = hit.end()
    if start < len(line):
        found.append(Piece(line[start:]))
    return found
