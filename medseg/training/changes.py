"""The preflight of a run that goes on: its cases are all there, can all be read, and are what they were."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.data.cases import DataFolder
from medseg.data.facts import CaseInfo, ChannelStats, read_survey
from medseg.data.store import Store
from medseg.data.survey import raise_problems, survey
from medseg.errors import Code, MedsegError
from medseg.labels import Labels
from medseg.reports.progress import counting_bar
from medseg.training.experiment import DataConfig

REMEDY = "put the files back as they were, or begin a new run from its weights: trainer.initial=RUN"
CLOSE = 1e-6
"""Relative difference of numbers that are the same, computed by another processor."""
CLOSE_STDS = 0.05
"""Difference of two means, as a share of the standard deviation, within which a case is the same: means are taken from
100 000 voxels drawn at random, and another version of NumPy may draw others."""


def refuse_changes(
    folder: DataFolder,
    wanted: set[str],
    data: DataConfig,
    info: BundleInfo,
    before: Path,
    console: Console,
    store: Store,
) -> None:
    """Read every case of a run again, and compare it with what the run found when it began.

    Args:
        folder: what lies in `data.root` now.
        wanted: ids of the cases that train and validate.
        data: how they are read.
        info: what the run is.
        before: the run's survey.json; where it is gone nothing is compared.
        console: where the user reads.
        store: where what was read of unchanged files is found, and decoded cases wait to be prepared.
    Raises:
        MedsegError: all that is wrong, at once: E_MISSING for cases that are gone, E_CHANGED for other content, and
            what reading refuses.
    """
    there = tuple(case for case in folder.cases if case.case_id in wanted)
    problems: dict[str, MedsegError] = {i: error for i, error in folder.problems if i in wanted}
    gone = wanted - {case.case_id for case in there} - problems.keys()
    for case_id in gone:
        message = "the case is not in the data folder any more"
        problems[case_id] = MedsegError(Code.MISSING, message, where=case_id, remedy=REMEDY)
    if there:
        # Values that nobody declares are found in all cases together: those that the run found are asked for.
        undeclared = folder.labels is None and folder.structures is None
        declared = info.labels.to_json() if undeclared and not data.labels else data.labels
        with counting_bar(console, "reading every case again") as progress:
            found = survey(
                dataclasses.replace(folder, cases=there, problems=()),
                declared,
                regions_order=data.regions_order,
                num_threads=data.threads,
                progress=progress,
                on_bad_case="skip",
                reading=data.reading,
                store=store,
                refused=problems,
            )
        _refuse_other_labels(found.labels, info.labels)
        if before.is_file():
            for case_id, what in changed(read_survey(before), found.cases).items():
                problems[case_id] = MedsegError(
                    Code.CHANGED, f"it is not the case that the run began with: {what}", where=case_id, remedy=REMEDY
                )
    raise_problems(problems, len(wanted), can_skip=False)


def changed(before: Mapping[str, Any], now: Sequence[CaseInfo]) -> dict[str, str]:
    """Id of each case that is another than it was → what is, in words.

    Args:
        before: as `read_survey` gives it.
        now: what reading the cases again told.
    Raises:
        MedsegError: E_RUN if what the run wrote down cannot be read.
    """
    known = {case["case_id"]: case for case in before["cases"]}
    try:
        told = {info.case_id: _difference(known[info.case_id], info) for info in now if info.case_id in known}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MedsegError(
            Code.RUN,
            "what the run found in its data cannot be read",
            where="survey.json",
            got=f"{type(error).__name__}: {error}",
            remedy="delete the file: nothing is compared then",
        ) from error
    return {case_id: what for case_id, what in told.items() if what is not None}


def _difference(before: Mapping[str, Any], now: CaseInfo) -> str | None:
    """The first of its facts that is another; None where none is."""
    for name, what in (
        ("shape", "shape"),
        ("orientation", "orientation"),
        ("label_voxels", "voxels of the classes"),
        ("ignored_voxels", "ignored voxels"),
        ("nonzero_shape", "box of nonzero voxels"),
    ):
        was, is_ = before[name], getattr(now, name)
        if (tuple(was) if isinstance(is_, tuple) else was) != is_:
            return f"{what} {is_}, and it was {was}"
    if not _close(before["spacing_mm"], now.spacing_mm):
        return f"spacing {now.spacing_mm}, and it was {before['spacing_mm']}"
    for channel, (was, stats) in enumerate(zip(before["intensity"], now.intensity, strict=True)):
        if not _same(was, stats):
            return f"intensities of channel {channel}"
    return None


def _same(was: Mapping[str, Any], now: ChannelStats) -> bool:
    ends = _close((was["minimum"], was["maximum"]), (now.minimum, now.maximum))
    spread = max(float(was["std"]), now.std)
    return ends and abs(float(was["mean"]) - now.mean) <= max(CLOSE_STDS * spread, CLOSE * abs(now.mean))


def _close(first: Sequence[Any], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(float(a), b, rel_tol=CLOSE) for a, b in zip(first, second, strict=True)
    )


def _refuse_other_labels(now: Labels, before: Labels) -> None:
    if now != before:
        raise MedsegError(
            Code.CHANGED,
            "the classes are not those that the run began with",
            where="data.labels, or the data's own table of labels",
            expected=before.to_json(),
            got=now.to_json(),
            remedy=REMEDY,
        )
