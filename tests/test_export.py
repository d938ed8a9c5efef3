"""Bundles: what is handed on is what predicts, and what a stranger hands on is checked before it is used."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import run

from medseg.bundle import BundleInfo, checkpoint_path, is_archive, load_bundle, opened
from medseg.bundle.manifest import MANIFEST_FILE, Manifest, write_manifest
from medseg.cli import main
from medseg.config import compose
from medseg.errors import MedsegError
from medseg.formats import open_label
from medseg.inference.ensemble import Ensemble
from medseg.inference.members import configurations_of, digest_of, write_ensemble
from medseg.inference.packing import export_bundle
from medseg.inference.verification import Status, verify


def ran(*arguments: object) -> int:
    """Exit status of a command."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.fixture(scope="module")
def packed(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the tiny run. Tests read it; none changes it."""
    target = tmp_path_factory.mktemp("packed") / "model.zip"
    export_bundle(tiny_run.run, target)
    return target


@pytest.fixture
def folder(tiny_run, packed: Path, tmp_path: Path) -> Path:
    """The same as a folder that a test may damage."""
    target = tmp_path / "bundle"
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(target)
    return target


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder).as_posix())
    return target


def forged(folder: Path) -> None:
    """The manifest of a bundle as somebody makes it anew who has changed its files."""
    before = Manifest.read(folder)
    write_manifest(folder, kind=before.kind, made=before.made, trainings=before.trainings)


def test_a_bundle_holds_the_model_and_nothing_of_the_cases(tiny_run, packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        texts = b"".join(archive.read(name) for name in names if not name.endswith(".safetensors")).decode()
        weights = archive.getinfo("checkpoints/best.safetensors")
    assert set(names) == {
        "manifest.json",
        "bundle.json",
        "checkpoints/best.safetensors",
        "model_card.md",
        "plan.yaml",
        "postprocessing.json",
        "postprocessing.md",
    }
    assert names[0] == MANIFEST_FILE and weights.compress_type == zipfile.ZIP_STORED
    assert str(tiny_run.data) not in texts and str(tiny_run.run.parent) not in texts
    manifest = Manifest.read(opened(packed))
    (training,) = manifest.trainings.values()
    assert training["seed"] == 0 and training["num_cases"] == 4 and len(training["data_sha256"]) == 64
    assert manifest.made["trained"]["environment"]["torch"] == torch.__version__
    assert set(manifest.files) == set(names) - {MANIFEST_FILE}


def test_the_bundle_is_the_model(tiny_run, packed: Path) -> None:
    ours, theirs = load_bundle(tiny_run.run), load_bundle(packed)
    assert ours.info == theirs.info
    state = theirs.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())
    assert Ensemble.from_run(packed).postprocessing == Ensemble.from_run(tiny_run.run).postprocessing
    assert is_archive(packed) and opened(packed) == opened(packed)
    with pytest.raises(MedsegError, match="E_CHECKPOINT: there is no such checkpoint"):
        load_bundle(packed, checkpoint="latest")


def test_predict_with_a_zip_and_with_its_folder(tiny_run, packed: Path, folder: Path, tmp_path: Path) -> None:
    labels = []
    for number, model in enumerate((tiny_run.run, packed, folder)):
        assert ran("predict", model, tiny_run.dicom, "-o", tmp_path / str(number)) == 0
        labels.append(open_label(next((tmp_path / str(number)).glob("*.nii.gz"))).array)
    assert all((label == labels[0]).all() for label in labels)
    assert verify(tmp_path / "0").kind == "predictions" and verify(tmp_path / "0").is_ok
    path = next((tmp_path / "0").glob("*.nii.gz"))
    path.write_bytes(path.read_bytes()[:-1])
    (wrong,) = [f for f in verify(tmp_path / "0").findings if f.status is Status.WRONG]
    assert wrong.name == path.name and "was changed" in wrong.detail


def test_fine_tuning_begins_with_a_zip(tiny_run, packed: Path, tmp_path: Path) -> None:
    run(tiny_run.data, tmp_path / "run", f"trainer.initial='{packed}'", "trainer.max_steps=1")
    said = " ".join((tmp_path / "run.txt").read_text().split())
    assert "tensors taken from" in said and "nothing tells which cases these weights were trained on" in said
    assert BundleInfo.read(tmp_path / "run").model == BundleInfo.read(packed).model


def test_folds_and_ensembles(tiny_run, tmp_path: Path) -> None:
    folds = tmp_path / "folds"
    for number in range(3):
        shutil.copytree(tiny_run.run, folds / f"fold_{number}", ignore=shutil.ignore_patterns("tensorboard"))
    names = ["fold_0", "fold_1", "fold_2"]
    (folds / "folds.json").write_text(json.dumps({"members": names, "finished": names[:2]}))
    (tmp_path / "ensemble").mkdir()
    chosen = (*configurations_of(folds), *configurations_of(tiny_run.run))
    write_ensemble(tmp_path / "ensemble", chosen)
    for name, num_models in (("folds", 2), ("ensemble", 3)):
        manifest = export_bundle(tmp_path / name, tmp_path / f"{name}.zip")
        assert Ensemble.from_run(tmp_path / f"{name}.zip").num_models == num_models == len(manifest.trainings)
        assert verify(tmp_path / f"{name}.zip").is_ok
        again = export_bundle(tmp_path / f"{name}.zip", tmp_path / f"{name} again")  # a bundle of a bundle, as a folder
        assert again.trainings == manifest.trainings and set(again.files) == set(manifest.files)
        assert Ensemble.from_run(tmp_path / f"{name} again").num_models == num_models
    assert verify(tmp_path / "ensemble").is_ok
    best = checkpoint_path(folds / "fold_1", "best")
    best.write_bytes(checkpoint_path(folds / "fold_1", "latest").read_bytes())
    wrong = [f.name for f in verify(tmp_path / "ensemble").findings if f.status is Status.WRONG]
    assert wrong == ["../folds/fold_1"]


def test_only_a_bundle_is_replaced_and_only_when_asked(tiny_run, tmp_path: Path, capsys) -> None:
    target = tmp_path / "model.zip"
    assert ran("export", tiny_run.run, "-o", target) == 0
    assert ran("export", tiny_run.run, "-o", target) == 2
    assert ran("export", tiny_run.run, "-o", target, "--overwrite") == 0
    mine = tmp_path / "run"
    shutil.copytree(tiny_run.run, mine)
    before = sorted(mine.rglob("*"))
    capsys.readouterr()
    assert ran("export", tiny_run.run, "-o", mine, "--overwrite") == 2
    assert "E_OUTPUT" in capsys.readouterr().err and sorted(mine.rglob("*")) == before
    assert ran("export", tmp_path, "-o", tmp_path / "none.zip") == 2
    assert not (tmp_path / "none.zip").exists() and not list(tmp_path.glob(".*"))


def test_a_model_that_does_not_open_is_not_handed_on(tiny_run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.run, tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", "best")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MedsegError, match="E_CHECKPOINT"):
        export_bundle(tmp_path / "run", tmp_path / "model.zip")
    assert not (tmp_path / "model.zip").exists()


class _Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_s1_a_pickle_is_refused_and_never_runs(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for buffer in (pickle.dumps(_Payload(marker)), _torch_saved(_Payload(marker))):
        checkpoint_path(folder, "best").write_bytes(buffer)
        forged(folder)
        for model in (folder, zipped(folder, tmp_path / "forged.zip")):
            with pytest.raises(MedsegError, match="E_CHECKPOINT: the checkpoint is damaged"):
                load_bundle(model)
    (folder / "extra.pkl").write_bytes(pickle.dumps(_Payload(marker)))
    forged(folder)
    for model in (folder, zipped(folder, tmp_path / "extra.zip")):
        with pytest.raises(MedsegError, match=r"(?s)E_MALFORMED.*kinds that no bundle has.*\.pkl"):
            load_bundle(model)
    assert not marker.exists()


def _torch_saved(payload: _Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model.a": payload}, buffer)
    return buffer.getvalue()


def _model(content: dict[str, Any]) -> None:
    content["model"] = {"name": "os.system", "command": "touch ran"}


def _network(content: dict[str, Any]) -> None:
    content["model"] = {"name": "monai", "network": "os.system", "arguments": {"command": "touch ran"}}


def _target(content: dict[str, Any]) -> None:
    content["model"]["_target_"] = "os.system"


def _absurd(content: dict[str, Any]) -> None:
    content["model"]["widths"] = [2**20 for _ in content["model"]["widths"]]


def _endless(content: dict[str, Any]) -> None:
    content["model"]["num_convolutions"] = 100


def _beyond_memory(content: dict[str, Any]) -> None:
    content["model"]["num_convolutions"] = 10**18


def _nameless(content: dict[str, Any]) -> None:
    content["model"] = ["os.system"]


def _axes(content: dict[str, Any]) -> None:
    content["mirror_axes"] = [7]


def _channels(content: dict[str, Any]) -> None:
    content["channels"] = "CT"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_model, "E_NAME"),
        (_network, "E_NAME"),
        (_target, "E_CONFIG"),
        (_absurd, "E_MODEL"),
        (_endless, "(?s)E_MODEL.*layers and parameters"),
        (_beyond_memory, "E_CONFIG.*num_convolutions at most 100"),
        (_nameless, "E_RUN"),
        (_axes, "E_RUN"),
        (_channels, "E_RUN"),
    ],
)
def test_s2_nothing_is_built_by_a_name_that_is_not_registered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.loads((folder / "bundle.json").read_text())
    change(content)
    (folder / "bundle.json").write_text(json.dumps(content))
    forged(folder)
    with pytest.raises(MedsegError, match=code):
        load_bundle(folder)
    assert not (tmp_path / "ran").exists()


def test_a_network_that_memory_has_no_room_for_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("medseg.models.unet.convolutions", no_room)
    with pytest.raises(MedsegError, match="(?s)E_MODEL.*MemoryError"):
        load_bundle(folder)


def test_overwriting_keeps_what_was_there_until_the_new_one_stands(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    export_bundle(tiny_run.run, target)
    (target / "mine.txt").write_text("of the former one")
    replace, tried = Path.replace, []

    def fails_once(self: Path, to: Path) -> Path:
        if Path(to) == target and not tried:  # the new one, at its final name
            tried.append(self)
            raise OSError(28, "No space left on device")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", fails_once)
    with pytest.raises(MedsegError, match="E_OUTPUT"):
        export_bundle(tiny_run.run, target, overwrite=True)
    assert (target / "mine.txt").is_file() and tried
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("key", ["model._target_=os.system", "+loss._target_=os.system", "model=os.system"])
def test_s2_configurations_name_registered_parts_only(key: str) -> None:
    with pytest.raises(MedsegError, match="E_CONFIG"):
        compose("train", ["data.root=nowhere", key])


def _archive(folder: Path, target: Path, name: str, content: bytes, mode: int = 0) -> Path:
    with zipfile.ZipFile(zipped(folder, target), "a", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, content)
    return target


@pytest.mark.parametrize(
    ("name", "content", "mode", "code"),
    [
        ("../outside.json", b"{}", 0, "E_MALFORMED"),
        ("/outside.json", b"{}", 0, "E_MALFORMED"),
        ("C:\\outside.json", b"{}", 0, "E_MALFORMED"),
        ("..\\outside.json", b"{}", 0, "E_MALFORMED"),
        ("link.json", b"/etc/passwd", stat.S_IFLNK | 0o777, "E_MALFORMED"),
        ("run.sh", b"touch ran", 0, "E_MALFORMED"),
        ("bomb.json", bytes(200_000_000), 0, "E_LIMIT"),
        ("more.json", b"{}", 0, "E_CHECKPOINT"),
    ],
)
def test_s3_archives_that_reach_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, mode: int, code: str
) -> None:
    archive = _archive(folder, tmp_path / "model.zip", name, content, mode)
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    for use in (load_bundle, BundleInfo.read, Ensemble.from_run, configurations_of):
        with pytest.raises(MedsegError, match=code):
            use(archive)
    assert ran("predict", archive, tmp_path, "-o", tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    # More than the manifest lists is seen once it is unpacked, all else before
    assert bool(list(private.iterdir())) == (code == "E_CHECKPOINT")
    assert not (tmp_path / "outside.json").exists() and not Path("/outside.json").exists()


def test_s3_links_in_a_folder_and_runs_elsewhere(tiny_run, folder: Path, tmp_path: Path) -> None:
    (folder / "plan.yaml").unlink()
    (folder / "plan.yaml").symlink_to(tiny_run.run / "plan.yaml")
    with pytest.raises(MedsegError, match="E_MALFORMED: the bundle holds a link"):
        load_bundle(folder)
    (folder / "plan.yaml").unlink()
    (folder / "folds.json").write_text(json.dumps({"members": [str(tiny_run.run)]}))
    forged(folder)
    with pytest.raises(MedsegError, match=r"(?s)E_RUN.*runs outside of the bundle"):
        configurations_of(folder)


def test_s3_folds_outside_of_their_run(tiny_run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.run, tmp_path / "m", ignore=shutil.ignore_patterns("tensorboard"))
    shutil.copytree(tmp_path / "m", tmp_path / "run" / "m")
    (tmp_path / "out").mkdir()
    for name in ("../m", str(tmp_path / "m")):
        (tmp_path / "run" / "folds.json").write_text(json.dumps({"members": [name]}))
        with pytest.raises(MedsegError, match=r"(?s)E_RUN.*folds outside of their run"):
            export_bundle(tmp_path / "run", tmp_path / "out" / "model")
    for name in ("../run/m", str(tmp_path / "run" / "m")):  # names of what is inside after all
        (tmp_path / "run" / "folds.json").write_text(json.dumps({"members": [name]}))
        export_bundle(tmp_path / "run", tmp_path / "out" / "model", overwrite=True)
        assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "model"]
        assert verify(tmp_path / "out" / "model").is_ok and load_bundle(tmp_path / "out" / "model" / "m")


def test_an_ensemble_that_names_its_runs_absolutely(tiny_run, tmp_path: Path) -> None:
    member = {"run": str(tiny_run.run), "digest": digest_of(tiny_run.run)}
    for runs, is_refused in (([{"run": str(tiny_run.run), "members": [member]}], False),
                             ([{"run": "elsewhere", "members": [member]}], True)):  # fmt: skip
        (tmp_path / "ensemble.json").write_text(json.dumps({"format": 1, "runs": runs}))
        if is_refused:
            with pytest.raises(MedsegError, match=r"(?s)E_RUN.*folds outside of their run"):
                export_bundle(tmp_path, tmp_path / "model.zip")
        else:
            (finding,) = verify(tmp_path).findings
            assert finding.status is Status.OK and (tmp_path / finding.name).resolve() == tiny_run.run.resolve()


def test_every_byte_of_a_bundle_counts(folder: Path, tmp_path: Path) -> None:
    for name in ("bundle.json", "checkpoints/best.safetensors", "postprocessing.json"):
        path = folder / name
        whole = path.read_bytes()
        for changed in (whole[:-1], whole[:50] + b"~" + whole[51:], None):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            with pytest.raises(
                MedsegError, match=f"(?s)E_CHECKPOINT: the bundle is not what its manifest says.*{name}"
            ):
                load_bundle(folder)
            path.write_bytes(whole)
    load_bundle(folder)
    for damage in ("{", "[]", '{"format": "9"}', '{"format": 1, "kind": "bundle", "files": {"../a": {}}}'):
        (folder / MANIFEST_FILE).write_text(damage)
        with pytest.raises(MedsegError, match="E_RUN: the manifest cannot be read"):
            load_bundle(folder)
    packed = zipped(folder, tmp_path / "model.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(MedsegError, match="E_TRUNCATED"):
        load_bundle(tmp_path / "cut.zip")


def test_a_zip_of_something_else(tmp_path: Path, capsys) -> None:
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        archive.writestr("scan.dcm", b"0")
    with pytest.raises(MedsegError, match="E_RUN: this zip is no bundle"):
        load_bundle(tmp_path / "scans.zip")
    assert ran("predict", tmp_path / "scans.zip", tmp_path, "-o", tmp_path / "out") == 2
    assert "E_RUN" in capsys.readouterr().err


def test_verify_a_run(tiny_run, tmp_path: Path, capsys) -> None:
    assert ran("verify", tiny_run.run) == 0
    target = tmp_path / "run"
    shutil.copytree(tiny_run.run, target)
    (target / "notes.txt").write_text("mine")
    (target / "places.yaml").write_text("data.root: elsewhere")  # its owner may move the data
    assert ran("verify", target) == 0
    path = checkpoint_path(target, "latest")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (target / "plan.yaml").unlink()
    capsys.readouterr()
    assert ran("verify", target, "--json") == 3
    said = json.loads(capsys.readouterr().out)
    status = {entry["name"]: entry["status"] for entry in said["files"]}
    wrong = {name for name, value in status.items() if value == "wrong"}
    assert said["kind"] == "run" and not said["ok"] and wrong == {"checkpoints/latest.safetensors", "plan.yaml"}
    assert status["notes.txt"] == "unknown" and not any(name.startswith("tensorboard") for name in status)
    assert ran("verify", target) == 3
    assert "another SHA-256" in " ".join(capsys.readouterr().out.split())
    (target / MANIFEST_FILE).unlink()  # as while it trains: then only checkpoints can tell
    unfinished = verify(target)
    wrong = {finding.name for finding in unfinished.findings if finding.status is Status.WRONG}
    assert unfinished.kind == "unfinished run" and wrong == {"checkpoints/latest.safetensors"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_verify_reads_plain_files_of_the_folder_only(tmp_path: Path) -> None:
    """Each of these would be read for ever."""
    folder = tmp_path / "labels"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"")
    (folder / "inside").write_bytes(b"")
    (folder / "zeros").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    names = ["/dev/zero", "../outside", str(tmp_path / "outside"), "zeros", "pipe", "", "a\0b", "inside"]
    empty = hashlib.sha256(b"").hexdigest()
    line = {"case": "a", "session": "s", "input": None, "files": dict.fromkeys(names, empty), "notes": []}
    (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    findings = {finding.name: finding for finding in verify(folder).findings}
    assert [name for name in names if findings[name].status is Status.OK] == ["inside"]
    assert {name for name in names if "leads out" in findings[name].detail} == set(names[:3])


def test_verify_a_bundle_and_nothing(packed: Path, folder: Path, tmp_path: Path) -> None:
    assert verify(packed).is_ok and verify(folder).is_ok and verify(packed).kind == "bundle"
    (folder / "more.md").write_text("added")
    wrong = [finding.name for finding in verify(zipped(folder, tmp_path / "more.zip")).findings if finding.detail]
    assert wrong == ["more.md"]
    assert ran("verify", tmp_path / "more.zip") == 3
    for nothing in (tmp_path, tmp_path / "none"):
        assert ran("verify", nothing) == 2


def test_a_run_that_goes_on_has_no_manifest_until_it_is_done(
    tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_run.data, tmp_path / "run", "trainer.max_steps=1", "trainer.num_validations=1")
    assert verify(tmp_path / "run").is_ok
    with monkeypatch.context() as patch:
        patch.setattr("medseg.training.loop.Loop.train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny_run.data, tmp_path / "run", "trainer.max_steps=2", f"resume='{tmp_path / 'run'}'")
    assert not (tmp_path / "run" / MANIFEST_FILE).exists()
