"""Trained models on disk: what is written is what is read, and damage is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peak import peak_bytes
from safetensors.torch import save

from medseg.bundle import BundleInfo, checkpoint_path, load_bundle, read_checkpoint, write_atomically, write_checkpoint
from medseg.bundle.checkpoint import with_digest
from medseg.bundle.manifest import Manifest, write_manifest
from medseg.documents import check_format
from medseg.errors import Code, MedsegError
from medseg.inference.packing import export_bundle
from medseg.inference.verification import Status, verify


def copy_of(run: Path, target: Path) -> Path:
    shutil.copytree(run, target / "run", ignore=shutil.ignore_patterns("tensorboard", "validation"))
    return target / "run"


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    tensors = {"model.a": torch.randn(3, 4), "optimizer.0.step": torch.tensor(5.0), "model.n": torch.tensor(7)}
    write_checkpoint(path, tensors, {"counters": {"step": 3}, "text": "ü"})
    read, metadata = read_checkpoint(path)
    assert metadata == {"counters": {"step": 3}, "text": "ü"}
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_weights_and_description_come_back(tiny_run) -> None:
    bundle = load_bundle(tiny_run.run)
    assert not bundle.model.training
    assert bundle.info.labels.foreground == ("liver", "spleen", "kidneys", "spine", "aorta")
    saved, _ = read_checkpoint(checkpoint_path(tiny_run.run, "best"))
    for name, weight in bundle.model.state_dict().items():
        assert torch.equal(weight, saved[f"model.{name}"])
    assert BundleInfo.read(tiny_run.run) == bundle.info


def test_a_checkpoint_cut_anywhere_is_refused(tiny_run, tmp_path: Path) -> None:
    run = copy_of(tiny_run.run, tmp_path)
    path = checkpoint_path(run, "best")
    whole = path.read_bytes()
    for length in np.unique(np.linspace(0, len(whole) - 1, 40).astype(int)):
        path.write_bytes(whole[:length])
        with pytest.raises(MedsegError, match=r"E_CHECKPOINT: the checkpoint is damaged"):
            load_bundle(run)
    path.write_bytes(whole)
    load_bundle(run)


def test_missing_and_foreign(tiny_run, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="E_RUN: this is not a run"):
        load_bundle(tmp_path)
    run = copy_of(tiny_run.run, tmp_path)
    checkpoint_path(run, "best").unlink()
    with pytest.raises(MedsegError, match=r"(?s)E_CHECKPOINT: there is no such checkpoint.*latest\.safetensors"):
        load_bundle(run)
    load_bundle(run, checkpoint="latest")
    checkpoint_path(run, "latest").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(MedsegError, match="E_CHECKPOINT"):
        load_bundle(run, checkpoint="latest")


def test_weights_of_another_network_are_refused(tiny_run, tmp_path: Path) -> None:
    run = copy_of(tiny_run.run, tmp_path)
    description = json.loads((run / "bundle.json").read_text())
    description["model"]["widths"] = [4, 8, 12]
    (run / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(MedsegError, match=r"(?s)E_MODEL: the checkpoint's weights.*another shape"):
        load_bundle(run)


@pytest.mark.parametrize("damage", ["{", '{"format": "99"}', '{"format": true}', "{}", "[]"])
def test_damaged_descriptions(tiny_run, tmp_path: Path, damage: str) -> None:
    run = copy_of(tiny_run.run, tmp_path)
    (run / "bundle.json").write_text(damage)
    with pytest.raises(MedsegError, match="E_RUN"):
        load_bundle(run)


def test_a_message_shows_what_it_must_not_do(tmp_path: Path) -> None:
    """What a file says of itself: no escape sequence, no line of its own, no end."""
    forged = {"format": 99, "medseg": "9\x1b]0;pwned\x07\n  remedy:   run this" + "A" * 10**6}
    with pytest.raises(MedsegError) as caught:
        check_format(forged, 1, where=tmp_path)
    said = str(caught.value)
    assert "\x1b" not in said and r"\x1b]0;pwned\x07\n" in said and len(said) < 1000
    assert [line.split(":")[0].strip() for line in said.splitlines()].count("remedy") == 1
    said = str(MedsegError(Code.RUN, "a\x1bb\u202e", got="c\td\r\n    e\x9b" + "f" * 10**5, where="\udcff"))
    assert r"a\x1bb\u202e" in said and "c\td\\r\n    e\\x9b" in said and r"\udcff" in said and len(said) < 5000
    assert "more characters)" in said


def test_what_another_version_wrote_is_not_called_damaged(tiny_run, tmp_path: Path) -> None:
    run = copy_of(tiny_run.run, tmp_path)
    whole = (run / "bundle.json").read_text()
    (run / "bundle.json").write_text('{"format": 99, "medseg": "9.1"}')
    with pytest.raises(MedsegError, match=r"(?s)E_VERSION: this was written.*bundle.json.*format 99 of medseg 9.1"):
        load_bundle(run)
    (run / "bundle.json").write_text(whole)
    (run / "manifest.json").write_text('{"format": 2, "kind": "run"}')
    with pytest.raises(MedsegError, match="E_VERSION"):
        Manifest.read(run)
    (run / "manifest.json").unlink()

    path = checkpoint_path(run, "best")
    tensors, metadata = read_checkpoint(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medseg.bundle.checkpoint.FORMAT", 7)
        write_checkpoint(path, tensors, metadata)
    with pytest.raises(MedsegError, match=r"(?s)E_VERSION.*best.safetensors.*format 1.*format 7 of medseg"):
        load_bundle(run)
    stated = with_digest(tensors, {"json": json.dumps(metadata), "format": "1"})
    path.write_bytes(save(tensors, stated))
    assert load_bundle(run).info.labels.num_classes == 6
    for other in ({**stated, "format": "x"}, {**stated, "medseg": "9"}, with_digest(tensors, {"json": stated["json"]})):
        path.write_bytes(save(tensors, other))
        with pytest.raises(MedsegError, match="E_CHECKPOINT: the checkpoint is damaged"):
            load_bundle(run)


@pytest.mark.parametrize("setting", ["num_convolutions", "num_decoder_convolutions", "num_blocks"])
def test_a_billion_convolutions_are_refused_before_they_are_listed(tiny_run, tmp_path: Path, setting: str) -> None:
    run = copy_of(tiny_run.run, tmp_path)
    (run / "manifest.json").unlink()
    description = json.loads((run / "bundle.json").read_text())
    model = description["model"]
    if setting != "num_convolutions":
        model = {"name": "residual_encoder_unet", "widths": model["widths"]}
    model[setting] = [10**9] * len(model["widths"]) if setting == "num_blocks" else 10**9
    (run / "bundle.json").write_text(json.dumps({**description, "model": model}))
    before = peak_bytes()
    with pytest.raises(MedsegError, match="(?s)E_CONFIG.*at most 100"):
        load_bundle(run)
    assert peak_bytes() - before < 100e6


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MedsegError, match=r"(?s)E_OUTPUT.*No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_bundle_without_its_manifest_is_refused(tiny_run, tmp_path: Path) -> None:
    """A run in training has none either, and is opened."""
    folder = tmp_path / "model"
    export_bundle(tiny_run.run, folder)
    load_bundle(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(MedsegError, match="E_MISSING: the bundle has lost its manifest"):
        load_bundle(folder)
    (wrong,) = (finding for finding in verify(folder).findings if finding.status is Status.WRONG)
    assert wrong.name == "bundle.json" and "lost its manifest" in wrong.detail
    run = copy_of(tiny_run.run, tmp_path)
    (run / "manifest.json").unlink()
    load_bundle(run)
    assert verify(run).is_ok

    home = tmp_path / "folds"  # a fold of a bundle, named by itself
    home.mkdir()
    folder.rename(home / "fold_0")
    write_manifest(home, kind="bundle", trainings={}, made={})
    plan = home / "fold_0" / "plan.yaml"
    whole = plan.read_bytes()
    plan.write_bytes(whole + b"# changed\n")
    with pytest.raises(MedsegError, match="E_CHECKPOINT: the bundle is not what its manifest says"):
        load_bundle(home / "fold_0")
    plan.write_bytes(whole)
    load_bundle(home / "fold_0")
