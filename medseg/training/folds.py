"""Several folds of one cross-validation: `RUN/fold_0`, `RUN/fold_1`, … each an ordinary run, and what they share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from medseg.bundle import FOLDS_FILE, BundleInfo
from medseg.data.cases import Case, DataFolder
from medseg.data.plan.file import PLAN_FILE
from medseg.data.prepared import PreparedCase
from medseg.data.splits import SPLIT_FILE, Split, read_split, write_splits
from medseg.data.store import Store
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.training.beginning import SURVEY_FILE, cases_again, prepare, settle
from medseg.training.experiment import Experiment, write_config
from medseg.training.state import Counters, read_counters

SPLITS_FILE = "splits_final.json"
"""The splits of all folds in nnU-Net's form: `data.split.file=` takes it, and so does nnU-Net."""
PREFIX = "fold_"

Sides = Callable[[Split], tuple[list[PreparedCase], list[PreparedCase]]]
"""Split → prepared training and validation cases."""


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold.

    Args:
        number: which.
        run: its folder.
        experiment: as if it were trained alone.
        split: which cases train and validate.
    """

    number: int
    run: Path
    experiment: Experiment
    split: Split


@dataclass(frozen=True, eq=False)
class Folds:
    """A run of several folds.

    Args:
        run: the folder that holds theirs.
        members: the folds in their order.
        info: plan and model of all.
        cases: everything in the data folder, by id.
        finished: counters of the folds whose training is done, by their number.
    """

    run: Path
    members: tuple[Fold, ...]
    info: BundleInfo
    cases: Mapping[str, Case]
    finished: dict[int, Counters]

    def finish(self, fold: Fold) -> None:
        """Write down that a fold is done: it is skipped when the run goes on."""
        self.finished[fold.number] = read_counters(fold.run)
        self.write()

    def write(self) -> None:
        """Write `folds.json`."""
        content = {
            "members": [fold.run.name for fold in self.members],
            "finished": [f"{PREFIX}{number}" for number in sorted(self.finished)],
        }
        with whole_file(self.run / FOLDS_FILE, ".json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def preparation(self, experiment: Experiment, console: Console, store: Store) -> Sides:
        """A function that gives each fold its prepared cases; they are prepared once, when the first asks."""
        wanted = {i for fold in self.members if fold.number not in self.finished for i in _ids(fold.split)}

        @cache
        def prepared() -> dict[str, PreparedCase]:
            everything = Split(tuple(sorted(wanted)), (), (), "all folds")
            cases, _ = prepare(experiment, self.info, self.cases, everything, console, store)
            return {case.case_id: case for case in cases}

        def sides(split: Split) -> tuple[list[PreparedCase], list[PreparedCase]]:
            return [prepared()[i] for i in split.train], [prepared()[i] for i in split.val]

        return sides


def begin_folds(
    experiment: Experiment, run: Path, device: torch.device, console: Console, store: Store, found: DataFolder
) -> Folds:
    """Read and divide the cases, plan once for all folds, and make the folder of each.

    Raises:
        MedsegError: what `settle` refuses.
    """
    settled = settle(experiment, device, console, store, folder=found)
    members = []
    for number, split in zip(experiment.fold_numbers, settled.splits, strict=True):
        folder = run / f"{PREFIX}{number}"
        folder.mkdir()
        alone = dataclasses.replace(experiment, fold=number, folds=None)
        write_config(alone, folder)
        settled.write(folder, split)
        members.append(Fold(number, folder, alone, split))
    settled.info.plan.write(run / PLAN_FILE)
    write_splits(run / SPLITS_FILE, settled.splits)
    folds = Folds(run, tuple(members), settled.info, settled.cases, {})
    folds.write()  # last: what has this file can go on
    return folds


def go_on_folds(experiment: Experiment, run: Path, console: Console, store: Store | None = None) -> Folds:
    """The folds as they were when the run began, and which of them are done.

    Raises:
        MedsegError: E_RUN if this is no run of several folds, or one of them is not there; as `go_on` besides.
    """
    content = read_folds(run)
    members = []
    for name in content["members"]:
        folder = run / name
        info = BundleInfo.read(folder)
        number = int(name.removeprefix(PREFIX))
        alone = dataclasses.replace(experiment, fold=number, folds=None, resume=str(folder))
        members.append(Fold(number, folder, alone, read_split(folder / SPLIT_FILE)))
    # From their checkpoints: a fold may have gone on alone since (resume=RUN/fold_0).
    finished = {fold.number: read_counters(fold.run) for fold in members if fold.run.name in content["finished"]}
    before = members[0].run / SURVEY_FILE
    cases = cases_again(experiment, info, [fold.split for fold in members], console, before, store)
    return Folds(run, tuple(members), info, cases, finished)


def read_folds(run: Path) -> dict[str, list[str]]:
    """`folds.json` of a run of several folds.

    Raises:
        MedsegError: E_RUN if it is not there, or is none.
    """
    path = run / FOLDS_FILE
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if not content["members"] or not all(n.removeprefix(PREFIX).isdigit() for n in content["members"]):
            raise ValueError("no names of folds")
        return {"members": content["members"], "finished": list(content.get("finished", ()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedsegError(
            Code.RUN,
            "this is no run of several folds, or its list of folds cannot be read",
            where=path,
            expected='{"members": ["fold_0", …]}',
            got=f"{type(error).__name__}: {error}",
        ) from error


def _ids(split: Split) -> tuple[str, ...]:
    return (*split.train, *split.val)
