"""What a classifier's training begins with, and what one that goes on finds again: images, split, sight, network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from medseg.classification.bundle import ClassifierInfo
from medseg.classification.cases import find_classified
from medseg.classification.division import divide
from medseg.classification.experiment import ClassificationExperiment
from medseg.classification.images import ImageCase
from medseg.classification.preparation import (
    plain_counts,
    prepare_images,
    read_digests,
    survey_images,
    write_survey,
)
from medseg.classification.sight import ImageFacts, Sight, plan_sight, refuse_mixed
from medseg.data.splits import OVERFITTING, SPLIT_FILE, Split, read_split, write_split
from medseg.errors import Code, MedsegError
from medseg.models.classifiers import CLASSIFIERS
from medseg.reports.progress import counting_bar
from medseg.training.pretrained import IMAGENET, settled

PREPARED_FOLDER = ".prepared"
"""In a run, while it trains: images that do not fit into the memory."""


@dataclass(frozen=True)
class Settled:
    """What a run begins with, and goes on with.

    Args:
        info: classes, sight, network.
        cases: by id.
        split: which train, validate and are set aside.
    """

    info: ClassifierInfo
    cases: dict[str, ImageCase]
    split: Split


def begin(experiment: ClassificationExperiment, run: Path, console: Console) -> Settled:
    """Find the images, read them once, divide them, and settle what the network sees.

    Raises:
        MedsegError: what is wrong with the data, or with the settings for them.
    """
    data = experiment.data
    if data.root is None:
        raise MedsegError(
            Code.CONFIG,
            "no data were named",
            where="data.root",
            expected="a folder with a folder for each class, a CSV, or an npz",
            remedy="medseg train task=classification data.root=FOLDER",
        )
    found = find_classified(Path(data.root), data.classes)
    classes = _with_positive_last(found.classes, data.positive)
    with counting_bar(console, "reading the images") as progress:
        facts, bad = survey_images(found.cases, data.reading, threads=data.threads, progress=progress)
    _settle_bad(bad, len(found.cases), data.on_bad_case, console)
    refuse_mixed(facts)
    usable = [case for case in found.cases if case.case_id in facts]
    split, remarks = divide(usable, data.split, experiment.seed, experiment.fold, facts)
    cases = {case.case_id: case for case in usable}
    if experiment.trainer.overfit_cases is not None:
        split = _overfitting(split, cases, classes, experiment.trainer.overfit_cases)
    _refuse_absent_classes([cases[i] for i in split.train], classes)
    settings, sight = plan(experiment, [facts[i] for i in split.train])
    modalities = {facts[i].modality for i in split.train}
    info = ClassifierInfo(settings, classes, sight, modalities.pop() if len(modalities) == 1 else None)
    _say(console, found.layout, found.left_out, remarks, cases, split, classes)
    write_split(run / SPLIT_FILE, split)
    write_survey(run, usable, facts)
    info.write(run)
    return Settled(info, cases, split)


def go_on(experiment: ClassificationExperiment, run: Path, console: Console) -> Settled:
    """What a run settled when it began, with its images looked up again.

    Raises:
        MedsegError: E_MISSING if some are not there any more, or have changed.
    """
    info, split = ClassifierInfo.read(run), read_split(run / SPLIT_FILE)
    data = experiment.data
    if data.root is None:
        raise MedsegError(
            Code.CONFIG, "the run does not know where its images are", where="data.root", remedy="add data.root=FOLDER"
        )
    cases = {case.case_id: case for case in find_classified(Path(data.root), data.classes).cases}
    wanted = [i for side in (split.train, split.val, split.test) for i in side]
    absent = [i for i in wanted if i not in cases]
    if not absent:
        with counting_bar(console, "reading the images") as progress:
            facts, bad = survey_images(
                [cases[i] for i in wanted], data.reading, threads=data.threads, progress=progress
            )
        digests = read_digests(run)
        absent = [i for i in wanted if i in bad or facts[i].digest != digests.get(i)]
    if absent:
        raise MedsegError(
            Code.MISSING,
            f"{len(absent)} of the run's {len(wanted)} images are not there any more, or have changed",
            where=", ".join(absent[:3]),
            remedy="put them back, name their place with data.root=FOLDER, or begin a new run",
        )
    return Settled(info, {i: cases[i] for i in wanted}, split)


def plan(experiment: ClassificationExperiment, facts: Sequence[ImageFacts]) -> tuple[dict[str, Any], Sight]:
    """The network's settings, complete, and what it sees.

    Args:
        experiment: what states the run.
        facts: of the training images.
    Raises:
        MedsegError: E_CONFIG, E_MODEL for what does not fit.
    """
    data = experiment.data

    def sight(smallest: dict[int, tuple[int, ...]]) -> Sight:
        return plan_sight(
            facts,
            size=data.size,
            spacing_mm=data.spacing_mm,
            channels=data.channels,
            normalisation=data.normalisation,
            smallest=smallest,
            expects_imagenet=experiment.model.get("weights") == IMAGENET,
        )

    def complete(seen: Sight) -> dict[str, Any]:
        """Fully connected layers over places need to know the size; where training begins is no part of a network."""
        fields = {field.name for field in dataclasses.fields(CLASSIFIERS.part(str(experiment.model["name"])).config)}
        network = settled(experiment.model)
        if "image_size" in fields and network.get("image_size") is None:
            network["image_size"] = list(seen.size)
        return network

    first = sight({})
    dims = first.spatial_dims
    with torch.device("meta"):
        model = CLASSIFIERS.build(complete(first), in_channels=1, num_classes=2, spatial_dims=dims)
    smallest = model.smallest_size
    if data.size is not None and any(n < least for n, least in zip(data.size, smallest, strict=True)):
        raise MedsegError(
            Code.MODEL,
            "the network takes no images as small as this",
            where="data.size",
            expected=f"at least {' × '.join(map(str, smallest))}",
            got=data.size,
            remedy="state a larger size, or take a network with fewer stages",
        )
    seen = sight({dims: smallest})
    return complete(seen), seen


def prepare(
    experiment: ClassificationExperiment, settled: Settled, run: Path, console: Console
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training, validation and test images as the network sees them, in this order, and their classes."""
    split, data = settled.split, experiment.data
    cases = [settled.cases[i] for side in (split.train, split.val, split.test) for i in side]
    with counting_bar(console, "preparing the images") as progress:
        images = prepare_images(
            cases,
            settled.info.sight,
            data.reading,
            threads=data.threads,
            folder=run / PREPARED_FOLDER,
            progress=progress,
        )
    classes = settled.info.classes
    return images, torch.tensor([classes.index(str(case.class_name)) for case in cases])


def _say(
    console: Console,
    layout: str,
    left_out: Sequence[str],
    remarks: Sequence[str],
    cases: dict[str, ImageCase],
    split: Split,
    classes: Sequence[str],
) -> None:
    lines = [f"data       {layout}: {len(cases)} images, {len(classes)} classes"]
    lines += [f"left out   {what}" for what in left_out]
    lines.append(f"split      {split.rule}")
    for name, ids in (("train", split.train), ("val", split.val), ("test", split.test)):
        if ids:
            counts = plain_counts((cases[i] for i in ids), classes)
            lines.append(f"           {name} {len(ids)}: {', '.join(f'{c} {n}' for c, n in list(counts.items())[:8])}")
    console.print("\n".join([*lines, *remarks]), highlight=False, soft_wrap=True, markup=False)


def _with_positive_last(classes: tuple[str, ...], positive: str | None) -> tuple[str, ...]:
    if positive is None:
        return classes
    if positive not in classes or len(classes) != 2:
        raise MedsegError(
            Code.LABEL,
            "one of two classes can be the positive one",
            where="data.positive",
            expected=" | ".join(classes) if len(classes) == 2 else f"nothing: there are {len(classes)} classes",
            got=positive,
            remedy="leave data.positive out, or name two classes with data.classes",
        )
    return (*(name for name in classes if name != positive), positive)


def _settle_bad(bad: dict[str, MedsegError], total: int, on_bad_case: str, console: Console) -> None:
    """Refuse, or list what is left out."""
    if not bad:
        return
    first, error = next(iter(bad.items()))
    if on_bad_case == "error" or len(bad) == total:
        raise MedsegError(
            error.code,
            f"{len(bad)} of {total} images cannot be used; of the first: {error.message}",
            where=first,
            expected=error.expected,
            got=error.got,
            remedy=f"{error.remedy or 'repair them'}; or leave such images out: data.on_bad_case=skip",
        ) from error
    for case, why in bad.items():
        console.print(f"left out   {case}: {why.code}: {why.message}", highlight=False, soft_wrap=True, markup=False)


def _refuse_absent_classes(training: Sequence[ImageCase], classes: Sequence[str]) -> None:
    counts = plain_counts(training, classes)
    absent = [name for name, count in counts.items() if not count]
    if absent:
        raise MedsegError(
            Code.NO_CASES,
            "no training image has a class that others have",
            where="data.split",
            expected="training images of each class",
            got=", ".join(absent),
            remedy="another split (fold, seed, data.split), or name the classes to take with data.classes",
        )


def _overfitting(split: Split, cases: dict[str, ImageCase], classes: Sequence[str], number: int) -> Split:
    """The first training images of each class, to train and to validate on."""
    of_class = {name: [i for i in split.train if cases[i].class_name == name] for name in classes}
    chosen = tuple(sorted(i for ids in of_class.values() for i in ids[:number]))
    return Split(chosen, chosen, (), f"{OVERFITTING} on {number} image(s) of each class, as trainer.overfit_cases asks")
