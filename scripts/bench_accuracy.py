#!/usr/bin/env python3
"""Train U-Net and FusionNet on real images for a fixed time and write what they reach to docs/benchmarks/accuracy.md.

    python scripts/bench_accuracy.py                      all tasks, about 75 minutes on 2 cores
    python scripts/bench_accuracy.py isbi_unet            one task
    python scripts/bench_accuracy.py --minutes-scale 0.1  a quick look (its figures are not kept)

Each task is one ordinary `medseg train`; the figures are those of its final validation, on the scans' own grids.
The images are found through MEDSEG_DATA. Keep the machine otherwise idle: the budget is time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "docs" / "benchmarks" / "accuracy.json"
TABLE = ROOT / "docs" / "benchmarks" / "accuracy.md"


@dataclass(frozen=True)
class Task:
    """One training."""

    name: str
    folder: str
    minutes: float
    overrides: tuple[str, ...]


EM = ("data.labels={background: 255, membrane: 0}", "data.split.validation=['20','21','22','23']")
TASKS = (
    Task("hippocampus_unet", "segmentation/hippocampus", 20, ("model=unet",)),
    Task("hippocampus_fusionnet", "segmentation/hippocampus", 20, ("model=fusionnet_narrow",)),
    Task("isbi_unet", "segmentation/isbi2012_em", 15, ("model=unet", *EM)),
    Task("isbi_fusionnet", "segmentation/isbi2012_em", 15, ("model=fusionnet_narrow", *EM)),
)


def run(task: Task, folder: Path, scale: float) -> dict[str, Any]:
    """Train one task and read what it reached."""
    overrides = [f"data.root='{DATA / task.folder}'", *task.overrides, f"trainer.max_minutes={task.minutes * scale}"]
    command = [sys.executable, "-m", "medseg", "train", *overrides, f"hydra.run.dir='{folder / task.name}'"]
    subprocess.run(command, check=True)
    of_run = folder / task.name
    metrics = json.loads((of_run / "validation" / "metrics.json").read_text())
    split = json.loads((of_run / "split.json").read_text())
    last = (of_run / "history.csv").read_text().splitlines()[-1].split(",")
    return {
        "command": "medseg train " + " ".join([f"data.root=$MEDSEG_DATA/{task.folder}", *map(_quoted, overrides[1:])]),
        "num_train": len(split["train"]),
        "num_val": len(split["val"]),
        "steps": int(last[0]),
        "minutes": float(last[1]),
        "summary": metrics["summary"],
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
    }


def _quoted(override: str) -> str:
    return f"'{override}'" if set(override) & set("{[' ") else override


def write_table(results: dict[str, dict[str, Any]]) -> None:
    """Write the Markdown table of all results."""
    lines = [
        "# What U-Net and FusionNet reach in a fixed time",
        "",
        "Made by `python scripts/bench_accuracy.py`; each row is one run of the command below it, on a CPU. Dice is of",
        "the validation cases on their own grids (mean over cases of the mean over classes; a missed structure counts",
        "0). The best checkpoint is chosen on the same validation cases, so the figures are slightly optimistic.",
        "",
        "| task | train / val | cores | minutes | steps | mean Dice | per class |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        dice = {name: entry["metrics"]["dice"]["mean"] for name, entry in r["summary"].items()}
        foreground = dice.pop("(foreground)")
        per_class = ", ".join(f"{k} {v:.3f}" for k, v in dice.items())
        lines.append(
            f"| {name} | {r['num_train']} / {r['num_val']} | {r['cores']} | {r['minutes']:.1f} | {r['steps']} |"
            f" **{foreground:.3f}** | {per_class} |"
        )
    lines += ["", *(f"- `{name}`: `{r['command']}`" for name, r in results.items()), ""]
    TABLE.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Run the chosen tasks one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(t.name for t in TASKS))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_accuracy"), help="where the runs are kept")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="other than 1: nothing is written")
    arguments = parser.parse_args()
    chosen = [t for t in TASKS if not arguments.tasks or t.name in arguments.tasks]
    if not chosen:
        parser.error("no such task")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for task in chosen:
        results[task.name] = run(task, arguments.runs.resolve(), arguments.minutes_scale)
        if arguments.minutes_scale == 1:
            ordered = {t.name: results[t.name] for t in TASKS if t.name in results}
            RESULTS.write_text(json.dumps(ordered, indent=1), encoding="utf-8")
            write_table(ordered)


if __name__ == "__main__":
    main()
