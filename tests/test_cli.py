"""The front door: what a user types, what it leaves behind, and what bad input is answered with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from medseg.cli import main
from medseg.formats import open_label, open_volume, read_grid, write_image, write_label
from medseg.volume import Grid, Volume

GRID = Grid((12, 10, 8), np.diag([1.0, 1.5, 2.0, 1.0]))


def refused(capsys, *arguments: object) -> str:
    """Run a command that must be refused; its message."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert exit_.value.code == 2
    message: str = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def cases(folder: Path, num: int = 4) -> Path:
    """A folder of tiny volumes with labels."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    rng = np.random.default_rng(0)
    for i in range(num):
        label = np.zeros(GRID.shape, dtype=np.uint8)
        label[3:8, 3:7, 2:6] = 1
        write_image(folder / "images" / f"case{i}.nii.gz", Volume(rng.normal(size=(1, *GRID.shape)) + label, GRID))
        write_label(folder / "labels" / f"case{i}.nii.gz", Volume(label, GRID))
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_predict_a_dicom_series_and_evaluate(tiny_run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "with space, and comma"
    main(["predict", str(tiny_run.run), str(tiny_run.dicom), "-o", str(out), "--preview"])
    name = tiny_run.dicom.name
    predicted = open_label(out / f"{name}.nii.gz")
    assert predicted.grid.difference(read_grid(tiny_run.dicom)) is None
    assert predicted.grid.difference(open_label(tiny_run.label).grid) is None
    assert predicted.array.dtype == np.uint8
    assert (out / "previews" / f"{name}.png").stat().st_size > 10_000
    assert json.loads((out / "predictions.json").read_text())["labels"]["liver"] == 1

    main(["evaluate", str(out), str(tiny_run.label.parent), "-o", str(tmp_path / "metrics")])
    table = json.loads((tmp_path / "metrics" / "metrics.json").read_text())
    truth, found = open_label(tiny_run.label).array == 1, predicted.array == 1
    dice = 2 * (truth & found).sum() / (truth.sum() + found.sum())
    assert table["summary"]["liver"]["metrics"]["dice"]["mean"] == pytest.approx(dice)
    assert "liver" in capsys.readouterr().out


def test_predict_one_file_many_files_and_a_folder(tiny_run, tmp_path: Path) -> None:
    images = sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))
    main(["predict", str(tiny_run.run), str(images[0]), "-o", str(tmp_path / "one")])
    assert len(list((tmp_path / "one").glob("*.nii.gz"))) == 1
    main(["predict", str(tiny_run.run), str(tiny_run.data / "imagesTr"), "-o", str(tmp_path / "many")])
    written = sorted(p.name for p in (tmp_path / "many").glob("*.nii.gz"))
    assert written == [p.name.replace("_0000", "") for p in images]
    for image in images:
        label = open_label(tmp_path / "many" / image.name.replace("_0000", ""))
        assert label.grid.difference(read_grid(image)) is None


def test_inspect_shows_and_prints_json_alone(tiny_run, tmp_path: Path, capsys) -> None:
    main(["inspect", str(tiny_run.dicom)])
    assert "CT_" in capsys.readouterr().out
    main(["inspect", str(tiny_run.dicom.parent), "--json", "--pictures", str(tmp_path / "pictures")])
    found = json.loads(capsys.readouterr().out)
    assert found["series"][0]["shape"] == list(read_grid(tiny_run.dicom).shape)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert "E_MISSING" in refused(capsys, "inspect", tmp_path / "nothing")


def test_step_changes_the_work_not_the_grid(tiny_run, tmp_path: Path, capsys) -> None:
    main(["predict", str(tiny_run.run), str(tiny_run.dicom), "-o", str(tmp_path / "out"), "--step", "1"])
    label = open_label(tmp_path / "out" / f"{tiny_run.dicom.name}.nii.gz")
    assert label.grid.difference(read_grid(tiny_run.dicom)) is None
    message = refused(capsys, "predict", tiny_run.run, tiny_run.dicom, "-o", tmp_path / "m", "--mirror")
    assert "trained without mirroring" in message


def test_predict_never_replaces_the_scans(tiny_run, tmp_path: Path, capsys) -> None:
    scan = tmp_path / "scan.nii.gz"
    shutil.copy(next((tiny_run.data / "imagesTr").glob("*.nii.gz")), scan)
    before = scan.read_bytes()
    message = refused(capsys, "predict", tiny_run.run, scan, "-o", tmp_path, "--overwrite")
    assert "replace the scans" in message and scan.read_bytes() == before


def test_predict_refuses(tiny_run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    run, scan = tiny_run.run, tiny_run.dicom
    assert "E_RUN: this is not a run" in refused(capsys, "predict", scan, scan, "-o", out)
    assert "E_RUN: there is no such run" in refused(capsys, "predict", tmp_path / "no", scan, "-o", out)
    assert "did you mean the last run in it" in refused(capsys, "predict", run.parent, scan, "-o", out)
    for first in (scan, tmp_path / "nothing.nii.gz"):
        message = refused(capsys, "predict", first, run, "-o", out)
        assert "did you swap them?" in message and f"{run} {first}" in message
    assert "E_MISSING" in refused(capsys, "predict", run, tmp_path / "nothing.nii.gz", "-o", out)
    assert "the step is a share" in refused(capsys, "predict", run, scan, "-o", out, "--step", "3")
    assert "no device 'warp'" in refused(capsys, "predict", run, scan, "-o", out, "--device", "warp")
    two_channels = Volume(np.zeros((2, *GRID.shape), dtype=np.float32), GRID)
    write_image(tmp_path / "two.nii.gz", two_channels)
    assert "E_4D" in refused(capsys, "predict", run, tmp_path / "two.nii.gz", "-o", out)
    assert not list(out.glob("*.nii*")) and not list(out.glob(".*"))
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(capsys, "predict", run, scan, "-o", tmp_path / "file")


def test_predict_overwrites_only_when_told(tiny_run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    existing = out / f"{tiny_run.dicom.name}.nii.gz"
    existing.write_bytes(b"precious")
    assert "exist already" in refused(capsys, "predict", tiny_run.run, tiny_run.dicom, "-o", out)
    assert existing.read_bytes() == b"precious"
    main(["predict", str(tiny_run.run), str(tiny_run.dicom), "-o", str(out), "--overwrite"])
    assert open_volume(existing).grid.ndim == 3


def test_a_cut_checkpoint(tiny_run, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run.run, run, ignore=shutil.ignore_patterns("tensorboard", "validation"))
    path = run / "checkpoints" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(capsys, "predict", run, tiny_run.dicom, "-o", tmp_path / "out")
    assert "E_CHECKPOINT" in message and "--checkpoint latest" in message
    assert not (tmp_path / "out").exists()
    main(["predict", str(run), str(tiny_run.dicom), "-o", str(tmp_path / "out"), "--checkpoint", "latest"])


def test_train_from_any_folder_and_resume(tmp_path: Path) -> None:
    data = cases(tmp_path / "data")
    run = tmp_path / "my run"
    small = ["data.plan.base_width=4", "data.plan.patch_size=[8,8,8]", "trainer.device=cpu", "trainer.log_steps=1"]
    main(["train", f"data.root={data}", f"hydra.run.dir='{run}'", "debug=fast", "trainer.max_steps=2", *small])
    assert (run / "checkpoints" / "best.safetensors").exists() and (run / "config.yaml").exists()
    assert str(data) in (run / "places.yaml").read_text() and str(data) not in (run / "config.yaml").read_text()
    assert (run / "places.yaml").stat().st_mode & 0o777 == 0o600 and not (run / ".hydra").exists()
    assert (run / "train.log").read_text().count("validation Dice") == 2
    main(["train", f"resume={run}", "trainer.max_steps=4"])
    steps = [line.split(",")[0] for line in (run / "history.csv").read_text().splitlines()[1:]]
    assert "4" in steps and steps == sorted(steps, key=int)
    assert not list(Path.cwd().iterdir()), "everything lies in the run's folder"


def test_a_folder_with_something_in_it_is_left_alone(tiny_run, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("mine")
    assert "not empty" in refused(capsys, "train", "data.root=nowhere", f"hydra.run.dir={mine}")
    assert (mine / "config.yaml").read_text() == "mine"
    run = tmp_path / "run"
    shutil.copytree(tiny_run.run, run)
    before = (run / "bundle.json").read_bytes()
    message = refused(capsys, "train", f"data.root={tiny_run.data}", f"hydra.run.dir={run}", "model.widths=[4,8]")
    assert "E_OUTPUT" in message and "resume=RUN" in message
    assert "trainer's" in refused(capsys, "train", f"resume={run}", "model.skip=add")
    assert (run / "bundle.json").read_bytes() == before


def test_sweep(tmp_path: Path) -> None:
    data = cases(tmp_path / "data")
    main(
        [
            "train",
            "-m",
            f"data.root={data}",
            "seed=1,2",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
            "debug=fast",
            "trainer.max_steps=1",
            "trainer.num_validations=1",
            "data.plan.base_width=4",
            "data.plan.patch_size=[8,8,8]",
            "trainer.final_predictions=false",
            "trainer.device=cpu",
        ]
    )
    runs = sorted(p.parent.name for p in (tmp_path / "sweep").glob("*/bundle.json"))
    assert runs == ["0_unet", "1_unet"]


def bad_data(tmp_path: Path, kind: str) -> Path:
    data = cases(tmp_path / "data")
    image, label = data / "images" / "case2.nii.gz", data / "labels" / "case2.nii.gz"
    if kind == "no cases":
        shutil.rmtree(data / "images")
        shutil.rmtree(data / "labels")
    elif kind == "no label":
        label.unlink()
    elif kind == "other shape":
        write_label(label, Volume(np.ones((12, 10, 9), np.uint8), Grid((12, 10, 9), GRID.affine)))
    elif kind == "other origin":
        moved = GRID.affine.copy()
        moved[0, 3] = 7.5
        write_label(label, Volume(np.ones(GRID.shape, np.uint8), Grid(GRID.shape, moved)))
    elif kind == "not integer":
        write_image(label, Volume(np.full((1, *GRID.shape), 0.5), GRID))
    elif kind == "truncated":
        image.write_bytes(image.read_bytes()[:-50])
    elif kind == "not finite":
        write_image(image, Volume(np.full((1, *GRID.shape), np.nan), GRID))
    return data


@pytest.mark.parametrize(
    "kind, code, words",
    [
        ("no cases", "E_NO_CASES", ["images", "dataset.json"]),
        ("no label", "E_MISSING", ["case2"]),
        ("other shape", "E_GRID", ["case2", "(12, 10, 8)", "(12, 10, 9)"]),
        ("other origin", "E_GRID", ["case2", "7.5"]),
        ("not integer", "E_LABEL", ["case2", "0.5"]),
        ("truncated", "E_TRUNCATED", ["case2"]),
        ("not finite", "E_NONFINITE", ["case2"]),
    ],
)
def test_bad_data_are_refused_before_training(tmp_path: Path, capsys, kind: str, code: str, words: list[str]) -> None:
    message = refused(capsys, "train", f"data.root={bad_data(tmp_path, kind)}")
    assert message.startswith(code)
    assert all(word in message for word in words), message
    left = {path.name for path in Path("runs").glob("*")}
    assert left <= {"prepared"}, "a run that never began leaves no folder"  # only what was read of the good cases


def test_options_may_stand_anywhere_and_a_bare_path_is_understood(tmp_path: Path, capsys) -> None:
    main(["train", "seed=3", "--cfg", "job", "--resolve", "trainer.max_steps=4"])
    shown = capsys.readouterr().out
    assert "seed: 3" in shown and "max_steps: 4" in shown
    assert f"did you mean data.root={tmp_path} ?" in refused(capsys, "train", tmp_path)


def test_train_without_data(capsys) -> None:
    message = refused(capsys, "train")
    assert "data.root=FOLDER" in message and "medseg demo" in message
    assert "data folder is not there" in refused(capsys, "train", "data.root=/no/such/folder")


def test_several_bad_cases_are_named_at_once(tmp_path: Path, capsys) -> None:
    data = cases(tmp_path / "data")
    for name in ("case1", "case3"):
        write_image(data / "labels" / f"{name}.nii.gz", Volume(np.full((1, *GRID.shape), 0.5), GRID))
    message = refused(capsys, "train", f"data.root={data}")
    assert "case1" in message and "case3" in message


def test_evaluate_refuses(tmp_path: Path, capsys) -> None:
    data = cases(tmp_path / "data")
    predictions = tmp_path / "predictions"
    shutil.copytree(data / "labels", predictions)
    (predictions / "case1.nii.gz").unlink()
    message = refused(capsys, "evaluate", predictions, data / "labels")
    assert "E_MISSING" in message and "case1" in message and "--missing count" in message
    main(["evaluate", str(predictions), str(data / "labels"), "--missing", "count", "-o", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]["label_1"]
    assert summary["num_missed"] == 1
    assert summary["metrics"]["dice"]["mean"] == pytest.approx(0.75)
    assert "E_LABEL" in refused(capsys, "evaluate", predictions, data / "labels", "--labels", "liver")
    main(["evaluate", str(predictions), str(data / "labels"), "--missing", "skip", "-o", str(tmp_path / "part")])
    assert json.loads((tmp_path / "part" / "metrics.json").read_text())["num_cases"] == 3


def test_help_of_every_verb_teaches(capsys) -> None:
    for verb, words in {
        "train": ["data.root=FOLDER", "resume=RUN", "Groups", "max_minutes", "preset=nnunet", "plan=PLAN"],
        "plan": ["data.root=FOLDER", "preset=nnunet", "plan=MY_PLAN", "data.plan.memory_gb=24", "Groups"],
        "predict": ["DICOM series", "--preview", "medseg predict RUN folder_of_scans", "--format nifti,dicom-seg"],
        "evaluate": ["missed structure", "--tolerance"],
        "demo": ["phantom", "--minutes"],
        "inspect": ["--json", "--pictures", "medseg inspect EXPORT"],
        "convert": ["--image SERIES", "--resample-irregular", "medseg convert SERIES scan.nii.gz", "rtstruct.dcm"],
    }.items():
        try:
            main([verb, "--help"])
        except SystemExit as exit_:
            assert exit_.code in (0, None)
        text = capsys.readouterr().out
        assert all(word in text for word in words), (verb, text)


def test_help_of_train_says_what_each_key_means(capsys, monkeypatch) -> None:
    from medseg.cli.keys import first_sentence, meanings
    from medseg.config import composed
    from medseg.tasks import TASKS

    monkeypatch.setenv("COLUMNS", "160")
    main(["train", "model=residual_encoder_unet", "trainer.max_steps=77", "--help"])
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "trainer.max_steps=77 Optimizer steps; null with no time budget means 20000." in lines
    assert "data.split.num_folds=5 Number of folds: one in this many cases validates." in lines
    assert any(line.startswith("model.name=residual_encoder_unet ") for line in lines)
    assert ", fusionnet, fusionnet_narrow, " in said and " _unet" not in said
    values, _, _ = composed("train", [])

    def keys(table: dict, before: str) -> set[str]:
        plan = {k: v for k, v in table.items() if isinstance(v, dict)}
        return {before + k for k in table.keys() - plan.keys()} | {
            k for p in plan for k in keys(plan[p], f"{before}{p}.")
        }

    found = dict(meanings(values, TASKS["segmentation"]))
    assert found.keys() == keys(values, "") - {"preset", "experiment", "debug"}
    assert all(len(text) > 8 for text in found.values()), [key for key, text in found.items() if len(text) <= 8]
    assert first_sentence("Size e.g. 2.5 mm. And more.") == "Size e.g. 2.5 mm."


@pytest.mark.parametrize(
    "line, expected",
    [
        ("medseg tr", {"train"}),
        (
            "medseg ",
            {
                "inspect",
                "convert",
                "plan",
                "train",
                "tune",
                "select",
                "export",
                "verify",
                "predict",
                "evaluate",
                "compare",
                "demo",
                "doctor",
                "notebook",
                "prepare",
                "measure",
                "survival",
            },
        ),
        ("medseg train model=fus", {"model=fusionnet", "model=fusionnet_narrow"}),
        ("medseg train trainer.max_m", {"trainer.max_minutes="}),
    ],
)
def test_shell_completion(line: str, expected: set[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    main(["-sc", "query=bash"])
    assert set(capsys.readouterr().out.split()) == expected


def test_completion_script_is_for_medseg(capsys) -> None:
    main(["train", "-sc", "install=bash"])
    assert capsys.readouterr().out.rstrip().endswith("hydra_bash_completion medseg")
