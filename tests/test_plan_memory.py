"""The memory of a training step: counted without computing, against what trainings take; budgets that plans keep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peak
import pytest
import yaml
from test_plan import found

from medseg.data.plan import Plan, PlanConfig, Preset, machine_for, make_plan, takes_too_much
from medseg.data.plan.memory import step_cost
from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.phantom import write_phantoms

TRAIN = (
    peak.IMPORT
    + """
from medseg.cli import main
main(sys.argv[1:])
print("PEAK", peak_bytes() / 2**30)
"""
)


def planned(config: PlanConfig, shape: tuple[int, ...] = (512, 512, 400), model: str = "unet") -> Plan:
    data = found(shape, (1.0,) * len(shape), "RAS" if len(shape) == 3 else "")
    return make_plan(data, config, machine_for(data, config, device="cuda", model={"name": model}))


def test_what_is_counted_grows_with_patch_and_batch() -> None:
    settings = {"name": "unet", "widths": [4, 8], "strides": [1, 2]}
    small = step_cost(settings, in_channels=1, num_outputs=3, patch_size=(8, 8, 8))
    large = step_cost(settings, in_channels=1, num_outputs=3, patch_size=(16, 8, 8))
    assert large.num_saved == pytest.approx(2 * small.num_saved, rel=0.01) and large.num_weights == small.num_weights
    assert small.num_logits == 3 * 8**3 and small.num_input == 2 * 8**3
    weights = MODELS.build(settings, in_channels=1, num_classes=3, spatial_dims=3).parameters()
    assert small.num_weights == sum(weight.numel() for weight in weights)
    # Both convolutions of a stage keep what comes in, what goes into the normalisation and what comes out of it.
    assert small.num_saved > 4 * 4 * 8**3
    first, second, third = (small.bytes_of(n, device="cpu", precision="bf16") for n in (1, 2, 3))
    assert second - first == pytest.approx(third - second)
    assert small.bytes_of(1, device="cpu", precision="fp32") > first


def test_parts_and_processes_share_the_memory_and_each_has_a_sample() -> None:
    data, config = (
        found((512, 512, 400), (1.0,) * 3, "RAS"),
        PlanConfig(memory_gb=8, batch_size=64, patch_size=(64, 64, 64)),
    )
    whole, parts, gpus = (
        make_plan(data, config, machine_for(data, config, device="cuda", **ways))
        for ways in ({}, {"accumulate": 16}, {"processes": 4, "accumulate": 4})
    )
    assert takes_too_much(whole) and not takes_too_much(parts)
    assert parts.memory_gb == gpus.memory_gb < whole.memory_gb / 4
    left_open = PlanConfig(memory_gb=8)
    assert make_plan(data, left_open, machine_for(data, left_open, device="cuda", processes=5)).batch_size >= 5


@pytest.mark.parametrize("name", ["unet", "residual_encoder_unet"])
@pytest.mark.parametrize("memory", [4.0, 8.0, 24.0, 80.0])
@pytest.mark.parametrize("shape", [(512, 512, 400), (1024, 1200)])
def test_a_plan_keeps_its_budget_and_uses_it(name: str, memory: float, shape: tuple[int, ...]) -> None:
    plan = planned(PlanConfig(memory_gb=memory), shape, name)
    assert plan.memory_gb <= 0.9 * memory
    assert "which may take" in plan.reasons["memory_gb"] and f"{0.9 * memory:.1f} GiB" in plan.reasons["memory_gb"]
    smaller = planned(PlanConfig(memory_gb=2.5), shape, name)
    sizes = [p.batch_size * p.patch_size[0] * p.patch_size[1] for p in (smaller, plan)]
    assert sizes[0] < sizes[1] and smaller.memory_gb <= 0.9 * 2.5


@pytest.mark.parametrize("preset, fits, too_small", [("resenc_m", 24, 8), ("resenc_l", 40, 24), ("resenc_xl", 80, 40)])
def test_a_preset_keeps_nnunets_size_and_says_where_that_is_too_much(preset: Preset, fits: int, too_small: int) -> None:
    plans = [planned(PlanConfig(preset=preset, memory_gb=m), model="residual_encoder_unet") for m in (fits, too_small)]
    assert plans[0].patch_size == plans[1].patch_size and plans[0].memory_gb == plans[1].memory_gb
    assert [takes_too_much(plan) for plan in plans] == [False, True]
    assert "% of data.plan.memory_gb" in plans[1].reasons["memory_gb"]


def test_too_little_memory_is_refused_and_values_that_were_set_are_believed() -> None:
    with pytest.raises(MedsegError, match="too little memory") as refusal:
        planned(PlanConfig(memory_gb=0.5))
    assert refusal.value.code == Code.LIMIT and "base_width" in str(refusal.value.remedy)
    plan = planned(PlanConfig(memory_gb=1.5, patch_size=(128, 128, 128)))
    assert plan.memory_gb > 1.5 and "MORE than" in plan.reasons["memory_gb"]
    with pytest.raises(MedsegError, match="must be positive"):
        planned(PlanConfig(memory_gb=-1.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["data.plan.patch_size=[40,56,40]", "data.plan.batch_size=9", "data.plan.base_width=32"],
        ["data.plan.patch_size=[96,96,96]", "data.plan.batch_size=2", "trainer.precision=fp32"],
        ["model=residual_encoder_unet", "data.plan.patch_size=[64,96,96]", "data.plan.batch_size=2",
         "data.plan.base_width=32"],
        ["data.plan.configuration=2d", "data.plan.patch_size=[1,192,192]", "data.plan.batch_size=12"],
        ["model=unet_plus_plus", "data.plan.patch_size=[64,64,64]", "data.plan.batch_size=2"],
        ["model=segnet", "data.plan.patch_size=[64,96,96]", "data.plan.batch_size=2", "data.plan.base_width=32"],
        ["model=vnet", "data.plan.patch_size=[64,64,64]", "data.plan.batch_size=2"],
        ["model=deepmedic", "data.plan.patch_size=[75,75,75]", "data.plan.batch_size=4"],
    ],
)  # fmt: skip
def test_a_training_takes_what_was_estimated(overrides: list[str], tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", num_train=4, size=0.4)
    run = tmp_path / "run"
    settings = [
        "train", f"data.root='{data.train}'", f"hydra.run.dir='{run}'", "data.split.num_folds=2", "trainer.max_steps=3",
        "trainer.num_validations=1", "trainer.final_predictions=false", "data.store=null", *overrides,
    ]  # fmt: skip
    answer = subprocess.run([sys.executable, "-c", TRAIN, *settings], capture_output=True, text=True, check=True)
    peak = float(next(line for line in answer.stdout.splitlines() if line.startswith("PEAK")).split()[1])
    estimate = yaml.safe_load((run / "plan.yaml").read_text())["memory_gb"]
    assert peak <= estimate <= 2 * peak
