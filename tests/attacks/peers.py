"""A small network that PyTorch and JAX share, and images in [0, 1] that it classifies."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@contextlib.contextmanager
def one_thread():
    """PyTorch on one thread: for networks as small as ours more of them take ten times as long."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(batch=24, shape=(8, 8, 1), hidden=24, classes=10):
    """Two layers of random weights: ``apply``, ``x`` and ``labels`` here, ``torch``, ``torch_x``, ``torch_labels`` there."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    first = rng.normal(size=(size, hidden), scale=size**-0.5).astype(np.float32)
    second = rng.normal(size=(hidden, classes), scale=3 * hidden**-0.5).astype(np.float32)
    x = np.clip(rng.uniform(-0.2, 1.2, size=(batch, *shape)), 0, 1).astype(np.float32)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(size, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes)
    ).eval()
    # PyTorch flattens channels first.
    rows = first.reshape(*shape, hidden).transpose(2, 0, 1, 3).reshape(size, hidden)
    with torch.no_grad():
        for layer, weights in ((net[1], rows), (net[3], second)):
            layer.weight.copy_(torch.tensor(weights.T.copy()))
            layer.bias.zero_()
    apply = lambda x: jax.nn.relu(x.reshape(x.shape[0], -1) @ first) @ second  # noqa: E731
    labels = jnp.argmax(apply(x), axis=1)
    return types.SimpleNamespace(
        apply=apply,
        x=jnp.asarray(x),
        labels=labels,
        torch=net,
        torch_x=torch.tensor(x.transpose(0, 3, 1, 2).copy()),
        torch_labels=torch.tensor(np.array(labels)),
        images=lambda images: jnp.asarray(images.detach().numpy().transpose(0, 2, 3, 1)),
    )
