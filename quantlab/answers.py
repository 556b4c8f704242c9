"""Answers to a person's prompts, streamed, where a variant's answer leaves the original's, and the
spelling of single tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quantlab.engine import Choose, TokenStreamer, encode_prompt, end_tokens, greedy
from quantlab.metrics.reading import most_likely, token_ids
from quantlab.metrics.speed import Decoder
from quantlab.results import ResultRecord
from quantlab.stops import StopStrings, cut_pieces
from quantlab.types import Choice, Emit, Generation, OutputDelta, Progress


@dataclass
class Witness:
    """A greedy choice that remembers what it chose from: `rows` of [token, probability]."""

    rows: list[list[list[float]]] = field(default_factory=list)

    def __call__(self, logits: Tensor) -> int:
        """logits: float32 [vocabulary]"""
        self.rows += most_likely(logits[None])
        return greedy(logits)


def answer_prompts(
    session: Callable[[Choose], Decoder],
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    label: str,
    emit: Emit,
    stop_strings: Sequence[str] = (),
) -> tuple[Generation, ...]:
    """Answers to every prompt, each piece emitted as it is decoded; greedy, where `session` takes
    the choice it is given."""
    answers = []
    for index, prompt in enumerate(prompts):
        emit(Progress(label, "answers", index, len(prompts), 0.0))
        answering = Answering(
            *(session, tokenizer, prompt, index, max_new_tokens, label, emit),
            stop_strings=stop_strings,
        )
        answers.append(next(done for done in answering.steps() if done is not None))
    return tuple(answers)


@dataclass
class Answering:
    """One answer in the making; `index` is the prompt's place among the prompts.

    It begins with the tokens `forced`, whatever the decoder prefers, as if it had chosen them, and
    ends before the first of `stop_strings`; tokens of which nothing is left are not kept.
    """

    session: Callable[[Choose], Decoder]
    tokenizer: Any
    prompt: str
    index: int
    max_new_tokens: int
    label: str
    emit: Emit
    forced: Sequence[int] = ()
    stop_strings: Sequence[str] = ()

    def steps(self) -> Iterator[Generation | None]:
        """None after every token, the whole answer at the end."""
        witness = Witness()
        decoder = self.session(witness)
        streamer, ends = TokenStreamer(self.tokenizer), end_tokens(None, self.tokenizer)
        stops, told = StopStrings(self.stop_strings), 0
        tokens: list[int] = []
        pieces: list[str] = []
        prompt = encode_prompt(self.tokenizer, self.prompt)
        limit, context = self.max_new_tokens, getattr(decoder, "context", None)
        if context is not None:
            # The last token is chosen without being read.
            limit = min(limit, context - len(prompt) + 1)
        token = decoder.prefill(prompt)
        while True:
            # Forced tokens are read one by one too: read at once, they would be summed in another
            # order, and the variant would not say again what it said before.
            if len(tokens) < len(self.forced):
                token = self.forced[len(tokens)]
            if token in ends:
                break
            tokens.append(token)
            pieces.append(streamer.push(token))
            if stops.completed_by(pieces[-1] + streamer.held):
                pieces[-1] += streamer.finish()
            told += self._tell(stops.push(pieces[-1]))
            if stops.reached or len(tokens) >= limit:
                break
            yield None
            token = decoder.step(token)
        rest = streamer.finish()
        if rest and pieces:
            pieces[-1] += rest
            told += self._tell(stops.push(rest))
        told += self._tell(stops.finish())
        if stops.reached:
            pieces = cut_pieces(pieces, told)
        yield Generation(
            self.prompt,
            "".join(pieces),
            tuple(tokens[: len(pieces)]),
            tuple(pieces),
            choices=choices(witness.rows[: len(pieces) + 1], self.tokenizer),
        )

    def _tell(self, text: str) -> int:
        """Emit some text; its length."""
        if text:
            self.emit(OutputDelta(self.label, self.index, text))
        return len(text)


def mark_divergence(
    records: Sequence[ResultRecord], original: Sequence[Generation]
) -> list[ResultRecord]:
    """The records with every answer's `first_divergence` from the original's answer to it."""
    by_prompt = {answer.prompt: answer for answer in original}
    return [
        dataclasses.replace(
            record,
            outputs=tuple(
                dataclasses.replace(
                    output, first_divergence=first_difference(output, by_prompt.get(output.prompt))
                )
                for output in record.outputs
            ),
        )
        for record in records
    ]


def first_difference(answer: Generation, original: Generation | None) -> int | None:
    """Index of the first token that differs (or that only one of the two has); None if equal."""
    if original is None or answer.tokens == original.tokens:
        return None
    for index, (ours, theirs) in enumerate(zip(answer.tokens, original.tokens, strict=False)):
        if ours != theirs:
            return index
    return min(len(answer.tokens), len(original.tokens))


def spelled(reading: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A reading (see `quantlab.metrics.reading`) with its words: `text`, a piece for each of its
    `tokens` as they follow each other, and `pieces`, token id (as text) -> the token by itself."""
    if not reading:
        return {}
    streamer = TokenStreamer(tokenizer)
    text = [streamer.push(token) for token in reading["tokens"]]
    text[-1] += streamer.finish()
    pieces = {str(token): _alone(token, tokenizer) for token in sorted(token_ids(reading))}
    return {**reading, "text": text, "pieces": pieces}


def choices(
    rows: Sequence[Sequence[Sequence[float]]], tokenizer: Any
) -> tuple[tuple[Choice, ...], ...]:
    """What a witness saw, with the text of each token."""
    known = {int(token) for row in rows for token, _ in row}
    texts = {token: _alone(token, tokenizer) for token in known}
    return tuple(
        tuple((int(token), chance, texts[int(token)]) for token, chance in row) for row in rows
    )


def _alone(token: int, tokenizer: Any) -> str:
    """The text of one token in the middle of a text; the name of a special one, which has none."""
    streamer = TokenStreamer(tokenizer)
    # Some decoders drop the space of a text's first token, so another one goes before it.
    streamer.push(tokenizer("a", add_special_tokens=False).input_ids[-1])
    text = streamer.push(token) or streamer.finish()
    return text or str(tokenizer.convert_ids_to_tokens(token))
