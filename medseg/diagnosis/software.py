"""Python, the packages beside medseg, and what they can decode."""

from __future__ import annotations

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from pydicom import uid
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

import medseg
from medseg.diagnosis.check import Check, Status, fail, in_short, ok, warn
from medseg.environment import revision
from medseg.errors import MedsegError
from medseg.formats.dicom.pixels import check_codec
from medseg.registry import PLUGIN_GROUP
from medseg.torchvision_compat import prepare_torchvision

PYTHON_VERSIONS = ((3, 11), (3, 13))
"""First and last that medseg is tested with."""
SYNTAXES = {
    "RLE": (uid.RLELossless,),
    "JPEG (8 bits)": (uid.JPEGBaseline8Bit,),
    "JPEG (12 bits)": (uid.JPEGExtended12Bit,),
    "JPEG Lossless": (uid.JPEGLossless, uid.JPEGLosslessSV1),
    "JPEG-LS": (uid.JPEGLSLossless, uid.JPEGLSNearLossless),
    "JPEG 2000": (uid.JPEG2000Lossless, uid.JPEG2000),
    "HTJ2K": (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
}
"""Compressions of images in archives → their transfer syntaxes. Uncompressed and deflated images need no decoder."""
RARE = frozenset({"HTJ2K"})
"""Hardly any archive holds them yet: that nothing decodes them is said, but is no fault."""


def python() -> Check:
    """The interpreter, and which medseg it runs."""
    code = revision()
    which = code[:12] if code else "revision unknown"
    found = f"medseg {medseg.__version__} ({which}) on Python {platform.python_version()}"
    first, last = PYTHON_VERSIONS
    if not first <= sys.version_info[:2] <= last:
        between = " to ".join(f"{major}.{minor}" for major, minor in PYTHON_VERSIONS)
        return warn("medseg", found, f"medseg is tested with Python {between}: take one of them")
    return ok("medseg", found)


def packages() -> Check:
    """Whether what medseg requires is there, in the versions that it requires."""
    try:
        required = [Requirement(text) for text in requires("medseg") or ()]
    except PackageNotFoundError:
        return warn("packages", "medseg itself is not installed, only its source is there", "pip install .")
    wanted = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    if wrong:
        return fail("packages", "; ".join(wrong), "install medseg again: pip install . (or: make clean demo)")
    return ok("packages", f"all {len(wanted)}, in the versions that medseg requires")


def torch_pair() -> Check:
    """torch, and whether torchvision is the one made for it and can be imported."""
    name, build = "torch and torchvision", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"torch {torch.__version__} ({build})"
    try:
        found += f", torchvision {version('torchvision')}"
        pins = [Requirement(text) for text in requires("torchvision") or ()]
        pin = next((p for p in pins if p.name == "torch"), None)
        if pin is not None and not pin.specifier.contains(Version(torch.__version__), prereleases=True):
            return fail(name, found, f"this torchvision was made for torch{pin.specifier}: install the two together")
        prepare_torchvision()
        importlib.import_module("torchvision")
    except PackageNotFoundError:
        return fail(name, f"{found}, no torchvision", "pip install torchvision")
    except (ImportError, RuntimeError, OSError) as error:  # operators that do not load raise RuntimeError
        return fail(name, f"{found}: {in_short(error)}", "install torch and torchvision anew, from one index")
    return ok(name, found)


def plugins() -> list[Check]:
    """Packages of others that add parts to medseg: whether they can be loaded."""
    checks = []
    for plugin in entry_points(group=PLUGIN_GROUP):
        try:
            plugin.load()
        except Exception as error:  # it is a stranger's code
            remedy = "mend or remove that package: without it medseg would start"
            checks.append(fail(f"plugin {plugin.name}", in_short(error), remedy))
        else:
            checks.append(ok(f"plugin {plugin.name}", "loaded"))
    return checks


def codecs() -> list[Check]:
    """Which compressed DICOM images can be decoded, and what is missing for the others."""
    missing: dict[str, list[str]] = {}
    decoded = []
    for name, syntaxes in SYNTAXES.items():
        remedy = next((r for r in map(_missing, syntaxes) if r is not None), None)
        if remedy is None:
            decoded.append(name)
        else:
            missing.setdefault(remedy, []).append(name)
    checks = [ok("DICOM decoders", ", ".join(decoded) or "none: only uncompressed images can be read")]
    for remedy, names in missing.items():
        status = Status.OK if RARE.issuperset(names) else Status.WARN
        found, remedy = f"none for {', '.join(names)}", f"where you have such images: {remedy}"
        checks.append(Check("DICOM decoders", status, found, remedy))
    return checks


def _missing(syntax: UID) -> str | None:
    """What to do for a transfer syntax that cannot be decoded; None if it can."""
    if syntax == uid.JPEGExtended12Bit and "gdcm" not in get_decoder(syntax).available_plugins:
        return _missing(uid.JPEGLossless) or "pip install 'medseg[codecs]'"  # Pillow claims it, but decodes 8 bits only
    try:
        check_codec(syntax, Path())
    except MedsegError as error:
        return error.remedy
    return None
