"""The loss that fits what a data set's labels ask for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from medseg.errors import Code, MedsegError
from medseg.labels import Labels
from medseg.losses import LOSSES
from medseg.losses.dice_ce import DiceCEConfig
from medseg.registry import make_config


def fitting_loss(settings: Mapping[str, Any], labels: Labels) -> tuple[dict[str, Any], str | None]:
    """The settings of the loss, with binary instead of categorical cross-entropy where there are regions.

    Args:
        settings: as the user chose them.
        labels: the classes.
    Returns:
        The settings to build, and why they are others than those given; None where they are the same.
    Raises:
        MedsegError: E_CONFIG for a loss that knows no regions, or no ignored voxels, where the labels have them.
    """
    name = str(settings.get("name", ""))
    if labels.regions and name == "dice_ce":
        given = make_config(DiceCEConfig, {k: v for k, v in settings.items() if k != "name"}, where="loss")
        if given.class_weights is not None:
            raise MedsegError(
                Code.CONFIG,
                "regions overlap and have no class weights",
                where="loss.class_weights",
                got=given.class_weights,
                remedy="leave loss.class_weights out",
            )
        fitting = {
            "name": "dice_bce",
            "dice_weight": given.dice_weight,
            "bce_weight": given.ce_weight,
            "batch_dice": given.batch_dice,
            "smooth": given.smooth,
        }
        return fitting, "dice_bce instead of dice_ce: regions overlap, so each has a yes or no of its own"
    if labels.regions and not getattr(LOSSES.part(name).build, "takes_regions", False):
        raise _unfit(name, "regions, which overlap", "loss=dice_bce")
    if labels.ignore and not _takes_labels(name):
        raise _unfit(name, "voxels that are ignored", "loss=dice_bce" if labels.regions else "loss=dice_ce")
    return dict(settings), None


def build_loss(settings: Mapping[str, Any], labels: Labels) -> nn.Module:
    """The loss of `fitting_loss`."""
    fitting, _ = fitting_loss(settings, labels)
    takes_labels = _takes_labels(str(fitting.get("name", "")))
    return LOSSES.build(fitting, labels=labels) if takes_labels else LOSSES.build(fitting)


def _takes_labels(name: str) -> bool:
    return "labels" in inspect.signature(LOSSES.part(name).build).parameters


def _unfit(name: str, what: str, remedy: str) -> MedsegError:
    return MedsegError(Code.CONFIG, f"this loss does not know {what}", where=f"loss={name}", remedy=f"use {remedy}")
