#!/usr/bin/env python3
"""Look for known vulnerabilities in what the Docker image holds (requirements.lock), with pip-audit.

python scripts/audit.py

Exits with 1 where there are any. Where the data base of vulnerabilities cannot be reached, it says so and passes: a
machine without network must be able to run all checks.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
ACCEPTED: dict[str, str] = {}
"""Vulnerabilities that do not concern medseg: id → why not."""
UNREACHED = ("requests.exceptions", "urllib3.exceptions", "ServiceError", "your network may be blocking")
"""What pip-audit says, in words or in a traceback, where it got no answer."""


def audit(lock: Path) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package of a lock; None where its data base cannot be reached.

    A data base that knows none of the packages is none: registries that only serve files answer so.
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off"]
    for accepted in ACCEPTED:
        command += ["--ignore-vuln", accepted]
    result = subprocess.run(command, capture_output=True, text=True)
    try:
        found: list[dict[str, Any]] = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        if any(sign in result.stderr for sign in UNREACHED):
            return None
        sys.exit(f"pip-audit failed:\n{result.stderr}")
    return found if any("vulns" in package for package in found) else None


def first_pin(lock: Path) -> str:
    """The first package of a lock, with its hashes."""
    return re.split(r"\n(?=[\w.-]+==)", re.sub(r"^#.*\n", "", lock.read_text(encoding="utf-8"), flags=re.MULTILINE))[0]


def main() -> None:
    """Ask about one package, and about all of them if there is an answer."""
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.txt"
        one.write_text(first_pin(LOCK), encoding="utf-8")
        found = None if audit(one) is None else audit(LOCK)
    if found is None:
        print("the data base of vulnerabilities cannot be reached: nothing was audited")
        return
    skipped = [f"{p['name']}: {p['skip_reason']}" for p in found if "skip_reason" in p]
    bad = [(package, vulnerability) for package in found for vulnerability in package.get("vulns", ())]
    for package, vulnerability in bad:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, mended in {fixed}")
    print(*skipped, sep="\n", end="\n" if skipped else "")
    print(f"{len(found) - len(skipped)} packages audited, {len(bad)} known vulnerabilities")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
