"""What is settled before the first step: cases, split, plan, prepared arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.data.augment import mirrored_axes, side_lines, swapped_classes
from medseg.data.cases import Case, DataFolder, find_cases
from medseg.data.plan import make_plan, with_model, with_patch
from medseg.data.preprocess import PreparedCase, prepare_cases
from medseg.data.splits import Split, make_split, read_split, write_split
from medseg.data.summary import summary_lines
from medseg.data.survey import Survey, survey
from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.reports.progress import counting_bar
from medseg.training.experiment import DataConfig, Experiment

SPLIT_FILE = "split.json"
"""Which cases train and validate, in a run's folder."""


def begin(
    experiment: Experiment, run: Path, device: torch.device, console: Console
) -> tuple[dict[str, Case], Split, BundleInfo]:
    """Find the cases, split them, read each once, say what was found, plan; and write all that down.

    Test cases are not looked at, and validation cases shape neither the plan nor the normalisation.
    """
    data = experiment.data
    folder = found_cases(data, console)
    split = make_split(folder.cases, data.split, experiment.seed)
    if experiment.trainer.overfit_cases is not None:
        few = split.train[: experiment.trainer.overfit_cases]
        split = dataclasses.replace(split, train=few, val=few, rule=f"overfitting on {len(few)} case(s)")
    used = {*split.train, *split.val}
    with counting_bar(console, "reading every case once") as progress:
        found = survey(
            dataclasses.replace(folder, cases=tuple(c for c in folder.cases if c.case_id in used)),
            data.labels,
            num_threads=data.num_threads,
            progress=progress,
            on_bad_case=data.on_bad_case,
            training=split.train,
            reading=data.reading,
        )
    bad = {problem.case_id for problem in found.quarantine}
    split = dataclasses.replace(
        split,
        train=tuple(i for i in split.train if i not in bad),
        val=tuple(i for i in split.val if i not in bad),
    )
    if not split.train or not split.val:
        raise MedsegError(
            Code.NO_CASES,
            "the bad cases leave nothing to train on or nothing to validate on",
            where=", ".join(sorted(bad)[:10]),
            remedy="repair them; data.on_bad_case=error lists what is wrong with each",
        )
    for line in summary_lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    sizes = f"{len(split.train)} to train, {len(split.val)} to validate"
    sizes += f", {len(split.test)} set aside to test" if split.test else ""
    console.print(f"split      {sizes} ({split.rule})", highlight=False, soft_wrap=True)
    training = dataclasses.replace(found, cases=tuple(c for c in found.cases if c.case_id in split.train))
    info = plan_run(experiment, training, device)
    for line in side_lines(info.labels.names, info.mirroring, info.swap):
        console.print(line, highlight=False, soft_wrap=True)
    write_split(run / SPLIT_FILE, split)
    (run / "survey.json").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    info.plan.write(run / "plan.yaml")
    info.write(run)
    return {case.case_id: case for case in folder.cases}, split, info


def go_on(experiment: Experiment, run: Path, console: Console) -> tuple[dict[str, Case], Split, BundleInfo]:
    """What a run decided when it began: a resumed run keeps its split and plan, also where the folder has grown.

    Raises:
        MedsegError: E_MISSING if a case of the split is not in the folder any more; E_RUN if this is no run.
    """
    info, split = BundleInfo.read(run), read_split(run / SPLIT_FILE)
    data = experiment.data
    if info.structures is not None:
        data = dataclasses.replace(data, labels=info.structures, modality=data.modality or info.modality)
    cases = {case.case_id: case for case in found_cases(data, console).cases}
    gone = [case for case in (*split.train, *split.val) if case not in cases]
    if gone:
        raise MedsegError(
            Code.MISSING,
            f"{len(gone)} case(s) of the run are not in the data folder any more",
            where=", ".join(gone[:10]),
            remedy="put them back, or begin a new run",
        )
    return cases, split, info


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
        )


def plan_run(experiment: Experiment, found: Survey, device: torch.device) -> BundleInfo:
    """The plan and the complete settings of the model: each takes from the other what the user has set there.

    Raises:
        MedsegError: E_MODEL if a patch size that was asked for does not fit the network; names the nearest that do.
    """
    config, settings = experiment.data.plan, dict(experiment.model)
    part = MODELS.part(str(settings["name"]))
    shared = [f.name for f in dataclasses.fields(part.config) if f.name in ("widths", "kernels", "strides")]
    given = {name: settings[name] for name in shared if settings.get(name) is not None}
    if given and config.num_stages is None:
        config = dataclasses.replace(config, num_stages=len(next(iter(given.values()))))
    plan = with_model(make_plan(found, config, device=device.type), given)
    settings |= {name: plan.to_json()[name] for name in shared if name not in given}
    names = found.labels.names
    mirrored = mirrored_axes(experiment.augment, names, spatial_dims=plan.spatial_dims, is_picture=not plan.orientation)
    info = BundleInfo(
        settings,
        plan,
        found.labels,
        found.channel_names,
        mirrored,
        modality=found.modality,
        structures=found.structures,
        swap=swapped_classes(experiment.augment, names),
    )
    model = info.build_model()
    patch = model.next_size(plan.patch_size)
    if config.patch_size is None and patch != plan.patch_size:
        reason = f"{plan.reasons['patch_size']}; enlarged to what the network takes"
        info = dataclasses.replace(info, plan=with_patch(plan, patch, reason))
    model.output_size(info.plan.patch_size)
    return info


def prepare(
    experiment: Experiment, info: BundleInfo, cases: Mapping[str, Case], split: Split, console: Console
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """All training and validation cases in memory, as the network sees them."""
    wanted = list(dict.fromkeys([*split.train, *split.val]))
    with counting_bar(console, "preparing the cases") as progress:
        prepared = prepare_cases(
            [cases[i] for i in wanted],
            info.plan,
            info.labels,
            seed=experiment.seed,
            num_threads=experiment.data.num_threads,
            reading=experiment.data.reading,
            progress=progress,
        )
    by_id = {case.case_id: case for case in prepared}
    return [by_id[i] for i in split.train], [by_id[i] for i in split.val]
