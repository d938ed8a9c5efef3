"""`medseg predict --engine ray`: the books of the pool, and a cluster of two nodes of which one is killed."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pickle
import secrets
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_training import TINY

from medseg.cli import main
from medseg.cli.predict import EXIT_BAD_CASES
from medseg.data.inputs import find_inputs
from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.archive import unpacked
from medseg.inference.ensemble import Ensemble
from medseg.inference.export import Made
from medseg.inference.folder import predict_inputs
from medseg.inference.job import Done, Job, Options, Scan
from medseg.inference.manifest import MANIFEST_FILE, Entry, digest_of_file
from medseg.remote import cluster as cluster_module
from medseg.remote import pool as pool_module
from medseg.remote.cluster import Predictions, Worker, ray_engine
from medseg.remote.exchange import Unreachable
from medseg.remote.pool import AHEAD, ATTEMPTS, Failed, Pool, failure, located, refuse_unpacked, sendable
from medseg.remote.pool import cluster as start


def cases_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / MANIFEST_FILE).read_text().splitlines()]
    return [line for line in lines if "case" in line]


# The books, with a Ray that is none: results come in the order in which they were asked for


class Died(Exception):
    pass


class Result:
    """What brings a result when it is asked for."""

    def __init__(self, worker: FakeWorker, make: Any) -> None:
        self.worker, self.make = worker, make


class Method:
    def __init__(self, worker: FakeWorker, call: Any) -> None:
        self.worker, self.call = worker, call

    def remote(self, *arguments: Any) -> Result:
        return Result(self.worker, lambda: self.call(*arguments))


class FakeWorker:
    def __init__(self, fate: FakeRay) -> None:
        self.fate = fate
        self.is_dead = False
        self.ready = Method(self, fate.on_start)
        self.work = Method(self, lambda case: fate.on_case(self, case))
        self.close = SimpleNamespace(remote=lambda: fate.closed.append(self))


class FakeRay:
    """Ray, as far as the pool asks it.

    Args:
        on_case: worker, case → result; raises `Died` to die of it.
        on_start: called when a worker starts.
    """

    exceptions = SimpleNamespace(RayError=Died)

    def __init__(self, on_case: Any, on_start: Any = lambda: None) -> None:
        self.on_case, self.on_start = on_case, on_start
        self.workers: list[FakeWorker] = []
        self.closed: list[FakeWorker] = []
        self.killed: list[FakeWorker] = []
        self.most = 0

    def make(self) -> FakeWorker:
        self.workers.append(FakeWorker(self))
        return self.workers[-1]

    def wait(self, results: list[Result], num_returns: int, timeout: float) -> tuple[list[Result], list[Result]]:
        if not any(self.closed):
            self.most = max(self.most, max(Counter(result.worker for result in results).values()))
        return results[:num_returns], results[num_returns:]

    def get(self, result: Result) -> Any:
        if result.worker.is_dead:
            raise Died
        try:
            return result.make()
        except Died:
            result.worker.is_dead = True
            raise

    def kill(self, worker: FakeWorker) -> None:
        self.killed.append(worker)


class Books:
    """What a job does with results, noted."""

    def __init__(self, on_bad_case: str = "skip") -> None:
        self.settled: list[str] = []
        self.bad: dict[str, Exception] = {}
        self.before: list[str] = []
        self.digests: dict[str, str] = {}
        self.refused: dict[str, MedsegError] = {}
        self.fatal: Exception | None = None
        self.on_bad_case = on_bad_case
        self.console = Console(file=io.StringIO(), width=200)
        self.bar, self.task = SimpleNamespace(advance=lambda task: None), 0
        self.manifest = SimpleNamespace(folder=Path("here"))

    def settle(self, done: Done) -> None:
        assert done.made.folder == Path("here")
        self.settled.append(done.entry.case)

    def write(self, case: Case, result: Scan | Exception) -> None:
        if isinstance(result, Scan):
            self.before.append(case.case_id)
            return
        if self.on_bad_case == "error" or result is self.fatal:
            raise result
        self.bad[case.case_id] = result


def done(case: Case) -> Done:
    entry = Entry(case.case_id, "session", "digest")
    return Done(entry, Made(case.case_id, Path("there"), ".unfinished", (), ()), "", ())


CASES = [Case(f"c{number:02d}", (), None) for number in range(12)]
ALL = [case.case_id for case in CASES]


def work(ray: FakeRay, books: Books, num_workers: int = 2, cases: list[Case] = CASES) -> None:
    with Pool(ray, books.console, ray.make, num_workers) as pool:
        pool.work(cases, Predictions(books))  # type: ignore[arg-type]


def test_every_case_is_settled_once_and_few_are_on_their_way() -> None:
    ray, books = FakeRay(lambda worker, case: done(case)), Books()
    work(ray, books, 3)
    assert sorted(books.settled) == ALL and len(ray.workers) == 3
    assert ray.most <= AHEAD
    assert set(ray.closed) == set(ray.killed) == set(ray.workers)


def test_no_more_workers_than_cases() -> None:
    ray, books = FakeRay(lambda worker, case: done(case)), Books()
    work(ray, books, 8, CASES[:2])
    assert len(ray.workers) == 2 and sorted(books.settled) == ALL[:2]


def test_what_a_lost_worker_had_is_done_again_once() -> None:
    count = itertools.count()

    def on_case(worker: FakeWorker, case: Case) -> Done:
        if next(count) == 4:
            raise Died
        return done(case)

    ray, books = FakeRay(on_case), Books()
    work(ray, books)
    assert sorted(books.settled) == ALL and not books.bad
    assert len(ray.workers) == 3  # one came in its place
    assert "a worker was lost (Died); it is done again" in books.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_case_that_kills_its_workers_is_set_aside_and_its_neighbours_are_done() -> None:
    tried: list[str] = []

    def on_case(worker: FakeWorker, case: Case) -> Done:
        tried.append(case.case_id)
        if case.case_id == "c03":
            raise Died
        return done(case)

    ray, books = FakeRay(on_case), Books()
    work(ray, books)
    assert sorted(books.settled) == [name for name in ALL if name != "c03"]
    assert tried.count("c03") == ATTEMPTS
    assert isinstance(books.bad["c03"], MedsegError) and "has ended 3 workers" in str(books.bad["c03"])
    with pytest.raises(MedsegError, match="has ended 3 workers"):
        work(FakeRay(on_case), Books("error"))


def test_refusals_of_the_case_are_final_and_those_of_the_archive_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PAUSE_S", 0.01)
    tried: Counter[str] = Counter()

    def on_case(worker: FakeWorker, case: Case) -> Done | Failed:
        tried[case.case_id] += 1
        if case.case_id == "c01":
            return Failed(MedsegError(Code.GAP, "a slice is missing"), "digest of c01", False)
        if case.case_id == "c02" and tried["c02"] < ATTEMPTS:
            return Failed(MedsegError(Code.ARCHIVE, "busy"), None, False)
        return done(case)

    books = Books()
    work(FakeRay(on_case), books)
    assert list(books.bad) == ["c01"] and tried["c01"] == 1 and books.digests["c01"] == "digest of c01"
    assert tried["c02"] == ATTEMPTS and "c02" in books.settled


def test_a_share_that_is_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker tries it again, after a rest, while others are done; also where nothing else is left to do."""
    monkeypatch.setattr(pool_module, "PAUSE_S", 0.05)
    tried: dict[str, list[tuple[float, FakeWorker]]] = {}

    def unopened() -> None:
        try:
            raise OSError(errno.ESTALE, "Stale file handle")
        except OSError as error:
            raise MedsegError(Code.UNSUPPORTED, "the file cannot be opened") from error

    def vanished() -> None:
        raise MedsegError(Code.MISSING, "there is no such file")

    def raw() -> None:
        raise OSError(errno.ETIMEDOUT, "Connection timed out", "/shared/a.nii")

    def unread() -> None:
        raise MedsegError(Code.UNSUPPORTED, "no scan")

    faults = {"c01": unopened, "c02": vanished, "c03": raw, "c04": unread}

    def on_case(worker: FakeWorker, case: Case) -> Done | Failed:
        attempts = tried.setdefault(case.case_id, [])
        attempts.append((time.monotonic(), worker))
        if case.case_id in faults and (len(attempts) < ATTEMPTS or always):
            try:
                faults[case.case_id]()
            except Exception as error:
                return pickle.loads(pickle.dumps(failure(error)))
        return done(case)

    always, books = False, Books()
    work(FakeRay(on_case), books, cases=CASES[:6])
    assert list(books.bad) == ["c04"] and len(books.settled) == 5
    for name in ("c01", "c02", "c03"):
        (first, one), (second, other), (third, _) = tried[name]
        assert second - first > 0.05 and third - second > 0.1 and one is not other
    tried.clear()
    always, books = True, Books()
    work(FakeRay(on_case), books, cases=CASES[:6])
    assert {name: len(attempts) for name, attempts in tried.items() if len(attempts) > 1} == dict.fromkeys(
        ("c01", "c02", "c03"), ATTEMPTS
    )
    assert isinstance(books.bad["c03"], MedsegError) and books.bad["c03"].code is Code.ARCHIVE
    assert books.bad["c01"].code is Code.UNSUPPORTED  # type: ignore[attr-defined]


def test_the_last_worker_is_lost_while_a_case_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PAUSE_S", 0.05)
    tried: list[str] = []

    def on_case(worker: FakeWorker, case: Case) -> Done | Failed:
        tried.append(case.case_id)
        if tried == ["c00"]:
            return Failed(MedsegError(Code.MISSING, "there is no such file"))
        if case.case_id == "c01":
            raise Died
        return done(case)

    books = Books()
    work(FakeRay(on_case), books, 1, CASES[:2])
    assert books.settled == ["c00"] and list(books.bad) == ["c01"]


def test_an_archive_that_is_out_of_reach_ends_the_work() -> None:
    refusal = sendable(Unreachable(Code.ARCHIVE, "the server does not answer"))
    books = Books()
    ray = FakeRay(lambda worker, case: Failed(refusal, None, True))
    with pytest.raises(MedsegError, match="does not answer"):
        work(ray, books)
    assert not books.bad and set(ray.killed) == set(ray.workers)


def test_what_is_known_to_be_bad_is_given_to_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    books, tried = Books(), []

    def on_case(worker: FakeWorker, case: Case) -> Done:
        tried.append(case.case_id)
        return done(case)

    ray = FakeRay(on_case)
    monkeypatch.setattr(cluster_module, "cluster", lambda: nullcontext(ray))
    monkeypatch.setattr(cluster_module, "refuse_unpacked", lambda ray, cases: None)
    monkeypatch.setattr(cluster_module, "_making", lambda *_: (ray.make, 2))
    refusal = books.refused["c05"] = MedsegError(Code.OUTPUT, "no DICOM scan")
    ray_engine(Path("run"), {})(books, CASES)  # type: ignore[arg-type]
    assert books.bad == {"c05": refusal} and sorted(books.settled) == sorted(tried) == [n for n in ALL if n != "c05"]


def test_workers_stay_for_more_work() -> None:
    ray, first, second = FakeRay(lambda worker, case: done(case)), Books(), Books()
    with Pool(ray, Console(quiet=True), ray.make, 3) as pool:
        pool.work(CASES[:2], Predictions(first))  # type: ignore[arg-type]
        assert len(ray.workers) == 2 and not ray.killed
        pool.work(CASES, Predictions(second))  # type: ignore[arg-type]
    assert sorted(first.settled) == ALL[:2] and sorted(second.settled) == ALL
    assert len(ray.workers) == 3 and set(ray.closed) == set(ray.killed) == set(ray.workers)


def test_what_was_unpacked_here_is_refused_where_other_nodes_work(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.writestr("scans/a.txt", "a")
    inside = Case("a", (unpacked(tmp_path / "scans.zip") / "scans" / "a.txt",), None)
    here, other = ({"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0}} for name in ("here", "other"))

    def cluster_of(*nodes: dict) -> Any:
        context = SimpleNamespace(get_node_id=lambda: "here")
        return SimpleNamespace(nodes=lambda: nodes, get_runtime_context=lambda: context)

    refuse_unpacked(cluster_of(here), [inside])
    refuse_unpacked(cluster_of(here, other), [Case("b", (tmp_path / "b.nii.gz",), None)])
    with pytest.raises(MedsegError, match="a zip is unpacked on this machine alone"):
        refuse_unpacked(cluster_of(here, other), [inside])


def test_workers_that_do_not_start() -> None:
    def on_start() -> None:
        raise Died

    with pytest.raises(MedsegError, match="the workers of the Ray cluster do not start"):
        work(FakeRay(lambda worker, case: done(case), on_start), Books())

    def refused() -> None:
        error = Died()
        error.cause = MedsegError(Code.CHECKPOINT, "damaged")  # type: ignore[attr-defined]
        raise error

    with pytest.raises(MedsegError, match="damaged"):
        work(FakeRay(lambda worker, case: done(case), refused), Books())


def test_a_cluster_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises Exception itself where a busy machine is late."""
    ended = []

    def init(**settings: Any) -> None:
        raise Exception("The current node timed out\nduring startup.")

    module = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(MedsegError, match=r"(?s)E_ARCHIVE: Ray does not start.*timed out during.*less busy"), start():
        pass
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with (
        pytest.raises(MedsegError, match=r"(?s)E_ARCHIVE: the Ray cluster cannot be reached.*check RAY_ADDRESS"),
        start(),
    ):
        pass
    assert len(ended) == 2
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING.*medseg\[ray\]"), start():
        pass


def test_errors_survive_the_way_between_processes() -> None:
    class Local(Exception):
        pass

    assert "Local: x" in str(pickle.loads(pickle.dumps(sendable(Local("x")))))
    refusal = MedsegError(Code.GAP, "a slice is missing", where="CT_1")
    assert str(pickle.loads(pickle.dumps(sendable(refusal)))) == str(refusal)


# A worker, in this process


@pytest.fixture
def scans(tiny_run, tmp_path: Path) -> Path:
    """Ten scans, of which the last is cut off."""
    folder = tmp_path / "scans"
    folder.mkdir()
    sources = itertools.cycle(sorted((tiny_run.data / "imagesTr").glob("*.nii.gz")))
    for number, source in zip(range(10), sources, strict=False):
        shutil.copy(source, folder / f"s{number}.nii.gz")
    last = folder / "s9.nii.gz"
    last.write_bytes(last.read_bytes()[:2000])
    return folder


SETTINGS = {"device": "cpu", "precision": "fp32"}


def test_a_worker_writes_files_without_names_and_hands_back_the_line(
    tiny_run, scans: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    worker = Worker(tiny_run.run, SETTINGS, Options(), (None, None), out, "the session", 1)
    worker.ready()
    first, *_, last = (located(case) for case in find_inputs([Path("scans")], num_channels=1))
    assert first.images[0].is_absolute()
    result = pickle.loads(pickle.dumps(worker.work(first)))
    assert isinstance(result, Done)
    assert result.entry.session == "the session" and result.entry.case == "s0"
    assert sorted(p.name for p in out.iterdir()) == [result.made.unfinished]
    assert result.entry.files == {"s0.nii.gz": digest_of_file(out / result.made.unfinished / "s0.nii.gz")}
    assert replace(result.made, folder=out).settle(["s0.nii.gz"]) == [out / "s0.nii.gz"]
    assert sorted(p.name for p in out.iterdir()) == ["s0.nii.gz"]
    failed = pickle.loads(pickle.dumps(worker.work(last)))
    assert isinstance(failed, Failed) and failed.digest is not None and not failed.fatal
    assert failed.error.code is Code.TRUNCATED  # type: ignore[attr-defined]
    assert sorted(p.name for p in out.iterdir()) == ["s0.nii.gz"]
    worker.close()


def test_a_full_disk_is_not_the_cases_fault(tiny_run, scans: Path, tmp_path: Path, monkeypatch) -> None:
    worker = Worker(tiny_run.run, SETTINGS, Options(), (None, None), tmp_path, "the session", 1)
    worker.ready()
    first = located(find_inputs([scans], num_channels=1)[0])

    def full(self, *arguments: object) -> None:
        raise MedsegError(Code.OUTPUT, "the files cannot be written")

    monkeypatch.setattr(Job, "_make", full)
    failed = worker.work(first)
    assert isinstance(failed, Failed) and failed.fatal
    worker.close()


def test_workers_are_of_a_cluster(tmp_path: Path, capfd) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(tmp_path), "scan.nii.gz", "-o", str(tmp_path / "out"), "--workers", "2"])
    assert exit_.value.code == 2 and "--engine ray" in capfd.readouterr().err


# A real cluster


class Nodes:
    """A Ray cluster of a head and a second node on this machine, each with one processor."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(shutdown_at_exit=False)
        self._add(include_dashboard=False, no_monitor=True)
        self.second: Any = None
        self.add_second()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_second(self) -> None:
        if self.second is None:
            self.second = self._add()

    def kill_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def _add(self, **settings: Any) -> Any:
        """Start a node. Ray gives one half a minute, which does not suffice where much else is running."""
        before = children()
        for attempt in range(3):
            try:
                return self.cluster.add_node(
                    num_cpus=1, object_store_memory=80 * 2**20, include_log_monitor=False, **settings
                )
            except Exception:
                for process in children() - before:
                    os.kill(process, signal.SIGKILL)
                if attempt == 2:
                    raise
        raise AssertionError


def children() -> set[int]:
    """The processes that this one has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster for all tests of this file."""
    ray = pytest.importorskip("ray", reason='ray is not installed: pip install "medseg[ray]"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else one is written into the home folder
        made = Nodes()
        try:
            yield made
        finally:
            ray.shutdown()
            made.cluster.shutdown()


@pytest.fixture
def cluster(nodes: Nodes) -> Iterator[Nodes]:
    """Both nodes, and this process connected to them."""
    import ray

    nodes.add_second()
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        yield nodes
    finally:
        ray.shutdown()


def when_both_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is handed out before."""
    hand_out, gate = Pool._hand_out, []

    def gated(self: Pool, *arguments: Any) -> None:
        if gate or not self.starting:
            gate.append(True)
            hand_out(self, *arguments)

    monkeypatch.setattr(Pool, "_hand_out", gated)


@pytest.mark.ray
def test_a_node_is_killed_and_nothing_is_lost_or_done_twice(
    cluster, tiny_run, scans: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    import ray

    out, here = tmp_path / "out", tmp_path / "here"
    ensemble = Ensemble.from_run(tiny_run.run, **SETTINGS)  # type: ignore[arg-type]
    options = Options(on_bad_case="skip", statistics=True)
    seen: list[int] = []

    def kill_the_second_node() -> None:
        while not (out / MANIFEST_FILE).is_file() or len(cases_of(out)) < 2:
            time.sleep(0.02)
        seen.append(sum(node["Alive"] for node in ray.nodes()))
        cluster.kill_second()

    when_both_have_started(monkeypatch)
    killer = threading.Thread(target=kill_the_second_node)
    killer.start()
    log = io.StringIO()
    engine = ray_engine(tiny_run.run, SETTINGS)
    outcome = predict_inputs(ensemble, [scans], out, Console(file=log, width=200), options, engine=engine)
    killer.join()
    assert seen == [2] and "a worker was lost" in log.getvalue(), log.getvalue()
    assert outcome.bad.keys() == {"s9"} and len(outcome.files) == 9, log.getvalue()
    assert Counter(line["case"] for line in cases_of(out)) == Counter({f"s{number}": 1 for number in range(10)})

    # The same labels as one process makes, and its --resume finds nothing to do.
    predict_inputs(ensemble, [scans], here, Console(quiet=True), options)
    names = sorted(path.name for path in here.glob("*.nii.gz"))
    assert names == sorted(path.name for path in out.glob("*.nii.gz")) and len(names) == 9
    assert {line["case"]: line["files"] for line in cases_of(out) if "failed" not in line} == {
        line["case"]: line["files"] for line in cases_of(here) if "failed" not in line
    }
    assert (out / "statistics.csv").read_bytes() == (here / "statistics.csv").read_bytes()
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    command = ["predict", str(tiny_run.run), str(scans), "-o", str(out), "--statistics", "--on-bad-case", "skip"]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--device", "cpu", "--precision", "fp32", "--resume", "--engine", "ray", "--workers", "1"])
    assert exit_.value.code == EXIT_BAD_CASES
    assert "9 done before, 1 bad" in capfd.readouterr().out and len(cases_of(out)) == 11
    assert not ray.is_initialized()


@pytest.mark.ray
def test_a_node_is_killed_while_cases_are_prepared(
    cluster: Nodes, tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """`medseg prepare --engine ray`: a node dies meanwhile, and the store is that of one process."""
    data, store, alone = tmp_path / "data", tmp_path / "store", tmp_path / "alone"
    shutil.copytree(tiny_run.data, data)
    for number in range(5, 11):  # four cases are soon read
        for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            shutil.copy(data / folder / f"phantom_001{ending}", data / folder / f"phantom_{number:03d}{ending}")
    take, taken = Pool._take, []

    def kill_after_the_third(self: Pool, *arguments: Any) -> None:
        take(self, *arguments)
        taken.append(len(self.busy))
        if len(taken) == 3:
            cluster.kill_second()

    when_both_have_started(monkeypatch)
    monkeypatch.setattr(Pool, "_take", kill_after_the_third)
    stated = [*TINY, f"data.root='{data}'", f"data.store='{store}'"]
    main(["prepare", "--engine", "ray", "--workers", "2", *stated])
    said = capfd.readouterr().out
    assert taken[0] == 2 and "a worker was lost" in said and "10 cases prepared" in said, said
    main(["prepare", *stated])
    assert "10 cases found prepared" in capfd.readouterr().out
    main(["prepare", *stated[:-1], f"data.store='{alone}'"])
    names = {path.name for path in store.iterdir()}
    assert names == {path.name for path in alone.iterdir()} and len(names) == 21  # two entries of each, README.txt
    assert all(
        (store / name / part).read_bytes() == (alone / name / part).read_bytes()
        for name in names
        for part in ("image.b2nd", "label.b2nd", "locations.bin")
        if (store / name).is_dir()
    )
