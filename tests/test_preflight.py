"""The preflight of a training: `medseg inspect DATA` makes every kind of bad case known at once, and so does `train`.

One folder holds a case for each row of the list of bad inputs that concerns a case of NIfTI files, good ones among
them. The ids of the cases are the rows'.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.cli import main
from medseg.cli.inspect import EXIT_BAD_CASES
from medseg.data.cases import find_cases, find_inputs, is_labelled
from medseg.errors import Code, MedsegError

SHAPE = (12, 10, 8)
AFFINE = np.array([[-1.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 2, 10], [0, 0, 0, 1]])
LABELS = "{a: 1, b: 2}"


def image(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(-900, 900, shape).astype(np.int16)


def label(dtype: str = "uint8") -> np.ndarray:
    array = np.zeros(SHAPE, dtype)
    array[3:8, 3:7, 2:6], array[4, 4, 3] = 1, 2
    return array


class Maker:
    """Writes the two files of a case and changes what it is told of them."""

    def __init__(self, root: Path, case: str) -> None:
        self.image, self.label = root / "images" / f"{case}.nii.gz", root / "labels" / f"{case}.nii.gz"

    def __call__(
        self, voxels: np.ndarray | None = None, drawn: np.ndarray | None = None, affine: np.ndarray = AFFINE
    ) -> Maker:
        arrays = (image() if voxels is None else voxels, label() if drawn is None else drawn)
        for path, array in zip((self.image, self.label), arrays, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            found = nib.Nifti1Image(array, affine, dtype=array.dtype)
            found.set_sform(affine, code=1)
            found.set_qform(affine, code=1)
            nib.save(found, path)
        return self

    def header(self, path: Path | None = None, **fields: object) -> None:
        path = path or self.image
        data = gzip.decompress(path.read_bytes())
        header = nib.Nifti1Header(data[:348], check=False)
        for name, value in fields.items():
            header[name] = value
        path.write_bytes(gzip.compress(header.binaryblock + data[348:]))


def other(**changes: float) -> np.ndarray:
    affine = AFFINE.copy()
    for place, value in changes.items():
        affine[int(place[1]), int(place[2])] = value
    return affine


def bad(root: Path) -> dict[str, Code]:
    """Make the bad cases: id → the code that is expected."""

    def make(case: str, **arrays: Any) -> Maker:
        return Maker(root, case)(**arrays)

    codes: dict[str, Code] = {}

    def case(name: str, code: Code, change: Callable[[Maker], object] | None = None, **arrays: Any) -> None:
        maker = make(name, **arrays)
        if change is not None:
            change(maker)
        codes[name] = code

    case("N1", Code.FORM, lambda m: m.header(qoffset_x=77))
    case("N2", Code.NO_GEOMETRY, lambda m: m.header(sform_code=0, qform_code=0))
    case("N3", Code.SHEAR, lambda m: m.header(qform_code=0, srow_x=[-1, 0.8, 0, 30]))
    case("N5_zero", Code.AFFINE, lambda m: m.header(qform_code=0, srow_x=[0, 0, 0, 0]))
    case("N5_nan", Code.AFFINE, lambda m: m.header(qform_code=0, srow_y=[0, np.nan, 0, 0]))
    case("N7", Code.FOUR_D, voxels=image((*SHAPE, 3)))
    case("N10", Code.NONFINITE, voxels=np.where(label() == 2, np.inf, image()).astype(np.float32))
    case("N13", Code.LABEL, drawn=label() + np.float32(0.5))
    case("N14_unknown", Code.LABEL, drawn=label() * np.uint8(7))
    case("N14_negative", Code.LABEL, drawn=-label("int16"))
    case("N15", Code.GRID, drawn=label()[:, :, 1:])
    case("N18_cut", Code.TRUNCATED, lambda m: m.image.write_bytes(m.image.read_bytes()[:-200]))
    case("N18_sum", Code.TRUNCATED, lambda m: m.image.write_bytes(m.image.read_bytes()[:-8] + bytes(4) + b"\0\0\0\0"))
    case("N20_dims", Code.LIMIT, lambda m: m.header(dim=[3, 20000, 20000, 20000, 1, 1, 1, 1]))
    case("N20_bomb", Code.LIMIT, lambda m: m.image.write_bytes(
        gzip.compress(gzip.decompress(m.image.read_bytes()) + bytes(2**22))))  # fmt: skip
    case("N21_colour", Code.UNSUPPORTED, lambda m: m.header(datatype=128, bitpix=24))
    for name, changes in (("N16_origin", {"a03": 37.5}), ("N16_direction", {"a00": 1.0})):
        case(name, Code.GRID)
        Maker(root, name)(affine=other(**changes))
        shutil.move(root / "labels" / f"{name}.nii.gz", root / "keep")
        make(name)
        shutil.move(root / "keep", root / "labels" / f"{name}.nii.gz")
    make("N21_half")
    (root / "images" / "N21_half.nii.gz").unlink()
    nib.save(nib.Nifti1Pair(image(), AFFINE), root / "images" / "N21_half.img")
    (root / "images" / "N21_half.img").unlink()  # the .hdr is left
    codes["N21_half"] = Code.MISSING
    for name in ("N24", "n24"):
        case(name, Code.DUPLICATE_ID)
    case("no_label", Code.MISSING, lambda m: m.label.unlink())
    case("no_image", Code.MISSING, lambda m: m.image.unlink())
    case("two_images", Code.DUPLICATE_ID, lambda m: shutil.copy(m.image, m.image.with_suffix("")))
    for folder in ("images", "labels"):
        Image.fromarray(label()[:, :, 3]).save(root / folder / "picture.png")
    codes["picture"] = Code.MIXED
    return codes


def good(root: Path) -> dict[str, tuple[int, ...]]:
    """Make good cases that look bad: id → the shape that is expected."""
    make = lambda case, **arrays: Maker(root, case)(**arrays)  # noqa: E731
    make("good0")
    make("good1")
    turned = nib.Nifti1Image(label(), AFFINE).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LAS"), nib.orientations.axcodes2ornt("PIR"))
    )
    make("N4")
    nib.save(turned, root / "labels" / "N4.nii.gz")
    make("N6", voxels=image()[..., None])
    make("N8").header(scl_slope=0, scl_inter=99)
    make("N11", voxels=np.full(SHAPE, 7, np.int16))
    make("N12", drawn=label("int64"))
    make("N13_near", drawn=label("float32") * np.float32(1.0000001))
    make("N17", drawn=np.zeros(SHAPE, np.uint8))
    n19 = make("N19")
    n19.image.rename(n19.image.with_suffix(""))  # gzip under .nii
    make("N22", voxels=image()[:, :, :1], drawn=label()[:, :, 3:4])
    return {
        "good0": SHAPE, "good1": SHAPE, "N4": SHAPE, "N6": SHAPE, "N8": SHAPE, "N11": SHAPE, "N12": SHAPE,
        "N13_near": SHAPE, "N17": SHAPE, "N19": SHAPE, "N22": (12, 10, 1),
    }  # fmt: skip


class Bench:
    """The folder, what is expected of it, and what `medseg inspect --json` said of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.good, self.bad = good(root), bad(root)
        self.status = 0
        self.said: dict[str, Any] = {}

    @property
    def problems(self) -> dict[str, dict[str, str]]:
        return {problem["case_id"]: problem for problem in self.said["problems"]}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Tests read it; none writes into it."""
    from contextlib import redirect_stdout
    from io import StringIO

    made = Bench(tmp_path_factory.mktemp("preflight") / "Jane Doe" / "data")
    out = StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main(["inspect", str(made.root), "--json", "--labels", LABELS])
    made.status, made.said = int(ended.value.code or 0), json.loads(out.getvalue())
    return made


BAD = (
    "N1", "N2", "N3", "N5_zero", "N5_nan", "N7", "N10", "N13", "N14_unknown", "N14_negative", "N15", "N16_origin",
    "N16_direction", "N18_cut", "N18_sum", "N20_dims", "N20_bomb", "N21_colour", "N21_half", "N24", "n24", "no_label",
    "no_image", "two_images", "picture",
)  # fmt: skip
GOOD = ("good0", "good1", "N4", "N6", "N8", "N11", "N12", "N13_near", "N17", "N19", "N22")


def test_all_problems_are_listed_and_nothing_else(bench: Bench) -> None:
    assert bench.status == EXIT_BAD_CASES
    assert set(bench.problems) == set(BAD) == set(bench.bad)
    assert bench.said["num_cases"] == len(BAD) + len(GOOD)
    assert "Jane" not in json.dumps(bench.said)


@pytest.mark.parametrize("case", BAD)
def test_bad_case(bench: Bench, case: str) -> None:
    """Each has its code, and says where, what was expected, what came and what to do."""
    problem = bench.problems[case]
    assert problem["code"] == bench.bad[case], problem
    assert all(problem[key] for key in ("message", "where", "expected", "got", "remedy")), problem
    assert case.lower() in problem["where"].lower()


@pytest.mark.parametrize("case", GOOD)
def test_good_case(bench: Bench, case: str) -> None:
    (found,) = [info for info in bench.said["survey"]["cases"] if info["case_id"] == case]
    assert tuple(found["shape"]) == bench.good[case]
    expected = [0, 0] if case == "N17" else [int((label() == v).sum()) for v in (1, 2)]
    if case == "N22":
        expected = [int((label()[:, :, 3] == v).sum()) for v in (1, 2)]
    assert found["label_voxels"][1:] == expected


def test_what_the_messages_tell(bench: Bench) -> None:
    told = bench.problems
    assert "origin shifted by (7.5, 0, 0) mm" in told["N16_origin"]["message"]
    assert str(SHAPE) in told["N15"]["expected"] and "(12, 10, 7)" in told["N15"]["got"]
    assert told["N10"]["got"].startswith("1 of 960")
    assert "7" in told["N14_unknown"]["got"] and "14" in told["N14_unknown"]["got"]
    assert "--form" in told["N1"]["remedy"] and "data.form" in told["N1"]["remedy"]
    assert "--without-form" in told["N2"]["remedy"]
    assert told["N21_half"]["expected"] == "N21_half.img"


def test_the_table_says_the_same(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(bench.root), "--labels", LABELS])
    assert ended.value.code == EXIT_BAD_CASES
    shown = capsys.readouterr().out
    for case, code in bench.bad.items():
        assert f"{code}  {case}  " in shown, case
    assert "what to do" in shown and shown.rstrip().endswith(f"{len(BAD) + len(GOOD)} cases, {len(BAD)} problems")
    assert shown.count("find out which one is right") == 1
    assert "Jane" not in shown


def test_training_says_the_same_before_its_first_step(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["train", f"data.root='{bench.root}'", f"data.labels={LABELS}", "data.store=null"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{len(BAD)} of {len(BAD) + len(GOOD)} cases cannot be used" in said
    listed = [case for case in BAD if f"    {case}: {bench.bad[case]} " in said]
    assert len(listed) == 20 and "and 5 more: medseg inspect DATA lists all" in said
    assert "data.on_bad_case=skip" in said


def test_bad_cases_are_left_out_of_a_plan_and_listed(bench: Bench, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    main(
        ["plan", f"data.root='{bench.root}'", f"data.labels={LABELS}", "data.on_bad_case=skip", "data.store=null",
         f"hydra.run.dir='{plan}'", "data.plan.base_width=4", "trainer.device=cpu"]
    )  # fmt: skip
    survey = json.loads((plan / "survey.json").read_text())
    assert {problem["case_id"] for problem in survey["quarantine"]} == set(BAD)
    assert {info["case_id"] for info in survey["cases"]} == set(GOOD)


def test_options_of_reading_make_bad_cases_good(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows' choices: `form: sform|qform`, and no form where that is allowed."""
    with pytest.raises(SystemExit):
        main(["inspect", str(bench.root), "--json", "--labels", LABELS, "--form", "sform", "--without-form"])
    said = json.loads(capsys.readouterr().out)
    problems = {problem["case_id"]: problem for problem in said["problems"]}
    notes = {info["case_id"]: info["notes"] for info in said["survey"]["cases"]}
    assert "N1" not in problems and any("sform was taken" in note for note in notes["N1"])
    assert problems["N2"]["code"] == "E_GRID"  # its label says where it lies: not there


def folder(root: Path, *names: str) -> Path:
    for name in names:
        Maker(root, name)()
    return root


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    status = 0
    try:
        main(["inspect", *(str(a) for a in arguments), "--json"])
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, json.loads(capsys.readouterr().out)


def test_nothing_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = inspected(capsys, folder(tmp_path / "data", "a", "b"))
    assert status == 0 and said["problems"] == [] and said["num_cases"] == 2
    main(["inspect", str(tmp_path / "data")])
    assert capsys.readouterr().out.rstrip().endswith("2 cases, no problems")


def test_what_is_wrong_with_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "data", "a", "b")
    for name in "ab":
        nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE), root / "labels" / f"{name}.nii.gz")
    status, said = inspected(capsys, root)
    (problem,) = said["problems"]
    assert status == EXIT_BAD_CASES and said["survey"] is None and said["num_cases"] == 2
    assert (problem["case_id"], problem["code"]) == ("data set", "E_LABEL")
    for name in "ab":
        (root / "images" / f"{name}.nii.gz").write_bytes(b"")
    status, said = inspected(capsys, root)
    assert [problem["case_id"] for problem in said["problems"]] == ["a", "b"] and status == EXIT_BAD_CASES


def test_a_patient_on_two_sides_is_found_with_the_bad_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """N23: training and test of a manifest share a patient."""
    root = folder(tmp_path / "data", "a", "b", "c", "d", "e")
    (root / "images" / "d.nii.gz").write_bytes(b"")
    rows = [("a", "P1", "train"), ("b", "P2", "val"), ("c", "P1", "test"), ("d", "P3", "train"), ("e", "P4", "val")]
    lines = [f"{name},images/{name}.nii.gz,labels/{name}.nii.gz,{patient},{side}" for name, patient, side in rows]
    (root / "manifest.csv").write_text("\n".join(["case,image,label,patient,split", *lines]))
    status, said = inspected(capsys, root)
    codes = {problem["case_id"]: problem["code"] for problem in said["problems"]}
    assert status == EXIT_BAD_CASES and codes == {"data set": "E_LEAK", "d": "E_TRUNCATED"}
    with pytest.raises(SystemExit):
        main(["train", f"data.root={root}"])
    assert capsys.readouterr().err.startswith("E_LEAK")
    (root / "labels" / "b.nii.gz").unlink()
    status, said = inspected(capsys, root / "manifest.csv")
    assert {problem["case_id"] for problem in said["problems"]} == {"data set", "b", "d"}


def test_which_folders_are_read_case_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "data", "a", "b")
    assert is_labelled(root) and not is_labelled(root / "images") and not is_labelled(tmp_path / "no")
    assert not is_labelled(root / "images" / "a.nii.gz")
    assert "images" in inspected(capsys, root / "images")[1]
    assert "images" in inspected(capsys, root, "--no-cases")[1]
    assert "problems" in inspected(capsys, root)[1]
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(root), "--labels", "liver"])
    assert ended.value.code == 2 and "--labels" in capsys.readouterr().err
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "data")
    assert inspected(capsys, archive)[1]["num_cases"] == 2


def test_strict_by_default_and_one_error_for_a_folder_where_nothing_fits(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", "a", "b", "c")
    (root / "labels" / "c.nii.gz").unlink()
    with pytest.raises(MedsegError, match="1 of 3 images"):
        find_cases(root)
    found = find_cases(root, strict=False)
    assert [case.case_id for case in found.cases] == ["a", "b"]
    assert [(name, error.code) for name, error in found.problems] == [("c", Code.MISSING)]
    for name in "ab":
        (root / "labels" / f"{name}.nii.gz").rename(root / "labels" / f"other{name}.nii.gz")
    with pytest.raises(MedsegError, match="3 of 3 images"):
        find_cases(root, strict=False)


def test_cases_of_other_channels_are_noted(tmp_path: Path) -> None:
    for name in "abc":
        for channel in range(2):
            Maker(tmp_path, f"{name}_000{channel}")()
            (tmp_path / "labels" / f"{name}_000{channel}.nii.gz").rename(tmp_path / "labels" / f"{name}.nii.gz")
    (tmp_path / "images" / "b_0001.nii.gz").unlink()
    found = find_cases(tmp_path, strict=False)
    assert [case.case_id for case in found.cases] == ["a", "c"]
    assert [(name, error.code) for name, error in found.problems] == [("b", Code.CHANNELS)]


def test_two_labels_in_a_folder_of_a_case_are_noted(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        (tmp_path / case).mkdir()
        for name in ("t1", "seg"):
            (tmp_path / case / f"{name}.nii").write_bytes(b"")
    shutil.copy(tmp_path / "p2" / "seg.nii", tmp_path / "p2" / "x_seg.nii")
    found = find_cases(tmp_path, strict=False)
    assert [case.case_id for case in found.cases] == ["p1"]
    assert [(name, error.code) for name, error in found.problems] == [("p2", Code.DUPLICATE_ID)]


def test_zips_within_a_folder_are_not_looked_into_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "data", "a")
    there = tmp_path / "folder"
    archive = Path(shutil.make_archive(str(there / "Jane Doe"), "zip", root))
    for verb in (["inspect", there], ["train", f"data.root={there}"]):
        with pytest.raises(SystemExit):
            main([str(a) for a in verb])
        said = capsys.readouterr().err
        assert "E_NO_CASES" in said and "name them one by one" in said
    with pytest.raises(MedsegError, match="name them one by one"):
        find_inputs([there])
    shutil.copy(root / "images" / "a.nii.gz", there / "scan.nii.gz")
    _, said = inspected(capsys, there)
    assert said["others"] == {"zip within the folder": 1} and "Jane" not in json.dumps(said)
    assert [case.case_id for case in find_inputs([there])] == ["scan"]
    assert [case.case_id for case in find_inputs([archive])] == ["a"]
