"""Fine-tuning: begin with the weights of another run, trained or pretrained, and see the data as that run did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from medseg.bundle import MODEL_PREFIX, BundleInfo, checkpoint_path, opened, read_checkpoint
from medseg.data.plan import Plan, PlanConfig
from medseg.data.splits import SPLIT_FILE, Split, read_split
from medseg.documents import parse_yaml
from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.models.shapes import ShapesOnly
from medseg.training.experiment import PLACES_FILE, Experiment

TAKEN_OVER = (
    "configuration",
    "orientation",
    "spacing_mm",
    "crop",
    "normalisation",
    "mask_normalisation",
    "patch_size",
    "batch_size",
)
"""What is taken over of the other run's plan where no key states it: its weights know the world like that."""
DEFAULT_MODEL = "unet"
"""The network where no key states one (configs/train.yaml)."""
REASON = "of the run that training starts from (trainer.initial)"
NUM_NAMED = 6
"""Most tensors that a line names."""


def begun_by(experiment: Experiment, *, spatial_dims: int, num_channels: int) -> tuple[Experiment, Plan | None]:
    """The experiment with network and plan of the run that it starts from.

    Args:
        experiment: as the user states it.
        spatial_dims: of the new data.
        num_channels: the same; with others than that run's, each has the normalisation that is planned anew.
    Returns:
        The experiment (as it is without `trainer.initial`) and the plan of that run, if it is taken over.
    Raises:
        MedsegError: E_RUN if there is no such run; E_MODEL if it is for pictures and the data are volumes, or the
            other way round; E_CONFIG for keys of the network that it has otherwise.
    """
    if experiment.trainer.initial is None:
        return experiment, None
    info = BundleInfo.read(Path(experiment.trainer.initial))
    _refuse_other_model(experiment.model, info.model)
    if info.plan.spatial_dims != spatial_dims:
        raise MedsegError(
            Code.MODEL,
            "the run that training starts from has another number of dimensions than the data",
            where="trainer.initial",
            expected=f"{spatial_dims}D",
            got=f"{info.plan.spatial_dims}D",
        )
    names = [name for name in TAKEN_OVER if name != "normalisation" or info.plan.num_channels == num_channels]
    if experiment.plan is not None:  # a plan that is named wins over one that is taken over
        return dataclasses.replace(experiment, model=dict(info.model)), None
    config = experiment.data.plan
    planned = {name: getattr(info.plan, name) for name in names if getattr(config, name) is None}
    if not info.plan.orientation:  # pictures have neither
        planned = {name: value for name, value in planned.items() if name not in ("orientation", "configuration")}
    data = dataclasses.replace(experiment.data, plan=dataclasses.replace(config, **planned))
    return dataclasses.replace(experiment, data=data, model=dict(info.model)), info.plan


def _refuse_other_model(stated: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Refuse keys of the network that would have no effect: those that are not their defaults."""
    name = str(stated["name"])
    defaults = {"name": DEFAULT_MODEL, **{f.name: f.default for f in dataclasses.fields(MODELS.part(name).config)}}
    other = [
        key for key, value in stated.items() if _plain(value) not in (_plain(defaults.get(key)), _plain(taken.get(key)))
    ]
    if other:
        raise MedsegError(
            Code.CONFIG,
            "the network is that of the run that training starts from",
            where=f"model.{other[0]}" if other[0] != "name" else f"model={name}",
            expected=f"{other[0]}: {taken.get(other[0])}",
            got=stated[other[0]],
            remedy="leave model and preset out: trainer.initial takes the network over, or begin without it",
        )


def _plain(value: Any) -> Any:
    """Tuples as the lists that files hold."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def as_before(plan: Plan, before: Plan | None, config: PlanConfig) -> Plan:
    """The plan with the intensities of the run that it starts from, and with that as the reason of what it took over.

    Args:
        plan: made by the keys of `begun_by`.
        before: the other run's; None changes nothing.
        config: the keys that the user stated.
    """
    if before is None:
        return plan
    names = {name for name in TAKEN_OVER if getattr(config, name) is None} | {"widths", "kernels", "strides"}
    if plan.normalisation == before.normalisation:
        plan = dataclasses.replace(plan, intensity=before.intensity)
        names.add("intensity")
    same = {name for name in names if getattr(plan, name) == getattr(before, name)}
    return dataclasses.replace(plan, reasons={**plan.reasons, **dict.fromkeys(same, REASON)})


@torch.no_grad()
def load_initial(model: nn.Module, info: BundleInfo, initial: Path) -> list[str]:
    """Put the best weights of another run into a network.

    Heads for another number of classes keep their fresh weights; as many of other names are taken, and said. Filters
    over another number of channels all become the mean of the old channels' filters, scaled so that equal channels give
    the same answer. Of a pretraining all is taken that has the same name and shape, but for the heads, which
    reconstructed images there.

    Args:
        model: fresh.
        info: what it is.
        initial: the other run, trained, pretrained or converted, or its bundle.
    Returns:
        Lines that say what was taken, and what was not.
    Raises:
        MedsegError: E_RUN or E_CHECKPOINT from reading; E_MODEL if the networks differ in anything else.
    """
    before = BundleInfo.read(initial)
    path = checkpoint_path(opened(initial), "best")
    tensors, _ = read_checkpoint(path)
    old = {k.removeprefix(MODEL_PREFIX): v for k, v in tensors.items() if k.startswith(MODEL_PREFIX)}
    own = model.state_dict()
    classes = (before.labels.num_outputs, info.labels.num_outputs)
    channels = (before.plan.num_channels, info.plan.num_channels)
    heads = set() if before.method is None else heads_of(info)
    fresh: list[str] = []
    adapted: list[str] = []
    wrong = [name for name in old if name not in own]
    for name, tensor in own.items():
        if name in heads:
            continue
        if name not in old:
            wrong.append(name)
        elif old[name].shape == tensor.shape:
            tensor.copy_(old[name])
        elif before.method is None and _differ_along(old[name], tensor, 0, classes):
            fresh.append(name)
        elif _differ_along(old[name], tensor, 1, channels):
            mean = old[name].mean(dim=1, keepdim=True) * (channels[0] / channels[1])
            tensor.copy_(mean.expand_as(tensor))
            adapted.append(name)
        else:
            wrong.append(name)
    num_taken = len(own) - len(own.keys() & {*fresh, *adapted, *wrong, *heads})
    if (before.method is None and wrong) or not num_taken + len(adapted):
        raise MedsegError(
            Code.MODEL,
            "the weights to start from do not fit the network",
            where=path,
            expected="the same network; only its classes and channels may differ",
            got=f"missing, unknown or of another shape: {_some(wrong)}",
            remedy="leave model and data.plan as that run had them: trainer.initial takes them over",
        )
    lines = [f"initial    {num_taken} of {len(own)} tensors taken from {initial}"]
    if before.method is not None:
        lines[0] += f", a pretraining ({before.method['name']})"
        lines.append(f"           fresh, for they are the heads: {_some(sorted(heads))}")
        begun = [name for name in own if name in wrong]
        if begun:
            lines.append(f"           fresh, for the pretraining had none of that shape: {_some(begun)}")
        left = sorted(old.keys() - own.keys())
        if left:
            lines.append(f"           not taken, for this network has none of that name: {_some(left)}")
    elif before.labels.declared != info.labels.declared and not fresh:
        lines.append("           its heads are kept though they are of other classes: they have to learn anew")
    if fresh:
        lines.append(f"           fresh, for {classes[1]} instead of {classes[0]} classes: {_some(fresh)}")
    if adapted:
        lines.append(f"           spread over {channels[1]} instead of {channels[0]} channel(s): {_some(adapted)}")
    return lines


def heads_of(info: BundleInfo) -> set[str]:
    """Names of the tensors whose shape follows from the number of classes: what turns feature maps into scores.

    Args:
        info: what the network is.
    """
    plan = info.plan
    shapes: list[dict[str, torch.Size]] = []
    for number in (info.labels.num_outputs, info.labels.num_outputs + 1):
        context = {"in_channels": plan.num_channels, "num_classes": number, "spatial_dims": plan.spatial_dims}
        try:
            with ShapesOnly():
                built = MODELS.build(info.model, **context)
        except (NotImplementedError, RuntimeError):  # it computes with numbers while it is built
            built = MODELS.build(info.model, **context)
        shapes.append({name: tensor.shape for name, tensor in built.state_dict().items()})
    first, second = shapes
    return {name for name in first if first[name] != second.get(name)}


def seen_before(initial: Path, split: Split, root: str | None) -> list[str]:
    """Whether the run that training starts from was trained on cases that now validate or test.

    Args:
        initial: that run.
        split: of the new one.
        root: the new one's `data.root`.
    Returns:
        Lines for the user: ids that coincide, where the data may be others.
    Raises:
        MedsegError: E_LEAK if both train on the same folder.
    """
    if not (initial / SPLIT_FILE).is_file():
        return [
            "           nothing tells which cases these weights were trained on: they may be among those that validate"
        ]
    before = set(read_split(initial / SPLIT_FILE).train)
    seen = sorted(before & {*split.val, *split.test})
    if not seen:
        return []
    if BundleInfo.read(initial).method is not None:
        return [
            f"note       {len(seen)} cases that validate or test were among the images of the pretraining, without "
            f"their labels: {_some(seen)}"
        ]
    where = _root_of(initial)
    if where is not None and root is not None and Path(where).resolve() == Path(root).resolve():
        raise MedsegError(
            Code.LEAK,
            "the run that training starts from was trained on cases that now validate or test",
            where="trainer.initial",
            got=f"{len(seen)} cases: {_some(seen)}",
            expected="cases that it has not seen",
            remedy=f"divide the cases as that run did: data.split.file={initial / SPLIT_FILE}",
        )
    return [
        f"warning    {len(seen)} ids that validate or test trained that run: {_some(seen)}; if they are the same "
        "cases, the results below are too good"
    ]


def _root_of(run: Path) -> str | None:
    """The `data.root` of a run; None where it came without its places, or they cannot be read."""
    try:
        return str(parse_yaml((run / PLACES_FILE).read_text(encoding="utf-8"))["data.root"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _differ_along(old: torch.Tensor, new: torch.Tensor, axis: int, lengths: tuple[int, int]) -> bool:
    """Whether the shapes differ along one axis only, by the lengths given."""
    if old.ndim != new.ndim or old.ndim <= axis or (old.shape[axis], new.shape[axis]) != lengths:
        return False
    return old.shape[:axis] == new.shape[:axis] and old.shape[axis + 1 :] == new.shape[axis + 1 :]


def _some(names: Sequence[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
