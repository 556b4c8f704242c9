"""AutoAWQ quantizes a folder; its own Python runs this: .venv-peers/awq/bin/python.

On a CPU its scale search is broken: it keeps `v.cpu()` of every weight to restore between the
candidates, and on a CPU that is the live tensor, so nothing is ever restored and every scale is
applied twice. Here the search sees a copied state dict; nothing else is changed. Written to --out:
`checkpoint` (GEMM format), `plain` (dequantized by AutoAWQ's own functions), report.json.
"""

from __future__ import annotations

import json
import time
import warnings

from plain import arguments, original_loss, report, save_plain

PATCH = "patched: the state dict that its scale search restores from is copied"


def main() -> None:
    given = arguments("Quantize with AutoAWQ on the CPU.")
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(given.threads)
    import awq
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from transformers import AutoTokenizer

    pieces = json.loads(given.ids.read_text(encoding="utf-8"))
    total = 0

    class Patched(AwqQuantizer):
        def __init__(self, *args, **kwargs):
            nonlocal total
            super().__init__(*args, **kwargs)
            total = len(self.modules)
            if given.blocks:
                self.modules = self.modules[: given.blocks]

        def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):
            live = module2inspect.state_dict
            module2inspect.state_dict = lambda: {k: v.clone() for k, v in live().items()}
            try:
                return super()._compute_best_scale(
                    x, w_mean, x_mean, module2inspect, *args, **kwargs
                )
            finally:
                del module2inspect.state_dict

    loss = original_loss(given.model, pieces[0])
    started = time.perf_counter()
    model = AutoAWQForCausalLM.from_pretrained(str(given.model), device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(given.model))
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    loaded = time.perf_counter()
    model.quantize(
        tokenizer,
        quant_config={
            "zero_point": True,
            "q_group_size": given.group_size,
            "w_bit": given.bits,
            "version": "GEMM",
        },
        calib_data=pieces,
        max_calib_samples=len(pieces),
        max_calib_seq_len=len(pieces[0]),
        quantizer_cls=Patched,
    )
    quantized = time.perf_counter()
    checkpoint = given.out / "checkpoint"
    model.save_quantized(str(checkpoint))
    saved = time.perf_counter()
    del model

    save_plain(dequantized(checkpoint, given), given.model, given.out / "plain")
    report(
        given.out,
        peer=f"AutoAWQ {awq.__version__}",
        original_loss=loss,
        seconds=quantized - loaded,
        load_seconds=loaded - started,
        save_seconds=saved - quantized,
        blocks=[given.blocks, total] if 0 < given.blocks < total else None,
        settings=f"{PATCH}; its defaults: zero-point, clip search, weights in {dtype}",
        versions={"torch": torch.__version__, "autoawq": awq.__version__},
    )


def dequantized(checkpoint, given) -> dict:
    """Weights by transformers' names, quantized ones unpacked from the written checkpoint."""
    from awq.utils.packing_utils import dequantize_gemm
    from safetensors.torch import load_file

    stored = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        stored |= load_file(file)
    weights = {}
    for name, value in stored.items():
        path, _, field = name.rpartition(".")
        if field == "qweight":
            parts = [stored[f"{path}.{part}"] for part in ("qweight", "qzeros", "scales")]
            weight = dequantize_gemm(*parts, given.bits, given.group_size)
            weights[f"{path}.weight"] = weight.t()
        elif field not in ("qzeros", "scales"):
            weights[name] = value
    return weights


if __name__ == "__main__":
    main()
