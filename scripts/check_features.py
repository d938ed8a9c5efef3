"""Compare the features of `medseg measure` with published values: docs/benchmarks/features.{json,md}.

    python scripts/check_features.py --data FOLDER [--write]

FOLDER holds radiomics/pyradiomics: images and the baseline of PyRadiomics' tests (BSD-3). The IBSI's digital phantom
stands in tests/ibsi.py. Needs pynrrd.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from medseg import __version__
from medseg.features import glcm, gldm, glrlm, glszm, intensity, ngtdm, shape
from medseg.features.region import measure_region
from medseg.features.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import ibsi  # noqa: E402

TOLERANCE = 1e-3
"""Relative, of agreement with PyRadiomics."""
CASES = ("brain1", "breast1")
"""Those whose images are there; the baseline has three more."""
SLICES = 2
"""Axis of the files from slice to slice."""

NAMES: dict[str, dict[str, str]] = {
    "shape": {
        "MeshVolume": "shape_volume",
        "VoxelVolume": "shape_volume_of_voxels",
        "SurfaceArea": "shape_surface_area",
        "SurfaceVolumeRatio": "shape_surface_to_volume_ratio",
        "Sphericity": "shape_sphericity",
        "Maximum3DDiameter": "shape_maximum_diameter",
        "MajorAxisLength": "shape_major_axis_length",
        "MinorAxisLength": "shape_minor_axis_length",
        "LeastAxisLength": "shape_least_axis_length",
        "Elongation": "shape_elongation",
        "Flatness": "shape_flatness",
    },
    "shape2D": {
        "MeshSurface": "shape_area",
        "PixelSurface": "shape_area_of_pixels",
        "Perimeter": "shape_perimeter",
        "PerimeterSurfaceRatio": "shape_perimeter_to_area_ratio",
        "Sphericity": "shape_circularity",
        "MaximumDiameter": "shape_maximum_diameter",
        "MajorAxisLength": "shape_major_axis_length",
        "MinorAxisLength": "shape_minor_axis_length",
        "Elongation": "shape_elongation",
    },
    "firstorder": {
        "Mean": "intensity_mean",
        "Variance": "intensity_variance",
        "Skewness": "intensity_skewness",
        "Kurtosis": "intensity_kurtosis",
        "Median": "intensity_median",
        "Minimum": "intensity_minimum",
        "10Percentile": "intensity_percentile_10",
        "90Percentile": "intensity_percentile_90",
        "Maximum": "intensity_maximum",
        "InterquartileRange": "intensity_interquartile_range",
        "Range": "intensity_range",
        "MeanAbsoluteDeviation": "intensity_mean_absolute_deviation",
        "RobustMeanAbsoluteDeviation": "intensity_robust_mean_absolute_deviation",
        "Energy": "intensity_energy",
        "RootMeanSquared": "intensity_root_mean_square",
        "Entropy": "histogram_entropy",
        "Uniformity": "histogram_uniformity",
    },
    "glcm": {
        "MaximumProbability": "glcm_joint_maximum",
        "JointAverage": "glcm_joint_average",
        "SumSquares": "glcm_joint_variance",
        "JointEntropy": "glcm_joint_entropy",
        "DifferenceAverage": "glcm_difference_average",
        "DifferenceVariance": "glcm_difference_variance",
        "DifferenceEntropy": "glcm_difference_entropy",
        "SumAverage": "glcm_sum_average",
        "SumEntropy": "glcm_sum_entropy",
        "JointEnergy": "glcm_angular_second_moment",
        "Contrast": "glcm_contrast",
        "Id": "glcm_inverse_difference",
        "Idn": "glcm_inverse_difference_normalised",
        "Idm": "glcm_inverse_difference_moment",
        "Idmn": "glcm_inverse_difference_moment_normalised",
        "InverseVariance": "glcm_inverse_variance",
        "Correlation": "glcm_correlation",
        "Autocorrelation": "glcm_autocorrelation",
        "ClusterTendency": "glcm_cluster_tendency",
        "ClusterShade": "glcm_cluster_shade",
        "ClusterProminence": "glcm_cluster_prominence",
        "Imc1": "glcm_information_correlation_1",
        "Imc2": "glcm_information_correlation_2",
    },
    "glrlm": dict(
        zip(
            (
                "ShortRunEmphasis",
                "LongRunEmphasis",
                "LowGrayLevelRunEmphasis",
                "HighGrayLevelRunEmphasis",
                "ShortRunLowGrayLevelEmphasis",
                "ShortRunHighGrayLevelEmphasis",
                "LongRunLowGrayLevelEmphasis",
                "LongRunHighGrayLevelEmphasis",
                "GrayLevelNonUniformity",
                "GrayLevelNonUniformityNormalized",
                "RunLengthNonUniformity",
                "RunLengthNonUniformityNormalized",
                "RunPercentage",
                "GrayLevelVariance",
                "RunVariance",
                "RunEntropy",
            ),
            (f"glrlm_{name}" for name in glrlm.CODES),
            strict=True,
        )
    ),
    "glszm": dict(
        zip(
            (
                "SmallAreaEmphasis",
                "LargeAreaEmphasis",
                "LowGrayLevelZoneEmphasis",
                "HighGrayLevelZoneEmphasis",
                "SmallAreaLowGrayLevelEmphasis",
                "SmallAreaHighGrayLevelEmphasis",
                "LargeAreaLowGrayLevelEmphasis",
                "LargeAreaHighGrayLevelEmphasis",
                "GrayLevelNonUniformity",
                "GrayLevelNonUniformityNormalized",
                "SizeZoneNonUniformity",
                "SizeZoneNonUniformityNormalized",
                "ZonePercentage",
                "GrayLevelVariance",
                "ZoneVariance",
                "ZoneEntropy",
            ),
            (f"glszm_{name}" for name in glszm.CODES),
            strict=True,
        )
    ),
    "gldm": {
        theirs: f"gldm_{ours}"
        for theirs, ours in zip(
            (
                "SmallDependenceEmphasis",
                "LargeDependenceEmphasis",
                "LowGrayLevelEmphasis",
                "HighGrayLevelEmphasis",
                "SmallDependenceLowGrayLevelEmphasis",
                "SmallDependenceHighGrayLevelEmphasis",
                "LargeDependenceLowGrayLevelEmphasis",
                "LargeDependenceHighGrayLevelEmphasis",
                "GrayLevelNonUniformity",
                "-",
                "DependenceNonUniformity",
                "DependenceNonUniformityNormalized",
                "-",
                "GrayLevelVariance",
                "DependenceVariance",
                "DependenceEntropy",
                "-",
            ),
            gldm.CODES,
            strict=True,
        )
        if theirs != "-"
    },
    "ngtdm": {
        name: f"ngtdm_{name.lower()}" for name in ("Coarseness", "Contrast", "Busyness", "Complexity", "Strength")
    },
}
"""PyRadiomics' family → its feature → our column."""
CODES = {
    f"{family}_{name}": code
    for family, codes in (
        ("shape", shape.CODES),
        ("intensity", intensity.CODES),
        ("histogram", intensity.HISTOGRAM_CODES),
        ("glcm", glcm.CODES),
        ("glrlm", glrlm.CODES),
        ("glszm", glszm.CODES),
        ("gldm", gldm.CODES),
        ("ngtdm", ngtdm.CODES),
    )
    for name, code in codes.items()
}
"""Column → identifier of the IBSI."""
FAMILIES_OF = {"shape2D": ("shape",), "firstorder": ("intensity", "histogram")}
"""PyRadiomics' family → ours, where they are called otherwise."""
ELSEWHERE = {
    "TotalEnergy": "the energy times the volume of a voxel; the IBSI has no such feature",
    "MCC": "maximal correlation coefficient; the IBSI has no such feature",
    "Maximum2DDiameterSlice": "diameters within slices; the IBSI has no such feature",
    "Maximum2DDiameterRow": "diameters within slices; the IBSI has no such feature",
    "Maximum2DDiameterColumn": "diameters within slices; the IBSI has no such feature",
}
"""Features of the baseline that are not computed, and why."""


@dataclass(frozen=True)
class Comparison:
    """One value of the baseline beside ours."""

    family: str
    case: str
    setting: str
    feature: str
    published: float
    measured: float | None
    agrees: bool
    why: str = ""


def main() -> None:
    """Compare, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data"))
    )
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/features.json and .md")
    arguments = parser.parse_args()
    phantom = compare_phantom()
    baseline = compare_baseline(arguments.data / "radiomics" / "pyradiomics")
    page = as_page(phantom, baseline)
    print(page)
    if arguments.write:
        folder = ROOT / "docs" / "benchmarks"
        names = [field.name for field in fields(Comparison)]
        content = {
            "version": __version__,
            "ibsi": {"columns": list(phantom[0]), "rows": [list(row.values()) for row in phantom]},
            "pyradiomics": {"columns": names, "rows": [[getattr(c, name) for name in names] for c in baseline]},
        }
        text = json.dumps(_finite(content), ensure_ascii=False).replace("[[", "[\n[").replace("], [", "],\n[") + "\n"
        (folder / "features.json").write_text(text, encoding="utf-8")
        (folder / "features.md").write_text(page, encoding="utf-8")


def compare_phantom() -> list[dict[str, Any]]:
    """Each value that the IBSI published for its digital phantom beside ours."""
    measured = {
        texture: measure_region(
            ibsi.IMAGE, ibsi.MASK, ibsi.SPACING_MM, Settings(bin_count=None, bin_width=1.0, texture=texture), across=0
        ).values
        for texture in ibsi.TEXTURES
    }
    rows = []
    for feature, texture, value, tolerance in ibsi.reference():
        ours = measured[texture or "3d"][feature]
        agrees = bool(ibsi.agrees(ours, value, tolerance))
        rows.append({"feature": feature, "texture": texture, "published": value, "measured": ours, "agrees": agrees})
    return rows


def compare_baseline(folder: Path) -> list[Comparison]:
    """Each value of PyRadiomics' baseline for the cases whose images are there."""
    found = []
    for family in NAMES:
        with (folder / "baseline" / f"baseline_{family}.csv").open(newline="") as file:
            rows = {row[0]: row[1:] for row in csv.reader(file)}
        for column, name in enumerate(rows["featureName"]):
            case, _, setting = name.partition("_")
            if case not in CASES:
                continue
            values = {key.split("_")[-1]: row[column] for key, row in rows.items() if key.startswith("original_")}
            options = ast.literal_eval(rows["diagnostics_Configuration_Settings"][column])
            box = rows.get("diagnostics_Mask-corrected_BoundingBox", rows.get("diagnostics_Mask-original_BoundingBox"))
            found += _compare_case(
                folder, family, case, setting, values, options, ast.literal_eval((box or [])[column])
            )
    return found


def _compare_case(
    folder: Path,
    family: str,
    case: str,
    setting: str,
    values: dict[str, str],
    options: dict[str, Any],
    box: tuple[int, ...],
) -> list[Comparison]:
    image, mask, spacing = read_case(folder, case)
    why_not = ""
    if setting == "resampling":
        why_not = (
            "another grid: theirs begins at the corner of the scan, the IBSI's is centred; masks by nearest neighbour"
        )
        ours: dict[str, float] = {}
    else:
        if options.get("normalize"):
            image = (image - image.mean()) / image.std(ddof=1) * options["normalizeScale"]
        if family == "shape2D":  # the slice whose region they kept
            image, mask, spacing = image[:, :, box[2]], mask[:, :, box[2]], spacing[:2]
        ours = measure_region(image, mask, spacing, _settings(family, options, setting), across=SLICES).values
    rows = []
    for feature, text in values.items():
        published = float(text)
        if feature in ELSEWHERE:
            continue
        column = NAMES[family][feature]
        if why_not:
            rows.append(Comparison(family, case, setting, feature, published, None, False, why_not))
            continue
        measured = _as_theirs(feature, ours[column], ours, int(mask.sum()), options)
        agrees = bool(np.isclose(measured, published, rtol=TOLERANCE, atol=1e-9))
        why = "" if agrees else _why(feature, measured, published, int(mask.sum()))
        rows.append(Comparison(family, case, setting, feature, published, measured, agrees, why))
    return rows


def _settings(family: str, options: dict[str, Any], setting: str) -> Settings:
    texture = "2.5d" if options["force2D"] else "3d-merged" if options.get("weightingNorm") == "no_weighting" else "3d"
    count = options.get("binCount")
    return Settings(
        families=FAMILIES_OF.get(family, (family,)),
        bin_count=count,
        bin_width=None if count else float(options.get("binWidth", 25)),
        bin_origin=None if count else 0.0,
        outliers=3.0 if setting == "resegmentation" else None,
        texture=texture,
    )


def _as_theirs(feature: str, value: float, ours: dict[str, float], num_voxels: int, options: dict[str, Any]) -> float:
    """Our value by their definition, where the two are known to differ."""
    if feature == "Kurtosis":  # not the excess over a normal distribution
        return value + 3
    shift = options.get("voxelArrayShift", 0)
    if shift and feature in ("Energy", "RootMeanSquared"):  # of intensities that were made positive
        energy = ours["intensity_energy"] + 2 * shift * ours["intensity_mean"] * num_voxels + shift**2 * num_voxels
        return energy if feature == "Energy" else math.sqrt(energy / num_voxels)
    return value


def _why(feature: str, measured: float, published: float, num_voxels: int) -> str:
    """What is known of a difference; "" where nothing is."""
    if math.isnan(measured):
        return "one grey level: the feature does not exist, PyRadiomics puts a number in its place"
    if feature.endswith("AxisLength") and np.isclose(
        measured * math.sqrt((num_voxels - 1) / num_voxels), published, rtol=TOLERANCE
    ):
        return "axes of a sample (n - 1), as the IBSI's values; PyRadiomics divides by n"
    return ""


def read_case(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Image, region and spacing in mm, axes in the file's order."""
    import nrrd

    image, header = nrrd.read(str(folder / f"{case}_image.nrrd"))
    label, _ = nrrd.read(str(folder / f"{case}_label.nrrd"))
    spacing = tuple(float(np.linalg.norm(direction)) for direction in header["space directions"])
    return image.astype(np.float64), label == 1, spacing


def as_page(phantom: list[dict[str, Any]], baseline: list[Comparison]) -> str:
    """The table for people."""
    lines = [
        "# Features against published values",
        "",
        "Made by `python scripts/check_features.py --data FOLDER --write`; `features.json` has every value.",
        "",
        "## The IBSI's digital phantom",
        "",
        "Agreement: within the published tolerance, or equal in the three digits that are published.",
        "",
        "| family | values | agree |",
        "|---|---|---|",
    ]
    families: dict[str, list[bool]] = {}
    for row in phantom:
        families.setdefault(row["feature"].partition("_")[0], []).append(row["agrees"])
    lines += [f"| {family} | {len(found)} | {sum(found)} |" for family, found in families.items()]
    total = [row["agrees"] for row in phantom]
    lines += [f"| all | {len(total)} | {sum(total)} |", ""]
    lines += [
        "The phantom has one value for each texture matrix's way of being put together (2d, 2.5d, 3d, merged or not):",
        "",
        "| feature | IBSI | values | agree |",
        "|---|---|---|---|",
    ]
    features: dict[str, list[bool]] = {}
    for row in phantom:
        features.setdefault(row["feature"], []).append(row["agrees"])
    lines += [f"| {name} | {CODES[name]} | {len(found)} | {sum(found)} |" for name, found in features.items()]
    lines += [
        "",
        "## PyRadiomics' baseline",
        "",
        f"Cases {' and '.join(CASES)} (the images of the other three are not in the data). Agreement: to {TOLERANCE:g} "
        "of the value, after what is known to be defined otherwise: the kurtosis is theirs + 3; energies of "
        "intensities that they shifted by 2000.",
        "",
        "| family | setting | values | agree | differ, and why |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in baseline:
        if comparison.measured is not None:
            groups.setdefault((comparison.family, comparison.setting or "default"), []).append(comparison)
    for (family, setting), group in groups.items():
        reasons = Counter(c.why or f"not known: {c.case} {c.feature}" for c in group if not c.agrees)
        why = "; ".join(f"{number} × {reason}" for reason, number in reasons.items())
        lines.append(f"| {family} | {setting} | {len(group)} | {sum(c.agrees for c in group)} | {why} |")
    compared = [c for c in baseline if c.measured is not None]
    lines += [f"| all | | {len(compared)} | {sum(c.agrees for c in compared)} | |", ""]
    left = Counter(c.why for c in baseline if c.measured is None)
    lines += ["Not compared:", ""]
    lines += [f"- {number} values after resampling: {why}." for why, number in left.items()]
    lines += [f"- {name}: {why}." for name, why in ELSEWHERE.items()]
    return "\n".join(lines) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
