"""One pass over the evaluation windows: perplexity, KL divergence and top-1 agreement together.

Every variant reads the same windows as the original. Of the original only the last hidden states
are kept (width numbers a token instead of vocabulary); its logits are made from them chunk by
chunk, exactly, while a variant is measured.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantlab.errors import ModelError
from quantlab.metrics.divergence import compare_logits
from quantlab.metrics.intervals import SEGMENT_TOKENS, interval
from quantlab.metrics.perplexity import (
    negative_log_likelihood,
    perplexity,
    perplexity_interval,
)
from quantlab.metrics.reading import Closeup
from quantlab.models import LoadedModel
from quantlab.paths import home
from quantlab.types import Emit, Progress


class Scorer(Protocol):
    """Anything that gives next-token logits for a window."""

    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first position, float32 logits [n, vocabulary]) for consecutive positions."""
        ...


class Head:
    """From last hidden states to logits, as the model's own forward does it."""

    def __init__(self, module: Any) -> None:
        self.linear: nn.Module = module.get_output_embeddings()  # nothing else is kept alive
        config = module.config
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(hidden).float()
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class TorchScorer:
    """A transformers causal LM, possibly with quantized linears."""

    def __init__(self, module: Any, bos: int | None) -> None:
        self.module, self.bos, self.head = module, bos, Head(module)

    @torch.inference_mode()
    def hidden(self, window: Tensor) -> Tensor:
        """Last hidden states [window, width] at the window's own tokens."""
        ids = window if self.bos is None else torch.cat([window.new_tensor([self.bos]), window])
        device = next(self.module.parameters()).device
        output = self.module.base_model(ids[None].to(device), use_cache=False)
        states: Tensor = output.last_hidden_state[0]
        return states[-window.numel() :]

    @torch.inference_mode()
    def chunks(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        hidden = self.hidden(window)
        for start in range(0, window.numel(), SEGMENT_TOKENS):
            yield start, self.head(hidden[start : start + SEGMENT_TOKENS]).cpu()


@dataclass
class Reference:
    """The original's last hidden states for each window (float32 [windows, length, width]), and
    its head."""

    hidden: Tensor
    head: Head

    def logits(self, window: int, start: int, stop: int) -> Tensor:
        with torch.inference_mode():
            return self.head(self.hidden[window, start:stop])

    @property
    def vocabulary(self) -> int:
        return self.logits(0, 0, 1).shape[-1]

    def perplexity(self, windows: Sequence[Tensor]) -> float:
        """The original's own on these windows, read as `measure_quality` reads a variant."""
        losses = [
            negative_log_likelihood(
                self.logits(index, start, stop), window[start + 1 : stop + 1]
            ).double()
            for index, window in enumerate(windows)
            for start in range(0, window.numel() - 1, SEGMENT_TOKENS)
            for stop in [min(start + SEGMENT_TOKENS, window.numel() - 1)]
        ]
        return math.exp(float(torch.cat(losses).mean()))


@dataclass(frozen=True)
class Quality:
    """See `ResultRecord` for the meaning and unit of each field."""

    perplexity: float | None
    perplexity_ci: tuple[float, float] | None
    kl_divergence: float | None
    kl_divergence_ci: tuple[float, float] | None
    top1_agreement: float | None
    segments: dict[str, list[float]]
    reading: dict[str, Any] = field(default_factory=dict)


def reference_states(
    model: LoadedModel, windows: Sequence[Tensor], bos: int | None, emit: Emit
) -> Reference:
    """Run the original (float32) once over the windows, or read what an earlier run kept.

    Raises: ModelError where the head cannot be applied apart from the model.
    """
    from safetensors.torch import load_file, save_file

    stacked = torch.stack(list(windows))
    key = hashlib.sha256(
        f"{model.source.fingerprint}:{bos}:{list(stacked.shape)}".encode()
        + stacked.numpy().tobytes()
    ).hexdigest()[:24]
    path = home() / "references" / f"{key}.safetensors"
    head = Head(model.module)
    if path.is_file():
        return Reference(load_file(path)["hidden"], head)
    scorer = TorchScorer(model.module, bos)
    states = []
    for done, window in enumerate(windows):
        emit(Progress("original", "reference", done, len(windows), 0.0))
        states.append(scorer.hidden(window).float().cpu())
    _check_head(model.module, head, windows[0][:16], bos)
    hidden = torch.stack(states).clone()
    save_atomically(path, {"hidden": hidden}, save_file)
    return Reference(hidden, head)


def save_atomically(path: Path, tensors: dict[str, Tensor], save_file: Any) -> None:
    """Write beside the target, then rename, so that no half-written file is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


def _check_head(module: Any, head: Head, ids: Tensor, bos: int | None) -> None:
    with torch.inference_mode():
        whole = module(ids[None], use_cache=False).logits[0].float()
        apart = head(module.base_model(ids[None], use_cache=False).last_hidden_state[0])
    if not torch.allclose(whole, apart, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{module.config.model_type}: its head does more than a linear layer, so distributions "
            "cannot be compared; this architecture is not supported yet"
        )


def measure_quality(
    scorer: Scorer, windows: Sequence[Tensor], reference: Reference | None, label: str, emit: Emit
) -> Quality:
    """Perplexity of `scorer` on the windows, and, with a reference, KL and top-1 agreement.

    The first token of a window is given, every later one predicted.
    """
    nll: list[float] = []
    kl: list[float] = []
    counts: list[int] = []
    agreed = 0
    closeup = None if reference is None else Closeup(int(windows[0][0]))
    for index, window in enumerate(windows):
        emit(Progress(label, "perplexity", index, len(windows), 0.0))
        losses, divergences, same = _window(
            scorer, window, index, reference, closeup if index == 0 else None
        )
        # Segments are the same tokens for every variant, whatever chunks its engine works in.
        for part in losses.split(SEGMENT_TOKENS):
            nll.append(float(part.mean()))
            counts.append(part.numel())
        kl += [float(part.mean()) for part in divergences.split(SEGMENT_TOKENS) if part.numel()]
        agreed += same
    total = sum(counts)
    mean = sum(n * c for n, c in zip(nll, counts, strict=True)) / total
    measured = perplexity(mean)
    segments = {"nll": nll, "kl": kl} if measured is not None else {}
    if closeup is None or measured is None:
        return Quality(measured, perplexity_interval(nll), None, None, None, segments)
    return Quality(
        perplexity=measured,
        perplexity_ci=perplexity_interval(nll),
        kl_divergence=sum(k * c for k, c in zip(kl, counts, strict=True)) / total,
        kl_divergence_ci=interval(kl),
        top1_agreement=agreed / total,
        segments=segments,
        reading=closeup.to_json(),
    )


def _window(
    scorer: Scorer,
    window: Tensor,
    index: int,
    reference: Reference | None,
    closeup: Closeup | None,
) -> tuple[Tensor, Tensor, int]:
    """(nats lost, KL divergence) of each predicted token, float64 [window - 1] (KL empty without a
    reference), and how often the original's first choice is the variant's too."""
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    same = 0
    for first, chunk in scorer.chunks(window):
        for offset in range(0, chunk.shape[0], SEGMENT_TOKENS):
            start = first + offset
            stop = min(start + SEGMENT_TOKENS, first + chunk.shape[0], window.numel() - 1)
            if stop <= start:
                continue
            logits = chunk[offset : offset + stop - start]
            targets = window[start + 1 : stop + 1]
            # Without an original the losses still come from the same sums, to the last digit.
            original = logits if reference is None else reference.logits(index, start, stop)
            loss, kl, agreed = compare_logits(original, logits, targets)
            if closeup is not None:
                closeup.add(original, logits, kl, targets)
            losses.append(loss)
            if reference is not None:
                divergences.append(kl)
                same += int(agreed.sum())
    return torch.cat(losses), torch.cat(divergences) if divergences else torch.empty(0), same
