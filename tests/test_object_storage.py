"""`medseg predict --from storage s3://… --to storage s3://…`, against moto's server on loopback."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicom_phantom import GTV, write_series

from medseg.cli import main
from medseg.cli.predict import EXIT_BAD_CASES
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT
from medseg.inference.ensemble import Ensemble
from medseg.inference.job import Job
from medseg.inference.manifest import DELIVERING, MANIFEST_FILE
from medseg.inference.verification import Status, verify
from medseg.remote import exchange, storage
from medseg.remote.exchange import PREFIX, Remote, Unreachable
from medseg.remote.storage import StorageSink, StorageSource, Store

KEY, SECRET = "AKIAcanary", "zqCanarySecret"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The end point of an S3 that forgets all when the module ends."""
    moto = pytest.importorskip("moto.server", reason='moto is not installed: pip install "moto[s3]" flask flask-cors')
    pytest.importorskip("s3fs", reason='s3fs is not installed: pip install "medseg[s3]"')
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The file system, with an empty bucket; credentials are in the environment."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem(use_listings_cache=False)
    system.mkdir("hospital")
    yield system
    system.rm("hospital", recursive=True)


def predict(run: Path, *arguments: object, status: int | None = None) -> None:
    command = ["predict", str(run), "--device", "cpu", "--precision", "fp32", *(str(a) for a in arguments)]
    if status is None:
        main(command)
        return
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == status


def names_in(bucket: Any, folder: str) -> list[str]:
    return sorted(key.removeprefix(f"{folder}/") for key in bucket.find(folder))


def cases_of(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / MANIFEST_FILE).read_text().splitlines()]
    return {line["case"]: line for line in lines if "case" in line}


def test_from_a_bucket_and_back(bucket, tiny_run, tmp_path: Path, capfd, monkeypatch) -> None:
    scans = sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))
    for name, source in zip(("a", "b"), scans, strict=False):
        bucket.put_file(str(source), f"hospital/scans/site1/{name}.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(scans[0].read_bytes()[:1000])
    bucket.put_file(str(tmp_path / "cut.nii.gz"), "hospital/scans/cut.nii.gz")
    for path in write_series(tmp_path / "series", 1, [GTV]):
        bucket.put_file(str(path), f"hospital/scans/ct/{path.name}")
    for name in ("notes.txt", "site1/README", ".hidden.nii.gz"):
        bucket.pipe_file(f"hospital/scans/{name}", b"no scan")
    fetched: list[Path] = []
    plain = Remote.fetch

    def fetch(self, case):
        found = plain(self, case)
        fetched.extend(found.images)
        assert len(list((tmp_path / "tmp").glob(f"{PREFIX}*/*/"))) <= 3
        return found

    monkeypatch.setattr(Remote, "fetch", fetch)
    out = tmp_path / "out"
    ends = ("--from", "storage", "s3://hospital/scans", "--to", "storage", "s3://hospital/labels", "-o", out)
    predict(tiny_run.run, *ends, "--statistics", "--on-bad-case", "skip", status=EXIT_BAD_CASES)
    tables = ["predictions.json", MANIFEST_FILE, "statistics.csv"]
    assert names_in(bucket, "hospital/labels") == sorted(["ct.nii.gz", "site1_a.nii.gz", "site1_b.nii.gz", *tables])
    assert sorted(p.name for p in out.iterdir()) == sorted(tables)
    assert list((tmp_path / "tmp").iterdir()) == [] and not any(path.exists() for path in fetched)
    assert bucket.cat_file(f"hospital/labels/{MANIFEST_FILE}") == (out / MANIFEST_FILE).read_bytes()
    assert cases_of(out)["cut"]["failed"]["code"] == "E_TRUNCATED"
    said = "".join(capfd.readouterr()) + "".join(p.read_text() for p in out.iterdir())
    assert KEY not in said and SECRET not in said

    # As if the file had been here.
    predict(tiny_run.run, scans[0], "-o", tmp_path / "here")
    bucket.get_file("hospital/labels/site1_a.nii.gz", str(tmp_path / "there.nii.gz"))
    ours, theirs = (nib.load(path) for path in (next((tmp_path / "here").glob("*.nii.gz")), tmp_path / "there.nii.gz"))
    assert np.array_equal(ours.dataobj, theirs.dataobj) and np.array_equal(ours.affine, theirs.affine)

    # Nothing is fetched that is done; what has changed since is.
    fetched.clear()
    bucket.put_file(str(scans[2]), "hospital/scans/site1/b.nii.gz")
    predict(tiny_run.run, *ends, "--statistics", "--on-bad-case", "skip", "--resume", status=EXIT_BAD_CASES)
    assert "2 done before" in capfd.readouterr().out
    assert sorted(path.name for path in fetched) == ["b.nii.gz", "cut.nii.gz"]
    # Without --resume nothing there is replaced.
    predict(tiny_run.run, *ends[:6], "-o", tmp_path / "new", status=2)
    assert "is not empty" in capfd.readouterr().err


def test_from_this_disk_to_a_bucket(bucket, tiny_run, tmp_path: Path) -> None:
    predict(tiny_run.run, tiny_run.dicom, "--to", "storage", "s3://hospital/x", "--format", "nifti,dicom-seg",
            "-o", tmp_path / "out")  # fmt: skip
    name = tiny_run.dicom.name
    expected = [f"{name}.nii.gz", f"{name}.seg.dcm", "predictions.json", MANIFEST_FILE]
    assert names_in(bucket, "hospital/x") == sorted(expected)


def test_an_upload_that_fails_ends_the_work_and_leaves_no_line(bucket, tiny_run, tmp_path: Path, monkeypatch) -> None:
    ensemble = Ensemble.from_run(tiny_run.run, device="cpu", precision="fp32")
    from rich.console import Console

    from medseg.inference.job import Options
    from medseg.remote.predict import predict_remote

    plain = Store.put

    def put(self, path: Path, name: str) -> None:
        if name.endswith(".nii.gz"):
            raise Unreachable(Code.ARCHIVE, "the object store refuses")
        plain(self, path, name)

    monkeypatch.setattr(Store, "put", put)
    out = tmp_path / "out"
    options = Options(on_bad_case="skip")
    with pytest.raises(MedsegError, match="the object store refuses"):
        predict_remote(ensemble, [tiny_run.data / "imagesTr"], out, Console(quiet=True), options,
                       sink=("storage", "s3://hospital/y"))  # fmt: skip
    lines = cases_of(out)
    assert len(lines) == 1 and next(iter(lines.values()))["failed"]["code"] == "E_ARCHIVE"
    assert sorted(p.name for p in out.iterdir()) == ["predictions.json", MANIFEST_FILE]


def test_channels_and_folders_become_cases(bucket) -> None:
    for name in ("p1/x_0000.nii.gz", "p1/x_0001.nii.gz", "p2/IM1", "p2/IM2", "p3/1.2.840.5", "y_0000.nii.gz"):
        bucket.pipe_file(f"hospital/in/{name}", name.encode())
    one = {c.case_id: c.key[1:] for c in StorageSource("s3://hospital/in", ("CT",), STRICT).cases()}
    assert one.keys() == {"p1_x_0000", "p1_x_0001", "p2", "p3", "y_0000"}
    assert one["p2"] == ("p2/IM1", "p2/IM2")
    source = pickle.loads(pickle.dumps(StorageSource("s3://hospital/in/", ("T1", "T2"), STRICT)))
    two = {c.case_id: c for c in source.cases()}
    assert two.keys() == {"p1_x", "p2", "p3", "y"} and two["p1_x"].key[1:] == ("p1/x_0000.nii.gz", "p1/x_0001.nii.gz")
    before = source.digest(two["p1_x"])
    assert before == {c.case_id: c for c in source.cases()}["p1_x"].key[0]
    bucket.pipe_file("hospital/in/p1/x_0001.nii.gz", b"something else")
    assert before != {c.case_id: c for c in source.cases()}["p1_x"].key[0]


def test_paths_that_become_one_id_are_refused(bucket) -> None:
    for name in ("site1/a/scan.nii.gz", "site1_a/scan.nii.gz"):
        bucket.pipe_file(f"hospital/in/{name}", name.encode())
    with pytest.raises(MedsegError, match="site1_a_scan") as caught:
        StorageSource("s3://hospital/in", ("CT",), STRICT).cases()
    assert caught.value.code is Code.DUPLICATE_ID
    for number, names in enumerate((("ct/IM1", "ct.nii.gz"), ("x.nii.gz", "x_0000.nii.gz"))):
        for name in names:
            bucket.pipe_file(f"hospital/in{number}/{name}", name.encode())
        with pytest.raises(MedsegError, match="E_DUPLICATE_ID"):
            StorageSource(f"s3://hospital/in{number}", ("T1", "T2"), STRICT).cases()


def test_labels_are_no_scans(bucket) -> None:
    for name in (
        "imagesTr/a.nii.gz",
        "labelsTr/a.nii.gz",
        "y/x.nii.gz",
        "y/x_seg.nii.gz",
        "y/Masks/x.nii.gz",
        "seg.nii",
    ):
        bucket.pipe_file(f"hospital/in/{name}", name.encode())
    cases = StorageSource("s3://hospital/in", ("CT",), STRICT).cases()
    assert [case.case_id for case in cases] == ["imagesTr_a", "seg", "y_x"]


def test_room_is_looked_for_before_anything_is_fetched(bucket, tmp_path: Path, monkeypatch) -> None:
    bucket.pipe_file("hospital/in/a.nii.gz", b"0" * 1000)
    source = StorageSource("s3://hospital/in", ("CT",), STRICT)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1200))
    monkeypatch.setattr(Store, "get", lambda *arguments: pytest.fail("fetched"))
    (case,) = source.cases()
    with pytest.raises(MedsegError, match="E_LIMIT") as caught:
        source.fetch(case, tmp_path)
    assert caught.value.got == "1000 bytes"


def test_another_place_gets_all_files_and_verify_says_where_they_are(bucket, tiny_run, tmp_path: Path, capfd) -> None:
    out, to = tmp_path / "out", ("--to", "storage")
    predict(tiny_run.run, tiny_run.dicom, *to, "s3://hospital/one", "-o", out)
    name = f"{tiny_run.dicom.name}.nii.gz"
    found = {finding.name: finding for finding in verify(out).findings}
    assert verify(out).is_ok and found[name].status is Status.UNKNOWN and "elsewhere" in found[name].detail
    predict(tiny_run.run, tiny_run.dicom, *to, "s3://hospital/two", "-o", out, "--resume")
    assert "done before" not in capfd.readouterr().out
    assert name in names_in(bucket, "hospital/two")
    predict(tiny_run.run, tiny_run.dicom, *to, "s3://hospital/two/", "-o", out, "--resume")
    assert "1 done before" in capfd.readouterr().out
    predict(tiny_run.run, tiny_run.dicom, "-o", out, "--resume")  # and here
    assert (out / name).is_file() and verify(out).is_ok
    (out / name).unlink()
    assert not verify(out).is_ok


def test_a_correction_in_the_store_is_not_replaced_unasked(bucket, tiny_run, tmp_path: Path, capfd) -> None:
    scans = sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))
    for name, source in zip(("a", "b"), scans, strict=False):
        bucket.put_file(str(source), f"hospital/scans/{name}.nii.gz")
    ends = ("--from", "storage", "s3://hospital/scans", "--to", "storage", "s3://hospital/labels", "-o", tmp_path / "o")
    predict(tiny_run.run, *ends)
    bucket.pipe_file("hospital/labels/a.nii.gz", b"corrected by hand")
    again = (*ends, "--resume", "--on-bad-case", "skip", "--step", "0.6")  # other options: all is done again
    predict(tiny_run.run, *again, status=EXIT_BAD_CASES)
    assert "a is bad and left out: E_OUTPUT" in capfd.readouterr().out
    assert bucket.cat_file("hospital/labels/a.nii.gz") == b"corrected by hand"
    assert "failed" not in cases_of(tmp_path / "o")["b"]  # what is ours is replaced
    predict(tiny_run.run, *again, "--overwrite")
    assert bucket.cat_file("hospital/labels/a.nii.gz") != b"corrected by hand"
    # Somebody else's objects, and nothing here that says otherwise.
    predict(tiny_run.run, *ends[:6], "-o", tmp_path / "new", "--resume", status=2)
    assert "is not empty" in capfd.readouterr().err


def test_what_was_delivered_just_before_a_crash_is_ours(bucket, tiny_run, tmp_path: Path, monkeypatch, capfd) -> None:
    out = tmp_path / "out"
    command = (tiny_run.dicom, "--to", "storage", "s3://hospital/x", "--format", "dicom-seg", "-o", out, "--resume")

    def killed(self, done) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Job, "settle", killed)
        with pytest.raises(SystemExit):
            main(["predict", str(tiny_run.run), "--device", "cpu", "--precision", "fp32", *map(str, command)])
    assert (out / DELIVERING / f"{tiny_run.dicom.name}.json").is_file() and not (out / MANIFEST_FILE).exists()
    name = f"{tiny_run.dicom.name}.seg.dcm"
    first = bucket.cat_file(f"hospital/x/{name}")
    predict(tiny_run.run, *command)  # a SEG has another UID and time: only the announcement knows the first
    assert bucket.cat_file(f"hospital/x/{name}") != first
    assert cases_of(out)[tiny_run.dicom.name]["delivered"].keys() == {name} and not (out / DELIVERING).exists()


def test_a_disk_without_room_ends_the_work(bucket, tiny_run, tmp_path: Path, monkeypatch, capfd) -> None:
    scans = sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))
    for name, source in zip(("a", "b"), scans, strict=False):
        bucket.put_file(str(source), f"hospital/scans/{name}.nii.gz")
    origin = ("--from", "storage", "s3://hospital/scans", "--on-bad-case", "skip", "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "MIN_FREE_BYTES", 2**62)
        predict(tiny_run.run, *origin, status=2)
    assert "E_OUTPUT: a scan cannot be kept" in capfd.readouterr().err
    assert [line["failed"]["code"] for line in cases_of(tmp_path / "out").values()] == ["E_OUTPUT"]

    def full(self, files, identity) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StorageSink, "deliver", full)
    predict(tiny_run.run, *origin, "--to", "storage", "s3://hospital/y", "--resume", status=2)
    assert "E_OUTPUT: the files cannot be written" in capfd.readouterr().err


def test_the_tables_follow_work_alone_and_hide_no_error(bucket, tiny_run, tmp_path: Path, monkeypatch, capfd) -> None:
    out = tmp_path / "out"
    predict(tiny_run.run, tiny_run.dicom, "-o", out)
    to = ("--to", "storage", "s3://hospital/x", "-o", out)
    predict(tiny_run.run, tiny_run.dicom, *to, status=2)  # refused: the files are there
    assert "exist already" in capfd.readouterr().err and names_in(bucket, "hospital/x") == []
    (tmp_path / "cut.nii.gz").write_bytes(b"no scan")

    def refused(self, folder) -> None:
        raise Unreachable(Code.ARCHIVE, "the object store refuses")

    monkeypatch.setattr(StorageSink, "end", refused)
    predict(tiny_run.run, tmp_path / "cut.nii.gz", *to, status=2)
    said = capfd.readouterr()
    assert "E_ARCHIVE" not in said.err and "E_" in said.err
    assert "the tables were not delivered: the object store refuses" in said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", "storage", "s3://user:secret@bucket/x"), "this is no place in an object store"),
        (("--from", "storage", "/home/scans"), "without --from"),
        (("--from", "storage", "s3://hospital/x", "--query", "Modality=CT"), "a query is answered by an archive"),
        (("--from", "storage", "s3://hospital/x", "--to", "storage", "s3://hospital/x/y"), "among the scans"),
        (("--from", "storage", "s3://hospital/nothing"), "E_NO_CASES"),
        (("--from", "storage", "s3://no-such-bucket/x"), "E_"),
    ],
)
def test_what_is_refused(bucket, arguments, said: str, tiny_run, tmp_path: Path, capfd) -> None:
    predict(tiny_run.run, *arguments, "-o", tmp_path / "out", status=2)
    shown = capfd.readouterr().err
    assert said in shown and "secret" not in shown
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_not_there(bucket, monkeypatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(Unreachable, match="the object store refuses") as caught:
        StorageSink("s3://hospital/x").begin(may_replace=False)
    assert "127.0.0.1" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()
    shutil.rmtree(tempfile.gettempdir())
