"""The configuration: every YAML composes, every key exists, and mistakes are answered with the nearest."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medseg.config import compose, resumed
from medseg.errors import MedsegError
from medseg.tasks import TASKS, Task, configs_folder
from medseg.training.experiment import write_config

OPTIONS = [
    (task, group.name, option)
    for task in TASKS
    for group in sorted(path for path in configs_folder().iterdir() if path.is_dir())
    for option in TASKS[task].options(group.name)
]


def test_every_option_serves_a_task() -> None:
    found = {(path.parent.name, path.stem) for path in configs_folder().glob("*/*.yaml")}
    assert {(group, option) for _, group, option in OPTIONS} == found


@pytest.mark.parametrize("task, group, option", OPTIONS)
def test_every_option_composes_and_says_what_it_is(task: str, group: str, option: str) -> None:
    text = (configs_folder() / group / f"{option}.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    assert comments, "the first lines say what the option is"
    override = [f"{group}={option}"]
    if option == "monai":
        override.append("model.network=SegResNet")
    experiment = compose(TASKS[task].config, override)
    if group in TASKS[task].parts:
        expected = yaml.safe_load(text)["name"]
        assert getattr(experiment, group)["name"] == expected
        for key, value in yaml.safe_load(text).items():
            if key not in ("defaults", "name"):
                assert getattr(experiment, group)[key] == value


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_part_has_an_option(task: Task) -> None:
    for group, registry in task.parts.items():
        named = {
            yaml.safe_load((configs_folder() / group / f"{o}.yaml").read_text())["name"] for o in task.options(group)
        }
        assert named == set(registry.names())


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_all_defaults_are_shown_and_equal_the_dataclasses(task: Task) -> None:
    experiment = compose(task.config, [])
    for group, (_, cls) in task.plain.items():
        assert getattr(experiment, group) == cls()
    for group, registry in task.parts.items():
        settings = dict(getattr(experiment, group))
        part = registry.part(settings.pop("name"))
        assert set(settings) == {f.name for f in dataclasses.fields(part.config)}


def test_overrides_reach_their_places() -> None:
    experiment = compose(
        "train",
        [
            "model.widths=[4,8]",
            "model.skip=add",
            "data.labels={a: 1, b: [2, 3]}",
            "data.plan.patch_size=[8,8]",
            "seed=7",
            "trainer.max_minutes=2",
            "optimizer=sgd",
            "optimizer.momentum=0.5",
        ],
    )
    assert experiment.model["widths"] == [4, 8] and experiment.model["skip"] == "add"
    assert experiment.data.labels == {"a": 1, "b": [2, 3]}
    assert experiment.data.plan.patch_size == (8, 8)
    assert (experiment.seed, experiment.trainer.max_minutes) == (7, 2.0)
    assert experiment.optimizer["name"] == "sgd" and experiment.optimizer["momentum"] == 0.5


@pytest.mark.parametrize(
    "override, code, words",
    [
        ("modle=unet", "E_CONFIG", "did you mean 'model'"),
        ("model=unett", "E_CONFIG", "did you mean 'unet'"),
        ("model.dropot=0.1", "E_CONFIG", "did you mean 'model.dropout'"),
        ("trainer.max_minuts=3", "E_CONFIG", "'trainer.max_minutes'"),
        ("data.split.num_fold=2", "E_CONFIG", "'data.split.num_folds'"),
        ("flod=2", "E_CONFIG", "'fold'"),
        ("folds=2", "E_CONFIG", "all, or a list"),
        ("folds=[0,7]", "E_CONFIG", "0 to 4"),
        ("model.skip=cat", "E_CONFIG", "concat | add"),
        ("model.name=unot", "E_NAME", "did you mean 'unet'"),
        ("optimizer.lr=fast", "E_CONFIG", "expected: float"),
        ("data.plan.patch_size=3", "E_CONFIG", "where:    data.plan.patch_size"),
        ("trainer.max_steps=-1", "E_CONFIG", "must be positive"),
        ("trainer=huge", "E_CONFIG", "choose one of: default"),
        ("model", "E_CONFIG", "key=value"),
        ("model={a: 1}", "E_CONFIG", "fusionnet | fusionnet_narrow | monai | "),
    ],
)
def test_mistakes_are_answered(override: str, code: str, words: str) -> None:
    with pytest.raises(MedsegError) as caught:
        compose("train", [override])
    assert caught.value.code == code
    assert words in str(caught.value)


def test_written_configuration_states_everything(tmp_path: Path) -> None:
    experiment = compose("train", ["seed=3", "model.widths=[4,8]"])
    write_config(experiment, tmp_path)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["seed"] == 3 and written["model"]["widths"] == [4, 8]
    assert written["trainer"]["num_validations"] == experiment.trainer.num_validations


def test_a_resumed_run_keeps_its_configuration(tmp_path: Path) -> None:
    write_config(compose("train", ["model.skip=add", "seed=3", "data.root=relative"]), tmp_path)
    with pytest.raises(MedsegError, match="E_RUN"):
        resumed(tmp_path, [])
    (tmp_path / "bundle.json").write_text("{}")
    experiment = resumed(tmp_path, ["trainer.max_steps=9", "trainer.compile=off"])
    assert (experiment.model["skip"], experiment.seed, experiment.trainer.max_steps) == ("add", 3, 9)
    assert experiment.trainer.compile == "off"  # and not YAML's false
    assert experiment.resume == str(tmp_path)
    assert experiment.data.root == str(Path.cwd() / "relative")  # a run goes on from any folder
    for override in ("model.skip=concat", "data.root=x", "--multirun"):
        with pytest.raises(MedsegError, match="keeps its configuration"):
            resumed(tmp_path, [override])
    with pytest.raises(MedsegError, match="did you mean 'max_steps'"):
        resumed(tmp_path, ["trainer.max_step=9"])


def test_a_users_own_folder_of_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medseg.cli import main

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 41\n")
    monkeypatch.chdir(tmp_path)
    main(["train", "--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job", "--resolve"])
    assert "seed: 41" in capsys.readouterr().out


def test_every_field_is_described_and_the_document_is_up_to_date() -> None:
    from medseg.registry import field_descriptions

    classes = [cls for task in TASKS.values() for _, cls in task.plain.values()]
    registries = [registry for task in TASKS.values() for registry in task.parts.values()]
    classes += [registry.part(name).config for registry in registries for name in registry.names()]
    for cls in classes:
        assert field_descriptions(cls).keys() == {f.name for f in dataclasses.fields(cls)}, cls
    script = Path(__file__).resolve().parent.parent / "scripts" / "make_configuration_docs.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0, f"run {script.name}"
