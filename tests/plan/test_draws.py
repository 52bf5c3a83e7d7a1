"""What the command ``plan`` compiles of samplers: their own steps, not the padding of their tables."""

import dataclasses

import jax
import pytest

from experiments import digits_diffusion, digits_gan, image_diffusion, image_gan
from jaxgen import place

SHAPE, CLASSES = (8, 8, 1), 10


def compiled(recipe, config):
    mesh = place.mesh(jax.devices()[:1])
    samples = recipe.Samples(config, SHAPE, CLASSES, mesh)
    params = place.state_shapes(recipe.method(config, SHAPE, CLASSES), mesh).average
    return samples.compiled(params, samples.own(), "quick", batch_size=3)


def test_a_sampler_of_twice_the_steps_costs_twice_as_much():
    config = dataclasses.replace(image_diffusion.smoke(digits_diffusion.CONFIG), sample_steps=3)
    few, many = (compiled(image_diffusion, dataclasses.replace(config, sample_steps=n)) for n in (3, 6))
    assert few.rows == 3
    assert few.flops > 0
    assert many.flops == pytest.approx(2 * few.flops)
    # What is done once, before and after the steps, is little.
    assert many.reading.traffic == pytest.approx(2 * few.reading.traffic, rel=0.2)


def test_samplers_without_tables():
    program = compiled(image_gan, image_gan.smoke(digits_gan.CONFIG))
    assert (program.fits, program.gradients, program.reading.collectives) == (True, 0, ())
