"""Metrics: functions of two sets of features, whatever extracted them.

A score is only as good as its features: say which extractor gave it, by a `signature`. Nothing computed here is called
FID, the name of `frechet_distance` on the features of one particular Inception network.

What comes in pieces, or on many devices, is gathered by `moments` (for `frechet_distance`) and `predictions` (for the
inception score): modules of ``init``, ``update``, ``merge`` and ``compute``, and `merge_across` devices.
"""

from jaxgen.metrics import moments, predictions
from jaxgen.metrics.frechet import frechet_distance
from jaxgen.metrics.kernel import KernelDistance, kernel_distance, subset_kernel_distance
from jaxgen.metrics.manifold import PrecisionRecall, precision_recall
from jaxgen.metrics.moments import Moments
from jaxgen.metrics.neighbours import nearest_neighbours
from jaxgen.metrics.predictions import InceptionScore, Predictions, inception_score
from jaxgen.metrics.signature import signature
from jaxgen.metrics.streaming import merge_across

__all__ = [
    "InceptionScore",
    "KernelDistance",
    "Moments",
    "PrecisionRecall",
    "Predictions",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "merge_across",
    "moments",
    "nearest_neighbours",
    "precision_recall",
    "predictions",
    "signature",
    "subset_kernel_distance",
]
