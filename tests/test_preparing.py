"""`medseg prepare`: cases prepared before a training, which finds them; and what workers of a cluster do of it."""

from __future__ import annotations

import io
import pickle
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_ray import Died, FakeRay, FakeWorker, Method
from test_training import TINY

from medseg.cli import main
from medseg.config import compose
from medseg.data import preparation, survey
from medseg.data.cases import find_cases
from medseg.data.store import Store, code_digest
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT
from medseg.remote import pool as pool_module
from medseg.remote import preparing as preparing_module
from medseg.remote.pool import ATTEMPTS, Failed
from medseg.remote.preparing import Preparer, _fitting, ray_preparing
from medseg.training.prepare_data import prepare_data


@pytest.fixture
def data(tiny_run, tmp_path: Path) -> Path:
    """A copy that tests may damage."""
    return Path(shutil.copytree(tiny_run.data, tmp_path / "data"))


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the cases whose images are decoded, as they come."""
    read: list[str] = []
    for module in (preparation, survey):
        load = module.load_image

        def counted(case: Any, load: Any = load, **options: Any) -> Any:
            read.append(case.case_id)
            return load(case, **options)

        monkeypatch.setattr(module, "load_image", counted)
    return read


def overrides(data: Path, store: Path) -> list[str]:
    return [*TINY, f"data.root='{data}'", f"data.store='{store}'"]


class InProcess(FakeRay):
    """A cluster whose workers are `Preparer`s of this process; what they take and give back is pickled.

    Args:
        deadly: ids of the cases that kill a worker which reads them, or prepares them.
    """

    def __init__(self, deadly: dict[str, str] | None = None) -> None:
        super().__init__(None)
        self.deadly = deadly or {}
        self.asked: list[tuple[str, str]] = []

    def remote(self, cls: type) -> Any:
        ray = self

        class Actor:
            @staticmethod
            def options(**needs: Any) -> Any:
                return Actor

            @staticmethod
            def remote(*arguments: Any) -> FakeWorker:
                preparer = cls(*pickle.loads(pickle.dumps(arguments)))
                worker = FakeWorker(ray)
                worker.ready = Method(worker, preparer.ready)
                worker.read = Method(worker, ray.sent("read", preparer.read))  # type: ignore[attr-defined]
                worker.prepare = Method(worker, ray.sent("prepare", preparer.prepare))  # type: ignore[attr-defined]
                ray.workers.append(worker)
                return worker

        return Actor

    def sent(self, name: str, method: Any) -> Any:
        def call(case: Any, *arguments: Any) -> Any:
            self.asked.append((name, case.case_id))
            if self.deadly.get(case.case_id) == name:
                raise Died
            return pickle.loads(pickle.dumps(method(*pickle.loads(pickle.dumps((case, *arguments))))))

        return call


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PAUSE_S", 0.0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """What `ray_preparing` takes for a cluster of one node with three processors."""
    ray = InProcess()

    @contextmanager
    def cluster() -> Any:
        yield ray

    monkeypatch.setattr(preparing_module, "cluster", cluster)
    monkeypatch.setattr(preparing_module, "resources", lambda ray: [{"CPU": 3.0, "memory": 64e9}])
    monkeypatch.setattr(preparing_module, "refuse_unpacked", lambda ray, cases: None)
    return ray


def prepared(data: Path, store: Path, **options: Any) -> str:
    said = io.StringIO()
    stated = overrides(data, store)
    prepare_data(compose("train", stated), Console(file=said, width=200), stated=stated, **options)
    return said.getvalue()


def entries(store: Path) -> dict[str, dict[str, bytes]]:
    """All entries, with what they hold."""
    found = {}
    for path in store.iterdir():
        if len(path.name) == 64:
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            found[path.name] = {file.name: file.read_bytes() for file in files}
    return found


def test_a_training_finds_what_was_prepared(
    data: Path, tmp_path: Path, decodings: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """By the command, in this process: `./runs/prepared` is the store of runs in `./runs`."""
    monkeypatch.chdir(tmp_path)
    stated = [*TINY, f"data.root={data}", "trainer.max_steps=1"]
    main(["prepare", *stated])
    said = capfd.readouterr().out
    assert "4 cases prepared, kept in" in said and f"medseg train {' '.join(stated)}" in said.replace("'", "")
    assert len(entries(tmp_path / "runs" / "prepared")) == 8  # what the survey read, and the arrays
    decodings.clear()
    main(["prepare", *stated])
    assert "4 cases found prepared" in capfd.readouterr().out
    main(["train", *stated, "trainer.num_validations=1"])
    assert not decodings and "4 cases found prepared" in capfd.readouterr().out


def test_machines_without_a_gpu_prepare_for_one(data: Path, tmp_path: Path, decodings: list[str]) -> None:
    """What is planned for a GPU has larger patches; cases are the same."""
    stated, said = [f"data.root='{data}'", f"data.store='{tmp_path / 'store'}'"], io.StringIO()
    prepare_data(compose("train", [*stated, "trainer.device=cpu"]), Console(quiet=True))
    decodings.clear()
    gpu = compose("train", [*stated, "trainer.device=cuda", "data.plan.memory_gb=24"])
    prepare_data(gpu, Console(file=said, width=200))
    assert "4 cases found prepared" in said.getvalue() and not decodings


def test_workers_prepare_what_one_process_would(
    data: Path, tmp_path: Path, decodings: list[str], here: InProcess
) -> None:
    said = prepared(data, tmp_path / "store", engine="ray")
    assert "4 cases prepared" in said, said
    assert sorted(here.asked) == sorted((what, f"phantom_{n:03d}") for what in ("read", "prepare") for n in range(1, 5))
    assert len(here.workers) == 3 and set(here.killed) == set(here.workers)
    assert len(decodings) == 8, "each case once by the survey, once to be prepared, and never here"
    again = prepared(data, tmp_path / "store", engine="ray", num_workers=1)
    assert "4 cases found prepared" in again and len(decodings) == 8
    prepared(data, tmp_path / "alone")
    assert entries(tmp_path / "store") == entries(tmp_path / "alone")
    assert sorted(path.name[:6] for path in (tmp_path / "store").iterdir() if len(path.name) < 64) == ["README"]


def test_a_digest_is_read_once(data: Path, tmp_path: Path, here: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the worker that reads the case: neither this process nor the one that prepares it reads the bytes again."""
    read: list[str] = []
    from medseg.data import store as store_module

    digest = store_module.case_digest
    monkeypatch.setattr(store_module, "case_digest", lambda case: (read.append(case.case_id), digest(case))[1])
    prepared(data, tmp_path / "store", engine="ray")
    assert sorted(read) == [f"phantom_{n:03d}" for n in range(1, 5)]


def test_bad_cases_are_said_all_at_once(data: Path, tmp_path: Path, here: InProcess) -> None:
    for number in (1, 3):
        path = data / "imagesTr" / f"phantom_{number:03d}_0000.nii.gz"
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(MedsegError, match=r"(?s)2 of 4 cases cannot be used.*phantom_001.*phantom_003"):
        prepared(data, tmp_path / "store", engine="ray")
    assert here.asked.count(("read", "phantom_001")) == ATTEMPTS  # it may have been a share that was away


def test_a_case_that_ends_its_workers(data: Path, tmp_path: Path, here: InProcess) -> None:
    here.deadly["phantom_002"] = "prepare"
    with pytest.raises(MedsegError, match=r"(?s)E_LIMIT: the case has ended 3 workers.*phantom_002"):
        prepared(data, tmp_path / "store", engine="ray")
    assert here.asked.count(("prepare", "phantom_002")) == ATTEMPTS
    assert len(entries(tmp_path / "store")) == 7, "the others are done"
    here.deadly = {"phantom_004": "read"}  # which the survey of this process would read too
    with pytest.raises(MedsegError, match=r"(?s)E_LIMIT: the case has ended 3 workers.*phantom_004"):
        prepared(data, tmp_path / "other", engine="ray")
    here.deadly = {}
    assert "1 of 4 cases prepared anew" in prepared(data, tmp_path / "store", engine="ray")


def test_a_full_disk_ends_the_work(
    data: Path, tmp_path: Path, here: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Store.write

    def full(self: Store, key: str, values: Any, files: Any) -> Any:
        if files:
            raise MedsegError(Code.OUTPUT, "the disk is full")
        return write(self, key, values, files)

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(MedsegError, match="the disk is full"):
        prepared(data, tmp_path / "store", engine="ray")
    assert sum(what == "prepare" for what, _ in here.asked) == 1


def test_nodes_that_would_lose_their_work_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with pytest.raises(MedsegError, match="does not see the store"):
        Preparer(folder, ".new-mark", code_digest(), STRICT).ready()
    folder.mkdir()
    (folder / ".new-mark").touch()
    with pytest.raises(MedsegError, match="another version of medseg"):
        Preparer(folder, ".new-mark", "0" * 64, STRICT).ready()
    Preparer(folder, ".new-mark", code_digest(), STRICT).ready()
    with pytest.raises(MedsegError, match=r"(?s)does not see the scans.*scan\.nii"):
        Preparer(folder, ".new-mark", code_digest(), STRICT, tmp_path / "scan.nii").ready()
    (tmp_path / "scan.nii").touch()
    Preparer(folder, ".new-mark", code_digest(), STRICT, tmp_path / "scan.nii").ready()
    with (
        pytest.raises(MedsegError, match=r"(?s)has to be kept.*data\.store"),
        ray_preparing(Store(None), STRICT, Console(quiet=True)),
    ):
        pass
    with pytest.raises(MedsegError, match=r"(?s)has to be kept.*data\.store"):
        prepare_data(compose("train", ["data.root=.", "data.store=null"]), Console(quiet=True))


def test_files_that_change_are_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be prepared, and not be there."""
    settings = {"num_threads": 1, "store": Store(tmp_path / "plan")}
    experiment = compose("train", overrides(data, tmp_path / "plan"))
    from medseg.training.beginning import settle
    from medseg.training.plan_data import planned_device

    settled = settle(experiment, planned_device(experiment), Console(quiet=True), settings["store"])  # type: ignore[arg-type]
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / ".new-mark").touch()
    worker = Preparer(folder, ".new-mark", code_digest(), STRICT)
    worker.ready()
    monkeypatch.setattr(Store, "is_unchanged", lambda self, case: False)
    case = find_cases(data).cases[0]
    failed = worker.prepare(case, None, settled.info.plan, settled.info.labels)
    assert isinstance(failed, Failed) and isinstance(failed.error, MedsegError) and not failed.fatal
    assert failed.error.code is Code.CHANGED
    gone = worker.prepare(replace(case, images=(data / "gone.nii.gz",)), None, settled.info.plan, settled.info.labels)
    assert isinstance(gone, Failed) and gone.error.code is Code.MISSING  # type: ignore[attr-defined]


def test_workers_by_processors_and_memory() -> None:
    assert _fitting({"CPU": 16.0, "memory": 64 * 2.0**30}) == 16
    assert _fitting({"CPU": 16.0, "memory": 9 * 2.0**30}) == 2
    assert _fitting({"CPU": 2.0}) == 2 and _fitting({"CPU": 4.0, "memory": 2.0**30}) == 1


def test_refusals_of_the_command(tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["prepare", f"data.root={tmp_path}", "--workers", "2"])
    assert exit_.value.code == 2 and "--engine ray" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["prepare", "task=segmentatio"])
    assert "there is no task" in capfd.readouterr().err
