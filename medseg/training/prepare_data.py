"""`medseg prepare`: read and prepare the cases of a training before it, here or on a Ray cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from medseg.data.cases import Case
from medseg.data.splits import Split, usable
from medseg.errors import Code, MedsegError
from medseg.program import command
from medseg.reports.progress import counting_bar
from medseg.training.beginning import Settled, found_cases, open_store, prepare, settle
from medseg.training.experiment import Experiment
from medseg.training.plan_data import RUNS_FOLDER, planned_device


def prepare_data(
    experiment: Experiment,
    console: Console | None = None,
    *,
    engine: Literal["local", "ray"] = "local",
    num_workers: int | None = None,
    stated: Sequence[str] = (),
) -> Path:
    """Prepare all cases that a training would read, so that it finds them in the store.

    Args:
        experiment: as for the training.
        console: where the user reads.
        engine: threads of this process, or the workers of a Ray cluster, which see data and store at the same paths.
        num_workers: of the cluster; None: one for each processor that has memory for one.
        stated: the keys that the user stated, for the command that trains.
    Returns:
        The folder of the store.
    Raises:
        MedsegError: what the data, the configuration, the machine or the cluster refuse.
    """
    console = console or Console()
    data = experiment.data
    store = open_store(data, Path(RUNS_FOLDER).absolute() / "none")
    if store.folder is None:
        raise MedsegError(
            Code.CONFIG,
            "what is prepared ahead has to be kept, and nothing is",
            where="data.store",
            remedy="leave data.store=null out, or name a folder: data.store=FOLDER",
        )
    device = planned_device(experiment)
    folder = found_cases(data, console)
    if engine == "local":
        settled = settle(experiment, device, console, store, folder=folder)
        everything = Split(tuple(case.case_id for case in _used(settled)), (), (), "all")
        on_disk = dataclasses.replace(experiment, data=dataclasses.replace(data, in_memory=False))
        prepare(on_disk, settled.info, settled.cases, everything, console, store)
    else:
        from medseg.remote.preparing import ray_preparing  # Ray, which is an extra

        wanted = dataclasses.replace(folder, cases=tuple(usable(folder.cases, data.split)))
        with ray_preparing(store, data.reading, console, num_workers) as preparing:
            with counting_bar(console, "reading every case once") as progress:
                preparing.read(wanted, data.labels, data.regions_order, progress)
            settled = settle(experiment, device, console, store, folder=folder)
            with counting_bar(console, "preparing the cases") as progress:
                lines = preparing.prepare(_used(settled), settled.info.plan, settled.info.labels, progress)
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
    train = command("train", *(stated or [f"data.root={data.root}"]))
    console.print(f"a training finds them: {train}", highlight=False, soft_wrap=True, markup=False)
    return store.folder


def _used(settled: Settled) -> list[Case]:
    """The cases that train or validate in any of the folds."""
    wanted = dict.fromkeys(case_id for split in settled.splits for case_id in (*split.train, *split.val))
    return [settled.cases[case_id] for case_id in sorted(wanted)]
