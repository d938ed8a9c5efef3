"""The planner: shapes that fit, reasons for everything, overrides, anisotropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

from medseg.data.plan import Plan, PlanConfig, make_plan
from medseg.data.survey import CaseInfo, ChannelStats, Survey
from medseg.errors import MedsegError
from medseg.labels import Labels
from medseg.models import MODELS

STATS = ChannelStats(-900, 1200, 50.0, 20.0, -80.0, 55.0, 180.0, 1000)


def found(shape=(35, 50, 36), spacing=(1.0, 1.0, 1.0), orientation="RAS", modality="MR", num_cases=5) -> Survey:
    cases = tuple(
        CaseInfo(f"c{i}", shape, spacing, orientation, modality, (100, 10), (STATS,)) for i in range(num_cases)
    )
    return Survey(
        "folders",
        len(shape),
        1,
        ("image",),
        Labels(("background", "organ"), ((0,), (1,))),
        "values found",
        cases,
        shape,
        spacing,
        (STATS,),
    )


def test_axes_are_put_in_model_order() -> None:
    plan = make_plan(found(shape=(100, 80, 20), spacing=(1.0, 1.1, 5.0), orientation="LAS"), PlanConfig(), device="cpu")
    assert plan.orientation == "SPL"
    assert plan.spacing_mm == (5.0, 1.1, 1.0)
    assert plan.patch_size[0] <= 20 and plan.patch_size[2] > plan.patch_size[0]


def test_hippocampus_like() -> None:
    plan = make_plan(found(), PlanConfig(), device="cpu")
    # Shape in model order 36×35... -> S 36, P 50, L 35; three poolings, padded to a multiple of 8
    assert plan.patch_size == (40, 56, 40)
    assert plan.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert plan.widths == (16, 32, 64, 128)
    assert make_plan(found(), PlanConfig(), device="cuda").widths == (32, 64, 128, 256)


def test_coarse_axis_is_neither_pooled_nor_convolved_first() -> None:
    plan = make_plan(found(shape=(256, 256, 24), spacing=(0.7, 0.7, 6.0)), PlanConfig(), device="cuda")
    assert plan.kernels[0] == (1, 3, 3) and plan.strides[1] == (1, 2, 2)
    assert plan.kernels[-1] == (3, 3, 3)


@pytest.mark.parametrize("shape", [(35, 50, 36), (17, 300, 9), (512, 512, 90), (700, 500), (65, 64)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_plan_fits_its_network(shape: tuple[int, ...], device: str) -> None:
    dims = len(shape)
    plan = make_plan(found(shape, (1.0,) * dims, "RAS" if dims == 3 else ""), PlanConfig(), device=device)
    divisor = np.prod(np.array(plan.strides), axis=0)
    assert all(p % d == 0 for p, d in zip(plan.patch_size, divisor, strict=True))
    assert len(plan.widths) == len(plan.strides) == len(plan.kernels)
    settings = {"name": "unet", "widths": [2] * len(plan.widths), "strides": plan.strides, "kernels": plan.kernels}
    model = MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=dims)
    assert model.output_size(plan.patch_size) == plan.patch_size
    assert (
        math.prod(plan.patch_size) <= 3 * {"cpu": {2: 192**2, 3: 45**3}, "cuda": {2: 512**2, 3: 128**3}}[device][dims]
    )


def test_overrides_win_and_say_so() -> None:
    config = PlanConfig(
        spacing_mm=(2.0, 1.0, 1.0),
        patch_size=(16, 32, 32),
        batch_size=7,
        base_width=4,
        num_stages=2,
        normalisation="ct",
    )
    plan = make_plan(found(), config, device="cpu")
    assert (plan.spacing_mm, plan.patch_size, plan.batch_size) == ((2.0, 1.0, 1.0), (16, 32, 32), 7)
    assert plan.widths == (4, 8) and plan.normalisation == "ct"
    assert plan.intensity == ((-80.0, 180.0, 50.0, 20.0),)
    for key in ("spacing_mm", "patch_size", "batch_size", "normalisation"):
        assert "set by data.plan" in plan.reasons[key]
    with pytest.raises(MedsegError, match="the data have 3 axes"):
        make_plan(found(), PlanConfig(patch_size=(16, 16)), device="cpu")


def test_ct_is_recognised() -> None:
    assert make_plan(found(modality="CT"), PlanConfig(), device="cpu").normalisation == "ct"
    assert make_plan(found(modality="MR"), PlanConfig(), device="cpu").normalisation == "z-score"


def test_round_trip_and_reasons_in_the_file(tmp_path) -> None:
    plan = make_plan(found(), PlanConfig(), device="cpu")
    assert Plan.from_json(plan.to_json()) == plan
    plan.write(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert yaml.safe_load(text)["patch_size"] == [40, 56, 40]
    for key, reason in plan.reasons.items():
        assert f"# {reason}\n{key}:" in text
    with pytest.raises(MedsegError, match="incomplete"):
        Plan.from_json({"spatial_dims": 3})
