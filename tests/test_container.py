"""The container: what Dockerfile and compose.yaml say, and their steps done as commands where no Docker is."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (REPOSITORY / "compose.yaml").read_text(encoding="utf-8")
SERVICES = yaml.safe_load(COMPOSE)["services"]
UID = 1000


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in their order, comments left out, lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


def context(target: Path) -> Path:
    """What the build sees: the files of the repository that .dockerignore lets through."""
    patterns = (REPOSITORY / ".dockerignore").read_text().split("\n")
    rules = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    hidden = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    assert rules[0] == "*" and len(kept) + len(hidden) + 1 == len(rules), "a rule that this test does not know"
    for name in kept:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(*hidden))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    return target


def test_every_instruction_is_known_and_nothing_is_fetched_by_hand() -> None:
    names = {name for name, _ in instructions()}
    assert names <= {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    for name, rest in instructions():
        if name == "FROM":
            assert not rest.split()[0].endswith((":latest", "python")), rest
        if name == "RUN":
            assert not re.search(r"\b(curl|wget|git clone|sudo|chmod 777)\b", rest), rest
            assert "://" not in rest


def test_the_result_runs_without_privileges_and_writes_only_where_it_may() -> None:
    final = stages()[-1]
    order = [name for name, _ in final]
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert all(name != "RUN" for name in order[order.index("USER") :]), "a step as the user would not be cached"
    (user,) = [rest for name, rest in final if name == "USER"]
    assert user not in ("root", "0") and f"useradd --uid {UID}" in DOCKERFILE
    environment = " ".join(rest for name, rest in final if name == "ENV")
    assert "HOME=/tmp" in environment and "PYTHONDONTWRITEBYTECODE=1" in environment
    assert [rest for name, rest in final if name == "VOLUME"] == ["/work"]
    # What the compiler is for, and what pip brought, do not fill the image twice.
    assert "PIP_NO_CACHE_DIR=1" in environment and "rm -rf /var/lib/apt/lists" in DOCKERFILE


def test_compose_is_healthy_by_default() -> None:
    service = SERVICES["medseg"]
    assert service["network_mode"] == "none"
    assert service["init"] is True and service["stop_grace_period"] == "2m"
    assert service["shm_size"] == "1gb"
    assert service["read_only"] is True
    (tmp,) = service["tmpfs"]
    assert tmp.startswith("/tmp:exec,mode=1777,size=")  # compiled networks are loaded from there
    assert "privileged" not in service and "ports" not in service
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    writable = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
    assert writable == ["./runs:/work"]


def test_only_the_service_for_archives_has_a_network_and_its_secrets_are_names() -> None:
    archive = SERVICES["archive"]
    assert archive["extends"] == {"service": "medseg"} and archive["profiles"] == ["archive"]
    assert archive["network_mode"] == "bridge"
    assert all(re.fullmatch(r"[A-Z_]+", name) for name in archive["environment"])  # no value stands in the file
    named = r"`(MEDSEG_(?:FROM|TO)_[A-Z]+|AWS_[A-Z_]+|NETRC|[A-Z_]+_CA_BUNDLE)[`=]"
    read = set(re.findall(named, (REPOSITORY / "docs" / "archive.md").read_text()))
    read |= {name.replace("FROM", "TO") for name in read}
    assert len(read) > 12 and read <= set(archive["environment"]), read - set(archive["environment"])
    assert archive["volumes"] == ["${MEDSEG_SECRETS:-./secrets}:/secrets:ro"]  # beside those of `medseg`: certificates
    assert set(SERVICES) == {"medseg", "archive"}
    security = (REPOSITORY / "SECURITY.md").read_text()
    assert "the service `medseg` has no network" in security and "the service `archive`" in security


def test_what_is_copied_reaches_the_build(tmp_path: Path) -> None:
    held = context(tmp_path / "context")
    for name, rest in instructions():
        words = shlex.split(rest)
        if name == "COPY" and not words[0].startswith("--from"):
            for word in words[:-1]:
                assert word == "." or (held / word).is_file(), word
    names = [path.relative_to(held).as_posix() for path in held.rglob("*")]
    assert not any(fnmatch(name, pattern) for name in names for pattern in ("*.pyc", ".git*", "runs*", "*.nii*"))


def test_an_archive_of_a_hospital_is_in_the_image() -> None:
    text = (REPOSITORY / "scripts" / "make_lock.py").read_text()
    assert re.search(r'^EXTRAS = \("codecs", "dicomweb", "s3"\)$', text, re.MULTILINE)


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def _may_run(program: str) -> bool:
    """Whether another user may run it: environments often lie in folders of one user."""
    try:
        return subprocess.run([program, "-c", ""], user=UID, group=UID, extra_groups=[], timeout=60).returncode == 0
    except PermissionError:
        return False


@pytest.mark.slow
def test_the_steps_in_a_fresh_environment(tmp_path: Path, tiny_run) -> None:
    """The first stage as it stands, in an environment of its own, with only what .dockerignore lets through; then the
    wheel, run as the image runs it: as another user, with a root that cannot be written, without a network."""
    source = context(tmp_path / "source")
    venv.create(tmp_path / "build", with_pip=True)
    python = str(tmp_path / "build" / "bin" / "python")
    dist = tmp_path / "dist"
    first = [rest for name, rest in stages()[0] if name == "RUN"]
    assert len(first) == 2
    for step in first:
        words = [word.replace("/dist", str(dist)) for word in shlex.split(step)]
        words = [python, "-m", *words] if words[0] == "pip" else [python, *words[1:]]
        run(words, cwd=source)
    (wheel,) = dist.glob("*.whl")

    # The second stage: its dependencies are those of this environment; torch with CUDA is several GB.
    site = tmp_path / "site"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)])
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    (final,) = [rest for name, rest in stages()[-1] if name == "ENV"]
    environment = dict(word.split("=", 1) for word in shlex.split(final)) | {
        "HOME": str(home),
        "TMPDIR": str(home),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(site),
    }
    shutil.copytree(tiny_run.run, tmp_path / "run")
    shutil.copytree(tiny_run.dicom, tmp_path / "scan")
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    command = [sys.executable, "-m", "medseg", "predict", str(tmp_path / "run"), str(tmp_path / "scan"), "-o", "labels"]
    as_user: dict[str, object] = {}
    if os.getuid() == 0 and _may_run(sys.executable):
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == 0 and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o011)
        for folder in (home, work):
            os.chown(folder, UID, UID)
        as_user = {"user": UID, "group": UID, "extra_groups": []}
    isolated = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") and subprocess.run([*isolated, "true"], capture_output=True).returncode == 0:
        command = [*isolated, *command]
    run([*command, "--device", "cpu"], cwd=work, env=environment, **as_user)
    assert (work / "labels" / "scan.nii.gz").is_file()
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before  # a read-only root is enough
