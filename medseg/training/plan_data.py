"""`medseg plan`: what a training would do with a folder of cases, and why; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from medseg.data.plan import Plan
from medseg.data.plan.file import PLAN_FILE
from medseg.device import choose_device
from medseg.program import command
from medseg.reports.plan_table import print_anomalies, print_plan
from medseg.training.beginning import SURVEY_FILE, settle
from medseg.training.experiment import Experiment


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
    settled = settle(experiment, planned_device(experiment), console, say_anomalies=False)
    plan = settled.info.plan
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder / PLAN_FILE)
    (folder / SURVEY_FILE).write_text(json.dumps(settled.found.to_json(), indent=1), encoding="utf-8")
    console.print()
    print_plan(plan, console)
    console.print()
    print_anomalies(settled.found.anomalies, console)
    keys = stated or [f"data.root={experiment.data.root}"]
    train = command("train", *(k for k in keys if not k.startswith(("plan=", "hydra."))), f"plan={folder}")
    console.print(
        f"\nwritten: {folder / PLAN_FILE}, {SURVEY_FILE}; change what you like, then:\n  {train}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return plan


def planned_device(experiment: Experiment) -> torch.device:
    """What is planned for. It need not be there where its memory is stated (`data.plan.memory_gb`)."""
    name = experiment.trainer.device
    if name.startswith("cuda") and experiment.data.plan.memory_gb is not None:
        return torch.device("cuda")
    return choose_device(name)
