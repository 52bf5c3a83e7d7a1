"""The Dirac-GAN: Mescheder et al.'s game (arXiv:1801.04406, section 2), where losses turn in circles and penalties end it.

Data are at 0, the one sample at theta, the critic is psi x. With u = theta psi and a penalty of weight g on psi^2 / 2,

    d theta / dt = psi a(u),    d psi / dt = -theta b(u) - g psi

where a = b = 1 for Wasserstein and hinge (|u| < 1), a = b = s(u) for minimax, and a = s(-u), b = s(u) for the
nonsaturating and the relativistic loss, s the sigmoid. Around (0, 0) that is a turn by c = a(0) = b(0) a time, damped:
the eigenvalues are -g / 2 +- i sqrt(c^2 - g^2 / 4).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import gan

TURNS = {"wasserstein": 1.0, "hinge": 1.0, "minimax": 0.5, "nonsaturating": 0.5, "relativistic": 0.5}
PENALTIES = {"R1": (0.4, 0.0), "R2": (0.0, 0.4), "R1 and R2": (0.4, 0.4)}


def descent(loss, weights, point):
    theta, psi = point
    data = jnp.zeros(1)

    def discriminator(psi):
        scored = gan.scored(lambda x: psi * x, data, theta[None])
        penalty = weights[0] * scored.r1 + weights[1] * scored.r2
        return (loss.discriminator(scored.real_logits, scored.fake_logits) + 0.5 * penalty)[0]

    def generator(theta):
        return loss.generator(psi * data, psi * theta[None])[0]

    return -jnp.stack([jax.grad(generator)(theta), jax.grad(discriminator)(psi)])


def euler(velocity, point, step):
    return point + step * velocity(point)


def runge_kutta(velocity, point, step):
    k1 = velocity(point)
    k2 = velocity(point + step / 2 * k1)
    k3 = velocity(point + step / 2 * k2)
    k4 = velocity(point + step * k3)
    return point + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def radii(name, radius, time, steps, weights=(0.0, 0.0), method=runge_kutta):
    """Distances from the equilibrium, of a path that starts at theta = radius, psi = 0."""
    with jax.enable_x64(True):

        def advance(point, _):
            point = method(lambda point: descent(getattr(gan, name), weights, point), point, time / steps)
            return point, jnp.linalg.norm(point)

        start = jnp.array([radius, 0.0], jnp.float64)
        return np.asarray(jax.jit(lambda: jax.lax.scan(advance, start, None, length=steps)[1])())


@pytest.mark.parametrize("name", ["wasserstein", "hinge", "minimax"])
def test_where_one_player_loses_what_the_other_wins_the_radius_is_kept(name):
    np.testing.assert_allclose(radii(name, 1.0, 4 * np.pi, 400), 1, rtol=1e-5)


@pytest.mark.parametrize("name", TURNS)
def test_near_the_equilibrium_every_loss_turns_in_circles(name):
    np.testing.assert_allclose(radii(name, 0.05, 2 * np.pi / TURNS[name], 100), 0.05, rtol=0.01)


@pytest.mark.parametrize("name", ["nonsaturating", "relativistic"])
def test_beyond_it_two_losses_creep_inwards(name):
    """d r^2 / dt = -2 u tanh(u / 2), over a turn -r^4 / 8: 1 / r^2 grows by t / 8, and nothing is exponential."""
    radius = radii(name, 0.4, 200, 4000)[-1]
    np.testing.assert_allclose(1 / radius**2, 1 / 0.4**2 + 200 / 8, rtol=0.02)


@pytest.mark.parametrize("radius", [0.05, 1.0])
def test_relativistic_descent_without_a_penalty_does_not_converge(radius):
    """Huang et al. (arXiv:2501.05441), section 2: steps h lead to a circle, 1 / r^2 = 1 / (2 h), from in and out."""
    np.testing.assert_allclose(radii("relativistic", radius, 4000, 40000, method=euler)[-1], np.sqrt(0.2), rtol=0.1)


def test_wasserstein_descent_without_a_penalty_diverges():
    np.testing.assert_allclose(radii("wasserstein", 1.0, 10, 100, method=euler)[-1], 1.01**50, rtol=1e-10)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", TURNS)
def test_penalties_bring_every_loss_to_the_equilibrium(name, penalty):
    """Huang et al., section 2: locally, at the rate that the eigenvalues say."""
    weight = sum(PENALTIES[penalty])
    turn = 2 * np.pi / np.sqrt(TURNS[name] ** 2 - weight**2 / 4)
    radius = radii(name, 1e-3, turn, 200, PENALTIES[penalty])[-1]
    np.testing.assert_allclose(radius, 1e-3 * np.exp(-weight / 2 * turn), rtol=1e-4)
    assert radii(name, 1.0, 60, 600, PENALTIES[penalty])[-1] < 1e-3
