"""With nnU-Net's presets the plan is nnU-Net's own: against its goldens, and against the installed package."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from medseg.config import compose
from medseg.data.cases import find_cases
from medseg.data.facts import CaseInfo, ChannelStats, Survey
from medseg.data.plan import Plan, PlanConfig, machine_for, make_plan
from medseg.data.survey import survey
from medseg.errors import MedsegError
from medseg.labels import Labels

REPOSITORY = Path(__file__).resolve().parent.parent
PEER = REPOSITORY / ".peers" / "bin" / "python"
GOLDENS: list[dict[str, Any]] = json.loads((REPOSITORY / "tests" / "goldens" / "nnunet_plans.json").read_text())
STATS = ChannelStats(-900, 1200, 50.0, 20.0, -80.0, 55.0, 180.0, 1000)
NAMES = {"fullres": "3d_fullres", "lowres": "3d_lowres", "2d": "2d"}
PEER_PLAN = """
import glob, json, sys
sys.path.insert(0, "scripts")
import make_nnunet_goldens as goldens
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
data = {"spacings": [], "shapes": [], "repeat": 1, "channels": 1, "classes": int(sys.argv[2])}
for path in sorted(glob.glob(sys.argv[1] + "/*.nii.gz")):
    image, properties = goldens.SimpleITKIO().read_images([path])
    data["spacings"].append([float(s) for s in properties["spacing"]])
    data["shapes"].append([int(n) for n in crop_to_nonzero(image)[0].shape[1:]])
print(json.dumps(goldens.plan(goldens.PLANNERS[sys.argv[3]], data)))
"""


def of_golden(golden: dict[str, Any]) -> Survey:
    """Files stored as RAS have nnU-Net's axes (k, j, i) when read backwards."""
    spacings, shapes = (golden[key] * golden["repeat"] for key in ("spacings", "shapes"))
    is_picture = golden["name"] == "pictures"
    first = 1 if is_picture else 0  # nnU-Net gives pictures a third axis
    cases = tuple(
        CaseInfo(
            f"c{number}",
            tuple(shape[first:] if is_picture else shape[::-1]),
            tuple(spacing[first:] if is_picture else spacing[::-1]),
            "" if is_picture else "RAS",
            "MR",
            (100,) * golden["classes"],
            (STATS,) * golden["channels"],
            tuple(shape[first:] if is_picture else shape[::-1]),
        )
        for number, (spacing, shape) in enumerate(zip(spacings, shapes, strict=True))
    )
    count = golden["classes"]
    return Survey(
        layout="made up",
        spatial_dims=3 - first,
        num_channels=golden["channels"],
        channel_names=("MR",) * golden["channels"],
        labels=Labels(tuple(f"class {n}" for n in range(count)), tuple((n,) for n in range(count))),
        labels_from="made up",
        cases=cases,
        median_shape=cases[0].shape,
        median_spacing_mm=cases[0].spacing_mm,
        intensity=(STATS,) * golden["channels"],
    )


def planned(found: Survey, config: PlanConfig, model: str = "unet") -> Plan:
    return make_plan(found, config, machine_for(found, config, device="cuda", model={"name": model}))


def check(plan: Plan, expected: dict[str, Any]) -> None:
    """Compare with a configuration of nnU-Net; one of its 2D networks is one of ours in 3D, one voxel thick."""
    thin = plan.spatial_dims - len(expected["patch_size"])
    assert plan.spacing_mm[thin:] == pytest.approx(expected["spacing_mm"], abs=1e-6)
    assert plan.patch_size == (1,) * thin + tuple(expected["patch_size"])
    for key in ("kernels", "strides"):
        assert getattr(plan, key) == tuple((1,) * thin + tuple(stage) for stage in expected[key]), key
    assert (plan.batch_size, list(plan.widths)) == (expected["batch_size"], expected["widths"])


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: f"{g['name']}-{g['preset']}")
def test_the_plan_is_nnunets_own(golden: dict[str, Any]) -> None:
    found, preset = of_golden(golden), golden["preset"]
    for ours, theirs in NAMES.items():
        if found.spatial_dims == 2:
            ours, theirs = "fullres", "2d"
        config = PlanConfig(preset=preset, configuration=ours)
        if theirs not in golden["plan"]:
            with pytest.raises(MedsegError, match="a patch sees enough"):
                planned(found, config)
            continue
        plan = planned(found, config)
        check(plan, golden["plan"][theirs])
        if found.spatial_dims == 3:
            assert plan.orientation == "".join("SPL"[axis] for axis in golden["plan"]["order"])


def test_files_stored_otherwise_keep_nnunets_order() -> None:
    """nnU-Net takes axes as files hold them: of coronal stacks (k from front to back) the second of ours is first."""
    golden = next(g for g in GOLDENS if g["name"] == "prostate" and g["preset"] == "nnunet")
    found = of_golden(golden)
    turned = Survey(**{**vars(found), "cases": tuple(_stored_as(case, "RSA") for case in found.cases)})
    plan = planned(turned, PlanConfig(preset="nnunet"))
    assert plan.orientation == "PSL"
    check(plan, golden["plan"]["3d_fullres"])


def _stored_as(case: CaseInfo, orientation: str) -> CaseInfo:
    return CaseInfo(**{**vars(case), "orientation": orientation})


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        ("nnunet", "unet"),
        ("M", "residual_encoder_unet"),
        ("L", "residual_encoder_unet"),
        ("XL", "residual_encoder_unet"),
    ],
)
def test_presets_choose_plan_and_network(preset: str, model: str) -> None:
    experiment = compose("train", [f"preset={preset}"])
    assert experiment.model["name"] == model
    assert experiment.data.plan.preset == ("nnunet" if preset == "nnunet" else f"resenc_{preset.lower()}")
    plan = planned(of_golden(next(g for g in GOLDENS if g["name"] == "hippocampus")), experiment.data.plan, model)
    assert plan.patch_size == (40, 56, 40) and plan.widths == (32, 64, 128, 256)
    assert preset != "nnunet" or plan.batch_size == 9  # as nnU-Net publishes it


def test_keys_override_a_preset() -> None:
    golden = next(g for g in GOLDENS if g["name"] == "prostate" and g["preset"] == "nnunet")
    config = PlanConfig(preset="nnunet", patch_size=(16, 128, 128), base_width=8, num_stages=4, batch_size=3)
    plan = planned(of_golden(golden), config)
    assert (plan.patch_size, plan.batch_size, plan.widths) == ((16, 128, 128), 3, (8, 16, 32, 64))
    for key in ("patch_size", "batch_size", "widths", "strides"):
        assert "data.plan" in plan.reasons[key]


@pytest.mark.data
@pytest.mark.parametrize("preset", ["nnunet", "resenc_l"])
def test_hippocampus_as_the_installed_nnunet_plans_it(preset: str, real_data: Path) -> None:
    if not PEER.is_file():
        pytest.skip("the peer is not installed: scripts/make_peers.py")
    folder = real_data / "segmentation" / "hippocampus"
    found = survey(find_cases(folder), num_threads=2)
    images = str(folder / "images")
    command = [str(PEER), "-c", PEER_PLAN, images, str(found.labels.num_classes), preset]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300)
    expected = json.loads(answer.stdout.splitlines()[-1])
    for configuration in ("fullres", "2d"):
        plan = planned(found, PlanConfig(preset=preset, configuration=configuration))
        check(plan, expected[NAMES[configuration]])
    assert plan.orientation == "".join("SPL"[axis] for axis in expected["order"])
