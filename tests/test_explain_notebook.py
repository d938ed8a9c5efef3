"""Notebook 2 runs as it is, and what it says of perceptron and convolution is what comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "02_from_convolution_to_unet.ipynb"
MAX_BYTES = 1_000_000
NUM_FIGURES = 6


def outputs_of(cells) -> tuple[str, int, list]:
    """What was printed, the number of figures, and what went wrong."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout")
    figures = sum("image/png" in o.get("data", {}) for o in outputs)
    return text, figures, [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def check(text: str, figures: int, wrong: list) -> None:
    assert wrong == []
    assert figures == NUM_FIGURES
    assert "conv2d is the cross-correlation:     True" in text
    assert "conv2d is the convolution:           False" in text
    assert "the map of the moved image is the moved map: True" in text
    assert "result:    204 voxels, 31,030,658 weights" in text
    dice = {
        name: [float(value) for value in re.findall(r"0\.\d+", line)]
        for name, line in re.findall(r"^ *(perceptron|convolutional):(.*)$", text, flags=re.MULTILINE)
    }
    assert dice["convolutional"][1] > dice["perceptron"][1] + 0.05  # unseen slices
    assert dice["convolutional"][2] > dice["perceptron"][2] + 0.3  # shifted ones


def test_it_runs_from_a_clean_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    check(*outputs_of(notebook.cells))


def test_it_is_shipped_with_outputs_and_without_traces_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < MAX_BYTES
    notebook = json.loads(text)
    check(*outputs_of(notebook["cells"]))
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}] * len(notebook["cells"])
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt)/", re.sub(r'"image/png": "[^"]*"', "", text))
