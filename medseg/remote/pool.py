"""Workers of a Ray cluster, and which cases they have: what is common to all that is done there.

A worker does a case and hands back what came of it; the process that began keeps the books. Whatever dies on the way,
each case is done once: what a lost worker had is done again, and one that ends its workers is set aside.

At most `AHEAD` cases are with each worker, so that a cluster never holds more than it can chew.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.formats import Source
from medseg.formats.dicom.archive import is_unpacked
from medseg.inference.export import files_of
from medseg.inference.job import say

AHEAD = 2
"""Cases with one worker: the one that it works on, and one that waits for it."""
ATTEMPTS = 3
"""Of a case that kills its worker, or meets an archive or a memory that fails it."""
STARTS = 3
"""Workers that may fail to start, one after the other."""
MAX_SAID = 200
"""Characters of what Ray says."""
PATIENCE_S = 30.0
"""Wait for the cluster before the user is told that one does."""
AGAIN = (Code.ARCHIVE, Code.LIMIT, Code.TRUNCATED, Code.MISSING)
"""Refusals that may be gone at the next attempt; the others are the case's."""
AWAY = (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)
"""Errors of a shared file system that does not answer."""
PAUSE_S = 5.0
"""Wait before the second attempt at a case; before the third it is twice as long."""


@dataclass(frozen=True, eq=False)
class Failed:
    """A case that could not be done."""

    error: Exception
    digest: str | None = None
    """Of its files, where they were read."""
    fatal: bool = False
    """The next case would fare no better."""
    lost: bool = False
    """It has ended the processes that worked on it."""
    is_away: bool = False
    """A shared file system did not answer."""


class Books(Protocol):
    """What a pool is to do with its cases, and who takes what came of each."""

    def begin(self, worker: Any, case: Case) -> Any:
        """Have a worker begin with a case: what brings the result, which is `Failed` where it failed."""
        ...

    def take(self, case: Case, result: Any) -> None:
        """A case is done."""
        ...

    def fail(self, case: Case, failed: Failed) -> None:
        """A case could not be done, and is not tried again. What is raised ends the work."""
        ...


class Pool:
    """Workers that stay warm until the block ends.

    Args:
        ray: the module.
        console: where the user reads.
        make: starts one worker, whose `ready` answers when it can work and whose `close` lets it clear up.
        num_workers: how many there are to be.
    """

    def __init__(self, ray: Any, console: Console, make: Callable[[], Any], num_workers: int) -> None:
        self.ray, self.console = ray, console
        self.make, self.num_workers = make, num_workers
        self.starting: dict[Any, Any] = {}
        """What tells that a worker is ready → the worker."""
        self.busy: dict[Any, deque[tuple[Any, Case]]] = {}
        """Worker → its cases in their order, each with what brings its result."""
        self.attempts: dict[str, int] = {}
        self.failed_on: dict[str, Any] = {}
        """Id of a case that is tried again → the worker that it failed on."""
        self.resting: list[tuple[float, Case]] = []
        """Cases that are tried again, and from when on (monotonic seconds)."""
        self.failed_starts = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the workers remove what they have fetched, then end them."""
        workers = [*self.busy, *self.starting.values()]
        closing = [worker.close.remote() for worker in self.busy]
        if closing:
            self.ray.wait(closing, num_returns=len(closing), timeout=PATIENCE_S)
        for worker in workers:
            self.ray.kill(worker)

    def work(self, cases: Sequence[Case], books: Books) -> None:
        """Have all cases done.

        Raises:
            MedsegError: E_ARCHIVE where no worker starts; what the books raise.
        """
        waiting = deque(cases)
        self.attempts.clear()
        self.failed_on.clear()
        self.resting.clear()
        for _ in range(min(self.num_workers, len(waiting)) - len(self.busy) - len(self.starting)):
            self._start()
        while waiting or self.resting or any(self.busy.values()):
            patience = self._wake(waiting)
            self._hand_out(waiting, books)
            pending = [*self.starting, *(result for queue in self.busy.values() for result, _ in queue)]
            if not pending:  # all that is left is resting
                time.sleep(patience)
                continue
            ready, _ = self.ray.wait(pending, num_returns=1, timeout=patience)
            if not ready and patience == PATIENCE_S and not any(self.busy.values()):
                say(self.console, ["waiting for the cluster: it has no room for a worker"])
            for result in ready:
                if result in self.starting:
                    self._started(result)
                else:
                    self._take(result, waiting, books)

    def _start(self) -> None:
        worker = self.make()
        self.starting[worker.ready.remote()] = worker

    def _hand_out(self, waiting: deque[Case], books: Books) -> None:
        for depth in range(1, AHEAD + 1):  # one for each, before anybody gets a second
            for worker, queue in self.busy.items():
                if len(queue) < depth and (case := self._next(worker, waiting)) is not None:
                    queue.append((books.begin(worker, case), case))

    def _next(self, worker: Any, waiting: deque[Case]) -> Case | None:
        """A case for a worker: one that failed on it is another's, where there are others."""
        for place, case in enumerate(waiting):
            if len(self.busy) == 1 or self.failed_on.get(case.case_id) is not worker:
                del waiting[place]
                return case
        return None

    def _wake(self, waiting: deque[Case]) -> float:
        """Let cases wait for a worker that have rested; seconds until the next one has, `PATIENCE_S` at most."""
        now = time.monotonic()
        waiting.extend(case for until, case in self.resting if until <= now)
        self.resting = [(until, case) for until, case in self.resting if until > now]
        return min((until - now for until, _ in self.resting), default=PATIENCE_S)

    def _started(self, result: Any) -> None:
        worker = self.starting.pop(result)
        try:
            self.ray.get(result)
        except Exception as error:
            self.ray.kill(worker)
            refusal = getattr(error, "cause", None)
            if isinstance(refusal, MedsegError):
                raise refusal from error
            self.failed_starts += 1
            if self.failed_starts >= STARTS:
                raise MedsegError(
                    Code.ARCHIVE,
                    "the workers of the Ray cluster do not start",
                    expected="nodes with medseg, and all folders at the same paths",
                    got=type(error).__name__,
                    remedy="look into Ray's logs on the nodes; begin with --workers 1",
                ) from error
            self._start()
        else:
            self.failed_starts = 0
            self.busy[worker] = deque()

    def _take(self, result: Any, waiting: deque[Case], books: Books) -> None:
        found = next(((w, case) for w, queue in self.busy.items() for ref, case in queue if ref == result), None)
        if found is None:  # of a worker that was given up in this round
            return
        worker, case = found
        try:
            outcome = self.ray.get(result)
        except self.ray.exceptions.RayError as error:
            self._lost(worker, waiting, books, error)
            return
        self.busy[worker] = deque(item for item in self.busy[worker] if item[1] is not case)
        if not isinstance(outcome, Failed):
            books.take(case, outcome)
            return
        again = outcome.is_away or (isinstance(outcome.error, MedsegError) and outcome.error.code in AGAIN)
        if again and not outcome.fatal and self._may_try(case):
            self.failed_on[case.case_id] = worker
            self.resting.append((time.monotonic() + PAUSE_S * self.attempts[case.case_id], case))
        else:
            books.fail(case, outcome)

    def _lost(self, worker: Any, waiting: deque[Case], books: Books, error: Exception) -> None:
        """A worker died: the case that it worked on has had an attempt, those that waited for it have not."""
        (_, first), *others = self.busy.pop(worker)
        waiting.extendleft(case for _, case in reversed(others))
        if self._may_try(first):
            waiting.appendleft(first)
            say(self.console, [f"{first.case_id}: a worker was lost ({type(error).__name__}); it is done again"])
        else:
            refusal = MedsegError(
                Code.LIMIT,
                f"the case has ended {ATTEMPTS} workers",
                where=first.case_id,
                got=type(error).__name__,
                remedy="do it alone, without --engine ray; perhaps the memory does not suffice for that many --workers",
            )
            books.fail(first, Failed(refusal, lost=True))
        if waiting or self.resting:
            self._start()

    def _may_try(self, case: Case) -> bool:
        self.attempts[case.case_id] = self.attempts.get(case.case_id, 0) + 1
        return self.attempts[case.case_id] < ATTEMPTS


@contextmanager
def cluster() -> Iterator[Any]:
    """Ray, connected: that of RAY_ADDRESS, or one of this machine.

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
    is_elsewhere = bool(os.environ.get("RAY_ADDRESS"))
    try:
        here = {} if is_elsewhere else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **here)
    except Exception as error:  # Ray raises Exception itself where one of its processes is late
        ray.shutdown()
        raise MedsegError(
            Code.ARCHIVE,
            "the Ray cluster cannot be reached" if is_elsewhere else "Ray does not start on this machine",
            where="RAY_ADDRESS" if is_elsewhere else "--engine ray",
            got=" ".join(f"{type(error).__name__}: {error}".split())[:MAX_SAID],
            remedy="check RAY_ADDRESS, or unset it to use this machine alone"
            if is_elsewhere
            else "begin again when the machine is less busy; or start one (ray start --head), and set RAY_ADDRESS",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def resources(ray: Any) -> list[Mapping[str, float]]:
    """What each node that may work has: CPU, GPU, memory in bytes.

    Raises:
        MedsegError: E_ARCHIVE where there is none.
    """
    nodes = [node["Resources"] for node in _nodes(ray)]
    if not nodes:
        raise MedsegError(
            Code.ARCHIVE,
            "the Ray cluster has no processors",
            expected="a node with CPUs",
            remedy="add nodes: ray start --address=…",
        )
    return nodes


def _nodes(ray: Any) -> list[Mapping[str, Any]]:
    """Those that may work."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def refuse_unpacked(ray: Any, cases: Sequence[Case]) -> None:
    """Refuse what was unpacked from a zip into a folder that other nodes do not see.

    Raises:
        MedsegError: E_CONFIG.
    """
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


def located(case: Case) -> Case:
    """A case by paths that mean the same in every process."""
    label = case.label.absolute() if isinstance(case.label, Path) else case.label
    return replace(case, images=tuple(map(_located, case.images)), label=label)


def _located(source: Source) -> Source:
    if isinstance(source, Path):
        return source.absolute()
    return replace(source, files=tuple(path.absolute() for path in source.files))


def failure(error: Exception, *, digest: str | None = None, fatal: bool = False) -> Failed:
    """What a worker hands back of a case: what the error was made of does not survive the way."""
    found: BaseException | None = error
    while found is not None and not (isinstance(found, OSError) and found.errno in AWAY):
        found = found.__cause__
    return Failed(sendable(error), digest, fatal, is_away=found is not None)


def sendable(error: Exception) -> Exception:
    """An error that survives the way between processes: other kinds than these may not."""
    if isinstance(error, OSError) and error.errno in AWAY:
        return MedsegError(
            Code.ARCHIVE,
            "a folder of the network does not answer",
            where=Path(error.filename).name if isinstance(error.filename, str) else None,
            got=error.strerror,
            remedy="see that all nodes reach it; the same command goes on",
        )
    if isinstance(error, (MedsegError, MemoryError)):
        return error
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return MemoryError(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))
