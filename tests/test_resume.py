"""Going on: exactly where a run was, whatever ended it, and from the checkpoint before where the latest is damaged."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_training import TINY, history, run
from torch import nn

from medseg.bundle import MANIFEST_FILE, checkpoint_path, read_checkpoint
from medseg.cli import main
from medseg.config import resumed
from medseg.data.sampling import PatchSampler
from medseg.errors import MedsegError
from medseg.inference.verification import Status, verify
from medseg.training import engine, loop, state
from medseg.training.averaging import WeightAverage
from medseg.training.journal import HISTORY_FILE, Journal, _rows
from medseg.training.loop import Loop
from medseg.training.signals import SAVING, save_signal_is_harmless
from medseg.training.state import Counters, read_counters, resume_latest, save_latest
from medseg.training.train import train

EVERYTHING = (
    "trainer.precision=bf16",
    "trainer.ema=0.9",
    "model.deep_supervision=true",
    "data.plan.num_stages=3",
    "schedule=one_cycle",
    "trainer.num_validations=3",
    "trainer.map_cases=1",  # looking inside changes nothing
    "trainer.log_steps=4",  # the mean of an entry spans the interruption
    "trainer.max_steps=6",
)
DROPOUT = (
    "model=monai",
    "model.network=SegResNet",
    "model.arguments={init_filters: 8, dropout_prob: 0.5}",
    "data.plan.patch_size=[16,16,16]",
    "data.plan.batch_size=2",
    "trainer.num_validations=1",
    "trainer.max_steps=2",
)


class Killed(BaseException):
    """What a test raises in place of SIGKILL: nobody catches it."""


def contents(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Tensors and metadata of a checkpoint, but for the time it took."""
    tensors, metadata = read_checkpoint(checkpoint_path(folder, name))
    metadata["counters"]["minutes"] = 0.0
    return tensors, metadata


def assert_same(first: Path, second: Path) -> None:
    """Same weights, averages, moments and counters, bit for bit; same losses."""
    for name in ("latest", "best"):
        (ours, our_data), (theirs, their_data) = contents(first, name), contents(second, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), name
        assert our_data == their_data, name
    losses = [[(r["step"], r["train_loss"], r["val_dice_mean"]) for r in history(folder)] for folder in (first, second)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that has a state, done without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(tiny_run.data, folder, *EVERYTHING)
    return folder


def go_on(folder: Path) -> None:
    """Take a run up again and finish it."""
    from rich.console import Console

    with (folder.parent / "again.txt").open("w") as log:
        train(resumed(folder, []), folder, Console(file=log))


def interrupted(data: Path, folder: Path, settings: tuple[str, ...], at: int, error: type[BaseException]) -> None:
    """A run that SIGTERM or a `Killed` ends within the step `at`."""
    original = Loop.train_step

    def step_and_end(self: Loop, step: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if step == at and error is Killed:
            raise Killed
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, image, label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "train_step", step_and_end)
        with pytest.raises(error) as ended:
            run(data, folder, *settings)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 143


@pytest.mark.parametrize("error", [SystemExit, Killed])
def test_with_everything_that_has_a_state(tiny_run, straight: Path, tmp_path: Path, error: type[BaseException]) -> None:
    """bf16, averaged weights, deep supervision, one cycle, augmentation by a thread: 6 straight are 3 + 3."""
    settings = EVERYTHING if error is SystemExit else (*EVERYTHING, "trainer.save_minutes=0")
    interrupted(tiny_run.data, tmp_path / "run", settings, 3, error)
    assert read_counters(tmp_path / "run").step == (4 if error is SystemExit else 3)
    go_on(tmp_path / "run")
    assert_same(straight, tmp_path / "run")


def test_what_a_network_draws_itself(tiny_run, tmp_path: Path) -> None:
    """Dropout too is a function of (seed, step)."""
    run(tiny_run.data, tmp_path / "straight", *DROPOUT)
    interrupted(tiny_run.data, tmp_path / "run", (*DROPOUT, "trainer.save_minutes=0"), 1, Killed)
    torch.rand(7)
    go_on(tmp_path / "run")
    assert_same(tmp_path / "straight", tmp_path / "run")


def test_killed_between_the_row_of_a_validation_and_its_checkpoint(
    tiny_run, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation is done again, and history.csv has its row once."""

    original = Journal.record

    def write_and_die(self: Journal, step: int, minutes: float, values: Mapping[str, float]) -> None:
        original(self, step, minutes, values)
        if "val_loss" in values:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "record", write_and_die)
        run(tiny_run.data, tmp_path / "run", *EVERYTHING, "trainer.save_minutes=100")
    assert read_counters(tmp_path / "run").is_validating
    assert [row["step"] for row in history(tmp_path / "run") if row["val_dice_mean"]] == ["2"]
    go_on(tmp_path / "run")
    assert_same(straight, tmp_path / "run")


@pytest.mark.parametrize("moment", ["validate", "save_best"])
def test_killed_in_a_validation(
    tiny_run, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """In the middle of it, and after `latest` was written and before `best` was."""
    module = loop if moment == "validate" else engine
    original: Callable[..., object] = getattr(module, moment)
    calls = []

    def die(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == (2 if moment == "validate" else 1):  # the first one is the best by being the first
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(module, moment, die)
    with pytest.raises(Killed):
        run(tiny_run.data, tmp_path / "run", *EVERYTHING, "trainer.save_minutes=100")
    counters = read_counters(tmp_path / "run")
    assert counters.is_validating == (moment == "validate")
    if moment == "validate":
        assert counters.step == 4  # the steps before it are not lost
    go_on(tmp_path / "run")
    assert_same(straight, tmp_path / "run")


def small_state(step: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, WeightAverage]:
    """A network after a few steps, with all that is saved."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = WeightAverage(model, 0.9)
    for number in range(step):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        average.update(number)
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False), average


def save_state(folder: Path, step: int) -> None:
    model, optimizer, scaler, average = small_state(step)
    save_latest(folder, model, optimizer, scaler, Counters(step=step), average)


def resume_state(folder: Path) -> tuple[Counters, list[str], dict[str, torch.Tensor]]:
    model, optimizer, scaler, average = small_state(0)
    counters, notes = resume_latest(folder, model, optimizer, scaler, average)
    return counters, notes, model.state_dict()


def damaged(whole: bytes) -> list[bytes]:
    """A file cut at every k-th byte, and with every k-th byte changed."""
    places = np.unique(np.linspace(0, len(whole) - 1, 60).astype(int))
    flipped = [whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :] for i in places]
    return [*(whole[:i] for i in places), *flipped]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    save_state(tmp_path, 2)
    save_state(tmp_path, 3)
    latest, previous = (checkpoint_path(tmp_path, name) for name in ("latest", "previous"))
    newer, older = latest.read_bytes(), previous.read_bytes()
    assert resume_state(tmp_path)[:2] == (Counters(step=3), [])
    for content in damaged(newer):
        latest.write_bytes(content)
        previous.write_bytes(older)
        assert read_counters(tmp_path).step == 2
        counters, (note,), weights = resume_state(tmp_path)
        assert counters.step == 2 and "the latest checkpoint is damaged" in note and "of step 2" in note
        assert all(torch.equal(weights[k], v) for k, v in small_state(2)[0].state_dict().items())
        assert latest.read_bytes() == older and not previous.exists()  # the next save keeps a whole one
    save_state(tmp_path, 4)
    assert (read_counters(tmp_path).step, previous.read_bytes()) == (4, older)


def test_a_bit_of_the_format_falls_back_too_unless_both_say_the_same(tmp_path: Path) -> None:
    save_state(tmp_path, 2)
    save_state(tmp_path, 3)
    paths = [checkpoint_path(tmp_path, name) for name in ("latest", "previous")]
    other = [path.read_bytes().replace(b'"format":"1"', b'"format":"9"') for path in paths]
    whole = [path.read_bytes() for path in paths]
    assert other != whole
    for path, content in zip(paths, other, strict=True):
        path.write_bytes(content)
    with pytest.raises(MedsegError, match=r"(?s)E_VERSION.*format 9"):
        read_counters(tmp_path)
    paths[1].write_bytes(whole[1])
    assert read_counters(tmp_path).step == 2
    counters, (note,), _ = resume_state(tmp_path)
    assert counters.step == 2 and "another version" in note and "of step 2" in note
    assert paths[0].read_bytes() == whole[1]
    paths[0].write_bytes(other[0])
    paths[1].write_bytes(whole[1][:-1])
    with pytest.raises(MedsegError, match=r"(?s)E_VERSION.*format 9"):
        read_counters(tmp_path)


def test_both_damaged_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 1)
    save_state(tmp_path, 2)
    for name in ("latest", "previous"):
        path = checkpoint_path(tmp_path, name)
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MedsegError, match=r"(?s)E_CHECKPOINT.*previous one are both damaged.*trainer\.initial"):
        read_counters(tmp_path)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 1)
    model, _, scaler, average = small_state(0)
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(MedsegError, match="E_CHECKPOINT: the checkpoint's optimizer is not that of this run"):
        resume_latest(tmp_path, model, torch.optim.AdamW(groups), scaler, average)


def test_without_hard_links_the_one_before_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        save_state(tmp_path, step)
    assert read_counters(tmp_path).step == 3
    _, metadata = read_checkpoint(checkpoint_path(tmp_path, "previous"))
    assert metadata["counters"]["step"] == 2
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"latest.safetensors", "previous.safetensors"}


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    save_state(tmp_path, 1)
    left = tmp_path / "checkpoints" / f".{'0' * 32}.safetensors"
    left.write_bytes(b"half")
    other = tmp_path / "checkpoints" / ".mine.safetensors"
    other.write_bytes(b"not ours")
    resume_state(tmp_path)
    assert not left.exists() and other.exists()


def test_a_lost_best_is_made_again_or_said(tmp_path: Path) -> None:
    model, optimizer, scaler, average = small_state(3)
    here = Counters(step=3, best_score=0.5, best_step=3, validations=1)
    save_latest(tmp_path, model, optimizer, scaler, here, average)
    assert resume_state(tmp_path)[:2] == (here, [])
    tensors, metadata = read_checkpoint(checkpoint_path(tmp_path, "best"))
    assert metadata == {"counters": asdict(here)} and len(tensors) == 2
    assert torch.equal(tensors["model.weight"], average.weights()["weight"])

    # The best one is of a later step than the checkpoint that is left: it stays the one to beat.
    save_latest(tmp_path, model, optimizer, scaler, Counters(step=2, best_score=0.3, best_step=1), average)
    counters, notes, _ = resume_state(tmp_path)
    assert (counters.step, counters.best_score, counters.best_step, notes) == (2, 0.5, 3, [])

    checkpoint_path(tmp_path, "best").write_bytes(b"damaged")
    counters, (note,), _ = resume_state(tmp_path)
    assert counters.best_score == -1 and "the best checkpoint is missing or damaged" in note


@pytest.mark.skipif(SAVING is None, reason="no SIGUSR1 here")
def test_sigusr1_saves_and_goes_on(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    step_of, save_of = Loop.train_step, state.save_latest

    def ask(self: Loop, step: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step_of(self, step, image, label)

    def note(folder: Path, model: nn.Module, *rest: object) -> None:
        saved.append(next(part for part in rest if isinstance(part, Counters)).step)
        save_of(folder, model, *rest)

    monkeypatch.setattr(Loop, "train_step", ask)
    monkeypatch.setattr(engine, "save_latest", note)
    result = run(tiny_run.data, tmp_path / "run", "trainer.max_steps=4", "trainer.num_validations=1")
    assert result.steps == 4 and saved == [2, 4, 4]  # asked for; before and after the validation
    with save_signal_is_harmless():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Batches with NaN in these steps."""
    original = PatchSampler.batch

    def batch(self: PatchSampler, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = original(self, step)
        return (torch.full_like(image, math.nan), label) if step in steps else (image, label)

    monkeypatch.setattr(PatchSampler, "batch", batch)


@pytest.mark.parametrize("normalisation", ["instance", "batch"])
def test_a_loss_that_is_not_finite_may_be_left_out(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalisation: str
) -> None:
    """A batch normalisation has taken the NaN into its running statistics before the loss is known."""
    spoil(monkeypatch, range(1, 2))
    settings = ("trainer.max_steps=4", "trainer.num_validations=1", "trainer.ema=0.9")
    settings += (f"model.normalisation={normalisation}",)
    with pytest.raises(MedsegError, match="E_NAN_LOSS"):
        run(tiny_run.data, tmp_path / "stops", *settings)
    assert not (tmp_path / "stops" / "checkpoints").exists()  # it never becomes the best, nor the latest
    result = run(tiny_run.data, tmp_path / "goes_on", *settings, "trainer.on_nan_loss=skip")
    assert result.steps == 4 and result.best_dice > -1
    assert "step 2 is left out" in (tmp_path / "goes_on.txt").read_text()
    for name in ("latest", "best"):
        tensors, _ = read_checkpoint(checkpoint_path(tmp_path / "goes_on", name))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        counted = {int(v) for k, v in tensors.items() if k.endswith("num_batches_tracked")}
        assert counted == ({3} if normalisation == "batch" else set())
    assert [r["step"] for r in history(tmp_path / "goes_on") if r["train_loss"]] == ["1", "3", "4"]


def test_leaving_out_has_an_end(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(1, 100))
    monkeypatch.setattr(engine, "MAX_LEFT_OUT", 3)
    with pytest.raises(MedsegError, match=r"(?s)E_NAN_LOSS: the training loss was not finite 3 times in a row.*step 3"):
        run(tiny_run.data, tmp_path / "run", "trainer.max_steps=40", "trainer.on_nan_loss=skip")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_where_a_run_lies_is_said_but_not_logged(
    tiny_run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    """Folders may be named for patients. And under `medseg` too the loop's own handler stops at a step and saves."""
    folder = tmp_path / "Patient_Name [1]" / "run"
    settings = (*TINY, f"data.root='{tiny_run.data}'", "trainer.max_steps=4", f"hydra.run.dir='{folder}'")
    original = Loop.train_step

    def ask_to_stop(self: Loop, step: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        if step == 1:
            os.kill(os.getpid(), number)
        return original(self, step, image, label)

    monkeypatch.setattr(Loop, "train_step", ask_to_stop)
    with pytest.raises(SystemExit) as ended:
        main(["train", *settings])
    assert ended.value.code == code and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert read_counters(folder).step == 2
    assert f"resume={folder}" in capsys.readouterr().out.replace("'", "")
    log = (folder / "train.log").read_text()
    assert f"stopped by {number.name} at step 2" in log and "Patient_Name" not in log


def test_a_run_that_cannot_go_on_keeps_its_manifest(tiny_run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("trainer.max_steps=1", "trainer.num_validations=1")
    run(tiny_run.data, folder, *settings)
    before = (folder / MANIFEST_FILE).read_bytes()
    gone = tmp_path / "gone"
    gone.mkdir()
    with pytest.raises(MedsegError):
        run(gone, folder, *settings, f"resume='{folder}'")
    assert (folder / MANIFEST_FILE).read_bytes() == before
    for name in ("latest", "previous"):
        checkpoint_path(folder, name).write_bytes(b"damaged")
    with pytest.raises(MedsegError, match="E_CHECKPOINT"):
        run(tiny_run.data, folder, *settings, f"resume='{folder}'")
    assert (folder / MANIFEST_FILE).read_bytes() == before


def test_folds_whose_conclusion_is_cut_short_have_no_manifest(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fold is left to train, but what all of them say together is written anew."""
    folder = tmp_path / "run"
    settings = ("trainer.max_steps=1", "trainer.num_validations=1", "data.split.num_folds=2", "folds=all")
    run(tiny_run.data, folder, *settings)
    assert (folder / MANIFEST_FILE).is_file()
    whole = verify(folder)
    members = {f"fold_{number}/checkpoints/best.safetensors" for number in range(2)}
    assert whole.is_ok and members < {finding.name for finding in whole.findings}
    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / "fold_1" / "plan.yaml").write_text("patch_size: []")
    assert [f.name for f in verify(tmp_path / "changed").findings if f.status is Status.WRONG] == ["fold_1/plan.yaml"]

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("medseg.training.train.conclude_folds", die)
    with pytest.raises(Killed):
        go_on(folder)
    assert not (folder / MANIFEST_FILE).exists()


def test_rows_that_were_cut_short_are_none(tmp_path: Path) -> None:
    path = tmp_path / HISTORY_FILE
    path.write_bytes(b"step,minutes,train_loss\n1,0.1,0.5\n2,0.2\n\xff\n3,0.3,0.4\n12,0.4,0.")
    assert [row["step"] for row in _rows(path)] == ["1", "3"]


def test_a_save_is_waited_for(tmp_path: Path) -> None:
    """What aims the kills of scripts/kill_training.py at saves."""
    spec = importlib.util.spec_from_file_location("kill_training", REPOSITORY / "scripts" / "kill_training.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, program)  # its dataclasses look there
        spec.loader.exec_module(program)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as waiting:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "latest.safetensors").touch()
        later = threading.Timer(0.2, (tmp_path / "checkpoints" / f".{'0' * 32}.safetensors").touch)
        later.start()
        begun = time.monotonic()
        assert program._wait_for_save(waiting, tmp_path) and time.monotonic() - begun > 0.1
        waiting.communicate(b"\n")
    later.join()
    assert not program._wait_for_save(waiting, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_again_and_again(tmp_path: Path, devices: int) -> None:
    """scripts/kill_training.py with few kills; docs/reliability.md has the figures of many."""
    script = REPOSITORY / "scripts" / "kill_training.py"
    if devices > 1 and not Path("/proc/self/stat").exists():
        pytest.skip("finds the processes in /proc")
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--steps-per-kill", "120", "--devices", str(devices)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert results["kills_aimed_at_saves"] == 1
    assert results["kills"] == 3 and results["same_weights_as_without_kills"] == "yes"
    if devices > 1:
        of_each = {name: number for name, number in results.items() if name.startswith("kills_of_")}
        assert len(of_each) == 3 and set(of_each.values()) == {1}
