"""The same layers in PyTorch, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nets import ConvAutoencoder, calibrate, init


def torch_reference(torch, channels):
    nn = torch.nn
    layers, width = [], channels
    for i, features in enumerate((64, 128, 256, 512)):
        layers.append(nn.Conv2d(width, features, 4, 2, 1))
        layers += [nn.BatchNorm2d(features)] if i else []
        layers.append(nn.LeakyReLU(0.2))
        width = features
    for features in (256, 128, 64):
        layers += [nn.ConvTranspose2d(width, features, 4, 2, 1), nn.BatchNorm2d(features), nn.ReLU()]
        width = features
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())


def converted(torch, network):
    """Layers in order, by kind."""
    names = {
        torch.nn.Conv2d: iter([f"down_{i}" for i in range(4)]),
        torch.nn.ConvTranspose2d: iter([f"up_{i}" for i in range(4)]),
        torch.nn.BatchNorm2d: iter([f"down_norm_{i}" for i in (1, 2, 3)] + [f"up_norm_{i}" for i in range(3)]),
    }
    params = {}
    for layer in network:
        if type(layer) in names:
            weight, bias = (jnp.asarray(p.detach().numpy()) for p in (layer.weight, layer.bias))
            weight = {"scale": weight} if weight.ndim == 1 else {"kernel": weight.transpose(2, 3, 1, 0)}
            params[next(names[type(layer)])] = {**weight, "bias": bias}
    return {"params": params}


def test_agrees_with_torch():
    torch = pytest.importorskip("torch", reason="peer: torch is not installed")
    torch.manual_seed(0)
    network = torch_reference(torch, 3)
    for layer in network:
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.weight, 1.0, 0.2)
            torch.nn.init.normal_(layer.bias, 0.0, 0.2)
    x = np.random.default_rng(0).uniform(-1, 1, (3, 32, 48, 3)).astype(np.float32)
    inputs = torch.from_numpy(x.transpose(0, 3, 1, 2))
    model, params = ConvAutoencoder(), converted(torch, network)
    assert jax.tree.structure(params) == jax.tree.structure(init(model, jax.random.key(0), x))

    expected = network(inputs).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model.apply(params, x), expected, atol=1e-5)

    # Inference: torch's cumulative average over one batch, its variance made the biased one.
    calibrated = calibrate(model.apply, params, [x])
    np.testing.assert_allclose(model.apply(calibrated, x), expected, atol=1e-5)


def test_gradients_reach_every_parameter():
    model, x = ConvAutoencoder(), jax.random.uniform(jax.random.key(0), (2, 16, 32, 1), minval=-1.0)
    params = init(model, jax.random.key(1), x)
    gradients = jax.jit(jax.grad(lambda p: jnp.mean((model.apply(p, x) - x) ** 2)))(params)
    assert all(
        float(jnp.max(jnp.abs(g))) > 0 for path, g in jax.tree.leaves_with_path(gradients) if "bias" not in str(path)
    )


def test_bad_input_is_refused():
    with pytest.raises(
        ValueError, match=r"`x` must have a height and width that 16 divides, got shape \[1, 24, 32, 3\]"
    ):
        ConvAutoencoder().init(jax.random.key(0), jnp.ones((1, 24, 32, 3)))
    with pytest.raises(TypeError, match="`x` must be floating-point"):
        ConvAutoencoder().init(jax.random.key(0), jnp.ones((1, 32, 32, 3), jnp.uint8))
