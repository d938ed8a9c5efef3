#!/usr/bin/env python3
"""Time fingerprint, plan and preprocessing of the whole hippocampus set by medseg and by nnU-Net.

    python scripts/make_peers.py                     once: the peers' own environment
    python scripts/bench_preprocess.py               some minutes on 2 cores; prints the table
    python scripts/bench_preprocess.py --write       and writes docs/benchmarks/preprocess.md and .json

Both find the same files (MEDSEG_DATA), survey and plan them, and write all cases prepared to an empty folder on disk:
nnU-Net with two processes (its own functions behind `nnUNetv2_plan_and_preprocess -c 3d_fullres`), medseg with two
threads (what `medseg train` does before its first step). Each round runs each in a fresh process, in turns. *Work* is
from the first file to the last, *whole process* has starting Python and importing as well, on either side, and *CPU* is
the processors' time of that, with all processes it started, which a busy machine disturbs least. Then medseg runs
again: over the unchanged folder, and with one new case. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import make_peers
from benchmark import environment, need_peers, parser_of, show, where

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data")) / "segmentation" / "hippocampus"
TABLE = ROOT / "docs" / "benchmarks" / "preprocess.md"
NUMBER = 4
WORKERS = 2
BAR = 8.0
"""At least so many times faster."""
FREE = " (as called by default)"
"""Behind a way's name: the libraries' threads are not limited, as when users call it and set nothing."""
WAYS = {
    f"nnunet{FREE}": f"nnU-Net, 2 processes{FREE}",
    f"cold{FREE}": f"medseg, 2 threads{FREE}",
    "nnunet": "nnU-Net, 2 processes",
    "cold": "medseg, 2 threads",
    "again": "medseg, again over the unchanged folder",
    "one new": "medseg, again with one new case",
}


def write_inputs(folder: Path) -> int:
    """Links to the images and labels as either side wants them; the number of cases."""
    raw = folder / "raw" / f"Dataset{NUMBER:03d}_Hippocampus"
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (DATA / "labels").glob("*.nii.gz"))
    for made in (raw / "imagesTr", raw / "labelsTr", folder / "ours" / "images", folder / "ours" / "labels"):
        made.mkdir(parents=True)
    for case in cases:
        image, label = (DATA / name / f"{case}.nii.gz" for name in ("images", "labels"))
        (raw / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(image)
        (raw / "labelsTr" / label.name).symlink_to(label)
        (folder / "ours" / "images" / image.name).symlink_to(image)
        (folder / "ours" / "labels" / label.name).symlink_to(label)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return len(cases)


def work_of_nnunet() -> float:
    """Seconds of its fingerprint, plan and preprocessing; runs in the peers' environment."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # type: ignore[import-not-found,unused-ignore]
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    begin = time.perf_counter()
    extract_fingerprints([NUMBER], num_processes=WORKERS, check_dataset_integrity=False)
    plans = plan_experiments([NUMBER])
    preprocess([NUMBER], plans, configurations=("3d_fullres",), num_processes=(WORKERS,))
    return time.perf_counter() - begin


def work_of_medseg(folder: Path) -> float:
    """Seconds from the first file to the last: find, survey, plan, prepare into the store."""
    import blosc2  # noqa: F401 - the store imports it when it needs it
    import torch
    from rich.console import Console

    import medseg.formats.nifti  # noqa: F401 - and that of the first NIfTI file its reader
    from medseg.config import compose
    from medseg.training.beginning import open_store, prepare, settle

    settings = [f"data.root='{folder / 'ours'}'", f"data.num_threads={WORKERS}", "trainer.device=cpu"]
    experiment = compose("train", [*settings, f"data.store='{folder / 'store'}'"])
    begin = time.perf_counter()
    store = open_store(experiment.data, folder / "run")
    settled = settle(experiment, torch.device("cpu"), Console(stderr=True, quiet=True), store)
    console = Console(stderr=True)
    prepare(experiment, settled.info, settled.cases, settled.splits[0], console, store)
    return time.perf_counter() - begin


def patch_reads() -> dict[str, float]:
    """Milliseconds to read a patch of an image with its label from the store: median of 40 at random places."""
    import numpy as np

    from medseg.data.prepared import PreparedCase
    from medseg.data.stored_array import StoredArray, compressed, rounded
    from medseg.volume import Grid

    rng = np.random.default_rng(0)
    shape = (256, 320, 320)
    image = rng.normal(size=(1, *shape)).astype(np.float32)  # noise: nothing compresses worse
    codes, steps = rounded(image)
    label = (image[0] > 1).astype(np.uint8)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary) / name for name in ("image.b2nd", "label.b2nd")]
        for path, array in zip(paths, (codes, label), strict=True):
            path.write_bytes(compressed(array, (32, 32, 32)))
        arrays = StoredArray(paths[0], codes.shape, steps, "a"), StoredArray(paths[1], shape, None, "a")
        case = PreparedCase("a", *arrays, Grid.of_picture(shape), [])
        for size in ((40, 56, 40), (128, 128, 128)):
            times = []
            for _ in range(40):
                start = [int(rng.integers(n - p + 1)) for n, p in zip(shape, size, strict=True)]
                begin = time.perf_counter()
                case.cut(start, size)
                times.append(1000 * (time.perf_counter() - begin))
            found["×".join(map(str, size))] = median(times)
    return found


def run(way: str, folder: Path) -> dict[str, float]:
    """One measurement in a fresh process: {"work": s, "whole": s, "cpu": s}."""
    interpreter = str(make_peers.python()) if way.startswith("nnunet") else sys.executable
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environ = {name: value for name, value in os.environ.items() if name not in limits}
    environ |= {} if way.endswith(FREE) else dict.fromkeys(limits, "1")
    environ |= {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    command = [interpreter, __file__, "--measure", way, str(folder)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"work": float((folder / "seconds").read_text(encoding="utf-8")), "whole": whole, "cpu": cpu}


def bench(rounds: int) -> dict[str, Any]:
    """All rounds: {"seconds": {way: [{"work", "whole"}, ...]}, ...}."""
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    sizes: dict[str, int] = {}
    for turn in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            count = write_inputs(folder)
            aside = sorted((folder / "ours").glob("*/*.nii.gz"))[:: max(1, count)]
            for way in WAYS:
                if way == "one new":  # as if the last cases of both folders had just come: the files are copies
                    for link in aside:
                        target = link.resolve()
                        link.unlink()
                        shutil.copy(target, link.with_name("hippocampus_999.nii.gz"))
                made = {"nnunet": "preprocessed", "cold": "store"}.get(way.removesuffix(FREE))
                if made:
                    shutil.rmtree(folder / made, ignore_errors=True)
                got = run(way, folder)
                seconds[way].append(got)
                print(turn + 1, WAYS[way], {key: round(value, 1) for key, value in got.items()}, flush=True)
            preprocessed = folder / "preprocessed"
            sizes = {"nnunet": _bytes(preprocessed), "medseg": _bytes(folder / "store"), "cases": count}
    facts = environment(("medseg", "torch", "numpy", "blosc2"), ("nnunetv2", "torch", "numpy", "blosc2"))
    return {"seconds": seconds, "bytes": sizes, "patch_ms": patch_reads(), "rounds": rounds, "environment": facts}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    times = {
        way: {k: median(t[k] for t in got) for k in ("work", "whole", "cpu")} for way, got in results["seconds"].items()
    }
    sizes, facts = results["bytes"], results["environment"]
    ratios = {k: times["nnunet"][k] / times["cold"][k] for k in ("work", "whole", "cpu")}
    free = {k: times[f"nnunet{FREE}"][k] / times[f"cold{FREE}"][k] for k in ("work", "whole")}
    lines = [
        "# Fingerprint, plan and preprocessing of a whole data set",
        "",
        "Made by `python scripts/make_peers.py && python scripts/bench_preprocess.py --write`. The hippocampus set of",
        f"the Medical Segmentation Decathlon, {sizes['cases']} labelled MR crops of about 35×50×35 voxels at 1 mm,",
        "from files to prepared cases in an empty folder on disk; fresh processes in turns, `OMP_NUM_THREADS=1` but",
        f"where *as called by default* says otherwise, median of {results['rounds']}. *Whole process* has starting",
        "Python and importing as well.",
        "",
        "| | work s | whole process s | CPU s | times faster: work | whole process |",
        "|---|---|---|---|---|---|",
    ]
    for way, name in WAYS.items():
        figures = [times[way][k] for k in ("work", "whole", "cpu")]
        peer = f"nnunet{FREE}" if way.endswith(FREE) else "nnunet"
        figures += [times[peer][k] / times[way][k] for k in ("work", "whole")]
        lines.append(f"| {name} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    lines += [
        "",
        f"- at least {BAR:.0f} times faster: {ratios['work']:.1f} – **{'met' if ratios['work'] >= BAR else 'missed'}**;"
        f" with starting and importing {ratios['whole']:.1f}, in CPU time {ratios['cpu']:.1f};"
        f" as called by default {free['work']:.1f}, with starting and importing {free['whole']:.1f}",
        f"- on disk: nnU-Net {sizes['nnunet'] / 2**20:.0f} MiB, medseg {sizes['medseg'] / 2**20:.0f} MiB",
        "- reading a patch with its label from the store, by one thread, of noise: "
        + ", ".join(f"{size} voxels {ms:.1f} ms" for size, ms in results["patch_ms"].items()),
        "",
        "*Work* leaves out all imports made before its clock starts, on medseg's side those of `blosc2` and `nibabel`",
        "too, which `medseg train` makes on the way. nnU-Net's processes import within its work. (The first optimizer",
        "of a training loads `torch._dynamo`, a second more, on either side; nothing here needs it.)",
        "",
        *where(facts),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure everything, or (in a process started by that) one way."""
    parser = parser_of(__doc__, TABLE)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each way")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, folder = arguments.measure
        seconds = work_of_nnunet() if way.startswith("nnunet") else work_of_medseg(Path(folder))
        (Path(folder) / "seconds").write_text(str(seconds), encoding="utf-8")
        return
    need_peers(parser)
    if not DATA.is_dir():
        parser.error("the hippocampus set is not there: set MEDSEG_DATA")
    results = bench(arguments.rounds)
    show(TABLE, table(results), results, write=arguments.write)


if __name__ == "__main__":
    main()
