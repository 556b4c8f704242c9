"""GPTQModel quantizes a folder; its own Python runs this: .venv-peers/gptqmodel/bin/python.

Its defaults: symmetric, group-aware reordering, damping 0.05, one piece of text a batch. Written to
--out: `checkpoint` (GPTQ format), `plain` (dequantized by GPTQModel's own layers), report.json.
"""

from __future__ import annotations

import json
import os
import time

from plain import arguments, original_loss, report, save_plain


def main() -> None:
    given = arguments("Quantize with GPTQModel on the CPU.")
    # Its default is one worker a core beyond what torch's own threads already fill.
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(given.threads, 2))
    import torch

    torch.set_num_threads(given.threads)
    import gptqmodel
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    pieces = json.loads(given.ids.read_text(encoding="utf-8"))
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in pieces]
    settings = QuantizeConfig(bits=given.bits, group_size=given.group_size)

    loss = original_loss(given.model, pieces[0])
    started = time.perf_counter()
    model = GPTQModel.load(str(given.model), settings, device="cpu")
    loaded = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    quantized = time.perf_counter()
    checkpoint = given.out / "checkpoint"
    model.save(str(checkpoint))
    saved = time.perf_counter()
    del model

    model = GPTQModel.load(str(checkpoint), device="cpu", backend=BACKEND.TORCH)
    save_plain(dequantized(model.model), given.model, given.out / "plain")
    report(
        given.out,
        peer=f"GPTQModel {gptqmodel.__version__}",
        original_loss=loss,
        seconds=quantized - loaded,
        load_seconds=loaded - started,
        save_seconds=saved - quantized,
        blocks=None,
        settings=(
            f"its defaults: {'' if settings.sym else 'a'}symmetric, damping "
            f"{settings.damp_percent}, act_group_aware {settings.act_group_aware}, "
            f"GPTQMODEL_CPU_WORKERS={os.environ['GPTQMODEL_CPU_WORKERS']}"
        ),
        versions={"torch": torch.__version__, "gptqmodel": gptqmodel.__version__},
    )


def dequantized(module) -> dict:
    """Weights by transformers' names; quantized linears through their own `dequantize_weight`."""
    weights = {}
    for path, layer in module.named_modules():
        if hasattr(layer, "qweight"):
            # It returns [in, out], transformers keeps [out, in].
            weight = layer.dequantize_weight().t()
            if tuple(weight.shape) != (layer.out_features, layer.in_features):
                raise SystemExit(f"{path}: {tuple(weight.shape)} is no [out, in]")
            weights[f"{path}.weight"] = weight
        else:
            for name, value in layer.named_parameters(prefix=path, recurse=False):
                weights[name] = value
    tied = getattr(module.config, "tie_word_embeddings", False)
    return {k: v for k, v in weights.items() if not (tied and k == "lm_head.weight")}


if __name__ == "__main__":
    main()
