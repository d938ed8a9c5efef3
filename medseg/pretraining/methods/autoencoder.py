"""The autoencoder: the segmenter's encoder, its bottleneck, and a decoder that gets nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from medseg.errors import Code, MedsegError
from medseg.pretraining.methods.method import METHODS, Hidden, Method, keys_of
from medseg.pretraining.reconstruction import Error


@dataclass(frozen=True)
class AutoencoderConfig:
    """Settings of `Autoencoder`."""

    loss: Error = "l2"
    """What the error of a voxel costs: l1 (its size), l2 (its square)."""


@METHODS.register("autoencoder", AutoencoderConfig)
class Autoencoder(Method):
    """Reconstructs all of an image from the coarsest maps alone.

    The network is the segmenter without its skips (`model.skip=none`): its encoder, and its steps up (transposed
    convolutions, unless `model.up` says otherwise) with their convolutions: a deconvolution decoder. Its tensors have
    the segmenter's names. How narrow the bottleneck is follows from the plan: where its maps hold more numbers than
    the patch has voxels, copying is possible, and little need be learnt.

    Args:
        config: the settings.
        coarsest: not used.

    Source:
        Hinton, Salakhutdinov: Reducing the Dimensionality of Data with Neural Networks, Science 2006; as convolutions
        Masci et al., ICANN 2011. The decoder: Zeiler et al., Deconvolutional Networks, CVPR 2010; Noh, Hong, Han,
        ICCV 2015, but for its unpooling.
    """

    def __init__(self, config: AutoencoderConfig, *, coarsest: tuple[int, ...]) -> None:
        self.loss = config.loss

    def network(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """See `Method.network`."""
        if "skip" not in keys_of(model):
            raise MedsegError(
                Code.CONFIG,
                "an autoencoder needs a network whose skips can be left out",
                where=f"model={model['name']}",
                expected="a network with the key model.skip, such as unet or fusionnet",
                remedy="choose method=masked, which takes any network, or model=unet",
            )
        return {**super().network(model), "skip": "none"}

    def in_words(self, patch_size: tuple[int, ...]) -> str:
        """See `Method.in_words`."""
        return f"autoencoder: all of a patch is reconstructed from the coarsest maps, {self.loss}"

    def hide(self, image: torch.Tensor, key: tuple[int, ...], indices: Iterable[int]) -> Hidden:
        """Nothing is hidden, and everything asked for."""
        return Hidden(image, torch.ones_like(image[:, :1]))
