"""A peer's process: what it says, how it ends, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantlab.errors import MethodError
from quantlab.peers import environments, process
from quantlab.peers.environments import Peer
from tests.fake_peer import REPORT, fake_python, install

PEER = Peer("Fake", "fake", "fake", "fake-peer", "rtn")
SAYS = "import json, os, subprocess, sys, time\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "peers")
    install(PEER, "1.5")
    return tmp_path


def script(text: str) -> None:
    """Let the peer's Python run this, whatever it is asked to run."""
    path = PEER.python.with_name("script.py")
    path.write_text(SAYS + text)
    fake_python(PEER, str(path))


def run(folder: Path, step: process.Step = lambda *_: None, **more: Any) -> process.Report:
    return process.run(PEER, folder, [[1, 2], [3, 4]], folder / "out", {"bits": 3}, 1, step, **more)


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has) within some seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_it_is_asked_and_listened_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are no events, and pieces of lines, do no harm; the checkout is not in sight."""
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    script(f"""
say = lambda text: (sys.stdout.write(text), sys.stdout.flush())
say('{{"stage": "load", "done": 0, "total": 1}}\\nnoise\\n[1]\\n{{"stage": "quantize", "do')
time.sleep(0.1)
say('ne": 3, "total": 30}}\\n')
facts = {REPORT!r} | {{"settings": json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()])}}
say(json.dumps({{"report": facts | {{"blocks": [3, 30]}}}}) + "\\n")
""")
    steps: list[tuple[str, int, int]] = []
    report = run(folder, lambda *step: steps.append(step), blocks=3)
    assert steps == [("load", 0, 1), ("quantize", 3, 30)]
    assert (report.peer, report.version, report.seconds, report.blocks) == (
        "Fake",
        "1.5",
        12.5,
        (3, 30),
    )
    arguments, environment, place = json.loads(report.settings)
    assert arguments[0] == "-P"
    assert Path(arguments[1]) == process.RUN
    assert Path(arguments[2]) == PEER.worker
    given = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    assert json.loads(given["--options"]) == {"bits": 3}
    assert json.loads(Path(given["--ids"]).read_text()) == [[1, 2], [3, 4]]
    assert given["--blocks"] == "3"
    assert given["--parent"] == str(os.getpid())
    assert "PYTHONPATH" not in environment
    assert environment["OMP_NUM_THREADS"] == environment["HF_HUB_OFFLINE"] == "1"
    assert Path(place) == folder / "out"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("print(json.dumps({'error': 'no room'})); sys.exit(1)", "Fake failed: no room", None),
        (
            "print(json.dumps({'error': 'No module x', 'missing': True})); sys.exit(1)",
            "Fake failed: No module x",
            "make peers",
        ),
        ("print('a\\nlast words', file=sys.stderr); sys.exit(3)", "exit code 3: last words", None),
        ("os.kill(os.getpid(), 9)", "killed .signal 9., most likely out of memory", "smaller"),
        ("os.kill(os.getpid(), 11)", "Fake ended with signal 11", None),
        ("pass", "Fake ended with exit code 0", None),
        ("print(json.dumps({'report': {}})); sys.exit(1)", "exit code 1", None),
        ("print(json.dumps({'report': {'peer': 1}}))", "no report that can be read", None),
        (
            f"print(json.dumps({{'report': {REPORT!r} | {{'surprise': 1}}}}))",
            "no report that can be read .*surprise",
            None,
        ),
    ],
)
def test_every_other_end_is_a_reason(
    text: str, message: str, hint: str | None, folder: Path
) -> None:
    script(text)
    with pytest.raises(MethodError, match=message) as caught:
        run(folder)
    assert "\n" not in str(caught.value)
    assert (caught.value.hint is None) == (hint is None)
    assert hint is None or hint in str(caught.value.hint)


def test_a_peer_that_is_not_there_says_how_to_get_it(folder: Path) -> None:
    metadata = next(PEER.python.parents[1].rglob("METADATA"))
    metadata.write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.5\n")
    metadata.parent.rename(metadata.parents[1] / "another-1.5.dist-info")
    with pytest.raises(MethodError, match=r"\.venv-peers/fake has no fake-peer") as caught:
        run(folder)
    assert "make peers" in str(caught.value.hint)
    PEER.python.unlink()
    with pytest.raises(MethodError, match=r"Fake is not installed: there is no \.venv-peers/fake"):
        run(folder)


CHILD = """
child = subprocess.Popen(["sleep", "300"])
print(json.dumps({"stage": "quantize", "done": os.getpid(), "total": child.pid}), flush=True)
"""


def test_cancel_ends_it_and_its_children(folder: Path) -> None:
    script(CHILD + "time.sleep(300)")
    pids: list[int] = []

    def cancel(stage: str, done: int, total: int) -> None:
        pids.extend((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, cancel)
    assert len(pids) == 2
    assert all(map(gone, pids))


def test_a_child_that_it_leaves_behind_keeps_nobody_waiting(folder: Path) -> None:
    """The child holds the peer's standard output open."""
    script(CHILD + f"print(json.dumps({{'report': {REPORT!r}}}), flush=True)")
    pids: list[int] = []
    assert run(folder, lambda stage, *both: pids.extend(both)).peer == "Fake"
    assert all(map(gone, pids))


def test_it_ends_with_whoever_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed worker of the page takes its peer along, whose recipe is being read here."""
    fake_python(PEER)
    recipes, pids = folder / "recipes", folder / "pids"
    recipes.mkdir()
    (recipes / "fake.py").write_text(
        f"{SAYS}child = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(pids) + '.new'!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(pids) + '.new'!r}, {str(pids)!r})\n"
        "time.sleep(300)\n"
    )
    asker = f"""
from pathlib import Path
from quantlab.peers import environments, process
environments.FOLDER = Path({str(environments.FOLDER)!r})
environments.WORKERS = Path({str(recipes)!r})
peer = environments.Peer("Fake", "fake", "fake", "fake-peer", "rtn")
out = Path({str(folder)!r})
process.run(peer, out, [[1]], out / "out", {{}}, 1, lambda *_: None)
"""
    with subprocess.Popen([sys.executable, "-c", asker], start_new_session=True) as asking:
        for _ in range(600):
            if pids.exists() or asking.poll() is not None:
                break
            time.sleep(0.05)
        found = [int(pid) for pid in pids.read_text().split()]
        asking.send_signal(signal.SIGKILL)
    assert len(found) == 2
    assert all(map(gone, found))
