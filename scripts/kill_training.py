#!/usr/bin/env python3
"""Kill `medseg train` with SIGKILL again and again, and see that nothing is lost that should not be.

    python scripts/kill_training.py --write      100 kills, about half an hour; writes docs/reliability/kills.json
    python scripts/kill_training.py --kills 3
    python scripts/kill_training.py --devices 2 --kills 10 --write      writes docs/reliability/kills_of_processes.json

A small network is trained on phantoms twice: once straight, once killed and resumed, at random moments and each third
time as soon as a checkpoint is being written. After each kill a checkpoint must be there that loads; the work that is
lost is what the history tells of steps after it. In the end both runs must have the same weights, bit for bit.
Ends with status 1 where any of this fails.

Of several processes (--devices) one is killed in turn: the one that started them, the main one, which saves, and a
follower. The others must then end by themselves, and soon.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from medseg.bundle import checkpoint_path, read_checkpoint
from medseg.environment import environment
from medseg.errors import MedsegError
from medseg.phantom import write_phantoms
from medseg.training.state import can_resume, read_counters

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "reliability"
SAVE_SECONDS = 0.5
STEPS_PER_VALIDATION = 50
EARLY = 5
"""Each so manieth kill comes at any moment since the process began; the others wait for its first step."""
AIMED = 3
"""Of the others, each so manieth kill comes while a checkpoint is written: a save takes milliseconds, and chance would
hardly ever meet one."""
POLL_SECONDS = 0.0005
"""Between looks at the folder of checkpoints by who waits for a save."""
MAIN, STARTER, FOLLOWER = ROLES = "the main process", "the starting process", "a follower"
"""Which of several processes are killed, one after the other; each third kill may be aimed at a save, which is done by
the main one."""
ENDED_S = 300.0
"""How long the others have to end, after which they count as left behind."""
SETTINGS = (
    "data.plan.base_width=4",
    "data.plan.num_stages=2",
    "data.plan.patch_size=[8,16,16]",
    "data.plan.batch_size=2",
    "data.split.num_folds=4",
    "trainer.device=cpu",
    "trainer.ema=0.99",
    "trainer.log_steps=1",
    "trainer.overlay_cases=0",
    "trainer.final_predictions=false",
    "trainer.report=false",
    f"trainer.save_minutes={SAVE_SECONDS / 60:.6f}",
)


@dataclass
class Tally:
    """What the kills did."""

    kills: int = 0
    aimed_at_saves: int = 0
    before_the_first_step: int = 0
    during_a_save: int = 0
    during_a_validation: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    """Which process was killed how often."""
    slowest_end_seconds: float = 0.0
    """From a kill until the last of several processes had ended."""
    fallbacks: int = 0
    """Resumptions from the previous checkpoint, because the latest one was damaged."""
    damaged_bytes: int = 0
    """Bytes of checkpoints that stood under their names and could not be read."""
    most_lost_steps: int = 0
    most_lost_seconds: float = 0.0
    most_over_the_interval_seconds: float = 0.0
    """How much more was lost than the save interval and the longest step, validation or save of that sitting."""
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Train straight, train under fire, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--steps-per-kill", type=int, default=60, help="length of the training (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--devices", type=int, default=1, help="processes that train together (default 1)")
    parser.add_argument("--write", action="store_true", help=f"write the figures to {FIGURES.relative_to(ROOT)}")
    arguments = parser.parse_args()
    steps = arguments.kills * arguments.steps_per_kill
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments.kills, steps, random.Random(arguments.seed), arguments.devices)
    print(json.dumps(results, indent=1))
    if arguments.write:
        FIGURES.mkdir(parents=True, exist_ok=True)
        name = "kills.json" if arguments.devices == 1 else "kills_of_processes.json"
        (FIGURES / name).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if results["failures"] else 0)


def measure(folder: Path, kills: int, steps: int, moments: random.Random, devices: int = 1) -> dict[str, object]:
    """Both runs and what came of them, as plain values."""
    data = write_phantoms(folder / "data", num_train=4, size=0.4).train
    straight, killed = folder / "straight", folder / "killed"
    begun = time.monotonic()
    _finish(_start(data, straight, steps, devices))
    seconds = 60 * read_counters(straight).minutes
    start_seconds = time.monotonic() - begun - seconds
    tally = Tally()
    sitting = Sitting(killed)
    process = _start(data, killed, steps, devices)
    while tally.kills < kills:
        is_early = tally.kills % EARLY == EARLY - 1
        is_aimed = not is_early and tally.kills % AIMED == 0
        if not is_early and not _wait_for_step(process, sitting):
            break
        if is_aimed and not _wait_for_save(process, killed):
            break
        longest = 0 if is_aimed else start_seconds if is_early else 1.2 * seconds / kills
        role = STARTER if devices == 1 else ROLES[tally.kills % len(ROLES)]
        if not _kill(process, moments.uniform(0, longest), role, tally):
            break
        tally.aimed_at_saves += is_aimed
        judge(sitting, tally)
        sitting = Sitting(killed)
        process = _medseg(f"resume={killed}")
        print(f"\r{tally.kills} kills, step {sitting.saved_step} of {steps} ", end="", file=sys.stderr)
    print(file=sys.stderr)
    _finish(process)
    if tally.kills < kills:
        tally.failures.append(f"the training was done after {tally.kills} kills: give more --steps-per-kill")
    for name in ("latest", "best"):
        if not _same(straight, killed, name):
            tally.failures.append(f"the {name} weights are not those of the run that was not killed")
    leftovers = [path.name for path in (killed / "checkpoints").glob(".*")]
    if leftovers:
        tally.failures.append(f"{len(leftovers)} temporary files are left")
    return {
        "kills": tally.kills,
        "failures": len(tally.failures),
        "what_failed": "; ".join(tally.failures) or "nothing",
        "steps_of_the_training": steps,
        "same_weights_as_without_kills": "yes" if _same(straight, killed, "latest") else "no",
        "kills_before_the_first_step_of_a_sitting": tally.before_the_first_step,
        "kills_aimed_at_saves": tally.aimed_at_saves,
        "kills_during_a_save": tally.during_a_save,
        "kills_during_a_validation": tally.during_a_validation,
        "checkpoints_damaged": tally.fallbacks,
        "checkpoint_bytes_damaged": tally.damaged_bytes,
        "save_interval_seconds": SAVE_SECONDS,
        "most_lost_seconds": round(tally.most_lost_seconds, 2),
        "most_lost_steps": tally.most_lost_steps,
        "most_lost_beyond_interval_and_longest_step_seconds": round(tally.most_over_the_interval_seconds, 2),
        **({f"kills_of_{role.replace(' ', '_')}": tally.roles[role] for role in ROLES} if devices > 1 else {}),
        **({"slowest_end_of_the_others_seconds": round(tally.slowest_end_seconds, 2)} if devices > 1 else {}),
        "environment": environment(),
    }


class Sitting:
    """What a run was like when a process took it up.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.saved_step = read_counters(run).step if can_resume(run) else 0
        self._history = self._inode()

    @property
    def has_begun(self) -> bool:
        """Whether the process has come to its loop: it then writes the history anew, up to the saved step."""
        return self._inode() != self._history

    def _inode(self) -> int | None:
        path = self.run / "history.csv"
        return path.stat().st_ino if path.exists() else None


def judge(sitting: Sitting, tally: Tally) -> None:
    """Look at what a kill has left, and count it."""
    run = sitting.run
    tally.kills += 1
    saved_step, saved_minutes, is_validating = 0, 0.0, False
    if can_resume(run):  # else the first interval was not over
        try:
            read_checkpoint(checkpoint_path(run, "latest"))
        except MedsegError:
            tally.fallbacks += 1
            tally.damaged_bytes += size_of(checkpoint_path(run, "latest"))
        try:
            counters = read_counters(run)
        except MedsegError as error:
            tally.failures.append(f"kill {tally.kills}: {error.message}")
            return
        saved_step, saved_minutes, is_validating = counters.step, counters.minutes, counters.is_validating
    if checkpoint_path(run, "best").exists():
        try:
            read_checkpoint(checkpoint_path(run, "best"))
        except MedsegError as error:
            tally.failures.append(f"kill {tally.kills}: best: {error.message}")
            tally.damaged_bytes += size_of(checkpoint_path(run, "best"))
    rows = [row for row in _history(run) if row["train_loss"]] if sitting.has_begun else []
    if not rows or int(rows[-1]["step"]) <= sitting.saved_step:
        tally.before_the_first_step += 1
        return
    tally.during_a_save += bool(list((run / "checkpoints").glob(".*")))
    tally.during_a_validation += is_validating
    lost = 60 * max(0.0, float(rows[-1]["minutes"]) - saved_minutes)
    minutes = [saved_minutes, *(float(row["minutes"]) for row in rows if int(row["step"]) > saved_step)]
    longest = 60 * max((b - a for a, b in itertools.pairwise(minutes)), default=0.0)
    over = lost - SAVE_SECONDS - longest
    tally.most_lost_steps = max(tally.most_lost_steps, int(rows[-1]["step"]) - saved_step)
    tally.most_lost_seconds = max(tally.most_lost_seconds, lost)
    tally.most_over_the_interval_seconds = max(tally.most_over_the_interval_seconds, over)
    if over > 0.1:
        tally.failures.append(f"kill {tally.kills}: {lost:.2f} s were lost, {over:.2f} s more than there should be")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _start(data: Path, run: Path, steps: int, devices: int) -> subprocess.Popen[bytes]:
    where = f"data.root='{data}'", f"hydra.run.dir='{run}'"
    validations = f"trainer.num_validations={max(2, steps // STEPS_PER_VALIDATION)}"
    return _medseg(*where, f"trainer.max_steps={steps}", validations, f"trainer.devices={devices}", *SETTINGS)


def _medseg(*arguments: str) -> subprocess.Popen[bytes]:
    # One thread: sums in another order are other sums, and the weights are compared bit by bit.
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "medseg", "train", *arguments]
    return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"medseg train ended with {process.returncode}: {said.decode(errors='replace')[-2000:]}")


def _wait_for_step(process: subprocess.Popen[bytes], sitting: Sitting) -> bool:
    """Wait until a process has done a step of its own; False if it ends before that."""
    while process.poll() is None:
        rows = _history(sitting.run) if sitting.has_begun else []
        if rows and int(rows[-1]["step"]) > sitting.saved_step:
            return True
        time.sleep(0.02)
    return False


def _wait_for_save(process: subprocess.Popen[bytes], run: Path) -> bool:
    """Wait until a process has begun to write a checkpoint; False if it ends before that.

    What an earlier kill left is gone by then: a run removes it before its first step.
    """
    while process.poll() is None:
        if any((run / "checkpoints").glob(".*")):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _kill(process: subprocess.Popen[bytes], delay: float, role: str, tally: Tally) -> bool:
    """SIGKILL after a while to one of the processes, then wait until all have ended; False if the training has ended
    by itself."""
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        members = members_of(process.pid)
        if role == STARTER or not members:  # in its first seconds a training is one process
            role = STARTER
            process.kill()
        else:
            os.kill(members[0 if role == MAIN else -1], signal.SIGKILL)
        begun = time.monotonic()
        try:
            process.communicate(timeout=ENDED_S)  # all of them hold its standard error
        except subprocess.TimeoutExpired:
            tally.failures.append(f"kill {tally.kills + 1}: processes were left behind")
            for member in members:
                with suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            process.kill()
            process.communicate()
        tally.slowest_end_seconds = max(tally.slowest_end_seconds, time.monotonic() - begun)
        tally.roles[role] += 1
        return True
    return False


def members_of(starter: int) -> list[int]:
    """The processes that a training has started, the main one first; none of a training in one process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == starter and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append((int(fields[19]), int(folder.name)))  # by the time of their start
        except OSError:  # gone meanwhile
            continue
    return [number for _, number in sorted(found)]


def _history(run: Path) -> list[dict[str, str]]:
    """Whole rows of a history, which may be in the middle of being written."""
    try:
        with (run / "history.csv").open(newline="", encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n")]
    except OSError:
        return []
    return [row for row in csv.DictReader(lines) if (row["step"] or "").isdecimal()]


def _same(first: Path, second: Path, name: str) -> bool:
    """Whether two runs have the same weights, bit for bit, optimizer and average included."""
    ours, theirs = (read_checkpoint(checkpoint_path(run, name))[0] for run in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


if __name__ == "__main__":
    main()
