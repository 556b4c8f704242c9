"""Stop strings: what is streamed is the text before the first of them, in whatever pieces."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantlab.engine import TokenStreamer, text_pieces
from quantlab.errors import ConfigError
from quantlab.stops import StopStrings, cut_pieces
from tests.tiny import tokenizer

letters = st.text("ab日🙂", max_size=4)
stops = st.lists(st.text("ab日🙂", min_size=1, max_size=5), max_size=4)


def oracle(text: str, strings: Sequence[str]) -> tuple[str, bool]:
    """By the definition, a character at a time; and whether the text was ended."""
    for end in range(len(text) + 1):
        found = [text[:end].index(string) for string in strings if string in text[:end]]
        if found:
            return text[: min(found)], True
    return text, False


@given(pieces=st.lists(letters, max_size=12), strings=stops)
@example(pieces=["a", "b", "a", "b", "b"], strings=["abb"])  # a beginning within a beginning
@example(pieces=["a", "a", "b"], strings=["aab", "ab"])  # both end here: the longest
@example(pieces=["aab日"], strings=["aab日", "b"])  # the one that is complete first
def test_what_is_streamed_is_the_text_before(pieces: list[str], strings: list[str]) -> None:
    wanted, ended = oracle("".join(pieces), strings)
    watch, shown, read = StopStrings(strings), "", ""
    for piece in pieces:
        assert watch.completed_by(piece) == oracle(read + piece, strings)[1]
        shown += watch.push(piece)
        read += piece
        assert wanted.startswith(shown), "a part of a stop string was shown"
        assert watch.reached == oracle(read, strings)[1]
        if watch.reached:
            break
        # Nothing is held back that cannot begin a stop string.
        held = read[len(shown) :]
        assert all(any(s.startswith(held) for s in strings) for held in [held] if held)
    assert watch.reached == ended
    assert shown + watch.finish() == wanted


@given(pieces=st.lists(letters, max_size=8), length=st.integers(0, 40))
def test_pieces_are_cut_as_their_text(pieces: list[str], length: int) -> None:
    kept = cut_pieces(pieces, length)
    assert "".join(kept) == "".join(pieces)[:length]
    assert len(kept) == sum(len("".join(pieces[:index])) < length for index in range(len(pieces)))


@pytest.mark.parametrize("strings", [[""], ["a", ""]])
def test_an_empty_stop_string_is_refused(strings: list[str]) -> None:
    with pytest.raises(ConfigError, match="stop: empty; give the text that ends an answer"):
        StopStrings(strings)


def test_what_the_streamer_holds_is_what_it_would_finish_with() -> None:
    """Half of a character is held, and readable as what it would come to."""
    streamer = TokenStreamer(tokenizer())
    first, *_ = tokenizer()("世").input_ids
    assert streamer.push(first) == ""
    assert streamer.held == streamer.finish() == "\N{REPLACEMENT CHARACTER}"
    assert streamer.held == ""
    assert text_pieces(tokenizer(), [first]) == ("\N{REPLACEMENT CHARACTER}",)
