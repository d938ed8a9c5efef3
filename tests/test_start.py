"""What the verbs import before they know whether there is anything to do: a start takes as long as its imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEVER = ("monai", "pandas", "torch._dynamo", "torch._inductor", "sympy", "jinja2", "IPython")
"""What no verb needs before its work begins."""
DRAWING = ("matplotlib", "tensorboard", "skimage")
CONFIGURATION = ("hydra", "omegaconf")
MEASURING = ("scipy.spatial", "scipy.stats", "scipy.optimize", "scipy.sparse", "scipy.linalg", "medseg.metrics")
NOT_AT_START = {
    ("train", "data.root=nowhere"): ("matplotlib.axes", "skimage", "scipy.stats", "scipy.spatial", "highdicom"),
    ("predict", "nowhere", "scan.nii.gz", "-o", "out"): (
        *DRAWING, *CONFIGURATION, *MEASURING, "highdicom", "torchvision", "medseg.training", "medseg.reports.overlay"
    ),
    ("evaluate", "nowhere", "nothing"): (*DRAWING, *CONFIGURATION, "torch", "highdicom", "medseg.training"),
    ("compare", "nowhere", "nothing"): (*DRAWING, *CONFIGURATION, "torch", "highdicom", "medseg.training"),
    ("inspect", "nowhere"): (*DRAWING, *CONFIGURATION, *MEASURING, "torch", "highdicom", "medseg.training"),
    ("convert", "nowhere", "x.nii.gz"): (*DRAWING, *CONFIGURATION, *MEASURING, "torch", "highdicom", "medseg.training"),
}  # fmt: skip
"""A command line that is refused as soon as its verb looks at it → what must not be imported by then."""


@pytest.mark.parametrize("arguments", NOT_AT_START, ids=lambda arguments: arguments[0])
def test_a_verb_imports_what_it_needs_first(arguments: tuple[str, ...], tmp_path) -> None:
    forbidden = (*NEVER, *NOT_AT_START[arguments])
    program = (
        "import sys\n"
        "from medseg.cli import main\n"
        "try:\n"
        f"    main({list(arguments)!r})\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 2, ended.code\n"
        f"print(*(name for name in {forbidden!r} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == [""], f"imported too early: {done.stdout}"
