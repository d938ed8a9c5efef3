"""medseg: from a folder of medical scans to a trained, validated, usable segmentation model."""

__version__ = "0.1.0"
