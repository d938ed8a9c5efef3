"""nnU-Net's rules give nnU-Net's plans: expected values by scripts/make_nnunet_goldens.py from the real package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.data.nnunet_plan import PRESETS, configurations

GOLDENS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "goldens" / "nnunet_plans.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: f"{g['name']}-{g['preset']}")
def test_the_plan_is_nnunets_own(golden: dict[str, Any]) -> None:
    order, found = configurations(
        golden["spacings"] * golden["repeat"],
        golden["shapes"] * golden["repeat"],
        num_channels=golden["channels"],
        num_classes=golden["classes"],
        preset=PRESETS[golden["preset"]],
    )
    expected = dict(golden["plan"])
    assert list(order) == expected.pop("order")
    assert found.keys() == expected.keys()
    for name, configuration in found.items():
        assert configuration.spacing_mm == pytest.approx(expected[name].pop("spacing_mm"), rel=1e-12)
        for key, value in expected[name].items():
            assert json.loads(json.dumps(getattr(configuration, key))) == value, (name, key)


def test_hippocampus_is_what_nnunet_publishes() -> None:
    golden = next(g for g in GOLDENS if g["name"] == "hippocampus")
    full = golden["plan"]["3d_fullres"]
    assert (full["patch_size"], full["batch_size"], full["widths"]) == ([40, 56, 40], 9, [32, 64, 128, 256])
