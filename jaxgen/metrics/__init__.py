"""Metrics: functions of two sets of features, whatever extracted them.

A score is only as good as its features: say which extractor gave it. Nothing computed here is called FID, the name of
`frechet_distance` on the features of one particular Inception network.
"""

from jaxgen.metrics.frechet import frechet_distance
from jaxgen.metrics.manifold import PrecisionRecall, precision_recall
from jaxgen.metrics.neighbours import nearest_neighbours

__all__ = ["PrecisionRecall", "frechet_distance", "nearest_neighbours", "precision_recall"]
