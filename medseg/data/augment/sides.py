"""Left and right: which axes may be mirrored, and which classes change places when they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.data.augment.config import AugmentConfig
from medseg.errors import Code, MedsegError

SIDE_WORDS = {"left": "l", "l": "l", "lt": "l", "lh": "l", "right": "r", "r": "r", "rt": "r", "rh": "r"}
"""Words of a class name that tell a side (lh and rh: the hemispheres of FreeSurfer)."""
CHAMBER_WORDS = {"heart", "cardiac", "atrium", "atrial", "auricle", "ventricle", "ventricular", "myocardium"}
"""Left and right chambers of the heart are no mirror images: they keep their names."""
BRAIN_WORDS = {"lateral", "lat", "brain", "cerebral"}
"""With these words a ventricle is one of the brain's, which are mirror images."""


@dataclass(frozen=True)
class Mirroring:
    """What training mirrors, and prediction may.

    Args:
        axes: axes of the patch.
        side_axis: the axis that runs from one side of the patient to the other.
        classes: what class index c becomes when `side_axis` is mirrored; () where no classes change places.
        outputs: the same for the outputs of a network where they are regions; () where they are the classes.
    """

    axes: tuple[int, ...] = ()
    side_axis: int | None = None
    classes: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        axes: tuple[int, ...],
        swap: Mapping[str, str],
        names: Sequence[str],
        orientation: str,
        spatial_dims: int,
        *,
        membership: NDArray[np.bool_] | None = None,
    ) -> Mirroring:
        """From what a bundle holds.

        Args:
            axes: that are mirrored.
            swap: classes or regions that change places, each pair once.
            names: of the background, then of all classes or regions, in order.
            orientation: of the model's axes ("SPL"); "" for pictures, whose columns run from side to side.
            spatial_dims: 2 or 3; of an oriented model with 2 the last two axes count.
            membership: of regions: which of them a class lies in, shape (number of classes, number of regions).
        Raises:
            MedsegError: E_CONFIG where a part of a region has no counterpart.
        """
        lettered = [axis for axis, letter in enumerate(orientation[-spatial_dims:]) if letter in "LR"]
        side_axis = lettered[0] if lettered else None if orientation else spatial_dims - 1
        order = {**swap, **{b: a for a, b in swap.items()}}
        if not swap:
            return cls(axes, side_axis)
        order_of_names = tuple(names.index(order.get(name, name)) for name in names)
        if membership is None:
            return cls(axes, side_axis, order_of_names)
        outputs = tuple(index - 1 for index in order_of_names[1:])  # the background is no region
        return cls(axes, side_axis, _mirrored_classes(membership, outputs, names[1:]), outputs)

    def swaps(self, flips: Sequence[int]) -> bool:
        """Whether classes change places when these axes are mirrored."""
        return bool(self.classes) and self.side_axis in flips


def _mirrored_classes(membership: NDArray[np.bool_], outputs: tuple[int, ...], names: Sequence[str]) -> tuple[int, ...]:
    """What each class becomes where regions change places: the class that lies in the counterparts of its regions."""
    rows = [tuple(row) for row in membership.tolist()]
    wanted = [tuple(row) for row in membership[:, list(outputs)].tolist()]
    alone = next((row for row in wanted if row not in rows), None)
    if alone is not None:
        raise MedsegError(
            Code.CONFIG,
            "regions that change places need the same parts on both sides",
            where="augment.swap",
            got=f"no voxel can lie in {' and '.join(n for n, is_in in zip(names, alone, strict=True) if is_in)} alone",
            remedy="name all pairs in augment.swap, or set augment.swap={} for none",
        )
    return tuple(rows.index(row) for row in wanted)


def mirrored_axes(
    config: AugmentConfig, names: Sequence[str], *, spatial_dims: int, is_picture: bool
) -> tuple[int, ...]:
    """The axes that training mirrors: those that prediction may average over.

    Args:
        config: `mirror_axes` where the user has set it.
        names: of the classes: where one tells a side, nothing is mirrored unless asked.
        spatial_dims: 2 or 3.
        is_picture: 2D pictures without orientation.
    Raises:
        MedsegError: E_CONFIG if the data have no such axis.
    """
    if config.mirror_axes is None:
        sided = swapped_classes(config, names) or any(_side(name) for name in names)
        return tuple(range(spatial_dims)) if is_picture and not sided else ()
    if any(not 0 <= axis < spatial_dims for axis in config.mirror_axes):
        raise MedsegError(
            Code.CONFIG,
            f"the data have axes 0 to {spatial_dims - 1}",
            where="augment.mirror_axes",
            got=config.mirror_axes,
        )
    return tuple(sorted(set(config.mirror_axes)))


def swapped_classes(config: AugmentConfig, names: Sequence[str]) -> dict[str, str]:
    """Classes that change places when left and right are mirrored, each pair once.

    Args:
        config: `swap` where the user has set it.
        names: of all classes, the background first.
    Raises:
        MedsegError: E_CONFIG if the user's table names an unknown class, the background, or a class twice.
    """
    if config.swap is None or config.swap == "auto":
        return _pairs(names[1:])
    named = [*config.swap.keys(), *config.swap.values()]
    wrong = [name for name in named if name not in names[1:]] or [n for n in named if named.count(n) > 1]
    if wrong:
        raise MedsegError(
            Code.CONFIG,
            "classes that change places are two different foreground classes, each named once",
            where="augment.swap",
            expected=f"of {', '.join(names[1:])}",
            got=wrong[0],
            remedy="augment.swap={kidney_left: kidney_right}, or {} for none",
        )
    return dict(config.swap)


def side_lines(
    names: Sequence[str], mirroring: Mirroring, swap: Mapping[str, str], *, assumed: bool = False
) -> list[str]:
    """What a run says about sides when it begins; nothing where no class has one.

    Args:
        names: of all classes, the background first.
        mirroring: what training mirrors.
        swap: classes that change places then.
        assumed: the names alone told them, and nobody agreed: how to say otherwise is told too.
    """
    alone = [name for name in names[1:] if _side(name) and name not in (*swap.keys(), *swap.values())]
    if not swap and not alone:
        return []
    across = mirroring.side_axis in mirroring.axes
    said = "change places where mirrored" if across else "left and right are not mirrored"
    lines = []
    if swap:
        key = "by their names; other pairs: augment.swap={left: right}, none: augment.swap={}"
        found = ", ".join(f"{a} ↔ {b}" for a, b in swap.items())
        lines.append(f"sides      {found} ({said}; {key if assumed else 'augment.swap'})")
    if alone and across:
        lines.append(f"note       mirrored, but without a class for the other side: {', '.join(alone)} (augment.swap)")
    return lines


def _pairs(names: Sequence[str]) -> dict[str, str]:
    sides = [(name, *found) for name in names if (found := _side(name)) is not None]
    pairs = {}
    for name, side, rest in sides:
        alike = [n for n, s, r in sides if r == rest and s == side]
        other = [n for n, s, r in sides if r == rest and s != side]
        if side == "l" and len(alike) == len(other) == 1:
            pairs[name] = other[0]
    return pairs


def _side(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The side that a class name tells ("l" or "r") and its other words, sorted; None if it tells none."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W_]+", spaced.lower())
    if not SIDE_WORDS.keys() & {*words}:  # "leftkidney", "kidneyleft"
        words = re.findall(r"[^\W_]+", re.sub(r"\b(left|right)|(left|right)\b", r" \1\2 ", " ".join(words)))
    sides = {SIDE_WORDS[word] for word in words if word in SIDE_WORDS}
    rest = tuple(sorted(word for word in words if word not in SIDE_WORDS))
    is_chamber = bool(CHAMBER_WORDS & {*rest}) and not BRAIN_WORDS & {*rest}
    return None if len(sides) != 1 or not rest or is_chamber else (sides.pop(), rest)
