"""What is fuzzed: for each format valid files, the damage that is done to them, and everything that reads them."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random

import nibabel as nib
import numpy as np
import pydicom
import torch
from dicom_images import make as make_slices
from dicom_phantom import CORD, GTV, write_rtstruct, write_seg, write_series
from fuzz_damage import (
    Damage,
    damaged_checkpoint,
    damaged_csv,
    damaged_dicom,
    damaged_gzip,
    damaged_json,
    damaged_lines,
    damaged_model,
    damaged_png,
    damaged_text,
    damaged_yaml,
    damaged_zip,
)
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless
from rich.console import Console

from medseg.config import compose, resumed
from medseg.data.cases import find_cases, find_inputs, load_image, load_label_values
from medseg.data.facts import CaseInfo, ChannelStats, read_survey
from medseg.errors import MedsegError
from medseg.formats import Reading, find_series, open_label, open_volume, read_grid, write_image, write_label
from medseg.labels import Labels
from medseg.volume import Grid, Volume

GRID = Grid((20, 18, 14), np.array([[1.0, 0, 0, -3], [0, 1.2, 0, 5], [0, 0, 1.5, 7], [0, 0, 0, 1]]))
LOOSE = Reading(channels=True, resample_irregular=True, without_preamble=True)


@dataclass(frozen=True)
class Format:
    """One kind of input.

    Args:
        make: writes valid inputs, each a folder of its own in the folder that it is given.
        damage: ending of a file's name → what is done to such a file; others stay whole.
        read: reads one such folder by everything that reads it.
    """

    make: Callable[[Path], None]
    damage: dict[str, Damage]
    read: Callable[[Path], None]

    def mutant(self, seeds: Path, target: Path, rng: Random) -> None:
        """Write a damaged copy of one of the valid inputs."""
        seed = rng.choice(sorted(p for p in seeds.iterdir() if p.is_dir()))
        files = sorted(p for p in seed.rglob("*") if p.is_file())
        victims = [p for p in files if any(p.name.endswith(ending) for ending in self.damage)]
        victim = rng.choice(victims)
        for path in files:
            copy = target / path.relative_to(seed)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path == victim:
                damage = next(d for ending, d in self.damage.items() if path.name.endswith(ending))
                copy.write_bytes(damage(path.read_bytes(), rng))
            else:
                shutil.copyfile(path, copy)


outcomes: Counter[str] = Counter()
"""How often a call accepted its input ("accepted"), or with which code it refused it."""


def attempt(*calls: Callable[[], object]) -> None:
    """Do one after the other; the refusal of one does not keep the next from being tried."""
    for call in calls:
        try:
            call()
            outcomes["accepted"] += 1
        except MedsegError as error:
            str(error)
            outcomes[error.code] += 1


def _array(seed: int, shape: tuple[int, ...] = GRID.shape) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.float32)


def _label() -> np.ndarray:
    label = np.zeros(GRID.shape, np.uint8)
    label[4:12, 5:12, 3:9], label[13:17, 4:8, 4:8] = 1, 2
    return label


def make_nifti(folder: Path) -> None:
    for name in ("plain", "packed", "label", "two", "channels", "pair", "double"):
        (folder / name).mkdir(parents=True)
    write_image(folder / "plain" / "a.nii", Volume(_array(0)[None], GRID))
    write_image(folder / "packed" / "a.nii.gz", Volume(_array(0)[None], GRID))
    write_image(folder / "channels" / "a.nii.gz", Volume(_array(0, (2, *GRID.shape)), GRID))
    write_label(folder / "label" / "a.nii.gz", Volume(_label(), GRID), {1: "liver", 2: "spleen"})
    nib.save(nib.Nifti2Image(_array(0).astype(np.int16), GRID.affine), folder / "two" / "a.nii")
    nib.save(nib.Nifti1Pair(_array(0).astype(np.int16), GRID.affine), folder / "pair" / "a.hdr")
    nib.save(nib.Nifti1Image(_array(0).astype(np.float64), GRID.affine), folder / "double" / "a.nii.gz")


def read_images(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        attempt(
            lambda path=path: open_volume(path),
            lambda path=path: open_volume(path, Reading(channels=True)),
            lambda path=path: open_label(path),
            lambda path=path: read_grid(path),
        )
    attempt(lambda: find_inputs([folder]), lambda: _inspect(folder))


def _inspect(folder: Path) -> None:
    from medseg.reports.inventory import inspect_path

    console = Console(file=io.StringIO(), width=200)
    inspect_path(folder, console, as_json=False, pictures=None, paths=True)


def make_pictures(folder: Path) -> None:
    grey = _array(1, (40, 30)).astype(np.uint8)
    colour = _array(2, (40, 30, 3)).astype(np.uint8)
    palette = Image.fromarray(grey).convert("P")
    for name, picture, options in (
        ("grey.png", Image.fromarray(grey), {}),
        ("wide.png", Image.fromarray(grey.astype(np.uint16) * 300), {}),
        ("bits.png", Image.fromarray(grey > 90), {}),
        ("palette.png", palette, {}),
        ("alpha.png", Image.fromarray(colour).convert("RGBA"), {}),
        ("interlaced.png", Image.fromarray(colour), {"optimize": True}),
        ("raw.tif", Image.fromarray(colour), {}),
        ("lzw.tif", Image.fromarray(grey), {"compression": "tiff_lzw"}),
        ("deflate.tif", Image.fromarray(grey.astype(np.float32)), {"compression": "tiff_adobe_deflate"}),
        ("packbits.tif", palette, {"compression": "packbits"}),
        ("jpeg.tif", Image.fromarray(colour), {"compression": "jpeg"}),
        ("a.jpg", Image.fromarray(colour), {"progressive": True}),
        ("a.gif", palette, {}),
    ):
        (folder / name.replace(".", "_")).mkdir(parents=True)
        picture.save(folder / name.replace(".", "_") / name, **options)


def make_dicom(folder: Path) -> None:
    make_slices(folder / "plain")
    for name, syntax in (("rle", RLELossless), ("deflated", DeflatedExplicitVRLittleEndian)):
        for path in make_slices(folder / name):
            dataset = pydicom.dcmread(path)
            if syntax == RLELossless:
                dataset.compress(RLELossless)
            else:
                dataset.file_meta.TransferSyntaxUID = syntax
            dataset.save_as(path, enforce_file_format=True)
    write_series(folder / "other", 1, [GTV])


def read_dicom(folder: Path) -> None:
    from medseg.formats.dicom.catalog import read_catalog

    attempt(
        lambda: open_volume(folder),
        lambda: open_volume(folder, LOOSE),
        lambda: read_grid(folder),
        lambda: find_series(folder),
        lambda: read_catalog(folder),
        lambda: _inspect(folder),
        lambda: [load_image(case) for case in find_inputs([folder])],
    )


def make_seg(folder: Path) -> None:
    for number in range(2):
        root = folder / f"tree{number}"
        files = write_series(root / "ct", number, [GTV, CORD])
        write_seg(root / "annotation.dcm", files, {"tumour": GTV, "cord": CORD})


def make_rtstruct(folder: Path) -> None:
    for number in range(2):
        root = folder / f"tree{number}"
        files = write_series(root / "ct", number, [GTV, CORD])
        write_rtstruct(root / "annotation.dcm", files, {"tumour": GTV, "cord": CORD})


def read_annotated(folder: Path) -> None:
    from medseg.conversion import convert
    from medseg.conversion.options import Options
    from medseg.formats.dicom.annotations import read_annotation

    def train() -> None:
        for case in find_cases(folder, labels={"tumour": "tumour", "cord": "cord"}).cases:
            load_label_values(case, load_image(case).grid)

    target = folder.parent / "converted.nii.gz"
    options = Options(Reading(), image=folder / "ct")
    attempt(
        lambda: read_annotation(folder / "annotation.dcm"),
        train,
        lambda: convert(folder / "annotation.dcm", target, Console(file=io.StringIO()), options),
        lambda: _inspect(folder),
    )
    target.unlink(missing_ok=True)


def make_zips(folder: Path) -> None:
    slices = make_slices(folder / "slices")
    packed = folder / "nifti"
    make_nifti(packed)
    for name, paths in (("dicom", slices), ("images", [packed / "label" / "a.nii.gz", packed / "plain" / "a.nii"])):
        (folder / f"z_{name}").mkdir()
        with zipfile.ZipFile(folder / f"z_{name}" / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, f"in/{path.name}")
    shutil.rmtree(folder / "slices")
    shutil.rmtree(packed)


def read_zips(folder: Path) -> None:
    path = folder / "a.zip"
    attempt(
        lambda: open_volume(path),
        lambda: find_inputs([path]),
        lambda: find_cases(path),
        lambda: _inspect(path),
    )


def write_cases(folder: Path, number: int = 4) -> None:
    """A data set of NIfTI files with all tables that may describe one."""
    rng = np.random.default_rng(number)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for index in range(number):
        label = _label()
        image = rng.normal(50, 10, GRID.shape) + 60.0 * label
        write_image(folder / "imagesTr" / f"c{index}_0000.nii.gz", Volume(image[None].astype(np.float32), GRID))
        write_label(folder / "labelsTr" / f"c{index}.nii.gz", Volume(label, GRID))


def make_tables(folder: Path) -> None:
    """dataset.json of MSD and nnU-Net, manifests, split files, tables of labels."""
    names = [f"c{n}" for n in range(4)]
    rows = [
        {
            "case": n,
            "image": f"imagesTr/{n}_0000.nii.gz",
            "label": f"labelsTr/{n}.nii.gz",
            "patient": f"p{n}",
            "split": s,
        }
        for n, s in zip(names, ("train", "train", "val", "test"), strict=True)
    ]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    listed = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    tables: dict[str, dict[str, object]] = {
        "msd": {"dataset.json": {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"},
                                 "training": listed, "numTraining": 4}},
        "nnunet": {"dataset.json": {"channel_names": {"0": "CT"}, "labels": {"background": 0, "whole": [1, 2], "b": 2},
                                    "regions_class_order": [1, 2], "numTraining": 4, "file_ending": ".nii.gz"}},
        "listed": {"dataset.json": {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2},
                                    "file_ending": ".nii.gz",
                                    "dataset": {r["case"]: {"images": [r["image"]], "label": r["label"]}
                                                for r in rows}}},
        "json": {"manifest.json": {"cases": rows, "labels": {"a": 1, "b": 2}, "channels": ["CT"]}},
        "split": {"split.json": {"train": names[:2], "val": names[2:3], "test": names[3:], "rule": "mine"}},
        "splits": {"split.json": [{"train": names[:2], "val": names[2:]}, {"train": names[2:], "val": names[:2]}]},
        "labels": {"predictions.json": {"labels": {"background": 0, "a": 1}, "cases": {"c0": {"files": ["c0.nii.gz"],
                                                                                          "notes": ["n"]}}}},
    }  # fmt: skip
    for name, files in tables.items():
        write_cases(folder / name)
        for file, content in files.items():
            (folder / name / file).write_text(json.dumps(content))
    write_cases(folder / "csv")
    (folder / "csv" / "manifest.csv").write_text("\n".join(lines) + "\n")


def read_tables(folder: Path) -> None:
    from medseg.data.splits import SplitConfig, make_split, num_folds, read_split, read_splits
    from medseg.formats.label_table import labels_for, read_cases, read_labels

    def cases() -> None:
        found = find_cases(folder)
        if found.labels is not None:
            Labels.from_mapping(found.labels)
        if (folder / "split.json").is_file():
            config = SplitConfig(file=str(folder / "split.json"))
            for fold in range(min(num_folds(config), 3)):
                make_split(found.cases, config, 0, fold=fold)
        else:
            make_split(found.cases, SplitConfig(num_folds=2), 0)

    attempt(
        cases,
        lambda: read_split(folder / "split.json"),
        lambda: read_splits(folder / "split.json"),
        lambda: read_labels(folder / "predictions.json"),
        lambda: read_cases(folder / "predictions.json"),
        lambda: labels_for(folder / "c0.nii.gz"),
    )


def _write_discs(folder: Path) -> list[str]:
    names = [f"{name}{number}.png" for name in ("ill", "well") for number in range(3)]
    folder.mkdir(parents=True)
    for seed, name in enumerate(names):
        Image.fromarray(_array(seed, (12, 10)).astype(np.uint8)).save(folder / name)
    return names


def make_classified(folder: Path) -> None:
    """Tables of images and their classes, with all columns and with few."""
    splits = ("train", "val", "test")
    names = _write_discs(folder / "all" / "images")
    _write_discs(folder / "few" / "images")
    rows = [f"c{n},images/{name},{name[:-5]},p{n},{splits[n % 3]}" for n, name in enumerate(names)]
    (folder / "all" / "list.csv").write_text("\n".join(["case,image,class,patient,split", *rows]) + "\n")
    rows = [f"images/{name};{name[:-5]}" for name in names]
    (folder / "few" / "list.csv").write_text("\n".join(["file;diagnosis", *rows]) + "\n")


def make_npz(folder: Path) -> None:
    """Pictures and volumes, packed and not."""
    for name, shape, save in (
        ("grey", (6, 8, 7), np.savez),
        ("colour", (6, 8, 7, 3), np.savez_compressed),
        ("volumes", (6, 5, 8, 7), np.savez_compressed),
    ):
        (folder / name).mkdir(parents=True)
        arrays = {}
        for seed, split in enumerate(("train", "val", "test")):
            arrays[f"{split}_images"] = _array(seed, shape).astype(np.uint8)
            arrays[f"{split}_labels"] = (np.arange(6) % 2).reshape(-1, 1)
        save(folder / name / "list.npz", **arrays)


def read_classified(folder: Path) -> None:
    from medseg.classification.cases import find_classified, find_images
    from medseg.classification.images import npz_arrays, open_image

    (path,) = folder.glob("list.*")
    npz_arrays.cache_clear()

    def images(classes: list[str] | None = None) -> None:
        for case in find_classified(path, classes).cases:
            if not isinstance(case.source, Path) or case.source.resolve().is_relative_to(folder.resolve()):  # not "/"
                open_image(case, Reading(channels=True))

    attempt(images, lambda: images(["ill", "well"]), lambda: find_images([path]))


SMALL = (
    "data.plan.base_width=2",
    "data.plan.num_stages=2",
    "data.plan.patch_size=[8,8,8]",
    "data.plan.batch_size=2",
    "data.split.num_folds=2",
    "data.store=null",
    "trainer.device=cpu",
    "trainer.max_steps=2",
    "trainer.num_validations=1",
    "trainer.log_steps=1",
    "trainer.overlay_cases=0",
    "trainer.report=false",
)


_runs: list[Path] = []
"""A run that `make_run` made in this process."""


def make_run(folder: Path) -> None:
    """A run of two steps, and its predictions."""
    from medseg.cli import main
    from medseg.training.train import train

    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    if _runs and _runs[0].is_dir():  # several formats need one: trained once for a process
        shutil.copytree(_runs[0], run)
        return
    data = folder.parent / "data of the run"
    write_cases(data)
    train(compose("train", [f"data.root='{data}'", *SMALL]), run, Console(file=io.StringIO()))
    scan = str(data / "imagesTr" / "c0_0000.nii.gz")
    with redirect_stdout(io.StringIO()):
        main(["predict", str(run), scan, "-o", str(run / "predicted")])
    shutil.rmtree(run / "tensorboard")
    for path in (run / "curves.png", *(run / "validation").glob("*.png")):
        path.unlink()
    shutil.rmtree(run / "validation" / "overlays", ignore_errors=True)
    (run / "folds.json").write_text(json.dumps({"members": ["fold_0"], "finished": ["fold_0"]}))
    kept = folder.parent / "a run for others"  # tests may write into the other one
    shutil.copytree(run, kept)
    _runs[:] = [kept]


def make_ensemble(folder: Path) -> None:
    """Of two runs, and of folds."""
    from medseg.inference.members import Configuration, Member, write_ensemble

    made = folder.parent / "runs of the ensemble"
    make_run(made)
    (made / "run" / "folds.json").unlink()
    for name in ("one", "two"):
        shutil.copytree(made / "run", folder / "ensemble" / name)
    runs = [folder / "ensemble" / name for name in ("one", "two")]
    write_ensemble(folder / "ensemble", [Configuration(run, (Member(run),)) for run in runs])
    for number in range(2):
        shutil.copytree(made / "run", folder / "folds" / f"fold_{number}")
    (folder / "folds" / "folds.json").write_text(
        json.dumps({"members": ["fold_0", "fold_1"], "finished": ["fold_0", "fold_1"]})
    )


def read_bundle(folder: Path) -> None:
    from medseg.bundle import load_bundle
    from medseg.inference.members import configurations_of, load_members

    attempt(lambda: [load_members(configuration) for configuration in configurations_of(folder)])
    for run in sorted(path.parent for path in folder.rglob("bundle.json")):
        attempt(
            lambda run=run: load_bundle(run),
            lambda run=run: load_bundle(run, checkpoint="latest"),
            lambda run=run: _resume(run),
        )


def _resume(run: Path) -> None:
    """What a training that goes on reads."""
    from medseg.bundle import load_bundle
    from medseg.training.optimizers import OPTIMIZERS
    from medseg.training.state import read_counters, resume_latest

    read_counters(run)
    model = load_bundle(run, checkpoint="latest").model
    optimizer = OPTIMIZERS.build({"name": "adamw"}, parameters=model.parameters())
    resume_latest(run, model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None)


def make_archives(folder: Path) -> None:
    """Bundles as zips, of a run, of folds and of an ensemble."""
    from medseg.inference.packing import export_bundle

    for name, run in _models(folder).items():
        (folder / name).mkdir()
        export_bundle(run, folder / name / "model.zip")


def make_manifests(folder: Path) -> None:
    """Bundles as folders, and a run that is done."""
    from medseg.inference.packing import export_bundle

    runs = _models(folder)
    for name, run in runs.items():
        export_bundle(run, folder / name)
    shutil.copytree(runs["run"], folder / "done")


def _models(folder: Path) -> dict[str, Path]:
    made = folder.parent / "models"
    make_ensemble(made)
    folder.mkdir(parents=True, exist_ok=True)
    return {"run": made / "ensemble" / "one", "ensemble": made / "ensemble", "folds": made / "folds"}


def read_model(folder: Path) -> None:
    """A bundle or a run, as the verbs that take a MODEL do."""
    from medseg.bundle import load_bundle, opened
    from medseg.inference.members import configurations_of, is_model, load_members
    from medseg.inference.packing import export_bundle
    from medseg.inference.postprocess import PostProcessing
    from medseg.inference.verification import verify

    model = folder / "model.zip" if (folder / "model.zip").is_file() else folder
    again = folder.parent / "again.zip"

    def post_processing() -> None:
        for configuration in configurations_of(model):
            for bundle in load_members(configuration):
                PostProcessing.read(opened(model), bundle.info.labels)

    attempt(
        lambda: is_model(model),
        lambda: verify(model).to_json(),
        post_processing,
        lambda: load_bundle(model),
        lambda: export_bundle(model, again),
    )
    again.unlink(missing_ok=True)


def read_run_tables(folder: Path) -> None:
    from medseg.bundle import BundleInfo
    from medseg.inference.manifest import Manifest
    from medseg.inference.postprocess import PostProcessing
    from medseg.reports.browse import cases_table, data_of, find_runs, read_evaluation
    from medseg.reports.comparison import compare, read_metrics
    from medseg.training.changes import changed
    from medseg.training.class_weights import with_class_weights
    from medseg.training.folds import read_folds
    from medseg.training.initial import seen_before

    labels = BundleInfo.read(folder).labels
    from medseg.data.splits import Split, read_split

    split = Split(("c0",), ("c1",), (), "")
    stats = ChannelStats(0.0, 9.0, 4.0, 1.0, 0.0, 4.0, 9.0, 5)
    case = CaseInfo("c0", GRID.shape, GRID.spacing_mm, "RAS", None, (3000, 300, 80), (stats,), GRID.shape)
    attempt(
        lambda: PostProcessing.read(folder, labels),
        lambda: read_folds(folder),
        lambda: read_split(folder / "split.json"),
        lambda: cases_table(read_evaluation(folder / "validation")),
        lambda: compare(read_metrics(folder / "validation"), read_metrics(folder / "validation")),
        lambda: data_of(folder),
        lambda: find_runs(folder.parent),
        lambda: seen_before(folder, split, "x"),
        lambda: changed(read_survey(folder / "survey.json"), [case]),
        lambda: with_class_weights({"class_weights": "auto"}, labels, folder / "survey.json", {"c0", "c1"}),
        lambda: [*Manifest(folder / "predicted", "m", {}).rows()],
        lambda: Manifest(folder / "predicted", "m", {}).records(),
        lambda: _report(folder),
    )


def _report(folder: Path) -> None:
    from medseg.reports.html.predictions import manifest_of

    manifest_of(folder / "predicted")


def read_configuration(folder: Path) -> None:
    attempt(lambda: resumed(folder, []), lambda: resumed(folder, ["trainer.max_steps=9"]))


def read_plans(folder: Path) -> None:
    from medseg.data.plan.file import read_plan
    from medseg.formats.label_table import table_of

    text = (folder / "labels.txt").read_text("latin-1")
    attempt(lambda: read_plan(folder / "plan.yaml"), lambda: Labels.from_mapping(table_of(text)))


def make_plans(folder: Path) -> None:
    made = folder.parent / "run of the plan"
    make_run(made)
    (folder / "plan").mkdir(parents=True)
    shutil.copyfile(made / "run" / "plan.yaml", folder / "plan" / "plan.yaml")
    (folder / "plan" / "labels.txt").write_text("{background: 0, liver: [1, 2], rest: rest}")


def make_nnunet(folder: Path) -> None:
    import test_nnunet_weights as nnunet

    for name in nnunet.NAMES:
        nnunet.write(nnunet.read(name), folder / name)


def read_nnunet(folder: Path) -> None:
    from medseg.conversion import convert
    from medseg.conversion.options import Options

    target = folder.parent / "converted"
    attempt(lambda: convert(folder, target, Console(file=io.StringIO()), Options(Reading())))
    shutil.rmtree(target, ignore_errors=True)


def make_store(folder: Path) -> None:
    """What two uses of a store leave; its data lie beside it, so that the files are those of the keys."""
    data = folder.parent / "data of the store"
    write_cases(data, 2)
    _use_store(folder / "prepared", data)


def _use_store(place: Path, data: Path) -> None:
    import test_preprocess

    from medseg.data.preparation import prepare_cases
    from medseg.data.store import Store
    from medseg.data.survey import survey

    found = find_cases(data)
    store = Store(place)
    labels = {"a": 1, "b": 2}
    survey(found, labels, num_threads=1, store=store)
    plan = test_preprocess.plan(spacing_mm=(1.2, 1.0, 1.0), patch_size=(8, 8, 8), batch_size=2)
    prepared = prepare_cases(
        found.cases, plan, Labels.from_mapping(labels), num_threads=1, store=store, in_memory=False
    )
    for case in prepared.cases:
        case.image[..., :4, :4, :4]
        case.label[..., :4, :4, :4]
        assert len(case.locations[1][:2]) == 2


def read_store(folder: Path) -> None:
    """Damage is a miss, so there is no refusal either. An entry is a folder of the store, and so is the mutant."""
    attempt(lambda: _use_store(folder, folder.parent / "seeds" / "store" / "data of the store"))


SETTINGS = (
    b"model.widths=[4,8]", b"trainer.max_steps=3", b"data.labels={a: 1, b: [2, 3]}", b"loss=dice_ce", b"seed=5",
    b"data.plan.normalisation=[ct,z-score]", b"data.root='a b'", b"optimizer.lr=1e-3", b"folds=[0,1]",
)  # fmt: skip


def make_overrides(folder: Path) -> None:
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "overrides.txt").write_bytes(b"\n".join(SETTINGS))


def read_overrides(folder: Path) -> None:
    """The line that is damaged; the first where none is."""
    lines = (folder / "overrides.txt").read_bytes().split(b"\n")
    changed = [line for line in lines if line not in SETTINGS] or lines[:1]
    attempt(*(lambda line=line: compose("train", [line.decode("utf-8", "surrogateescape")]) for line in changed))


FORMATS: dict[str, Format] = {
    "nifti": Format(make_nifti, {".gz": damaged_gzip, ".nii": damaged_gzip, ".hdr": damaged_gzip}, read_images),
    "pictures": Format(make_pictures, {"": damaged_png}, read_images),
    "dicom": Format(make_dicom, {".dcm": damaged_dicom}, read_dicom),
    "seg": Format(make_seg, {"annotation.dcm": damaged_dicom}, read_annotated),
    "rtstruct": Format(make_rtstruct, {"annotation.dcm": damaged_dicom}, read_annotated),
    "zip": Format(make_zips, {".zip": damaged_zip}, read_zips),
    "tables": Format(make_tables, {".json": damaged_json, ".csv": damaged_csv}, read_tables),
    "classified": Format(make_classified, {".csv": damaged_csv}, read_classified),
    "npz": Format(make_npz, {".npz": damaged_zip}, read_classified),
    "configuration": Format(make_run, {"config.yaml": damaged_yaml, "places.yaml": damaged_yaml}, read_configuration),
    "plan": Format(make_plans, {".yaml": damaged_yaml, ".txt": damaged_yaml}, read_plans),
    "bundle": Format(
        make_ensemble,
        {"bundle.json": damaged_json, ".safetensors": damaged_checkpoint, "ensemble.json": damaged_json,
         "folds.json": damaged_json},
        read_bundle,
    ),
    "archive": Format(make_archives, {".zip": damaged_model}, read_model),
    "manifest": Format(make_manifests, {"manifest.json": damaged_json}, read_model),
    "run": Format(
        make_run,
        {"folds.json": damaged_json, "split.json": damaged_json, "survey.json": damaged_json,
         "metrics.json": damaged_json, "postprocessing.json": damaged_json, "config.yaml": damaged_yaml,
         "places.yaml": damaged_yaml, ".jsonl": damaged_lines, ".csv": damaged_csv},
        read_run_tables,
    ),
    "nnunet": Format(make_nnunet, {".json": damaged_json, ".pth": damaged_zip}, read_nnunet),
    "store": Format(make_store, {".json": damaged_json, ".b2nd": damaged_text, ".bin": damaged_text}, read_store),
    "overrides": Format(make_overrides, {".txt": damaged_text}, read_overrides),
}  # fmt: skip
