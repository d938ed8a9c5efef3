"""The plan: each value that follows from the data and the machine, with its reason and a key that overrides it."""

from medseg.data.plan.make import machine_for, make_plan, takes_too_much, with_memory
from medseg.data.plan.network import Machine
from medseg.data.plan.schema import Axes, Configuration, Normalisation, Plan, PlanConfig, Preset, with_model, with_patch

__all__ = [
    "Axes",
    "Configuration",
    "Machine",
    "Normalisation",
    "Plan",
    "PlanConfig",
    "Preset",
    "machine_for",
    "make_plan",
    "takes_too_much",
    "with_memory",
    "with_model",
    "with_patch",
]
