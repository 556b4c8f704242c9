"""Environments of peers that are not there: this Python, and the metadata of a package."""

from __future__ import annotations

import sys
from pathlib import Path

from quantlab.peers.environments import Peer

REPORT = {
    "peer": "Fake",
    "version": "1.5",
    "settings": "its defaults",
    "seconds": 12.5,
    "load_seconds": 1.0,
    "save_seconds": 2.0,
    "original_loss": 3.0,
    "peak_rss_bytes": 123_000_000,
}


def fake_python(peer: Peer, *before: str) -> None:
    """The peer's Python is this one, with arguments before its own."""
    peer.python.parent.mkdir(parents=True, exist_ok=True)
    words = " ".join(f'"{word}"' for word in (sys.executable, *before))
    peer.python.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    peer.python.chmod(0o755)


def install(peer: Peer, version: str) -> Path:
    """An environment with the metadata of `peer`, and its site-packages."""
    fake_python(peer)
    site = peer.python.parents[1] / "lib" / "python3" / "site-packages"
    about = site / f"{peer.distribution.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {peer.distribution}\nVersion: {version}\n"
    (about / "METADATA").write_text(text)
    return site
