#!/usr/bin/env python3
"""Train medseg and nnU-Net on the hippocampus set for the same time, both planned by themselves, and score both.

    python scripts/make_peers.py                                   once: the peers' own environment
    python scripts/bench_hippocampus.py --minutes 30               both for 30 minutes, about 75 minutes in all
    python scripts/bench_hippocampus.py --minutes 90 --only medseg ours for 90 minutes
    python scripts/bench_hippocampus.py --minutes 30 --write       and writes docs/benchmarks/hippocampus.md and .json

The split is by block of ids: those below 250 train, the rest test and are not seen by the trainings (both sides of a
person's brain have neighbouring ids). Both see the same files and cores. The clock of each runs over its training
loop alone; validation during training counts, planning and preprocessing do not. nnU-Net gets what it would not have by
itself: its learning rate falls to zero at the end of the budget instead of after 1000 epochs, no step is spent on its
pseudo-validation, and all cases train (medseg keeps a tenth to choose its checkpoint). Its prediction is its default,
mirrored passes included. Both predictions are scored by `medseg evaluate` on the scans' own grids. Keep the machine
otherwise idle: the budget is time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark
import make_peers

DATA = benchmark.DATA / "segmentation" / "hippocampus"
TABLE = benchmark.PAGES / "hippocampus.md"
FIRST_TEST_ID = 250
DATASET = "Dataset004_Hippocampus"
BARS = {30.0: 0.88, 90.0: 0.89}
"""Mean Dice to reach after so many minutes on 2 cores."""
RECIPES = {
    90.0: [
        "folds=[0,1,2]",
        "augment.rotation_probability=0.5",
        "augment.scale_probability=0.5",
        "augment.mirror_axes=[2]",
    ]
}
"""Settings of a budget that differ from the defaults: one network overfits so few cases before 90 minutes have gone, so
three share them, with more variation of what they see and left and right mirrored, in prediction too."""


def is_test(case: str) -> bool:
    """Whether a case is set aside: by its number, hippocampus_NNN."""
    return int(case.rpartition("_")[2]) >= FIRST_TEST_ID


def write_inputs(folder: Path) -> None:
    """A manifest with the split for medseg, the test images and labels, and the folder that nnU-Net wants."""
    shutil.rmtree(folder / "input", ignore_errors=True)
    test_images, test_labels = folder / "input" / "images", folder / "input" / "labels"
    raw = folder / "nnunet" / "raw" / DATASET
    for made in (test_images, test_labels, raw / "imagesTr", raw / "labelsTr"):
        made.mkdir(parents=True, exist_ok=True)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (DATA / "labels").glob("*.nii.gz"))
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "image", "label", "split"])
        for case in cases:
            image, label = DATA / "images" / f"{case}.nii.gz", DATA / "labels" / f"{case}.nii.gz"
            writer.writerow([case, f"images/{image.name}", f"labels/{label.name}", "test" if is_test(case) else ""])
            places = (test_images / image.name, test_labels / label.name) if is_test(case) else (
                raw / "imagesTr" / f"{case}_0000.nii.gz", raw / "labelsTr" / label.name)  # fmt: skip
            for place, source in zip(places, (image, label), strict=True):
                if not place.exists():
                    place.symlink_to(source)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": sum(not is_test(case) for case in cases),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def train_medseg(folder: Path, minutes: float, overrides: list[str]) -> dict[str, Any]:
    """`medseg train`, `medseg predict`, `medseg evaluate`, as a user would."""
    run = folder / f"medseg_{minutes:g}"
    shutil.rmtree(run, ignore_errors=True)
    overrides = [*RECIPES.get(minutes, []), *overrides]
    members = next((len(o.split(",")) for o in overrides if o.startswith("folds=")), 1)
    settings = [
        f"data.root='{DATA}'",
        f"data.manifest='{folder / 'manifest.csv'}'",
        "data.split.num_folds=10",
        f"trainer.max_minutes={minutes / members}",
        *overrides,
    ]
    medseg("train", *settings, f"hydra.run.dir='{run}'")
    mirrors = ["--mirror"] if any(o.startswith("augment.mirror_axes=") for o in overrides) else []
    medseg("predict", run, folder / "input" / "images", "-o", run / "test", *mirrors)
    histories = [list(csv.DictReader(path.open(encoding="utf-8"))) for path in sorted(run.glob("**/history.csv"))]
    steps = sum(int(history[-1]["step"]) for history in histories)
    cores = len(os.sched_getaffinity(0))
    return {
        "steps": steps,
        "cores": cores,
        "overrides": overrides,
        "validation": validation_dice(run),
        **score(folder, run / "test"),
    }


def validation_dice(run: Path) -> dict[str, float]:
    """Mean Dice over the cases that chose the checkpoints (so slightly too high), and how many they are."""
    folder = run / "crossvalidation"
    path = (folder if folder.exists() else run / "validation") / "metrics.json"
    dice = json.loads(path.read_text(encoding="utf-8"))["summary"]["(foreground)"]["metrics"]["dice"]
    return {"dice": dice["mean"], "cases": dice["n"]}


def medseg(*arguments: object) -> None:
    """One command of medseg, in its own process."""
    subprocess.run([sys.executable, "-m", "medseg", *map(str, arguments)], check=True)


def train_nnunet(folder: Path, minutes: float) -> dict[str, Any]:
    """nnU-Net in the peers' environment: its planner, its preprocessing, its trainer, its predictor."""
    output = folder / f"nnunet_{minutes:g}"
    shutil.rmtree(output, ignore_errors=True)
    places = {f"nnUNet_{name}": str(folder / "nnunet" / name) for name in ("raw", "preprocessed", "results")}
    command = [str(make_peers.python()), __file__, "--peer", str(minutes), str(folder), str(output)]
    subprocess.run(command, check=True, env={**os.environ, **places})
    steps = json.loads((output / "steps.json").read_text(encoding="utf-8"))
    return {**steps, **score(folder, output)}


def peer(minutes: float, folder: Path, output: Path) -> None:
    """Runs in the peers' environment."""
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # type: ignore[import-not-found,unused-ignore]
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # type: ignore[import-not-found,unused-ignore]
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import (  # type: ignore[import-not-found,unused-ignore]
        nnUNetTrainer,
    )

    number = int(DATASET[7:10])
    begin = time.perf_counter()
    extract_fingerprints([number], num_processes=2, check_dataset_integrity=False)
    plans_name = plan_experiments([number])
    preprocess([number], plans_name, configurations=("3d_fullres",), num_processes=(2,))
    prepared = time.perf_counter() - begin
    preprocessed = folder / "nnunet" / "preprocessed" / DATASET
    plans = json.loads((preprocessed / f"{plans_name}.json").read_text(encoding="utf-8"))
    dataset = json.loads((preprocessed / "dataset.json").read_text(encoding="utf-8"))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", "all", dataset, torch.device("cpu"))
    trainer.on_train_start()
    trainer.network.train()
    steps, begin = 0, time.perf_counter()
    while (progress := (time.perf_counter() - begin) / (60 * minutes)) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - progress) ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
    trainer.on_train_end()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",), "checkpoint_final.pth")
    images = [[str(path)] for path in sorted((folder / "input" / "images").glob("*.nii.gz"))]
    output.mkdir(parents=True)
    targets = [str(output / Path(image[0]).name.removesuffix(".nii.gz")) for image in images]
    predictor.predict_from_files_sequential(images, targets, save_probabilities=False, overwrite=True)
    (output / "steps.json").write_text(json.dumps({"steps": steps, "prepare_seconds": prepared}), encoding="utf-8")


def score(folder: Path, predictions: Path) -> dict[str, Any]:
    """Mean Dice over the test cases, and of each class."""
    labels = "{background: 0, anterior: 1, posterior: 2}"
    result = predictions.with_name(f"{predictions.parent.name}_{predictions.name}_metrics")
    medseg("evaluate", predictions, folder / "input" / "labels", "-o", result, "--labels", labels)
    summary = json.loads((result / "metrics.json").read_text(encoding="utf-8"))["summary"]
    dice = {name: entry["metrics"]["dice"]["mean"] for name, entry in summary.items()}
    return {"dice": dice.pop("(foreground)"), "per_class": dice}


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# Hippocampus: the same time for medseg and nnU-Net",
        "",
        f"Made by `python scripts/bench_hippocampus.py --write`: ids below {FIRST_TEST_ID} train, the"
        f" {results['num_test']} others test. The head of the script says what each clock counts and what nnU-Net is",
        "given. One run each; [README.md](README.md) says what was tried before, on the same test cases.",
        "",
        "| minutes | | steps | mean Dice | per class | bar | validation cases |",
        "|---|---|---|---|---|---|---|",
    ]
    for minutes, row in sorted(results["minutes"].items(), key=lambda item: float(item[0])):
        for name, one in row.items():
            per_class = ", ".join(f"{k} {v:.3f}" for k, v in one["per_class"].items())
            bar = BARS.get(float(minutes)) if name == "medseg" else None
            met = "" if bar is None else f"≥ {bar}: {'met' if one['dice'] >= bar else 'missed'}"
            if one.get("overrides"):
                name = f"{name} `{' '.join(one['overrides'])}`"
            if one.get("cores") == 1:
                name += ", on one core"
            row_ends = f"{v['dice']:.4f} ({v['cases']})" if (v := one.get("validation")) else ""
            lines.append(
                f"| {minutes} | {name} | {one['steps']} | **{one['dice']:.4f}** | {per_class} | {met} | {row_ends} |"
            )
    return "\n".join([*lines, "", "The run that was measured last:", *benchmark.where(results["environment"]), ""])


def main() -> None:
    """Run what was asked for."""
    parser = benchmark.parser_of(__doc__, TABLE)
    parser.add_argument("--minutes", type=float, default=30, help="training time of each")
    parser.add_argument("--only", choices=["medseg", "nnunet"], help="one of the two")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_hippocampus"), help="where the runs are kept")
    parser.add_argument("overrides", nargs="*", help="keys for medseg train; with them nothing is written")
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(float(arguments.peer[0]), Path(arguments.peer[1]), Path(arguments.peer[2]))
        return
    folder = arguments.folder.resolve()
    write_inputs(folder)
    found: dict[str, Any] = {}
    if arguments.only != "nnunet":
        found["medseg"] = train_medseg(folder, arguments.minutes, arguments.overrides)
    if arguments.only != "medseg":
        found["nnU-Net"] = train_nnunet(folder, arguments.minutes)
    stored = TABLE.with_suffix(".json")
    results: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"minutes": {}}
    results["environment"] = benchmark.environment(("medseg", "torch"), ("nnunetv2", "torch"))
    results["num_test"] = len(list((folder / "input" / "images").iterdir()))
    results["minutes"].setdefault(f"{arguments.minutes:g}", {}).update(found)
    benchmark.show(TABLE, page(results), results, write=arguments.write and not arguments.overrides)


if __name__ == "__main__":
    main()
