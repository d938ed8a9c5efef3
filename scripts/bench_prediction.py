#!/usr/bin/env python3
"""Time prediction with the same weights beside nnU-Net's predictor: network, export, memory, start.

    python scripts/make_peers.py                          once: the peers' own environment
    python scripts/bench_prediction.py                    all but options, about 25 minutes on 2 cores; prints
    python scripts/bench_prediction.py --write            and writes docs/benchmarks/prediction.md and .json
    python scripts/bench_prediction.py --only export      one part of several: --help
    python scripts/bench_prediction.py --only ct --ct-size 128 --ct-rounds 1 --train-steps 2    a quick look
    python scripts/bench_prediction.py --only options --run RUN    what step, mirroring and precision cost, for a run
                                                                   of bench_hippocampus.py's split
    python scripts/bench_prediction.py --run RUN --write           everything

What was measured before and is not asked for now keeps its numbers on the page: --write adds to the JSON file.

A network of nnU-Net's is trained for a short while by this script, saved as nnU-Net saves it, and read by nnU-Net's
predictor and, through `medseg convert`, by medseg. Both answer the same arrays with step 0.5 and eight mirrored
passes, in fresh processes in turn, with all cores: from the scan in memory to the label map on its grid; loading is not
counted, and of each case the shortest time counts. nnU-Net computes in fp32 (it has no mixed precision on CPUs), medseg
in what it chooses. Keep the machine otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import make_peers
from benchmark import environment, where
from measure_prediction import DATA, NUM_CASES, NUM_CLASSES, SETTINGS, scans_in, write_scans

from medseg.statistics import bootstrap_means

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "prediction.md"
PARTS = ("hippocampus", "ct", "export", "start", "folder", "batch", "options")
TIME_BAR, AGREEMENT_BAR, OVERHEAD_BAR, EXPORT_BAR, RSS_BAR, START_BAR, FOLDER_BAR = 2.5, 0.999, 0.10, 10, 4.0, 3.0, 5.0
FOLDER_CASES, ALONE_CASES = 100, 4


FIRST_TILE = """
import json, os, sys, time
import medseg.inference.sliding_window as module

def first(*_):
    used = os.times()
    print(json.dumps([time.time() - float(sys.argv[1]), used.user + used.system]), flush=True)
    os._exit(0)

module._tile_logits = first
from medseg.cli import main
main(sys.argv[2:])
"""
"""Prints the seconds from the start of the process to when the first tile would go through the network."""


def small_run(folder: Path) -> tuple[Path, list[Path]]:
    """A run with a small network, and files to predict."""
    (folder / "small").mkdir()
    write_scans(folder / "small", "small", 0)
    peer(folder / "small", "make", "small", "8", "5")
    convert(folder / "small")
    return folder / "small" / "medseg", sorted((DATA / "images").glob("*.nii.gz"))[:FOLDER_CASES]


def start(folder: Path) -> list[list[float]]:
    """Seconds from the start of `medseg predict` to the first tile, and those of the processor, five times on a warm
    disk."""
    run, (first, *_) = small_run(folder)
    found = []
    for number in range(6):
        arguments = ["predict", run, first, "-o", folder / f"start_{number}"]
        command = [sys.executable, "-c", FIRST_TILE, str(time.time()), *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found[1:]


def folder_of_cases(folder: Path) -> dict[str, Any]:
    """Seconds for all cases in one process, and for some in a process each."""
    run, files = small_run(folder)

    def seconds(name: str, cases: list[Path]) -> float:
        command = [sys.executable, "-m", "medseg", "predict", run, *cases, "-o", folder / name]
        begin = time.perf_counter()
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return time.perf_counter() - begin

    alone = [seconds(f"alone_{number}", [case]) for number, case in enumerate(files[:ALONE_CASES])]
    return {"together": seconds("together", files), "cases": len(files), "alone": alone}


def measure(interpreter: str, *arguments: object) -> Any:
    """One of the above in a fresh process."""
    places = {f"nnUNet_{name}": tempfile.gettempdir() for name in ("raw", "preprocessed", "results")}
    command = [interpreter, str(ROOT / "scripts" / "measure_prediction.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **places})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} ended with status {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peer(*arguments: object) -> Any:
    """One of the above in a fresh process of the peers' environment."""
    return measure(str(make_peers.python()), *arguments)


def convert(folder: Path) -> None:
    """nnU-Net's model as a run of medseg; the scans' axes run as `predict_medseg` says."""
    command = [sys.executable, "-m", "medseg", "convert", folder / "nnunet", folder / "medseg", "--orientation", "RAS"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def same_weights(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both predictors on the same arrays with the same weights."""
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scans(folder, part, arguments.ct_size)
        say(f"{part}: training a network of nnU-Net's for {arguments.train_steps} steps")
        peer(folder, "make", part, arguments.ct_width, arguments.train_steps)
        convert(folder)
        ours, theirs = [], []
        for turn in range(arguments.ct_rounds if part == "ct" else arguments.rounds):
            sides = [("medseg", ours, lambda: measure(sys.executable, folder, "medseg", part, 0, 0)),
                     ("nnunet", theirs, lambda: peer(folder, "nnunet", part, 0, 0))]  # fmt: skip
            for name, found, measured in sides[:: 1 if turn % 2 == 0 else -1]:
                found.append(measured())
                say(f"{part}, round {turn + 1}: {name} {sum(found[-1]['seconds'].values()):.1f} s")
        equal, voxels, foreground, fired = 0, 0, 0, 0
        for case in scans_in(folder):
            mine, other = (np.load(folder / f"{side}_{case}.out.npy") for side in ("medseg", "nnunet"))
            equal, voxels = equal + int((mine == other).sum()), voxels + mine.size
            fired += int(((mine > 0) | (other > 0)).sum())
            foreground += int(((mine == other) & (mine > 0)).sum())
        shape = next(list(scan.shape) for scan in scans_in(folder).values())
    return {
        "medseg": ours,
        "nnunet": theirs,
        "agreement": equal / voxels,
        "agreement_foreground": foreground / max(fired, 1),
        "shape": shape,
        "width": arguments.ct_width,
    }


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for."""
    found: dict[str, Any] = {}
    for part in arguments.only or (PARTS if arguments.run else PARTS[:-1]):
        say(part)
        if part in ("hippocampus", "ct"):
            found[part] = same_weights(part, arguments)
        elif part == "export":
            ours = measure(sys.executable, ".", "export", "medseg", 0, 0)
            theirs = peer(".", "export", "nnunet", arguments.peer_classes, 0)
            found[part] = {"medseg": ours, "nnunet": theirs}
        elif part in ("start", "folder"):
            with tempfile.TemporaryDirectory() as name:
                found[part] = start(Path(name)) if part == "start" else folder_of_cases(Path(name))
        elif part == "batch":
            found[part] = measure(sys.executable, ".", "batch", "", 0, 0)
        elif part == "options":
            if arguments.run is None:
                sys.exit("--only options needs --run RUN")
            found[part] = options(arguments)
        print(f"{part}: {json.dumps(found[part])[:400]}", flush=True)
    facts = environment(("medseg", "torch"), ("nnunetv2", "torch"))
    return {"parts": found, "environment": facts}


def options(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each setting in a fresh process; those that the run does not allow are left out."""
    rows = []
    for number, setting in enumerate(SETTINGS):
        row = measure(sys.executable, arguments.run.absolute(), "options", "", number, arguments.option_cases)
        outcome = row["left_out"] if "left_out" in row else f"Dice {row['dice']:.4f}, {row['seconds']:.1f} s"
        say(f"options: {setting}: {outcome}")
        rows += [] if "left_out" in row else [row]
    return rows


def say(line: str) -> None:
    """How far it is, on the standard error."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def least(rounds: list[dict[str, Any]]) -> list[float]:
    """The shortest time of each case over the rounds."""
    return [min(one["seconds"][case] for one in rounds) for case in rounds[0]["seconds"]]


def rows_of(parts: dict[str, Any]) -> list[tuple[str, str, str, str, bool]]:
    """What, medseg, nnU-Net, ratio or bar, met."""
    rows = []
    for part in ("hippocampus", "ct"):
        if part not in parts:
            continue
        got = parts[part]
        ours, theirs = (sum(least(got[side])) for side in ("medseg", "nnunet"))
        overhead = median(sum(one["seconds"].values()) / sum(one["network"].values()) - 1 for one in got["medseg"])
        size = "×".join(map(str, got["shape"]))
        name = f"{NUM_CASES} hippocampus cases" if part == "hippocampus" else f"CT phantom {size}, width {got['width']}"
        rows += [
            (f"{name}, seconds", f"{ours:.1f}", f"{theirs:.1f}",
             f"{theirs / ours:.2f} (at least {TIME_BAR})", theirs / ours >= TIME_BAR),
            ("– share of voxels that agree", "", "", f"{got['agreement']:.5f} (at least {AGREEMENT_BAR})",
             got["agreement"] >= AGREEMENT_BAR),
            ("– foreground of both that agrees", "", "", f"{got['agreement_foreground']:.4f}", True),
            ("– beside the forward passes", f"{overhead:.1%}", "", f"at most {OVERHEAD_BAR:.0%}",
             overhead <= OVERHEAD_BAR),
        ]  # fmt: skip
    if "export" in parts:
        ours, theirs = parts["export"]["medseg"], parts["export"]["nnunet"]
        whole = theirs["seconds"] * NUM_CLASSES / theirs["classes"]
        some = f" ({theirs['classes']} classes took {theirs['seconds']:.0f})"
        scaled = "" if theirs["classes"] == NUM_CLASSES else some
        times = whole / ours["seconds"]
        rows += [
            (f"export of {NUM_CLASSES} classes to 512×512×300, seconds", f"{ours['seconds']:.1f}",
             f"{whole:.0f}{scaled}", f"{times:.0f} (at least {EXPORT_BAR})", times >= EXPORT_BAR),
            ("– peak of the resident set, logits included, GiB", f"{ours['gib']:.2f}", "",
             f"at most {RSS_BAR:g}", ours["gib"] <= RSS_BAR),
        ]  # fmt: skip
    if "start" in parts:
        best, used = min(parts["start"])
        rows.append(("medseg predict, start to the first tile, seconds (least of 5; of the processor)",
                     f"{best:.2f} ({used:.2f})", "",
                     f"at most {START_BAR:g}", best <= START_BAR))  # fmt: skip
    if "folder" in parts:
        got = parts["folder"]
        alone = sum(got["alone"]) / len(got["alone"]) * got["cases"]
        times = alone / got["together"]
        rows.append((f"{got['cases']} small cases in one process; beside it medseg, a process for each, seconds",
                     f"{got['together']:.1f}", f"{alone:.0f}", f"{times:.1f} (at least {FOLDER_BAR:g})",
                     times >= FOLDER_BAR))  # fmt: skip
    return rows


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    parts, facts = results["parts"], results["environment"]
    some = "" if {*PARTS[:-1]} <= set(parts) else "".join(f" --only {part}" for part in parts)
    command = f"python scripts/bench_prediction.py{some}{' --run RUN' if 'options' in parts else ''} --write"
    lines = [
        "# Prediction beside nnU-Net's",
        "",
        f"Made by `python scripts/make_peers.py && {command}`; the script says how.",
        "The same weights, step 0.5, eight mirrored passes, from the scan in memory to the label map on its grid.",
        "",
        "| | medseg | nnU-Net | ratio or bar | |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row[:4])} | {'met' if row[4] else '**missed**'} |" for row in rows_of(parts)),
        "",
    ]
    if "batch" in parts:
        sizes = ", ".join(f"{size}: {ms:.0f} ms" for size, ms in parts["batch"].items())
        lines += [f"Time per tile of the hippocampus network by the number of tiles in a pass: {sizes}.", ""]
    if "options" in parts:
        lines += [
            "## What the options cost",
            "",
            "| step | mirroring | computed in | tiles and passes of a case | Dice | against the first row, 95 % "
            "interval | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        first = parts["options"][0]["of_cases"]
        for row in parts["options"]:
            change = bootstrap_means([[b - a] for a, b in zip(first, row["of_cases"], strict=True)])[0]
            is_first = row is parts["options"][0]
            against = "" if is_first else f"{change.mean:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
            cells = (row["step"], "yes" if row["mirror"] else "no", row["computed_in"], f"{row['passes']:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} | {row['dice']:.4f} | {against} | {row['seconds']:.1f} |")
        text = f"Mean Dice of {len(first)} hippocampus cases that the run has not seen, and seconds for all of them."
        lines += ["", text, ""]
    lines += [
        *where(facts),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/prediction.md and .json")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes of each predictor; the least counts")
    parser.add_argument("--ct-rounds", type=int, default=1, help="the same of the CT phantom, which takes minutes")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part; may be given again")
    parser.add_argument("--ct-size", type=int, default=256, help="voxels of the CT phantom along each axis")
    parser.add_argument("--ct-width", type=int, default=8, help="filters of the CT network's first stage (nnU-Net: 32)")
    parser.add_argument("--train-steps", type=int, default=60, help="steps of the short training of either network")
    parser.add_argument("--peer-classes", type=int, default=2, help="classes that nnU-Net exports; 41 needs 20 GiB")
    parser.add_argument("--run", type=Path, help="for options: a run of bench_hippocampus.py, mirrored if possible")
    parser.add_argument("--option-cases", type=int, default=0, help="cases of options; 0 takes all that are set aside")
    arguments = parser.parse_args()
    if not DATA.is_dir():
        parser.error(f"there are no cases in {DATA}: set MEDSEG_DATA")
    results = bench(arguments)
    if arguments.write and PAGE.with_suffix(".json").is_file():
        before = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))["parts"]
        results["parts"] = {
            part: (before | results["parts"])[part] for part in PARTS if part in before | results["parts"]
        }
    text = page(results)
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")
        PAGE.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
