"""The Inception network behind the Fréchet inception distance and the inception score.

Szegedy et al. 2015 (arXiv:1512.00567) in the form of Google's graph of 2015-12-05, whose weights published scores are
made with (`jaxgen.pretrained`). With K a convolution, its normalisation and ReLU, M the maximum and P the mean over
3 x 3 pixels, ' for no padding and * for a stride of 2 besides, blocks concatenate branches:

    A(h) = [K1 h,    K5 K1 h,                  K3 K3 K1 h,                 K1 P h]                     (1)
    B(h) = [K3* h,                             K3* K3 K1 h,                M* h]                       (2)
    C(h) = [K1 h,    K7x1 K1x7 K1 h,           (K1x7 K7x1)^2 K1 h,         K1 P h]                     (3)
    D(h) = [K3* K1 h,                          K3* K7x1 K1x7 K1 h,         M* h]                       (4)
    E(h) = [K1 h,    [K1x3, K3x1] K1 h,        [K1x3, K3x1] K3 K1 h,       K1 P h]                     (5)

    h = M* K3' K1 M* K3 K3' K3* x,    h <- A, A, A, B, C, C, C, C, D, E, E,    features = mean of h      (6)

That graph is not the network of the paper, nor torchvision's: at borders P is the mean over the pixels that there are,
the last E has M in the place of P, and of its 1,008 logits 1,000 are classes. Layers have torchvision's names.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from jaxgen import checks
from jaxgen.nets.convolution import Conv
from jaxgen.nets.initialisation import constant, variance_scaling
from jaxgen.nets.normalisation import BatchNorm
from jaxgen.typing import Array

_LEAST = 75  # the smallest image of which one pixel is left
_FEATURES = (64, 192, 768, 2048)
_LOGITS = 1008


class Inception(nn.Module):
    """Eq. 6: features of images, by which sets of images are compared.

    ``apply(params, x [batch, height, width, 3]) -> [batch, features]``, float32, of images in [-1, 1]. Scores are
    comparable with others for images of 299 x 299 pixels, made by the function that made the others':
    `pytorch_fid_input`, `tensorflow_fid_input` or `clean_fid_input`; the network takes any of 75 x 75 and more.
    ``apply(params, features [batch, 2048], method="logits") -> [batch, 1008]`` is what the inception score takes.

        params = pretrained.load_inception("pt_inception-2015-12-05-6726825d.pth")
        features = jax.jit(nets.Inception().apply)(params, nets.pytorch_fid_input(images))

    Features of an image must not depend on its neighbours, so ``params`` have to hold 'batch_stats', as those do. For
    weights of one's own ``calibrate`` makes them.

    Accelerators multiply in less than float32 unless told otherwise. Scores that others should reproduce are computed
    under ``jax.default_matmul_precision("highest")``.

    Raises at trace time: TypeError for integer ``x``; ValueError for an ``x`` that is not [batch, height, width, 3] or
    is smaller than 75 x 75, ``params`` without statistics, ``features`` that are none of the four.

    Attributes:
        features: 2048, the last. Earlier ones, means over pixels too, need fewer images: 64, after the first maximum;
            192, after the second; 768, after the last C. The same ``params`` serve all.
    """

    features: int = 2048

    def setup(self) -> None:
        """Names the classifier, which has a call of its own."""
        self.fc = _Classifier()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the network."""
        self._check(x)
        h = _layer(x, "Conv2d_1a_3x3", 32, 3, strides=2)
        h = _layer(h, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        h = _layer(h, "Conv2d_2b_3x3", 64, 3)
        h = _halve(h)
        if self.features == 64:
            return _mean(h)
        h = _layer(h, "Conv2d_3b_1x1", 80, 1)
        h = _layer(h, "Conv2d_4a_3x3", 192, 3, padding="VALID")
        h = _halve(h)
        if self.features == 192:
            return _mean(h)
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            h = _Block(functools.partial(_a, pooled=pooled), name=f"Mixed_{name}")(h)
        h = _Block(_b, name="Mixed_6a")(h)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            h = _Block(functools.partial(_c, width=width), name=f"Mixed_{name}")(h)
        if self.features == 768:
            return _mean(h)
        h = _Block(_d, name="Mixed_7a")(h)
        h = _Block(functools.partial(_e, pool=_average), name="Mixed_7b")(h)
        h = _Block(functools.partial(_e, pool=_maximum), name="Mixed_7c")(h)
        features = _mean(h)
        if self.is_initializing():
            self.logits(features)
        return features

    def logits(self, features: Array, *, bias: bool = False) -> Array:
        """Logits of the last features: without the classifier's bias, as in Salimans et al.'s inception scores.

        Args:
            features: [batch, 2048].
            bias: whether it is added, as a classifier wants it.

        Returns:
            [batch, 1008], of which 1,000 are ImageNet's classes, in an order of that graph's own.

        Raises:
            ValueError: ``features`` have another shape.
            TypeError: they are not floating.
        """
        checks.floating("features", features)
        checks.shape("features", features, (None, _FEATURES[-1]))
        logits: Array = self.fc(features, bias)
        return logits

    def _check(self, x: Array) -> None:
        if self.features not in _FEATURES:
            raise ValueError(f"`features` must be one of {_FEATURES}, got {self.features!r}")
        checks.floating("x", x)
        checks.shape("x", x, (None, None, None, 3))
        if min(x.shape[1:3]) < _LEAST:
            raise ValueError(f"`x` must be at least {_LEAST} pixels high and wide, got shape {list(x.shape)}")
        calibrating = self.is_initializing() or self.is_mutable_collection("batch_moments")
        if not calibrating and "batch_stats" not in self.variables:
            raise ValueError(f"`params` must hold 'batch_stats' beside 'params', got {sorted(self.variables)}")


class _Layer(nn.Module):
    """K: a convolution without bias, normalisation by fixed statistics, ReLU."""

    features: int
    size: int | tuple[int, int]
    strides: int
    padding: str

    @nn.compact
    def __call__(self, h: Array) -> Array:
        conv = Conv(self.features, self.size, strides=self.strides, padding=self.padding, use_bias=False, name="conv")
        return nn.relu(BatchNorm(eps=1e-3, name="bn")(conv(h)))


class _Block(nn.Module):
    """One of Eqs. 1 to 5: the branches' results, one after the other."""

    branches: Callable[[Array], list[Array]]

    @nn.compact
    def __call__(self, h: Array) -> Array:
        return jnp.concatenate(self.branches(h), -1)


class _Classifier(nn.Module):
    """A linear layer whose bias may be left out."""

    @nn.compact
    def __call__(self, features: Array, add_bias: bool) -> Array:
        kernel = self.param("kernel", variance_scaling(), (features.shape[-1], _LOGITS))
        bias: Array = self.param("bias", constant(0.0), (_LOGITS,))
        logits = jnp.matmul(features.astype(kernel.dtype), kernel)
        return logits + bias if add_bias else logits


def _a(h: Array, *, pooled: int) -> list[Array]:
    return [
        _layer(h, "branch1x1", 64, 1),
        _chain(h, "branch5x5", (48, 1), (64, 5)),
        _chain(h, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        _layer(_average(h), "branch_pool", pooled, 1),
    ]


def _b(h: Array) -> list[Array]:
    inner = _chain(h, "branch3x3dbl", (64, 1), (96, 3))
    return [
        _layer(h, "branch3x3", 384, 3, strides=2),
        _layer(inner, "branch3x3dbl_3", 96, 3, strides=2),
        _halve(h),
    ]


def _c(h: Array, *, width: int) -> list[Array]:
    across, down = (width, (1, 7)), (width, (7, 1))
    return [
        _layer(h, "branch1x1", 192, 1),
        _chain(h, "branch7x7", (width, 1), across, (192, (7, 1))),
        _chain(h, "branch7x7dbl", (width, 1), down, across, down, (192, (1, 7))),
        _layer(_average(h), "branch_pool", 192, 1),
    ]


def _d(h: Array) -> list[Array]:
    small = _chain(h, "branch3x3", (192, 1))
    large = _chain(h, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)))
    return [
        _layer(small, "branch3x3_2", 320, 3, strides=2),
        _layer(large, "branch7x7x3_4", 192, 3, strides=2),
        _halve(h),
    ]


def _e(h: Array, *, pool: Callable[[Array], Array]) -> list[Array]:
    small = _chain(h, "branch3x3", (384, 1))
    large = _chain(h, "branch3x3dbl", (448, 1), (384, 3))
    return [
        _layer(h, "branch1x1", 320, 1),
        _layer(small, "branch3x3_2a", 384, (1, 3)),
        _layer(small, "branch3x3_2b", 384, (3, 1)),
        _layer(large, "branch3x3dbl_3a", 384, (1, 3)),
        _layer(large, "branch3x3dbl_3b", 384, (3, 1)),
        _layer(pool(h), "branch_pool", 192, 1),
    ]


def _layer(
    h: Array, name: str, features: int, size: int | tuple[int, int], *, strides: int = 1, padding: str = "SAME"
) -> Array:
    y: Array = _Layer(features, size, strides, "VALID" if strides > 1 else padding, name=name)(h)
    return y


def _chain(h: Array, name: str, *layers: tuple[int, int | tuple[int, int]]) -> Array:
    """Layers one after the other, numbered from 1."""
    for i, (features, size) in enumerate(layers, 1):
        h = _layer(h, f"{name}_{i}", features, size)
    return h


def _average(h: Array) -> Array:
    """P: the mean over the pixels that there are."""
    return nn.avg_pool(h, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(h: Array) -> Array:
    return nn.max_pool(h, (3, 3), (1, 1), "SAME")


def _halve(h: Array) -> Array:
    """M*."""
    return nn.max_pool(h, (3, 3), (2, 2), "VALID")


def _mean(h: Array) -> Array:
    return jnp.mean(h, axis=(1, 2))
