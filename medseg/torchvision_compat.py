"""Makes `import torchvision` work beside a CPU-only torch.

The registry's torchvision wheel is built for CUDA; beside a CPU-only torch its compiled operators do not load and the
import dies with "operator torchvision::nms does not exist" (pytorch/vision issues 9077 and 9085). Declaring the two
operators before the import makes all Python parts work. Import this module before torchvision, and before anything
that imports it (MONAI's pretrained networks, TensorBoard's helpers of other packages).
"""

from __future__ import annotations

import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Declare torchvision's operators where its compiled library cannot load. Does nothing where it can."""
    global _library
    if _library is not None or torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS.values():
        _library.define(schema)  # type: ignore[no-untyped-call]
