"""The preflight of a run that goes on: what became of its cases is said before the first step, all at once."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fuzz_formats import SMALL, write_cases
from rich.console import Console

from medseg.bundle.manifest import MANIFEST_FILE
from medseg.config import compose, resumed
from medseg.data.facts import CaseInfo, ChannelStats
from medseg.errors import Code, MedsegError
from medseg.training.changes import _refuse, changed
from medseg.training.train import train


def stats(**changes: float) -> ChannelStats:
    values = {"minimum": -1000.0, "maximum": 900.0, "mean": 40.0, "std": 20.0, "p00_5": 0.0, "p50": 40.0, "p99_5": 80.0}
    return ChannelStats(**{**values, **changes}, num_foreground=5)


CASE = CaseInfo("a", (9, 8, 7), (1.0, 1.5, 2.0), "RAS", "CT", (500, 4), (stats(),), (9, 8, 7))


def told(now: CaseInfo) -> str | None:
    return changed({"cases": [json.loads(json.dumps(dataclasses.asdict(CASE)))]}, [now]).get("a")


def test_the_same_case_is_the_same_on_another_machine() -> None:
    assert told(CASE) is None
    other = stats(mean=40.0 + 1e-9, std=20.1, p50=39.9)
    assert told(dataclasses.replace(CASE, intensity=(other,), spacing_mm=(1.0, 1.5 + 1e-12, 2.0))) is None
    assert changed({"cases": []}, [CASE]) == {}


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("shape", {"shape": (9, 8, 6)}),
        ("orientation", {"orientation": "LAS"}),
        ("voxels of the classes (501, 3), and it was [500, 4]", {"label_voxels": (501, 3)}),
        ("ignored", {"ignored_voxels": 2}),
        ("nonzero", {"nonzero_shape": (9, 8, 5)}),
        ("spacing", {"spacing_mm": (1.0, 1.5, 2.1)}),
        ("channel 0", {"intensity": (stats(maximum=901.0),)}),
        ("channel 0", {"intensity": (stats(mean=44.0),)}),
    ],
)
def test_what_is_another(words: str, change: dict[str, object]) -> None:
    assert words in str(told(dataclasses.replace(CASE, **change)))


def test_files_tell_what_facts_do_not() -> None:
    before = {"cases": [json.loads(json.dumps(dataclasses.asdict(CASE)))], "files_sha256": {"a": "1" * 64}}
    assert changed(before, [CASE], {"a": "1" * 64}) == {} == changed(before, [CASE], {})
    assert "byte for byte" in changed(before, [CASE], {"a": "2" * 64})["a"]
    assert "shape" in changed(before, [dataclasses.replace(CASE, shape=(9, 8, 6))], {"a": "2" * 64})["a"]
    counted = dataclasses.replace(CASE, label_voxels=(504,))
    assert changed(before, [counted], {"a": "1" * 64}, same_classes=False) == {}, "by other classes all are others"
    with pytest.raises(MedsegError, match="E_RUN"):
        changed({**before, "files_sha256": 5}, [CASE], {"a": ""})


@pytest.mark.parametrize("cases", [[{"case_id": "a"}], [{**dataclasses.asdict(CASE), "intensity": [{"mean": "x"}]}]])
def test_a_survey_that_is_none(cases: list[object]) -> None:
    with pytest.raises(MedsegError, match="E_RUN"):
        changed({"cases": cases}, [CASE])


def test_all_that_became_of_the_cases_is_said_before_a_run_goes_on(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    write_cases(data, 5)
    settings = [setting for setting in SMALL if "report" not in setting]
    cheap = ["trainer.final_predictions=false", "trainer.report=false", "data.store=null"]
    experiment = compose("train", [f"data.root='{data}'", *settings, *cheap])
    said = io.StringIO()
    train(experiment, run, Console(file=said))
    before = (run / MANIFEST_FILE).read_bytes()
    kept = tmp_path / "kept"
    shutil.copytree(data, kept)

    label = data / "labelsTr" / "c1.nii.gz"
    image = nib.load(label)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), label)
    cut = data / "labelsTr" / "c2.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-20])
    for path in (data / "imagesTr" / "c3_0000.nii.gz", data / "labelsTr" / "c3.nii.gz"):
        path.unlink()
    with pytest.raises(MedsegError, match="3 of 5 cases cannot be used") as caught:
        train(resumed(run, ["trainer.max_steps=3"]), run, Console(file=said))
    table = str(caught.value)
    assert "c1: E_CHANGED" in table and "c2: E_TRUNCATED" in table and "c3: E_MISSING" in table, table
    assert "trainer.initial=RUN" in table and "on_bad_case" not in table
    assert (run / MANIFEST_FILE).read_bytes() == before, "refused before anything of the run was touched"

    shutil.rmtree(data)
    kept.rename(data)
    with pytest.raises(MedsegError) as caught:  # another table of classes
        (data / "dataset.json").write_text(
            json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "whole": [1, 2]}, "numTraining": 5,
                        "file_ending": ".nii.gz"})
        )  # fmt: skip
        train(resumed(run, ["trainer.max_steps=3"]), run, Console(file=said))
    assert caught.value.code == Code.CHANGED
    (data / "dataset.json").unlink()
    assert train(resumed(run, ["trainer.max_steps=3"]), run, Console(file=said)).steps == 3


def rewritten(path: Path, change: Callable[[np.ndarray], object]) -> None:
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    change(voxels)
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)


def test_voxels_that_no_fact_tells_of_and_all_is_said_at_once(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    write_cases(data, 5)
    settings = [setting for setting in SMALL if "report" not in setting]
    cheap = ["trainer.final_predictions=false", "trainer.report=false", "data.store=null"]
    console = Console(file=io.StringIO())
    train(compose("train", [f"data.root='{data}'", *settings, *cheap]), run, console)
    kept = tmp_path / "kept"
    shutil.copytree(data, kept)

    def refused() -> str:
        with pytest.raises(MedsegError) as caught:
            train(resumed(run, ["trainer.max_steps=3"]), run, console)
        shutil.rmtree(data)
        shutil.copytree(kept, data)
        return str(caught.value)

    def move_one(voxels: np.ndarray) -> None:
        flat = voxels.reshape(-1)
        inside, outside = np.flatnonzero(flat == 1)[0], np.flatnonzero(flat == 0)[-1]
        flat[inside], flat[outside] = 0, 1

    rewritten(data / "labelsTr" / "c1.nii.gz", move_one)
    said = refused()
    assert "c1" in said and "byte for byte" in said and "E_CHANGED" in said

    for path in (data / "imagesTr" / "c3_0000.nii.gz", data / "labelsTr" / "c3.nii.gz"):
        path.unlink()
    (data / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "whole": [1, 2]}, "numTraining": 5,
                    "file_ending": ".nii.gz"})
    )  # fmt: skip
    said = refused()
    assert "1 of 5 cases" in said and "c3: E_MISSING" in said and "all cases: E_CHANGED the classes" in said, said
    assert "c1:" not in said and "whole" in said

    for number in range(5):
        path = data / "labelsTr" / f"c{number}.nii.gz"
        path.write_bytes(path.read_bytes()[:-20])
    (data / "imagesTr" / "c3_0000.nii.gz").unlink()
    (data / "labelsTr" / "c3.nii.gz").unlink()
    said = refused()
    assert "5 of 5 cases" in said and "c3: E_MISSING" in said and said.count(": E_TRUNCATED the") == 4, said

    problems = {f"c{n:02}": MedsegError(Code.CHANGED, "another") for n in range(50)}
    with pytest.raises(MedsegError) as caught:
        _refuse(None, problems, 50)
    assert all(f"{case_id}: " in str(caught.value) for case_id in problems) and "inspect" not in str(caught.value)
