"""The Fréchet distance: ``python -m benchmarks frechet``: seconds, and how much of the result is wrong.

Two sets of 10,000 features of 2,048 numbers, as Inception's are. What the distance is, is known: where the second set
is the first one moved by x -> A x + b with A symmetric and positive definite, no cheaper way to carry the one Gaussian
to the other exists (Brenier 1991), and with the first set's mean m and covariance C

    d^2 = |(A - I) m + b|^2 + tr (A - I) C (A - I)                                                (1)

This holds of samples' moments as they are. The covariances do not commute, and their eigenvalues fall as 1 / k.

    jaxgen         float32, by QR of the centred features
    scipy          float64, the formula of pytorch-fid: `scipy.linalg.sqrtm` of the product of the covariances
    eigenvalues    float64, the formula of torch-fidelity: the roots of that product's eigenvalues
"""

import functools
from collections.abc import Callable

import numpy as np

from benchmarks.case import Case, Work, compiled

RANK = 32


def features(rows: int, size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Two sets [rows, size], float32, and their squared distance by Eq. 1."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((rows, size), np.float32) / np.sqrt(np.arange(1, size + 1, dtype=np.float32))
    wide, narrow = first.astype(np.float64), rng.standard_normal((size, RANK)) / np.sqrt(size)
    moved = 0.9 * wide + 0.3 * (wide @ narrow) @ narrow.T + 0.02  # A = 0.9 + 0.3 N N^T
    step = moved - wide
    exact = np.sum(step.mean(axis=0) ** 2) + np.sum(step.var(axis=0, ddof=1))
    return first, moved.astype(np.float32), float(exact)


def jaxgen(rows: int, size: int, batch: int) -> Work:
    """One compiled program."""
    from jaxgen import metrics

    first, second, exact = features(rows, size)
    work = compiled(metrics.frechet_distance, first, second)
    return work._replace(run=lambda: [work.run() for _ in range(batch)], outputs=np.stack, quality=_quality(exact))


def formula(trace_of_root: Callable[[np.ndarray], float], rows: int, size: int, batch: int) -> Work:
    """Covariances, of whose product the root has this trace."""
    first, second, exact = features(rows, size)

    def distance() -> float:
        means = [one.mean(axis=0, dtype=np.float64) for one in (first, second)]
        covariances = [np.cov(one.astype(np.float64), rowvar=False) for one in (first, second)]
        root = trace_of_root(covariances[0] @ covariances[1])
        return float(np.sum((means[0] - means[1]) ** 2) + sum(np.trace(one) for one in covariances) - 2 * root)

    return Work(lambda: [distance() for _ in range(batch)], outputs=np.asarray, quality=_quality(exact))


def by_square_root(product: np.ndarray) -> float:
    """As pytorch-fid has it."""
    from scipy import linalg

    return float(np.trace(linalg.sqrtm(product)).real)


def by_eigenvalues(product: np.ndarray) -> float:
    """As torch-fidelity has it."""
    return float(np.sum(np.sqrt(np.linalg.eigvals(product).astype(complex))).real)


def _quality(exact: float) -> Callable[[np.ndarray], dict[str, float]]:
    return lambda found: {"relative_error": float(abs(found[0] - exact) / exact)}


def cases(quick: bool) -> list[Case]:
    """The one."""
    rows, size = (400, 64) if quick else (10_000, 2048)
    sides: dict[str, Callable[..., Work]] = {
        "jaxgen": jaxgen,
        "scipy": functools.partial(formula, by_square_root),
        "eigenvalues": functools.partial(formula, by_eigenvalues),
    }
    return [
        Case(
            name=f"frechet-{size}",
            settings={"rows": rows, "features": size},
            sides={name: functools.partial(side, rows, size) for name, side in sides.items()},
            batch=1,
            unit="distances",
            libraries={"scipy": ("scipy",), "eigenvalues": ("numpy",)},
        )
    ]
