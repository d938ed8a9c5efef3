"""What is settled before the first step: cases, split, plan, prepared arrays."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from medseg.bundle import FOLDS_FILE, BundleInfo
from medseg.data.augment import side_lines
from medseg.data.cases import Case, DataFolder, find_cases
from medseg.data.facts import CaseInfo, Survey
from medseg.data.layouts import name_some
from medseg.data.plan import Plan, takes_too_much
from medseg.data.plan.file import PLAN_FILE
from medseg.data.preparation import prepare_cases
from medseg.data.prepared import PreparedCase
from medseg.data.splits import OVERFITTING, SPLIT_FILE, Split, make_split, read_split, usable, write_split
from medseg.data.store import Store
from medseg.data.stratify import class_volumes
from medseg.data.summary import anomaly_lines, summary_lines
from medseg.data.survey import survey
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.losses.choice import fitting_loss
from medseg.reports.progress import counting_bar
from medseg.training.changes import DIGESTS, digests_of, refuse_changes
from medseg.training.experiment import DataConfig, Experiment
from medseg.training.planning import plan_run

SURVEY_FILE = "survey.json"
"""What reading the cases told."""
STORE_FOLDER = "prepared"
"""Beside a run's folder: what was prepared of the cases, for this run and the next ones."""


@dataclass(frozen=True, eq=False)
class Settled:
    """What is settled before the first step, of one fold or of several.

    Args:
        cases: everything in the data folder, by id.
        splits: one for each of `Experiment.fold_numbers`, in their order.
        found: what reading the cases told, of all that train or validate.
        info: plan and model, for all folds.
        store: what the cases were read with.
    """

    cases: Mapping[str, Case]
    splits: tuple[Split, ...]
    found: Survey
    info: BundleInfo
    store: Store

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the files of every case that trains or validates, for the run that goes on."""
        return digests_of((self.cases[info.case_id] for info in self.found.cases), self.store)

    def write(self, run: Path, split: Split) -> None:
        """Write down what one run begins with; its bundle.json comes last."""
        write_split(run / SPLIT_FILE, split)
        write_survey(self.found, run, self.digests)
        self.info.plan.write(run / PLAN_FILE)
        self.info.write(run)


def write_survey(found: Survey, folder: Path, digests: Mapping[str, str] | None = None) -> None:
    """Write `SURVEY_FILE`, whole or not at all; with `digests` of the cases' files, where a run begins with them."""
    content = found.to_json() if digests is None else {**found.to_json(), DIGESTS: digests}
    with whole_file(folder / SURVEY_FILE, ".json") as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def open_store(data: DataConfig, run: Path) -> Store:
    """The store that `data.store` names, for a run; a fold that goes on alone has that of all its folds."""
    if data.store is None:
        return Store(None)
    run = run.parent if (run.parent / FOLDS_FILE).is_file() else run
    return Store(run.parent / STORE_FOLDER if data.store == "auto" else Path(data.store))


def begin(
    experiment: Experiment,
    run: Path,
    device: torch.device,
    console: Console,
    store: Store | None = None,
    folder: DataFolder | None = None,
) -> tuple[Mapping[str, Case], Split, BundleInfo]:
    """Settle what a run of one fold begins with, and write it down."""
    settled = settle(experiment, device, console, store, folder=folder)
    (split,) = settled.splits
    settled.write(run, split)
    return settled.cases, split, settled.info


def settle(
    experiment: Experiment,
    device: torch.device,
    console: Console,
    store: Store | None = None,
    *,
    folder: DataFolder | None = None,
    say_anomalies: bool = True,
) -> Settled:
    """Read each case once, divide them, plan; and say what was found.

    Test cases are not looked at. Where one fold is trained, its validation cases shape neither the plan nor the
    normalisation. Several folds have one plan, which all of their cases shape, as in nnU-Net.

    Args:
        experiment: what states the training.
        device: that it will run on.
        console: where the user reads.
        store: where what was read of a case is found and kept.
        folder: the cases; None finds them in `data.root`.
        say_anomalies: whether cases unlike the rest are listed.
    Raises:
        MedsegError: what the data, the configuration or the machine refuse.
    """
    folder = folder or found_cases(experiment.data, console)
    found, splits = _read_and_divide(experiment, folder, console, store)
    for line in (*summary_lines(found), *(anomaly_lines(found) if say_anomalies else [])):
        console.print(line, highlight=False, soft_wrap=True)
    for number, split in zip(experiment.fold_numbers, splits, strict=True):
        _say_split(split, found, None if experiment.folds is None else number, console)
    training = {case_id for split in splits for case_id in split.train}
    info = plan_run(
        experiment,
        dataclasses.replace(found, cases=tuple(c for c in found.cases if c.case_id in training)),
        device,
    )
    if experiment.folds is not None and experiment.plan is None and experiment.trainer.initial is None:
        info = dataclasses.replace(info, plan=_of_all_folds(info.plan, len(training)))
    if takes_too_much(info.plan):
        said = f"{info.plan.memory_gb:g} GiB {info.plan.reasons['memory_gb']}"
        remedy = "data.plan.batch_size and data.plan.patch_size lower it"
        console.print(f"[yellow]warning[/]    {said}: {remedy}", highlight=False, soft_wrap=True)
    assumed = not isinstance(experiment.augment.swap, Mapping)
    for line in side_lines(info.labels.declared, info.mirroring, info.swap, assumed=assumed):
        console.print(line, highlight=False, soft_wrap=True)
    _, why = fitting_loss(experiment.loss, info.labels)
    if why is not None:
        console.print(f"loss       {why}", highlight=False, soft_wrap=True)
    cases = {case.case_id: case for case in folder.cases}
    return Settled(cases, tuple(splits), found, info, store or Store(None))


def _read_and_divide(
    experiment: Experiment, folder: DataFolder, console: Console, store: Store | None
) -> tuple[Survey, list[Split]]:
    """The survey, and the splits, which are balanced by what it found. Its medians are those of the training cases."""
    data, numbers = experiment.data, experiment.fold_numbers
    used = {case.case_id for case in usable(folder.cases, data.split)}

    def into_folds(infos: Sequence[CaseInfo] | None) -> list[Split]:
        volumes = None if infos is None else class_volumes(infos)
        bad = () if infos is None else used.difference(info.case_id for info in infos)
        seed = experiment.seed
        return [make_split(folder.cases, data.split, seed, fold=n, volumes=volumes, bad=bad) for n in numbers]

    divide: Callable[[Sequence[CaseInfo] | None], list[Split]] = into_folds
    splits = divide(None)  # what is wrong with the folds is said before anything is read
    if experiment.folds is not None:
        _refuse_no_folds(folder.cases, splits)
    few = experiment.trainer.overfit_cases
    if few is not None:
        used = set(splits[0].train[:few])
        divide = partial(_overfitting, splits[0])
    with counting_bar(console, "reading every case once") as progress:
        found = survey(
            dataclasses.replace(folder, cases=tuple(c for c in folder.cases if c.case_id in used)),
            data.labels,
            regions_order=data.regions_order,
            num_threads=data.threads,
            progress=progress,
            on_bad_case=data.on_bad_case,
            training=lambda infos: {case_id for split in divide(infos) for case_id in split.train},
            reading=data.reading,
            store=store,
        )
    return found, divide(found.cases)


def _refuse_no_folds(cases: Sequence[Case], splits: Sequence[Split]) -> None:
    """Several folds make sense where each case validates once."""
    if any(case.split in ("train", "val") for case in cases):
        raise MedsegError(
            Code.CONFIG,
            "the manifest's split column says which cases validate: there are no folds",
            where="folds",
            remedy="leave folds out; or mark only the test cases in the manifest, and leave the others empty",
        )
    validated = Counter(case_id for split in splits for case_id in split.val)
    twice = sorted(case_id for case_id, count in validated.items() if count > 1)
    if twice:
        raise MedsegError(
            Code.CONFIG,
            f"{len(twice)} case(s) validate in several folds: their scores would count twice",
            where=f"data.split.file: {name_some(twice)}",
            remedy="let each case validate in one fold, or train the folds one by one: fold=0",
        )


def _overfitting(split: Split, infos: Sequence[CaseInfo] | None) -> list[Split]:
    few = tuple(info.case_id for info in infos or ())
    return [dataclasses.replace(split, train=few, val=few, rule=f"{OVERFITTING} on {len(few)} case(s)")]


def _say_split(split: Split, found: Survey, fold: int | None, console: Console) -> None:
    """How the cases are divided, and which classes one of the sides lacks."""
    sizes = f"{len(split.train)} to train, {len(split.val)} to validate"
    sizes += f", {len(split.test)} set aside to test" if split.test else ""
    name = "split " if fold is None else f"fold {fold}"
    console.print(f"{name:<11}{sizes} ({split.rule})", highlight=False, soft_wrap=True, markup=False)
    voxels = {case.case_id: case.label_voxels for case in found.cases}
    for class_name, parts in zip(found.labels.foreground, found.labels.parts, strict=True):
        has = {case_id for case_id, counts in voxels.items() if any(counts[part] for part in parts)}
        if has and not has.intersection(split.train):
            console.print(
                f"[yellow]warning[/]    no training case has {escape(class_name)}: the model cannot learn it "
                f"(it is in {escape(name_some(sorted(has)))})",
                highlight=False,
                soft_wrap=True,
            )
        elif has and not has.intersection(split.val):
            console.print(
                f"note       no validation case has {escape(class_name)}: how well it is found stays unknown",
                highlight=False,
                soft_wrap=True,
            )


def _of_all_folds(plan: Plan, num_cases: int) -> Plan:
    """The plan with the reason that it is one for all folds."""
    reasons = dict(plan.reasons)
    for name in ("spacing_mm", "patch_size", "normalisation"):
        if name in reasons and not reasons[name].startswith("set by"):
            reasons[name] += f"; one plan for all folds, from all {num_cases} cases but those for test, as in nnU-Net"
    return dataclasses.replace(plan, reasons=reasons)


def go_on(
    experiment: Experiment, run: Path, console: Console, store: Store | None = None
) -> tuple[Mapping[str, Case], Split, BundleInfo]:
    """What a run decided when it began: a resumed run keeps its split and plan, also where the folder has grown.

    Raises:
        MedsegError: E_RUN if this is no run; what `cases_again` refuses.
    """
    info, split = BundleInfo.read(run), read_split(run / SPLIT_FILE)
    return cases_again(experiment, info, [split], console, run / SURVEY_FILE, store), split, info


def cases_again(
    experiment: Experiment,
    info: BundleInfo,
    splits: Sequence[Split],
    console: Console,
    before: Path | None = None,
    store: Store | None = None,
) -> Mapping[str, Case]:
    """The cases of a run that goes on, by id: those of its splits are all there.

    Args:
        experiment: the run's.
        info: what it is.
        splits: its own, of all folds.
        console: where the user reads.
        before: its `SURVEY_FILE`.
        store: with it, every case is read again and compared with `before`.
    Raises:
        MedsegError: E_MISSING; what `refuse_changes` refuses.
    """
    data = experiment.data
    if info.structures is not None:
        data = dataclasses.replace(data, labels=info.structures, modality=data.modality or info.modality)
    folder = found_cases(data, console)
    wanted = {case_id for split in splits for case_id in (*split.train, *split.val)}
    if before is not None and store is not None:
        refuse_changes(folder, wanted, data, info, before, console, store)
    cases = {case.case_id: case for case in folder.cases}
    gone = sorted(wanted - cases.keys())
    if gone:
        raise MedsegError(
            Code.MISSING,
            f"{len(gone)} case(s) of the run are not in the data folder any more",
            where=", ".join(gone[:10]),
            remedy="put them back, or begin a new run",
        )
    return cases


def found_cases(data: DataConfig, console: Console) -> DataFolder:
    """The cases of `data.root`."""
    if data.root is None:
        raise MedsegError(
            Code.CONFIG,
            "no data were named",
            where="data.root",
            expected="a folder of cases",
            remedy="medseg train data.root=FOLDER; try it on a phantom with: medseg demo",
        )
    with counting_bar(console, "looking for cases") as progress:
        return find_cases(
            Path(data.root),
            manifest=None if data.manifest is None else Path(data.manifest),
            labels=data.labels,
            modality=data.modality,
            reading=data.reading,
            progress=progress,
            strict=False,  # the survey refuses, or leaves out, all that is bad at once
        )


def prepare(
    experiment: Experiment,
    info: BundleInfo,
    cases: Mapping[str, Case],
    split: Split,
    console: Console,
    store: Store | None = None,
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """All training and validation cases as the network sees them: found in the store, or prepared and kept there."""
    wanted = list(dict.fromkeys([*split.train, *split.val]))
    store = store or Store(None)
    with counting_bar(console, "preparing the cases") as progress:
        prepared = prepare_cases(
            [cases[i] for i in wanted],
            info.plan,
            info.labels,
            num_threads=experiment.data.threads,
            store=store,
            in_memory=experiment.data.in_memory,
            reading=experiment.data.reading,
            progress=progress,
        )
    store.decoded.clear()
    for line in prepared.lines(store.folder):
        console.print(line, highlight=False, soft_wrap=True)
    by_id = {case.case_id: case for case in prepared.cases}
    return [by_id[i] for i in split.train], [by_id[i] for i in split.val]
