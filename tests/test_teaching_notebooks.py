"""Notebooks 1, 3 and 5 run from a clean clone, in a short form, and what is shipped says what is true."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, TinyRun

MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Shown:
    """What the cells of a notebook show.

    Args:
        text: what was printed.
        tables: rows of the HTML tables, as texts.
        num_figures: pictures.
        wrong: errors, and what was written to the standard error.
    """

    text: str
    tables: list[list[list[str]]]
    num_figures: int
    wrong: list[Any]


def shown_by(cells: list[Any]) -> Shown:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    html = ["".join(o["data"]["text/html"]) for o in outputs if "text/html" in o.get("data", {})]
    return Shown(
        "".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout"),
        [[re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("</tr>")] for table in html],
        sum("image/png" in o.get("data", {}) for o in outputs),
        [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"],
    )


def check_data_set(shown: Shown, *, short: bool, num_cases: int | None = None) -> None:
    assert shown.num_figures == 9
    assert f"cases      {num_cases or (8 if short else 12)}, 3D, CT" in shown.text
    assert "phantom_004: E_LABEL" in shown.text
    assert "phantom_005: E_GRID" in shown.text
    unusual = dict(re.findall(r"^  (phantom_\d+): (?!E_)(.*)$", shown.text, flags=re.MULTILINE))
    assert set(unusual) == {"phantom_001", "phantom_002", "phantom_003"}
    assert "voxels of" in unusual["phantom_001"]
    assert "median intensity" in unusual["phantom_002"]
    assert "spleen is missing" in unusual["phantom_003"]
    assert re.search(r"^patch_size +\d+×\d+×\d+ ", shown.text, flags=re.MULTILINE)


def check_membranes(shown: Shown, *, short: bool) -> None:
    assert shown.num_figures == 5
    mistakes, networks, scores, without = ([row for row in table if row] for table in shown.tables)
    (_, *thick), (_, *hole) = mistakes
    assert float(thick[0]) < 0.85 < 0.99 < float(hole[0])  # Dice prefers the one with the hole
    assert float(hole[1]) < 0.9 < 0.99 < float(thick[1])  # V_rand the other
    weights = {(row[0], row[1]): int(row[3].replace(",", "")) for row in networks}
    for network in ("unet", "fusionnet"):  # 3×3 convolutions over half the maps, at 8, 16 and 32 filters
        assert weights[network, "concat"] - weights[network, "add"] == 9 * (8**2 + 16**2 + 32**2)
    assert len(scores) == 4
    if not short:
        assert min(float(row[2]) for row in scores) > 0.8
        for _, whole, finest, _, none in without:
            assert float(whole) > float(finest)
            assert float(whole) > float(none) + 0.2


def check_dicom(shown: Shown, *, short: bool) -> None:
    assert shown.num_figures == 2
    for said in (
        r"largest distance between both grids: (\d\.\de-1\d|0\.0e\+00) mm",
        r"the same values: True",
        r"a slice lost: E_GAP",
        r"numbered back to front: taken, \d+ slices, the same voxels: True",
        r"gantry tilt: E_TILT",
        r"refers to the series: +True",
        r"and to each of its images: +True",
        r"lies in the same frame of reference: +True",
        r"belongs to the same patient and study: +True",
        r"is a new series of that study: +True",
        r"farthest from a voxel's centre: \d\.\de-\d+ mm",
        r"SEG, read by highdicom, and NIfTI hold the same voxels: +True",
        r"RTSTRUCT, filled again by medseg, and NIfTI hold the same: +True",
        r"1 series of 1 patient, none with problems, 2 annotations",
    ):
        assert re.search(said, shown.text), said
    segments = [row for row in shown.tables[0] if row]
    assert [row[1] for row in segments] == ["liver", "spleen", "kidneys", "spine", "aorta"]
    assert "SCT 10200004" in segments[0][2]
    if not short:
        dice = {row[0]: float(row[3]) for row in shown.tables[1] if row}
        assert dice["liver"] > 0.6


NOTEBOOKS: dict[str, Callable[..., None]] = {
    "01_inspect_a_data_set": check_data_set,
    "03_unet_and_fusionnet": check_membranes,
    "05_from_dicom_to_dicom_seg": check_dicom,
}


def execute(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Shown:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for variable in ("MEDSEG_DATA", "MEDSEG_FOLDER", "MEDSEG_RUNS"):
        monkeypatch.delenv(variable, raising=False)
    fixed = {"MEDSEG_SHORT": "1", "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    for variable, value in {**fixed, **environment}.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    return shown_by(notebook.cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_from_a_clean_clone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute(name, tmp_path, monkeypatch)
    assert shown.wrong == []
    NOTEBOOKS[name](shown, short=True)


@pytest.mark.slow
def test_they_take_what_the_demo_left(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = tmp_path / "demo"
    run = demo / "runs" / tiny_run.run.name
    shutil.copytree(tiny_run.run, run)
    shutil.copytree(tiny_run.data, demo / "data" / "train")
    shutil.copytree(tiny_run.dicom.parent, demo / "data" / "test")
    shutil.copytree(tiny_run.label.parent, demo / "data" / "test_labels")
    for runs in (demo / "runs", run):  # as `make notebooks` names them, and `medseg notebook RUN`
        shown = execute("05_from_dicom_to_dicom_seg", tmp_path, monkeypatch, MEDSEG_RUNS=str(runs))
        assert shown.wrong == []
        assert "a model of the demo" in shown.text
        check_dicom(shown, short=True)
    shown = execute("01_inspect_a_data_set", tmp_path, monkeypatch, MEDSEG_RUNS=str(run))
    assert shown.wrong == []
    check_data_set(shown, short=True, num_cases=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_shipped_with_outputs_and_without_traces_of_a_machine(name: str) -> None:
    text = (REPOSITORY / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    cells = json.loads(text)["cells"]
    shown = shown_by(cells)
    assert shown.wrong == []
    NOTEBOOKS[name](shown, short=False)
    assert [cell["metadata"] for cell in cells] == [{}] * len(cells)
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt)/", without_pictures)
