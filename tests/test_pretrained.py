"""Weights from elsewhere: torchvision's cache, files, runs; and that a bundle needs none of them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from medseg.bundle import BUNDLE_FILE, MODEL_PREFIX, checkpoint_path, load_bundle, write_checkpoint
from medseg.bundle.info import BUNDLE_FORMAT
from medseg.config import compose, resumed
from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.models.classifiers import CLASSIFIERS
from medseg.phantom import write_phantoms
from medseg.torchvision_compat import prepare_torchvision
from medseg.training.pretrained import imagenet_file, load_pretrained, own_names, read_weights, settled
from medseg.training.train import train

prepare_torchvision()
import torchvision  # noqa: E402

CNN = {"name": "cnn", "widths": [4, 8], "num_convolutions": 1, "head": "flatten", "hidden": [6], "image_size": 12}


class Evil:
    """What a pickle could do."""

    def __reduce__(self):
        return (Path.mkdir, (Path("evil"),))


def resnet(in_channels: int = 1, spatial_dims: int = 2, seed: int = 0, **settings):
    torch.manual_seed(seed)
    context = {"in_channels": in_channels, "num_classes": 2, "spatial_dims": spatial_dims}
    return CLASSIFIERS.build({"name": "torchvision", **settings}, **context)


def torchvisions(network: str = "resnet18", seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return torchvision.models.get_model(network, weights=None).state_dict()


def classification_run(run: Path, settings: dict) -> torch.nn.Module:
    """What a training of a classifier leaves."""
    torch.manual_seed(3)
    model = CLASSIFIERS.build(settings, in_channels=1, num_classes=2, spatial_dims=2)
    run.mkdir()
    content = {
        "format": BUNDLE_FORMAT,
        "medseg": "0",
        "task": "classification",
        "model": {**settings, "weights": None},
        "classes": ["a", "b"],
    }
    (run / BUNDLE_FILE).write_text(json.dumps(content))
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(checkpoint_path(run, "best"), {**tensors, "optimizer.0": torch.zeros(1)}, {})
    return model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet_weights_that_are_not_there_are_named_and_not_downloaded(cache):
    with pytest.raises(MedsegError) as refusal:
        load_pretrained(resnet(), {"weights": "imagenet"})
    assert refusal.value.code == Code.MISSING
    for part in (str(cache), "https://download.pytorch.org/models/resnet18-f37072fd.pth", "model.weights=FILE"):
        assert part in str(refusal.value)
    assert list(cache.iterdir()) == []


def test_imagenet_weights_with_another_hash_are_refused(cache):
    (cache / "resnet18-f37072fd.pth").write_bytes(b"something else")
    with pytest.raises(MedsegError, match="begins with f37072fd") as refusal:
        load_pretrained(resnet(), {"weights": "imagenet"})
    assert refusal.value.code == Code.CHECKPOINT


def test_imagenet_weights_of_the_cache_are_taken(cache, monkeypatch):
    state = torchvisions()
    torch.save(state, cache / "weights")
    digest = hashlib.sha256((cache / "weights").read_bytes()).hexdigest()
    (cache / "weights").rename(cache / f"resnet18-{digest[:8]}.pth")
    entry = type("Entry", (), {"url": f"https://example.org/resnet18-{digest[:8]}.pth"})
    monkeypatch.setattr(torchvision.models, "ResNet18_Weights", type("Weights", (), {"IMAGENET1K_V1": entry}))
    assert imagenet_file("resnet18") == cache / f"resnet18-{digest[:8]}.pth"
    model = resnet(in_channels=1)
    lines = load_pretrained(model, {"weights": "imagenet"})
    assert "resnet18 as in imagenet" in lines[0] and "from 3 channels to 1" in lines[1]
    torch.testing.assert_close(model.backbone.stages[0].conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(model.backbone.stages[4].layer4[0].conv2.weight, state["layer4.0.conv2.weight"])


def test_only_torchvisions_networks_have_imagenet_weights():
    model = CLASSIFIERS.build(CNN, in_channels=1, num_classes=2, spatial_dims=2)
    with pytest.raises(MedsegError, match="densenet121") as refusal:
        load_pretrained(model, {"weights": "imagenet"})
    assert refusal.value.code == Code.MODEL


@pytest.mark.parametrize("form", ["file.safetensors", "file.pth", "wrapped.pt", "parallel.pth"])
def test_files_of_weights(tmp_path, form):
    state = torchvisions()
    path = tmp_path / form
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif form == "wrapped.pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        torch.save({f"module.{k}": v for k, v in state.items()} if form == "parallel.pth" else state, path)
    model = resnet(in_channels=3)
    assert len(load_pretrained(model, {"weights": str(path)})) == 1
    assert torch.equal(model.backbone.stages[4].layer4[1].bn2.weight, state["layer4.1.bn2.weight"])
    assert torch.equal(model.backbone.stages[0].conv1.weight, state["conv1.weight"])


def test_old_names_of_densenet():
    state = torchvisions("densenet121")
    old = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    model = resnet(in_channels=3, network="densenet121")
    named = own_names(model.backbone, old)
    assert named.keys() == model.backbone.state_dict().keys()
    name = "stages.1.denseblock1.denselayer2.conv2.weight"
    assert torch.equal(named[name], state["features.denseblock1.denselayer2.conv2.weight"])


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Evil()}, "file.pth")
    with pytest.raises(MedsegError, match="stranger's code") as refusal:
        load_pretrained(resnet(), {"weights": "file.pth"})
    assert refusal.value.code == Code.CHECKPOINT and not Path("evil").exists()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("none.pth", None, Code.MISSING),
        ("none.safetensors", None, Code.MISSING),
        ("none", None, Code.CHECKPOINT),
        ("broken.pth", b"PK\x03\x04 and no more", Code.CHECKPOINT),
        ("broken.safetensors", b"\xff" * 20, Code.CHECKPOINT),
    ],
    ids=str,
)
def test_files_that_are_none_are_refused(tmp_path, name, content, code):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MedsegError) as refusal:
        read_weights(str(tmp_path / name), "resnet18")
    assert refusal.value.code == code


def test_a_file_that_inflates_is_refused(tmp_path):
    stored, packed, twice = (tmp_path / f"{name}.pth" for name in ("stored", "packed", "twice"))
    torch.save({"conv1.weight": torch.zeros(1_000_000)}, stored)
    with zipfile.ZipFile(stored) as given, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in given.namelist():
            archive.writestr(name, given.read(name))
    assert packed.stat().st_size < 10_000
    with pytest.raises(MedsegError, match="E_LIMIT") as caught:
        read_weights(str(packed), "resnet18")
    assert "compressed" in str(caught.value)
    with zipfile.ZipFile(stored) as given, zipfile.ZipFile(twice, "w") as archive:
        for name in given.namelist():
            archive.writestr(name, given.read(name))
        # Members that lie upon each other
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        again = copy.copy(largest)
        again.filename = "archive/data/more"
        archive.filelist.append(again)
    with pytest.raises(MedsegError, match="E_LIMIT"):
        read_weights(str(twice), "resnet18")
    assert read_weights(str(stored), "resnet18")["conv1.weight"].shape == (1_000_000,)


def test_a_file_without_names_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(MedsegError, match="no state dict"):
        read_weights(str(tmp_path / "list.pth"), "resnet18")


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(torchvisions("resnet34"), tmp_path / "file.safetensors")
    with pytest.raises(MedsegError, match="another shape|missing") as refusal:
        load_pretrained(resnet(network="resnet50"), {"weights": str(tmp_path / "file.safetensors")})
    assert refusal.value.code == Code.MODEL
    unet = MODELS.build({"name": "unet", "widths": [4, 4]}, in_channels=1, num_classes=2, spatial_dims=2)
    with pytest.raises(MedsegError, match=r"trainer\.initial"):
        load_pretrained(unet, {"weights": str(tmp_path / "file.safetensors")})


def test_a_run_of_ours_in_three_dimensions_from_two(tmp_path):
    source = classification_run(tmp_path / "run", {"name": "torchvision"})
    settings = {"name": "unet_resnet", "decoder_widths": [8, 8, 8, 8, 4], "weights": str(tmp_path / "run")}
    torch.manual_seed(0)
    model = MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=3)
    lines = load_pretrained(model, settings)
    assert "inflated along the depth" in lines[1]
    flat = source.backbone.stages[3].layer3[0].conv1.weight
    torch.testing.assert_close(model.backbone.stages[3].layer3[0].conv1.weight.sum(2), flat)
    assert settled(settings) == {**settings, "weights": None}


def test_a_segmenter_of_a_classification_run_scores_as_it_did(tmp_path):
    """What stands in the bundle rebuilds it without the run."""
    source = classification_run(tmp_path / "run", CNN).eval()
    stated = {"name": "fcn", "classifier": str(tmp_path / "run"), "output_stride": 2}
    kept = json.loads(json.dumps(settled(stated)))
    assert str(tmp_path) not in json.dumps(kept) and kept["classifier"]["image_size"] == 12
    model = MODELS.build(kept, in_channels=1, num_classes=2, spatial_dims=2).eval()
    assert load_pretrained(model, stated, ["a", "b"]) == [f"weights    of the classifier in {tmp_path / 'run'}"]
    x = torch.randn(2, 1, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(model.coarse_scores(x)[:, :, 1, 1], source(x), rtol=0, atol=1e-5)
    for classes in (["b", "a"], ["background", "a", "b"]):
        other = MODELS.build(kept, in_channels=1, num_classes=len(classes), spatial_dims=2).eval()
        assert f"for {', '.join(classes)} instead of a, b" in load_pretrained(other, stated, classes)[1]
        with torch.no_grad():
            assert not torch.allclose(other.coarse_scores(x)[:, :2, 1, 1], source(x))
    with pytest.raises(MedsegError, match="two sets"):
        load_pretrained(model, {**stated, "weights": "imagenet"})


def test_what_is_no_run_of_a_classifier_is_refused(tmp_path):
    for folder, content in (
        ("empty", None),
        ("segments", {"format": BUNDLE_FORMAT, "medseg": "0", "model": {"name": "unet"}}),
    ):
        (tmp_path / folder).mkdir()
        if content is not None:
            (tmp_path / folder / BUNDLE_FILE).write_text(json.dumps(content))
        with pytest.raises(MedsegError, match="no run of a classifier") as refusal:
            settled({"name": "fcn", "classifier": str(tmp_path / folder)})
        assert refusal.value.code == Code.RUN


def test_frozen_stages_of_a_fresh_network_are_noticed():
    assert load_pretrained(resnet(), {"weights": None, "frozen_stages": 0}) == []
    assert "fresh weights" in load_pretrained(resnet(), {"weights": None, "frozen_stages": 2})[0]
    lines = load_pretrained(resnet(), {"weights": None, "keep_statistics": True})
    assert len(lines) == 1 and "statistics of a fresh network" in lines[0]


def test_a_training_begins_with_a_classifier_and_its_bundle_does_not_need_it(tmp_path):
    """Plan, weights, bundle, places, resuming: through the train function."""
    phantom = write_phantoms(tmp_path / "data", num_train=4, size=0.4)
    source = classification_run(tmp_path / "classifier", {**CNN, "head": "average"})
    source3d = CLASSIFIERS.build({**CNN, "head": "average"}, in_channels=1, num_classes=2, spatial_dims=3)
    overrides = [
        f"data.root='{phantom.train}'", "data.split.num_folds=2", "data.plan.patch_size=[16,24,24]", "model=fcn",
        f"model.classifier='{tmp_path / 'classifier'}'", "model.output_stride=2", "model.frozen_stages=1",
        "trainer.device=cpu", "trainer.max_steps=2", "trainer.num_validations=1", "trainer.ema=null",
        "trainer.final_predictions=false", "trainer.report=false", "trainer.map_cases=0", "trainer.overlay_cases=0",
    ]  # fmt: skip
    run = tmp_path / "runs" / "fcn"
    run.mkdir(parents=True)
    with (tmp_path / "console.txt").open("w", encoding="utf-8") as log:
        train(compose("train", overrides), run, Console(file=log, width=200))
    said = (tmp_path / "console.txt").read_text()
    assert "of the classifier in" in said and "inflated" in said and "instead of a, b" in said
    for name in ("config.yaml", BUNDLE_FILE):
        assert str(tmp_path) not in (run / name).read_text()
    assert str(tmp_path / "classifier") in (run / "places.yaml").read_text()
    shutil.rmtree(tmp_path / "classifier")
    model = load_bundle(run).model
    expected = source.backbone.state_dict()["stages.0.0.convolution.weight"]
    found = model.backbone.state_dict()["stages.0.0.convolution.weight"]
    torch.testing.assert_close(found.sum(2), expected)  # frozen
    assert found.shape == source3d.backbone.state_dict()["stages.0.0.convolution.weight"].shape
    with (tmp_path / "console.txt").open("w", encoding="utf-8") as log:
        train(resumed(run, ["trainer.max_steps=3"]), run, Console(file=log))
    assert "3 steps" in (tmp_path / "console.txt").read_text()
