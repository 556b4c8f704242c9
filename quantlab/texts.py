"""Texts for calibration and evaluation: the project's own, the model's own, a file, a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quantlab.errors import ConfigError, TextError
from quantlab.models import LoadedModel
from quantlab.paths import find, home
from quantlab.types import Emit, Progress

Role = Literal["calibration", "evaluation"]
ASSETS = Path(__file__).parents[1] / "assets" / "texts"
NAMED: dict[str, str] = {
    "project": "prose written for this project (encyclopedic, mixed styles)",
    "self": "sampled from the model itself at temperature 1 (calibration only)",
    "wikitext2": "WikiText-2 raw through datasets (needs a network)",
    "c4": "C4 English through datasets (needs a network)",
}


@dataclass(frozen=True)
class TokenText:
    """Token ids of a text: int64 [tokens]; `sha256` of what they were made from; `bos` is put
    before each window where the tokenizer does so by itself, else None."""

    name: str
    sha256: str
    ids: Tensor
    bos: int | None = None

    def windows(self, tokens: int, length: int) -> list[Tensor]:
        """The first `tokens` tokens cut into windows of `length`, none shorter.

        Raises: TextError when not even one window is full.
        """
        count = min(tokens, self.ids.numel()) // length
        if count < 1:
            raise TextError(
                f"text {self.name}: {self.ids.numel()} tokens, but one window takes {length}; "
                "give a longer text or a smaller window"
            )
        return list(self.ids[: count * length].reshape(count, length))

    def spread(self, tokens: int, length: int) -> Tensor:
        """`tokens // length` pieces of `length` tokens, evenly spread over the text and never
        overlapping: int64 [pieces, length]. Fewer where the text is shorter. Raises: TextError."""
        wanted = max(tokens // length, 1)
        available = self.ids.numel() // length
        if available < 1:
            raise TextError(
                f"calibration text {self.name}: {self.ids.numel()} tokens, but one piece takes "
                f"{length}; give a longer text or a smaller --calibration-length"
            )
        count = min(wanted, available)
        slack = self.ids.numel() - count * length
        starts = [
            i * length + (slack * i // max(count - 1, 1) if count > 1 else 0) for i in range(count)
        ]
        return torch.stack([self.ids[start : start + length] for start in starts])


def read_text(name: str, role: Role) -> str:
    """The characters of a named text or a UTF-8 file. Raises: TextError."""
    if name == "project":
        return (ASSETS / f"{role}.txt").read_text(encoding="utf-8")
    if name in ("wikitext2", "c4"):
        return _dataset(name, role)
    if name == "self":
        raise TextError("text: 'self' is for calibration; evaluate on project or a file")
    path = find(name)
    if path is None or not path.is_file():
        known = ", ".join(key for key in NAMED if role == "calibration" or key != "self")
        named = name if len(name) < 200 else f"{name[:60]}…"
        raise TextError(f"{role} text: no such file: {named}; give a text file or one of {known}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{role} text: {name} is not readable UTF-8 text ({error})") from None


def check_text(name: str, role: Role, tokens: int) -> None:
    """A cheap look before anything starts: the text is there, and not obviously shorter than
    `tokens` tokens (a token takes at least a byte). Raises: TextError."""
    if name in ("wikitext2", "c4") or (name == "self" and role == "calibration"):
        return
    size = len(read_text(name, role).encode())
    if size < tokens:
        raise TextError(
            f"{role} text: {name} has {size} bytes, too few for {tokens} tokens; "
            "give a longer text or a smaller window"
        )


def tokenize(tokenizer: Any, name: str, role: Role) -> TokenText:
    """Encode a whole text without special tokens. Raises: TextError."""
    text = read_text(name, role)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    starts = tokenizer("a").input_ids[:1] == [bos] if bos is not None else False
    digest = hashlib.sha256(text.encode()).hexdigest()
    return TokenText(name, digest, torch.tensor(ids, dtype=torch.int64), bos if starts else None)


def calibration_ids(
    model: LoadedModel, name: str, tokens: int, length: int, seed: int, emit: Emit
) -> tuple[Tensor, str]:
    """(token ids int64 [pieces, length], sha256 of the text or of the sampled ids).

    Raises: TextError; ConfigError for pieces longer than the model's context."""
    limit = getattr(model.module.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ConfigError(
            f"calibration_length: {length} is more than the model's context of {limit}"
        )
    if name == "self":
        ids = sample_from_model(model, max(tokens // length, 1), length, seed, emit)
        return ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    text = tokenize(model.tokenizer, name, "calibration")
    return text.spread(tokens, length), text.sha256


def sample_from_model(model: LoadedModel, count: int, length: int, seed: int, emit: Emit) -> Tensor:
    """`count` sequences of `length` tokens sampled from the model at temperature 1 from its begin
    token, in one batch; cached by model, sizes and seed."""
    from safetensors.torch import load_file, save_file
    from transformers import LogitsProcessorList

    key = hashlib.sha256(
        f"{model.source.fingerprint}:{count}:{length}:{seed}".encode()
    ).hexdigest()[:24]
    path = home() / "texts" / f"self-{key}.safetensors"
    if path.is_file():
        return load_file(path)["ids"]
    begin = model.tokenizer.bos_token_id
    if begin is None:
        begin = model.tokenizer.eos_token_id or 0

    def report(ids: Tensor, scores: Tensor) -> Tensor:
        emit(Progress("", "sample calibration text", int(ids.shape[1]), length, 0.0))
        return scores

    with torch.random.fork_rng(), torch.inference_mode(), calibration_autocast():
        torch.manual_seed(seed)
        ids: Tensor = model.module.generate(
            torch.full((count, 1), begin),
            max_new_tokens=length - 1,
            min_new_tokens=length - 1,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=begin,
            logits_processor=LogitsProcessorList([report]),
        ).clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"ids": ids}, partial)
    partial.rename(path)
    return ids


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def calibration_autocast() -> torch.autocast:
    """bfloat16 matrix products where the CPU has them; norms and the residual stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16())


def _dataset(name: str, role: Role) -> str:
    try:
        import datasets

        if name == "wikitext2":
            split = "train" if role == "calibration" else "test"
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
            return "".join(rows["text"][:40_000])
        split = "train" if role == "calibration" else "validation"
        stream = datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
        return "\n\n".join(row["text"] for row in stream.take(2_000))
    except Exception as error:
        raise TextError(
            f"text {name}: could not be fetched ({type(error).__name__}); it needs a network, "
            "use project or a file without one"
        ) from None
