"""Left and right under mirroring: which classes are pairs, and that they change places, in training and on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.bundle import BundleInfo
from medseg.data.augment import AugmentConfig, Augmenter, Mirroring, mirrored_axes, side_lines, swapped_classes
from medseg.errors import MedsegError

INTENSITIES = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")


@pytest.mark.parametrize("turned", [0.0, 1.0])
def test_mirrored_sides_change_places(turned: bool) -> None:
    """Class 1 lies in low columns, 2 in high ones, 3 in the middle: so it must be in every mirrored patch."""
    names = ("background", "kidney_right", "kidney_left", "spine")
    config = AugmentConfig(mirror_axes=(0, 1, 2))
    pairs = swapped_classes(config, names)
    mirroring = Mirroring.of((0, 1, 2), pairs, names, "SPL", 3)
    assert mirroring == Mirroring((0, 1, 2), 2, (0, 2, 1, 3))
    label = torch.zeros(12, 10, 10, 21, dtype=torch.uint8)
    label[:, 3:7, 3:7, 2:7], label[:, 3:7, 3:7, 15:19], label[:, 4:6, 4:6, 10] = 1, 2, 3  # 5 and 4 columns
    always = {"rotation_probability": turned, "rotation_degrees": 5.0, "scale_probability": 0.0}
    turn = Augmenter(
        AugmentConfig(**always, **{f"{name}_probability": 0.0 for name in INTENSITIES}),
        patch_size=(10, 10, 21),
        spacing_mm=(1.0, 1.0, 1.0),
        is_picture=False,
        mirroring=mirroring,
        seed=0,
    )
    image, new = turn(label[:, None].float(), label, 0)
    mirrored = 0
    for n in range(12):
        columns = {c: (new[n] == c).nonzero()[:, 2].float().mean() for c in (1, 2, 3)}
        assert columns[1] < columns[3] < columns[2]
        values = {c: int(image[n, 0][new[n] == c].median().round()) for c in (1, 2)}  # what the image shows there
        mirrored += int(values[1] == 2)
        assert (values[1], values[2]) in ((1, 2), (2, 1))
    assert 0 < mirrored < 12


@pytest.mark.parametrize(
    "left, right",
    [
        ("left_kidney", "right_kidney"),
        ("left_kidney", "kidney_right"),
        ("left kidney", "right kidney"),
        ("lung_l", "lung_r"),
        ("KidneyLeft", "KidneyRight"),
        ("leftlung", "rightlung"),
        ("ctx-lh-cuneus", "ctx-rh-cuneus"),
        ("Parotid_Lt", "Parotid_Rt"),
        ("Left-Lateral-Ventricle", "Right-Lateral-Ventricle"),
        ("lung_upper_lobe_left", "lung_upper_lobe_right"),
    ],
)
def test_pairs_are_found(left: str, right: str) -> None:
    names = ("background", "liver", right, "bright spot", left)
    assert swapped_classes(AugmentConfig(), names) == {left: right}


@pytest.mark.parametrize(
    "names",
    [
        ("liver", "tumour"),
        ("left_ventricle", "right_ventricle", "myocardium"),
        ("heart_atrium_left", "heart_atrium_right"),
        ("left", "right"),
        ("left_lung", "right_kidney"),
        ("LV", "RV"),
        ("L1", "R1"),
        ("left_lung", "lung_left", "right_lung"),
    ],
)
def test_what_is_no_pair(names: tuple[str, ...]) -> None:
    assert swapped_classes(AugmentConfig(), ("background", *names)) == {}


def test_pairs_can_be_stated() -> None:
    names = ("background", "a", "b", "left_c", "right_c")
    assert swapped_classes(AugmentConfig(swap={"a": "b"}), names) == {"a": "b"}
    assert swapped_classes(AugmentConfig(swap={}), names) == {}
    for wrong in ({"a": "x"}, {"a": "a"}, {"a": "b", "b": "left_c"}, {"background": "a"}):
        with pytest.raises(MedsegError, match=r"augment\.swap"):
            swapped_classes(AugmentConfig(swap=wrong), names)


def test_defaults_respect_sides() -> None:
    def axes(*names: str, picture: bool, **changes: Any) -> tuple[int, ...]:
        dims = 2 if picture else 3
        return mirrored_axes(AugmentConfig(**changes), ("background", *names), spatial_dims=dims, is_picture=picture)

    assert axes("liver", picture=False) == ()
    assert axes("nucleus", picture=True) == (0, 1)
    assert axes("right lung", "left lung", picture=True) == ()
    assert axes("left_lung", picture=True) == ()
    assert axes("a", "b", picture=True, swap={"a": "b"}) == ()
    assert axes("right lung", "left lung", picture=True, mirror_axes=(1,)) == (1,)
    with pytest.raises(MedsegError, match="axes 0 to 1"):
        axes("a", picture=True, mirror_axes=(2,))


def test_which_axis_runs_from_side_to_side() -> None:
    names = ("background", "left_a", "right_a")
    for orientation, dims, axis in (("SPL", 3, 2), ("RAS", 3, 0), ("SPL", 2, 1), ("", 2, 1)):
        mirroring = Mirroring.of((0,), {"left_a": "right_a"}, names, orientation, dims)
        assert mirroring.side_axis == axis and mirroring.classes == (0, 2, 1)
        assert mirroring.swaps((axis,)) and not mirroring.swaps(((axis + 1) % dims,)) and not mirroring.swaps(())
    assert not Mirroring.of((0, 1, 2), {}, names, "SPL", 3).swaps((2,))


def test_sides_are_said() -> None:
    names = ("background", "left_a", "right_a", "left_b")
    pairs = {"left_a": "right_a"}
    assert side_lines(("background", "liver"), Mirroring((0, 1, 2), 2), {}) == []
    (line,) = side_lines(names, Mirroring.of((), pairs, names, "SPL", 3), pairs)
    assert "left_a ↔ right_a" in line and "not mirrored" in line and "augment.swap" in line
    line, note = side_lines(names, Mirroring.of((0, 1, 2), pairs, names, "SPL", 3), pairs)
    assert "change places" in line and "left_b" in note


def test_a_bundle_keeps_its_pairs(tiny_run, tmp_path: Path) -> None:
    info = BundleInfo.read(tiny_run.run)
    assert info.swap == {} and info.mirroring.axes == info.mirror_axes
    changed = dataclasses.replace(info, mirror_axes=(2,), swap={"liver": "spleen"})
    changed.write(tmp_path)
    assert BundleInfo.read(tmp_path) == changed
    assert BundleInfo.read(tmp_path).mirroring == Mirroring((2,), 2, (0, 2, 1, 3, 4, 5))
    old = json.loads((tmp_path / "bundle.json").read_text())
    del old["swap"]
    (tmp_path / "bundle.json").write_text(json.dumps(old))
    assert BundleInfo.read(tmp_path) == dataclasses.replace(changed, swap={})
