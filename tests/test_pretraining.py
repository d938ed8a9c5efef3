"""Pretraining without labels: what is hidden, what counts, and whole runs that begin segmenters."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_training import weights

from medseg.bundle import BundleInfo, load_bundle
from medseg.config import compose, resumed
from medseg.data.cases import find_cases
from medseg.data.splits import read_split
from medseg.data.survey import survey
from medseg.errors import MedsegError
from medseg.formats import open_volume, write_image, write_label
from medseg.labels import UNLABELLED
from medseg.models import MODELS
from medseg.pretraining.cases import found_images
from medseg.pretraining.loop import Shown, as_score, explained_by
from medseg.pretraining.methods import METHODS
from medseg.pretraining.methods.masked import random_blocks
from medseg.pretraining.pictures import GAP, draw
from medseg.pretraining.reconstruction import Fit, ReconstructionLoss, target_of
from medseg.pretraining.train import PretrainResult
from medseg.pretraining.train import train as pretrain
from medseg.training.initial import REASON, heads_of, load_initial
from medseg.training.train import train
from medseg.volume import Grid, Volume

TINY = (
    "data.plan.base_width=4",
    "data.plan.num_stages=3",
    "data.plan.patch_size=[8,16,16]",
    "data.plan.batch_size=2",
    "data.store=null",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.num_validations=1",
    "trainer.log_steps=1",
)


def write_images(root: Path, num: int = 6, *, labels: bool = False) -> Path:
    """Small volumes of a bright ball in noise; with labels also the balls."""
    for folder in ("images", "labels")[: 2 if labels else 1]:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for n in range(num):
        grid = Grid((12, 20, 20), np.diag([-2.0, -1.0, 1.0, 1.0]))
        places = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"))
        centre = np.array([6, 8 + n / 2, 10]).reshape(3, 1, 1, 1)
        ball = ((places - centre) ** 2).sum(axis=0) < 20
        image = np.random.default_rng(n).normal(scale=0.2, size=(1, *grid.shape)) + 3 * ball
        write_image(root / "images" / f"c{n}.nii.gz", Volume(image.astype(np.float32), grid))
        if labels:
            write_label(root / "labels" / f"c{n}.nii.gz", Volume(ball.astype(np.uint8), grid))
    return root


@dataclass(frozen=True)
class Pretrained:
    run: Path
    data: Path
    result: PretrainResult
    said: str


def run(data: Path, folder: Path, *overrides: str) -> Pretrained:
    experiment = compose("pretraining", [f"data.root='{data}'", *TINY, "trainer.max_steps=3", *overrides])
    log = folder.parent / f"{folder.name}.txt"
    with log.open("w") as file:
        result = pretrain(experiment, folder, Console(file=file, width=500))
    return Pretrained(folder, data, result, log.read_text())


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A masked pretraining on images alone."""
    folder = tmp_path_factory.mktemp("masked")
    return run(write_images(folder / "data"), folder / "run")


# What is hidden


@pytest.mark.parametrize(("size", "block"), [((8, 16, 16), (4, 4, 4)), ((10, 7), (4, 4)), ((1, 16, 16), (1, 8, 8))])
def test_whole_blocks_are_hidden_and_as_many_as_asked(size: tuple[int, ...], block: tuple[int, ...]) -> None:
    mask = random_blocks(size, block, 0.6, np.random.default_rng(0))
    assert mask.shape == size
    corners = mask[tuple(slice(None, None, b) for b in block)]
    assert corners.sum() == round(0.6 * corners.size)
    spread = np.kron(corners, np.ones(block, dtype=bool))[tuple(slice(n) for n in size)]
    assert np.array_equal(spread, mask)


@pytest.mark.parametrize("ratio", [0.01, 0.99])
def test_something_is_hidden_and_something_left(ratio: float) -> None:
    mask = random_blocks((4, 4), (2, 2), ratio, np.random.default_rng(1))
    assert 0 < mask.sum() < mask.size


def test_what_is_hidden_follows_from_seed_and_step() -> None:
    method = METHODS.build({"name": "masked", "fill": "noise"}, coarsest=(4, 4, 4))
    image = torch.randn(4, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    whole = method.hide(image, (0, 7), range(4))
    again, later, other = (method.hide(image, key, range(4)) for key in ((0, 7), (0, 8), (1, 7)))
    assert torch.equal(image, before)
    assert torch.equal(whole.image, again.image) and torch.equal(whole.asked, again.asked)
    assert not torch.equal(whole.asked, later.asked) and not torch.equal(whole.asked, other.asked)
    assert not torch.equal(whole.asked[0], whole.asked[1])
    part = method.hide(image[1::2], (0, 7), range(1, 4, 2))  # one of two processes
    assert torch.equal(part.image, whole.image[1::2]) and torch.equal(part.asked, whole.asked[1::2])
    seen = whole.asked.expand_as(image) == 0
    assert torch.equal(whole.image[seen], image[seen])


def test_hidden_voxels_are_zero_or_noise_like_the_patch() -> None:
    image = 5 + 2 * torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    for fill, mean, deviation in (("zero", 0.0, 0.0), ("noise", 5.0, 2.0)):
        method = METHODS.build({"name": "masked", "fill": fill}, coarsest=(8, 8, 8))
        hidden = method.hide(image, (0, 0), [0])
        filling = hidden.image[hidden.asked > 0]
        assert float(filling.mean()) == pytest.approx(mean, abs=0.1)
        assert float(filling.std()) == pytest.approx(deviation, abs=0.1)


def test_blocks_are_those_of_the_coarsest_maps_and_enough_of_them() -> None:
    method = METHODS.build({"name": "masked"}, coarsest=(4, 16, 16))
    assert method.block_size((32, 64, 64)) == (4, 16, 16)
    assert method.block_size((8, 16, 16)) == (2, 8, 8)  # two blocks would be too few
    assert method.block_size((1, 64, 64)) == (1, 16, 16)
    given = METHODS.build({"name": "masked", "block_size": (2, 3, 4)}, coarsest=(4, 16, 16))
    assert given.block_size((8, 16, 16)) == (2, 3, 4)


@pytest.mark.parametrize(
    "settings", [{"ratio": 1.0}, {"ratio": 0.0}, {"block_size": (0, 2, 2)}, {"block_size": (2, 2)}, {"fill": "ones"}]
)
def test_what_cannot_be_hidden_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(MedsegError, match=r"E_CONFIG.*|method\."):
        METHODS.build({"name": "masked", **settings}, coarsest=(4, 4, 4))


def test_an_autoencoder_sees_everything_but_across_its_bottleneck() -> None:
    method = METHODS.build({"name": "autoencoder"}, coarsest=(4, 4))
    image = torch.randn(2, 1, 16, 16)
    hidden = method.hide(image, (0, 0), range(2))
    assert torch.equal(hidden.image, image) and bool((hidden.asked == 1).all())
    model = {"name": "unet", "widths": (4, 8, 16)}
    network = method.network(model)
    assert network == {**model, "skip": "none", "deep_supervision": False}
    autoencoder = MODELS.build(network, in_channels=1, num_classes=1, spatial_dims=2)
    bottleneck = torch.zeros(2, 16, 4, 4)
    autoencoder.encoder[-1].register_forward_hook(lambda *_: bottleneck)
    a, b = autoencoder(image)
    assert torch.equal(a, b)  # of different images: nothing but the bottleneck tells them apart
    segmenter = MODELS.build(model, in_channels=1, num_classes=3, spatial_dims=2).state_dict()
    shapes = {name: tensor.shape for name, tensor in autoencoder.state_dict().items()}
    assert all(shapes[name] == segmenter[name].shape for name in segmenter if name.startswith("encoder."))
    assert all(shapes[name] == segmenter[name].shape for name in segmenter if ".up." in name)


def test_an_autoencoder_needs_skips_that_can_be_left_out() -> None:
    method = METHODS.build({"name": "autoencoder"}, coarsest=(4, 4))
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*skips.*method=masked"):
        method.network({"name": "monai"})


# What counts


@pytest.mark.parametrize(("error", "expected"), [("l1", 2.0), ("l2", 4.0)])
def test_the_error_of_what_was_asked_counts_and_nothing_else(error: str, expected: float) -> None:
    image, asked = torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    asked[..., :2] = 1
    output = torch.full((1, 2, 4, 4), 100.0)
    output[..., :2] = -2
    output.requires_grad_()
    loss = ReconstructionLoss(error)(output, target_of(image, asked))  # type: ignore[arg-type]
    assert loss.item() == expected
    loss.backward()
    assert output.grad is not None and bool((output.grad[..., 2:] == 0).all())
    assert bool((output.grad[..., :2] < 0).all())


def test_of_a_smaller_output_the_middle_is_compared() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6)
    middle = image[..., 1:5, 1:5]
    target = target_of(image, torch.ones(1, 1, 6, 6))
    assert float(ReconstructionLoss("l1")(middle, target)) == 0
    assert Fit.of(middle, target).explained == pytest.approx(1)
    assert float(ReconstructionLoss("l1")(middle, target_of(image, torch.zeros(1, 1, 6, 6)))) == 0


def test_the_explained_variance_adds_up_over_parts() -> None:
    rng = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 4, 1, 8, 8, generator=rng)
    asked = (torch.rand(4, 1, 8, 8, generator=rng) < 0.5).float()
    output, target = image + 0.5 * noise, target_of(image, asked)
    whole = Fit.of(output, target)
    parts = Fit.of(output[:1], target[:1]) + Fit.of(output[1:], target[1:])
    chosen = asked > 0
    expected = 1 - float((0.5 * noise)[chosen].square().sum() / (image[chosen] - image[chosen].mean()).square().sum())
    assert whole.explained == pytest.approx(expected, rel=1e-5) == pytest.approx(parts.explained, rel=1e-5)
    mean = torch.full_like(image, float(image[chosen].mean()))
    assert Fit.of(mean, target).explained == pytest.approx(0, abs=1e-5)
    constant = Fit.of(output, target_of(torch.ones_like(image), asked))
    assert constant.explained == 0 and Fit().explained == 0 and math.isnan(Fit().mean("l1"))


# Whole runs


def test_a_run_tells_what_it_is(masked: Pretrained) -> None:
    info = BundleInfo.read(masked.run)
    assert info.method is not None and info.method["name"] == "masked" and info.labels == UNLABELLED
    assert info.model["name"] == "unet" and info.model["skip"] == "concat"  # of the segmenter to come
    assert json.loads((masked.run / "manifest.json").read_text())["kind"] == "run"
    assert json.loads((masked.run / "bundle.json").read_text())["task"] == "pretraining"
    assert "labels     none" in masked.said and "unusual" not in masked.said
    split = read_split(masked.run / "split.json")
    assert len(split.train) + len(split.val) == 6 and not set(split.train) & set(split.val)
    pictures = {path.stem for path in (masked.run / "pictures").glob("*.png")}
    assert pictures == set(split.val[:3])
    with (masked.run / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train_loss"]] == ["1", "2", "3"]
    (validated,) = [row for row in rows if row["val_loss"]]
    explained = float(validated["val_explained"])
    assert masked.result.best_score == pytest.approx(explained, rel=1e-4)
    assert -1 < as_score(explained) < 1 and explained_by(as_score(explained)) == pytest.approx(explained)
    assert (masked.run / "curves.png").is_file() and list((masked.run / "tensorboard").iterdir())


def test_a_picture_shows_what_was_seen_and_puts_the_reconstruction_in_its_place() -> None:
    image = torch.linspace(0, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    asked = torch.zeros(1, 4, 8, 8)
    asked[..., :4] = 1
    shown = Shown("a", image, image * (1 - asked), torch.ones_like(image), asked, (4.0, 1.0, 1.0), "SPL")
    picture = draw(shown)
    rows, pixels = picture.shape[0] - 2 * GAP, 8 * 24  # the top row: 8 × 8 voxels of 1 mm, 24 pixels each
    assert picture.shape[1:] == (4 * pixels + 3 * GAP, 3) and rows > pixels
    first = [picture[:pixels, i * (pixels + GAP) :][:, :pixels, 0].astype(int) for i in range(4)]
    half = pixels // 2
    assert (first[1][:, :half] == 0).all() and np.array_equal(first[1][:, half:], first[0][:, half:])
    assert (first[2] == 255).all()
    assert (first[3][:, :half] == 255).all() and np.array_equal(first[3][:, half:], first[0][:, half:])
    coronal = picture[pixels + GAP :][: pixels // 2, :pixels, 0].astype(int)  # brighter towards the head
    assert coronal[0].mean() > coronal[-1].mean()


def test_it_segments_nothing_and_says_what_it_is_for(masked: Pretrained) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_MODEL.*pretraining.*trainer\.initial="):
        load_bundle(masked.run)


def test_the_same_seed_gives_the_same_weights_also_over_an_interruption(masked: Pretrained, tmp_path: Path) -> None:
    again = run(masked.data, tmp_path / "again")
    first, second = weights(masked.run), weights(again.run)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    longer = resumed(again.run, ["trainer.max_steps=5"])
    with (tmp_path / "more.txt").open("w") as file:
        result = pretrain(longer, again.run, Console(file=file))
    assert result.steps == 5 and any(not torch.equal(first[k], v) for k, v in weights(again.run).items())
    write_images(masked.data.parent / "changed")
    (masked.data.parent / "changed" / "images" / "c0.nii.gz").unlink()
    (tmp_path / "again" / "places.yaml").write_text(f"data.root: '{masked.data.parent / 'changed'}'\n")
    with pytest.raises(MedsegError, match=r"(?s)E_MISSING.*c0"):
        pretrain(resumed(again.run, ["trainer.max_steps=6"]), again.run, Console(quiet=True))


def fine_tune(pretrained: Path, folder: Path, *overrides: str) -> str:
    """A segmenter that begins with a pretraining and learns next to nothing; what was said."""
    data = write_images(folder.parent / "labelled", labels=True)
    quick = ("trainer.final_predictions=false", "trainer.report=false", "trainer.map_cases=0", "trainer.max_steps=1")
    still = ("optimizer.lr=1e-12", "optimizer.weight_decay=0", "trainer.device=cpu", "trainer.num_validations=1")
    stated = [f"data.root='{data}'", "data.store=null", f"trainer.initial='{pretrained}'", *quick, *still, *overrides]
    log = folder.parent / "segmenter.txt"
    with log.open("w") as file:
        train(compose("train", stated), folder, Console(file=file, width=500))
    return log.read_text()


def test_a_segmenter_begins_with_encoder_and_decoder_of_masked_images(masked: Pretrained, tmp_path: Path) -> None:
    said = fine_tune(masked.run, tmp_path / "run", "fold=1")
    before, after = weights(masked.run, "best"), weights(tmp_path / "run", "best")
    taken = [name for name in after if "heads" not in name]
    assert len(taken) > 20 and all(torch.allclose(before[name], after[name], atol=1e-6) for name in taken)
    assert f"{len(taken)} of {len(after)} tensors taken from" in said and "a pretraining (masked)" in said
    assert "fresh, for they are the heads: heads.0" in said
    assert "validate or test were among the images of the pretraining, without their labels: c" in said
    old, new = BundleInfo.read(masked.run), BundleInfo.read(tmp_path / "run")
    assert new.model == old.model and new.method is None
    assert new.plan.patch_size == old.plan.patch_size and new.plan.reasons["patch_size"] == REASON


def test_of_an_autoencoder_in_2d_all_is_taken_that_fits_and_the_rest_said(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(4):
        image = np.random.default_rng(n).integers(0, 255, (1, 24, 24)).astype(np.float32)
        write_image(pictures / f"p{n}.png", Volume(image, Grid.of_picture((24, 24))))
    flat = ("data.plan.patch_size=[16,16]", "method=autoencoder", "data.split.num_folds=2")
    done = run(pictures, tmp_path / "run", *flat)
    assert "autoencoder: all of a patch" in done.said
    info = BundleInfo.read(done.run)
    segmenter = MODELS.build(info.model, in_channels=1, num_classes=2, spatial_dims=2)
    fresh = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    lines = load_initial(segmenter, info, done.run)
    before = weights(done.run, "best")
    for name, tensor in segmenter.state_dict().items():
        fits = "heads" not in name and before["model." + name].shape == tensor.shape
        assert torch.equal(tensor, before["model." + name] if fits else fresh[name]), name
        assert fits or "heads" in name or ("decoder" in name and any(name in line for line in lines)), name
    assert any("the pretraining had none of that shape: decoder.0.block" in line for line in lines)


def test_another_network_than_the_pretrained_one_is_refused(masked: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*that of the run that training starts from"):
        fine_tune(masked.run, tmp_path / "run", "model=fusionnet")


def test_heads_are_what_follows_from_the_number_of_classes(masked: Pretrained) -> None:
    info = BundleInfo.read(masked.run)
    names = set(info.build_model().state_dict())
    assert heads_of(info) == {name for name in names if name.startswith("heads.")}


# What is read


def test_labels_beside_the_images_are_not_looked_at(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", labels=True)
    (data / "labels" / "c0.nii.gz").write_bytes(b"no label at all")
    (data / "labels" / "c1.nii.gz").unlink()
    experiment = compose("pretraining", [f"data.root='{data}'"])
    folder = found_images(experiment.data)
    assert [case.case_id for case in folder.cases] == [f"c{n}" for n in range(6)]
    assert all(case.label is None for case in folder.cases) and folder.labels is None
    assert run(data, tmp_path / "run", "trainer.max_steps=1").result.steps == 1


def test_keys_about_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*looks at no labels.*data\.labels"):
        compose("pretraining", [f"data.root='{tmp_path}'", "data.labels={organ: 1}"])
    with pytest.raises(MedsegError, match=r"(?s)E_CONFIG.*one process"):
        compose("pretraining", [f"data.root='{tmp_path}'", "trainer.devices=2"])
    with pytest.raises(MedsegError, match="E_CONFIG.*no images were named"):
        found_images(compose("pretraining", []).data)


def test_dicom_series_without_annotations_are_images_too(tiny_run) -> None:  # type: ignore[no-untyped-def]
    experiment = compose("pretraining", [f"data.root='{tiny_run.dicom.parent}'"])
    assert len(found_images(experiment.data).cases) == 1


def test_without_labels_intensities_are_those_of_whole_images(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", labels=True)
    folder = found_images(compose("pretraining", [f"data.root='{data}'"]).data)
    found = survey(folder, UNLABELLED.to_json(), num_threads=1)
    images = np.concatenate([open_volume(case.images[0]).array.ravel() for case in folder.cases])  # type: ignore[arg-type]
    (stats,) = found.intensity
    assert stats.num_foreground == 0 and not found.anomalies
    assert stats.mean == pytest.approx(float(images.mean()), abs=0.05)
    assert (stats.minimum, stats.maximum) == pytest.approx((float(images.min()), float(images.max())))
    with_labels = survey(find_cases(data), num_threads=1).intensity[0]
    assert with_labels.mean > 2.5 > 0.5 > stats.mean  # of the balls alone


def test_a_plan_of_labelled_data_is_kept(masked: Pretrained, tmp_path: Path) -> None:
    plan = (masked.run / "plan.yaml").read_text().replace("batch_size: 2", "batch_size: 3")
    (tmp_path / "plan.yaml").write_text(plan)
    quick = ("trainer.max_steps=1", "data.store=null", "trainer.device=cpu", "trainer.num_validations=1")
    experiment = compose("pretraining", [f"data.root='{masked.data}'", f"plan='{tmp_path}'", *quick])
    (tmp_path / "run").mkdir()
    pretrain(experiment, tmp_path / "run", Console(quiet=True))
    stated, kept = BundleInfo.read(masked.run).plan, BundleInfo.read(tmp_path / "run").plan
    assert kept.batch_size == 3 and kept.patch_size == stated.patch_size and kept.widths == stated.widths
