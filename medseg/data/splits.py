"""Which cases train and which validate: by patient or by block of ids, seeded, written down.

Cases of one patient are never on both sides. Where nothing tells the patients, neighbours in the sorted ids stay
together, because numbers are usually given out one after the other: two sides of one person, slices of one stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg.data.layouts import Case, name_some
from medseg.errors import Code, MedsegError, nearest
from medseg.formats.atomic import whole_file

BIDS_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)(?:_.*)?")
"""BIDS file names begin with the person: `sub-12_ses-2_T1w`."""


@dataclass(frozen=True)
class SplitConfig:
    """How cases are divided into training and validation."""

    fold: int = 0
    """Which fold validates; the others train."""
    num_folds: int = 5
    """Number of folds: one in this many cases validates."""
    by: Literal["auto", "patient", "block"] = "auto"
    """What stays together: patients, blocks of neighbouring ids, or patients where they are known ("auto")."""
    validation: tuple[str, ...] | None = None
    """Ids of the validation cases, or patterns such as "site2_*"; null for folds."""

    def __post_init__(self) -> None:
        if self.num_folds < 2 or not 0 <= self.fold < self.num_folds:
            raise MedsegError(
                Code.CONFIG,
                "there is no such fold",
                where="data.split.fold",
                expected="num_folds of at least 2, and a fold from 0 to num_folds - 1",
                got=f"fold {self.fold} of {self.num_folds}",
            )


@dataclass(frozen=True)
class Split:
    """Ids of the cases on each side, sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    """Cases that a manifest sets aside: never looked at in training."""
    rule: str
    """How they were divided, in words."""


def make_split(cases: Sequence[Case], config: SplitConfig, seed: int) -> Split:
    """Divide cases into training, validation and test.

    The manifest's split column decides; where it has none, `config.validation`; else folds of patients or blocks.
    A manifest that marks only test cases sets these aside, and the rest is divided.

    Args:
        cases: as found.
        config: the user's choice.
        seed: of the shuffling.
    Raises:
        MedsegError: E_LEAK if a patient would be on two sides, E_NO_CASES if a side is empty, E_CONFIG for a
            split column with gaps, an id that matches no case, or unknown patients where they are asked for.
    """
    test = sorted(case.case_id for case in cases if case.split == "test")
    rest = sorted((case for case in cases if case.split != "test"), key=lambda case: case.case_id)
    patients = patients_of(cases)
    if any(case.split is not None for case in rest):
        val, rule = _by_manifest(rest), "the manifest's split column"
    elif config.validation is not None:
        val, rule = _by_pattern(rest, config.validation), "the ids in data.split.validation"
    else:
        val, rule = _by_fold(rest, patients, config, seed)
    if test and "manifest" not in rule:
        rule += "; test cases by the manifest's split column"
    split = Split(
        tuple(case.case_id for case in rest if case.case_id not in val), tuple(sorted(val)), tuple(test), rule
    )
    _refuse_empty(split, len(rest), config)
    _refuse_leak(split, patients)
    return split


def patients_of(cases: Sequence[Case]) -> dict[str, str]:
    """Case id → patient, for the cases whose patient is known.

    A manifest's patient column tells; without one, BIDS names (`sub-XX_…`) do, if all ids have that form.
    """
    known = {case.case_id: case.patient for case in cases if case.patient is not None}
    subjects = {case.case_id: m[1] for case in cases if (m := BIDS_SUBJECT.fullmatch(case.case_id))}
    return known if known or len(subjects) < len(cases) else subjects


def write_split(path: Path, split: Split) -> None:
    """Write a split as JSON, whole or not at all."""
    with whole_file(path, ".json") as temporary:
        temporary.write_text(json.dumps(asdict(split), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_split(path: Path) -> Split:
    """Read what `write_split` wrote.

    Raises:
        MedsegError: E_MISSING if the file is not there, E_CONFIG if it is no split, E_LEAK if a case is on two sides.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MedsegError(Code.MISSING, "the split is not there", where=path.name) from error
    except ValueError as error:
        raise MedsegError(Code.CONFIG, f"not valid JSON: {error}", where=path.name) from error
    if not _is_split(table):
        raise MedsegError(
            Code.CONFIG,
            "not a split",
            where=path.name,
            expected='{"train": [ids], "val": [ids], "test": [ids], "rule": …}',
        )
    split = Split(tuple(table["train"]), tuple(table["val"]), tuple(table["test"]), table["rule"])
    _refuse_leak(split, {case_id: case_id for side in (split.train, split.val, split.test) for case_id in side})
    return split


def _is_split(table: Any) -> bool:
    if not isinstance(table, Mapping) or not isinstance(table.get("rule"), str):
        return False
    sides = [table.get(side) for side in ("train", "val", "test")]
    return all(isinstance(side, list) and all(isinstance(i, str) for i in side) for side in sides)


def _by_manifest(cases: Sequence[Case]) -> set[str]:
    unmarked = [case.case_id for case in cases if case.split is None]
    if unmarked:
        raise MedsegError(
            Code.CONFIG,
            f"{len(unmarked)} cases have no split where others have one",
            where=name_some(unmarked),
            expected="train, val or test for every case, or only test cases marked",
        )
    return {case.case_id for case in cases if case.split == "val"}


def _by_pattern(cases: Sequence[Case], patterns: Sequence[str]) -> set[str]:
    """Cases that a pattern names; an id itself comes first, because ids may hold brackets."""
    ids = [case.case_id for case in cases]
    chosen: set[str] = set()
    for pattern in patterns:
        found = {pattern} if pattern in ids else {i for i in ids if fnmatchcase(i, pattern)}
        if not found:
            raise MedsegError(
                Code.CONFIG,
                f"no case is named {pattern!r}",
                where="data.split.validation",
                remedy=nearest(pattern, ids) if len(ids) <= 50 else f"ids look like {ids[0]!r}",
            )
        chosen |= found
    return chosen


def _by_fold(
    cases: Sequence[Case], patients: Mapping[str, str], config: SplitConfig, seed: int
) -> tuple[set[str], str]:
    unknown = [case.case_id for case in cases if case.case_id not in patients]
    if config.by == "patient" and unknown:
        raise MedsegError(
            Code.CONFIG,
            f"the patient of {len(unknown)} cases is not known",
            where=name_some(unknown),
            remedy="add a patient column to a manifest, or set data.split.by=block",
        )
    ids = [case.case_id for case in cases]
    which = f"fold {config.fold} of {config.num_folds}, seed {seed}"
    random = np.random.default_rng(seed)
    if config.by != "block" and not unknown:
        people = sorted({patients[i] for i in ids})
        several = "1 patient" if len(people) == 1 else f"{len(people)} patients"
        order = [people[k] for k in random.permutation(len(people))]
        chosen = set(order[config.fold :: config.num_folds])
        return {i for i in ids if patients[i] in chosen}, f"by patient ({several} shuffled, {which})"
    blocks = np.array_split(np.arange(len(ids)), min(config.num_folds, max(len(ids), 1)))
    order_of_blocks = random.permutation(len(blocks))
    block = blocks[order_of_blocks[config.fold]] if config.fold < len(blocks) else []
    why = "neighbours are often one person or one stack"
    return {ids[k] for k in block}, f"by block of the sorted ids, because {why} ({which})"


def _refuse_empty(split: Split, num_cases: int, config: SplitConfig) -> None:
    for name, side in (("training", split.train), ("validation", split.val)):
        if side:
            continue
        if "fold" in split.rule:
            remedy = (
                f"folds need at least two patients (or cases), and data.split.fold={config.fold} must be less than "
                "their number; or name the validation cases: data.split.validation=[id, …]"
            )
        elif config.validation is not None and "manifest's split column" not in split.rule.partition(";")[0]:
            remedy = "data.split.validation must name some of the cases, and not all"
        else:
            remedy = f"mark {name} cases in the manifest"
        raise MedsegError(
            Code.NO_CASES,
            f"there is no {name} case",
            where="data.split",
            got=f"{num_cases} {'case' if num_cases == 1 else 'cases'}, {len(split.test)} more for test, divided by "
            f"{split.rule.removeprefix('by ')}",
            remedy=remedy,
        )


def _refuse_leak(split: Split, patients: Mapping[str, str]) -> None:
    sides: dict[str, set[str]] = {}
    for name, side in (("train", split.train), ("val", split.val), ("test", split.test)):
        for case_id in side:
            if case_id in patients:
                sides.setdefault(patients[case_id], set()).add(name)
    leaks = sorted(patient for patient, on in sides.items() if len(on) > 1)
    if leaks:
        both = [case_id for case_id, patient in patients.items() if patient == leaks[0]]
        raise MedsegError(
            Code.LEAK,
            f"{len(leaks)} patients are on two sides of the split",
            where=name_some(leaks),
            expected="all cases of a patient in one of train, val, test",
            got=f"{leaks[0]}: cases {name_some(both)} in {', '.join(sorted(sides[leaks[0]]))}",
            remedy="correct the split column or data.split.validation, or set data.split.by=patient",
        )
