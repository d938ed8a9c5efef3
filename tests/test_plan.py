"""The planner: shapes that fit, reasons for everything, overrides, anisotropy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import yaml

from medseg.data.facts import CaseInfo, ChannelStats, Survey
from medseg.data.plan import Plan, PlanConfig, machine_for
from medseg.data.plan import make_plan as plan_for
from medseg.errors import MedsegError
from medseg.labels import Labels
from medseg.models import MODELS

STATS = ChannelStats(-900, 1200, 50.0, 20.0, -80.0, 55.0, 180.0, 1000)


def found(shape=(35, 50, 36), spacing=(1.0, 1.0, 1.0), orientation="RAS", modality="MR", num_cases=5) -> Survey:
    cases = tuple(
        CaseInfo(f"c{i}", shape, spacing, orientation, modality, (100, 10), (STATS,), shape) for i in range(num_cases)
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


def make_plan(survey: Survey, config: PlanConfig, *, device: str) -> Plan:
    """A plan for a machine with memory enough, whatever this one has."""
    machine = machine_for(survey, dataclasses.replace(config, memory_gb=config.memory_gb or 1000), device=device)
    return plan_for(survey, config, machine)


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
    assert plan.widths == (4, 8) and plan.normalisation == ("ct",)
    assert plan.intensity == ((-80.0, 180.0, 50.0, 20.0),)
    for key in ("spacing_mm", "patch_size", "batch_size", "normalisation"):
        assert "set by data.plan" in plan.reasons[key]
    with pytest.raises(MedsegError, match="the data have 3 axes"):
        make_plan(found(), PlanConfig(patch_size=(16, 16)), device="cpu")


def test_ct_is_recognised() -> None:
    assert make_plan(found(modality="CT"), PlanConfig(), device="cpu").normalisation == ("ct",)
    assert make_plan(found(modality="MR"), PlanConfig(), device="cpu").normalisation == ("z-score",)


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


@pytest.mark.parametrize("preset", ["auto", "nnunet", "resenc_m"])
@pytest.mark.parametrize("kind", ["fullres", "lowres", "2d"])
def test_every_value_has_a_reason(preset: str, kind: str) -> None:
    plan = make_plan(found((400, 380, 300)), PlanConfig(preset=preset, configuration=kind), device="cpu")
    assert {field.name for field in dataclasses.fields(Plan)} == {*plan.reasons, "reasons"}
    assert all(plan.reasons.values())


def test_low_resolution_sees_more() -> None:
    full = make_plan(found((400, 380, 300)), PlanConfig(), device="cuda")
    low = make_plan(found((400, 380, 300)), PlanConfig(configuration="lowres"), device="cuda")
    assert full.configuration == "fullres" and "configuration=lowres sees more" in full.reasons["configuration"]
    assert low.configuration == "lowres" and min(low.spacing_mm) > 1.0
    shape = np.array((300, 380, 400)) / low.spacing_mm
    assert math.prod(low.patch_size) / np.prod(shape) >= 0.25
    with pytest.raises(MedsegError, match="of no use here"):
        make_plan(found(), PlanConfig(configuration="lowres"), device="cuda")


def test_slices_are_a_flat_network_in_3d() -> None:
    coronal = found((200, 30, 220), (1.0, 4.0, 1.0))
    plan = make_plan(coronal, PlanConfig(configuration="2d"), device="cpu")
    assert plan.orientation == "PSL" and plan.spacing_mm == (4.0, 1.0, 1.0)  # the coarsest axis stacks the slices
    assert plan.spatial_dims == 3 and plan.patch_size[0] == 1 and min(plan.patch_size[1:]) > 100
    assert {stage[0] for stage in (*plan.kernels, *plan.strides)} == {1}
    assert make_plan(coronal, PlanConfig(), device="cpu").orientation == "SPL"
    one = make_plan(found((200, 220, 1), (1.0, 1.0, 1.0)), PlanConfig(), device="cpu")
    assert one.configuration == "2d" and one.orientation == "SPL" and one.patch_size[0] == 1
    with pytest.raises(MedsegError, match="one voxel thick"):
        make_plan(coronal, PlanConfig(configuration="2d", patch_size=(4, 64, 64)), device="cpu")


def test_each_channel_has_its_normalisation() -> None:
    data = dataclasses.replace(found(), num_channels=3, channel_names=("CT", "T1", "noNorm"), intensity=(STATS,) * 3)
    assert make_plan(data, PlanConfig(), device="cpu").normalisation == ("ct", "z-score", "none")
    config = PlanConfig(normalisation=("z-score", "rescale", "none"))
    assert make_plan(data, config, device="cpu").normalisation == ("z-score", "rescale", "none")
    assert make_plan(data, PlanConfig(normalisation="none"), device="cpu").normalisation == ("none",) * 3
    with pytest.raises(MedsegError, match="3 channel"):
        make_plan(data, PlanConfig(normalisation=("ct", "ct")), device="cpu")


@pytest.mark.parametrize(("edge", "crop", "masked"), [(50, False, False), (45, True, False), (35, True, True)])
def test_borders_of_zeros(edge: int, crop: bool, masked: bool) -> None:
    """Cut off beyond 5 %; a masked z-score beyond 25 %, as nnU-Net. What is planned for is what remains."""
    data = found((50, 50, 50))
    data = dataclasses.replace(
        data, cases=tuple(dataclasses.replace(case, nonzero_shape=(edge, 50, 50)) for case in data.cases)
    )
    plan = make_plan(data, PlanConfig(), device="cuda")
    assert (plan.crop, plan.mask_normalisation) == (crop, masked)
    assert f"50×50×{edge if crop else 50}" in plan.reasons["patch_size"]
    off = make_plan(data, PlanConfig(crop=False, mask_normalisation=False), device="cuda")
    assert not off.crop and not off.mask_normalisation and "50×50×50" in off.reasons["patch_size"]
    ct = dataclasses.replace(data, cases=tuple(dataclasses.replace(case, modality="CT") for case in data.cases))
    assert not make_plan(ct, PlanConfig(), device="cuda").crop  # 0 is water
    assert make_plan(ct, PlanConfig(preset="nnunet"), device="cuda").crop


def test_orientation_can_be_set() -> None:
    plan = make_plan(found((35, 50, 36)), PlanConfig(orientation="ras"), device="cpu")
    assert plan.orientation == "RAS" and "35×50×36" in plan.reasons["patch_size"]
    with pytest.raises(MedsegError, match="no orientation of three axes"):
        make_plan(found(), PlanConfig(orientation="RAA"), device="cpu")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"patch_size": (40, 56)}, "plan.patch_size"),
        ({"widths": (16, 32)}, "plan.kernels"),
        ({"normalisation": ("ct", "ct")}, "plan.normalisation"),
        ({"batch_size": 0}, "plan.batch_size"),
        ({"configuration": "2d"}, "plan.patch_size"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "plan.spacing_mm"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(change: dict[str, object], where: str) -> None:
    plan = make_plan(found(), PlanConfig(), device="cpu")
    with pytest.raises(MedsegError, match="does not fit") as refusal:
        dataclasses.replace(plan, **change)  # type: ignore[arg-type]
    assert refusal.value.where == where


def test_pictures_have_no_spacing() -> None:
    pictures = found((96, 80), (1.0, 1.0), "", None)
    with pytest.raises(MedsegError, match=r"pictures are not resampled(.|\n)*data.plan.spacing_mm"):
        make_plan(pictures, PlanConfig(spacing_mm=(8, 8)), device="cpu")
    assert make_plan(pictures, PlanConfig(spacing_mm=(1, 1)), device="cpu").spacing_mm == (
        1,
        1,
    )  # as fine-tuning takes it over
