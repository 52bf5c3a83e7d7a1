"""Images as sequences of tokens: cut into square patches and put together again.

Token i w + j of an image of h x w patches is the patch in row i and column j, its pixels flattened in the
order (row, column, channel): the linear layer on it is a convolution whose stride is its kernel's size.
"""

from jaxgen import checks
from jaxgen.typing import Array


def patchify(x: Array, patch: int) -> Array:
    """Cuts images into patches.

    Args:
        x: [batch, height, width, channels], of any dtype.
        patch: the patches' side; it divides height and width.

    Returns:
        [batch, (height / patch) (width / patch), patch^2 channels].

    Raises:
        ValueError: ``patch`` is not a positive integer, or does not divide ``x``.

    >>> import jax.numpy as jnp
    >>> patchify(jnp.zeros((1, 8, 4, 3)), 2).shape
    (1, 8, 12)
    """
    checks.shape("x", x, (None, None, None, None))
    checks.positive_integer("patch", patch)
    batch, height, width, channels = x.shape
    if height % patch or width % patch or 0 in x.shape:
        raise ValueError(f"`x` must have a height and width that `patch` = {patch} divides, got shape {list(x.shape)}")
    rows, columns = height // patch, width // patch
    x = x.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(tokens: Array, height: int, width: int) -> Array:
    """Puts patches together: the inverse of `patchify`, whose side and channels follow from the shapes.

    Args:
        tokens: [batch, tokens, patch^2 channels]; the patches are square, so height width / tokens = patch^2.
        height: of the images.
        width: of the images.

    Returns:
        [batch, height, width, channels].

    Raises:
        ValueError: no square patch fits.
    """
    checks.shape("tokens", tokens, (None, None, None))
    batch, count, length = tokens.shape
    patch = round((height * width / max(count, 1)) ** 0.5)
    if patch < 1 or height % patch or width % patch or (height // patch) * (width // patch) != count:
        raise ValueError(f"`tokens` must be square patches of {height} x {width}, got shape {list(tokens.shape)}")
    if length % patch**2:
        raise ValueError(f"`tokens` must have a length that {patch}^2 divides, got shape {list(tokens.shape)}")
    x = tokens.reshape(batch, height // patch, width // patch, patch, patch, length // patch**2).swapaxes(2, 3)
    return x.reshape(batch, height, width, length // patch**2)
