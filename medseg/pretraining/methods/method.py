"""What every method of pretraining promises, and the registry of methods."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from medseg.models import MODELS
from medseg.pretraining.reconstruction import Error
from medseg.registry import Registry


class Hidden(NamedTuple):
    """What a network gets to see of a batch, and where it is asked for the rest."""

    image: torch.Tensor
    """Shape (N, C, *P)."""
    asked: torch.Tensor
    """Float, shape (N, 1, *P): 1 where the reconstruction counts, else 0."""


class Method(ABC):
    """A way to learn from images alone. Built as `Method(config, *, coarsest)`.

    Args:
        coarsest: voxels of the image along each axis that one voxel of the network's coarsest maps stands for.
    """

    loss: Error
    """Of a voxel that counts."""

    def network(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the network that reconstructs, from those of the segmenter that it is to begin: the same
        with one result in place of several resolutions.

        Args:
            model: name and settings of the segmenter.
        Raises:
            MedsegError: E_CONFIG for a network that the method cannot use.
        """
        return {**model, "deep_supervision": False} if "deep_supervision" in keys_of(model) else dict(model)

    @abstractmethod
    def in_words(self, patch_size: tuple[int, ...]) -> str:
        """What it does with patches of this size, for the user."""

    @abstractmethod
    def hide(self, image: torch.Tensor, key: tuple[int, ...], indices: Iterable[int]) -> Hidden:
        """Hide a part of each image of a batch.

        Args:
            image: shape (N, C, *P); stays as it is.
            key: what decides what is drawn, such as (seed, step).
            indices: which samples of the whole batch these are: of several processes each draws its own.
        """


def keys_of(model: Mapping[str, Any]) -> set[str]:
    """The keys that the network of these settings has."""
    return {field.name for field in dataclasses.fields(MODELS.part(str(model["name"])).config)}


METHODS: Registry[Method] = Registry("method", "medseg.pretraining.methods")
"""All methods by name."""
