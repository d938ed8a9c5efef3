#!/usr/bin/env python3
"""Train every segmentation network for the same time on hippocampus, and DeepMedic on two MR sequences of one patient.

    python scripts/bench_models.py                         all, 5 minutes each, BraTS 15: about 90 minutes on one core
    python scripts/bench_models.py unet vnet --minutes 1   some of them, shorter
    python scripts/bench_models.py brats                   DeepMedic on BraTS alone

Each is an ordinary `medseg train`. So that networks compare, and not their sizes, each gets the base width at which it
has about as many weights as DeepMedic, and four resolutions (`data.plan.num_stages=4`); that is not the size that its
paper trains. Dice is of the validation cases on their own grids. What was run, with its minutes, goes to
docs/benchmarks/models.json, and the table of all that stands there to models.md. The images are found through
MEDSEG_DATA; one thread (`taskset -c 0` pins it), and nothing else should run: the budget is time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundle import BundleInfo
from medseg.formats import open_label, open_volume, write_image, write_label
from medseg.models import MODELS
from medseg.models.shapes import ShapesOnly
from medseg.volume import Grid, Volume

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data")).resolve()
RESULTS = ROOT / "docs" / "benchmarks"

NUM_STAGES = 4
NUM_WEIGHTS = 659_000
"""About those of DeepMedic as published, for one channel and three classes."""
HIPPOCAMPUS = (
    f"data.root='{DATA / 'segmentation' / 'hippocampus'}'",
    "data.labels={background: 0, anterior: 1, posterior: 2}",
    "data.split.num_folds=10",  # 19 cases to validate: DeepMedic takes a while for each
)
COMMON = (
    "trainer.device=cpu",
    "trainer.num_validations=1",
    "trainer.overlay_cases=0",
    "trainer.map_cases=0",
    "trainer.embedding_cases=0",
)
NETWORKS: dict[str, tuple[str, ...]] = {
    "unet": (),
    "fusionnet": (),
    "residual_encoder_unet": (),
    "vnet": (),
    "residual_unet": (),
    "attention_unet": (),
    "unet_plus_plus": (),
    "segnet": (),
    # Patches of 69³, of which 21³ are labelled: cheaper for each voxel than the paper's 57³ and 9³.
    "deepmedic": ("data.plan.patch_size=[69,69,69]", "data.plan.batch_size=2", "trainer.foreground_share=0.5"),
}
OWN_SIZE = ("deepmedic",)
"""Networks whose size is not a matter of a base width."""

BRATS = "brats"
CUT = 110
"""Plane of the third axis where the patient is cut in two: the lower part is learnt, the upper one held out."""
BRATS_TIMES = 3
"""Times as long as the others: a step on two sequences and larger patches takes as much longer."""
CHANNELS = ("Flair_subtrMeanDivStd", "T1c_subtrMeanDivStd")
BRATS_LABELS = "data.labels={background: 0, necrosis: 1, oedema: 2, non_enhancing: 3, enhancing: 4}"
BRATS_SETTINGS = ("data.plan.patch_size=[75,75,75]", "data.plan.batch_size=2", "trainer.foreground_share=0.5")

ABOUT = (
    "Made by `python scripts/bench_models.py`; each row is one run of its command below, one thread on a CPU. Networks "
    f"have a base width at which they have about {NUM_WEIGHTS // 1000} thousand weights (DeepMedic's), on {NUM_STAGES} "
    "resolutions: sizes that compare, not those of the papers. Dice is of the validation cases of hippocampus on their "
    "own grids, mean over cases of the mean over classes, with the 95 % interval over cases. One run each, of few "
    "minutes: what a network learns quickly on small crops, not what it can reach; small differences mean nothing."
)
ABOUT_BRATS = (
    f"The box around the brain of the one BraTS patient at hand, cut at plane {CUT} of the third axis: the lower part "
    "is learnt, the upper one held out, and chooses nothing (one validation, at the end); no patch reaches over the "
    "cut. This shows that the network learns from two sequences, and that its bundle labels whole volumes on their own "
    "grid by `medseg predict`. It says nothing about other patients: the held-out slices are of the same scan and the "
    "same tumour. Each part is a case of its own, with its own z-score."
)


def widths_for(name: str) -> list[int]:
    """Filters per stage, doubled from a base, at which a network in 3D has the most nearly `NUM_WEIGHTS` weights."""

    def distance(base: int) -> int:
        with ShapesOnly():
            settings = {"name": name, "widths": [base * 2**stage for stage in range(NUM_STAGES)]}
            model = MODELS.build(settings, in_channels=1, num_classes=3, spatial_dims=3)
        return abs(sum(parameter.numel() for parameter in model.parameters()) - NUM_WEIGHTS)

    base = min(range(2, 33), key=distance)
    return [base * 2**stage for stage in range(NUM_STAGES)]


def train(run: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """One training, and what it reached."""
    command = [sys.executable, "-m", "medseg", "train", *overrides, f"hydra.run.dir='{run}'"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with (run / "history.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    summary = json.loads((run / "validation" / "metrics.json").read_text())["summary"]
    split = json.loads((run / "split.json").read_text())
    shown = [override.replace(str(DATA), "$MEDSEG_DATA") for override in overrides]
    return {
        "command": " ".join(["medseg train", *(f'"{part}"' if set(part) & set("{[' ") else part for part in shown)]),
        "weights": sum(parameter.numel() for parameter in BundleInfo.read(run).build_model().parameters()),
        "steps": int(last["step"]),
        "minutes": round(float(last["minutes"]), 1),
        "train": len(split["train"]),
        "val": len(split["val"]),
        "dice": dice_of(summary),
    }


def dice_of(summary: dict[str, Any]) -> dict[str, list[float]]:
    """Mean Dice of each class and of all, with its interval."""
    found = {name: entry["metrics"]["dice"] for name, entry in summary.items()}
    return {
        name: [round(float(dice.get(key) or 0), 4) for key in ("mean", "low", "high")] for name, dice in found.items()
    }


def hippocampus(name: str, run: Path, minutes: float) -> dict[str, Any]:
    """Train a network of comparable size."""
    size: tuple[str, ...] = () if name in OWN_SIZE else (f"model.widths={widths_for(name)}".replace(" ", ""),)
    stages = () if name in OWN_SIZE else (f"data.plan.num_stages={NUM_STAGES}",)
    budget = f"trainer.max_minutes={minutes:g}"
    return train(run, (*HIPPOCAMPUS, f"model={name}", *size, *stages, *NETWORKS[name], *COMMON, budget))


def brats(folder: Path, minutes: float) -> dict[str, Any]:
    """Train DeepMedic on the lower part of the one patient, and label both parts with `medseg predict`."""
    data, run = folder / "data", folder / "run"
    write_halves(data)
    budget = f"trainer.max_minutes={BRATS_TIMES * minutes:g}"
    split = "data.split.validation=['upper']"
    overrides = (f"data.root='{data}'", "model=deepmedic", *BRATS_SETTINGS, BRATS_LABELS, split, *COMMON, budget)
    result = train(run, overrides)
    result["command"] = result["command"].replace(str(data), "HALVES")
    images = folder / "lower"
    images.mkdir()
    for image in sorted((data / "imagesTr").glob("lower_*")):
        (images / image.name).symlink_to(image)
    medseg = [sys.executable, "-m", "medseg"]
    predict = ["predict", str(run), str(images), "-o", str(folder / "predicted"), "--step", "1", "--device", "cpu"]
    subprocess.run([*medseg, *predict], check=True)
    reference = folder / "reference"
    reference.mkdir()
    (reference / "lower.nii.gz").symlink_to(data / "labelsTr" / "lower.nii.gz")
    scores = folder / "scores"
    subprocess.run([*medseg, "evaluate", str(folder / "predicted"), str(reference), "-o", str(scores)], check=True)
    learnt = json.loads((scores / "metrics.json").read_text())["summary"]
    with (run / "history.csv").open(newline="") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    return {**result, "dice_learnt": dice_of(learnt), "first_loss": losses[0], "last_loss": losses[-1]}


def write_halves(folder: Path) -> None:
    """The box around the patient's brain, cut in two along the third axis, in a layout that `medseg train` reads."""
    (patient,) = (DATA / "segmentation" / "brats").iterdir()
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    brain = np.argwhere(open_volume(patient / "brainmask.nii.gz").array[0] > 0.5)
    i, j, k = (slice(int(first), int(last) + 1) for first, last in zip(brain.min(0), brain.max(0), strict=True))
    for half, planes in (("lower", slice(k.start, CUT)), ("upper", slice(CUT, k.stop))):
        for number, channel in enumerate(CHANNELS):
            volume = open_volume(patient / f"{channel}.nii.gz")
            write_image(folder / "imagesTr" / f"{half}_{number:04d}.nii.gz", cut(volume, (i, j, planes)))
        label = open_label(patient / "OTMultiClass.nii.gz")
        write_label(folder / "labelsTr" / f"{half}.nii.gz", cut(label, (i, j, planes)))


def cut(volume: Volume, box: tuple[slice, slice, slice]) -> Volume:
    """The voxels of a box, where they lie."""
    array = np.ascontiguousarray(volume.array[(..., *box)])
    affine = volume.grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    return Volume(array, Grid(tuple(array.shape[-3:]), affine))


def write_table(results: dict[str, dict[str, Any]], table: Path) -> None:
    """Write the Markdown of all results."""
    lines = ["# What each segmentation network reaches", ""]
    networks = {name: r for name, r in results.items() if name != BRATS}
    if networks:
        cases = {f"{r['train']} / {r['val']}" for r in networks.values()}
        lines += [
            *textwrap.wrap(ABOUT, width=120),
            "",
            "| model | weights | minutes | steps | Dice (95 %) | per class |",
            "|---|---|---|---|---|---|",
            *(row_of(name, r) for name, r in networks.items()),
            "",
            f"Cases to train / validate: {', '.join(sorted(cases))}.",
            "",
        ]
    if BRATS in results:
        lines += of_brats(results[BRATS])
    lines += ["## Commands", "", *(f"- {name}: `{r['command']}`" for name, r in results.items()), ""]
    table.write_text("\n".join(lines), encoding="utf-8")


def row_of(name: str, r: dict[str, Any]) -> str:
    """A network's line of the table."""
    per_class = ", ".join(f"{label} {dice[0]:.3f}" for label, dice in r["dice"].items() if label != "(foreground)")
    return f"| `{name}` | {r['weights']:,} | {r['minutes']} | {r['steps']} | {spread(r['dice'])} | {per_class} |"


def spread(dice: dict[str, list[float]]) -> str:
    """The mean over the classes with its interval."""
    mean, low, high = dice["(foreground)"]
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def of_brats(r: dict[str, Any]) -> list[str]:
    """What the two halves of one patient show."""
    rows = [f"| {name} | {learnt[0]:.3f} | {r['dice'][name][0]:.3f} |" for name, learnt in r["dice_learnt"].items()]
    told = f"{r['minutes']} minutes, {r['steps']} steps of 2 patches; training loss {r['first_loss']:.3f} at first, "
    return [
        "## DeepMedic on FLAIR and T1c of one patient",
        "",
        "Made by `python scripts/bench_models.py brats`.",
        *textwrap.wrap(f"{ABOUT_BRATS} {told}{r['last_loss']:.3f} at last.", width=120),
        "",
        "| class | Dice, learnt part | Dice, held-out part |",
        "|---|---|---|",
        *rows,
        "",
    ]


def main() -> None:
    """Run the chosen networks one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*NETWORKS, BRATS)))
    parser.add_argument("--minutes", type=float, default=5.0, help="of each training; BraTS gets three times as many")
    parser.add_argument("--to", type=Path, default=RESULTS, help="folder of models.json and models.md")
    arguments = parser.parse_args()
    chosen = arguments.names or [*NETWORKS, BRATS]
    if unknown := set(chosen) - {*NETWORKS, BRATS}:
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    file = arguments.to / "models.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            if name == BRATS:
                results[name] = brats(Path(folder), arguments.minutes)
            else:
                results[name] = hippocampus(name, Path(folder) / "run", arguments.minutes)
        results = {n: results[n] for n in (*NETWORKS, BRATS) if n in results}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_table(results, file.with_suffix(".md"))


if __name__ == "__main__":
    main()
