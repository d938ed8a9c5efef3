"""`medseg plan`, its files, and trainings that use a plan that was written or edited."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from medseg.cli import main
from medseg.formats import write_image, write_label
from medseg.volume import Grid, Volume

GRID = Grid((24, 20, 16), np.diag([1.0, 1.5, 2.0, 1.0]))
SMALL = ("data.plan.base_width=2", "data.plan.num_stages=2", "trainer.max_steps=1", "trainer.num_validations=1",
         "trainer.final_predictions=false", "data.store=null", "data.split.num_folds=2")  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six tiny volumes with labels, one of them empty; the working folder is empty too."""
    folder = tmp_path / "data"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        label = np.zeros(GRID.shape, dtype=np.uint8)
        label[3:8, 3 + number % 2 : 7, 2:6] = number != 3
        image = rng.normal(size=(1, *GRID.shape)) + 3 * label
        write_image(folder / "images" / f"case{number}.nii.gz", Volume(image, GRID))
        write_label(folder / "labels" / f"case{number}.nii.gz", Volume(label, GRID))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def plan_of(folder: Path) -> dict[str, object]:
    values: dict[str, object] = yaml.safe_load((folder / "plan.yaml").read_text(encoding="utf-8"))
    return values


def train(data: Path, run: Path, *overrides: str) -> dict[str, object]:
    main(["train", f"data.root='{data}'", f"hydra.run.dir='{run}'", *SMALL, *overrides])
    return plan_of(run)


def refused(capsys: pytest.CaptureFixture[str], data: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["train", f"data.root='{data}'", *SMALL, *overrides])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_the_command_that_trains_by_a_plan_keeps_what_was_stated(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", f"data.root='{data}'", "preset=M", "data.split.num_folds=2", "hydra.run.dir=planned"])
    command = capsys.readouterr().out.split("then:")[1]
    assert "preset=M" in command and "data.split.num_folds=2" in command and "hydra.run.dir" not in command
    assert "E_CONFIG" in (error := refused(capsys, data, "plan=planned")) and "preset=M plan=planned" in error


def test_a_plan_with_tiny_and_huge_numbers_is_read_back(tmp_path: Path) -> None:
    from test_plan import found

    from medseg.data.plan import PlanConfig, machine_for, make_plan
    from medseg.data.plan.file import read_plan

    survey = found((40, 40, 40), (1.0, 1.0, 1.0), "RAS")
    plan = make_plan(survey, PlanConfig(), machine_for(survey, PlanConfig(), device="cpu"))
    plan = dataclasses.replace(plan, intensity=((-1e16, 1e17, 0.0, 1e-8),))
    plan.write(tmp_path / "plan.yaml")
    assert dataclasses.replace(read_plan(tmp_path / "plan.yaml"), reasons=plan.reasons) == plan


def test_plan_says_why_and_trains_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["plan", f"data.root='{data}'", f"hydra.run.dir='{tmp_path / 'mine'}'", "data.split.num_folds=2"])
    said = capsys.readouterr().out
    assert "patch_size" in said and "the median shape at this spacing is 16×20×24" in said
    assert "case3" in said and "the label is empty" in said and "plan=" in said
    assert {p.name for p in (tmp_path / "mine").iterdir()} - {".hydra", "plan.log"} == {"plan.yaml", "survey.json"}
    survey = json.loads((tmp_path / "mine" / "survey.json").read_text())
    assert survey["anomalies"] == [{"case_id": "case3", "reasons": ["the label is empty"]}]
    text = (tmp_path / "mine" / "plan.yaml").read_text()
    assert all(f"\n{key}:" in text for key in plan_of(tmp_path / "mine"))
    assert text.count("\n# ") == len(plan_of(tmp_path / "mine"))

    main(["plan", f"data.root='{data}'", "preset=nnunet", "trainer.device=cuda", "data.plan.memory_gb=24"])
    (folder,) = Path("plans").iterdir()
    assert folder.name.endswith("_nnunet") and plan_of(folder)["widths"][0] == 32  # type: ignore[index]
    assert "on a GPU, which may take 21.6 GiB (90% of data.plan.memory_gb)" in (folder / "plan.yaml").read_text()


@pytest.mark.parametrize("where", ["mine", None])
def test_what_planning_has_read_is_not_read_again(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str | None
) -> None:
    """The training that `medseg plan` names, and one by hand where both have their default folders."""
    from medseg.data import survey

    decoded: list[str] = []
    settings = [s for s in SMALL if not s.startswith("data.store")]
    original = survey._decode
    monkeypatch.setattr(survey, "_decode", lambda case, *a: (decoded.append(case.case_id), original(case, *a))[1])
    main(["plan", f"data.root='{data}'", *settings, *([] if where is None else [f"hydra.run.dir={where}"])])
    assert sorted(decoded) == sorted(set(decoded)) and len(decoded) > 2
    said = capsys.readouterr().out.split("then:")[1].split()
    folder = next(word for word in said if word.startswith("plan="))
    store = [word for word in said if word.startswith("data.store=")]
    assert len(store) == (where is not None)
    decoded.clear()
    main(["train", f"data.root='{data}'", *settings, folder, *store])
    assert not decoded


def test_train_uses_an_edited_plan_and_keys_win(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", f"data.root='{data}'", "hydra.run.dir=mine", *SMALL])
    path = Path("mine") / "plan.yaml"
    planned = plan_of(Path("mine"))
    edited = path.read_text().replace(f"batch_size: {planned['batch_size']}", "batch_size: 1")
    path.write_text(edited.replace('orientation: "SPL"', 'orientation: "PLS"'))
    keys = ("data.plan.base_width=2", "data.plan.num_stages=2")
    main(["train", f"data.root='{data}'", f"hydra.run.dir='{tmp_path / 'run'}'", "plan=mine",
          *(s for s in SMALL if s not in keys)])  # fmt: skip
    used, text = plan_of(tmp_path / "run"), (tmp_path / "run" / "plan.yaml").read_text()
    assert (used["batch_size"], used["orientation"], used["widths"]) == (1, "PLS", planned["widths"])
    assert '# as mine states; without it: "SPL", because medseg\'s axes run' in text
    assert "# as mine states\nspacing_mm" in text
    again = train(data, tmp_path / "again", "plan=mine/plan.yaml", "data.plan.batch_size=2")
    assert (again["batch_size"], again["orientation"]) == (2, "PLS")
    assert "# set by data.plan.batch_size\n" in (tmp_path / "again" / "plan.yaml").read_text()


def test_plans_that_cannot_be_used_are_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", f"data.root='{data}'", "hydra.run.dir=mine", *SMALL])
    path, good = Path("mine") / "plan.yaml", (Path("mine") / "plan.yaml").read_text()
    keys = ("data.plan.base_width=2", "data.plan.num_stages=2")
    options = [s for s in SMALL if s not in keys]

    def message(text: str) -> str:
        path.write_text(text)
        with pytest.raises(SystemExit):
            main(["train", f"data.root='{data}'", "plan=mine", *options])
        return capsys.readouterr().err

    patch = json.dumps(plan_of(Path("mine"))["patch_size"])
    assert "E_MODEL" in message(good.replace(f"patch_size: {patch}", "patch_size: [15, 21, 24]"))
    assert "3 positive numbers" in message(good.replace(f"patch_size: {patch}", "patch_size: [16, 24]"))
    assert "did you mean" in message(good.replace("batch_size:", "batch_sise:"))
    assert "incomplete" in message(good.replace("batch_size:", "# batch_size:"))
    assert "was made for other data" in message(good.replace("num_channels: 1", "num_channels: 2")
                                                .replace('["z-score"]', '["z-score", "none"]')
                                                .replace("intensity: [", "intensity: [[0, 1, 0, 1], "))  # fmt: skip
    assert "cannot be read" in message("a: [1")
    assert "no such plan" in refused(capsys, data, "plan=elsewhere")
