"""Several processes train what one would: the same gradients, draws and tables; kills, signals and refusals."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes_work import LOSSES, augmented, batch_norm_difference, exactness
from rich.console import Console
from test_sampling import case
from test_training import TINY, history, run, weights

from medseg.config import resumed
from medseg.data.sampling import PatchSampler
from medseg.diagnosis import places
from medseg.errors import Code, MedsegError
from medseg.training.distributed import World, divide, refuse_sweep
from medseg.training.launching import launch
from medseg.training.lock import LOCK_FILE, locked
from medseg.training.state import read_counters
from medseg.training.train import say_shared_memory, train

SAME = (
    "data.plan.batch_size=4",
    "data.plan.num_stages=2",
    "data.split.validation=[phantom_002,phantom_003,phantom_004]",  # three cases for two processes
    "optimizer=sgd",
    "augment=none",
    "trainer.max_steps=4",
    "trainer.final_predictions=true",
    "trainer.precision=fp32",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result: dict[str, Any] = launch(exactness, 2)
    return result


@pytest.mark.parametrize("name", [*(name for name, *_ in LOSSES), "uneven", "in parts", "in uneven parts"])
def test_gradients_are_those_of_the_whole_batch(found: dict[str, Any], name: str) -> None:
    """2 processes x 2 samples = 1 process x 4; also 3 + 2, and in parts one after the other."""
    assert found[name] < 1e-6


def test_what_processes_tell_each_other(found: dict[str, Any]) -> None:
    first, second = found["gathered"]
    assert first == {"rank": 0, "nan": 1.5} and second["rank"] == 1 and math.isnan(second["nan"])
    assert found["highest"] == (2.0, -1.0) and found["of main"] == (1.0,)
    assert found["told"] == ["ü", 1.0] and found["mean"] == 1.5


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds what listens in /proc")
def test_nobody_outside_of_this_machine_is_listened_to(found: dict[str, Any]) -> None:
    assert found["listening"], "gloo listens"
    assert set(found["listening"]) <= {"0100007F", "00000000000000000000000001000000"}


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def obedient(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that has started two, and their ids."""
    command = [sys.executable, str(Path(__file__).with_name("processes_work.py")), str(tmp_path)]
    process = subprocess.Popen(command, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    own = [tmp_path / f"process{rank}" for rank in range(2)]
    ids: list[int] = []
    try:
        wait_for(lambda: all(path.exists() and path.read_text() for path in own), process, "start")
        ids += [int(path.read_text()) for path in own]
        yield process, ids
    finally:
        process.kill()
        process.wait()
        for number in filter(is_alive, ids):
            os.kill(number, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the processes in /proc")
def test_signals_reach_all_processes(obedient: tuple[subprocess.Popen[str], list[int]], tmp_path: Path) -> None:
    """SIGUSR1 has them save, and on they go; where the one that started them is killed, they stop as for SIGTERM."""
    process, ids = obedient
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: all((tmp_path / f"saved{rank}").exists() for rank in range(2)), process, "SIGUSR1")
    assert all(is_alive(number) for number in ids)
    process.kill()
    process.wait()
    end = time.monotonic() + 120
    while any(is_alive(number) for number in ids):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
    assert all((tmp_path / f"stopped{rank}").exists() for rank in range(2))


def test_a_signal_to_stop_ends_all_processes(obedient: tuple[subprocess.Popen[str], list[int]], tmp_path: Path) -> None:
    process, ids = obedient
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert not any(is_alive(number) for number in ids)
    assert all((tmp_path / f"stopped{rank}").exists() for rank in range(2))


def test_a_run_is_trained_by_one_at_a_time(tiny_run, tmp_path: Path) -> None:
    """Two trainings into one run; folds beside each other; what is left of a training that was killed."""
    (tmp_path / "folds.json").touch()
    whole, fold, other = tmp_path, tmp_path / "fold_0", tmp_path / "fold_1"
    fold.mkdir()
    other.mkdir()
    with locked(fold), locked(other):
        for taken in (fold, whole):
            with pytest.raises(MedsegError, match="E_OUTPUT: another process trains into this run"), locked(taken):
                pass
        with locked(fold, is_main=False):
            pass
        with locked(other, is_main=False):
            pass
    assert not list(tmp_path.rglob(LOCK_FILE))
    with locked(whole), pytest.raises(MedsegError, match="another process trains"), locked(fold):
        pass
    with locked(fold):
        pass
    (fold / LOCK_FILE).touch()
    with locked(fold):
        pass
    experiment = resumed(tiny_run.run, ["trainer.max_steps=3"])
    with locked(tiny_run.run), pytest.raises(MedsegError, match="another process trains into this run"):
        train(experiment, tiny_run.run, Console(file=io.StringIO()))


def test_small_shared_memory_is_said_before_nccl_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 * 2**20, free=64 * 2**20)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage)
    for device, is_said in (("auto", True), ("cuda", True), ("cpu", False), ("cuda:0", False)):
        output = io.StringIO()
        say_shared_memory(device, Console(file=output))
        assert ("--shm-size 1g" in output.getvalue()) == is_said


def test_alone_nothing_is_asked() -> None:
    world = World()
    assert world.gather(math.inf) == [math.inf] and world.highest(2, 3) == (2, 3) and world.main_first(lambda: 5) == 5
    assert world.network(model := torch.nn.Linear(1, 1), torch.device("cpu")) is model


def test_batch_normalisation_sees_the_samples_of_all_processes_on_gpus() -> None:
    """Its layers become SyncBatchNorm, which PyTorch has for GPUs alone, with the same weights."""
    model = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 1), torch.nn.Sequential(torch.nn.BatchNorm3d(4)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same, notes = World().with_whole_batches(model, torch.device("cuda"))
    assert same is model and not notes  # alone
    world = World(size=2)
    world.group = "the group"  # type: ignore[assignment]
    same, notes = world.with_whole_batches(model, torch.device("cpu"))
    assert same is model and "the samples of one process only" in notes[0]
    instance = torch.nn.Sequential(torch.nn.InstanceNorm3d(4))
    same, notes = world.with_whole_batches(instance, torch.device("cpu"))
    assert same is instance and not notes
    converted, notes = world.with_whole_batches(model, torch.device("cuda"))
    assert not notes and not any(isinstance(m, torch.nn.BatchNorm3d) for m in converted.modules())
    (layer,) = (m for m in converted.modules() if isinstance(m, torch.nn.SyncBatchNorm))
    assert layer.process_group == "the group"
    assert converted.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batch_normalisation_over_processes_is_that_of_the_whole_batch() -> None:
    assert launch(batch_norm_difference, 2) < 1e-5


def test_draws_are_those_of_one_process() -> None:
    cases = [case((30, 30), (3, 3), "a"), case((20, 40), (15, 35), "b")]
    settings = {"batch_size": 5, "foreground_share": 0.4, "seed": 7}
    whole = PatchSampler(cases, (12, 12), **settings).batch(3)
    for rank in range(2):
        part = PatchSampler(cases, (12, 12), **settings, share=(rank, 2)).batch(3)
        assert all(torch.equal(ours, theirs[rank::2]) for ours, theirs in zip(part, whole, strict=True))
    whole = augmented(range(4))
    for rank in range(2):
        part = augmented(range(rank, 4, 2))
        assert all(torch.equal(ours, theirs[rank::2]) for ours, theirs in zip(part, whole, strict=True))


def test_work_is_divided_once_and_evenly() -> None:
    assert divide([1, 1, 1], 2) == [[0, 2], [1]]
    assert divide([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert divide([1, 1, 9, 1], 2, first=[0, 1]) == [[0, 1, 3], [2]]
    assert divide([], 3) == [[], [], []] and divide([2], 3) == [[0], [], []]


def test_too_small_a_batch_is_refused() -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG: the batch has fewer samples.*at least 6.*batch_size=6"):
        World(size=3).share_batch(5, 2)
    assert World(size=2).share_batch(7, 2) == [(slice(0, None, 2), 4 / 7), (slice(1, None, 2), 3 / 7)]


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_sweep(["-m"])
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*trainer\.devices=N"):
        refuse_sweep(["-m", "seed=1,2"])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "validation" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_train_what_one_does(tiny_run, tmp_path: Path) -> None:
    """S14: three validation cases over two processes give the tables of one, in its order; then one goes on alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    handler = signal.getsignal(signal.SIGTERM)
    alone = run(tiny_run.data, one, *SAME)
    result = run(tiny_run.data, two, *SAME, "trainer.devices=2")
    assert signal.getsignal(signal.SIGTERM) is handler  # torch's launcher sets its own
    assert (result.run, result.steps) == (two, 4) and result.evaluation is not None
    assert result.best_dice == pytest.approx(alone.best_dice, abs=1e-5)
    ours, theirs = weights(two), weights(one)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k], theirs[k], rtol=1e-4, atol=1e-6) for k in ours)
    for mine, other in zip(history(two), history(one), strict=True):
        for name in ("step", "train_loss", "lr", "val_loss", "val_dice_mean"):
            assert mine[name] == other[name] == "" or float(mine[name]) == pytest.approx(float(other[name]), rel=1e-4)
    rows, expected = table(two), table(one)
    assert len({row["case"] for row in rows}) == 3
    keys = [[(r["case"], r["class"], r["state"]) for r in rows_] for rows_ in (rows, expected)]
    assert keys[0] == keys[1]
    dices = [[float(row["dice"] or "nan") for row in rows_] for rows_ in (rows, expected)]
    assert dices[0] == pytest.approx(dices[1], abs=1e-3, nan_ok=True)
    files = [sorted(path.name for path in (folder / "validation").iterdir()) for folder in (one, two)]
    assert files[0] == files[1]

    again = train(resumed(two, ["trainer.max_steps=6", "trainer.devices=1"]), two, Console(file=io.StringIO()))
    assert again.steps == 6 and [row["step"] for row in history(two) if row["train_loss"]] == list("123456")


def test_a_refusal_of_a_process_is_that_of_the_training(tiny_run, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG: the batch has fewer samples.*data\.plan\.batch_size=2"):
        run(tiny_run.data, tmp_path / "run", "trainer.devices=2", "data.plan.batch_size=1", "trainer.max_steps=2")


def started_by(parent: int) -> dict[int, int]:
    """The processes that torchrun started, rank → id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(v[5:]): int(folder.name) for v in variables if v.startswith(b"RANK=")}
        except OSError:
            continue
    return found


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str], what: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert process.poll() is None and time.monotonic() < end, f"{what}: {process.poll()}"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_torchrun_restarts_after_a_kill_and_stops_at_a_step(tiny_run, tmp_path: Path) -> None:
    """One of two processes is killed: torchrun starts both anew, and they go on with the run. SIGTERM saves."""
    settings = ("trainer.max_steps=100000", "trainer.num_validations=1", "trainer.save_minutes=0", "augment=none")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    arguments = (*TINY, "data.plan.batch_size=2", f"data.root='{tiny_run.data}'", *settings)
    output = (tmp_path / "output.txt").open("w")
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "medseg", "train", *arguments],
        cwd=tmp_path,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def step() -> int:
        runs = list(tmp_path.glob("runs/*_unet"))
        return read_counters(runs[0]).step if runs and (runs[0] / "checkpoints" / "latest.safetensors").exists() else 0

    try:
        wait_for(lambda: step() >= 3, process, "first steps")
        first = started_by(process.pid)
        os.kill(first[1], signal.SIGKILL)
        wait_for(lambda: len({*started_by(process.pid).values()} - {*first.values()}) == 2, process, "restart")
        (folder,) = tmp_path.glob("runs/*_unet")
        before = step()
        wait_for(lambda: step() > before, process, "steps after the restart")
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    finally:
        if process.poll() is None:
            left = started_by(process.pid).values()
            process.kill()
            for number in left:
                os.kill(number, signal.SIGKILL)
        output.close()
    said = (tmp_path / "output.txt").read_text()
    assert (folder,) == tuple(tmp_path.glob("runs/*_unet")), said
    stopped = re.search(r"stopped by SIGTERM at step (\d+)", (folder / "train.log").read_text())
    assert stopped is not None and read_counters(folder).step == int(stopped.group(1)) > before, said
    steps = [int(row["step"]) for row in history(folder)]
    assert steps == list(range(1, steps[-1] + 1))  # each once


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the processes in /proc")
def test_devices_save_on_usr1_and_leave_no_orphans(tiny_run, tmp_path: Path) -> None:
    """`medseg train trainer.devices=2`: SIGUSR1, a second training into the run, and SIGKILL to what was started."""
    folder, output = tmp_path / "run", (tmp_path / "output.txt").open("w")
    settings = ("trainer.max_steps=100000", "trainer.num_validations=1", "trainer.save_minutes=600", "augment=none")
    arguments = (*TINY, "data.plan.batch_size=2", f"data.root='{tiny_run.data}'", f"hydra.run.dir={folder}", *settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "medseg", "train", "trainer.devices=2", *arguments],
        cwd=tmp_path,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    children: list[int] = []

    def step() -> int:
        return read_counters(folder).step if (folder / "checkpoints" / "latest.safetensors").exists() else 0

    def has_trained() -> bool:
        return (folder / "history.csv").exists() and len(history(folder)) > 2

    try:
        wait_for(has_trained, process, "first steps")
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == process.pid:
                    children.append(int(path.parent.name))
        assert len(children) >= 2 and step() == 0
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: step() > 0, process, "SIGUSR1")
        saved = step()
        with pytest.raises(MedsegError, match="E_OUTPUT: another process trains into this run"):
            train(resumed(folder, ["trainer.max_steps=1"]), folder, Console(file=io.StringIO()))
        process.kill()
        process.wait()
        end = time.monotonic() + 120
        while any(is_alive(number) for number in children):
            assert time.monotonic() < end, "orphans"
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        for number in filter(is_alive, children):
            os.kill(number, signal.SIGKILL)
        output.close()
    said = (tmp_path / "output.txt").read_text()
    assert "stopped by SIGTERM at step" in (folder / "train.log").read_text(), said
    assert step() > saved and not (folder / LOCK_FILE).exists(), said


def test_a_lost_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.training import distributed

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5")

    monkeypatch.setattr(distributed.dist, "init_process_group", gone)
    pattern = r"(?s)E_PROCESS: another process.*process 1 of 2.*resume=RUN"
    with pytest.raises(MedsegError, match=pattern) as refused, distributed.joined():
        pass
    assert refused.value.code is Code.PROCESS
