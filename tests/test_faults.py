"""Faults of the machine: a message with a code, nothing partial under a final name, and work that goes on."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import SCENARIOS, FaultyDisk, Materials, call, count, inject, materials, unfinished

from medseg.bundle import checkpoint_path, read_checkpoint
from medseg.data import sampling
from medseg.errors import Code, MedsegError, of_machine
from medseg.training.loop import Loop
from medseg.training.train import TrainResult

# TensorBoard's thread says itself that its disk is full, before the training does.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return materials(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, given: Materials) -> Iterator[dict[str, tuple[Path, int]]]:
    """For each verb what it writes without a fault, and by how many operations; made when a test asks."""
    folder = tmp_path_factory.mktemp("references")

    class Made(dict[str, tuple[Path, int]]):
        def __missing__(self, name: str) -> tuple[Path, int]:
            disk = folder / name
            disk.mkdir()
            self[name] = disk, count(SCENARIOS[name], disk, given)
            return self[name]

    yield Made()


def spread(total: int, number: int) -> list[int]:
    """Operations in the middle of as many equal parts; the first one is that of the read-only disk."""
    return sorted({1 + int((i + 0.5) * total / number) for i in range(number)})


def try_all(name: str, number: int, code: int, given: Materials, references, tmp_path: Path) -> None:
    reference, total = references[name]
    for fails_at in spread(total, number):
        disk = tmp_path / str(fails_at)
        disk.mkdir()
        outcome = inject(SCENARIOS[name], disk, given, reference, fails_at, code)
        assert not outcome.wrong, f"{name}, operation {fails_at} of {total}: {outcome.wrong}\n{outcome.said}"
        shutil.rmtree(disk)


@pytest.mark.parametrize(
    ("name", "number"),
    [("predict", 1), ("evaluate", 3), ("convert", 2), ("convert to SEG", 2), ("export", 3), ("export to a folder", 2),
     ("predict from and to storage", 3), ("notebook", 3), ("compare", 1)],
)  # fmt: skip
def test_a_full_disk(name: str, number: int, given: Materials, references, tmp_path: Path) -> None:
    try_all(name, number, errno.ENOSPC, given, references, tmp_path)


def test_a_disk_that_fills_while_a_training_runs(given: Materials, references, tmp_path: Path) -> None:
    try_all("train", 1, errno.ENOSPC, given, references, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_full_disk_at_many_operations(name: str, given: Materials, references, tmp_path: Path) -> None:
    try_all(name, 10 if name == "tune" else 40, errno.ENOSPC, given, references, tmp_path)


@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "convert", "convert to SEG", "export", "select"])
def test_a_read_only_disk(name: str, given: Materials, references, tmp_path: Path) -> None:
    reference, _ = references[name]
    outcome = inject(SCENARIOS[name], tmp_path, given, reference, 1, errno.EROFS)
    assert not outcome.wrong and outcome.status != 0 and "E_OUTPUT" in outcome.said, outcome


def test_the_injected_disk_refuses_what_real_ones_refuse(tmp_path: Path) -> None:
    """Otherwise none of these tests could fail."""
    with FaultyDisk(tmp_path, 1).mounted() as disk:
        for write in (
            lambda: (tmp_path / "a").write_text("a"),
            lambda: (tmp_path / "b").mkdir(),
            lambda: os.open(tmp_path / "c", os.O_CREAT | os.O_WRONLY),
        ):
            with pytest.raises(OSError) as caught:
                write()
            assert caught.value.errno == errno.ENOSPC
        (tmp_path.parent / "elsewhere").write_text("fine")
    assert disk.refused == 3
    with FaultyDisk(tmp_path, 2).mounted(), pytest.raises(OSError), (tmp_path / "d").open("w") as file:
        file.write("begins, and is refused when it reaches the disk")
    assert (tmp_path / "d").read_text() == ""
    (tmp_path / "cut.json").write_text('{"a": ')
    assert unfinished(tmp_path) == ["cut.json: JSONDecodeError: Expecting value: line 1 column 7 (char 6)"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Code.OUTPUT),
        (torch.OutOfMemoryError("CUDA out of memory"), Code.LIMIT),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), Code.LIMIT),
        (MemoryError(), Code.LIMIT),
    ],
)
def test_faults_of_the_machine_are_told_from_those_of_the_program(error: BaseException, code: Code) -> None:
    refusal = of_machine(error)
    assert refusal is not None and refusal.code == code and refusal.remedy
    wrapped = ValueError("Unable to configure handler 'file'")
    wrapped.__cause__ = error
    again = of_machine(wrapped)
    assert again is not None and again.code == code
    assert of_machine(KeyError("a")) is None and of_machine(FileNotFoundError(errno.ENOENT, "gone")) is None


def test_small_shared_memory_is_no_full_disk() -> None:
    """NCCL in a container with Docker's 64 MB: its words as PyTorch passes them on."""
    said = (
        "NCCL error in: NCCLUtils.cpp:94\nncclSystemError: System call (e.g. socket, malloc) or external library call "
        "failed\nError while creating shared memory segment /dev/shm/nccl-cjY8K5 (size 10617216), error: No space left "
        "on device (28)"
    )
    for error in (torch.distributed.DistBackendError(said), OSError(errno.ENOSPC, "No space left", "/dev/shm/nccl-1")):
        refusal = of_machine(error)
        assert refusal is not None and refusal.code is Code.LIMIT and "--shm-size 1g" in str(refusal)
    mine = of_machine(OSError(errno.ENOSPC, "No space left on device", "/dev/shm/of/mine.nii.gz"))
    assert mine is not None and mine.code is Code.OUTPUT


def begin(given: Materials, folder: Path, *settings: str) -> tuple[int, str]:
    command = SCENARIOS["train"].command(folder, given)
    if not any(setting.startswith("trainer.final_predictions") for setting in settings):
        settings = ("trainer.final_predictions=false", *settings)  # what follows the loop is not looked at
    keys = {setting.partition("=")[0] for setting in settings}
    return call([*(argument for argument in command if argument.partition("=")[0] not in keys), *settings])


def go_on(folder: Path, *settings: str) -> tuple[int, str]:
    return call(["train", f"resume={folder / 'run'}", *settings])


def test_no_memory_for_a_training_step(given: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.train_step

    def full(self: Loop, number: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, number, image, label)

    monkeypatch.setattr(Loop, "train_step", full)
    status, said = begin(given, tmp_path)
    assert status == 2 and "E_LIMIT" in said and "data.plan.batch_size" in said and "Traceback" not in said
    assert not unfinished(tmp_path)
    monkeypatch.undo()
    status, said = go_on(tmp_path)
    assert status == 0, said


def test_a_thread_that_fails_ends_the_training_with_its_error(
    given: Materials, references, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = sampling.PatchSampler.batch

    def failing(self: sampling.PatchSampler, step: int):
        if step == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return batch(self, step)

    before = threading.active_count()
    monkeypatch.setattr(sampling.PatchSampler, "batch", failing)
    status, said = begin(given, tmp_path)
    assert status == 2 and "E_OUTPUT: the disk fails" in said
    assert threading.active_count() <= before + 1, "the other threads have ended"
    monkeypatch.undo()
    status, said = go_on(tmp_path)
    assert status == 0, said
    straight, resumed = (
        read_checkpoint(checkpoint_path(folder / "run", "latest"))[0] for folder in (references["train"][0], tmp_path)
    )
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight), "as if nothing had happened"


def test_a_loss_that_is_nan_never_becomes_the_best(
    given: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.train_step

    def spoilt(self: Loop, number: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return step(self, number, image * torch.nan if number == 3 else image, label)

    monkeypatch.setattr(Loop, "train_step", spoilt)
    status, said = begin(given, tmp_path)
    assert status == 2 and "E_NAN_LOSS" in said
    for name in ("best", "latest"):
        tensors, _ = read_checkpoint(checkpoint_path(tmp_path / "run", name))
        assert all(tensor.isfinite().all() for tensor in tensors.values()), name
    monkeypatch.undo()
    status, said = go_on(tmp_path)
    assert status == 0, said


def test_clocks_that_jump_change_nothing(
    given: Materials, references, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A computer that wakes, is set right or crosses into summer time: an hour forth or back at each look."""
    offsets = itertools.cycle((3600.0, -3600.0, 0.0, -86400.0 * 365))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(offsets))
    status, said = begin(given, tmp_path, "trainer.max_minutes=60")
    assert status == 0, said
    straight, jumped = (
        read_checkpoint(checkpoint_path(folder / "run", "latest"))[1]["counters"]
        for folder in (references["train"][0], tmp_path)
    )
    assert jumped["step"] == straight["step"] and 0 <= jumped["minutes"] < 10


def test_a_trial_that_met_a_full_disk_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has no room for a checkpoint may well have some for a line of the study."""
    pytest.importorskip("optuna")
    from medseg import tuning

    tried: list[str] = []

    def fake(experiment: object, run: Path, *_: object) -> TrainResult:
        tried.append(run.name)
        if len(tried) == 2:
            raise MedsegError(Code.OUTPUT, "the disk is full")
        run.mkdir(parents=True)
        return TrainResult(run, 0.5, 5, 0.1, None)

    monkeypatch.setattr(tuning, "train", fake)
    monkeypatch.setattr(tuning, "conclude_sweep", lambda *_: None)
    command = ["tune", "-o", str(tmp_path / "search"), "--trials", "3", "data.root=.", "seed=1,2"]
    status, said = call(command)
    assert status == 2 and "E_OUTPUT" in said
    status, said = call(command)
    assert status == 0 and "trial_001 was cut short and goes on" in said, said
    assert tried == ["trial_000", "trial_001", "trial_001", "trial_003"]


@pytest.mark.parametrize("gone", ["image", "store"])
def test_a_case_that_vanishes_while_a_training_runs(
    given: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Prepared cases do not need their files; a store does, and says how the run goes on."""
    data = tmp_path / "data"
    shutil.copytree(given.data, data)
    step = Loop.train_step

    def vanishing(self: Loop, number: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if number == 1 and gone == "image":
            shutil.rmtree(data / "imagesTr")
        elif number == 1:
            from medseg.data import stored_array

            for entry in (tmp_path / "prepared").iterdir():
                if entry.is_dir():
                    stored_array.forget(entry)
                    shutil.rmtree(entry)
        return step(self, number, image, label)

    monkeypatch.setattr(Loop, "train_step", vanishing)
    settings = [f"data.root='{data}'", f"data.in_memory={str(gone == 'image').lower()}", "trainer.max_steps=20"]
    settings += ["trainer.final_predictions=true"]  # it reads the images again
    status, said = begin(given, tmp_path, *settings, f"data.store='{tmp_path / 'prepared'}'")
    assert status == 2 and "E_MISSING" in said and "Traceback" not in said, said
    assert not unfinished(tmp_path / "run")
    monkeypatch.undo()
    if gone == "image":
        shutil.copytree(given.data / "imagesTr", data / "imagesTr")
    status, said = go_on(tmp_path, "trainer.max_steps=4")
    assert status == 0, said


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("what", ["shm", "output"])
def test_real_small_file_systems(given: Materials, tmp_path: Path, what: str) -> None:
    """/dev/shm of 64 MB, where nothing of ours lies; and an output that is really full."""
    target = Path("/dev/shm") if what == "shm" else tmp_path / "small"
    target.mkdir(exist_ok=True)
    disk = target if what == "output" else tmp_path
    command = [sys.executable, "-m", "medseg", *SCENARIOS["train"].command(disk, given)]
    size = "64m" if what == "shm" else "300k"
    shell = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, str(target), *command], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no file systems of one's own here")
    if what == "shm":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and "E_OUTPUT" in done.stderr, done.stderr
