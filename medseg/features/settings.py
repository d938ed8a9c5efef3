"""How features are computed: what has to be known to compute a table again."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError, nearest

FAMILIES = ("shape", "intensity", "histogram", "glcm", "glrlm", "glszm", "gldm", "ngtdm", "edge")
"""In the order of the columns."""
TEXTURES = ("3d", "3d-merged", "2.5d", "2.5d-merged", "2d", "2d-merged")
"""How texture matrices are put together, see `Settings.texture`."""


@dataclass(frozen=True)
class Settings:
    """What is computed, and how."""

    families: tuple[str, ...] = FAMILIES
    """Which features."""
    bin_count: int | None = 32
    """Grey levels between the lowest and the highest intensity of the structure (IBSI: fixed bin number). For images
    whose units mean nothing, as of MR."""
    bin_width: float | None = None
    """Instead: width of a grey level in units of the image (IBSI: fixed bin size). For calibrated units, as of CT."""
    bin_origin: float | None = None
    """With `bin_width`: a value at which a bin begins. None begins at the lower end of `intensities`, else at the
    structure's lowest intensity, as the IBSI says; 0 is what PyRadiomics does."""
    intensities: tuple[float, float] | None = None
    """Voxels outside this range, both ends within it, count for the shape only (IBSI: re-segmentation by range)."""
    outliers: float | None = None
    """Voxels further than so many standard deviations from the mean count for the shape only (IBSI: outlier
    filtering)."""
    spacing_mm: tuple[float, ...] = ()
    """Voxel size to resample to first, one value for all axes or one for each; () leaves the voxels as they are."""
    order: int = 3
    """Of the spline that resamples the image: 1 (linear) or 3. The mask is resampled linearly and cut at one half."""
    texture: str = "3d"
    """3d: matrices over neighbours in all directions, features averaged over the directions; 3d-merged: one matrix of
    all directions. 2.5d and 2.5d-merged: neighbours in the slice only, matrices of all slices added. 2d and 2d-merged:
    a matrix (merged: one for all directions) for each slice, features averaged over them. Matrices without directions
    (GLSZM, GLDM, NGTDM) know 3d, 2.5d and 2d. Pictures have one slice."""
    dependence: float = 0.0
    """GLDM: neighbours whose level differs by no more than this depend on each other (IBSI: coarseness parameter)."""
    edge_reach_mm: float = 5.0
    """How far to either side of the border the edge features look (pixels for pictures)."""

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise MedsegError(
                    Code.NAME, f"there is no family of features {name!r}", where="--families",
                    remedy=nearest(name, FAMILIES),
                )  # fmt: skip
        if self.texture not in TEXTURES:
            raise MedsegError(Code.CONFIG, "no such texture", where="--texture", expected=" | ".join(TEXTURES),
                              got=self.texture)  # fmt: skip
        if (self.bin_count is None) == (self.bin_width is None):
            raise MedsegError(
                Code.CONFIG,
                "grey levels are given by their number or by their width",
                where="--bins and --bin-width",
                expected="one of the two",
                got="both" if self.bin_count is not None else "neither",
            )
        positive = {
            "--bins": self.bin_count,
            "--bin-width": self.bin_width,
            "--outliers": self.outliers,
            "--edge-reach": self.edge_reach_mm,
            **{"--spacing": min(self.spacing_mm, default=None)},
        }
        for option, value in positive.items():
            if value is not None and not 0 < value < float("inf"):
                raise MedsegError(Code.CONFIG, "must be positive", where=option, got=value)
        if self.order not in (1, 3):
            raise MedsegError(Code.CONFIG, "no such spline", where="--order", expected="1 or 3", got=self.order)
        if self.bin_origin is not None and self.bin_width is None:
            raise MedsegError(
                Code.CONFIG, "bins begin somewhere only where they have a width", where="--bin-origin",
                remedy="add --bin-width",
            )  # fmt: skip
        if self.intensities is not None and not self.intensities[0] < self.intensities[1]:
            raise MedsegError(Code.CONFIG, "the range is empty", where="--range", got=self.intensities)

    @property
    def bins(self) -> str:
        """The discretisation in words."""
        if self.bin_width is None:
            return f"{self.bin_count} levels from minimum to maximum"
        begin = self.bin_origin if self.bin_origin is not None else (self.intensities or ("the minimum",))[0]
        return f"width {self.bin_width:g} from {begin if isinstance(begin, str) else f'{begin:g}'}"
