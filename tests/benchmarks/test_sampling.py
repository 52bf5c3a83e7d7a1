"""Sampling as it is measured: sides do the same work, and a program serves every solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import networks, rounds, sampling
from jaxgen import diffusion

# diffusers' own warnings, not ours.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("in_this_process")]


def quick(name):
    return next(case for case in sampling.cases(quick=True) if case.name == name)


def outputs(case, sides, batch=8):
    """Eight images, as there are devices to split them among."""
    works = {name: case.sides[name](batch) for name in sides}
    return {name: work.outputs(work.run()) for name, work in works.items()}


def agree(case, sides):
    rounds.check_outputs(outputs(case, sides), case)


def test_a_transformer_samples_alike_in_diffusers():
    pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")
    agree(quick("dit-tiny-dpmpp_2m-4-batch2"), ["jaxgen", "diffusers"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in sampling.cases(quick=True) if c.name.startswith("unet")], ids=lambda c: c.name
)
def test_sides_sample_alike(case):
    pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")
    agree(case, [name for name in case.sides if not name.endswith("-compiled") and name != "flaxdiff"])


def test_the_bare_evaluations_are_the_samplers():
    task = sampling.Task("dit-tiny", "heun", 2, 8)
    ours, bare = sampling.jaxgen(task, 8), sampling.network_only(task, 8)
    evaluated = bare.run()
    assert len(evaluated) == task.evaluations
    np.testing.assert_allclose(bare.outputs(evaluated), ours.outputs(ours.run()), rtol=0, atol=1e-3)


def test_another_solver_steps_eta_or_guidance_compile_nothing():
    """All of them are data of one program, which calls the network as often as they say."""
    network, params = networks.module("dit-tiny"), networks.parameters("dit-tiny")
    path = diffusion.linear_beta()
    traced, evaluated = [], []

    def draw(params, table, scale, x):
        traced.append(table)

        def denoiser(labels):
            def predict(x, t):
                jax.debug.callback(lambda: evaluated.append(1))
                return network.apply(params, x, t - 1, labels)[..., :4]

            return diffusion.clip_data(diffusion.denoiser(path, diffusion.noise, predict), -1.0, 1.0)

        labels = jnp.arange(len(x))
        guided = diffusion.cfg(denoiser(labels), denoiser(jnp.full_like(labels, networks.CLASSES)), scale)
        return diffusion.sample(jax.random.key(0), guided, table, x)

    program, x = jax.jit(draw), sampling.start("dit-tiny", 2)
    found = []
    for solver, steps, options, scale in [
        ("ddim", 3, {}, 1.0),
        ("ddim", 5, {}, 1.0),
        ("ddim", 3, {"eta": 0.7}, 1.0),
        ("ddim", 3, {}, 4.0),
        ("dpmpp_2m", 3, {}, 1.0),
        ("heun", 3, {}, 1.0),
        ("unipc", 3, {}, 1.0),
    ]:
        table = getattr(diffusion, solver)(path, diffusion.trailing_times(path, steps), **options)
        evaluated.clear()
        found.append(np.asarray(program(params, diffusion.pad(table, rows=8, slots=5), jnp.float32(scale), x)))
        jax.effects_barrier()
        assert len(evaluated) == 2 * len(table.times)  # with and without the class
    assert len(traced) == 1
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


def test_operations():
    """Those of PyTorch's own counter on diffusers' network, 12.1 billion, and of attention, which it leaves out."""
    attention = 4 * 256 * (5 * 256**2 + 16**2)  # logits and sums, over the pixels of five layers and of the middle
    assert networks.flops("unet") == 12_107_907_072 + attention


def test_operations_of_a_transformer():
    """Of S/2 the paper says 6.06 billion pairs of a product and a sum."""
    assert networks.flops("dit-s-2") == pytest.approx(2 * 6.06e9, rel=1e-3)


def test_cases_say_what_they_are():
    for case in (*sampling.cases(quick=True), *sampling.cases(quick=False)):
        assert next(iter(case.sides)) == "jaxgen"
        assert {"network", "solver", "steps", "evaluations", "batch", "precision"} <= case.settings.keys()
    assert quick("unet-tiny-heun-4-batch2").settings["evaluations"] == 7
