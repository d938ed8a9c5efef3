"""What medseg needs of a machine: found, tried, and for each fault what to do. `medseg doctor` shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg.diagnosis.check import Check, Status
from medseg.diagnosis.hardware import compiling, cores, devices, memory, precisions
from medseg.diagnosis.places import disk, shared_memory, temporary_files, writing
from medseg.diagnosis.software import codecs, packages, plugins, python, torch_pair
from medseg.environment import environment

__all__ = ["Check", "Diagnosis", "Status", "diagnose"]

FORMAT = 1
"""Raised when the JSON of a diagnosis changes in a way that a reader would misread."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        environment: versions, revision, hardware: what manifests hold too.
        checks: the table, in its order.
    """

    environment: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst of all checks."""
        return max((check.status for check in self.checks), key=list(Status).index)

    def record(self) -> dict[str, Any]:
        """Plain values, for a bug report and for the manifest of a run."""
        checks = [asdict(check) for check in self.checks]
        return {"format": FORMAT, "status": str(self.status), "environment": self.environment, "checks": checks}

    def to_json(self) -> str:
        """For scripts."""
        return json.dumps(self.record(), indent=2, ensure_ascii=False)


def diagnose(runs: Path, device: str = "auto") -> Diagnosis:
    """Look at everything, and try what can be tried; nothing is changed.

    Args:
        runs: the folder that runs go to, whether it is there or not.
        device: the device that must work; "auto" takes what there is.
    """
    found, chosen = devices(device)
    checks: Sequence[Check] = (
        python(),
        packages(),
        torch_pair(),
        *plugins(),
        *codecs(),
        cores(),
        memory(),
        *found,
        *precisions(chosen),
        compiling(chosen),
        disk("disk of runs", runs),
        writing("write access to runs", runs),
        temporary_files(),
        shared_memory(),
    )
    return Diagnosis(environment(), tuple(checks))
