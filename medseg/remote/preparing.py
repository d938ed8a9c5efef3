"""Reading and preparing the cases of a training on a Ray cluster: what the workers find out lies in the store.

A worker reads a case for the survey, or prepares it, and keeps the entry in the store that all nodes see; it hands back
the digest of the files alone. Entries appear whole or not at all, under names that follow from content and settings
(`medseg.data.store`): what a lost worker had is done again, a case that is there is not, and a second run finds all.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from medseg.data.cases import Case, DataFolder
from medseg.data.plan import Plan
from medseg.data.preparation import preparation_lines, prepare_cases
from medseg.data.store import TEMPORARY, Decoded, Known, Store, code_digest
from medseg.data.survey import case_reader, labels_declared, raise_problems
from medseg.errors import Code, MedsegError
from medseg.formats import Reading
from medseg.inference.export import files_of
from medseg.labels import Labels
from medseg.remote.pool import Failed, Pool, cluster, failure, located, refuse_unpacked, resources

WORKER_BYTES = 4 * 2**30
"""Memory for which a worker is started: a large CT with its label, before and after."""
FATAL = (Code.OUTPUT, Code.CONFIG)
"""Of a worker: the store cannot be written, and the next case would not fare better."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Read:
    """A case that lies in the store."""

    known: Known | None
    """Of its files."""
    was_found: bool = False
    """The store had it before."""
    damaged: tuple[str, ...] = ()
    """What the store had and was damaged, in words."""


class Preparer:
    """One process of the cluster.

    Args:
        folder: of the store.
        mark: a file in it.
        code: `code_digest` of the process that began.
        reading: how the files are read.
        scan: a file of the data; None: it is not known yet.
    """

    def __init__(self, folder: Path, mark: str, code: str, reading: Reading, scan: Path | None = None) -> None:
        self.folder, self.mark, self.code, self.reading = folder, mark, code, reading
        self.scan = scan

    def ready(self) -> None:
        """Refuse what would be lost work.

        Raises:
            MedsegError: E_OUTPUT where this node does not see the store, E_MISSING where it does not see the data;
                E_CONFIG where it would find other keys.
        """
        if not (self.folder / self.mark).is_file():
            raise MedsegError(
                Code.OUTPUT,
                "a node of the cluster does not see the store",
                where="data.store",
                expected="a folder that all nodes share, at the same path",
                remedy="data.store=FOLDER names one; the scans have to be seen by all nodes too",
            )
        if self.scan is not None and not self.scan.is_file():
            raise MedsegError(
                Code.MISSING,
                "a node of the cluster does not see the scans",
                where=self.scan.name,
                expected="a folder that all nodes share, at the same path",
                remedy="data.root=FOLDER names one",
            )
        if code_digest() != self.code:
            raise MedsegError(
                Code.CONFIG,
                "a node of the cluster has another version of medseg, or of the libraries that it reads with",
                where="--engine ray",
                remedy="install the same versions on all nodes: what one prepares, another would not find",
            )
        self.store = Store(self.folder)
        self.store.decoded = Decoded(0)  # the next case is another one

    def read(self, case: Case, folder: DataFolder, labels: Labels | None) -> Read | Failed:
        """Read a case for the survey."""

        def work() -> bool:
            case_reader(folder, labels, self.reading, self.store)(case)
            return False

        return self._done(case, work)

    def prepare(self, case: Case, known: Known | None, plan: Plan, labels: Labels) -> Read | Failed:
        """Prepare a case."""
        self.store.know(case, known)

        def work() -> bool:
            settings: dict[str, Any] = {"num_threads": 1, "in_memory": False, "reading": self.reading}
            prepared = prepare_cases([case], plan, labels, store=self.store, **settings)
            if prepared.in_memory:  # nothing is kept of files that change meanwhile
                raise MedsegError(
                    Code.CHANGED,
                    "the files of the case changed while it was prepared",
                    where=case.case_id,
                    remedy="begin again when nobody writes them any more: what is prepared is not done twice",
                )
            return prepared.num_found == 1

        return self._done(case, work)

    def _done(self, case: Case, work: Callable[[], bool]) -> Read | Failed:
        self.store.damaged.clear()
        try:
            was_found = work()
            return Read(self.store.known(case), was_found, tuple(self.store.damaged))
        except Exception as error:
            fatal = isinstance(error, MedsegError) and error.code in FATAL
            return failure(error, fatal=fatal)
        finally:
            self.store.forget(case)

    def close(self) -> None:
        """Nothing is left behind."""


class _Books:
    """What came of each case.

    Args:
        begin: has a worker begin with a case.
        store: takes what is known of the files.
        num_cases: in all.
        progress: called with (done, total).
    """

    def __init__(
        self, begin: Callable[[Any, Case], Any], store: Store, num_cases: int, progress: Progress | None
    ) -> None:
        self.begin = begin
        self.store, self.num_cases, self.progress = store, num_cases, progress
        self.num_done = self.num_found = 0
        self.problems: dict[str, Failed] = {}

    def take(self, case: Case, result: Read) -> None:
        """Note what is known of its files."""
        self.store.know(case, result.known)
        self.store.damaged += result.damaged
        self.num_found += result.was_found
        self._count()

    def fail(self, case: Case, failed: Failed) -> None:
        """Note what is wrong; raise what is not the case's fault."""
        if failed.fatal or not isinstance(failed.error, (MedsegError, MemoryError)):
            failed.error.add_note(f"while working on case {case.case_id}")
            raise failed.error
        self.problems[case.case_id] = failed
        self._count()

    def _count(self) -> None:
        self.num_done += 1
        if self.progress is not None:
            self.progress(self.num_done, self.num_cases)


class Preparing:
    """A pool of `Preparer`s.

    Args:
        pool: of them.
        store: that they share.
        refuse: what other nodes could not see.
    """

    def __init__(self, pool: Pool, store: Store, refuse: Callable[[Sequence[Case]], None]) -> None:
        self.pool, self.store, self.refuse = pool, store, refuse

    def read(
        self,
        folder: DataFolder,
        declared_labels: Mapping[str, Any] | None,
        regions_order: Sequence[str] | None,
        progress: Progress | None = None,
    ) -> None:
        """Read all cases of a folder: `survey` then finds in the store what there is to know of them.

        What is wrong with single cases is left to the survey, which says it of all at once.

        Raises:
            MedsegError: E_LIMIT for cases that no worker outlives, which the survey would not outlive either; E_OUTPUT
                if the store cannot be written.
        """
        self.refuse(folder.cases)
        labels, _ = labels_declared(folder, declared_labels, regions_order)
        alone = replace(folder, cases=(), problems=())

        def begin(worker: Any, case: Case) -> Any:
            return worker.read.remote(located(case), alone, labels)

        books = self._work(folder.cases, begin, progress)
        deadly = {i: f for i, f in books.problems.items() if f.lost or isinstance(f.error, MemoryError)}
        raise_problems(_refusals(deadly), len(folder.cases), can_skip=False)

    def prepare(self, cases: Sequence[Case], plan: Plan, labels: Labels, progress: Progress | None = None) -> list[str]:
        """Prepare cases into the store, if it does not have them.

        Returns:
            What the user is told of it.
        Raises:
            MedsegError: what is wrong with any of them, once the others are done; E_OUTPUT at once.
        """

        def begin(worker: Any, case: Case) -> Any:
            return worker.prepare.remote(located(case), self.store.known(case), plan, labels)

        books = self._work(cases, begin, progress)
        raise_problems(_refusals(books.problems), len(cases), can_skip=False)
        damaged = self.store.damaged
        return preparation_lines(len(cases), books.num_found, damaged, self.store.folder)

    def _work(self, cases: Sequence[Case], begin: Callable[[Any, Case], Any], progress: Progress | None) -> _Books:
        books = _Books(begin, self.store, len(cases), progress)
        self.pool.work(cases, books)
        return books


@contextmanager
def ray_preparing(
    store: Store, reading: Reading, console: Console, num_workers: int | None = None
) -> Iterator[Preparing]:
    """Workers that read and prepare cases into a store, while the block runs.

    Args:
        store: in a folder that every node sees.
        reading: how the files are read.
        console: where the user reads.
        num_workers: processes; None: one for each processor, but no more than the nodes have memory for.
    Raises:
        MedsegError: E_CONFIG for a store without a folder; what `cluster` refuses.
    """
    if store.folder is None:
        raise MedsegError(
            Code.CONFIG,
            "what is prepared ahead has to be kept, and nothing is",
            where="data.store",
            remedy="leave data.store=null out, or name a folder that all nodes share: data.store=FOLDER",
        )
    folder = store.folder.absolute()
    mark = f"{TEMPORARY}{uuid.uuid4().hex}"
    scans: list[Path] = []
    store.begin()
    try:
        with cluster() as ray:
            nodes = resources(ray)
            number = num_workers or sum(_fitting(node) for node in nodes)
            actor = ray.remote(Preparer).options(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")

            def make() -> Any:
                (folder / mark).touch()  # old ones are deleted
                return actor.remote(folder, mark, code_digest(), reading, *scans)

            def refuse(cases: Sequence[Case]) -> None:
                refuse_unpacked(ray, cases)
                scans[:] = _a_file(cases)

            with Pool(ray, console, make, number) as pool:
                yield Preparing(pool, store, refuse)
    finally:
        (folder / mark).unlink(missing_ok=True)


def _a_file(cases: Sequence[Case]) -> list[Path]:
    """One file that is there, if there is any: every node should see it."""
    files = (path.absolute() for case in cases for path in files_of(case.images))
    return list(itertools.islice((path for path in files if path.is_file()), 1))


def _fitting(node: Mapping[str, float]) -> int:
    """Workers for a node: by its processors and its memory."""
    return max(1, int(min(node["CPU"], node.get("memory", float("inf")) / WORKER_BYTES)))


def _refusals(problems: Mapping[str, Failed]) -> dict[str, MedsegError]:
    found: dict[str, MedsegError] = {}
    for case_id, failed in problems.items():
        error = failed.error
        if not isinstance(error, MedsegError):
            error = MedsegError(
                Code.LIMIT,
                "the memory of a worker does not suffice for the case",
                where=case_id,
                remedy="begin with fewer --workers, or leave the case out with a manifest (case,image,label)",
            )
        found[case_id] = error
    return found
