"""`medseg plan`: what a training would do with a folder of cases, and why; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from medseg.data.plan import Plan
from medseg.data.plan.file import PLAN_FILE
from medseg.data.store import Decoded, Store
from medseg.device import choose_device
from medseg.program import command
from medseg.reports.plan_table import print_anomalies, print_plan
from medseg.training.beginning import SURVEY_FILE, open_store, settle, write_survey
from medseg.training.experiment import DataConfig, Experiment

RUNS_FOLDER, PLANS_FOLDER = "runs", "plans"
"""Where runs and plans lie by default (configs/train.yaml, configs/plan.yaml)."""


def plan_data(
    experiment: Experiment, folder: Path, console: Console | None = None, *, stated: Sequence[str] = ()
) -> Plan:
    """Read the cases, plan, and write plan.yaml and survey.json.

    Args:
        experiment: as for a training.
        folder: for both files.
        console: where the user reads.
        stated: the keys that the user stated, for the command that trains by the plan.
    Raises:
        MedsegError: what the data, the configuration or the machine refuse.
    """
    console = console or Console()
    store = shared_store(experiment.data, folder)
    settled = settle(experiment, planned_device(experiment), console, store, say_anomalies=False)
    plan = settled.info.plan
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder / PLAN_FILE)
    write_survey(settled.found, folder)
    console.print()
    print_plan(plan, console)
    console.print()
    print_anomalies(settled.found.anomalies, console)
    keys = [k for k in stated or [f"data.root={experiment.data.root}"] if not k.startswith(("plan=", "hydra."))]
    if experiment.data.store == "auto" and folder.parent.name != PLANS_FOLDER:
        keys.append(f"data.store={store.folder}")
    train = command("train", *keys, f"plan={folder}")
    console.print(
        f"\nwritten: {folder / PLAN_FILE}, {SURVEY_FILE}; change what you like, then:\n  {train}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return plan


def shared_store(data: DataConfig, folder: Path) -> Store:
    """The store in which a training finds what planning has read of the cases: by default that of `RUNS_FOLDER`.

    Args:
        data: names it.
        folder: of the plan.
    """
    beside = folder.parent.with_name(RUNS_FOLDER) if folder.parent.name == PLANS_FOLDER else folder.parent
    store = open_store(data, beside / folder.name)
    store.decoded = Decoded(0)  # nothing is prepared here
    return store


def planned_device(experiment: Experiment) -> torch.device:
    """What is planned for. It need not be there where its memory is stated (`data.plan.memory_gb`)."""
    name = experiment.trainer.device
    if name.startswith("cuda") and experiment.data.plan.memory_gb is not None:
        return torch.device("cuda")
    return choose_device(name)
