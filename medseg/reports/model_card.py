"""`model_card.md` of a run: what the model is, what it learnt from, how well it did, and what it is not for.

Everything in it is read from the run's files or counted by the training: numbers and case ids, no names of people, no
paths.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import medseg
from medseg.bundle import BundleInfo
from medseg.data.splits import Split
from medseg.data.summary import spread
from medseg.formats.atomic import whole_file
from medseg.labels import REST, Labels
from medseg.metrics.masks import State
from medseg.metrics.metric import metrics
from medseg.reports.crossvalidation import OPTIMISTIC, CrossValidation, markdown_table
from medseg.reports.evaluation import FOREGROUND, Evaluation

CARD_FILE = "model_card.md"
NUM_WORST = 5
"""Worst cases that are named."""
PLAN_LEFT_OUT = ("intensity", "kernels")
"""Values of the plan that are too long for a card; plan.yaml has them."""
DISCLAIMER = (
    "**Research use only. Not a medical device**: nothing here is cleared for diagnosis or treatment, and no output "
    "may be used for a patient without an expert who checks every result."
)


@dataclass(frozen=True)
class Fit:
    """One training.

    Args:
        name: of the fold ("fold 0"), or "" where only one was trained.
        split: its cases.
        steps: optimizer steps done.
        minutes: minutes of the loop.
        best_dice: mean Dice of the validation that the best checkpoint comes from, on the network's grid.
        best_step: its step.
    """

    name: str
    split: Split
    steps: int
    minutes: float
    best_dice: float
    best_step: int


@dataclass(frozen=True)
class Facts:
    """What a card tells beside the bundle.

    Args:
        survey: what `Survey.to_json` gives: survey.json.
        fits: the trainings.
        settings: name → value, of what the training was set to (loss, optimizer, seed, device, …).
        evaluation: validation cases on their own grids; None if they were not predicted.
        num_weights: of one network.
        postprocessed: whether post-processing was decided on (postprocessing.md).
    """

    survey: Mapping[str, Any]
    fits: Sequence[Fit]
    settings: Mapping[str, object]
    evaluation: Evaluation | CrossValidation | None
    num_weights: int
    postprocessed: bool = False


def write_model_card(run: Path, info: BundleInfo, facts: Facts) -> Path:
    """Write `model_card.md` into a run, whole or not at all; an earlier one is replaced."""
    path = run / CARD_FILE
    with whole_file(path, ".md") as temporary:
        temporary.write_text(model_card(info, facts), encoding="utf-8")
    return path


def model_card(info: BundleInfo, facts: Facts) -> str:
    """The card as Markdown."""
    sections = {
        "What it segments": _segments(info),
        "Data": _data(info.labels, facts),
        "Plan": _plan(info),
        "Training": _training(info, facts),
        "Results": _results(facts),
        "Known failures": _failures(info.labels, facts),
        "Intended use and limits": _limits(info, facts),
        "How to predict": [
            "`medseg predict RUN SCAN -o FOLDER`, where RUN is this folder. Labels come on exactly the scan's own grid."
            + (" The mean of all folds decides." if len(facts.fits) > 1 else "")
        ],
    }
    lines = [f"# Model card: {', '.join(info.labels.foreground)}", "", DISCLAIMER]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", *text]
    return "\n".join(lines) + "\n"


def _segments(info: BundleInfo) -> list[str]:
    labels, plan = info.labels, info.plan
    kind = f"{info.modality or 'images'} in {plan.spatial_dims}D"
    channels = f"{plan.num_channels} channel{'s' * (plan.num_channels > 1)} ({', '.join(info.channels)})"
    rows = [["class", "value in files"]]
    table = labels.to_json()
    for name in labels.foreground:
        value = table[name]
        rows.append([name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)])
    if REST in table.values():
        rows.append(["", f"{REST}: every value that no other class has"])
    overlap = ["", "These are regions, and may overlap."] if labels.regions else []
    return [f"{kind}, {channels}.", *overlap, "", *markdown_table(rows)]


def _data(labels: Labels, facts: Facts) -> list[str]:
    cases = facts.survey["cases"]
    unit = "mm" if cases[0]["orientation"] else "pixel"
    modalities = Counter(str(case["modality"] or "not stated") for case in cases)
    lines = [
        f"- {len(cases)} labelled cases; modality: {', '.join(f'{m} ({n})' for m, n in modalities.most_common())}",
        *(
            f"- {fit.name + ': ' if fit.name else ''}{len(fit.split.train)} to train, {len(fit.split.val)} to validate"
            + (f", {len(fit.split.test)} set aside and not looked at" if fit.split.test else "")
            for fit in facts.fits
        ),
        f"- sizes in voxels: {spread([case['shape'] for case in cases], '{:.0f}')}",
        f"- spacings in {unit}: {spread([case['spacing_mm'] for case in cases], '{:.3g}')}",
    ]
    if facts.survey.get("quarantine"):
        lines.append(f"- {len(facts.survey['quarantine'])} cases could not be used and were left out")
    return [*lines, "", *markdown_table(_volumes(labels, cases))]


def _volumes(labels: Labels, cases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Per class: in how many cases it is, and how large it is there."""
    is_picture = not cases[0]["orientation"]
    unit = "px" if is_picture else "ml"
    rows = [["class", "cases with it", f"median volume ({unit})", "smallest", "largest"]]
    for name, parts in zip(labels.foreground, labels.parts, strict=True):
        volumes = np.array(
            [
                sum(case["label_voxels"][part] for part in parts)
                * (1 if is_picture else math.prod(case["spacing_mm"]) / 1000)
                for case in cases
            ]
        )
        present = volumes[volumes > 0]
        numbers = (np.median(present), present.min(), present.max()) if len(present) else ()
        cells = [f"{value:.4g}" for value in numbers] or ["–", "–", "–"]
        rows.append([name, f"{len(present)} of {len(cases)}", *cells])
    return rows


def _plan(info: BundleInfo) -> list[str]:
    plan = info.plan
    rows = [["value", "is", "because"]]
    for name, value in plan.to_json().items():
        if name in plan.reasons and name not in PLAN_LEFT_OUT:
            rows.append([name, json.dumps(value), plan.reasons[name]])
    return [line.replace("---:", "---") for line in markdown_table(rows)]


def _training(info: BundleInfo, facts: Facts) -> list[str]:
    versions = {"medseg": medseg.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    lines = [f"- network: {info.model['name']}, {facts.num_weights / 1e6:.3g} million weights"]
    lines += [f"- {name}: {value}" for name, value in facts.settings.items()]
    lines += [f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"]
    rows = [["training", "steps", "minutes", "best validation Dice", "at step"]]
    for fit in facts.fits:
        numbers = [str(fit.steps), f"{fit.minutes:.1f}", f"{fit.best_dice:.4f}", str(fit.best_step)]
        rows.append([fit.name or "this run", *numbers])
    return [*lines, "", *markdown_table(rows)]


def _results(facts: Facts) -> list[str]:
    if facts.evaluation is None:
        return [
            "The validation cases were not predicted on their own grids (`trainer.final_predictions=false`). The best "
            "validation Dice above is on the network's grid, of the cases that the checkpoint was chosen on."
        ]
    evaluation = _pooled(facts.evaluation)
    frame = evaluation.frame
    (hd95,) = metrics(("hd95",))
    head = ["class", "Dice mean", "SD", "median", "n", "missed", "spurious", f"HD95 median ({hd95.unit(frame)})"]
    rows = [head]
    for entry in evaluation.summary:
        if entry.class_name == FOREGROUND and len(evaluation.labels.foreground) == 1:
            continue
        dice, distance = entry.statistics["dice"], entry.statistics["hd95"]
        counts = [str(entry.counts[State.MISSED]), str(entry.counts[State.SPURIOUS])]
        numbers = [_number(dice.mean), _number(dice.std), _number(dice.median), str(dice.n), *counts]
        rows.append(
            ["mean" if entry.class_name == FOREGROUND else entry.class_name, *numbers, _number(distance.median)]
        )
    lines = [_scored_on(facts), "", *markdown_table(rows)]
    if any(entry.counts[State.MISSED] for entry in evaluation.summary):
        lines += ["", "A missed structure counts with a Dice of 0 and the diagonal of the case for its distance."]
    if isinstance(facts.evaluation, CrossValidation):
        lines += ["", "Mean Dice by fold:", "", *markdown_table(facts.evaluation.table())]
    if facts.postprocessed:
        lines += ["", "Post-processing was decided on the same cases (postprocessing.md); the scores are before it."]
    return lines


def _scored_on(facts: Facts) -> str:
    cases = len(_pooled(facts.evaluation).cases) if facts.evaluation is not None else 0
    if any(set(fit.split.train) & set(fit.split.val) for fit in facts.fits):
        return f"On {cases} cases **that it was trained on** (overfitting on purpose): this says nothing about others."
    if isinstance(facts.evaluation, CrossValidation):
        return f"On {cases} cases, each by the fold that did not train on it, on their own grids. {OPTIMISTIC}"
    return f"On the {cases} validation cases, which it did not train on, on their own grids. {OPTIMISTIC}"


def _failures(labels: Labels, facts: Facts) -> list[str]:
    lines = []
    voxels = {case["case_id"]: case["label_voxels"] for case in facts.survey["cases"]}
    for fit in facts.fits:
        for name, parts in zip(labels.foreground, labels.parts, strict=True):
            if not any(voxels[case][part] for case in fit.split.train for part in parts):
                lines.append(f"- {fit.name + ': ' if fit.name else ''}no training case has {name}: it was not learnt")
    if facts.evaluation is None:
        return [*lines, "Not looked for: the validation cases were not predicted."]
    evaluation = _pooled(facts.evaluation)
    for entry in evaluation.summary:
        if entry.class_name != FOREGROUND and entry.counts[State.MISSED]:
            present = entry.counts[State.MISSED] + entry.counts[State.PRESENT]
            lines.append(f"- {entry.class_name} was missed entirely in {entry.counts[State.MISSED]} of {present} cases")
        if entry.class_name != FOREGROUND and entry.counts[State.SPURIOUS]:
            absent = entry.counts[State.SPURIOUS] + entry.counts[State.ABSENT]
            found = entry.counts[State.SPURIOUS]
            lines.append(f"- {entry.class_name} was found in {found} of {absent} cases that do not have it")
    means = [(case, mean) for case, mean in evaluation.case_means("dice").items() if not math.isnan(mean)]
    rows = [["case", "mean Dice", "worst class", "its Dice"]]
    for case, mean in sorted(means, key=lambda item: item[1])[:NUM_WORST]:
        of_case = [r for r in evaluation.rows if r.case == case and not math.isnan(r.values["dice"])]
        worst = min(of_case, key=lambda row: row.values["dice"])
        rows.append([case, f"{mean:.3f}", worst.class_name, f"{worst.values['dice']:.3f}"])
    gap = [""] if lines else []
    return [*lines, *gap, "The worst validation cases:", "", *markdown_table(rows)]


def _limits(info: BundleInfo, facts: Facts) -> list[str]:
    spacings = spread([case["spacing_mm"] for case in facts.survey["cases"]], "{:.3g}")
    unit = "mm" if info.plan.orientation else "pixel"
    return [
        "- For research on images like those above, by people who look at the result.",
        f"- It was trained and scored on {info.modality or 'images'} with spacings of {spacings} {unit}; nothing was "
        "measured beyond that: on other scanners, sites, protocols, ages or diseases it may fail without a sign.",
        "- It looks for its classes in every scan that it is given, whatever that shows.",
        "- Who the people in the data are (age, sex, origin) is not recorded, and no group was looked at apart.",
    ]


def _pooled(evaluation: Evaluation | CrossValidation) -> Evaluation:
    return evaluation.pooled if isinstance(evaluation, CrossValidation) else evaluation


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
