"""Moving averages whose length is chosen after training.

Karras et al. 2023 (arXiv:2312.02696, section 3). An average of the parameters theta over the times tau of training with
a power function as its profile,

    theta_hat(t) = (gamma + 1) / t^(gamma + 1)  integral from 0 to t of tau^gamma theta(tau) dtau              (1)

forgets the beginning at any length of training, and updates as an exponential average does, with a decay of its own at
each step:

    theta_hat <- beta theta_hat + (1 - beta) theta,    beta = (1 - 1 / t)^(gamma + 1)                       (2)

Its length is told by the profile's standard deviation, as a share of the training so far:

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))                                           (3)

Two such averages, stored now and then, span many more: the profile of any other length is approximated by a linear
combination of the stored ones, by least squares,

    w = argmin || sum_i w_i p_i - p ||^2,    i.e.  A w = b,  A_ij = <p_i, p_j>,  b_i = <p_i, p>             (4)
    <p_a, p_b> = (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1)  min(t_a, t_b)^(gamma_a + gamma_b + 1)
                 / (t_a^(gamma_a + 1) t_b^(gamma_b + 1))                                              (5)

and the same w combine the stored parameters. With t_a <= t_b, Eq. 5 is its first factor times (t_a / t_b)^gamma_b
/ t_b.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import checks
from jaxgen.train import Average
from jaxgen.typing import Array, Params

LONGEST = 12**-0.5
"""The sigma_rel of gamma = 0, which averages all of the training alike."""


def power_ema(sigma_rel: Sequence[float] = (0.05, 0.10)) -> Average:
    """Power-function averages of several lengths, Eqs. 1 and 2, for ``minimise(average=...)``.

    Store the state's ``average`` from time to time (every checkpoint holds one) and `reconstruct` gives any other
    length. The first step's parameters replace the initial draw at once, so there is no warm-up to choose.

    Args:
        sigma_rel: the lengths, each in (0, 0.2886]: 0.1 is an average over about the last tenth of the training.

    Returns:
        An Average whose value is a tuple of trees like the parameters, one per length, in the parameters' own dtype.

    Raises:
        ValueError: a length is out of range, or there is none.
    """
    exponents = _exponents(sigma_rel)

    def update(average: tuple[Params, ...], params: Params, step: Array) -> tuple[Params, ...]:
        log_kept = jnp.log1p(-1 / step.astype(jnp.float32))
        rates = [-jnp.expm1((gamma + 1) * log_kept) for gamma in exponents]
        return tuple(
            jax.tree.map(lambda old, new, rate=rate: old + rate.astype(new.dtype) * (new - old), one, params)
            for rate, one in zip(rates, average, strict=True)
        )

    return Average(init=lambda params: tuple(jax.tree.map(jnp.copy, params) for _ in exponents), update=update)


def power_weights(
    steps: Sequence[int], sigma_rel: Sequence[float], *, target: float, step: int | None = None
) -> np.ndarray:
    """The weights of Eq. 4, in float64 on the host.

    Args:
        steps: after how many steps each snapshot was stored, at least 1, all different.
        sigma_rel: the lengths that were averaged.
        target: the length wanted, in (0, 0.2886].
        step: at which step it is wanted; the last of ``steps`` by default.

    Returns:
        [snapshots, lengths].

    Raises:
        ValueError: an argument is out of range.
    """
    if not len(steps) or len(set(steps)) < len(steps):
        raise ValueError(f"`steps` must be different numbers, at least one, got {list(steps)}")
    for number in (*steps, *(() if step is None else (step,))):
        checks.positive_integer("steps", number)
    (wanted,) = _exponents([target], "target")
    times = np.repeat(np.array(steps, np.float64), len(sigma_rel))
    gammas = np.tile(_exponents(sigma_rel), len(steps))
    inner = _inner(times[:, None], gammas[:, None], times, gammas)
    against = _inner(times, gammas, float(max(steps) if step is None else step), wanted)
    # Profiles have norms of about t^-1/2: scaled to 1, the matrix is as well-conditioned as it can be.
    norms = np.sqrt(np.diag(inner))
    weights = np.linalg.lstsq(inner / np.outer(norms, norms), against / norms, rcond=1e-14)[0] / norms
    return weights.reshape(len(steps), len(sigma_rel))


def reconstruct(
    snapshots: Sequence[tuple[int, Sequence[Params]]],
    sigma_rel: Sequence[float],
    *,
    target: float,
    step: int | None = None,
) -> Params:
    """The average of another length, from stored snapshots of `power_ema`.

    Args:
        snapshots: (number of steps, the average then), in any order.
        sigma_rel: the lengths that were averaged.
        target: the length wanted, in (0, 0.2886]; best between the lengths that were averaged, or not far outside.
        step: at which step it is wanted; that of the last snapshot by default.

    Returns:
        A tree like the parameters, of NumPy arrays in their dtype, summed in float64.

    Raises:
        ValueError: an argument is out of range, or a snapshot holds another number of averages.
    """
    if not snapshots:
        raise ValueError("`snapshots` must hold at least one, got none")
    for number, averages in snapshots:
        if len(averages) != len(sigma_rel):
            raise ValueError(
                f"`snapshots` must hold {len(sigma_rel)} averages each, as `sigma_rel` does, "
                f"got {len(averages)} at step {number}"
            )
    weights = power_weights([number for number, _ in snapshots], sigma_rel, target=target, step=step).ravel()
    trees = [tree for _, averages in snapshots for tree in averages]

    def combine(*leaves: Array) -> np.ndarray:
        total = sum(w * np.asarray(leaf, np.float64) for w, leaf in zip(weights, leaves, strict=True))
        return np.asarray(total, leaves[0].dtype)

    return jax.tree.map(combine, *trees)


def _exponents(sigma_rel: Sequence[float], name: str = "sigma_rel") -> list[float]:
    """Solves Eq. 3 for gamma >= 0: the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2."""
    if not len(sigma_rel) or not all(0 < length <= LONGEST for length in sigma_rel):
        raise ValueError(f"`{name}` must lie in (0, {LONGEST:.4f}], got {list(sigma_rel)}")
    inverse = [length**-2.0 for length in sigma_rel]
    return [max(float(np.roots([1.0, 7.0, 16 - n, 12 - n]).real.max()), 0.0) for n in inverse]


def _inner(t_a, gamma_a, t_b, gamma_b):  # type: ignore[no-untyped-def]
    """Eq. 5, broadcasting."""
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    later_gamma = np.where(t_a < t_b, gamma_b, gamma_a)
    share = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return share * (earlier / later) ** later_gamma / later
