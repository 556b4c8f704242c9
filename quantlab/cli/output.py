"""Writing results to files: checked before a run starts, complete or not at all, and valid JSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError, StorageError


def check_writable(option: str, path: Path | None) -> None:
    """Make sure that `path` can be written later.

    Raises: ConfigError that names the `option`. Leaves nothing behind.
    """
    if path is None:
        return
    target = path.resolve()
    if target.is_dir():
        raise ConfigError(f"{option}: {path} is a folder; name a file in it")
    if target.exists() and not target.is_file():
        return  # a device or a pipe, such as /dev/null
    check_folder(option, path, target.parent)


def check_folder(option: str, path: Path, folder: Path) -> None:
    """Make sure that files can be made in `folder`, for `path` that was given with `option`.

    Raises: ConfigError. Access bits do not tell (root, read-only mounts), so a file is tried.
    """
    if not folder.is_dir():
        raise ConfigError(f"{option}: {path}: there is no folder {folder}; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{option}: {path} cannot be written ({reason}); name a file in a folder of yours"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole: into a temporary one beside it, then renamed over it.

    Raises: StorageError (for example a full disk); an older file of that name is then untouched.
    """
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0600
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path} could not be written: {reason}",
            "finished variants are kept; the same command again takes them from the cache",
        ) from None


def to_json(value: Any) -> str:
    """JSON text that every reader takes: NaN and infinities become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
