"""Quantized models on disk, one folder a content key, the least recently used removed first."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_REMOVED = ".removed-"


def artifact_path(folder: Path, key: str) -> Path:
    """`folder/key`. Raises: ValueError for a key that would lead out of the folder."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"artifact key {key!r}: letters, digits, '.', '_' and '-' only")
    return folder / key


def touch(path: Path) -> None:
    """Count `path` as just used, if it exists."""
    with contextlib.suppress(OSError):
        os.utime(path)


def prune(folder: Path, keep_bytes: int, protected: Collection[str]) -> int:
    """Remove least recently used entries until at most `keep_bytes` remain; bytes removed.

    Entries named in `protected` count but are never removed. What cannot be read or removed is
    left alone.
    """
    entries: list[tuple[float, int, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            # What an interrupted removal left goes first.
            used = 0.0 if path.name.startswith(_REMOVED) else path.stat().st_mtime
            entries.append((used, _size(path), path))
    excess = sum(size for _, size, _ in entries) - keep_bytes
    removed = 0
    for _, size, path in sorted(entries):
        if removed >= excess:
            break
        if path.name not in protected and _remove(path):
            removed += size
    return removed


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    total = 0
    for inside in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += 0 if inside.is_dir() else inside.lstat().st_size
    return total


def _remove(path: Path) -> bool:
    """Rename, then delete: nobody meets half an artifact under its own name."""
    condemned = path.with_name(f"{_REMOVED}{secrets.token_hex(4)}")
    try:
        path.rename(condemned)
        if condemned.is_dir():
            shutil.rmtree(condemned)
        else:
            condemned.unlink()
    except OSError:
        return False
    return True
