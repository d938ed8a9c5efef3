"""Colours of classes that colour-blind readers can tell apart."""

from __future__ import annotations

import colorsys

_BASE = (
    "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2",
    "#88CCEE", "#DDCC77", "#AA4499", "#44AA99", "#CC6677", "#999933", "#882255",
)  # fmt: skip
"""Okabe and Ito, Color universal design, 2008 (without black), ordered so that neighbours differ most on grey; then
the muted scheme of Tol, Colour schemes, SRON 2021, without what repeats it."""
_GOLDEN = 0.61803398875
"""Hues that far apart around the circle never repeat."""


def class_colours(num: int) -> list[str]:
    """`num` colours as "#RRGGBB", always the same first ones: the colour of a class does not depend on the others."""
    extra = (colorsys.hsv_to_rgb(i * _GOLDEN % 1, 0.55, 0.95) for i in range(max(0, num - len(_BASE))))
    return [*_BASE[:num], *("#" + "".join(f"{round(255 * c):02X}" for c in rgb) for rgb in extra)]
