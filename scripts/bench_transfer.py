#!/usr/bin/env python3
"""Segment the lungs on chest X-rays with networks that begin fresh, and with weights of a classifier of pneumonia.

    python scripts/bench_transfer.py                  all rows that docs/benchmarks/transfer.json does not have yet
    python scripts/bench_transfer.py --again --seeds 3
    python scripts/bench_transfer.py --steps 2        does the script work? Its figures mean nothing, and are not kept

Two classifiers are trained first (`medseg train task=classification`): ResNet-18, and a small network with fully
connected layers, on the X-rays of 28×28 pixels in classification/pneumonia. Their weights then begin `unet_resnet` and
`fcn`. Every row is an ordinary `medseg train`, of the same steps; fcn once for each output stride. What was run goes
to docs/benchmarks/transfer.json, row by row, and the table to transfer.md. The images are found through MEDSEG_DATA.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import DATA, RESULTS, train
from PIL import Image

STEPS = {"classifier": 100, "fcn": 150, "unet_resnet": 60}
"""Of each training: what one core does in a minute or two."""
LUNG_PIXELS = 96
PIXELS = 64
"""Along each axis of what the classifiers see."""
SMALL = {"name": "cnn", "widths": [16, 32, 64, 64], "head": "flatten", "hidden": [64], "image_size": PIXELS}
PNEUMONIA = (
    "task=classification",
    f"data.root='{DATA / 'classification' / 'pneumonia' / 'pneumoniamnist.npz'}'",
    f"data.size=[{PIXELS},{PIXELS}]",
    "data.classes=[normal,pneumonia]",
    "trainer.device=cpu",
    "trainer.num_validations=2",
    "trainer.report=false",
)
LUNGS = (
    "data.labels={background: 0, right_lung: 1, left_lung: 2}",
    "data.plan.patch_size=[96,96]",
    "data.plan.batch_size=4",
    "trainer.foreground_share=0",
    "augment=none",  # that of pictures turns them by any angle, after which right and left are hard to tell
    "trainer.device=cpu",
    "trainer.num_validations=1",
    "trainer.ema=0.95",
    "trainer.overlay_cases=0",
    "trainer.map_cases=0",
    "trainer.embedding_cases=0",
    "trainer.report=false",
    "trainer.postprocess=off",
)
ABOUT = """\
Made by `python scripts/bench_transfer.py`: the right and the left lung on 45 chest X-rays (36 to train, 9 to validate),
scaled down to 96 pixels, a minute or two of one CPU core for each training; Dice is of the validation images, the mean
over seeds, with the lowest and the highest where there are several. The classifiers saw other chest X-rays, of 28×28
pixels, with or without pneumonia. ImageNet's weights were not at hand. So few steps show how fast a network gets
somewhere, not where it ends, and differences within the range of the seeds mean nothing."""


def write_small(folder: Path) -> None:
    """The X-rays and their labels with `LUNG_PIXELS` along the longer axis."""
    for part, method in (("images", Image.Resampling.BOX), ("labels", Image.Resampling.NEAREST)):
        (folder / part).mkdir(parents=True)
        for path in sorted((DATA / "segmentation" / "cxr_lungs" / part).glob("*.png")):
            with Image.open(path) as picture:
                factor = LUNG_PIXELS / max(picture.size)
                size = (round(picture.width * factor), round(picture.height * factor))
                picture.resize(size, method).save(folder / part / path.name)


def rows(classifiers: Path) -> dict[str, tuple[str, ...]]:
    """The trainings by name, and what their overrides are."""
    fresh = str(SMALL).replace("'", "")
    cnn, resnet = (f"'{classifiers / name}'" for name in ("cnn", "resnet18"))
    found = {"unet_resnet, fresh": ("model=unet_resnet",)}
    found["unet_resnet, of the classifier"] = ("model=unet_resnet", f"model.weights={resnet}")
    found["fcn, stride 4, fresh"] = ("model=fcn", f"model.classifier={fresh}", "model.output_stride=4")
    for stride in (4, 16, 2, 8):
        settings = (f"model.classifier={cnn}", f"model.output_stride={stride}")
        found[f"fcn, stride {stride}, of the classifier"] = ("model=fcn", *settings)
    added = ("model=unet_resnet", f"model.weights={resnet}", "model.skip=add")
    found["unet_resnet with skips that add, of the classifier"] = added
    frozen = ("model=unet_resnet", f"model.weights={resnet}", "model.frozen_stages=2")
    found["unet_resnet, of the classifier, 2 stages frozen"] = frozen
    return found


def train_classifier(name: str, run: Path, steps: int) -> dict[str, Any]:
    """One of the two classifiers, and its AUC on the validation images."""
    settings = ("model=resnet18",)
    if name == "cnn":
        settings = ("model=cnn_fc", f"model.widths={SMALL['widths']}", f"model.hidden={SMALL['hidden']}")
    overrides = (*PNEUMONIA, *settings, f"trainer.max_steps={steps}")
    command = [sys.executable, "-m", "medseg", "train", *overrides, f"hydra.run.dir='{run}'"]
    if not run.is_dir():
        subprocess.run(command, check=True)
    history = (run / "history.csv").read_text().splitlines()
    header, values = history[0].split(","), history[-1].split(",")
    auc = next(value for name, value in zip(header, values, strict=True) if "auc" in name and value)
    return {"command": shown(overrides), "steps": steps, "auc": round(float(auc), 4)}


def shown(overrides: tuple[str, ...]) -> str:
    """The command, without this machine's folders."""
    return "medseg train " + " ".join(override.replace(str(DATA), "$MEDSEG_DATA") for override in overrides)


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each training, to try the script")
    parser.add_argument("--classifiers", type=Path, help="folder that keeps the classifiers for the next time")
    parser.add_argument("--again", action="store_true", help="also what was run before")
    arguments = parser.parse_args()
    stored = RESULTS / "transfer.json"
    results: dict[str, Any] = {"classifiers": {}, "rows": {}}
    if stored.is_file() and not arguments.again and not arguments.steps:
        results = json.loads(stored.read_text())
    with tempfile.TemporaryDirectory() as folder:
        classifiers = (arguments.classifiers or Path(folder) / "classifiers").absolute()
        done = results["rows"]
        lungs = Path(folder) / "lungs"
        write_small(lungs)
        for seed in range(arguments.seeds):
            for name, overrides in rows(classifiers).items():
                if str(seed) in done.get(name, {}):
                    continue
                for classifier in ("cnn", "resnet18"):
                    if str(classifiers / classifier) in " ".join(overrides):
                        steps = arguments.steps or STEPS["classifier"]
                        about = train_classifier(classifier, classifiers / classifier, steps)
                        results["classifiers"][classifier] = about
                budget = f"trainer.max_steps={arguments.steps or STEPS[overrides[0].partition('=')[2]]}"
                run = Path(folder) / f"{seed}_{list(rows(classifiers)).index(name)}"
                result = train(run, (f"data.root='{lungs}'", *LUNGS, *overrides, budget, f"seed={seed}"))
                command = result["command"].replace(str(classifiers), "RUNS").replace(str(lungs), "LUNGS")
                result["command"] = command
                done.setdefault(name, {})[str(seed)] = result
                if not arguments.steps:
                    stored.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                    (RESULTS / "transfer.md").write_text(table(results), encoding="utf-8")
    sys.stdout.write(table(results))


def table(results: dict[str, Any]) -> str:
    """The Markdown of all results."""
    lines = ["# Weights of a classifier for a segmenter", "", *textwrap.wrap(ABOUT, width=120), ""]
    for name, r in results["classifiers"].items():
        lines.append(f"- classifier {name}: {r['steps']} steps, validation AUC {r['auc']:.3f}")
    lines += [
        "",
        "| network | weights | steps | seeds | Dice (lowest to highest) | right lung | left lung |",
        "|---" * 7 + "|",
    ]
    for name, seeds in results["rows"].items():
        runs = list(seeds.values())
        means = [run["dice"]["(foreground)"][0] for run in runs]
        sides = [np.mean([run["dice"][key][0] for run in runs]) for key in runs[0]["dice"] if key != "(foreground)"]
        spread = f"{np.mean(means):.3f} ({min(means):.3f} to {max(means):.3f})"
        first = runs[0]
        lines.append(
            f"| {name} | {first['weights'] / 1e6:.2f} M | {first['steps']} | {len(runs)} | {spread} | "
            + " | ".join(f"{side:.3f}" for side in sides)
            + " |"
        )
    commands = {name: r["command"] for name, r in results["classifiers"].items()}
    commands |= {name: next(iter(seeds.values()))["command"] for name, seeds in results["rows"].items()}
    lines += ["", "## Commands", "", *(f"- {name}: `{command}`" for name, command in commands.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
