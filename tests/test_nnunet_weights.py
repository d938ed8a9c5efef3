"""Models that nnU-Net trained answer as they do in nnU-Net: expected values by scripts/make_nnunet_goldens.py."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from medseg.bundle import BundleInfo, load_bundle
from medseg.cli import main
from medseg.conversion import Options, convert
from medseg.conversion.nnunet import read_pth
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ["plain_2d", "plain_3d", "residual_2d", "residual_3d"]
AGREEMENT = {"plain_2d": 0.95, "plain_3d": 0.98, "residual_2d": 0.95, "residual_3d": 0.99}
"""Share of voxels that must be labelled as nnU-Net labels them."""
FILES = "LAS"
"""Orientation of the goldens' scans."""


@dataclass(frozen=True)
class Golden:
    tensors: dict[str, torch.Tensor]
    plans: dict[str, Any]
    dataset: dict[str, Any]
    affine: np.ndarray | None
    state: dict[str, torch.Tensor]
    """Each weight under all the names that nnU-Net has for it."""

    @property
    def is_picture(self) -> bool:
        return self.affine is None

    @property
    def configuration(self) -> dict[str, Any]:
        (found,) = self.plans["configurations"].values()
        return found


def read(name: str) -> Golden:
    with safe_open(GOLDENS / f"nnunet_{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        about = json.loads(file.metadata()["json"])
    state = {}
    for key, tensor in tensors.items():
        prefix, _, weight = key.partition(".")
        if prefix != "weights":
            continue
        twin = weight.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        for alias in {weight, twin}:
            state[alias] = tensor
            if alias.startswith("encoder."):
                state[f"decoder.{alias}"] = tensor
    assert len(state) == about["num_names"]
    assert hashlib.sha256("\n".join(sorted(state)).encode()).hexdigest() == about["names_sha256"]
    affine = None if about["affine"] is None else np.array(about["affine"])
    return Golden(tensors, about["plans"], about["dataset"], affine, state)


def checkpoint_of(golden: Golden, **changes: Any) -> dict[str, Any]:
    """What nnU-Net's trainer saves."""
    return {
        "network_weights": golden.state,
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "lrs": [0.01]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {
            "plans": golden.plans, "configuration": next(iter(golden.plans["configurations"])), "fold": 0,
            "dataset_json": golden.dataset, "device": torch.device("cuda", 0),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
        **changes,
    }  # fmt: skip


def write(golden: Golden, folder: Path, *, fold: str = "fold_0", **changes: Any) -> Path:
    """nnU-Net's folder of results."""
    (folder / fold).mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(golden.plans))
    (folder / "dataset.json").write_text(json.dumps(golden.dataset))
    torch.save(checkpoint_of(golden, **changes), folder / fold / "checkpoint_final.pth")
    return folder


def convert_quietly(source: Path, target: Path, **options: Any) -> str:
    """Convert, and return what the user reads."""
    console = Console(file=io.StringIO(), width=200)
    convert(source, target, console, Options(STRICT, **options))
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_logits_at_all_resolutions(name: str, tmp_path: Path) -> None:
    golden = read(name)
    run = tmp_path / "run"
    convert_quietly(write(golden, tmp_path / "nnunet"), run)
    bundle = load_bundle(run)
    expected = [golden.tensors[f"scores.{level}"] for level in range(sum(k[:7] == "scores." for k in golden.tensors))]
    with torch.no_grad():
        torch.testing.assert_close(bundle.model(golden.tensors["patch"]), expected[0], rtol=0, atol=1e-4)
        scores = bundle.model.train()(golden.tensors["patch"])
    assert len(scores) == len(expected) - 1  # the lowest head, whose loss has no weight, is left out
    for ours, theirs in zip(scores, expected, strict=False):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_label_map_through_the_command_line(name: str, tmp_path: Path) -> None:
    """Reading, turning, resampling, normalising, tiling: all but single voxels are as nnU-Net labels them.

    What is different, and tells with random weights in networks as small as these: nnU-Net's weights of a tile lie
    half a voxel beside its middle (the pictures need several tiles), and it clips what a spline overshoots to the range
    of the scan (plain_3d is resampled). With its tile weights 99.9 % of the pictures agree.
    """
    golden = read(name)
    run, output = tmp_path / "run", tmp_path / "labels"
    scan = golden.tensors["scan"].numpy()
    orientation = []
    if golden.is_picture:
        files = [tmp_path / "scan.png"]
        Image.fromarray((scan[0].astype(np.int32) + 32768).astype(np.uint16)).save(files[0])  # the z-score removes this
    else:
        (tmp_path / "scans").mkdir()
        files = [tmp_path / "scans" / f"scan_{number:04d}.nii.gz" for number in range(len(scan))]
        for path, channel in zip(files, scan, strict=True):
            nibabel.save(nibabel.Nifti1Image(channel, golden.affine), path)
        orientation = ["--orientation", FILES]
    main_ok(["convert", str(write(golden, tmp_path / "nnunet")), str(run), *orientation])
    inputs = files[0] if len(files) == 1 else files[0].parent
    main_ok(["predict", str(run), str(inputs), "-o", str(output), "--device", "cpu", "--precision", "fp32"])
    (written,) = [path for path in output.iterdir() if path.name.endswith((".png", ".nii.gz"))]
    label = np.asarray(Image.open(written)) if golden.is_picture else np.asarray(nibabel.load(written).dataobj)
    expected = golden.tensors["label"].numpy()
    assert label.shape == expected.shape
    assert np.bincount(expected.ravel(), minlength=3).min() > 0.15 * expected.size
    assert (label == expected).mean() > AGREEMENT[name]


def main_ok(arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code


def test_the_run_says_what_the_model_is(tmp_path: Path) -> None:
    golden = read("plain_3d")
    said = convert_quietly(write(golden, tmp_path / "nnunet"), tmp_path / "run", orientation="las")
    info = BundleInfo.read(tmp_path / "run")
    assert (info.plan.orientation, info.plan.spacing_mm) == ("LSA", (2.5, 1.0, 0.9))  # (k, j, i) = SAL, then [2, 0, 1]
    assert info.plan.normalisation == ("ct",) and info.plan.intensity == ((-190.0, 215.0, 20.0, 70.0),)
    assert info.plan.patch_size == (8, 16, 16)
    assert info.labels.to_json() == {"background": 0, "liver": 1, "tumour": 2}
    assert (info.channels, info.modality, info.mirror_axes) == (("CT",), "CT", (0, 1))
    assert info.model["name"] == "unet" and info.model["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 1]]
    assert "LAS" in info.plan.reasons["orientation"] and "LSA" in said
    assert "LAS" in (tmp_path / "run" / "plan.yaml").read_text()
    said = convert_quietly(write(golden, tmp_path / "other", trainer_name="MyTrainer"), tmp_path / "run2")
    assert BundleInfo.read(tmp_path / "run2").plan.orientation == "RSA"
    assert "taken to be RAS" in said and "--orientation" in said and "MyTrainer" in said


def test_a_model_of_regions(tmp_path: Path) -> None:
    """The same logits, and labels as nnU-Net's LabelManager paints them: in its order, one region over the other."""
    golden = read("plain_3d")
    golden.dataset["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    golden.dataset["regions_class_order"] = [1, 2, 3]
    assert "3 regions" in convert_quietly(write(golden, tmp_path / "nnunet"), tmp_path / "run")
    bundle = load_bundle(tmp_path / "run")
    assert bundle.info.labels.foreground == ("whole", "core", "enhancing") and bundle.info.labels.ignore == (4,)
    with torch.no_grad():
        logits = bundle.model(golden.tensors["patch"])
    torch.testing.assert_close(logits, golden.tensors["scores.0"], rtol=0, atol=1e-4)
    logits = logits[0] - logits[0].mean((1, 2, 3), keepdim=True)  # so that each region is found somewhere
    expected = torch.zeros(logits.shape[1:], dtype=torch.long)
    for region, value in enumerate(golden.dataset["regions_class_order"]):
        expected[logits[region].sigmoid() > 0.5] = value
    decoded = bundle.info.labels.to_values(bundle.info.labels.decode(logits).numpy())
    assert expected.unique().tolist() == [1, 2, 3] and np.array_equal(decoded, expected.numpy())


def test_each_channel_keeps_its_normalisation(tmp_path: Path) -> None:
    golden = read("residual_3d")
    change("configuration.normalization_schemes", ["ZScoreNormalization", "NoNormalization"])(golden)
    change("configuration.use_mask_for_norm", [True, False])(golden)
    convert_quietly(write(golden, tmp_path / "nnunet"), tmp_path / "run")
    plan = BundleInfo.read(tmp_path / "run").plan
    assert plan.normalisation == ("z-score", "none") and plan.mask_normalisation and plan.crop


def test_plans_before_nnunet_2_4(tmp_path: Path) -> None:
    golden = read("plain_3d")
    arguments = golden.configuration.pop("architecture")["arch_kwargs"]
    assert arguments["features_per_stage"] == [2, 4, 6, 6]
    golden.configuration.update(
        {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 2,
            "unet_max_num_features": 6,
            "conv_kernel_sizes": arguments["kernel_sizes"],
            "pool_op_kernel_sizes": arguments["strides"],
            "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
            "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        }
    )
    convert_quietly(write(golden, tmp_path / "nnunet"), tmp_path / "run")
    with torch.no_grad():
        scores = load_bundle(tmp_path / "run").model(golden.tensors["patch"])
    torch.testing.assert_close(scores, golden.tensors["scores.0"], rtol=0, atol=1e-4)


def change(path: str, value: Any) -> Callable[[Golden], None]:
    """Set a value deep in the descriptions: "dataset.labels.liver"."""

    def apply(golden: Golden) -> None:
        first, *keys, last = path.split(".")
        table = golden.configuration if first == "configuration" else getattr(golden, first)
        for key in keys:
            table = table[key]
        table[last] = value

    return apply


@pytest.mark.parametrize(
    ("name", "changed", "code", "message"),
    [
        ("plain_3d", change("configuration.previous_stage", "3d_lowres"), Code.MODEL, "cascade"),
        ("plain_3d", change("dataset.labels.liver", [1, 2]), Code.CHECKPOINT, "regions_class_order"),
        ("plain_3d", change("dataset.labels.liver", 7), Code.LABEL, "0, 1, 2"),
        ("plain_3d", change("configuration.architecture.network_class_name", "a.b.Primus"), Code.MODEL, "Primus"),
        (
            "plain_3d",
            change("configuration.architecture.arch_kwargs.dropout_op", "Dropout3d"),
            Code.MODEL,
            "dropout_op",
        ),
        ("plain_3d", change("configuration.architecture.arch_kwargs.nonlin", "torch.nn.GELU"), Code.MODEL, "GELU"),
        ("plain_3d", change("configuration.architecture.arch_kwargs.norm_op", "GroupNorm"), Code.MODEL, "GroupNorm"),
        ("plain_3d", change("configuration.architecture.arch_kwargs.nonlin_first", True), Code.MODEL, "nonlin_first"),
        (
            "plain_3d",
            change("configuration.architecture.arch_kwargs.n_conv_per_stage", [1, 2, 2, 2]),
            Code.MODEL,
            "stages",
        ),
        ("plain_3d", change("configuration.architecture.arch_kwargs.norm_op_kwargs", {}), Code.MODEL, "affine"),
        (
            "plain_3d",
            change("configuration.architecture.arch_kwargs.features_per_stage", 4),
            Code.MODEL,
            "another shape",
        ),
        ("residual_3d", change("configuration.architecture.arch_kwargs.block", "BottleneckD"), Code.MODEL, "block"),
        ("residual_3d", change("configuration.normalization_schemes", ["MyNorm"] * 2), Code.MODEL, "MyNorm"),
        ("residual_3d", change("configuration.use_mask_for_norm", [True, False]), Code.MODEL, "use_mask_for_norm"),
        (
            "residual_3d",
            change("configuration.resampling_fn_data", "resample_torch_fornnunet"),
            Code.MODEL,
            "by resample_torch",
        ),
        (
            "plain_3d",
            change("configuration.resampling_fn_probabilities_kwargs", {"order": 0}),
            Code.MODEL,
            "probabilities by",
        ),
        ("residual_3d", change("configuration.preprocessor_name", "Mine"), Code.MODEL, "Mine"),
        ("residual_3d", change("plans.image_reader_writer", "Tiff3DIO"), Code.MODEL, "Tiff3DIO"),
        ("residual_2d", change("plans.image_reader_writer", "SimpleITKIO"), Code.MODEL, "2D networks of volumes"),
        ("residual_3d", change("plans.transpose_forward", [0, 0, 1]), Code.CHECKPOINT, "transpose_forward"),
        ("residual_3d", change("configuration.inherits_from", "3d_fullres"), Code.CHECKPOINT, "itself"),
        ("residual_3d", change("plans.foreground_intensity_properties_per_channel", {}), None, ""),
        ("plain_3d", change("plans.foreground_intensity_properties_per_channel", {}), Code.CHECKPOINT, "KeyError"),
        ("plain_3d", lambda golden: golden.plans.pop("configurations"), Code.CHECKPOINT, "KeyError"),
    ],
)
def test_what_medseg_does_not_have_is_refused_by_name(
    name: str, changed: Callable[[Golden], None], code: Code | None, message: str, tmp_path: Path
) -> None:
    golden = read(name)
    saved = checkpoint_of(golden)
    saved = {**saved, "init_args": copy.deepcopy(saved["init_args"])}
    changed(golden)
    source = tmp_path / "nnunet"
    (source / "fold_0").mkdir(parents=True)
    (source / "plans.json").write_text(json.dumps(golden.plans))
    (source / "dataset.json").write_text(json.dumps(golden.dataset))
    torch.save(saved, source / "fold_0" / "checkpoint_final.pth")
    if code is None:
        convert_quietly(source, tmp_path / "run")
        return
    with pytest.raises(MedsegError, match=message) as refusal:
        convert_quietly(source, tmp_path / "run")
    assert refusal.value.code == code
    assert str(tmp_path) not in str(refusal.value)
    assert not (tmp_path / "run").exists()


class Payload:
    """What a stranger could put into a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/medseg_payload_ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(legacy: bool, tmp_path: Path) -> None:
    source = write(read("plain_2d"), tmp_path / "nnunet")
    path = source / "fold_0" / "checkpoint_final.pth"
    content = checkpoint_of(read("plain_2d"), logging=Payload())
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(MedsegError) as refusal:
        convert_quietly(source, tmp_path / "run")
    assert refusal.value.code == Code.CHECKPOINT
    assert legacy or "mkdir" in str(refusal.value)
    assert not Path("/tmp/medseg_payload_ran").exists()
    assert not (tmp_path / "run").exists()


def test_numbers_of_the_log_are_read_over_and_nothing_stays_allowed(tmp_path: Path) -> None:
    source = write(read("plain_2d"), tmp_path / "nnunet")
    before = set(torch.serialization.get_safe_globals())
    content = read_pth(source / "fold_0" / "checkpoint_final.pth")
    assert not isinstance(content["_best_ema"], float)
    assert content["current_epoch"] == 1000
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no weights", "not a table", "nan", "extra", "missing"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    golden = read("plain_2d")
    source = write(golden, tmp_path / "nnunet")
    path = source / "fold_0" / "checkpoint_final.pth"
    whole = path.read_bytes()
    state = dict(golden.state)
    match damage:
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1")
        case "no weights":
            torch.save({"state_dict": state}, path)
        case "not a table":
            torch.save([1, 2], path)
        case "nan":
            state["decoder.seg_layers.1.bias"] = torch.tensor([0.0, float("nan"), 0.0])
            torch.save(checkpoint_of(golden, network_weights=state), path)
        case "extra":
            state["encoder.stages.0.0.convs.0.norm.running_mean"] = torch.zeros(4)
            torch.save(checkpoint_of(golden, network_weights=state), path)
        case "missing":
            del state["encoder.stages.1.0.convs.1.conv.weight"]
            torch.save(checkpoint_of(golden, network_weights=state), path)
    with pytest.raises(MedsegError) as refusal:
        convert_quietly(source, tmp_path / "run")
    assert refusal.value.code == (Code.MODEL if damage in ("extra", "missing") else Code.CHECKPOINT)
    assert not (tmp_path / "run").exists()


def test_distributed_training_and_batch_normalisation(tmp_path: Path) -> None:
    """Names that begin with "module.", and the running statistics of batch normalisation."""
    golden = read("plain_2d")
    arguments = golden.configuration["architecture"]["arch_kwargs"]
    arguments |= {"norm_op": "torch.nn.modules.batchnorm.BatchNorm2d", "norm_op_kwargs": {"eps": 1e-5}}
    state = {f"module.{name}": tensor for name, tensor in golden.state.items()}
    for name, tensor in golden.state.items():
        if name.endswith(".norm.weight"):
            norm = f"module.{name.removesuffix('.weight')}"
            state |= {f"{norm}.running_mean": tensor + 1, f"{norm}.running_var": tensor + 2}
            state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    convert_quietly(write(golden, tmp_path / "nnunet", network_weights=state), tmp_path / "run")
    first = load_bundle(tmp_path / "run").model.encoder[0].block[0][0]
    weight = golden.state["encoder.stages.0.0.convs.0.norm.weight"]
    assert torch.equal(first.normalisation.running_mean, weight + 1)
    assert torch.equal(first.normalisation.running_var, weight + 2)


def test_which_fold(tmp_path: Path) -> None:
    golden = read("plain_2d")
    source = write(golden, tmp_path / "nnunet")
    (source / "fold_1").mkdir()
    second = source / "fold_1" / "checkpoint_final.pth"
    torch.save(checkpoint_of(golden), second)
    with pytest.raises(MedsegError, match="fold_1/checkpoint_final.pth") as refusal:
        convert_quietly(source, tmp_path / "run")
    assert refusal.value.code == Code.CONFIG
    for number, given in enumerate((second, second.parent)):
        assert "fold_1" in convert_quietly(given, tmp_path / f"run{number}")
    second.rename(second.with_name("checkpoint_best.pth"))
    with pytest.raises(MedsegError, match="no finished training") as refusal:
        convert_quietly(second.parent, tmp_path / "run")
    assert refusal.value.code == Code.MISSING
    convert_quietly(second.with_name("checkpoint_best.pth"), tmp_path / "run")
    (source / "plans.json").unlink()
    with pytest.raises(MedsegError, match="plans.json") as refusal:
        convert_quietly(source / "fold_0", tmp_path / "other")
    assert refusal.value.code == Code.MISSING


def test_a_run_is_not_replaced_unless_told(tmp_path: Path) -> None:
    source = write(read("plain_2d"), tmp_path / "nnunet")
    convert_quietly(source, tmp_path / "run")
    with pytest.raises(MedsegError, match="exist") as refusal:
        convert_quietly(source, tmp_path / "run")
    assert refusal.value.code == Code.OUTPUT
    convert_quietly(source, tmp_path / "run", overwrite=True)
    with pytest.raises(MedsegError, match="folder") as refusal:
        convert_quietly(source, tmp_path / "label.nii.gz")
    assert refusal.value.code == Code.OUTPUT


@pytest.mark.parametrize(
    ("name", "reader", "orientation", "code"),
    [
        ("plain_3d", "SimpleITKIO", "RAX", Code.CONFIG),
        ("plain_3d", "SimpleITKIO", "RLS", Code.CONFIG),
        ("plain_3d", "SimpleITKIO", "RASP", Code.CONFIG),
        ("plain_3d", "NibabelIOWithReorient", "LPS", Code.CONFIG),
        ("plain_2d", "NaturalImage2DIO", "RAS", Code.CONFIG),
        ("plain_3d", "NibabelIOWithReorient", None, None),
    ],
)
def test_orientations(name: str, reader: str, orientation: str | None, code: Code | None, tmp_path: Path) -> None:
    golden = read(name)
    golden.plans["image_reader_writer"] = reader
    source = write(golden, tmp_path / "nnunet")
    if code is None:
        said = convert_quietly(source, tmp_path / "run", orientation=orientation)
        assert "turned the training files to RAS" in said and "--orientation" not in said
        return
    with pytest.raises(MedsegError, match="--orientation") as refusal:
        convert_quietly(source, tmp_path / "run", orientation=orientation)
    assert refusal.value.code == code


def test_options_that_mean_nothing_for_the_input_are_refused(tmp_path: Path) -> None:
    source = write(read("plain_2d"), tmp_path / "nnunet")
    with pytest.raises(MedsegError, match="--separate"):
        convert_quietly(source, tmp_path / "run", separate=True)
    label = tmp_path / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4)), label)
    with pytest.raises(MedsegError, match="--orientation"):
        convert_quietly(label, tmp_path / "label.seg.dcm", orientation="RAS")
