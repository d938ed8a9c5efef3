"""The same arrays as nnU-Net's own preprocessor, which runs in the peers' environment (scripts/make_peers.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from medseg.data.plan import Plan
from medseg.data.preprocess import covered_box, prepare_image, prepare_label
from medseg.volume import Grid, Volume

PEERS = Path(__file__).resolve().parent.parent / ".peers" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
SCHEMES = {
    "z-score": "ZScoreNormalization",
    "ct": "CTNormalization",
    "rescale": "RescaleTo01Normalization",
    "none": "NoNormalization",
}
INTENSITY = (-190.0, 215.0, 20.0, 70.0)
SPACING = (2.0, 0.9, 0.8)
CASES: dict[str, dict[str, Any]] = {
    "CT": {"spacing": (2.0, 1.2, 1.1), "schemes": ["ct"], "body": False},
    "CT with far slices": {"spacing": (5.0, 0.7, 0.7), "schemes": ["ct"], "body": False},
    "fewer slices": {"spacing": (0.5, 0.8, 0.9), "schemes": ["ct"], "body": False, "target": (5.0, 1.0, 1.0)},
    "far columns": {"spacing": (0.9, 0.8, 4.0), "schemes": ["z-score"], "body": False, "target": (1.0, 1.0, 3.0)},
    "two far axes": {"spacing": (4.0, 4.0, 1.0), "schemes": ["z-score"], "body": False, "target": (2.0, 2.0, 1.0)},
    "MR, cropped and masked": {"spacing": (1.5, 1.1, 1.0), "schemes": ["z-score", "z-score"], "body": True},
    "MR, cropped": {"spacing": (1.5, 1.1, 1.0), "schemes": ["z-score", "rescale"], "body": True, "mask": False},
    "as it is": {"spacing": SPACING, "schemes": ["none"], "body": True},
    "slice by slice": {"spacing": (3.0, 1.1, 1.0), "schemes": ["z-score"], "body": False, "flat": True},
}
PEER = """
    import sys, os
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = sys.argv[1]
    import json, contextlib, io
    import numpy as np
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    for name, made in json.load(open(sys.argv[1] + "/cases.json")).items():
        resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        low, high, mean, std = made["intensity"]
        numbers = {"mean": mean, "std": std, "percentile_00_5": low, "percentile_99_5": high}
        configuration = {
            "architecture": {}, "data_identifier": "made", "preprocessor_name": "DefaultPreprocessor",
            "spacing": made["target"],
            "normalization_schemes": made["schemes"], "use_mask_for_norm": made["mask"],
            "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        }
        plans = PlansManager({
            "dataset_name": "Dataset001_Made", "plans_name": "p", "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2], "label_manager": "LabelManager", "configurations": {"c": configuration},
            "foreground_intensity_properties_per_channel": {str(c): numbers for c in range(len(made["schemes"]))},
        })
        dataset = {"channel_names": {}, "labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii"}
        arrays = np.load(made["file"])
        image, label, properties = DefaultPreprocessor(verbose=False).run_case_npy(
            arrays["image"], arrays["label"][None].astype(np.int16), {"spacing": made["spacing"]}, plans,
            plans.get_configuration("c"), dataset,
        )
        np.savez(made["file"] + ".done.npz", image=image, label=label[0],
                 box=properties["bbox_used_for_cropping"])
"""


def made(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A smooth scan with a body amid zeros, if asked for, a hole of zeros in it, and organs."""
    case = CASES[name]
    shape = (24, 40, 36)
    rng = np.random.default_rng(sorted(CASES).index(name))
    image = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1.5) * 900 for _ in case["schemes"]])
    z, y, x = np.ogrid[-1:1:24j, -1:1:40j, -1:1:36j]
    if case["body"]:
        body = (z / 0.8) ** 2 + ((y - 0.1) / 0.6) ** 2 + (x / 0.7) ** 2 < 1
        hole = z**2 + (y - 0.1) ** 2 + x**2 < 0.01
        image[:, ~body | hole] = 0
    label = ((z / 0.5) ** 2 + ((y - 0.1) / 0.3) ** 2 + (x / 0.4) ** 2 < 1).astype(np.uint8)
    label[(z - 0.1) ** 2 + (y - 0.1) ** 2 + (x + 0.1) ** 2 < 0.03] = 2
    return image.astype(np.float32), label


def plan_of(name: str) -> Plan:
    case = CASES[name]
    channels, flat = len(case["schemes"]), case.get("flat", False)
    return Plan(
        preset="nnunet",
        configuration="2d" if flat else "fullres",
        spatial_dims=3,
        num_channels=channels,
        orientation="SPL",
        spacing_mm=case.get("target", SPACING),
        crop=True,
        normalisation=tuple(case["schemes"]),
        mask_normalisation=case["body"] and case.get("mask", True),
        intensity=(INTENSITY,) * channels,
        patch_size=(1 if flat else 8, 8, 8),
        batch_size=2,
        widths=(2, 4),
        kernels=((1 if flat else 3, 3, 3),) * 2,
        strides=((1, 1, 1), (1 if flat else 2, 2, 2)),
        memory_gb=1.0,
        reasons={},
    )


@pytest.fixture(scope="module")
def peers_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not PEERS.exists():
        pytest.skip("nnU-Net is not there: python scripts/make_peers.py")
    folder = tmp_path_factory.mktemp("nnunet")
    asked = {}
    for number, name in enumerate(CASES):
        plan = plan_of(name)
        image, label = made(name)
        np.savez(folder / f"{number}.npz", image=image, label=label)
        target = list(plan.spacing_mm)
        asked[name] = {
            "file": str(folder / f"{number}.npz"),
            "spacing": CASES[name]["spacing"],
            "target": target[1:] if plan.configuration == "2d" else target,
            "schemes": [SCHEMES[scheme] for scheme in plan.normalisation],
            "mask": [plan.mask_normalisation] * plan.num_channels,
            "intensity": INTENSITY,
        }
    (folder / "cases.json").write_text(json.dumps(asked), encoding="utf-8")
    command = [str(PEERS), "-c", textwrap.dedent(PEER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: np.load(case["file"] + ".done.npz") for name, case in asked.items()}


@pytest.mark.parametrize("name", CASES)
def test_image_label_and_box_are_nnunets(name: str, peers_answers: dict[str, Any]) -> None:
    theirs = peers_answers[name]
    image, label = made(name)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]) @ np.diag(CASES[name]["spacing"])
    scan = Volume(image, Grid(label.shape, affine))
    assert scan.grid.orientation == "SPL"
    plan = plan_of(name)
    ours, grid = prepare_image(scan, plan)
    box = covered_box(grid, scan.grid)
    assert [[s.start, s.stop] for s in box] == theirs["box"].tolist()
    assert ours.shape == theirs["image"].shape
    for channel, other in zip(ours.numpy(), theirs["image"], strict=True):
        assert np.abs(channel - other).max() <= 1e-4 * max(1.0, float(other.std()))
    indices = prepare_label(Volume(label, scan.grid), plan, 3, grid).numpy()
    differ = (indices != theirs["label"].clip(0)).mean()
    assert differ <= 2e-3, f"{differ:.2%}"  # where two classes have the same share either may win
    assert set(np.unique(indices)) == set(np.unique(theirs["label"].clip(0)))
