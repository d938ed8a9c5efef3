#!/usr/bin/env python3
"""What bench_prediction.py measures, each in a fresh process of medseg's or the peers' environment.

python scripts/measure_prediction.py FOLDER WHAT PART NUMBER STEPS    prints one line of JSON
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data")) / "segmentation" / "hippocampus"
NUM_CASES = 8
"""Hippocampus cases that are predicted."""
NUM_CLASSES, LOGITS, SCAN = 41, (300, 273, 273), (300, 512, 512)
"""Of the export: classes, the grid of 1.5 mm, the scan's grid of 0.8 × 0.8 × 1.5 mm; slices first."""
GIB = 2**30


def made_network(part: str, width: int) -> dict[str, Any]:
    """What `make_nnunet_goldens.plans_of` makes plans of: nnU-Net's own choices for the hippocampus set and a CT."""
    small = part != "ct"
    num_stages = 4 if small else 5
    widths = [32, 64, 128, 256] if part == "hippocampus" else [min(width * 2**i, 320) for i in range(num_stages)]
    return {
        "patch_size": [40, 56, 40] if small else [128, 128, 128],
        "kernels": [[3, 3, 3]] * num_stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (num_stages - 1)],
        "widths": widths,
        "n_conv_per_stage": [2] * num_stages,
        "decoder": [2] * (num_stages - 1),
        "schemes": ["ZScoreNormalization" if small else "CTNormalization"],
        "names": ["MR" if small else "CT"],
        "spacing": [1.0, 1.0, 1.0] if small else [1.5, 1.5, 1.5],
        "order": [0, 1, 2],
    }


def write_scans(folder: Path, part: str, size: int) -> None:
    """Scans as (k, j, i) float32 with their labels: hippocampus cases, or a computed CT of a body in air."""
    import nibabel
    import numpy as np

    if part != "ct":
        for path in sorted((DATA / "images").glob("*.nii.gz"))[:NUM_CASES]:
            np.save(folder / f"{path.name[:-7]}.npy", np.asarray(nibabel.load(path).dataobj, np.float32).T)
            label = np.asarray(nibabel.load(DATA / "labels" / path.name).dataobj, np.uint8).T
            np.save(folder / f"{path.name[:-7]}_label.npy", label)
        return
    rng = np.random.default_rng(0)
    k, j, i = np.ogrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j, -1 : 1 : size * 1j]
    body = (i / 0.8) ** 2 + (j / 0.55) ** 2 + 0 * k < 1
    wave = 0.03 * np.sin(31 * i + 5 * k) * np.cos(29 * j) * np.sin(23 * k)
    label = np.zeros((size,) * 3, np.uint8)
    label[np.sqrt((i + 0.35) ** 2 + (j - 0.05) ** 2 + (k - 0.1) ** 2) + wave < 0.35] = 1
    label[np.sqrt((i - 0.35) ** 2 + (j - 0.1) ** 2 + (k + 0.2) ** 2) + wave < 0.25] = 2
    scan = np.where(body, 20.0, -1000.0)
    scan += np.choose(label, [0, 60, 130]) + rng.normal(0, 15, scan.shape)
    np.save(folder / "phantom.npy", np.where(body, scan, -1000).astype(np.float32))
    np.save(folder / "phantom_label.npy", label)


def make_model(folder: Path, part: str, width: int, num_steps: int) -> None:
    """Train a network of nnU-Net's for a short while and save it as nnU-Net does. Runs in the peers' environment."""
    import numpy as np
    import torch
    from make_nnunet_goldens import plans_of
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    made = made_network(part, width)
    plans, dataset = plans_of("plain", made)
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    torch.manual_seed(0)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        3,
        deep_supervision=False,
    )
    patch = [min(p, 64) for p in made["patch_size"]]
    scans = [np.load(path) for path in sorted(folder.glob("*.npy")) if not path.stem.endswith("_label")]
    labels = [np.load(path) for path in sorted(folder.glob("*_label.npy"))]
    scans = [np.clip(s, -190, 215) / 70 if part == "ct" else (s - s.mean()) / s.std() for s in scans]
    pads = [[(0, max(p - n, 0)) for p, n in zip(patch, s.shape, strict=True)] for s in scans]
    scans = [np.pad(s, pad) for s, pad in zip(scans, pads, strict=True)]
    labels = [np.pad(s, pad) for s, pad in zip(labels, pads, strict=True)]
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    weight = torch.tensor([1.0, 3.0, 3.0])
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / num_steps) ** 0.9
        case = rng.integers(len(scans))
        starts = [int(rng.integers(n - p + 1)) for n, p in zip(scans[case].shape, patch, strict=True)]
        box = tuple(slice(s, s + p) for s, p in zip(starts, patch, strict=True))
        image = torch.from_numpy(scans[case][box][None, None].astype(np.float32))
        target = torch.from_numpy(labels[case][box][None].astype(np.int64))
        axes = [a + 1 for a in range(3) if rng.integers(2)]
        image, target = image.flip([a + 1 for a in axes]), target.flip(axes)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image)
        loss = torch.nn.functional.cross_entropy(logits.float(), target, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = folder / "nnunet"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")


def scans_in(folder: Path) -> dict[str, Any]:
    """The scans of `write_scans`, by id."""
    import numpy as np

    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy")) if "_" not in path.stem or
            path.stem.split("_")[-1].isdigit()}  # fmt: skip


def spacing_of(part: str) -> float:
    """Voxel size of the scans in mm; the model's is the same, so that no time of the network's differs."""
    return 1.5 if part == "ct" else 1.0


def predict_nnunet(folder: Path, part: str) -> dict[str, Any]:
    """Seconds of nnU-Net's predictor. Runs in the peers' environment."""
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    predictor = nnUNetPredictor(tile_step_size=0.5, use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder / "nnunet"), (0,))
    seconds, spacing = {}, [spacing_of(part)] * 3
    for name, scan in scans_in(folder).items():
        properties = {"spacing": spacing, "sitk_stuff": {"spacing": spacing, "origin": [0] * 3, "direction": np.eye(3)}}
        begin = time.perf_counter()
        label = predictor.predict_single_npy_array(scan[None], properties)
        seconds[name] = time.perf_counter() - begin
        np.save(folder / f"nnunet_{name}.out", label.astype(np.uint8), allow_pickle=False)
    return {"seconds": seconds}


def predict_medseg(folder: Path, part: str, batch_size: int | None = None) -> dict[str, Any]:
    """Seconds of medseg's predictor, and how many of them are the network's forward passes."""
    import numpy as np

    from medseg import Predictor

    predictor = Predictor.load(folder / "medseg", mirror=True, postprocess=False, batch_size=batch_size)
    (one,) = predictor.ensemble.predictors
    forward = one.model.forward
    inside: list[float] = []

    def timed(x: Any) -> Any:
        begin = time.perf_counter()
        result = forward(x)
        inside.append(time.perf_counter() - begin)
        return result

    one.model.forward = timed
    seconds, network, passes = {}, {}, {}
    for name, scan in scans_in(folder).items():
        inside.clear()
        begin = time.perf_counter()
        found = predictor(scan, spacing_mm=[spacing_of(part)] * 3, orientation="SAR")
        seconds[name] = time.perf_counter() - begin
        network[name], passes[name] = sum(inside), len(inside)
        np.save(folder / f"medseg_{name}.out", found.labels.array, allow_pickle=False)
    return {"seconds": seconds, "network": network, "passes": passes, "precision": one.config.precision}


def export_nnunet(num_classes: int) -> dict[str, Any]:
    """nnU-Net's resampling of logits and its argmax; of fewer classes, the time is proportional to them."""
    import numpy as np
    import torch
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    logits = blocky(torch, num_classes).numpy()
    before, begin = peak(), time.perf_counter()
    full = resample_data_or_seg_to_shape(
        logits, SCAN, (1.5, 1.5, 1.5), (1.5, 0.8, 0.8), is_seg=False, order=1, order_z=0, force_separate_z=None
    )
    resampled = time.perf_counter() - begin
    np.asarray(full).argmax(0)
    return {"seconds": time.perf_counter() - begin, "resampling": resampled, "classes": num_classes, "gib": peak(),
            "before_gib": before}  # fmt: skip


def export_medseg() -> dict[str, Any]:
    """medseg's export of all classes."""
    import numpy as np
    import torch

    from medseg.inference.predictor import decode
    from medseg.labels import Labels
    from medseg.volume import Grid

    labels = Labels.from_mapping({f"c{i}": i for i in range(NUM_CLASSES)})
    scan = Grid(SCAN, np.diag([1.5, 0.8, 0.8, 1.0]))
    logits = blocky(torch, NUM_CLASSES)
    before, begin = peak(), time.perf_counter()
    decode(logits, scan, labels, scan)
    return {"seconds": time.perf_counter() - begin, "gib": peak(), "before_gib": before}


def blocky(torch: Any, num_classes: int) -> Any:
    """Logits (K, *LOGITS) at half precision."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty((num_classes, *LOGITS), dtype=torch.float16)
    for of_class in logits:
        coarse = torch.randn([-(-n // 8) for n in LOGITS], generator=generator)
        for axis in range(3):
            coarse = coarse.repeat_interleave(8, axis).narrow(axis, 0, LOGITS[axis])
        of_class.copy_(coarse)
    return logits


def peak() -> float:
    """Peak of the resident set so far, GiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def batch() -> dict[str, float]:
    """Milliseconds per tile of nnU-Net's hippocampus network, by batch size."""
    import torch

    from medseg.device import choose_precision
    from medseg.inference.sliding_window import autocast, memory_format
    from medseg.models import MODELS

    cpu = torch.device("cpu")
    model = MODELS.build({"name": "unet", "widths": [32, 64, 128, 256]}, in_channels=1, num_classes=3, spatial_dims=3)
    model = model.eval().to(memory_format=memory_format(3))
    found: dict[str, list[float]] = {}
    with torch.inference_mode(), autocast(cpu, choose_precision("auto", cpu)):
        for turn in range(6):
            for size in (1, 2, 4, 8):
                tiles = torch.randn(size, 1, 40, 56, 40).to(memory_format=memory_format(3))
                begin = time.perf_counter()
                model(tiles)
                if turn:
                    found.setdefault(str(size), []).append((time.perf_counter() - begin) / size * 1e3)
    return {size: min(times) for size, times in found.items()}


SETTINGS: tuple[dict[str, Any], ...] = (
    {"step": 0.5, "mirror": False, "precision": "auto"},
    {"step": 0.75, "mirror": False, "precision": "auto"},
    {"step": 1.0, "mirror": False, "precision": "auto"},
    {"step": 0.5, "mirror": True, "precision": "auto"},
    {"step": 0.75, "mirror": True, "precision": "auto"},
    {"step": 0.5, "mirror": False, "precision": "fp32"},
)
"""What `options` tries; the first is what `medseg predict` does unless told otherwise."""


def options(run: Path, number: int, num_cases: int) -> dict[str, Any]:
    """Mean Dice and seconds of a run with one of `SETTINGS` on the hippocampus cases that `bench_hippocampus.py` sets
    aside: a run of its split has never seen them.

    Args:
        run: with mirroring (`augment.mirror_axes`), or else what mirrors is left out.
        number: of the setting.
        num_cases: how many of them; 0 takes all.
    """
    import numpy as np
    from bench_hippocampus import is_test

    from medseg import Predictor
    from medseg.errors import MedsegError
    from medseg.formats import open_label
    from medseg.metrics.case import measure_case

    cases = [path for path in sorted((DATA / "images").glob("*.nii.gz")) if is_test(path.name.removesuffix(".nii.gz"))]
    cases = cases[: num_cases or None]
    setting = SETTINGS[number]
    try:
        predictor = Predictor.load(run, **setting)
    except MedsegError as error:  # trained without mirroring
        return {**setting, "left_out": error.message}
    predictor(cases[0])  # what the first call sets up is not counted
    labels, dice, seconds, passes = predictor.ensemble.info.labels, [], 0.0, 0
    for one in predictor.ensemble.predictors:
        forward = one.model.forward

        def counted(x: Any, forward: Any = forward) -> Any:
            nonlocal passes
            passes += len(x)
            return forward(x)

        one.model.forward = counted
    for path in cases:
        begin = time.perf_counter()
        got = predictor(path)
        seconds += time.perf_counter() - begin
        truth = labels.to_index(open_label(DATA / "labels" / path.name).array)
        indices = np.asarray(got.indices.array)
        rows = measure_case(indices, truth, got.indices.grid, num_classes=labels.num_classes, names=["dice"])
        dice.append(float(np.nanmean([row.values["dice"] for row in rows])))
    precision = predictor.ensemble.predictors[0].config.precision
    return {**setting, "computed_in": precision, "dice": float(np.mean(dice)), "of_cases": dice, "seconds": seconds,
            "passes": passes / len(cases)}  # fmt: skip


def main() -> None:
    """One measurement."""
    where, what, part, number, steps = sys.argv[1:]
    if what == "make":
        make_model(Path(where), part, int(number), int(steps))
        print("{}")
    elif what == "export":
        print(json.dumps(export_medseg() if part == "medseg" else export_nnunet(int(number))))
    elif what == "batch":
        print(json.dumps(batch()))
    elif what == "options":
        print(json.dumps(options(Path(where), int(number), int(steps))))
    else:
        print(json.dumps((predict_medseg if what == "medseg" else predict_nnunet)(Path(where), part)))


if __name__ == "__main__":
    main()
