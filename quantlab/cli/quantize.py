"""`quantize`: one model, one method, files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli import options as o
from quantlab.cli.output import check_folder
from quantlab.cli.terminal import TerminalProgress
from quantlab.errors import Cancelled, ConfigError
from quantlab.types import OptionValue, RunSpec, VariantSpec

D = o.DEFAULTS


def quantize(
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="A method that `methods` lists.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where to write: a folder, or a .gguf file."),
    ],
    model: o.Model = D.model,
    bits: Annotated[
        int | None, typer.Option("--bits", help="Bits a weight, where the method has a choice.")
    ] = None,
    group_size: o.GroupSize = D.group_size,
    settings: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE...", help="Options of the method; several may be given."
        ),
    ] = [],  # noqa: B006 - typer reads the default and never changes it
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="File format: quantlab, gguf, gptq, awq or compressed-tensors; by default the one "
            "the method is for.",
        ),
    ] = None,
    calibration: o.Calibration = D.calibration,
    calibration_tokens: o.CalibrationTokens = D.calibration_tokens,
    calibration_length: o.CalibrationLength = D.calibration_length,
    device: o.DeviceOption = "auto",
    threads: o.Threads = D.threads,
    seed: o.Seed = D.seed,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Quantize a model and write it to disk."""
    form = format or ("gguf" if method == "gguf" else "quantlab")
    check_out(out, form)
    from quantlab import pipeline
    from quantlab.methods import METHODS, configure

    if method not in METHODS:
        raise ConfigError(f"--method: unknown method {method!r}; choose {', '.join(METHODS)}")
    plain = VariantSpec(method, bits)
    with o.blame("--bits", f"{plain.label}: "):
        configure(plain)
    with o.blame("--group-size", f"{plain.label}: "):
        configure(plain, group_size)
    variant = VariantSpec(method, bits, parse_settings(settings))
    with o.blame("--set", f"{variant.label}: "):
        configure(variant, group_size)
    spec = RunSpec(
        model=model,
        group_size=group_size,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        calibration_length=calibration_length,
        device=device,
        threads=threads,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    existed = out.exists()
    try:
        with TerminalProgress() as progress:
            written = pipeline.quantize(spec, variant, out, form, progress)
    except KeyboardInterrupt:
        state = "is as it was" if existed or not out.exists() else "may be incomplete"
        raise Cancelled(f"cancelled: {out} {state}") from None
    print(f"wrote {written} ({size(written) / 1e6:,.1f} MB)")


def parse_settings(settings: list[str]) -> tuple[tuple[str, OptionValue], ...]:
    """`key=value` texts as the options of a variant. Raises: ConfigError."""
    options: dict[str, OptionValue] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set: {setting!r}: write key=value, for example act_order=true")
        if key.strip() in options:
            raise ConfigError(f"--set: {key.strip()} is given twice")
        options[key.strip()] = value.strip()
    return tuple(sorted(options.items()))


def check_out(out: Path, format: str) -> None:
    """Make sure that `out` can be made: somewhere above it is a folder that takes files.

    Raises: ConfigError.
    """
    if out.exists() and not out.is_dir() and format != "gguf":
        raise ConfigError(f"--out: {out} is a file; name a new folder")
    folder = out.resolve() if out.is_dir() else out.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file, so {out} cannot be made; name a new folder")
    check_folder("--out", out, folder)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
