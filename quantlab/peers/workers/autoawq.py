"""AutoAWQ: https://github.com/casper-hansen/AutoAWQ, `make peers`. Left behind: its GEMM format.

On a CPU its scale search is broken: it keeps `v.cpu()` of every weight to restore between the
candidates, and on a CPU that is the live tensor, so nothing is ever restored and every scale is
applied twice. Here the search sees a copied state dict; nothing else is changed.
"""

from __future__ import annotations

import warnings
from typing import Any

PATCH = "the state dict that its scale search restores from is copied"


def check() -> None:
    """Raises: ImportError."""
    warnings.filterwarnings("ignore")
    import awq  # noqa: F401


def quantize(job: Any, clock: Any) -> dict[str, Any]:
    import awq
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from transformers import AutoTokenizer

    total = done = 0

    class Patched(AwqQuantizer):  # type: ignore[misc]
        modules: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal total
            super().__init__(*args, **kwargs)
            total = len(self.modules)
            self.modules = self.modules[: job.blocks or total]

        def _get_input_feat(self, *args: Any, **kwargs: Any) -> Any:
            """The first thing it does in a block."""
            nonlocal done
            job.step("quantize", done, len(self.modules))
            done += 1
            return super()._get_input_feat(*args, **kwargs)

        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *args: Any, **kwargs: Any
        ) -> Any:
            live = module2inspect.state_dict
            module2inspect.state_dict = lambda: {k: v.clone() for k, v in live().items()}
            try:
                return super()._compute_best_scale(
                    x, w_mean, x_mean, module2inspect, *args, **kwargs
                )
            finally:
                del module2inspect.state_dict

    options, pieces = job.options, job.pieces
    clock.lap()
    model = AutoAWQForCausalLM.from_pretrained(str(job.model), device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(job.model))
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    load_seconds = clock.lap()
    model.quantize(
        tokenizer,
        quant_config={
            "zero_point": True,
            "q_group_size": options["group_size"],
            "w_bit": options["bits"],
            "version": "GEMM",
        },
        calib_data=pieces,
        max_calib_samples=len(pieces),
        max_calib_seq_len=len(pieces[0]),
        quantizer_cls=Patched,
    )
    seconds = clock.lap()
    model.save_quantized(str(job.checkpoint))
    return {
        "peer": "AutoAWQ",
        "version": awq.__version__,
        "patch": PATCH,
        "settings": f"its defaults: zero-point, clip search, weights in {dtype}",
        "load_seconds": load_seconds,
        "seconds": seconds,
        "save_seconds": clock.lap(),
        "blocks": [job.blocks, total] if 0 < job.blocks < total else None,
    }
