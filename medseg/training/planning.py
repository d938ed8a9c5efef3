"""Plan and network of a run, and `medseg plan`, which ends there."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path

import torch

from medseg.bundle import BundleInfo
from medseg.data.augment import mirrored_axes, swapped_classes
from medseg.data.facts import Survey
from medseg.data.plan import Machine, Plan, machine_for, make_plan, with_memory, with_model, with_patch
from medseg.data.plan.file import as_stated, read_plan, refuse_other_data, with_stated
from medseg.data.plan.memory import complete_settings
from medseg.device import choose_precision
from medseg.errors import Code, MedsegError
from medseg.training.distributed import num_processes
from medseg.training.experiment import Experiment
from medseg.training.initial import as_before, begun_by
from medseg.training.pretrained import settled

OF_STAGES = ("widths", "kernels", "strides")
"""What a plan and the settings of a network both state."""

PRECISION_ELSEWHERE = "bf16"
"""Of a GPU that is planned for and not in this machine."""


def plan_run(experiment: Experiment, found: Survey, device: torch.device) -> BundleInfo:
    """The plan and the complete settings of the model: each takes from the other what the user has set there.

    Raises:
        MedsegError: E_MODEL if a patch size that was asked for does not fit the network; names the nearest that do.
            What planning and a plan file refuse.
    """
    stated = experiment.data.plan
    experiment = dataclasses.replace(experiment, model=settled(experiment.model))
    experiment, before = begun_by(experiment, spatial_dims=found.spatial_dims, num_channels=found.num_channels)
    is_here = device.type != "cuda" or torch.cuda.is_available()
    precision = choose_precision(experiment.trainer.precision, device) if is_here else PRECISION_ELSEWHERE
    machine = machine_for(
        found,
        experiment.data.plan,
        device=device.type,
        model=experiment.model,
        precision=precision,
        processes=num_processes(experiment.trainer.devices),
        accumulate=experiment.trainer.accumulate,
    )
    plan = as_before(_plan(experiment, found, machine), before, stated)
    names = found.labels.declared
    mirrored = mirrored_axes(experiment.augment, names, spatial_dims=plan.spatial_dims, is_picture=not plan.orientation)
    info = BundleInfo(
        complete_settings(experiment.model, plan.widths, plan.kernels, plan.strides),
        plan,
        found.labels,
        found.channel_names,
        mirrored,
        modality=found.modality,
        structures=found.structures,
        swap=swapped_classes(experiment.augment, names),
    )
    model = info.build_model()
    patch = model.next_size(plan.patch_size)
    if experiment.data.plan.patch_size is None and experiment.plan is None and patch != plan.patch_size:
        plan = with_patch(plan, patch, f"{plan.reasons['patch_size']}; enlarged to what the network takes")
    model.output_size(plan.patch_size)
    return dataclasses.replace(info, plan=with_memory(plan, machine))


def _plan(experiment: Experiment, found: Survey, machine: Machine) -> Plan:
    """The plan, of a file where one is named, with what the settings of the model state."""
    settings, config = experiment.model, experiment.data.plan
    given = {name: settings[name] for name in OF_STAGES if settings.get(name) is not None}
    if given and config.num_stages is None:
        config = dataclasses.replace(config, num_stages=len(next(iter(given.values()))))
    if experiment.plan is None:
        plan = make_plan(found, config, machine)
        if config != experiment.data.plan:
            why = f"as many stages as model.{next(iter(given))} has"
            plan = dataclasses.replace(plan, reasons={**plan.reasons, "strides": why})
        return with_model(plan, given)
    path = Path(experiment.plan)
    stated = read_plan(path)
    refuse_other_data(stated, found, where=f"plan={path.name}")
    _refuse_other_network(stated, str(settings["name"]), where=f"plan={path.name}")
    own = None
    with suppress(MedsegError):  # what would be planned here is told where something can be
        own = make_plan(found, config, machine)
    plan = make_plan(found, with_stated(config, stated), machine)
    return with_model(as_stated(plan, stated, own, config, path.name), given)


def _refuse_other_network(stated: Plan, name: str, where: str) -> None:
    """A residual-encoder preset plans patch and batch for its own network.

    Raises:
        MedsegError: E_CONFIG.
    """
    if stated.preset.startswith("resenc") and name == "unet":
        preset = stated.preset.rpartition("_")[2].upper()
        raise MedsegError(
            Code.CONFIG,
            "the plan was made for another network",
            where=where,
            expected="model=residual_encoder_unet",
            got=f"model={name}",
            remedy=f"state the preset as well: preset={preset} {where}",
        )
