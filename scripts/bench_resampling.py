#!/usr/bin/env python3
"""Time the resampling of a CT and its label by medseg and by nnU-Net, their memory, and how far the results agree.

    python scripts/make_peers.py                  once: the peers' own environment
    python scripts/bench_resampling.py            about three minutes on 2 cores; prints the table
    python scripts/bench_resampling.py --write    and writes docs/benchmarks/resampling.md and .json
    python scripts/bench_resampling.py --scale 4 --rounds 1    a quick look at a quarter of the size

Each call runs in a fresh process that has imported what it needs, loaded its input and resampled a volume of 16³
voxels, and is made once. Memory is the peak of the resident set (getrusage) after it less the peak before it: what the
call needs beside its input, its result included. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import make_peers
from benchmark import environment, need_peers, parser_of, show, where

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "resampling.md"
SHAPE, SPACING_MM = (512, 512, 200), (0.8, 0.8, 1.5)
NEW_SHAPE, NEW_SPACING_MM = (410, 410, 300), (1.0, 1.0, 1.0)
NUM_CLASSES = 6
OURS_NEED = ("medseg", "torch", "numpy", "scipy")
PEERS_NEED = ("nnunetv2", "batchgenerators", "scikit-image", "scipy", "numpy")
TIME_BAR, MEMORY_BAR, VALUE_BAR = 10.0, 2 / 3, 1e-4
"""At least so many times faster in sum, at most that share of the memory, at most that share of the value range."""
PREDICTION = """\
Written down before anything was optimised: image 0.35 s (blocks along the diagonal of the matrices need 20 GFLOP where
whole matrices need 97), label 0.4 s (a gather where all neighbours agree, whole-number shares in the few percent of
voxels between classes), together about 30 times faster than nnU-Net on two threads and 20 times on one; memory beside
the input 0.3 GiB for the image and 0.15 GiB for the label."""

Resample = Callable[["np.ndarray[Any, Any]", tuple[int, ...]], "np.ndarray[Any, Any]"]
"""What is timed: an array (*S) and the new shape → the resampled array."""


@dataclass(frozen=True)
class Way:
    """One of those that are compared."""

    name: str
    call: dict[str, str]
    """For "image" and "label", what a user writes."""
    make: Callable[[str], Resample]
    """Imports, and returns what is timed for "image" or "label"."""
    num_threads: int
    is_peer: bool = False


def _medseg(work: str) -> Resample:
    import torch

    from medseg.resampling import resample, resample_labels

    if work == "image":
        return lambda array, shape: resample(torch.from_numpy(array), shape, order=3, clip=True).numpy()
    return lambda array, shape: resample_labels(torch.from_numpy(array), shape, NUM_CLASSES).numpy()


def _nnunet(work: str) -> Resample:
    from nnunetv2.preprocessing.resampling.default_resampling import (  # type: ignore[import-not-found,unused-ignore]
        resample_data_or_seg_to_shape,
    )

    keywords = {"is_seg": work == "label", "order": 1 if work == "label" else 3, "order_z": 0}
    return lambda array, shape: resample_data_or_seg_to_shape(
        array[None], shape, SPACING_MM, NEW_SPACING_MM, force_separate_z=None, **keywords
    )[0]


OURS = {"image": "`resample(image, shape, order=3, clip=True)`", "label": "`resample_labels(label, shape, 6)`"}
THEIRS = {
    "image": "`resample_data_or_seg_to_shape(image[None], …, is_seg=False, order=3, order_z=0)`",
    "label": "`resample_data_or_seg_to_shape(label[None], …, is_seg=True, order=1, order_z=0)`",
}
WAYS = (
    Way("nnU-Net", THEIRS, _nnunet, 2, is_peer=True),
    Way("medseg, 2 threads", OURS, _medseg, 2),
    Way("medseg, 1 thread", OURS, _medseg, 1),
)


def write_inputs(folder: Path, scale: int) -> None:
    """A computed CT (float32 HU with the noise of a scanner) and five touching, wavy organs (uint8), (i, j, k)."""
    import numpy as np

    shape = tuple(n // scale for n in SHAPE)
    rng = np.random.default_rng(0)
    x, y, z = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]
    body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < 1
    image = np.where(body, 40 + 60 * np.sin(9 * x) * np.cos(7 * y + 5 * z), -1000).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    wave = 0.03 * np.sin(31 * x + 5 * z) * np.cos(29 * y) * np.sin(23 * z)
    organs = (
        (-0.4, 0.1, 0.1, 0.4),
        (0.3, 0.15, -0.2, 0.35),
        (0.0, -0.2, 0.3, 0.3),
        (0.05, 0.2, 0.2, 0.25),
        (0, 0, 0, 0.1),
    )
    for index, (i, j, k, radius) in enumerate(organs, start=1):
        organ = np.sqrt((x - i) ** 2 + (y - j) ** 2 + (z - k) ** 2) + wave < radius
        label[organ & body] = index
        image[organ & body] += 30 * index
    for plane in image:
        plane += rng.normal(0, 20, plane.shape).astype(np.float32)
    np.save(folder / "image.npy", np.rint(image))
    np.save(folder / "label.npy", label)


def measure(way: Way, work: str, folder: Path, scale: int) -> dict[str, float]:
    """One call, in a process of its own; its result is left in the folder."""
    import numpy as np

    call = way.make(work)
    array = np.load(folder / f"{work}.npy")
    call(np.ones_like(array, shape=(16, 16, 16)), (13, 13, 24))
    unit = 1024 if sys.platform != "darwin" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    begin = time.perf_counter()
    result = call(array, tuple(n // scale for n in NEW_SHAPE))
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    np.save(folder / f"{work}-{way.name}.npy", result)
    return {"seconds": seconds, "added_bytes": after - before, "peak_bytes": after}


def run(way: Way, work: str, folder: Path, scale: int) -> dict[str, float]:
    """`measure` in a fresh process, peers in their own environment."""
    interpreter = str(make_peers.python()) if way.is_peer else sys.executable
    command = [interpreter, __file__, "--measure", way.name, work, str(folder), "--scale", str(scale)]
    threads = {name: str(way.num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def agreement(folder: Path) -> dict[str, Any]:
    """Ours beside nnU-Net's: image values, classes, and whether classes differ only where two have equal shares."""
    import numpy as np

    image = np.load(folder / "image.npy", mmap_mode="r")
    ours, theirs = (np.load(folder / f"image-{WAYS[i].name}.npy", mmap_mode="r") for i in (1, 0))
    value_range = float(image.max()) - float(image.min())
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    label = np.load(folder / "label.npy")
    our_label, their_label = (np.load(folder / f"label-{WAYS[i].name}.npy").astype(np.uint8) for i in (1, 0))
    where = np.nonzero(our_label != their_label)
    shares = exact_shares(label, our_label.shape, where)
    rows = np.arange(len(where[0]))
    tied = shares[rows, our_label[where]] == shares[rows, their_label[where]]
    return {
        "value_difference": difference / value_range,
        "value_range": value_range,
        "voxels": int(our_label.size),
        "voxels_that_differ": len(rows),
        "of_them_ties": int(tied.sum()),
        "new_values": bool(set(np.unique(our_label)) - set(np.unique(label))),
    }


def exact_shares(
    label: np.ndarray[Any, Any], shape: tuple[int, ...], where: tuple[np.ndarray[Any, Any], ...]
) -> np.ndarray[Any, Any]:
    """Linearly interpolated shares of all classes at some voxels of the result, as whole numbers: (n, classes)."""
    import numpy as np

    shares = np.zeros((len(where[0]), NUM_CLASSES), np.int64)
    lows, weights = [], []
    for index, num_in, num_out in zip(where, label.shape, shape, strict=True):
        position = ((2 * index + 1) * num_in - num_out).clip(0, (num_in - 1) * 2 * num_out)
        lows.append((position // (2 * num_out)).clip(0, num_in - 2))
        weights.append(position - lows[-1] * 2 * num_out)
    for corner in np.ndindex(2, 2, 2):
        weight = np.ones(len(shares), np.int64)
        for step, high, num_out in zip(corner, weights, shape, strict=True):
            weight *= high if step else 2 * num_out - high
        classes = label[tuple(low + step for low, step in zip(lows, corner, strict=True))]
        shares[np.arange(len(shares)), classes] += weight
    return shares


def bench(rounds: int, scale: int) -> dict[str, Any]:
    """Everything: {"works": {work: {way: [measurement, ...]}}, "agreement": ..., "environment": ...}."""
    works: dict[str, dict[str, list[dict[str, float]]]] = {w: {way.name: [] for way in WAYS} for w in OURS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, __file__, "--inputs", temporary, "--scale", str(scale)], check=True)
        for turn in range(rounds):
            for work in works:
                for way in WAYS:
                    got = run(way, work, folder, scale)
                    works[work][way.name].append(got)
                    print(
                        turn + 1,
                        work,
                        way.name,
                        f"{got['seconds']:.2f} s, {got['added_bytes'] / 2**30:.2f} GiB",
                        flush=True,
                    )
        agreed = agreement(folder)
    facts = environment(OURS_NEED, PEERS_NEED)
    return {"works": works, "agreement": agreed, "environment": facts, "rounds": rounds, "scale": scale}


def table(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    works, agreed, facts = results["works"], results["agreement"], results["environment"]
    seconds = {w: [median(m["seconds"] for m in works[w][way.name]) for way in WAYS] for w in works}
    added = {w: [max(m["added_bytes"] for m in works[w][way.name]) for way in WAYS] for w in works}
    sums = [sum(seconds[w][i] for w in works) for i in range(len(WAYS))]
    peaks = [max(added[w][i] for w in works) for i in range(len(WAYS))]
    old, new = (" × ".join(str(n // results["scale"]) for n in shape) for shape in (SHAPE, NEW_SHAPE))
    lines = [
        "# Resampling a CT and its label",
        "",
        "Made by `python scripts/make_peers.py && python scripts/bench_resampling.py --write`. A computed CT of",
        f"{old} voxels (0.8 × 0.8 × 1.5 mm, float32) and a label of five touching organs (8 bits) are",
        f"resampled to {new} voxels (1 mm): the image by a cubic spline, the label by the class with the",
        "largest linearly interpolated share. Each call is made once in a fresh process that has imported what it",
        f"needs, loaded its input and resampled 16³ voxels; median of {results['rounds']}. *GiB* is what the peak of",
        "the resident set (getrusage) grows by: all that is needed beside the input, the result included.",
        "",
        "| | image s | label s | sum s | times faster | image GiB | label GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, way in enumerate(WAYS):
        gib = [f"{added[w][i] / 2**30:.2f}" for w in works]
        time_columns = [f"{s:.2f}" for s in (*(seconds[w][i] for w in works), sums[i])]
        lines.append(f"| {' | '.join([way.name, *time_columns, f'{sums[0] / sums[i]:.1f}', *gib])} |")
    met = {
        f"at least {TIME_BAR:.0f} times faster in sum: {sums[0] / sums[1]:.1f}": sums[0] >= TIME_BAR * sums[1],
        f"at most 2/3 of the memory (the larger of the two): {peaks[1] / peaks[0]:.2f}": peaks[1]
        <= MEMORY_BAR * peaks[0],
        f"the values of the general routine to {VALUE_BAR:.0e} of their range, borders included: largest difference to "
        f"nnU-Net's {agreed['value_difference']:.1e}": agreed["value_difference"] <= VALUE_BAR,
        "no new label values": not agreed["new_values"],
    }
    lines += ["", *(f"- {what} – **{'met' if is_met else 'missed'}**" for what, is_met in met.items())]
    lines += [
        "",
        f"{agreed['voxels_that_differ']:,} of {agreed['voxels']:,} label voxels differ from nnU-Net's; in",
        f"{agreed['of_them_ties']:,} of them both classes have exactly the same share (recomputed in whole numbers):",
        "nnU-Net then takes the nearest voxel's class, medseg the lower one.",
        "",
        "## The rule at the border",
        "",
        "Beyond the outermost voxel centres the edge value is continued without end, as by",
        '`scipy.ndimage.zoom(order=3, mode="nearest", grid_mode=True)`; and, with `clip=True` as in nnU-Net, no value',
        "leaves the range of the image. `tests/test_resampling.py` compares with that routine.",
        "",
        "## What was predicted",
        "",
        *PREDICTION.splitlines(),
        "",
        "## What was called, and where",
        "",
        *(f"- {way.name}, {work}: {call}" for way in WAYS[:2] for work, call in way.call.items()),
        "",
        "nnU-Net's routine uses one core however many there are (nnU-Net prepares several cases at a time instead):",
        "the row with one thread is the fair one for whole data sets.",
        "",
        *where(facts),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure everything, or (in a process started by that) one call."""
    parser = parser_of(__doc__, TABLE)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per way and work")
    parser.add_argument("--scale", type=int, default=1, help="divide the sizes; --write needs 1")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "WORK", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--inputs", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, work, folder = arguments.measure
        print(json.dumps(measure(next(w for w in WAYS if w.name == name), work, Path(folder), arguments.scale)))
        return
    if arguments.inputs:
        write_inputs(Path(arguments.inputs), arguments.scale)
        return
    need_peers(parser)
    if arguments.write and arguments.scale != 1:
        parser.error("--write goes with the whole size only")
    results = bench(arguments.rounds, arguments.scale)
    show(TABLE, table(results), results, write=arguments.write)


if __name__ == "__main__":
    main()
