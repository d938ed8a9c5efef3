"""The notebook runs as it is on what the demo leaves, and what it shows is true."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, TinyRun

from medseg.bundle import BundleInfo
from medseg.inference.folder import write_predictions_table
from medseg.reports.evaluation import evaluate_folders

NOTEBOOK = REPOSITORY / "notebooks" / "04_inspect_predictions.ipynb"
MAX_BYTES = 1_000_000


@pytest.fixture(scope="module")
def demo(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `medseg demo`; the held-out prediction is the reference itself."""
    folder = tmp_path_factory.mktemp("notebook") / "demo"
    run = folder / "runs" / tiny_run.run.name
    shutil.copytree(tiny_run.run, run)
    shutil.copytree(tiny_run.dicom.parent, folder / "data" / "test")
    shutil.copytree(tiny_run.label.parent, folder / "data" / "test_labels")
    predictions = folder / "predictions" / run.name
    shutil.copytree(tiny_run.label.parent, predictions)
    write_predictions_table(predictions, BundleInfo.read(run).labels)
    evaluate_folders(predictions, tiny_run.label.parent).write(predictions / "evaluation")
    return folder


def execute(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run every cell; the outputs of all of them."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("MEDSEG_RUNS", str(runs))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)  # pictures, not widgets
    monkeypatch.delenv("VSCODE_PID", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(outputs: list[dict[str, Any]]) -> str:
    return "".join(o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout")


def num_figures(outputs: list[dict[str, Any]]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_it_runs_on_the_demo_and_names_the_worst_case(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = execute(demo / "runs", tmp_path, monkeypatch)
    assert [o for o in outputs if o["output_type"] == "error"] == []
    # curves, Dice, three planes, profile, worst slices, one slice, uncertainty, saliency, filters, held-out scan
    assert num_figures(outputs) == 10
    assert text_of(outputs).count("most uncertain voxels hold") == 3
    moved = re.findall(r"^(\d+×\d+×\d+) +([\d.]+)% +([\d.]+)%$", text_of(outputs), flags=re.MULTILINE)
    assert [voxels for voxels, *_ in moved] == ["0×0×1", "0×0×2", "0×0×4", "4×4×4"]
    assert all(0 < float(share) <= 100 for _, *shares in moved for share in shares)
    dice = defaultdict(list)
    with (demo / "runs" / "2000-01-01_12-00-00_unet" / "validation" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["dice"]:
                dice[row["case"]].append(float(row["dice"]))
    assert len(dice) > 1
    worst = min(dice, key=lambda case: sum(dice[case]) / len(dice[case]))
    assert f"worst case: {worst}\n" in text_of(outputs)
    tables = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert ">phantom_005<" in tables[-1] and ">1.000<" in tables[-1]  # the held-out scan, predicted without an error


def test_it_runs_on_any_run_without_a_held_out_scan(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = execute(tiny_run.run, tmp_path, monkeypatch)
    assert num_figures(outputs) == 9
    assert "No held-out scan" in text_of(outputs)


def test_it_is_shipped_with_outputs_and_without_traces_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert num_figures(outputs) == 10
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}] * len(notebook["cells"])
    runs = next("".join(o["data"]["text/html"]) for o in outputs if "text/html" in o.get("data", {}))
    assert float(re.findall(r"<td[^>]*>(0\.\d{3})</td>", runs)[0]) > 0.85  # best Dice: what is shown works
    shown = json.dumps([{k: v for k, v in o.get("data", {}).items() if k != "image/png"} for o in outputs])
    shown += text_of([{**o, "text": "".join(o["text"])} if "text" in o else o for o in outputs])
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt)\b|[A-Z]:\\\\", shown)
