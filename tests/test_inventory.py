"""`medseg inspect`: the table, the JSON and the pictures say what is there, and nothing about the patient."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from rich.console import Console
from test_catalog import SHAPE, change, oblique, uid_of, write_rtstruct, write_seg, write_tree

from medseg.errors import MedsegError
from medseg.formats import STRICT, Reading, write_image
from medseg.reports.inventory import counts, draw_pictures, inspect_path, take_inventory, told
from medseg.reports.overlay import figure_to_array, scan_figure
from medseg.reports.planes import views_of
from medseg.reports.series_picture import _drawn
from medseg.volume import Grid, Volume

CANARY = "Zzyzx"


def inspected(path: Path, width: int = 160, **options: object) -> str:
    out = io.StringIO()
    how = {key: options.pop(key) for key in ("series", "resample_irregular", "without_preamble") if key in options}
    inspect_path(path, Console(file=out, width=width), reading=Reading(**how), **options)  # type: ignore[arg-type]
    return out.getvalue()


def as_json(path: Path, **options: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(inspected(path, as_json=True, **options))
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients with two series each, one broken; structures on two; whatever names a patient holds the canary.
    Tests read it; none writes into it."""
    root = tmp_path_factory.mktemp("data") / f"{CANARY}^root"
    series = write_tree(root)
    for files in series.values():
        change(
            files,
            PatientName=f"{CANARY}^Jane",
            PatientBirthDate="19010203",
            InstitutionName=CANARY,
            SeriesDescription=CANARY,
            StudyDescription=CANARY,
            AccessionNumber=CANARY,
        )
    change(series["a_ct"] + series["a_mr"], PatientID=f"{CANARY}-1")
    change(series["b_ct"] + series["b_mr"], PatientID=f"{CANARY}-2")
    write_rtstruct(root / f"{CANARY}_rt.dcm", series["a_ct"], names=("GTV [a]", "cord $x_"))
    write_seg(root / f"{CANARY}_seg.dcm", series["b_ct"])
    write_rtstruct(root / f"{CANARY}_lost.dcm", series["b_ct"], names=("lost",), frame="1.2.3")
    (root / f"{CANARY}_damaged.dcm").write_bytes(bytes(128) + b"DICM" + bytes(40))
    double = root / "B" / f"{CANARY}_double.dcm"  # at the place of another slice: the refusal tells both files' names
    double.write_bytes(series["b_mr"][0].read_bytes())
    change([double], SOPInstanceUID="1.2.3", PixelData=bytes(2 * SHAPE[0] * SHAPE[1]))
    return root


def test_the_table_says_what_is_there(tree: Path) -> None:
    text = inspected(tree)
    assert "4 series of 2 patients" in text
    assert "1 with problems" in text
    assert "E_DUPLICATE" in text
    assert "RTSTRUCT GTV [a], cord $x_" in text
    assert "SEG liver, kidney" in text
    assert "another frame of reference" in text
    assert "damaged files" in text
    assert "14×11×6" in text
    assert "0.9×1.1×2.5" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_names_stay_whole_at_any_width(tree: Path, width: int) -> None:
    text = inspected(tree, width)
    for scan in as_json(tree)["series"]:  # type: ignore[attr-defined]
        assert scan["case_id"] in text
        assert scan["patient"] in text


def test_a_pipe_gets_one_line_for_each_thing_to_say(tree: Path) -> None:
    assert inspected(tree, 60) == inspected(tree, 200)


def test_nothing_names_the_patient(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    told = [
        inspected(tree),
        inspected(tree, as_json=True),
        inspected(tree, pictures=pictures),
        *capfd.readouterr(),
    ]
    assert [CANARY in text for text in told] == [False] * len(told)
    assert [name for name in ("1901", "^") if any(name in text for text in told)] == []
    drawn = sorted(pictures.iterdir())
    assert len(drawn) == 3
    for path in drawn:
        assert CANARY.encode() not in path.read_bytes()
        with Image.open(path) as picture:
            assert set(picture.info) <= {"Software", "dpi"}
    assert CANARY in inspected(tree, paths=True)  # only where it was asked for
    assert CANARY in inspected(tree, paths=True, as_json=True)


def test_json_has_numbers_and_stable_keys(tree: Path) -> None:
    found = as_json(tree)
    assert list(found) == ["schema", "summary", "series", "images", "orphans", "others", "damaged"]
    assert found["summary"] == {
        "series": 4, "patients": 2, "images": 0, "with_problems": 1, "with_warnings": 0, "annotations": 3,
        "orphans": 1, "annotations_with_problems": 0, "others": 0, "damaged": 1,
    }  # fmt: skip
    (ct,) = [s for s in found["series"] if s["annotations"] and s["annotations"][0]["kind"] == "RTSTRUCT"]  # type: ignore[attr-defined]
    assert ct["shape"] == list(SHAPE)
    assert ct["spacing_mm"] == pytest.approx([0.9, 1.1, 2.5])
    assert ct["orientation"] == "LPS"
    assert np.array(ct["affine"]) == pytest.approx(oblique().grid.affine, abs=1e-4)
    assert [s["name"] for s in ct["annotations"][0]["structures"]] == ["GTV [a]", "cord $x_"]
    assert (ct["problem"], ct["picture"], "path" in ct) == (None, None, False)
    (broken,) = [s for s in found["series"] if s["problem"]]  # type: ignore[attr-defined]
    assert broken["problem"]["code"] == "E_DUPLICATE"
    assert broken["shape"] is None
    (placed,) = [s for s in as_json(tree, paths=True)["series"] if s["case_id"] == ct["case_id"]]  # type: ignore[attr-defined]
    assert (placed["path"], placed["paths"]) == ("A/1", ["A/1"])


def test_one_series_by_uid_or_case_id(tree: Path) -> None:
    wanted = uid_of(sorted((tree / "A" / "1").iterdir()))
    (by_uid,) = as_json(tree, series=wanted)["series"]  # type: ignore[misc]
    assert by_uid["series_uid"] == wanted
    assert as_json(tree, series=by_uid["case_id"])["series"] == [by_uid]
    with pytest.raises(MedsegError, match="E_MISSING"):
        inspected(tree, series="1.2.3")


def test_pictures_show_planes_and_structures(tree: Path, tmp_path: Path) -> None:
    found = as_json(tree, pictures=tmp_path / "pictures")
    assert [s["picture"] is None for s in found["series"]] == [s["problem"] is not None for s in found["series"]]  # type: ignore[attr-defined]
    for series in found["series"]:  # type: ignore[attr-defined]
        if series["picture"]:
            with Image.open(tmp_path / "pictures" / series["picture"]) as picture:
                colours = np.asarray(picture.convert("RGB")).astype(int)
            has_colour = bool((np.ptp(colours, axis=-1) > 100).any())
            assert has_colour == bool(series["annotations"])
            assert min(colours.shape[:2]) > 300


def test_a_structure_is_drawn_where_it_lies(tree: Path) -> None:
    catalog = take_inventory(tree, STRICT).catalog
    (series,) = [s for s in catalog.series if any(a.kind == "SEG" for a in s.annotations)]
    assert series.grid is not None
    names, drawn, remarks, problems = _drawn(series.annotations, series.grid)
    expected = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), np.uint8)
    expected[1:4, 2:4, 3:9], expected[1:4, 4:6, 3:9] = 1, 2
    assert (names, remarks, problems) == (["liver", "kidney"], [], {})
    np.testing.assert_array_equal(drawn.transpose(2, 1, 0), expected)


def test_the_smaller_structure_is_on_top(tree: Path) -> None:
    (series,) = [s for s in take_inventory(tree, STRICT).catalog.series if "RTSTRUCT" in kinds(s)]
    assert series.grid is not None
    _, drawn, *_ = _drawn(series.annotations, series.grid)  # the second square holds the first one
    assert np.count_nonzero(drawn == 1) > 0
    assert np.count_nonzero(drawn == 2) > 0


def test_voxels_that_cannot_be_read_are_in_the_report(tree: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(tree, tmp_path / tree.name)
    change([sorted((cut / "A" / "1").iterdir())[2]], PixelData=b"\0\0")
    found = as_json(cut, pictures=tmp_path / "pictures")
    assert {s["problem"]["code"] for s in found["series"] if s["problem"]} >= {"E_TRUNCATED"}  # type: ignore[attr-defined]
    assert CANARY not in json.dumps(found)


def test_folders_of_other_images(tmp_path: Path) -> None:
    image = oblique()
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    write_image(folder / "scan.nii.gz", image)
    write_image(folder / "more" / "scan.nii.gz", image)
    write_image(folder / "photo.png", Volume(np.full((1, 20, 30), 7.0, np.float32), Grid.of_picture((20, 30))))
    (folder / "cut.nii.gz").write_bytes((folder / "scan.nii.gz").read_bytes()[:40])
    found = as_json(folder, pictures=tmp_path / "pictures")
    assert found["summary"]["images"] == 4  # type: ignore[index]
    assert "3 pictures in" in inspected(folder, pictures=tmp_path / "again")
    images = {(i["case_id"], i["kind"]): i for i in found["images"]}  # type: ignore[attr-defined]
    assert images["scan", "NIfTI"]["shape"] == list(SHAPE)
    assert images["scan", "NIfTI"]["spacing_mm"] == pytest.approx([0.9, 1.1, 2.5], abs=1e-5)
    assert images["photo", "picture"]["shape"] == [20, 30]
    (cut,) = [i for i in found["images"] if i["problem"]]  # type: ignore[attr-defined]
    assert (cut["case_id"], cut["problem"]["code"]) == ("cut", "E_TRUNCATED")
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["photo.png", "scan (2).png", "scan.png"]
    assert {i["picture"] for i in found["images"]} == {None, "photo.png", "scan (2).png", "scan.png"}  # type: ignore[attr-defined]
    assert "4 image files" in inspected(folder)
    rows = inspected(folder, paths=True).splitlines()
    (first, second) = (n for n, row in enumerate(rows) if row.startswith("scan"))
    assert [rows[n].partition("  ")[0] for n in (first, second)] == ["scan", "scan (2)"]
    assert [rows[n + 1].strip() for n in (first, second)] == ["scan.nii.gz", "more/scan.nii.gz"]
    assert inspected(folder / "scan.nii.gz").count("scan") == 1


def test_each_remedy_is_said_once(tmp_path: Path) -> None:
    series = write_tree(tmp_path)  # one of its series lacks a slice
    series["a_mr"][2].unlink()
    double = series["a_ct"][0].with_name("double.dcm")
    double.write_bytes(series["a_ct"][0].read_bytes())
    change([double], SOPInstanceUID="1.2.3", PixelData=bytes(2 * SHAPE[0] * SHAPE[1]))
    text = inspected(tmp_path)
    _, _, below = text.partition("what to do\n")
    problems = {s["case_id"]: s["problem"] for s in as_json(tmp_path)["series"] if s["problem"]}  # type: ignore[attr-defined]
    expected = {f"{problem['code']} {problem['remedy']}" for problem in problems.values()}
    assert (len(problems), len(expected)) == (3, 2)
    assert [sum(line.strip() == remedy for line in below.splitlines()) for remedy in expected] == [1] * len(expected)
    assert "what to do" not in inspected(
        tmp_path, series=next(s["case_id"] for s in as_json(tmp_path)["series"] if not s["problem"])
    )  # type: ignore[attr-defined]


def test_files_without_preamble_are_found_when_asked_for(tmp_path: Path) -> None:
    files = write_tree(tmp_path / "tree")["a_ct"]
    (tmp_path / "old").mkdir()
    for number, file in enumerate(files):
        (tmp_path / "old" / f"{number}").write_bytes(file.read_bytes()[132:])
    with pytest.raises(MedsegError, match="E_NO_CASES"):
        inspected(tmp_path / "old")
    found = as_json(tmp_path / "old", without_preamble=True, pictures=tmp_path / "pictures")
    assert [(s["problem"], s["shape"], s["picture"] is None) for s in found["series"]] == [(None, list(SHAPE), False)]  # type: ignore[attr-defined]


def test_every_folder_of_a_series_is_shown(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for number, file in enumerate(write_tree(tmp_path / "tree")["a_ct"]):
        folder = tmp_path / "one" / f"f{number}"
        folder.mkdir()
        shutil.copy(file, folder)
    (found,) = as_json(tmp_path / "one", paths=True)["series"]  # type: ignore[misc]
    assert found["paths"] == [f"f{number}" for number in range(SHAPE[2])]
    lines = [line.strip() for line in inspected(tmp_path / "one", paths=True).splitlines()]
    assert [f"f{number}" in lines for number in range(SHAPE[2])] == [True] * 5 + [False] * (SHAPE[2] - 5)
    assert f"and {SHAPE[2] - 5} more" in lines


def test_the_place_of_an_orphan_stands_apart_from_the_reason(tree: Path) -> None:
    text = inspected(tree, paths=True)
    assert f"{CANARY}_lost.dcm: RTSTRUCT lost: E_REFERENCE: it was drawn in another frame" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xd8\xff\xe0" + bytes(300), "a JPEG picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(300), "a PNG picture"),
        (b"PK\x03\x04" + bytes(300), "a zip"),
        ((348).to_bytes(4, "little") + bytes(344), "a NIfTI file"),
        (b"%PDF-1.7" + bytes(300), "a PDF"),
        (b"hello, doctor", "text"),
        (b"", "empty"),
    ],
)
def test_what_a_file_is_instead_of_dicom(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.dcm").write_bytes(content)
    (damaged,) = as_json(tmp_path)["damaged"]  # type: ignore[misc]
    assert damaged["reason"] == f"E_NOT_DICOM: the file is not DICOM; its content is {words}"
    assert "preamble" not in damaged["remedy"]
    assert f"1 × {damaged['reason']}" in inspected(tmp_path)


def test_a_file_that_may_be_old_dicom_is_left_to_the_option(tmp_path: Path) -> None:
    (tmp_path / "x.dcm").write_bytes(bytes(300))
    assert "E_NOT_DICOM old files without a preamble are read with --without-preamble" in inspected(tmp_path)


def test_annotations_that_cannot_be_drawn_are_problems(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    series = write_tree(root)
    write_seg(root / "seg.dcm", series["a_ct"])
    dataset = pydicom.dcmread(root / "seg.dcm")
    dataset.PixelData = dataset.PixelData[:2]
    dataset.save_as(root / "seg.dcm")
    assert as_json(root)["summary"]["annotations_with_problems"] == 0  # type: ignore[index]
    found = as_json(root, pictures=tmp_path / "pictures")
    assert found["summary"]["annotations_with_problems"] == 1  # type: ignore[index]
    (drawn,) = [a for s in found["series"] for a in s["annotations"]]  # type: ignore[attr-defined]
    assert drawn["problem"]["code"] in ("E_TRUNCATED", "E_MALFORMED")
    text = inspected(root, pictures=tmp_path / "pictures")
    assert f"SEG: {drawn['problem']['code']} {drawn['problem']['message']}" in text
    assert "1 annotation, 1 of them cannot be drawn" in text


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="E_MISSING"):
        inspected(tmp_path / "none")
    with pytest.raises(MedsegError, match="E_NO_CASES"):
        inspected(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MedsegError, match="E_OUTPUT"):
        write_image(tmp_path / "scan.nii.gz", oblique())
        inspected(tmp_path, pictures=tmp_path / "file")


@pytest.mark.parametrize("name", ["$x^2", "_hidden", "a$b_{c", "ÄÖ", "", "x" * 300])
def test_any_name_of_a_structure_can_stand_in_the_legend(name: str) -> None:
    image = oblique()
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[3:9, 3:7, 2:4] = 1
    figure = scan_figure(image, names=[name], drawn=drawn, title="$CT")
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [name]
    assert figure_to_array(figure).ndim == 3


def kinds(series: object) -> list[str]:
    return [a.kind for a in series.annotations]  # type: ignore[attr-defined]


def test_messages_keep_their_numbers_and_lose_the_names_of_files(tree: Path) -> None:
    (scan,) = [s for s in take_inventory(tree, STRICT).scans if s.problem]
    name = next(f.name for f in scan.files if CANARY in f.name)
    short = replace(scan, files=(Path("3"), *scan.files))
    assert told(short, f"({name}) and x{name}, {name} at 3 mm") == f"({told(short, name)}) and x{name}, file 2 at 3 mm"
    assert told(scan, None) is None


def test_irregular_series_are_resampled_only_when_asked_for(tmp_path: Path) -> None:
    write_tree(tmp_path)  # one of its series lacks a slice
    assert [s["problem"]["code"] for s in as_json(tmp_path)["series"] if s["problem"]] == ["E_GAP"]  # type: ignore[attr-defined]
    found = as_json(tmp_path, resample_irregular=True, pictures=tmp_path / "pictures")
    assert found["summary"]["with_problems"] == 0  # type: ignore[index]
    (mended,) = [s for s in found["series"] if s["num_files"] == 5]  # type: ignore[attr-defined]
    assert mended["shape"] == list(SHAPE)
    assert "E_GAP" in " ".join(mended["warnings"])
    assert (tmp_path / "pictures" / mended["picture"]).is_file()


def test_real_structure_sets(real_data: Path, tmp_path: Path) -> None:
    """Cropped series: the structure sets refer to the images before cropping."""
    inventory = take_inventory(real_data / "dicom" / "rtstruct" / "sts" / "dicom", STRICT)
    summary = counts(inventory)
    assert {key: summary[key] for key in ("series", "patients", "with_problems", "annotations", "orphans")} == {
        "series": 6, "patients": 2, "with_problems": 0, "annotations": 6, "orphans": 0,
    }  # fmt: skip
    for scan in inventory.scans:
        (annotation,) = scan.annotations
        assert annotation.path.parent.parent == scan.files[0].parent.parent  # CT/image/*.dcm, CT/mask/RS.dcm
    one = replace(inventory, scans=inventory.scans[:1])
    (drawn,) = draw_pictures(one, tmp_path, STRICT).scans
    assert drawn.problem is None
    assert drawn.picture == f"{drawn.name}.png"
    assert not any("not in the picture" in warning for warning in drawn.warnings)


def test_real_tree_of_everything(real_data: Path) -> None:
    inventory = take_inventory(real_data / "dicom", STRICT)
    found = counts(inventory)
    assert (found["series"], found["patients"]) == (37, 14)
    codes = {s.problem.code for s in inventory.scans if s.problem and "failing" in s.files[0].as_posix()}
    assert {"E_TILT", "E_GAP", "E_MIXED", "E_DUPLICATE"} <= codes
    orphans = {a.path.name: reason for a, reason in inventory.catalog.orphans}
    assert "another frame of reference" in orphans["rt.dcm"]  # rtutils' mock


@pytest.mark.parametrize(("shape", "planes"), [((60, 50, 3), ["axial"]), ((60, 4, 50), ["coronal"]), ((9, 9, 9), None)])
def test_strips_are_not_drawn(shape: tuple[int, int, int], planes: list[str] | None) -> None:
    image = Volume(np.zeros((1, *shape), np.float32), Grid(shape, np.diag([1.0, 1, 2, 1])))
    drawn = [view.caption.split()[0] for view in views_of(image, None, None, None)]
    assert drawn == (planes or ["axial", "coronal", "sagittal"])


def test_x_rays_are_drawn_to_scale() -> None:
    (view,) = views_of(Volume(np.zeros((1, 20, 30), np.float32), Grid.of_picture((20, 30), (2.0, 1.0))), *[None] * 3)
    assert (view.aspect, view.ruler) == (30 / 40, (5 / 30, "5 mm"))
    (photo,) = views_of(Volume(np.zeros((1, 20, 30), np.float32), Grid.of_picture((20, 30))), *[None] * 3)
    assert (photo.aspect, photo.ruler) == (1.5, None)
