"""Make the comparison that ships with QuantLab: `python scripts/precomputed.py [--run ID]`.

Writes assets/precomputed.json. It measures the page's default comparison on this machine, in a home
of its own so that nothing comes from earlier results; leave the machine alone meanwhile. With
`--run ID` (or `--run latest`) a finished run of the store is taken as it is; QUANTLAB_HOME says
which store.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantlab import precomputed, report
from quantlab.paths import home
from quantlab.plots.words import words
from quantlab.runs import Run
from quantlab.store import Store
from quantlab.ui import form


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", metavar="ID")
    given = parser.parse_args(arguments)
    if given.run is None:
        with tempfile.TemporaryDirectory() as folder:
            run = measured(Path(folder))
    else:
        store = Store()
        newest = (r for r in store.runs(100) if r.kind == "compare" and r.status == "finished")
        run = next(newest) if given.run == "latest" else store.run(given.run)
    document = precomputed.write(run)
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    precomputed.FILE.write_text(text + "\n", encoding="utf-8")
    print(f"{precomputed.FILE.name}: {precomputed.FILE.stat().st_size:,} bytes of {run.id}")


def measured(folder: Path) -> Run:
    """The page's default comparison, run by the command line with `folder` as its home."""
    if (home() / "models").is_dir():  # The rebuilt bundled model is the same in every home.
        (folder / "models").symlink_to(home() / "models")
    command = report.reproduce_command(form.spec_of(form.defaults(), words()))
    print(command)
    subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"QUANTLAB_HOME": str(folder)},
        check=True,
    )
    return Store(folder).runs(1)[0]


if __name__ == "__main__":
    main()
