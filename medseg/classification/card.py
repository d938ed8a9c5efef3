"""`model_card.md` of a classifier: what it tells apart, what it learnt from, how well, and what it is not for."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import medseg
from medseg.classification.bundle import Classifier
from medseg.classification.evaluation import ClassificationEvaluation
from medseg.classification.experiment import ClassificationExperiment
from medseg.classification.tables import TITLES, notes_on
from medseg.data.splits import Split
from medseg.formats.atomic import whole_file
from medseg.reports.crossvalidation import markdown_table
from medseg.reports.model_card import CARD_FILE, DISCLAIMER, NUM_WORST
from medseg.training.optimizers import learning_rate
from medseg.training.state import Counters

__all__ = ["CARD_FILE", "write_card"]


def write_card(
    experiment: ClassificationExperiment,
    run: Path,
    classifier: Classifier,
    *,
    counts: Mapping[str, Mapping[str, int]],
    split: Split,
    evaluations: Mapping[str, ClassificationEvaluation],
    counters: Counters,
    device: str,
) -> Path:
    """Write the card into a run, whole or not at all.

    Args:
        experiment: what stated the run.
        run: its folder.
        classifier: its best weights.
        counts: side → class → number of images.
        split: which images train and validate.
        evaluations: side → how well it does.
        counters: how far it was trained.
        device: what on, in words.
    """
    info = classifier.info
    sections = {
        "What it tells apart": _classes(classifier),
        "Data": [
            f"- divided {split.rule}",
            "",
            *markdown_table([["images", *info.classes], *([s, *map(str, n.values())] for s, n in counts.items())]),
        ],
        "What it sees": [f"- {name}: {reason}" for name, reason in info.sight.reasons.items()],
        "Training": _training(experiment, classifier, counters, device),
        "Results": [line for side, one in evaluations.items() for line in _results(side, one)],
        "Known failures": [line for side, one in evaluations.items() for line in _failures(side, one)],
        "Intended use and limits": [
            "- For research on images like those above, by people who look at the result.",
            "- Nothing was measured beyond them: on other scanners, sites or ages it may fail without a sign.",
            "- It gives every image one of its classes, whatever the image shows.",
            "- Probabilities hold where the classes are as common as here; predictive values change with that.",
            "- It may go by what is no sign of a disease: marks, borders, devices. report.html shows where it looks.",
            "- Who the people in the data are (age, sex, origin) is not recorded, and no group was looked at apart.",
        ],
        "How to predict": ["`medseg predict RUN IMAGES -o FOLDER`, where RUN is this folder."],
    }
    lines = [f"# Model card: {' or '.join(info.classes[:6])}", "", DISCLAIMER]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    path = run / CARD_FILE
    with whole_file(path, ".md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _classes(classifier: Classifier) -> list[str]:
    info = classifier.info
    size = " × ".join(map(str, info.sight.size))
    lines = [f"{info.modality or 'Images'} in {info.sight.spatial_dims}D, seen as {size}: {', '.join(info.classes)}."]
    if len(info.classes) == 2:
        lines += ["", f"The positive class is {info.classes[1]}."]
    return lines


def _training(
    experiment: ClassificationExperiment, classifier: Classifier, counters: Counters, device: str
) -> list[str]:
    model, trainer = classifier.model, experiment.trainer
    weights = sum(p.numel() for p in model.parameters())
    begun = "fresh weights" if experiment.model.get("weights") is None else "trained weights"
    begun = "ImageNet's weights" if experiment.model.get("weights") == "imagenet" else begun
    versions = f"medseg {medseg.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    frozen = experiment.model.get("frozen_stages") or 0
    return [
        f"- network: {classifier.info.model.get('network') or classifier.info.model['name']}, "
        f"{weights / 1e6:.3g} million weights, begun with {begun}, {frozen} stages frozen",
        f"- optimizer: {experiment.optimizer['name']}, learning rate "
        f"{learning_rate(experiment.optimizer, next(model.parameters()).device):g} (before the head × "
        f"{trainer.backbone_lr_factor:g}), batch {trainer.batch_size}",
        f"- class weights {trainer.class_weights}, label smoothing {trainer.label_smoothing:g}, seed {experiment.seed}",
        f"- {counters.step} steps in {counters.minutes:.1f} min on {device}; the best weights, by {trainer.score} of "
        f"the validation images, are of step {counters.best_step}",
        f"- versions: {versions}",
    ]


def _results(side: str, evaluation: ClassificationEvaluation) -> list[str]:
    chosen = " (the best weights were chosen on them: somewhat too good)" if side == "validation" else ""
    rows = [["measure", "value (95 % interval)"]]
    for name, one in evaluation.aucs.items():
        rows.append(["mean AUC" if name == "macro" else f"AUC {name}", f"{one} {one.reason}".strip()])
    rows += [[TITLES[name], f"{one} {one.reason}".strip()] for name, one in evaluation.summary.items()]
    points = [["class", "decided", "threshold", "sensitivity", "specificity"]]
    for row in evaluation.decisions:
        threshold = "" if math.isnan(row.threshold) else f"{row.threshold:.3f}"
        points.append([row.class_name, row.point, threshold, *(str(row.values[n]) for n in points[0][3:])])
    lines = [f"On {len(evaluation.cases)} {side} images{chosen}:", "", *_left(markdown_table(rows)), ""]
    lines += [*_left(markdown_table(points)), "", f"Thresholds: {evaluation.how_chosen}."]
    return [*lines, *(f"- {note}" for note in notes_on(evaluation)), ""]


def _failures(side: str, evaluation: ClassificationEvaluation) -> list[str]:
    wrong = [i for i in evaluation.worst(NUM_WORST) if evaluation.truth[i] != evaluation.predicted[i]]
    if not wrong:
        return [f"Of the {side} images none was given a wrong class.", ""]
    rows = [["image", "is", "its probability", "taken for"]]
    for i in wrong:
        truth = int(evaluation.truth[i])
        share = f"{evaluation.probabilities[i, truth]:.3f}"
        rows.append(
            [evaluation.cases[i], evaluation.classes[truth], share, evaluation.classes[int(evaluation.predicted[i])]]
        )
    return [f"The worst {side} images:", "", *_left(markdown_table(rows)), ""]


def _left(lines: Sequence[str]) -> list[str]:
    return [line.replace("---:", "---") for line in lines]
