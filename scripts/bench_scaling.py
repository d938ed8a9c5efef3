#!/usr/bin/env python3
"""How fast one and several processes train and prepare, on a phantom: work per second, and the share of the ideal.

    python scripts/bench_scaling.py                       about ten minutes on 2 cores; prints the page
    python scripts/bench_scaling.py --write               and writes docs/benchmarks/scaling.md and .json
    python scripts/bench_scaling.py --steps 6 --rounds 1 --cases 2 4 --size 0.4 --width 4    a quick look
    python scripts/bench_scaling.py --device cuda -p 1 2 4 8 --patch 128 128 128 --batch 16 --width 32 --skip-preparing

Training: strong scaling, the batch stays and `trainer.devices` processes share it, one thread each. The median speed
over the last two thirds of the steps, of rounds in turn.

Preparing: `medseg prepare --engine ray --workers N` of few cases and of many; the difference counts, so that the start
of the cluster and of its workers does not. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import PAGES, environment, num_cores, parser_of, show, where

from medseg.phantom import write_phantoms

PAGE = PAGES / "scaling.md"
NEEDED = ["medseg", "torch"]
ATTEMPTS = 3
"""Of a preparation: Ray gives its processes half a minute to start."""
TELLING_SECONDS = 20
"""Less than this between few cases and many is lost in what the start of a cluster takes now and then."""
FEWEST_CASES = 4
"""That a training takes."""


def train(arguments: argparse.Namespace, number: int, data: Path, folder: Path) -> float:
    """Samples per second of a training."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    settings = [
        f"data.root='{data}'",
        f"data.store='{folder / 'store'}'",
        f"data.plan.batch_size={arguments.batch}",
        f"data.plan.patch_size={json.dumps(arguments.patch, separators=(',', ':'))}",
        f"data.plan.base_width={arguments.width}",
        f"trainer.device={arguments.device}",
        f"trainer.devices={number}",
        f"trainer.max_steps={arguments.steps}",
        "trainer.num_validations=1",
        f"trainer.log_steps={max(1, arguments.steps // 12)}",
        "trainer.final_predictions=false",
        "trainer.report=false",
        f"hydra.run.dir='{run}'",
    ]
    _medseg(arguments, "train", *settings)
    with (run / "history.csv").open(newline="") as file:
        speeds = [float(row["samples_per_s"]) for row in csv.DictReader(file) if row["samples_per_s"]]
    return statistics.median(speeds[len(speeds) // 3 :])


def prepare(arguments: argparse.Namespace, number: int, sets: list[Path], folder: Path) -> float:
    """Cases per second of a cluster of this machine."""
    seconds = [_seconds_to_prepare(arguments, number, data, folder / "prepared") for data in sets]
    few, many = arguments.cases
    return (many - few) / max(seconds[1] - seconds[0], 1e-9)


def _seconds_to_prepare(arguments: argparse.Namespace, number: int, data: Path, store: Path) -> float:
    settings = (f"data.root='{data}'", f"data.store='{store}'", "data.num_threads=1")
    for left in reversed(range(ATTEMPTS)):
        shutil.rmtree(store, ignore_errors=True)
        begin = time.perf_counter()
        try:
            _medseg(arguments, "prepare", "--engine", "ray", "--workers", str(number), *settings)
        except subprocess.CalledProcessError:
            if not left:
                raise
        else:
            break
    return time.perf_counter() - begin


def _medseg(arguments: argparse.Namespace, *words: str) -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    subprocess.run([sys.executable, "-m", "medseg", *words], check=True, env=variables, stdout=sys.stderr)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    found: dict[str, dict[int, list[float]]] = {"training": {}, "preparing": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = arguments.cases
        sets = [write_phantoms(folder / f"data{n}", num_train=n, size=arguments.size).train for n in (few, many)]
        small = write_phantoms(folder / "data", num_train=FEWEST_CASES, size=0.6).train
        for _ in range(arguments.rounds):
            for number in arguments.processes:
                found["training"].setdefault(number, []).append(train(arguments, number, small, folder))
                if not arguments.skip_preparing:
                    found["preparing"].setdefault(number, []).append(prepare(arguments, number, sets, folder))
    settings = {key: value for key, value in vars(arguments).items() if key != "write"}
    facts = environment([*NEEDED, *([] if arguments.skip_preparing else ["ray"])])
    return {"settings": settings, "results": found, "environment": facts}


def page(results: dict[str, Any]) -> str:
    """The page."""
    settings = results["settings"]
    few, many = settings["cases"]
    lines = [
        "# Several processes beside one",
        "",
        "Made by `python scripts/bench_scaling.py --write`. A training of a phantom: batch "
        f"{settings['batch']}, patch {'×'.join(map(str, settings['patch']))}, first width {settings['width']}, on",
        f"`{settings['device']}`, {settings['threads']} thread(s) in each process, {settings['steps']} steps; and "
        f"`medseg prepare --engine ray` of {many} phantoms less {few}.",
        f"Medians of {settings['rounds']} round(s). {num_cores()} cores: more processes than these could gain nothing.",
        "",
        "| what | processes | per second | share of the ideal |",
        "|---|---|---|---|",
    ]
    for what, unit in (("training", "samples"), ("preparing", "cases")):
        speeds = {int(number): statistics.median(rounds) for number, rounds in results["results"][what].items()}
        for number, speed in speeds.items():
            share = speed / speeds[min(speeds)] / (number / min(speeds))
            lines.append(f"| {what} | {number} | {speed:.2f} {unit} | {share:.0%} |")
    prepared = [speed for rounds in results["results"]["preparing"].values() for speed in rounds]
    if prepared and (many - few) / max(prepared) < TELLING_SECONDS:
        lines += [
            "",
            f"**The rows of preparing tell nothing**: {many - few} of these cases took as little as "
            f"{(many - few) / max(prepared):.1f} s, and the start of a cluster varies by more.",
            "They want more or larger cases (`--cases`, `--size`).",
        ]
    return "\n".join([*lines, "", *where(results["environment"])]) + "\n"


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = parser_of(__doc__, PAGE)
    parser.add_argument("-p", "--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 48, 48])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of each process that trains")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", type=int, nargs=2, default=[2, 26], metavar=("FEW", "MANY"), help="to be prepared")
    parser.add_argument("--size", type=float, default=2.0, help="of these phantoms")
    parser.add_argument("--skip-preparing", action="store_true", help="without Ray")
    arguments = parser.parse_args()
    results = measure(arguments)
    show(PAGE, page(results), results, write=arguments.write)


if __name__ == "__main__":
    main()
