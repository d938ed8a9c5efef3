"""The preflight of a run that goes on: its cases are all there, can all be read, and are what they were."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.data.cases import Case, DataFolder
from medseg.data.facts import CaseInfo, ChannelStats, read_survey
from medseg.data.store import Store, case_digest
from medseg.data.survey import MAX_REMEDIES, survey
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.annotations import DrawnLabel
from medseg.labels import Labels
from medseg.reports.progress import counting_bar
from medseg.training.experiment import DataConfig

DIGESTS = "files_sha256"
"""In a run's survey.json: id of each case → `digests_of` its files. Beside the facts of the cases, not among them: the
fingerprint of the data in a bundle is made of these."""
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
    """Read every case of a run again, and compare its files and what is in them with what the run began with.

    Args:
        folder: what lies in `data.root` now.
        wanted: ids of the cases that train and validate.
        data: how they are read.
        info: what the run is.
        before: the run's survey.json; where it is gone nothing is compared.
        console: where the user reads.
        store: where what was read of unchanged files is found, and decoded cases wait to be prepared.
    Raises:
        MedsegError: all that is wrong, at once: E_MISSING for cases that are gone, E_CHANGED for other content or
            classes, and what reading refuses.
    """
    classes: MedsegError | None = None
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
        infos: tuple[CaseInfo, ...] = ()
        try:
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
            infos, classes = found.cases, _other_labels(found.labels, info.labels)
        except MedsegError as error:
            if not all(case.case_id in problems for case in there):  # else it says what `problems` says
                classes = error
        if before.is_file():
            good = {told.case_id for told in infos}
            digests = digests_of((case for case in there if case.case_id in good), store)
            for case_id, what in changed(read_survey(before), infos, digests, same_classes=classes is None).items():
                problems[case_id] = MedsegError(
                    Code.CHANGED, f"it is not the case that the run began with: {what}", where=case_id, remedy=REMEDY
                )
    _refuse(classes, problems, len(wanted))


def digests_of(cases: Iterable[Case], store: Store) -> dict[str, str]:
    """Id of each case → SHA-256 of the bytes of its files; "" where one of them cannot be read.

    Args:
        cases: which.
        store: knows those of the files that it read already.
    """

    def digest(case: Case) -> str:
        try:
            if not isinstance(case.label, DrawnLabel):
                return store.digest(case)
            # The store's also follows from what structures mean: that are the classes, which are compared as such.
            return case_digest(dataclasses.replace(case, label=dataclasses.replace(case.label, classes=())))
        except OSError:
            return ""

    cases = tuple(cases)
    with ThreadPoolExecutor() as pool:
        return dict(zip((case.case_id for case in cases), pool.map(digest, cases), strict=True))


def changed(
    before: Mapping[str, Any],
    now: Sequence[CaseInfo],
    digests: Mapping[str, str] | None = None,
    *,
    same_classes: bool = True,
) -> dict[str, str]:
    """Id of each case that is another than it was → what is, in words.

    Args:
        before: as `read_survey` gives it.
        now: what reading the cases again told.
        digests: of their files, now.
        same_classes: whether what is counted by classes, and taken from foreground, can be compared.
    Raises:
        MedsegError: E_RUN if what the run wrote down cannot be read.
    """
    known = {case["case_id"]: case for case in before["cases"]}
    told: dict[str, str | None] = {}
    try:
        files = dict(before.get(DIGESTS) or {})
        for info in now:
            if info.case_id in known:
                told[info.case_id] = _difference(known[info.case_id], info, same_classes=same_classes)
            if told.get(info.case_id) is None and (was := files.get(info.case_id)):
                is_same = digests is None or digests.get(info.case_id, was) == was
                told[info.case_id] = None if is_same else "its files are others, byte for byte"
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MedsegError(
            Code.RUN,
            "what the run found in its data cannot be read",
            where="survey.json",
            got=f"{type(error).__name__}: {error}",
            remedy="delete the file: nothing is compared then",
        ) from error
    return {case_id: what for case_id, what in told.items() if what is not None}


def _difference(before: Mapping[str, Any], now: CaseInfo, *, same_classes: bool) -> str | None:
    """The first of its facts that is another; None where none is."""
    counted = (("label_voxels", "voxels of the classes"), ("ignored_voxels", "ignored voxels"))
    for name, what in (
        ("shape", "shape"),
        ("orientation", "orientation"),
        *(counted if same_classes else ()),
        ("nonzero_shape", "box of nonzero voxels"),
    ):
        was, is_ = before[name], getattr(now, name)
        if (tuple(was) if isinstance(is_, tuple) else was) != is_:
            return f"{what} {is_}, and it was {was}"
    if not _close(before["spacing_mm"], now.spacing_mm):
        return f"spacing {now.spacing_mm}, and it was {before['spacing_mm']}"
    for channel, (was, stats) in enumerate(zip(before["intensity"], now.intensity, strict=True)):
        if same_classes and not _same(was, stats):
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


def _other_labels(now: Labels, before: Labels) -> MedsegError | None:
    if now == before:
        return None
    return MedsegError(
        Code.CHANGED,
        "the classes are not those that the run began with",
        where="data.labels, or the data's own table of labels",
        expected=before.to_json(),
        got=now.to_json(),
        remedy=REMEDY,
    )


def _refuse(classes: MedsegError | None, cases: Mapping[str, MedsegError], num_cases: int) -> None:
    """Raise the one error, or all in a table: all, for no other verb knows what a run began with."""
    ordered = [cases[case_id] for case_id in sorted(cases)]
    errors = ordered if classes is None else [classes, *ordered]
    if len(errors) < 2:
        for error in errors:
            raise error
        return
    table = [f"{case_id}: {cases[case_id].code} {cases[case_id].message}" for case_id in sorted(cases)]
    if classes is not None:
        sides = [str(side) for side in (classes.got, classes.expected) if side is not None]
        table.insert(0, f"all cases: {classes.code} {classes.message}: {', expected '.join(sides)}")
    remedies = dict.fromkeys(error.remedy for error in errors if error.remedy)
    raise MedsegError(
        errors[0].code,
        f"{len(cases)} of {num_cases} cases cannot be used",
        where="data.root",
        expected="the cases that the run began with",
        got="\n    ".join(["", *table]),
        remedy="; ".join([*remedies][:MAX_REMEDIES]) or None,
    )
