"""GPTQModel: https://github.com/ModelCloud/GPTQModel, `make peers`.

What the options do not name is its default: group-aware reordering without act-order, damping 0.05,
one piece of text a batch. Left behind: a folder in GPTQ format.
"""

from __future__ import annotations

import os
from typing import Any


def check() -> None:
    """Raises: ImportError."""
    # Its default is one worker a core beyond what torch's own threads already fill.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(int(os.environ["OMP_NUM_THREADS"]), 2)))
    import gptqmodel  # noqa: F401


def quantize(job: Any, clock: Any) -> dict[str, Any]:
    import gptqmodel
    from gptqmodel import GPTQModel, QuantizeConfig

    options = job.options
    settings = QuantizeConfig(
        bits=options["bits"],
        group_size=options["group_size"],
        sym=options["symmetric"],
        desc_act=options["act_order"],
        act_group_aware=not options["act_order"],
    )
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.pieces]
    clock.lap()
    model = GPTQModel.load(str(job.model), settings, device="cpu")
    total = int(model.model.config.num_hidden_layers)
    done = 0

    def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
        nonlocal done
        done = max(done, layer_idx + 1)
        job.step("quantize", min(done, total), total)

    model.layer_callback = layer_complete
    load_seconds = clock.lap()
    job.step("quantize", 0, total)
    model.quantize(calibration, batch_size=1)
    seconds = clock.lap()
    model.save(str(job.checkpoint))
    return {
        "peer": "GPTQModel",
        "version": gptqmodel.__version__,
        "settings": (
            f"{'' if settings.sym else 'a'}symmetric, damping {settings.damp_percent}, "
            f"desc_act {settings.desc_act}, act_group_aware {settings.act_group_aware}; "
            f"GPTQMODEL_CPU_WORKERS={os.environ['GPTQMODEL_CPU_WORKERS']}"
        ),
        "load_seconds": load_seconds,
        "seconds": seconds,
        "save_seconds": clock.lap(),
    }
