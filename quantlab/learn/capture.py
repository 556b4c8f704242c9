"""The process that takes the slices of a whole model: `python -m quantlab.learn.capture MODEL`.

The unquantized model reads some hundred tokens of calibration text once, while every linear of
every block is listened to. What is kept goes to `$QUANTLAB_HOME/learn`, one file a model, and is
found again there. Progress is one JSON object a line on stdout, the last of which names the file;
an error is one too. Nothing is written when the process is ended before.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.environment import machine
from quantlab.errors import QuantLabError
from quantlab.learn.material import ROWS, TOKENS, Origin, Slice, half, window, write
from quantlab.locks import measuring_lock
from quantlab.models import LoadedModel, ModelSource, block_list, load, locate
from quantlab.paths import home
from quantlab.processes import die_with
from quantlab.texts import calibration_ids
from quantlab.types import Event, Notice, ignore

LENGTH = 256
"""Tokens of a sequence; two of them are read."""

Watch = Callable[[str, int, int], None]
"""Called with what happens, and how many of how many blocks are done."""


def file_of(fingerprint: str) -> Path:
    """Where the slices of a model lie once they are captured."""
    key = hashlib.sha256(f"1:{fingerprint}".encode()).hexdigest()[:20]
    return home() / "learn" / f"{key}.safetensors"


def captured(name: str, watch: Watch) -> Path:
    """The file of a model's slices, made if it is not there. Raises: ModelError, TextError."""
    source = locate(name)
    path = file_of(source.fingerprint)
    if path.is_file():
        return path
    watch("load_model", 0, 1)
    keep(load(source), path, watch)
    return path


def keep(model: LoadedModel, path: Path, watch: Watch) -> None:
    """Take the slices of a model and write them. Raises: TextError."""
    length = fitting(model, LENGTH)
    ids, _ = calibration_ids(model, "project", 2 * length, length, 0, ignore)
    blocks = block_list(model.module, model.family)
    slices = listen(model.module, blocks, ids, model.source.name, watch)
    write(path, origin_of(model.source, "project", ids.numel()), slices)


def fitting(model: LoadedModel, length: int) -> int:
    """`length` tokens, or as many as the model's context holds."""
    limit = getattr(model.module.config, "max_position_embeddings", None) or length
    return min(length, int(limit))


def origin_of(source: ModelSource, text: str, tokens: int) -> Origin:
    """Where figures come from that this process takes of a model now."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cpu = str(machine().get("cpu") or machine().get("system"))
    return Origin(source.name, source.fingerprint, text, tokens, cpu, date)


@torch.no_grad()
def listen(
    module: Any, blocks: nn.ModuleList, ids: Tensor, name: str, watch: Watch = lambda *_: None
) -> dict[str, Slice]:
    """Slices of every linear of the blocks, by path. ids: int64 [sequences, length]."""
    found: dict[str, Slice] = {}
    linears = [
        {path: inner for path, inner in block.named_modules() if isinstance(inner, nn.Linear)}
        for block in blocks
    ]
    paths = {id(block): index for index, block in enumerate(blocks)}

    def linear_hook(layer: str) -> Callable[..., None]:
        def hook(linear: nn.Linear, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            if x.shape[0] and layer not in found:
                found[layer] = cut(name, layer, linear.weight.detach(), x)

        return hook

    def block_hook(block: nn.Module, *_: object) -> None:
        watch("capture", paths[id(block)] + 1, len(blocks))

    handles = [
        linear.register_forward_pre_hook(linear_hook(f"{index}.{path}"))
        for index, inner in enumerate(linears)
        for path, linear in inner.items()
    ]
    handles += [block.register_forward_hook(block_hook) for block in blocks]
    try:
        module(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def cut(model: str, layer: str, weight: Tensor, x: Tensor) -> Slice:
    """The slice of a linear around its largest channel. x: float32 [tokens, channels]."""
    first = window(x.abs().amax(0))
    tokens = x[:: max(x.shape[0] // TOKENS, 1)][:TOKENS]
    part = slice(first, first + 256)
    return Slice(
        model,
        layer,
        (weight.shape[0], weight.shape[1]),
        first,
        float(x.abs().max()),
        half(weight[:ROWS, part]),
        half(tokens[:, part]),
    )


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """What every process that reads a model for the page is told."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("model")
    made.add_argument("--parent", type=int, help="process to end with")
    return made


def serve(label: str, parent: int | None, work: Callable[[Watch], Path]) -> int:
    """Do `work` in its turn, tell of it on stdout, and return the exit code: 0, or 2 for an error
    a person can meet. `label` begins the message where the file cannot be written."""
    if parent is not None:
        die_with(parent)

    def tell(**values: object) -> None:
        print(json.dumps(values), flush=True)

    def notice(event: Event) -> None:
        if isinstance(event, Notice):
            tell(stage="waiting_for_its_turn", done=0, total=1)

    try:
        home().mkdir(parents=True, exist_ok=True)
        with measuring_lock(home() / "measuring.lock", notice):
            path = work(lambda stage, done, of: tell(stage=stage, done=done, total=of))
        tell(path=str(path))
    except QuantLabError as error:
        tell(error=str(error), hint=error.hint)
        return 2
    except OSError as error:
        reason = error.strerror or error
        tell(error=f"{label}: the figures cannot be written ({reason})", hint=None)
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Do it and return the exit code."""
    given = parser("quantlab.learn.capture", __doc__).parse_args(arguments)
    return serve("learn", given.parent, lambda watch: captured(given.model, watch))


if __name__ == "__main__":
    sys.exit(main())
