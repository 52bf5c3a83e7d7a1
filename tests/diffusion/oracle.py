"""What the diffusion tests share: paths, solvers with their orders, and exact answers in NumPy float64.

For Gaussian data N(mean, std^2) the denoiser is affine in x, so a table maps mean and covariance of its buffer exactly:
`moments` follows them without drawing a sample. `run` reads a table as its type describes it, a second implementation of
`sample`. The `check_` functions raise AssertionError; the tests call them on the library, the mutation tests on defects.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import diffusion

PATHS = {
    "linear_beta": diffusion.linear_beta(),
    "cosine": diffusion.cosine(),
    "edm": diffusion.edm(),
    "rectified_flow": diffusion.rectified_flow(),
}

ORDERS = {
    "ddim": (diffusion.ddim, 1),
    "euler": (diffusion.euler, 1),
    "heun": (diffusion.heun, 2),
    "dpmpp_2s": (diffusion.dpmpp_2s, 2),
    "dpmpp_2m": (diffusion.dpmpp_2m, 2),
    "dpmpp_3m": (diffusion.dpmpp_3m, 3),
    "deis-1": (partial(diffusion.deis, order=1), 1),
    "deis-2": (partial(diffusion.deis, order=2), 2),
    "deis-3": (partial(diffusion.deis, order=3), 3),
    "unip-1": (partial(diffusion.unipc, order=1, corrector=False), 1),
    "unip-2": (partial(diffusion.unipc, order=2, corrector=False), 2),
    "unip-3": (partial(diffusion.unipc, order=3, corrector=False), 3),
    "unipc-1": (partial(diffusion.unipc, order=1), 2),
    "unipc-2": (partial(diffusion.unipc, order=2), 3),
    "unipc-2-bh1": (partial(diffusion.unipc, order=2, b=lambda h: h), 3),
    "unipc-3": (partial(diffusion.unipc, order=3), 4),
}
"""Deterministic solvers, each with the order of its end."""

STOCHASTIC = {
    "ddim-0.5": (partial(diffusion.ddim, eta=0.5), 1),
    "ddpm": (diffusion.ddpm, 1),
    "euler_ancestral": (diffusion.euler_ancestral, 1),
    "dpmpp_2m_sde": (diffusion.dpmpp_2m_sde, 2),
    "dpmpp_2m_sde-0.5": (partial(diffusion.dpmpp_2m_sde, eta=0.5), 2),
    "dpmpp_3m_sde": (diffusion.dpmpp_3m_sde, 2),
    "dpmpp_3m_sde-0.5": (partial(diffusion.dpmpp_3m_sde, eta=0.5), 2),
    "edm_stochastic": (partial(diffusion.edm_stochastic, s_churn=5.0), 2),
}
"""Stochastic solvers, each with the weak order of its variance on Gaussian data."""

MEAN_ORDERS = {
    "dpmpp_2m_sde-0.5": (STOCHASTIC["dpmpp_2m_sde-0.5"][0], 2),
    "dpmpp_3m_sde-0.5": (STOCHASTIC["dpmpp_3m_sde-0.5"][0], 3),
}
"""Solvers of the SDE with eta = 0.5, each with the weak order of its mean; at eta = 1 a Gaussian's is exact."""

EVERY = {name: entry[0] for name, entry in {**ORDERS, **STOCHASTIC}.items()}

MEAN = np.array([0.3, -0.5, 1.0])
STD = np.array([0.2, 0.6, 1.5])
MODES = np.array([[1.0, 0.0, 0.5], [-1.0, 0.5, 0.0]])
MIXTURE_START = 5.0 * np.random.default_rng(0).normal(size=(8, 3))


def interior_times(path: diffusion.Path, steps: int) -> np.ndarray:
    """Log-SNR uniform from ratio 20 to ratio 0.05, where every path is smooth; does not end at 0."""
    return diffusion.time_at_ratio(path, np.geomspace(20.0, 0.05, steps + 1))


def eased_times(path: diffusion.Path, steps: int) -> np.ndarray:
    """Log-SNR uniform with step h from ratio 5 to 0.1, the first step split at h^2.

    A multi-step method's first step is of first order: of length h^2 its error is O(h^4) and hides no order up to 4.
    """
    log_ratio = np.linspace(np.log(5.0), np.log(0.1), steps + 1)
    h = log_ratio[0] - log_ratio[1]
    return diffusion.time_at_ratio(path, np.exp(np.insert(log_ratio, 1, log_ratio[0] - h**2)))


def gaussian(path, mean=MEAN, std=STD):
    """The exact denoiser of N(mean, std^2), of NumPy arrays and one time."""

    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        return mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (x - alpha * mean)

    return denoise


def mixture(path, std=0.4):
    """The exact denoiser of two Gaussians of equal weight around `MODES`: not affine in x."""

    def denoise(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = (alpha * std) ** 2 + sigma**2
        offset = x[:, None] - alpha * MODES
        odds = -0.5 * (offset**2).sum(-1) / variance
        share = np.exp(odds - odds.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        return (share[..., None] * (MODES + alpha * std**2 / variance * offset)).sum(1)

    return denoise


def run(table, denoise, x, noise=None, others=0.0):
    """Reads a table as `Table` says: the state after the last row. ``noise``: [rows, *x.shape], for stochastic ones.

    ``others`` fills the slots that are not the state at the start; a real sampler's are zeros.
    """
    slots = table.weights.shape[1]
    buffer = [x, *[np.full_like(x, others)] * (slots - 1)]
    for r, (t, weights) in enumerate(zip(table.times, table.weights, strict=True)):
        answer = denoise(buffer[0], t) if np.any(weights[:, slots]) else np.zeros_like(x)
        fresh = np.zeros_like(x) if noise is None else noise[r]
        buffer = np.tensordot(weights, np.stack([*buffer, answer, fresh]), axes=1)
    return buffer[0]


def row_noise(key, rows, x):
    """The noise that `sample` draws in each row, read off by a table that does nothing but draw."""
    table = diffusion.Table(np.ones(rows), np.tile([[0.0, 0.0, 1.0]], (rows, 1, 1)))
    with jax.enable_x64(True):
        states = diffusion.trajectory(key, lambda x, t: x, table, jnp.asarray(x))
        return np.asarray(states[1:])


def marginal(path, t):
    """Mean and variance of x_t, [3] each."""
    return path.alpha(t) * MEAN, (path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2


def moments(path, table, mean, variance):
    """Mean and variance, [3] each, of the end of a sampler with the exact Gaussian denoiser, from those of its start."""
    slots = table.weights.shape[1]
    alpha, sigma = path.alpha(table.times)[:, None], path.sigma(table.times)[:, None]
    gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)  # d = shift + gain x
    shift = (1 - gain * alpha) * MEAN
    means, covariance = np.zeros((3, slots, 1)), np.zeros((3, slots, slots))
    means[:, 0, 0], covariance[:, 0, 0] = mean, variance
    for r, weights in enumerate(table.weights):
        linear = np.tile(weights[:, :slots], (3, 1, 1))
        linear[:, :, 0] += gain[r][:, None] * weights[:, slots]
        means = linear @ means + shift[r][:, None, None] * weights[:, slots : slots + 1]
        fresh = weights[:, slots + 1]
        covariance = linear @ covariance @ linear.transpose(0, 2, 1) + np.outer(fresh, fresh)
    return means[:, 0, 0], covariance[:, 0, 0]


def flow_error(path, build, steps):
    """Largest distance of a deterministic solver's end from the exact probability flow's, Gaussian data."""
    times = eased_times(path, steps)
    table = build(path, times)
    start, end = (times[-1], times[0]) if table.times[-1] > table.times[0] else (times[0], times[-1])
    x = np.random.default_rng(0).normal(size=(16, 3)) * path.sigma(start)
    stretch = np.sqrt(marginal(path, end)[1] / marginal(path, start)[1])
    exact = marginal(path, end)[0] + stretch * (x - marginal(path, start)[0])
    return np.abs(run(table, gaussian(path), x) - exact).max()


def mixture_error(path, build, steps):
    """The same for the mixture; in y = x / alpha and log rho, dy = (y - d) dlog rho, so one reference serves all paths."""
    times = eased_times(path, steps)
    x = run(build(path, times), mixture(path), MIXTURE_START * path.alpha(times[0]))
    return np.abs(x / path.alpha(times[-1]) - mixture_end()).max()


@cache
def mixture_end(steps=1000):
    """Where the flow of y carries `MIXTURE_START` from ratio 5 to 0.1: Runge and Kutta's fourth-order method."""
    denoise, y = mixture(diffusion.edm()), MIXTURE_START
    h = np.log(0.1 / 5.0) / steps

    def slope(y, log_ratio):
        return y - denoise(y, np.exp(log_ratio))

    for at in np.log(5.0) + h * np.arange(steps):
        k1 = slope(y, at)
        k2 = slope(y + 0.5 * h * k1, at + 0.5 * h)
        k3 = slope(y + 0.5 * h * k2, at + 0.5 * h)
        k4 = slope(y + h * k3, at + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def variance_error(path, build, steps):
    """Largest relative error of a stochastic solver's variance: the marginal's at the start must be so at the end."""
    times = eased_times(path, steps)
    mean, variance = moments(path, build(path, times), *marginal(path, times[0]))
    np.testing.assert_allclose(mean, marginal(path, times[-1])[0], atol=1e-12)
    return np.abs(variance / marginal(path, times[-1])[1] - 1).max()


def mean_error(path, build, steps, *, eta):
    """Largest error of the mean's response to a start off the marginal's mean, that of the SDE of the given eta.

    The drift is affine in eta, so the gain's logarithm is: at 0 it is the flow's, at 1 that of E[x_s | x_t].
    """
    times = eased_times(path, steps)
    (mean, variance), (mean_end, variance_end) = marginal(path, times[0]), marginal(path, times[-1])
    ratio = variance_end / variance
    gain = np.sqrt(ratio) ** (1 - eta) * (path.alpha(times[0]) / path.alpha(times[-1]) * ratio) ** eta
    return np.abs(moments(path, build(path, times), mean + 1.0, variance)[0] - mean_end - gain).max()


def observed_order(error, steps=160):
    """The order at which ``error(steps)`` falls."""
    return np.log2(error(steps) / error(2 * steps))


def check_order(path, build, nominal, error=flow_error, steps=160):
    order = observed_order(partial(error, path, build), steps)
    assert abs(order - nominal) < 0.2, f"observed order {order:.2f}, nominal {nominal}"


def check_ends_on_data(path, build, steps):
    """All data at one point: any solver in any number of steps ends on it."""
    table = build(path, diffusion.uniform_times(path, steps))
    assert np.all(np.isfinite(table.weights))
    x = path.sigma(table.times[0]) * np.random.default_rng(0).normal(size=(4, 2))
    noise = np.random.default_rng(1).normal(size=(len(table.times), 4, 2))
    np.testing.assert_allclose(run(table, lambda x, t: np.full_like(x, -0.25), x, noise), -0.25, rtol=1e-9)


def check_starts_afresh(path, build):
    """The end depends on the state at the start alone, not on what past calls may have left in the other slots."""
    table = build(path, interior_times(path, 6))
    x = np.random.default_rng(0).normal(size=(4, 3))
    ends = [run(table, gaussian(path), x, np.ones((len(table.times), 4, 3)), others) for others in (0.0, 1e3)]
    np.testing.assert_array_equal(*ends)


def check_posterior(path, build):
    """The row equals q(x_s | x_t, x0) by Bayes' rule: the product of two Gaussians in x_s, in precisions."""
    times = interior_times(path, 7)
    for i, (per_x, per_d, std) in enumerate(build(path, times).weights[:, 0]):
        a_t, a_s = path.alpha(times[i]), path.alpha(times[i + 1])
        s_t, s_s = path.sigma(times[i]), path.sigma(times[i + 1])
        forward = s_t**2 - (a_t / a_s) ** 2 * s_s**2  # x_t | x_s ~ N(a_t / a_s x_s, forward)
        precision = 1 / s_s**2 + (a_t / a_s) ** 2 / forward
        np.testing.assert_allclose(per_x, a_t / a_s / forward / precision, rtol=1e-9)
        np.testing.assert_allclose(per_d, a_s / s_s**2 / precision, rtol=1e-9)
        np.testing.assert_allclose(std**2, 1 / precision, rtol=1e-9)


def check_one_program(compiled, steps=(1, 3, 10), solvers=tuple(EVERY)):
    """``compiled(table, x, scale)``, from jax.jit: one trace for every solver, number of steps and guidance scale."""
    path = PATHS["edm"]
    for n in steps:
        times = diffusion.karras_times(path, n)
        for scale, build in enumerate(EVERY[name] for name in solvers):
            compiled(diffusion.pad(build(path, times), rows=24, slots=5), jnp.ones((4, 3)), float(scale))
    assert compiled._cache_size() == 1, f"{compiled._cache_size()} programs"


def halved_second_difference(table, path, times):
    """Turns `dpmpp_3m` into the authors' released code, which counts the second difference half."""
    lam = -np.log(diffusion.noise_ratio(path, times[times > 0]))
    weights = np.array(table.weights)
    for i in range(2, len(lam) - 1):
        h = lam[i + 1] - lam[i]
        second = np.array(
            [1 / np.prod([lam[j] - lam[k] for k in (i, i - 1, i - 2) if k != j]) for j in (i, i - 1, i - 2)]
        )
        integral = h**2 - 2 * h + 2 * (1 - np.exp(-h))  # of h e^{-h (1 - u)} (u h)^2
        weights[i, 0, [3, 1, 2]] -= 0.5 * path.alpha(times[i + 1]) * integral * second
    return diffusion.Table(table.times, weights)
