"""Trained models on disk: what is written is what is read, and damage is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.bundle import BundleInfo, checkpoint_path, load_bundle, read_checkpoint, write_atomically, write_checkpoint
from medseg.errors import MedsegError


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


@pytest.mark.parametrize("damage", ["{", '{"format": 99}', "{}", "[]"])
def test_damaged_descriptions(tiny_run, tmp_path: Path, damage: str) -> None:
    run = copy_of(tiny_run.run, tmp_path)
    (run / "bundle.json").write_text(damage)
    with pytest.raises(MedsegError, match="E_RUN"):
        load_bundle(run)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MedsegError, match=r"(?s)E_OUTPUT.*No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
