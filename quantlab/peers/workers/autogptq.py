"""AutoGPTQ: https://github.com/AutoGPTQ/AutoGPTQ, requirements-peers-gptq.txt; CUDA only.

Left behind: a folder in GPTQ format.
"""

from __future__ import annotations

from typing import Any


def check() -> None:
    """Raises: ImportError; SystemExit without CUDA."""
    import auto_gptq  # noqa: F401
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("it quantizes with CUDA only, and its torch finds no CUDA GPU")


def quantize(job: Any, clock: Any) -> dict[str, Any]:
    import auto_gptq
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    options = job.options
    settings = BaseQuantizeConfig(
        bits=options["bits"],
        group_size=options["group_size"],
        sym=options["symmetric"],
        desc_act=options["act_order"],
    )
    examples = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        for ids in job.pieces
    ]
    clock.lap()
    model = AutoGPTQForCausalLM.from_pretrained(str(job.model), settings)
    total = int(model.model.config.num_hidden_layers)
    load_seconds = clock.lap()
    job.step("quantize", 0, total)
    model.quantize(examples)
    seconds = clock.lap()
    model.save_quantized(str(job.checkpoint), use_safetensors=True)
    return {
        "peer": "AutoGPTQ",
        "version": auto_gptq.__version__,
        "settings": f"{'' if settings.sym else 'a'}symmetric, desc_act {settings.desc_act}, "
        f"damping {settings.damp_percent}",
        "load_seconds": load_seconds,
        "seconds": seconds,
        "save_seconds": clock.lap(),
    }
