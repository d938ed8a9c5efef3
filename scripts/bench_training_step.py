#!/usr/bin/env python3
"""Time one training step of nnU-Net's hippocampus network: medseg's loop beside nnU-Net's own, on the same cores.

    python scripts/make_peers.py                     once: the peers' own environment
    python scripts/bench_training_step.py            about ten minutes on 2 cores; prints the table
    python scripts/bench_training_step.py --write    and writes docs/benchmarks/training_step.md and .json
    python scripts/bench_training_step.py --steps 2 --rounds 1    a quick look
    python scripts/bench_training_step.py --compile  medseg's step alone, with torch.compile and without

Network, patch (40×56×40) and batch (9) are those that nnU-Net plans for the whole set; cases are real (MEDSEG_DATA).
Each side is timed twice, in fresh processes, in turn:

- the step: a batch that lies ready, without augmentation; forward, loss, backward, clipping, SGD;
- the loop: as in training, with sampling and augmentation. nnU-Net augments in processes of its own beside the step (as
  many as there are cores), medseg samples in a thread and augments in the step.

nnU-Net's trainer runs as it is, `nnUNetTrainer.train_step`, in fp32: it has no mixed precision on CPUs. The shortest
step of each process counts for the step, the mean for the loop. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import make_peers
from benchmark import environment, need_peers, num_cores, parser_of, show, where

if TYPE_CHECKING:
    from medseg.training.loop import Loop

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data")) / "segmentation" / "hippocampus"
PAGE = ROOT / "docs" / "benchmarks" / "training_step.md"
DATASET = "Dataset004_Hippocampus"
NUM_CASES = 20
SIDES = ("medseg", "nnU-Net")
PARTS = ("step", "loop")
BAR = 2.5
PREDICTION = """\
By profiles on a busy machine, which no script repeats and whose figures are therefore left out. Two things came out of
them: glibc gave the memory of large maps back and took it anew at each use (it is kept now, device.py), and a skip's
cut to the size that it had already had a gradient, a map of zeros for each axis in another layout than channels-last
(it is left out now, models/blocks/skip.py). What remains are nearly all convolutions.

Tried without gain: normalisation and leaky ReLU in one autograd function, huge pages, the convolution over
concatenated maps as two without concatenation, torch.compile of normalisation and leaky ReLU alone. A compiled network
as a whole was not measured."""


@dataclass(frozen=True)
class Network:
    """A network of nnU-Net's with filters of 3×3×3 that halves its maps from stage to stage, and its batches.

    Args:
        patch: voxels along each axis.
        batch: patches.
        widths: filters of each stage.
    """

    patch: tuple[int, ...]
    batch: int
    widths: tuple[int, ...]

    @property
    def strides(self) -> list[int]:
        """Of each stage."""
        return [1] + [2] * (len(self.widths) - 1)


HIPPOCAMPUS = Network((40, 56, 40), 9, (32, 64, 128, 256))
"""What nnU-Net plans for the whole set."""


def write_raw(folder: Path) -> None:
    """The first cases in the layout that both sides read."""
    raw = folder / "raw" / DATASET
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (DATA / "labels").glob("*.nii.gz"))[:NUM_CASES]
    for case in cases:
        (raw / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(DATA / "images" / f"{case}.nii.gz")
        (raw / "labelsTr" / f"{case}.nii.gz").symlink_to(DATA / "labels" / f"{case}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def timed(step: Any, make_batch: Any, num_steps: int, part: str, wait: Any) -> list[float]:
    """Seconds of each step; of the loop with getting the batch."""
    seconds = []
    for number in range(-1, num_steps):
        batch = make_batch(number + 1) if part == "step" else None
        begin = time.perf_counter()
        step(number + 1, make_batch(number + 1) if batch is None else batch)
        wait()
        if number >= 0:
            seconds.append(time.perf_counter() - begin)
    return seconds


def at_first_step(folder: Path, network: Network, overrides: list[str], use: Callable[[Loop], Any]) -> Any:
    """What `use` says of the loop of an ordinary training of medseg's that has come up to its first step.

    Args:
        folder: with `raw/`, as nnU-Net wants it; takes the run.
        network: what is trained.
        overrides: further keys of `medseg train`.
        use: what is done in place of the steps.
    """
    from rich.console import Console

    from medseg.config import compose
    from medseg.training.loop import Loop
    from medseg.training.train import train

    found: list[Any] = []

    class Done(Exception):
        """The steps are timed: the rest of a training is not wanted."""

    def instead(self: Loop, journal: object) -> None:
        self.model.train()
        found.append(use(self))
        raise Done

    as_it_was = Loop.run_to_the_end
    Loop.run_to_the_end = instead  # type: ignore[method-assign]
    settings = [
        f"data.root='{folder / 'raw' / DATASET}'",
        f"data.plan.patch_size={list(network.patch)}",
        f"data.plan.batch_size={network.batch}",
        f"model.widths={list(network.widths)}",
        f"model.kernels={[3] * len(network.widths)}",
        f"model.strides={network.strides}",
        "optimizer=sgd",
        *overrides,
    ]
    try:
        train(compose("train", settings), folder / "runs" / str(time.time_ns()), Console(stderr=True))
    except Done:
        return found[0]
    finally:
        Loop.run_to_the_end = as_it_was  # type: ignore[method-assign]
    raise RuntimeError("the training ended before its first step")


def run_medseg(folder: Path, part: str, num_steps: int, device: str, compiled: str) -> dict[str, Any]:
    """Time medseg's loop: an ordinary training up to its first step, and then its steps one by one."""
    import torch

    def steps_only(loop: Loop) -> dict[str, Any]:
        wait = torch.cuda.synchronize if loop.device.type == "cuda" else lambda: None
        if part == "loop":
            batches = loop.feed()
            seconds = timed(lambda n, b: loop.train_step(*b), lambda n: next(batches), num_steps, part, wait)
            batches.close()
        else:
            ready = [tensor.to(loop.device) for tensor in loop.sampler.batch(0)]
            seconds = timed(lambda n, b: loop.train_step(n, *b), lambda n: ready, num_steps, part, wait)
        return {"seconds": seconds, "precision": loop.precision, "device": loop.device.type}

    overrides = [
        "augment.mirror_axes=[0,1,2]" if part == "loop" else "augment=none",
        f"trainer.device={device}",
        f"trainer.compile={compiled}",
    ]
    found: dict[str, Any] = at_first_step(folder, HIPPOCAMPUS, overrides, steps_only)
    return found


def nnunet_trainer(folder: Path, device: str) -> Any:
    """nnU-Net's trainer, ready for its first step, on cases that it has planned and preprocessed by itself."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    preprocessed = folder / "preprocessed" / DATASET
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    description = json.loads((preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", "all", description, device=torch.device(device))
    trainer.initialize()
    trainer.network.train()
    return trainer


def run_nnunet(folder: Path, part: str, num_steps: int) -> dict[str, Any]:
    """Time nnU-Net's trainer on a CPU."""
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    trainer = nnunet_trainer(folder, "cpu")
    loader, other = trainer.get_dataloaders()
    if part == "step":
        ready = next(loader)
        seconds = timed(lambda n, b: trainer.train_step(b), lambda n: ready, num_steps, part, lambda: None)
    else:
        seconds = timed(lambda n, b: trainer.train_step(b), lambda n: next(loader), num_steps, part, lambda: None)
    finish(loader, other)
    weights = sum(p.numel() for p in trainer.network.parameters())
    return {"seconds": seconds, "weights": weights, "augmenting_processes": get_allowed_n_proc_DA()}


def finish(*loaders: Any) -> None:
    """End the processes of nnU-Net's loaders, where they have some."""
    for loader in loaders:
        if hasattr(loader, "_finish"):
            loader._finish()


def plan_nnunet(network: Network) -> None:
    """Fingerprint, plan and preprocess as nnU-Net does, but with the network, patch and batch that are asked for."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    extract_fingerprints([4], num_processes=1)
    plan_experiments([4])
    path = Path(os.environ["nnUNet_preprocessed"]) / DATASET / "nnUNetPlans.json"  # noqa: SIM112 (its name)
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    num_stages = len(network.widths)
    configuration["patch_size"], configuration["batch_size"] = list(network.patch), network.batch
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=num_stages,
        features_per_stage=list(network.widths),
        kernel_sizes=[[3] * 3] * num_stages,
        strides=[[stride] * 3 for stride in network.strides],
        n_conv_per_stage=[2] * num_stages,
        n_conv_per_stage_decoder=[2] * (num_stages - 1),
    )
    path.write_text(json.dumps(plans))
    preprocess([4], configurations=("3d_fullres",), num_processes=(1,))


def run(folder: Path, arguments: list[str], side: str, cores: int) -> Any:
    """One of the above in a fresh process."""
    environment_ = {
        **os.environ,
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_n_proc_DA": "0" if "step" in arguments else str(cores),
        "nnUNet_compile": "f",
    }
    interpreter = sys.executable if side == "medseg" else str(make_peers.python())
    command = [interpreter, __file__, "--measure", str(folder), side, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_)
    if done.returncode:
        sys.exit(f"{side} ended with status {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench(rounds: int, num_steps: int) -> dict[str, Any]:
    """Both sides in turn."""
    cores = num_cores()
    results: dict[str, dict[str, list[Any]]] = {side: {part: [] for part in PARTS} for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_raw(folder)
        run(folder, ["plan", "0"], "nnU-Net", cores)
        for turn in range(rounds):
            for part in PARTS:
                for side in SIDES[:: 1 if turn % 2 == 0 else -1]:
                    got = run(folder, [part, str(num_steps)], side, cores)
                    results[side][part].append(got)
                    print(f"{turn + 1} {side} {part}: " + ", ".join(f"{s:.2f}" for s in got["seconds"]), flush=True)
    facts = environment(("medseg", "torch"), ("nnunetv2", "batchgeneratorsv2", "torch"))
    return {"results": results, "rounds": rounds, "steps": num_steps, "environment": facts}


def seconds_of(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """side → part → seconds: the shortest step, and the median over rounds of the loop's mean."""
    return {
        side: {
            "step": min(min(got["seconds"]) for got in of_side["step"]),
            "loop": median(mean(got["seconds"]) for got in of_side["loop"]),
        }
        for side, of_side in results["results"].items()
    }


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    found, facts = seconds_of(results), results["environment"]
    ratios = {part: found["nnU-Net"][part] / found["medseg"][part] for part in PARTS}
    precision = results["results"]["medseg"]["step"][0]["precision"]
    widths = HIPPOCAMPUS.widths
    lines = [
        "# A training step beside nnU-Net's",
        "",
        "Made by `python scripts/make_peers.py && python scripts/bench_training_step.py --write`. nnU-Net's network",
        f"for the hippocampus set ({len(widths)} stages, {widths[0]} to {widths[-1]} filters, deep supervision), patch",
        f"{'×'.join(map(str, HIPPOCAMPUS.patch))}, batch {HIPPOCAMPUS.batch}, SGD, real cases. medseg in",
        f"{precision}, nnU-Net as its trainer is (fp32: it has no mixed precision on CPUs). {results['rounds']} rounds",
        f"of fresh processes in turn, {results['steps']} steps each after a first one that does not count.",
        "",
        "| seconds | medseg | nnU-Net | ratio |",
        "|---|---|---|---|",
    ]
    names = {
        "step": "the step: a batch that lies ready, no augmentation (shortest)",
        "loop": "the loop: with sampling and augmentation (mean, median of rounds)",
    }
    for part in PARTS:
        ours, theirs = found["medseg"][part], found["nnU-Net"][part]
        lines.append(f"| {names[part]} | {ours:.2f} | {theirs:.2f} | **{ratios[part]:.1f}** |")
    processes = results["results"]["nnU-Net"]["loop"][0]["augmenting_processes"]
    lines += [
        "",
        f"The bar is {BAR}. In its loop nnU-Net augments in {processes} processes beside the step.",
        "",
        *where(facts),
        "",
        "## What was expected, and tried",
        "",
        PREDICTION,
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure everything, or (in a process started by that) one side."""
    parser = parser_of(__doc__, PAGE)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each side and part")
    parser.add_argument("--steps", type=int, default=4, help="steps that count, in each process")
    parser.add_argument("--device", default="cpu", help="cuda: medseg alone")
    parser.add_argument("--compile", action="store_true", help="medseg alone, with torch.compile and without")
    parser.add_argument("--measure", nargs=4, metavar=("FOLDER", "SIDE", "PART", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, side, part, steps = arguments.measure
        if part == "plan":
            plan_nnunet(HIPPOCAMPUS)
            print("{}")
            return
        of_medseg = (arguments.device, "off")
        got = run_medseg(Path(folder), part, int(steps), *of_medseg) if side == "medseg" else None
        print(json.dumps(got or run_nnunet(Path(folder), part, int(steps))))
        return
    if not DATA.is_dir():
        parser.error(f"there are no cases in {DATA}: set MEDSEG_DATA")
    if arguments.compile or arguments.device != "cpu":
        with tempfile.TemporaryDirectory() as name:
            write_raw(Path(name))
            for compiled in ("off", "on") if arguments.compile else ("off",):
                for part in PARTS:
                    got = run_medseg(Path(name), part, arguments.steps, arguments.device, compiled)
                    print(f"compile={compiled} {part}: " + ", ".join(f"{s:.3f}" for s in got["seconds"]) + " s")
        return
    need_peers(parser)
    results = bench(arguments.rounds, arguments.steps)
    show(PAGE, page(results), results, write=arguments.write)


if __name__ == "__main__":
    main()
