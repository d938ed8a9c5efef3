"""Prediction on a Ray cluster: workers that keep the models warm, and one process that keeps the books.

A worker fetches, predicts and writes the files of a case, but gives them no names; what it hands back is the line of
the manifest. Only this process adds lines and gives names, so that whatever dies on the way, each case is done once:
the work of a lost worker is done again, its half-written files have no names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.data.layouts import Case
from medseg.inference.ensemble import Ensemble
from medseg.inference.folder import Engine, export_of, subset_of
from medseg.inference.job import Done, Job, Options, Scan
from medseg.inference.manifest import Manifest
from medseg.remote.exchange import Remote
from medseg.remote.pool import Failed, Pool, cluster, failure, located, refuse_unpacked, resources


class Worker:
    """One process of the cluster with the models loaded.

    Args:
        run: whose models.
        settings: of `Ensemble.from_run`.
        options: what is written, and how.
        ends: source and sink.
        folder: of the outputs, which every node sees.
        session: of the manifest.
        num_threads: of a worker without a GPU.
    """

    def __init__(
        self,
        run: Path,
        settings: Mapping[str, Any],
        options: Options,
        ends: tuple[Any, Any],
        folder: Path,
        session: str,
        num_threads: int,
    ) -> None:
        self.run, self.settings, self.options = run, settings, options
        self.ends, self.folder, self.session, self.num_threads = ends, folder, session, num_threads

    def ready(self) -> None:
        """Load the models. Not when the worker is made: Ray would not say what was wrong then."""
        import torch
        from rich.console import Console

        from medseg.inference.progress import cases_bar

        torch.set_num_threads(self.num_threads)
        console = Console(quiet=True)
        ensemble = Ensemble.from_run(self.run, **self.settings)
        manifest = Manifest(self.folder, "", {})  # read only: what is done
        manifest.session = self.session
        self.remote = Remote(*self.ends).__enter__()
        self.job = Job(
            ensemble,
            subset_of(ensemble, self.options),
            export_of(ensemble, self.options),
            manifest,
            self.options,
            console,
            cases_bar(console, 1),
            1,
            {},
            self.remote,
        )

    def work(self, case: Case) -> Done | Failed | None:
        """Do a case; None where it is done."""
        job = self.job
        try:
            scan = job.predict(case, job.read(case))
            return None if scan.prediction is None else job.make(scan.case, scan, scan.prediction)
        except Exception as error:
            fatal = error is job.fatal or self.remote.is_fatal(error)
            return failure(error, digest=job.digests.get(case.case_id), fatal=fatal)
        finally:
            job.exchange.drop(case)
            job.digests.pop(case.case_id, None)

    def close(self) -> None:
        """Remove what was fetched."""
        self.remote.__exit__(None, None, None)


class Predictions:
    """The books of a prediction.

    Args:
        job: takes what is done.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def begin(self, worker: Any, case: Case) -> Any:
        """Predict it."""
        return worker.work.remote(located(case))

    def take(self, case: Case, result: Done | None) -> None:
        """Its line and its names; None of a case that was done before."""
        if result is None:
            self.job.write(case, Scan(case, None))
            return
        self.job.settle(replace(result, made=replace(result.made, folder=self.job.manifest.folder)))
        self.job.bar.advance(self.job.task)

    def fail(self, case: Case, failed: Failed) -> None:
        """Its line, or the end."""
        if failed.digest is not None:
            self.job.digests[case.case_id] = failed.digest
        if failed.fatal:
            self.job.fatal = failed.error
        self.job.write(case, failed.error)


def ray_engine(run: Path, settings: Mapping[str, Any], num_workers: int | None = None) -> Engine:
    """What brings cases through a job on a Ray cluster: that of RAY_ADDRESS, or one of this machine.

    Args:
        run: whose models; a path that every node sees.
        settings: of `Ensemble.from_run`, as the workers load it.
        num_workers: processes; None: one for each GPU, or for each node where there is none.
    """

    def engine(job: Job, cases: Sequence[Case]) -> None:
        with cluster() as ray:
            refuse_unpacked(ray, cases)
            for case in cases:
                if case.case_id in job.refused:
                    job.write(case, job.refused[case.case_id])
            left = [case for case in cases if case.case_id not in job.refused]
            with Pool(ray, job.console, *_making(ray, job, run, settings, num_workers)) as pool:
                pool.work(left, Predictions(job))

    return engine


def _making(
    ray: Any, job: Job, run: Path, settings: Mapping[str, Any], num_workers: int | None
) -> tuple[Callable[[], Any], int]:
    """How a worker is started, and how many are."""
    nodes = resources(ray)
    num_gpus = 0 if settings.get("device") == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    number = num_workers or num_gpus or len(nodes)
    on_each = -(-number // len(nodes))
    threads = max(1, int(min(node["CPU"] for node in nodes)) // on_each)
    if num_gpus:  # several workers share a GPU where there are more of them
        needs = {"num_gpus": min(1.0, num_gpus / number), "num_cpus": 1}
    else:
        needs = {"num_gpus": 0, "num_cpus": threads}
    actor = ray.remote(Worker).options(**needs, max_restarts=0, scheduling_strategy="SPREAD")
    exchange = job.exchange
    ends = (exchange.source, exchange.sink) if isinstance(exchange, Remote) else (None, None)
    # The precision of this process is that of all: it stands in the manifest, and decides the voxels.
    shared = {**settings, "precision": job.ensemble.predictors[0].config.precision}
    arguments = (run.absolute(), shared, job.options, ends, job.manifest.folder.absolute(), job.manifest.session)

    def make() -> Any:
        return actor.remote(*arguments, threads)

    return make, number
