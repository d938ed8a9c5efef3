"""A plan that was written, and perhaps edited by hand, used again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from medseg.data.facts import Survey
from medseg.data.plan.schema import Plan, PlanConfig
from medseg.documents import parse_yaml
from medseg.errors import Code, MedsegError

PLAN_FILE = "plan.yaml"
"""The plan in a run's folder, and in that of `medseg plan`."""
KEYS = (
    "configuration", "orientation", "spacing_mm", "crop", "normalisation", "mask_normalisation", "patch_size",
    "batch_size",
)  # fmt: skip
"""Values that a key of the same name overrides."""


def read_plan(path: Path) -> Plan:
    """A plan file, or the one in a folder.

    Raises:
        MedsegError: E_MISSING if it is not there; E_CONFIG if it is no plan, or its values do not fit each other.
    """
    path = path / PLAN_FILE if path.is_dir() else path
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MedsegError(
            Code.MISSING,
            "there is no such plan",
            where=path,
            expected=f"a {PLAN_FILE} that medseg plan or medseg train wrote, or the folder that holds it",
            remedy="write one: medseg plan data.root=FOLDER",
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MedsegError(
            Code.CONFIG, "the plan cannot be read", where=path, got=" ".join(str(error).split())
        ) from error
    if not isinstance(values, dict):
        raise MedsegError(
            Code.CONFIG, "this is no plan", where=path, expected="a table of values", got=type(values).__name__
        )
    try:
        return Plan.from_json({**values, "reasons": {}})
    except MedsegError as error:
        # The message names the key; the file is said here.
        raise MedsegError(
            error.code, error.message, where=f"{path.name}: {error.where}", expected=error.expected, got=error.got,
            remedy=error.remedy or "edit the file, or write a new one: medseg plan data.root=FOLDER",
        ) from error  # fmt: skip


def with_stated(config: PlanConfig, stated: Plan) -> PlanConfig:
    """The overrides, those that are not set taken from a plan that was stated: keys win over the file."""
    values: dict[str, Any] = {key: getattr(stated, key) for key in KEYS if getattr(config, key) is None}
    values |= {"orientation": values.get("orientation") or config.orientation}  # "" for pictures
    values |= {"num_stages": config.num_stages or len(stated.strides)}
    if config.preset == PlanConfig().preset:
        values["preset"] = stated.preset
    return replace(config, **values)


def refuse_other_data(stated: Plan, survey: Survey, where: str) -> None:
    """A plan is of use for data of its kind only.

    Raises:
        MedsegError: E_CONFIG.
    """
    of_plan = f"{stated.spatial_dims}D with {stated.num_channels} channel(s)"
    of_data = f"{survey.spatial_dims}D with {survey.num_channels} channel(s)"
    if of_plan != of_data:
        raise MedsegError(
            Code.CONFIG,
            "the plan was made for other data",
            where=where,
            expected=of_data,
            got=of_plan,
            remedy="leave plan= out, or plan these data: medseg plan data.root=FOLDER",
        )


def as_stated(plan: Plan, stated: Plan, own: Plan | None, config: PlanConfig, name: str) -> Plan:
    """A plan with the values of a file where no key overrides them, and with that for a reason.

    Args:
        plan: made with what the file states for overrides.
        stated: the file.
        own: what would be planned without it; None where nothing can be.
        config: the user's overrides beside the file.
        name: of the file.
    """
    taken = ["intensity", *(key for key in KEYS if getattr(config, key) is None)]
    if config.preset == stated.preset or config.preset == PlanConfig().preset:
        taken.append("preset")
    if config.num_stages is None:
        taken += ["kernels", "strides", *(["widths"] if config.base_width is None else [])]
    reasons = dict(plan.reasons)
    for field in taken:
        reasons[field] = f"as {name} states"
        if own is not None and getattr(own, field) != getattr(stated, field):
            reasons[field] += f"; without it: {json.dumps(getattr(own, field))}, because {own.reasons[field]}"
    return replace(plan, **{field: getattr(stated, field) for field in taken}, reasons=reasons)
