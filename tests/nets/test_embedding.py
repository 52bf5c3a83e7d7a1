"""Against a loop in NumPy float64 and, where installed, diffusers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nets import LabelEmbedding, init, time_embedding

T = np.array([0.0, 1.0, 17.5, 999.0])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_time_embedding(flip, shift):
    expected = np.empty((4, 12))
    for b, t in enumerate(T):
        for i in range(6):
            angle = t * 5000.0 ** (-i / (6 - shift))
            waves = (math.cos(angle), math.sin(angle)) if flip else (math.sin(angle), math.cos(angle))
            expected[b, i], expected[b, 6 + i] = waves
    ours = time_embedding(T, 12, max_period=5000.0, freq_shift=shift, flip_sin_to_cos=flip)
    np.testing.assert_allclose(ours, expected, atol=2e-4)  # float32 angles of up to 999


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.filterwarnings("default")
def test_time_embedding_agrees_with_diffusers(flip, shift):
    torch = pytest.importorskip("torch", reason="peer: torch is not installed")
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="peer: diffusers is not installed")
    expected = embeddings.get_timestep_embedding(torch.tensor(T), 32, flip, shift).numpy()
    ours = time_embedding(T, 32, freq_shift=shift, flip_sin_to_cos=flip)
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_labels_have_a_null_class_and_bounds():
    module = LabelEmbedding(3, 4)
    params = init(module, jax.random.key(0), jnp.array([0]))
    table = params["params"]["embedding"]
    assert table.shape == (4, 4)
    np.testing.assert_array_equal(module.apply(params, jnp.array([3, 0])), table[jnp.array([3, 0])])
    assert np.all(np.isnan(module.apply(params, jnp.array([4, -1]))))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"`t` must have shape \[any\], got \[\]"):
        time_embedding(1.0, 8)
    with pytest.raises(ValueError, match="`features` must be even and more than 2"):
        time_embedding(T, 7)
    with pytest.raises(TypeError, match=r"`labels` must be integers in \[0, 3\], got dtype float32"):
        LabelEmbedding(3, 4).init(jax.random.key(0), jnp.array([1.0]))
