"""Training as it is measured: sides take the same steps."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import networks, rounds, training

# diffusers' own warnings, not ours.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("in_this_process")]


def outputs(work, steps=2):
    return np.stack([work.outputs(work.run()) for _ in range(steps)])


def test_a_transformer_is_trained_alike_in_diffusers():
    pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")
    ours = outputs(training.stepped(functools.partial(training.diffusion, "dit-tiny", "float32"), 8))
    theirs = outputs(training.diffusion_in_torch("dit-tiny", "float32", 8))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[1, 1] < ours[0, 1]  # the loss, on the same images, noise and times


@pytest.mark.slow
@pytest.mark.parametrize("case", training.cases(quick=True), ids=lambda case: case.name)
def test_sides_train_alike(case):
    pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")
    told = {name: outputs(side(8))[0] for name, side in case.sides.items() if not name.endswith("-compiled")}
    rounds.check_outputs(told, case)


def test_a_step_costs_three_evaluations():
    """One forward and one for each of two kinds of gradients, but for the image's in the first layer."""
    counted = training.flops(functools.partial(training.diffusion, "dit-tiny", "float32"))
    forward = networks.flops("dit-tiny")
    patches = 2 * 64 * (2 * 2 * 4) * 64  # tokens, inputs and features of the first layer
    waves = 2 * 256 * 64  # the time's embedding has no gradient by its sinusoids either
    assert counted == 3 * forward - patches - waves


def test_cases_without_a_peer_run_the_experiments_steps():
    for case in training.cases(quick=True):
        shapes = jax.eval_shape(case.sides["jaxgen"].args[0]().method.init, jax.random.key(0))
        assert jax.tree.leaves(shapes)
