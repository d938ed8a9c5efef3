"""A process that reads damaged inputs under limits of memory and time, and says what came out.

    python tests/fuzz_worker.py FOLDER FORMAT:FIRST:COUNT[:SECONDS] …

One line of JSON for each format at the end; a line "at FORMAT NUMBER" before each input, so that the one is known that
ended the process. Inputs follow from format and number alone: FORMAT:NUMBER:1 repeats one.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))

import torch
from fuzz_formats import FORMATS, Format, outcomes
from peak import peak_bytes

SECONDS_EACH = 20.0
"""Most that one input may take by everything that reads it, in seconds of the processor."""
ROOM_BYTES = 2 << 30
"""Address space that reading may take beyond what the process has when it begins."""
KILLED_AFTER_S = 180
"""Wall-clock seconds after which the process ends itself, stuck outside of Python."""


class TooLongError(BaseException):
    """No reader catches it."""


def fuzz(folder: Path, name: str, first: int, count: int, seconds: float = math.inf) -> None:
    """Read `count` damaged inputs of a format, fewer where the time is up."""
    form = FORMATS[name]
    seeds = folder / "seeds" / name
    if not seeds.is_dir():
        form.make(seeds / "inputs")
    outcome = {"format": name, "inputs": 0, "failures": [], "peak_bytes": 0, "slowest_s": 0.0}
    outcome["failures"] += unreadable(form, seeds / "inputs", folder / f"{name}_whole")
    limit()
    before, begin = peak_bytes(), time.monotonic()
    for number in range(first, first + count):
        if time.monotonic() - begin > seconds:
            break
        say(f"at {name} {number}")
        place = folder / f"{name}_{number}"
        form.mutant(seeds / "inputs", place, Random(f"{name} {number}"))
        used = time.process_time()
        faulthandler.dump_traceback_later(KILLED_AFTER_S, exit=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)
        try:
            form.read(place)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            outcome["failures"].append({"number": number, "error": words(error), "at": where(error)})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
        outcome["slowest_s"] = max(outcome["slowest_s"], round(time.process_time() - used, 2))
        outcome["inputs"] += 1
        shutil.rmtree(place, ignore_errors=True)
    outcome["peak_bytes"] = peak_bytes() - before
    say(json.dumps(outcome))


def unreadable(form: Format, seeds: Path, place: Path) -> list[dict[str, object]]:
    """Valid inputs that nothing accepts: damaging these would find nothing."""
    found: list[dict[str, object]] = []
    for seed in sorted(path for path in seeds.iterdir() if path.is_dir()):
        shutil.copytree(seed, place)
        outcomes.clear()
        form.read(place)
        if not outcomes["accepted"]:
            found.append({"number": -1, "error": f"the whole input is refused: {dict(outcomes)}", "at": seed.name})
        shutil.rmtree(place)
    return found


def say(line: str) -> None:
    """A line for who started this, past everything that readers print."""
    sys.__stdout__.write(line + "\n")
    sys.__stdout__.flush()


def limit() -> None:
    """Bound the memory of this process, and the time of each input."""
    limit_time()
    fields = Path("/proc/self/statm")
    taken = int(fields.read_text().split()[0]) * resource.getpagesize() if fields.exists() else 0
    if taken:
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limit_time() -> None:
    """Let time be up inside of the readers."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    signal.signal(signal.SIGPROF, too_long)


def words(error: BaseException) -> str:
    """Kind and beginning of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def where(error: BaseException) -> str:
    """The last line of medseg that was at work."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/medseg/" in f.filename]
    if not frames:
        return ""
    return f"{frames[-1].filename.rpartition('/medseg/')[2]}:{frames[-1].lineno} {frames[-1].name}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
    for job in sys.argv[2:]:
        form, *numbers = job.split(":")
        fuzz(Path(sys.argv[1]), form, *map(int, numbers))
