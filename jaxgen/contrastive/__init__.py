"""Contrastive learning: losses of embeddings, the views they compare, and what the embeddings are worth.

>>> import jax, jax.numpy as jnp
>>> from jaxgen import contrastive
>>> first, second = jnp.eye(8), jnp.eye(8) + 0.1  # two views of eight examples, [n, d]
>>> contrastive.nt_xent(first, second, temperature=0.5).shape  # one value per view, to be averaged
(16,)
>>> loss = lambda x: contrastive.nt_xent(x, second, block_size=4).mean()  # 16 x 4 similarities at a time, not 16 x 16
>>> jax.grad(loss)(first).shape
(8, 8)
"""

from jaxgen.contrastive.caching import grad_cached
from jaxgen.contrastive.evaluation import LinearProbe, alignment, knn_accuracy, linear_probe, uniformity
from jaxgen.contrastive.info_nce import info_nce
from jaxgen.contrastive.nt_xent import dcl, nt_xent
from jaxgen.contrastive.redundancy import barlow_twins, vicreg
from jaxgen.contrastive.siglip import siglip
from jaxgen.contrastive.similarity import normalise
from jaxgen.contrastive.supcon import supcon
from jaxgen.contrastive.targets import byol_loss, moco_loss
from jaxgen.contrastive.views import random_view

__all__ = [
    "LinearProbe",
    "alignment",
    "barlow_twins",
    "byol_loss",
    "dcl",
    "grad_cached",
    "info_nce",
    "knn_accuracy",
    "linear_probe",
    "moco_loss",
    "normalise",
    "nt_xent",
    "random_view",
    "siglip",
    "supcon",
    "uniformity",
    "vicreg",
]
