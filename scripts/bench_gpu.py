#!/usr/bin/env python3
"""Time training steps and prediction on a GPU: medseg beside nnU-Net, as share of what the GPU can do.

    python scripts/bench_gpu.py                              the first CUDA device; prints the tables
    python scripts/bench_gpu.py --write                      and writes docs/benchmarks/gpu.md and .json
    python scripts/bench_gpu.py --only step                  or prediction, hippocampus; may be given again
    python scripts/bench_gpu.py --only hippocampus --budgets 2 4 8    minutes of training that are tried in turn
    python scripts/bench_gpu.py --device cpu --tiny          does the script work? Its figures mean nothing

Without a GPU it says so and ends with status 2. nnU-Net takes part where its environment (scripts/make_peers.py) has
CUDA. Every measurement is a fresh process on phantoms that this script writes; real cases are only needed for the part
hippocampus (MEDSEG_DATA).

- step: a batch that lies ready on the GPU, without augmentation; forward, loss, backward, clipping, SGD. medseg in bf16
  and channels-last, with torch.compile and without; nnU-Net with its own train_step (fp16), with its torch.compile (its
  default) and without.
- loop: as in training, with sampling, copying and augmentation; nnU-Net augments in processes beside the step.
- augmentation: its own time for batches that lie ready, as a share of a step of the loop.
- share of peak: multiply-adds of the network, forward and backward, counted on it by torch; over the time of the step
  and the GPU's peak in bf16 by its data sheet.
- prediction: a scan of 512×512×200 in memory to its label map, step 0.5, of networks with fresh weights.
- hippocampus: ids below 250 train, the rest is scored, as in scripts/bench_hippocampus.py; the first of the budgets
  whose mean Dice reaches 0.89.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_hippocampus
import make_peers
from bench_augment import source
from bench_training_step import DATASET, HIPPOCAMPUS, Network, at_first_step, finish, nnunet_trainer, plan_nnunet
from benchmark import PAGES, environment, parser_of, show, where

PAGE = PAGES / "gpu.md"
PARTS = ("step", "prediction", "hippocampus")
NETWORKS = {
    "nnU-Net's hippocampus network": HIPPOCAMPUS,
    "patches of 128³": Network((128, 128, 128), 2, (32, 64, 128, 256, 320, 320)),
}
"""The second is what nnU-Net plans for large scans of 1 mm on 8 GB."""
TINY = {"tiny": Network((16, 16, 16), 2, (4, 8))}
PREDICTED = "patches of 128³"
SCAN, TINY_SCAN = (200, 512, 512), (20, 24, 24)
"""Voxels of 1 mm, slices first."""
NUM_CASES = 4
GOAL = 0.89
"""Mean Dice on hippocampus cases that nnU-Net publishes after 1000 epochs."""
AUGMENTATION_BAR = 0.10
PEAKS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100": 989.4,
    "NVIDIA A100": 312.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L40S": 362.1,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}
"""Dense bf16 with sums in fp32, 10¹² operations a second, by NVIDIA's data sheets; a name may go on (memory, form)."""


def peak_of(gpu: str) -> float | None:
    """Operations a second of a GPU in bf16; None for one that the table does not know."""
    known = [name for name in PEAKS if gpu == name or gpu.startswith((f"{name} ", f"{name}-"))]
    return PEAKS[max(known, key=len)] * 1e12 if known else None


def write_raw(folder: Path, network: Network) -> None:
    """Phantoms a little larger than the patch, in the layout that both sides read."""
    import nibabel
    import numpy as np

    raw = folder / "raw" / DATASET
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for number in range(NUM_CASES):
        image, label = source(tuple(-(-5 * n // 32) * 8 for n in network.patch), number)
        for array, place in ((image[0], f"imagesTr/case_{number}_0000"), (label, f"labelsTr/case_{number}")):
            nibabel.save(nibabel.Nifti1Image(array.numpy().T, np.eye(4)), raw / f"{place}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "outer": 1, "inner": 2},
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def waiting_for(device: str) -> Callable[[], None]:
    """Waits until a device has done what it was told."""
    import torch

    return torch.cuda.synchronize if device != "cpu" else lambda: None


def each(work: Callable[[int], Any], wait: Callable[[], None], times: dict[str, int]) -> list[float]:
    """Mean seconds of `work` in each round, after a few that do not count; the device is waited for between rounds.

    Args:
        work: told a number that goes up.
        wait: for the device.
        times: warm, rounds, steps.
    """
    number, found = 0, []
    for count in (times["warm"], *[times["steps"]] * times["rounds"]):
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            work(number)
            number += 1
        wait()
        found.append((time.perf_counter() - begin) / count)
    return found[1:]


def step_medseg(folder: Path, network: Network, device: str, compiled: str, times: dict[str, int]) -> dict[str, Any]:
    """Seconds of medseg's step, loop and augmentation, and the operations of a step."""
    import torch

    wait = waiting_for(device)

    def measured(loop: Any) -> dict[str, Any]:
        whole = loop.augment
        image, label = (tensor.to(loop.device) for tensor in loop.sampler.batch(0))
        starts = [(n - p) // 2 for n, p in zip(image.shape[2:], network.patch, strict=True)]
        box = tuple(slice(s, s + p) for s, p in zip(starts, network.patch, strict=True))
        image, label = image[(..., *box)].contiguous(), label[(..., *box)].contiguous()
        loop.augment = lambda image, label, step, indices=None: (image, label)
        begin = time.perf_counter()
        loop.train_step(0, image, label)
        wait()
        first = time.perf_counter() - begin
        step = each(lambda n: loop.train_step(n, image, label), wait, times)
        loop.augment = whole
        batches = loop.feed()
        whole_loop = each(lambda n: loop.train_step(*next(batches)), wait, times)
        ready = [next(batches) for _ in range(min(8, times["steps"]))]
        batches.close()
        augmentation = each(lambda n: whole(*ready[n % len(ready)][1:], ready[n % len(ready)][0]), wait, times)
        memory = torch.cuda.max_memory_allocated() if loop.device.type == "cuda" else 0
        return {
            "step": step,
            "loop": whole_loop,
            "augmentation": augmentation,
            "first": first,
            "precision": loop.precision,
            "memory": memory,
            "operations": operations(loop, (network.batch, loop.plan.num_channels, *network.patch)),
        }

    overrides = [
        f"trainer.device={device}",
        f"trainer.compile={compiled}",
        "augment.mirror_axes=[0,1,2]",
        "data.split.num_folds=2",
    ]
    found: dict[str, Any] = at_first_step(folder, network, overrides, measured)
    return found


def operations(loop: Any, shape: tuple[int, ...]) -> int:
    """Operations (two for each multiply-add) of a step, forward and backward: counted, nothing is computed."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = copy.deepcopy(loop.model).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        outputs = network(torch.empty(shape, device="meta"))
        torch.autograd.backward([output.sum() for output in (outputs if isinstance(outputs, list) else [outputs])])
    return int(counter.get_total_flops())


def step_nnunet(folder: Path, device: str, times: dict[str, int]) -> dict[str, Any]:
    """Seconds of nnU-Net's step and loop. Runs in the peers' environment."""
    trainer = nnunet_trainer(folder, device)
    loader, other = trainer.get_dataloaders()
    wait, batch = waiting_for(device), next(loader)
    ready = {
        "data": batch["data"].to(device),
        "target": [target.to(device) for target in batch["target"]],
    }
    begin = time.perf_counter()
    trainer.train_step(ready)
    wait()
    first = time.perf_counter() - begin
    step = each(lambda n: trainer.train_step(ready), wait, times)
    loop = each(lambda n: trainer.train_step(next(loader)), wait, times)
    finish(loader, other)
    return {"step": step, "loop": loop, "first": first, "precision": "fp16" if device != "cpu" else "fp32"}


def predict_medseg(
    folder: Path, network: Network, device: str, compiled: str, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Seconds of medseg's prediction of a scan that lies in memory, of a network with fresh weights."""
    from medseg import Predictor
    from medseg.training.state import Counters, save_best

    def untrained(loop: Any) -> Path:
        save_best(loop.run, loop.model, loop.average, Counters())
        return Path(loop.run)

    overrides = [
        f"trainer.device={device}",
        "data.plan.spacing_mm=[1,1,1]",
        "augment.mirror_axes=[0,1,2]",
        "data.split.num_folds=2",
    ]
    run = at_first_step(folder, network, overrides, untrained)
    scan, found = source(shape, 0)[0][0].numpy(), {}
    for mirror in (False, True):
        predictor = Predictor.load(run, device=device, mirror=mirror, compile=compiled)
        answer = partial(predictor, scan, spacing_mm=(1.0, 1.0, 1.0), orientation="SPL")
        found["mirrored" if mirror else "plain"] = each(lambda n: answer(), lambda: None, PREDICTION_TIMES)  # noqa: B023
    return {**found, "precision": predictor.ensemble.predictors[0].config.precision}


PREDICTION_TIMES = {"warm": 1, "steps": 1, "rounds": 2}


def predict_nnunet(folder: Path, device: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The same of nnU-Net's predictor. Runs in the peers' environment."""
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer = nnunet_trainer(folder, device)
    (Path(trainer.output_folder)).mkdir(parents=True, exist_ok=True)
    base = Path(trainer.output_folder_base)
    for name, content in (("plans.json", trainer.plans_manager.plans), ("dataset.json", trainer.dataset_json)):
        (base / name).write_text(json.dumps(content))
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    scan, spacing, found = source(shape, 0)[0].numpy(), [1.0] * 3, {}
    properties = {"spacing": spacing, "sitk_stuff": {"spacing": spacing, "origin": [0] * 3, "direction": np.eye(3)}}
    for mirror in (False, True):
        predictor = nnUNetPredictor(
            use_mirroring=mirror, device=torch.device(device), perform_everything_on_device=True, allow_tqdm=False
        )
        predictor.initialize_from_trained_model_folder(str(base), ("all",), "checkpoint_final.pth")
        answer = partial(predictor.predict_single_npy_array, scan, properties)
        found["mirrored" if mirror else "plain"] = each(lambda n: answer(), lambda: None, PREDICTION_TIMES)  # noqa: B023
    return {**found, "precision": "fp16"}


def fresh(folder: Path, task: dict[str, Any]) -> Any:
    """A measurement (see `measure`) in a fresh process."""
    places = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    places["nnUNet_compile"] = "t" if task.get("compiled") == "on" else "f"
    interpreter = str(make_peers.python()) if task["side"] == "nnU-Net" else sys.executable
    command = [interpreter, __file__, "--measure", str(folder), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **places})
    if done.returncode:
        sys.exit(f"{task['what']} of {task['side']} ended with status {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, task: dict[str, Any]) -> Any:
    """One measurement in this process."""
    network = Network(**{name: tuple(v) if isinstance(v, list) else v for name, v in task["network"].items()})
    device, compiled, shape = task["device"], task["compiled"], tuple(task["scan"])
    ours = task["side"] == "medseg"
    if task["what"] == "plan":
        plan_nnunet(network)
        return {}
    if task["what"] == "step" and ours:
        return step_medseg(folder, network, device, compiled, task["times"])
    if task["what"] == "step":
        return step_nnunet(folder, device, task["times"])
    if ours:
        return predict_medseg(folder, network, device, compiled, shape)
    return predict_nnunet(folder, device, shape)


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for."""
    device, tiny = arguments.device, arguments.tiny
    networks = TINY if tiny else NETWORKS
    times = {"warm": 1, "steps": 1, "rounds": 1} if tiny else {"warm": 20, "steps": 50, "rounds": 3}
    peers = device != "cpu" and peers_have_cuda()
    variants = ("off",) if device == "cpu" else ("off", "on")  # a compiler for CPUs need not be there
    found: dict[str, Any] = {"steps": {}, "prediction": []}
    for name, network in networks.items():
        wanted = [
            p for p in ("step", "prediction") if p in arguments.only and (p == "step" or tiny or name == PREDICTED)
        ]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            write_raw(folder, network)
            task = {"network": vars(network), "device": device, "times": times, "scan": TINY_SCAN if tiny else SCAN}
            if peers:
                fresh(folder, {**task, "what": "plan", "side": "nnU-Net", "compiled": "off"})
            for part in wanted:
                rows = [
                    {"side": side, "compiled": compiled, **got}
                    for side in (("medseg", "nnU-Net") if peers else ("medseg",))
                    for compiled in variants
                    if (got := fresh(folder, {**task, "what": part, "side": side, "compiled": compiled}))
                ]
                print(f"{part}, {name}: {json.dumps(rows)}", flush=True)
                if part == "step":
                    found["steps"][name] = {"batch": network.batch, "rows": rows}
                else:
                    found["prediction"] = rows
    if "hippocampus" in arguments.only:
        found["hippocampus"] = minutes_to_goal(arguments)
    facts = environment(("medseg", "torch"), ("nnunetv2", "torch") if peers else ())
    return {**found, "environment": facts, "device": describe(device), "peers": peers, "goal": GOAL}


def minutes_to_goal(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What budgets reach, one after the other, up to the first that reaches the goal."""
    folder, found = arguments.folder.resolve(), []
    bench_hippocampus.write_inputs(folder)
    for minutes in arguments.budgets:
        got = bench_hippocampus.train_medseg(folder, minutes, [f"trainer.device={arguments.device}"])
        found.append({"minutes": minutes, "dice": got["dice"], "steps": got["steps"]})
        if got["dice"] >= GOAL:
            break
    return found


def describe(device: str) -> dict[str, Any]:
    """Name and memory of the GPU."""
    import torch

    if device == "cpu":
        return {"name": "no GPU: the processor", "memory": 0, "cuda": None}
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}


def peers_have_cuda() -> bool:
    """Whether nnU-Net's environment is there and sees a GPU."""
    if not make_peers.python().exists():
        return False
    ask = "import torch; print(torch.cuda.is_available())"
    asked = subprocess.run([str(make_peers.python()), "-c", ask], capture_output=True, text=True)
    return asked.stdout.strip() == "True"


def counted(rows: list[dict[str, Any]]) -> int:
    """Operations of a step, which medseg's rows hold."""
    return next(int(row["operations"]) for row in rows if "operations" in row)


def step_rows(results: dict[str, Any]) -> list[str]:
    """Rows of the table of steps."""
    peak, lines = peak_of(results["device"]["name"]), []
    for name, of_network in results["steps"].items():
        count = counted(of_network["rows"])
        theirs = [min(row["step"]) for row in of_network["rows"] if row["side"] == "nnU-Net"]
        for row in of_network["rows"]:
            step, loop = min(row["step"]), median(row["loop"])
            share = "" if peak is None else f"{count / step / peak:.1%}"
            augmentation = f"{median(row['augmentation']) / step:.1%}" if "augmentation" in row else ""
            ratio = f"{min(theirs) / step:.2f}" if theirs and row["side"] == "medseg" else ""
            compiled = "compiled" if row["compiled"] == "on" else "not compiled"
            cells = (name, f"{row['side']}, {row['precision']}, {compiled}", f"{1e3 * step:.2f}", ratio,
                     f"{1e3 * loop:.2f}", f"{of_network['batch'] / loop:.0f}", share, augmentation,
                     f"{row['first']:.0f}")  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    device, steps = results["device"], results["steps"]
    peak = peak_of(device["name"])
    lines = [
        "# On a GPU",
        "",
        "Made by `python scripts/bench_gpu.py --write`; the script says what is measured, and how.",
        f"On {device['name']}, {device['memory'] / 2**30:.0f} GiB, CUDA {device['cuda']}.",
        "",
    ]
    if steps:
        lines += [
            "## Training",
            "",
            "| network | | step, ms | nnU-Net's better step ÷ this | loop, ms a step | samples/s in the loop "
            "| share of the bf16 peak | augmentation ÷ step | first step, s |",
            "|---|---|---|---|---|---|---|---|---|",
            *step_rows(results),
            "",
            *(
                f"{name}: {counted(of['rows']) / 1e12:.2f} · 10¹² operations a step, two for each multiply-add, "
                f"forward and backward, batch {of['batch']}."
                for name, of in steps.items()
            ),
            f"The GPU's peak is taken as {peak / 1e12:.0f} · 10¹² a second (bf16, dense)."
            if peak
            else f"The peak of {device['name']} is not known to the script: no share of it is given.",
            f"The bar of augmentation is {AUGMENTATION_BAR:.0%} of a step.",
            "",
        ]
    if results["prediction"]:
        lines += ["## Prediction", "", "| | seconds | with eight mirrored passes |", "|---|---|---|"]
        for row in results["prediction"]:
            compiled = "compiled" if row["compiled"] == "on" else "not compiled"
            plain, mirrored = min(row["plain"]), min(row["mirrored"])
            lines.append(f"| {row['side']}, {row['precision']}, {compiled} | {plain:.2f} | {mirrored:.2f} |")
        lines += [
            "",
            f"A scan of {'×'.join(map(str, SCAN))} voxels, network with {PREDICTED}; loading not counted.",
            "",
        ]
    if "hippocampus" in results:
        lines += [f"## Minutes to a Dice of {results['goal']}", "", "| minutes | steps | Dice of the test cases |",
                  "|---|---|---|"]  # fmt: skip
        lines += [f"| {r['minutes']:g} | {r['steps']} | {r['dice']:.4f} |" for r in results["hippocampus"]]
        lines += ["", "Each row is a training of its own, whose learning rate ends with its budget.", ""]
    if not results["peers"]:
        lines += ["nnU-Net took no part: its environment is not there, or has no CUDA.", ""]
    return "\n".join([*lines, *where(results["environment"]), ""])


def main() -> None:
    """Measure what was asked for."""
    parser = parser_of(__doc__, PAGE)
    parser.add_argument("--only", action="append", choices=PARTS, help="one part; may be given again")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; cpu only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps, to try the script")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 2, 4, 8, 15, 30], help="minutes")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_gpu"), help="where hippocampus runs are kept")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "TASK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), json.loads(arguments.measure[1]))))
        return
    import torch

    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("on a processor there is nothing to measure here; --tiny tries the script")
    if arguments.tiny and arguments.write:
        parser.error("what --tiny measures means nothing: it is not written")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tries the script without")
    arguments.only = arguments.only or ["step", "prediction"]
    if "hippocampus" in arguments.only and not bench_hippocampus.DATA.is_dir():
        parser.error(f"there are no cases in {bench_hippocampus.DATA}: set MEDSEG_DATA")
    results = bench(arguments)
    show(PAGE, page(results), results, write=arguments.write)


if __name__ == "__main__":
    main()
