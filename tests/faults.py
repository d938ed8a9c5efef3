"""Faults of the machine, made within the process: a disk that is full from the k-th write on, or read-only.

`FaultyDisk` stands between Python's files and the system, so that every write of every library that is written in
Python passes it (medseg, nibabel, Pillow, matplotlib, pydicom, TensorBoard, logging, Hydra). Deleting always works, as
on a full disk.
"""

from __future__ import annotations

import builtins
import csv
import errno
import io
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)  # fmt: skip
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pydicom
import yaml
from dicom_phantom import GTV, write_series
from elsewhere import archive, bucket
from fuzz_formats import SMALL, make_run, write_cases
from PIL import Image
from safetensors import safe_open

from medseg.cli import main
from medseg.formats import read_grid, write_label
from medseg.remote.exchange import PREFIX
from medseg.volume import Volume

HIDDEN = re.compile(r"\.[0-9a-f]{32}")
"""Beginning of the temporary names that medseg gives to what it has not finished."""
BY_OTHERS = ("train.log", "plan.log", "multirun.yaml")
"""What is added to line by line, or written by Hydra: it may end anywhere, and nothing reads it."""
ELSEWHERE = "elsewhere"
"""A folder on the disk that stands for another machine: it takes everything."""
TEMPORARY = "tmp"
"""The folder of temporary files, for scenarios that have it on the disk."""


class FaultyDisk:
    """Counts what is written below a folder, and refuses it from a write on.

    Args:
        folder: the disk; writes elsewhere are not looked at.
        fails_at: number of the first operation that is refused, counted from 1; None only counts.
        code: what the system says.
        times: how many operations are refused; for ever if None: a full disk stays full.
    """

    def __init__(
        self, folder: Path, fails_at: int | None = None, code: int = errno.ENOSPC, times: int | None = None
    ) -> None:
        self.folder = str(folder.resolve())
        self.elsewhere = self.folder + os.sep + ELSEWHERE
        self.fails_at, self.code, self.times = fails_at, code, times
        self.operations = 0
        self.refused = 0
        self._lock = threading.Lock()
        self._handles: set[int] = set()

    def operation(self, path: object) -> None:
        """One operation that needs room: a file that begins, bytes, a folder.

        Raises:
            OSError: it is refused.
        """
        with self._lock:
            self.operations += 1
            late = self.fails_at is not None and self.operations >= self.fails_at
            if not late or (self.times is not None and self.refused >= self.times):
                return
            self.refused += 1
        raise OSError(self.code, os.strerror(self.code), str(path))

    def holds(self, path: object) -> bool:
        """Whether a path lies on the disk."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        found = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (links stay links)
        if found == self.elsewhere or found.startswith(self.elsewhere + os.sep):
            return False
        return found == self.folder or found.startswith(self.folder + os.sep)

    @contextmanager
    def mounted(self) -> Iterator[FaultyDisk]:
        """While the block runs, the folder is this disk."""
        real_open, real_os_open, real_write, real_mkdir, real_rename = (
            io.open, os.open, os.write, os.mkdir, os.replace,
        )  # fmt: skip

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
            newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not set(mode) & set("wax+") or not self.holds(file):
                return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            self.operation(file)
            raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

        def os_opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR) and dir_fd is None and self.holds(path)
            if writes:
                self.operation(path)
            handle = real_os_open(path, flags, mode, dir_fd=dir_fd)
            if writes:
                self._handles.add(handle)
            return handle

        def written(handle: int, data: Any) -> int:
            if handle in self._handles:
                self.operation(handle)
            return real_write(handle, data)

        def made(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            if self.holds(path) and not Path(path).exists():
                self.operation(path)
            real_mkdir(path, mode, dir_fd=dir_fd)

        def renamed(source: Any, target: Any, **options: Any) -> None:
            if self.code == errno.EROFS and self.holds(target):
                self.operation(target)
            real_rename(source, target, **options)

        with ExitStack() as stack:
            for module in (builtins, io):
                stack.enter_context(patch.object(module, "open", opened))
            # Else the system copies files itself, past `write`.
            stack.enter_context(patch.object(shutil, "_USE_CP_SENDFILE", False))
            for name, replacement in (("open", os_opened), ("write", written), ("mkdir", made), ("replace", renamed)):
                stack.enter_context(patch.object(os, name, replacement))
            yield self


class _Raw(io.FileIO):
    """A file on the disk, unbuffered."""

    def __init__(self, disk: FaultyDisk, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._disk = disk

    def write(self, data: Any) -> int | None:
        self._disk.operation(self.name)
        return super().write(data)


def unfinished(folder: Path) -> list[str]:
    """What lies in a folder under its final name and is not whole, and what is left under temporary names."""
    return [
        f"{path.relative_to(folder)}: {why}"
        for path in sorted(folder.rglob("*"))
        if (why := _what_is_wrong(path, folder)) is not None
    ]


def _what_is_wrong(path: Path, folder: Path) -> str | None:
    if HIDDEN.match(path.name):
        return "a temporary name"
    if path.name.startswith(PREFIX):
        return "scans that were fetched"
    if not path.is_file() or path.name in BY_OTHERS or "tfevents" in path.name or path.name.endswith(".jsonl"):
        return None
    if any(part.startswith(".new-") for part in path.relative_to(folder).parts):  # of the store: tidied by age
        return None
    ending = next((e for e in CHECKS if path.name.endswith(e)), None)
    if ending is None:
        return None
    try:
        CHECKS[ending](path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check_table(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))
    if path.name != "history.csv":  # to which lines are added
        assert text.endswith("\n") and len({len(row) for row in rows}) == 1, "rows of several lengths"


def _check_weights(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            file.get_tensor(name)


def _check_page(path: Path) -> None:
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


def _check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def _check_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


CHECKS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".yaml": _check_yaml,
    ".csv": _check_table,
    ".nii.gz": lambda path: np.asarray(nib.load(path).dataobj),
    ".dcm": pydicom.dcmread,
    ".png": _check_picture,
    ".safetensors": _check_weights,
    ".html": _check_page,
    ".zip": _check_archive,
    ".ipynb": lambda path: json.loads(path.read_text(encoding="utf-8"))["cells"],
    ".svg": lambda path: ElementTree.parse(path),
}
"""Ending → what reads a whole file of it."""


@dataclass(frozen=True)
class Scenario:
    """A verb at work on the disk.

    Args:
        command: the verb and its arguments, in the folder of the disk.
        again: the arguments that go on after a fault, told by what the fault left.
        outputs: files that are there when all is done.
        same: of these, the ones whose content does not depend on the faults that came before.
        around: what the verb needs besides, while it works, on the disk.
    """

    command: Callable[[Path, Materials], list[str]]
    again: Callable[[Path, Materials], list[str]]
    outputs: tuple[str, ...]
    same: tuple[str, ...] = ()
    around: Callable[[Path, Materials], AbstractContextManager[object]] = lambda disk, given: nullcontext()


@dataclass(frozen=True)
class Materials:
    """What scenarios work with, on another disk.

    Args:
        data: a data set of four cases.
        run: trained on it.
        other: another run, trained on it.
        series: a DICOM series.
        label: drawn on the series.
    """

    data: Path
    run: Path
    other: Path
    series: Path
    label: Path


def materials(folder: Path) -> Materials:
    """Make them."""
    made = folder / "made"
    make_run(made)
    (made / "run" / "folds.json").unlink()
    shutil.copytree(made / "run", made / "other")
    write_cases(folder / "data")
    write_series(folder / "series", 0, [GTV])
    grid = read_grid(folder / "series")
    label = np.zeros(grid.shape, np.uint8)
    label[1:3, 1:3, 1:4] = 1
    write_label(folder / "drawn.nii.gz", Volume(label, grid), {1: "tumour"})
    return Materials(folder / "data", made / "run", made / "other", folder / "series", folder / "drawn.nii.gz")


def _train(disk: Path, given: Materials) -> list[str]:
    small = [setting for setting in SMALL if not setting.startswith(("trainer.max_steps", "data.store"))]
    where = [f"data.root='{given.data}'", f"hydra.run.dir='{disk / 'run'}'"]
    return ["train", *where, *small, "trainer.max_steps=4", "trainer.num_validations=2"]


def _train_again(disk: Path, given: Materials) -> list[str]:
    begun = (disk / "run" / "bundle.json").is_file() and (disk / "run" / "config.yaml").is_file()
    return ["train", f"resume={disk / 'run'}"] if begun else _train(disk, given)


def _predict(disk: Path, given: Materials) -> list[str]:
    scans = [str(given.data / "imagesTr" / f"c{n}_0000.nii.gz") for n in range(2)]
    return ["predict", str(given.run), *scans, "-o", str(disk / "out"), "--preview", "--statistics", "--uncertainty"]


def _evaluate(disk: Path, given: Materials) -> list[str]:
    return ["evaluate", str(given.data / "labelsTr"), str(given.data / "labelsTr"), "-o", str(disk / "scores")]


def _plan(disk: Path, given: Materials) -> list[str]:
    return ["plan", f"data.root='{given.data}'", f"hydra.run.dir='{disk / 'plan'}'", "trainer.device=cpu"]


def _convert(disk: Path, given: Materials) -> list[str]:
    return ["convert", str(given.series), str(disk / "scan.nii.gz")]


def _draw(kind: str) -> Callable[[Path, Materials], list[str]]:
    def command(disk: Path, given: Materials) -> list[str]:
        target = disk / f"drawn.{kind}.dcm"
        return ["convert", str(given.label), str(target), "--image", str(given.series), "--labels", "{tumour: 1}"]

    return command


def _export(name: str) -> Callable[[Path, Materials], list[str]]:
    return lambda disk, given: ["export", str(given.run), "-o", str(disk / name)]


def _select(disk: Path, given: Materials) -> list[str]:
    runs = [str(given.run), str(given.other)]
    return ["select", *runs, "-o", str(disk / "best"), "--data", str(given.data), "--device", "cpu"]


def _select_again(disk: Path, given: Materials) -> list[str]:
    return [*_select(disk, given), "--overwrite"]


def _fetch(disk: Path, given: Materials) -> list[str]:
    ends = ["--from", "storage", "s3://hospital/scans", "--to", "storage", "s3://hospital/labels"]
    return ["predict", str(given.run), "-o", str(disk / "out"), *ends, "--statistics", "--device", "cpu"]


@contextmanager
def _with_bucket(disk: Path, given: Materials) -> Iterator[None]:
    """Two scans in an object store; what is fetched comes onto the disk."""
    scans = disk / ELSEWHERE / "hospital" / "scans"
    scans.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        shutil.copy(given.data / "imagesTr" / f"c{number}_0000.nii.gz", scans / f"c{number}.nii.gz")
    with bucket(disk / ELSEWHERE), _temporary_on(disk):
        yield


@contextmanager
def _temporary_on(disk: Path) -> Iterator[None]:
    (disk / TEMPORARY).mkdir(exist_ok=True)
    with patch.object(tempfile, "tempdir", str(disk / TEMPORARY)):
        yield


_archives: list[str] = []
"""The URL of the archive that is up."""


def _ask_archive(disk: Path, given: Materials) -> list[str]:
    ends = ["--from", "dicomweb", _archives[-1], "--to", "dicomweb", _archives[-1]]
    return ["predict", str(given.run), "-o", str(disk / "out"), *ends, "--statistics", "--device", "cpu"]


@contextmanager
def _with_archive(disk: Path, given: Materials) -> Iterator[None]:
    """An archive with a series; what it has in the end is written to the folder that stands for it."""
    target = disk / ELSEWHERE
    target.mkdir(exist_ok=True)
    before = [*given.series.glob("*.dcm"), *target.glob("*.dcm")]
    with archive(before) as started, _temporary_on(disk):
        _archives.append(started.url)
        yield
        _archives.pop()
        for number, content in enumerate(started.of("SEG")):
            (target / f"stored{number}.dcm").write_bytes(content)


def _tune(disk: Path, given: Materials) -> list[str]:
    small = [setting for setting in SMALL if not setting.startswith("data.store")]
    searched = "optimizer.lr=tag(log,interval(1e-4,1e-2))"
    return ["tune", "-o", str(disk / "search"), "--trials", "2", f"data.root='{given.data}'", searched, *small]


def _notebook(disk: Path, given: Materials) -> list[str]:
    return ["notebook", str(given.run), "-o", str(disk / "notebooks"), "--no-browser"]


def _inspect(disk: Path, given: Materials) -> list[str]:
    scan = str(given.data / "imagesTr" / "c0_0000.nii.gz")
    return ["inspect", str(given.run), "--image", scan, "-o", str(disk / "inside"), "--tensorboard", "--steps", "2"]


def _compare(disk: Path, given: Materials) -> list[str]:
    scores = str(given.run / "validation")
    return ["compare", scores, scores, "-o", str(disk / "compared.json")]


SCENARIOS: dict[str, Scenario] = {
    "train": Scenario(
        _train,
        _train_again,
        ("run/checkpoints/best.safetensors", "run/bundle.json", "run/validation/metrics.json", "run/model_card.md"),
    ),
    "predict": Scenario(
        _predict,
        lambda disk, given: [*_predict(disk, given), "--resume"],
        ("out/c0.nii.gz", "out/c1.nii.gz", "out/previews/c1.png", "out/uncertainty/c1.nii.gz", "out/statistics.csv"),
        ("out/c0.nii.gz", "out/c1.nii.gz", "out/statistics.csv"),
    ),
    "evaluate": Scenario(_evaluate, _evaluate, ("scores/metrics.json", "scores/summary.csv"), ("scores/metrics.csv",)),
    "plan": Scenario(_plan, _plan, ("plan/plan.yaml", "plan/survey.json"), ("plan/survey.json",)),
    "convert": Scenario(_convert, _convert, ("scan.nii.gz",), ("scan.nii.gz",)),
    "convert to SEG": Scenario(_draw("seg"), _draw("seg"), ("drawn.seg.dcm",)),
    "convert to RTSTRUCT": Scenario(_draw("rtstruct"), _draw("rtstruct"), ("drawn.rtstruct.dcm",)),
    "export": Scenario(_export("model.zip"), _export("model.zip"), ("model.zip",)),
    "export to a folder": Scenario(
        _export("model"),
        _export("model"),
        ("model/manifest.json", "model/checkpoints/best.safetensors"),
        ("model/bundle.json", "model/checkpoints/best.safetensors"),
    ),
    "select": Scenario(
        _select,
        _select_again,
        ("best/ensemble.json", "best/selection.md", "best/validation/predictions.json", "best/postprocessing.json"),
        ("best/selection.json",),
    ),
    "predict from and to storage": Scenario(
        _fetch,
        lambda disk, given: [*_fetch(disk, given), "--resume"],
        (
            "elsewhere/hospital/labels/c0.nii.gz",
            "elsewhere/hospital/labels/c1.nii.gz",
            "elsewhere/hospital/labels/predictions.jsonl",
            "elsewhere/hospital/labels/statistics.csv",
            "out/predictions.json",
        ),
        ("elsewhere/hospital/labels/c0.nii.gz", "elsewhere/hospital/labels/c1.nii.gz"),
        _with_bucket,
    ),
    "predict from and to dicomweb": Scenario(
        _ask_archive,
        lambda disk, given: [*_ask_archive(disk, given), "--resume"],
        ("elsewhere/stored0.dcm", "out/predictions.json", "out/statistics.csv"),
        (),
        _with_archive,
    ),
    "tune": Scenario(_tune, _tune, ("search/trial_000/model_card.md", "search/sweep.csv", "search/sweep.png")),
    "notebook": Scenario(
        _notebook,
        _notebook,
        ("notebooks/01_inspect_a_data_set.ipynb", "notebooks/04_inspect_predictions.ipynb"),
        ("notebooks/04_inspect_predictions.ipynb",),
        lambda disk, given: patch.object(
            import_module("medseg.cli.notebook"), "_serve", lambda *_: 0
        ),  # Jupyter itself is no part of it
    ),
    "inspect a model": Scenario(_inspect, _inspect, ("inside/layers.json", "inside/architecture.svg")),
    "compare": Scenario(_compare, _compare, ("compared.json",), ("compared.json",)),
}


@dataclass(frozen=True)
class Outcome:
    """What a fault led to: exit status, what was said, what is wrong if anything is, bytes of files that are broken."""

    status: int
    said: str
    wrong: tuple[str, ...]
    lost_bytes: int = 0


def call(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a verb in this process: exit status, and what the user reads. 1 and the traceback for a bare exception."""
    said = io.StringIO()
    status = 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main(list(arguments))
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            status = 1
            said.write(traceback.format_exc())
    logging_off()
    return status, said.getvalue()


def logging_off() -> None:
    """Close the log files that Hydra opened."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) is logging.FileHandler:
            root.removeHandler(handler)
            with suppress(OSError):
                handler.close()


def count(scenario: Scenario, disk: Path, given: Materials) -> int:
    """Operations of a run without a fault, whose outputs stay on the disk."""
    with scenario.around(disk, given), FaultyDisk(disk).mounted() as watched:
        status, said = call(scenario.command(disk, given))
    assert status == 0, said
    assert not unfinished(disk), unfinished(disk)
    absent = [name for name in scenario.outputs if not (disk / name).is_file()]
    assert not absent, absent
    return watched.operations


def inject(
    scenario: Scenario, disk: Path, given: Materials, reference: Path, fails_at: int, code: int = errno.ENOSPC
) -> Outcome:
    """Run a verb on a disk that fails from an operation on, look at what it left, and go on with room.

    Args:
        disk: an empty folder.
        reference: what `count` left.
        fails_at: the operation.
        code: what the system says.
    """
    wrong = []
    with scenario.around(disk, given), FaultyDisk(disk, fails_at, code).mounted() as faulty:
        status, said = call(scenario.command(disk, given))
    if not faulty.refused and status:
        wrong.append("it failed without a fault")
    if status == 0 and any(not (disk / name).is_file() for name in scenario.outputs):
        wrong.append("it claims success without its outputs")
    if status != 0 and not re.search(r"\bE_[A-Z_]+\b", said):
        wrong.append("no code in what it says")
    broken = unfinished(disk)
    lost = sum((disk / line.partition(": ")[0]).stat().st_size for line in broken)
    wrong += broken
    if status != 0:
        with scenario.around(disk, given):
            again, said_again = call(scenario.again(disk, given))
        if again:
            wrong.append(f"it cannot go on: {said_again[-600:]}")
        wrong += [f"absent in the end: {name}" for name in scenario.outputs if not (disk / name).is_file()]
        wrong += unfinished(disk)
    for name in scenario.same:
        if not wrong and (disk / name).read_bytes() != (reference / name).read_bytes():
            wrong.append(f"another content: {name}")
    return Outcome(status, said, tuple(wrong), lost)
