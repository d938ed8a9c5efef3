#!/usr/bin/env python3
"""What counts on a short budget: train the demo's phantom with several settings for the same time, and table the Dice.

    python scripts/bench_short_budget.py                 about 14 minutes; writes docs/benchmarks/short_budget.md
    taskset -c 0 python scripts/bench_short_budget.py    on one core

One run of each, one after the other. Keep the machine otherwise idle: the budget is time.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from medseg.phantom import write_phantoms

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "short_budget.md"
MINUTES = 1.2
COMMON = (
    f"trainer.max_minutes={MINUTES}",
    "trainer.num_validations=1",
    "trainer.final_predictions=false",
    "trainer.overlay_cases=1",
)
LARGE, SMALL = "data.plan.patch_size=[40,64,80]", "data.plan.patch_size=[32,48,48]"
SETTINGS: tuple[tuple[str, ...], ...] = (
    (LARGE, "data.plan.batch_size=2"),
    (LARGE, "data.plan.batch_size=2", "optimizer.lr=3e-3"),
    (SMALL, "data.plan.batch_size=5", "optimizer.lr=3e-3"),
    (SMALL, "data.plan.batch_size=2"),
    (SMALL, "data.plan.batch_size=2", "optimizer.lr=3e-3"),
    (SMALL, "data.plan.batch_size=2", "optimizer.lr=6e-3"),
    (SMALL, "data.plan.batch_size=2", "optimizer.lr=3e-3", "data.plan.base_width=8"),
    (SMALL, "data.plan.batch_size=2", "optimizer.lr=3e-3", "loss.batch_dice=false"),
    (SMALL, "data.plan.batch_size=2", "optimizer=sgd", "optimizer.lr=2e-2", "optimizer.momentum=0.95"),
)


def main() -> None:
    """Run all settings and write the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_phantoms(Path(folder) / "data")
        for number, settings in enumerate(SETTINGS):
            run = Path(folder) / f"run_{number}"
            command = [sys.executable, "-m", "medseg", "train", f"data.root='{data.train}'", f"hydra.run.dir='{run}'"]
            subprocess.run([*command, *COMMON, *settings], check=True)
            with (run / "history.csv").open(newline="") as file:
                last = [row for row in csv.DictReader(file) if row["val_dice_mean"]][-1]
            rows.append((settings, int(last["step"]), float(last["val_dice_mean"])))
    lines = [
        "# What counts on a short budget",
        "",
        f"Made by `python scripts/bench_short_budget.py` on {len(os.sched_getaffinity(0))} CPU core(s): the demo's",
        f"phantom, {MINUTES} minutes each, `medseg train data.root=PHANTOM {' '.join(COMMON)}` and the settings of the",
        "row (base width 16 and AdamW at 1e-3 where none are named); mean Dice of the 2 validation cases on the",
        "network's grid. One run each: differences of a few hundredths mean nothing.",
        "",
        "| settings | steps | mean Dice |",
        "|---|---|---|",
        *(f"| `{' '.join(settings)}` | {steps} | {dice:.2f} |" for settings, steps, dice in rows),
        "",
    ]
    TABLE.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
