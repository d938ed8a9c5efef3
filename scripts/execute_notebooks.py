#!/usr/bin/env python3
"""Execute notebooks and write what comes out into their files, without traces of this machine: `make notebooks`.

python scripts/execute_notebooks.py                      all of them; makes the demo's run first if there is none
python scripts/execute_notebooks.py 2 4                  those of these numbers
python scripts/execute_notebooks.py --check              execute, and write nothing
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

from medseg.cli.notebook import RUNS_VARIABLE, shipped_notebooks

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "demo"
MINUTES = "4"
"""Of the demo's training: notebook 4 has to show a network that works, also where the machine is busy."""
TIMEOUT_S = 1800
"""Of a cell."""
PATHS = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|opt|private|var)/[^\s\"'<>]*|[A-Z]:\\\\[^\s\"'<>]*")
"""What tells of a machine; in a saved notebook there must be none."""


def execute(path: Path) -> nbformat.NotebookNode:
    """Run all cells; the notebook with their outputs.

    Args:
        path: the notebook; its folder is the working directory, as in Jupyter.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources, record_timing=False
    )
    return client.execute()


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without metadata of the machine, warnings on the standard error, and widgets, which only a kernel keeps alive.

    Raises:
        SystemExit: an output names a folder of this machine.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            data = output.get("data", {})
            for mime in [m for m in data if m.startswith("application/vnd.jupyter.widget")]:
                del data[mime]
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
            if output.get("name") != "stderr" and output.get("data", True):
                kept.append(output)
        cell.outputs = kept
        told = PATHS.search(_text(kept))
        if told:
            raise SystemExit(f"an output names a folder of this machine: {told.group()}\nin the cell:\n{cell.source}")
    return notebook


def smaller(picture: str) -> str:
    """A PNG in base64 with a palette of 256 colours: half the size, and nobody sees it."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image, io.BytesIO() as file:
        image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            file, "PNG", optimize=True
        )
        packed = base64.b64encode(file.getvalue()).decode()
    return min(packed, picture, key=len)


def _text(outputs: list[Any]) -> str:
    """What people read in outputs; pictures are left out."""
    shown = [{k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")} for o in outputs]
    return json.dumps([shown, [o.get("text", "") for o in outputs]], ensure_ascii=False)


def main() -> None:
    """Execute what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="the first part of their names; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--runs", type=Path, help="a run to look at, or a folder of runs; by default the demo's")
    options = parser.parse_args()
    runs = options.runs or DEMO / "runs"
    if options.runs is None and not any(runs.glob("*/validation/metrics.json")):
        print("no run of the demo yet: medseg demo", flush=True)
        subprocess.run(
            [sys.executable, "-m", "medseg", "demo", "-o", str(DEMO), "--minutes", MINUTES], check=True, cwd=REPOSITORY
        )
    os.environ[RUNS_VARIABLE] = str(runs.resolve())
    os.environ.pop("JPY_SESSION_NAME", None)  # pictures, not widgets, also where this runs in a terminal of Jupyter
    for path in shipped_notebooks():
        if options.numbers and int(path.name[:2]) not in options.numbers:
            continue
        started = time.monotonic()
        notebook = cleaned(execute(path))
        figures = sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))
        if not options.check:
            path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        print(f"{path.name}: {figures} figures, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
