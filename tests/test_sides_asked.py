"""Left and right, asked at a terminal: who is asked, what each answer does, and that the run remembers it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import yaml
from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.config import compose, resumed
from medseg.data.layouts import DataFolder
from medseg.training import sides
from medseg.training.experiment import Experiment

pty = pytest.importorskip("pty")  # no such terminals on Windows

NAMES = {"background": 0, "liver": 1, "kidney_left": 2, "kidney_right": 3, "lung left": 4, "lung right": 5}
FOUND = {"kidney_left": "kidney_right", "lung left": "lung right"}


class Terminal:
    """Somebody at a terminal."""

    def __init__(self, screen: TextIO, far_end: int) -> None:
        self.console, self.far_end = Console(file=screen, width=200, force_terminal=True, color_system=None), far_end

    def asks(self, *typed: str, settings: tuple[str, ...] = (), labels: Any = None) -> Experiment:
        """What becomes of an experiment, with these lines typed ahead."""
        os.write(self.far_end, "".join(f"{line}\n" for line in typed).encode())
        folder = DataFolder(Path("data"), "a folder", (), labels=NAMES if labels is None else labels or None)
        return sides.with_sides(compose("train", list(settings)), folder, self.console)

    def shown(self) -> str:
        return read_all(self.far_end)


def read_all(far_end: int) -> str:
    """What a terminal has shown since the last look."""
    os.set_blocking(far_end, False)
    text = b""
    try:
        while part := os.read(far_end, 2**16):
            text += part
    except OSError:  # nothing more
        pass
    os.set_blocking(far_end, True)
    return text.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    far_end, near_end = pty.openpty()
    monkeypatch.setattr(sides, "_answers", {})
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with os.fdopen(near_end, encoding="utf-8") as keyboard, os.fdopen(os.dup(near_end), "w") as screen:
        monkeypatch.setattr(sys, "stdin", keyboard)
        yield Terminal(screen, far_end)
    os.close(far_end)


@pytest.mark.parametrize(
    "typed, swap",
    [
        (("",), FOUND),
        (("yes",), FOUND),
        (("none",), {}),
        (("edit", "2=3"), {"kidney_left": "kidney_right"}),
        (("edit", "2 = 3, 5=4"), {"kidney_left": "kidney_right", "lung right": "lung left"}),
        (("edit", ""), {}),
        (("perhaps", "none"), {}),
        (("edit", "2=9", "2=2", "2=3 3=4", "kidney", "0=1", "2=3 2=4", "4=5"), {"lung left": "lung right"}),
    ],
)
def test_each_answer(terminal: Terminal, typed: tuple[str, ...], swap: dict[str, str]) -> None:
    assert terminal.asks(*typed).augment.swap == swap
    shown = terminal.shown()
    assert "kidney_left ↔ kidney_right, lung left ↔ lung right" in shown and "kept as augment.swap" in shown
    assert shown.count("not understood") == max(0, len(typed) - 2 if typed[0] == "edit" else 0)


def test_one_answer_serves_a_sweep(terminal: Terminal) -> None:
    assert terminal.asks("none").augment.swap == {}
    terminal.shown()
    assert terminal.asks(settings=("fold=1",)).augment.swap == {}
    assert terminal.shown() == ""


@pytest.mark.parametrize(
    "settings, labels",
    [
        (("augment.swap=auto",), NAMES),
        (("augment.swap={}",), NAMES),
        (("augment.swap={kidney_left: kidney_right}",), NAMES),
        ((), {"background": 0, "liver": 1, "kidney_left": 2}),
        ((), {}),
        (("data.labels={background: 0, organs: [1, 2, 3]}",), NAMES),
    ],
)
def test_what_is_not_asked(terminal: Terminal, settings: tuple[str, ...], labels: dict[str, int]) -> None:
    assert terminal.asks(settings=settings, labels=labels) == compose("train", list(settings))
    assert terminal.shown() == ""


@pytest.mark.parametrize(
    "absent",
    [
        lambda patch, terminal: patch.setenv("CI", "true"),
        lambda patch, terminal: patch.setenv("WORLD_SIZE", "2"),
        lambda patch, terminal: patch.setattr(sys, "stdin", None),
        lambda patch, terminal: patch.setattr(os, "tcgetpgrp", lambda fd: -1),
        lambda patch, terminal: setattr(terminal, "console", Console(file=io.StringIO())),
        lambda patch, terminal: patch.setattr(sys.stdin, "isatty", lambda: False, raising=False),
    ],
    ids=["CI", "several processes", "no input", "in the background", "output to a file", "input from a file"],
)
def test_nobody_is_asked(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, absent: Callable[[pytest.MonkeyPatch, Terminal], None]
) -> None:
    absent(monkeypatch, terminal)
    assert terminal.asks().augment.swap is None
    assert "left and right" not in terminal.shown()


def test_an_end_of_input_is_no_answer(terminal: Terminal) -> None:
    assert terminal.asks("\x04").augment.swap is None


def test_a_run_remembers_the_answer(tiny_run, tmp_path: Path) -> None:
    """`medseg train` in a terminal of its own, a fold: one question, and its answer in all configurations."""
    data = tmp_path / "data"
    shutil.copytree(tiny_run.data, data)
    description = json.loads((data / "dataset.json").read_text())
    description["labels"] = NAMES
    (data / "dataset.json").write_text(json.dumps(description))
    folder = tmp_path / "run"
    settings = [
        f"data.root='{data}'",
        f"hydra.run.dir='{folder}'",
        "folds=[0]",
        "data.split.num_folds=2",
        "trainer.overlay_cases=0",
    ]
    settings += [
        "data.plan.base_width=4",
        "data.plan.num_stages=2",
        "data.plan.patch_size=[8,16,16]",
        "trainer.device=cpu",
    ]
    settings += ["trainer.max_steps=1", "trainer.final_predictions=false", "trainer.report=false", "data.store=null"]
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "WORLD_SIZE")}
    far_end, near_end = pty.openpty()
    os.write(far_end, b"edit\n2=3\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "medseg", "train", *settings, "data.in_memory=true"],
        stdin=near_end, stdout=near_end, stderr=near_end, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(near_end)
    shown = ""
    with suppress(OSError):  # the end of what is shown, once the process has gone
        while part := os.read(far_end, 2**16):
            shown += part.decode(errors="replace")
    os.close(far_end)
    assert process.wait(120) == 0, shown
    assert shown.count("Is that so?") == 1 and "by their names; other pairs" not in shown
    pairs = {"kidney_left": "kidney_right"}
    for name in (".", "fold_0"):
        assert yaml.safe_load((folder / name / "config.yaml").read_text())["augment"]["swap"] == pairs
    assert BundleInfo.read(folder / "fold_0").swap == pairs
    assert resumed(folder, []).augment.swap == pairs
