"""File locks between processes, which the system releases when their holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantlab.types import Emit, Notice

POLL_SECONDS = 0.1
_held = threading.local()


class FileLock:
    """An exclusive lock on a file (`flock`), whose text is the process id of the holder.

    Every object opens the file anew, so two of them exclude each other within a process too. On a
    file system without locks `acquire` succeeds and `supported` becomes False.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.supported = True
        self._file: int | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free; never waits. Raises: OSError if the file cannot be made."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(file)
                return False
            self.supported = False
        self._file = file
        self._write(str(os.getpid()))
        return True

    def release(self) -> None:
        """Give the lock back; without effect if it is not held."""
        if self._file is not None:
            self._write("")
            if self.supported:
                # Not by closing alone: a forked child may still hold the same open file.
                fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Hold the lock for a short piece of work, after waiting for it."""
        while not self.acquire():
            time.sleep(0.01)
        try:
            yield
        finally:
            self.release()

    def holder(self) -> int | None:
        """The process id that the holder wrote, None when there is none (yet)."""
        try:
            return int(self.path.read_text())
        except (OSError, ValueError):
            return None

    def _write(self, text: str) -> None:
        assert self._file is not None
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text.encode(), 0)
        except OSError:
            pass  # A full disk: the lock holds without its holder's name.


@contextmanager
def measuring_lock(path: Path, emit: Emit) -> Iterator[None]:
    """Hold `path` while measuring; wait for whoever holds it, with a Notice that names them.

    May be nested within a thread. The wait is plain sleeping, so a signal ends it at once.
    """
    mine: set[Path] = _held.__dict__.setdefault("paths", set())
    if path in mine:
        yield
        return
    lock = FileLock(path)
    told, told_of = False, None
    while not lock.acquire():
        holder = lock.holder()
        if not told and holder is None:
            time.sleep(POLL_SECONDS)  # The holder is about to write its name.
            holder = lock.holder()
        if not told or (holder is not None and holder != told_of):
            who = "" if holder is None else f" (process {holder})"
            emit(Notice(f"waiting for another comparison on this machine{who} to finish"))
            told, told_of = True, holder
        time.sleep(POLL_SECONDS)
    if not lock.supported:
        emit(Notice(f"{path.parent} cannot be locked: another comparison may disturb the speeds"))
    mine.add(path)
    try:
        yield
    finally:
        mine.discard(path)
        lock.release()
