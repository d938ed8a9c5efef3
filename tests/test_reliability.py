"""docs/reliability.md is what its figures say, and says where there are none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reliability", ROOT / "scripts" / "make_reliability.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(program: ModuleType) -> None:
    written = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert written == program.page(ROOT / "docs" / "reliability"), "python scripts/make_reliability.py"


def test_what_was_not_measured_is_said(program: ModuleType, tmp_path: Path) -> None:
    assert program.page(tmp_path).count("not measured yet") == 15


def test_figures_are_added_up(program: ModuleType, tmp_path: Path) -> None:
    one = {"inputs": 1500, "failures": [], "mended": 2, "peak_mb": 7, "slowest_s": 0.5}
    other = {**one, "inputs": 11, "failures": [{"number": 3, "error": "KeyError", "at": "x"}]}
    (tmp_path / "fuzz.json").write_text(json.dumps({"nifti": one, "zip": other}))
    injected = {"operations": 40, "faults": 20, "refused": 19, "handled": 1, "harm": ["operation 3: a.json"]}
    faults = {"injected": {"train: a full disk": injected}, "tests": {"a": "passed", "b": "skipped", "c": "failed"}}
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    injected["lost_bytes"] = 2048
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    kills = {"kills": 100, "failures": 0, "checkpoints_damaged": 0, "most_lost_steps": 4, "most_lost_seconds": 1.5}
    (tmp_path / "kills.json").write_text(json.dumps(kills))
    of_processes = {**kills, "kills": 10, "failures": 1, "kills_of_a_follower": 3}
    (tmp_path / "kills_of_processes.json").write_text(json.dumps(of_processes))
    guided = {"inputs": 900, "seconds": 18, "first_edges": 381, "edges": 521, "failures": [{}]}
    (tmp_path / "atheris.json").write_text(json.dumps({"tables": guided, "plan": {**guided, "failures": []}}))
    page = program.page(tmp_path)
    assert "| inputs damaged as coverage guides (atheris) | 1,800 in 2 formats | 1 |" in page
    assert "| tables | 900 | 1 | 381 | 521 | 18 s |" in page
    assert (
        "| kills of one of the two processes of a training | 10 | 1 |" in page and "| kills of a follower | 3 |" in page
    )
    assert "| damaged inputs read | 1,511 in 2 formats | 1 |" in page
    assert "| disks full, read-only or failing | 20 | 1 | 2,048 bytes |" in page
    assert "| tests of other faults | 2 | 1 |" in page
    lost = "0 bytes of what was saved; at most 4 steps (1.5 s) since the last save"
    assert f"| kills of a training | 100 | 0 | {lost} |" in page
    assert "not measured" not in page and "| most lost steps | 4 |" in page
    counted = {**kills, "checkpoint_bytes_damaged": 77, "checkpoints_damaged": 1}
    assert "77 bytes of what was saved" in program.lost_by_kills(counted)
