"""`medseg measure`: which label belongs to which image, the table, refusals, embeddings."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyRun
from dicom_phantom import CORD, GTV, box_mask, write_rtstruct, write_seg, write_series

from medseg.cli import main
from medseg.formats import write_image, write_label
from medseg.measurement.columns import ABOUT
from medseg.volume import Grid, Volume

AFFINE = np.array([[0.0, -1.5, 0, 10], [1.0, 0, 0, -20], [0, 0, 4.0, 5], [0, 0, 0, 1]])
"""Axes permuted and flipped, voxels of 1 × 1.5 × 4 mm."""
GRID = Grid((12, 10, 8), AFFINE)
FAST = ("--families", "shape,intensity,glcm")


def case(folder: Path, name: str, seed: int = 0, values: tuple[int, ...] = (1,)) -> tuple[Path, Path]:
    """An image of noise in `images`, and a label of one cuboid for each value in `labels`."""
    rng = np.random.default_rng(seed)
    image, label = folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.zeros(GRID.shape, dtype=np.uint8)
    for number, value in enumerate(values):
        drawn[2:7, 2 + 4 * number : 5 + 4 * number, 2:6] = value
    write_image(image, Volume(rng.normal(100, 20, (1, *GRID.shape)).astype(np.float32), GRID))
    write_label(label, Volume(drawn, GRID))
    return image, label


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main(["measure", *map(str, arguments)])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_a_row_for_each_case_and_structure_that_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case(tmp_path, "b", 1, (1, 3))
    case(tmp_path, "a", 2)
    out = tmp_path / "out" / "features.csv"
    main(["measure", str(tmp_path / "images"), str(tmp_path / "labels"), "-o", str(out), *FAST, "--bin-width", "5"])
    rows = rows_of(out)
    assert [(r["case"], r["label"], r["value"]) for r in rows] == [
        ("a", "label_1", "1"), ("b", "label_1", "1"), ("b", "label_3", "3"),
    ]  # fmt: skip
    assert list(rows[0])[: len(ABOUT)] == list(ABOUT)
    first = rows[0]
    assert first["spacing"] == "4 1 1.5"  # to the head, the back, the left: not in the order of the file
    assert (first["unit"], first["bins"], first["texture"]) == ("mm", "width 5 from the minimum", "3d")
    assert float(first["shape_volume_of_voxels"]) == 5 * 3 * 4 * 6
    assert first["voxels"] == "60" and first["missing"] == ""
    assert float(first["intensity_mean"]) == pytest.approx(100, abs=10)
    assert "more than 2 times as long as wide" in capsys.readouterr().out


def test_the_order_of_the_axes_in_the_file_does_not_matter(tmp_path: Path) -> None:
    image, label = case(tmp_path, "a")
    from medseg.formats import open_label, open_volume

    for path, volume in ((image, open_volume(image)), (label, open_label(label))):
        turned = path.with_name("turned.nii.gz")
        (write_image if path is image else write_label)(turned, volume.reoriented("RAS"))
    main(["measure", str(image), str(label), "-o", str(tmp_path / "a.csv")])
    main(["measure", str(image.with_name("turned.nii.gz")), str(label), "-o", str(tmp_path / "b.csv")])  # mixed axes
    before, after = rows_of(tmp_path / "a.csv")[0], rows_of(tmp_path / "b.csv")[0]
    assert {k: v for k, v in before.items() if k != "case"} == {k: v for k, v in after.items() if k != "case"}


def test_names_and_choices_of_structures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label = case(tmp_path, "a", values=(1, 3))
    out = tmp_path / "f.csv"
    table = ("--labels", "{liver: 1, tumour: [2, 3]}")
    main(["measure", str(image), str(label), "-o", str(out), *FAST, *table])
    assert [r["label"] for r in rows_of(out)] == ["liver", "tumour"]
    main(["measure", str(image), str(label), "-o", str(out), *FAST, *table, "--label", "Tumour"])
    assert [(r["label"], r["voxels"]) for r in rows_of(out)] == [("tumour", "60")]
    main(["measure", str(image), str(label), "-o", str(out), *FAST, "--label", "3", "--label", "9"])
    assert [(r["label"], r["voxels"], r["missing"]) for r in rows_of(out)] == [
        ("label_3", "60", ""), ("label_9", "0", "the region is empty"),
    ]  # fmt: skip
    said = refused(image, label, "-o", out, *table, "--label", "tumor", capsys=capsys)
    assert "E_NAME" in said and "tumour" in said
    assert "--labels" in refused(image, label, "-o", out, "--label", "tumour", capsys=capsys)
    (label.parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 3}}))
    main(["measure", str(image), str(label), "-o", str(out), *FAST, "--label", "liver"])
    assert [r["label"] for r in rows_of(out)] == ["liver"]


def test_an_empty_label_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label = case(tmp_path, "a", values=())
    main(["measure", str(image), str(label), "-o", str(tmp_path / "f.csv")])
    (row,) = rows_of(tmp_path / "f.csv")
    assert row["missing"] == "the region is empty"
    assert {row[name] for name in row if name not in ABOUT} == {""}
    assert "the region is empty" in capsys.readouterr().out


def test_a_label_on_another_grid_is_refused_or_becomes_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case(tmp_path, "a")
    image, label = case(tmp_path, "b")
    moved = Grid(GRID.shape, AFFINE + np.array([[0, 0, 0, 3.0], [0] * 4, [0] * 4, [0] * 4]))
    write_label(label, Volume(np.ones(GRID.shape, dtype=np.uint8), moved))
    folders = (image.parent, label.parent, "-o", tmp_path / "f.csv", *FAST)
    said = refused(*folders, capsys=capsys)
    assert "E_GRID" in said and "image and label" in said and "3" in said
    assert not (tmp_path / "f.csv").exists()
    main(["measure", *map(str, folders), "--on-bad-case", "skip"])
    rows = rows_of(tmp_path / "f.csv")
    assert rows[0]["missing"] == ""
    assert rows[1]["case"] == "b" and "E_GRID" in rows[1]["missing"] and rows[1]["shape_volume"] == ""


def test_labels_without_an_image_are_refused_and_images_without_a_label_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, label = case(tmp_path, "a")
    image.with_name("c.nii.gz").write_bytes(image.read_bytes())
    folders = (str(image.parent), str(label.parent), "-o", str(tmp_path / "f.csv"), *FAST)
    main(["measure", *folders])
    assert "1 images have no label and are not measured: c" in capsys.readouterr().out
    label.with_name("d_seg.nii.gz").write_bytes(label.read_bytes())
    said = refused(*folders, capsys=capsys)
    assert "E_MISSING" in said and "d" in said
    said = refused(image.parent, label, "-o", tmp_path / "f.csv", capsys=capsys)
    assert "one label file belongs to one image" in said


def test_channels_must_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label = case(tmp_path, "a")
    rng = np.random.default_rng(0)
    array = np.stack([rng.normal(m, 1, GRID.shape) for m in (10, 50)]).astype(np.float32)
    write_image(image, Volume(array, GRID))
    out = tmp_path / "f.csv"
    said = refused(image, label, "-o", out, *FAST, capsys=capsys)
    assert "E_CHANNELS" in said and "--channel" in said
    main(["measure", str(image), str(label), "-o", str(out), *FAST, "--channel", "1"])
    assert float(rows_of(out)[0]["intensity_mean"]) == pytest.approx(50, abs=1)
    assert "E_CHANNELS" in refused(image, label, "-o", out, *FAST, "--channel", "2", capsys=capsys)


def test_pictures_have_features_of_their_own(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros((40, 50), dtype=np.uint8)
    mask[10:20, 10:30] = 7
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    main(["measure", str(tmp_path / "a.png"), str(tmp_path / "a_mask.png"), "-o", str(tmp_path / "f.csv")])
    (row,) = rows_of(tmp_path / "f.csv")
    assert (row["unit"], row["spacing"], row["value"]) == ("px", "1 1", "7")
    assert float(row["shape_area_of_pixels"]) == 200
    assert float(row["shape_perimeter"]) == pytest.approx(2 * (9 + 19) + 4 * math.sqrt(0.5))
    assert "shape_volume" not in row
    assert float(row["glcm_contrast"]) > 0


@pytest.mark.parametrize("write", [write_rtstruct, write_seg])
def test_structures_of_dicom_annotations(tmp_path: Path, write: object, capsys: pytest.CaptureFixture[str]) -> None:
    structures = {"tumour": GTV, "cord": CORD}
    tree = tmp_path / "tree"
    files = write_series(tree / "ct", 1, [GTV, CORD])
    other = write_series(tree / "other", 2, [GTV])
    annotation = write(tree / "drawn.dcm", files, structures)  # type: ignore[operator]
    out = tmp_path / "f.csv"
    main(["measure", str(tree), str(tree), "-o", str(out), "--families", "shape"])
    rows = rows_of(out)
    assert [r["label"] for r in rows] == ["tumour", "cord"]
    assert [int(r["voxels"]) for r in rows] == [int(box_mask(box).sum()) for box in structures.values()]
    assert rows[0]["patient"].startswith("p_") and rows[0]["modality"] == "CT"
    assert not any("patient 1" in value for row in rows for value in row.values())
    main(["measure", str(tree / "ct"), str(annotation), "-o", str(out), "--families", "shape", "--label", "Cord"])
    assert [r["label"] for r in rows_of(out)] == ["cord"]
    said = refused(tree / "ct", annotation, "-o", out, "--label", "spleen", capsys=capsys)
    assert "E_LABEL" in said and "cord" in said
    said = refused(other[0].parent, annotation, "-o", out, capsys=capsys)
    assert "E_REFERENCE" in said


def test_two_drawings_of_one_structure_are_told_apart(tmp_path: Path) -> None:
    files = write_series(tmp_path / "tree" / "ct", 1, [GTV])
    for name in ("first", "second"):
        write_rtstruct(tmp_path / "tree" / f"{name}.dcm", files, {"tumour": GTV})
    main(["measure", str(tmp_path / "tree"), str(tmp_path / "tree"), "-o", str(tmp_path / "f.csv"), *FAST])
    names = [row["label"] for row in rows_of(tmp_path / "f.csv")]
    assert len(set(names)) == 2 and all(name.startswith("tumour (RTSTRUCT_") for name in names)


def test_embeddings_of_structures_and_of_scans(tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "e.csv"
    images, labels = tiny_run.data / "imagesTr", tiny_run.data / "labelsTr"
    assert images.is_dir()
    run = ("--embeddings", str(tiny_run.run))
    main(["measure", str(images), str(labels), "-o", str(out), *run, "--families", "none", "--threads", "2"])
    rows = rows_of(out)
    vectors = [[float(v) for k, v in row.items() if k.startswith("embedding_") and v] for row in rows]
    numbers = {len(vector) for vector in vectors if vector}
    assert len(numbers) == 1 and numbers.pop() >= 4
    assert len({tuple(v) for v in vectors}) > 1
    main(["measure", str(images), "-o", str(tmp_path / "s.csv"), *run])
    scans = rows_of(tmp_path / "s.csv")
    assert len(scans) == len({row["case"] for row in rows})
    assert all(math.isfinite(float(row["embedding_000"])) for row in scans)
    main(
        [
            "measure",
            str(images),
            str(labels),
            "-o",
            str(tmp_path / "t.csv"),
            *run,
            "--families",
            "none",
            "--threads",
            "1",
        ]
    )
    assert rows_of(tmp_path / "t.csv") == rows  # whichever thread came first


def test_embeddings_of_a_pretraining_are_those_of_its_encoder(tmp_path: Path) -> None:
    import torch
    from test_pretraining import run, write_images

    from medseg.bundle.info import BundleInfo
    from medseg.measurement.embedding import Embedder
    from medseg.models import MODELS
    from medseg.training.initial import load_initial

    data = write_images(tmp_path / "data", num=4, labels=True)
    pretrained = run(data, tmp_path / "run").run
    out, images = tmp_path / "e.csv", data / "images"
    asked = ("--embeddings", str(pretrained), "--families", "none")
    main(["measure", str(images), str(data / "labels"), "-o", str(out), *asked])
    rows = rows_of(out)
    assert len(rows) == 4 and len({row["embedding_000"] for row in rows}) == 4
    # The segmenter that begins with it has the same encoder, and its coarsest maps are the same
    embedder = Embedder(pretrained)
    info = BundleInfo.read(pretrained)
    segmenter = MODELS.build(info.model, in_channels=1, num_classes=info.labels.num_outputs, spatial_dims=3).eval()
    load_initial(segmenter, info, pretrained)
    tile = torch.randn(1, 1, *embedder.size, generator=torch.Generator().manual_seed(0))
    from medseg.explain.maps import map_of

    with torch.no_grad():
        maps = [map_of(model, tile, embedder.layer) for model in (embedder.model, segmenter)]
    assert torch.equal(*maps) and not embedder.model.training


def test_volumes_and_pictures_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medseg.measurement import table

    case(tmp_path, "volume")
    for folder, write in (("images", write_image), ("labels", write_label)):
        array = np.zeros((20, 20), dtype=np.uint8)
        array[5:12, 5:12] = 1
        picture = Volume(array[None].astype(np.float32) if folder == "images" else array, Grid.of_picture((20, 20)))
        write(tmp_path / folder / "picture.png", picture)
    measured: list[object] = []
    monkeypatch.setattr(table, "_rows", lambda case, *_, **__: measured.append(case) or [])
    said = refused(tmp_path / "images", tmp_path / "labels", "-o", tmp_path / "f.csv", *FAST, capsys=capsys)
    assert "E_MIXED" in said and "picture (2D), volume (3D)" in said and not measured


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label = case(tmp_path, "a")
    assert "LABEL is missing" in refused(image, "-o", tmp_path / "f.csv", capsys=capsys)
    assert "nothing to measure" in refused(image, label, "-o", "f.csv", "--families", "none", capsys=capsys)
    said = refused(image, label, "-o", tmp_path / "f.csv", "--families", "shape,glmc", capsys=capsys)
    assert "E_NAME" in said and "glcm" in said
    said = refused(image, label, "-o", tmp_path / "f.csv", "--bins", "8", "--bin-width", "2", capsys=capsys)
    assert "one of the two" in said
    assert "E_MISSING" in refused(image, tmp_path / "no.nii", "-o", tmp_path / "f.csv", capsys=capsys)
