"""Cases that are unlike the rest: told before the training, because one wrong label costs more than many steps.

Nothing is left out for it: an unusual case may be the one that matters. A number is far from the others where it is
more than `DEVIATIONS` robust standard deviations (1.4826 times the median absolute deviation) from their median, and
differs from it by more than a factor (`FACTORS`): sets whose cases are all alike do not report trifles.
Orientations may differ: cases are compared along anatomical axes. Where more than `GROUP` of the cases are far, they
are a group of their own, another scanner say, and get one row together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.data.facts import Anomaly, CaseInfo
from medseg.data.layouts import name_some
from medseg.labels import UNLABELLED, Labels
from medseg.volume import MODEL_ORIENTATION

DEVIATIONS = 5.0
"""Robust standard deviations beyond which a number is far from the others."""
MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution, in units of its median absolute deviation."""
FACTORS = {"spacing": 1.5, "extent": 2.0, "volume": 3.0}
"""Least factor between a number and the median that is worth saying."""
LEAST_SHIFT = 0.5
"""Least distance of an intensity from the median, as a share of the spread of intensities in the data set."""
NEARLY_ALL = 0.9
"""A class that so large a share of the other cases has is missed where it is not."""
GROUP = 0.1
"""Share of the cases beyond which those that are far in the same way are told in one row."""
FEWEST_CASES = 5
"""With fewer cases nothing is compared."""

Finding = tuple[str, dict[str, str]]
"""In what cases are unlike the rest, and for each of them (id) how."""


def find_anomalies(cases: Sequence[CaseInfo], labels: Labels, channel_names: Sequence[str]) -> tuple[Anomaly, ...]:
    """The cases that are unlike the rest, with reasons in words, in their order.

    Args:
        cases: all that were read.
        labels: their classes.
        channel_names: of the images.
    """
    reasons: dict[str, list[str]] = {case.case_id: [] for case in cases}
    groups: list[Anomaly] = []
    findings = [] if labels == UNLABELLED else _labels(cases, labels)
    if len(cases) >= FEWEST_CASES:
        findings += _geometry(cases) + _intensities(cases, channel_names)
    for what, texts in findings:
        if len(texts) > max(GROUP * len(cases), 1):
            case_id, text = next(iter(texts.items()))
            groups.append(Anomaly(f"{len(texts)} cases", (f"{what}: {name_some(list(texts))}; {case_id}: {text}",)))
        else:
            for case_id, text in texts.items():
                reasons[case_id].append(text)
    return (*groups, *(Anomaly(case_id, tuple(said)) for case_id, said in reasons.items() if said))


def _labels(cases: Sequence[CaseInfo], labels: Labels) -> list[Finding]:
    found: list[Finding] = []
    empty = {case.case_id: "the label is empty" for case in cases if not any(case.label_voxels[1:])}
    found.append(("the label is empty", empty))
    for name, parts in zip(labels.foreground, labels.parts, strict=True):
        voxels = np.array([sum(case.label_voxels[part] for part in parts) for case in cases], dtype=np.float64)
        ml = voxels * [math.prod(case.spacing_mm) / 1000 for case in cases]
        has = voxels > 0
        others = has.sum() / max(len(cases) - 1, 1)
        if others >= NEARLY_ALL and len(cases) >= FEWEST_CASES:
            text = f"{name} is missing, which {others:.0%} of the others have"
            without = [case for case, present in zip(cases, has, strict=True) if not present]
            found.append((f"{name} is missing", {c.case_id: text for c in without if c.case_id not in empty}))
        if has.sum() >= FEWEST_CASES:
            unit = "ml" if cases[0].orientation else "thousand pixels"
            of_cases = [case for case, present in zip(cases, has, strict=True) if present]
            texts = {
                of_cases[index].case_id: f"{name} has {ml[has][index]:.3g} {unit}, in the median case "
                f"{np.median(ml[has]):.3g}"
                for index in far_by_factor(ml[has], FACTORS["volume"])
            }
            found.append((f"unusual volume of {name}", texts))
    return found


def _geometry(cases: Sequence[CaseInfo]) -> list[Finding]:
    found: list[Finding] = []
    axes = [case.axes_along(MODEL_ORIENTATION) for case in cases]
    spacings = np.array([[c.spacing_mm[a] for a in order] for c, order in zip(cases, axes, strict=True)])
    shapes = np.array([[c.shape[a] for a in order] for c, order in zip(cases, axes, strict=True)])
    is_picture = not cases[0].orientation
    names = ("rows", "columns") if is_picture else ("head to foot", "front to back", "side to side")
    unit = "pixels" if is_picture else "mm"
    for axis, name in enumerate(names):
        for kind, what, values in (
            ("spacing", "voxels of", spacings[:, axis]),
            ("extent", "a field of view of", (spacings * shapes)[:, axis]),
        ):
            texts = {
                cases[i].case_id: f"{what} {values[i]:.3g} {unit} ({name}), the median is {np.median(values):.3g}"
                for i in far_by_factor(values, FACTORS[kind])
            }
            found.append((f"unusual {kind}, {name}", texts))
    return found


def _intensities(cases: Sequence[CaseInfo], channel_names: Sequence[str]) -> list[Finding]:
    found: list[Finding] = []
    cases = [case for case in cases if case.intensity[0].num_foreground]  # of others they are those of the whole image
    if len(cases) < FEWEST_CASES:
        return found
    for channel, name in enumerate(channel_names):
        middles = np.array([case.intensity[channel].p50 for case in cases])
        spread = float(np.median([c.intensity[channel].p99_5 - c.intensity[channel].p00_5 for c in cases]))
        distance = np.abs(middles - np.median(middles))
        far = (distance > DEVIATIONS * _deviation(middles)) & (distance > LEAST_SHIFT * spread)
        texts = {
            cases[i].case_id: f"the median intensity of its structures in {name} is {middles[i]:.4g}, that of the "
            f"median case {np.median(middles):.4g}"
            for i in np.flatnonzero(far).tolist()
        }
        found.append((f"unusual intensities in {name}", texts))
    return found


def far_by_factor(values: NDArray[np.float64], factor: float) -> list[int]:
    """Places of positive numbers that are far from the others; they are compared by their ratios."""
    logs = np.log(values)
    distance = np.abs(logs - np.median(logs))
    return [int(i) for i in np.flatnonzero((distance > DEVIATIONS * _deviation(logs)) & (distance > math.log(factor)))]


def _deviation(values: NDArray[np.float64]) -> float:
    """Robust standard deviation."""
    return MAD_TO_DEVIATION * float(np.median(np.abs(values - np.median(values))))
