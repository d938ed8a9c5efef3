"""Weights of the classes in the loss, from how often they occur."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from medseg.data.facts import read_survey
from medseg.errors import Code, MedsegError
from medseg.labels import Labels

LARGEST_WEIGHT = 10.0
"""Most that a rare class weighs against the most frequent: a class of a few voxels would else outweigh all others."""


def with_class_weights(
    settings: Mapping[str, Any], labels: Labels, survey: Path, case_ids: Collection[str]
) -> tuple[dict[str, Any], str | None]:
    """The settings of the loss with numbers in place of `class_weights: auto`.

    Args:
        settings: of the loss.
        labels: the classes.
        survey: the run's survey.json.
        case_ids: the cases that train.
    Returns:
        The settings, and what was chosen and why; None where the user chose.
    Raises:
        MedsegError: E_CONFIG for another number of weights than classes; E_RUN for a survey that cannot be used.
    """
    settings = dict(settings)
    weights = settings.get("class_weights")
    if weights is None or labels.regions:  # regions refuse them by themselves
        return settings, None
    if weights != "auto":
        if len(weights) != labels.num_classes:
            raise MedsegError(
                Code.CONFIG,
                "each class needs a weight, the background first",
                where="loss.class_weights",
                expected=f"{labels.num_classes} numbers ({', '.join(labels.names)}), or auto",
                got=list(weights),
            )
        return settings, None
    cases = read_survey(survey)["cases"]
    counts = [case["label_voxels"] for case in cases if case["case_id"] in case_ids]
    if {len(of_case) for of_case in counts} != {labels.num_classes}:
        raise MedsegError(
            Code.RUN,
            "the run's survey does not count the classes of its model",
            where=survey.name,
            expected=f"{labels.num_classes} numbers for each case that trains",
            remedy="state the weights: loss.class_weights=[…]",
        )
    totals = [sum(of_class) for of_class in zip(*counts, strict=True)]
    settings["class_weights"] = tuple(min(max(totals) / max(n, 1), LARGEST_WEIGHT) for n in totals)
    each = ", ".join(f"{name} {w:.3g}" for name, w in zip(labels.names, settings["class_weights"], strict=True))
    why = f"as often as the most frequent class has more voxels in training, at most {LARGEST_WEIGHT:g}"
    return settings, f"class weights of the loss: {each} ({why})"
