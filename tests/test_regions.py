"""Regions, classes that overlap: their table, decoding, loss, scores, and a training from one end to the other."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from medseg.bundle import BundleInfo, load_bundle
from medseg.cli import main
from medseg.config import compose
from medseg.data.augment import Mirroring
from medseg.data.manifest import read_dataset_json
from medseg.errors import Code, MedsegError
from medseg.formats import open_label
from medseg.formats.dicom import annotations
from medseg.inference.predictor import decode
from medseg.inference.sliding_window import WindowConfig, sliding_window_logits
from medseg.labels import Labels
from medseg.losses import LOSSES
from medseg.losses.choice import build_loss, fitting_loss
from medseg.metrics.case import measure_case
from medseg.reports.evaluation import evaluate_folders
from medseg.reports.overlay import overlay_figure
from medseg.resampling import resample
from medseg.training.train import train
from medseg.volume import Grid, Volume

BRATS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
APART = {"lesion": [1, 2], "bleeding": [2, 3]}
"""Of these none holds the other."""
TINY = (
    "data.plan.base_width=4",
    "data.plan.num_stages=2",
    "data.plan.patch_size=[8,16,16]",
    "trainer.device=cpu",
    "trainer.num_validations=2",
    "trainer.log_steps=1",
    "trainer.overlay_cases=1",
)
ORGANS = "{organs: [1,2,3], upper: [1,2], liver: 1, spine: 4, aorta: 5}"
"""Regions of the phantom's classes."""


def refused(table: dict[str, Any], order: Any = None) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        Labels.from_mapping(table, regions_order=order)
    assert caught.value.code is Code.LABEL
    return caught.value


def test_a_value_of_several_names_makes_regions() -> None:
    labels = Labels.from_mapping(BRATS)
    assert labels.foreground == ("whole", "core", "enhancing") and labels.num_outputs == 3
    assert labels.names == ("background", "whole without core", "core without enhancing", "enhancing")
    assert labels.regions == labels.parts == ((1, 2, 3), (2, 3), (3,))
    values = np.array([[0, 1, 2, 3]])
    assert np.array_equal(labels.to_values(labels.to_index(values)), values)
    assert labels.to_json() == {**BRATS, "regions_class_order": [1, 2, 3]}


def test_disjoint_lists_are_classes_unless_an_order_makes_them_regions() -> None:
    table = {"a": [1, 2], "b": [3, 4]}
    assert Labels.from_mapping(table).regions == () and Labels.from_mapping(table).num_outputs == 3
    assert Labels.from_mapping(table, regions_order=["a", "b"]).regions == ((1,), (2,))
    assert Labels.from_mapping(table).parts == ((1,), (2,))


@pytest.mark.parametrize(
    ("table", "order", "painted"),
    [
        ({"enhancing": 3, "core": [2, 3], "whole": [1, 2, 3]}, None, [("whole", 1), ("core", 2), ("enhancing", 3)]),
        (BRATS, ["core", "whole", "enhancing"], [("core", 2), ("whole", 1), ("enhancing", 3)]),
        ({**BRATS, "whole": [1, 2, 3, 4]}, [4, 2, 3], [("whole", 4), ("core", 2), ("enhancing", 3)]),
        (APART, None, [("lesion", 1), ("bleeding", 3)]),
        ({"both": [1, 2], "one": 1, "two": 2}, None, [("both", 1), ("one", 1), ("two", 2)]),
    ],
)
def test_the_order_and_what_is_painted(table: dict[str, Any], order: Any, painted: list[tuple[str, int]]) -> None:
    labels = Labels.from_mapping(table, regions_order=order)
    written = labels.written_values()
    assert [(n, written[of[0]]) for n, of in zip(labels.region_names, labels.regions, strict=True)] == painted
    assert Labels.from_mapping(json.loads(json.dumps(labels.to_json()))) == labels


@pytest.mark.parametrize(
    ("table", "order", "message"),
    [
        ({"a": [1, 2], "b": [2, 1]}, None, "'a' and 'b' apart"),
        ({"background": 0, "a": [0, 1], "b": 1}, None, "holds the background"),
        ({"a": [1, 2], "b": 2, "c": "rest"}, None, "'rest'"),
        (BRATS, ["whole", "core"], "name each of them once"),
        (BRATS, ["whole", "core", "kore"], "name each of them once"),
        (BRATS, ["whole", "core", "core"], "name each of them once"),
        (BRATS, [1, 1, 3], "name each of them once"),
        (BRATS, [1, 2], "name each of them once"),
        (BRATS, [1, {"whole": 1}, [3]], "name each of them once"),
    ],
)
def test_tables_that_cannot_be_meant(table: dict[str, Any], order: Any, message: str) -> None:
    error = refused(table, order)
    assert message in error.message
    if order == ["whole", "core"]:
        assert error.where == "data.regions_order" and "enhancing" in str(error.remedy)


def test_values_that_no_region_holds_are_refused() -> None:
    with pytest.raises(MedsegError, match=r"ids \[7\]"):
        Labels.from_mapping(BRATS).to_index(np.array([0, 3, 7]))


@pytest.mark.parametrize("table", [BRATS, APART, {"both": [1, 2], "one": 1, "two": 2}])
def test_what_is_certain_is_decoded_as_it_was(table: dict[str, Any]) -> None:
    labels = Labels.from_mapping(table)
    indices = torch.arange(labels.num_classes, dtype=torch.uint8).repeat(2, 1)
    inside = torch.from_numpy(labels.membership())[indices.long()].movedim(-1, 0).float()
    assert torch.equal(labels.decode(20 * inside - 10), indices)
    assert torch.equal(labels.decode(0.8 * inside + 0.1, threshold=0.5), indices)


def test_decoding_paints_in_the_order_as_nnunet_does() -> None:
    """All combinations of BraTS's regions, also those that cannot be: nnU-Net's loop over regions_class_order."""
    labels = Labels.from_mapping(BRATS)
    logits = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3))).T
    expected = torch.zeros(8, dtype=torch.long)
    for region, value in enumerate([1, 2, 3]):
        expected[torch.sigmoid(logits[region]) > 0.5] = value
    assert np.array_equal(labels.to_values(labels.decode(logits).numpy()), expected.numpy())


@pytest.mark.parametrize("shape", [(5, 9, 8), (20, 13, 6), (9, 10, 8)])
def test_decoding_on_another_grid(shape: tuple[int, ...]) -> None:
    labels = Labels.from_mapping(BRATS)
    logits = torch.randn(3, 9, 10, 8, generator=torch.Generator().manual_seed(0))
    grid = Grid(shape, np.eye(4))
    got = decode(logits, grid, labels, grid)
    assert np.array_equal(got.array, labels.decode(resample(logits, shape)).numpy())


def test_loss_by_hand() -> None:
    labels = Labels.from_mapping({"outer": [1, 2], "inner": 2})
    target = torch.tensor([[[0, 1, 2, 2]]], dtype=torch.uint8)
    logits = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(0))
    inside = torch.tensor([[[[0.0, 1, 1, 1]], [[0, 0, 1, 1]]]])
    p = logits.sigmoid()
    dice = (2 * (p * inside).sum((0, 2, 3)) + 1e-5) / (p.sum((0, 2, 3)) + inside.sum((0, 2, 3)) + 1e-5)
    expected = F.binary_cross_entropy(p, inside) + 1 - dice.mean()
    loss = LOSSES.build({"name": "dice_bce"}, labels=labels)
    assert loss(logits, target).item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss(logits.bfloat16(), target).dtype == torch.float32
    perfect = 40 * inside - 20
    assert loss(perfect, target) < 1e-4
    assert loss(torch.full_like(logits, -20), torch.zeros_like(target)) < 1e-4  # no region at all


def test_the_loss_fits_the_labels() -> None:
    regions, classes = Labels.from_mapping(BRATS), Labels.from_mapping({"a": 1, "b": 2})
    chosen, why = fitting_loss({"name": "dice_ce", "ce_weight": 0.5, "batch_dice": False}, regions)
    assert chosen["name"] == "dice_bce" and chosen["bce_weight"] == 0.5 and chosen["batch_dice"] is False
    assert why is not None and "overlap" in why
    assert type(build_loss({"name": "dice_ce"}, regions)).__name__ == "DiceBCELoss"
    assert fitting_loss({"name": "dice_ce"}, classes) == ({"name": "dice_ce"}, None)
    assert fitting_loss({"name": "dice_bce"}, regions) == ({"name": "dice_bce"}, None)
    with pytest.raises(MedsegError, match=r"E_CONFIG.*(?s:.*)loss=dice_ce"):
        build_loss({"name": "dice_bce"}, classes)
    with pytest.raises(MedsegError, match="class weights"):
        build_loss({"name": "dice_ce", "class_weights": [1, 2, 3, 4]}, regions)


def test_regions_are_measured_as_the_union_of_their_classes() -> None:
    labels = Labels.from_mapping(BRATS)
    rng = np.random.default_rng(0)
    predicted, reference = rng.integers(0, 4, (2, 6, 7, 8)).astype(np.uint8)
    grid = Grid((6, 7, 8), np.diag([1.0, 2.0, 3.0, 1.0]))
    found = measure_case(predicted, reference, grid, num_classes=4, regions=labels.regions)
    for result, classes in zip(found, labels.regions, strict=True):
        masks = [np.isin(indices, classes).astype(np.uint8) for indices in (predicted, reference)]
        (alone,) = measure_case(*masks, grid, num_classes=2)
        assert result.values == alone.values and result.state is alone.state


def test_sides_of_regions_change_places() -> None:
    labels = Labels.from_mapping({"lung_left": [1, 2], "nodule_left": 2, "lung_right": [3, 4], "nodule_right": 4})
    assert labels.foreground == ("lung_left", "lung_right", "nodule_left", "nodule_right")
    swap = {"lung_left": "lung_right", "nodule_left": "nodule_right"}
    table = labels.membership()[: labels.num_classes]
    mirroring = Mirroring.of((2,), swap, labels.declared, "SPL", 3, membership=table)
    assert mirroring.outputs == (1, 0, 3, 2)
    places = [labels.names.index(n) for n in ("lung_left without nodule_left", "nodule_left")]
    others = [labels.names.index(n) for n in ("lung_right without nodule_right", "nodule_right")]
    assert [mirroring.classes[p] for p in places] == others and mirroring.classes[0] == 0
    with pytest.raises(MedsegError, match=r"(?s)same parts.*augment.swap"):
        Mirroring.of((2,), {"lung_left": "lung_right"}, labels.declared, "SPL", 3, membership=table)

    class Sides(torch.nn.Module):  # knows left from right by the column: output 0 is the low half, output 1 the high
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
            return size

        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            low = (torch.arange(8) < 4).float().expand(len(tiles), 8, 8)
            return torch.stack([low, 1 - low, low, 1 - low], dim=1)

    window = WindowConfig(mirroring=Mirroring((1,), 1, mirroring.classes, mirroring.outputs))
    logits = sliding_window_logits(Sides(), torch.zeros(1, 8, 8), (8, 8), 4, window)
    assert torch.allclose(logits, Sides()(torch.zeros(1, 1, 8, 8))[0], atol=1e-6)


def test_dataset_json_as_nnunet_has_it(tmp_path: Path) -> None:
    table = {"channel_names": {"0": "T1"}, "labels": BRATS, "regions_class_order": [1, 2, 3], "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    labels = read_dataset_json(tmp_path / "dataset.json").labels
    assert labels is not None and Labels.from_mapping(labels) == Labels.from_mapping(BRATS)
    table["labels"] = {"background": 0, "a": 1, "b": 2}  # nnU-Net heeds the order only where there are regions
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    labels = read_dataset_json(tmp_path / "dataset.json").labels
    assert labels is not None and Labels.from_mapping(labels).regions == ()


def test_overlays_draw_the_classes_and_name_the_dice_of_regions() -> None:
    labels = Labels.from_mapping(BRATS)
    mask = np.zeros((12, 12, 12), dtype=np.uint8)
    mask[2:10, 2:10, 2:10], mask[4:8, 4:8, 4:8], mask[5:7, 5:7, 5:7] = 1, 2, 3
    grid = Grid(mask.shape, np.eye(4))
    image, label = Volume(mask[None].astype(np.float32), grid), Volume(mask, grid)
    figure = overlay_figure(image, labels=labels, reference=label, predicted=label)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == ["whole without core", "core without enhancing", "enhancing"]
    assert texts[3:] == [f"{name}   Dice 1.000" for name in labels.region_names]


@pytest.fixture(scope="module")
def region_run(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the phantom whose dataset.json declares regions; what was printed lies in console.txt beside it."""
    folder = tmp_path_factory.mktemp("regions")
    shutil.copytree(tiny_run.data, folder / "data")
    overrides = [
        *(f"data.root='{folder / 'data'}'", *TINY, f"data.labels={ORGANS}", "debug=overfit", "optimizer.lr=0.01"),
        *(
            "trainer.max_minutes=null",
            "trainer.max_steps=200",
            "trainer.log_steps=20",
            "trainer.final_predictions=true",
        ),
        *("data.plan.base_width=8", "data.plan.batch_size=2", "data.plan.patch_size=[16,24,24]"),
    ]
    experiment = compose("train", overrides)
    (folder / "run").mkdir()
    with (folder / "console.txt").open("w", encoding="utf-8") as log:
        train(experiment, folder / "run", Console(file=log, width=200))
    return folder / "run"


def test_a_run_with_regions_learns_and_reports_them(region_run: Path) -> None:
    info = BundleInfo.read(region_run)
    names = ("organs", "upper", "liver", "spine", "aorta")
    assert info.labels.foreground == names and load_bundle(region_run).model.num_classes == 5
    said = (region_run.parent / "console.txt").read_text(encoding="utf-8")
    assert "dice_bce instead of dice_ce" in said and "region     organs" in said
    with (region_run / "history.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_dice_mean"]]
    assert all(float(rows[-1][f"val_dice_{name}"]) > 0.9 for name in ("organs", "upper", "liver")), rows[-1]
    with (region_run / "validation" / "metrics.csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(names)


def test_predictions_hold_the_values_of_the_files_and_are_scored_by_region(
    region_run: Path, tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> None:
        try:
            main(list(arguments))
        except SystemExit as end:
            assert not end.code

    (case,) = (region_run / "validation").glob("*.nii.gz")
    image = tiny_run.data / "imagesTr" / case.name.replace(".nii.gz", "_0000.nii.gz")
    run("predict", str(region_run), str(image), "-o", str(tmp_path / "out"), "--device", "cpu")
    (written,) = (tmp_path / "out").glob("*.nii.gz")
    assert set(np.unique(open_label(written).array)) <= {0, 1, 2, 3, 4, 5}
    (tmp_path / "references").mkdir()
    shutil.copy(tiny_run.data / "labelsTr" / case.name, tmp_path / "references" / written.name)
    run("evaluate", str(tmp_path / "out"), str(tmp_path / "references"), "-o", str(tmp_path / "scores"))
    said = capsys.readouterr().out
    assert "organs" in said and "without" not in said
    evaluation = evaluate_folders(tmp_path / "out", tmp_path / "references")
    truth, guess = (open_label(p / written.name).array for p in (tmp_path / "references", tmp_path / "out"))
    upper = [np.isin(a, (1, 2)) for a in (truth, guess)]
    dice = 2 * (upper[0] & upper[1]).sum() / (upper[0].sum() + upper[1].sum())
    assert evaluation.mean("dice", "upper") == pytest.approx(dice)
    run("predict", str(region_run), str(tiny_run.dicom), "-o", str(tmp_path / "dicom"), "--device", "cpu",
        "--format", "nifti,dicom-seg,rtstruct")  # fmt: skip
    (label_file,) = (tmp_path / "dicom").glob("*.nii.gz")
    label, labels = open_label(label_file), BundleInfo.read(region_run).labels
    drawn = sorted((tmp_path / "dicom").glob("*.dcm"))
    assert len(drawn) == 2
    for file in drawn:  # the regions themselves, which overlap
        annotation = annotations.read_annotation(file)
        assert tuple(structure.name for structure in annotation.structures) == labels.foreground
        found = dict(annotations.masks(annotation, label.grid))
        indices = labels.to_index(label.array)
        for number, parts in enumerate(labels.parts, start=1):
            np.testing.assert_array_equal(found[number], np.isin(indices, parts))


def test_an_order_without_a_table_is_refused(tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        array = np.arange(8, dtype=np.float32).reshape(2, 2, 2) % 3
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name / "a.nii.gz")
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name / "b.nii.gz")
    experiment = compose("train", [f"data.root='{tmp_path}'", "data.regions_order=[a,b]"])
    with pytest.raises(MedsegError, match=r"(?s)E_LABEL.*data.regions_order.*data.labels"):
        train(experiment, tmp_path / "run", Console(file=io.StringIO()))


def test_brats(real_data: Path) -> None:
    """A real tumour: values → classes → values, and the regions hold each other as they should."""
    folder = real_data / "segmentation" / "brats"
    (path,) = folder.glob("*/OTMultiClass.nii.gz")
    label = open_label(path)
    labels = Labels.from_mapping({"whole": [1, 2, 3, 4], "core": [1, 3, 4], "enhancing": 4})
    indices = labels.to_index(label.array)
    sizes = [int(np.isin(indices, classes).sum()) for classes in labels.regions]
    assert sizes == [int(np.isin(label.array, v).sum()) for v in ((1, 2, 3, 4), (1, 3, 4), (4,))]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    inside = torch.from_numpy(labels.membership()[indices]).movedim(-1, 0).float()
    decoded = labels.decode(inside - 0.5).numpy()
    assert np.array_equal(decoded, indices)
    scores = measure_case(decoded, indices, label.grid, num_classes=4, regions=labels.regions, names=["dice"])
    assert [s.values["dice"] for s in scores] == [1.0, 1.0, 1.0]
