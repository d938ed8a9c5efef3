"""Ask the installed nnU-Net for the expected values of tests/test_nnunet_plan.py and test_nnunet_weights.py.

    python scripts/make_peers.py && .peers/bin/python scripts/make_nnunet_goldens.py

Writes tests/goldens/nnunet_plans.json: its plans of made-up data sets, whose fingerprints (spacings and shapes) are
drawn from a fixed seed. And tests/goldens/nnunet_*.safetensors: tiny networks that it builds, with random weights, what
they answer to a patch, and what it predicts with them for a scan.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import scipy.ndimage
import torch
from safetensors.torch import save_file

FOLDER = Path(tempfile.mkdtemp())
for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[variable] = str(FOLDER)

import nnunetv2.experiment_planning.experiment_planners.default_experiment_planner as default_planner  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (  # noqa: E402
    residual_encoder_unet_planners as residual,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO  # noqa: E402
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans  # noqa: E402

PLANNERS = {
    "nnunet": default_planner.ExperimentPlanner,
    "resenc_m": residual.nnUNetPlannerResEncM,
    "resenc_l": residual.nnUNetPlannerResEncL,
    "resenc_xl": residual.nnUNetPlannerResEncXL,
}
GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
TARGET = GOLDENS / "nnunet_plans.json"


def data_sets() -> list[dict]:
    """Fingerprints like those of known data sets, and random ones."""
    rng = np.random.default_rng(0)

    def constant(name: str, count: int, spacing: list[float], shape: list[int], channels: int, classes: int) -> dict:
        return {
            "name": name, "spacings": [spacing], "shapes": [shape],
            "repeat": count,
            "channels": channels, "classes": classes,
        }  # fmt: skip

    found = [
        constant("hippocampus", 260, [1.0, 1.0, 1.0], [36, 50, 35], 1, 3),
        constant("prostate", 30, [3.6, 0.62, 0.62], [20, 320, 320], 2, 3),
        constant("cardiac", 20, [10.0, 1.5, 1.5], [9, 237, 208], 1, 4),
        constant("large CT", 131, [1.0, 0.77, 0.77], [482, 512, 512], 1, 3),
        constant("huge CT", 40, [0.5, 0.4, 0.4], [1500, 512, 512], 1, 60),
        constant("pictures", 24, [999.0, 1.0, 1.0], [1, 512, 512], 1, 2),
        constant("four MR channels", 484, [1.0, 1.0, 1.0], [140, 171, 137], 4, 4),
    ]
    found[2] |= {
        "spacings": [[10.0, 1.5, 1.5]] * 15 + [[5.0, 1.5, 1.5]] * 5,
        "shapes": found[2]["shapes"] * 20,
        "repeat": 1,
    }
    for number in range(12):
        count = int(rng.integers(3, 12))
        spacings = np.exp(rng.uniform(-1, 1.8, 3)) * np.exp(rng.normal(0, 0.1, (count, 3)))
        shapes = np.maximum(np.exp(rng.uniform(2.5, 6, 3)) * np.exp(rng.normal(0, 0.1, (count, 3))), 8)
        found.append(
            {
                "name": f"random {number}", "repeat": 1,
                "spacings": spacings.round(4).tolist(), "shapes": shapes.astype(int).tolist(),
                "channels": int(rng.integers(1, 4)), "classes": int(rng.integers(2, 20)),
            }
        )  # fmt: skip
    return found


def plan(planner: type, data: dict) -> dict:
    """nnU-Net's own plan of a fingerprint."""
    folder = FOLDER / "Dataset001_Made"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*Plans.json"):  # it would merge its configurations into the new ones
        old.unlink()
    labels = {"background": 0} | {f"class {value}": value for value in range(1, data["classes"])}
    description = {
        "channel_names": {str(channel): "MR" for channel in range(data["channels"])},
        "labels": labels, "numTraining": len(data["shapes"]) * data["repeat"], "file_ending": ".nii.gz",
    }  # fmt: skip
    fingerprint = {
        "spacings": data["spacings"], "shapes_after_crop": data["shapes"] * data["repeat"],
        "median_relative_size_after_cropping": 1.0, "foreground_intensity_properties_per_channel": {},
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    default_planner.get_filenames_of_train_images_and_targets = lambda *_, **__: {}
    default_planner.shutil.copy = lambda *_, **__: None
    default_planner.ExperimentPlanner.determine_reader_writer = lambda self: type("Reader", (), {})
    with contextlib.redirect_stdout(io.StringIO()):
        plans = planner(1).plan_experiment()
    found = {"order": plans["transpose_forward"]}
    for name in ("2d", "3d_fullres", "3d_lowres"):
        configuration = plans["configurations"].get(name)
        if configuration is not None:
            network = configuration["architecture"]["arch_kwargs"]
            found[name] = {
                "spacing_mm": [float(s) for s in configuration["spacing"]],
                "patch_size": [int(p) for p in configuration["patch_size"]],
                "batch_size": int(configuration["batch_size"]),
                "strides": network["strides"],
                "kernels": network["kernel_sizes"],
                "widths": network["features_per_stage"],
                "blocks": network.get("n_conv_per_stage", network.get("n_blocks_per_stage")),
                "decoder_blocks": network["n_conv_per_stage_decoder"],
            }
    return found


def networks() -> dict[str, dict]:
    """Tiny networks with kernels and strides that differ between axes, and the scans to predict."""
    volume = {"kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]], "patch_size": [8, 16, 16]}
    picture = {"kernels": [[3, 3], [3, 1], [3, 3]], "strides": [[1, 1], [2, 1], [2, 2]], "patch_size": [24, 16]}
    ct, mr = ["CTNormalization"], ["ZScoreNormalization"] * 2
    return {
        "plain_2d": {
            **picture, "widths": [4, 6, 8], "n_conv_per_stage": [2, 2, 2], "decoder": [2, 2],
            "schemes": ["ZScoreNormalization"], "names": ["gray"], "spacing": [1.0, 1.0], "shape": [30, 41],
            "order": [0, 1, 2],
        },
        "plain_3d": {
            **volume, "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 1]],
            "widths": [2, 4, 6, 6], "n_conv_per_stage": [2, 2, 2, 2], "decoder": [2, 2, 2],
            "schemes": ct, "names": ["CT"], "spacing": [2.5, 1.0, 0.9], "shape": [7, 13, 16], "order": [2, 0, 1],
        },
        "residual_2d": {
            **picture, "widths": [4, 6, 8], "n_blocks_per_stage": [1, 3, 2], "decoder": [1, 1],
            "schemes": ["ZScoreNormalization"], "names": ["gray"], "spacing": [1.0, 1.0], "shape": [30, 41],
            "order": [0, 1, 2],
        },
        "residual_3d": {
            **volume, "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]],
            "widths": [2, 4, 4, 6], "n_blocks_per_stage": [1, 2, 2, 1], "decoder": [1, 1, 1],
            "schemes": mr, "names": ["T1", "T2"], "spacing": [3.0, 1.2, 1.2], "shape": [14, 16, 7], "order": [0, 1, 2],
        },
    }  # fmt: skip


def plans_of(name: str, made: dict) -> tuple[dict, dict]:
    """plans.json and dataset.json of a made network, in nnU-Net's form."""
    dims = len(made["patch_size"])
    blocks = "n_conv_per_stage" if name.startswith("plain") else "n_blocks_per_stage"
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet."
        + ("PlainConvUNet" if name.startswith("plain") else "ResidualEncoderUNet"),
        "arch_kwargs": {
            "n_stages": len(made["widths"]), "features_per_stage": made["widths"],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d", "kernel_sizes": made["kernels"],
            "strides": made["strides"], blocks: made[blocks], "n_conv_per_stage_decoder": made["decoder"],
            "conv_bias": True, "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "made", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": made["patch_size"], "spacing": made["spacing"], "normalization_schemes": made["schemes"],
        "use_mask_for_norm": [False] * len(made["schemes"]), "batch_dice": False, "architecture": architecture,
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
    }  # fmt: skip
    intensity = {"mean": 20.0, "std": 70.0, "percentile_00_5": -190.0, "percentile_99_5": 215.0, "median": 20.0,
                 "min": -200.0, "max": 250.0}  # fmt: skip
    order = made["order"]
    plans = {
        "dataset_name": "Dataset001_Made", "plans_name": "nnUNetPlans", "transpose_forward": order,
        "transpose_backward": [order.index(axis) for axis in range(3)], "label_manager": "LabelManager",
        "image_reader_writer": "NaturalImage2DIO" if dims == 2 else "SimpleITKIO",
        "configurations": {"2d" if dims == 2 else "3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {str(c): intensity for c in range(len(made["names"]))},
    }  # fmt: skip
    dataset = {
        "channel_names": {str(c): channel for c, channel in enumerate(made["names"])},
        "labels": {"background": 0, "liver": 1, "tumour": 2}, "numTraining": 5,
        "file_ending": ".png" if dims == 2 else ".nii.gz",
    }  # fmt: skip
    return plans, dataset


def affine_of(made: dict) -> np.ndarray:
    """A scan's affine: axes to the left, anterior and superior, turned; spacing near the network's, in file order."""
    order = made["order"]
    spacing = np.empty(3)
    spacing[order] = made["spacing"]  # along (k, j, i)
    if made["order"] != [0, 1, 2]:
        spacing[order] *= (1.0, 0.9, 1.2)  # something to resample
    turn = np.deg2rad(12)
    rotation = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-1.0, 1.0, 1.0]) @ np.diag(spacing[::-1])
    affine[:3, 3] = (31.0, -17.0, 5.0)
    return affine


def scan_of(made: dict, rng: np.random.Generator) -> np.ndarray:
    """A smooth random scan, int16, shape (channels, *shape), in file order; no voxel is 0 (nnU-Net would crop)."""
    noise = rng.normal(size=(len(made["names"]), *made["shape"]))
    smooth = np.stack([scipy.ndimage.gaussian_filter(channel, 2.0) for channel in noise])
    smooth = (smooth / smooth.std() * 80).round().astype(np.int16)
    smooth[smooth == 0] = 1
    return smooth


def nnunet_prediction(plans: dict, dataset: dict, weights: dict, scan: np.ndarray, made: dict) -> np.ndarray:
    """The label map that nnU-Net's own predictor gives for a scan, in file order."""
    run = Path(tempfile.mkdtemp())
    (run / "plans.json").write_text(json.dumps(plans))
    (run / "dataset.json").write_text(json.dumps(dataset))
    (run / "fold_0").mkdir()
    checkpoint = {
        "network_weights": weights, "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": next(iter(plans["configurations"]))}, "inference_allowed_mirroring_axes": None,
    }  # fmt: skip
    torch.save(checkpoint, run / "fold_0" / "checkpoint_final.pth")
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(run), (0,))
    if scan.ndim == 3:  # a picture
        return predictor.predict_single_npy_array(scan[:, None].astype(np.float32), {"spacing": (999, 1, 1)})[0]
    files = []
    for number, channel in enumerate(scan):
        image = nibabel.Nifti1Image(channel, affine_of(made))
        files.append(str(run / f"scan_{number:04d}.nii.gz"))
        nibabel.save(image, files[-1])
    array, properties = SimpleITKIO().read_images(files)
    return predictor.predict_single_npy_array(array, properties).transpose(2, 1, 0)


def write_network(name: str, made: dict, seed: int) -> None:
    """One network's golden: weights, a patch, its scores at all resolutions, a scan, its label map."""
    plans, dataset = plans_of(name, made)
    (configuration,) = plans["configurations"].values()
    architecture = configuration["architecture"]
    torch.manual_seed(seed)
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
        len(made["names"]), len(dataset["labels"]), deep_supervision=True,
    )  # fmt: skip
    with torch.no_grad():
        for weight, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(weight.endswith("norm.weight") + 0.2 * torch.randn_like(parameter))
        patch = torch.randn(1, len(made["names"]), *made["patch_size"])
        smooth = patch if len(made["patch_size"]) == 2 else torch.nn.functional.avg_pool3d(patch, 3, 1, 1) * 3
        head = network.decoder.seg_layers[-1]
        head.bias -= network(smooth)[0].mean(dim=(0, *range(2, smooth.ndim)))  # so that each class wins somewhere
        scores = network(patch)
    state = network.state_dict()
    scan = scan_of(made, np.random.default_rng(seed))
    with contextlib.redirect_stdout(io.StringIO()):
        label = nnunet_prediction(plans, dataset, state, scan, made)
    first = {}  # nnU-Net registers each weight under up to four names
    for weight, tensor in state.items():
        first.setdefault(tensor.data_ptr(), (weight, tensor))
    tensors = {f"weights.{weight}": tensor.contiguous() for weight, tensor in first.values()}
    tensors |= {"patch": patch, "scan": torch.from_numpy(scan), "label": torch.from_numpy(label.astype(np.uint8))}
    tensors |= {f"scores.{level}": score.contiguous() for level, score in enumerate(scores)}
    metadata = {
        "plans": plans, "dataset": dataset, "num_names": len(state),
        "names_sha256": hashlib.sha256("\n".join(sorted(state)).encode()).hexdigest(),
        "affine": affine_of(made).tolist() if scan.ndim == 4 else None,
    }  # fmt: skip
    path = GOLDENS / f"nnunet_{name}.safetensors"
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, path, {"json": json.dumps(metadata)})
    shares = np.bincount(label.ravel(), minlength=3) / label.size
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {len(first)} of {len(state)} names, classes {shares}")


def count_weights(golden: dict, name: str) -> dict:
    """How many weights nnU-Net's residual-encoder network of a golden plan has."""
    planned = golden["plan"][name]
    made = {
        **planned, "n_blocks_per_stage": planned["blocks"], "decoder": planned["decoder_blocks"],
        "schemes": [], "names": ["MR"] * golden["channels"], "spacing": planned["spacing_mm"], "order": [0, 1, 2],
    }  # fmt: skip
    architecture = next(iter(plans_of("residual", made)[0]["configurations"].values()))["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
        golden["channels"], golden["classes"], allow_init=False, deep_supervision=True,
    )  # fmt: skip
    lowest = network.decoder.seg_layers[0]
    return {
        "channels": golden["channels"], "classes": golden["classes"], "plan": planned,
        "weights": sum(p.numel() for p in network.parameters()),
        "weights_of_lowest_head": sum(p.numel() for p in lowest.parameters()),
    }  # fmt: skip


def main() -> None:
    """Write the files."""
    for seed, (name, made) in enumerate(networks().items()):
        write_network(name, made, seed)
    goldens = []
    for data in data_sets():
        for preset, planner in PLANNERS.items():
            if preset == "nnunet" or data["name"] in ("cardiac", "large CT", "four MR channels", "random 0"):
                goldens.append({**data, "preset": preset, "plan": plan(planner, data)})
    counts = [
        count_weights(golden, name)
        for golden in goldens
        for name in ("2d", "3d_fullres")
        if golden["preset"] == "resenc_m" and golden["name"] in ("cardiac", "four MR channels")
    ]
    (GOLDENS / "nnunet_weight_counts.json").write_text(
        "[\n" + ",\n".join(json.dumps(count) for count in counts) + "\n]\n", encoding="utf-8"
    )
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("[\n" + ",\n".join(json.dumps(golden) for golden in goldens) + "\n]\n", encoding="utf-8")
    print(f"{len(goldens)} plans written to {TARGET.name}")


if __name__ == "__main__":
    main()
