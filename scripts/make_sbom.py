#!/usr/bin/env python3
"""Write dist/sbom.cdx.json: what the Docker image holds, packages with versions and hashes, as CycloneDX (ECMA-424).

python scripts/make_sbom.py    from requirements.lock, which `make lock` writes
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, TARGET = "requirements.lock", "dist/sbom.cdx.json"


def main() -> None:
    """Write the list, the same for the same lock."""
    (ROOT / TARGET).parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", LOCK, "--pyproject", "pyproject.toml"]
    command += ["--output-reproducible", "--output-format", "JSON", "--output-file", TARGET]
    subprocess.run(command, cwd=ROOT, check=True)
    components = json.loads((ROOT / TARGET).read_text(encoding="utf-8"))["components"]
    print(f"{TARGET}: {len(components)} components")


if __name__ == "__main__":
    main()
