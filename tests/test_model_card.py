"""The model card: its figures are those of the run's files, and it says what they do not tell."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.config import compose, resumed
from medseg.data.splits import Split
from medseg.metrics.masks import State
from medseg.reports.crossvalidation import CrossValidation
from medseg.reports.evaluation import Evaluation, Row
from medseg.reports.model_card import Facts, Fit, model_card
from medseg.training.train import train


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text: str) -> dict[str, list[str]]:
    """The rows of all Markdown tables of a text, by their first cell."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_a_runs_card_says_what_its_files_say(tiny_run) -> None:
    folder = tiny_run.run
    card = (folder / "model_card.md").read_text()
    survey = json.loads((folder / "survey.json").read_text())
    split = json.loads((folder / "split.json").read_text())
    info = BundleInfo.read(folder)
    assert "Not a medical device" in card

    data = section(card, "Data")
    assert f"{len(survey['cases'])} labelled cases; modality: CT" in data
    assert f"{len(split['train'])} to train, {len(split['val'])} to validate" in data
    number = info.labels.names.index("liver")
    volumes = [c["label_voxels"][number] * np.prod(c["spacing_mm"]) / 1000 for c in survey["cases"]]
    assert float(table(data)["liver"][1]) == pytest.approx(np.median([v for v in volumes if v]), rel=1e-3)

    plan = table(section(card, "Plan"))
    assert plan["patch_size"] == ["[16, 24, 24]", "set by data.plan.patch_size"]
    with (folder / "validation" / "summary.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "dice"]
    results = table(section(card, "Results"))
    for row in rows:
        name = {"(foreground)": "mean"}.get(row["class"], row["class"])
        shown = [f"{float(row[key]):.3f}" if row[key] else "–" for key in ("mean", "std", "median")]
        assert results[name][:6] == [*shown, row["n"], row["num_missed"], row["num_spurious"]]
    assert "chosen by its Dice on the same validation cases" in section(card, "Results")

    with (folder / "validation" / "metrics.csv").open(newline="") as file:
        by_case: dict[str, list[float]] = {}
        for row in csv.DictReader(file):
            by_case.setdefault(row["case"], []).append(float(row["dice"] or "nan"))
    worst = min(by_case, key=lambda case: float(np.nanmean(by_case[case])))
    failures = section(card, "Known failures")
    assert next(iter(c for c in table(failures) if c in by_case)) == worst
    training = section(card, "Training")
    assert re.search(r"device: cpu \(.*\), (bf16|fp32)", training) and "seed: 0" in training
    assert table(training)["this run"][0] == "10"


def test_a_card_holds_no_path(tiny_run) -> None:
    card = (tiny_run.run / "model_card.md").read_text()
    for part in (str(tiny_run.data), str(tiny_run.run), tiny_run.run.name, "/"):
        assert part not in card


def test_a_run_that_goes_on_writes_it_again(tiny_run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.run, folder)
    (folder / "model_card.md").unlink()
    with (tmp_path / "log.txt").open("w") as log:
        train(resumed(folder, ["trainer.max_steps=12"]), folder, Console(file=log))
    card = (folder / "model_card.md").read_text()
    assert table(section(card, "Training"))["this run"][0] == "12"
    assert "budget of a training: 12 steps" in card and "learning rate 0.002\n" in card and "- device: cpu (" in card
    assert "- augmentation: 20% of the patches turned, 20% scaled; mirrored axes: none\n" in card


def test_overfitting_and_no_final_predictions(tiny_run, tmp_path: Path) -> None:
    settings = [f"data.root='{tiny_run.data}'", "data.plan.base_width=4", "data.plan.patch_size=[16,24,24]",
                "trainer.device=cpu", "trainer.max_steps=1", "trainer.overfit_cases=1"]  # fmt: skip
    for name, more, words in (
        ("a", [], "**that it was trained on**"),
        ("b", ["trainer.final_predictions=false"], "were not predicted on their own grids"),
    ):
        with (tmp_path / f"{name}.txt").open("w") as log:
            train(compose("train", [*settings, *more]), tmp_path / name, Console(file=log))
        assert words in (tmp_path / name / "model_card.md").read_text()


def row(case: str, name: str, state: State, dice: float) -> Row:
    return Row(case, name, state, {"dice": dice, "hd95": 3.0})


def test_failures_by_hand(tiny_run) -> None:
    """A class missed, a class found where it is not, a class that a fold could not learn."""
    info = BundleInfo.read(tiny_run.run)
    first, second = info.labels.foreground[:2]
    survey = json.loads((tiny_run.run / "survey.json").read_text())
    ids = [case["case_id"] for case in survey["cases"]]
    for case in survey["cases"][1:]:
        case["label_voxels"][1] = 0  # only the first case has the first class
    fits = [
        Fit("fold 0", Split(tuple(ids[1:]), (ids[0],), ("secret_test",), "rule"), 10, 1.5, 0.5, 5),
        Fit("fold 1", Split((ids[0],), tuple(ids[1:]), (), "rule"), 10, 1.5, 0.5, 5),
    ]
    folds = {
        0: Evaluation((row(ids[0], first, State.MISSED, 0.0), row(ids[0], second, State.PRESENT, 0.8)), info.labels),
        1: Evaluation((row(ids[1], first, State.SPURIOUS, 0.0), row(ids[1], second, State.PRESENT, 0.6)), info.labels),
    }
    labels = replace(info.labels, names=info.labels.names[:3], values=info.labels.values[:3])
    info = replace(info, labels=labels)
    folds = {number: replace(evaluation, labels=labels) for number, evaluation in folds.items()}
    facts = Facts(survey, fits, {"seed": 1}, CrossValidation(folds), 1_234_567)
    card = model_card(info, facts)
    failures = section(card, "Known failures")
    assert f"{first} was missed entirely in 1 of 1 cases" in failures
    assert f"{first} was found in 1 of 1 cases that do not have it" in failures
    assert f"fold 0: no training case has {first}: it was not learnt" in failures and "fold 1: no" not in failures
    assert list(table(failures))[-2:] == [ids[1], ids[0]]  # 0.3 before 0.4
    assert table(section(card, "Results").split("Mean Dice by fold")[1])[second][:2] == ["0.800", "0.600"]
    assert "1 set aside" in card and "secret_test" not in card
    assert "1.23 million weights" in card and "The mean of all folds decides" in card
