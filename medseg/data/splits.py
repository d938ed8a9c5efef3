"""Which cases train and which validate: by patient or by block of ids, stratified, seeded, written down.

Cases of one patient are never on both sides. Where nothing tells the patients, neighbours in the sorted ids stay
together, because numbers are usually given out one after the other: two sides of one person, slices of one stack. Each
border between blocks may part such a pair, so blocks are as large as they can be: one per fold, and smaller ones only
where a class (or a stratum of a manifest) would be absent from a fold otherwise. Where some patients are known, blocks
that share one are one block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from medseg.data.blocks import folds_of_blocks
from medseg.data.layouts import Case, name_some
from medseg.data.stratify import Traits, deal
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError, nearest
from medseg.formats.atomic import whole_file

SPLIT_FILE = "split.json"
"""Which cases train and validate, in a run's folder."""
OVERFITTING = "overfitting"
"""The rule of a split begins with it where the same cases train and validate."""
BIDS_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)(?:_.*)?")
"""BIDS file names begin with the person: `sub-12_ses-2_T1w`."""


@dataclass(frozen=True)
class SplitConfig:
    """How cases are divided into training and validation; `fold` and `folds` at the top say which folds are trained."""

    num_folds: int = 5
    """Number of folds: one in this many cases validates."""
    by: Literal["auto", "patient", "block"] = "auto"
    """What stays together: patients, blocks of neighbouring ids, or patients where they are known ("auto"; where only
    some are, blocks that part none of these)."""
    stratify: bool = True
    """Give each fold a like share of the classes, of their volumes, and of a manifest's strata (its column `stratum`
    or `site`)."""
    validation: tuple[str, ...] | None = None
    """Ids of the validation cases, or patterns such as "site2_*"; null for folds."""
    file: str | None = None
    """A JSON file that states the split: a run's split.json, or the splits_final.json of nnU-Net or of a run with
    folds (a list of {train, val}), of which `fold` takes one."""

    def __post_init__(self) -> None:
        if self.num_folds < 2:
            raise MedsegError(
                Code.CONFIG,
                "there are no folds of less than two",
                where="data.split.num_folds",
                expected="at least 2",
                got=self.num_folds,
            )
        if self.file is not None and self.validation is not None:
            raise MedsegError(
                Code.CONFIG,
                "the split is stated twice",
                where="data.split.validation",
                got="data.split.file as well",
                remedy="set one of the two",
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


def make_split(
    cases: Sequence[Case],
    config: SplitConfig,
    seed: int,
    *,
    fold: int = 0,
    volumes: Mapping[str, Sequence[float]] | None = None,
    bad: Collection[str] = (),
) -> Split:
    """Divide cases into training, validation and test.

    `config.file` decides; without one, the manifest's split column; where that is empty, `config.validation`; else
    folds of patients or blocks. A manifest that marks only test cases sets these aside, and the rest is divided.

    Args:
        cases: as found.
        config: the user's choice.
        seed: of the shuffling.
        fold: which fold validates.
        volumes: case id → volume of each foreground class, in any one unit; what folds are balanced over.
        bad: ids of cases that cannot be used: they are on no side.
    Raises:
        MedsegError: E_LEAK if a patient would be on two sides, E_NO_CASES if a side is empty, E_CONFIG for a
            split column with gaps, a fold that there is not, an id that matches no case, or unknown patients where
            they are asked for; E_MISSING for ids of a file that are not there.
    """
    test = sorted(case.case_id for case in cases if case.split == "test")
    rest = usable(cases, config)
    refuse_fold(fold, config)
    patients = patients_of(cases)
    train: set[str] | None = None
    if config.file is not None:
        train, val, rule = _by_file(cases, config, fold)
    elif any(case.split is not None for case in rest):
        val, rule = _by_manifest(rest), "the manifest's split column"
    elif config.validation is not None:
        val, rule = _by_pattern(rest, config.validation), "the ids in data.split.validation"
    else:
        strata = {case.case_id: case.stratum for case in rest if case.stratum}
        traits = Traits(volumes or {}, strata) if config.stratify else Traits()
        good = [case for case in rest if case.case_id not in bad]
        val, rule = _by_fold(good, patients, traits, config, seed, fold)
    if test and "manifest" not in rule:
        rule += "; test cases by the manifest's split column"
    if train is None:
        train = {case.case_id for case in rest} - val
    split = Split(tuple(sorted(train.difference(bad))), tuple(sorted(val.difference(bad))), tuple(test), rule)
    _refuse_empty(split, len(rest), config, fold, num_bad=len(set(bad)))
    _refuse_leak(split, patients)
    return split


def usable(cases: Sequence[Case], config: SplitConfig) -> list[Case]:
    """The cases that may train or validate, sorted by id: not set aside as test, and named where a file names them.

    Raises:
        MedsegError: as `read_splits`.
    """
    rest = sorted((case for case in cases if case.split != "test"), key=lambda case: case.case_id)
    if config.file is None:
        return rest
    named = {i for split in read_splits(Path(config.file)) for i in (*split.train, *split.val)}
    return [case for case in rest if case.case_id in named]


def refuse_fold(fold: int, config: SplitConfig) -> None:
    """Refuse a fold that there is not.

    Raises:
        MedsegError: E_CONFIG.
    """
    count = 1 if config.validation is not None else num_folds(config)
    if not 0 <= fold < count:
        raise MedsegError(
            Code.CONFIG,
            "there is no such fold",
            where="fold",
            expected=f"0 to {count - 1}" if count > 1 else "0: the split is stated, not made of folds",
            got=fold,
            remedy=None if config.file or config.validation else "set data.split.num_folds for another number of folds",
        )


def num_folds(config: SplitConfig) -> int:
    """How many folds there are: those of the file, where one is named.

    Raises:
        MedsegError: as `read_splits`.
    """
    return config.num_folds if config.file is None else len(read_splits(Path(config.file)))


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
    return _parsed(_read_json(path), path.name, '{"train": [ids], "val": [ids], "test": [ids], "rule": …}', whole=True)


def read_splits(path: Path) -> list[Split]:
    """Read the splits that a file states: one (`write_split`), or one for each fold (nnU-Net's splits_final.json).

    Raises:
        MedsegError: as `read_split`.
    """
    table = _read_json(path)
    expected = 'a list of {"train": [ids], "val": [ids]}, or one of these'
    rows = table if isinstance(table, list) and table else [table]
    return [_parsed(row, path.name, expected, whole=False) for row in rows]


def write_splits(path: Path, splits: Sequence[Split]) -> None:
    """Write the splits of several folds in the form of nnU-Net's splits_final.json, whole or not at all."""
    table = [{"train": list(split.train), "val": list(split.val)} for split in splits]
    with whole_file(path, ".json") as temporary:
        temporary.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MedsegError(Code.MISSING, "the split is not there", where=path.name) from error
    except (ValueError, OSError) as error:
        raise MedsegError(Code.CONFIG, f"not valid JSON: {error}", where=path.name) from error


def _parsed(table: Any, where: str, expected: str, *, whole: bool) -> Split:
    """A split from its JSON; `whole`: with test cases and the rule, as `write_split` writes them."""
    if not _is_split(table, whole=whole):
        raise MedsegError(Code.CONFIG, "not a split", where=where, expected=expected)
    split = Split(
        tuple(table["train"]), tuple(table["val"]), tuple(table.get("test", ())), str(table.get("rule", "as given"))
    )
    _refuse_leak(split, {case_id: case_id for side in (split.train, split.val, split.test) for case_id in side})
    return split


def _is_split(table: Any, *, whole: bool) -> bool:
    if not isinstance(table, Mapping) or not (isinstance(table.get("rule"), str) or not whole):
        return False
    sides = [table.get(side, None if whole or side != "test" else []) for side in ("train", "val", "test")]
    return all(isinstance(side, list) and all(isinstance(i, str) for i in side) for side in sides)


def _by_file(cases: Sequence[Case], config: SplitConfig, fold: int) -> tuple[set[str], set[str], str]:
    """Both sides as a file states them; cases that it does not name are on none."""
    path = Path(str(config.file))
    splits = read_splits(path)
    split = splits[fold]
    known = {case.case_id: case.split for case in cases}
    absent = [i for i in (*split.train, *split.val) if i not in known]
    if absent:
        raise MedsegError(
            Code.MISSING,
            f"{len(absent)} case(s) of the split are not in the data folder",
            where=f"{path.name}: {name_some(absent)}",
            remedy="was the split made of other data? the folder's ids look like " + repr(min(known, default="")),
        )
    aside = [i for i in (*split.train, *split.val) if known[i] == "test"]
    if aside:
        raise MedsegError(
            Code.LEAK,
            f"{len(aside)} case(s) of the split are set aside for test by the manifest",
            where=f"{path.name}: {name_some(aside)}",
            remedy="correct the manifest's split column, or the file",
        )
    which = f", fold {fold} of {len(splits)}" if len(splits) > 1 else ""
    return set(split.train), set(split.val), f"as {path.name} states{which}"


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
    cases: Sequence[Case], patients: Mapping[str, str], traits: Traits, config: SplitConfig, seed: int, fold: int
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
    which = f"fold {fold} of {config.num_folds}, seed {seed}"
    balanced = "balanced by classes and volumes" if traits.volumes else ""
    balanced += (" and strata" if balanced else "balanced by strata") if traits.strata else ""
    if config.by != "block" and not unknown:
        # In the order of their first cases: names of patients from DICOM are digests that differ in each process.
        of_patient: dict[str, list[str]] = {}
        for case_id in ids:
            of_patient.setdefault(patients[case_id], []).append(case_id)
        several = "1 patient" if len(of_patient) == 1 else f"{len(of_patient)} patients"
        folds, _ = deal(list(of_patient.values()), traits, config.num_folds, seed)
        how = f"shuffled, {balanced}" if balanced else "shuffled"
        return set(folds[fold]), f"by patient ({several} {how}, {which})"
    known = {} if config.by == "block" else patients
    folds, num_blocks = folds_of_blocks(ids, known, traits, config.num_folds, seed)
    why = "neighbours are often one person or one stack"
    if known:
        why = f"the patient of {len(unknown)} cases is not known and {why}; known patients stay together"
    if num_blocks > config.num_folds:
        which = f"{num_blocks} blocks, {balanced}, {which}"
    return set(folds[fold]), f"by block of the sorted ids, because {why} ({which})"


def _refuse_empty(split: Split, num_cases: int, config: SplitConfig, fold: int, *, num_bad: int) -> None:
    for name, side in (("training", split.train), ("validation", split.val)):
        if side:
            continue
        if config.file is not None:
            remedy = f"name {name} cases in data.split.file"
        elif "fold" in split.rule:
            remedy = (
                f"folds need at least two patients (or cases), and fold={fold} must be less than "
                "their number; set data.split.num_folds, or name the validation cases: data.split.validation=[id, …]"
            )
        elif config.validation is not None and "manifest's split column" not in split.rule.partition(";")[0]:
            remedy = "data.split.validation must name some of the cases, and not all"
        else:
            remedy = f"mark {name} cases in the manifest"
        if num_bad:
            remedy = f"repair the bad cases (data.on_bad_case=error lists what is wrong with each), or {remedy}"
        left_out = f", {num_bad} of them bad and left out" if num_bad else ""
        raise MedsegError(
            Code.NO_CASES,
            f"there is no {name} case",
            where="data.split",
            got=f"{num_cases} {'case' if num_cases == 1 else 'cases'}{left_out}, {len(split.test)} more for test, "
            f"divided by {split.rule.removeprefix('by ')}",
            remedy=remedy,
        )


def _refuse_leak(split: Split, patients: Mapping[str, str]) -> None:
    if split.rule.startswith(OVERFITTING) and split.train == split.val:  # asked for
        return
    sides: dict[str, set[str]] = {}
    for name, side in (("train", split.train), ("val", split.val), ("test", split.test)):
        for case_id in side:
            if case_id in patients:
                sides.setdefault(patients[case_id], set()).add(name)
    leaks = sorted(patient for patient, on in sides.items() if len(on) > 1)
    if leaks:
        # By their cases: what a manifest calls its patients may be their names, and this ends up in logs.
        both = [case_id for case_id, patient in patients.items() if patient == leaks[0]]
        raise MedsegError(
            Code.LEAK,
            f"{len(leaks)} patient(s) are on two sides of the split",
            where=f"the cases {name_some(both)}" + (" and those of the others" if len(leaks) > 1 else ""),
            expected="all cases of a patient in one of train, val, test",
            got=f"cases of one patient in {', '.join(sorted(sides[leaks[0]]))}",
            remedy="look for these cases in the manifest (column patient); correct the split column, data.split.file "
            "or data.split.validation; or give every case its "
            "patient in the manifest, and set data.split.by=patient",
        )
