"""`medseg predict` on many cases: overlap, --resume, bad cases, manifest, --classes, --statistics, names in NIfTI."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from rich.console import Console

from medseg.cli import main
from medseg.cli.predict import EXIT_BAD_CASES
from medseg.data.cases import load_image
from medseg.data.inputs import Refused, find_inputs
from medseg.errors import Code, MedsegError
from medseg.formats import Reading, open_label, open_volume, write_image, write_label
from medseg.formats.nifti_names import CODES, names_extension, names_in
from medseg.formats.remarks import gathered_warnings
from medseg.formats.shares import write_shares
from medseg.inference.case_statistics import STATISTICS_FILE, cut_off, structure_statistics, write_statistics
from medseg.inference.ensemble import Ensemble
from medseg.inference.folder import predict_inputs
from medseg.inference.job import Options
from medseg.inference.manifest import MANIFEST_FILE, Entry, Manifest, digest_of_file, model_digest
from medseg.inference.overlap import overlapped
from medseg.inference.prediction import Prediction
from medseg.inference.subset import choose
from medseg.labels import IGNORE_INDEX, TABLE_FILE, Labels
from medseg.phantom import write_dicom_series
from medseg.volume import Grid, Volume

GRID = Grid((6, 5, 4), np.diag([2.0, 1.0, 3.0, 1.0]))


@pytest.fixture
def scans(tiny_run, tmp_path: Path) -> Path:
    """A folder of three scans, a.nii.gz to c.nii.gz."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, source in zip("abc", sorted((tiny_run.data / "imagesTr").glob("*.nii.gz")), strict=False):
        shutil.copy(source, folder / f"{name}.nii.gz")
    return folder


def predict(*arguments: object, status: int | None = None) -> None:
    """Run `medseg predict`; `status` is the exit status that it must have if it is not 0."""
    if status is None:
        main(["predict", *(str(a) for a in arguments)])
        return
    with pytest.raises(SystemExit) as exit_:
        predict(*arguments)
    assert exit_.value.code == status


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / MANIFEST_FILE).read_text().splitlines()]


def cases_of(out: Path) -> list[dict]:
    return [line for line in lines_of(out) if "case" in line]


def labels_in(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.nii.gz"))}


# Overlap


def test_stages_overlap_in_order_with_one_ahead_and_one_behind() -> None:
    events: list[str] = []
    reading, writing = threading.Event(), threading.Event()
    alive = 0
    most = 0
    lock = threading.Lock()

    def read(item: int) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        if item == 2:
            reading.set()
        return item * 10

    def work(item: int, value: int) -> int:
        if item == 1:  # the next is read, and the one before is written, while this one is worked on
            assert reading.wait(5) and writing.wait(5)
        return value + 1

    def write(item: int, value: int | Exception) -> None:
        nonlocal alive
        if item == 0:
            writing.set()
        with lock:
            alive -= 1
        events.append(f"{item}:{value}")

    overlapped(range(6), read, work, write)
    assert events == [f"{i}:{10 * i + 1}" for i in range(6)]
    assert most <= 3


def test_an_error_of_an_item_reaches_write_in_its_turn() -> None:
    got: list[object] = []

    def read(item: int) -> int:
        if item == 1:
            raise ValueError("unreadable")
        return item

    def work(item: int, value: int) -> int:
        if item == 3:
            raise RuntimeError("too hard")
        return value

    overlapped(range(5), read, work, lambda item, value: got.append(value))
    assert [repr(v) for v in got] == ["0", "ValueError('unreadable')", "2", "RuntimeError('too hard')", "4"]


def test_what_write_raises_ends_the_work_before_more_is_done() -> None:
    worked: list[int] = []

    def work(item: int, value: int) -> int:
        time.sleep(0.05)
        worked.append(item)
        return item

    def write(item: int, value: int | Exception) -> None:
        raise MedsegError(Code.OUTPUT, "full")

    with pytest.raises(MedsegError, match="full"):
        overlapped(range(100), lambda item: item, work, write)
    assert len(worked) <= 2


def test_an_interruption_finishes_the_item_that_is_being_written() -> None:
    written: list[int] = []

    def work(item: int, value: int) -> int:
        if item == 2:
            raise KeyboardInterrupt
        return item

    def write(item: int, value: int | Exception) -> None:
        time.sleep(0.1)
        written.append(item)

    with pytest.raises(KeyboardInterrupt):
        overlapped(range(5), lambda item: item, work, write)
    assert written == [0, 1]


def test_warnings_are_told_apart_by_thread() -> None:
    import logging

    logger = logging.getLogger("medseg.test")
    with gathered_warnings() as ours:
        other = threading.Thread(target=lambda: logger.warning("of another case"))
        other.start()
        other.join()
        logger.warning("of this case")
    assert ours == ["of this case"]


# The manifest


def test_the_manifest_tells_what_was_made_of_what(tiny_run, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(tiny_run.run, scans, "-o", out, "--preview")
    session, *cases = lines_of(out)
    assert session["medseg"] and session["torch"] and session["device"].startswith("cpu")
    assert session["options"]["step"] == 0.5 and session["options"]["format"] == ["nifti"]
    assert len(session["model"]) == 64 and "batch_size" not in session["options"]
    assert [case["case"] for case in cases] == ["a", "b", "c"]
    for case in cases:
        name = case["case"]
        assert case["session"] == session["session"]
        assert set(case["files"]) == {f"{name}.nii.gz", f"previews/{name}.png"}
        assert all(digest_of_file(out / file) == digest for file, digest in case["files"].items())
        assert set(case["seconds"]) == {"read", "predict", "write"} and min(case["seconds"].values()) > 0
        assert len(case["input"]) == 64
    assert len({case["input"] for case in cases}) == 3
    text = (out / MANIFEST_FILE).read_text()
    assert str(tmp_path) not in text and str(tiny_run.run) not in text
    table = json.loads((out / TABLE_FILE).read_text())
    assert table["cases"]["a"] == {"files": ["a.nii.gz"], "notes": []}


def test_the_same_prediction_has_the_same_digest(tiny_run, scans: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        predict(tiny_run.run, scans, "-o", tmp_path / out)
    one, two = (cases_of(tmp_path / out) for out in ("one", "two"))
    assert [c["files"] for c in one] == [c["files"] for c in two]
    assert lines_of(tmp_path / "one")[0]["session"] == lines_of(tmp_path / "two")[0]["session"]


def test_the_model_digest_is_that_of_the_weights(tiny_run) -> None:
    best, again = (Ensemble.from_run(tiny_run.run, device="cpu") for _ in range(2))
    assert model_digest(best) == model_digest(again)
    parameter = next(again.predictors[0].model.parameters())
    parameter.data.view(-1)[0] += 1e-3
    assert model_digest(best) != model_digest(again)


def test_a_line_that_was_cut_short_counts_as_not_there(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "m", {"step": 1})
    for case in ("a", "b"):
        (tmp_path / f"{case}.nii.gz").write_bytes(case.encode())
        digests = {f"{case}.nii.gz": digest_of_file(tmp_path / f"{case}.nii.gz")}
        manifest.append(Entry(case, manifest.session, "input", digests))
    path = tmp_path / MANIFEST_FILE
    path.write_bytes(path.read_bytes()[:-20])
    manifest = Manifest(tmp_path, "m", {"step": 1})
    assert list(manifest.entries) == ["a"]
    manifest.append(Entry("c", manifest.session, "input"))
    assert list(Manifest(tmp_path, "m", {"step": 1}).entries) == ["a", "c"]
    assert manifest.outstanding("a", "input", ["a.nii.gz"], overwrite=False) is None
    with pytest.raises(MedsegError, match="changed after it was written, or is not ours"):
        manifest.outstanding("b", "input", ["b.nii.gz"], overwrite=False)


def test_two_processes_may_fill_one_folder(tmp_path: Path) -> None:
    one, two = (Manifest(tmp_path, "m", {}) for _ in range(2))
    for manifest, case in ((one, "a"), (two, "b"), (one, "c")):
        manifest.append(Entry(case, manifest.session, "i", {f"{case}.nii.gz": "d"}))
    assert sorted(one.records()) == sorted(two.records()) == ["a", "b", "c"]


def test_adding_a_line_does_not_cost_more_with_many(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "m", {})
    manifest.append(Entry("0", manifest.session, "i"))
    path = tmp_path / MANIFEST_FILE
    inode, size = path.stat().st_ino, path.stat().st_size
    manifest.append(Entry("1", manifest.session, "i"))
    assert path.stat().st_ino == inode, "added to, not written anew"
    assert path.stat().st_size - size < 200


# --resume


def test_resume_does_only_what_is_left(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    predict(tiny_run.run, scans / "a.nii.gz", "-o", out)
    before = (out / "a.nii.gz").stat()
    predict(tiny_run.run, scans, "-o", out, status=2)  # without --resume
    assert "--resume" in capsys.readouterr().err
    predict(tiny_run.run, scans, "-o", out, "--resume")
    shown = capsys.readouterr().out
    assert "3 cases: 2 predicted, 1 done before" in shown
    assert (out / "a.nii.gz").stat().st_mtime_ns == before.st_mtime_ns
    assert [c["case"] for c in cases_of(out)] == ["a", "b", "c"]
    predict(tiny_run.run, scans, "-o", out, "--resume")
    assert "3 cases: 0 predicted, 3 done before" in capsys.readouterr().out
    assert sorted(json.loads((out / TABLE_FILE).read_text())["cases"]) == ["a", "b", "c"]


def test_resume_does_again_what_has_changed_and_says_so(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    predict(tiny_run.run, scans, "-o", out)
    shutil.copy(scans / "b.nii.gz", scans / "a.nii.gz")
    (out / "c.nii.gz").unlink()
    capsys.readouterr()
    predict(tiny_run.run, scans, "-o", out, "--resume")
    shown = capsys.readouterr().out
    assert "done again: its input has changed" in shown and "done again: files of it are missing" in shown
    assert "2 predicted, 1 done before" in shown
    assert np.array_equal(open_label(out / "a.nii.gz").array, open_label(out / "b.nii.gz").array)

    run = tmp_path / "run"
    shutil.copytree(tiny_run.run, run, ignore=shutil.ignore_patterns("tensorboard", "validation"))
    predict(run, scans, "-o", out, "--resume")
    assert "0 predicted, 3 done before" in capsys.readouterr().out, "a copy of the model is the same model"
    bundle = json.loads((run / "bundle.json").read_text())
    bundle["channels"] = ["another"]
    (run / "bundle.json").write_text(json.dumps(bundle))
    predict(run, scans, "-o", out, "--resume")
    shown = capsys.readouterr().out
    assert "done again: 3 cases that another model made" in shown and "3 predicted" in shown
    predict(run, scans, "-o", out, "--resume", "--step", "1", "--batch-size", "1")
    assert "other options (step)" in capsys.readouterr().out
    predict(run, scans, "-o", out, "--resume", "--step", "1", "--batch-size", "2")
    assert "3 done before" in capsys.readouterr().out, "the batch size changes no voxel"


def test_resume_never_replaces_a_correction(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    predict(tiny_run.run, scans, "-o", out)
    corrected = open_label(out / "b.nii.gz")
    corrected.array[:2] = 1
    write_label(out / "b.nii.gz", corrected)
    mine = (out / "b.nii.gz").read_bytes()
    predict(tiny_run.run, scans, "-o", out, "--resume", status=2)
    assert "changed after it was written" in capsys.readouterr().err
    predict(tiny_run.run, scans, "-o", out, "--resume", "--on-bad-case", "skip", status=EXIT_BAD_CASES)
    assert (out / "b.nii.gz").read_bytes() == mine
    predict(tiny_run.run, scans, "-o", out, "--resume", "--overwrite")
    assert (out / "b.nii.gz").read_bytes() != mine


def test_resume_refuses_files_that_it_does_not_know(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.nii.gz").write_bytes(b"precious")
    predict(tiny_run.run, scans, "-o", out, "--resume", status=2)
    assert "exist already" in capsys.readouterr().err
    assert (out / "a.nii.gz").read_bytes() == b"precious"


@pytest.mark.parametrize("after", ["the line", "some files"])
def test_a_crash_between_line_and_files_is_mended(tiny_run, scans: Path, tmp_path: Path, monkeypatch, after) -> None:
    """The line comes first: what it promises and is not there is done again, without --overwrite."""
    out = tmp_path / "out"
    real = Path.replace

    def crash(path: Path, target: Path) -> Path:
        ends = {"the line": out / "b.nii.gz", "some files": out / "previews" / "b.png"}
        if Path(target) == ends[after]:
            raise KeyboardInterrupt  # as if the process ended
        return real(path, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        predict(tiny_run.run, scans, "-o", out, "--preview")
    monkeypatch.undo()
    assert [c["case"] for c in cases_of(out)] == ["a", "b"]
    predict(tiny_run.run, scans, "-o", out, "--preview", "--resume")
    for case in cases_of(out)[-2:]:
        assert all(digest_of_file(out / name) == digest for name, digest in case["files"].items())
    assert sorted(labels_in(out)) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_ctrl_c_leaves_whole_files_and_a_manifest_that_resumes(
    tiny_run, scans: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "out"
    predict(tiny_run.run, scans, "-o", tmp_path / "whole")
    whole = labels_in(tmp_path / "whole")
    real, calls = Ensemble.predict_case, []

    def interrupted(self: Ensemble, volume: Volume, **options: object) -> Prediction:
        calls.append(volume)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, volume, **options)

    monkeypatch.setattr(Ensemble, "predict_case", interrupted)
    predict(tiny_run.run, scans, "-o", out, status=130)
    monkeypatch.undo()
    assert "2 of 3 cases are done; go on with --resume" in capsys.readouterr().out
    assert labels_in(out) == {name: whole[name] for name in ("a.nii.gz", "b.nii.gz")}
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert sorted(json.loads((out / TABLE_FILE).read_text())["cases"]) == ["a", "b"]
    predict(tiny_run.run, scans, "-o", out, "--resume")
    assert labels_in(out) == whole


def test_what_a_killed_process_left_is_tidied_up(tiny_run, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old, young, other = out / f".{'a' * 32}", out / f".{'b' * 32}", out / ".git"
    for folder in (old, young, other):
        folder.mkdir(parents=True)
        (folder / "a.nii.gz").write_bytes(b"half")
    for folder in (old, other):
        os.utime(folder, (0, 0))
    predict(tiny_run.run, scans / "a.nii.gz", "-o", out)
    assert not old.exists() and young.exists() and other.exists()


# Bad cases


def test_bad_cases_are_set_aside_and_said(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    cut = (scans / "b.nii.gz").read_bytes()
    (scans / "b.nii.gz").write_bytes(cut[: len(cut) // 2])
    predict(tiny_run.run, scans, "-o", out, status=2)
    assert "E_TRUNCATED" in capsys.readouterr().err and list(labels_in(out)) == ["a.nii.gz"]
    predict(tiny_run.run, scans, "-o", out, "--resume", "--on-bad-case", "skip", status=EXIT_BAD_CASES)
    shown = capsys.readouterr().out
    assert "3 cases: 1 predicted, 1 done before, 1 bad and left out" in shown
    assert "bad: b: E_TRUNCATED" in shown
    assert sorted(labels_in(out)) == ["a.nii.gz", "c.nii.gz"]
    bad = [case for case in cases_of(out) if case.get("failed")][-1]
    assert bad["case"] == "b" and bad["failed"]["code"] == "E_TRUNCATED" and bad["failed"]["message"]
    assert sorted(json.loads((out / TABLE_FILE).read_text())["cases"]) == ["a", "c"]

    (scans / "b.nii.gz").write_bytes(cut)
    predict(tiny_run.run, scans, "-o", out, "--resume", "--on-bad-case", "skip")
    assert "3 cases: 1 predicted, 2 done before" in capsys.readouterr().out


def test_output_lines_keep_the_order_of_the_inputs(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    (scans / "a.nii.gz").write_bytes(b"no image")
    predict(tiny_run.run, scans, "-o", tmp_path / "out", "--on-bad-case", "skip", status=EXIT_BAD_CASES)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[1:3] == "/3"]
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "a is bad" in lines[0] and "b.nii.gz" in lines[1] and "c.nii.gz" in lines[2]


def test_a_full_disk_is_no_bad_case(tiny_run, scans: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise MedsegError(Code.OUTPUT, "the file cannot be written", got="No space left on device")

    monkeypatch.setattr("medseg.inference.export.write_label", full)
    predict(tiny_run.run, scans, "-o", tmp_path / "out", "--on-bad-case", "skip", status=2)
    assert "No space left" in capsys.readouterr().err


def test_no_memory_for_a_scan_is_that_scans_and_a_fault_is_everybodys(
    tiny_run, scans: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    real, calls = Ensemble.predict_case, []

    def greedy(self: Ensemble, volume: Volume, **options: object) -> Prediction:
        calls.append(volume)
        if len(calls) == 2:
            raise MemoryError
        if len(calls) == 5:
            raise RuntimeError("/home/somebody: broken")
        return real(self, volume, **options)

    monkeypatch.setattr(Ensemble, "predict_case", greedy)
    predict(tiny_run.run, scans, "-o", tmp_path / "out", "--on-bad-case", "skip", status=EXIT_BAD_CASES)
    assert "bad: b: E_LIMIT" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="broken"):
        predict(tiny_run.run, scans, "-o", tmp_path / "other", "--on-bad-case", "skip")
    assert cases_of(tmp_path / "other")[-1]["failed"] == {"code": "fault", "message": "a fault of medseg: RuntimeError"}


def test_a_scan_that_is_no_dicom_is_one_bad_case_among_others(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    options = ("--format", "nifti,dicom-seg", "--on-bad-case", "skip")
    predict(tiny_run.run, scans / "a.nii.gz", tiny_run.dicom, "-o", out, *options, status=EXIT_BAD_CASES)
    assert "bad: a: E_OUTPUT" in capsys.readouterr().out
    assert {p.name for p in out.glob(f"{tiny_run.dicom.name}*")} == {
        f"{tiny_run.dicom.name}.nii.gz",
        f"{tiny_run.dicom.name}.seg.dcm",
    }


def test_a_damaged_slice_spoils_its_own_series_only(tiny_run, tmp_path: Path, capsys) -> None:
    root, out = tmp_path / "export", tmp_path / "out"
    for name in ("a", "b", "c"):
        image = Volume(np.zeros((1, 20, 18, 9), dtype=np.float32), Grid((20, 18, 9), np.diag([2.0, 2.0, 4.0, 1.0])))
        write_dicom_series(root / name, image, uid_seed=name, patient_id=name)
    last = sorted((root / "b").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:300])
    predict(tiny_run.run, root, "-o", out, status=2)
    assert "E_" in capsys.readouterr().err and not out.exists()
    predict(tiny_run.run, root, "-o", out, "--on-bad-case", "skip", status=EXIT_BAD_CASES)
    assert "3 cases: 2 predicted, 1 bad and left out" in capsys.readouterr().out
    assert sorted(labels_in(out)) == ["a.nii.gz", "c.nii.gz"]
    (bad,) = [case for case in cases_of(out) if case.get("failed")]
    assert bad["case"] == "b" and str(tmp_path) not in json.dumps(bad)


def test_a_missing_channel_spoils_its_own_case_only(tmp_path: Path) -> None:
    image = Volume(np.zeros((1, *GRID.shape), np.float32), GRID)
    for name in ("a_0000", "a_0001", "b_0000", "c_0001", "c_0000"):
        write_image(tmp_path / f"{name}.nii.gz", image)
    refused: Refused = []
    cases = find_inputs([tmp_path], num_channels=2, refused=refused)
    assert [(case.case_id, len(case.images)) for case in cases] == [("a", 2), ("b", 1), ("c", 2)]
    assert len(load_image(cases[0], num_channels=2).array) == 2
    with pytest.raises(MedsegError, match="E_CHANNELS"):
        load_image(cases[1], num_channels=2)
    named = tmp_path / "named"
    for name in ("a_flair", "a_t1", "b_t1", "b_t2"):
        (named / name[0]).mkdir(parents=True, exist_ok=True)
        write_image(named / name[0] / f"{name}.nii.gz", image)
    with pytest.raises(MedsegError, match="E_CHANNELS"):
        find_inputs([named], channels=["t1", "flair"])
    cases = find_inputs([named], channels=["t1", "flair"], refused=refused)
    assert [case.case_id for case in cases] == ["a", "b"]
    assert [path.name for path in cases[0].images] == ["a_t1.nii.gz", "a_flair.nii.gz"]
    ((source, error),) = refused
    assert source in cases[1].images and error.code is Code.CHANNELS


# --classes


def test_a_subset_of_classes() -> None:
    labels = Labels.from_mapping({"background": 0, "liver": 1, "spleen": [5, 6], "kidney": 9, "ignore": 11})
    some = choose(labels, " kidney, spleen")
    assert some.labels.names == ("background", "spleen", "kidney")
    indices = np.array([0, 1, 2, 3, IGNORE_INDEX], dtype=np.uint8)
    written = some.labels.to_values(some.apply(indices))
    assert written.tolist() == [0, 0, 5, 9, 11], "the values of the training labels"
    assert labels.to_values(indices).tolist() == [0, 1, 5, 9, 11]
    reference = some.labels.to_index(np.array([0, 1, 5, 6, 9, 11]))
    assert reference.tolist() == [0, 0, 1, 1, 2, IGNORE_INDEX], "a reference with all classes can be compared with"
    assert Labels.from_mapping(json.loads(json.dumps(some.labels.to_json()))) == some.labels
    with pytest.raises(MedsegError, match=r"(?s)E_NAME.*did you mean 'liver'"):
        choose(labels, "lver")


def test_a_subset_with_the_rest() -> None:
    labels = Labels.from_mapping({"background": 0, "cell": 3, "other": "rest"})
    some = choose(labels, "other")
    indices = np.array([0, 1, 2], dtype=np.uint8)
    assert labels.to_values(indices).tolist() == [0, 3, 1]
    assert some.labels.to_values(some.apply(indices)).tolist() == [0, 0, 1]
    some = choose(labels, "cell")
    assert some.labels.to_values(some.apply(indices)).tolist() == [0, 3, 0]


def test_a_subset_of_regions() -> None:
    labels = Labels.from_mapping({"background": 0, "whole": [1, 2, 4], "core": [2, 4], "enhancing": 4})
    file_values = np.array([0, 1, 2, 4])
    indices = labels.to_index(file_values)
    for text, expected in {"core": [0, 0, 1, 1], "enhancing": [0, 0, 0, 1], "whole": [0, 1, 1, 1]}.items():
        some = choose(labels, text)
        assert some.labels.foreground == (text,)
        assert some.apply(indices).tolist() == expected
    some = choose(labels, "whole,enhancing")
    found = some.apply(indices)
    for name, members in zip(some.labels.foreground, some.labels.parts, strict=True):
        values = {"whole": [1, 2, 4], "enhancing": [4]}[name]
        assert np.array_equal(np.isin(found, members), np.isin(file_values, values))
    back = some.labels.to_index(some.labels.to_values(found))
    assert np.array_equal(back, found)


def test_predict_some_classes(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    predict(tiny_run.run, scans / "a.nii.gz", "-o", tmp_path / "all")
    table = json.loads((tmp_path / "all" / TABLE_FILE).read_text())["labels"]
    name, value = next((n, v) for n, v in table.items() if n != "background")
    predict(tiny_run.run, scans / "a.nii.gz", "-o", tmp_path / "some", "--classes", name)
    every, one = (open_label(tmp_path / out / "a.nii.gz").array for out in ("all", "some"))
    assert np.array_equal(one, np.where(every == value, value, 0)) and len(np.unique(every)) > 2
    labels = Labels.from_mapping(json.loads((tmp_path / "some" / TABLE_FILE).read_text())["labels"])
    assert labels.foreground == (name,)
    predict(tiny_run.run, scans / "b.nii.gz", "-o", tmp_path / "some", "--resume", status=2)
    assert "other classes" in capsys.readouterr().err
    reference = tmp_path / "references"
    reference.mkdir()
    shutil.copy(tmp_path / "all" / "a.nii.gz", reference)
    main(["evaluate", str(tmp_path / "some"), str(reference), "-o", str(tmp_path / "metrics")])
    metrics = json.loads((tmp_path / "metrics" / "metrics.json").read_text())
    assert metrics["summary"][name]["metrics"]["dice"]["mean"] == 1


# --statistics


def test_statistics_of_known_boxes() -> None:
    rng = np.random.default_rng(0)
    image = Volume(rng.normal(40, 10, (2, 6, 5, 4)).astype(np.float32), GRID)
    indices = np.zeros(GRID.shape, dtype=np.uint8)
    indices[1:3, 1:3, 1:3] = 1
    indices[4, 3, 2] = 1
    indices[5, 1, 1] = 2
    labels = Labels.from_mapping({"background": 0, "a": 1, "b": 2, "c": 3})
    a, b, c = structure_statistics(indices, image, labels, ("T1", "T2"))
    assert (a["class"], a["num_voxels"], a["num_components"], a["touches_border"]) == ("a", 9, 2, False)
    assert a["volume_ml"] == pytest.approx(9 * 2 * 1 * 3 / 1000)
    assert a["mean_T2"] == pytest.approx(float(image.array[1][indices == 1].mean()))
    assert a["sd_T1"] == pytest.approx(float(image.array[0][indices == 1].std()), rel=1e-5)
    assert (b["num_voxels"], b["touches_border"], b["sd_T1"]) == (1, True, 0)
    assert (c["num_voxels"], c["volume_ml"], c["mean_T1"], c["touches_border"]) == (0, 0, None, False)
    assert cut_off([a, b, c]) == "touches the border of the scan, which may have cut it off: b"
    assert cut_off([a, c]) is None


def test_a_single_slice_touches_no_border_along_its_axis() -> None:
    grid = Grid((6, 5, 1), np.eye(4))
    indices = np.zeros(grid.shape, dtype=np.uint8)
    indices[2:4, 2:4] = 1
    labels = Labels.from_mapping({"background": 0, "a": 1})
    (row,) = structure_statistics(indices, Volume(np.zeros((1, *grid.shape), np.float32), grid), labels, ("CT",))
    assert not row["touches_border"] and row["mean_intensity"] == 0


def test_regions_and_pictures_in_statistics() -> None:
    labels = Labels.from_mapping({"background": 0, "whole": [1, 2], "core": [2]})
    grid = Grid.of_picture((6, 6))
    values = np.zeros((6, 6), dtype=np.uint8)
    values[1:3, 1:3] = 1
    values[3, 3] = 2
    whole, core = structure_statistics(
        labels.to_index(values), Volume(np.ones((1, 6, 6), np.float32), grid), labels, "g"
    )
    assert (whole["num_voxels"], core["num_voxels"]) == (5, 1)
    assert whole["volume_ml"] is None and whole["num_components"] == 1, "what touches at a corner is connected"


def test_statistics_table(tmp_path: Path) -> None:
    row = {"class": "a, b", "num_voxels": 0, "volume_ml": None, "mean_x": None, "sd_x": None}
    write_statistics(tmp_path / "s.csv", [("one", [{**row, "num_components": 0, "touches_border": True}]), ("two", [])])
    (read,) = csv.DictReader((tmp_path / "s.csv").open(newline=""))
    assert read["case"] == "one" and read["class"] == "a, b" and read["volume_ml"] == ""
    assert read["touches_border"] == "yes"


def test_predict_statistics_and_resume(tiny_run, scans: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    predict(tiny_run.run, scans / "a.nii.gz", "-o", out, "--statistics")
    predict(tiny_run.run, scans, "-o", out, "--statistics", "--resume")
    with (out / STATISTICS_FILE).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    labels = Labels.from_mapping(json.loads((out / TABLE_FILE).read_text())["labels"])
    assert [(r["case"], r["class"]) for r in rows] == [(c, n) for c in "abc" for n in labels.foreground]
    for row in rows:
        label = open_label(out / f"{row['case']}.nii.gz")
        image = open_volume(scans / f"{row['case']}.nii.gz")
        mask = label.array == labels.written_values()[labels.names.index(row["class"])]
        assert int(row["num_voxels"]) == mask.sum()
        volume = mask.sum() * np.prod(nib.load(out / f"{row['case']}.nii.gz").header.get_zooms()) / 1000
        assert float(row["volume_ml"]) == pytest.approx(float(volume), rel=1e-4)
        if mask.any():
            assert float(row["mean_intensity"]) == pytest.approx(float(image.array[0][mask].mean()), rel=1e-3)
            faces = any(np.take(mask, end, axis).any() for axis in range(3) for end in (0, -1))
            assert row["touches_border"] == ("yes" if faces else "no")
    assert any(r["touches_border"] == "yes" for r in rows) == ("touches the border" in capsys.readouterr().out)


# Names in the NIfTI header


def test_names_stand_in_the_header_and_harm_nobody(tmp_path: Path) -> None:
    names = {1: 'a <b> & "c" ]]>', 7: "Niere\x00 links é"}
    array = np.zeros(GRID.shape, dtype=np.uint8)
    array[1, 2, 3] = 7
    for name in ("a.nii.gz", "a.nii"):
        write_label(tmp_path / name, Volume(array, GRID), names)
        image = nib.load(tmp_path / name)
        assert tuple(e.get_code() for e in image.header.extensions) == CODES
        for extension in image.header.extensions:
            assert extension.get_sizeondisk() % 16 == 0
            assert names_in(extension.content) == {1: 'a <b> & "c" ]]>', 7: "Niere links é"}
        assert image.header.extensions[0].get_content(), "as TotalSegmentator reads it"
        read = open_label(tmp_path / name)
        assert np.array_equal(read.array, array) and read.grid.difference(GRID) is None
        assert np.array_equal(np.asarray(image.dataobj), array)
    sitk = pytest.importorskip("SimpleITK")
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz"))).T, array)


def test_names_of_other_programs_and_bad_ones() -> None:
    theirs = b"""<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14T05:45:09]]></Date>
    <VolumeInformation Index="0">   <LabelTable><Label Key="1" Red="1" Green="0" Blue="0" Alpha="1"><![CDATA[liver]]>
    </Label></LabelTable></VolumeInformation></CaretExtension>\0\0"""
    assert {k: v.strip() for k, v in names_in(theirs).items()} == {1: "liver"}
    assert names_in(names_extension({})) == {}
    with pytest.raises(MedsegError, match="E_MALFORMED"):
        names_in(b"<CaretExtension>")
    with pytest.raises(MedsegError, match="E_UNSUPPORTED"):
        names_in(b'<!DOCTYPE a [<!ENTITY b "c">]><CaretExtension/>')


def test_predicted_files_name_their_classes(tiny_run, scans: Path, tmp_path: Path) -> None:
    predict(tiny_run.run, scans / "a.nii.gz", "-o", tmp_path / "out")
    table = json.loads((tmp_path / "out" / TABLE_FILE).read_text())["labels"]
    extension = nib.load(tmp_path / "out" / "a.nii.gz").header.extensions[0]
    assert names_in(extension.content) == {value: name for name, value in table.items() if value}


# Probabilities and uncertainty


def test_shares_are_read_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    array = rng.random((3, *GRID.shape)).astype(np.float16)
    array[0, 0, 0, 0], array[1, 0, 0, 0] = 1, 0
    write_shares(tmp_path / "p.nii.gz", Volume(array, GRID))
    image = nib.load(tmp_path / "p.nii.gz")
    assert image.shape == (*GRID.shape, 3) and image.get_data_dtype() == np.uint16
    np.testing.assert_allclose(np.moveaxis(image.get_fdata(), -1, 0), array, atol=1e-5)
    read = open_volume(tmp_path / "p.nii.gz", Reading(channels=True))
    np.testing.assert_allclose(read.array, array, atol=1e-5)
    assert read.grid.difference(GRID) is None and read.array[0, 0, 0, 0] == 1 and read.array[1, 0, 0, 0] == 0
    write_shares(tmp_path / "u.nii.gz", Volume(array[0], GRID))
    np.testing.assert_allclose(open_volume(tmp_path / "u.nii.gz").array[0], array[0], atol=1e-5)
    picture = Grid.of_picture((4, 5))
    write_shares(tmp_path / "u.png", Volume(np.full((4, 5), 0.5, np.float16), picture))
    assert (open_volume(tmp_path / "u.png").array == 32768).all()


def test_predict_probabilities_and_uncertainty(tiny_run, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--probabilities", "--uncertainty", "--no-postprocess")
    predict(tiny_run.run, scans / "a.nii.gz", "-o", out, *options)
    label = open_label(out / "a.nii.gz")
    probabilities = open_volume(out / "probabilities" / "a.nii.gz", Reading(channels=True))
    uncertainty = open_volume(out / "uncertainty" / "a.nii.gz")
    disagreement = open_volume(out / "disagreement" / "a.nii.gz")
    assert (disagreement.array <= uncertainty.array + 1e-3).all()
    for volume in (probabilities, uncertainty, disagreement):
        assert volume.grid.difference(label.grid) is None
    np.testing.assert_allclose(probabilities.array.sum(axis=0), 1, atol=2e-3)
    table = Labels.from_mapping(json.loads((out / TABLE_FILE).read_text())["labels"])
    assert lines_of(out)[0]["options"]["probabilities"] == list(table.names)
    largest = np.partition(probabilities.array, -2, axis=0)[-2:]
    clear = largest[1] - largest[0] > 1e-2
    assert clear.any()
    assert np.array_equal(probabilities.array.argmax(0)[clear], table.to_index(label.array)[clear])
    assert 0 <= uncertainty.array.min() < uncertainty.array.max() <= 1
    assert set(labels_in(out)) == {"a.nii.gz"}, "beside the labels lies nothing that could be taken for one"
    (case,) = cases_of(out)
    assert set(case["files"]) == {"a.nii.gz", "probabilities/a.nii.gz", "uncertainty/a.nii.gz", "disagreement/a.nii.gz"}
    assert json.loads((out / TABLE_FILE).read_text())["cases"]["a"]["files"] == ["a.nii.gz"]
    predict(tiny_run.run, scans / "a.nii.gz", "-o", out, *options, "--resume")
    assert len(cases_of(out)) == 1


# Many at once


def test_the_models_are_loaded_once_for_many(tiny_run, scans: Path, tmp_path: Path, monkeypatch) -> None:
    from medseg.inference import members

    loads: list[Path] = []
    real = members.load_bundle
    monkeypatch.setattr(members, "load_bundle", lambda run, **kw: loads.append(run) or real(run, **kw))
    small = tmp_path / "small"
    small.mkdir()
    for number in range(12):
        image = Volume(np.full((1, 12, 12, 6), number, np.float32), Grid((12, 12, 6), np.diag([2.0, 2.0, 4.0, 1.0])))
        write_image(small / f"{number:02d}.nii.gz", image)
    ensemble = Ensemble.from_run(tiny_run.run, device="cpu")
    with Path(os.devnull).open("w") as nowhere:
        outcome = predict_inputs(ensemble, [small], tmp_path / "out", Console(file=nowhere), Options())
    assert [p.name for p in outcome.files] == [f"{n:02d}.nii.gz" for n in range(12)] and not outcome.bad
    assert len(loads) == 1


def test_help_teaches(capsys) -> None:
    main(["predict", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for told in ("--resume", "--on-bad-case", "Exit status", "predictions.jsonl", "--classes liver,spleen"):
        assert told in shown


def test_what_the_prediction_warns_of_stands_in_the_manifest(
    tiny_run, scans: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Sums of half precision decide voxels: who compares two predictions must find it."""
    from medseg.inference import predictor as module

    plan = module.plan_memory

    def half(*arguments, **options):
        logging.getLogger("medseg.inference.memory").warning("logits are kept at half precision")
        return dataclasses.replace(plan(*arguments, **options), dtype=torch.float16)

    monkeypatch.setattr(module, "plan_memory", half)
    predict(tiny_run.run, scans / "a.nii.gz", "-o", tmp_path / "out")
    (case,) = cases_of(tmp_path / "out")
    assert case["warnings"] == ["logits are kept at half precision"]
    assert "note: logits are kept at half precision" in capsys.readouterr().out
