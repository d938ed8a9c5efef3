"""A step of building the package: writes into it of which commit it was made, for manifests and bug reports."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "revision.txt"
"""In the package: the commit, on one line. `medseg.environment.revision` reads it where there is no checkout."""


class RevisionHook(BuildHookInterface):
    """Adds `NAME` to wheels and source distributions.

    The commit is the one that is checked out; where there is no checkout, MEDSEG_REVISION of the environment (Docker:
    `--build-arg MEDSEG_REVISION=$(git rev-parse HEAD)`, as the build sees no .git). Where neither tells, nothing is
    added, and medseg says "unknown"; a wheel made of a source distribution takes what stands in that.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Hatchling calls it before it builds."""
        revision = self.checked_out() or os.environ.get("MEDSEG_REVISION", "").strip()
        if version == "editable" or not revision:
            return
        with tempfile.NamedTemporaryFile("w", suffix=NAME, delete=False, encoding="ascii") as file:
            file.write(f"{revision}\n")
        self.written = Path(file.name)
        build_data["force_include"][file.name] = f"medseg/{NAME}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Hatchling calls it when it is done."""
        if hasattr(self, "written"):
            self.written.unlink(missing_ok=True)

    def checked_out(self) -> str:
        """The commit of the checkout in which the package is built; empty where it is none, or git is not there."""
        if not (Path(self.root) / ".git").exists():  # git would look in the folders above
            return ""
        command = ["git", "-C", self.root, "rev-parse", "HEAD"]
        try:
            return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=30).strip()  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            return ""
