"""What is hidden of an image, and what is to be reconstructed of it: one method per file."""

from medseg.pretraining.methods.method import METHODS, Hidden, Method

__all__ = ["METHODS", "Hidden", "Method"]
