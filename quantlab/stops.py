"""Stop strings: texts that end an answer, of which nothing is shown."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.errors import ConfigError


def check_stop_strings(strings: Sequence[str]) -> None:
    """Raises: ConfigError for an empty one, which every text contains."""
    if not all(strings):
        raise ConfigError("stop: empty; give the text that ends an answer")


class StopStrings:
    """A text as it comes, piece by piece, up to the first stop string.

    Read character by character, the text ends as soon as it contains a stop string, and is what
    comes before it; of several that end at the same character, the longest. So the same text ends
    at the same place in whatever pieces (tokens) it comes. Raises: ConfigError for an empty one.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        check_stop_strings(strings)
        self._strings = tuple(strings)
        self._held = ""
        self.reached = False
        """Whether a stop string was there; nothing is to be pushed after it."""

    def push(self, piece: str) -> str:
        """What of the text so far can be shown now, and was not yet: the longest end that may be
        the beginning of a stop string is held back."""
        text = self._held + piece
        ends = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:
            self.reached, self._held = True, ""
            return text[: min(ends)[1]]
        kept = max((_beginning(text, s) for s in self._strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def completed_by(self, piece: str) -> bool:
        """Whether `reached` would be true if this were pushed."""
        text = self._held + piece
        return any(s in text for s in self._strings)

    def finish(self) -> str:
        """What was held back, where the text ends otherwise."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string` and is not all of it."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


def cut_pieces(pieces: Sequence[str], length: int) -> list[str]:
    """The first `length` characters of the pieces concatenated, without the pieces that begin
    after them: what a stop string leaves of the texts of tokens."""
    kept = []
    for piece in pieces:
        if length <= 0:
            break
        kept.append(piece[:length])
        length -= len(piece)
    return kept
