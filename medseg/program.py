"""How the user calls medseg, for the commands that it prints."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command(*arguments: object, program: str = "medseg") -> str:
    """A command line that can be pasted into a shell: with the program's path where it is not on PATH."""
    if shutil.which(program) is None:
        script = Path(sys.executable).with_name(program)
        program = str(script) if script.exists() else f"{sys.executable} -m {program}"
    return " ".join([program, *(shlex.quote(str(argument)) for argument in arguments)])
