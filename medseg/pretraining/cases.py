"""What is settled before the first step of a pretraining: images, split, plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.data.cases import Case, DataFolder, find_cases, find_inputs, is_labelled
from medseg.data.facts import Survey
from medseg.data.plan.file import PLAN_FILE
from medseg.data.splits import SPLIT_FILE, Split, make_split, read_split, usable, write_split
from medseg.data.store import Store
from medseg.data.summary import anomaly_lines, summary_lines
from medseg.data.survey import survey
from medseg.errors import Code, MedsegError
from medseg.labels import UNLABELLED
from medseg.pretraining.experiment import PretrainingExperiment
from medseg.reports.progress import counting_bar
from medseg.training.beginning import SURVEY_FILE, write_survey
from medseg.training.changes import digests_of, refuse_changes
from medseg.training.experiment import DataConfig
from medseg.training.planning import plan_run


@dataclass(frozen=True, eq=False)
class Settled:
    """What a pretraining begins with.

    Args:
        cases: everything in the data folder, by id, without labels.
        split: which of them train and validate.
        info: plan, and the segmenter that this begins.
    """

    cases: Mapping[str, Case]
    split: Split
    info: BundleInfo


def found_images(data: DataConfig) -> DataFolder:
    """The images of `data.root`, whatever lies beside them: those of any layout of labelled data, or images alone, as
    `medseg predict` takes them.

    Raises:
        MedsegError: E_CONFIG if no data are named; what `find_cases` and `find_inputs` refuse.
    """
    if data.root is None:
        raise MedsegError(
            Code.CONFIG,
            "no images were named",
            where="data.root",
            expected="a folder of images, with or without labels",
            remedy="medseg train task=pretraining data.root=FOLDER",
        )
    root = Path(data.root)
    if data.manifest is not None or is_labelled(root):
        folder = find_cases(
            root,
            manifest=None if data.manifest is None else Path(data.manifest),
            require_labels=False,
            reading=data.reading,
            strict=False,  # the survey refuses, or leaves out, all that is bad at once
        )
    else:
        cases = find_inputs([root], modality=data.modality, reading=data.reading)
        folder = DataFolder(root, "images", cases)
    unlabelled = tuple(dataclasses.replace(case, label=None) for case in folder.cases)
    return dataclasses.replace(folder, cases=unlabelled, labels=None, structures=None)


def begin(
    experiment: PretrainingExperiment, run: Path, device: torch.device, console: Console, store: Store
) -> Settled:
    """Read each image once, divide them, plan; say what was found, and write it down.

    The cases that a manifest sets aside for test are not looked at.

    Raises:
        MedsegError: what the data, the configuration or the machine refuse.
    """
    data = experiment.data
    folder = found_images(data)
    used = {case.case_id for case in usable(folder.cases, data.split)}
    split = make_split(folder.cases, data.split, experiment.seed, fold=experiment.fold)
    with counting_bar(console, "reading every image once") as progress:
        found = survey(
            dataclasses.replace(folder, cases=tuple(c for c in folder.cases if c.case_id in used)),
            UNLABELLED.to_json(),
            num_threads=data.threads,
            progress=progress,
            on_bad_case=data.on_bad_case,
            training=lambda infos: {info.case_id for info in infos} & {*split.train},
            reading=data.reading,
            store=store,
        )
    bad = used.difference(info.case_id for info in found.cases)
    split = make_split(folder.cases, data.split, experiment.seed, fold=experiment.fold, bad=bad)
    for line in (*summary_lines(found), *anomaly_lines(found)):
        console.print(line, highlight=False, soft_wrap=True)
    sizes = f"{len(split.train)} to train, {len(split.val)} to validate"
    sizes += f", {len(split.test)} set aside to test" if split.test else ""
    console.print(f"split      {sizes} ({split.rule})", highlight=False, soft_wrap=True, markup=False)
    info = _planned(experiment, found, split, device)
    cases = {case.case_id: case for case in folder.cases}
    digests = digests_of((cases[i] for i in (*split.train, *split.val)), store)
    write_split(run / SPLIT_FILE, split)
    write_survey(found, run, digests)
    info.plan.write(run / PLAN_FILE)
    info.write(run)  # last: with it the run has begun
    return Settled(cases, split, info)


def _planned(experiment: PretrainingExperiment, found: Survey, split: Split, device: torch.device) -> BundleInfo:
    """The plan of the segmenter to come, as far as images tell it."""
    training = tuple(case for case in found.cases if case.case_id in split.train)
    info = plan_run(experiment.segmenter(), dataclasses.replace(found, cases=training), device)
    plan = info.plan
    if "ct" in plan.normalisation and experiment.plan is None:
        said = "percentiles 0.5 and 99.5, mean and deviation of whole images: without labels nothing tells the "
        said += "foreground (plan=PLAN takes those of labelled data)"
        plan = dataclasses.replace(plan, reasons={**plan.reasons, "intensity": said})
    return dataclasses.replace(info, plan=plan, method=dict(experiment.method))


def go_on(experiment: PretrainingExperiment, run: Path, console: Console, store: Store) -> Settled:
    """What a pretraining decided when it began.

    Raises:
        MedsegError: E_RUN if this is no run; what `refuse_changes` refuses.
    """
    info, split = BundleInfo.read(run), read_split(run / SPLIT_FILE)
    folder = found_images(experiment.data)
    wanted = {*split.train, *split.val}
    refuse_changes(folder, wanted, experiment.data, info, run / SURVEY_FILE, console, store)
    return Settled({case.case_id: case for case in folder.cases}, split, info)
