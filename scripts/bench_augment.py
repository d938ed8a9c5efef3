#!/usr/bin/env python3
"""Time medseg's augmentation beside nnU-Net's (batchgeneratorsv2), on the same patches and cores.

    python scripts/make_peers.py                once: the peers' own environment
    python scripts/bench_augment.py             about five minutes on 2 cores; prints the table
    python scripts/bench_augment.py --write     and writes docs/benchmarks/augment.md and .json
    python scripts/bench_augment.py --rounds 1 --batches 20    a quick look
    python scripts/bench_augment.py --device cuda              medseg alone on a GPU: ms a batch

Patches of 128³, one channel, batch 2, three classes, mirrored over all axes. Each side takes cuts that lie ready: what
nnU-Net's loader cuts (206³), and what medseg's sampler cuts (larger than the patch only where the step turns or
scales). nnU-Net runs as it does in training, in one process of one thread for each core, and once more in one process
with all threads; the better counts. medseg runs as it does in training, in one process with a thread for each core. All
run in fresh processes, in turn, `--rounds` times. Keep the machine otherwise idle, or compare the seconds of processor
time, which other programs hardly change.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import make_peers
from benchmark import environment, need_peers, num_cores, parser_of, show, where

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "augment.md"
PATCH, BATCH = (128, 128, 128), 2
NNUNET_CUT = (205, 205, 205)
"""What `get_patch_size` of nnU-Net 2.8.1 gives for `PATCH`; read anew in each measurement."""
NUM_SOURCES = 3
SIDES = ("medseg", "nnU-Net, a process per core", "nnU-Net, threads")
BAR = 1.5
PREDICTION = """\
Before anything whole was measured, from the times of single operations on one thread: nnU-Net spends most of its time
on the 36 % of patches that are turned or scaled: 55 ms for the image, three times that for the label (an interpolation
for each class, one to settle ties), a matrix product for the grid. Ours takes the label's nearest voxel at the points
of the image (100 ms together), blurs by shifted sums (15 ms) and not by `conv3d` (130 ms an axis); gamma 10 ms.
Expected: 50 ms of a core for a patch against 200, a ratio of 3 to 4.

What came first was 0.3. `floor` and `round` of torch take two threads even for few values, which wait for each other:
beside other programs ten times as long as on one thread (by torch's profiler); turning a number into an
integer does the same without waiting.
Since then a patch takes 27 ms of one core: half of what was expected, because slabs of 32768 voxels stay in the cache
(eight gathers and seven blends: 40 ms; `grid_sample`: 55 ms, and 30 ms for the label)."""


def source(shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    """A smooth random image (1, *shape) and three nested classes of it (*shape)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((1, 1, *(n // 8 for n in shape)), generator=generator)
    image = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]
    image = (image - image.mean()) / image.std() + 0.1 * torch.randn((1, *shape), generator=generator)
    return image, (image[0] > 0.8).to(torch.uint8) + (image[0] > 1.6).to(torch.uint8)


def run_medseg(num_batches: int, seed: int, device: str) -> dict[str, float]:
    """Time `num_batches` batches of medseg's augmentation."""
    import torch

    from medseg.data.augment import AugmentConfig, Augmenter, Mirroring

    augment = Augmenter(
        AugmentConfig(),
        patch_size=PATCH,
        spacing_mm=(1.0, 1.0, 1.0),
        is_picture=False,
        mirroring=Mirroring((0, 1, 2)),
        seed=seed,
    )
    large = tuple(2 * n for n in PATCH)
    image, label = (x.to(device) for x in source(large, seed))
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    seconds = processor = 0.0
    for step in range(-3, num_batches):
        size = augment.cut_size(step, BATCH)
        box = tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(large, size, strict=True))
        images, labels = torch.stack([image[(slice(None), *box)]] * BATCH), torch.stack([label[box]] * BATCH)
        wait()
        begin, begin_processor = time.perf_counter(), time.process_time()
        augment(images, labels, step)
        wait()
        if step >= 0:
            seconds += time.perf_counter() - begin
            processor += time.process_time() - begin_processor
    return {"patches": num_batches * BATCH, "seconds": seconds, "processor": processor}


def run_nnunet(num_batches: int, seed: int) -> dict[str, float]:
    """The same with nnU-Net's own list of transforms."""
    import numpy as np
    import torch
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    angle = (-np.pi / 6, np.pi / 6)
    transforms = nnUNetTrainer.get_training_transforms(
        np.array(PATCH), angle, None, mirror_axes=(0, 1, 2), do_dummy_2d_data_aug=False
    )
    cut = tuple(int(n) for n in get_patch_size(PATCH, angle, angle, angle, (0.85, 1.25)))
    sources = [source(cut, seed + n) for n in range(NUM_SOURCES)]
    np.random.seed(seed)  # noqa: NPY002 (it draws from there)
    torch.manual_seed(seed)
    seconds = processor = 0.0
    for step in range(-15, num_batches):  # it first measures by itself which kind of blur is quicker
        image, label = sources[step % NUM_SOURCES]
        given = [{"image": image.clone(), "segmentation": label[None].to(torch.int16)} for _ in range(BATCH)]
        begin, begin_processor = time.perf_counter(), time.process_time()
        with torch.no_grad():
            done = [transforms(**sample) for sample in given]
        torch.stack([d["image"] for d in done])
        torch.stack([d["segmentation"] for d in done])
        if step >= 0:
            seconds += time.perf_counter() - begin
            processor += time.process_time() - begin_processor
    return {"patches": num_batches * BATCH, "seconds": seconds, "processor": processor, "cut": cut[0]}


def measure(side: str, num_batches: int, seed: int, threads: int, device: str) -> dict[str, float]:
    """One side in this process."""
    import torch

    torch.set_num_threads(threads)
    return run_medseg(num_batches, seed, device) if side == "medseg" else run_nnunet(num_batches, seed)


def run(side: str, num_batches: int, seed: int, cores: int) -> dict[str, float]:
    """`measure` in fresh processes: patches a second, and processor seconds a patch."""
    workers = cores if side == "nnU-Net, a process per core" else 1
    interpreter = sys.executable if side == "medseg" else str(make_peers.python())
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if workers > 1 else {})}
    running = [
        subprocess.Popen(
            [interpreter, __file__, "--measure", side, str(num_batches), str(seed + 100 * n), str(cores // workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for n in range(workers)
    ]
    results = []
    for process in running:
        out, error = process.communicate()
        if process.returncode:
            sys.exit(f"{side} ended with status {process.returncode}: {error[-2000:]}")
        results.append(json.loads(out.splitlines()[-1]))
    patches = sum(r["patches"] for r in results)
    return {
        "per_second": sum(r["patches"] / r["seconds"] for r in results),
        "processor": sum(r["processor"] for r in results) / patches,
        "cut": results[0].get("cut", 0),
    }


def bench(rounds: int, num_batches: int) -> dict[str, Any]:
    """All sides in turn."""
    cores = num_cores()
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in SIDES[turn % len(SIDES) :] + SIDES[: turn % len(SIDES)]:
            got = run(side, num_batches, 1000 * turn, cores)
            results[side].append(got)
            print(f"{turn + 1} {side}: {got['per_second']:.2f} patches/s, {got['processor']:.3f} s of a core each")
    facts = environment(("medseg", "torch"), ("nnunetv2", "batchgeneratorsv2", "torch"))
    return {"results": results, "rounds": rounds, "batches": num_batches, "environment": facts}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, and the two ratios: throughput and processor time."""
    sides = {
        side: {key: median(r[key] for r in rounds) for key in ("per_second", "processor")}
        for side, rounds in results["results"].items()
    }
    best = max(SIDES[1:], key=lambda side: sides[side]["per_second"])
    ours = sides["medseg"]
    return {
        "sides": sides,
        "best_peer": best,
        "ratio": ours["per_second"] / sides[best]["per_second"],
        "processor_ratio": min(sides[side]["processor"] for side in SIDES[1:]) / ours["processor"],
    }


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    facts, found = results["environment"], summary(results)
    count = results["rounds"] * results["batches"] * BATCH
    cut = int(results["results"][SIDES[1]][0]["cut"])
    lines = [
        "# Augmentation beside nnU-Net's",
        "",
        "Made by `python scripts/make_peers.py && python scripts/bench_augment.py --write`. Patches of 128³ voxels,",
        "one channel, three classes, batches of 2; nnU-Net's list of transforms at its own probabilities on both",
        f"sides, mirrored over all axes. {count} patches a process, in {results['rounds']} rounds of fresh processes,",
        f"in turn. Cutting from the case is not counted: nnU-Net always cuts {cut}³, medseg only where a step turns",
        "or scales, and as much as it needs.",
        "",
        "| | patches/s (median) | of each round | core seconds a patch |",
        "|---|---|---|---|",
    ]
    for side, medians in found["sides"].items():
        each = ", ".join(f"{r['per_second']:.2f}" for r in results["results"][side])
        lines.append(f"| {side} | {medians['per_second']:.2f} | {each} | {medians['processor']:.3f} |")
    lines += [
        "",
        f"**{found['ratio']:.2f} times the throughput** of nnU-Net's better way ({found['best_peer']}; the bar",
        f"is {BAR}), and {found['processor_ratio']:.2f} times by processor time.",
        "",
        *where(facts),
        "",
        "## What was expected",
        "",
        PREDICTION,
        "",
        "## What differs from nnU-Net",
        "",
        "- A label takes the class of the nearest voxel. nnU-Net interpolates every class and takes the largest.",
        "- Rotations are rigid in mm; nnU-Net turns voxels. Thick slices are turned by up to 30° within themselves",
        "  (nnU-Net: 180°), because a volume's orientation is known.",
        "- A cut is as large as the step's moves need, at most 4 times the patch's volume; nnU-Net's is of one size.",
        "- Mirroring comes with the first copy instead of last: what follows does not care for directions.",
        "- Volumes are mirrored only if asked, and then classes with sides change places.",
        "- nnU-Net calls the range of its noise a variance and uses it as a deviation; so does the default here.",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure everything, or (in a process started by that) one side."""
    parser = parser_of(__doc__, PAGE)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each side")
    parser.add_argument("--batches", type=int, default=100, help="batches of each process")
    parser.add_argument("--device", default="cpu", help="cuda: medseg alone")
    parser.add_argument("--measure", nargs=4, metavar=("SIDE", "BATCHES", "SEED", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, batches, seed, threads = arguments.measure
        print(json.dumps(measure(side, int(batches), int(seed), int(threads), arguments.device)))
        return
    if arguments.device != "cpu":
        got = measure("medseg", arguments.batches, 0, os.cpu_count() or 1, arguments.device)
        print(f"{1e3 * got['seconds'] / arguments.batches:.1f} ms a batch of {BATCH}")
        return
    need_peers(parser)
    results = bench(arguments.rounds, arguments.batches)
    show(PAGE, page(results), results, write=arguments.write)


if __name__ == "__main__":
    main()
