#!/usr/bin/env python3
"""Time HD95, the average surface distance and the surface Dice of five organs by medseg and by MONAI.

    python scripts/bench_metrics.py               about three minutes on 2 cores; prints the table
    python scripts/bench_metrics.py --write       and writes docs/benchmarks/metrics.md and .json
    python scripts/bench_metrics.py --scale 4 --rounds 1    a quick look at a quarter of the size

Each call runs in a fresh process that has imported what it needs, prepared its input and measured a case of 32³ voxels;
the two take turns, and the shortest of the rounds counts: what else the machine does can only add time. MONAI is handed
one-hot arrays, which are made before the clock starts; medseg is handed what a file holds, the map of class indices.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import environment, parser_of, show, where
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "metrics.md"
SHAPE, SPACING_MM = (512, 512, 200), (0.8, 0.8, 1.5)
NUM_CLASSES = 6
TOLERANCE_MM = 2.0
METRICS = ("hd95", "asd", "surface_dice")
TIME_BAR, VALUE_BAR = 8.0, 1e-5
"""At least so many times faster; values differ by at most that share (MONAI computes means in float32)."""
PREDICTIONS = {
    "near": (0.004, 0.008, "a good prediction: surfaces about a voxel apart"),
    "far": (0.06, 0.03, "a bad one: organs shifted by 12 mm, surfaces several voxels apart"),
}
"""Name → shift along the first axis, height of the waves (both in half sizes of the scan), description."""

Labels = NDArray[np.uint8]
Measure = Callable[[Labels, Labels], "list[list[float]]"]


def organs(shape: tuple[int, ...], shift: float, ripple: float) -> Labels:
    """Five touching, wavy organs as class indices, (i, j, k)."""
    x, y, z = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    label = np.zeros(shape, np.uint8)
    wave = 0.03 * np.sin(31 * x + 5 * z) * np.cos(29 * y) * np.sin(23 * z)
    wave = wave + ripple * np.sin(17 * x + 11 * y) * np.cos(19 * z + 3 * y)
    spheres = (
        (-0.4, 0.1, 0.1, 0.4),
        (0.3, 0.15, -0.2, 0.35),
        (0.0, -0.2, 0.3, 0.3),
        (0.05, 0.2, 0.2, 0.25),
        (0.0, 0.0, 0.0, 0.1),
    )
    for index, (i, j, k, radius) in enumerate(spheres, start=1):
        label[np.sqrt((x - i - shift) ** 2 + (y - j) ** 2 + (z - k) ** 2) + wave < radius] = index
    return label


def write_inputs(folder: Path, scale: int) -> None:
    """The reference and the predictions."""
    shape = tuple(n // scale for n in SHAPE)
    np.save(folder / "reference.npy", organs(shape, 0, 0))
    for name, (shift, ripple, _) in PREDICTIONS.items():
        np.save(folder / f"{name}.npy", organs(shape, shift, ripple))


def _medseg() -> Measure:
    from medseg.metrics.case import measure_case
    from medseg.volume import Grid

    def measure(predicted: Labels, reference: Labels) -> list[list[float]]:
        grid = Grid(predicted.shape, np.diag([*SPACING_MM, 1.0]))
        results = measure_case(
            predicted, reference, grid, num_classes=NUM_CLASSES, tolerance_mm=TOLERANCE_MM, names=METRICS
        )
        return [[result.values[name] for result in results] for name in METRICS]

    return measure


def _monai() -> Measure:
    from medseg.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    def measure(predicted: Any, reference: Any) -> list[list[float]]:
        values = (
            compute_hausdorff_distance(predicted, reference, percentile=95, spacing=SPACING_MM),
            compute_average_surface_distance(predicted, reference, symmetric=True, spacing=SPACING_MM),
            compute_surface_dice(predicted, reference, [TOLERANCE_MM] * (NUM_CLASSES - 1), spacing=SPACING_MM),
        )
        return [tensor[0].tolist() for tensor in values]

    return measure


WAYS = {"MONAI": _monai, "medseg": _medseg}


def one_hot(labels: Labels) -> Any:
    """What MONAI's metrics take: bool (1, C, *S)."""
    import torch

    return torch.stack([torch.from_numpy(labels == index) for index in range(NUM_CLASSES)])[None]


def measure(way: str, prediction: str, folder: Path) -> dict[str, Any]:
    """One call, in a process of its own."""
    call = WAYS[way]()
    prepare = one_hot if way == "MONAI" else np.asarray
    small = organs((32, 32, 32), 0.01, 0.0)
    call(prepare(small), prepare(np.roll(small, 1, 0)))
    inputs = [prepare(np.load(folder / f"{name}.npy")) for name in (prediction, "reference")]
    unit = 1024 if sys.platform != "darwin" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    begin = time.perf_counter()
    values = call(*inputs)
    seconds = time.perf_counter() - begin
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    return {"seconds": seconds, "added_bytes": added, "values": values}


def bench(rounds: int, scale: int) -> dict[str, Any]:
    """Everything: {"runs": {prediction: {way: [measurement, ...]}}, "environment": ..., …}."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {p: {way: [] for way in WAYS} for p in PREDICTIONS}
    with tempfile.TemporaryDirectory() as temporary:
        # A process of its own: what is measured would start with this one's peak of memory
        subprocess.run([sys.executable, __file__, "--inputs", temporary, "--scale", str(scale)], check=True)
        for turn in range(rounds):
            for prediction, of_way in runs.items():
                for way, measured in of_way.items():
                    command = [sys.executable, __file__, "--measure", way, prediction, temporary]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    measured.append(json.loads(done.stdout.splitlines()[-1]))
                    print(turn + 1, prediction, way, f"{measured[-1]['seconds']:.2f} s", flush=True)
    facts = environment(("medseg", "monai", "torch", "numpy", "scipy"))
    return {"runs": runs, "environment": facts, "rounds": rounds, "scale": scale}


def table(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    facts = results["environment"]
    size = " × ".join(str(n // results["scale"]) for n in SHAPE)
    lines = [
        "# Surface metrics",
        "",
        f"Made by `python scripts/bench_metrics.py --write`. Five computed organs in {size} voxels of",
        "0.8 × 0.8 × 1.5 mm: HD95, average symmetric surface distance and surface Dice (2 mm) of each, from label maps",
        "in memory. Each call is made once in a fresh process that has imported what it needs and measured 32³ voxels;",
        f"MONAI is handed one-hot arrays, made before the clock starts. The shortest of {results['rounds']} rounds.",
        "*GiB* is what the peak of the resident set grows by.",
        "",
        "| | s | times faster | GiB |",
        "|---|---|---|---|",
    ]
    met: list[tuple[str, bool]] = []
    for prediction, (_, _, description) in PREDICTIONS.items():
        runs = results["runs"][prediction]
        seconds = {way: min(m["seconds"] for m in runs[way]) for way in WAYS}
        for way in WAYS:
            gib = max(m["added_bytes"] for m in runs[way]) / 2**30
            times = seconds["MONAI"] / seconds[way]
            lines.append(f"| {way}, {prediction} | {seconds[way]:.2f} | {times:.1f} | {gib:.2f} |")
        ratio = seconds["MONAI"] / seconds["medseg"]
        met.append((f"{description}: at least {TIME_BAR:.0f} times faster: {ratio:.1f}", ratio >= TIME_BAR))
        difference = max(
            abs(a - b) / max(abs(b), 1e-12)
            for ours, theirs in zip(runs["medseg"][0]["values"], runs["MONAI"][0]["values"], strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        what = f"{prediction}: the same values, to {VALUE_BAR:.0e} of each: largest difference {difference:.1e}"
        met.append((what, math.isfinite(difference) and difference <= VALUE_BAR))
    lines += ["", *(f"- {what} – **{'met' if is_met else 'missed'}**" for what, is_met in met), "", "## Why", ""]
    lines += [
        "MONAI makes a distance transform of the box around both masks for each metric and direction. Here the three",
        "share one set of distances, found by looking at the neighbours of each surface voxel, the nearest first; a",
        "k-d tree answers for what is left (`medseg/metrics/masks.py`). Both are exact.",
        "",
        *where(facts),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure everything, or (in a process started by that) one call."""
    parser = parser_of(__doc__, TABLE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="divide each axis of the scan by this")
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "PREDICTION", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inputs:
        write_inputs(Path(options.inputs), options.scale)
        return
    if options.measure:
        way, prediction, folder = options.measure
        print(json.dumps(measure(way, prediction, Path(folder))))
        return
    results = bench(options.rounds, options.scale)
    text = table(results)
    show(TABLE, text, results, write=options.write)


if __name__ == "__main__":
    main()
