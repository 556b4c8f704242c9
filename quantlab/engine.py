"""Text generation on transformers causal models: prefill, then one token at a time on a KV cache.

Models of several variants can be decoded in turn, token by token, each in a `Session` of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import native_sample, native_solve, reference
from quantlab.errors import ConfigError, ModelError
from quantlab.stops import StopStrings

Choose = Callable[[Tensor], int]
"""From float32 logits [vocabulary] to a token id."""


def greedy(logits: Tensor) -> int:
    """The most likely token, the lowest id among equals."""
    return int(logits.argmax())


class Sampler:
    """Draws from softmax(logits / temperature), cut to the likeliest tokens that together have a
    probability of at least `top_p` (`kernels.reference.sample`). Same seed, same draws, in C++ and
    in torch: one uniform number a token. Temperature 0 is `greedy`.

    Raises: ConfigError; a call ModelError for logits without probabilities (NaN).
    """

    def __init__(self, temperature: float, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature={temperature}: needs 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p={top_p}: needs to be above 0 and at most 1")
        self._temperature, self._top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        if self._temperature == 0:
            return greedy(logits)
        logits = logits.detach().float().cpu()
        draw = native_sample.sample if native_solve.ready(logits) else reference.sample
        uniform = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        try:
            return draw(logits, self._temperature, self._top_p, uniform)
        except ValueError as error:
            raise ModelError(f"the model's next token cannot be drawn: {error}") from None


class Session:
    """One sequence in one model: `prefill` reads a prompt, `step` one more token; both choose the
    next token from the logits, which stay readable in `logits` (float32 [vocabulary])."""

    logits: Tensor

    def __init__(self, model: Any, choose: Choose = greedy) -> None:
        self._model, self._choose = model, choose
        self._keep = last_logits_only(model)
        self.context = context_length(model)
        self._cache: Any = None

    def prefill(self, ids: Sequence[int]) -> int:
        """Start over with a prompt. Raises: ConfigError for one that is empty or too long."""
        if not len(ids):
            raise ConfigError("the prompt has no tokens")
        if self.context is not None and len(ids) > self.context:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens; this model reads at most {self.context}"
            )
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        return self._read(list(ids))

    def step(self, token: int) -> int:
        """Read `token` after everything read so far. Raises: RuntimeError before `prefill`."""
        if self._cache is None:
            raise RuntimeError("step() before prefill()")
        return self._read([token])

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> int:
        device = next(self._model.parameters()).device
        output = self._model(
            input_ids=torch.tensor([ids], device=device),
            past_key_values=self._cache,
            use_cache=True,
            **self._keep,
        )
        self.logits = output.logits[0, -1].float()
        return self._choose(self.logits)


def last_logits_only(model: Any) -> dict[str, int]:
    """The argument that makes a forward compute the last position's logits only, if it has one."""
    accepted = inspect.signature(model.forward).parameters
    for name in ("logits_to_keep", "num_logits_to_keep"):
        if name in accepted:
            return {name: 1}
    return {}


def context_length(model: Any) -> int | None:
    """Tokens that the model can read, None where its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def generate(
    model: Any,
    input_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Collection[int] = (),
    on_token: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
) -> list[int]:
    """The tokens that follow `input_ids`, an end token or those of a stop string included.

    Ends after `max_new_tokens`, at a token of `eos_ids`, at the model's context length, as soon as
    the text contains one of `stop_strings` (which needs the `tokenizer`), or when `stop()` (asked
    before every token) is true. Raises: ConfigError.
    """
    stops, streamer = StopStrings(stop_strings), TokenStreamer(tokenizer)
    if stop_strings and tokenizer is None:
        raise ConfigError("stop_strings: need the tokenizer as well, to read tokens as text")
    session = Session(model, Sampler(temperature, top_p, seed))
    limit = context_length(model)
    if limit is not None:
        # The last token is chosen without being read.
        max_new_tokens = min(max_new_tokens, max(1, limit - len(input_ids) + 1))
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and not (stop is not None and stop()):
        tokens.append(session.step(tokens[-1]) if tokens else session.prefill(input_ids))
        if on_token is not None:
            on_token(tokens[-1])
        if tokens[-1] in eos_ids:
            break
        if stop_strings:
            piece = streamer.push(tokens[-1])
            if stops.completed_by(piece + streamer.held):
                break
            stops.push(piece)
    return tokens


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt: as a user's message where the tokenizer has a chat template, ready for
    the answer, else as plain text. Raises: ConfigError for no tokens, ModelError for a template
    that fails."""
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        try:
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise ModelError(f"the model's chat template fails on a message ({error})") from None
    else:
        encoded = tokenizer(prompt)
    ids = [int(token) for token in encoded["input_ids"]]
    if not ids and getattr(tokenizer, "bos_token_id", None) is not None:
        ids = [int(tokenizer.bos_token_id)]
    if not ids:
        raise ConfigError("the prompt is empty; write at least a word")
    return ids


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, from the generation settings and the tokenizer."""
    settings = getattr(model, "generation_config", None)
    found = [getattr(settings, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    flat = [token for entry in found for token in (entry if isinstance(entry, list) else [entry])]
    return frozenset(int(token) for token in flat if token is not None)


class TokenStreamer:
    """From tokens to pieces of text, one piece a token, as they come.

    The pieces and `finish()` concatenated are exactly `tokenizer.decode(tokens)` without special
    tokens. A token that ends inside a character gives "" and its text comes with a later one; so do
    byte tokens (`<0xE2>`), which decoders read as a whole run.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Decoders look at the token before (a leading space is dropped at the start), so each
        # decoding begins at `_begin`, a token that already gave text; tokens below `_done` did.
        self._tokens: list[int] = []
        self._begin = self._done = 0
        self.held = ""
        """What `finish` would give now."""

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._new_text()
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        # A special token is skipped and does not end a run of bytes: the text stays as it was.
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") or text == self.held
        if unfinished or re.fullmatch("<0x[0-9A-F]{2}>", name):
            self.held = text
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """What was held back: the replacement character for bytes that never became one."""
        return self._emit(self._new_text())

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._begin : self._done])
        return self._decode(self._tokens[self._begin :])[len(known) :]

    def _emit(self, text: str) -> str:
        self._begin, self._done = self._done, len(self._tokens)
        self.held = ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def text_pieces(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, ...]:
    """The text of each token, as many as tokens; concatenated they are the decoded text."""
    streamer = TokenStreamer(tokenizer)
    pieces = [streamer.push(token) for token in tokens]
    if pieces:
        pieces[-1] += streamer.finish()
    return tuple(pieces)
