"""From a model's name to files that may be trusted: what it is, where it lies, its hash."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantlab.errors import ModelError
from quantlab.models import bundled
from quantlab.models.gguf_header import read_header
from quantlab.models.json_files import read_json
from quantlab.models.quantization import LEGACY, quantization_of
from quantlab.models.shards import open_shards
from quantlab.paths import find

ARTIFACT_FILE = "quantlab.json"
"""Present in a folder that `quantize --format quantlab` wrote."""

HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`path` is a folder or a .gguf file (None for a Hub id); `fingerprint` identifies the weights:
    sha256 of the weight files and the configuration, or the Hub's commit. A 'checkpoint' is a
    folder of GPTQ, AWQ or compressed-tensors weights."""

    name: str
    kind: Literal["bundled", "folder", "gguf", "hub", "quantlab", "checkpoint"]
    path: Path | None
    fingerprint: str


def locate(
    name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> ModelSource:
    """Find a model without loading it.

    `name` is 'bundled', a folder, a .gguf file or a Hub id (owner/name). Raises: ModelError that
    says what was looked for, and names the flag where pickles or remote code would be needed.
    """
    if not name.strip():
        raise ModelError("model: empty; use bundled, a Hub id, a folder or a .gguf file")
    if name == "bundled":
        gguf = bundled.find_gguf()
        made = f"{bundled.SEED}:{bundled.REVISION}"
        fingerprint = f"bundled:{gguf.name}:{gguf.stat().st_size}:{made}"
        return ModelSource(name, "bundled", gguf, fingerprint)
    path = find(name)
    if path is not None and path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"model: {name} is a file but not a .gguf; give its folder instead")
        check_gguf(path)
        return ModelSource(name, "gguf", path, _hash_files([path]))
    if path is not None and path.is_dir():
        if (path / ARTIFACT_FILE).is_file():
            files = sorted(file for file in path.iterdir() if file.is_file())
            return ModelSource(name, "quantlab", path, _hash_files(files))
        if quantization_of(path) is not None:
            files = check_checkpoint(path, trust_remote_code=trust_remote_code)
            return ModelSource(name, "checkpoint", path, _hash_files(files))
        files = check_folder(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        return ModelSource(name, "folder", path, _hash_files([path / "config.json", *files]))
    if name.lower().endswith(".gguf") or not HUB_ID.fullmatch(name):
        named = name if len(name) < 200 else f"{name[:60]}…"
        raise ModelError(
            f"model: no such file or folder: {named}; "
            "use bundled, a Hub id (owner/name), a folder or a .gguf file"
        )
    return ModelSource(name, "hub", None, _hub_revision(name))


def check_checkpoint(path: Path, *, trust_remote_code: bool) -> list[Path]:
    """What decides the weights of a quantized folder, headers checked. Raises: ModelError."""
    _check_code(path, trust_remote_code)
    configs = [path / name for name in ("config.json", *LEGACY)]
    return [*(file for file in configs if file.is_file()), *open_shards(path).files]


def _check_code(path: Path, trust_remote_code: bool) -> None:
    """Raise ModelError for a folder that brings code of its own, unless that is trusted."""
    if read_json(path / "config.json").get("auto_map") and not trust_remote_code:
        raise ModelError(
            f"model: {path.name} brings its own Python code; it runs only with --trust-remote-code"
        )


def check_folder(path: Path, *, allow_pickle: bool, trust_remote_code: bool) -> list[Path]:
    """The weight files of a transformers folder, headers checked. Raises: ModelError."""
    _check_code(path, trust_remote_code)
    shards = sorted(path.glob("*.safetensors"))
    if shards:
        for shard in shards:
            check_safetensors(shard)
        return shards
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if not pickles:
        raise ModelError(f"model: {path} holds no .safetensors weights")
    if not allow_pickle:
        raise ModelError(
            f"model: {path.name} has only pickle weights ({pickles[0].name}), which can run code "
            "when loaded; convert them to safetensors or pass --allow-pickle"
        )
    return pickles


def check_safetensors(path: Path) -> None:
    """Raise ModelError unless the file's header is sound and all its bytes are there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model: {path.name} is corrupt or truncated ({error}); fetch it again"
        ) from None


def check_gguf(path: Path) -> None:
    """Raise ModelError unless the GGUF header can be read and all tensor bytes are there."""
    header = read_header(path)
    if "general.architecture" not in header.fields or not header.tensors:
        raise ModelError(f"model: {path.name} is a GGUF file without a language model")


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(path.name.encode())
        digest.update(_hash_file(path, status.st_size, status.st_mtime_ns))
    return f"sha256:{digest.hexdigest()}"


@functools.lru_cache(maxsize=256)
def _hash_file(path: Path, size: int, changed: int) -> bytes:
    """sha256 of a file; read again only after its size or time of change is another."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _hub_revision(name: str) -> str:
    """The commit of a Hub model, from the network or the local cache. Raises: ModelError."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return f"hub:{Path(cached).parent.name}"
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise ModelError(
                f"model: {name} is not in the local Hub cache and HF_HUB_OFFLINE is set"
            )
        return f"hub:{HfApi().model_info(name, timeout=10).sha}"
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model: {name} is no local folder, and the Hub did not have it or cannot be reached "
            f"({type(error).__name__}); check the spelling and the network, or use bundled"
        ) from None
