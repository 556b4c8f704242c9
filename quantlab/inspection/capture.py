"""The process that surveys a whole model: `python -m quantlab.inspection.capture MODEL`.

The unquantized model reads calibration text once, block by block, as it does for any method; every
linear is then rounded at every width. The survey goes to `$QUANTLAB_HOME/inspect`, slices of the
same linears to where the Learn tab keeps its own, and both are found again there. What it tells on
stdout is what `quantlab.learn.capture` tells; nothing is written when it is ended before.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantlab.calibration import ActStats, BlockRunner
from quantlab.inspection.survey import (
    BINS,
    GROUP_SIZE,
    WIDTHS,
    WORST,
    WORST_BITS,
    Input,
    Linear,
    Survey,
    write,
)
from quantlab.learn import capture as learn
from quantlab.learn.capture import Watch
from quantlab.methods.rtn import RTNConfig, round_weight
from quantlab.models import Block, LoadedModel, block_list, get_block, load, locate
from quantlab.paths import home
from quantlab.texts import calibration_ids
from quantlab.types import ignore

TOKENS, LENGTH = 2048, 512
"""Calibration tokens, and how many of them a sequence has at most."""


def file_of(fingerprint: str) -> Path:
    """Where the survey of a model lies once it is made."""
    key = hashlib.sha256(f"1:{fingerprint}".encode()).hexdigest()[:20]
    return home() / "inspect" / f"{key}.safetensors"


def captured(name: str, watch: Watch) -> Path:
    """The file of a model's survey, made if it is not there, and with it the model's slices.

    Raises: ModelError, TextError."""
    source = locate(name)
    path, slices = file_of(source.fingerprint), learn.file_of(source.fingerprint)
    if path.is_file() and slices.is_file():
        return path
    watch("load_model", 0, 1)
    model = load(source)
    if not slices.is_file():
        learn.keep(model, slices, watch)
    if not path.is_file():
        length = learn.fitting(model, LENGTH)
        ids, _ = calibration_ids(model, "project", TOKENS, length, 0, ignore)
        write(path, survey(model, ids, watch))
    return path


@torch.no_grad()
def survey(model: LoadedModel, ids: Tensor, watch: Watch = lambda *_: None) -> Survey:
    """Statistics of every linear of the blocks; the model is left as it was.

    ids: int64 [sequences, length], calibration tokens. Raises: ModelError."""
    runner = BlockRunner(model, ids)
    count = len(block_list(model.module, model.family))
    found: dict[str, Linear] = {}
    for index in range(count):
        watch("survey", index, count)
        block = get_block(model.module, model.family, index)
        stats = runner.collect(block, {"second_moment", "range"}, advance=index < count - 1)
        inputs = _inputs(block, stats)
        for path in block.linears:
            one = linear_of(block, path, stats[path], inputs[path])
            found[one.name] = one
    watch("survey", count, count)
    attention = (block.heads, block.kv_heads, block.head_dim)
    return Survey(learn.origin_of(model.source, "project", ids.numel()), found, attention)


def _inputs(block: Block, stats: Mapping[str, ActStats]) -> dict[str, Input]:
    """What each linear reads; linears that read the same have the same `Input`."""
    made: dict[int, Input] = {}
    folds = {target: fold.kind for fold in block.folds for target in fold.targets}
    for path in block.linears:
        one = stats[path]
        if id(one) in made:
            continue
        readers = [other for other in block.linears if stats[other] is one]
        weights = [block.linears[other].weight.detach().float().abs().amax(0) for other in readers]
        assert one.low is not None
        assert one.high is not None
        made[id(one)] = Input(
            one.max_abs,
            torch.stack(weights).amax(0),
            float(one.low.min()),
            float(one.high.max()),
            folds.get(path),
        )
    return {path: made[id(stats[path])] for path in block.linears}


def linear_of(block: Block, path: str, stats: ActStats, read: Input) -> Linear:
    """The statistics of one linear."""
    weight, moment = block.linears[path].weight.detach().float(), stats.second_moment
    assert moment is not None
    rows, columns = weight.shape
    whole = max(float(weight.square().sum()), 1e-30)
    output = max(float(((weight @ moment) * weight).sum()), 1e-30)
    errors: dict[int, float] = {}
    output_errors: dict[int, float] = {}
    worst: tuple[tuple[int, float], ...] = ()
    for bits in WIDTHS:
        change = round_weight(weight, RTNConfig(bits=bits, group_size=GROUP_SIZE)).dequantize()
        change -= weight
        errors[bits] = float(change.square().sum()) / whole
        output_errors[bits] = float(((change @ moment) * change).sum()) / output
        if bits == WORST_BITS:
            worst = worst_channels(change, moment)
    largest = float(weight.abs().max())
    histogram = torch.histc(weight, BINS, -largest, largest)
    return Linear(
        f"{block.index}.{path}",
        block.kinds[path],
        (rows, columns),
        read,
        largest,
        histogram.long(),
        *group_ranges(weight),
        errors,
        output_errors,
        worst,
    )


def worst_channels(change: Tensor, moment: Tensor) -> tuple[tuple[int, float], ...]:
    """(channel, its share of sum_j M_jj sum_i D_ij^2), the largest first."""
    added = change.square().sum(0) * moment.diagonal()
    top = added.topk(min(WORST, added.shape[0]))
    whole = max(float(added.sum()), 1e-30)
    return tuple(
        (int(channel), float(value) / whole)
        for channel, value in zip(top.indices, top.values, strict=True)
    )


def group_ranges(weight: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """(least, largest) of the group of GROUP_SIZE with the widest range, and of the median one;
    the rest of a row that fills no group is left out, unless there is nothing else."""
    columns = weight.shape[1]
    size = min(GROUP_SIZE, columns)
    groups = weight[:, : columns // size * size].reshape(-1, size)
    low, high = torch.aminmax(groups, dim=1)
    spans = high - low
    places = (int(spans.argmax()), int(spans.argsort()[len(spans) // 2]))
    widest, usual = ((float(low[place]), float(high[place])) for place in places)
    return widest, usual


def main(arguments: list[str] | None = None) -> int:
    """Do it and return the exit code: 0, or 2 for an error a person can meet."""
    parser = learn.parser("quantlab.inspection.capture", __doc__)
    given = parser.parse_args(arguments)
    return learn.serve("inspection", given.parent, lambda watch: captured(given.model, watch))


if __name__ == "__main__":
    sys.exit(main())
