"""Which images train, which validate and which are only scored at the end; equal images are never on two sides unseen.

Given splits are kept. Else folds are dealt with like shares of the classes. Images of one patient stay together; where
patients are not known, neighbours in the sorted names of a class do, because they are often of one person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from medseg.classification.images import ImageCase
from medseg.classification.preparation import equal_images
from medseg.classification.sight import ImageFacts
from medseg.data.layouts import Case, name_some
from medseg.data.splits import Split, SplitConfig, make_split
from medseg.errors import Code, MedsegError

BLOCKS_PER_FOLD = 2
"""Blocks of neighbours of each class and fold, where patients are not known: larger ones part fewer patients, smaller
ones make folds more alike."""


def divide(
    cases: Sequence[ImageCase], config: SplitConfig, seed: int, fold: int, facts: Mapping[str, ImageFacts]
) -> tuple[Split, list[str]]:
    """Divide images into training, validation and test.

    Args:
        cases: those that can be used.
        config: the user's choice.
        seed: of the shuffling.
        fold: which fold validates.
        facts: of each image, for its digest.
    Returns:
        The split, and lines for the user.
    Raises:
        MedsegError: as `make_split`; E_NO_CASES if all images are of one patient.
    """
    marked = {case.split for case in cases}
    # A train and a test folder, as many data sets come: folds of the first
    cases = [replace(case, split=None) if case.split == "train" and "val" not in marked else case for case in cases]
    is_given = config.file is not None or config.validation is not None or "val" in marked
    known = {case.case_id: case.patient for case in cases if case.patient is not None}
    if is_given or (config.by == "patient" and any(case.patient is None for case in cases)):
        patients, rule = known, ""  # what does not fit is refused
    else:
        rest = [case for case in cases if case.split != "test"]
        if config.by != "block" and len(rest) > 1 and len({case.patient for case in rest}) == 1:
            _refuse_one_patient(rest)
        patients, rule = _groups(rest, known, config, facts)
        of_patient = {known[i]: name for i, name in patients.items() if i in known}
        set_aside = [case for case in cases if case.split == "test" and case.patient is not None]
        patients |= {c.case_id: of_patient.get(str(c.patient), f"patient {c.patient}") for c in set_aside}
    stated = [
        Case(case.case_id, (), None, patients.get(case.case_id), case.split, case.class_name)
        for case in sorted(cases, key=lambda case: case.case_id)
    ]
    split = make_split(stated, config if not rule else replace(config, by="auto"), seed, fold=fold)
    if "val" in marked and config.file is None:
        split = replace(split, rule="as the data state it")
    if rule:
        aside = "; test images as given" if split.test else ""
        split = replace(split, rule=f"{rule} (fold {fold} of {config.num_folds}, seed {seed}){aside}")
    return split, _remarks(split, cases, facts)


def _refuse_one_patient(cases: Sequence[ImageCase]) -> None:
    """Refuse images that are all of one patient, as far as anything tells."""
    if all(case.patient is not None for case in cases):
        raise MedsegError(
            Code.NO_CASES,
            "all images are of one patient, who cannot train and validate",
            where="data.split",
            expected="at least two patients",
            got=f"{len(cases)} images with one patient (of DICOM files: one PatientID)",
            remedy="if anonymising gave all one PatientID: list the images in a CSV with a column patient, or divide "
            "them by neighbouring names: data.split.by=block",
        )


def _groups(
    cases: Sequence[ImageCase], known: Mapping[str, str], config: SplitConfig, facts: Mapping[str, ImageFacts]
) -> tuple[dict[str, str], str]:
    """What stays together, as one name for each case; and why, in words."""
    group: dict[str, str] = {}
    unknown = [case for case in cases if config.by == "block" or case.case_id not in known]
    for name in sorted({str(case.class_name) for case in unknown}):
        ids = sorted(case.case_id for case in unknown if case.class_name == name)
        num_blocks = min(len(ids), BLOCKS_PER_FOLD * config.num_folds)
        for number, case_id in enumerate(ids):
            group[case_id] = f"block {name} {number * num_blocks // len(ids)}"
    for case in cases:
        if case.case_id not in group:
            group[case.case_id] = f"patient {known[case.case_id]}"
    equal = equal_images({case.case_id: facts[case.case_id] for case in cases})
    for same in equal:  # groups that share an image become one
        kept, *others = sorted({group[i] for i in same})
        group = {i: kept if name in others else name for i, name in group.items()}
    several = f"{len(set(group.values()))} "
    rule = f"by patient ({several}patients" if not unknown else f"by block of the sorted names of a class ({several}"
    whose = "some patients are unknown" if any(case.case_id in known for case in cases) else "no patient is known"
    whose = "patients are set aside, as data.split.by asks" if config.by == "block" and known else whose
    rule += "" if not unknown else f"blocks: {whose}, and neighbours are often one person"
    rule += ", equal images together" if equal else ""
    return group, f"{rule}), with like shares of the classes"


def _remarks(split: Split, cases: Sequence[ImageCase], facts: Mapping[str, ImageFacts]) -> list[str]:
    """Images that are on two sides, or have two classes."""
    side = {i: name for name in ("train", "val", "test") for i in getattr(split, name)}
    class_of = {case.case_id: case.class_name for case in cases}
    used = [tuple(i for i in ids if i in side) for ids in equal_images(facts)]
    across = [ids for ids in used if len({side[i] for i in ids}) > 1]
    unsure = [ids for ids in used if len({class_of[i] for i in ids}) > 1]
    lines = []
    if across:
        example = " = ".join(across[0][:3])
        sides = sorted({" and ".join(sorted({side[i] for i in ids})) for ids in across})
        lines.append(
            f"warning    {len(across)} images are on two sides of the given split ({', '.join(sides)}; such as "
            f"{example}): scores of the later side are too good"
        )
    if unsure:
        lines.append(
            f"warning    {len(unsure)} images occur with two classes, such as {name_some([' = '.join(unsure[0][:3])])}"
        )
    inside = sum(len(ids) - 1 for ids in used) - sum(len(ids) - 1 for ids in across)
    if inside:
        lines.append(f"note       {inside} images occur more than once, on one side of the split")
    return lines
