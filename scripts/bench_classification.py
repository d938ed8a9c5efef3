"""Classifiers on breast ultrasound (busi) and chest X-rays (pneumonia): from scratch, and with trained weights.

    python scripts/bench_classification.py                     all that is not done yet, then the page
    python scripts/bench_classification.py --only busi,cnn     cells whose names hold all these words
    python scripts/bench_classification.py --weights resnet18=FILE   ImageNet's weights, where you have the file
    python scripts/bench_classification.py --page              only the page, from the figures that are there

Writes docs/benchmarks/classification.json (a cell that is done is not done again) and classification.md. The given test
part of pneumonia, and each fold of busi in turn, are scored once by the weights that the validation images chose; no
choice is made on them. Run folders stay in --work: trained weights are taken from there.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from medseg.classification.bundle import CLASSIFICATION
from medseg.classification.cases import find_classified
from medseg.classification.division import divide
from medseg.classification.evaluation import ClassificationEvaluation
from medseg.classification.preparation import survey_images
from medseg.classification.train import train
from medseg.config import compose
from medseg.data.splits import SplitConfig
from medseg.formats import Reading
from medseg.metrics.classification_intervals import Estimate

REPOSITORY = Path(__file__).resolve().parent.parent
FIGURES = REPOSITORY / "docs" / "benchmarks" / "classification.json"
PAGE = FIGURES.with_suffix(".md")
NUM_FOLDS = 5
SETTINGS = {
    "pneumonia": ["data.classes=[normal,pneumonia]", "trainer.max_steps=300", "trainer.batch_size=64"],
    "busi": ["trainer.max_steps=150", "trainer.batch_size=16", "data.size=[64,64]", "data.channels=grey"],
}
COMMON = ["trainer.device=cpu", "trainer.report=false", "trainer.worst_cases=0", "trainer.num_validations=6",
          "optimizer.lr=0.001", "trainer.ema=0.98"]  # fmt: skip
MODELS = {
    "cnn": "small CNN",
    "resnet18": "ResNet-18",
    "densenet121": "DenseNet-121",
    "efficientnet_b0": "EfficientNet-B0",
}
SCRATCH, OURS, IMAGENET = "from scratch", "trained on pneumonia", "ImageNet"


@dataclass(frozen=True)
class Cell:
    """One row of the table, as one training of pneumonia or five of busi."""

    data: str
    model: str
    begun: str
    seed: int

    @property
    def name(self) -> str:
        """Of the cell, in the figures."""
        return f"{self.data}, {self.model}, {self.begun}, seed {self.seed}"


def cells(weights: dict[str, str]) -> list[Cell]:
    """What is measured: one seed of everything, then others of what is quick."""
    found = []
    for model in ("cnn", "resnet18"):
        found.append(Cell("pneumonia", model, SCRATCH, 0))
        found += [Cell("busi", model, begun, 0) for begun in (SCRATCH, OURS)]
    found += [Cell("pneumonia", model, SCRATCH, 0) for model in ("efficientnet_b0", "densenet121")]
    found += [Cell("pneumonia", "cnn", SCRATCH, seed) for seed in (1, 2)]
    found += [Cell("busi", "cnn", begun, 1) for begun in (SCRATCH, OURS)]
    found.append(Cell("pneumonia", "resnet18", SCRATCH, 1))
    found += [Cell(data, model, IMAGENET, 0) for model in weights for data in ("busi", "pneumonia")]
    return found


def main() -> None:
    """Measure what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDSEG_DATA", str(REPOSITORY.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default), help="folder that holds classification/")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "medseg_bench_classification")
    parser.add_argument("--only", default="", help="words between commas that a cell's name must hold")
    parser.add_argument("--weights", action="append", default=[], metavar="MODEL=FILE|imagenet")
    parser.add_argument("--until", help="begin no cell after this time of the day, such as 04:10")
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument("--note", default="", help="how it was run, for the page")
    options = parser.parse_args()
    weights = dict(text.partition("=")[::2] for text in options.weights)
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {"cells": {}}
    if options.note:
        figures["note"] = options.note
    for cell in cells(weights):
        late = options.until is not None and time.strftime("%H:%M") >= options.until
        wanted = all(word.strip() in cell.name for word in options.only.split(",") if word.strip())
        if options.page or late or not wanted or cell.name in figures["cells"]:
            continue
        if (
            cell.begun == OURS
            and not (folder_of(options.work, Cell("pneumonia", cell.model, SCRATCH, 0)) / "bundle.json").is_file()
        ):
            print(f"{cell.name}: train pneumonia first", flush=True)
            continue
        started = time.monotonic()
        figures["cells"][cell.name] = {**measured(cell, options.data, options.work, weights), "data": cell.data,
                                       "model": cell.model, "begun": cell.begun, "seed": cell.seed,
                                       "seconds": round(time.monotonic() - started)}  # fmt: skip
        figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"{cell.name}: {figures['cells'][cell.name]['auc']}", flush=True)
    PAGE.write_text(page_of(figures), encoding="utf-8")


def measured(cell: Cell, data: Path, work: Path, weights: dict[str, str]) -> dict[str, Any]:
    """The scores of a cell on test images."""
    if cell.data == "pneumonia":
        root = data / "classification" / "pneumonia" / "pneumoniamnist.npz"
        evaluation = run_of(cell, root, folder_of(work, cell), work, weights)
    else:
        parts = [
            run_of(cell, table, folder_of(work, cell) / f"fold_{fold}", work, weights)
            for fold, table in enumerate(tables_of_busi(data / "classification" / "busi", work))
        ]
        evaluation = ClassificationEvaluation(
            [case for part in parts for case in part.cases],
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
            parts[0].classes,
        )
    found = evaluation.to_json()
    shown = "malignant" if cell.data == "busi" else "pneumonia"
    called = {row["point"]: row for row in found["decisions"] if row["class"] == shown}
    return {key: found[key] for key in ("num_cases", "classes", "auc", "summary", "confusion")} | {
        "points": {
            point: {k: row[k] for k in ("threshold", "sensitivity", "specificity")} for point, row in called.items()
        }
    }


def run_of(cell: Cell, root: Path, run: Path, work: Path, weights: dict[str, str]) -> ClassificationEvaluation:
    """Train once, and score the test images."""
    begun = []
    if cell.begun == OURS:
        begun = [f"model.weights={folder_of(work, Cell('pneumonia', cell.model, SCRATCH, 0))}"]
    elif cell.begun == IMAGENET:
        begun = [f"model.weights={weights[cell.model]}", "trainer.backbone_lr_factor=0.3"]
    overrides = [
        f"data.root='{root}'",
        f"model={cell.model}",
        *SETTINGS[cell.data],
        *COMMON,
        f"seed={cell.seed}",
        *begun,
    ]
    with (work / "log.txt").open("a", encoding="utf-8") as log:
        result = train(compose(CLASSIFICATION, overrides), run, Console(file=log, width=120))
    assert result.test is not None
    return result.test


def folder_of(work: Path, cell: Cell) -> Path:
    """The run of a cell."""
    folder = work / cell.name.replace(", ", "_").replace(" ", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def tables_of_busi(root: Path, work: Path) -> list[Path]:
    """A CSV for each fold: it is the test part, the next one validates, and the others train."""
    cases = find_classified(root).cases
    facts, _ = survey_images(cases, Reading(channels=True), threads=1)
    folds = [set(divide(cases, SplitConfig(num_folds=NUM_FOLDS), 0, fold, facts)[0].val) for fold in range(NUM_FOLDS)]
    found = []
    for fold in range(NUM_FOLDS):
        path = work / f"busi_{fold}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "class", "split"])
            for case in cases:
                validates = case.case_id in folds[(fold + 1) % NUM_FOLDS]
                side = "test" if case.case_id in folds[fold] else "val" if validates else "train"
                writer.writerow([case.source, case.class_name, side])
        found.append(path)
    return found


def page_of(figures: dict[str, Any]) -> str:
    """The page, from the figures."""
    lines = [
        "# Classification: what networks and trained weights bring",
        "",
        "Written by `scripts/bench_classification.py`, which says how; the figures are in classification.json.",
        "",
        f"Run on {figures.get('machine', 'no machine yet')}. {figures.get('note', '')}".strip(),
        "",
        "Small budgets, the same for all networks: what is compared is what they come to within them, not what they "
        "can come to. Nothing was tuned for a network. Each row is one seed; the test images chose nothing.",
    ]
    for data, title, what in (
        ("pneumonia", "Chest X-rays, 28 × 28 (pneumonia)",
         "624 test images, given; 300 steps of 64 images. The data are an edited copy of PneumoniaMNIST (8 images "
         "stand on both sides of training and validation): compare these rows with each other alone."),
        ("busi", "Breast ultrasound (busi), benign / malignant / normal",
         "150 images in five folds, each the test part once; three folds train, one validates; 150 steps of 16 images, "
         "seen grey at 64 × 64. Which images are of one patient is not known: neighbours in their names stay together, "
         "and intervals may be too narrow. AUC malignant: against the other two."),
    ):  # fmt: skip
        rows = [cell for cell in figures["cells"].values() if cell["data"] == data]
        last = "pneumonia" if data == "pneumonia" else "malignant"
        head = f"| network | begun | seed | AUC {last} | mean AUC | balanced accuracy | sensitivity / specificity* |"
        lines += ["", f"## {title}", "", what, "", head,
                  "|---|---|--:|---|---|---|---|"]  # fmt: skip
        for cell in sorted(rows, key=lambda c: (list(MODELS).index(c["model"]), c["begun"], c["seed"])):
            mean = cell["auc"].get("macro", cell["auc"][last])
            point = cell["points"].get("youden") or cell["points"]["most probable"]
            cells_of_row = [
                MODELS[cell["model"]],
                cell["begun"],
                str(cell["seed"]),
                words(cell["auc"][last]),
                words(mean),
                words(cell["summary"]["balanced_accuracy"]),
                f"{words(point['sensitivity'])} / {words(point['specificity'])}",
            ]
            lines.append(f"| {' | '.join(cells_of_row)} |")
        if not rows:
            lines.append("| nothing measured yet | | | | | | |")
    lines += [
        "",
        "\\* of pneumonia at the threshold of largest sensitivity + specificity on the validation images, applied to "
        "the test images; of malignant by the most probable class.",
        "",
        "95 % intervals: AUC by DeLong (mean over classes: bootstrap within classes), shares by Wilson, balanced "
        "accuracy by bootstrap. **ImageNet's weights** are not among these rows unless the file was at hand: medseg "
        "downloads nothing; `--weights resnet18=FILE` adds them.",
    ]
    return "\n".join(lines) + "\n"


def words(one: dict[str, Any]) -> str:
    """A number with its interval."""
    values = {key: float("nan") if one.get(key) is None else one[key] for key in ("value", "low", "high")}
    return str(Estimate(**values))


if __name__ == "__main__":
    main()
