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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_work import LOSSES, augmented, exactness
from rich.console import Console
from test_sampling import case
from test_training import TINY, history, run, weights

from medseg.config import resumed
from medseg.data.sampling import PatchSampler
from medseg.errors import Code, MedsegError
from medseg.training.distributed import World, divide, launch, refuse_sweep
from medseg.training.state import read_counters
from medseg.training.train import train

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


def test_alone_nothing_is_asked() -> None:
    world = World()
    assert world.gather(math.inf) == [math.inf] and world.highest(2, 3) == (2, 3) and world.main_first(lambda: 5) == 5
    assert world.network(model := torch.nn.Linear(1, 1), torch.device("cpu")) is model


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
