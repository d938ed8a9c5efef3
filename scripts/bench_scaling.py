"""How fast one and several processes train, on a phantom: samples per second, and the share of the ideal.

    python scripts/bench_scaling.py                       1 and 2 processes on this machine's CPU, one thread each
    python scripts/bench_scaling.py --device cuda -p 1 2 4 8 --patch 128 128 128 --batch 16 --width 32

Strong scaling: the batch stays, and the processes share it. Prints a table and JSON (docs/scaling.md has the figures).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from medseg.environment import environment
from medseg.phantom import write_phantoms


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-p", "--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=60, help="the first third is not counted")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 48, 48])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_phantoms(Path(folder) / "data", num_train=4, size=0.6).train
        speeds = {number: samples_per_s(arguments, number, data, Path(folder)) for number in arguments.processes}
    first = min(speeds)
    rows = []
    for number, speed in speeds.items():
        share = speed / speeds[first] / (number / first)
        rows.append({"processes": number, "samples_per_s": round(speed, 2), "share_of_ideal": round(share, 3)})
        print(f"{number:>3} process(es)  {speed:8.2f} samples/s  {share:6.1%} of the ideal")
    settings = {key: value for key, value in vars(arguments).items() if key != "processes"}
    print(json.dumps({"settings": settings, "results": rows, "environment": environment()}, indent=1))


def samples_per_s(arguments: argparse.Namespace, number: int, data: Path, folder: Path) -> float:
    """The median over the last two thirds of a training."""
    run = folder / f"run_{number}"
    settings = [
        f"data.root='{data}'",
        f"data.plan.batch_size={arguments.batch}",
        f"data.plan.patch_size={json.dumps(arguments.patch, separators=(',', ':'))}",
        f"data.plan.base_width={arguments.width}",
        f"trainer.device={arguments.device}",
        f"trainer.devices={number}",
        f"trainer.max_steps={arguments.steps}",
        "trainer.num_validations=1",
        "trainer.log_steps=5",
        "trainer.final_predictions=false",
        "trainer.report=false",
        f"hydra.run.dir='{run}'",
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    subprocess.run([sys.executable, "-m", "medseg", "train", *settings], check=True, env=variables, stdout=sys.stderr)
    with (run / "history.csv").open(newline="") as file:
        speeds = [float(row["samples_per_s"]) for row in csv.DictReader(file) if row["samples_per_s"]]
    return statistics.median(speeds[len(speeds) // 3 :])


if __name__ == "__main__":
    main()
