"""bitsandbytes: https://github.com/bitsandbytes-foundation/bitsandbytes, `make peers`.

transformers replaces the linears of the blocks and hands each weight to it; the head stays. Left
behind: a folder in bitsandbytes' format.
"""

from __future__ import annotations

from typing import Any


def check() -> None:
    """Raises: ImportError."""
    import bitsandbytes  # noqa: F401


def quantize(job: Any, clock: Any) -> dict[str, Any]:
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = job.options
    four = options["bits"] == 4
    settings = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type=options["codebook"],
        bnb_4bit_use_double_quant=options["double_quant"],
    )
    job.step("quantize", 0, 1)
    clock.lap()
    model = AutoModelForCausalLM.from_pretrained(
        job.model, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    seconds = clock.lap()
    job.step("quantize", 1, 1)
    for parameter in model.parameters():  # the others are quantized, from float32
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(job.checkpoint)
    kind = options["codebook"] if four else "LLM.int8()"
    double = four and options["double_quant"]
    return {
        "peer": "bitsandbytes",
        "version": bitsandbytes.__version__,
        "settings": f"{kind}{', double quantization' if double else ''}; loading is in the seconds",
        "load_seconds": 0.0,
        "seconds": seconds,
        "save_seconds": clock.lap(),
    }
