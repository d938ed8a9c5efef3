"""What a result was made with: versions, revision of the code, processor, GPU.

One table for all who tell it: `medseg doctor` shows it, and manifests of runs and of predictions hold it. It names no
machine, user or folder.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

import medseg

PACKAGES = (
    *("torch", "torchvision", "numpy", "scipy", "scikit-image", "nibabel", "pydicom", "highdicom", "pillow"),
    *("python-gdcm", "pyjpegls", "safetensors", "blosc2", "monai", "hydra-core"),
)
"""Whose versions are told: those that decide on numbers, or on which files can be read."""
REVISION_FILE = "revision.txt"
"""In a package that was built (hatch_build.py): the commit that it was built of."""
UNKNOWN = "unknown"
"""Where no commit is known: somebody's copy of the source."""
DRIVER = Path("/proc/driver/nvidia/version")
"""Where NVIDIA's driver on Linux says what it is."""


def environment() -> dict[str, str]:
    """What medseg runs with here and now, as name → text; what is not there, or not in use, is left out."""
    found = {
        "medseg": medseg.__version__,
        "revision": revision() or UNKNOWN,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "driver": driver(),
        "gpu": ", ".join(gpu_names()),
        **versions(PACKAGES),
    }
    return {name: text for name, text in found.items() if text}


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Name → version of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def revision() -> str | None:
    """The commit of medseg's code: of the checkout that it runs from, or of the package; None if unknown."""
    package = Path(medseg.__file__).resolve().parent
    git, built = package.parent / ".git", package / REVISION_FILE
    try:
        if git.exists():
            return _head_of(git)
        if built.is_file():
            return built.read_text(encoding="ascii").strip()[:64] or None
        installed = distribution("medseg").read_text("direct_url.json")
        return None if installed is None else str(json.loads(installed)["vcs_info"]["commit_id"])
    except (OSError, ValueError, KeyError, IndexError, PackageNotFoundError):
        return None


def processor() -> str:
    """The kind of CPU, as its maker names it; the architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def gpu_names() -> list[str]:
    """The CUDA devices, each by the name of its kind; none where this process has not used CUDA.

    To ask would start it, which takes seconds and some hundred MB of the GPU, also from work that runs on the CPU.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none, or it does not tell."""
    try:
        words = DRIVER.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _cudnn() -> str | None:
    if torch.version.cuda is None:
        return None
    number = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if number is None else str(number)


def _head_of(git: Path) -> str | None:
    """The commit that is checked out, read from git's own files: no program is run for it."""
    if git.is_file():  # a worktree: "gitdir: PATH"
        git = (git.parent / git.read_text(encoding="utf-8").split(":", 1)[1].strip()).resolve()
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head
    reference = head.split(":", 1)[1].strip()
    common = git / "commondir"
    home = (git / common.read_text(encoding="utf-8").strip()).resolve() if common.is_file() else git
    if (home / reference).is_file():
        return (home / reference).read_text(encoding="utf-8").strip()
    lines = (home / "packed-refs").read_text(encoding="utf-8").splitlines()
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), None)
