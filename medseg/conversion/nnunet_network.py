"""nnU-Net's networks as ours: settings from its plans, weights under our names.

PlainConvUNet is our `unet`, ResidualEncoderUNet our `residual_encoder_unet`. Three things differ. nnU-Net's checkpoints
hold each weight under up to four names. It concatenates what comes up before what comes across, we the other way
round. It has one more head, at the lowest resolution of the decoder, whose loss has no weight; it is left out.

Source:
    dynamic_network_architectures 0.4 (architectures/unet.py), nnunetv2 2.8 (utilities/plans_handling).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.registry import make_config

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
NORMALISATIONS = {
    "InstanceNorm2d": "instance",
    "InstanceNorm3d": "instance",
    "BatchNorm2d": "batch",
    "BatchNorm3d": "batch",
}
ACTIVATIONS = {"LeakyReLU": "leaky_relu", "ReLU": "relu"}
EPSILON = 1e-5
"""Of the variance: the only value that our normalisations have, and nnU-Net's."""
NEGATIVE_SLOPE = 0.01
"""Of torch's leaky ReLU where nothing else is stated."""
KNOWN_ARGUMENTS = frozenset(
    {
        "n_stages",
        "features_per_stage",
        "conv_op",
        "kernel_sizes",
        "strides",
        "n_conv_per_stage",
        "n_blocks_per_stage",
        "n_conv_per_stage_decoder",
        "conv_bias",
        "norm_op",
        "norm_op_kwargs",
        "dropout_op_kwargs",
        "nonlin",
        "nonlin_kwargs",
        "deep_supervision",
    }
)
"""Arguments of the networks that are read here; any other must be empty or false."""


@dataclass(frozen=True)
class Network:
    """One of nnU-Net's networks."""

    settings: Mapping[str, Any]
    """What `MODELS.build` takes, complete."""
    spatial_dims: int
    """2 or 3."""
    modules: Mapping[str, str]
    """nnU-Net's name of each module with weights → ours."""
    left_out: str | None
    """nnU-Net's name of the head that we do not have."""

    def build(self, *, in_channels: int, num_classes: int) -> torch.nn.Module:
        """The network without memory for its weights."""
        with torch.device("meta"):
            return MODELS.build(
                self.settings, in_channels=in_channels, num_classes=num_classes, spatial_dims=self.spatial_dims
            )


def network_of(configuration: Mapping[str, Any], *, where: str) -> Network:
    """Read a configuration of plans.json, of any version of nnU-Net v2.

    Args:
        configuration: with what it inherits.
        where: the file's name, for messages.
    Raises:
        MedsegError: E_MODEL for what our networks do not have.
        KeyError, TypeError, ValueError: if something is missing or of another type.
    """
    kind, arguments = _architecture(configuration)
    if kind not in (PLAIN, RESIDUAL):
        raise refused(f"networks of the kind {kind}", where, expected=f"{PLAIN} or {RESIDUAL}")
    for name, value in arguments.items():
        if name not in KNOWN_ARGUMENTS and value:
            raise refused(f"networks with {name}", where, got=value)
    num_stages = int(arguments["n_stages"])
    encoder = _per_stage(arguments["n_conv_per_stage" if kind == PLAIN else "n_blocks_per_stage"], num_stages)
    decoder = _per_stage(arguments["n_conv_per_stage_decoder"], num_stages - 1)
    settings: dict[str, Any] = {
        "widths": _per_stage(arguments["features_per_stage"], num_stages),
        "kernels": [_axes(k) for k in _per_stage(arguments["kernel_sizes"], num_stages)],
        "strides": [_axes(s) for s in _per_stage(arguments["strides"], num_stages)],
        "bias": bool(arguments["conv_bias"]),
        **_style(arguments, where),
    }
    counts = {*decoder, *(encoder if kind == PLAIN else ())}
    if len(counts) > 1:
        raise refused("networks whose stages have different numbers of convolutions", where, got=(encoder, decoder))
    if kind == PLAIN:
        name, settings["num_convolutions"] = "unet", counts.pop()
    else:
        name, settings["num_blocks"] = "residual_encoder_unet", encoder
        settings["num_decoder_convolutions"] = counts.pop()
    layers = _plain_encoder(encoder) if kind == PLAIN else _residual_encoder(encoder)
    modules: dict[str, str] = {}
    for theirs, ours in [*layers, *_decoder(decoder)]:
        modules |= {f"{theirs}.conv": f"{ours}.convolution", f"{theirs}.norm": f"{ours}.normalisation"}
    for stage in range(len(decoder)):
        modules[f"decoder.transpconvs.{stage}"] = f"decoder.{stage}.up.convolution"
        modules[f"decoder.seg_layers.{stage}"] = f"heads.{len(decoder) - 1 - stage}.convolution"
    left_out = "decoder.seg_layers.0" if len(decoder) > 1 else None
    config: Any = make_config(MODELS.part(name).config, settings, where="model")
    dims = 3 if str(arguments["conv_op"]).endswith("3d") else 2
    return Network({"name": name, **asdict(config)}, dims, modules, left_out)


def our_weights(
    theirs: Mapping[str, Tensor], network: Network, expected: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """nnU-Net's weights under our names, in our order of channels.

    Args:
        theirs: its state dict.
        network: what it belongs to.
        expected: our state dict, for names and shapes.
        where: the file's name, for messages.
    Raises:
        MedsegError: E_MODEL if the weights are not those of the network; E_CHECKPOINT if one is not finite.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for full_name, tensor in theirs.items():
        name = full_name.removeprefix("module.")  # of distributed training
        if ".all_modules." in name or name.startswith("decoder.encoder."):
            continue  # another name of a weight that has one
        module, _, leaf = name.rpartition(".")
        if module == network.left_out:
            continue
        if module not in network.modules:
            unknown.append(name)
            continue
        found[f"{network.modules[module]}.{leaf}"] = tensor
    unknown += [name for name in found if name not in expected]
    wrong = [name for name, tensor in expected.items() if name not in found or found[name].shape != tensor.shape]
    if wrong or unknown:
        raise MedsegError(
            Code.MODEL,
            "the weights are not those of the network that plans.json describes",
            where=where,
            expected=f"{len(expected)} tensors",
            got=f"missing or of another shape: {wrong[:3] or 'none'}; unknown: {unknown[:3] or 'none'}",
            remedy="trainers that build networks of their own cannot be converted; else check that plans.json is "
            "that of this training",
        )
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise MedsegError(Code.CHECKPOINT, "a weight is NaN or infinite", where=where, got=name)
        if name.startswith("decoder.") and name.endswith(".block.0.convolution.weight"):
            found[name] = tensor.roll(tensor.shape[1] // 2, dims=1)
    return found


def refused(
    what: str, where: str, *, expected: object = None, got: object = None, remedy: str | None = None
) -> MedsegError:
    """The refusal of something that nnU-Net has and medseg does not."""
    return MedsegError(
        Code.MODEL, f"{what} cannot be converted", where=where, expected=expected, got=got, remedy=remedy
    )


def _architecture(configuration: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of a network; plans before nnU-Net 2.4 state them one by one."""
    if "architecture" in configuration:
        architecture = configuration["architecture"]
        return str(architecture["network_class_name"]).rpartition(".")[2], dict(architecture["arch_kwargs"])
    kind = str(configuration["UNet_class_name"])
    encoder = configuration["n_conv_per_stage_encoder"]
    dims = len(configuration["patch_size"])
    base, most = int(configuration["UNet_base_num_features"]), int(configuration["unet_max_num_features"])
    return kind, {
        "n_stages": len(encoder),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(len(encoder))],
        "conv_op": f"Conv{dims}d",
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        "n_conv_per_stage" if kind == PLAIN else "n_blocks_per_stage": encoder,
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": EPSILON, "affine": True},
        "nonlin": "LeakyReLU",
    }


def _style(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Normalisation and activation."""
    norm, nonlin = (str(arguments[key]).rpartition(".")[2] for key in ("norm_op", "nonlin"))
    of_norm, of_nonlin = (dict(arguments.get(key) or {}) for key in ("norm_op_kwargs", "nonlin_kwargs"))
    if norm not in NORMALISATIONS:
        raise refused(f"networks with {norm}", where, expected=" | ".join(NORMALISATIONS))
    if nonlin not in ACTIVATIONS:
        raise refused(f"networks with {nonlin}", where, expected=" | ".join(ACTIVATIONS))
    affine = of_norm.get("affine", norm.startswith("Batch"))
    if not affine or float(of_norm.get("eps", EPSILON)) != EPSILON:
        raise refused(f"{norm} of this form", where, expected=f"affine, eps {EPSILON}", got=of_norm)
    slope = float(of_nonlin.get("negative_slope", NEGATIVE_SLOPE))
    return {"normalisation": NORMALISATIONS[norm], "activation": ACTIVATIONS[nonlin], "negative_slope": slope}


def _plain_encoder(convolutions: Sequence[int]) -> Iterator[tuple[str, str]]:
    """nnU-Net's name of each convolution with its normalisation, and ours."""
    for stage, count in enumerate(convolutions):
        for i in range(count):
            ours = f"block.0.{i}" if stage == 0 else "down.block" if i == 0 else f"block.0.{i - 1}"
            yield f"encoder.stages.{stage}.0.convs.{i}", f"encoder.{stage}.{ours}"


def _residual_encoder(blocks: Sequence[int]) -> Iterator[tuple[str, str]]:
    yield "encoder.stem.convs.0", "encoder.0.block.0"
    for stage, count in enumerate(blocks):
        for i in range(count):
            block = f"block.{i + 1}" if stage == 0 else "down.block" if i == 0 else f"block.{i - 1}"
            theirs, ours = f"encoder.stages.{stage}.blocks.{i}", f"encoder.{stage}.{block}"
            yield f"{theirs}.conv1", f"{ours}.convolutions.0"
            yield f"{theirs}.conv2", f"{ours}.convolutions.1"
            for place in (0, 1):  # the projection stands after the pooling where there is one, in both
                yield f"{theirs}.skip.{place}", f"{ours}.shortcut.{place}"


def _decoder(convolutions: Sequence[int]) -> Iterator[tuple[str, str]]:
    for stage, count in enumerate(convolutions):
        for i in range(count):
            yield f"decoder.stages.{stage}.convs.{i}", f"decoder.{stage}.block.{i}"


def _per_stage(value: Any, num_stages: int) -> list[Any]:
    """One value for each stage.

    Raises:
        ValueError: for a list of another length.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * num_stages
    if len(values) != num_stages:
        raise ValueError(f"{len(values)} values for {num_stages} stages")
    return values


def _axes(value: Any) -> int | tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else int(value)
