"""`medseg select`: which configuration, or which two together, segment the validation cases best.

Each case is predicted by the models that have not seen it: of every run the one of the fold in which the case
validates. All answers to a case are made from one pass of each of these models, so that nothing but label files is
stored.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from medseg.bundle import BundleInfo, load_bundle
from medseg.data.cases import Case, load_image, load_label_values
from medseg.data.layouts import name_some
from medseg.data.splits import SPLIT_FILE, Split, patients_of, read_split
from medseg.device import choose_device, choose_precision
from medseg.errors import Code, MedsegError
from medseg.formats import Reading, write_label
from medseg.formats.label_table import written_names
from medseg.inference.averaging import decode_mean
from medseg.inference.ensemble import planned_logits
from medseg.inference.folder import label_name, write_predictions_table
from medseg.inference.members import (
    ENSEMBLE_FILE,
    Configuration,
    Member,
    check_agreement,
    configurations_of,
    write_ensemble,
)
from medseg.inference.postprocess import POSTPROCESSING_FILE
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig
from medseg.labels import Labels
from medseg.metrics.case import measure_case
from medseg.program import command
from medseg.reports.progress import counting_bar
from medseg.reports.ranking import SELECTION_FILE, Candidate, Ranking, print_ranking
from medseg.training.beginning import cases_again
from medseg.training.experiment import DataConfig, Experiment
from medseg.training.postprocessing import postprocess_run
from medseg.training.validation import FINAL_FOLDER
from medseg.volume import Grid

UNFINISHED = ".unfinished"
"""Label files of all that is compared, until it is decided."""
OWN_FILES = frozenset(
    (UNFINISHED, FINAL_FOLDER, SELECTION_FILE, "selection.md", POSTPROCESSING_FILE, "postprocessing.md")
)
"""What a selection that was cut off leaves behind."""


@dataclass(frozen=True)
class Source:
    """A run that is compared.

    Args:
        name: how the tables call it.
        configuration: its models.
        splits: of each model, in their order.
        info: what the first of the models is.
    """

    name: str
    configuration: Configuration
    splits: tuple[Split, ...]
    info: BundleInfo

    def member_for(self, split: Split) -> Member:
        """The model whose validation cases are those of `split`."""
        by_cases = {s.val: member for s, member in zip(self.splits, self.configuration.members, strict=True)}
        return by_cases[split.val]


def select(
    runs: Sequence[Path],
    output: Path,
    experiments: Sequence[Experiment],
    console: Console,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 4,
    overwrite: bool = False,
) -> Ranking:
    """Compare runs and their pairs on the validation cases, and make a folder that predicts with the best.

    Args:
        runs: two or more runs, with folds or without, on the same cases.
        output: the folder: `ensemble.json`, `selection.md` and `.json`, `validation/`, `postprocessing.json` and `.md`.
        experiments: the runs' own, which know where the cases are.
        console: where the user reads.
        device: "auto", "cpu", "cuda", "cuda:1", …
        precision: "auto", "bf16", "fp16" or "fp32".
        batch_size: tiles in one forward pass.
        overwrite: replace an ensemble that is there.
    Raises:
        MedsegError: E_CONFIG for fewer than two runs; E_MODEL for runs on other cases, splits or classes; E_LEAK for
            runs that validated on what they trained on; E_OUTPUT; E_MISSING for cases that are gone; what reading and
            the models refuse.
    """
    sources = read_sources(runs)
    _refuse_other_data(runs, [experiment.data for experiment in experiments])
    _check_output(output, overwrite=overwrite)
    found = cases_again(experiments[0], sources[0].info, sources[0].splits, console)
    cases = {case_id: found[case_id] for split in sources[0].splits for case_id in split.val}
    candidates = _candidates(sources)
    where = choose_device(device)
    window = WindowConfig(batch_size=batch_size, precision=choose_precision(precision, where))
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    labels, reading = sources[0].info.labels, experiments[0].data.reading
    try:
        dice = _predict_all(sources, candidates, cases, unfinished, window, where, reading, console)
        ranking = Ranking.of(candidates, dice, sorted(cases), labels.foreground, patients_of(list(cases.values())))
        print_ranking(ranking, console)
        (output / ENSEMBLE_FILE).unlink(missing_ok=True)  # the folder is no ensemble until all of it is new
        validation = output / FINAL_FOLDER
        shutil.rmtree(validation, ignore_errors=True)
        (unfinished / str(candidates.index(ranking.chosen))).replace(validation)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    write_predictions_table(validation, labels)
    ranking.write(output)
    postprocess_run(output, [validation], cases, labels, console, reading=reading)
    write_ensemble(output, [sources[i].configuration for i in ranking.chosen.sources])
    console.print(
        f"chosen: {ranking.chosen.name}\nwhy: {ranking.reason}\ntable: {output / 'selection.md'}\n"
        f"use: {command('predict', output)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return ranking


def read_sources(runs: Sequence[Path]) -> list[Source]:
    """Open the descriptions of runs and see that they can be compared.

    Raises:
        MedsegError: as `select`.
    """
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        raise MedsegError(
            Code.CONFIG,
            "there is nothing to compare",
            where="RUN...",
            expected="two or more different runs",
            got=", ".join(str(run) for run in runs),
            remedy="train another configuration on the same folds, such as model=residual_encoder_unet folds=all",
        )
    names = _short_names([run.resolve() for run in runs])
    sources = [_source(run, name) for run, name in zip(runs, names, strict=True)]
    check_agreement([(source.configuration.folder, source.info) for source in sources])
    first = sources[0]
    for source in sources[1:]:
        ours, theirs = ({(s.train, s.val) for s in one.splits} for one in (first, source))
        if ours != theirs:
            raise MedsegError(
                Code.MODEL,
                "the runs were not trained and validated on the same cases",
                where=source.configuration.folder,
                expected=f"{_described(first)} ({first.name})",
                got=f"{_described(source)}; {_difference(first, source)}",
                remedy="train them with the same data, seed, data.split and folds",
            )
    return sources


def _short_names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the runs' paths, as few as tell them apart: no more of this machine's folders is written."""
    for number in range(1, 1 + max(len(run.parts) for run in runs)):
        names = ["/".join(run.parts[-number:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names


def _source(run: Path, name: str) -> Source:
    if (run / ENSEMBLE_FILE).is_file():
        raise MedsegError(
            Code.RUN,
            "this is an ensemble, and what is compared are runs",
            where=run,
            remedy="give the runs that it consists of; pairs of them are tried",
        )
    (configuration,) = configurations_of(run)
    if configuration.unfinished:
        raise MedsegError(
            Code.RUN,
            "not all folds of this run are finished",
            where=run,
            got=f"unfinished: {', '.join(configuration.unfinished)}",
            remedy=f"go on with it: {command('train', f'resume={run}')}",
        )
    infos = [BundleInfo.read(member.run) for member in configuration.members]
    check_agreement([(m.run, info) for m, info in zip(configuration.members, infos, strict=True)])
    splits = tuple(read_split(member.run / SPLIT_FILE) for member in configuration.members)
    for member, split in zip(configuration.members, splits, strict=True):
        both = sorted({*split.train} & {*split.val})
        if both:
            raise MedsegError(
                Code.LEAK,
                f"the run validated on {len(both)} case(s) that it trained on: its Dice says nothing",
                where=member.run,
                got=name_some(both),
                remedy="compare runs without trainer.overfit_cases",
            )
    return Source(name, configuration, splits, infos[0])


def _described(source: Source) -> str:
    num = sum(len(split.val) for split in source.splits)
    return f"{len(source.splits)} fold(s) with {num} validation cases"


def _difference(one: Source, other: Source) -> str:
    """Which validation cases only one of two runs has; else that they are divided otherwise."""
    ours, theirs = ({case for split in source.splits for case in split.val} for source in (one, other))
    if ours != theirs:
        return f"only one of them has {name_some(sorted(ours ^ theirs))}"
    return "the same validation cases, but divided into other folds or with other training cases"


def _refuse_other_data(runs: Sequence[Path], data: Sequence[DataConfig]) -> None:
    places = [(config.root, config.manifest) for config in data]
    other = next((i for i, place in enumerate(places) if place != places[0]), None)
    if other is not None:
        raise MedsegError(
            Code.MODEL,
            "the runs read their cases from other places, where other images may have the same names",
            where=runs[other],
            expected=f"data.root={places[0][0]} ({runs[0].name})",
            got=f"data.root={places[other][0]}",
            remedy="if the folder has moved, say where it is: --data FOLDER",
        )


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise MedsegError(Code.OUTPUT, "the output is not a folder", where=output, remedy="give a folder with -o")
    if (output / ENSEMBLE_FILE).is_file():
        if not overwrite:
            raise MedsegError(
                Code.OUTPUT,
                "there is an ensemble already",
                where=output,
                remedy="choose another folder with -o, or replace it with --overwrite",
            )
    elif output.is_dir() and any(path.name not in OWN_FILES for path in output.iterdir()):
        raise MedsegError(
            Code.OUTPUT, "the folder holds something else", where=output, remedy="choose a new folder with -o"
        )


def _candidates(sources: Sequence[Source]) -> list[Candidate]:
    """Every run, and every two of them."""
    indices = range(len(sources))
    groups = [*((i,) for i in indices), *itertools.combinations(indices, 2)]
    return [
        Candidate(
            " + ".join(sources[i].name for i in group),
            group,
            sum(len(sources[i].configuration.members) for i in group),
        )
        for group in groups
    ]


def _predict_all(
    sources: Sequence[Source],
    candidates: Sequence[Candidate],
    cases: Mapping[str, Case],
    folder: Path,
    window: WindowConfig,
    device: torch.device,
    reading: Reading,
    console: Console,
) -> np.ndarray:
    """Label files of each candidate in `folder/NUMBER/`, and their Dice (candidates, cases by id, structures)."""
    info = sources[0].info
    order = {case_id: number for number, case_id in enumerate(sorted(cases))}
    dice = np.full((len(candidates), len(cases), len(info.labels.foreground)), math.nan)
    for number in range(len(candidates)):
        (folder / str(number)).mkdir(parents=True)
    done = 0
    with counting_bar(console, "predicting the validation cases") as progress:
        progress(0, len(cases))
        for split in sources[0].splits:
            predictors = [
                Predictor(load_bundle(source.member_for(split).run, device=device), window) for source in sources
            ]
            for case_id in split.val:
                image = load_image(cases[case_id], channels=info.channels, reading=reading)
                reference = load_label_values(cases[case_id], image.grid, reading)
                truth = info.labels.to_index(reference.array, where=case_id)
                logits = planned_logits(predictors, image)
                for number, candidate in enumerate(candidates):
                    parts = [logits[i] for i in candidate.sources]
                    indices = decode_mean(parts, [1 / len(parts)] * len(parts), info.labels, image.grid)
                    dice[number, order[case_id]] = _dice(np.asarray(indices.array), truth, info.labels, image.grid)
                    name = label_name(case_id, image)
                    label = predictors[0].in_file_values(indices)
                    write_label(folder / str(number) / name, label, written_names(info.labels))
                done += 1
                progress(done, len(cases))
    return dice


def _dice(predicted: np.ndarray, reference: np.ndarray, labels: Labels, grid: Grid) -> list[float]:
    results = measure_case(
        predicted, reference, grid, num_classes=labels.num_classes, regions=labels.regions, names=["dice"]
    )
    return [result.values["dice"] for result in results]
