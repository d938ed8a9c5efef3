"""What the Docker image is made of: pinned, hashed, fitting pyproject.toml, and asked for by the Dockerfile."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-build.lock")
ENVIRONMENTS = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.1", "extra": ""} for minor in (11, 12, 13)
]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}


def pins(name: str) -> list[tuple[Requirement, list[str]]]:
    """The packages of a lock, each with its hashes."""
    text = "".join(line for line in (REPOSITORY / name).read_text().splitlines(keepends=True) if line[0] != "#")
    found = []
    for block in re.split(r"\n(?=\S)", text):
        requirement, *options = re.sub(r"\\\n", " ", re.sub(r"\n +#.*", "", block)).split(" --hash=")
        found.append((Requirement(requirement.strip()), [option.strip() for option in options]))
    return found


def pinned_for(name: str, environment: dict[str, str]) -> dict[str, str]:
    """Package → version that a lock gives to one kind of machine."""
    found: dict[str, str] = {}
    for requirement, _ in pins(name):
        if requirement.marker is None or requirement.marker.evaluate({**environment, **LINUX}):
            (specifier,) = requirement.specifier
            assert requirement.name not in found, f"{requirement.name} twice"
            found[requirement.name] = specifier.version
    return found


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_by_version_and_hash(name: str) -> None:
    found = pins(name)
    assert len(found) >= 8
    for requirement, hashes in found:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert requirement.url is None
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement
    text = (REPOSITORY / name).read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: e["python_version"])
def test_the_lock_fits_pyproject(environment: dict[str, str]) -> None:
    """A dependency that is added or moved on without `make lock` is found here."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + [text for name in script("make_lock").EXTRAS for text in extras[name]]
    locked = pinned_for("requirements.lock", environment)
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.name in locked, f"{requirement.name} is not in requirements.lock: make lock"
        assert requirement.specifier.contains(locked[requirement.name]), f"{text}: make lock"
    building = pinned_for("requirements-build.lock", environment)
    for text in (*project["build-system"]["requires"], "build", "setuptools"):
        requirement = Requirement(text)
        assert requirement.specifier.contains(building[requirement.name])
    both = building.keys() & locked.keys()
    assert {name: building[name] for name in both} == {name: locked[name] for name in both}


def test_the_image_takes_nothing_but_what_is_pinned() -> None:
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    installs = [part for line in text.splitlines() if line.startswith("RUN") for part in line.split("&&")]
    installs = [part.removeprefix("RUN").strip() for part in installs if "pip install" in part]
    assert len(installs) == 4
    for command in installs:
        # medseg's own wheel comes from the stage before, alone
        assert "--require-hashes" in command or command == "pip install --no-deps /tmp/*.whl", command
    assert "--no-isolation" in text  # else `build` would fetch what builds the wheel
    assert "--no-build-isolation" in next(command for command in installs if "/requirements.lock" in command)
    allowed = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert all(f"!{name}" in allowed for name in LOCKS)
    assert text.index("USER medseg") < text.index("ENTRYPOINT")


def test_the_container_has_no_network_and_no_privileges() -> None:
    service = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]["medseg"]
    assert service["network_mode"] == "none" and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert any(volume.endswith(":/data:ro") for volume in service["volumes"])


def test_the_list_of_components_is_that_of_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sbom = script("make_sbom")
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    monkeypatch.setattr(make_sbom, "ROOT", tmp_path)
    make_sbom.main()
    listed = json.loads((tmp_path / make_sbom.TARGET).read_text())
    assert listed["bomFormat"] == "CycloneDX"
    components = {(c["name"], c["version"]): c for c in listed["components"]}
    expected = {(r.name, next(iter(r.specifier)).version): hashes for r, hashes in pins("requirements.lock")}
    assert components.keys() == expected.keys()
    for key, hashes in expected.items():
        (reference,) = components[key]["externalReferences"]
        assert {f"sha256:{found['content']}" for found in reference["hashes"]} == set(hashes)


VULNERABLE = {"name": "click", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"], "aliases": []}]}
UNKNOWN = {"name": "click", "skip_reason": "Dependency not found and could not be audited"}


@pytest.mark.parametrize(
    ("found", "errors", "code", "said"),
    [
        ([{"name": "click", "version": "1", "vulns": []}], "", 0, "1 packages audited, 0 known"),
        ([VULNERABLE], "", 1, "click 1: PYSEC-1, mended in 2"),
        ([{"name": "rich", "version": "1", "vulns": []}, UNKNOWN], "", 0, "click: Dependency not found"),
        ([UNKNOWN], "", 0, "cannot be reached"),
        (None, "requests.exceptions.ProxyError: unable to connect", 0, "cannot be reached"),
        (None, "ERROR: requirements.lock has no hash for click", 1, ""),
    ],
)
def test_audit(found, errors: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    audit, asked = script("audit"), []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        output = "" if found is None else json.dumps({"dependencies": found, "fixes": []})
        return subprocess.CompletedProcess(command, code, output, errors)

    monkeypatch.setattr(audit.subprocess, "run", run)
    try:
        audit.main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    assert status == code and said in capsys.readouterr().out
    assert asked[0].startswith("absl-py==") and asked[0].count("==") == 1  # one package first: is there an answer?
    assert len(asked) == 1 or asked[1] == (REPOSITORY / "requirements.lock").read_text()


def test_pip_audit_takes_the_command(tmp_path: Path) -> None:
    """Its options are those of the installed version; nothing is asked of any data base."""
    help_text = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--help"], capture_output=True, text=True, timeout=120
    ).stdout
    source = (REPOSITORY / "scripts" / "audit.py").read_text()
    options = set(re.findall(r'"(--[a-z-]+)"', source))
    assert options and all(option in help_text for option in options)
