"""Parity with diffusers' schedulers in float64, wherever both can walk the same times.

diffusers numbers its training timesteps from 0; our time t is its timestep t - 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion

torch = pytest.importorskip("torch", reason="install the extra [peers] to compare with diffusers")
diffusers = pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")

# diffusers converts tensors to arrays in a way that NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SINGLE = 2e-6  # DPMSolverMultistepScheduler and EulerDiscreteScheduler cast the state to float32 in every step
KEY = jax.random.key(0)
PATH = diffusion.linear_beta(1000)
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
START = np.random.default_rng(0).normal(size=(2, 5))


def eps_model(x, t, xp):
    """A smooth nonlinear function, the same in both libraries; t is ours."""
    return xp.sin(1.3 * x + t / 300.0) * 0.7 + 0.1 * x


def ours(table, net=None):
    with jax.enable_x64(True):
        net = (lambda x, t: eps_model(x, t[:, None], jnp)) if net is None else net
        denoise = diffusion.denoiser(PATH, diffusion.noise, net)
        return np.asarray(diffusion.sample(KEY, denoise, table, jnp.asarray(START)))


def float64(scheduler):
    """diffusers builds its betas in float32: rebuild what is derived from them in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if hasattr(scheduler, "alpha_t"):
        scheduler.alpha_t = scheduler.alphas_cumprod.sqrt()
        scheduler.sigma_t = (1 - scheduler.alphas_cumprod).sqrt()
        scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "one"):
        scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def theirs(scheduler, **options):
    x = torch.tensor(START)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_model(x, t.double() + 1, torch), t, x, **options).prev_sample
    return x.numpy()


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim(steps):
    scheduler = float64(diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(steps)
    times = np.append(scheduler.timesteps.numpy() + 1.0, 0.0)
    # "leading" timesteps end at 0 and step to -steps' spacing, that is to the data.
    np.testing.assert_allclose(ours(diffusion.ddim(PATH, times)), theirs(scheduler), rtol=1e-10)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise(eta, monkeypatch):
    """With eta > 0 the noise must be shared: ours is replayed to theirs."""
    scheduler = float64(diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(10)
    table = diffusion.ddim(PATH, np.append(scheduler.timesteps.numpy() + 1.0, 0.0), eta=eta)
    noise = row_noise(10)
    x = torch.tensor(START)
    for i, t in enumerate(scheduler.timesteps):
        out = eps_model(x, t.double() + 1, torch)
        x = scheduler.step(out, t, x, eta=eta, variance_noise=torch.tensor(noise[i])).prev_sample
    # their last step adds noise of variance "beta tilde" at t = 0, which is 0
    np.testing.assert_allclose(ours(table), x.numpy(), rtol=1e-10)


def test_ddpm(monkeypatch):
    scheduler = float64(diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small"))
    scheduler.set_timesteps(20)
    noise = iter(row_noise(20))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: torch.tensor(next(noise)))
    x = torch.tensor(START)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_model(x, t.double() + 1, torch), t, x).prev_sample
    table = diffusion.ddpm(PATH, np.append(scheduler.timesteps.numpy() + 1.0, 0.0))
    # They clamp the variance at 1e-20, which shows only where it is 0: the last step, to which they add none.
    np.testing.assert_allclose(ours(table), x.numpy(), rtol=1e-9)


@pytest.mark.parametrize("steps", [5, 12, 30])
def test_dpmpp_2m(steps):
    scheduler = float64(
        diffusers.DPMSolverMultistepScheduler(
            **BETAS, solver_order=2, final_sigmas_type="zero", timestep_spacing="leading"
        )
    )
    scheduler.set_timesteps(steps)
    # Their sigmas pass through float32: give both the same ones.
    t = scheduler.timesteps.numpy() + 1.0
    scheduler.sigmas = torch.tensor(np.append(diffusion.noise_ratio(PATH, t), 0.0))
    times = np.append(t, 0.0)
    np.testing.assert_allclose(ours(diffusion.dpmpp_2m(PATH, times)), theirs(scheduler), rtol=SINGLE)


@pytest.mark.parametrize(
    ("scheduler", "solver"), [("EulerDiscreteScheduler", "euler"), ("HeunDiscreteScheduler", "heun")]
)
def test_euler_and_heun_on_karras_sigmas(scheduler, solver):
    """Their state is x / alpha: both see the EDM path, with a denoiser of x0."""
    peer = getattr(diffusers, scheduler)(**BETAS, prediction_type="sample", use_karras_sigmas=False)
    peer.set_timesteps(8)
    path = diffusion.edm()
    times = diffusion.karras_times(path, 8)
    sigmas = torch.tensor(times)
    if solver == "heun":
        peer.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        peer.timesteps = torch.arange(len(peer.sigmas) - 1, dtype=torch.float64)
    else:
        peer.sigmas, peer.timesteps = sigmas, torch.arange(8, dtype=torch.float64)
    peer._step_index = None

    def x0(x, sigma, xp):
        return xp.tanh(x / (1 + sigma))

    x = torch.tensor(START * 80)
    for i, t in enumerate(peer.timesteps):
        # Heun's second evaluation is at the next sigma.
        sigma = peer.sigmas[i] if solver == "euler" or i % 2 == 0 else peer.sigmas[i + 1]
        x = peer.step(x0(x, sigma, torch), t, x).prev_sample
    with jax.enable_x64(True):
        table = getattr(diffusion, solver)(path, times)
        got = diffusion.sample(KEY, lambda x, t: x0(x, t[:, None], jnp), table, jnp.asarray(START * 80))
    np.testing.assert_allclose(got, x.numpy(), rtol=SINGLE if solver == "euler" else 1e-9)


def row_noise(rows):
    """The noise that `sample` draws in each row, read off by a table that does nothing but draw."""
    table = diffusion.Table(np.ones(rows), np.tile([[0.0, 0.0, 1.0]], (rows, 1, 1)))
    with jax.enable_x64(True):
        states = diffusion.trajectory(KEY, lambda x, t: x, table, jnp.asarray(START))
        return np.asarray(states[1:])
