"""Networks from an image to the scores of its classes."""

from medseg.models.classifiers.contract import CLASSIFIERS, ClassificationModel

__all__ = ["CLASSIFIERS", "ClassificationModel"]
