"""Contrastive losses: ``python -m benchmarks contrastive`` (peers: ``[peers]`` and ``pip install --no-deps lightly``).

SimCLR's loss (arXiv:2002.05709) of 4,096 pairs of embeddings of 128 numbers, and its gradient with respect to all of
them. Of the four sides two hold the similarities of all 8,192 views with each other, and more arrays of that size:

    jaxgen           the matrix as a whole
    jaxgen-blocks    512 columns of it at a time; the same gradient
    lightly          `lightly.loss.NTXentLoss`
    torch-masks      the formulation of solo-learn and of many a repository: exponentials of all similarities, times a
                     mask of the positives and one of the negatives
"""

import functools
import importlib.util
import sys
from typing import Any

import numpy as np

from benchmarks.case import Case, Work, compiled

TEMPERATURE = 0.2
FEATURES = 128
BLOCK = 512


def embeddings(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Two views of each example: [pairs, features] twice, alike as trained ones are."""
    rng = np.random.default_rng(0)
    example, *noise = rng.standard_normal((3, pairs, FEATURES)).astype(np.float32)
    first, second = (example + one for one in noise)
    return first, second


def jaxgen(pairs: int, *, block_size: int | None = None) -> Work:
    """One compiled program."""
    import jax

    from jaxgen import contrastive

    def loss(first: Any, second: Any) -> Any:
        return contrastive.nt_xent(first, second, temperature=TEMPERATURE, block_size=block_size).mean()

    return compiled(jax.value_and_grad(loss, (0, 1)), *embeddings(pairs), outputs=joined)


def lightly(pairs: int) -> Work:
    """The loss of lightly."""
    return in_torch(_lightly_loss()(temperature=TEMPERATURE), pairs)


def masks(pairs: int) -> Work:
    """Exponentials and masks, in PyTorch."""
    import torch
    from torch.nn import functional

    example = torch.arange(pairs).repeat(2)
    same = (example[:, None] == example[None, :]).float()
    itself = torch.eye(2 * pairs)
    positives, negatives = same - itself, 1 - same

    def loss(first: Any, second: Any) -> Any:
        z = functional.normalize(torch.cat([first, second]), dim=1)
        similarity = torch.exp(z @ z.T / TEMPERATURE)
        positive = (similarity * positives).sum(1)
        return -torch.log(positive / (positive + (similarity * negatives).sum(1))).mean()

    return in_torch(loss, pairs)


def in_torch(loss: Any, pairs: int) -> Work:
    """A loss of two tensors, with its gradient."""
    import torch

    views = [torch.tensor(one, requires_grad=True) for one in embeddings(pairs)]

    def run() -> Any:
        value = loss(*views)
        return value.detach(), torch.autograd.grad(value, views)

    return Work(run, outputs=joined)


def joined(found: Any) -> np.ndarray:
    """The loss and each embedding's gradient of the loss's sum, so that all numbers are of one size."""
    value, gradients = found
    size = sum(len(gradient) for gradient in gradients)
    return np.concatenate([np.asarray(value)[None], *(size * np.asarray(gradient).ravel() for gradient in gradients)])


def _lightly_loss() -> Any:
    """Its class, without the packages around it: other losses in these need the torchvision of this very PyTorch."""
    for name in ("lightly.loss", "lightly.models", "lightly.models.modules", "lightly.models.utils"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return NTXentLoss


def cases(quick: bool) -> list[Case]:
    """The one."""
    pairs = 256 if quick else 4096
    return [
        Case(
            name=f"nt_xent-{pairs}",
            settings={"pairs": pairs, "features": FEATURES, "temperature": TEMPERATURE, "precision": "float32"},
            sides={
                "jaxgen": jaxgen,
                "jaxgen-blocks": functools.partial(jaxgen, block_size=min(BLOCK, pairs)),
                "lightly": lightly,
                "torch-masks": masks,
            },
            batch=pairs,
            unit="pairs",
            libraries={"lightly": ("torch", "lightly"), "torch-masks": ("torch",)},
            # The similarities, and two products of as many operations for the gradient.
            flops=lambda: 3 * 2 * (2 * pairs) ** 2 * FEATURES / pairs,
            tolerance=1e-4,
        )
    ]
