"""Whole images into classes: `medseg train task=classification`, and what predict and evaluate do with such a run."""
