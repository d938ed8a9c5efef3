#!/usr/bin/env python3
"""What pretraining without labels brings: Dice on the hippocampus set against the number of labelled cases.

    python scripts/bench_pretraining.py                              about 15 minutes on a core of its own
    taskset -c 0 python scripts/bench_pretraining.py --minutes 30    begins nothing new after half an hour
    python scripts/bench_pretraining.py --write                      and writes docs/benchmarks/pretraining.md and .json

Ids of 250 and more test and are seen by no training, labelled or not, as in bench_hippocampus.py. All images below are
the unlabelled ones: a network is pretrained on them once as an autoencoder and once masked. Then 5, 20 and 80 of them
have labels, and a segmenter is trained from scratch and from either pretraining: same plan, steps, schedule, seeds and
labelled cases. Nothing is chosen by a validation: each training has one, at its end, on `VALIDATION` other cases. The
steps of the pretraining come on top, once for all segmenters that begin with it.

A result that is there is not made again (it stands in --folder with its settings), so the script goes on where it was
ended. Trainings go by steps, not by the clock: other programs beside it change no Dice.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark
import numpy as np
from bench_hippocampus import DATA, FIRST_TEST_ID, is_test
from rich.console import Console

from medseg.bundle import load_bundle
from medseg.config import compose
from medseg.data.cases import Case, load_image, load_label_values
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig
from medseg.pretraining.train import train as pretrain
from medseg.reports.evaluation import Evaluation, Row, evaluate_pair
from medseg.statistics import bootstrap_means, paired_test
from medseg.training.train import train

TABLE = benchmark.PAGES / "pretraining.md"
METHODS = ("autoencoder", "masked")
SCRATCH = "scratch"
LABELLED = (5, 20, 80)
VALIDATION = 10
"""Labelled cases beside those that train, which choose nothing."""
PLAN = (
    "data.plan.patch_size=[24,32,24]",
    "data.plan.batch_size=4",
    "data.plan.base_width=8",
    "data.plan.num_stages=4",
    "trainer.device=cpu",
)
"""A network and patches that a core trains in minutes."""


def main() -> None:
    """Make what is missing, and show the table."""
    parser = benchmark.parser_of(__doc__, TABLE)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a segmenter")
    parser.add_argument("--pretraining-steps", type=int, default=800, help="optimizer steps of a pretraining")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each cell, each with other labelled cases")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_pretraining"), help="where the runs are kept")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    steps = {"steps": arguments.steps, "pretraining_steps": arguments.pretraining_steps}
    for kind, number, seed in cells(arguments.seeds):
        if (time.monotonic() - began) / 60 > arguments.minutes:
            print("the time is up: begin the script again to go on")
            break
        if kind != SCRATCH:
            pretrained(folder, kind, arguments.pretraining_steps)
        result(folder, kind, number, seed, steps)
    found = results(folder, steps)
    if found["cells"]:
        found["environment"] = benchmark.environment(("medseg", "torch"))
        benchmark.show(TABLE, page(found), found, write=arguments.write)


def cells(seeds: int) -> Iterator[tuple[str, int, int]]:
    """(how it begins, number of labelled cases, seed) of each training, one whole table after the other."""
    for seed in range(seeds):
        for number in LABELLED:
            for kind in (SCRATCH, *METHODS):
                yield kind, number, seed


def case_ids() -> tuple[list[str], list[str]]:
    """The cases that may train, and those that test."""
    found = sorted(path.name.removesuffix(".nii.gz") for path in (DATA / "labels").glob("*.nii.gz"))
    return [case for case in found if not is_test(case)], [case for case in found if is_test(case)]


def labelled_cases(number: int, seed: int) -> tuple[list[str], list[str]]:
    """Of a seed the first of one order of the cases: fewer are always among more; and those that validate."""
    order = [str(case) for case in np.random.default_rng(seed).permutation(case_ids()[0])]
    return order[VALIDATION : VALIDATION + number], order[:VALIDATION]


def write_manifest(path: Path, rows: list[tuple[str, str]], *, labels: bool) -> Path:
    """A table of cases with their side of the split."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "image", *(["label"] if labels else []), "split"])
        for case, split in rows:
            label = [f"labels/{case}.nii.gz"] if labels else []
            writer.writerow([case, f"images/{case}.nii.gz", *label, split])
    return path


def pretrained(folder: Path, method: str, steps: int) -> Path:
    """The run of a pretraining on all images that may train, one in ten held out; made where it is not there."""
    run = folder / f"pretraining_{method}_{steps}"
    if (run / "manifest.json").is_file():
        return run
    shutil.rmtree(run, ignore_errors=True)  # of one that was ended
    run.mkdir(parents=True)
    rows = [(case, "val" if index % 10 == 0 else "train") for index, case in enumerate(case_ids()[0])]
    manifest = write_manifest(folder / "unlabelled.csv", rows, labels=False)
    stated = [*common(manifest, steps, 0, folder), "task=pretraining", f"method={method}", "trainer.num_validations=4"]
    pretrain(compose("pretraining", stated), run, Console())
    return run


def common(manifest: Path, steps: int, seed: int, folder: Path) -> list[str]:
    """Keys that every training states."""
    return [
        f"data.root='{DATA}'",
        f"data.manifest='{manifest}'",
        f"data.store='{folder / 'store'}'",
        f"trainer.max_steps={steps}",
        f"seed={seed}",
        *PLAN,
    ]


def result(folder: Path, kind: str, number: int, seed: int, steps: dict[str, int]) -> None:
    """Train and score one segmenter, and keep the Dice of each test case; nothing where it is kept already."""
    name = f"{kind}_{number}_{seed}_{steps['steps']}"
    name += f"_{steps['pretraining_steps']}" if kind != SCRATCH else ""
    path = folder / f"{name}.json"
    if path.is_file():
        return
    training, validation = labelled_cases(number, seed)
    rows = [*((case, "train") for case in training), *((case, "val") for case in validation)]
    manifest = write_manifest(folder / f"labelled_{number}_{seed}.csv", rows, labels=True)
    labels = "data.labels={background: 0, anterior: 1, posterior: 2}"
    quiet = ("trainer.num_validations=1", "trainer.final_predictions=false", "trainer.report=false",
             "trainer.embedding_cases=0", "trainer.map_cases=0")  # fmt: skip
    stated = [*common(manifest, steps["steps"], seed, folder), labels, *quiet]
    if kind != SCRATCH:
        begins = folder / f"pretraining_{kind}_{steps['pretraining_steps']}"
        stated.append(f"trainer.initial='{begins}'")
    run = folder / name
    shutil.rmtree(run, ignore_errors=True)  # of one that was ended
    run.mkdir()
    train(compose("train", stated), run, Console())
    path.write_text(json.dumps({"kind": kind, "labelled": number, "seed": seed, "dice": score(run)}), encoding="utf-8")


def score(run: Path) -> dict[str, float]:
    """Mean Dice over the classes of each test case, on its own grid; tiles overlap by a quarter."""
    predictor = Predictor(load_bundle(run), WindowConfig(step=0.75))
    rows: list[Row] = []
    for case_id in case_ids()[1]:
        case = Case(case_id, (DATA / "images" / f"{case_id}.nii.gz",), DATA / "labels" / f"{case_id}.nii.gz")
        image = load_image(case)
        reference = load_label_values(case, image.grid)
        labels = predictor.bundle.info.labels
        rows += evaluate_pair(predictor.predict(image), reference, labels, names=["dice"], case=case_id)
    return dict(Evaluation(tuple(rows), predictor.bundle.info.labels, frame="mm").case_means("dice"))


def results(folder: Path, steps: dict[str, int]) -> dict[str, Any]:
    """What is there of these settings."""
    found = []
    for path in sorted(folder.glob(f"*_{steps['steps']}*.json")):
        begun = path.stem.endswith(f"_{steps['steps']}_{steps['pretraining_steps']}")
        if begun or (path.stem.startswith(SCRATCH) and path.stem.endswith(f"_{steps['steps']}")):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    explained = {
        method: best_explained(folder / f"pretraining_{method}_{steps['pretraining_steps']}") for method in METHODS
    }
    return {"settings": {**steps, "plan": list(PLAN)}, "explained": explained, "cells": found}


def best_explained(run: Path) -> float | None:
    """The best share of the held-out images' variance that a pretraining explained."""
    if not (run / "history.csv").is_file():
        return None
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        told = [float(row["val_explained"]) for row in csv.DictReader(file) if row["val_explained"]]
    return max(told, default=None)


def page(found: dict[str, Any]) -> str:
    """The Markdown page: means over test cases, of which each stands for the mean over the seeds that all have."""
    settings = found["settings"]
    shared: dict[int, list[int]] = {}
    dice: dict[tuple[str, int], np.ndarray] = {}
    for number in LABELLED:
        by_kind = {
            kind: {c["seed"]: c["dice"] for c in found["cells"] if (c["kind"], c["labelled"]) == (kind, number)}
            for kind in (SCRATCH, *METHODS)
        }
        begun = [of_seed for of_seed in by_kind.values() if of_seed]
        seeds = sorted(set.intersection(*(set(of_seed) for of_seed in begun))) if begun else []
        shared[number] = seeds
        for kind, of_seed in by_kind.items():
            if seeds and of_seed:
                dice[kind, number] = np.mean([list(of_seed[seed].values()) for seed in seeds], axis=0)
    lines = [
        "# Pretraining without labels: Dice against the number of labelled cases",
        "",
        f"Made by `python scripts/bench_pretraining.py --write --steps {settings['steps']} --pretraining-steps"
        f" {settings['pretraining_steps']}`: hippocampus, ids of {FIRST_TEST_ID} and",
        f"more test ({len(case_ids()[1])} cases), all {len(case_ids()[0])} others are the unlabelled images;"
        " the head of the script says the rest.",
        f"Each segmenter has {settings['steps']} steps of {' '.join(settings['plan'])}.",
        "",
        "| labelled | seeds | begins with | mean Dice (95 %) | minus from scratch (95 %) | cases better, worse |",
        "|---|---|---|---|---|---|",
    ]
    for number in LABELLED:
        for kind in (SCRATCH, *METHODS):
            if (kind, number) not in dice:
                continue
            (mean,) = bootstrap_means(dice[kind, number])
            row = f"| {number} | {len(shared[number])} | {kind} | {mean.mean:.4f} ({mean.low:.4f} to {mean.high:.4f}) |"
            if kind != SCRATCH and (SCRATCH, number) in dice:
                test = paired_test(dice[SCRATCH, number], dice[kind, number])
                d = test.difference
                row += f" {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}) | {test.num_higher}, {test.num_lower} |"
            else:
                row += " | |"
            lines.append(row)
    told = [f"{name} {value:.3f}" for name, value in found["explained"].items() if value is not None]
    lines += [
        "",
        "Dice is the mean over the classes of a test case; of several seeds (other labelled cases, weights and patches)"
        " the mean is taken",
        "first. The intervals are over test cases (BCa bootstrap): what other labelled cases or seeds would change"
        " is not in them.",
        f"Share of the variance of held-out images that the pretrainings explained: {', '.join(told) or 'not known'}.",
    ]
    lines += seed_lines(found["cells"])
    return "\n".join([*lines, "", *benchmark.where(found["environment"]), ""])


def seed_lines(cells: list[dict[str, Any]]) -> list[str]:
    """What the seeds differ in: the mean Dice of each training."""
    lines = ["", "| labelled | seed | " + " | ".join((SCRATCH, *METHODS)) + " |", "|---|---|" + "---|" * 3]
    means = {(c["labelled"], c["seed"], c["kind"]): float(np.mean(list(c["dice"].values()))) for c in cells}
    for number, seed in sorted({key[:2] for key in means}):
        row = [f"{means[number, seed, k]:.4f}" if (number, seed, k) in means else "" for k in (SCRATCH, *METHODS)]
        lines.append(f"| {number} | {seed} | " + " | ".join(row) + " |")
    return lines


if __name__ == "__main__":
    main()
