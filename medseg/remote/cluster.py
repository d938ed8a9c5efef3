"""Cases on a Ray cluster: workers that keep the models warm, and one process that keeps the books.

A worker fetches, predicts and writes the files of a case, but gives them no names; what it hands back is the line of
the manifest. Only this process adds lines and gives names, so that whatever dies on the way, each case is done once:
the work of a lost worker is done again, its half-written files have no names.

At most `AHEAD` cases are with each worker, so that a cluster never holds more than it can chew.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.formats import Source
from medseg.formats.dicom.archive import is_unpacked
from medseg.inference.ensemble import Ensemble
from medseg.inference.export import files_of
from medseg.inference.folder import Engine, export_of, subset_of
from medseg.inference.job import Done, Job, Options, Scan, say
from medseg.inference.manifest import Manifest
from medseg.remote.exchange import Remote

AHEAD = 2
"""Cases with one worker: the one that it works on, and one that waits for it."""
ATTEMPTS = 3
"""Of a case that kills its worker, or meets an archive or a memory that fails it."""
STARTS = 3
"""Workers that may fail to start, one after the other."""
PATIENCE_S = 30.0
"""Wait for the cluster before the user is told that one does."""
AGAIN = (Code.ARCHIVE, Code.LIMIT, Code.TRUNCATED)
"""Refusals that may be gone at the next attempt; the others are the case's."""


@dataclass(frozen=True, eq=False)
class Failed:
    """A case that a worker could not do."""

    error: Exception
    digest: str | None
    fatal: bool
    """The next case would fare no better."""


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
        import torch
        from rich.console import Console

        from medseg.inference.progress import cases_bar

        torch.set_num_threads(num_threads)
        console = Console(quiet=True)
        ensemble = Ensemble.from_run(run, **settings)
        manifest = Manifest(folder, "", {})  # read only: what is done
        manifest.session = session
        self.remote = Remote(*ends).__enter__()
        self.job = Job(
            ensemble,
            subset_of(ensemble, options),
            export_of(ensemble, options),
            manifest,
            options,
            console,
            cases_bar(console, 1),
            1,
            {},
            self.remote,
        )

    def ready(self) -> None:
        """Answers when the models are loaded."""

    def work(self, case: Case) -> Done | Failed | None:
        """Do a case; None where it is done."""
        job = self.job
        try:
            scan = job.predict(case, job.read(case))
            return None if scan.prediction is None else job.make(scan.case, scan, scan.prediction)
        except Exception as error:
            fatal = error is job.fatal or self.remote.is_fatal(error)
            return Failed(_sendable(error), job.digests.get(case.case_id), fatal)
        finally:
            job.exchange.drop(case)
            job.digests.pop(case.case_id, None)

    def close(self) -> None:
        """Remove what was fetched."""
        self.remote.__exit__(None, None, None)


def ray_engine(run: Path, settings: Mapping[str, Any], num_workers: int | None = None) -> Engine:
    """What brings cases through a job on a Ray cluster: that of RAY_ADDRESS, or one of this machine.

    Args:
        run: whose models; a path that every node sees.
        settings: of `Ensemble.from_run`, as the workers load it.
        num_workers: processes; None: one for each GPU, or for each node where there is none.
    """

    def engine(job: Job, cases: Sequence[Case]) -> None:
        with _cluster() as ray:
            _refuse_unpacked(ray, cases)
            Pool(ray, job, _making(ray, job, run, settings, num_workers)).work(cases)

    return engine


class Pool:
    """Workers, and which cases they have.

    Args:
        ray: the module.
        job: takes what is done.
        make: starts one worker, and says how many there are to be.
    """

    def __init__(self, ray: Any, job: Job, make: tuple[Callable[[], Any], int]) -> None:
        self.ray, self.job = ray, job
        self.make, self.num_workers = make
        self.starting: dict[Any, Any] = {}
        """What tells that a worker is ready → the worker."""
        self.busy: dict[Any, deque[tuple[Any, Case]]] = {}
        """Worker → its cases in their order, each with what brings its result."""
        self.attempts: dict[str, int] = {}
        self.failed_starts = 0

    def work(self, cases: Sequence[Case]) -> None:
        """Bring all cases through the job.

        Raises:
            MedsegError: E_ARCHIVE where no worker starts; what ends the work, as `Job.write` does.
        """
        waiting: deque[Case] = deque()
        try:
            for case in cases:
                if case.case_id in self.job.refused:
                    self.job.write(case, self.job.refused[case.case_id])
                else:
                    waiting.append(case)
            for _ in range(min(self.num_workers, len(waiting))):
                self._start()
            while waiting or any(self.busy.values()):
                self._hand_out(waiting)
                pending = [*self.starting, *(result for queue in self.busy.values() for result, _ in queue)]
                ready, _ = self.ray.wait(pending, num_returns=1, timeout=PATIENCE_S)
                if not ready and not any(self.busy.values()):
                    say(self.job.console, ["waiting for the cluster: it has no room for a worker"])
                for result in ready:
                    if result in self.starting:
                        self._started(result)
                    else:
                        self._take(result, waiting)
        finally:
            self._end()

    def _start(self) -> None:
        worker = self.make()
        self.starting[worker.ready.remote()] = worker

    def _hand_out(self, waiting: deque[Case]) -> None:
        for depth in range(1, AHEAD + 1):  # one for each, before anybody gets a second
            for worker, queue in self.busy.items():
                if waiting and len(queue) < depth:
                    case = waiting.popleft()
                    queue.append((worker.work.remote(located(case)), case))

    def _started(self, result: Any) -> None:
        worker = self.starting.pop(result)
        try:
            self.ray.get(result)
        except Exception as error:
            refusal = getattr(error, "cause", None)
            if isinstance(refusal, MedsegError):
                raise refusal from error
            self.failed_starts += 1
            if self.failed_starts >= STARTS:
                raise MedsegError(
                    Code.ARCHIVE,
                    "the workers of the Ray cluster do not start",
                    expected="nodes with medseg, and the run and the output folder at the same paths",
                    got=type(error).__name__,
                    remedy="look into Ray's logs on the nodes; begin with --workers 1",
                ) from error
            self._start()
        else:
            self.failed_starts = 0
            self.busy[worker] = deque()

    def _take(self, result: Any, waiting: deque[Case]) -> None:
        found = next(((w, case) for w, queue in self.busy.items() for ref, case in queue if ref == result), None)
        if found is None:  # of a worker that was given up in this round
            return
        worker, case = found
        try:
            outcome = self.ray.get(result)
        except self.ray.exceptions.RayError as error:
            self._lost(worker, waiting, error)
            return
        self.busy[worker] = deque(item for item in self.busy[worker] if item[1] is not case)
        if isinstance(outcome, Failed):
            self._failed(case, outcome, waiting)
        elif isinstance(outcome, Done):
            self.job.settle(replace(outcome, made=replace(outcome.made, folder=self.job.manifest.folder)))
            self.job.bar.advance(self.job.task)
        else:
            self.job.write(case, Scan(case, None))

    def _failed(self, case: Case, outcome: Failed, waiting: deque[Case]) -> None:
        again = isinstance(outcome.error, MedsegError) and outcome.error.code in AGAIN and not outcome.fatal
        if again and self._may_try(case):
            waiting.append(case)
            return
        if outcome.digest is not None:
            self.job.digests[case.case_id] = outcome.digest
        if outcome.fatal:
            self.job.fatal = outcome.error
        self.job.write(case, outcome.error)

    def _lost(self, worker: Any, waiting: deque[Case], error: Exception) -> None:
        """A worker died: the case that it worked on has had an attempt, those that waited for it have not."""
        (_, first), *others = self.busy.pop(worker)
        waiting.extendleft(case for _, case in reversed(others))
        if self._may_try(first):
            waiting.appendleft(first)
            say(self.job.console, [f"{first.case_id}: a worker was lost ({type(error).__name__}); it is done again"])
        else:
            refusal = MedsegError(
                Code.LIMIT,
                f"the case has ended {ATTEMPTS} workers",
                where=first.case_id,
                got=type(error).__name__,
                remedy="predict it alone, without --engine ray; perhaps the memory does not suffice",
            )
            self.job.write(first, refusal)
        if waiting:
            self._start()

    def _may_try(self, case: Case) -> bool:
        self.attempts[case.case_id] = self.attempts.get(case.case_id, 0) + 1
        return self.attempts[case.case_id] < ATTEMPTS

    def _end(self) -> None:
        """Let the workers remove what they have fetched, then end them."""
        workers = [*self.busy, *self.starting.values()]
        closing = [worker.close.remote() for worker in self.busy]
        if closing:
            self.ray.wait(closing, num_returns=len(closing), timeout=PATIENCE_S)
        for worker in workers:
            self.ray.kill(worker)


def _refuse_unpacked(ray: Any, cases: Sequence[Case]) -> None:
    """Refuse what was unpacked from a zip into a folder that other nodes do not see."""
    here = ray.get_runtime_context().get_node_id()
    if all(node["NodeID"] == here for node in _nodes(ray)):
        return
    for case in cases:
        if any(is_unpacked(path) for path in files_of(case.images)):
            raise MedsegError(
                Code.CONFIG,
                "a zip is unpacked on this machine alone, and the cluster has other nodes",
                where=case.case_id,
                expected="scans at a path that every node sees",
                got="a zip",
                remedy="unpack it into a folder that all nodes share, and name that folder",
            )


def _nodes(ray: Any) -> list[Mapping[str, Any]]:
    """Those that may work."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _making(
    ray: Any, job: Job, run: Path, settings: Mapping[str, Any], num_workers: int | None
) -> tuple[Callable[[], Any], int]:
    """How a worker is started, and how many are."""
    nodes = [node["Resources"] for node in _nodes(ray)]
    if not nodes:
        raise MedsegError(
            Code.ARCHIVE,
            "the Ray cluster has no processors",
            expected="a node with CPUs",
            remedy="add nodes: ray start --address=…",
        )
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


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected.

    Raises:
        MedsegError: E_MISSING where it is not installed; E_ARCHIVE where the cluster is out of reach.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would report to its makers
    try:
        import ray
    except ImportError as error:
        raise MedsegError(
            Code.MISSING,
            "the engine needs a package that is not installed",
            where="--engine ray",
            expected="ray",
            remedy='pip install "medseg[ray]"',
        ) from error
    if ray.is_initialized():
        yield ray
        return
    try:
        here = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MedsegError(
            Code.ARCHIVE,
            "the Ray cluster cannot be reached",
            where="RAY_ADDRESS",
            got=type(error).__name__,
            remedy="check RAY_ADDRESS, or unset it to use this machine alone",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def located(case: Case) -> Case:
    """A case by paths that mean the same in every process."""
    return replace(case, images=tuple(map(_located, case.images)))


def _located(source: Source) -> Source:
    if isinstance(source, Path):
        return source.absolute()
    return replace(source, files=tuple(path.absolute() for path in source.files))


def _sendable(error: Exception) -> Exception:
    """An error that survives the way between processes: other kinds than these may not."""
    if isinstance(error, (MedsegError, MemoryError)):
        return error
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return MemoryError(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))
