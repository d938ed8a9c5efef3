"""Sweeps: what differs between runs, a search that goes on, ends trials early and takes up killed ones."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from test_training import TINY

from medseg import tuning
from medseg.bundle import BUNDLE_FILE
from medseg.config import run_hydra, search_space
from medseg.errors import Code, MedsegError
from medseg.reports.sweep import conclude_sweep, differing, read_sweep
from medseg.training.experiment import Experiment, write_config
from medseg.training.run_folder import refusals_in, write_refusal
from medseg.training.state import read_counters
from medseg.training.train import TrainResult
from medseg.tuning import ENDED_EARLY

optuna = pytest.importorskip("optuna")


def made_run(folder: Path, settings: dict[str, Any], dices: list[float]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [f"{10 * n},{n / 2},0.5,{dice}" for n, dice in enumerate(dices, start=1)]
    (folder / "history.csv").write_text("\n".join(["step,minutes,train_loss,val_dice_mean", *rows]) + "\n")


def test_words_that_are_no_refusal(tmp_path: Path) -> None:
    """In a folder of `medseg tune`, beside those of a sweep."""
    write_refusal(tmp_path / "trial_0", ENDED_EARLY)
    write_refusal(tmp_path / "trial_1", MedsegError(Code.LIMIT, "the memory does not suffice"))
    (tmp_path / "trial_2").mkdir()
    (tmp_path / "trial_2" / "refused.txt").write_bytes(b"\xff")
    (error,) = refusals_in(tmp_path)
    assert error.code is Code.LIMIT and "does not suffice" in error.message


def test_runs_side_by_side(tmp_path: Path) -> None:
    made_run(tmp_path / "0_unet", {"model": {"name": "unet"}, "optimizer": {"lr": 0.1}, "seed": 0}, [0.2, 0.6, 0.5])
    made_run(tmp_path / "1_unet", {"model": {"name": "unet"}, "optimizer": {"lr": 0.001}, "seed": 0}, [0.7])
    write_refusal(tmp_path / "2_unet", MedsegError(Code.LIMIT, "the memory does not suffice"))
    made_run(tmp_path / "3_other" / "fold_0", {"seed": 0}, [0.2])
    made_run(tmp_path / "3_other" / "fold_1", {"seed": 0}, [0.4, 0.1])
    (tmp_path / "3_other" / "config.yaml").write_text(
        yaml.safe_dump({"model": {"name": "b", "own": 1}, "optimizer": {"lr": 0.1}, "seed": 0})
    )
    (tmp_path / "3_other" / "folds.json").write_text("{}")
    runs = read_sweep(tmp_path)
    assert [run.score for run in runs][:2] == [0.6, 0.7] and math.isnan(runs[2].score)
    assert runs[3].score == pytest.approx(0.3) and runs[3].minutes == pytest.approx(1.5)
    assert runs[0].curve == ([0.5, 1.0, 1.5], [0.2, 0.6, 0.5])
    assert set(differing(runs)) == {"model.name", "optimizer.lr"}
    said = io.StringIO()
    conclude_sweep(tmp_path, Console(file=said, width=120))
    lines = [line for line in said.getvalue().splitlines() if "unet" in line]
    assert [line.split()[0] for line in lines] == ["1_unet", "0_unet", "2_unet"] and "E_LIMIT" in lines[2]
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer.lr"] for row in rows] == ["0.1", "0.001", "null", "0.1"]
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    with pytest.raises(MedsegError, match="E_RUN: there are no runs"):
        read_sweep(tmp_path / "3_other" / "fold_0")


def test_runs_of_another_task_side_by_side(tmp_path: Path) -> None:
    for number, auc in enumerate((0.7, 0.9)):
        made_run(tmp_path / f"{number}_cnn", {"task": "classification", "seed": number}, [])
        (tmp_path / f"{number}_cnn" / "history.csv").write_text(f"step,minutes,train_loss,val_auc\n1,0.5,0.1,{auc}\n")
    said = io.StringIO()
    conclude_sweep(tmp_path, Console(file=said, width=120))
    assert "AUC" in said.getvalue() and "Dice:" not in said.getvalue()
    assert said.getvalue().index("1_cnn") < said.getvalue().index("0_cnn")
    assert (tmp_path / "sweep.csv").read_text().startswith("run,seed,best_validation_auc,")


def test_what_is_searched() -> None:
    fixed, space = search_space(
        ["seed=3", "model=unet,fusionnet", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "fold=int(interval(0,4))"]
    )
    assert fixed == ["seed=3"]
    assert space == {
        "model": ("unet", "fusionnet"),
        "optimizer.lr": (1e-4, 1e-2, True),
        "fold": (0, 4, False),
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """Trainings that take no time: the Dice follows from the learning rate, over five validations."""
    done: list[Experiment] = []

    def fake(experiment: Experiment, run: Path, console: Console, watch: Any) -> TrainResult:
        done.append(experiment)
        run.mkdir(parents=True, exist_ok=True)
        write_config(experiment, run)
        (run / BUNDLE_FILE).write_text("{}")
        best = -abs(math.log10(experiment.optimizer["lr"]) + 3)
        if len(done) == DIES_AT:
            raise KeyboardInterrupt
        for number in range(1, 6):
            watch(number / 5, best - 0.1 / number)
        return TrainResult(run, best, 5, 0.1, None)

    monkeypatch.setattr(tuning, "train", fake)
    return done


DIES_AT = 4
SEARCH = ("data.root=.", "optimizer.lr=tag(log,interval(1e-6,1))")


def search(folder: Path, trials: int, *overrides: str) -> str:
    said = io.StringIO()
    tuning.tune(overrides or SEARCH, folder, num_trials=trials, prunes=True, console=Console(file=said, width=200))
    return said.getvalue()


def test_a_search_goes_on(tmp_path: Path, trained: list[Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is interrupted in its fourth trial, which is taken up again with the same values in the same folder."""
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "s", 12)
    assert len(trained) == 4
    said = search(tmp_path / "s", 12)
    assert "trial_003 was cut short and goes on" in said
    assert trained[4].resume == str(tmp_path / "s" / "trial_003")
    assert trained[4].optimizer["lr"] == trained[3].optimizer["lr"]
    assert len(trained) == 13 and len(list((tmp_path / "s").glob("trial_*"))) == 12
    assert "best of" in said and (tmp_path / "s" / "sweep.csv").is_file()
    study = tuning.open_study(tmp_path / "s", search_space(SEARCH)[1], prunes=True)
    assert study.best_value == max(
        t.value for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE and t.value is not None
    )
    pruned = [t for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    assert pruned and all(len(t.intermediate_values) < 5 for t in pruned)
    assert search(tmp_path / "s", 12) and len(trained) == 13  # nothing is left to do
    search(tmp_path / "s", 14)
    assert len(trained) == 15
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG: the study in this folder searches something else"):
        search(tmp_path / "s", 14, "data.root=.", "fold=0,1")


def test_a_search_refuses(tmp_path: Path, trained: list[Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG: nothing is searched.*model=unet"):
        search(tmp_path / "s", 2, "data.root=.")
    with pytest.raises(MedsegError, match=r"(?s)there is no option 'fusionet' of model"):
        search(tmp_path / "s", 2, "model=unet,fusionet")
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(tuning, "train", refusing(Code.NAN_LOSS))
    assert "E_NAN_LOSS" in search(tmp_path / "s", 2)  # of these values; the search goes on
    assert len(list((tmp_path / "s").glob("trial_*/refused.txt"))) == 2
    monkeypatch.setattr(tuning, "train", refusing(Code.NO_CASES))
    with pytest.raises(MedsegError, match="E_NO_CASES"):
        search(tmp_path / "s", 4)
    assert "E_NO_CASES" in (tmp_path / "s" / "trial_002" / "refused.txt").read_text()

    def fine(experiment: Experiment, run: Path, console: Console, watch: Any) -> TrainResult:
        made_run(run, {"optimizer": {"lr": experiment.optimizer["lr"]}}, [0.5])
        return TrainResult(run, 0.5, 5, 0.1, None)

    monkeypatch.setattr(tuning, "train", refusing(Code.OUTPUT))
    with pytest.raises(MedsegError, match="E_OUTPUT"):
        search(tmp_path / "s", 4)
    monkeypatch.setattr(tuning, "train", fine)
    said = search(tmp_path / "s", 4)  # what one trial's values caused is not tried again, what a full disk did is
    assert "trial_003 was cut short and goes on" in said and "trial_002 was cut short" not in said
    assert "best of 1: trial_003" in said


def refusing(code: Code) -> Any:
    def refuse(*_: object) -> None:
        raise MedsegError(code, "no")

    return refuse


def sweep(folder: Path, *overrides: str) -> None:
    arguments = ["-m", f"hydra.sweep.dir='{folder}'", *overrides]

    def task(experiment: Experiment, run: Path) -> None:
        if experiment.fold == 1:
            raise MedsegError(Code.LIMIT, "too large")
        write_config(experiment, run)
        (run / "history.csv").write_text("step,minutes,train_loss,val_dice_mean\n10,0.5,0.1,0.5\n")

    run_hydra("train", arguments, task)


def test_a_sweep_of_hydra_is_compared_and_goes_on_after_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedsegError, match="E_LIMIT"):
        sweep(tmp_path / "sweep", "model=unet,fusionnet", "fold=0,1")
    runs = read_sweep(tmp_path / "sweep")
    assert [run.name for run in runs] == ["0_unet", "1_unet", "2_fusionnet", "3_fusionnet"]
    assert [run.refused is None for run in runs] == [True, False, True, False]
    assert "model.name" in differing(runs) and (tmp_path / "sweep" / "sweep.png").is_file()
    assert "0_unet" in capsys.readouterr().out
    sweep(tmp_path / "other", "seed=1,2")  # and nothing of the last one is left


def test_a_job_that_slurm_begins_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit requeues a job whose time is over: the same command, in the folder where its run has begun."""
    monkeypatch.chdir(tmp_path)
    folder, given = tmp_path / "run", []

    def task(experiment: Experiment, run: Path) -> None:
        given.append((experiment.resume, experiment.seed))
        if experiment.resume is None:
            write_config(experiment, run)

    arguments = [f"hydra.run.dir='{folder}'", "seed=5"]
    run_hydra("train", arguments, task)
    with pytest.raises(MedsegError, match="E_OUTPUT: the run's folder is not empty"):
        run_hydra("train", arguments, task)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_hydra("train", arguments, task)  # ended before it had settled what it begins with
    (folder / BUNDLE_FILE).write_text("{}")
    run_hydra("train", arguments, task)
    assert given == [(None, 5), (None, 5), (str(folder), 5)]


def test_the_command_for_slurm_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of docs/scaling.md, up to where SLURM would be asked."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    (command,) = re.findall(
        r"^medseg train -m (hydra/launcher=submitit_slurm .*?[^\\])$", text, re.DOTALL | re.MULTILINE
    )
    words = shlex.split(command.replace("\\\n", " "))
    more = ["hydra.launcher.max_num_timeout=5", "hydra.launcher.account=a", "hydra.launcher.qos=b"]
    more.append("+hydra.launcher.additional_parameters.reservation=c")
    assert all(word.lstrip("+").rpartition("=")[0] in text for word in more)
    single = [word for word in words if "," not in word]
    run_hydra("train", [*single, *more, "--cfg", "hydra"], lambda experiment, folder: None)
    launcher = yaml.safe_load(capsys.readouterr().out)["hydra"]["launcher"]
    assert (launcher["partition"], launcher["gpus_per_node"], launcher["timeout_min"]) == ("gpu", 1, 600)
    assert launcher["additional_parameters"] == {"reservation": "c"}


@pytest.mark.slow
def test_through_submitit(tiny_run, tmp_path: Path) -> None:
    """The launcher for SLURM, with its executor on this machine."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    settings = ("trainer.max_steps=2", "trainer.num_validations=1", "hydra/launcher=submitit_local")
    arguments = (*TINY, *settings, f"data.root='{tiny_run.data}'", "hydra.launcher.timeout_min=20", "seed=0,1")
    done = subprocess.run(
        [sys.executable, "-m", "medseg", "train", "-m", f"hydra.sweep.dir='{tmp_path / 'sweep'}'", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = read_sweep(tmp_path / "sweep")
    assert [run.settings["seed"] for run in runs] == [0, 1] and all(run.score >= 0 for run in runs)
    assert (tmp_path / "sweep" / "sweep.csv").is_file() and "0_unet" in done.stdout


@pytest.mark.slow
def test_a_search_over_real_trainings(tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its second trial, it goes on from `study.log`; trials end early; a table and a picture compare them."""
    folder = tmp_path / "search"
    lengths = ("trainer.max_steps=20", "trainer.num_validations=5", "trainer.save_minutes=0", "augment=none")
    stated = [*TINY, *lengths, f"data.root='{tiny_run.data}'", "optimizer.lr=tag(log,interval(1e-6,1e-1))"]
    command = [sys.executable, "-m", "medseg", "tune", "-o", str(folder), "--trials", "2", *stated]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        second, end = folder / "trial_001", time.monotonic() + 600
        while not (second / "checkpoints" / "latest.safetensors").exists():
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        process.kill()
        process.wait()
    begun = read_counters(second).step

    sampler = optuna.samplers.TPESampler
    # The same values each time this test runs
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda seed=None: sampler(seed=3))
    said = io.StringIO()
    tuning.tune(stated, folder, num_trials=12, prunes=True, console=Console(file=said, width=200))
    assert "trial_001 was cut short and goes on" in said.getvalue()
    study = tuning.open_study(folder, search_space(stated)[1], prunes=True)
    states = Counter(trial.state.name for trial in study.trials)
    assert states["FAIL"] == 1 and states["COMPLETE"] + states["PRUNED"] == 12 and states["PRUNED"] >= 1, states
    runs = {run.name: run for run in read_sweep(folder)}
    assert len(runs) == 12 and read_counters(second).step == 20 > begun
    for trial in study.trials:
        run = runs[trial.user_attrs["run"]]
        assert run.settings["optimizer.lr"] == pytest.approx(trial.params["optimizer.lr"])
        if trial.state.name == "PRUNED":
            assert len(trial.intermediate_values) < 5 and ENDED_EARLY in (folder / run.name / "refused.txt").read_text()
        elif trial.state.name == "COMPLETE":
            assert run.score == pytest.approx(trial.value, abs=1e-6)
    with (folder / "sweep.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    assert (folder / "sweep.png").stat().st_size > 10_000
    best = runs[study.best_trial.user_attrs["run"]]
    assert f"best of {states['COMPLETE']}: {best.name}" in said.getvalue()
    assert best.score == max(run.score for run in runs.values() if run.refused is None)
    if keep := os.environ.get("MEDSEG_KEEP_SEARCH"):  # to look at the picture
        shutil.copytree(folder, keep)
