"""Ask the installed nnU-Net for its plans of made-up data sets: the expected values of tests/test_nnunet_plan.py.

    python scripts/make_peers.py && .peers/bin/python scripts/make_nnunet_goldens.py

Writes tests/goldens/nnunet_plans.json. The inputs are fingerprints (spacings and shapes), drawn from a fixed seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(tempfile.mkdtemp())
for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[variable] = str(FOLDER)

import nnunetv2.experiment_planning.experiment_planners.default_experiment_planner as default_planner  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (  # noqa: E402
    residual_encoder_unet_planners as residual,
)

PLANNERS = {
    "nnunet": default_planner.ExperimentPlanner,
    "resenc_m": residual.nnUNetPlannerResEncM,
    "resenc_l": residual.nnUNetPlannerResEncL,
    "resenc_xl": residual.nnUNetPlannerResEncXL,
}
TARGET = Path(__file__).resolve().parent.parent / "tests" / "goldens" / "nnunet_plans.json"


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


def main() -> None:
    """Write the file."""
    goldens = []
    for data in data_sets():
        for preset, planner in PLANNERS.items():
            if preset == "nnunet" or data["name"] in ("cardiac", "large CT", "four MR channels", "random 0"):
                goldens.append({**data, "preset": preset, "plan": plan(planner, data)})
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("[\n" + ",\n".join(json.dumps(golden) for golden in goldens) + "\n]\n", encoding="utf-8")
    print(f"{len(goldens)} plans written to {TARGET.name}")


if __name__ == "__main__":
    main()
