"""Voxels that nobody knows: no part in losses, sampling, statistics and scores, and never a class."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.config import compose
from medseg.conversion import Options, convert
from medseg.data.augment import AugmentConfig, Augmenter, Mirroring
from medseg.data.cases import find_cases
from medseg.data.prepared import PreparedCase
from medseg.data.sampling import PatchSampler
from medseg.data.summary import summary_lines
from medseg.data.survey import survey
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, open_label
from medseg.labels import IGNORE_INDEX, Labels
from medseg.losses import LOSSES
from medseg.losses.choice import build_loss
from medseg.losses.deep_supervision import DeepSupervision
from medseg.metrics.case import measure_case
from medseg.reports.evaluation import evaluate_folders
from medseg.reports.overlay import slices_figure
from medseg.reports.slices import SliceErrors
from medseg.resampling import resample_labels
from medseg.training.train import train
from medseg.volume import Grid, Volume

PLAIN = Labels.from_mapping({"organ": 1, "lesion": 2, "ignore": 9})
REGIONS = Labels.from_mapping({"organ": [1, 2], "lesion": 2, "ignore": 9})
PEERS = Path(__file__).parent.parent / ".peers" / "bin" / "python"
NNUNET_LOSSES = """
import sys, numpy, torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss as Dice
given = numpy.load(sys.argv[1])
found = {}
for batch_dice in (False, True):
    soft = dict(batch_dice=batch_dice, smooth=1e-5, ddp=False)
    for ignore in (False, True):
        logits = torch.tensor(given["logits"], requires_grad=True)
        target = torch.tensor(given["ignored" if ignore else "target"]).long()[:, None]
        loss = DC_and_CE_loss(dict(soft, do_bg=False), {}, ignore_label=255 if ignore else None, dice_class=Dice)
        value = loss(logits, target)
        value.backward()
        found[f"ce_{batch_dice}_{ignore}"] = value.item()
        found[f"ce_{batch_dice}_{ignore}_gradient"] = logits.grad.numpy()
        logits = torch.tensor(given["logits"][:, 1:], requires_grad=True)
        inside = [(target == 1) | (target == 2), target == 2] + ([target == 255] if ignore else [])
        # Where voxels are ignored nnU-Net sums the cross-entropy over the regions
        loss = DC_and_BCE_loss({}, dict(soft, do_bg=True), weight_ce=0.5 if ignore else 1, use_ignore_label=ignore)
        value = loss(logits, torch.cat(inside, 1).float())
        value.backward()
        found[f"bce_{batch_dice}_{ignore}"] = value.item()
        found[f"bce_{batch_dice}_{ignore}_gradient"] = logits.grad.numpy()
numpy.savez(sys.argv[2], **found)
"""


def scene(num_channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, a target that holds all classes, and which voxels are ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_channels, 5, 6, 7, generator=generator)
    target = torch.randint(0, 3, (2, 5, 6, 7), generator=generator, dtype=torch.uint8)
    return logits, target, torch.rand(2, 5, 6, 7, generator=generator) < 0.3


def test_a_value_of_no_class() -> None:
    assert PLAIN.foreground == ("organ", "lesion") and PLAIN.num_classes == PLAIN.num_outputs == 3
    values = np.array([[0, 1], [2, 9]])
    indices = PLAIN.to_index(values)
    assert indices.tolist() == [[0, 1], [2, IGNORE_INDEX]]
    assert np.array_equal(PLAIN.to_values(indices), values)
    for labels in (PLAIN, REGIONS, Labels.from_mapping({"organ": "rest", "ignore": [1, 7]})):
        assert Labels.from_mapping(json.loads(json.dumps(labels.to_json()))) == labels
    rest = Labels.from_mapping({"organ": "rest", "ignore": [1, 7]})
    assert rest.to_index(np.array([0, 1, 2, 7])).tolist() == [0, IGNORE_INDEX, 1, IGNORE_INDEX]
    assert rest.written_values() == (0, 2)


@pytest.mark.parametrize("table", [{"a": [1, 2], "ignore": 2}, {"a": 1, "ignore": 0}, {"a": 1, "ignore": "rest"}])
def test_ignored_values_that_cannot_be_meant(table: dict[str, object]) -> None:
    with pytest.raises(MedsegError) as caught:
        Labels.from_mapping(table)
    assert caught.value.code is Code.LABEL and caught.value.where == "data.labels.ignore"


def test_all_numbers_of_a_label_map_but_one_are_for_classes() -> None:
    assert Labels.from_mapping({f"c{n}": n for n in range(1, 255)}).num_classes == 255
    with pytest.raises(MedsegError, match="too many classes"):
        Labels.from_mapping({f"c{n}": n for n in range(1, 256)})


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0]])
@pytest.mark.parametrize("labels", [PLAIN, REGIONS], ids=["classes", "regions"])
def test_ignored_voxels_have_no_gradient_and_no_say(
    labels: Labels, weights: list[float] | None, batch_dice: bool
) -> None:
    if labels.regions and weights:
        pytest.skip("regions have no weights")
    logits, target, ignored = scene(labels.num_outputs)
    loss = build_loss({"name": "dice_ce", "class_weights": weights, "batch_dice": batch_dice}, labels)
    gradients, values = [], []
    for other in (0.0, 5.0):  # whatever the network says there
        said = torch.where(ignored[:, None], other, logits).requires_grad_()
        value = loss(said, target.masked_fill(ignored, IGNORE_INDEX))
        value.backward()
        assert said.grad is not None
        values.append(value.item())
        gradients.append(said.grad)
    assert values[0] == values[1] and torch.equal(gradients[0], gradients[1])
    at_ignored = ignored[:, None].expand_as(logits)
    assert (gradients[0][at_ignored] == 0).all() and (gradients[0][~at_ignored] != 0).all()


@pytest.mark.parametrize("labels", [PLAIN, REGIONS], ids=["classes", "regions"])
def test_the_loss_is_that_of_the_other_voxels(labels: Labels) -> None:
    logits, target, ignored = scene(labels.num_outputs)
    loss = build_loss({"name": "dice_ce"}, labels)
    expected = loss(logits.movedim(1, -1)[~ignored].T[None], target[~ignored][None])
    assert loss(logits, target.masked_fill(ignored, IGNORE_INDEX)).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("labels", [PLAIN, REGIONS], ids=["classes", "regions"])
def test_a_patch_of_ignored_voxels_teaches_nothing(labels: Labels) -> None:
    logits = torch.randn(2, labels.num_outputs, 8, 8, requires_grad=True)
    coarse = torch.randn(2, labels.num_outputs, 4, 4, requires_grad=True)
    loss = DeepSupervision(build_loss({"name": "dice_ce"}, labels))
    value = loss([logits, coarse], torch.full((2, 8, 8), IGNORE_INDEX, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0 and not logits.grad.any() and not coarse.grad.any()  # type: ignore[union-attr]


def test_losses_and_gradients_are_nnunets(tmp_path: Path) -> None:
    if not PEERS.exists():
        pytest.skip("nnU-Net is not installed: python scripts/make_peers.py")
    logits, target, ignored = scene()
    arrays = {"logits": logits, "target": target, "ignored": target.masked_fill(ignored, IGNORE_INDEX)}
    np.savez(tmp_path / "given.npz", **{name: array.numpy() for name, array in arrays.items()})
    command = [str(PEERS), "-c", NNUNET_LOSSES, str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    subprocess.run(command, check=True, capture_output=True)
    found = np.load(tmp_path / "found.npz")
    for batch_dice in (False, True):
        for ignore in (False, True):
            for kind, labels in (("ce", PLAIN), ("bce", REGIONS)):
                said = (logits if kind == "ce" else logits[:, 1:]).clone().requires_grad_()
                loss = LOSSES.build({"name": f"dice_{kind}", "batch_dice": batch_dice}, labels=labels)
                value = loss(said, arrays["ignored" if ignore else "target"])
                value.backward()
                # nnU-Net's Dice loss is minus Dice
                assert value.item() - 1 == pytest.approx(float(found[f"{kind}_{batch_dice}_{ignore}"]), abs=1e-5)
                expected = torch.from_numpy(found[f"{kind}_{batch_dice}_{ignore}_gradient"])
                torch.testing.assert_close(said.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_loss_that_knows_no_ignored_voxels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Simple(torch.nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()

    part = LOSSES.part("dice_ce")
    monkeypatch.setitem(LOSSES._parts, "simple", type(part)("simple", Simple, part.config))
    assert isinstance(build_loss({"name": "simple"}, Labels.from_mapping({"a": 1})), Simple)
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*ignored.*loss=dice_ce"):
        build_loss({"name": "simple"}, PLAIN)
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*regions.*loss=dice_bce"):
        build_loss({"name": "simple"}, REGIONS)


def test_resampling_makes_no_class_of_ignored_voxels_and_ignores_no_class() -> None:
    labels = torch.zeros(6, 4, 4, dtype=torch.uint8)
    labels[2:4] = IGNORE_INDEX
    labels[4:] = 1
    finer = resample_labels(labels, (12, 4, 4), 2)
    assert [int(v) for v in finer[:, 0, 0]] == [0, 0, 0, 0, *[IGNORE_INDEX] * 4, 1, 1, 1, 1]
    assert set(resample_labels(labels, (5, 7, 3), 2).unique().tolist()) <= {0, 1, IGNORE_INDEX}
    everywhere = torch.full((4, 4), IGNORE_INDEX, dtype=torch.uint8)
    assert (resample_labels(everywhere, (7, 3), 2) == IGNORE_INDEX).all()
    with pytest.raises(MedsegError, match="E_LABEL"):
        resample_labels(labels + (labels == 1), (5, 7, 3), 2)  # a 2 beside what is ignored


def test_scores_leave_ignored_voxels_out() -> None:
    rng = np.random.default_rng(0)
    predicted, reference = rng.integers(0, 3, (2, 6, 7, 8)).astype(np.uint8)
    reference[:, 4:] = IGNORE_INDEX
    grid, smaller = (Grid((6, n, 8), np.eye(4)) for n in (7, 4))
    for regions in ((), REGIONS.regions):
        found = measure_case(predicted, reference, grid, num_classes=3, regions=regions)
        cut = measure_case(predicted[:, :4], reference[:, :4], smaller, num_classes=3, regions=regions)
        for name in ("dice", "iou", "sensitivity", "precision", "specificity", "hd95", "surface_dice"):
            assert [r.values[name] for r in found] == [r.values[name] for r in cut], name
    only = np.full_like(reference, IGNORE_INDEX)
    assert {r.state.value for r in measure_case(predicted, only, grid, num_classes=3)} == {"absent"}
    with pytest.raises(MedsegError, match="E_LABEL"):  # a prediction has to say what it means
        measure_case(reference, predicted, grid, num_classes=3)


def test_patches_are_centred_where_somebody_knows() -> None:
    shape = (40, 40)
    label = torch.full(shape, IGNORE_INDEX, dtype=torch.uint8)
    label[30:34, 30:34], label[31, 31] = 0, 1
    where = tuple(np.argwhere(label.numpy() == c).astype(np.int32) for c in (0, 1))
    case = PreparedCase("a", torch.zeros(1, *shape), label, Grid.of_picture(shape), where)
    sampler = PatchSampler([case], (8, 8), 4, 0.25, seed=0, annotated_only=True)
    anywhere = PatchSampler([case], (8, 8), 4, 0.25, seed=0)
    known = [[(s.batch(step)[1] != IGNORE_INDEX).flatten(1).any(1) for step in range(10)] for s in (sampler, anywhere)]
    assert torch.stack(known[0]).all() and not torch.stack(known[1]).all()


def test_augmentation_moves_ignored_voxels_as_they_are() -> None:
    label = torch.ones(2, 12, 12, dtype=torch.uint8)
    label[:, :, 6:] = IGNORE_INDEX
    augment = Augmenter(
        AugmentConfig(rotation_probability=1.0, scale_probability=1.0),
        patch_size=(12, 12), spacing_mm=(1.0, 1.0), is_picture=True, mirroring=Mirroring((0, 1), 1, (0, 2, 1)), seed=0,
    )  # fmt: skip
    found = set()
    for step in range(6):
        found |= {int(v) for v in augment(torch.zeros(2, 1, 12, 12), label, step)[1].unique()}
    assert found == {1, 2, IGNORE_INDEX}  # 1 is called 2 where it is mirrored


def write_case(folder: Path, name: str, image: np.ndarray, label: np.ndarray) -> None:
    for kind, array in (("images", image), ("labels", label)):
        (folder / kind).mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / kind / f"{name}.nii.gz")


def test_the_survey_counts_them_apart(tmp_path: Path) -> None:
    label = np.zeros((6, 6, 6), dtype=np.uint8)
    label[:2], label[2:4] = 1, 9
    image = np.where(label == 9, 1000.0, label).astype(np.float32)
    write_case(tmp_path, "a", image, label)
    found = survey(find_cases(tmp_path), {"organ": 1, "ignore": 9}, num_threads=1)
    (case,) = found.cases
    assert case.label_voxels == (72, 72) and case.ignored_voxels == 72
    assert case.intensity[0].mean == 1.0 and case.intensity[0].num_foreground == 72
    (line,) = [line for line in summary_lines(found) if line.startswith("ignored")]
    assert "value 9" in line and "33.3 %" in line and "in 1 of 1 cases" in line


def test_pictures_of_errors_show_no_error_where_nobody_knows() -> None:
    truth, guess = np.zeros((4, 8, 8), dtype=np.uint8), np.zeros((4, 8, 8), dtype=np.uint8)
    truth[1, 2:4, 2:4], truth[2] = 1, 9
    guess[1, 2:4, 2:4], guess[2] = 1, 2
    grid = Grid(truth.shape, np.eye(4))
    reference, predicted = Volume(truth, grid), Volume(guess, grid)
    assert SliceErrors.of(reference, predicted, PLAIN).num_wrong.sum() == 0
    image = Volume(truth[None].astype(np.float32), grid)
    figure = slices_figure(image, [1, 2], labels=PLAIN, reference=reference, predicted=predicted)
    assert "ignored" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_training_from_one_end_to_the_other(tiny_run, tmp_path: Path) -> None:
    """A slab of each case is ignored, wholly of another class beneath: scores and predictions do not know it."""
    data = tmp_path / "data"
    shutil.copytree(tiny_run.data, data)
    for path in (data / "labelsTr").glob("*.nii.gz"):
        image = nibabel.load(path)
        array = np.asarray(image.dataobj).astype(np.uint8)
        array[: array.shape[0] // 3] = 6
        nibabel.save(nibabel.Nifti1Image(array, image.affine), path)
    table = json.loads((data / "dataset.json").read_text())
    table["labels"]["ignore"] = 6
    (data / "dataset.json").write_text(json.dumps(table))
    overrides = [
        f"data.root='{data}'", "data.split.num_folds=2", "data.plan.base_width=4", "data.plan.num_stages=2",
        "data.plan.patch_size=[8,16,16]", "trainer.device=cpu", "trainer.max_steps=6", "trainer.num_validations=1",
        "trainer.log_steps=1", "trainer.overlay_cases=1",
    ]  # fmt: skip
    said = io.StringIO()
    run = tmp_path / "run"
    run.mkdir()
    train(compose("train", overrides), run, Console(file=said, width=200))
    assert "ignored    value 6" in said.getvalue()
    labels = BundleInfo.read(run).labels
    assert labels.ignore == (6,) and labels.num_outputs == 6
    predictions = sorted((run / "validation").glob("*.nii.gz"))
    assert predictions and all(open_label(path).array.max() < 6 for path in predictions)
    references = tmp_path / "references"
    references.mkdir()
    for path in predictions:
        shutil.copy(data / "labelsTr" / path.name, references / path.name)
    evaluation = evaluate_folders(run / "validation", references)
    written = json.loads((run / "validation" / "metrics.json").read_text())
    for name in labels.foreground:
        said_mean = written["summary"][name]["metrics"]["dice"]["mean"]
        assert evaluation.mean("dice", name) == pytest.approx(said_mean, nan_ok=True)
    case = predictions[0]
    truth, guess = open_label(references / case.name).array, open_label(case).array
    for value, name in enumerate(labels.foreground, start=1):
        a, b = (truth == value), (guess == value) & (truth != 6)
        row = next(r for r in evaluation.rows if r.case == case.name.removesuffix(".nii.gz") and r.class_name == name)
        if a.any() or b.any():
            assert row.values["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_ignored_voxels_are_not_drawn_into_dicom(tiny_run, tmp_path: Path) -> None:
    table = "{liver: 1, spleen: 2, kidneys: 3, spine: 4, ignore: 5}"
    drawn = tmp_path / "label.seg.dcm"
    options = Options(STRICT, image=tiny_run.dicom, labels=table)
    convert(tiny_run.label, drawn, Console(file=io.StringIO()), options)
    convert(drawn, tmp_path / "back.nii.gz", Console(file=io.StringIO()), Options(STRICT, image=tiny_run.dicom))
    truth = open_label(tiny_run.label)
    back = open_label(tmp_path / "back.nii.gz").oriented_as(truth.grid).array
    assert (truth.array == 5).any() and not back[truth.array == 5].any()
    assert np.array_equal(back > 0, (truth.array > 0) & (truth.array != 5))
