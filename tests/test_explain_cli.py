"""`medseg inspect MODEL`: runs, plans and configurations, as text, JSON and pictures."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from medseg.bundle.checkpoint import MODEL_PREFIX, checkpoint_path, write_checkpoint
from medseg.classification.bundle import ClassifierInfo
from medseg.classification.sight import Sight
from medseg.cli import main
from medseg.cli.inspect_model import is_about_model
from medseg.errors import Code, MedsegError
from medseg.explain.subject import parsed_size


def inspect(*arguments: object) -> None:
    main(["inspect", *map(str, arguments)])


@pytest.fixture
def refused(capsys):
    """Run `medseg inspect` and return what it refuses with."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            inspect(*arguments)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


def test_what_is_about_a_model(tiny_run, tmp_path):
    assert is_about_model([str(tiny_run.run)])
    assert is_about_model(["--json", str(tiny_run.run)])
    assert is_about_model([str(tiny_run.run / "plan.yaml")])
    assert is_about_model(["model=unet", "--size", "64x64"])
    assert is_about_model(["preset=L"])
    assert is_about_model(["-o", str(tmp_path), str(tiny_run.run)])
    assert not is_about_model([str(tiny_run.data)])
    assert not is_about_model([str(tiny_run.dicom), "--json"])
    assert not is_about_model(["--help"])
    assert not is_about_model([str(tmp_path / "nothing")])
    for name, expected in (("scan.dcm", False), ("bundle.json", True)):
        path = tmp_path / f"{expected}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "{}")
        assert is_about_model([str(path)]) is expected


def test_what_is_no_path_and_what_is_damaged_is_not_about_a_model(tmp_path):
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr("bundle.json", "{}" * 200)
    content = bytearray(damaged.read_bytes())
    content[content.index(b"PK\x01\x02")] = 0  # the table of contents, not the record at the end
    damaged.write_bytes(content)
    assert zipfile.is_zipfile(damaged)
    table = "{" + ", ".join(f"structure_{i}: {i}" for i in range(40)) + "}"
    assert not is_about_model([str(tmp_path), "--labels", table, str(damaged)])


def test_a_configuration_as_json(capsys):
    inspect("model=unet", "model.widths=[4,8,8]", "model.skip=add", "--size", "32x64", "--classes", 5, "--json")
    content = json.loads(capsys.readouterr().out)
    assert content["input"] == [1, 32, 64]
    assert content["output"] == [5, 32, 64]
    assert {layer["function"] for layer in content["layers"] if layer["kind"] == "merge"} == {"add"}
    assert content["training_step"]["gib"] > 0


def test_a_configuration_without_a_size_says_so(capsys):
    inspect("model=fusionnet_narrow")
    text = capsys.readouterr().out
    assert "--size" in text
    assert "1×256×256" in text
    assert "in all" in text


def test_refusals(refused, tiny_run, tmp_path):
    valid = ("model=unet", "model.widths=[4,4,4]", "model.padding=valid", "model.down=max_pool")
    message = refused(*valid, "model.deep_supervision=false", "--size", "61x68")
    assert "E_MODEL" in message
    assert "nearest that fit, axis by axis: 60 or 64; 68" in message
    assert "did you mean 'resnet18'" in refused("model=resnt18")
    assert "did you mean 'unet'" in refused("model=unett")
    assert "no size of an image" in refused("model=unet", "--size", "big")
    assert "names no model" in refused("model=unet", tmp_path / "nothing")
    assert "no key changes it" in refused(tiny_run.run, "model=unet")
    assert "through a trained network" in refused("model=unet", "--image", tiny_run.label, "-o", tmp_path / "out")
    assert "through a trained network" in refused(tiny_run.run, "--image", tiny_run.label)
    assert "nothing" in refused(tiny_run.run, "--show", "nothing")
    assert "nothing to show" in refused(tiny_run.run, "--layer", "encoder.1")
    assert "nothing to show" in refused(tiny_run.run, "--class", "background")
    out = tmp_path / "out"
    assert "no such class" in refused(tiny_run.run, "--image", tiny_run.dicom, "-o", out, "--class", "wing")
    assert "outside of the scan" in refused(tiny_run.run, "--image", tiny_run.dicom, "-o", out, "--at", "0,0,100000")
    assert "no layer" in refused(tiny_run.run, "-o", out, "--layer", "encodr.1")


def test_a_plan_is_read_with_the_network_that_it_is_made_for(tiny_run, capsys):
    inspect(tiny_run.run / "plan.yaml", "--json")
    content = json.loads(capsys.readouterr().out)
    assert content["input"] == [1, 16, 24, 24]
    assert content["layers"][0]["output"] == [4, 16, 24, 24]


def test_a_run_with_a_scan_is_looked_into(tiny_run, tmp_path, capsys):
    out = tmp_path / "inside"
    inspect(tiny_run.run, "--image", tiny_run.dicom, "-o", out, "--effective", "--steps", 2, "--class", "background",
            "--layer", "encoder.1", "--layer", "decoder.1.skip")  # fmt: skip
    text = capsys.readouterr().out
    content = json.loads((out / "layers.json").read_text())
    assert content["total"]["effective_field"] > 1
    assert content["effective_on"] == "scan" and "effective, in this scan" in text
    assert all("effective_field" in stage for stage in content["stages"])
    expected = {
        "architecture.svg", "effective_field.png", "filters.png", "image.png", "layers.json", "shifts.json",
        "saliency_gradient.png", "saliency_grad_cam.png", "saliency_occlusion.png",
        "maps/encoder.1.png", "maps/decoder.1.skip.png", "excitation/encoder.1.png", "excitation/decoder.1.skip.png",
    }  # fmt: skip
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == expected
    for path in out.rglob("*.png"):
        with Image.open(path) as picture:
            assert len(set(picture.convert("L").tobytes())) > 2, path  # something is drawn
    shifts = json.loads((out / "shifts.json").read_text())
    assert [shift["voxels"] for shift in shifts] == [[0, 0, 1], [0, 0, 2], [0, 0, 4], [4, 4, 4]]
    assert all(0 <= shift["agreement"] <= 1 for shift in shifts)
    assert "translation equivariance" in text
    assert "why background is seen" in text
    assert str(tiny_run.data.parent) not in (out / "architecture.svg").read_text()


def test_effective_fields_are_those_of_the_scan(tiny_run, capsys, tmp_path):
    """Not of noise, of which they are where there is no scan; and of the place that is looked at."""
    fields = []
    for options in ((), ("--image", tiny_run.dicom), ("--image", tiny_run.dicom, "--at", "1,1,1")):
        folder = ("-o", tmp_path) if options else ()
        inspect(tiny_run.run, "--effective", "--json", "--show", "filters", *options, *folder)
        content = json.loads(capsys.readouterr().out)
        assert content["effective_on"] == ("scan" if options else "noise")
        fields.append([stage["effective_field"] for stage in content["stages"]])
    assert fields[0] != fields[1] != fields[2] != fields[0]


def test_pictures_go_to_tensorboard(tiny_run, tmp_path, capsys, refused):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    inspect(tiny_run.run, "--image", tiny_run.dicom, "-o", tmp_path, "--tensorboard", "--class", "background",
            "--steps", 1)  # fmt: skip
    assert "tensorboard --logdir" in capsys.readouterr().out
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    files = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.png")}
    assert set(events.Tags()["images"]) == files
    scalars = events.Scalars("equivariance/same class")
    shifts = json.loads((tmp_path / "shifts.json").read_text())
    assert [(s.step, pytest.approx(s.value)) for s in scalars] == [
        (shift["voxels"][-1], shift["agreement_middle"]) for shift in shifts[:-1]
    ]
    assert {"filters", "saliency_grad_cam", "maps/encoder.0", "excitation/encoder.0"} <= files
    assert "--tensorboard" in refused(tiny_run.run, "--tensorboard")


def test_a_run_alone_shows_its_filters(tiny_run, tmp_path, capsys):
    inspect(tiny_run.run, "-o", tmp_path / "out", "--show", "filters")
    assert "4 filters of encoder.0" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["architecture.svg", "filters.png", "layers.json"]


def test_sizes_as_people_write_them():
    assert parsed_size("572x572") == parsed_size("572,572") == parsed_size("572×572") == (572, 572)
    assert parsed_size("64X128x128") == (64, 128, 128)
    for wrong in ("64", "a x b", "", "1x2x3x4"):
        with pytest.raises(MedsegError) as refusal:
            parsed_size(wrong)
        assert refusal.value.code == Code.CONFIG


@pytest.fixture
def classifier(tmp_path):
    """A run that classifies, with fresh weights."""
    info = ClassifierInfo(
        {"name": "cnn", "widths": [4, 8], "head": "flatten", "hidden": [8], "image_size": 32},
        ("benign", "malignant"),
        Sight((32, 32), 1, "z-score"),
    )
    torch.manual_seed(0)
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in info.build_model().state_dict().items()}
    run = tmp_path / "classifier"
    checkpoint_path(run, "best").parent.mkdir(parents=True)
    info.write(run)
    write_checkpoint(checkpoint_path(run, "best"), tensors, {})
    return run


def test_a_classifier_is_looked_into(classifier, tmp_path, capsys, refused):
    picture, out = tmp_path / "picture.png", tmp_path / "inside"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)).save(picture)
    inspect(classifier, "--image", picture, "-o", out, "--steps", 1, "--class", "malignant", "--effective")
    text = capsys.readouterr().out
    assert "why malignant is seen\n" in text and "fully connected" in text
    content = json.loads((out / "layers.json").read_text())
    assert content["output"] == [2] and content["total"]["receptive_field"] == [None, None]
    expected = {
        "architecture.svg", "effective_field.png", "excitation", "filters.png", "image.png", "layers.json", "maps",
        "saliency_grad_cam.png", "saliency_gradient.png", "saliency_occlusion.png",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == expected  # its answer has no place: no shifts
    assert {path.name for path in (out / "maps").iterdir()} == {"backbone.stages.0.png", "backbone.stages.1.png"}
    with Image.open(out / "saliency_grad_cam.png") as drawn:
        assert len(set(drawn.convert("L").tobytes())) > 2
    inspect(classifier, "--image", picture, "-o", out, "--class", "benign", "--show", "saliency")
    assert "why benign is seen\n" in capsys.readouterr().out  # whichever of both is answered
    assert "sees the whole image" in refused(classifier, "--image", picture, "-o", out, "--at", "1,1")
    assert "no such class" in refused(classifier, "--image", picture, "-o", out, "--class", "wing")
    assert "images of one size" in refused(classifier, "--size", "64x64")


@pytest.mark.parametrize("arguments", [("model=cnn",), ("task=classification", "model=cnn")])
def test_the_name_of_a_network_says_what_it_learns(arguments, capsys):
    inspect(*arguments, "model.widths=[4,8]", "--channels", 3, "--classes", 7, "--size", "40x40", "--json")
    content = json.loads(capsys.readouterr().out)
    assert content["input"] == [3, 40, 40] and content["output"] == [7] and "training_step" not in content
    assert is_about_model(["task=classification", "model=cnn"])
