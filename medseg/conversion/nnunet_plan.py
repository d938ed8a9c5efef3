"""What nnU-Net's plans.json and dataset.json say of a model, as plan, labels and channels of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from medseg.conversion.nnunet_network import Network, refused
from medseg.data.plan import Normalisation, Plan, Preset
from medseg.errors import Code, MedsegError
from medseg.labels import IGNORE, ORDER_KEY, Labels
from medseg.models.blocks.dimensions import per_axis

PLANS_FILE, DATASET_FILE = "plans.json", "dataset.json"
DEFAULT_ORIENTATION = "RAS"
"""Of training files, where nothing is said: NIfTI's own frame, and what tools that make axes uniform choose."""
TURNING_READER = "NibabelIOWithReorient"
"""nnU-Net's reader that turns every file to RAS."""
FREE_READERS = ("SimpleITKIO", "NibabelIO")
"""Its readers that leave the axes as they are."""
PICTURE_READER = "NaturalImage2DIO"
AXIS_LETTERS = ("LR", "AP", "IS")
Z_SCORE, CT, RGB = "ZScoreNormalization", "CTNormalization", "RGBTo01Normalization"
NORMALISATIONS: dict[str, Normalisation] = {
    Z_SCORE: "z-score", CT: "ct", RGB: "ct", "RescaleTo01Normalization": "rescale", "NoNormalization": "none",
}  # fmt: skip
PRESETS: dict[str, Preset] = {
    "ResEncUNetMPlans": "resenc_m", "ResEncUNetLPlans": "resenc_l", "ResEncUNetXLPlans": "resenc_xl",
}  # fmt: skip
"""Ours by what the names of its plans hold; all others count as nnU-Net's own."""
RGB_INTENSITY = (0.0, 255.0, 0.0, 255.0)
"""Low and high clip, mean and deviation that map 0–255 to 0–1."""
RESAMPLING = "resample_data_or_seg_to_shape"
ORDERS = {"data": 3, "probabilities": 1}
"""How nnU-Net resamples, and so medseg: the orders of its splines."""
ANY_INTENSITY = (0.0, 1.0, 0.0, 1.0)
"""Stands where the z-score of each image needs none."""


def labels_of(dataset: Mapping[str, Any]) -> Labels:
    """The classes, or the regions where one of them has several values, in the order of the network's outputs.

    Raises:
        MedsegError: E_LABEL for values that are not 0, 1, 2, …, and what `Labels` refuses.
    """
    table = {
        str(name): [int(v) for v in value] if isinstance(value, list) else [int(value)]
        for name, value in dataset["labels"].items()
    }
    classes = {name: values for name, values in table.items() if name != IGNORE}
    has_regions = any(len(values) > 1 for values in classes.values())
    found = sorted(v for values in classes.values() for v in (set(values) if has_regions else values))
    if (sorted(set(found)) if has_regions else found) != list(range(len(set(found)))):
        raise MedsegError(
            Code.LABEL, "label values must be 0, 1, 2, …", where=DATASET_FILE, expected="no gaps", got=table
        )
    if has_regions:
        return Labels.from_mapping({**table, ORDER_KEY: dataset[ORDER_KEY]})
    return Labels.from_mapping(dict(sorted(table.items(), key=lambda item: (item[0] == IGNORE, item[1]))))


def channels_of(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the channels, in order."""
    names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    return tuple(str(names[key]) for key in sorted(names, key=int))


def plan_of(
    plans: Mapping[str, Any],
    configuration: Mapping[str, Any],
    network: Network,
    *,
    name: str,
    num_channels: int,
    orientation: str | None,
) -> Plan:
    """What the network sees.

    Args:
        plans: plans.json.
        configuration: of it, with what it inherits.
        network: as it was read from the configuration.
        name: of the configuration (3d_fullres, …).
        num_channels: of an image.
        orientation: of the training files (axes i, j, k); None is `DEFAULT_ORIENTATION`.
    Raises:
        MedsegError: E_MODEL for what medseg does not prepare; E_CONFIG for a wrong orientation.
    """
    dims = network.spatial_dims
    preprocessor = configuration.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise refused(f"models with the preprocessor {preprocessor}", PLANS_FILE)
    _refuse_resampling(configuration)
    spacing = tuple(float(s) for s in configuration["spacing"])
    patch = tuple(int(p) for p in configuration["patch_size"])
    if {len(spacing), len(patch)} != {dims}:
        raise ValueError(f"spacing {spacing} and patch {patch} of a network in {dims}D")
    reader = str(plans["image_reader_writer"])
    if dims == 2:
        axes, why = _picture_axes(reader, spacing, orientation)
    else:
        axes, why = _volume_axes(reader, [int(axis) for axis in plans["transpose_forward"]], orientation)
    normalisation, masked, intensity = _normalisation(plans, configuration, num_channels)
    ours = "nnU-Net's plans.json"
    reasons = {**dict.fromkeys((field.name for field in fields(Plan) if field.name != "reasons"), ours)}
    reasons |= {"orientation": why, "crop": "nnU-Net always cuts off borders of zeros"}
    kernels, strides = (
        tuple(per_axis(value, dims, where=f"model.{name}") for value in network.settings[name])
        for name in ("kernels", "strides")
    )
    return Plan(
        preset=next((ours for theirs, ours in PRESETS.items() if theirs in str(plans.get("plans_name"))), "nnunet"),
        configuration="lowres" if name == "3d_lowres" else "fullres",
        spatial_dims=dims,
        num_channels=num_channels,
        orientation=axes,
        spacing_mm=spacing,
        crop=True,
        normalisation=normalisation,
        mask_normalisation=masked,
        intensity=intensity,
        patch_size=patch,
        batch_size=int(configuration["batch_size"]),
        widths=tuple(network.settings["widths"]),
        kernels=kernels,
        strides=strides,
        memory_gb=0.0,
        reasons=reasons,
    )


def _refuse_resampling(configuration: Mapping[str, Any]) -> None:
    """Only nnU-Net's own resampling is what medseg does: the network of another one saw other images."""
    for of in ("data", "probabilities"):
        function = configuration.get(f"resampling_fn_{of}", RESAMPLING)
        settings = {"order_z": 0, "force_separate_z": None, **configuration.get(f"resampling_fn_{of}_kwargs", {})}
        stated = (function, settings.get("order", ORDERS[of]), settings["order_z"], settings["force_separate_z"])
        if stated != (RESAMPLING, ORDERS[of], 0, None):
            raise refused(f"models that resample {of} by {function} {settings}", PLANS_FILE)


def _picture_axes(reader: str, spacing: tuple[float, ...], orientation: str | None) -> tuple[str, str]:
    """The orientation of a 2D network, which is none, and why."""
    if reader != PICTURE_READER or set(spacing) != {1.0}:
        raise refused(
            "2D networks of volumes", PLANS_FILE, expected=f"2D networks of pictures ({PICTURE_READER})",
            got=f"{reader}, spacing {spacing}", remedy="convert 3d_fullres of this data set",
        )  # fmt: skip
    if orientation is not None:
        raise MedsegError(
            Code.CONFIG, "pictures have no orientation in a patient", where="--orientation", got=orientation
        )
    return "", "pictures have no orientation in a patient"


def _volume_axes(reader: str, order: list[int], orientation: str | None) -> tuple[str, str]:
    """Where the axes run to that a 3D network saw, and why.

    Args:
        reader: nnU-Net's name of the class that read the files.
        order: `transpose_forward` of plans.json.
        orientation: what the user says of the training files.
    """
    if reader not in (TURNING_READER, *FREE_READERS):
        raise refused(
            f"models of files that {reader} reads", PLANS_FILE, expected=" | ".join((TURNING_READER, *FREE_READERS))
        )
    if sorted(order) != [0, 1, 2]:
        raise ValueError(f"transpose_forward {order}")
    letters = (orientation or DEFAULT_ORIENTATION).upper()
    if sorted("".join(pair for pair in AXIS_LETTERS if letter in pair) for letter in letters) != sorted(AXIS_LETTERS):
        raise MedsegError(
            Code.CONFIG,
            "these letters are no orientation of three axes",
            where="--orientation",
            expected="where the axes i, j, k of the training files run to, such as RAS, LAS or LPS",
            got=orientation,
        )
    if reader == TURNING_READER and letters != "RAS":
        raise MedsegError(
            Code.CONFIG,
            "nnU-Net turned the training files of this model to RAS",
            where="--orientation",
            got=orientation,
            remedy="leave --orientation out",
        )
    axes = "".join(letters[::-1][axis] for axis in order)  # nnU-Net reads k, j, i
    if reader == TURNING_READER:
        why = "nnU-Net turned the training files to RAS"
    elif orientation is None:
        why = (
            f"the training files are taken to be {letters}: nnU-Net does not write down their orientation; "
            "if they were otherwise, say so with --orientation"
        )
    else:
        why = f"the training files were {letters} (--orientation)"
    return axes, f"{why}; the network sees axes to {axes}, scans of any orientation are turned to that"


def _normalisation(
    plans: Mapping[str, Any], configuration: Mapping[str, Any], num_channels: int
) -> tuple[tuple[Normalisation, ...], bool, tuple[tuple[float, float, float, float], ...]]:
    """How each channel is normalised, whether inside the nonzero voxels only, and the numbers for each channel."""
    schemes = [str(scheme) for scheme in configuration["normalization_schemes"]]
    if len(schemes) != num_channels:
        raise ValueError(f"{len(schemes)} normalisations for {num_channels} channels")
    unknown = [scheme for scheme in schemes if scheme not in NORMALISATIONS]
    if unknown:
        raise refused(f"models with {unknown[0]}", PLANS_FILE, expected=" | ".join(NORMALISATIONS))
    use_mask = configuration.get("use_mask_for_norm") or [False] * num_channels
    masked = {bool(mask) for mask, scheme in zip(use_mask, schemes, strict=True) if scheme == Z_SCORE}
    if len(masked) > 1:
        raise refused("models that mask the z-score of some channels only (use_mask_for_norm)", PLANS_FILE)
    by_channel = plans.get("foreground_intensity_properties_per_channel")
    if by_channel is None:
        by_channel = plans.get("foreground_intensity_properties_by_modality", {})
    numbers = []
    for channel, scheme in enumerate(schemes):
        if scheme == CT:
            of_channel = by_channel[str(channel)]
            low, high, mean, std = (
                float(of_channel[key]) for key in ("percentile_00_5", "percentile_99_5", "mean", "std")
            )
            numbers.append((low, high, mean, max(std, 1e-8)))
        else:
            numbers.append(RGB_INTENSITY if scheme == RGB else ANY_INTENSITY)
    return tuple(NORMALISATIONS[scheme] for scheme in schemes), True in masked, tuple(numbers)
