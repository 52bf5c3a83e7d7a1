"""Parity with diffusers' schedulers in float64, wherever both can walk the same times.

diffusers numbers its training timesteps from 0; our time t is its timestep t - 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import diffusion
from tests.diffusion import oracle

torch = pytest.importorskip("torch", reason="install the extra [peers] to compare with diffusers")
diffusers = pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")

# diffusers converts tensors to arrays and back in ways that NumPy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SINGLE = 2e-6  # DPMSolverMultistepScheduler and EulerDiscreteScheduler cast the state to float32 in every step
KEY = jax.random.key(0)
PATH = diffusion.linear_beta(1000)
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
START = np.random.default_rng(0).normal(size=(2, 5))


def eps_model(x, t, xp):
    """A smooth nonlinear function, the same in both libraries; t is ours."""
    return xp.sin(1.3 * x + t / 300.0) * 0.7 + 0.1 * x


@jax.jit
def compiled(table):
    denoise = diffusion.denoiser(PATH, diffusion.noise, lambda x, t: eps_model(x, t[:, None], jnp))
    return diffusion.sample(KEY, denoise, table, jnp.asarray(START))


def ours(table):
    with jax.enable_x64(True):  # one program for every table: padded rows do nothing
        return np.asarray(compiled(diffusion.pad(table, rows=64, slots=5)))


def float64(scheduler):
    """diffusers builds its betas in float32: rebuild what is derived from them in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if hasattr(scheduler, "alpha_t"):
        scheduler.alpha_t = scheduler.alphas_cumprod.sqrt()
        scheduler.sigma_t = (1 - scheduler.alphas_cumprod).sqrt()
        scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
    for one in ("final_alpha_cumprod", "initial_alpha_cumprod", "one"):
        if hasattr(scheduler, one):
            setattr(scheduler, one, torch.tensor(1.0, dtype=torch.float64))
    return scheduler


def theirs(scheduler, **options):
    x = torch.tensor(START)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_model(x, t.double() + 1, torch), t, x, **options).prev_sample
    return x.numpy()


def on_shared_times(name, steps, *, last=0.0, **options):
    """A scheduler whose sigmas, which pass through float32, are replaced by those of our times; and the times."""
    scheduler = float64(getattr(diffusers, name)(**BETAS, **options))
    scheduler.set_timesteps(steps)
    times = np.append(scheduler.timesteps.numpy() + 1.0, last)
    scheduler.sigmas = torch.tensor(diffusion.noise_ratio(PATH, times))
    return scheduler, times


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim(steps):
    scheduler = float64(diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(steps)
    times = np.append(scheduler.timesteps.numpy() + 1.0, 0.0)
    # "leading" timesteps end at 0 and step to -steps' spacing, that is to the data.
    np.testing.assert_allclose(ours(diffusion.ddim(PATH, times)), theirs(scheduler), rtol=1e-10)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_noise(eta):
    """With eta > 0 the noise must be shared: ours is replayed to theirs."""
    scheduler = float64(diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True))
    scheduler.set_timesteps(10)
    table = diffusion.ddim(PATH, np.append(scheduler.timesteps.numpy() + 1.0, 0.0), eta=eta)
    noise = oracle.row_noise(KEY, 10, START)
    x = torch.tensor(START)
    for i, t in enumerate(scheduler.timesteps):
        out = eps_model(x, t.double() + 1, torch)
        x = scheduler.step(out, t, x, eta=eta, variance_noise=torch.tensor(noise[i])).prev_sample
    # their last step adds noise of variance "beta tilde" at t = 0, which is 0
    np.testing.assert_allclose(ours(table), x.numpy(), rtol=1e-10)


def test_ddpm(monkeypatch):
    scheduler = float64(diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small"))
    scheduler.set_timesteps(20)
    noise = iter(oracle.row_noise(KEY, 20, START))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: torch.tensor(next(noise)))
    x = torch.tensor(START)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_model(x, t.double() + 1, torch), t, x).prev_sample
    table = diffusion.ddpm(PATH, np.append(scheduler.timesteps.numpy() + 1.0, 0.0))
    # They clamp the variance at 1e-20, which shows only where it is 0: the last step, to which they add none.
    np.testing.assert_allclose(ours(table), x.numpy(), rtol=1e-9)


@pytest.mark.parametrize("steps", [5, 12, 30])
def test_dpmpp_2m(steps):
    scheduler, times = on_shared_times("DPMSolverMultistepScheduler", steps, solver_order=2, final_sigmas_type="zero")
    np.testing.assert_allclose(ours(diffusion.dpmpp_2m(PATH, times)), theirs(scheduler), rtol=SINGLE)


@pytest.mark.parametrize("steps", [5, 12, 30])
def test_dpmpp_3m(steps):
    """Theirs counts the second difference half, which makes it a method of order 2: see the mutations."""
    scheduler, times = on_shared_times(
        "DPMSolverMultistepScheduler",
        steps,
        solver_order=3,
        solver_type="heun",
        lower_order_final=False,
        final_sigmas_type="zero",
    )
    expected = theirs(scheduler)
    table = diffusion.dpmpp_3m(PATH, times)
    np.testing.assert_allclose(ours(oracle.halved_second_difference(table, PATH, times)), expected, rtol=SINGLE)
    assert np.abs(ours(table) - expected).max() > 1e-5


@pytest.mark.parametrize("steps", [5, 12])
def test_dpmpp_2m_sde(steps):
    scheduler, times = on_shared_times(
        "DPMSolverMultistepScheduler", steps, algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
    )
    noise = oracle.row_noise(KEY, steps, START)
    x = torch.tensor(START)
    for i, t in enumerate(scheduler.timesteps):
        out = eps_model(x, t.double() + 1, torch)
        x = scheduler.step(out, t, x, variance_noise=torch.tensor(noise[i])).prev_sample
    np.testing.assert_allclose(ours(diffusion.dpmpp_2m_sde(PATH, times)), x.numpy(), rtol=SINGLE)


def test_dpmpp_2s():
    """Their single-step solver takes pairs of steps of a grid; ours halves its own steps in lambda."""
    ratios = np.geomspace(100.0, 0.02, 13)
    times = diffusion.time_at_ratio(PATH, ratios)
    scheduler = float64(diffusers.DPMSolverSinglestepScheduler(**BETAS, solver_order=2, final_sigmas_type="sigma_min"))
    scheduler.set_timesteps(12)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(ratios), torch.tensor(times[:-1] - 1)
    np.testing.assert_allclose(ours(diffusion.dpmpp_2s(PATH, times[::2])), theirs(scheduler), rtol=1e-9)


@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, b):
    """Not to time 0, where theirs of order 3 would lower its last orders."""
    scheduler, times = on_shared_times(
        "UniPCMultistepScheduler", 12, last=0.3, solver_order=order, solver_type=b, lower_order_final=False
    )
    table = diffusion.unipc(PATH, times, order=order, b=(lambda h: h) if b == "bh1" else (lambda h: -np.expm1(-h)))
    np.testing.assert_allclose(ours(table), theirs(scheduler), rtol=1e-9)


def test_unipc_to_the_data():
    scheduler, times = on_shared_times("UniPCMultistepScheduler", 12, solver_order=2, final_sigmas_type="zero")
    np.testing.assert_allclose(ours(diffusion.unipc(PATH, times)), theirs(scheduler), rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    scheduler, times = on_shared_times(
        "DEISMultistepScheduler", 12, last=0.3, solver_order=order, lower_order_final=False
    )
    np.testing.assert_allclose(ours(diffusion.deis(PATH, times, order=order)), theirs(scheduler), rtol=1e-8)


def test_ddim_inversion():
    scheduler = float64(diffusers.DDIMInverseScheduler(**BETAS, clip_sample=False))
    scheduler.set_timesteps(10)
    table = diffusion.ddim_inversion(PATH, diffusion.leading_times(PATH, 10))
    np.testing.assert_array_equal(table.times, scheduler.timesteps.numpy() + 1)
    np.testing.assert_allclose(ours(table), theirs(scheduler), rtol=1e-9)


@pytest.mark.parametrize("steps", [7, 10, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings(spacing, steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = getattr(diffusion, f"{spacing}_times")(PATH, steps)
    np.testing.assert_array_equal(times, np.append(scheduler.timesteps.numpy() + 1.0, 0.0))


def test_leading_offset():
    scheduler = diffusers.DDIMScheduler(**BETAS, steps_offset=1)
    scheduler.set_timesteps(30)
    times = diffusion.leading_times(PATH, 30, offset=1)
    np.testing.assert_array_equal(times, np.append(scheduler.timesteps.numpy() + 1.0, 0.0))


def test_flow_matching_with_shift():
    path = diffusion.rectified_flow()
    times = diffusion.uniform_times(path, 9)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=list(times[:-1]))
    shifted = diffusion.shift_times(times, 3.0)
    np.testing.assert_allclose(shifted, scheduler.sigmas.numpy(), atol=1e-7)
    x = torch.tensor(START)
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(eps_model(x, sigma.double(), torch), t, x).prev_sample

    def denoise(x, t):  # eps_model as a velocity
        return x - t * eps_model(x, t, np)

    np.testing.assert_allclose(oracle.run(diffusion.euler(path, shifted), denoise, START), x.numpy(), rtol=1e-5)


def test_euler_ancestral(monkeypatch):
    """Their state is x / alpha: both see the EDM path."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(8)
    times = diffusion.karras_times(diffusion.edm(), 8)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(times), torch.arange(8, dtype=torch.float64)
    scheduler.is_scale_input_called = True
    noise = np.random.default_rng(1).normal(size=(8, *START.shape))
    draws = iter(noise)
    name = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(name, lambda *a, **k: torch.tensor(next(draws)))
    x = torch.tensor(START * 80)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.sin(x / (1 + times[i])), t, x).prev_sample

    def denoise(x, t):
        return x - t * np.sin(x / (1 + t))

    table = diffusion.euler_ancestral(diffusion.edm(), times)
    np.testing.assert_allclose(oracle.run(table, denoise, START * 80, noise), x.numpy(), rtol=1e-5, atol=1e-6)


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
    got = oracle.run(getattr(diffusion, solver)(path, times), lambda x, t: x0(x, t, np), START * 80)
    np.testing.assert_allclose(got, x.numpy(), rtol=SINGLE if solver == "euler" else 1e-9)
