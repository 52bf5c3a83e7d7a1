"""UniPC: a multi-step predictor whose next evaluation corrects it, at no further cost.

Zhao et al. 2023 (arXiv:2302.04867). With the weights of `exponential_weights` (Eq. 3 there) the predictor from time t
to s extrapolates p known outputs, and the corrector interpolates them together with the output at the predicted x_s:

    UniP-p    x~_s = sigma_s / sigma x + alpha_s sum_j w_j d_j,                 u_j = 0, and p - 1 earlier ones    (1)
    UniC-p    x_s  = sigma_s / sigma x + alpha_s (w_* d(x~_s) + sum_j w_j d_j), u_j = 1, 0, and p - 1 earlier ones (2)

The paper's conditions on its weights fix them to these, whatever its function B(h), but where a single difference of
outputs is weighted: UniP-2 and UniC-1 take the published 1/2, and B matters,

    UniP-2    sum_j w_j d_j = (1 - e^-h) d + B(h) / 2 (d_before - d) / u_before                                   (3)
    UniC-1    w_* d(x~_s) + sum_j w_j d_j = (1 - e^-h) d + B(h) / 2 (d(x~_s) - d)                                 (4)

Row i of the table evaluates the predicted state, corrects it, and predicts the next.
"""

from collections.abc import Callable

import numpy as np

from jaxgen.diffusion.exponential import exponential_weights, half_log_snr, known_nodes
from jaxgen.diffusion.path import Path
from jaxgen.diffusion.tables import check_order, grid, with_history
from jaxgen.typing import ArrayLike, Table


def unipc(
    path: Path,
    times: ArrayLike,
    *,
    order: int = 2,
    corrector: bool = True,
    b: Callable[[float], float] = lambda h: -np.expm1(-h),
) -> Table:
    """UniPC-p, Eqs. 1 to 4: one evaluation a step, of order p + 1 (p without the corrector) after its start.

    The first steps have lower p; a last step to time 0, and one from alpha = 0, are DDIM's and are not corrected. The
    first step's error, O(h^3), or O(h^2) without the corrector, limits the global order to 3, or 2, unless that step is
    short.

    Args:
        path: the Gaussian path.
        times: [n + 1] strictly decreasing times in [0, path.t_max].
        order: the paper's p, 1, 2 or 3.
        corrector: False leaves UniP-p: `ddim` for order 1, and `dpmpp_2m` for order 2.
        b: the paper's B of a step's length h in log(alpha / sigma), h + O(h^2): its B_2, 1 - e^-h, by default ("bh2");
            ``lambda h: h`` is its B_1.

    Returns:
        A Table of n rows and ``order + 2`` slots.

    Raises:
        ValueError: the times are not decreasing or out of range, or ``order`` is none of the three.
    """
    check_order(order)
    times = grid(path, times)
    alpha, sigma, lam = path.alpha(times), path.sigma(times), half_log_snr(path, times)
    # Slots: the predicted state, the corrected state before, past outputs of the denoiser, the latest first.
    slots = order + 2
    unit = np.eye(slots + 2)
    present, past = unit[slots], unit[2:slots]

    def moved(i: int, state: np.ndarray, weights: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        return sigma[i + 1] / sigma[i] * state + alpha[i + 1] * weights @ outputs

    rows = []
    for i in range(len(times) - 1):
        state = unit[0]
        if corrector and i > 0 and np.isfinite(lam[i - 1]):
            weights = _corrector_weights(lam[i] - lam[i - 1], known_nodes(lam, i - 1, order), b)
            state = moved(i - 1, unit[1], weights, np.vstack([present, past[: len(weights) - 1]]))
        weights = _predictor_weights(lam[i + 1] - lam[i], known_nodes(lam, i, order), b)
        predicted = moved(i, state, weights, np.vstack([present, past[: len(weights) - 1]]))
        rows.append(with_history([predicted, state], slots))
    return Table(times[:-1], np.array(rows))


def _predictor_weights(h: float, nodes: list[float], b: Callable[[float], float]) -> np.ndarray:
    if len(nodes) == 2:
        back = 0.5 * b(h) / nodes[1]
        return np.array([-np.expm1(-h) - back, back])
    return exponential_weights(h, nodes)


def _corrector_weights(h: float, nodes: list[float], b: Callable[[float], float]) -> np.ndarray:
    """Weights of the output at the step's end, then of those at ``nodes``."""
    if len(nodes) == 1:
        return np.array([0.5 * b(h), -np.expm1(-h) - 0.5 * b(h)])
    return exponential_weights(h, [1.0, *nodes])
