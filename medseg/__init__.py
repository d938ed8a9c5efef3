"""medseg: from a folder of medical scans to a trained, validated, usable segmentation model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.inference.warm import Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """`medseg.Predictor`, imported when it is asked for: torch takes a second that not every use of medseg needs."""
    if name == "Predictor":
        from medseg.inference.warm import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
