from __future__ import annotations

import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.errors import Code, MedsegError
from medseg.formats.dicom import archive
from medseg.formats.dicom.archive import is_zip, unpacked

CANARY = "CanaryPatient"
CONTENT = bytes(random.Random(0).randbytes(5000))


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Archives unpack below this folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(archive, "_unpacked", {})
    yield folder


def make(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def refused(path: Path, code: Code, temporary: Path) -> MedsegError:
    """The refusal; nothing may be left on disk, and no name of a member said."""
    with pytest.raises(MedsegError) as caught:
        unpacked(path)
    assert caught.value.code is code
    assert caught.value.where == path.name
    assert caught.value.remedy
    assert CANARY not in str(caught.value)
    assert list(temporary.iterdir()) == []
    return caught.value


def test_unpacks_into_a_private_folder_of_the_archives_name(tmp_path: Path) -> None:
    path = make(tmp_path / "case 7.v2.zip", {"study/series/a.dcm": CONTENT, "study/b.dcm": b"", "study/empty/": b""})
    folder = unpacked(path)
    assert folder.name == "case 7.v2"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert (folder / "study/series/a.dcm").read_bytes() == CONTENT
    assert (folder / "study/b.dcm").read_bytes() == b""
    assert [p for p in folder.rglob("*") if p.is_symlink()] == []


@pytest.mark.parametrize("name", ["größe Ünï/Bild ß.dcm", "患者/画像 1.dcm", "a;$(touch x)`b`/c'd\".dcm", "12:30/x"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    folder = unpacked(make(tmp_path / "患者 größe;$(x).zip", {name: CONTENT}))
    assert folder.name == "患者 größe;$(x)"
    assert (folder / name).read_bytes() == CONTENT


def test_names_in_an_undeclared_encoding(tmp_path: Path) -> None:
    """GBK bytes without the UTF-8 flag, as Chinese Windows writes them: the name is garbled, the file is there."""
    name = "患者.dcm".encode("gbk")
    placeholder = "x" * len(name)
    path = make(tmp_path / "a.zip", {placeholder: CONTENT})
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), name))
    (file,) = unpacked(path).iterdir()
    assert file.read_bytes() == CONTENT


def test_backslashes_are_folders(tmp_path: Path) -> None:
    folder = unpacked(make(tmp_path / "a.zip", {"study\\": b"", "study\\a.dcm": CONTENT}))
    assert (folder / "study" / "a.dcm").read_bytes() == CONTENT


def test_shadows_of_macos_are_left_out(tmp_path: Path) -> None:
    folder = unpacked(make(tmp_path / "a.zip", {"s/a.dcm": CONTENT, "__MACOSX/s/._a.dcm": b"x"}))
    assert [p.name for p in folder.iterdir()] == ["s"]


def test_archives_within_stay_files(tmp_path: Path) -> None:
    inner = make(tmp_path / "inner.zip", {"a.dcm": CONTENT})
    folder = unpacked(make(tmp_path / "outer.zip", {"inner.zip": inner.read_bytes()}))
    assert [p.name for p in folder.rglob("*")] == ["inner.zip"]
    assert (folder / "inner.zip").read_bytes() == inner.read_bytes()


def test_unpacked_once_until_it_changes(tmp_path: Path, temporary: Path) -> None:
    path = make(tmp_path / "a.zip", {"a.dcm": CONTENT})
    first = unpacked(path)
    link = tmp_path / "link.zip"
    link.symlink_to(path)
    assert unpacked(path) == unpacked(link) == first
    make(path, {"a.dcm": CONTENT, "b.dcm": b"new"})
    second = unpacked(path)
    assert second != first
    assert (second / "b.dcm").read_bytes() == b"new"
    for file in second.iterdir():  # as a cleaner of temporary folders does
        file.unlink()
    second.rmdir()
    assert (unpacked(path) / "b.dcm").read_bytes() == b"new"


@pytest.mark.parametrize(
    "end", ["", "raise KeyboardInterrupt", "raise MedsegError(Code.GAP, 'x')", "raise SystemExit(3)"]
)
def test_removed_when_the_process_ends(tmp_path: Path, end: str) -> None:
    path = make(tmp_path / "a.zip", {"a.dcm": CONTENT})
    script = f"""
import os, sys
from pathlib import Path
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.archive import unpacked
folder = unpacked(Path({str(path)!r}))
child = os.fork()
if child == 0:
    sys.exit(0)  # runs atexit: the parent's files must stay
os.waitpid(child, 0)
assert (folder / "a.dcm").is_file()
print(folder, flush=True)
{end}
"""
    place = tmp_path / "temporary"
    place.mkdir()
    environment = {**os.environ, "TMPDIR": str(place)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (end == ""), done.stderr
    assert done.stdout.strip().startswith(str(place))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("becomes", ["", "ImportError('initialization failed')"])
def test_removed_when_the_program_is_terminated(tmp_path: Path, becomes: str) -> None:
    """SIGTERM, as schedulers and `docker stop` send it, while a verb works on what it has unpacked.

    Compiled modules make another exception of SystemExit while they are imported.
    """
    path = make(tmp_path / "a.zip", {"a.dcm": CONTENT})
    script = f"""
import time
from pathlib import Path
from medseg.cli import cli, main
from medseg.formats.dicom.archive import unpacked
@cli.command("work")
def work():
    try:
        print(unpacked(Path({str(path)!r})), flush=True)
        time.sleep(60)
    except SystemExit:
        raise {becomes}
main(["work"])
"""
    place = tmp_path / "temporary"
    place.mkdir()
    environment = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert (folder / "a.dcm").is_file() and folder.is_relative_to(place)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert list(place.iterdir()) == []


def test_nothing_is_left_after_an_interrupt(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.zip", {"a.dcm": CONTENT, "b.dcm": CONTENT})
    real, calls = archive._write, []

    def interrupted(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(archive, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpacked(path)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        f"../{CANARY}.dcm",
        f"a/../../{CANARY}",
        f"/tmp/{CANARY}",
        f"..\\{CANARY}",
        f"C:\\{CANARY}",
        f"c:{CANARY}",
        f"\\\\host\\share\\{CANARY}",
        "a/..",
        "..",
    ],
)
def test_paths_out_of_the_folder(tmp_path: Path, temporary: Path, name: str) -> None:
    path = make(tmp_path / "a.zip", {"good.dcm": CONTENT, name: CONTENT})
    error = refused(path, Code.MALFORMED, temporary)
    assert "leaves its folder" in error.message
    assert error.got == "member 2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


def test_nul_in_a_name(tmp_path: Path, temporary: Path) -> None:
    path = make(tmp_path / "a.zip", {"a_dcm": CONTENT})
    path.write_bytes(path.read_bytes().replace(b"a_dcm", b"a\0dcm"))
    refused(path, Code.MALFORMED, temporary)


@pytest.mark.parametrize("stem", ["..", ".", "...."])
def test_archives_named_like_the_folder_above(tmp_path: Path, temporary: Path, stem: str) -> None:
    folder = unpacked(make(tmp_path / f"{stem}.zip", {"a.dcm": CONTENT}))
    assert folder.name == "archive"
    assert folder.parent.parent == temporary


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
def test_links_and_special_files(tmp_path: Path, temporary: Path, kind: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as out:
        info = zipfile.ZipInfo(CANARY)
        info.external_attr = (kind | 0o777) << 16
        info.create_system = 3
        out.writestr(info, "/etc/passwd")
    assert "link" in refused(path, Code.MALFORMED, temporary).message


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", [f"s/{CANARY}", f"s/./{CANARY}", f"s//{CANARY}", f"s\\{CANARY}"])
def test_two_members_of_one_name(tmp_path: Path, temporary: Path, second: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr(f"s/{CANARY}", b"1")
        out.writestr(second, b"2")
    assert "one name" in refused(path, Code.MALFORMED, temporary).message


def test_a_file_and_a_folder_of_one_name(tmp_path: Path, temporary: Path) -> None:
    refused(make(tmp_path / "a.zip", {CANARY: b"1", f"{CANARY}/a.dcm": b"2"}), Code.MALFORMED, temporary)


def test_passwords(tmp_path: Path, temporary: Path) -> None:
    path = make(tmp_path / "a.zip", {CANARY: CONTENT})
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.find(magic) + offset] |= 1
    path.write_bytes(data)
    assert "password" in refused(path, Code.UNSUPPORTED, temporary).message


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_rare_compressions(tmp_path: Path, temporary: Path, method: int) -> None:
    path = make(tmp_path / "a.zip", {CANARY: CONTENT}, method)
    assert "folder" in str(refused(path, Code.UNSUPPORTED, temporary).remedy)


def test_cut_at_every_place(tmp_path: Path, temporary: Path) -> None:
    data = make(tmp_path / "a.zip", {f"{CANARY}1": CONTENT[:60], f"{CANARY}2": CONTENT[:30]}).read_bytes()
    for length in range(len(data)):
        cut = tmp_path / f"cut{length}.zip"
        cut.write_bytes(data[:length])
        refused(cut, Code.TRUNCATED, temporary)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_content(tmp_path: Path, temporary: Path, method: int) -> None:
    path = make(tmp_path / "a.zip", {"good": CONTENT, CANARY: CONTENT}, method)
    data = bytearray(path.read_bytes())
    data[-3000] ^= 0x10  # within the second member
    path.write_bytes(data)
    refused(path, Code.TRUNCATED, temporary)


def forged(path: Path, **fields: int) -> Path:
    """Overwrite fields of the first entry of the table of contents."""
    places = {"compressed": 20, "size": 24}
    data = bytearray(path.read_bytes())
    start = data.find(b"PK\1\2")
    for field, value in fields.items():
        struct.pack_into("<I", data, start + places[field], value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("lie", [1, 4000, 4999, 5001, 60_000])
def test_sizes_that_lie(tmp_path: Path, temporary: Path, lie: int) -> None:
    path = forged(make(tmp_path / "a.zip", {CANARY: CONTENT}), size=lie)
    refused(path, Code.TRUNCATED, temporary)


def test_sizes_beyond_deflate(tmp_path: Path, temporary: Path) -> None:
    path = forged(make(tmp_path / "a.zip", {CANARY: CONTENT}), size=2**32 - 2)
    assert "absurd size" in refused(path, Code.LIMIT, temporary).message


def bomb(path: Path, member_bytes: int, members: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for index in range(members):
            with out.open(f"{index}.dcm", "w") as stream:
                for _ in range(member_bytes // 2**20):
                    stream.write(bytes(2**20))
    return path


def test_a_bomb_within_the_ratio_of_deflate(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MiB of zeros in 16 KiB are allowed where so much always is, refused before anything is written elsewhere."""
    path = bomb(tmp_path / "a.zip", 2**22, 4)
    monkeypatch.setattr(archive, "ALWAYS_ALLOWED_BYTES", 2**23)
    tracemalloc.start()
    error = refused(path, Code.LIMIT, temporary)
    monkeypatch.setattr(archive, "ALWAYS_ALLOWED_BYTES", 2**30)
    assert sum(f.stat().st_size for f in unpacked(path).iterdir()) == 2**24
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(2**24) in str(error.got)
    assert peak < 2**23  # chunks, never a whole member


def test_a_full_disk(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.zip", {CANARY: CONTENT})
    usage = archive.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage._replace(free=6000))
    error = refused(path, Code.LIMIT, temporary)
    assert "6000 bytes free" in str(error.expected)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Path, "open", full_disk(Path.open))
    assert "No space left" in str(refused(path, Code.LIMIT, temporary).got)


def full_disk(real):  # type: ignore[no-untyped-def]
    def opened(self: Path, mode: str = "r", *arguments: object):  # type: ignore[no-untyped-def]
        if "x" in mode:
            raise OSError(28, "No space left on device", str(self))
        return real(self, mode, *arguments)

    return opened


def test_members_that_overlap(tmp_path: Path, temporary: Path) -> None:
    """Fifield's bomb: many entries of the table of contents point at the same bytes."""
    path = make(tmp_path / "a.zip", {"a": CONTENT, "b": CONTENT})
    data = bytearray(path.read_bytes())
    second = data.find(b"PK\1\2", data.find(b"PK\1\2") + 1)
    struct.pack_into("<I", data, second + 42, 0)
    path.write_bytes(data)
    assert "overlap" in refused(path, Code.MALFORMED, temporary).message


def test_too_many_members(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.zip", {f"{CANARY}{i}": b"" for i in range(12)})
    monkeypatch.setattr(archive, "MAX_MEMBERS", 11)
    assert "too many" in refused(path, Code.LIMIT, temporary).message
    monkeypatch.setattr(archive, "MAX_MEMBERS", 12)
    assert len(list(unpacked(path).iterdir())) == 12


def test_a_table_of_contents_is_bounded_before_it_is_read(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.zip", {f"{CANARY}{i:06d}": b"" for i in range(3000)})
    monkeypatch.setattr(archive, "MAX_DIRECTORY_BYTES", 100_000)
    assert "table of contents" in refused(path, Code.LIMIT, temporary).message


def test_empty_and_missing(tmp_path: Path, temporary: Path) -> None:
    assert list(unpacked(make(tmp_path / "empty.zip", {})).iterdir()) == []
    with pytest.raises(MedsegError, match="E_MISSING"):
        unpacked(tmp_path / "none.zip")
    loop = tmp_path / "loop.zip"
    loop.symlink_to(loop)
    assert not is_zip(loop)
    with pytest.raises(MedsegError, match="E_MISSING"):
        unpacked(loop)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path, temporary: Path) -> None:
    path = make(tmp_path / "a.zip", {"a": b""})
    path.chmod(0)
    assert not is_zip(path)
    refused(path, Code.UNSUPPORTED, temporary)


def test_what_is_a_zip(tmp_path: Path) -> None:
    path = make(tmp_path / "no ending", {"a": CONTENT})
    assert is_zip(path)
    assert is_zip(make(tmp_path / "e", {}))
    cut = tmp_path / "cut.zip"
    cut.write_bytes(path.read_bytes()[:100])
    assert is_zip(cut)  # so that it is refused as a cut archive
    other = tmp_path / "other.zip"
    other.write_bytes(b"\0" * 128 + b"DICM")
    assert not is_zip(other)
    assert not is_zip(tmp_path)
    assert not is_zip(tmp_path / "missing")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 10_000),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_damage_of_any_kind(
    tmp_path: Path, temporary: Path, changes: list[tuple[int, int]], cut: int, method: int
) -> None:
    """Only a MedsegError may come out, nothing may be written outside, and what is read must have its checksum."""
    path = make(tmp_path / "a.zip", {"s/a.dcm": CONTENT[:300], "s/b.dcm": bytes(200), "s/t/c": b"c"}, method)
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    mutant = tmp_path / f"m{random.randrange(2**60)}.zip"
    mutant.write_bytes(data[: len(data) - (cut % len(data) if cut % 5 == 0 else 0)])
    before = set(temporary.iterdir())
    try:
        folder = unpacked(mutant)
    except MedsegError as error:
        assert CANARY not in str(error)
        assert set(temporary.iterdir()) == before
    else:
        contents = {p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert contents <= {CONTENT[:300], bytes(200), b"c"}
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".zip"} == set()
