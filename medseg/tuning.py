"""A search for settings: `medseg tune` trains trial after trial, and Optuna chooses what to try next.

The study lies in the folder of its trials as a file that only grows: the same command goes on with it, a second one on
the same folder shares the work, and a trial that was killed goes on where it was.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from medseg.config import compose, resumed, search_space
from medseg.errors import Code, MedsegError
from medseg.program import command
from medseg.reports.sweep import conclude_sweep
from medseg.tasks import SEGMENTATION, TASKS, task_of
from medseg.training.distributed import is_launched
from medseg.training.experiment import Experiment
from medseg.training.run_folder import has_begun, write_refusal
from medseg.training.train import train

if TYPE_CHECKING:
    from optuna import Study, Trial

CONFIG_NAME = TASKS[SEGMENTATION].config
STUDY_FILE = "study.log"
"""Optuna's journal: lines of JSON."""
PASSABLE = (Code.LIMIT, Code.NAN_LOSS, Code.MODEL)
"""Refusals that a trial's own values may cause: the search goes on. Others would come again with every trial."""
MACHINE = (Code.OUTPUT, Code.PROCESS, Code.ARCHIVE)
"""Refusals that are the machine's: when it is mended, the same command goes on with the trial."""
NUM_FIRST = 5
"""Trials whose values are drawn at random, and that are never ended early: there is nothing to compare them with."""
UNPRUNED = 0.3
"""Share of a training before which no trial is ended early."""
ENDED_EARLY = "ended early: worse than half of the others at this point"
_Space = Mapping[str, tuple[str, ...] | tuple[float, float, bool]]


def tune(overrides: Sequence[str], folder: Path, *, num_trials: int, prunes: bool, console: Console) -> None:
    """Train trials until there are enough, and compare them.

    Args:
        overrides: as of `medseg train -m`; the keys with several values or an interval are searched.
        folder: of the study and its trials.
        num_trials: how many in all, those of earlier calls included.
        prunes: whether trials are ended early that are worse than half of the others at the same point.
        console: where the user reads.
    Raises:
        MedsegError: E_CONFIG if nothing is searched, the study in the folder is another one, or Optuna is missing; what
            every trial would refuse.
    """
    fixed, space = search_space(overrides)
    _refuse(overrides, space)
    _check(fixed, space)
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(folder, space, prunes=prunes)
    _take_up_killed(study, folder, console)
    try:
        while _is_unfinished(study, num_trials):
            _one_trial(study, fixed, space, folder, console)
    except (KeyboardInterrupt, SystemExit):
        console.print("go on with the search by the same command", highlight=False)
        raise
    conclude_sweep(folder, console)
    _say_best(study, folder, console)


def open_study(folder: Path, space: _Space, *, prunes: bool) -> Study:
    """The study in a folder, begun if there is none.

    Raises:
        MedsegError: E_CONFIG if it searches something else, or Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise MedsegError(
            Code.CONFIG,
            "Optuna is not installed",
            where="medseg tune",
            got=error,
            remedy="python -m pip install 'medseg[sweep]'",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
    study = optuna.create_study(study_name="medseg", storage=storage, direction="maximize", load_if_exists=True)
    median = optuna.pruners.MedianPruner(n_startup_trials=NUM_FIRST, n_warmup_steps=round(100 * UNPRUNED))
    study.pruner = median if prunes else optuna.pruners.NopPruner()
    # Not the same first draws again when it goes on, or beside another process
    study.sampler = optuna.samplers.TPESampler(seed=len(study.get_trials(deepcopy=False)) + os.getpid())
    stated = {key: list(values) for key, values in space.items()}
    if (before := study.user_attrs.get("space", stated)) != stated:
        raise MedsegError(
            Code.CONFIG,
            "the study in this folder searches something else",
            where=folder,
            expected=before,
            got=stated,
            remedy="choose another folder: -o FOLDER",
        )
    study.set_user_attr("space", stated)
    return study


def _refuse(overrides: Sequence[str], space: _Space) -> None:
    if is_launched():
        raise MedsegError(
            Code.CONFIG,
            "torchrun starts the processes of one run, and a search is many",
            where="medseg tune",
            remedy="leave torchrun out: trainer.devices=N starts the processes of each trial",
        )
    if task_of(overrides) is not TASKS[SEGMENTATION]:
        raise MedsegError(
            Code.CONFIG,
            "only settings of a segmentation are searched",
            where="task",
            remedy="compare trainings of another task by a sweep: medseg train -m task=… KEY=A,B",
        )
    if not space:
        raise MedsegError(
            Code.CONFIG,
            "nothing is searched",
            where=" ".join(overrides),
            expected="a key with several values, or with an interval",
            remedy="such as model=unet,fusionnet or 'optimizer.lr=tag(log,interval(1e-4,1e-2))'",
        )


def _check(fixed: Sequence[str], space: _Space) -> None:
    """Compose each value once: a mistyped one is said before the first trial.

    Raises:
        MedsegError: E_CONFIG.
    """
    most = max(len(values) if _is_choice(values) else 2 for values in space.values())
    for number in range(most):
        chosen = [f"{key}={values[min(number, _last(values))]}" for key, values in space.items()]
        compose(CONFIG_NAME, [*fixed, *chosen])


def _one_trial(study: Study, fixed: Sequence[str], space: _Space, folder: Path, console: Console) -> None:
    from optuna import TrialPruned
    from optuna.trial import TrialState

    trial = study.ask()
    trial.set_user_attr("process", _this_process())
    run = folder / trial.user_attrs.get("run", f"trial_{trial.number:03d}")
    trial.set_user_attr("run", run.name)
    chosen = {key: _suggest(trial, key, values) for key, values in space.items()}
    console.rule(f"{run.name}: {', '.join(f'{key}={value}' for key, value in chosen.items())}")

    def watch(progress: float, dice: float) -> None:
        trial.report(dice, round(100 * min(progress, 1.0)))
        if trial.should_prune():
            raise TrialPruned

    try:
        result = train(_experiment(run, fixed, chosen), run, console, watch)
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        write_refusal(run, ENDED_EARLY)
        console.print(ENDED_EARLY, highlight=False)
    except MedsegError as refusal:
        if refusal.code in MACHINE:  # it counts as running, and is taken up again
            raise
        study.tell(trial, state=TrialState.FAIL)
        write_refusal(run, refusal)
        if refusal.code not in PASSABLE:
            raise
        console.print(f"{refusal}", highlight=False, markup=False, soft_wrap=True)
    else:
        study.tell(trial, result.best_dice)


def _experiment(run: Path, fixed: Sequence[str], chosen: Mapping[str, Any]) -> Experiment:
    """Of a new trial, or of one that goes on."""
    experiment: Experiment
    if has_begun(run):
        experiment = resumed(run, [])
    else:
        experiment = compose(CONFIG_NAME, [*fixed, *(f"{key}={value}" for key, value in chosen.items())])
    return experiment


def _suggest(trial: Trial, key: str, values: tuple[str, ...] | tuple[float, float, bool]) -> Any:
    if _is_choice(values):
        return trial.suggest_categorical(key, values)
    low, high, log = values[0], values[1], bool(values[2])
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    return trial.suggest_float(key, float(low), float(high), log=log)


def _is_choice(values: Sequence[Any]) -> bool:
    return isinstance(values[0], str)


def _last(values: Sequence[Any]) -> int:
    return len(values) - 1 if _is_choice(values) else 1


def _is_unfinished(study: Study, num_trials: int) -> bool:
    """Whether there is a trial to begin, or one that goes on (it has the folder of the one that was killed)."""
    trials = study.get_trials(deepcopy=False)
    runs = {trial.user_attrs["run"] for trial in trials if "run" in trial.user_attrs}
    return len(runs) < num_trials or any(trial.state.name == "WAITING" for trial in trials)


def _take_up_killed(study: Study, folder: Path, console: Console) -> None:
    """Trials whose process is gone go on as new ones with the same values, in the same folder."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        machine, process = trial.user_attrs.get("process", [None, 0])
        if machine not in (None, _this_process()[0]) or (machine is not None and _is_alive(process)):
            continue
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            run = trial.user_attrs["run"]
            study.enqueue_trial(trial.params, user_attrs={"run": run})
            console.print(f"{run} was cut short and goes on", highlight=False)


def _this_process() -> list[Any]:
    return [uuid.uuid5(uuid.NAMESPACE_OID, str(uuid.getnode())).hex, os.getpid()]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


def _say_best(study: Study, folder: Path, console: Console) -> None:
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return
    best = study.best_trial
    values = " ".join(f"{key}={value}" for key, value in best.params.items())
    run = folder / best.user_attrs["run"]
    console.print(
        f"best of {len(done)}: {run.name}, validation Dice {best.value:.4f}, with {values}\n"
        f"use: {command('predict', run)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
