"""A process in which atheris chooses the damage by what it reaches in medseg, under limits of memory and time.

    python tests/fuzz_guided.py FOLDER FORMAT SECONDS

Bytes that atheris mutates are what the choices of the damage are drawn from (`Drawn`). What comes out of the readers
and is no `MedsegError` is one line of JSON, and the fuzzing goes on; libFuzzer says on the standard error how many
inputs it made and how many edges of medseg they reached.

Source:
    Serebryany, Continuous Fuzzing with libFuzzer and AddressSanitizer, IEEE SecDev 2016; atheris, github.com/google.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from random import Random

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

MAX_BYTES = 512
"""Of which damage is drawn: each choice takes one to four."""
STUCK_S = 120
"""Wall-clock seconds after which libFuzzer ends an input that does not come back."""
FOUND = "found "
"""Begins the line of what came out."""


class Drawn(Random):
    """Choices from bytes, which a fuzzer changes a few of at a time; zeros where they end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._place = data, 0

    def getrandbits(self, k: int, /) -> int:
        """The next bits."""
        size = (k + 7) // 8
        taken = self._data[self._place : self._place + size]
        self._place += size
        return int.from_bytes(taken.ljust(size, b"\0"), "little") & ((1 << k) - 1)

    def random(self) -> float:
        """From 0 to 1."""
        return self.getrandbits(16) / 65536


def main(folder: Path, name: str, seconds: int) -> None:
    """Fuzz until the time is up; atheris then ends the process."""
    import atheris

    with atheris.instrument_imports(include=["medseg"]):
        from fuzz_formats import FORMATS
        from fuzz_worker import SECONDS_EACH, limit, where, words

        form = FORMATS[name]
        seeds = folder / "seeds" / name / "inputs"
        form.make(seeds)
        for seed in seeds.iterdir():  # readers import what they need when they are called
            form.read(seed)
    seen: set[str] = set()
    place = folder / f"{name}_0"

    def one(data: bytes) -> None:
        form.mutant(seeds, place, Drawn(data))
        signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)
        try:
            form.read(place)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if (at := where(error)) not in seen:  # one of each kind
                seen.add(at)
                failure = {"number": f"x{data.hex()}", "error": words(error), "at": at}
                os.write(1, f"{FOUND}{json.dumps(failure)}\n".encode())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(place, ignore_errors=True)

    limit()
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", f"-timeout={STUCK_S}", "-rss_limit_mb=0"]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(8):  # something to begin with: from no bytes at all always the same damage is drawn
        (corpus / str(number)).write_bytes(Random(number).randbytes(64))
    options += [f"-artifact_prefix={folder}/", "-print_final_stats=1", "-seed=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import torch

    torch.set_num_threads(1)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
